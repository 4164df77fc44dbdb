"""Every field of a config.json that is read: of its type, within reason, and no other model's; what is left is stock."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, prompts, tiny_model, write_base
from test_describe import mistral, no_weights  # noqa: F401 (fixture)
from test_loading import base, original, refused  # noqa: F401 (fixtures)
from transformers import LlavaForConditionalGeneration

import twigvlm
from twigvlm.errors import InputError
from twigvlm.loading.describe import read_config
from twigvlm.loading.judge.fields import DECODER, FOREIGN_DECODER, TOP, TOWER

JSON = (None, True, 7, -1.5, "x", ["x"], [], {"x": 1}, {}, math.nan)
PARTS = {"": TOP, "text_config": DECODER, "vision_config": TOWER}
LAYOUTS = ("base", "original")


def told(folder: Path, facts: dict, part: str = "") -> Path:
    """`facts` written into config.json, null as null; `part` is an object in it, or the tower's own file."""
    file = folder / "config.json"
    found = json.loads(file.read_text())
    if part == "vision_config" and part not in found:
        file = folder.parent / "tower" / "config.json"
        found = json.loads(file.read_text())
    inner = found.get(part, found)
    inner |= facts
    file.write_text(json.dumps(found))
    return folder


def set_decoder(folder: Path, **facts) -> Path:
    return told(folder, facts, "text_config")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", PARTS)
def test_a_field_of_another_type_is_refused_by_its_name(layout, part, request):
    folder = request.getfixturevalue(layout)
    file = folder / "config.json"
    if layout == "original" and part == "vision_config":
        file = folder.parent / "tower" / "config.json"
    before = file.read_text()
    for key, kind in PARTS[part].items():
        wrong = [value for value in JSON if value is not None and not kind.fits(value)]
        assert len(wrong) >= 6, key
        for value in JSON:
            told(folder, {key: value}, part)
            try:
                read_config(folder)
                assert value not in wrong, (key, value)
            except InputError as fault:  # and nothing else
                assert value not in wrong or key in str(fault), (key, value, str(fault))
            file.write_text(before)


SIZES = [
    *(
        {key: n}
        for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
        for n in (-1, 0, 10**9)
    ),
    {"max_position_embeddings": 0},
    *({"head_dim": n} for n in (-2, 0, 1, 3, 15)),
    {"num_key_value_heads": -1},
    *({"rms_norm_eps": eps} for eps in (math.nan, math.inf, -1e-6, 1.0, 10**400)),
    *({key: n} for key in ("bos_token_id", "pad_token_id", "eos_token_id") for n in (-1, 64, 10**12)),
    {"eos_token_id": [2, 64]},
    {"hidden_act": "xielu"},
    {"hidden_act": "prelu"},
    {"dtype": "int8"},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("facts", SIZES, ids=str)
def test_numbers_without_a_meaning(layout, facts, request, no_weights):  # noqa: F811
    refused(["config.json", *facts], set_decoder(request.getfixturevalue(layout), **facts))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "facts", [*({"layer_norm_eps": eps} for eps in (math.nan, math.inf, -1.0)), {"image_size": 10**6}], ids=str
)
def test_numbers_of_the_tower_without_a_meaning(layout, facts, request, no_weights):  # noqa: F811
    refused(["config.json", "tower", *facts], told(request.getfixturevalue(layout), facts, "vision_config"))


# ---------------------------------------------------------------------- rotary positions

THETA = {"rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
BAD_ROPES = [
    *({"rope_theta": value} for value in (0, -1e4, math.nan, math.inf)),
    *({"rope_parameters": {"rope_type": "default", "rope_theta": value}} for value in (0.0, -1e4, math.nan, None, "x")),
    *({"rope_parameters": {"rope_type": kind, **THETA, "factor": value}}
      for kind in ("linear", "yarn") for value in (0.0, -2.0, math.nan, math.inf, "x", None)),
    {"rope_parameters": {"rope_type": "default", "type": "linear", "factor": 4.0, **THETA}},
    {"rope_parameters": {"rope_type": "default", "factor": 4.0, **THETA}},
    {"rope_parameters": {"rope_type": None, **THETA}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", **THETA}}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1e4},
    {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 0}},
    {"rope_scaling": {"factor": 4.0}},
    {"rope_scaling": {"type": "linear", "factor": 4.0, "mrope_section": [2, 3, 3]}},
    {"rope_scaling": {"type": "longrope", "factor": 4.0}},
    {"partial_rotary_factor": 0.5},
    {"partial_rotary_factor": "x"},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}},
]  # fmt: skip
GOOD_ROPES = [
    {"rope_parameters": None, "rope_theta": 100.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rope_theta": 100.0},
    {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 1.0}},
    {"rope_parameters": None, "rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_parameters": None, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "attention_factor": 0.7, **THETA}},
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8} | THETA},
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("facts", BAD_ROPES, ids=str)
def test_ropes_without_a_meaning_or_with_two(layout, facts, request, no_weights):  # noqa: F811
    folder = request.getfixturevalue(layout)
    set_decoder(folder, rope_parameters=None)
    refused(["config.json", "r"], set_decoder(folder, **facts))


def logits(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and those of the stock class on its own, of a prompt with a picture; the model is in the Hugging Face layout."""
    vlm = twigvlm.load(folder)
    (row,), (picture,) = prompts(vlm, [(3, IMAGE, 14)])
    stock = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        state = vlm.trunk.embed(torch.tensor([row]), [len(row)], picture)
        ours = vlm.trunk.logits(vlm.trunk.run(vlm.trunk.layers, state).hidden)
        return ours, stock(input_ids=torch.tensor([row]), pixel_values=picture).logits


@pytest.mark.parametrize("facts", GOOD_ROPES, ids=str)
def test_ropes_as_stock_has_them(base, original, facts):  # noqa: F811
    plain, _ = logits(base)
    ours, stock = logits(set_decoder(base, **facts))
    assert torch.allclose(ours, stock, atol=1e-4) and not torch.allclose(ours, plain, atol=1e-2)
    found = twigvlm.load(set_decoder(original, **facts)).model.config.text_config.rope_parameters
    assert found == twigvlm.load(base).model.config.text_config.rope_parameters


@pytest.mark.parametrize("layer", [1, 2, -1, [-2, -1], [0, 2], [-2]], ids=str)  # of 0 alone stock code keeps no state
def test_layers_of_the_tower_as_stock_reads_them(tmp_path, layer):
    facts = tiny_model().config.to_dict() | {"vision_feature_layer": layer}
    model = LlavaForConditionalGeneration(type(tiny_model().config).from_dict(facts)).eval()
    state = tiny_model().state_dict()
    if isinstance(layer, list):
        key = "model.multi_modal_projector.linear_1.weight"
        state = state | {key: torch.cat([state[key] * (1 + n) for n in range(len(layer))], 1)}
    model.load_state_dict(state)
    ours, stock = logits(write_base(tmp_path / "base", model, tokenizer=False))
    assert torch.allclose(ours, stock, atol=1e-4)


# ---------------------------------------------------------------------- other models under this name

NEUTRAL = [
    {"embedding_multiplier": 1.0, "logits_scaling": 1, "num_local_experts": 0, "use_qk_norm": False},
    {"layer_types": ["full_attention"] * 6, "no_rope_layers": [1] * 6, "final_logit_softcapping": None},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", FOREIGN_DECODER)
def test_decoders_of_another_kind_under_the_name_of_llama(layout, key, request, no_weights):  # noqa: F811
    value = {"layer_types": ["sliding_attention"] * 6, "no_rope_layers": [1, 0, 1, 1, 1, 1]}.get(key, 12.0)
    refused(["config.json", key, "Llama"], set_decoder(request.getfixturevalue(layout), **{key: value}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("facts", NEUTRAL, ids=str)
def test_their_fields_may_say_that_nothing_is_changed(layout, facts, request):
    read_config(set_decoder(request.getfixturevalue(layout), **facts))


OTHERS = [
    *({"mm_projector_type": kind} for kind in ("linear", "identity", "mlp3x_gelu")),
    {"mm_vision_select_layer": -1},
    {"mm_vision_select_feature": "cls_patch"},
    {"mm_hidden_size": 99},
    {"image_grid_pinpoints": [[336, 672]]},
    {"vision_aspect_ratio": "anyres_max_9"},
    {"vision_feature_layers": [-2, -5]},
    {"projector_layernorm_eps": 1e-5},
    {"use_image_newline_parameter": True},
    {"video_token_index": 60},
    {"image_token_id": 5},
    *({"architectures": [name]} for name in (
        "LlavaNextForConditionalGeneration", "VipLlavaForConditionalGeneration", "VideoLlavaForConditionalGeneration")),
    {"architectures": ["LlavaForConditionalGeneration", "VipLlavaForConditionalGeneration"]},
]  # fmt: skip


@pytest.mark.parametrize("facts", OTHERS, ids=str)
def test_others_that_see_under_the_name_of_llava(base, facts, no_weights):  # noqa: F811
    refused(["config.json", *facts], told(base, facts))


def test_what_is_told_twice_and_alike(base):  # noqa: F811
    facts = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    read_config(told(base, facts | {"mm_hidden_size": 16, "image_token_id": 63, "image_grid_pinpoints": None}))


@pytest.mark.parametrize(
    ("part", "name"), [("text_config", "Qwen2ForCausalLM"), ("vision_config", "SiglipVisionModel")]
)
def test_classes_within(base, part, name, no_weights):  # noqa: F811
    refused(["config.json", "architectures", name], told(base, {"architectures": [name]}, part))
    known = {"text_config": "LlamaForCausalLM", "vision_config": "CLIPVisionModel"}[part]
    read_config(told(base, {"architectures": [known]}, part))


def test_classes_of_a_tower_of_its_own(original, no_weights):  # noqa: F811
    refused(["tower", "SiglipVisionModel"], told(original, {"architectures": ["SiglipVisionModel"]}, "vision_config"))


def test_a_mistral_has_no_biases(tmp_path, no_weights):  # noqa: F811
    folder = mistral(tmp_path / "m", None)
    refused(["attention_bias", "Mistral"], set_decoder(folder, attention_bias=True))


@pytest.mark.parametrize(
    ("facts", "window", "heads"),
    [({}, 4096, 8), ({"sliding_window": None}, None, 8), ({"num_key_value_heads": None}, 4096, 16)],
    ids=str,
)
def test_what_an_original_mistral_leaves_out(original, facts, window, heads):  # noqa: F811
    file = original / "config.json"
    found = json.loads(file.read_text()) | {"architectures": ["LlavaMistralForCausalLM"], "num_attention_heads": 16}
    del found["num_key_value_heads"]
    file.write_text(json.dumps(found | facts))
    text = read_config(original)[1].text_config
    assert (text.sliding_window, text.num_key_value_heads) == (window, heads)


# ---------------------------------------------------------------------- the image token


@pytest.mark.parametrize("image", [64, 32000, 10**6, None, "default"])
def test_the_image_token_is_within_the_vocabulary(base, image, no_weights):  # noqa: F811
    if image == "default":
        found = json.loads((base / "config.json").read_text())
        del found["image_token_index"]
        (base / "config.json").write_text(json.dumps(found))
    else:
        told(base, {"image_token_index": image})
    refused(["config.json", "image_token_index"], base)


def test_padded_rows_count(tmp_path):
    model = deepcopy(tiny_model())
    model.resize_token_embeddings(128)
    model.config.image_token_index = 100
    assert twigvlm.load(write_base(tmp_path / "b", model, tokenizer=False)).image_token_id == 100
