"""Keys and values of layers that hold the same tokens: one group, one set of places, one mask a call.

A call writes scratch rows behind what is committed. `commit` says how many of them stay; what is not
committed is gone, so nothing is ever rolled back. Buffers grow in steps with what is written.
Legend: B rows, S tokens of a call, H key heads, C capacity, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

STEP = 64  # tokens by which a buffer grows


class Tally:
    """Bytes of the buffers of several groups: now, and the most at once so far."""

    def __init__(self):
        self.now = self.most = 0

    def add(self, change: int) -> None:
        self.now += change
        self.most = max(self.most, self.now)


class CacheGroup:
    """Of the decoder layers `layers` (their cache slots); decoder layers of transformers ask for `update` only."""

    def __init__(
        self, layers: Sequence[int], rows: int, device: torch.device | str = "cpu", tally: Tally | None = None
    ):
        self.layers = tuple(layers)
        self.rows = rows
        self.tally = tally or Tally()  # which groups may share
        self.used = torch.zeros(rows, dtype=torch.long, device=device)  # committed tokens of each row
        self.shift = torch.zeros_like(self.used)  # positions compacted away below this group
        self.known: list[int] | None = [0] * rows  # `used` as far as the host knows it
        self.reach = 0  # no row uses more
        self.ahead = 0  # scratch tokens behind what is used, the same number in every row
        self.keys: torch.Tensor | None = None  # layers B H C d
        self.values: torch.Tensor | None = None
        self._slots = {layer: i for i, layer in enumerate(self.layers)}
        self._begin = self._end = 0
        self._write: torch.Tensor | None = None  # B 1 S 1, where rows of unequal length write

    @property
    def even(self) -> bool:
        """All rows are known to use the same number of tokens."""
        return self.known is not None and min(self.known) == max(self.known)

    def begin(self, width: int, sight: torch.Tensor | None = None) -> torch.Tensor | None:
        """Room for the next `width` tokens of every row, and who sees whom: once a call, for all layers.

        `sight` [B, S, ahead + S] bool says which scratch tokens each new one sees (None: all before it,
        a chain). Gives [B, 1, S, keys] bool, or None where plain causal attention is right.
        """
        self._begin = self.reach + self.ahead
        self._end = self._begin + width
        even, at = self.even, None
        if not even or (width > 1 and self._begin):
            at = ((self.used + self.ahead)[:, None] + self._steps(width))[:, None, :, None]
        self._write = None if even else at
        mask = self._mask(at, sight)
        self.ahead += width
        return mask

    def _mask(self, at: torch.Tensor | None, sight: torch.Tensor | None) -> torch.Tensor | None:
        """`at` [B, 1, S, 1]: where the new tokens go, if that says what plain causal attention does not."""
        if sight is None:
            # At prefill padding stands behind all that is real, so causality hides it.
            return None if at is None or not self._begin else self._steps(self._end) <= at
        behind = self._steps(self._end) - self.used[:, None, None]  # B 1 keys, index among the scratch tokens
        last = sight.shape[2] - 1
        seen = sight.gather(2, behind.clamp(0, last).expand(-1, sight.shape[1], -1)) & (behind <= last)
        return (seen | (behind < 0))[:, None]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new [B, H, S, d] where `begin` said; views of all keys and values up to the longest row."""
        if self.keys is None or self.keys.shape[3] < self._end:
            self._grow(keys, values)
        slot = self._slots[layer_idx]
        held = self.keys[slot, : self.rows], self.values[slot, : self.rows]
        for buffer, new in zip(held, (keys, values), strict=True):
            if self._write is None:
                buffer[:, :, self._begin : self._end] = new
            else:
                buffer.scatter_(2, self._write.expand_as(new), new)
        return held[0][:, :, : self._end], held[1][:, :, : self._end]

    def commit(
        self,
        count: torch.Tensor | int,
        known: Sequence[int] | None = None,
        path: torch.Tensor | None = None,
        first: torch.Tensor | int = 0,
    ) -> None:
        """`count` [B] scratch tokens of each row stay (`known`: the same numbers, where the host has them).

        With `path` [B, n], of a tree, the scratch tokens path[b, 0..] move up to the places from
        `first` [B] on before; -1 moves nothing.
        """
        if path is not None:
            self._move(path, first)
        if isinstance(count, int):
            known = [count] * self.rows
        elif known is None and count.device.type == "cpu":
            known = count.tolist()  # costs nothing there
        self.used = self.used + count
        if known is None or self.known is None:
            self.known, self.reach = None, self.reach + self.ahead
        else:
            self.learn([n + k for n, k in zip(self.known, known, strict=True)])
        self.ahead = 0

    def expect(self, used: Sequence[int]) -> None:
        """`learn`, where the host did not know."""
        if self.known is None:
            self.learn(used)

    def learn(self, used: Sequence[int]) -> None:
        """What the host has read of `used`."""
        self.known, self.reach = list(used), max(used, default=0)

    def evict(self, keep: torch.Tensor) -> None:
        """Of the committed tokens only those under `keep` [B, reach] stay, in their order."""
        held = self._steps(keep.shape[1]) < self.used[:, None]
        keep = keep & held
        order = keep.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[None, :, None, :, None]
        for buffer in (self.keys, self.values):
            there = buffer[:, : self.rows, :, : keep.shape[1]]
            there.copy_(there.gather(3, order.expand_as(there)))
        self.used = keep.sum(1)
        self.known = self.used.tolist() if self.used.device.type == "cpu" else None
        self.reach = max(self.known) if self.known is not None else self.reach

    def begin_behind(self, other: CacheGroup, rows: torch.Tensor) -> None:
        """Start, still empty, with what `other` has committed: row i continues its row rows[i]. Many may continue one."""
        known = None if other.known is None else [other.known[i] for i in rows.tolist()]
        self.used, self.shift = (t.index_select(0, rows) for t in (other.used, other.shift))
        self.known, self.reach = known, other.reach
        before = self.allocated_bytes()
        self.keys, self.values = (t.index_select(1, rows) for t in (other.keys, other.values))
        self.tally.add(self.allocated_bytes() - before)

    def forget(self) -> None:
        """Give the memory back; nothing is asked of it any more."""
        self.tally.add(-self.allocated_bytes())
        self.keys = self.values = None

    def leave(self, order: Sequence[int], index: torch.Tensor) -> None:
        """Row i becomes what row order[i] was; the others leave. `index` is `order` on the device.

        Only rows that move into a hole are copied.
        """
        for new, old in enumerate(order):
            if new != old and self.keys is not None:
                for buffer in (self.keys, self.values):
                    buffer[:, new, :, : self.reach] = buffer[:, old, :, : self.reach]
        self.used, self.shift = self.used.index_select(0, index), self.shift.index_select(0, index)
        self.rows = len(order)
        if self.known is not None:
            self.learn([self.known[old] for old in order])

    def allocated_bytes(self) -> int:
        return 0 if self.keys is None else 2 * self.keys.numel() * self.keys.element_size()

    def used_bytes(self) -> torch.Tensor:
        """Of the committed tokens of the rows that are here: a number on the device."""
        tokens = self.used.sum()
        if self.keys is None:
            return 0 * tokens
        layers, _, heads, _, width = self.keys.shape
        return tokens * (2 * layers * heads * width * self.keys.element_size())

    def _grow(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        room, before = -(-self._end // STEP) * STEP, self.allocated_bytes()
        for name, new in (("keys", keys), ("values", values)):
            buffer = new.new_empty(len(self.layers), self.rows, new.shape[1], room, new.shape[3])
            held = 0
            if (old := getattr(self, name)) is not None:
                held = old.shape[3]
                buffer[:, :, :, :held] = old[:, : self.rows]
            # A shorter row reads up to the longest row's end, masked, and must find finite numbers.
            buffer[:, :, :, held:] = 0
            setattr(self, name, buffer)
        self.tally.add(self.allocated_bytes() - before)

    def _move(self, path: torch.Tensor, first: torch.Tensor | int) -> None:
        start = (self.used + first)[:, None]
        still = (start - 1).clamp(min=0)  # nothing moves there, and a path may have more steps than there is room
        source = torch.where(path < 0, still, self.used[:, None] + path)
        target = torch.where(path < 0, still, start + self._steps(path.shape[1]))
        for buffer in (self.keys, self.values):
            there = buffer[:, : self.rows]
            shape = (*there.shape[:3], path.shape[1], there.shape[4])
            source_, target_ = (t[None, :, None, :, None].expand(shape) for t in (source, target))
            there.scatter_(3, target_, there.gather(3, source_))

    def _steps(self, count: int) -> torch.Tensor:
        return torch.arange(count, device=self.used.device)
