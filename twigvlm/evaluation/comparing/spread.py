"""How much of a score is chance: bootstrap over pictures, a method and the base asked the same questions.

The official scorers know corpora, not questions (F1, sums of pairs), so that a block's value is its
jackknife pseudo-value: the score of all answers against that without the block. For a mean over
questions that is the block's own mean, and the bootstrap the ordinary one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ...errors import InputError
from ..asking.answers import MERGED, read_lines
from ..asking.job import Job

BLOCKS = 50  # at most: each costs a score
RESAMPLES, LEVEL = 1000, 0.95


@dataclass(frozen=True)
class Blocks:
    """Questions that are drawn together: how many each block holds, and its value."""

    sizes: np.ndarray
    values: np.ndarray


def blocks_of(job: Job) -> list[list[int]]:
    """Places of the questions that belong together: about one picture, or counted as one by the benchmark."""
    owner: dict[object, int] = {}
    found: list[list[int]] = []
    for first in range(0, len(job.questions), job.task.together):
        places = range(first, min(first + job.task.together, len(job.questions)))
        at = owner.setdefault(job.questions[first].images or first, len(found))
        if at == len(found):
            found.append([])
        found[at] += places
    many = -(-len(found) // BLOCKS)
    return [list(chain(*found[i : i + many])) for i in range(0, len(found), many)]


def measure(job: Job, score: float) -> Blocks | None:
    """Of a job that is done and has this score; None where the scorer makes nothing of a part of it."""
    lines, blocks = read_lines(job.folder.path / MERGED), blocks_of(job)
    if len(blocks) < 2:
        return None
    n, sizes, values = len(lines), [], []
    try:
        for gone in blocks:
            without = job.score_without(lines, gone).score
            if without is None:
                return None
            share = n / len(gone)
            sizes.append(len(gone))
            values.append(share * score - (share - 1) * without)
    except InputError:
        return None
    sizes, values = np.array(sizes, float), np.array(values)
    return Blocks(sizes, values - np.average(values, weights=sizes) + score)


def together(many: Sequence[Blocks | None]) -> Blocks | None:
    """The mean over several runs on the same questions, seeds say."""
    if not many or any(one is None for one in many):
        return None
    return Blocks(many[0].sizes, np.mean([one.values for one in many], axis=0))


def interval(pairs: Sequence[tuple[Blocks | None, Blocks | None]]) -> tuple[float, float] | None:
    """Of RelAcc, percent: the mean over benchmarks of (a method's score / the base's), from their blocks."""
    if not pairs or any(ours is None or theirs is None for ours, theirs in pairs):
        return None
    rng, ratios = np.random.default_rng(0), []
    for ours, theirs in pairs:
        drawn = rng.integers(len(ours.sizes), size=(RESAMPLES, len(ours.sizes)))
        above, below = ((one.sizes * one.values)[drawn].sum(1) for one in (ours, theirs))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(np.where(below > 0, above / below, np.nan))
    means = np.mean(ratios, axis=0)
    means = means[np.isfinite(means)]
    if not len(means):
        return None
    low, high = np.quantile(100 * means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
