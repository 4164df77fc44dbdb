"""Where the decoder should look, as losses on a few heads' attention.

Left to itself a small decoder finds these look-ups late and suddenly, after hundreds of thousands
of questions; told where to look, the heads find them in minutes, and what reads them follows. Three
look-ups, in the order in which an answer needs them: a token that names something looks at the
cell where it stands; the last token of a question looks at all that the answer depends on, which
is what a twig's attention can tell the base to keep; and among options it points at the right one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ...model.trunk import rotate_half
from ...world.draw import IMAGE_SIZE, PATCH
from ...world.scenes import GRID

SIDE = IMAGE_SIZE // PATCH
SPAN = SIDE // GRID  # patches along a cell
CELL_BITS = [1 << ((p // SIDE // SPAN) * GRID + p % SIDE // SPAN) for p in range(SIDE * SIDE)]
NAMES, EVIDENCE, POINTS = 1, 3, 5  # the layer of the shallow decoder for each look-up
HEADS = {NAMES: 2, EVIDENCE: 3, POINTS: 2}
HIDDEN = -1e4


@dataclass(frozen=True)
class Scope:
    """What a loss sees of a forward: a layer's input [B, S, D], the rotary pair, and where the slots begin in S."""

    hidden: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    prefix: int


def names(layer, scope: Scope, batch: dict) -> torch.Tensor:
    """Tokens that name something look at any patch that shows it."""
    kept, symbols = batch["keep"], batch["symbols"]
    bits = torch.tensor(CELL_BITS, device=kept.device)[kept]
    shown = symbols[..., 0] + (symbols[..., 6] * (symbols[..., 0] == 0) * (symbols[..., 6] != batch["nothing"])) > 0
    rows, places = batch["looks"].nonzero(as_tuple=True)
    wanted = (batch["looks"][rows, places, None] & bits > 0) & shown[rows]
    found = wanted.any(-1)
    rows, places, wanted = rows[found], places[found], wanted[found]
    spent = _visual_attention(layer, scope, rows, places, len(kept), HEADS[NAMES])
    return -spent.masked_fill(~wanted[:, None], HIDDEN).logsumexp(-1).mean()


def evidence(layer, scope: Scope, batch: dict) -> torch.Tensor:
    """Before an answer: the same attention for every cell that matters, spent on the patches around its centre.

    Equal shares and few patches, so that the best tokens of a small budget cover all objects.
    """
    kept, centres = batch["keep"], batch["centres"]  # [V'], [B, cells]
    rows, places = batch["evidence"].nonzero(as_tuple=True)
    cells = (batch["evidence"][rows, places, None] >> torch.arange(GRID**2, device=kept.device)) & 1 > 0  # [n, cells]
    near = ((kept // SIDE)[None, None] - (centres // SIDE)[..., None]).abs() <= 1
    near &= ((kept % SIDE)[None, None] - (centres % SIDE)[..., None]).abs() <= 1
    near &= (centres >= 0)[..., None]  # [B, cells, V']
    wanted = cells & near.any(-1)[rows]
    spent = _visual_attention(layer, scope, rows, places, len(kept), HEADS[EVIDENCE])
    shares = spent[:, :, None].masked_fill(~near[rows][:, None], HIDDEN).logsumexp(-1)  # [n, heads, cells]
    mean = (shares * wanted[:, None]).sum(-1) / wanted.sum(-1).clamp(min=1)[:, None]
    # With n cells the best that can be is -log n: taken off, so that the figure reads as a distance.
    best = wanted.sum(-1).clamp(min=1).float().log()[:, None]
    return (-mean - best)[wanted.any(-1)].mean()


def points(layer, scope: Scope, batch: dict) -> torch.Tensor:
    """Before an option's letter: attention at the end of the right option, among the question's own tokens."""
    rows, places = (batch["points"] >= 0).nonzero(as_tuple=True)
    if not len(rows):
        return scope.hidden.new_zeros(())
    slots = (batch["positions"] == 0).cumsum(-1)  # [B, S]
    own = slots[rows] == slots[rows, places, None]
    own &= torch.arange(slots.shape[1], device=own.device) <= places[:, None]
    keys = slice(scope.prefix, None)
    scores = _scores(layer, scope, rows, places, keys, HEADS[POINTS]).masked_fill(~own[:, None], HIDDEN)
    right = batch["points"][rows, places][:, None, None].expand(-1, scores.shape[1], 1)
    return -scores.log_softmax(-1).gather(-1, right).mean()


def _visual_attention(layer, scope: Scope, rows, places, count: int, heads: int) -> torch.Tensor:
    """Log attention among the `count` visual tokens alone [n, heads, count]."""
    return _scores(layer, scope, rows, places, slice(scope.prefix - count, scope.prefix), heads).log_softmax(-1)


def _scores(layer, scope: Scope, rows, places, keys: slice, heads: int) -> torch.Tensor:
    """Attention logits of the slots' tokens (rows, places) over the tokens `keys`, first heads only: fp32 [n, heads, keys]."""
    attention = layer.self_attn
    heads = min(heads, attention.q_proj.out_features // attention.head_dim)
    normed, width = layer.input_layernorm(scope.hidden), heads * attention.head_dim
    asked = scope.prefix + places
    query = F.linear(normed[rows, asked], attention.q_proj.weight[:width]).float().unflatten(-1, (heads, -1))
    key = F.linear(normed[:, keys], attention.k_proj.weight[:width]).float().unflatten(-1, (heads, -1))
    cos, sin = (t.float().unsqueeze(2) for t in scope.rotary)
    query = query * cos[rows, asked] + rotate_half(query) * sin[rows, asked]
    key = key * cos[:, keys] + rotate_half(key) * sin[:, keys]
    return torch.einsum("nhd,nkhd->nhk", query, key[rows]) * attention.scaling


LOOKS = {NAMES: names, EVIDENCE: evidence, POINTS: points}
