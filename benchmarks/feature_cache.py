"""Would it pay to store what leaves the trunk, since that does not depend on what learns?

    python benchmarks/feature_cache.py [--out runs/feature_cache.json]

A pass over the data costs trunk + twig for each sample. With stored states the first pass costs
writing as well, every later one reading + twig. So storing can pay from the second pass on, and at
most by the trunk's share of a step. Measured with the embedded base on the drawn data; for
LLaVA-1.5-7B the size and the share are arithmetic (python -m twigvlm.training.train --dry-run).
Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from twigvlm import flags  # isort: skip  (before torch: it says how threads wait)

import torch

from twigvlm.files import write_json
from twigvlm.record import provenance
from twigvlm.training.cost import make_plan
from twigvlm.training.data.loading import fill_in, read_data
from twigvlm.training.objectives import Ntp
from twigvlm.training.settings import Settings
from twigvlm.training.twig import Start, TwigLesson, prepare_twig

ROWS, REPEATS, PASSES = 8, 6, (1, 2, 3, 5)
DISK = 2e9  # bytes a second that the arithmetic for 7B grants to the disk


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(folder: Path) -> dict[str, float]:
    """Seconds a sample of each part, medians over micro-batches; bytes a sample."""
    settings = fill_in(Settings(device="cpu"))
    prepared = prepare_twig(None, Start(settings.K, settings.T), torch.device("cpu"), torch.bfloat16)
    data = read_data(settings, prepared.loaded, cache=folder, progress=False)
    lesson = TwigLesson(prepared.base, prepared.twig, Ntp())
    optimizer = torch.optim.AdamW(prepared.twig.parameters(), lr=settings.lr, fused=True)
    found: dict[str, list[float]] = {name: [] for name in ("trunk", "twig", "write", "read")}
    size = 0
    for turn in range(REPEATS + 1):  # the first one warms up
        batch = data.collate(data.dataset.__getitems__(range(turn * ROWS, (turn + 1) * ROWS)))
        kept: list = []

        def trunk(batch=batch, kept=kept) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                kept.append(lesson.read(batch))

        def twig(batch=batch, kept=kept) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = lesson.objective(kept[0], batch["labels"], prepared.twig, prepared.base)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        file = folder / "states.pt"
        spent = {"trunk": seconds(trunk), "twig": seconds(twig)}
        spent["write"] = seconds(lambda kept=kept, file=file: store(kept[0].hidden, file))
        size = file.stat().st_size
        forget(file)
        spent["read"] = seconds(lambda file=file: torch.load(file, weights_only=True))
        for name in found if turn else ():
            found[name].append(spent[name] / ROWS)
    return {f"{name}_seconds": median(values) for name, values in found.items()} | {"bytes": size / ROWS}


def store(states: torch.Tensor, file: Path) -> None:
    with open(file, "wb") as out:
        torch.save(states.bfloat16(), out)
        out.flush()
        os.fsync(out.fileno())


def forget(file: Path) -> None:
    """Out of the page cache, so that reading means the disk."""
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def speedups(trunk: float, twig: float, write: float, read: float) -> dict[str, float]:
    """Time without a store over time with it, by number of passes."""
    return {str(n): n * (trunk + twig) / (trunk + twig + write + (n - 1) * (max(read, 0) + twig)) for n in PASSES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/feature_cache.json"))
    args = flags.parse(parser, None)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    plan = make_plan(Settings(base="liuhaotian/llava-v1.5-7b"), devices=1)
    work, size = plan["flops_per_sample"], 2 * 4096 * plan["tokens_per_sample"]
    share = (work["tower"] + work["trunk"]) / sum(work.values())
    result = provenance() | {
        "sprout": found | {
            "trunk_share": found["trunk_seconds"] / (found["trunk_seconds"] + found["twig_seconds"]),
            "speedup_by_passes": speedups(*(found[f"{n}_seconds"] for n in ("trunk", "twig", "write", "read"))),
        },
        "llava-1.5-7b": {
            "bytes": size, "bytes_of_one_pass": size * plan["samples"], "trunk_share_of_work": share,
            "seconds_to_write_at_2_GB_a_second": size * plan["samples"] / DISK,
        },
    }  # fmt: skip
    write_json(result, args.out)
    sprout, big = result["sprout"], result["llava-1.5-7b"]
    print(f"sprout: {sprout['bytes'] / 1e3:.0f} KB a sample, trunk {100 * sprout['trunk_share']:.1f} % of a step")
    print(
        "speed with a store over without, by passes: "
        + ", ".join(f"{n}: {v:.2f}" for n, v in sprout["speedup_by_passes"].items())
    )
    print(
        f"LLaVA-1.5-7B: {big['bytes'] / 1e6:.1f} MB a sample, {big['bytes_of_one_pass'] / 1e12:.2f} TB for "
        f"{plan['samples']:,} samples, trunk {100 * big['trunk_share_of_work']:.1f} % of the work"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
