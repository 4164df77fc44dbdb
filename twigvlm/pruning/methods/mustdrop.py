"""MustDrop (2024): windows of like patches merged in the tower, four cuts by two thresholds, caches cut after prefill.

Behind the tower's first layer, the 3 x 3 windows whose patches are alike (mean cosine 0.8 or more) become their
means and stand in front, most alike first. The 8 % that the class token looks at most, one layer behind the
one that is read, are never dropped. Before layers 3, 7, 11 and 15 a token leaves whose attention from all
text rows is less than `threshold` of what the image gets, and from none of them `individual` (as `threshold`
unless given). After prefill the caches of layers 2 on keep what the last cut has left.
How many stay depends on the picture: `threshold` is calibrated to R, or given. `count=authors` takes the settings
published for TextVQA; the authors' R counts what leaves layers. They merge as many windows in every
picture of a batch, here each picture has its own; their decoded tokens stand in front of the question
that they answer in layers whose caches were cut, here behind it, unless `faithful` is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from ...errors import InputError
from ...model.stream import fit
from ..budget import PAPER_V, at_depth, within
from ..calibrated import settled
from ..plan import Method, Plan, Shape
from ..reducer import CLASS, Reducer, Tokens, View
from ..rule import Probe, Rule, Seen, Selection

EVICT, *CUTS = 2, 3, 7, 11, 15  # of 32
WINDOW = 3  # patches in a row of one
ALIKE = 0.8
KEY = Fraction(8, 100)  # of an image's tokens
PUBLISHED = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}


def windows(side: int, device: torch.device) -> torch.Tensor:
    """[W, 9]: patches of each whole window of a grid, in raster order."""
    whole = side // WINDOW
    grid = torch.arange(side * side, device=device).view(side, side)[: whole * WINDOW, : whole * WINDOW]
    return grid.view(whole, WINDOW, whole, WINDOW).transpose(1, 2).reshape(-1, WINDOW * WINDOW)


def merge_windows(patches: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of [I, V, C]: windows that are alike as their means, most alike first, then all other patches: [I, V, C].

    And the patch whose place each takes, the window's middle one: [I, V]. Both end in padding, -1.
    """
    at = windows(side, patches.device)
    inside = patches[:, at]  # I W 9 C
    one = torch.nn.functional.normalize(inside.float(), dim=-1)
    pairs = WINDOW**2 * (WINDOW**2 - 1)
    alike = (one.sum(2).square().sum(-1) - one.square().sum((2, 3))) / pairs
    merges = alike >= ALIKE
    rank = alike.masked_fill(~merges, -torch.inf).sort(dim=1, descending=True, stable=True).indices.argsort(1)
    gone = torch.zeros(patches.shape[:2], dtype=torch.bool, device=at.device)
    gone = gone.index_put((torch.arange(len(gone), device=at.device)[:, None, None], at), merges[..., None])
    V, last = patches.shape[1], len(at) + patches.shape[1]
    steps = torch.arange(V, device=at.device)
    key = torch.cat([torch.where(merges, rank, last), torch.where(gone, last, len(at) + steps)], 1)
    order = key.argsort(dim=1, stable=True)[:, :V]
    both = torch.cat([inside.float().mean(2).to(patches), patches], 1)
    source = torch.cat([at[:, WINDOW**2 // 2], steps]).expand(len(patches), -1).gather(1, order)
    hidden = both.gather(1, order[..., None].expand(-1, -1, both.shape[-1]))
    return hidden, source.masked_fill(key.gather(1, order) == last, -1)


@dataclass(frozen=True)
class Merging(Reducer):
    class_token: ClassVar[bool] = True
    beyond: ClassVar[int] = 1
    exact: ClassVar[bool] = False

    def most(self, V: int) -> int:
        return V

    def listens(self, layer: int, read: int) -> str | None:
        return CLASS if layer == read + 1 else None

    def between(self, view: View, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        if layer != 0:
            return hidden
        patches, source = merge_windows(hidden[:, 1:], view.side)
        width, full = fit(source >= 0, view.V)
        view.memory["source"] = source = source[:, :width]
        if not full:
            there = torch.nn.functional.pad(source >= 0, (1, 0), value=True)
            nothing = torch.zeros_like(there, dtype=hidden.dtype)
            view.memory["bias"] = nothing.masked_fill(~there, torch.finfo(hidden.dtype).min)[:, None, None]
        return torch.cat([hidden[:, :1], patches[:, :width]], 1)

    def __call__(self, view: View) -> Tokens:
        source, bias = view.memory["source"], view.memory.get("bias")
        there = source >= 0
        count = there.sum(1)
        looked = view.taps[view.read + 1].weights(bias)[:, :, 0, 1:].mean(1).masked_fill(~there, -torch.inf)
        rank = looked.sort(dim=1, descending=True, stable=True).indices.argsort(1)
        share = -(-count * KEY.numerator // KEY.denominator)
        return Tokens(view.project(view.patches), source, count, {"key": (rank < share[:, None]) & there})


@dataclass(frozen=True)
class Dropping(Rule):
    """A token leaves that gets too little of the text's attention, both in all and from each of it."""

    threshold: float
    individual: float
    probe: Probe
    exact: ClassVar[bool] = False

    def most(self, total: int) -> int:
        return total

    def __call__(self, seen: Seen) -> Selection:
        real = seen.visual.real()
        rows = seen.scores * real[:, None]
        got = rows.sum(1)
        little = got < self.threshold * got.sum(1, keepdim=True)
        never = rows.amax(1) < self.individual
        return Selection(real & (~(little & never) | seen.marks("key")))


@dataclass(frozen=True)
class MustDrop(Method):
    """`threshold`: of the image's whole attention; `individual`: of one text token's; `faithful`: their decoded positions."""

    name: ClassVar[str] = "mustdrop"
    paper: ClassVar[str] = "MustDrop, arXiv 2411.10803"
    summary: ClassVar[str] = "like windows merged in the tower, four cuts by thresholds, caches cut after prefill"
    needs: ClassVar[str] = "class token"
    selects: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True
    threshold: float | None = None
    individual: float | None = None
    faithful: bool = False

    @property
    def fitted(self) -> tuple[str, ...]:
        return ("threshold",) if self.count == "entering" else ()

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        """From every window merged and every token but the key ones dropped, to none of both."""
        first = at_depth((EVICT, *CUTS), shape.L, self.name)[1]
        side = round(shape.V**0.5)
        least = shape.V - (side // WINDOW) ** 2 * (WINDOW**2 - 1)
        key = -(-least * KEY.numerator // KEY.denominator)
        low = Fraction(1) if self.count == "authors" else Fraction(first * least + (shape.L - first) * key, shape.L)
        return low, Fraction(shape.V)

    def plan(self, R: float, shape: Shape) -> Plan:
        evict, *cuts = at_depth((EVICT, *CUTS), shape.L, self.name)
        exact = within(
            R, self.legal(shape), f"{cuts[0]} layers read all that the tower leaves (L={shape.L}, V={shape.V})"
        )
        most, one = self.thresholds(exact, shape)
        stages = tuple((cut, Dropping(most, one, Probe("layer", "text", layer=cut - 1))) for cut in cuts)
        return Plan(stages, Merging(), "compact", evict, self.faithful)

    def thresholds(self, R: Fraction, shape: Shape) -> tuple[float, float]:
        if self.count == "authors" and self.threshold is None:
            found = PUBLISHED.get(R * PAPER_V / shape.V)
            if found is None:
                can = ", ".join(f"{float(Fraction(r * shape.V, PAPER_V)):g}" for r in PUBLISHED)
                raise InputError(
                    f"mustdrop's authors published thresholds for R = {can}, and R is {float(R):g}; give one of these, or "
                    "threshold=…"
                )
            return found
        found = settled(self, R, shape)
        return found.threshold, found.threshold if found.individual is None else found.individual

    def authors(self, entering: Sequence[float]) -> float:
        """What leaves a layer."""
        return sum((*entering[1:], entering[-1])) / len(entering)
