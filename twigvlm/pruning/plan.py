"""A pruning method as data: where it acts, which attention it wants to see, and what it answers.

A method answers with a selection; the road (decoding.prefill) cuts. Nothing here knows of masks,
caches or positions. Legend: B rows, V' visual tokens of a row now, Q asked rows, D width, c merged tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, Literal

import numpy as np
import torch

from ..errors import InputError
from ..model.stream import Stream
from ..model.tap import Tap

Rows = Literal["last", "text", "cls"]


@dataclass(frozen=True)
class Probe:
    """Rows of attention that a rule wants to see.

    `source`: the last twig layer ("twig"), base layer `layer` as it ran ("layer"), base layer `layer`
    that is about to run on what the rule sees ("peek"), or vision-tower layer `layer` ("tower").
    `rows`: the last prompt token ("last"), the text after the last image ("text"; where there is none
    the last token), or the tower's class token ("cls").
    """

    source: Literal["twig", "layer", "peek", "tower"]
    rows: Rows = "last"
    layer: int | None = None


@dataclass
class Seen:
    """What a rule is shown: its rows' attention and the visual tokens that are left."""

    visual: Stream  # B V'; padding behind rows with fewer
    scores: torch.Tensor | None  # fp32 B Q V', mean over heads of the probed attention; rows that are not there are 0
    total: Sequence[int]  # visual tokens of each row before anything was pruned
    prompt: Stream | None = None  # as it was embedded
    tap: Tap | None = None  # query and keys of the probed rows, for rules that want more than the mean
    draws: Sequence[int] = ()  # a seed of each row, for rules that draw
    memory: dict = field(default_factory=dict)  # shared by the stages of one prefill


@dataclass(frozen=True)
class Selection:
    """`keep` [B, V'] bool stay; `merged` [B, c, D] come in, each behind the visual token `behind` [B, c] (-1: none)."""

    keep: torch.Tensor
    merged: torch.Tensor | None = None
    behind: torch.Tensor | None = None


class Rule(ABC):
    """Chooses among the visual tokens at one place of the decoder."""

    probe: Probe | None = None
    exact: ClassVar[bool] = True  # a row keeps just what `most` says

    @abstractmethod
    def most(self, total: int) -> int:
        """Upper bound of visual tokens left in a row (merged ones included) that had `total` in its prompt."""

    @abstractmethod
    def __call__(self, seen: Seen) -> Selection: ...


@dataclass(frozen=True)
class Keep(Rule):
    """The `r` of `V` tokens an image that are scored highest, pooled over a row's images; ties go to the earlier.

    The score is the attention that `probe` sees, summed over its rows; without a probe, a random draw
    of the row's own seed.
    """

    r: int
    V: int
    probe: Probe | None = None

    def most(self, total: int) -> int:
        return -(-self.r * total // self.V)

    def __call__(self, seen: Seen) -> Selection:
        scores = seen.scores.sum(1) if self.probe is not None else _draw(seen)
        budget = torch.tensor([self.most(n) for n in seen.total], device=scores.device)
        return Selection(highest(scores, seen.visual.real(), budget))


@dataclass(frozen=True)
class Wipe(Rule):
    """The image leaves."""

    def most(self, total: int) -> int:
        return 0

    def __call__(self, seen: Seen) -> Selection:
        return Selection(torch.zeros_like(seen.visual.place, dtype=torch.bool))


@dataclass(frozen=True)
class Given(Rule):
    """A selection made beforehand: `kept` [B, P] bool over the places of each prompt."""

    kept: torch.Tensor
    exact: ClassVar[bool] = False

    def most(self, total: int) -> int:
        return total

    def __call__(self, seen: Seen) -> Selection:
        kept = self.kept.to(seen.visual.place.device)
        return Selection(kept.gather(1, seen.visual.place.clamp(min=0)) & seen.visual.real())


def highest(scores: torch.Tensor, real: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """[B, V'] bool: the `budget` [B] best-scored among the `real` tokens of each row."""
    order = scores.masked_fill(~real, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return (order.argsort(dim=1) < budget[:, None]) & real


def _draw(seen: Seen) -> torch.Tensor:
    """Random scores [B, V'], which depend on a row's seed and its tokens' places alone."""
    place = seen.visual.place
    # Drawn for every place of the prompt, so that neither the batch nor an earlier stage shifts the draw.
    drawn = [_uniform(seed, seen.prompt.width) for seed in seen.draws]
    return torch.stack(drawn).to(place.device).gather(1, place.clamp(min=0))


def _uniform(seed: int, count: int) -> torch.Tensor:
    """The first `count` of a row's random numbers; numpy's stream does not depend on how many are asked for."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).random(count, dtype=np.float32))


class Reducer(ABC):
    """Chooses among the tokens of each image before the decoder sees them."""

    probe: Probe | None = None

    @abstractmethod
    def most(self, V: int) -> int:
        """Upper bound of tokens left of an image."""

    @abstractmethod
    def __call__(self, features: torch.Tensor, scores: torch.Tensor | None, tap: Tap | None) -> Selection:
        """`features` [images, V, D] projected; `scores` fp32 [images, V] of the probed row; rows are images here."""


@dataclass(frozen=True)
class Plan:
    """Stages in the order of their layers, perhaps behind a reducer in the tower. The empty plan prunes nothing.

    `positions`: kept tokens keep their places in the prompt ("keep") or are numbered anew ("compact").
    `evict`: after prefill, caches of layers from this one on lose the visual tokens that no later
    layer has.
    """

    stages: tuple[tuple[int, Rule], ...] = ()
    tower: Reducer | None = None
    positions: Literal["keep", "compact"] = "keep"
    evict: int | None = None

    def __post_init__(self) -> None:
        layers = [before for before, _ in self.stages]
        if layers != sorted(set(layers)):
            raise InputError(f"stages stand before layers {layers}; each needs a layer of its own, in rising order")

    def __bool__(self) -> bool:
        return bool(self.stages or self.tower)

    @property
    def needs_twig(self) -> bool:
        return any(rule.probe is not None and rule.probe.source == "twig" for _, rule in self.stages)

    @property
    def random(self) -> bool:
        return any(isinstance(rule, Keep) and rule.probe is None for _, rule in self.stages)

    def tokens_per_layer(self, layers: int, visual: int) -> list[int]:
        """Visual tokens of one image that enter each base layer, at most."""
        counts, now = [], self.tower.most(visual) if self.tower else visual
        cuts = {before: rule.most(visual) for before, rule in self.stages}
        for layer in range(layers):
            now = min(now, cuts.get(layer, now))
            counts.append(now)
        return counts


@dataclass(frozen=True)
class Shape:
    """What a method's budget depends on: the base, its visual tokens per image, and where the twig grows."""

    L: int
    V: int
    K: int
    F: int


class Method(ABC):
    """Owns its budget: from R, the visual tokens that enter a layer on average (R_in), to a plan."""

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        """Smallest and largest R."""

    @abstractmethod
    def plan(self, R: float, shape: Shape) -> Plan:
        """Raises InputError for an R outside the legal range."""
