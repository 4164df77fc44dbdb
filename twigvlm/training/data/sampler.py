"""The order of an epoch: micro-batches of one modality and of like lengths, the same for every process.

A pure function of lengths, seed and epoch, so that a run goes on where it stopped. Knows lengths,
and neither texts nor pictures. Legend: an optimizer step has G = world x accumulation micro-batches
("cells") of at most `batch_size` samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ...errors import InputError


class LengthGroupedSampler:
    """A batch sampler: lists of dataset places, one per micro-batch of this process.

    Each usable sample comes exactly once per epoch, no micro-batch is empty, and all processes get
    the same number. Samples are shuffled within their modality and cut into steps; a step is sorted
    by length and cut into cells, so that those that run side by side are alike. Full steps come
    shuffled, but for the one with the longest sample: it comes first, so that what does not fit
    fails at once. What is left of both modalities makes the last steps, whose cells are smaller.

    The plan depends on the number of cells in a step and not on how they are shared between
    processes and accumulation, as long as what is left can fill them.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        images: Sequence[int],
        indices: Sequence[int] | None = None,
        batch_size: int = 1,
        world: int = 1,
        rank: int | None = 0,
        accumulation: int = 1,
        seed: int = 0,
    ):
        """`lengths` and `images` (0: text only) are those of `indices`, dataset places (default 0..n-1).

        `rank` None gives the cells of all processes in their order: rank r of cell k has number
        k * world + r. Raises InputError for fewer samples than processes.
        """
        if min(batch_size, world, accumulation) < 1:
            raise InputError(
                f"batch size {batch_size}, {world} processes, accumulation {accumulation}: each must be 1 or more"
            )
        if rank is not None and not 0 <= rank < world:
            raise InputError(f"rank {rank} of {world} processes; ranks are counted from 0")
        self.lengths, self.images = np.asarray(lengths), np.asarray(images) > 0
        self.indices = np.arange(len(self.lengths)) if indices is None else np.asarray(indices)
        if not len(self.lengths) == len(self.images) == len(self.indices):
            raise InputError(
                f"{len(self.lengths)} lengths, {len(self.images)} images, {len(self.indices)} indices; one each is needed"
            )
        if len(self.indices) < world:
            raise InputError(
                f"{len(self.indices)} usable samples for {world} processes; give more data or use fewer processes"
            )
        self.batch_size, self.world, self.rank = batch_size, world, rank
        self.cells = world * accumulation  # G
        self.seed, self.epoch, self.start = seed, 0, 0
        self._planned: tuple | None = None

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, as a function of seed and epoch."""
        self.epoch = epoch

    def set_start(self, batch: int) -> None:
        """Begin with this micro-batch of the epoch instead of the first (for this and later epochs, until 0)."""
        self.start = batch

    def __len__(self) -> int:
        """Micro-batches of this process in an epoch, whatever the start."""
        return len(self._plan()[1]) // (self.world if self.rank is not None else 1)

    def __iter__(self) -> Iterator[list[int]]:
        order, bounds = self._plan()
        step, first = (1, 0) if self.rank is None else (self.world, self.rank)
        for begin, end in bounds[first + self.start * step :: step].tolist():
            yield self.indices[order[begin:end]].tolist()

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        """(samples in the order of the epoch, [cells, 2] of where each cell begins and ends in it)."""
        key = (self.seed % 2**63, self.epoch)
        if self._planned is None or self._planned[0] != key:
            self._planned = (key, *self._make_plan(np.random.default_rng(key)))
        return self._planned[1:]

    def _make_plan(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        effective = self.batch_size * self.cells
        full, rest = [], []
        for kind in (np.flatnonzero(self.images), np.flatnonzero(~self.images)):
            shuffled = random.permutation(kind)
            whole = len(kind) - len(kind) % effective
            full += list(shuffled[:whole].reshape(-1, effective))
            rest.append(shuffled[whole:])
        full = [full[i] for i in random.permutation(len(full))]
        while full and not self._can_fill(rest):  # what is left borrows a step, to have a sample for every cell
            step = full.pop()
            kind = 0 if self.images[step[0]] else 1
            rest[kind] = np.concatenate([rest[kind], step])
        if full:
            first = max(range(len(full)), key=lambda i: self.lengths[full[i]].max())
            full[0], full[first] = full[first], full[0]
        cells = [cell for step in full for cell in self._by_length(step).reshape(self.cells, -1)]
        for kind, number in zip(rest, self._share(*map(len, rest)), strict=True):
            cells += self._cut(kind, number)
        sizes = np.array([len(cell) for cell in cells])
        ends = np.cumsum(sizes)
        return np.concatenate(cells), np.stack([ends - sizes, ends], 1)

    def _by_length(self, samples: np.ndarray) -> np.ndarray:
        return samples[np.argsort(-self.lengths[samples], kind="stable")]

    def _cut(self, samples: np.ndarray, number: int) -> list[np.ndarray]:
        """Cells of like lengths; the larger ones hold the shorter samples."""
        if not number:
            return []
        return [cell[::-1] for cell in np.array_split(self._by_length(samples)[::-1], number)][::-1]

    def _least(self, *left: int) -> int:
        """Cells that so many samples of each modality need."""
        return sum(_divide_up(n, self.batch_size) for n in left)

    def _whole_steps(self, *left: int) -> int:
        """Cells of the fewest full steps that hold these samples, at least one in each; 0 if there are none such."""
        number = _divide_up(self._least(*left), self.cells) * self.cells
        return number if number <= sum(left) else 0

    def _can_fill(self, rest: list[np.ndarray]) -> bool:
        left = [len(kind) for kind in rest]
        if self.batch_size == 1:  # no cell can do with less: the last step has fewer cells
            return not sum(left) or sum(left) >= self.world
        return not sum(left) or self._whole_steps(*left) > 0

    def _share(self, pictures: int, texts: int) -> tuple[int, int]:
        """How many cells each modality's leftovers get.

        All together whole steps, or at least the same number for every process; among the ways to
        share them the one that keeps the modalities apart in as many steps as possible.
        """
        total = pictures + texts
        if not total:
            return 0, 0
        number = self._whole_steps(pictures, texts)
        unit = self.cells if number else self.world
        number = number or total - total % self.world
        # Single samples, a few too many for the processes: some go in pairs, the shortest ones.
        size = self.batch_size if number >= self._least(pictures, texts) else 2
        low = max(_divide_up(pictures, size), number - texts)
        high = min(pictures, number - _divide_up(texts, size))
        fair = number * pictures / total
        best = max(range(low, high + 1), key=lambda n: (math.gcd(n, unit), -abs(n - fair)))
        return best, number - best


def _divide_up(n: int, size: int) -> int:
    return -(-n // size)
