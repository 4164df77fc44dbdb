"""DART (EMNLP 2025): once, after layer 2, those least like a few pivots; tokens that say the same leave.

Pivots are the tokens whose keys in the layer before the cut have the largest L1 norm: four of the image, which
stay, and four of the text after it. In the order of their norms, the image's first, each pivot keeps its
quota of the remaining tokens whose states (behind the decoder's last norm) have the smallest cosine with its own.
The authors' code goes through the pivots in the order of a Python set. Its count is the number of tokens
that the pivots may keep, in eights: 192, 128 and 64 are 196, 132 and 68 tokens in layers 2 to 31.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from ..budget import within
from ..plan import Plan, Shape
from ..rule import Probe, Seen, Selection, Share, highest
from ..select import cosine
from .fastv import FastV

PIVOTS = 4  # of the image, and as many of the text


@dataclass(frozen=True)
class Spread(Share):
    """Keeps `r` of `V` tokens an image; `even` gives all pivots the same quota, and what is over is not kept."""

    probe: Probe
    even: bool = False

    def most(self, total: int) -> int:
        n = super().most(total)
        return min(PIVOTS + n // (2 * PIVOTS) * 2 * PIVOTS, total) if self.even else n

    def __call__(self, seen: Seen) -> Selection:
        asked, real = seen.heard.asked, seen.visual.real()
        n = seen.budget(self.most)
        images = self._pivots(seen.heard.keys(seen.visual), real, n.clamp(max=PIVOTS))
        texts = self._pivots(seen.heard.keys(asked), asked.real(), torch.full_like(n, PIVOTS))
        own, states = seen.norm(seen.visual.hidden), seen.norm(asked.hidden)
        at = torch.cat([_rows(own, images), _rows(states, texts)], 1)
        there = torch.cat([images, texts], 1) >= 0
        stay = torch.zeros_like(real).scatter(1, images.clamp(min=0), images >= 0) & real
        return Selection(stay | least_like(cosine(at, own), there, real & ~stay, n - stay.sum(1)))

    @staticmethod
    def _pivots(keys: torch.Tensor, real: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """[B, 4]: the first `n` [B] by the L1 norm of `keys` [B, W, heads, d], largest first; -1 pads."""
        norms = keys.float().abs().sum((2, 3)).masked_fill(~real, -torch.inf)
        order = norms.sort(dim=1, descending=True, stable=True).indices[:, :PIVOTS]
        steps = torch.arange(order.shape[1], device=order.device)
        return order.masked_fill(steps >= torch.minimum(n, real.sum(1))[:, None], -1)


def least_like(likeness: torch.Tensor, there: torch.Tensor, pool: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """[B, V'] bool: the `n` [B] of the `pool` [B, V'] that pivots keep, one pivot after the other.

    `likeness` [B, P, V'] of the pivots to all tokens, of which those `there` [B, P] are asked; where n does not
    divide, the first ones keep one more.
    """
    kept, pivots = torch.zeros_like(pool), there.sum(1)
    first = there.long().cumsum(1) - 1
    quota = torch.where(there, n[:, None] // pivots[:, None] + (first < (n % pivots)[:, None]), 0)
    for like, some in zip(likeness.unbind(1), quota.unbind(1), strict=True):
        kept = kept | highest(-like, pool & ~kept, some)
    return kept


def _rows(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[B, P, D] of `tokens` [B, W, D]."""
    return tokens.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, tokens.shape[-1]))


@dataclass(frozen=True)
class DART(FastV):
    """`layer`: layers that read all tokens; the keys of the last of them and its output are asked."""

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = "DART, EMNLP 2025"
    summary: ClassVar[str] = "once, after layer 2: tokens least like a few pivots of large keys"

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        low, high = super().legal(shape)
        return (Fraction(0), high) if self.count == "authors" else (low, high)

    def plan(self, R: float, shape: Shape) -> Plan:
        theirs = self.count == "authors"
        exact = within(R, self.legal(shape), self.why(shape))
        n = int(exact) if theirs else self.kept(exact, shape)
        return Plan(((self.layer, Spread(n, shape.V, Probe("layer", "text", layer=self.layer - 1), theirs)),))

    def authors(self, entering) -> float:
        """Tokens that the pivots keep."""
        return max(entering[-1] - PIVOTS, 0)
