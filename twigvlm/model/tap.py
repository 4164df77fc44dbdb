"""Query and key of chosen rows, read inside a layer's own attention function.

What arrives there has been normed, rotated and grouped by the layer itself, so a row of attention
is right for any head layout, and nothing is projected twice. A tap is handed to the layer as a
keyword; the functions registered here look at it and then do what the plain ones do.
Legend: B rows, Q asked rows, H heads, N keys, d head width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

PREFIX = "tapped_"


class Peeked(Exception):
    """Leaves a module whose query and keys were all that was wanted of it."""


class Tap:
    """Listens to one attention module for the tokens at `rows` [B, Q] (-1 pads) of what enters it.

    Afterwards `query` [B, H, Q, d], `keys` [B, key heads, N, d] (a view) and `scaling` are what the
    module used, and `normed` [B, Q, D] the input of its projections (`entered` [B, N, D] that of all tokens, for
    who asked for the `whole`). `peek` stops there, with `Peeked`: nothing is attended to. The cache must have
    been empty, so that key j is token j.
    """

    def __init__(
        self, module: nn.Module, rows: torch.Tensor, causal: bool = True, peek: bool = False, whole: bool = False
    ):
        self.module, self.rows, self.causal, self.peek, self.whole = module, rows, causal, peek, whole
        self.entered: torch.Tensor | None = None
        self.query: torch.Tensor | None = None
        self.keys: torch.Tensor | None = None
        self.normed: torch.Tensor | None = None
        self.scaling = 1.0
        self._weights: torch.Tensor | None = None

    def read(self, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> None:
        """Called from inside the attention function."""
        at = self.rows.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        self.query, self.keys = query.gather(2, at), key
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def read_normed(self, normed: torch.Tensor) -> None:
        self.normed = normed.gather(1, self.rows.clamp(min=0)[..., None].expand(-1, -1, normed.shape[-1]))
        self.entered = normed if self.whole else None

    def at(self, columns: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What entered [B, W, D] (None unless the whole was heard) and the keys [B, key heads, W, d] of the tokens at `columns` [B, W]."""
        at = columns.clamp(min=0)
        keys = self.keys.gather(2, at[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        if self.entered is None:
            return None, keys
        return self.entered.gather(1, at[..., None].expand(-1, -1, self.entered.shape[-1])), keys

    def sees(self, columns: torch.Tensor) -> torch.Tensor:
        """[B, Q, W] bool: which of the tokens at `columns` [B, W] (-1 pads) stand before or at each asked row."""
        return (columns >= 0)[:, None] & (columns[:, None] <= self.rows[..., None])

    def weights(self, bias: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 [B, H, Q, N]: softmax over all that an asked row may see, as eager attention computes it.

        `bias` [B, 1, 1, N] is what was added to the scores.
        """
        keys = self.keys.repeat_interleave(self.query.shape[1] // self.keys.shape[1], 1)
        scores = (self.query @ keys.transpose(2, 3) * self.scaling).float()
        if bias is not None:
            scores = scores + bias.float()
        if self.causal:
            seen = torch.arange(keys.shape[2], device=keys.device) <= self.rows.clamp(min=0)[..., None]
            scores = scores.masked_fill(~seen[:, None], -torch.inf)
        return scores.softmax(-1)


def share(query: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor, scaling: float | None = None) -> torch.Tensor:
    """fp32 [B, Q, W]: attention of query [B, H, Q, d] to keys [B, key heads, W, d], mean over heads.

    Among the keys that are `seen` [B, Q, W] alone: a row's numbers make up 1, or are 0 where it sees none.
    """
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        scores = query.float() @ keys.float().transpose(2, 3) * scaling
    scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)  # a row may see nothing: no infinity
    return scores.softmax(-1).mean(1) * seen


@contextmanager
def tapped(config) -> Iterator[None]:
    """While it lasts, modules of this configuration call the functions that look at taps."""
    plain = config._attn_implementation
    config._attn_implementation = PREFIX + (plain or "eager")  # None is what transformers calls eager, too
    try:
        yield
    finally:
        config._attn_implementation = plain


def _flash_or_sdpa(module, query, key, value, attention_mask, **settings):
    """Flash attention where causality says it all; rows of unequal length carry a mask, which it cannot take."""
    forward = flash_attention_forward if attention_mask is None else sdpa_attention_forward
    return forward(module, query, key, value, attention_mask, **settings)


def _eager(module, *args, **settings):
    """The one of the model's own file: eager attention is registered nowhere."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **settings)


PLAIN = {"sdpa": sdpa_attention_forward, "flash_or_sdpa": _flash_or_sdpa, "eager": _eager}


def _listening(forward):
    def attend(module, query, key, value, attention_mask, taps: Sequence[Tap] = (), **settings):
        for tap in taps:
            if tap.module is module:
                tap.read(query, key, settings.get("scaling"))
                if tap.peek:
                    raise Peeked
        return forward(module, query, key, value, attention_mask, **settings)

    return attend


for _name, _forward in PLAIN.items():
    AttentionInterface.register(PREFIX + _name, _listening(_forward))
    AttentionMaskInterface.register(
        PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS["eager" if _name == "eager" else "sdpa"]
    )
AttentionInterface.register("flash_or_sdpa", _flash_or_sdpa)
