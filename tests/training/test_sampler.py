"""The order of an epoch: every sample once, alike with alike, the same plan for every process and after every stop."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.errors import InputError
from twigvlm.training.data.sampler import LengthGroupedSampler


@dataclass(frozen=True)
class Case:
    """`places` are dataset indices, so that positions and indices cannot be confused."""

    lengths: tuple[int, ...]
    images: tuple[int, ...]
    rows: int
    world: int
    accumulation: int
    seed: int

    @property
    def places(self) -> np.ndarray:
        return np.arange(len(self.lengths)) * 3 + 7

    @property
    def cells(self) -> int:
        return self.world * self.accumulation

    def sampler(self, rank: int | None = None, **changes) -> LengthGroupedSampler:
        how = {
            "batch_size": self.rows,
            "world": self.world,
            "accumulation": self.accumulation,
            "seed": self.seed,
            **changes,
        }
        return LengthGroupedSampler(self.lengths, self.images, self.places, rank=rank, **how)

    def kinds(self, cell: list[int]) -> set[bool]:
        return {self.images[(place - 7) // 3] > 0 for place in cell}

    def length(self, place: int) -> int:
        return self.lengths[(place - 7) // 3]


@st.composite
def cases(draw) -> Case:
    world, share = draw(st.integers(1, 4)), draw(st.sampled_from([0, 1, 5, 9, 10]))
    kinds = draw(st.lists(st.integers(0, 9), min_size=world, max_size=draw(st.sampled_from([8, 40, 150]))))
    images = tuple(draw(st.sampled_from([1, 2])) if k < share else 0 for k in kinds)
    lengths = tuple(draw(st.integers(1, 30)) + 576 * i for i in images)
    return Case(
        lengths, images, draw(st.integers(1, 5)), world, draw(st.sampled_from([1, 2, 4])), draw(st.integers(0, 9))
    )


@given(cases())
def test_every_sample_once_and_no_cell_empty(case):
    cells = list(case.sampler())
    assert sorted(place for cell in cells for place in cell) == case.places.tolist()
    assert all(cells)
    sizes = [len(cell) for cell in cells]
    assert max(sizes) <= max(case.rows, 2), "single samples that do not go round go in pairs"
    if case.rows == 1:
        assert sum(size > 1 for size in sizes) < case.world


@given(cases())
def test_processes_share_the_cells(case):
    cells = list(case.sampler())
    parts = [list(case.sampler(rank)) for rank in range(case.world)]
    assert {len(part) for part in parts} == {len(case.sampler(0))}
    assert len(case.sampler()) == len(cells) == case.world * len(parts[0])
    assert [parts[i % case.world][i // case.world] for i in range(len(cells))] == cells


@given(cases())
def test_grouped_by_modality(case):
    cells = list(case.sampler())
    assert all(len(case.kinds(cell)) == 1 for cell in cells)
    together = [cells[k : k + case.world] for k in range(0, len(cells), case.world)]
    mixed = [cells for cells in together if len(set().union(*map(case.kinds, cells))) > 1]
    assert len(mixed) <= 1, "processes differ in kind once at most, where the leftovers meet"
    smaller = min(sum(i > 0 for i in case.images), sum(i == 0 for i in case.images))
    if not smaller:
        assert not mixed


def test_leftovers_stay_apart_where_they_can():
    """5 pictures and 7 texts in 8 cells for two processes: 3 and 5 would be fair, 4 and 4 keep processes alike."""
    case = Case((5,) * 12, (1,) * 5 + (0,) * 7, rows=4, world=2, accumulation=4, seed=0)
    cells = list(case.sampler())
    assert [case.kinds(cell) for cell in cells] == [{True}] * 4 + [{False}] * 4


@given(cases())
def test_grouped_by_length(case):
    """Within a full step the cells are cut from a sorted list: no padding could be saved by exchanging samples."""
    cells = list(case.sampler())
    for first in range(0, len(cells), case.cells):
        step = cells[first : first + case.cells]
        if sum(map(len, step)) == case.rows * case.cells:
            lengths = [case.length(place) for cell in step for place in cell]
            for kind in (True, False):
                of_kind = [
                    n for n, cell in zip(lengths, [c for c in step for _ in c], strict=True) if kind in case.kinds(cell)
                ]
                assert of_kind == sorted(of_kind, reverse=True)


@given(cases())
def test_whole_steps(case):
    """Where there is a choice every optimizer step has all its cells, so that a mean over cells is a mean of equals."""
    n = len(case.places)
    if case.rows > 1 and n >= case.cells * 2:
        assert len(case.sampler()) % case.cells == 0
    full = case.rows * case.cells
    assert len(case.sampler()) <= (n // full + 3) * case.cells


@given(cases())
def test_the_same_plan_for_any_number_of_processes(case):
    """What two processes see side by side, one sees one after the other."""
    if len(case.places) % case.world == 0 or (case.rows > 1 and len(case.places) >= 2 * case.cells):
        assert list(case.sampler(world=1, accumulation=case.cells)) == list(case.sampler())


@given(cases(), st.integers(0, 3), st.integers(0, 50))
def test_going_on_where_it_stopped(case, epoch, start):
    sampler = case.sampler(0)
    sampler.set_epoch(epoch)
    whole, again = list(sampler), list(sampler)
    assert whole == again, "a function of seed and epoch alone"
    resumed = case.sampler(0)
    resumed.set_epoch(epoch)
    resumed.set_start(start)
    assert list(resumed) == whole[start:]
    assert len(resumed) == len(whole)


def plain(n: int = 400, **changes) -> Case:
    random = np.random.default_rng(0)
    images = (random.random(n) < 0.7).astype(int)
    lengths = random.integers(10, 900, n) + 576 * images
    how = {"rows": 4, "world": 2, "accumulation": 2, "seed": 0, **changes}
    return Case(tuple(lengths.tolist()), tuple(images.tolist()), **how)


def test_epochs_and_seeds_differ():
    case = plain()
    first, second = case.sampler(), case.sampler()
    second.set_epoch(1)
    other, negative = case.sampler(seed=1), case.sampler(seed=-1)
    orders = [str(list(s)) for s in (first, second, other, negative)]
    assert len(set(orders)) == 4


def test_the_longest_comes_first():
    """So that a run which does not fit into memory fails in its first step."""
    for seed in range(20):
        case = plain(seed=seed)
        cells = list(case.sampler())
        steps = [max(case.length(p) for c in cells[k : k + 4] for p in c) for k in range(0, len(cells), 4)]
        assert steps[0] >= max(steps[:-3])


def test_little_is_padding():
    """Against the same batches in any order."""
    case = plain(4000)
    cells = list(case.sampler())

    def padded(cells) -> int:
        return sum(max(map(case.length, cell)) * len(cell) for cell in cells)

    places = np.random.default_rng(1).permutation(case.places)
    shuffled = [places[k : k + 4].tolist() for k in range(0, len(places), 4)]
    needed = sum(case.lengths)
    assert padded(cells) - needed < 0.4 * (padded(shuffled) - needed)


def test_the_authors_lost_samples():
    """Both modalities present: their sampler drops the last batches of each. One of each: everything."""
    for rows, world in ((1, 1), (4, 1), (4, 2)):
        cells = Case((5, 3), (1, 0), rows, world, 1, 0).sampler()
        assert sorted(place for cell in cells for place in cell) == [7, 10]


def test_golden_lists(golden):
    """The lists that the authors' sampler was run on: here nothing is dropped."""
    facts = json.loads((golden / "training" / "sampler.json").read_text())
    assert any(case["dropped"] for case in facts["cases"])
    for case in facts["cases"]:
        lengths = np.array(facts["lengths"][case["list"]])
        if len(lengths) < case["world_size"]:
            continue
        sampler = LengthGroupedSampler(
            np.abs(lengths), lengths > 0, None, case["batch_size"], case["world_size"], None, 1, seed=0
        )
        assert sorted(i for cell in sampler for i in cell) == list(range(len(lengths)))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"world": 0}, "0 processes"),
        ({"accumulation": 0}, "accumulation 0"),
        ({"world": 2, "rank": 2}, "rank 2 of 2"),
        ({"world": 4}, "3 usable samples for 4 processes"),
        ({"indices": [1]}, "1 indices"),
        ({"images": [1]}, "1 images"),
    ],
)
def test_refused(arguments, part):
    with pytest.raises(InputError, match=part):
        LengthGroupedSampler(**{"lengths": [1, 2, 3], "images": [0, 0, 1], **arguments})


def test_half_a_million_in_a_second():
    n = 500_000
    sampler = LengthGroupedSampler(np.arange(n) % 1000 + 1, np.arange(n) % 20, None, 4, 8, 3, 4)
    assert len(sampler) == n // 32 + (4 - n // 32 % 4) % 4
    assert sum(map(len, sampler)) == pytest.approx(n / 8, rel=1e-3)
