"""TReVS (2026): tokens that stand out to the class token or to the text, and the farthest others; once more at layer 9.

Before the decoder: how far a patch's attention from the class token, and its likeness to the input embeddings of
the text after the image, lie above their medians, in median deviations. Of K1 tokens three quarters are the highest,
the rest are the farthest from all chosen. Before layer 9 the K2 stay that some text token attends to most in the
half of the heads whose rows vary most. K1 : K2 = 3 : 1.
No code is out. The paper's label counts 8 layers of K1 where its bytes of cache show 9; `count=authors` keeps
2 R and a third of it. Which text, eps and positions are not said: the text after the image, 1e-6, kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from ..budget import at_depth, counts, within
from ..plan import Method, Plan, Shape
from ..reducer import Attended, Tokens, View
from ..rule import Probe, Seen, Selection, Share, highest
from ..select import cosine, farthest

CUT = 9  # of 32
RATIO = 3  # K1 : K2, and pivots to farthest points
TEMPERATURES = 1.4, 1.0  # of the class token's attention and of the text's likeness
EPSILON = 1e-6


def standing_out(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """[I, V] scores → how many median deviations each lies above the median (the mean of the two middle ones), or 0."""
    away = scores - _median(scores)
    return (away / (_median(away.abs()) + EPSILON)).clamp(min=0) / temperature


def _median(values: torch.Tensor) -> torch.Tensor:
    ranked = values.sort(1).values
    return (ranked[:, [(values.shape[1] - 1) // 2]] + ranked[:, [values.shape[1] // 2]]) / 2


def likeness_to(text: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    """[V]: root of the mean square of the cosines above 0 of a `projected` token [V, D] with the `text` [T, D]."""
    if not len(text):
        return projected.new_zeros(len(projected), dtype=torch.float32)
    return cosine(projected, text).clamp(min=0).square().mean(1).sqrt()


def fused(salience: torch.Tensor, relevance: torch.Tensor) -> torch.Tensor:
    """Either is enough, both are better."""
    return torch.maximum(salience, relevance) + (salience * relevance).sqrt()


def pivots_and_others(score: torch.Tensor, projected: torch.Tensor, n: int) -> torch.Tensor:
    """[I, n] in raster order: pivots by `score` [I, V], then the farthest by `projected` [I, V, D]."""
    ranked = score.sort(dim=1, descending=True, stable=True).indices
    pivots = ranked[:, : n - n // (RATIO + 1)]
    alike = cosine(projected)
    taken = torch.zeros_like(score, dtype=torch.bool).scatter(1, pivots, True)
    nearest = alike.masked_fill(~taken[:, None], -torch.inf).max(2).values
    return torch.cat([pivots, farthest(alike, nearest, taken, n - pivots.shape[1])], 1).sort(1).values


@dataclass(frozen=True)
class StandingOut(Attended):
    projects_all: ClassVar[bool] = True

    def __call__(self, view: View) -> Tokens:
        said = torch.stack([likeness_to(t, z) for t, z in zip(view.text, view.projected, strict=True)])
        marks = (view.attention().mean(1), said)
        score = fused(*(standing_out(s, t) for s, t in zip(marks, TEMPERATURES, strict=True)))
        return view.select(pivots_and_others(score, view.projected, self.n))


def varying(rows: torch.Tensor, asked: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance over the `real` [B, V'] columns of `rows` [B, H, Q, V'], mean over those `asked` [B, Q]: [B, H].

    And [B, V']: the highest of the asked rows, each the mean over the half of the heads with most variance.
    """
    count = real.sum(1)[:, None, None].clamp(min=1)
    rows = rows * (real[:, None, None] & asked[:, None, :, None])
    mean = rows.sum(3, keepdim=True) / count[..., None]
    spread = ((rows - mean) * real[:, None, None]).square().sum(3) / count
    variance = (spread * asked[:, None]).sum(2) / asked.sum(1, keepdim=True).clamp(min=1)
    heads = variance.sort(dim=1, descending=True, stable=True).indices[:, : max(1, variance.shape[1] // 2)]
    chosen = rows.gather(1, heads[..., None, None].expand(-1, -1, *rows.shape[2:]))
    return variance, chosen.mean(1).max(1).values


@dataclass(frozen=True)
class Peaks(Share):
    """The `r` of `V` tokens an image that some text token looks at most."""

    probe: Probe

    def __call__(self, seen: Seen) -> Selection:
        real = seen.visual.real()
        _, score = varying(seen.heard.by_head(seen.visual), seen.heard.asked.real(), real)
        return Selection(highest(score, real, seen.budget(self.most)))


@dataclass(frozen=True)
class TReVS(Method):
    name: ClassVar[str] = "trevs"
    paper: ClassVar[str] = "TReVS, 2026"
    summary: ClassVar[str] = "salient to the class token or the text, the farthest others, then the text's peaks"
    needs: ClassVar[str] = "class token"

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        return Fraction(1), Fraction(shape.V, 2) if self.count == "authors" else Fraction(shape.V)

    def plan(self, R: float, shape: Shape) -> Plan:
        (cut,) = at_depth((CUT,), shape.L, self.name)
        exact = within(R, self.legal(shape), f"an image has V={shape.V} tokens")
        if self.count == "authors":
            first = round(2 * exact)
            then = first // RATIO
        else:
            first, then = counts(shape.L * exact, (cut, shape.L - cut), (Fraction(RATIO), Fraction(1)), shape.V)
        return Plan(((cut, Peaks(then, first, Probe("layer", "text", layer=cut - 1))),), StandingOut(first))

    def authors(self, entering: Sequence[float]) -> float:
        """With one layer less before the cut."""
        return (sum(entering) - entering[0] + entering[-1]) / len(entering)
