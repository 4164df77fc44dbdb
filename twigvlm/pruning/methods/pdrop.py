"""PyramidDrop (CVPR 2025): three cuts, each by the attention of the layer about to run, positions numbered anew.

The authors' cuts before 8, 16 and 24 of 32 cannot reach R below 144. For the budgets of the tables
they stand before 2, 10 and 20, keeping a, a/2 and a/4 of V (a community setting for R = 128, carried
on to the others): 312/156/78, 184/92/46 and 56/28/14 of 576 at R = 192, 128 and 64.
The authors' own cuts keep s, s^2 and s^3 of V, with s as R asks: 1/2, their ratio, at R = 270.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from ..budget import at_depth, shared_out, within
from ..plan import Method, Plan, Shape
from ..rule import Keep, Probe

SHARES = 10**6  # as fine as a share is found
CUTS = {"early": (2, 10, 20), "authors": (8, 16, 24)}  # layers of 32


@dataclass(frozen=True)
class PyramidDrop(Method):
    """`cuts=authors` (which `count=authors` means as well) cuts where the authors do."""

    name: ClassVar[str] = "pdrop"
    paper: ClassVar[str] = "PyramidDrop, CVPR 2025"
    summary: ClassVar[str] = "three cuts by the next layer's attention, positions compacted"
    cuts: Literal["early", "authors"] = "early"

    @property
    def theirs(self) -> bool:
        return "authors" in (self.cuts, self.count)

    def before(self, L: int) -> tuple[int, ...]:
        """The layers before which tokens are dropped."""
        return at_depth(CUTS["authors" if self.theirs else "early"], L, self.name)

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        return Fraction(self.before(shape.L)[0] * shape.V, shape.L), Fraction(shape.V)

    def kept(self, R: Fraction, shape: Shape) -> list[Fraction]:
        """Tokens above each cut."""
        cuts = (*self.before(shape.L), shape.L)
        layers = [b - a for a, b in itertools.pairwise(cuts)]
        total = shape.L * R - cuts[0] * shape.V
        if not self.theirs:
            return shared_out(total, layers, (Fraction(1), Fraction(1, 2), Fraction(1, 4)), shape.V)
        share = falling(total / shape.V, layers)
        return [shape.V * share**stage for stage in (1, 2, 3)]

    def plan(self, R: float, shape: Shape) -> Plan:
        V, cuts = shape.V, self.before(shape.L)
        exact = within(R, self.legal(shape), f"{cuts[0]} layers read all tokens (L={shape.L}, V={V})")
        stages = tuple(
            (cut, Keep(round(n), V, Probe("peek", "last", layer=cut)))
            for cut, n in zip(cuts, self.kept(exact, shape), strict=True)
        )
        return Plan(stages, positions="compact")


def falling(total: Fraction, layers: list[int]) -> Fraction:
    """The share s for which layers[0] s + layers[1] s^2 + layers[2] s^3 is `total`, to 1e-6."""
    low, high = 0, SHARES
    while low < high:
        middle = (low + high) // 2
        if sum(n * Fraction(middle, SHARES) ** (i + 1) for i, n in enumerate(layers)) < total:
            low = middle + 1
        else:
            high = middle
    return Fraction(low, SHARES)
