"""Keys and values by slot: base layers 0..L-1, twig layers L..L+T-1, one length per slot and row.

Buffers are allocated once, at a slot's first use, with room for all that will follow; writing never
copies what is there, and rolling back only shortens a length. Decoder layers of transformers ask
for nothing but `update`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


class Cache:
    """`room`: tokens that may be written after the first call of a slot."""

    def __init__(self, slots: int, rows: int, room: int):
        self.room = room
        self._rows = rows
        self._keys: list[torch.Tensor | None] = [None] * slots  # each B H capacity d
        self._values: list[torch.Tensor | None] = [None] * slots
        self._lengths: list[tuple[int, ...]] = [(0,) * rows] * slots

    def lengths(self, slot: int) -> tuple[int, ...]:
        return self._lengths[slot]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new [B, H, q, d] behind each row's length; views of all up to the longest row.

        The lengths move only with `advance`: what padding rows wrote is overwritten by the next call.
        """
        new = keys.shape[2]
        lengths = self._lengths[layer_idx]
        if self._keys[layer_idx] is None:
            shape = (*keys.shape[:2], new + self.room, keys.shape[3])
            self._keys[layer_idx], self._values[layer_idx] = keys.new_zeros(shape), values.new_zeros(shape)
        buffers, end = (self._keys[layer_idx], self._values[layer_idx]), max(lengths) + new
        if end > buffers[0].shape[2]:
            raise RuntimeError(f"slot {layer_idx} has room for {buffers[0].shape[2]} tokens; {end} are needed")
        if min(lengths) == max(lengths):
            for buffer, fresh in zip(buffers, (keys, values), strict=True):
                buffer[:, :, lengths[0] : end] = fresh
        else:
            start = torch.tensor(lengths, device=keys.device)[:, None, None, None]
            places = (start + torch.arange(new, device=keys.device)[:, None]).expand_as(keys)
            # Shorter rows may read up to the longest row's end, masked: it must hold finite numbers.
            for buffer, fresh in zip(buffers, (keys, values), strict=True):
                buffer.scatter_(2, places, fresh)
        return buffers[0][:, :, :end], buffers[1][:, :, :end]

    def keys(self, slot: int) -> torch.Tensor:
        """View of the keys of a slot, [B, H, longest, d]."""
        return self._keys[slot][:, :, : max(self._lengths[slot])]

    def advance(self, slots: Iterable[int], counts: Sequence[int]) -> None:
        """Accept the `counts[b]` tokens written last."""
        for slot in slots:
            self._lengths[slot] = tuple(n + c for n, c in zip(self._lengths[slot], counts, strict=True))

    def drop_last(self, slots: Iterable[int], counts: Sequence[int]) -> None:
        """Roll `counts[b]` tokens back."""
        self.advance(slots, [-c for c in counts])

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows (the one copy of the cache: when a row of a batch is finished)."""
        index = None
        for slot, keys in enumerate(self._keys):
            if keys is not None:
                index = torch.tensor(rows, device=keys.device) if index is None else index
                self._keys[slot] = keys.index_select(0, index)
                self._values[slot] = self._values[slot].index_select(0, index)
            self._lengths[slot] = tuple(self._lengths[slot][r] for r in rows)

    def bytes(self) -> int:
        """Allocated bytes of all slots."""
        held = [t for t in (*self._keys, *self._values) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)
