"""SIEVE (2026): what the text looks at and cannot say itself, picked one by one; a pick discounts what is like it.

The states of the tokens after the image, centred on their mean, span what the text says; the share of a visual
token that lies outside (its residual's norm over its own) times the attention that it gets from the text, both
squared, is its worth. The residual is a ridge regression's, whose lambda is the eigenvalue of the text's Gram
matrix at which `eta` of their sum is reached. 12 of 32 heads are heard: those that look at the image most.
No code is out, and neither paper nor appendix says where it cuts or how much stays, nor positions: here
one cut before layer 2, as FastV's, or two before 2 and 16 of 32 (`cuts=two`), and original positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch

from ..budget import counts, within
from ..plan import Plan, Shape
from ..rule import Probe, Seen, Selection, Share
from ..select import among, cosine, discounted
from .fastv import FastV

ETA = 0.75  # of the text's spectrum
EPSILON = 1e-6  # on top of lambda
HEADS = Fraction(12, 32)  # that are heard


def spectrum(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [B, Q] (none below 0) and vectors [B, Q, Q] in columns, largest first."""
    where = gram.cpu() if gram.device.type == "mps" else gram  # which has no eigenvalues of its own
    values, vectors = (t.to(gram.device) for t in torch.linalg.eigh(where))
    return values.flip(1).clamp(min=0), vectors.flip(2)


def ridge(values: torch.Tensor) -> torch.Tensor:
    """[B]: lambda, the eigenvalue (`values` [B, Q], largest first) at which ETA of their sum is reached."""
    short = values.cumsum(1) < ETA * values.sum(1, keepdim=True)
    return values.gather(1, short.sum(1, keepdim=True).clamp(max=values.shape[1] - 1))[:, 0] + EPSILON


def unsaid(visual: torch.Tensor, text: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What of `visual` [B, V', D] the `text` [B, Q, D] (of which `real` [B, Q] count) cannot say.

    The residuals [B, V', D], and the norm of each as a share of its token's [B, V'], both centred on the text's mean.
    """
    text, there = text.float(), real[..., None]
    mean = (text * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    text, visual = (text - mean) * there, visual.float() - mean
    gram = text @ text.transpose(1, 2)
    values, vectors = spectrum(gram)
    weights = visual @ text.transpose(1, 2) @ vectors / (values + ridge(values)[:, None])[:, None]
    left = visual - weights @ vectors.transpose(1, 2) @ text
    return left, left.norm(dim=2) / visual.norm(dim=2).clamp(min=torch.finfo(torch.float32).tiny)


def attended(rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """[B, V']: attention from all `rows` [B, H, Q, V'] in the heads that look at the `real` [B, V'] tokens most."""
    got = rows.sum(2) * real[:, None]
    heads = got.sum(2).sort(dim=1, descending=True, stable=True).indices[:, : max(1, round(HEADS * got.shape[1]))]
    return got.gather(1, heads[..., None].expand(-1, -1, got.shape[2])).sum(1)


@dataclass(frozen=True)
class Discounted(Share):
    """Picks by attention and novelty; what is like a pick counts less from then on."""

    probe: Probe

    def __call__(self, seen: Seen) -> Selection:
        real = seen.visual.real()
        left, share = unsaid(seen.visual.hidden, seen.text.hidden, seen.text.real())
        worth = (self.attention(seen) * self.trust(share)).square()
        n = max(map(self.most, seen.total))
        return Selection(among(discounted(worth, cosine(left), real, n), real, seen.budget(self.most)))

    def attention(self, seen: Seen) -> torch.Tensor:
        """[B, V']"""
        return attended(seen.heard.by_head(seen.visual), seen.visual.real())

    def trust(self, share: torch.Tensor) -> torch.Tensor:
        return share


@dataclass(frozen=True)
class SIEVE(FastV):
    """`cuts`: one, behind the layers that read all tokens, or a second one in the middle of the decoder."""

    name: ClassVar[str] = "sieve"
    paper: ClassVar[str] = "SIEVE, arXiv 2608.10489"
    summary: ClassVar[str] = "discounted picks by attention times what the text cannot say"
    cuts: Literal["one", "two"] = "one"

    def before(self, L: int) -> tuple[int, ...]:
        return (self.layer,) if self.cuts == "one" else (self.layer, min(max(self.layer + 1, L // 2), L - 1))

    def plan(self, R: float, shape: Shape) -> Plan:
        exact = within(R, self.legal(shape), self.why(shape))
        cuts = self.before(shape.L)
        layers = tuple(b - a for a, b in zip(cuts, (*cuts[1:], shape.L), strict=True))
        ratio = (Fraction(1), Fraction(1, 2))[: len(cuts)]
        left = counts(shape.L * exact - self.layer * shape.V, layers, ratio, shape.V)
        return Plan(
            tuple(
                (b, Discounted(n, shape.V, Probe("layer", "text", layer=b - 1)))
                for b, n in zip(cuts, left, strict=True)
            )
        )
