"""OccamToken (2026), an approximation: what gets more attention than a reference key stays, before the decoder and within.

The paper's reference is a register token that certain neurons of the tower write into; which neurons, and the second
threshold, are not said, and no code is out. So here it is a key that is there already: in the tower the class token
itself (a patch stays that its attention goes to at least `first` times as much as to itself), in the decoder, before
layer 12 of 32, the first text token (a patch stays whose highest attention from a text token is at least
`second` times the mean that the first token gets). What is said of OccamToken is not thereby said of this.

How many stay depends on picture and question: both thresholds are calibrated, to three times as many tokens
before the cut as behind it. The authors' labels count the final tokens; with `count=authors` R is that, of
`first` = 0.015.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from ...model.stream import fit
from ..budget import at_depth, shared_out, within
from ..calibrated import settled
from ..plan import Method, Plan, Shape
from ..reducer import CLASS, Reducer, Tokens, View
from ..rule import Probe, Rule, Seen, Selection

CUT = 12  # of 32
RATIO = (Fraction(3), Fraction(1))  # of tokens before and behind it
THEIRS = 0.015  # their first threshold is 0.01 to 0.02 of the register's attention


@dataclass(frozen=True)
class Above(Reducer):
    """Patches that the class token looks at at least `first` times as much as at itself; one stays in any case."""

    first: float
    class_token: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def most(self, V: int) -> int:
        return V

    def listens(self, layer: int, read: int) -> str | None:
        return CLASS if layer == read else None

    def __call__(self, view: View) -> Tokens:
        row = view.taps[view.read].weights()[:, :, 0].mean(1)  # I N
        own, others = row[:, :1], row[:, 1:]
        keep = others >= self.first * own
        keep = keep.scatter(1, others.argmax(1, keepdim=True), True)
        width, _ = fit(keep, view.V)
        order = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        return view.select(order, count=keep.sum(1))


@dataclass(frozen=True)
class Referred(Rule):
    """Tokens that some text token looks at at least `second` times as much as the text does at its first token."""

    second: float
    probe: Probe
    exact: ClassVar[bool] = False

    def most(self, total: int) -> int:
        return total

    def __call__(self, seen: Seen) -> Selection:
        real, asked = seen.visual.real(), seen.heard.asked.real()
        text = (seen.prompt.visual < 0) & seen.prompt.real()
        first = seen.prompt.take(text.to(torch.uint8).argmax(1, keepdim=True))
        reference = seen.heard.by_head(first).mean(1)[..., 0].sum(1) / asked.sum(1).clamp(min=1)
        return Selection(real & (seen.scores.amax(1) >= self.second * reference[:, None]))


@dataclass(frozen=True)
class OccamToken(Method):
    """`first`, `second`: thresholds in the tower and in the decoder, as shares of the reference's attention."""

    name: ClassVar[str] = "occamtoken"
    paper: ClassVar[str] = "OccamToken, arXiv 2605.29657 (approximation)"
    summary: ClassVar[str] = "approximation: what gets more attention than a reference key, without register neurons"
    needs: ClassVar[str] = "class token"
    selects: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True
    first: float | None = None
    second: float | None = None

    @property
    def fitted(self) -> tuple[str, ...]:
        return ("second",) if self.count == "authors" else ("first", "second")

    def aim(self, setting: str, R: float, shape: Shape) -> tuple[int | None, float]:
        if self.count == "authors":
            return shape.L - 1, R
        if setting == "second":
            return None, R
        (cut,) = at_depth((CUT,), shape.L, self.name)
        return 0, float(shared_out(shape.L * Fraction(R), (cut, shape.L - cut), RATIO, shape.V)[0])

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        return Fraction(1), Fraction(shape.V)

    def plan(self, R: float, shape: Shape) -> Plan:
        (cut,) = at_depth((CUT,), shape.L, self.name)
        exact = within(R, self.legal(shape), f"an image has V={shape.V} tokens")
        found = settled(self, exact, shape)
        first = THEIRS if found.first is None else found.first
        return Plan(((cut, Referred(found.second, Probe("layer", "text", layer=cut - 1))),), Above(first))

    def authors(self, entering: Sequence[float]) -> float:
        """The final ones."""
        return entering[-1]
