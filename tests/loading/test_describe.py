"""What config.json says is judged before any weight is fetched or opened; what is read is read as the stock classes do."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, batch, one, prompts, stock, tiny_model, tiny_tokenizer, write_base
from PIL import Image
from safetensors.torch import load_file, save_file
from test_loading import base, change, edit, original, refused, twig, write_tower  # noqa: F401 (fixtures)
from transformers import (
    GemmaConfig,
    GraniteConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    MistralConfig,
    MptConfig,
    PixtralVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

import twigvlm
from twigvlm.errors import InputError
from twigvlm.families import trunk_of
from twigvlm.loading.base import load_base
from twigvlm.loading.twig import load_twig
from twigvlm.model.twig import save_twig
from twigvlm.prompt.template import Talk
from twigvlm.training.cost import find_config
from twigvlm.training.settings import Settings

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
TEXTS = {
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "gemma": GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=16),
    "granite": GraniteConfig(**SMALL, num_key_value_heads=2),
    "mpt": MptConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=64),
}
TOWERS = {
    "siglip_vision_model": SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ),
    "pixtral": PixtralVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
}
QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
}


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever opens a weight file now has judged too late."""

    def opened(*_):
        raise AssertionError("weights were opened")

    monkeypatch.setattr("twigvlm.loading.base.weight_files", opened)
    monkeypatch.setattr("twigvlm.loading.base.skeleton", opened)


# ---------------------------------------------------------------------- refused by the description


@pytest.mark.parametrize("kind", TEXTS)
def test_other_decoders_in_the_hugging_face_layout(base, kind, no_weights):  # noqa: F811
    edit(base / "config.json", text_config=TEXTS[kind].to_dict())
    refused([str(base / "config.json"), repr(kind), "Llama or Mistral"], base)


@pytest.mark.parametrize("kind", TOWERS)
def test_other_towers(base, original, kind, no_weights):  # noqa: F811
    edit(base / "config.json", vision_config=TOWERS[kind].to_dict())
    refused([str(base / "config.json"), repr(kind), "CLIP"], base)
    TOWERS[kind].save_pretrained(original.parent / "tower")
    refused([str(original.parent), repr(kind), "CLIP"], original)


@pytest.mark.parametrize("layout", ["base", "original"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights(layout, kind, request, no_weights):
    folder = request.getfixturevalue(layout)
    edit(folder / "config.json", quantization_config=QUANTISED[kind])
    refused(["config.json", "quantised", kind, "bfloat16", "made from"], folder)


STOCK_FAULTS = [
    ({"architectures": ["LlavaNextForConditionalGeneration"]}, ["architectures", "LlavaNextForConditionalGeneration"]),
    ({"text_config": 3}, ["text_config", "3"]),
    ({"text_config": None}, ["text_config", "None"]),
    ({"vision_config": None}, ["vision_config", "None"]),
    ({"vision_feature_select_strategy": "middle"}, ["'middle'", "default", "full"]),
    ({"vision_feature_layer": 9}, ["9", "2 layers", "-3 to 2"]),
    ({"vision_feature_layer": [-2, 7]}, ["[-2, 7]", "2 layers"]),
    ({"projector_hidden_act": "swoosh"}, ["projector_hidden_act", "'swoosh'"]),
    ({"image_token_index": -200}, ["-200"]),
    ({"image_token_index": 2}, ["image token", "2", "end"]),
    ({"image_aspect_ratio": "anyres"}, ["'anyres'", "LLaVA-1.6", "pad"]),
    ({"mm_patch_merge_type": "spatial_unpad"}, ["mm_patch_merge_type", "'spatial_unpad'", "flat"]),
]
INNER_FAULTS = [
    ("text_config", {"hidden_act": "swoosh"}, ["hidden_act", "'swoosh'"]),
    ("text_config", {"hidden_size": "wide"}, ["hidden_size"]),
    ("text_config", {"num_key_value_heads": 0}, ["num_key_value_heads", "0"]),
    ("text_config", {"num_attention_heads": 3}, ["32", "3"]),
    ("text_config", {"eos_token_id": 999}, ["eos_token_id", "999", "63"]),
    (
        "text_config",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        ["'dynamic'", "linear"],
    ),
    ("vision_config", {"hidden_act": "swoosh"}, ["tower", "hidden_act", "'swoosh'"]),
    ("vision_config", {"patch_size": 0}, ["patch_size", "0"]),
    ("vision_config", {"num_attention_heads": 3}, ["tower", "16", "3"]),
    ("vision_config", {"num_channels": 4}, ["4 channels"]),
]


@pytest.mark.parametrize(("facts", "parts"), STOCK_FAULTS, ids=str)
def test_fields_of_the_hugging_face_layout(base, facts, parts, no_weights):  # noqa: F811
    edit(base / "config.json", **facts)
    refused([str(base / "config.json"), *parts], base)


@pytest.mark.parametrize(("part", "facts", "parts"), INNER_FAULTS, ids=str)
def test_fields_of_its_parts(base, part, facts, parts, no_weights):  # noqa: F811
    found = json.loads((base / "config.json").read_text())
    edit(base / "config.json", **{part: found[part] | facts})
    refused([str(base / "config.json"), *parts], base)


ORIGINAL_FAULTS = [
    ({"model_type": "llava_qwen"}, ["'llava_qwen'", "Llama or Mistral"]),
    ({"model_type": "llava_mpt"}, ["'llava_mpt'", "Llama or Mistral"]),
    ({"architectures": ["LlavaQwenForCausalLM"]}, ["LlavaQwenForCausalLM", "Llama or Mistral"]),
    ({"model_type": "llava_llama", "architectures": ["LlavaMistralForCausalLM"]}, ["LlavaMistralForCausalLM"]),
    ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}, ["'anyres'", "LLaVA-1.6"]),
    ({"mm_patch_merge_type": "spatial"}, ["'spatial'", "flat"]),
    ({"mm_projector_type": "mlp3x_gelu"}, ["'mlp3x_gelu'", "mlp2x_gelu"]),
    ({"mm_projector_type": None}, ["mm_projector_type", "'linear'", "mlp2x_gelu"]),
    ({"mm_resampler_type": "qformer"}, ["mm_resampler_type", "'qformer'"]),
    ({"s2": True}, ["s2", "True"]),
    ({"mm_use_im_start_end": "yes"}, ["mm_use_im_start_end", "'yes'"]),
    ({"mm_vision_select_feature": "cls"}, ["mm_vision_select_feature", "'cls'", "cls_patch"]),
    ({"mm_vision_select_layer": None}, ["mm_vision_select_layer", "None", "-2"]),
    ({"mm_vision_select_layer": -9}, ["-9", "2 layers"]),
    ({"mm_hidden_size": 99}, ["mm_hidden_size", "99", "16"]),
    ({"hidden_act": "swoosh"}, ["hidden_act", "'swoosh'"]),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "linear"]),
    ({"eos_token_id": -5}, ["eos_token_id", "-5"]),
    *[({key: None}, [key, "None"]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")],
]  # fmt: skip


@pytest.mark.parametrize(("facts", "parts"), ORIGINAL_FAULTS, ids=str)
def test_fields_of_the_original_layout(original, facts, parts, no_weights):  # noqa: F811
    edit(original / "config.json", **facts)
    refused([str(original / "config.json"), *parts], original)


def test_what_no_model_can_be_made_of(base):  # noqa: F811
    found = json.loads((base / "config.json").read_text())["text_config"]
    edit(base / "config.json", text_config=found | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}})
    refused([str(base / "config.json")], base)


def test_llava_next(tmp_path, no_weights):
    LlavaNextConfig(text_config=deepcopy(tiny_model().config.text_config)).save_pretrained(tmp_path)
    refused(["'llava_next'", "LLaVA-1.6", "LLaVA-1.5"], tmp_path)


def test_parts_of_a_model(tmp_path, base):  # noqa: F811
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"base_model_name_or_path": "liuhaotian/llava-v1.5-7b"}')
    refused([str(lora), "LoRA", "liuhaotian/llava-v1.5-7b", "merge"], lora)
    (base / "model.safetensors").rename(tmp_path / "away")
    torch.save({"model.mm_projector.0.weight": torch.ones(2, 2)}, base / "mm_projector.bin")
    refused([str(base), "projector", "decoder"], base)
    (base / "config.json").unlink()
    refused([str(base), "projector", "decoder"], base)


def test_quantised_tensors_without_a_word_in_the_description(base):  # noqa: F811
    up = next(k for k in load_file(base / "model.safetensors") if k.endswith("layers.3.mlp.up_proj.weight"))
    change(base / "model.safetensors", **{up: lambda t: t.to(torch.int8)})
    refused(["model.safetensors", up, "I8", "quantised"], base)
    change(base / "model.safetensors", **{up: lambda t: t.to(torch.float8_e4m3fn)})
    refused([up, "F8_E4M3", "quantised"], base)
    change(base / "model.safetensors", **{up: lambda t: t.float(), up.replace("weight", "qweight"): torch.ones(2)})
    refused(["qweight", "quantised"], base)


def test_names_are_checked_before_the_first_tensor_is_read(base, monkeypatch):  # noqa: F811
    """The fault is in the last shard."""
    from test_loading import split

    folder = split(base, "safetensors")
    change(sorted(folder.glob("model-*.safetensors"))[-1], extra=torch.ones(2))

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("twigvlm.loading.weights._copy", read)
    refused(["unexpected key extra"], folder)


# ---------------------------------------------------------------------- the hub


class Hub:
    """Stands for the hub: notes what is asked of it."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.asked = folder, []
        monkeypatch.setattr("huggingface_hub.snapshot_download", self)

    def __call__(self, name, allow_patterns, revision=None):
        self.asked.append((name, sorted(allow_patterns), revision))
        return str(self.folder)


def test_a_hub_id_is_described_first(base, tmp_path, monkeypatch):  # noqa: F811
    snapshot = base.rename(tmp_path / ("a" * 40))
    hub = Hub(snapshot, monkeypatch)
    assert twigvlm.load("someone/llava").base_name == "someone/llava"
    assert [revision for *_, revision in hub.asked] == [None, "a" * 40]
    assert not any("safetensors" in p or "bin" in p for p in hub.asked[0][1])
    assert hub.asked[1][1] == ["*.bin", "*.safetensors"]
    hub.asked.clear()
    (snapshot / "pytorch_model.bin.index.json").write_text("{}")
    twigvlm.load("someone/llava")
    assert hub.asked[1][1] == ["*.bin"], "one format is enough"
    hub.asked.clear()
    edit(snapshot / "config.json", model_type="llava_next")
    refused(["LLaVA-1.6"], "someone/llava")
    assert len(hub.asked) == 1, "nothing more is fetched of what cannot be used"


def test_a_dry_run_fetches_no_weights(base, monkeypatch):  # noqa: F811
    hub = Hub(base, monkeypatch)
    assert find_config(Settings(base="someone/llava")).text_config.num_hidden_layers == 6
    assert len(hub.asked) == 1 and not any("safetensors" in p for p in hub.asked[0][1])


# ---------------------------------------------------------------------- what is read, and right


def rebuilt(folder: Path, tokenizer: bool = False, **facts) -> LlavaForConditionalGeneration:
    """tiny_model with another configuration, its weights in `folder`."""
    model = deepcopy(tiny_model())
    for key, value in facts.items():
        setattr(model.config, key, value)
    write_base(folder, model, tokenizer)
    return model


def answers_alike(vlm, layout=(3, IMAGE, 4)) -> None:
    rows, pictures = prompts(vlm, [layout])
    found = vlm.generate(**batch(rows, pictures), max_new_tokens=8, eos_token_id=[2]).tokens[0]
    assert found == stock(vlm, rows[0], pictures[0], max_new_tokens=8)


@pytest.mark.parametrize("layout", ["stock", "original"])
def test_the_class_token_is_taken_along(tmp_path, request, layout):
    if layout == "stock":
        rebuilt(tmp_path / "full", vision_feature_select_strategy="full")
        vlm = twigvlm.load(tmp_path / "full")
    else:
        folder = request.getfixturevalue("original")
        edit(folder / "config.json", mm_vision_select_feature="cls_patch")
        vlm = twigvlm.load(folder)
    assert vlm.config.V == 5
    answers_alike(vlm)
    assert len(vlm.generate(**one(vlm, 3, IMAGE, 4), retained_tokens=3, pruning="random", max_new_tokens=2).kept[0]) < 5


def test_the_class_token_is_no_patch():
    from twigvlm.pruning.picture import kept_picture

    white = Image.new("RGB", (28, 28), "white")
    light = kept_picture(white, torch.tensor([0, 4]), 5)
    assert [light.getpixel(p)[0] > 200 for p in ((3, 3), (20, 3), (3, 20), (20, 20))] == [False, False, False, True]


def test_square_pictures_are_not_padded(tmp_path, golden):
    """As CLIP's own processor takes them: nothing is padded, the middle is cut out."""
    folder = shutil.copytree(golden / "A" / "base", tmp_path / "base")
    for path in folder.rglob("*"):
        path.chmod(0o755)
    picture = Image.linear_gradient("L").convert("RGB").resize((300, 200))
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    plain = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    for aspect, padded in (("square", False), (None, False), ("pad", True)):
        edit(folder / "config.json", image_aspect_ratio=aspect, mm_vision_tower=str(golden / "A" / "vision"))
        pixels = twigvlm.load(folder).pixels([picture])
        same = torch.equal(pixels, plain([picture], return_tensors="pt")["pixel_values"])
        assert same is not padded, aspect


def test_im_start_and_im_end(tmp_path, golden):
    """Around every picture, as LLaVA writes it."""
    folder = shutil.copytree(golden / "A" / "base", tmp_path / "base")
    for path in folder.rglob("*"):
        path.chmod(0o755)
    edit(folder / "config.json", mm_use_im_start_end=True, mm_vision_tower=str(golden / "A" / "vision"))
    refused(["<im_start>", "added_tokens.json"], folder)
    from transformers import LlamaTokenizer

    plain = LlamaTokenizer.from_pretrained(folder, legacy=True)
    before = twigvlm.load(golden / "A" / "base").prepare(Image.new("RGB", (9, 9)), "What?")["input_ids"][0].tolist()
    plain.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    start, end = plain.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    plain.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        state[key] = torch.cat([state[key], torch.zeros(2, 64)])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", vocab_size=514)
    vlm = twigvlm.load(folder)
    ids = vlm.prepare(Image.new("RGB", (9, 9)), "What?")["input_ids"][0].tolist()
    first = before.index(512)
    image = [vlm.image_token_id] * 576
    assert ids == [*before[:first], start, *image, end, *before[first + 576 :]]
    picture = Image.new("RGB", (9, 9))
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    assert vlm.processor.apply_chat_template(chat, **how)["input_ids"][0].tolist() == ids, "what is offered is the same"
    text = vlm.processor.apply_chat_template(chat, add_generation_prompt=True)
    assert vlm.processor(text=text, images=[picture])["input_ids"][0] == ids


def test_a_head_that_is_the_embeddings(tmp_path, original):  # noqa: F811
    model = deepcopy(tiny_model())
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    vlm = twigvlm.load(tmp_path / "tied")
    assert torch.equal(vlm.model.lm_head.weight, tiny_model().model.language_model.embed_tokens.weight)
    answers_alike(vlm)
    change(original / "model.safetensors", **{"lm_head.weight": None})
    refused(["missing key lm_head.weight"], original)
    edit(original / "config.json", tie_word_embeddings=True)
    head = twigvlm.load(original).model.lm_head.weight
    assert torch.equal(head, tiny_model().model.language_model.embed_tokens.weight)


@pytest.mark.parametrize("form", ["nested", "old", "old-nested"])
def test_other_forms_of_bin(base, form):  # noqa: F811
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    whole = {"state_dict": state, "epoch": 3} if "nested" in form else state
    torch.save(whole, base / "pytorch_model.bin", _use_new_zipfile_serialization="old" not in form)
    found = dict(twigvlm.load(base).model.named_parameters())
    assert all(torch.equal(v, found[k]) for k, v in tiny_model().named_parameters())


@pytest.mark.parametrize(
    ("what", "parts"),
    [([torch.ones(2)], ["list"]), ({"a": 3}, ["key a", "int"]), (torch.ones(2), ["Tensor"]), ({}, ["missing"])],
)
def test_bin_files_that_hold_something_else(base, what, parts):  # noqa: F811
    (base / "model.safetensors").unlink()
    torch.save(what, base / "pytorch_model.bin")
    refused([str(base), *parts], base)


def mistral(folder: Path, window: int | None, **shape) -> Path:
    """A Mistral body with the weights of tiny_model, whose names are the same."""
    old = tiny_model(**shape).config.text_config
    keys = (
        *SMALL,
        "num_key_value_heads",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "rms_norm_eps",
    )
    text = MistralConfig(**{k: getattr(old, k) for k in keys}, sliding_window=window)
    facts = tiny_model(**shape).config.to_dict() | {"text_config": text.to_dict()}
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(facts))
    model.load_state_dict(tiny_model(**shape).state_dict())
    return write_base(folder, model)


def test_mistral_and_its_window(tmp_path):
    """Within the window it is a plain decoder; beyond it nothing is written."""
    vlm = twigvlm.load(mistral(tmp_path / "m", window=24))
    answers_alike(vlm)
    out = vlm.generate(**one(vlm, 6, IMAGE, 8), max_new_tokens=50, eos_token_id=[])
    assert len(out.tokens[0]) == 6, "18 of 24 were read"
    with pytest.raises(InputError, match="context of 24"):
        vlm.generate(**one(vlm, 16, IMAGE, 8))
    assert twigvlm.load(mistral(tmp_path / "w", window=None)).trunk.context == 256


def test_mistral_in_the_original_layout(original):  # noqa: F811
    edit(original / "config.json", architectures=["LlavaMistralForCausalLM"], sliding_window=16)
    vlm = twigvlm.load(original)
    assert vlm.model.config.text_config.model_type == "mistral" and vlm.trunk.context == 16
    answers_alike(vlm, (2, IMAGE, 2))


def test_linear_rope_scaling(original):  # noqa: F811
    edit(original / "config.json", rope_scaling={"type": "linear", "factor": 4.0})
    vlm = twigvlm.load(original)
    assert vlm.model.config.text_config.rope_parameters["factor"] == 4.0
    answers_alike(vlm)


# ---------------------------------------------------------------------- what ends an answer


@pytest.mark.parametrize("layout", ["base", "original"])
def test_all_end_tokens_of_the_generation_config(layout, request):
    folder = request.getfixturevalue(layout)
    arguments = {**one(twigvlm.load(folder), 3, IMAGE, 4), "max_new_tokens": 8}
    first = twigvlm.load(folder).generate(**arguments, eos_token_id=[]).tokens[0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, first[3]], "temperature": 0.2}))
    vlm = twigvlm.load(folder)
    assert vlm.model.generation_config.eos_token_id == [2, first[3]]
    assert vlm.generate(**arguments).tokens[0] == first[: first.index(first[3])]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["JSON"]),
        ("[]", ["object"]),
        ('{"eos_token_id": [2, 999]}', ["999", "63"]),
        ('{"eos_token_id": "x"}', ["'x'"]),
    ],
)
def test_bad_generation_configs(base, text, parts):  # noqa: F811
    (base / "generation_config.json").write_text(text)
    refused(["generation_config.json", *parts], base)


# ---------------------------------------------------------------------- twigs of a padded vocabulary


def test_a_twig_of_the_padded_base_on_the_original_one(tmp_path, original, twig):  # noqa: F811
    padded = deepcopy(tiny_model())
    padded.resize_token_embeddings(128)
    base = write_base(tmp_path / "padded", padded, tokenizer=False)  # noqa: F811
    vlm = twigvlm.load(base)
    from twigvlm.config import TwigConfig
    from twigvlm.model.twig import grow

    grown = grow(vlm.trunk, TwigConfig(6, K=2, T=2))
    save_twig(grown, vlm.trunk, tmp_path / "grown", "padded")
    trunk = trunk_of(load_base(original, torch.device("cpu"), torch.float32, "sdpa").model)
    found = load_twig(tmp_path / "grown", trunk, None, None, None)
    assert found.lm_head.weight.shape == (64, 32)
    assert torch.equal(found.lm_head.weight, grown.lm_head.weight[:64])
    change(tmp_path / "grown" / "model.safetensors", **{"lm_head.weight": torch.zeros(129, 32)})
    with pytest.raises(InputError, match=r"lm_head.weight has shape \[129, 32\], expected \[64, 32\]"):
        load_twig(tmp_path / "grown", trunk, None, None, None)


# ---------------------------------------------------------------------- chat templates

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}{{ '<image>' }}{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HF_LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for p in m['content'] if p['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% endfor %}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_ONLY = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it red?"}]}]


def speaking_folder(folder: Path, template: str | None, place: str = "chat_template.jinja", **facts) -> Path:
    from conftest import speaking

    write_base(folder, speaking(twig=False).model)
    if template is not None:
        text = template if place.endswith("jinja") else json.dumps({"chat_template": template})
        edit(folder / place, chat_template=template) if place == "tokenizer_config.json" else (
            folder / place
        ).write_text(text)
    return folder


def words_of(vlm, ids) -> str:
    image, out = vlm.image_token_id, []
    for i in ids:
        out.append("<image>" if i == image else vlm.tokenizer.convert_ids_to_tokens(i))
    return "".join(out).replace("<image>" * vlm.config.V, "<image>")


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_checkpoints_own_template_is_used(tmp_path, place):
    vlm = twigvlm.load(speaking_folder(tmp_path / "chat", CHATML, place))
    offered = vlm.processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert offered == "<|im_start|>user\n<image>is it red?<|im_end|>\n<|im_start|>assistant\n"
    picture = Image.new("RGB", (9, 9))
    text = words_of(vlm, vlm.prepare(picture, "is it red?")["input_ids"][0].tolist())
    assert "USER" not in text and text.index("user") < text.index("<image>") < text.index("red") < text.index(
        "assistant"
    )
    assert isinstance(vlm.answer(picture, "is it red?", [("a", "no")], max_new_tokens=3), str)
    later = vlm.prepare(picture, "and <image>?", [("is it red?", "no")])["input_ids"]
    assert (later == vlm.image_token_id).sum() == vlm.config.V


def test_a_template_that_takes_text_only(tmp_path):
    vlm = twigvlm.load(speaking_folder(tmp_path / "chat", TEXT_ONLY))
    text = words_of(vlm, vlm.prepare(Image.new("RGB", (9, 9)), "is it red?")["input_ids"][0].tolist())
    assert text.index("I") < text.index("<image>") < text.index("red") and "USER" not in text


def test_a_template_that_shows_no_picture(tmp_path):
    blind = "{% for p in messages[-1]['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    vlm = twigvlm.load(speaking_folder(tmp_path / "chat", blind))
    with pytest.raises(InputError, match="chat template cannot write this conversation"):
        vlm.prepare(Image.new("RGB", (9, 9)), "is it red?")


@pytest.mark.parametrize("template", [None, HF_LLAVA])
def test_llava_is_asked_as_it_was_trained(tmp_path, template):
    """Hugging Face's template leaves the system sentence out; it is offered, and questions are asked in vicuna_v1."""
    vlm = twigvlm.load(speaking_folder(tmp_path / "chat", template))
    picture = Image.new("RGB", (9, 9))
    offered = vlm.processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    asked = words_of(vlm, vlm.prepare(picture, "is it red?")["input_ids"][0].tolist())
    assert "USER" in asked and "chat" in asked
    if template:
        assert offered == "USER: <image>\nis it red? ASSISTANT:"
    else:
        assert offered.endswith("questions. USER: <image>\nis it red? ASSISTANT:")
        history = [*CHAT, {"role": "assistant", "content": "no"}, {"role": "user", "content": "why?"}]
        from twigvlm.prompt.template import VICUNA_V1

        text = vlm.processor.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
        assert text == VICUNA_V1.render([("<image>\nis it red?", "no"), ("why?", None)])


def test_the_offered_template_gives_the_ids_that_prepare_gives(golden):
    vlm = twigvlm.load(golden / "A" / "base")
    picture = Image.new("RGB", (40, 30), "red")
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}]
    made = vlm.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    wanted = vlm.prepare(picture, "What is it?")
    assert made["input_ids"].tolist() == wanted["input_ids"].tolist()
    assert torch.equal(made["pixel_values"], wanted["pixel_values"])


def test_mistral_is_not_asked_in_vicunas_template(tmp_path):
    folder = mistral(tmp_path / "m", None, vocabulary=len(tiny_tokenizer()))
    vlm = twigvlm.load(folder)
    with pytest.raises(InputError, match=r"mistral.*chat_template\.jinja"):
        vlm.prepare(None, "is it red?")
    (folder / "chat_template.jinja").write_text(CHATML)
    assert "user" in words_of(twigvlm.load(folder), twigvlm.load(folder).prompts.ids(Talk([("a", None)])))
