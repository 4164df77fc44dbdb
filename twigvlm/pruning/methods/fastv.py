"""FastV (ECCV 2024): once, after layer 2, by that layer's attention from the last prompt token; nothing is wiped.

The count is TwigVLM's Eq. 4 for a method without wiping: n = (L*R - k*V) / (L - k), rounded, k layers
reading all tokens: 166, 98 and 30 of 576 at R = 192, 128 and 64. FastV's own count is the same average,
so `count=authors` changes nothing.
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
                f"{self.name} prunes after layer {self.layer}; 1 to {shape.L - 1} is possible with L = {shape.L}"
            )
        return Fraction(self.layer * shape.V, shape.L), Fraction(shape.V)

    def why(self, shape: Shape) -> str:
        return f"{self.name} keeps (L*R - {self.layer}*V) / (L - {self.layer}) of V (L={shape.L}, V={shape.V})"

    def kept(self, R: Fraction, shape: Shape) -> int:
        return round((shape.L * R - self.layer * shape.V) / (shape.L - self.layer))

    def plan(self, R: float, shape: Shape) -> Plan:
        n = self.kept(within(R, self.legal(shape), self.why(shape)), shape)
        return Plan(((self.layer, Keep(n, shape.V, Probe("layer", "last", layer=self.layer - 1))),))
