"""FasterVLM (arXiv 2412.01818): the patches that the class token looks at most.

Its attention in the layer that the decoder gets, mean over heads; in raster order, without the class
token itself. The authors project all patches and then drop; here only the kept ones are projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..plan import Shape, TowerMethod
from ..reducer import Attended, Reducer, Tokens, View, best


@dataclass(frozen=True)
class Looked(Attended):
    def __call__(self, view: View) -> Tokens:
        return view.select(best(view.attention().mean(1), self.n))


@dataclass(frozen=True)
class FasterVLM(TowerMethod):
    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = "FasterVLM, arXiv 2412.01818"
    summary: ClassVar[str] = "the class token's attention in the tower"
    needs: ClassVar[str] = "class token"

    def reducer(self, n: int, shape: Shape) -> Reducer:
        return Looked(n)
