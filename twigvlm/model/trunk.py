"""The base VLM as a road: embed a prompt, drive unmodified decoder layers one by one, read one attention row.

Knows nothing of twigs, pruning or drafts. Legend: B rows, S tokens, D width, V visual tokens an
image, H heads, d head width.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from ..errors import InputError, RunError
from .cache import Cache
from .describe import visual_tokens
from .stream import Stream


def slots(layers: Sequence[nn.Module]) -> list[int]:
    """The cache slots that these decoder layers write."""
    return [layer.self_attn.layer_idx for layer in layers]


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


def through(layer: nn.Module, hidden: torch.Tensor, mask: torch.Tensor | None, rotary, cache: Cache | None):
    """[B, S, D] through one decoder layer of any supported transformers."""
    memory = {cache_argument(type(layer)): cache}
    return layer(hidden, attention_mask=mask, position_embeddings=rotary, **memory)


class Trunk:
    """Drives a stock `LlavaForConditionalGeneration`, which stays as it is."""

    def __init__(self, model: LlavaForConditionalGeneration):
        self.model = model
        self.decoder = model.model.language_model
        self.layers = self.decoder.layers
        self.image_token_id = model.config.image_token_id
        text = model.config.text_config
        # Within a decoder's sliding window it attends to all; beyond it nothing is written.
        self.context = min(text.max_position_embeddings, getattr(text, "sliding_window", None) or sys.maxsize)
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

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
    def V(self) -> int:
        """Visual tokens per image."""
        return visual_tokens(self.model.config)

    def embed(self, input_ids: torch.Tensor, lengths: Sequence[int], pixel_values: torch.Tensor | None) -> Stream:
        """Prompts [B, S], right-padded, and images [images, 3, h, w] in the order of their tokens → Stream.

        Raises InputError when the image tokens are not V for each image, row by row, or the images
        have another size than the tower's.
        """
        ids = input_ids.to(self.device)
        visual = ids == self.image_token_id
        images = 0 if pixel_values is None else len(pixel_values)
        side = self.model.config.vision_config.image_size
        if images and pixel_values.shape[1:] != (3, side, side):
            raise InputError(
                f"pixel_values have shape {list(pixel_values.shape)}; [images, 3, {side}, {side}] is needed"
            )
        tokens = int(visual.sum())
        if tokens != images * self.V:
            raise InputError(
                f"input_ids hold {tokens} image tokens (id {self.image_token_id}), but {images} images need "
                f"{images} x {self.V} = {images * self.V}; repeat the image token {self.V} times per image"
            )
        for b, count in enumerate(visual.sum(1).tolist()):
            if count % self.V:
                raise InputError(
                    f"row {b} of input_ids holds {count} image tokens; whole images of {self.V} tokens are needed"
                )
        hidden = self.decoder.embed_tokens(ids.masked_fill(visual, 0))
        if images:
            hidden[visual] = self.image_features(pixel_values).flatten(0, 1).to(hidden)
        positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        return Stream(hidden, positions, visual, tuple(lengths))

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, 3, h, w] → projected visual tokens [images, V, D]."""
        out = self.model.get_image_features(pixel_values=pixel_values.to(self.device, self.dtype))
        features = getattr(out, "pooler_output", out)
        return torch.stack(list(features)) if not torch.is_tensor(features) else features

    def tokens(self, ids: Sequence[int], positions: Sequence[int], lengths: Sequence[int]) -> Stream:
        """One new token per row as a Stream of width 1 (rows of length 0 are padding)."""
        ids = torch.tensor(ids, device=self.device)[:, None]
        places = torch.tensor(positions, device=self.device)[:, None]
        return Stream(self.decoder.embed_tokens(ids), places, torch.zeros_like(ids, dtype=torch.bool), tuple(lengths))

    def run(self, layers: Sequence[nn.Module], stream: Stream, cache: Cache | None) -> Stream:
        """Through these layers, which must hold the same tokens in the cache (None: nothing is remembered)."""
        if not len(layers):
            return stream
        past = cache.lengths(layers[0].self_attn.layer_idx) if cache is not None else (0,) * len(stream.lengths)
        mask = self._mask(stream, past)
        rotary = self._rotary_at(stream.positions)
        hidden = stream.hidden
        for layer in layers:
            hidden = through(layer, hidden, mask, rotary, cache)
        if cache is not None:
            cache.advance(slots(layers), stream.lengths)
        return Stream(hidden, stream.positions, stream.visual, stream.lengths)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] that left the last layer → fp32 [..., vocabulary]."""
        return self.model.lm_head(self.decoder.norm(hidden)).float()

    def attention(self, layer: nn.Module, stream: Stream, cache: Cache, rows: torch.Tensor) -> torch.Tensor:
        """What the marked query rows of `layer` attend to: fp32 [B, S], summed over rows, mean over heads.

        `stream` is what entered the layer, as it did at prefill (the layer's slot holds the same
        tokens); `rows` [B, S] bool marks the queries. Softmax over the full causal row, as eager
        attention computes it, for just these rows (paper section 3.2).
        """
        attention = layer.self_attn
        count = rows.sum(1).max().item()
        order = rows.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :count]  # B Q
        chosen = stream.hidden.gather(1, order[..., None].expand(-1, -1, stream.hidden.shape[-1]))
        query = attention.q_proj(layer.input_layernorm(chosen)).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        cos, sin = (t[:, None] for t in self._rotary_at(stream.positions.gather(1, order)))
        query = query * cos + rotate_half(query) * sin  # B H Q d
        keys = cache.keys(layer.self_attn.layer_idx)
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
        scores = (query @ keys.transpose(2, 3) * attention.scaling).float()
        seen = torch.arange(keys.shape[2], device=order.device) <= order[..., None]  # B Q S
        scores = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).mean(1)  # B Q S
        return (scores * rows.gather(1, order)[..., None]).sum(1)

    def _rotary_at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, S, d], from a table made once: a look-up is cheaper than two kernels a call."""
        if self._rotary is None:
            places = torch.arange(self.context, device=self.device)[None]
            like = torch.empty(0, device=self.device, dtype=self.dtype)
            self._rotary = tuple(t[0] for t in self.decoder.rotary_emb(like, places))
        cos, sin = self._rotary
        return cos[positions], sin[positions]

    def _mask(self, stream: Stream, past: tuple[int, ...]) -> torch.Tensor | None:
        """None where plain causal attention is right, else [B, 1, S, keys] (bottom-right causal).

        At prefill padding stands behind everything that is real, so causality hides it.
        """
        width, eager = stream.width, self.decoder.config._attn_implementation == "eager"
        ragged = min(past) != max(past)
        if not ragged and (width == 1 or (max(past) == 0 and not eager)):
            return None
        if not ragged and self.decoder.config._attn_implementation.startswith("flash"):
            return None  # its causal mask is bottom-right by itself
        start = torch.tensor(past, device=self.device)[:, None, None]
        steps = torch.arange(width, device=self.device)[:, None]
        keys = torch.arange(max(past) + width, device=self.device)
        seen = (keys <= start + steps)[:, None]  # B 1 S keys
        if not eager:
            return seen
        return torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, torch.finfo(self.dtype).min)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)
