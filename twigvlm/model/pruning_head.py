"""The pruning head of TwigVLM++: a score of its own for visual tokens, beside the twig's attention (arXiv 2503.14075v3).

Two gates scale the query and the keys that the last twig layer has rotated; the score is the attention of the
gated query to the gated visual keys alone. It knows neither cache nor stream.
Legend: B rows, Q asked rows, V' visual tokens, D width, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..config import STARTS, HeadStart
from ..errors import InputError
from .tap import Tap, share

NAME = "leaf_attention_module"  # of the head among a twig's weights, as released


class PruningHead(nn.Module):
    """Gates for H query heads and for the key heads; `start` says how they begin and what they make of their product.

    "released": torch's usual random weights, gate = max(z, 0) * sigmoid(z), as published. "identity": weights 0 and
    gate = 2 * sigmoid(z), so that it begins as the twig's own attention to the image.
    """

    def __init__(self, hidden: int, queries: int, keys: int, start: HeadStart = "released"):
        """`queries` and `keys` are the widths of the layer's two projections."""
        super().__init__()
        if start not in STARTS:
            raise InputError(f"pruning head is {start!r}; {' or '.join(STARTS)} is needed")
        self.start = start
        self.q_gate, self.k_gate = nn.Linear(hidden, queries, bias=False), nn.Linear(hidden, keys, bias=False)
        if start == "identity":
            for linear in (self.q_gate, self.k_gate):
                nn.init.zeros_(linear.weight)

    def forward(
        self,
        asked: torch.Tensor,
        query: torch.Tensor,
        visual: torch.Tensor,
        keys: torch.Tensor,
        seen: torch.Tensor,
        scaling: float | None = None,
    ) -> torch.Tensor:
        """fp32 [B, Q, V']: of each asked row 1 in all over the tokens that are `seen` [B, Q, V'], or 0 where none is.

        asked [B, Q, D] and visual [B, V', D] are what enters the layer's projections; query [B, H, Q, d] and keys
        [B, key heads, V', d] what these made of it, rotated; `scaling` is the layer's (default: 1 / sqrt(d)).
        """
        return share(self._gated(self.q_gate, asked, query), self._gated(self.k_gate, visual, keys), seen, scaling)

    def of_tap(self, tap: Tap, columns: torch.Tensor) -> torch.Tensor:
        """fp32 [B, Q, V']: the score of the tokens at `columns` [B, V'] (-1 pads) for the rows of a tap that heard all."""
        visual, keys = tap.at(columns)
        return self(tap.normed, tap.query, visual, keys, tap.sees(columns), tap.scaling)

    def _gated(self, linear: nn.Linear, normed: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        z = linear(normed)
        gate = 2 * torch.sigmoid(z) if self.start == "identity" else F.relu(z) * torch.sigmoid(z)
        B, count, N, d = heads.shape
        return gate.view(B, N, count, d).transpose(1, 2) * heads


def head_for(attention: nn.Module, start: HeadStart) -> PruningHead:
    """A fresh head for this attention module of a decoder layer, whatever its heads."""
    queries, keys = attention.q_proj, attention.k_proj
    return PruningHead(queries.in_features, queries.out_features, keys.out_features, start)
