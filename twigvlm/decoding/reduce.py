"""Where an image's tokens stand in a batch, for reducers that choose among them before the decoder.

Legend: B rows, S tokens, D width, V visual tokens an image, c merged tokens an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pruning.plan import Reducer


@dataclass(frozen=True)
class Reduced:
    """A reducer's choice, row by row: what stays [B, S], what comes in [B, n, D] behind which index [B, n]."""

    keep: torch.Tensor
    merged: torch.Tensor | None
    behind: torch.Tensor | None
    room: list[int]  # visual tokens of each row at most


def reduce(reducer: Reducer, prompts, trunk) -> Reduced:
    """Ask `reducer` about every image; images are blocks of V tokens, in their order."""
    stream, V = prompts.stream, trunk.V
    device = stream.place.device
    columns = [[i for i, t in enumerate(row) if t == trunk.image_token_id] for row in prompts.ids]
    images = [(b, cols[i : i + V]) for b, cols in enumerate(columns) for i in range(0, len(cols), V)]
    row = torch.tensor([b for b, _ in images], device=device)[:, None]
    column = torch.tensor([cols for _, cols in images], device=device)
    scores = None
    if prompts.tap is not None:
        scores = prompts.tap.weights().mean(1)[:, 0]
        scores = scores[:, scores.shape[1] - V :]  # without the class token
    chosen = reducer(stream.hidden[row, column], scores, prompts.tap)
    keep = stream.real().index_put((row, column), chosen.keep)
    room = [len(cols) // V * reducer.most(V) for cols in columns]
    if chosen.merged is None:
        return Reduced(keep, None, None, room)
    c = chosen.merged.shape[1]
    most = max(len(cols) // V for cols in columns) * c
    merged = stream.hidden.new_zeros(stream.rows, most, stream.hidden.shape[-1])
    behind = torch.full((stream.rows, most), -1, device=device)
    nth = [sum(1 for other, _ in images[:i] if other == b) for i, (b, _) in enumerate(images)]
    slot = torch.tensor(nth, device=device)[:, None] * c + torch.arange(c, device=device)
    merged = merged.index_put((row, slot), chosen.merged.to(merged))
    at = torch.where(chosen.behind < 0, -1, column.gather(1, chosen.behind.clamp(min=0)))
    return Reduced(keep, merged, behind.index_put((row, slot), at), room)
