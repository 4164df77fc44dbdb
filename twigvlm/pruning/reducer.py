"""Methods that act before the decoder: from what the vision tower saw to the tokens that stand for each picture.

Legend: I images, N tokens of the tower now (class token first), V patches, C tower width, D decoder
width, n tokens that are left, H heads, T text tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from ..errors import InputError
from ..model.tap import Tap

CLASS, ALL = "class token", "all tokens"


@dataclass(frozen=True)
class Tokens:
    """What stands for each image, in the order in which the decoder reads it.

    `features` [I, n, D] are projected. `source` [I, n] is the patch whose place each takes, none twice;
    -1 for what is no patch (a class token). `count` [I]: where images keep different numbers, how many
    of the n are there. `marks` are bool [I, n], by name, for the plan's stages (`Seen.marks`).
    """

    features: torch.Tensor
    source: torch.Tensor
    count: torch.Tensor | None = None
    marks: dict[str, torch.Tensor] = field(default_factory=dict)


class Reducer(ABC):
    """Makes the tokens of every image. Stateless: what must be remembered on the way lies in `View.memory`."""

    class_token: ClassVar[bool] = False  # needs a tower that has one
    beyond: ClassVar[int] = 0  # layers to run behind the one whose output is read
    exact: ClassVar[bool] = True  # every image keeps just what `most` says
    projects_all: ClassVar[bool] = False  # `View.projected` is asked for
    draws: ClassVar[bool] = False  # from the seed of each image

    @abstractmethod
    def most(self, V: int) -> int:
        """Upper bound of tokens left of an image of V patches."""

    @abstractmethod
    def __call__(self, view: View) -> Tokens: ...

    def listens(self, layer: int, read: int) -> str | None:
        """CLASS or ALL: whose query is wanted in tower layer `layer`, of which `read` is the last that counts."""
        return None

    def within(self, view: View, layer: int, hidden: torch.Tensor, tap: Tap | None) -> torch.Tensor:
        """[I, N, C] between a layer's attention and its MLP; for merging."""
        return hidden

    def between(self, view: View, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """[I, N, C] behind a layer; for merging."""
        return hidden

    # What a merging reducer leaves of N tokens (class token included), for `pruning.cost`.

    def within_tokens(self, layer: int, read: int, N: int) -> int:
        """Tokens that `within` gives of N."""
        return N

    def between_tokens(self, layer: int, read: int, N: int) -> int:
        """Tokens that `between` gives of N."""
        return N

    def bind(self, vlm: Any) -> Reducer:
        """Itself, with what it needs of a loaded model beyond the tower and the projector (a text tower, a tokenizer)."""
        return self


@dataclass(frozen=True)
class Leaving(Reducer):
    """Leaves `n` tokens of every image."""

    n: int

    def most(self, V: int) -> int:
        return self.n


@dataclass(frozen=True)
class Attended(Leaving):
    """Reads the class token's attention in the layer that the decoder gets."""

    class_token: ClassVar[bool] = True

    def listens(self, layer: int, read: int) -> str | None:
        return CLASS if layer == read else None


@dataclass
class View:
    """What a reducer is shown: the images of one call, as the tower saw them. A watcher of `model.tower`."""

    reducer: Reducer
    V: int  # patches of an image
    class_tokens: int  # 1 where the tower has a class token, else 0
    project: Callable[[torch.Tensor], torch.Tensor]  # [..., C] → [..., D]
    embed: Callable[[Sequence[int]], torch.Tensor]  # token ids → [T, D]
    questions: Sequence[Sequence[int]]  # of each image: ids of the text after the last image of its prompt
    draws: Sequence[int] = ()  # of each image: a seed
    read: int = 0
    states: torch.Tensor | None = None  # I N C, as they left layer `read`
    taps: dict[int, Tap] = field(default_factory=dict)
    memory: dict = field(default_factory=dict)

    # ------------------------------------------------------------------ what reducers ask

    @property
    def patches(self) -> torch.Tensor:
        """[I, N, C] without the class token."""
        return self.states[:, self.class_tokens :]

    @cached_property
    def projected(self) -> torch.Tensor:
        """[I, N, D], what the decoder would read of all patches."""
        return self.project(self.patches)

    @property
    def side(self) -> int:
        """Patches in a row of the square grid."""
        side = round(self.V**0.5)
        if side * side != self.V:
            raise InputError(f"a square grid of patches is needed, and the tower makes {self.V}; choose another method")
        return side

    def attention(self, layer: int | None = None) -> torch.Tensor:
        """fp32 [I, H, V]: from the class token to the patches, in the layer that is read (or another one listened to)."""
        return self.taps[self.read if layer is None else layer].weights()[:, :, 0, self.class_tokens :]

    def received(self, layer: int) -> torch.Tensor:
        """fp32 [I, V]: attention that each patch gets, mean over heads and over all tokens that ask."""
        return self.taps[layer].weights().mean((1, 2))[:, self.class_tokens :]

    def keys(self, layer: int | None = None) -> torch.Tensor:
        """[I, N, d]: a layer's keys, mean over heads, class token first."""
        return self.taps[self.read if layer is None else layer].keys.mean(1)

    @cached_property
    def text(self) -> list[torch.Tensor]:
        """Of each image [T, D]: input embeddings of the text after the last image of its prompt."""
        return [self.embed(ids) for ids in self.questions]

    # ------------------------------------------------------------------ answers

    def select(self, index: torch.Tensor, **more: Any) -> Tokens:
        """Patches at `index` [I, n], in that order, projected."""
        whole = "projected" in self.__dict__  # somebody has asked for it
        features = self.projected if whole else self.patches
        features = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
        return Tokens(features if whole else self.project(features), index, **more)

    # ------------------------------------------------------------------ what the tower asks

    @property
    def beyond(self) -> int:
        return self.reducer.beyond

    def begin(self, read: int) -> None:
        self.read = read
        if self.reducer.class_token and not self.class_tokens:
            raise InputError("this method asks the vision tower's class token, and this tower has none; choose another")

    def rows(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        wanted = self.reducer.listens(layer, self.read)
        if wanted is None:
            return None
        asked = torch.arange(1 if wanted == CLASS else hidden.shape[1], device=hidden.device)
        return asked.expand(len(hidden), -1)

    def bias(self) -> torch.Tensor | None:
        return self.memory.get("bias")

    def within(self, layer: int, hidden: torch.Tensor, tap: Tap | None) -> torch.Tensor:
        if tap is not None:
            self.taps[layer] = tap
        return self.reducer.within(self, layer, hidden, tap)

    def between(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        if layer > self.read:
            return hidden
        return self.reducer.between(self, layer, hidden)


def best(scores: torch.Tensor, n: int) -> torch.Tensor:
    """[I, n]: indices of the highest of `scores` [I, V], in raster order; ties go to the earlier."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :n].sort(1).values
