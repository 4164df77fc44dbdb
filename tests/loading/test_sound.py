"""Weights that are no numbers are noticed when they are read, whatever reads them; attention may let them vanish later."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, batch, prompts, tiny
from safetensors.torch import load_file, save_file
from test_loading import base, change, original, refused, split, twig  # noqa: F401 (fixtures)

import twigvlm
from twigvlm.errors import RunError
from twigvlm.loading.clip import load_text_tower
from twigvlm.loading.projector import load_projector, write_projector
from twigvlm.model.finite import sound, spoilt
from twigvlm.model.twig import WEIGHTS, save_twig, signature

NAN, INF = float("nan"), float("inf")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def spoil(file: Path, ending: str, value: float = NAN) -> str:
    """One number of the tensor whose name ends so; its name."""
    (name,) = (k for k in load_file(file) if k.endswith(ending) and ("vision" in k) == ("vision" in ending))

    def one(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    change(file, **{name: one})
    return name


PLACES = {
    "layers.3.self_attn.q_proj.weight": "layer 3 of the base",
    "layers.5.self_attn.k_proj.weight": "layer 5 of the base",
    "layers.0.input_layernorm.weight": "layer 0 of the base",
    "embed_tokens.weight": "the base",
    "lm_head.weight": "the base",
    "linear_2.bias": "the projector",
    "vision_tower.encoder.layers.1.self_attn.q_proj.weight": "layer 1 of the vision tower",
    "vision_tower.embeddings.class_embedding": "the vision tower",
}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("ending", PLACES)
def test_a_base(base, ending, value):  # noqa: F811
    name = spoil(base / "model.safetensors", ending, value)
    parts = [str(base), f"{PLACES[ending]} are not finite", name, "fetch"]
    refused(parts, base, error=RunError)
    refused(parts, base, error=RunError, dtype="bfloat16")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_shard_is_named(base, kind):  # noqa: F811
    name = spoil(base / "model.safetensors", "layers.3.mlp.up_proj.weight")
    place = "model-00002" if kind == "safetensors" else "pytorch_model-00002"
    refused([place, name, "not finite"], split(base, kind), error=RunError)


@needs_torchao
@pytest.mark.parametrize("bits", [{"load_8bit": True}, {"load_4bit": True}])
def test_rounded_weights(base, bits):  # noqa: F811
    name = spoil(base / "model.safetensors", "layers.3.self_attn.q_proj.weight")
    refused(["layer 3 of the base", "not finite", name], base, error=RunError, **bits)


def test_a_tower_of_its_own(original):  # noqa: F811
    file = original.parent / "tower" / "model.safetensors"
    (name,) = (k for k in load_file(file) if k.endswith("layers.0.self_attn.k_proj.bias"))
    change(file, **{name: lambda t: t.fill_(NAN)})
    refused(["tower/model.safetensors", "layer 0 of the vision tower", name], original, error=RunError)


def test_a_twig_and_its_pruning_head(base, twig, tmp_path):  # noqa: F811
    spoil(twig / WEIGHTS, "layers.1.self_attn.q_proj.weight")
    refused([str(twig), "layer 1 of the twig are not finite"], base, twig, error=RunError)
    headed = tiny(K=2, T=2, pruning_head="released")
    save_twig(headed.twig, headed.trunk, tmp_path / "headed", "tiny")
    name = spoil(tmp_path / "headed" / WEIGHTS, "q_gate.weight")
    refused(["the twig are not finite", name], base, tmp_path / "headed", error=RunError)


def test_a_projector(tmp_path):
    vlm = tiny()
    state = {k: v.clone() for k, v in vlm.model.model.multi_modal_projector.state_dict().items()}
    write_projector(tmp_path, state, {"base_signature": signature(vlm.trunk)})
    load_projector(tmp_path, vlm.trunk)
    state["linear_1.weight"][0, 0] = NAN
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(RunError, match=r"projector are not finite \(key linear_1.weight"):
        load_projector(tmp_path, vlm.trunk)


def test_a_text_tower(tmp_path, monkeypatch):
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 64}, vision_config=small | {"image_size": 28, "patch_size": 14}
    )
    model = CLIPModel(config)
    model.text_model.encoder.layers[0].self_attn.q_proj.weight.data[0] = NAN
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    with pytest.raises(RunError, match="layer 0 of the text tower are not finite"):
        load_text_tower(str(tmp_path), torch.device("cpu"), torch.float32)


def test_a_number_that_the_dtype_cannot_hold(base):  # noqa: F811
    spoil(base / "model.safetensors", "layers.3.self_attn.q_proj.weight", torch.finfo(torch.float32).max)
    twigvlm.load(base)
    refused(["model.safetensors", "q_proj", "finite as stored"], base, dtype="bfloat16", error=RunError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_is_found_wherever_it_stands(dtype):
    weight = torch.full((37, 29), torch.finfo(dtype).max, dtype=dtype)
    assert sound(weight) and sound(-weight) and sound(weight[:0])
    for at in (0, 1, 500, 37 * 29 - 1):
        for value in (NAN, INF, -INF):
            spoiled = weight.clone()
            spoiled.view(-1)[at] = value
            assert not sound(spoiled)
    assert spoilt({"a": sound(weight), "b": sound(spoiled)}) == "b" and spoilt({"a": sound(weight)}) is None


# ---------------------------------------------------------------------- changed in memory, after they were read


def asked(spoil_it, **settings) -> str:
    """What is said of a tiny model that was changed in memory."""
    vlm = copy.deepcopy(tiny(K=2, T=2))
    spoil_it(vlm)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4)])
    with pytest.raises(RunError) as caught:
        vlm.generate(**batch(rows, pictures), max_new_tokens=5, eos_token_id=[], **settings)
    return str(caught.value)


def test_what_attention_lets_vanish_is_named_all_the_same():
    said = asked(lambda v: v.twig.layers[-1].self_attn.q_proj.weight[0].fill_(NAN), tree="2,2,2,4")
    assert "layer 1 of the twig" in said and "twig.model.layers.1.self_attn.q_proj.weight" in said
    assert "processor" not in said


def test_a_word_that_is_only_drafted():
    def forget(vlm):
        rows, pictures = prompts(vlm, [(3, IMAGE, 4)])
        out = vlm.generate(**batch(rows, pictures), max_new_tokens=5, eos_token_id=[])
        said = {*rows[0], *out.tokens[0]}
        word = next(t for step in out.steps[0] for t in step.drafted if t not in said)
        vlm.model.model.language_model.embed_tokens.weight[word].fill_(NAN)

    assert "language_model.embed_tokens.weight" in asked(forget)


@pytest.mark.parametrize("way", ["generate", "score"])
@pytest.mark.parametrize(("method", "whose"), [("twig", "twig"), ("fastv", "base")])
def test_visual_tokens_are_not_chosen_by_scores_that_are_none(way, method, whose):
    """Here attention lets them vanish: the answer would be one to a set of visual tokens that nobody chose."""
    vlm = copy.deepcopy(tiny(K=2, T=2))
    attention = vlm.twig.layers[-1].self_attn if whose == "twig" else vlm.trunk.layers[1].self_attn
    attention.q_proj.weight.fill_(NAN)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (6,)])
    settings = batch(rows, pictures) | {"retained_tokens": 2.5, "pruning": method}
    with pytest.raises(RunError, match=f"layer 1 of the {whose}; its weights hold"):
        if way == "score":
            vlm.score(targets=[[4, 5], []], **settings)
        else:
            vlm.generate(draft_length=0, max_new_tokens=4, **settings)


def test_scores_that_overflow():
    vlm = copy.deepcopy(tiny(K=2, T=2, pruning_head="released"))
    for gate in (vlm.twig.pruning_head.q_gate, vlm.twig.pruning_head.k_gate):
        gate.weight.mul_(1e30)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4)])
    settings = batch(rows, pictures) | {"retained_tokens": 2.5}
    for ask in (lambda: vlm.generate(draft_length=0, **settings), lambda: vlm.score(targets=[[4]], **settings)):
        with pytest.raises(RunError, match="the twig's scores of visual tokens are not finite; its weights are"):
            ask()
