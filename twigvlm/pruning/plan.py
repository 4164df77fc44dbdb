"""A pruning method as data: where it acts, which attention row it wants to see, how many it keeps.

Knows nothing of masks, caches and positions; the road (decoding.loop) looks up the scores that a
stage's probe names, asks `select`, and does the cutting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Rows = Literal["last", "text"]


@dataclass(frozen=True)
class Probe:
    """A row of head-averaged attention: of the last twig layer, or of base layer `layer`.

    `rows` is "last" (the last prompt token, as released) or "text" (the sum over the text after the
    last image, the paper's Eq. 3).
    """

    source: Literal["twig", "base"]
    rows: Rows = "last"
    layer: int | None = None  # of the base


@dataclass(frozen=True)
class Stage:
    """Before base layer `before`, `keep` = r of V visual tokens an image stay: those scored highest.

    Without a probe the tokens are drawn at random (from `seed`). `keep` = 0 drops the image.
    """

    before: int
    keep: int
    probe: Probe | None = None
    seed: int = 0

    def select(self, scores: torch.Tensor | None, visual: int, budget: int) -> torch.Tensor:
        """Sorted indices (0..visual-1) of the `budget` tokens that stay, of one row's visual tokens.

        `scores` fp32 [visual], or None without a probe. Ties go to the earlier token.
        """
        if budget == 0:
            return torch.empty(0, dtype=torch.long)
        if scores is None:
            generator = torch.Generator().manual_seed(self.seed)
            scores = torch.rand(visual, generator=generator)
        order = scores.sort(descending=True, stable=True).indices
        return order[:budget].sort().values


@dataclass(frozen=True)
class Plan:
    """Stages in the order of their layers. The empty plan prunes nothing."""

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        layers = [s.before for s in self.stages]
        assert layers == sorted(set(layers)), f"stages must be in the order of their layers: {layers}"

    @property
    def needs_twig(self) -> bool:
        return any(s.probe is not None and s.probe.source == "twig" for s in self.stages)

    def tokens_per_layer(self, layers: int, visual: int) -> list[int]:
        """Visual tokens of one image that enter each base layer."""
        counts, now = [], visual
        cuts = {s.before: s.keep for s in self.stages}
        for layer in range(layers):
            now = cuts.get(layer, now)
            counts.append(now)
        return counts
