"""TOPS (2026): tokens picked one by one for relevance, diversity and coverage; before the decoder and twice within.

Each pick has the highest sum of its relevance, its distance to the nearest picked one, and how much better it would
cover all candidates than the picked ones do, each normalised over the candidates. Relevance is the class token's
attention, and within the decoder that of the text tokens which look at the image no less than the text does on
average. 2 T tokens, T before layer 12 and T / 4 before 24, numbered anew.
No code is out. The paper normalises by the mean in its algorithms and by minimum and maximum in its text:
`norm=mean` or `norm=minmax`. `count=authors` takes T = R (152, 76 and 38 tokens a layer for 128, 64 and 32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch

from ..budget import PAPER_V, at_depth, counts, within
from ..plan import Method, Plan, Shape
from ..reducer import Attended, Tokens, View
from ..rule import Probe, Seen, Selection, Share
from ..select import among, cosine

CUTS = (12, 24)  # of 32
RATIO = (Fraction(2), Fraction(1), Fraction(1, 4))  # of T
DIVERSITY = 0.5
COVERAGE = 0.5  # within the decoder twice as much where T is nearer to 64 of 576 than to 128
FEW = 96
Norm = Literal["mean", "minmax"]


def normed(values: torch.Tensor, left: torch.Tensor, norm: Norm) -> torch.Tensor:
    """[B, N], by what is `left` [B, N] of them."""
    tiny = torch.finfo(torch.float32).tiny
    if norm == "mean":
        return values / ((values * left).sum(1, keepdim=True) / left.sum(1, keepdim=True).clamp(min=1)).clamp(min=tiny)
    low = values.masked_fill(~left, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~left, -torch.inf).amax(1, keepdim=True)
    return (values - low) / (high - low).clamp(min=tiny)


def picked(
    tokens: torch.Tensor, relevance: torch.Tensor, real: torch.Tensor, n: int, coverage: float, norm: Norm
) -> torch.Tensor:
    """[B, n]: `real` ones of `tokens` [B, N, D] in the order in which they are picked."""
    alike, row = cosine(tokens), torch.arange(len(tokens), device=tokens.device)
    gain = torch.empty_like(alike)
    new = relevance.masked_fill(~real, -torch.inf).argmax(1)
    order, left, near = [new], real.scatter(1, new[:, None], False), alike[row, new]
    for _ in range(n - 1):
        torch.sub(alike, near[:, None], out=gain).clamp_(min=0).mul_(left[:, None])
        score = normed(relevance, left, norm) + DIVERSITY * normed(1 - near, left, norm)
        score = score + coverage * normed(gain.sum(2), left, norm)
        new = score.masked_fill(~left, -torch.inf).argmax(1)
        order.append(new)
        left, near = left.scatter(1, new[:, None], False), torch.maximum(near, alike[row, new])
    return torch.stack(order[:n], 1) if n else real.long()[:, :0]


@dataclass(frozen=True)
class First(Attended):
    """Before the decoder."""

    norm: Norm = "mean"
    projects_all: ClassVar[bool] = True

    def __call__(self, view: View) -> Tokens:
        relevance = view.attention().mean(1)
        order = picked(
            view.projected, relevance, torch.ones_like(relevance, dtype=torch.bool), self.n, COVERAGE, self.norm
        )
        return view.select(order.sort(1).values)


def rated(scores: torch.Tensor, asked: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """[B, V']: mean over those `asked` [B, Q] whose rows [B, Q, V'] look at the `real` tokens no less than the mean."""
    mass = (scores * real[:, None]).sum(2) * asked
    mean = mass.sum(1, keepdim=True) / asked.sum(1, keepdim=True).clamp(min=1)
    raters = asked & (mass >= mean)
    raters = torch.where(raters.any(1, keepdim=True), raters, asked)
    return (scores * raters[..., None]).sum(1) / raters.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Picked(Share):
    coverage: float
    norm: Norm
    probe: Probe

    def __call__(self, seen: Seen) -> Selection:
        real = seen.visual.real()
        relevance = rated(seen.scores, seen.heard.asked.real(), real)
        order = picked(seen.visual.hidden, relevance, real, max(map(self.most, seen.total)), self.coverage, self.norm)
        return Selection(among(order, real, seen.budget(self.most)))


@dataclass(frozen=True)
class TOPS(Method):
    """`norm`: of the three criteria, by their mean or by their minimum and maximum."""

    name: ClassVar[str] = "tops"
    paper: ClassVar[str] = "TOPS, arXiv 2606.27161"
    summary: ClassVar[str] = "picks for relevance, diversity and coverage, before the decoder and twice within"
    needs: ClassVar[str] = "class token"
    norm: Norm = "mean"

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        return Fraction(1), Fraction(shape.V, 2) if self.count == "authors" else Fraction(shape.V)

    def plan(self, R: float, shape: Shape) -> Plan:
        cuts = at_depth(CUTS, shape.L, self.name)
        exact = within(R, self.legal(shape), f"an image has V={shape.V} tokens")
        if self.count == "authors":
            first, *later = (int(share * exact) for share in RATIO)
        else:
            layers = (cuts[0], cuts[1] - cuts[0], shape.L - cuts[1])
            first, *later = counts(shape.L * exact, layers, RATIO, shape.V)
        coverage = COVERAGE * (2 if later[0] * PAPER_V < FEW * shape.V else 1)
        stages = tuple(
            (cut, Picked(n, first, coverage, self.norm, Probe("layer", "text", layer=cut - 1)))
            for cut, n in zip(cuts, later, strict=True)
        )
        return Plan(stages, First(first, self.norm), positions="compact")

    def authors(self, entering: Sequence[float]) -> float:
        """T, what lies between the cuts."""
        return entering[at_depth(CUTS, len(entering), self.name)[0]]
