"""A coarser picture: tower states averaged over the cells of a grid, then projected.

What VTC-Bench (arXiv 2510.07143) does to the picture's size, for a tower of one size: the picture
would be enlarged again, so the grid of states is pooled. Adaptive average pooling to gh x gw; the grids and the
uneven rows where R is no product are those of `select.cells` (our choice). The tower costs as much as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..plan import Shape, TowerMethod
from ..reducer import Leaving, Reducer, Tokens, View
from ..select import cells


@dataclass(frozen=True)
class Pool(Leaving):
    """The mean of each cell, in the place of its middle."""

    def __call__(self, view: View) -> Tokens:
        grid, side, patches = cells(self.n, view.side), view.side, view.patches
        weight = torch.zeros(self.n, side, side)
        for out, (rows, columns, _) in zip(weight, grid, strict=True):
            out[rows.start : rows.stop, columns.start : columns.stop] = 1 / (len(rows) * len(columns))
        pooled = weight.flatten(1).to(patches.device) @ patches.float()
        middles = torch.tensor([middle for _, _, middle in grid], device=patches.device)
        return Tokens(view.project(pooled.to(patches)), middles.expand(len(patches), -1))


@dataclass(frozen=True)
class Downsample(TowerMethod):
    name: ClassVar[str] = "downsample"
    paper: ClassVar[str] = "control of VTC-Bench, arXiv 2510.07143"
    summary: ClassVar[str] = "average pooling of the tower's states on a coarser grid"

    def reducer(self, n: int, shape: Shape) -> Reducer:
        return Pool(n)
