"""Ours: the twig's budget and score with SIEVE's discounted picks, in place of the r highest scores.

A pick takes from what is like it (cosine of what the text cannot say of both, see `sieve.py`), so that r
tokens do not show the same thing r times. Same layers, same R, no new weights. A first cut before layer 0
was measured as well and made it worse (docs/LOG.md); written as a join (`scope+twig-discount`) it can be had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..plan import Plan, Shape
from ..rule import Seen
from .sieve import Discounted
from .twig import Twig


class ByTwig(Discounted):
    """The twig's own row is the attention, and what the text cannot say counts for likeness alone."""

    def attention(self, seen: Seen) -> torch.Tensor:
        return seen.scores.sum(1)

    def trust(self, share: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(share)


@dataclass(frozen=True)
class TwigDiscount(Twig):
    name: ClassVar[str] = "twig-discount"
    paper: ClassVar[str] = "ours, after TwigVLM and SIEVE"
    summary: ClassVar[str] = "the twig's score, picked with discount; the image leaves before layer F"

    def plan(self, R: float, shape: Shape) -> Plan:
        plan = super().plan(R, shape)
        (before, keep), *wipe = plan.stages
        return replace(plan, stages=((before, ByTwig(keep.r, keep.V, keep.probe)), *wipe))
