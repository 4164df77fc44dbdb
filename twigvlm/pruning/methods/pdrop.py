"""PyramidDrop (CVPR 2025): three cuts, each by the attention of the layer about to run, positions numbered anew.

The authors' cuts before 8, 16 and 24 of 32 cannot reach R below 144. For the budgets of the tables
they stand before 2, 10 and 20, keeping a, a/2 and a/4 of V (a community setting for R = 128, carried
on to the others): 312/156/78, 184/92/46 and 56/28/14 of 576 at R = 192, 128 and 64.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from ...errors import InputError
from ..budget import within
from ..plan import Method, Plan, Shape
from ..rule import Keep, Probe

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

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        return Fraction(self.cuts(shape.L)[0] * shape.V, shape.L), Fraction(shape.V)

    def shares(self, R: Fraction, shape: Shape) -> list[Fraction]:
        """Of V, above each cut: a, a/2 and a/4; where a = 1 is not enough, halves and quarters are filled up evenly."""
        cuts = (*self.cuts(shape.L), shape.L)
        layers = [b - a for a, b in itertools.pairwise(cuts)]
        wanted = shape.L * R / shape.V - cuts[0]  # full layers that the three stages may cost
        halving = sum((share * n for share, n in zip(SHARES, layers, strict=True)), Fraction(0))
        if wanted <= halving:
            return [share * wanted / halving for share in SHARES]
        filled = (wanted - halving) / (sum(layers) - halving)
        return [share + (1 - share) * filled for share in SHARES]

    def plan(self, R: float, shape: Shape) -> Plan:
        V, cuts = shape.V, self.cuts(shape.L)
        exact = within(R, self.legal(shape), f"{cuts[0]} layers read all tokens (L={shape.L}, V={V})")
        stages = tuple(
            (cut, Keep(round(share * V), V, Probe("peek", "last", layer=cut)))
            for cut, share in zip(cuts, self.shares(exact, shape), strict=True)
        )
        return Plan(stages, positions="compact")
