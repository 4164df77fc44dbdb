"""Every so many patches: the control without any signal, in two dimensions.

A stride along the raster would fall into columns; see `select.cells` for the grid, and for what
happens where R is no product of two numbers (our choice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..plan import Shape, TowerMethod
from ..reducer import Leaving, Reducer, Tokens, View
from ..select import cells


@dataclass(frozen=True)
class Middles(Leaving):
    """The patch in the middle of each cell."""

    def __call__(self, view: View) -> Tokens:
        middles = torch.tensor([middle for _, _, middle in cells(self.n, view.side)], device=view.patches.device)
        return view.select(middles.expand(len(view.patches), -1))


@dataclass(frozen=True)
class Uniform(TowerMethod):
    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "control"
    summary: ClassVar[str] = "patches on a coarser grid, whatever they show"

    def reducer(self, n: int, shape: Shape) -> Reducer:
        return Middles(n)
