"""From the asked average R to r kept tokens and back, and what a generation really keeps."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from conftest import IMAGE, batch, one, prompts, tiny
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.config import TwigConfig
from twigvlm.errors import InputError
from twigvlm.pruning import METHODS, Shape, average_tokens, kept_tokens, legal_range, plan_for
from twigvlm.pruning.methods.twig import Twig

SEVEN_B = {"L": 32, "V": 576, "K": 2, "F": 24}


@pytest.mark.parametrize(("R", "r"), [(192, 227), (128, 134), (64, 41), (36, 0), (432, 576), (36.5, 1)])
def test_the_papers_numbers(R, r):
    """Of LLaVA-1.5-7B, at the three budgets of its tables and at the ends of what is legal."""
    assert kept_tokens(R, **SEVEN_B) == r


@pytest.mark.parametrize("R", [35.9, 433, 0, -1, 576, 1e9])
def test_outside_the_legal_range(R):
    with pytest.raises(InputError) as error:
        kept_tokens(R, **SEVEN_B)
    for part in (f"{R:g}", "36 to 432", "r = ceil((L*R - K*V) / (F - K))", "L=32", "V=576", "K=2", "F=24"):
        assert part in str(error.value)


@pytest.mark.parametrize("R", [math.nan, math.inf, -math.inf, True, "64", None])
def test_no_number(R):
    with pytest.raises(InputError, match="a number is needed"):
        kept_tokens(R, **SEVEN_B)


def test_numbers_are_meant_as_they_are_written():
    """31.6 and 40/6 are no binary numbers; r is 4 and 8 exactly, and not one more, and 4/3 is within its own range."""
    assert kept_tokens(31.6, L=40, V=576, K=2, F=30) == 4
    assert kept_tokens(40 / 6, L=6, V=16, K=2, F=3) == 8
    assert kept_tokens(4 / 3, L=6, V=4, K=2, F=4) == 0


@st.composite
def budgets(draw):
    """(L, V, K, F, R), R anywhere in its legal range and often at its ends."""
    L, V = draw(st.integers(2, 80)), draw(st.integers(1, 3000))
    K = draw(st.integers(1, L - 1))
    F = draw(st.integers(K + 1, L))
    low, high = legal_range(L, V, K, F)
    share = draw(st.sampled_from([Fraction(0), Fraction(1)]) | st.fractions(0, 1))
    return L, V, K, F, low + (share * (high - low)).limit_denominator(1000)


@given(budgets())
def test_every_legal_budget(budget):
    """r is whole and within 0..V, and the average that it gives is R, rounded up by less than one token a layer."""
    L, V, K, F, exact = budget
    R = float(exact)
    r = kept_tokens(R, L, V, K, F)
    assert isinstance(r, int) and 0 <= r <= V
    excess = average_tokens(r, L, V, K, F) - R
    assert -1e-9 <= excess < (F - K) / L + 1e-9


TWIGS = sorted(n for n, m in METHODS.items() if issubclass(m, Twig) and not m.adaptive)  # that share the twig's budget


@given(budgets(), st.sampled_from(TWIGS))
def test_a_plan_spends_what_the_formula_says(budget, method):
    L, V, K, F, exact = budget
    r = kept_tokens(float(exact), L, V, K, F)
    counts = plan_for(method, float(exact), V, TwigConfig(L, K, 1, F)).tokens_per_layer(L, V)
    assert counts == [V] * K + [r] * (F - K) + [0] * (L - F)
    assert sum(counts) / L == pytest.approx(average_tokens(r, L, V, K, F))


@given(
    st.sampled_from(sorted(m for m in METHODS if not METHODS[m].adaptive)),
    st.integers(4, 80),
    st.integers(1, 3000),
    st.fractions(0, 1),
)
def test_every_method_spends_its_own_budget(method, L, V, share):
    """Within one token a layer of what was asked, over each method's legal range; outside it is refused."""
    twig = TwigConfig(L, 2 if L > 4 else 1, 1)
    found, shape = METHODS[method](), Shape(L, V, twig.K, twig.F)
    low, high = found.legal(shape)
    R = float(low + (share * (high - low)).limit_denominator(1000))
    counts = plan_for(method, R, V, twig).tokens_per_layer(L, V)
    assert max(counts) <= V and min(counts) >= 0
    assert abs(sum(counts) / L - R) <= 1 + 1e-9
    for wrong in (float(low) * 0.9 - 0.1, float(high) * 1.1 + 0.1):
        with pytest.raises(InputError, match="legal is"):
            plan_for(method, wrong, V, twig)


@pytest.mark.parametrize(
    ("method", "R", "counts"),
    [("fastv", 192, [166]), ("fastv", 128, [98]), ("fastv", 64, [30]), ("pdrop", 192, [312, 156, 78]),
     ("pdrop", 128, [184, 92, 46]), ("pdrop", 64, [56, 28, 14])],
)  # fmt: skip
def test_counts_of_other_methods_on_llava(method, R, counts):
    plan = plan_for(method, R, 576, TwigConfig(32, 2, 3))
    assert [rule.most(576) for _, rule in plan.stages] == counts
    assert [before for before, _ in plan.stages] == ([2] if method == "fastv" else [2, 10, 20])


@pytest.mark.parametrize("method", TWIGS)
@pytest.mark.parametrize(("K", "F", "R"), [(1, 2, 3), (2, 4, 7.5), (2, 6, 8), (3, 5, 9.1), (2, 6, 16), (2, 4, 16 / 3)])
def test_measured_is_asked(K, F, R, method):
    """What `stats` counted while the tokens passed, for one and for several pictures."""
    vlm = tiny(K=K, F=F, side=56)
    L, V = vlm.config.L, vlm.config.V
    r = kept_tokens(R, L, V, K, F)
    for layout in ([3, IMAGE, 4], [IMAGE, 2, IMAGE, 5]):
        images = layout.count(IMAGE)
        out = vlm.generate(**one(vlm, *layout), retained_tokens=R, pruning=method, max_new_tokens=4)
        assert [len(k) for k in out.kept] == [r * images]
        assert out.stats.visual_kept == r * images and out.stats.visual_tokens == V * images
        assert out.stats.visual_measured == pytest.approx(average_tokens(r, L, V, K, F))
        assert out.stats.visual_asked == R
        assert 0 <= out.stats.visual_measured - R < (F - K) / L + 1e-9


def test_measured_in_a_batch_counts_rows_with_pictures_only():
    vlm = tiny(side=56, F=4)
    out = vlm.generate(
        **batch(*prompts(vlm, [[3, IMAGE, 4], [9], [2, IMAGE, IMAGE, 2]])), retained_tokens=8, max_new_tokens=3
    )
    r = kept_tokens(8, 6, 16, 2, 4)
    assert [len(k) for k in out.kept] == [r, 0, 2 * r]
    assert out.stats.visual_measured == pytest.approx(average_tokens(r, 6, 16, 2, 4))
    assert out.stats.visual_twig_share == pytest.approx(2 * 16 / 6)


def test_without_pruning_all_stays():
    vlm = tiny(side=56)
    out = vlm.generate(**one(vlm, 3, IMAGE, 4), max_new_tokens=3)
    assert out.kept is None and out.stats.visual_asked is None
    assert out.stats.visual_measured == out.stats.visual_tokens == out.stats.visual_kept == 16


# ---------------------------------------------------------------------- random draws


def masks(vlm, *layouts, seed=None, pictures=0, **more) -> list[list[int]]:
    out = vlm.generate(
        **batch(*prompts(vlm, layouts, pictures)),
        retained_tokens=8,
        pruning="random",
        seed=seed,
        max_new_tokens=2,
        **more,
    )
    return [k.tolist() for k in out.kept]


def test_random_is_a_new_draw_for_every_row_and_call():
    vlm = tiny(side=56)
    layout = (3, IMAGE, 4)
    drawn = [tuple(mask) for _ in range(4) for mask in masks(vlm, layout, layout, layout)]
    assert len(set(drawn)) == 12


def test_a_seed_repeats_a_random_mask_but_no_two_pictures_share_one():
    vlm = tiny(side=56)
    layout = (3, IMAGE, 4)
    assert masks(vlm, layout, layout, seed=3) == masks(vlm, layout, layout, seed=3, draft_length=0)
    assert masks(vlm, layout, seed=3) != masks(vlm, layout, seed=4)
    assert masks(vlm, layout, seed=3, pictures=1) != masks(vlm, layout, seed=3, pictures=2)
    (first, second), (again,) = masks(vlm, layout, (2, IMAGE, 1), seed=[8, 9]), masks(vlm, layout, seed=8)
    assert first == again and first != second


def test_a_seed_for_every_row_or_for_all():
    vlm = tiny()
    arguments = batch(*prompts(vlm, [(3, IMAGE, 4), (5,)]))
    for wrong in ([1], [1, 2, 3], [1, 2.5], "ab", 1.5):
        with pytest.raises(InputError, match="seed"):
            vlm.generate(**arguments, seed=wrong)
