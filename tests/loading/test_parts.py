"""What the names and shapes of weights tell before any memory is taken, and parts of models told for what they are."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, batch, prompts, tiny, tiny_model
from safetensors.torch import load_file, save_file
from test_describe import Hub, speaking_folder
from test_loading import base, edit, original, refused, split, states_equal  # noqa: F401 (fixtures)

import twigvlm
from twigvlm.errors import RunError
from twigvlm.loading import device
from twigvlm.model import trunk

LORA, FINISHED, OTHER = ["LoRA", "merge"], ["projector only", "decoder"], ["another program's format"]
ADAPTER = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}
PROJECTOR = {"model.mm_projector.0.weight": torch.ones(32, 16), "model.mm_projector.0.bias": torch.ones(32)}


@pytest.fixture
def no_memory(monkeypatch):
    """Whoever asks for the model's memory now has planned too late."""

    def asked(*_):
        raise AssertionError("memory was taken")

    monkeypatch.setattr("twigvlm.loading.base.furnish", asked)


def inside(folder: Path, part: str, **facts) -> None:
    found = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", **{part: found[part] | facts})


# ---------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("part", "facts", "parts"),
    [
        ("text_config", {"head_dim": -2}, ["config.json", "head_dim"]),
        ("text_config", {"vocab_size": 2**22}, ["expected [4194304, 32]"]),
        ("text_config", {"vocab_size": 10**18}, ["config.json", "vocab_size"]),
        ("text_config", {"hidden_size": 2**16}, ["expected [64, 65536]"]),
        ("vision_config", {"image_size": 2**12}, ["position_embedding", "expected [85265, 16]"]),
        ("vision_config", {"hidden_size": 2**16}, ["expected [32, 65536]"]),
        ("text_config", {"num_hidden_layers": 2**10}, ["missing layers", "6 of the 1024", "config.json"]),
        ("vision_config", {"num_hidden_layers": 2**10}, ["missing layers", "2 of the 1024", "vision_tower"]),
    ],
    ids=str,
)
def test_sizes_that_no_memory_holds(base, no_memory, part, facts, parts):  # noqa: F811
    inside(base, part, **facts)
    start = time.monotonic()
    refused([str(base), *parts], base)
    assert time.monotonic() - start < 10


def test_fields_that_are_missing_are_not_those_of_a_large_model(base, no_memory):  # noqa: F811
    edit(base / "config.json", text_config={"model_type": "llama"})
    refused([str(base), "6 of the 32"], base)


def test_layers_of_a_tower_of_its_own(original, no_memory):  # noqa: F811
    edit(original.parent / "tower" / "config.json", num_hidden_layers=2**10)
    refused(["tower", "2 of the 1024"], original)
    split(original, "safetensors")
    refused(["tower", "2 of the 1024"], original)


@pytest.mark.parametrize(
    "fault", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_device_that_is_too_small(base, monkeypatch, fault):  # noqa: F811
    def full(*_):
        raise fault

    monkeypatch.setattr("twigvlm.loading.base.materialise", full)
    refused([str(base), "cpu has no room", "--load-4bit"], base, error=RunError)
    assert not device.is_out_of_memory(RuntimeError("something else"))


def test_a_context_that_no_memory_holds_a_table_of(base, monkeypatch):  # noqa: F811
    """It is read, and the same numbers come of it."""
    rows, pictures = prompts(tiny(twig=False), [(3, IMAGE, 4), (5,)])
    expected = tiny(twig=False).generate(**batch(rows, pictures), max_new_tokens=6, eos_token_id=[]).tokens
    inside(base, "text_config", max_position_embeddings=10**12)
    assert twigvlm.load(base).generate(**batch(rows, pictures), max_new_tokens=6, eos_token_id=[]).tokens == expected
    road, positions = twigvlm.load(base).trunk, torch.tensor([[[0, 7, 255], [3, 1, 2]]])
    road.family.context = road.context = 256
    table = road.rotary_at(positions)
    monkeypatch.setattr(trunk, "TABLE", 1)
    assert all(torch.equal(a, b) for a, b in zip(table, road.rotary_at(positions), strict=True))


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("adapter_model.safetensors", LORA),
        ("adapter_model.bin", LORA),
        ("non_lora_trainables.bin", LORA),
        ("mm_projector.bin", FINISHED),
        ("mm_projector.safetensors", FINISHED),
        ("ggml-model-q4_k.gguf", [*OTHER, "llama.cpp"]),
        ("consolidated.00.pth", OTHER),
        ("consolidated.safetensors", OTHER),
    ],
)
def test_files_of_a_part(base, name, parts, described):  # noqa: F811
    (base / "model.safetensors").rename(base / name)
    if not described:
        (base / "config.json").unlink()
    refused([str(base), name, *parts], base)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(("state", "parts"), [(ADAPTER, LORA), (PROJECTOR, FINISHED)], ids=["lora", "projector"])
def test_a_part_under_the_name_of_a_whole(original, kind, state, parts, monkeypatch):  # noqa: F811
    """It is told before the tower is looked for, let alone fetched."""
    monkeypatch.setattr("twigvlm.loading.base._tower_files", lambda *_: pytest.fail("the tower was looked for"))
    (original / "model.safetensors").unlink()
    file = original / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    save_file(state, file) if kind == "safetensors" else torch.save(state, file)
    refused([str(original), min(state), *parts], original)


def test_a_tower_with_quantised_weights(original):  # noqa: F811
    edit(original.parent / "tower" / "config.json", quantization_config={"quant_method": "fp8"})
    refused(["tower/config.json", "quantised", "fp8"], original)


@pytest.mark.parametrize("layout", ["base", "original"])
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("image_newline", ["unexpected key image_newline"]),
        ("model.layers.0.self_attn.q_proj.qweight", ["quantised", "qweight"]),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", LORA),
    ],
)
def test_an_index_is_read_before_weights_are_fetched(layout, name, parts, request, monkeypatch):
    folder = split(request.getfixturevalue(layout), "safetensors")
    twigvlm.load(folder)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {name: next(iter(places.values()))}}))
    hub = Hub(folder, monkeypatch)
    refused([index.name, *parts], "someone/llava")
    assert len(hub.asked) == 1, "nothing more is fetched of what cannot be used"


@pytest.mark.parametrize(
    "shard",
    [5, None, ["a.bin"], "../base/model.safetensors", "/model.bin", "..\\model.bin", "a\0.bin", ".", "", ".bin", "model.pt"],
    ids=repr,
)  # fmt: skip
def test_a_shard_is_a_file_beside_its_index(base, shard):  # noqa: F811
    index = split(base, "safetensors") / "model.safetensors.index.json"
    edit(index, weight_map=json.loads(index.read_text())["weight_map"] | {"lm_head.weight": shard})
    refused([f"{index}: the shard of 'lm_head.weight' is {shard!r}; ", ".safetensors or .bin", "fetch it again"], base)


def test_a_shard_of_a_name_that_no_file_has(base):  # noqa: F811
    index = split(base, "safetensors") / "model.safetensors.index.json"
    name = "a" * 5000 + ".bin"
    edit(index, weight_map=json.loads(index.read_text())["weight_map"] | {"lm_head.weight": name})
    refused(["1 of 3 shards", "aaa…", "fetch"], base)


@pytest.mark.parametrize("text", ["[" * 200000, "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"a": 1}}'], ids=len)
def test_what_is_no_weight_index(base, text):  # noqa: F811
    index = split(base, "safetensors") / "model.safetensors.index.json"
    index.write_text(text)
    refused([str(index), "again"], base)


# ---------------------------------------------------------------------- files that are none


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
                                  "special_tokens_map.json", "chat_template.jinja", "model.safetensors",
                                  "model.safetensors.index.json"])  # fmt: skip
def test_a_pipe_is_not_waited_for(tmp_path, name):
    folder = speaking_folder(tmp_path / "m", None)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused([f"{folder / name}: is a pipe or a device"], folder)


def test_a_byte_order_mark_is_no_part_of_a_description(base):  # noqa: F811
    for file in (base / "config.json", split(base, "safetensors") / "model.safetensors.index.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    twigvlm.load(base)


# ---------------------------------------------------------------------- files by torch


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"module": {"state_dict": state}},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"module": {f"module.{name}": tensor for name, tensor in state.items()}},
    ],
    ids=["module-state_dict", "model", "state_dict-model", "prefix", "both"],
)
def test_what_trainers_wrap_tensors_in(base, wrap):  # noqa: F811
    torch.save(wrap(load_file(base / "model.safetensors")), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    states_equal(twigvlm.load(base).model, tiny_model())


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.eye(4).to_sparse(), "sparse_coo"),
        (torch.ones(2, 2, device="meta"), "without numbers"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_tensors_that_are_no_plain_ones(base, value, what):  # noqa: F811
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(state | {next(iter(state)): value}, base / "pytorch_model.bin")
    refused([str(base / "pytorch_model.bin"), next(iter(state)), what], base)
