"""The vision tower as a road: unmodified layers, one by one, for whoever wants to look in or to merge on the way.

Layers behind the one that is read do not run. Legend: I images, N tokens now (the class
token first where there is one), C tower width, V patches, H heads.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
from torch import nn

from ..errors import InputError
from .tap import Tap, tapped


class Watcher(Protocol):
    """Who looks in. `beyond` counts layers behind the one whose output is read that are to run as well."""

    beyond: int

    def begin(self, read: int) -> None:
        """Output of layer `read` is what the decoder gets."""

    def rows(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """[I, Q] tokens of `hidden` whose query is wanted in this layer; None: no interest."""

    def bias(self) -> torch.Tensor | None:
        """[I, 1, 1, N], added to all scores of the next layer."""

    def within(self, layer: int, hidden: torch.Tensor, tap: Tap | None) -> torch.Tensor:
        """What the layer's MLP reads in place of `hidden` [I, N, C], which its attention has left."""

    def between(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the next layer reads in place of `hidden` [I, N, C], which this one has left."""


class Tower:
    """A stock tower of pre-norm layers (CLIP, SigLIP). `read`: the layer whose output is used; 0 is the first."""

    def __init__(self, model: nn.Module, read: int):
        self.model, self.read = model, read

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.encoder.layers

    @property
    def class_tokens(self) -> int:
        """1 where a class token stands in front of the patches, else 0."""
        return int(hasattr(self.model.embeddings, "class_embedding"))

    def look(self, pixel_values: torch.Tensor, watcher: Watcher | None = None) -> torch.Tensor:
        """Images → states [I, N, C] that left layer `read`, class token first."""
        if watcher is not None:
            watcher.begin(self.read)
        last = self.read + (watcher.beyond if watcher is not None else 0)
        if last >= len(self.layers):
            raise InputError(
                f"layer {last} of the vision tower is asked, and it has {len(self.layers)}; "
                "this method needs one behind the layer that is read: choose another"
            )
        hidden = self.model.embeddings(pixel_values)
        hidden = getattr(self.model, "pre_layrnorm", nn.Identity())(hidden)
        found = hidden  # with read = -1 no layer runs
        for number, layer in enumerate(self.layers[: last + 1]):
            hidden = (
                layer(hidden, attention_mask=None) if watcher is None else self._watched(layer, number, hidden, watcher)
            )
            found = hidden if number == self.read else found
        return found

    def _watched(self, layer: nn.Module, number: int, hidden: torch.Tensor, watcher: Watcher) -> torch.Tensor:
        rows = watcher.rows(number, hidden)
        tap = Tap(layer.self_attn, rows, causal=False) if rows is not None else None
        normed = layer.layer_norm1(hidden)
        with tapped(layer.self_attn.config) if tap is not None else nullcontext():
            listen = {"taps": [tap]} if tap is not None else {}
            attended = layer.self_attn(normed, attention_mask=watcher.bias(), **listen)[0]
        if tap is not None and tap.query is None:
            raise InputError(
                f"{type(layer.self_attn).__name__} of this vision tower cannot be listened to; choose a method that asks "
                "nothing of the tower (uniform, downsample, divprune) or acts within the decoder"
            )
        hidden = watcher.within(number, hidden + attended, tap)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        return watcher.between(number, hidden)
