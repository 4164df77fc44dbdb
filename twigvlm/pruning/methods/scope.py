"""SCOPE (NeurIPS 2025): patches that the class token looks at and that cover the whole picture.

A patch is worth its attention (layer that the decoder gets, summed over heads, to the power `power`) times what it
adds to the coverage: over all patches, by how much its cosine to them exceeds that of the best chosen one. Tower
states before the projector; greedy, raster order. The authors' power is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import InputError
from ..plan import Shape, TowerMethod
from ..reducer import Attended, Reducer, Tokens, View
from ..select import cosine, covering


@dataclass(frozen=True)
class Cover(Attended):
    power: float = 1.0

    def __call__(self, view: View) -> Tokens:
        weight = view.attention().sum(1) ** self.power
        return view.select(covering(cosine(view.patches), weight, self.n).sort(1).values)


@dataclass(frozen=True)
class Scope(TowerMethod):
    """`power`: of the attention; 0 leaves coverage alone."""

    name: ClassVar[str] = "scope"
    paper: ClassVar[str] = "SCOPE, NeurIPS 2025"
    summary: ClassVar[str] = "the class token's attention times coverage"
    needs: ClassVar[str] = "class token"
    power: float = 1.0

    def reducer(self, n: int, shape: Shape) -> Reducer:
        if not 0 <= self.power <= 10:
            raise InputError(f"scope:power={self.power:g}; 0 to 10 is needed")
        return Cover(n, self.power)
