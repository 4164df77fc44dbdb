"""A twig as a stock checkpoint: what it says first is what the twig drafts, logit for logit."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_model, write_base
from huggingface_hub import ModelCard
from transformers import AutoProcessor, LlavaForConditionalGeneration

import twigvlm
from twigvlm.commands import export
from twigvlm.config import TwigConfig
from twigvlm.families import trunk_of
from twigvlm.families.draft import stored_dtype
from twigvlm.model.twig import grow, save_twig


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("export")
    model = tiny_model()
    base = write_base(place / "base", model)
    trunk = trunk_of(tiny_model())
    twig = grow(trunk, TwigConfig(trunk.L, 2, 3))
    with torch.no_grad():
        for parameter in twig.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 50)
    save_twig(twig, trunk, place / "twig", "tiny")
    return base, place / "twig"


def draft_logits(vlm, inputs) -> torch.Tensor:
    """Of the twig, from a prompt whose visual tokens all stay: [S, vocabulary]."""
    trunk, ids = vlm.trunk, inputs["input_ids"]
    with torch.inference_mode():
        stream = trunk.embed(ids, torch.tensor([ids.shape[1]]), inputs["pixel_values"])
        stream = trunk.run(trunk.layers[: vlm.config.K], stream, None)
        return vlm.twig.logits(trunk.run(vlm.twig.layers, stream, None).hidden)[0]


def written(tmp_path, *flags: str):
    out = tmp_path / "draft"
    assert export.main(["--as", "draft-vlm", "--out", str(out), *flags]) == 0
    return out


def test_its_logits_are_the_twigs(folders, tmp_path, capsys):
    base, twig = map(str, folders)
    out = written(tmp_path, "--base-model", base, "--twig-block", twig, "--max-shard-size", "100KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    vlm = twigvlm.load(base, twig, device="cpu")
    model, found = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(found.values()), found
    text = model.config.text_config
    assert text.num_hidden_layers == 5 == len(model.model.language_model.layers) and vlm.trunk.L > 5
    side, image = vlm.model.config.vision_config.image_size, vlm.image_token_id
    ids = torch.tensor([[1, 5, *[image] * vlm.config.V, 6, 7, 8]])
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)),
    }
    with torch.inference_mode():
        logits = model(**inputs).logits[0]
    torch.testing.assert_close(
        logits[:, : vlm.twig.lm_head.out_features].float(), draft_logits(vlm, inputs), rtol=0, atol=1e-6
    )
    assert image in model.generation_config.suppress_tokens
    assert twigvlm.load(out, device="cpu").config.L == 5, "and this project reads it as well"
    card = ModelCard((out / "README.md").read_text())
    assert card.data.library_name == "transformers" and "5 layers" in card.text
    assert not list(tmp_path.glob(".part-*"))


def test_the_embedded_one_answers_with_stock_code(tmp_path):
    out = written(tmp_path, "--dtype", "float32")
    vlm = twigvlm.load(device="cpu", dtype="float32")
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(out)
    from PIL import Image

    from twigvlm.files import BROUGHT

    picture = Image.open(BROUGHT / "assets" / "image.png").convert("RGB")
    inputs = processor(
        images=picture, text="USER: <image>\nHow many objects are there? ASSISTANT:", return_tensors="pt"
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs).logits[0].float(), draft_logits(vlm, inputs), rtol=0, atol=2e-5)
    assert (out / "processor_config.json").read_bytes() == (
        BROUGHT / "checkpoints/sprout-base/processor_config.json"
    ).read_bytes()


def test_a_head_with_fewer_rows_than_words_never_prefers_one_that_is_none(folders, tmp_path):
    from twigvlm.families.draft import join

    trunk = trunk_of(copy.deepcopy(tiny_model()))  # which `join` uses up
    twig = grow(trunk, TwigConfig(trunk.L, 2, 3))
    words = twig.lm_head.out_features - 2
    twig.lm_head = torch.nn.Linear(twig.lm_head.in_features, words, bias=False)
    model = join(trunk, twig)
    states = torch.randn(50, twig.lm_head.in_features, generator=torch.Generator().manual_seed(1))
    assert model.lm_head(states).shape[1] == model.config.text_config.vocab_size == words + 2
    assert int(model.lm_head(states).argmax(-1).max()) < words


def test_it_replaces_its_own_and_nothing_else(folders, tmp_path, capsys):
    base, twig = map(str, folders)
    flags = ["--base-model", base, "--twig-block", twig]
    out = written(tmp_path, *flags)
    (out / "old.txt").write_text("of the last one")
    written(tmp_path, *flags)
    assert not (out / "old.txt").exists()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    capsys.readouterr()
    assert export.main(["--as", "draft-vlm", "--out", str(other), *flags]) == 2
    assert "not empty" in capsys.readouterr().err and (other / "thesis.txt").read_text() == "years of work"
    (other / "config.json").write_text('{"model_type": "llava"}')
    assert export.main(["--as", "draft-vlm", "--out", str(other), *flags]) == 2


def test_what_goes_wrong_half_way_leaves_the_old_one(folders, tmp_path, monkeypatch, capsys):
    base, twig = map(str, folders)
    flags = ["--base-model", base, "--twig-block", twig]
    out = written(tmp_path, *flags)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_processor", full)
    assert export.main(["--as", "draft-vlm", "--out", str(out), *flags]) == 1
    assert "No space left" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-shard-size", "much"], ["'much'", "5GB"]),
        (["--twig-block", "./nowhere"], ["nowhere", "no such folder"]),
        (["--twig-K", "3"], ["K = 3", "K = 2"]),
        (["--dtype", "int3"], ["int3"]),
        (["--license", "NONE!"], ["'NONE!'"]),
        (["--revision", "v1"], ["'v1'", "hub"]),
    ],
)
def test_bad_input_is_one_line(flags, words, tmp_path, capsys):
    assert export.main(["--as", "draft-vlm", "--out", str(tmp_path / "out"), *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and all(word in lines[-1] for word in words), lines
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_the_narrowest_type_that_loses_nothing(tmp_path):
    from safetensors.torch import save_file

    for name, dtype in (("a", torch.float16), ("b", torch.bfloat16), ("c", torch.float32)):
        save_file({"w": torch.zeros(2, dtype=dtype)}, tmp_path / f"{name}.safetensors")
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    assert (
        stored_dtype(a) == torch.float16 and stored_dtype(a, b) == torch.float32 and stored_dtype(b, c) == torch.float32
    )
