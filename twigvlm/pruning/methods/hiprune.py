"""HiPrune (arXiv 2508.00553, AAAI 2026 student abstract): what a middle layer of the tower looks at, with its
neighbours, and what the last one looks at.

A patch's score is the attention that it receives, mean over heads and over all tokens that ask, the class token
included. Anchors are the round(R * `alpha` / 5) highest of layer index 8 of CLIP's 24, buffers the patches left,
right, above and below of them, registers the rest by the layer that the decoder gets (index 22). Left and right
neighbours of a border patch are those of the next row, as released: they are indices -1 and +1, held within 0..V-1.
Ours: layer 8 scales with the layers that are read (index round(8/22 of the last)); where anchors and
buffers are more than R, anchors come first. R stays exact, order is the raster's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...errors import InputError
from ..plan import Shape, TowerMethod
from ..reducer import ALL, Leaving, Reducer, Tokens, View, best

MIDDLE = 8, 22  # layers of CLIP ViT-L: the middle one, the one that the decoder gets


def middle(read: int) -> int:
    """The middle layer of a tower whose layer `read` is the last that counts."""
    return round(read * MIDDLE[0] / MIDDLE[1])


def choose(early: torch.Tensor, late: torch.Tensor, n: int, anchors: int, side: int) -> torch.Tensor:
    """[B, n] indices in raster order, from what patches receive [B, V] in the middle and the last layer."""
    first = best(early, anchors)
    steps = torch.tensor([-1, 1, -side, side], device=first.device)
    around = (first[..., None] + steps).flatten(1).clamp(0, early.shape[1] - 1)
    rank = torch.zeros_like(late).scatter(1, around, 2.0).scatter(1, first, 4.0)  # shares of attention are below 1
    return best(late + rank, n)


@dataclass(frozen=True)
class Hierarchy(Leaving):
    anchors: int

    def listens(self, layer: int, read: int) -> str | None:
        return ALL if layer in (middle(read), read) else None

    def __call__(self, view: View) -> Tokens:
        early, late = view.received(middle(view.read)), view.received(view.read)
        return view.select(choose(early, late, self.n, self.anchors, view.side))


@dataclass(frozen=True)
class HiPrune(TowerMethod):
    """`alpha`: the share of R that anchors and their neighbours take, 0 to 1."""

    name: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = "HiPrune, arXiv 2508.00553"
    summary: ClassVar[str] = "attention received in a middle layer of the tower and in its last one"
    alpha: float = 0.1

    def reducer(self, n: int, shape: Shape) -> Reducer:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"hiprune:alpha={self.alpha:g}; 0 to 1 is needed")
        return Hierarchy(n, round(n * self.alpha / 5))
