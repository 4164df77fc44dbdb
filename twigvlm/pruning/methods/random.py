"""The floor: a new draw for every sample, repeated by its seed, whatever the batch.

The draw stands where another method's cut would: `schedule=twig` (under the twig's budget, with its wipe),
`fastv` (FastV's cut and count, positions kept), or `input` (R tokens of every picture before the decoder,
in raster order, numbered as in the shorter prompt).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch

from ..budget import within
from ..plan import Plan, Shape
from ..reducer import Leaving, Tokens, View, best
from ..rule import Keep, Probe, uniform
from .fastv import FastV
from .twig import TwigBudget


@dataclass(frozen=True)
class Draw(Leaving):
    """n patches of every image, from its seed."""

    draws: ClassVar[bool] = True

    def __call__(self, view: View) -> Tokens:
        scores = torch.stack([uniform(seed, view.V) for seed in view.draws]).to(view.patches.device)
        return view.select(best(scores, self.n))


@dataclass(frozen=True)
class Random(TwigBudget):
    """`schedule`: whose cuts, see above."""

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "control"
    summary: ClassVar[str] = "a random draw for every sample, under the twig's budget"
    schedule: Literal["twig", "input", "fastv"] = "twig"

    def probe(self, shape: Shape) -> Probe | None:
        return None

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        if self.schedule == "input":
            return Fraction(1), Fraction(shape.V)
        return FastV().legal(shape) if self.schedule == "fastv" else super().legal(shape)

    def plan(self, R: float, shape: Shape) -> Plan:
        if self.schedule == "input":
            exact = within(R, self.legal(shape), f"an image keeps R of V={shape.V} tokens in every layer")
            return Plan(tower=Draw(round(exact)))
        if self.schedule == "fastv":
            stages = FastV().plan(R, shape).stages
            return Plan(tuple((layer, Keep(rule.r, rule.V)) for layer, rule in stages))
        return super().plan(R, shape)
