"""TwigVLM (ICCV 2025, section 3.2): the last twig layer's attention keeps r tokens from K on, and none from F on."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from ..budget import kept_tokens, legal_range
from ..plan import Method, Plan, Shape
from ..rule import Keep, Probe, Rows, Wipe


@dataclass(frozen=True)
class Twig(Method):
    """`query`: the rows whose attention is the score, "last" (as released) or "text" (the paper's Eq. 3)."""

    name: ClassVar[str] = "twig"
    paper: ClassVar[str] = "TwigVLM, ICCV 2025"
    summary: ClassVar[str] = "attention of the last twig layer; the image leaves before layer F"
    needs: ClassVar[str] = "twig"
    trained: ClassVar[bool] = True
    query: Rows = "last"

    def probe(self, shape: Shape) -> Probe | None:
        return Probe("twig", self.query)

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        return legal_range(shape.L, shape.V, shape.K, shape.F)

    def plan(self, R: float, shape: Shape) -> Plan:
        r = kept_tokens(R, shape.L, shape.V, shape.K, shape.F)
        wipe = ((shape.F, Wipe()),) if shape.F < shape.L else ()
        return Plan(((shape.K, Keep(r, shape.V, self.probe(shape))), *wipe))
