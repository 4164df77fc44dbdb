"""DivPrune (CVPR 2025): patches that are far from each other, whatever is asked.

Max-min diversity over the projected features, by cosine distance: first the patch whose nearest
neighbour is farthest, then greedily the one that is farthest from all chosen. In raster order. The
authors search the distances anew in every step and read R as a share of V; the choice is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..plan import Shape, TowerMethod
from ..reducer import Leaving, Reducer, Tokens, View
from ..select import cosine, farthest


def diverse(similarity: torch.Tensor, n: int) -> torch.Tensor:
    """[B, n]: tokens in the order in which they are chosen, from their cosines [B, V, V]."""
    B, V = similarity.shape[:2]
    similarity = torch.maximum(
        similarity, similarity.transpose(1, 2)
    )  # two that are each other's nearest tie, to the bit
    # Each is its own nearest, so the neighbour is the second of its row.
    neighbour = similarity.topk(min(2, V), dim=2).values[..., -1]
    first = neighbour.argmin(1, keepdim=True)
    taken = torch.zeros(B, V, dtype=torch.bool, device=first.device).scatter(1, first, True)
    nearest = similarity.gather(1, first[..., None].expand(-1, -1, V))[:, 0]
    return torch.cat([first, farthest(similarity, nearest, taken, n - 1)], 1)


@dataclass(frozen=True)
class Diverse(Leaving):
    projects_all: ClassVar[bool] = True

    def __call__(self, view: View) -> Tokens:
        return view.select(diverse(cosine(view.projected), self.n).sort(1).values)


@dataclass(frozen=True)
class DivPrune(TowerMethod):
    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "DivPrune, CVPR 2025"
    summary: ClassVar[str] = "max-min diversity of the projected features"

    def reducer(self, n: int, shape: Shape) -> Reducer:
        return Diverse(n)
