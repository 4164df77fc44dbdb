"""The floor: a new draw for every sample, under the twig's budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..plan import Shape
from ..rule import Probe
from .twig import Twig


@dataclass(frozen=True)
class Random(Twig):
    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "control"
    summary: ClassVar[str] = "a random draw for every sample, under the twig's budget"
    needs: ClassVar[str] = ""
    trained: ClassVar[bool] = False

    def probe(self, shape: Shape) -> Probe | None:
        return None
