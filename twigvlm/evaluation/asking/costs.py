"""What a run cost: one record a batch, beside the answers, and their sums.

So a run that was killed and went on reports the time of all its sessions. Standard library only.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...record import tokens_per_step
from .answers import FIGURES, read_lines

SUMMED = ("tokens", "late_tokens", "drafted", "accepted", "steps", "prefill_seconds", "decode_seconds")


def summary(folder: Path, asked: Sequence[str]) -> dict[str, Any]:
    """The figures of result.json, over all shards and sessions that wrote into the folder.

    `questions_timed` is less than the number of answers only where a power cut took figures along.
    Seconds are those at work: waiting between two sessions is not counted; shards work side by side,
    so `seconds` is the longest of them.
    """
    shards = [read_lines(file) for file in sorted(folder.glob(FIGURES))]
    lines = [line for shard in shards for line in shard]
    sessions = [line["session"] for line in lines if "session" in line]
    known = set(asked)
    batches = [line for line in lines if "questions" in line and known.issuperset(line["questions"])]
    total = {name: sum(b[name] for b in batches) for name in SUMMED}
    images = sum(b["images"] for b in batches)
    inside = total["prefill_seconds"] + total["decode_seconds"]
    return {
        "seconds": max((_seconds(shard) for shard in shards), default=0.0),
        "seconds_over_shards": sum(map(_seconds, shards)),
        "load_seconds": max((s["load_seconds"] for s in sessions), default=None),
        "generation_seconds": inside,
        "prefill_seconds": total["prefill_seconds"],
        "decode_seconds": total["decode_seconds"],
        "questions_timed": sum(len(b["questions"]) for b in batches),
        "new_tokens": total["tokens"],
        "tokens_per_second": _ratio(total["tokens"], inside),
        "decode_tokens_per_second": _ratio(total["late_tokens"], total["decode_seconds"]) or None,
        "tokens_per_second_per_sample": _per_sample(batches),
        "time_to_first_token": _weighted(batches, "prefill_seconds", lambda b: len(b["questions"])),
        "time_to_first_token_median": _median(batches, "prefill_seconds"),
        "drafted": total["drafted"],
        "accepted": total["accepted"],
        "steps": total["steps"],
        "acceptance": _ratio(total["accepted"], total["drafted"]),
        "tokens_per_step": tokens_per_step(total["accepted"], total["steps"]),
        "images": images,
        "visual_measured": _weighted(batches, "visual_measured", lambda b: b["images"]),
        "visual_authors": _weighted(
            [b for b in batches if b.get("visual_authors") is not None], "visual_authors", lambda b: b["images"]
        ),
        "visual_spread": spread([n for b in batches for n in b.get("visual_rows", ())]),
        "visual_kept": _weighted(batches, "visual_kept", lambda b: b["images"]),
        "visual_twig_share": _weighted(batches, "visual_twig_share", lambda b: b["images"]),
        "cache_bytes": max((b["cache_bytes"] for b in batches), default=None),
        "peak_memory_bytes": max((b["peak_memory_bytes"] for b in batches), default=None),
        "batch_sizes": sorted({s["batch_size"] for s in sessions}),
        "shards": len(shards),
        "sessions": sessions,
    }


def _seconds(shard: Iterable[Mapping[str, Any]]) -> float:
    return sum(line.get("wall_seconds", 0.0) for line in shard)


def _per_sample(batches: Sequence[Mapping[str, Any]]) -> float | None:
    """The paper's: each sample's tokens / (prefill + decode), averaged; None unless asked one by one."""
    if not batches or any(len(b["questions"]) > 1 for b in batches):
        return None
    return statistics.mean(b["tokens"] / (b["prefill_seconds"] + b["decode_seconds"]) for b in batches)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _weighted(batches: Sequence[Mapping[str, Any]], name: str, weight) -> float | None:
    weights = [weight(b) for b in batches]
    return _ratio(sum(w * b[name] for w, b in zip(weights, batches, strict=True)), sum(weights))


def _median(batches: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return statistics.median([b[name] for b in batches for _ in b["questions"]]) if batches else None


def spread(rows: Sequence[float]) -> dict[str, float] | None:
    """Mean, standard deviation and the quantiles of 5 and 95 %, of tokens a layer."""
    if not rows:
        return None
    ranked = sorted(rows)
    at = [ranked[round(share * (len(ranked) - 1))] for share in (0.05, 0.95)]
    return {"mean": statistics.fmean(rows), "sd": statistics.pstdev(rows), "5%": at[0], "95%": at[1]}
