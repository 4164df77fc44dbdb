"""The base VLM as a road: embed a prompt, drive unmodified decoder layers one by one, listen to one attention.

Knows nothing of twigs, pruning or drafts. Legend: B rows, S tokens, D width, V visual tokens an
image, H heads, d head width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from ..errors import InputError, RunError
from .cache import CacheGroup
from .skinny import quick
from .stream import Stream
from .tap import Peeked, Tap, tapped
from .tower import Tower, Watcher

TABLE = 2**17  # places that a table of rotations has, at most: 128 MB for heads of 128 in fp32


@dataclass(frozen=True)
class Attention:
    """What all layers of a group share in one call, made once: who sees whom, the rotation, where keys go."""

    mask: torch.Tensor | None  # B 1 S keys, as the backend wants it
    rotary: tuple[torch.Tensor, torch.Tensor]  # cos and sin, B S d
    cache: CacheGroup | None


@functools.cache
def cache_argument(kind: type[nn.Module]) -> str:
    """What decoder layers of this class call their cache: `cache` from transformers 5.24 on, `past_key_values` before.

    Layers take any other name without a word and would then remember nothing: RunError.
    """
    taken = inspect.signature(kind.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in taken:
            return name
    raise RunError(
        f"{kind.__name__}.forward takes a cache neither as `cache` nor as `past_key_values`; "
        "a release of transformers that this package was tested with is needed: see requirements.txt"
    )


def through(layer: nn.Module, hidden: torch.Tensor, mask: torch.Tensor | None, rotary, cache, **more) -> torch.Tensor:
    """[B, S, D] through one decoder layer of any supported transformers."""
    memory = {cache_argument(type(layer)): cache}
    return layer(hidden, attention_mask=mask, position_embeddings=rotary, **memory, **more)


class Family(Protocol):
    """What differs between families of models: see `twigvlm.families`."""

    model: nn.Module
    decoder: nn.Module
    head: nn.Linear
    image_token_id: int
    context: int
    V: int

    processor: Callable  # (configuration, folder, LLaVA's own layout) → Hugging Face's processor
    prompts: Callable  # (processor, configuration) → how the model is asked

    def sizes(self, pixel_values: torch.Tensor | None) -> list[int]: ...
    def see(self, pixel_values: torch.Tensor) -> list[torch.Tensor]: ...
    def tower(self) -> Tower: ...
    def project(self, states: torch.Tensor) -> torch.Tensor: ...
    def positions(self, place: torch.Tensor) -> torch.Tensor: ...


class Trunk:
    """Drives a stock model, which stays as it is."""

    def __init__(self, family: Family):
        self.family, self.model, self.decoder = family, family.model, family.decoder
        self.layers = self.decoder.layers
        self.image_token_id, self.context = family.image_token_id, family.context
        self._rotary: torch.Tensor | None = None  # 2 places d, cos and sin

    @property
    def L(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed_tokens.weight.dtype

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return self.family.head.out_features

    @property
    def V(self) -> int:
        """Visual tokens per image."""
        return self.family.V

    # ------------------------------------------------------------------ what goes in

    def embed(self, input_ids: torch.Tensor, lengths: Sequence[int], pixel_values: torch.Tensor | None) -> Stream:
        """Prompts [B, S], right-padded, and images [images, 3, h, w] in the order of their tokens → Stream.

        Raises InputError when the image tokens are not as many as each image needs, row by row, or the
        images have another size than the tower's.
        """
        stream = self.lay_out(input_ids, lengths, pixel_values)
        if pixel_values is None or not len(pixel_values):
            return stream
        flat = torch.cat(self.image_features(pixel_values)).to(stream.hidden)
        return replace(stream, hidden=stream.hidden.masked_scatter((stream.visual >= 0)[..., None], flat))

    def lay_out(self, input_ids: torch.Tensor, lengths: Sequence[int], pixel_values: torch.Tensor | None) -> Stream:
        """`embed` before anybody has looked at the pictures: their tokens hold nothing yet."""
        ids = input_ids.cpu()  # places are counted on the host, before the device is asked anything
        visual = ids == self.image_token_id
        sizes = self._sizes(visual, pixel_values)
        place = torch.arange(ids.shape[1]).expand_as(ids)
        place = place.masked_fill(place >= torch.tensor(lengths)[:, None], -1).to(self.device)
        hidden = self.embed_text(ids.masked_fill(visual, 0))
        full = min(lengths) == ids.shape[1]
        return Stream(hidden, self.family.positions(place), place, _pictures(visual, sizes).to(self.device), full)

    def embed_text(self, ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Token ids [...] → [..., D]."""
        return self.decoder.embed_tokens(torch.as_tensor(ids, dtype=torch.long, device=self.device))

    def image_features(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Images → projected visual tokens of each [size, D]."""
        return self.family.see(pixel_values.to(self.device, self.dtype))

    def look(self, pixel_values: torch.Tensor, watcher: Watcher) -> torch.Tensor:
        """Images → states [images, N, C] of the vision tower, where `watcher` may look in and merge: see `model.tower`."""
        return self.family.tower().look(pixel_values.to(self.device, self.dtype), watcher)

    def _sizes(self, visual: torch.Tensor, pixel_values: torch.Tensor | None) -> list[int]:
        """Tokens of each image, after comparing them with the image tokens of each row."""
        sizes, tokens = self.family.sizes(pixel_values), int(visual.sum())
        images = len(sizes)
        if tokens != sum(sizes):
            raise InputError(
                f"input_ids hold {tokens} image tokens (id {self.image_token_id}), but {images} images need "
                f"{images} x {self.V} = {sum(sizes)}; repeat the image token {self.V} times per image"
            )
        ends = torch.tensor([0, *sizes]).cumsum(0)
        for b, end in enumerate(visual.sum(1).cumsum(0).tolist()):
            if end not in ends:
                raise InputError(
                    f"row {b} of input_ids holds {int(visual[b].sum())} image tokens; whole images of {self.V} tokens "
                    "are needed"
                )
        return sizes

    def tokens(self, ids: torch.Tensor, place: torch.Tensor, full: bool = False) -> Stream:
        """New text tokens [B, S] at `place` [B, S] (-1: padding) as a Stream."""
        hidden = self.decoder.embed_tokens(ids)
        return Stream(hidden, place.clamp(0, self.context - 1)[None], place, torch.full_like(place, -1), full)

    # ------------------------------------------------------------------ through the layers

    def attend(self, stream: Stream, cache: CacheGroup | None = None, sight: torch.Tensor | None = None) -> Attention:
        """What the layers of one group need to read `stream` behind what `cache` holds.

        `sight`: see `CacheGroup.begin`. Without a cache nothing is remembered (and gradients flow).
        """
        mask = cache.begin(stream.width, sight) if cache is not None else None
        if mask is None and stream.width > 1 and self.decoder.config._attn_implementation in ("eager", None):
            # Eager attention is causal by its mask alone.
            mask = torch.ones(stream.width, stream.width, dtype=torch.bool, device=self.device).tril()[None, None]
        if mask is not None:
            mask = self._additive(mask)
        return Attention(mask, self.rotary_at(stream.positions), cache)

    def run(
        self,
        layers: Sequence[nn.Module],
        stream: Stream,
        attention: Attention | None = None,
        taps: Sequence[Tap] = (),
    ) -> Stream:
        """Through these layers, which hold the same tokens in one group of the cache; `taps` listen to some."""
        if not len(layers):
            return stream
        attention = attention or self.attend(stream)
        hidden = stream.hidden
        drafting = layers[0].self_attn.layer_idx >= len(self.layers)  # a twig's
        with quick(layers, fewest=1 if drafting else 2):
            for layer in layers:
                heard = [t for t in taps if t.module is layer.self_attn] if taps else ()
                hidden = self._call(layer, hidden, attention, heard)
        return replace(stream, hidden=hidden)

    def peek(self, layer: nn.Module, stream: Stream, rows: torch.Tensor, whole: bool = False) -> Tap:
        """Query and keys that `layer` would use for the tokens `rows` [B, Q], without running it; `whole`: see `Tap`."""
        tap = Tap(layer.self_attn, rows, peek=True, whole=whole)
        normed = layer.input_layernorm(stream.hidden)
        tap.read_normed(normed)
        with tapped(layer.self_attn.config), suppress(Peeked):
            layer.self_attn(
                normed, position_embeddings=self.rotary_at(stream.positions), attention_mask=None, taps=[tap]
            )
        return tap

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] that left the last layer → fp32 [..., vocabulary]."""
        with quick([self.family.head]):
            return self.family.head(self.decoder.norm(hidden)).float()

    def _call(self, layer: nn.Module, hidden: torch.Tensor, attention: Attention, taps: Sequence[Tap]) -> torch.Tensor:
        facts = (attention.mask, attention.rotary, attention.cache)
        if not taps:
            return through(layer, hidden, *facts)
        for tap in taps:
            tap.read_normed(layer.input_layernorm(hidden))
        with tapped(layer.self_attn.config):
            return through(layer, hidden, *facts, taps=taps)

    def rotary_at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, S, d], from a table made once: a look-up is cheaper than two kernels a call.

        A context that no memory would hold a table of is said by some; few places of it are ever used.
        """
        if self.context > TABLE:
            return self._turns(positions[0])
        if self._rotary is None:
            self._rotary = torch.cat(self._turns(torch.arange(self.context, device=self.device)[None]))
        return self._rotary[:, positions[0]].unbind()

    def _turns(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.decoder.rotary_emb(torch.empty(0, device=self.device, dtype=self.dtype), positions)

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        """What is added to the scores, made once a group: a bool mask would be turned into this in every layer."""
        hidden = torch.full(seen.shape, torch.finfo(self.dtype).min, dtype=self.dtype, device=seen.device)
        return hidden.masked_fill_(seen, 0)


def _pictures(visual: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """[B, S] int64: the number of the picture that a token belongs to, counted over its row; -1 is text."""
    out = torch.full(visual.shape, -1)
    if sizes:
        numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        out = out.masked_scatter(visual, numbers)
        first = out.masked_fill(~visual, len(sizes)).min(1, keepdim=True).values
        out = torch.where(visual, out - first, out)
    return out


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)
