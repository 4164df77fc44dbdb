"""Ours: the twig's score, and as many tokens as it takes to gather a share of it, picture and question by picture and question.

A question about one thing has a score that stands on few tokens, one about all of them does not. The smallest set
stays whose scores make up `mass` of all, `least` tokens an image at least and `most` at most; `mass` is calibrated so that R
is met on average. Cuts are the twig's: before layer K, and before layer F the image leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ...errors import InputError
from ..calibrated import settled
from ..plan import Plan, Shape
from ..rule import Probe, Rule, Seen, Selection, highest
from .twig import Twig

AROUND = 4  # a picture gets between a quarter and four times of what all get on average


@dataclass(frozen=True)
class Gathered(Rule):
    """The fewest tokens that gather `mass` of the score; `low` to `high` of V an image, pooled over a row's images."""

    mass: float
    low: int
    high: int
    V: int
    probe: Probe
    exact: ClassVar[bool] = False

    def most(self, total: int) -> int:
        return -(-self.high * total // self.V)

    def __call__(self, seen: Seen) -> Selection:
        real = seen.visual.real()
        scores = seen.scores.sum(1).masked_fill(~real, 0)
        best = scores.sort(dim=1, descending=True, stable=True).values
        gathered = best.cumsum(1) - best  # by those before
        count = (gathered < self.mass * scores.sum(1, keepdim=True)).sum(1)
        least = seen.budget(lambda total: -(-self.low * total // self.V))
        return Selection(highest(scores, real, count.clamp(min=least, max=seen.budget(self.most))))


@dataclass(frozen=True)
class TwigAdaptive(Twig):
    """`mass`: share of the score that is kept; `least`, `most`: tokens an image (default: a quarter and four times the average)."""

    name: ClassVar[str] = "twig-adaptive"
    paper: ClassVar[str] = "ours, after TwigVLM and OccamToken"
    summary: ClassVar[str] = "as many tokens as gather a share of the twig's score; the image leaves before layer F"
    selects: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True
    mass: float | None = None
    least: int | None = None
    most: int | None = None

    @property
    def fitted(self) -> tuple[str, ...]:
        return ("mass",)

    def plan(self, R: float, shape: Shape) -> Plan:
        plan = super().plan(R, shape)
        (before, keep), *wipe = plan.stages
        r = keep.r
        low = min(r, max(1, r // AROUND)) if self.least is None else self.least
        high = min(shape.V, AROUND * r) if self.most is None else self.most
        if not 0 <= low <= r <= high <= shape.V:
            raise InputError(
                f"twig-adaptive keeps {r} tokens an image on average at R = {float(R):g}, and least={low}, most={high} do not go around "
                f"it; 0 <= least <= {r} <= most <= V={shape.V} is needed"
            )
        gathered = Gathered(settled(self, R, shape).mass, low, high, keep.V, keep.probe)
        return replace(plan, stages=((before, gathered), *wipe))
