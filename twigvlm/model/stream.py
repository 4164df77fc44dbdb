"""What flows through the layers: rows of hidden states that know where they come from.

All token surgery is here. Real tokens stand at the front of their rows, padding behind them; a token
knows its place, so nothing needs to know lengths.
Legend: B rows, S tokens, D width, A rotary axes (1, or 3 for mrope).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Stream:
    """`positions` feed the rotary embedding; `place` is who a token is, and stays when positions are compacted."""

    hidden: torch.Tensor  # B S D
    positions: torch.Tensor  # A B S
    place: torch.Tensor  # B S, index in the unpruned prompt and answer; -1 is padding
    visual: torch.Tensor  # B S, the picture that a token belongs to, counted over the row; -1 is text
    full: bool = False  # the host knows that no row is padded (False: perhaps)

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def width(self) -> int:
        return self.hidden.shape[1]

    def real(self) -> torch.Tensor:
        """[B, S] bool: which tokens are no padding."""
        return self.place >= 0

    def count(self) -> torch.Tensor:
        """[B] real tokens of each row."""
        return self.real().sum(1)

    def take(self, order: torch.Tensor, full: bool = False) -> Stream:
        """The tokens at `order` [B, W] of each row; -1 pads."""
        at, gone = order.clamp(min=0), order < 0
        hidden = self.hidden.gather(1, at[..., None].expand(-1, -1, self.hidden.shape[-1]))
        positions = self.positions.gather(2, at.expand(len(self.positions), -1, -1))
        place, visual = (t.gather(1, at).masked_fill(gone, -1) for t in (self.place, self.visual))
        return Stream(hidden, positions, place, visual, full)

    def keep(self, mask: torch.Tensor, width: int, full: bool = False) -> Stream:
        """The real tokens under `mask` [B, S], moved to the front in order; no row may keep more than `width`."""
        return self.take(front(mask & self.real(), width), full)

    def insert(
        self, extra: torch.Tensor, behind: torch.Tensor, marks: torch.Tensor, instead: torch.Tensor | None = None
    ) -> tuple[Stream, torch.Tensor]:
        """With new tokens [B, c, D], each behind the token at index `behind` [B, c] (-1: not there).

        A new token takes place, position and picture of the one at `instead` [B, c] (default: that it
        stands behind). `marks` [B, S] bool of the tokens go along, true for the new ones.
        """
        like = self.take(behind if instead is None else instead)
        both = join_raw([self, replace(like, hidden=extra.to(self.hidden.dtype))])
        steps = torch.arange(self.width, device=behind.device).expand(self.rows, -1)
        order = torch.cat([2 * steps, 2 * behind + 1], 1).masked_fill(~both.real(), 2 * both.width)
        order = order.argsort(dim=1, stable=True)
        return both.take(order), torch.cat([marks, behind >= 0], 1).gather(1, order)

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """[B, D]: the hidden state of one token of each row, [B]."""
        return self.hidden.gather(1, index[:, None, None].expand(-1, -1, self.hidden.shape[-1]))[:, 0]

    def tail(self, last: torch.Tensor, width: int) -> torch.Tensor:
        """[B, width, D]: the tokens from index `last` [B] on; rows that end before are filled with anything."""
        steps = torch.arange(width, device=last.device)
        at = (last[:, None] + steps).clamp(0, self.width - 1)
        return self.hidden.gather(1, at[..., None].expand(-1, -1, self.hidden.shape[-1]))

    def select(self, rows: torch.Tensor) -> Stream:
        """Only these rows, in this order."""
        parts = (t.index_select(0, rows) for t in (self.hidden, self.place, self.visual))
        hidden, place, visual = parts
        return Stream(hidden, self.positions.index_select(1, rows), place, visual, self.full)


def front(mask: torch.Tensor, width: int) -> torch.Tensor:
    """[B, width]: indices of the true entries of `mask` [B, S] in their order, then -1."""
    order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    steps = torch.arange(order.shape[1], device=mask.device)
    return order.masked_fill(steps >= mask.sum(1, keepdim=True), -1)


def fit(mask: torch.Tensor, bound: int, exact: bool = False) -> tuple[int, bool]:
    """(how wide the rows under `mask` [B, S] are, whether all are that wide).

    On a CPU it is counted, which costs nothing there. Elsewhere the host's `bound` stands, so that the
    device is not waited for; `exact` says that every row is known to reach it.
    """
    if mask.device.type != "cpu":
        return bound, exact
    counts = mask.sum(1)
    widest = int(counts.max())
    return widest, int(counts.min()) == widest


def join_raw(streams: Sequence[Stream]) -> Stream:
    """One after the other, padding where it stands."""
    return Stream(
        torch.cat([s.hidden for s in streams], 1),
        torch.cat([s.positions for s in streams], 2),
        torch.cat([s.place for s in streams], 1),
        torch.cat([s.visual for s in streams], 1),
        all(s.full for s in streams),
    )


def join(streams: Sequence[Stream]) -> Stream:
    """One after the other in every row, without gaps."""
    if len(streams) == 1:
        return streams[0]
    whole = join_raw(streams)
    if whole.full:
        return whole
    width, full = fit(whole.real(), whole.width)
    return whole.keep(whole.real(), width, full)
