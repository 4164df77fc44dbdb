"""How many visual tokens a sampled set keeps: the paper's schedule from many to few (arXiv 2503.14075v3, Eq. 16), or one R.

The paper's seven r are 41, 72, … 227, in equal steps from R = 64 to R = 192 of 576 tokens; here the same shares of V.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ...config import TwigConfig
from ...errors import InputError
from ...pruning import kept_tokens, legal_range

PAPER_V, PAPER_R, STEPS = 576, (64, 192), 7
SHARPNESS = 8.0  # of the schedule at its end
SPREAD = 1.0  # what weighs the attention term grows by this between the smallest and the largest r


@dataclass(frozen=True)
class Budgets:
    """r by step of the schedule, rising; a single one is a static budget. `V` tokens an image."""

    r: tuple[int, ...]
    V: int

    @classmethod
    def of(cls, config: TwigConfig, V: int, R: float | None) -> Budgets:
        """The paper's schedule, or what R leaves. Raises InputError for an R outside the legal range, or that keeps nothing."""
        if R is not None:
            r = kept_tokens(R, config.L, V, config.K, config.F)
            if r == 0:
                raise InputError(
                    f"budget is {R:g}, which keeps no visual token above layer {config.K}: nothing can be chosen"
                )
            return cls((r,), V)
        low, high = (_nearest(share / PAPER_V * V, config, V) for share in PAPER_R)
        steps = [low + round(i * (high - low) / (STEPS - 1)) for i in range(STEPS)]
        return cls(tuple(dict.fromkeys(steps)), V)

    def probabilities(self, progress: float) -> list[float]:
        """Of each r, at a share of the training: even at its start, the smallest alone at its end."""
        if progress >= 1:
            return [1.0] + [0.0] * (len(self.r) - 1)
        weights = [math.exp(-SHARPNESS * progress**2 * i) for i in range(len(self.r))]
        return [w / sum(weights) for w in weights]

    def draw(self, progress: float, numbers: random.Random, samples: int = 1) -> list[int]:
        return numbers.choices(self.r, self.probabilities(progress), k=samples)

    def weight(self, r: int) -> float:
        """w of the released code, whose square weighs the attention term: 1 for the smallest r, 2 for the largest."""
        low, high = self.r[0], self.r[-1]
        return 1 + SPREAD * (r - low) / (high - low) if high > low else 1.0

    def most(self, images: Sequence[int], r: Sequence[int]) -> list[int]:
        """Tokens of each sample's images, pooled."""
        return [min(n * self.V, n * k) for n, k in zip(images, r, strict=True)]


def _nearest(R: float, config: TwigConfig, V: int) -> int:
    """r at an R, or at the nearest that is legal; one token at least."""
    low, high = legal_range(config.L, V, config.K, config.F)
    return max(1, kept_tokens(float(min(max(R, float(low)), float(high))), config.L, V, config.K, config.F))
