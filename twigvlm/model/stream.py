"""What flows through the layers: rows of hidden states that know where they come from.

All token surgery is here. Rows are right-padded; `lengths` says how much of each row is real.
Legend: B rows, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Stream:
    """`positions` feed the rotary embedding; `visual` marks image tokens (a mask, never an interval)."""

    hidden: torch.Tensor  # B S D
    positions: torch.Tensor  # B S int64, places in the unpruned sequence
    visual: torch.Tensor  # B S bool
    lengths: tuple[int, ...]  # B

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def width(self) -> int:
        return self.hidden.shape[1]

    @property
    def full(self) -> bool:
        """No row is padded."""
        return all(n == self.width for n in self.lengths)

    def valid(self) -> torch.Tensor:
        """[B, S] bool: which tokens are real."""
        lengths = torch.tensor(self.lengths, device=self.hidden.device)
        return torch.arange(self.width, device=self.hidden.device) < lengths[:, None]

    def keep(self, mask: torch.Tensor) -> Stream:
        """Only the real tokens under `mask` [B, S], moved to the front of their rows in order."""
        mask = mask & self.valid()
        lengths = tuple(mask.sum(1).tolist())
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, : max(lengths)]
        hidden = self.hidden.gather(1, order[..., None].expand(-1, -1, self.hidden.shape[-1]))
        visual = (self.visual & mask).gather(1, order)  # padding is never visual
        return Stream(hidden, self.positions.gather(1, order), visual, lengths)

    def text(self) -> Stream:
        """Without the image."""
        return self.keep(~self.visual) if self.visual.any() else self

    def at(self, places: Sequence[int]) -> torch.Tensor:
        """[B, D]: one token of each row."""
        rows = torch.arange(self.rows, device=self.hidden.device)
        return self.hidden[rows, torch.tensor(places, device=self.hidden.device)]

    def tail(self, counts: Sequence[int]) -> torch.Tensor:
        """[B, max(counts), D]: the last real tokens of each row, left-aligned, padded on the right."""
        if self.full and len(set(counts)) == 1:
            return self.hidden[:, self.width - counts[0] :]
        steps = torch.arange(max(counts), device=self.hidden.device)
        starts = torch.tensor([n - c for n, c in zip(self.lengths, counts, strict=True)], device=steps.device)
        places = (starts[:, None] + steps).clamp(max=self.width - 1)
        return self.hidden.gather(1, places[..., None].expand(-1, -1, self.hidden.shape[-1]))

    def limit(self, lengths: Sequence[int]) -> Stream:
        """The same tensors with shorter rows (0 hides a row)."""
        return replace(self, lengths=tuple(lengths))

    def select(self, rows: Sequence[int]) -> Stream:
        index = torch.tensor(rows, device=self.hidden.device)
        parts = (t.index_select(0, index) for t in (self.hidden, self.positions, self.visual))
        return Stream(*parts, tuple(self.lengths[r] for r in rows))


def join(streams: Sequence[Stream]) -> Stream:
    """One after the other in every row, without gaps."""
    if len(streams) == 1:
        return streams[0]
    hidden = torch.cat([s.hidden for s in streams], 1)
    positions = torch.cat([s.positions for s in streams], 1)
    visual = torch.cat([s.visual for s in streams], 1)
    whole = Stream(hidden, positions, visual, (hidden.shape[1],) * hidden.shape[0])
    if all(s.full for s in streams):
        return whole
    return whole.keep(torch.cat([s.valid() for s in streams], 1))
