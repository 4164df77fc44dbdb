"""PyramidDrop (CVPR 2025): three cuts, each by the attention of the layer about to run, positions numbered anew.

The authors' cuts before 8, 16 and 24 of 32 cannot reach R below 144. For the budgets of the tables
they stand before 2, 10 and 20, keeping a, a/2 and a/4 of V (a community setting for R = 128, carried
on to the others): 312/156/78, 184/92/46 and 56/28/14 of 576 at R = 192, 128 and 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from ...errors import InputError
from ..budget import within
from ..plan import Keep, Method, Plan, Probe, Shape

CUTS = (Fraction(2, 32), Fraction(10, 32), Fraction(20, 32))  # of the depth
SHARES = (Fraction(1), Fraction(1, 2), Fraction(1, 4))  # of a


@dataclass(frozen=True)
class PyramidDrop(Method):
    name: ClassVar[str] = "pdrop"
    paper: ClassVar[str] = "PyramidDrop, CVPR 2025"
    summary: ClassVar[str] = "three cuts by the next layer's attention, positions compacted"

    def cuts(self, L: int) -> tuple[int, int, int]:
        """The layers before which tokens are dropped."""
        first, second, third = (max(1, round(share * L)) for share in CUTS)
        second = max(second, first + 1)
        third = max(third, second + 1)
        if third >= L:
            raise InputError(
                f"pdrop makes three cuts, and a decoder of L = {L} layers has room for fewer; L >= 4 is needed"
            )
        return first, second, third

    def _weight(self, L: int) -> Fraction:
        """Layers at a*V tokens that would cost what the three stages cost."""
        cuts = (*self.cuts(L), L)
        return sum((share * (cuts[i + 1] - cuts[i]) for i, share in enumerate(SHARES)), Fraction(0))

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        first = self.cuts(shape.L)[0]
        return Fraction(first * shape.V, shape.L), (first + self._weight(shape.L)) * shape.V / shape.L

    def plan(self, R: float, shape: Shape) -> Plan:
        L, V, cuts = shape.L, shape.V, self.cuts(shape.L)
        exact = within(
            R, self.legal(shape), f"pdrop keeps a, a/2 and a/4 of V from layers {cuts} on, a in 0..1 (L={L}, V={V})"
        )
        a = (L * exact - cuts[0] * V) / (V * self._weight(L))
        stages = tuple(
            (cut, Keep(round(a * share * V), V, Probe("peek", "last", layer=cut)))
            for cut, share in zip(cuts, SHARES, strict=True)
        )
        return Plan(stages, positions="compact")
