"""Methods before the decoder: against slow references and the stock model, at every budget, on any tower."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, batch, prompts, spec_of, tiny, tiny_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pruning.slowly import SLOW, Kept, Picture, pictures_of, slow_tome
from transformers import (
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from twigvlm.config import TwigConfig
from twigvlm.decoding import embed
from twigvlm.errors import InputError
from twigvlm.loading.base import Loaded
from twigvlm.loading.device import set_attention
from twigvlm.model.tower import Tower
from twigvlm.pruning import METHODS, TowerMethod, find_method, plan_for, select
from twigvlm.pruning.plan import Shape
from twigvlm.pruning.reducer import View
from twigvlm.vlm import TwigVLM

LLAVA = Shape(32, 576, 2, 24)


@torch.inference_mode()
def written(vlm, row: list[int], tokens: list[torch.Tensor], new: int) -> list[int]:
    """What the stock model writes behind a prompt in which `tokens` [n, D] stand for each picture."""
    hidden, V, i = [], vlm.config.V, 0
    waiting = list(tokens)
    while i < len(row):
        if row[i] == vlm.image_token_id:
            hidden += list(waiting.pop(0))
            i += V
        else:
            hidden.append(vlm.trunk.embed_text([row[i]])[0])
            i += 1
    out = vlm.model.generate(
        inputs_embeds=torch.stack(hidden)[None], attention_mask=torch.ones(1, len(hidden), dtype=torch.long),
        max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0].tolist()


@st.composite
def shapes(draw) -> tuple[dict, int, tuple, int]:
    """A model, R, the layout of a prompt, a seed."""
    shape = {"side": 14 * draw(st.sampled_from([2, 4, 5])), "sight": draw(st.integers(2, 5))}
    V = (shape["side"] // 14) ** 2
    layout = draw(st.sampled_from([(3, IMAGE, 4), (2, IMAGE, 1, IMAGE, 3), (IMAGE, 2), (4, IMAGE)]))
    return shape, draw(st.integers(1, V) | st.just(V)), layout, draw(st.integers(0, 99))


def check(spec: str, shape: dict, R: int, layout: tuple, seed: int, slow: Callable[[Picture, int], Kept]) -> None:
    """Tokens, places, and the answer."""
    vlm = tiny(**shape, twig=False)
    (row,), (pixels,) = prompts(vlm, [layout], seed)
    expected = [slow(picture, R) for picture in pictures_of(shape, row, pixels)]
    plan = plan_for(spec, R, vlm.config.V, TwigConfig(vlm.config.L, 2, 1))
    with torch.inference_mode():
        reduced = embed(vlm.trunk, plan, [row], pixels).reduced
        width = vlm.model.config.text_config.hidden_size
        tokens = [
            torch.stack([
                torch.zeros(width) if state is None else vlm.model.model.multi_modal_projector(torch.tensor(state))
                for state, _ in kept
            ])
            for kept in expected
        ]  # fmt: skip
    assert all(len(kept) == R for kept in expected)
    found = reduced.stream.hidden[0][reduced.stream.visual[0] >= 0]
    torch.testing.assert_close(found, torch.cat(tokens), atol=1e-4, rtol=1e-4)
    V = vlm.config.V
    places = [V * i + source for i, kept in enumerate(expected) for _, source in kept if source >= 0]
    assert reduced.source[reduced.source >= 0].tolist() == places
    out = vlm.generate(**batch([row], [pixels]), retained_tokens=R, pruning=spec, max_new_tokens=5, eos_token_id=[])
    assert out.tokens[0] == written(vlm, row, tokens, 5)
    assert out.stats.visual_by_layer == [R] * vlm.config.L


@pytest.mark.parametrize("spec", SLOW)
@settings(max_examples=12)
@given(data=st.data())
def test_against_plain_python(spec, data):
    shape, R, layout, seed = data.draw(shapes())
    V = (shape["side"] // 14) ** 2
    if spec.startswith("cdpruner"):
        R = min(R, 16)  # of features 32 wide
    if spec == "visionzip:contextual=2" and R < 3:
        R = 3
    assume(V >= R)
    check(spec, shape, R, layout, seed, SLOW[spec])


@pytest.mark.parametrize("spec", ["tome", "tome:sort"])
@settings(max_examples=12)
@given(data=st.data())
def test_tome_against_plain_python(spec, data):
    shape, R, layout, seed = data.draw(shapes())
    _, (pixels,) = prompts(tiny(**shape, twig=False), [layout], seed)
    kept = iter([slow_tome(shape, picture, R, spec == "tome:sort") for picture in pixels])
    check(spec, shape, R, layout, seed, lambda picture, n: next(kept))


@pytest.mark.parametrize(
    ("R", "counts"), [(192, [17] * 16 + [16] * 7), (128, [20] * 11 + [19] * 12), (64, [23] * 6 + [22] * 17)]
)
def test_tome_merges_in_the_layers_that_the_decoder_sees(R, counts):
    """23 of CLIP's 24."""
    reducer, left = METHODS["tome"]().reducer(R, LLAVA), 577
    for layer, count in enumerate(counts):
        assert reducer.within_tokens(layer, 22, left) == left - count
        left -= count
    assert left == R + 1


# ---------------------------------------------------------------------- budgets, towers, draws


BEFORE = sorted(name for name, kind in METHODS.items() if issubclass(kind, TowerMethod))


@given(st.integers(1, 30), st.data())
def test_a_grid_of_any_count(side, data):
    """Just n cells, whose middles are n patches in raster order; together they are the whole picture."""
    n = data.draw(st.integers(1, side**2))
    cells = select.cells(n, side)
    middles = [middle for _, _, middle in cells]
    assert len(cells) == n and middles == sorted(set(middles)) and middles[0] >= 0 and middles[-1] < side**2
    assert {side * r + c for rows, columns, _ in cells for r in rows for c in columns} == set(range(side**2))
    assert all(middle // side in rows and middle % side in columns for rows, columns, middle in cells)


@pytest.mark.parametrize("method", BEFORE)
def test_exactly_R_tokens_at_every_R(method):
    vlm = tiny(side=56, sight=3, twig=False)
    (row,), (pixels,) = prompts(vlm, [(2, IMAGE, 1, IMAGE, 3)])
    for R in range(1, 17):
        plan = plan_for(spec_of(method), R, 16, TwigConfig(6, 2, 1))
        assert plan.tokens_per_layer(6, 16) == [R] * 6
        with torch.inference_mode():
            reduced = embed(vlm.trunk, plan, [row], pixels).reduced
        assert int((reduced.stream.visual >= 0).sum()) == 2 * R and reduced.stream.width == 6 + 2 * R


@pytest.mark.parametrize("method", BEFORE)
def test_half_precision_is_kept(method):
    half = copy.deepcopy(tiny_model(side=56, sight=3)).bfloat16()
    vlm = TwigVLM(Loaded(half, Path("nowhere"), "half", False), None)
    (row,), (pixels,) = prompts(vlm, [(2, IMAGE, 3)])
    plan = plan_for(spec_of(method), 7, 16, TwigConfig(6, 2, 1))
    with torch.inference_mode():
        reduced = embed(vlm.trunk, plan, [row], pixels).reduced
    assert reduced.stream.hidden.dtype == torch.bfloat16 and reduced.stream.hidden.isfinite().all()
    assert reduced.stream.width == 12


EVERY = [*SLOW, "tome", "tome:sort", "random:schedule=input"]


@pytest.mark.parametrize("spec", EVERY)
def test_a_row_in_a_batch_is_the_row_alone(spec):
    """Ragged rows, one of text alone, pictures that are alike or not; with its settings, too."""
    vlm = tiny(side=56, sight=3, twig=False)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (5,), (2, IMAGE, 1, IMAGE, 3), (IMAGE, 2)], seed=2)
    asked = {"retained_tokens": 7, "pruning": spec, "max_new_tokens": 5, "eos_token_id": []}
    whole = vlm.generate(**batch(rows, pictures), seed=4, **asked)
    for b, pair in enumerate(zip(rows, pictures, strict=True)):
        alone = vlm.generate(**batch(*[[part] for part in pair]), seed=4 + b, **asked)
        assert alone.tokens[0] == whole.tokens[b] and alone.kept[0].tolist() == whole.kept[b].tolist()
    assert [len(kept) for kept in whole.kept][1] == 0


@pytest.mark.parametrize("spec", [s for s in EVERY if find_method(s).selects and "crops" not in s])
def test_all_tokens_are_the_picture_as_it_was(spec):
    vlm = tiny(side=56, sight=3, twig=False)
    arguments = batch(*prompts(vlm, [(2, IMAGE, 1, IMAGE, 3)]))
    out = vlm.generate(**arguments, retained_tokens=16, pruning=spec, seed=1, max_new_tokens=5, eos_token_id=[])
    assert out.tokens == vlm.generate(**arguments, max_new_tokens=5, eos_token_id=[]).tokens
    assert out.kept[0].tolist() == list(range(32))


@pytest.mark.parametrize("spec", EVERY)
def test_the_device_is_not_read(spec):
    """On the meta device there is nothing to read."""
    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(tiny_model(side=56, sight=3).config)
    set_attention(empty.eval(), "sdpa")
    vlm = TwigVLM(Loaded(empty, Path("nowhere"), "meta", False), None)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (2, IMAGE, 1, IMAGE, 3)])
    plan = plan_for(spec, 7, 16, TwigConfig(6, 2, 1))
    with torch.inference_mode():
        reduced = embed(vlm.trunk, plan, rows, torch.cat(pictures), draws=[1, 2]).reduced
    assert reduced.stream.hidden.device.type == "meta" and reduced.stream.width == 6 + 2 * 7


def classless_tower() -> Tower:
    """Three layers, of which the last is not read, behind embeddings without a class token, as SigLIP has them."""
    config = SiglipVisionConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=56, patch_size=14
    )
    model = copy.deepcopy(tiny_model(side=56, sight=3).model.vision_tower)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        donor = SiglipVisionModel(config).eval().requires_grad_(False)
    model.embeddings = getattr(donor, "vision_model", donor).embeddings
    return Tower(model, 1)


@pytest.mark.parametrize("method", BEFORE)
def test_a_tower_without_a_class_token(method):
    """Who needs one says so; the others leave R of its patches."""
    tower, reducer = classless_tower(), find_method(spec_of(method)).plan(6, Shape(6, 16, 2, 4)).tower
    view = View(
        reducer, 16, tower.class_tokens, lambda states: states, lambda ids: torch.ones(len(ids), 16), [[4, 5]] * 2
    )
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    assert reducer.class_token == ("class token" in METHODS[method].needs)
    with torch.inference_mode():
        if reducer.class_token:
            with pytest.raises(InputError, match="class token"):
                tower.look(pixels, view)
        else:
            view.states = tower.look(pixels, view)
            found = reducer(view)
            assert found.features.shape == (2, 6, 16) and all(len(set(s)) == 6 for s in found.source.tolist())


@pytest.mark.parametrize("method", [m for m in BEFORE if "class token" not in METHODS[m].needs])
def test_siglips_own_tower_answers_or_says_that_it_cannot_be_listened_to(method):
    """Its attention takes keywords without a word and hands none of them on."""
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=3, image_size=56, patch_size=14
    )
    model = SiglipVisionModel(config).eval().requires_grad_(False)
    tower, reducer = (
        Tower(getattr(model, "vision_model", model), 1),
        find_method(spec_of(method)).plan(6, Shape(6, 16, 2, 4)).tower,
    )
    view = View(reducer, 16, 0, lambda states: states, lambda ids: torch.ones(len(ids), 16), [[4, 5]] * 2)
    with torch.inference_mode():
        try:
            view.states = tower.look(torch.zeros(2, 3, 56, 56), view)
        except InputError as refusal:
            assert "cannot be listened to" in str(refusal) and any(reducer.listens(n, 1) for n in range(2))
            return
        assert reducer(view).features.shape == (2, 6, 16)


def test_without_a_class_token_it_is_said_which_methods_are_left(monkeypatch):
    vlm = tiny(side=56)
    monkeypatch.setattr(Tower, "class_tokens", 0)
    with pytest.raises(InputError, match="class token") as error:
        vlm.generate(**batch(*prompts(vlm, [(3, IMAGE, 4)])), retained_tokens=6, pruning="fastervlm")
    assert all(name in str(error.value) for name in ("'fastervlm'", "tome", "divprune", "uniform"))
    assert "scope" not in str(error.value)


def drawn(spec: str, layouts, seed, pictures: int = 0) -> list[list[int]]:
    vlm = tiny(side=56)
    out = vlm.generate(
        **batch(*prompts(vlm, layouts, pictures)), retained_tokens=8, pruning=spec, seed=seed, max_new_tokens=1
    )
    return [kept.tolist() for kept in out.kept]


def test_random_before_the_decoder_repeats_by_seed_row_and_picture():
    spec, single, pair = "random:schedule=input", (3, IMAGE, 4), (2, IMAGE, 1, IMAGE, 3)
    first, second = drawn(spec, [single, pair], [7, 8])
    assert drawn(spec, [single], 7) == [first] != drawn(spec, [single], 8)
    assert drawn(spec, [single, single], 7)[0] == first
    assert drawn(spec, [single], 7, pictures=1) != [first]
    assert len(first) == 8 and first == sorted(first) and second == sorted(second)
    halves = [i for i in second if i < 16], [i - 16 for i in second if i >= 16]
    assert [len(half) for half in halves] == [8, 8] and halves[0] != halves[1]


@pytest.mark.parametrize(
    ("spec", "entering"),
    [
        ("random", [576] * 2 + [41] * 22 + [0] * 8),
        ("random:schedule=fastv", [576] * 2 + [30] * 30),
        ("random:schedule=input", [64] * 32),
    ],
)
def test_random_under_other_schedules(spec, entering):
    plan = plan_for(spec, 64, 576, TwigConfig(32, 2, 3))
    assert plan.tokens_per_layer(32, 576) == entering and plan.random and not plan.needs_twig
    assert (plan.tower is None) == ("input" not in spec)  # else numbered as in the shorter prompt
    low, high = find_method(spec).legal(LLAVA)
    for wrong in (float(low) - 1, float(high) + 1):
        with pytest.raises(InputError, match="legal is"):
            plan_for(spec, wrong, 576, TwigConfig(32, 2, 3))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("visionzip:contextual=64", ("contextual=64", "0 to 63")),
        ("visionzip:contextual=-1", ("contextual=-1", "0 to 63")),
        ("visionzip:merge=mean", ("'mean'", "add, average")),
        ("vispruner:ratio=1.5", ("ratio=1.5", "0 to 1")),
        ("vispruner:ratio=nan", ("ratio=nan", "0 to 1")),
        ("hiprune:alpha=-0.1", ("alpha=-0.1", "0 to 1")),
        ("scope:power=-1", ("power=-1", "0 to 10")),
        ("holov:crops=0", ("crops=0", "1 to V=576")),
        ("holov:crops=577", ("crops=577", "1 to V=576")),
        ("random:schedule=pdrop", ("'pdrop'", "twig, input, fastv")),
        ("cdpruner:stand_in,text_tower=x", ("not both",)),
    ],
)
def test_settings_that_cannot_be(spec, words):
    with pytest.raises(InputError) as error:
        plan_for(spec, 64, 576, TwigConfig(32, 2, 3))
    assert all(word in str(error.value) for word in words), error.value
