"""What the authors' released code crashes on or gets wrong: one test a row of the table in the method's notes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import (
    EOS,
    IMAGE,
    ROOT,
    Numbers,
    batch,
    drafts,
    one,
    prompts,
    spec_of,
    stock,
    tiny,
    tiny_model,
    write_base,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import twigvlm
from twigvlm.config import TwigConfig
from twigvlm.decoding import DraftStreamer
from twigvlm.errors import InputError
from twigvlm.model.twig import WEIGHTS, save_twig
from twigvlm.prompt.images import open_image
from twigvlm.pruning import METHODS

NEW = 8


@pytest.mark.parametrize("method", sorted(METHODS))
def test_text_only_prompt_with_pruning(method):
    """No visual token, nothing to prune."""
    vlm = tiny()
    (row,), _ = prompts(vlm, [(7,)])
    out = vlm.generate(**batch([row]), retained_tokens=2.5, pruning=spec_of(method), max_new_tokens=NEW)
    assert out.tokens[0] == stock(vlm, row, max_new_tokens=NEW)
    assert out.kept is None or out.kept[0].tolist() == []


@pytest.mark.parametrize("R", [-1, 0, 1.3, 2.7, 4, 5, 1000])
def test_impossible_budgets(R):
    """r would be negative or above V: refused before anything runs, with the legal range."""
    vlm = tiny(F=4)  # L 6, V 4, K 2: 4/3 to 8/3
    arguments = one(vlm, 3, IMAGE, 4)
    with pytest.raises(InputError) as error:
        vlm.generate(**arguments, retained_tokens=R)
    assert "1.34 to 2.66" in str(error.value)


@pytest.mark.parametrize(
    ("K", "T", "F"),
    [(2, 2, 3), (2, 3, 4), (2, 2, 6), (2, 4, 5), (5, 1, 6), (1, 5, 2), (2, 2, 7), (2, 2, 60), (0, 2, 4)],
)
def test_every_legal_wipe_layer(K, T, F):
    """F right above K, inside the twig's range, at L and above it; a twig up to the last layer."""
    vlm = tiny(K=K, T=T, F=F, side=56)
    arguments = {**one(vlm, 3, IMAGE, 4), "max_new_tokens": NEW}
    R = (K * 16 + (F - K) * 8) / 6
    pruned = vlm.generate(**arguments, retained_tokens=R)
    assert pruned.tokens == vlm.generate(**arguments, retained_tokens=R, draft_length=0).tokens
    assert len(pruned.kept[0]) == 8
    per_layer = (K * 16 + (min(F, 6) - K) * 8) / 6
    assert pruned.stats.visual_measured == pytest.approx(per_layer)


@pytest.mark.parametrize(
    ("letters", "parts"),
    [
        ({"K": -1}, ["K is -1", "K >= 0"]),
        ({"K": 2, "T": 0}, ["T is 0", "T >= 1"]),
        ({"K": 4, "T": 3}, ["4 + 3 = 7", "L = 6"]),
        ({"K": 2, "F": 2}, ["F is 2", "K = 2", "3 to 6"]),
        ({"K": 3, "F": 1}, ["F is 1", "K = 3", "4 to 6"]),
    ],
)
def test_impossible_twigs(letters, parts):
    with pytest.raises(InputError) as error:
        TwigConfig(6, **letters)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(("L", "F"), [(32, 24), (8, 6), (6, 4), (3, 3)])
def test_wipe_layer_by_default(L, F):
    assert TwigConfig(L, K=2, T=1).F == F


@pytest.mark.parametrize("R", [None, 2.5])
@pytest.mark.parametrize("draft_length", [0, 5])
def test_one_new_token(R, draft_length):
    vlm = tiny()
    (row,), (pictures,) = prompts(vlm, [(3, IMAGE, 4)])
    out = vlm.generate(
        **batch([row], [pictures]), retained_tokens=R, draft_length=draft_length, max_new_tokens=1, eos_token_id=[]
    )
    assert len(out.tokens[0]) == 1 and drafts(out) == [(0, 0)]
    assert R or out.tokens[0] == stock(vlm, row, pictures, max_new_tokens=1)


def test_streaming_when_the_first_draft_is_refused():
    vlm = tiny(noise=3.0)
    shown = []
    streamer = DraftStreamer(Numbers(), lambda text, drafted: shown.append(text))
    out = vlm.generate(**one(vlm, 3, IMAGE, 4), max_new_tokens=NEW, streamer=streamer, eos_token_id=[])
    assert drafts(out)[0][0] > 0 and drafts(out)[0][1] == 0
    assert "".join(shown) == Numbers().decode(out.tokens[0])


@pytest.mark.parametrize("R", [None, 2.5])
def test_sampling(R):
    """Its losslessness is test_lossless.py's; here it works at all, with a draft accepted and one refused."""
    vlm = tiny(sharpness=1.0)
    arguments = {
        **one(vlm, 3, IMAGE, 4),
        "do_sample": True,
        "max_new_tokens": 30,
        "draft_confidence": 0.1,
        "eos_token_id": [],
    }
    out = vlm.generate(**arguments, temperature=0.8, top_k=20, top_p=0.95, seed=1, retained_tokens=R)
    assert len(out.tokens[0]) == 30
    assert 0 < out.stats.accepted < out.stats.drafted


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("R", [None, 2.5])
def test_a_batch_with_several_images_and_padding(left, R):
    vlm = tiny()
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (9,), (1, IMAGE, 2, IMAGE, 3), (IMAGE, IMAGE, IMAGE, 1)])
    out = vlm.generate(**batch(rows, pictures, left), retained_tokens=R, max_new_tokens=NEW)
    for b, (row, pixels) in enumerate(zip(rows, pictures, strict=True)):
        alone = vlm.generate(**batch([row], [pixels]), retained_tokens=R, draft_length=0, max_new_tokens=NEW)
        assert out.tokens[b] == alone.tokens[0]
        if R is None:
            assert out.tokens[b] == stock(vlm, row, pixels, max_new_tokens=NEW)
        else:
            assert len(out.kept[b]) == len(out.kept[0]) * len(pixels)


def test_sdpa_is_the_default(tmp_path):
    vlm = twigvlm.load(write_base(tmp_path, tiny_model(), tokenizer=False))
    assert vlm.trunk.decoder.config._attn_implementation == "sdpa"
    out = vlm.generate(**one(vlm, 3, IMAGE, 4), max_new_tokens=NEW)
    assert out.tokens == tiny(twig=False).generate(**one(vlm, 3, IMAGE, 4), max_new_tokens=NEW).tokens


@pytest.fixture
def saved(tmp_path):
    """A base and its twig on disk."""
    vlm = tiny(K=2, T=2)
    write_base(tmp_path / "base", vlm.model, tokenizer=False)
    save_twig(vlm.twig, vlm.trunk, tmp_path / "twig", "tiny")
    return tmp_path / "base", tmp_path / "twig"


def test_a_twig_with_another_number_of_layers_or_a_missing_key(saved):
    base, twig = saved
    with pytest.raises(InputError, match=r"model\.safetensors: T = 3 was asked for, but .* T = 2"):
        twigvlm.load(base, twig, T=3)
    weights = load_file(twig / WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, twig / WEIGHTS)
    with pytest.raises(InputError) as error:
        twigvlm.load(base, twig)
    for part in (WEIGHTS, "model.layers.1.mlp.up_proj.weight", "[64, 32]"):
        assert part in str(error.value)


def test_k_and_t_come_from_the_twig_and_not_from_the_environment(saved, monkeypatch):
    base, twig = saved
    for name in ("K", "T", "TWIG_K", "TWIG_T"):
        monkeypatch.setenv(name, "1")
    vlm = twigvlm.load(base, twig)
    assert (vlm.config.K, vlm.config.T) == (2, 2)
    with pytest.raises(InputError, match="K = 1 was asked for, but the twig was grown with K = 2"):
        twigvlm.load(base, twig, K=1)


def test_importing_does_nothing():
    """No torch, no environment, no output."""
    code = "import sys, twigvlm; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'PIL')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_a_twig(saved):
    base, _ = saved
    vlm = twigvlm.load(base)
    (row,), (pictures,) = prompts(vlm, [(3, IMAGE, 4)])
    assert (vlm.twig, vlm.config.K, vlm.config.T, vlm.config.F) == (None, None, None, None)
    out = vlm.generate(**batch([row], [pictures]), max_new_tokens=NEW)
    assert out.tokens[0] == stock(vlm, row, pictures, max_new_tokens=NEW)
    assert out.stats.acceptance is None
    with pytest.raises(InputError, match="pruning 'twig' needs a twig"):
        vlm.generate(**batch([row], [pictures]), retained_tokens=2.5)


@pytest.mark.parametrize("stored", [None, 5, [5, 6]])
def test_no_end_token_given(stored, monkeypatch):
    """The generation config's, one or several; without any there, the text model's."""
    vlm = tiny()
    arguments = {**one(vlm, 3, IMAGE, 4), "max_new_tokens": NEW}
    free = vlm.generate(**arguments, eos_token_id=[]).tokens[0]
    place = next(i for i, token in enumerate(free) if token != free[0])
    end = free[place]
    if stored is None:
        monkeypatch.setattr(vlm.model.config.text_config, "eos_token_id", end)
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", end if stored == 5 else stored and [EOS, end])
    assert vlm.generate(**arguments).tokens[0] == free[:place]


def test_an_overlong_prompt():
    vlm = tiny(context=32)
    with pytest.raises(InputError) as error:
        vlm.generate(**one(vlm, 30, IMAGE, 4))
    assert "38 tokens" in str(error.value) and "context of 32" in str(error.value)


def test_an_answer_ends_where_the_context_is_full():
    vlm = tiny(context=32)
    (row,), (pictures,) = prompts(vlm, [(20, IMAGE, 4)])
    out = vlm.generate(**batch([row], [pictures]), max_new_tokens=100, eos_token_id=[])
    assert len(out.tokens[0]) == 4
    assert out.tokens[0] == stock(vlm, row, pictures, eos=63, max_new_tokens=4)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "P"])
def test_pictures_of_every_mode(mode, tmp_path):
    """test_images.py looks at the colours."""
    image = Image.new("RGB", (20, 10), "white").convert("L").convert(mode)
    file = tmp_path / f"picture.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(file)
    assert open_image(file).mode == "RGB"
    assert torch.tensor(list(open_image(file).tobytes())).min() > 250


@pytest.mark.parametrize("layout", [(1,), (7,), (3, IMAGE, 4)], ids=str)
@pytest.mark.parametrize("R", [None, 2.5])
def test_an_end_token_drafted_without_a_confidence_to_stop_at(layout, R):
    """Every row's draft ends early, and none of the later nodes is there."""
    vlm = tiny(noise=0.0, fade=0.1)
    (row,), (pictures,) = prompts(vlm, [layout])
    asked = {**batch([row], [pictures]), "retained_tokens": R, "max_new_tokens": NEW}
    words = vlm.generate(**asked, draft_length=0, eos_token_id=[]).tokens[0]
    for end in sorted(set(words)):
        plain = vlm.generate(**asked, draft_length=0, eos_token_id=end)
        fast = vlm.generate(**asked, draft_length=4, draft_confidence=0.0, eos_token_id=end)
        assert fast.tokens == plain.tokens == [words[: words.index(end)]]
