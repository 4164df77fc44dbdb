"""The end of a run: what was learnt beside its description, the card, the curve, the authors' format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file

from ...files import copy, write_json, write_text
from ...loading.find import read_json
from ...model.twig import CONFIG, WEIGHTS
from ...record import provenance
from ..data.survey import counts
from ..settings import SKIPPED
from . import checkpoints
from .report import CARD, CURVE, LOG, card, history, plot


def write_results(job, last: Path, subject, prepared, made: dict, timing: dict) -> None:
    """Write what is left to write, from the run's last checkpoint, and say what there is.

    `subject` has learnt in `prepared` (see `training.subject`).

    `made`: split, batch_size, precision and processes of the run; `timing`: StepTimes' summary.
    """
    out, settings = job.out, job.settings
    tensors = subject.final(prepared, load_file(last / WEIGHTS))
    told, skipped = history(out), job.skips.skipped
    facts = {
        **provenance(), **made, "samples": len(job.data.usable), "held_out": len(job.data.held_out),
        "skipped": len(skipped), "clock": timing,
    }  # fmt: skip
    rows = subject.rows(job.facts, asdict(settings))
    with checkpoints.writing(f"the {settings.learn}", out):
        subject.write(out, tensors, job.facts)
        job.skips.write()
        plot(told, out / CURVE, subject.title(job.facts))
        named = facts | {"name": out.resolve().name}
        write_text(
            card(subject.card, job.facts, rows, asdict(settings), named, told, prepared.loaded.folder), out / CARD
        )
        stored = read_json(out / checkpoints.RUN)
        stored["finished"] = facts | {"settings": asdict(settings), "last": told[-1] if told else {}}
        write_json(stored, out / checkpoints.RUN)
    _say(out, settings.learn, timing, counts(skipped))
    if settings.export_release:
        export_release(out, Path(settings.export_release))


def _say(out: Path, what: str, timing: dict, left_out: dict[str, int]) -> None:
    if timing:
        print(
            f"a step takes {timing['step_seconds']:.3f} s = {timing['step_over_parts']:.3f} x its parts (trunk "
            f"{timing['trunk_seconds']:.3f}, twig {timing['twig_seconds']:.3f}, optimizer "
            f"{timing['optimizer_seconds']:.3f}); waiting for data {100 * timing['waiting_share']:.2f} %"
        )
    if left_out:
        print(f"left out: {', '.join(f'{n} {reason}' for reason, n in left_out.items())}; listed in {out / SKIPPED}")
    print(f"{out}: {what}, {CARD}, {CURVE}, {LOG}")


def export_release(folder: Path, file: Path) -> None:
    """A twig folder's weights as the authors publish them: one file, layers counted from 0, and no K."""
    with checkpoints.writing(file.name, file.parent, "free space, or choose another --export-release"):
        copy(folder / WEIGHTS, file)
    print(
        f"{file}: the twig in the authors' format; it stores no K: load it with K = {read_json(folder / CONFIG)['K']}"
    )
