"""The end of a run: the twig beside its description, the card, the curve, the authors' format."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file

from ...files import write_json, write_text
from ...loading.find import read_json
from ...model.twig import CONFIG, WEIGHTS, Twig, write_twig
from ...record import provenance
from ..data.survey import counts
from ..lora import has_adapters, merged
from ..settings import SKIPPED
from . import checkpoints
from .report import CARD, CURVE, LOG, card, history, plot


def write_results(job, last: Path, twig: Twig, made: dict, timing: dict) -> None:
    """Write what is left to write, from the run's last checkpoint, and say what there is.

    `made`: split, batch_size, precision and processes of the run; `timing`: StepTimes' summary.
    """
    out, settings = job.out, job.settings
    tensors = load_file(last / WEIGHTS)
    if has_adapters(twig):
        tensors = merged(tensors, twig)
    told, skipped = history(out), job.skips.skipped
    facts = {
        **provenance(), **made, "samples": len(job.data.usable), "held_out": len(job.data.held_out),
        "skipped": len(skipped), "clock": timing,
    }  # fmt: skip
    with checkpoints.writing("the twig", out):
        write_twig(out, tensors, job.facts)
        job.skips.write()
        plot(told, out / CURVE, f"Twig of {job.facts['base']}, K = {job.facts['K']}, T = {job.facts['T']}")
        write_text(card(job.facts, asdict(settings), facts, told), out / CARD)
        stored = read_json(out / checkpoints.RUN)
        stored["finished"] = facts | {"settings": asdict(settings), "last": told[-1] if told else {}}
        write_json(stored, out / checkpoints.RUN)
    _say(out, timing, counts(skipped))
    if settings.export_release:
        export_release(out, Path(settings.export_release))


def _say(out: Path, timing: dict, left_out: dict[str, int]) -> None:
    if timing:
        print(
            f"a step takes {timing['step_seconds']:.3f} s = {timing['step_over_parts']:.3f} x its parts (trunk "
            f"{timing['trunk_seconds']:.3f}, twig {timing['twig_seconds']:.3f}, optimizer "
            f"{timing['optimizer_seconds']:.3f}); waiting for data {100 * timing['waiting_share']:.2f} %"
        )
    if left_out:
        print(f"left out: {', '.join(f'{n} {reason}' for reason, n in left_out.items())}; listed in {out / SKIPPED}")
    print(f"{out}: twig, {CARD}, {CURVE}, {LOG}")


def export_release(folder: Path, file: Path) -> None:
    """A twig folder's weights as the authors publish them: one file, layers counted from 0, and no K."""
    part = file.with_name(file.name + ".part")
    with checkpoints.writing(file.name, file.parent, "free space, or choose another --export-release"):
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / WEIGHTS, part)
        os.replace(part, file)
    print(
        f"{file}: the twig in the authors' format; it stores no K: load it with K = {read_json(folder / CONFIG)['K']}"
    )
