"""What a method answers at one place of the decoder: a rule is shown attention and tokens, and gives a selection.

The road (decoding.prefill) cuts; nothing here knows of masks, caches or positions. Legend: B rows,
V' visual tokens of a row now, Q asked rows, P places of the prompt, H heads, D width, c merged tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch

from ..model.stream import Stream
from ..model.tap import Tap

Rows = Literal["last", "text"]
TWIG = ("twig", "head", "attention")  # sources that the twig answers


@dataclass(frozen=True)
class Probe:
    """Rows of attention that a rule wants to see.

    `source`: the twig's score ("twig": its pruning head's where it has one, else the attention of its last layer; "head"
    or "attention": that one alone), base layer `layer` as it ran ("layer"), or base layer `layer` that is about to run on
    what the rule sees ("peek").
    `rows`: the last prompt token ("last"), or the text after the last image ("text"; where there is none
    the last token).
    """

    source: Literal["twig", "head", "attention", "layer", "peek"]
    rows: Rows = "last"
    layer: int | None = None


@dataclass(frozen=True)
class Heard:
    """What a probe's layer used, before any mean: `asked` are the tokens [B, Q] whose rows these are, as they are now."""

    tap: Tap
    place: torch.Tensor  # B S, of what entered the layer
    asked: Stream

    def by_head(self, tokens: Stream) -> torch.Tensor:
        """fp32 [B, H, Q, W]: attention of the asked rows to `tokens` [B, W], each head alone; rows not there are 0."""
        weights = self.tap.weights().masked_fill((self.tap.rows < 0)[:, None, :, None], 0)
        at = found(self.place, tokens.place)[:, None, None].expand(-1, *weights.shape[1:3], -1)
        return weights.gather(3, at)

    def keys(self, tokens: Stream) -> torch.Tensor:
        """[B, W, key heads, d]: the keys of `tokens` [B, W], rotated."""
        keys = self.tap.keys.transpose(1, 2)
        at = found(self.place, tokens.place)
        return keys.gather(1, at[..., None, None].expand(-1, -1, *keys.shape[2:]))


@dataclass
class Seen:
    """What a rule is shown: its rows' attention and the visual tokens that are left."""

    visual: Stream  # B V'; padding behind rows with fewer
    scores: torch.Tensor | None  # fp32 B Q V', mean over heads of what was probed; rows that are not there are 0
    total: Sequence[int]  # visual tokens of each row that entered layer 0
    prompt: Stream  # as it entered layer 0
    text: Stream | None = None  # B Q, what follows the last image (or the last token, where nothing does), as it is now
    heard: Heard | None = None  # of the probe, for rules that want more than the mean over heads
    draws: Sequence[int] = ()  # a seed of each row, for rules that draw
    places: int = 0  # P, of the longest prompt
    marked: dict[str, torch.Tensor] = field(default_factory=dict)  # bool B P, what the plan's reducer marked
    memory: dict = field(default_factory=dict)  # shared by the stages of one prefill
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None  # the decoder's last one
    rotary: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = (
        None  # positions A B W → cos, sin B W d
    )

    def marks(self, name: str) -> torch.Tensor:
        """[B, V'] bool: which of the visual tokens the plan's reducer marked by that name."""
        return self.marked[name].gather(1, self.visual.place.clamp(min=0)) & self.visual.real()

    def first(self, tokens: Stream) -> torch.Tensor:
        """[B, W, D]: what `tokens` [B, W] were before layer 0 (anything for padding)."""
        at = found(self.prompt.place, tokens.place)
        return self.prompt.hidden.gather(1, at[..., None].expand(-1, -1, self.prompt.hidden.shape[-1]))

    def budget(self, most: Callable[[int], int]) -> torch.Tensor:
        """[B]: what each row may keep."""
        return torch.tensor([most(n) for n in self.total], device=self.visual.place.device)


@dataclass(frozen=True)
class Selection:
    """`keep` [B, V'] bool stay; `merged` [B, c, D] come in, each behind the visual token `behind` [B, c] (-1: none).

    A merged token takes the place and position of the visual token `instead` [B, c] of which it is made
    (default: the one that it stands behind); no two may take the same, and none that of a token that stays.
    """

    keep: torch.Tensor
    merged: torch.Tensor | None = None
    behind: torch.Tensor | None = None
    instead: torch.Tensor | None = None


class Rule(ABC):
    """Chooses among the visual tokens at one place of the decoder."""

    probe: Probe | None = None
    exact: ClassVar[bool] = True  # a row keeps just what `most` says

    @property
    def draws(self) -> bool:
        """It draws, from the seed of each row."""
        return False

    @abstractmethod
    def most(self, total: int) -> int:
        """Upper bound of visual tokens left in a row (merged ones included) that had `total` in its prompt."""

    @abstractmethod
    def __call__(self, seen: Seen) -> Selection: ...


@dataclass(frozen=True)
class Share(Rule):
    """Keeps `r` of `V` tokens an image, pooled over a row's images."""

    r: int
    V: int

    def most(self, total: int) -> int:
        return -(-self.r * total // self.V)


@dataclass(frozen=True)
class Keep(Share):
    """The `r` of `V` tokens an image that are scored highest, pooled over a row's images; ties go to the earlier.

    The score is the attention that `probe` sees, summed over its rows; without a probe, a random draw
    of the row's own seed.
    """

    probe: Probe | None = None

    @property
    def draws(self) -> bool:
        return self.probe is None

    def __call__(self, seen: Seen) -> Selection:
        scores = seen.scores.sum(1) if self.probe is not None else drawn(seen)
        return Selection(highest(scores, seen.visual.real(), seen.budget(self.most)))


@dataclass(frozen=True)
class Wipe(Rule):
    """The image leaves."""

    def most(self, total: int) -> int:
        return 0

    def __call__(self, seen: Seen) -> Selection:
        return Selection(torch.zeros_like(seen.visual.place, dtype=torch.bool))


@dataclass(frozen=True)
class Given(Rule):
    """A selection made beforehand: `kept` [B, P] bool over the places of each prompt; no row keeps more than `limit`."""

    kept: torch.Tensor
    limit: int | None = None
    exact: ClassVar[bool] = False

    def most(self, total: int) -> int:
        return total if self.limit is None else min(total, self.limit)

    def __call__(self, seen: Seen) -> Selection:
        kept = self.kept.to(seen.visual.place.device)
        return Selection(kept.gather(1, seen.visual.place.clamp(min=0)) & seen.visual.real())


def found(places: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """[B, W]: where those `wanted` [B, W] stand among `places` [B, S] (anything for padding)."""
    return (places[:, None] == wanted[..., None]).to(torch.uint8).argmax(2)


def highest(scores: torch.Tensor, real: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """[B, V'] bool: the `budget` [B] best-scored among the `real` tokens of each row."""
    order = scores.masked_fill(~real, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return (order.argsort(dim=1) < budget[:, None]) & real


def drawn(seen: Seen) -> torch.Tensor:
    """Random scores [B, V'], which depend on a row's seed and its tokens' places alone."""
    place = seen.visual.place
    # Drawn for every place of the prompt, so that neither the batch nor an earlier stage shifts the draw.
    scores = [uniform(seed, seen.places) for seed in seen.draws]
    return torch.stack(scores).to(place.device).gather(1, place.clamp(min=0))


def uniform(seed: int, count: int) -> torch.Tensor:
    """The first `count` of a row's random numbers; numpy's stream does not depend on how many are asked for."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).random(count, dtype=np.float32))
