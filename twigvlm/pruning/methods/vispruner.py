"""VisPruner (ICCV 2025): a part by the class token's attention, the others unlike each other.

int(R * `ratio`) patches have the highest attention (layer that the decoder gets, mean over heads). The rest, by falling
attention, lose up to 8 a round: of the even ones, those most similar to any odd one (tower states before
the projector); the even ones left go in front, most similar first, then the odd ones. Until R are left; raster order.
`ratio` is 0.5 in the README (0.75 in an example for R = 64); per benchmark unpublished. Where the rest is of odd
length, which does not happen in the published settings, the even half has one more (our choice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...errors import InputError
from ..plan import Shape, TowerMethod
from ..reducer import Attended, Reducer, Tokens, View
from ..select import cosine

ROUND = 8  # patches that a round removes at most


def unlike(similarity: torch.Tensor, rest: torch.Tensor, n: int) -> torch.Tensor:
    """n of `rest` [B, N], indices into `similarity` [B, V, V]."""
    while rest.shape[1] > n:
        even, odd = rest[:, ::2], rest[:, 1::2]
        if odd.shape[1] == 0:  # one is left, and none is wanted
            return odd
        rows = similarity.gather(1, even[..., None].expand(-1, -1, similarity.shape[2]))
        near = rows.gather(2, odd[:, None].expand(-1, even.shape[1], -1)).amax(2)
        drop = min(ROUND, rest.shape[1] - n, even.shape[1])
        stay = near.argsort(dim=1, descending=True, stable=True)[:, drop:]
        rest = torch.cat([even.gather(1, stay), odd], 1)
    return rest


def prune(scores: torch.Tensor, similarity: torch.Tensor, n: int, important: int) -> torch.Tensor:
    """[B, n] indices in raster order, from attention [B, V] and cosines [B, V, V]."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    others = unlike(similarity, order[:, important:], n - important)
    return torch.cat([order[:, :important], others], 1).sort(1).values


@dataclass(frozen=True)
class Unlike(Attended):
    important: int

    def __call__(self, view: View) -> Tokens:
        return view.select(prune(view.attention().mean(1), cosine(view.patches), self.n, self.important))


@dataclass(frozen=True)
class VisPruner(TowerMethod):
    """`ratio`: the share of R that attention alone chooses, 0 to 1."""

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "VisPruner, ICCV 2025"
    summary: ClassVar[str] = "the class token's attention, then what is unlike"
    needs: ClassVar[str] = "class token"
    ratio: float = 0.5

    def reducer(self, n: int, shape: Shape) -> Reducer:
        if not 0 <= self.ratio <= 1:
            raise InputError(f"vispruner:ratio={self.ratio:g}; 0 to 1 is needed")
        return Unlike(n, int(n * self.ratio))
