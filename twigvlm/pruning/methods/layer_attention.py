"""The base's own layer K-1 under the twig's budget: FastV's signal, so that signals compare."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from ...errors import InputError
from ..plan import Shape
from ..rule import Probe
from .twig import TwigBudget


@dataclass(frozen=True)
class LayerAttention(TwigBudget):
    name: ClassVar[str] = "layer-attention"
    paper: ClassVar[str] = "TwigVLM's ablation of the signal"
    summary: ClassVar[str] = "attention of base layer K-1 under the twig's budget"

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        self.probe(shape)
        return super().legal(shape)

    def probe(self, shape: Shape) -> Probe | None:
        if shape.K == 0:
            raise InputError(
                "pruning 'layer-attention' reads base layer K - 1, and with K = 0 there is none; K >= 1 is needed"
            )
        return Probe("layer", self.query, layer=shape.K - 1)
