"""TwigVLM (ICCV 2025, section 3.2): the last twig layer's attention keeps r tokens from K on, and none from F on.

A twig with a pruning head (TwigVLM++, arXiv 2503.14075v3) is asked that head in place of its attention.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from ..budget import kept_tokens, legal_range
from ..plan import Method, Plan, Shape
from ..rule import Keep, Probe, Rows, Wipe


@dataclass(frozen=True)
class TwigBudget(Method):
    """The twig's cuts and budget, whoever scores. `query`: the rows that are asked, "last" (as released) or "text" (the
    paper's Eq. 3).
    """

    query: Rows = "last"

    @abstractmethod
    def probe(self, shape: Shape) -> Probe | None:
        """What is asked for a score; None draws."""

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        return legal_range(shape.L, shape.V, shape.K, shape.F)

    def plan(self, R: float, shape: Shape) -> Plan:
        r = kept_tokens(R, shape.L, shape.V, shape.K, shape.F)
        wipe = ((shape.F, Wipe()),) if shape.F < shape.L else ()
        return Plan(((shape.K, Keep(r, shape.V, self.probe(shape))), *wipe))


@dataclass(frozen=True)
class Twig(TwigBudget):
    """`score`: the twig's pruning head where it has one ("auto"), that alone ("head"), or its attention."""

    name: ClassVar[str] = "twig"
    paper: ClassVar[str] = "TwigVLM, ICCV 2025"
    summary: ClassVar[str] = "attention of the last twig layer, or its pruning head; the image leaves before layer F"
    needs: ClassVar[str] = "twig"
    trained: ClassVar[bool] = True
    score: Literal["auto", "head", "attention"] = "auto"

    def probe(self, shape: Shape) -> Probe:
        return Probe("twig" if self.score == "auto" else self.score, self.query)
