"""FastV (ECCV 2024): once, after layer 2, by that layer's attention from the last prompt token; nothing is wiped.

The count is TwigVLM's Eq. 4 for a method without wiping: n = (L*R - k*V) / (L - k), rounded, k layers
reading all tokens: 166, 98 and 30 of 576 at R = 192, 128 and 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from ...errors import InputError
from ..budget import within
from ..plan import Method, Plan, Shape
from ..rule import Keep, Probe


@dataclass(frozen=True)
class FastV(Method):
    """`layer`: layers that read all tokens; the attention of the last of them is the score."""

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "FastV, ECCV 2024"
    summary: ClassVar[str] = "attention of layer 2 (1-based), once; the image stays to the end"
    layer: int = 2

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        if not 1 <= self.layer < shape.L:
            raise InputError(
                f"fastv prunes after layer {self.layer}; 1 to {shape.L - 1} is possible with L = {shape.L}"
            )
        return Fraction(self.layer * shape.V, shape.L), Fraction(shape.V)

    def plan(self, R: float, shape: Shape) -> Plan:
        k, L, V = self.layer, shape.L, shape.V
        exact = within(R, self.legal(shape), f"fastv keeps (L*R - {k}*V) / (L - {k}) of V (L={L}, V={V})")
        n = round((L * exact - k * V) / (L - k))
        return Plan(((k, Keep(n, V, Probe("layer", "last", layer=k - 1))),))
