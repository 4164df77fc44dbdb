"""HoloV (NeurIPS 2025): every part of the picture keeps tokens in proportion to what the class token sees there.

The raster is cut into runs (no squares) of V / C patches. As released: a run's quota is floor(R * its share of
attention), what is left over goes one each to the runs of largest share, and within a run the highest attention decides.
Tokens come run by run, by falling attention within (a run that is kept whole in raster order). The code's variance
term is a constant of each run's mean and changes nothing, so it is not computed; the paper scores differently.
A run whose quota exceeds it wastes tokens: zero vectors stand at the end, and the decoder reads them (as released).
`redistribute` gives them to the runs where most attention a kept token is left (ours; the paper's rule is not released).
C is floor(1024 / R) of 576 patches (16, 8 and 5; paper A.3) and in proportion for other V (ours); the released file has
16 and 64 written in. `crops` sets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...errors import InputError
from ..plan import Shape, TowerMethod
from ..reducer import Attended, Reducer, Tokens, View

PATCHES, PRODUCT = 576, 1024  # of LLaVA-1.5, and runs times R in the paper


def runs(V: int, crops: int) -> torch.Tensor:
    """[crops]: lengths; the first are one longer where V is no multiple."""
    return torch.tensor([V // crops + (i < V % crops) for i in range(crops)])


def choose(attention: torch.Tensor, n: int, crops: int, redistribute: bool) -> torch.Tensor:
    """[B, n] indices in the order of the output, -1 for zero vectors, from the class token's attention [B, V]."""
    B, V = attention.shape
    size = runs(V, crops)  # on the host, which knows how many there are
    run, start = (t.to(attention.device) for t in (torch.arange(crops).repeat_interleave(size), size.cumsum(0) - size))
    size = size.to(attention.device)
    order = attention.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, run[order].argsort(dim=1, stable=True))  # run by run, by falling attention
    rank = torch.arange(V, device=size.device) - start[run]  # of `order`, within its run
    quota = _quotas(attention.new_zeros(B, crops).index_add(1, run, attention) / size, n)[:, run]
    keep = rank < quota
    if redistribute:
        mass = attention.new_zeros(B, crops).index_add(1, run, attention)[:, run]
        last = torch.where(keep, torch.inf, mass / (rank + 1)).argsort(dim=1, descending=True, stable=True)
        keep = last.argsort(1) < n
        quota = torch.zeros_like(quota).scatter_add(1, run.expand(B, -1), keep.long()).gather(1, run.expand(B, -1))
    raster = torch.arange(V, device=size.device).expand(B, -1)
    order = torch.where(quota >= size[run], raster, order)
    front = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.where(keep.gather(1, front), order.gather(1, front), -1)


def _quotas(score: torch.Tensor, n: int) -> torch.Tensor:
    """[B, C] whole shares of n, from the scores [B, C] of the runs."""
    weight = score / score.sum(1, keepdim=True)
    quota = (weight * n).floor().long()
    place = weight.argsort(dim=1, descending=True, stable=True).argsort(1)
    return quota + (place < n - quota.sum(1, keepdim=True))


@dataclass(frozen=True)
class Runs(Attended):
    crops: int
    redistribute: bool = False

    def __call__(self, view: View) -> Tokens:
        index = choose(view.attention().mean(1), self.n, self.crops, self.redistribute)
        found = view.select(index.clamp(min=0))
        return Tokens(found.features * (index >= 0)[..., None], index)


@dataclass(frozen=True)
class HoloV(TowerMethod):
    """`crops`: runs of the raster; `redistribute`: no zero vectors."""

    name: ClassVar[str] = "holov"
    paper: ClassVar[str] = "HoloV, NeurIPS 2025"
    summary: ClassVar[str] = "the class token's attention, with a share for every part of the picture"
    needs: ClassVar[str] = "class token"
    crops: int | None = None
    redistribute: bool = False

    def reducer(self, n: int, shape: Shape) -> Reducer:
        V = shape.V
        crops = max(1, min(V, PRODUCT * V // (PATCHES * n))) if self.crops is None else self.crops
        if not 1 <= crops <= V:
            raise InputError(f"holov:crops={crops}; 1 to V={V} is needed")
        return Runs(n, crops, self.redistribute)
