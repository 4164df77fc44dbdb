"""The twig's adaptive budget: the smallest set that gathers a share of the score, within its bounds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import IMAGE, batch, prompts, tiny
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.errors import InputError
from twigvlm.pruning import Probe, Shape, Wipe, find_method
from twigvlm.pruning.methods.twig_adaptive import Gathered

SHAPE = Shape(8, 64, 2, 6)


def chosen(rule: Gathered, scores: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    visual = SimpleNamespace(real=lambda: real, place=real.long())
    seen = SimpleNamespace(visual=visual, scores=scores[:, None], total=real.sum(1).tolist())
    seen.budget = lambda most: torch.tensor([most(n) for n in seen.total])
    return rule(seen).keep


@given(st.data())
def test_the_fewest_that_gather_the_share(data):
    """Against adding up by hand, row by row; rows of one and of two images, ties among the scores."""
    V, mass = 6, data.draw(st.floats(0.01, 1.2))
    low = data.draw(st.integers(0, V))
    high = data.draw(st.integers(max(low, 1), V))
    numbers = st.lists(st.integers(0, 9), min_size=2 * V, max_size=2 * V)
    rows = [data.draw(numbers), data.draw(numbers)]
    real = torch.tensor([[True] * 2 * V, [True] * V + [False] * V])
    keep = chosen(Gathered(mass, low, high, V, Probe("twig")), torch.tensor(rows).float(), real)
    for row, kept, images in zip(rows, keep.tolist(), (2, 1), strict=True):
        row = row[: images * V]
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        count, sum_ = 0, 0.0
        while count < len(row) and sum_ < mass * sum(row) - 1e-4:
            sum_ += row[order[count]]
            count += 1
        count = min(max(count, low * images), high * images)
        near = abs(sum(row[i] for i in order[:count]) - mass * sum(row)) < 1e-3  # either side is right there
        assert [i for i, k in enumerate(kept) if k] == sorted(order[:count]) or near


def test_bounds_go_around_the_average():
    plan = find_method("twig-adaptive:mass=0.5").plan(24, SHAPE)
    (_, rule), (_, wipe) = plan.stages
    r = 16  # (8 x 24 - 2 x 64) / 4
    assert (rule.low, rule.high, rule.V) == (r // 4, 4 * r, 64) and wipe == Wipe()
    plan = find_method("twig-adaptive:mass=0.5,least=10,most=20").plan(24, SHAPE)
    assert (plan.stages[0][1].low, plan.stages[0][1].high) == (10, 20)


@pytest.mark.parametrize("bounds", ["least=17", "most=15", "most=65", "least=-1"])
def test_bounds_that_exclude_the_average_are_refused(bounds):
    with pytest.raises(InputError, match=r"keeps 16 tokens an image on average at R = 24, and .* <= V=64 is needed"):
        find_method(f"twig-adaptive:mass=0.5,{bounds}").plan(24, SHAPE)


def test_pictures_get_different_numbers_and_no_more_than_the_most():
    vlm = tiny(side=112, layers=8)
    rows, pictures = prompts(vlm, [(3, IMAGE, n % 4 + 2) for n in range(12)], seed=3)
    ask = batch(rows, pictures) | {"retained_tokens": 24, "max_new_tokens": 1, "draft_length": 0}
    counts = [len(kept) for kept in vlm.generate(**ask, pruning="twig-adaptive:mass=0.3,least=2,most=30").kept]
    assert len(set(counts)) > 1 and all(2 <= n <= 30 for n in counts)
    fewer = [len(kept) for kept in vlm.generate(**ask, pruning="twig-adaptive:mass=0.15,least=2,most=30").kept]
    assert all(a <= b for a, b in zip(fewer, counts, strict=True)) and sum(fewer) < sum(counts)
    held = vlm.generate(**ask, pruning="twig-adaptive:mass=0.3,least=16,most=16").kept
    usual = vlm.generate(**ask, pruning="twig").kept
    assert [list(k) for k in held] == [list(k) for k in usual], "bounds that meet are the twig's own budget"
