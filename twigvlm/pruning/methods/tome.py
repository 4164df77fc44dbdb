"""ToMe (ICLR 2023): patches of similar keys are merged inside the tower, some in every layer.

Between attention and MLP of each layer up to the one that the decoder gets: tokens at even places (the class token is
the first and stays) look for the most similar one at odd places, by keys (mean over heads), and the r pairs that
are most similar become one, their mean weighted by the patches that each stands for. Later layers add the logarithm of that size
to the attention logits. What was merged stands behind what was not, so the decoder reads a permuted raster; `sort` puts
tokens where the earliest of their patches was.
Ours, since no setup for LLaVA is published: the V - R merges are spread evenly over the layers, one more in the earliest ones
(192: 17 in 16 layers and 16 in 7, 128: 20 and 19, 64: 23 and 22); a layer that has too few pairs for its r matches
what it has left again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...model.tap import Tap
from ..plan import Shape, TowerMethod
from ..reducer import CLASS, Leaving, Reducer, Tokens, View
from ..select import cosine


def merges(total: int, layers: int, layer: int) -> int:
    """How many of `total` are merged in one of `layers`."""
    return total // layers + (layer < total % layers)


@dataclass
class Merged:
    """Tokens [I, N, C] on their way, with their keys [I, N, d], the patches that each stands for and the first of them [I, N]."""

    hidden: torch.Tensor
    keys: torch.Tensor
    size: torch.Tensor
    first: torch.Tensor

    def pair(self, r: int, protected: int) -> Merged:
        """`r` tokens fewer; the `protected` (0 or 1) at the front stays as it is."""
        even, odd = self._at(slice(0, None, 2)), self._at(slice(1, None, 2))
        near, partner = cosine(even.keys, odd.keys).max(2)
        near = torch.cat([near.new_full((len(near), protected), -torch.inf), near[:, protected:]], 1)
        order = near.argsort(dim=1, descending=True, stable=True)
        gone, stay = order[:, :r], order[:, r:].sort(1).values
        goes, kept, to = even.take(gone), even.take(stay), partner.gather(1, gone)
        total = odd.size.scatter_add(1, to, goes.size)
        return Merged(
            torch.cat([kept.hidden, _mean(odd.hidden, odd.size, goes.hidden, goes.size, to, total)], 1),
            torch.cat([kept.keys, _mean(odd.keys, odd.size, goes.keys, goes.size, to, total)], 1),
            torch.cat([kept.size, total], 1),
            torch.cat([kept.first, odd.first.scatter_reduce(1, to, goes.first, "amin")], 1),
        )

    def take(self, index: torch.Tensor) -> Merged:
        wide = index[..., None]
        hidden, keys = (t.gather(1, wide.expand(-1, -1, t.shape[2])) for t in (self.hidden, self.keys))
        return Merged(hidden, keys, self.size.gather(1, index), self.first.gather(1, index))

    def _at(self, part: slice) -> Merged:
        return Merged(self.hidden[:, part], self.keys[:, part], self.size[:, part], self.first[:, part])


def _mean(own, size, others, sizes, to, total) -> torch.Tensor:
    """[I, N, C]: `own` with the `others` [I, r, C] that go `to` [I, r], weighted by their sizes."""
    summed = own.float() * size[..., None]
    summed = summed.scatter_add(1, to[..., None].expand_as(others), others.float() * sizes[..., None])
    return (summed / total[..., None]).to(own)


@dataclass(frozen=True)
class Merge(Leaving):
    """n tokens of V patches."""

    V: int
    sort: bool = False

    def listens(self, layer: int, read: int) -> str | None:
        return CLASS if layer <= read else None  # for the keys

    def within_tokens(self, layer: int, read: int, N: int) -> int:
        return N - merges(self.V - self.n, read + 1, layer)

    def within(self, view: View, layer: int, hidden: torch.Tensor, tap: Tap | None) -> torch.Tensor:
        r = merges(self.V - self.n, view.read + 1, layer) if layer <= view.read else 0
        if r == 0:
            return hidden
        memory = view.memory
        if "size" not in memory:
            ones = torch.ones(hidden.shape[:2], device=hidden.device)
            patch = torch.arange(hidden.shape[1], device=hidden.device) - view.class_tokens
            memory |= {"size": ones, "first": patch.expand(len(hidden), -1)}
        now = Merged(hidden, view.keys(layer), memory["size"], memory["first"])
        while r:
            pairs = min(r, (now.hidden.shape[1] - view.class_tokens) // 2)
            now, r = now.pair(pairs, view.class_tokens), r - pairs
        memory |= {"size": now.size, "first": now.first, "bias": now.size.log().to(hidden)[:, None, None]}
        return now.hidden

    def __call__(self, view: View) -> Tokens:
        patches = view.patches
        every = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
        source = view.memory["first"][:, view.class_tokens :] if "first" in view.memory else every
        order = source.argsort(1) if self.sort else every
        return Tokens(view.select(order).features, source.gather(1, order))


@dataclass(frozen=True)
class ToMe(TowerMethod):
    """`sort`: tokens in the order of the earliest patch of each."""

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "ToMe, ICLR 2023"
    summary: ClassVar[str] = "similar patches merged in every layer of the tower"
    sort: bool = False

    def reducer(self, n: int, shape: Shape) -> Reducer:
        return Merge(n, shape.V, self.sort)
