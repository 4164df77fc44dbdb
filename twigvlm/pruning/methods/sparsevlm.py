"""SparseVLM (ICML 2025): three or four cuts by the attention of those text tokens that look at the image; what leaves is merged.

Raters, found once: the tokens after the image whose input embeddings get more than the mean of a softmax, over
the text, of their products with the image's. A cut keeps the k visual tokens that the raters of the layer
before attend to most. Of the D that leave, the int(0.3 D) + 1 best (m) become C = int(m / 10) + 1 tokens, means
of clusters that density peaks (DPC-kNN) make of their states; they stand behind the kept ones.

`version`: "1.5" (the paper's) keeps a table of counts; "1.0" keeps `scale` times the rank of the raters' rows
plus `bias`, so as many as a sample asks for; "2.0" keeps another table, merges nothing, keeps positions,
divides each weight by what rotary embedding alone would make of it and hears 14 of 32 heads.
The authors' R counts what leaves layers: 192, 128 and 64 are 206.5, 145.4 and 82.3 tokens that enter one. Here the
tables are scaled until that is R; `count=authors`, or `faithful`, has them as they are. Their noise of 1e-6 on
densities is left out: ties go to the earlier.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch

from ...errors import InputError
from ...model.stream import front
from ..budget import PAPER_V, at_depth, counts, within
from ..calibrated import settled
from ..plan import Method, Plan, Shape
from ..rule import Probe, Rule, Seen, Selection, highest

CUTS = (3, 7, 16)
TABLES = {  # best-scored tokens of 576 that stay at each cut, by the authors' R
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
LATE = 20  # a fourth cut of version 1.0
RANKS = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}  # scale and bias for MME, POPE and TextVQA
HEADS = Fraction(14, 32)  # that version 2.0 hears


def clusters(leaving):
    """C, of so many tokens that leave (a number or a tensor)."""
    return (recycled(leaving) // 10 + 1) * (leaving > 0)


def recycled(leaving):
    """m, of so many tokens that leave (a number or a tensor)."""
    return (leaving * 3 // 10 + 1) * (leaving > 0)


def parts(n: int, entering: int) -> tuple[int, int]:
    """(k, C): `n` of `entering` tokens, as many as can be kept as they are and the rest merged."""
    k = n
    while k > 0 and k + clusters(entering - k) > n:
        k -= 1
    return k, min(clusters(entering - k), n - k)


def density_peaks(
    tokens: torch.Tensor, real: torch.Tensor, count: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` [B] clusters of the `real` ones of `tokens` [B, M, D], `most` at most.

    Their centres, indices [B, most] (-1 pads), the likeliest first, and the means of their members [B, most, D].
    """
    tokens, pair = tokens.float(), real[:, :, None] & real[:, None]
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / tokens.shape[2] ** 0.5
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    near = distance.masked_fill(~pair, torch.inf).sort(2).values.square()
    near = near.masked_fill(steps >= count[:, None, None], 0).sum(2) / count[:, None].clamp(min=1)
    # Of the density, exp(-near), only the logarithm is sure to be a number.
    farthest = distance.masked_fill(~pair, 0).flatten(1).max(1).values[:, None, None]
    denser = (near[:, None] < near[:, :, None]) & pair
    worth = torch.where(denser, distance, farthest).min(2).values.log() - near
    centres = worth.masked_fill(~real, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :most]
    there = torch.arange(centres.shape[1], device=count.device) < count[:, None]
    to = distance.gather(2, centres[:, None].expand(-1, tokens.shape[1], -1)).masked_fill(~there[:, None], torch.inf)
    own = torch.where(there, centres, tokens.shape[1])  # a centre belongs to itself
    to = torch.nn.functional.pad(to.argmin(2), (0, 1)).scatter(1, own, steps[: own.shape[1]].expand_as(own))[:, :-1]
    member = (torch.nn.functional.one_hot(to, own.shape[1]) * real[..., None]).transpose(1, 2).float()
    return centres.masked_fill(~there, -1), member @ tokens / member.sum(2, keepdim=True).clamp(min=1)


def raters(seen: Seen) -> torch.Tensor:
    """[B, Q] bool: which text tokens look at the image, by input embeddings; all where none stands out."""
    if "raters" not in seen.memory:
        image, text = seen.prompt.visual >= 0, seen.text.real()
        alike = seen.prompt.hidden.float() @ seen.first(seen.text).float().transpose(1, 2)
        shares = alike.masked_fill(~text[:, None], torch.finfo(torch.float32).min).softmax(2) * image[..., None]
        mean = shares.sum(1) / image.sum(1, keepdim=True).clamp(min=1)  # B Q
        above = (mean > 1 / text.sum(1, keepdim=True)) & text
        seen.memory["raters"] = torch.where(above.any(1, keepdim=True), above, text)
    return seen.memory["raters"]


def rated(seen: Seen) -> torch.Tensor:
    """[B, V']: the raters' attention, mean over them and over heads."""
    asked = raters(seen)
    return (seen.scores * asked[..., None]).sum(1) / asked.sum(1, keepdim=True)


def unrotated(seen: Seen) -> torch.Tensor:
    """[B, V']: `rated` without what distance alone does, in the heads whose raters look at the image most."""

    def ones(positions: torch.Tensor) -> torch.Tensor:
        cos, sin = (t.float() for t in seen.rotary(positions))
        half = cos.shape[-1] // 2
        return torch.cat([(cos - sin)[..., :half], (cos + sin)[..., half:]], -1)

    asked, real = raters(seen), seen.visual.real()
    turned = ones(seen.heard.asked.positions) @ ones(seen.visual.positions).transpose(1, 2)  # B Q V'
    pull = turned / seen.heard.tap.query.shape[-1] ** 0.5
    rows = seen.heard.by_head(seen.visual) / pull[:, None] * (asked[:, None, :, None] & real[:, None, None])
    mass = rows.sum((2, 3)).sort(dim=1, descending=True, stable=True).indices[:, : max(1, round(HEADS * rows.shape[1]))]
    heads = rows.sum(2).gather(1, mass[..., None].expand(-1, -1, rows.shape[3]))
    return heads.mean(1) / asked.sum(1, keepdim=True)


@dataclass(frozen=True)
class Rated(Rule):
    """Leaves `n` of the `entering` tokens of an image that had `V`; with `merges`, merged ones are among them."""

    n: int
    entering: int
    V: int
    probe: Probe
    merges: bool = True

    def most(self, total: int) -> int:
        return -(-self.n * total // self.V)

    def split(self, seen: Seen) -> tuple[list[int], list[int], list[int]]:
        """Of each row: kept as they are, recycled, clusters."""
        left = [self.most(t) for t in seen.total]
        if not self.merges:
            return left, [0] * len(left), [0] * len(left)
        entering = [-(-self.entering * t // self.V) for t in seen.total]
        kept, merged = zip(*itertools.starmap(parts, zip(left, entering, strict=True)), strict=True)
        return kept, [recycled(e - k) if c else 0 for k, c, e in zip(kept, merged, entering, strict=True)], merged

    def __call__(self, seen: Seen) -> Selection:
        device, (kept, pool, merged) = seen.visual.place.device, self.split(seen)
        keep = highest(
            rated(seen) if self.merges else unrotated(seen), seen.visual.real(), torch.tensor(kept, device=device)
        )
        if not any(merged):
            return Selection(keep)
        return merge(
            seen, keep, torch.tensor(pool, device=device), torch.tensor(merged, device=device), max(pool), max(merged)
        )


def merge(seen: Seen, keep: torch.Tensor, pool: torch.Tensor, count: torch.Tensor, widest: int, most: int) -> Selection:
    """What stays, and behind it the means of `count` [B] clusters (`most` at most) of the `pool` [B] next best (`widest`)."""
    real = seen.visual.real()
    best = highest(rated(seen), real & ~keep, pool)
    order = front(best, widest)
    some = seen.visual.take(order)
    centres, merged = density_peaks(some.hidden, order >= 0, count, min(most, order.shape[1]))
    instead = torch.where(centres < 0, -1, order.gather(1, centres.clamp(min=0)))
    behind = torch.where(centres < 0, -1, real.sum(1, keepdim=True) - 1)
    return Selection(keep, merged, behind, instead)


@dataclass(frozen=True)
class Ranked(Rule):
    """Keeps int(rank * scale + bias) of a row's tokens, the rank that of the raters' rows; where it is full, all."""

    scale: float
    bias: float
    probe: Probe
    exact: ClassVar[bool] = False

    def most(self, total: int) -> int:
        return total

    def __call__(self, seen: Seen) -> Selection:
        real, asked = seen.visual.real(), raters(seen)
        rows = (seen.scores * asked[..., None]).masked_fill(~real[:, None], 0)
        count = real.sum(1)
        rank = ranks(rows, torch.maximum(asked.sum(1), count))
        k = torch.minimum((rank * self.scale + self.bias).long().clamp(min=0), count - 1)
        leaving = torch.where(rank == count, 0, count - k).clamp(min=0)
        keep = highest(rated(seen), real, count - leaving)
        widest = real.shape[1]
        return merge(seen, keep, recycled(leaving), clusters(leaving), recycled(widest), clusters(widest))


def ranks(rows: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """[B]: of `rows` [B, Q, V'], as if each were of its own `size` [B], the larger of its sides, without padding."""
    values = torch.linalg.svdvals(rows.cpu() if rows.device.type == "mps" else rows).to(rows.device)
    least = values[:, :1] * size[:, None] * torch.finfo(torch.float32).eps
    return (values > least).sum(1)


@dataclass(frozen=True)
class SparseVLM(Method):
    """`faithful` counts as the authors do; `scale` and `bias` are version 1.0's, of the rank."""

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM, ICML 2025"
    summary: ClassVar[str] = "three cuts by the text that looks at the image; some of what leaves is merged"
    version: Literal["1.5", "1.0", "2.0"] = "1.5"
    faithful: bool = False
    scale: float | None = None
    bias: float = 0.0

    @property
    def fitted(self) -> tuple[str, ...]:
        return ("scale",) if self.version == "1.0" and not self.theirs else ()

    def before(self, L: int) -> tuple[int, ...]:
        return at_depth((*CUTS, LATE) if self.version == "1.0" else CUTS, L, self.name)

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        if self.theirs:
            return Fraction(1), Fraction(shape.V)
        return Fraction(self.before(shape.L)[0] * shape.V, shape.L), Fraction(shape.V)

    @property
    def theirs(self) -> bool:
        return self.faithful or self.count == "authors"

    def plan(self, R: float, shape: Shape) -> Plan:
        cuts, V = self.before(shape.L), shape.V
        exact = within(R, self.legal(shape), f"{cuts[0]} layers read all tokens (L={shape.L}, V={V})")
        if self.version == "1.0":
            return self.by_rank(exact, cuts, shape)
        left = self.published(exact, V) if self.theirs else self.scaled(exact, cuts, shape)
        merges = self.version != "2.0"
        stages = tuple(
            (cut, Rated(n, entering, V, Probe("layer", "text", layer=cut - 1), merges))
            for cut, n, entering in zip(cuts, left, (V, *left), strict=False)
        )
        return Plan(stages, positions="compact" if merges else "keep")

    def by_rank(self, R: Fraction, cuts: tuple[int, ...], shape: Shape) -> Plan:
        if self.theirs:
            scale, bias = self.row(R, shape.V, RANKS)
        else:
            scale, bias = settled(self, R, shape).scale, self.bias
        stages = tuple((cut, Ranked(scale, bias, Probe("layer", "text", layer=cut - 1))) for cut in cuts)
        return Plan(stages, positions="compact")

    def published(self, R: Fraction, V: int) -> list[int]:
        """Tokens that leave each cut, merged ones included, of the table's row; a share of V where that is not 576."""
        return self.left(self.row(R, V, TABLES[self.version]), V)

    def row(self, R: Fraction, V: int, table: dict[int, tuple]) -> tuple:
        row = table.get(R * PAPER_V / V)
        if row is None:
            can = ", ".join(f"{float(Fraction(r * V, PAPER_V)):g}" for r in table)
            raise InputError(
                f"{self.name}'s authors published settings of version {self.version} for R = {can}, and R is "
                f"{float(R):g}; give one of these, or leave count=authors and faithful out"
            )
        return row

    def left(self, row: Sequence[int], V: int) -> list[int]:
        """Tokens that leave each cut where the best `row` of 576 are kept."""
        left: list[int] = []
        for k in row:
            entering = left[-1] if left else V
            k = min(round(Fraction(k * V, PAPER_V)), entering)
            left.append(k if self.version == "2.0" else min(k + clusters(entering - k), entering))
        return left

    def scaled(self, R: Fraction, cuts: tuple[int, ...], shape: Shape) -> tuple[int, ...]:
        """As `left`, in the table's proportions at this R (between rows, those between), so many that R is what enters."""
        layers = tuple(b - a for a, b in itertools.pairwise((*cuts, shape.L)))
        rows = {r: self.left(row, PAPER_V) for r, row in TABLES[self.version].items()}
        at = min(max(R * PAPER_V / shape.V, Fraction(min(rows))), Fraction(max(rows)))
        low, high = max(r for r in rows if r <= at), min(r for r in rows if r >= at)
        share = (at - low) / (high - low) if high > low else Fraction(0)
        ratio = tuple(a + (b - a) * share for a, b in zip(rows[low], rows[high], strict=True))
        return counts(shape.L * R - cuts[0] * shape.V, layers, ratio, shape.V)

    def authors(self, entering: Sequence[float]) -> float:
        """What leaves a layer."""
        return sum((*entering[1:], entering[-1])) / len(entering)
