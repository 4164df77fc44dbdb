"""From files to a model: every layout, bit for bit, and a clear refusal of everything incomplete or inconsistent."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, batch, one, prompts, tiny, tiny_model, write_base
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

import twigvlm
from twigvlm.config import TwigConfig
from twigvlm.errors import InputError, RunError
from twigvlm.loading import weights
from twigvlm.loading.base import canonical
from twigvlm.loading.twig import load_twig
from twigvlm.model.twig import CONFIG, WEIGHTS, grow, save_twig

SPLIT = "lm_head.weight", "model.layers.3.mlp.up_proj.weight"  # what stands in the second shard


# ---------------------------------------------------------------------- folders to load


def original_name(name: str) -> str:
    """The name in LLaVA's own layout of a tensor of the Hugging Face model."""
    name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
    name = name.replace("model.language_model.", "model.")
    name = name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.")
    return name.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.")


def write_original(folder: Path, tower: str | None, carried: bool) -> Path:
    """LLaVA's own layout; `tower` is mm_vision_tower, `carried` whether the weights hold the tower too."""
    model = tiny_model()
    text = model.config.text_config
    folder.mkdir(parents=True)
    state = {original_name(k): v.contiguous() for k, v in model.state_dict().items()}
    if not carried:
        state = {k: v for k, v in state.items() if "vision_tower" not in k}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    keys = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "hidden_act",
    ]
    facts = {key: getattr(text, key) for key in keys}
    facts |= {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    facts |= {"mm_vision_select_feature": "patch", "mm_vision_tower": tower}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))
    return folder


def write_tower(folder: Path) -> Path:
    """The vision tower as a CLIP model of its own."""
    inside = tiny_model().model.vision_tower
    tower = CLIPVisionModel(inside.config)
    names = {canonical(k).removeprefix("vision_tower."): k for k in tower.state_dict()}
    tower.load_state_dict({names[k.removeprefix("vision_model.")]: v for k, v in inside.state_dict().items()})
    tower.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return write_base(tmp_path / "base", tiny_model(), tokenizer=False)


@pytest.fixture
def original(tmp_path) -> Path:
    write_tower(tmp_path / "tower")
    return write_original(tmp_path / "original", "../tower", carried=False)


@pytest.fixture
def twig(tmp_path) -> Path:
    vlm = tiny(K=2, T=2)
    save_twig(vlm.twig, vlm.trunk, tmp_path / "twig", "tiny")
    return tmp_path / "twig"


def edit(file: Path, **facts) -> None:
    """Change fields of a JSON file; None removes one."""
    found = json.loads(file.read_text()) | facts
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def change(file: Path, **tensors) -> None:
    """Change tensors of a weight file; a callable gets the old one, None removes it."""
    state = load_file(file)
    for name, what in tensors.items():
        value = what(state[name]) if callable(what) else what
        state.pop(name, None)
        if value is not None:
            state[name] = value.contiguous()
    save_file(state, file, metadata={"format": "pt"})


def split(folder: Path, kind: str) -> Path:
    """The weights in two shards with an index, as .safetensors or .bin."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, index = ("model", "model.safetensors") if kind == "safetensors" else ("pytorch_model", "pytorch_model.bin")
    shards = {f"{stem}-0000{i}-of-00002.{kind}": {} for i in (1, 2)}
    names = list(shards)
    place = {k: names[k.endswith(SPLIT) or k in SPLIT] for k in state}
    for key, shard in place.items():
        shards[shard][key] = state[key]
    for shard, part in shards.items():
        save_file(part, folder / shard, metadata={"format": "pt"}) if kind == "safetensors" else torch.save(
            part, folder / shard
        )
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": place}))
    return folder


def states_equal(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name


def refused(parts, base, twig=None, error=InputError, **settings) -> None:
    with pytest.raises(error) as caught:
        twigvlm.load(base, twig, **settings)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


# ---------------------------------------------------------------------- what loads


def test_hugging_face_folder(base):
    """Bit for bit, and the stock class's own loading finds nothing else in the files."""
    vlm = twigvlm.load(base)
    states_equal(vlm.model, tiny_model())
    for name, buffer in tiny_model().named_buffers():
        assert torch.equal(vlm.model.get_buffer(name), buffer), name


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(base, kind):
    states_equal(twigvlm.load(split(base, kind)).model, tiny_model())


@pytest.mark.parametrize("kind", ["single", "safetensors", "bin"])
@pytest.mark.parametrize("where", ["relative", "absolute", "inside", "carried"])
def test_original_folder(tmp_path, kind, where):
    """The tower beside the checkpoint, elsewhere, in a folder inside it, or its weights among the others."""
    folder, name = (
        tmp_path / "original",
        {"relative": "../tower", "inside": "tower"}.get(where, str(tmp_path / "tower")),
    )
    write_original(folder, name, carried=where == "carried")
    write_tower(folder / "tower" if where == "inside" else tmp_path / "tower")
    vlm = twigvlm.load(folder if kind == "single" else split(folder, kind))
    assert vlm.image_token_id == 64, "the image token stands behind the vocabulary"
    table = vlm.model.model.language_model.embed_tokens.weight
    assert table.shape[0] == 65 and not table[64].any()
    reference = tiny(twig=False)
    for layout in ((3, IMAGE, 4), (6,)):
        rows, pictures = prompts(reference, [layout])
        expected = reference.generate(**batch(rows, pictures), max_new_tokens=8).tokens
        rows = [[64 if t == 63 else t for t in row] for row in rows]
        assert vlm.generate(**batch(rows, pictures), max_new_tokens=8).tokens == expected


def test_golden_shards(golden, tmp_path):
    """The authors' layout in the authors' shards gives the same tensors as the one file."""
    shutil.copytree(golden / "A" / "vision", tmp_path / "vision")
    shutil.copytree(golden / "A" / "base", tmp_path / "base")
    for path in tmp_path.rglob("*"):
        path.chmod(0o755)
    whole = twigvlm.load(tmp_path / "base").model
    for kind in ("safetensors", "bin"):
        folder = shutil.copytree(tmp_path / "base", tmp_path / kind)
        states_equal(twigvlm.load(split(folder, kind)).model, whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.bfloat16])
def test_dtype(base, twig, dtype):
    vlm = twigvlm.load(base, twig, dtype=dtype)
    wanted = torch.float32 if dtype == "float32" else torch.bfloat16
    for parameter in (*vlm.model.parameters(), *vlm.twig.parameters()):
        assert parameter.dtype == wanted and not parameter.requires_grad and not parameter.is_meta
    assert vlm.dtype == wanted
    assert (
        len(vlm.generate(**one(vlm, 3, IMAGE, 4), max_new_tokens=4, retained_tokens=2.5, eos_token_id=[]).tokens[0])
        == 4
    )


@pytest.mark.parametrize("layout", ["base", "original"])
def test_one_tensor_in_memory_at_a_time(layout, request, monkeypatch):
    """No second copy of the model: each tensor read is gone before the next is."""
    folder, alive, most = request.getfixturevalue(layout), weakref.WeakSet(), [0]

    class Reader:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_tensor(self, name):
            most[0] = max(most[0], len(alive) + 1)
            tensor = self.file.get_tensor(name)
            alive.add(tensor)
            return tensor

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(weights, "safe_open", Reader)
    twigvlm.load(folder, dtype="bfloat16")
    # The loop's own variable may hold one while the next is read.
    assert 1 <= most[0] <= 2


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_twig_saved_and_loaded(base, tmp_path, dtype):
    vlm = twigvlm.load(base)
    for init in ("base", "last", "random"):
        grown = grow(vlm.trunk, TwigConfig(6, K=1, T=3, F=5), init)
        save_twig(grown, vlm.trunk, tmp_path / init, "tiny", dtype)
        found = load_twig(tmp_path / init, vlm.trunk, None, None, None)
        assert found.config == grown.config
        modes = {(tmp_path / init / name).stat().st_mode for name in (WEIGHTS, CONFIG)}
        assert len(modes) == 1, "who may read the one may read the other"
        states_equal(found, grown.to(dtype).float() if dtype else grown)
        release = load_twig(tmp_path / init / WEIGHTS, vlm.trunk, None, None, None)
        assert release.config == grown.config, "the file's own folder describes it"


def test_the_release_format(base, twig, tmp_path):
    """One file that stores neither K nor F: 2 and round(0.75 L) unless given."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(twig / WEIGHTS, bare / WEIGHTS)
    assert set(load_file(bare / WEIGHTS)) >= {
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.weight",
    }
    for source in (bare, bare / WEIGHTS):
        vlm = twigvlm.load(base, source)
        assert (vlm.config.K, vlm.config.T, vlm.config.F) == (2, 2, 4)
        states_equal(vlm.twig, tiny(K=2, T=2).twig)
        given = twigvlm.load(base, source, K=3, T=2, wipe_layer=5).config
        assert (given.K, given.T, given.F) == (3, 2, 5)
    refused(["T = 3", "T = 2", WEIGHTS], base, bare, T=3)


def test_the_wipe_layer_may_be_changed(base, twig):
    assert twigvlm.load(base, twig).config.F == 4
    assert twigvlm.load(base, twig, wipe_layer=6).config.F == 6


# ---------------------------------------------------------------------- what is refused

UP = "model.layers.1.mlp.up_proj.weight"
TWIGS = {
    "missing-tensor": (lambda d: change(d / WEIGHTS, **{UP: None}), [WEIGHTS, "missing key", UP, "[64, 32]"]),
    "unexpected-tensor": (
        lambda d: change(d / WEIGHTS, **{"model.extra.weight": torch.ones(2)}),
        [WEIGHTS, "unexpected key", "model.extra.weight"],
    ),
    "mis-shaped-tensor": (
        lambda d: change(d / WEIGHTS, **{UP: lambda t: t[:, 1:]}),
        [WEIGHTS, UP, "[64, 31]", "[64, 32]"],
    ),
    "transposed": (lambda d: change(d / WEIGHTS, **{UP: lambda t: t.T}), [WEIGHTS, UP, "[32, 64]", "[64, 32]"]),
    "missing-norm": (
        lambda d: change(d / WEIGHTS, **{"model.norm.weight": None}),
        [WEIGHTS, "model.norm.weight", "[32]"],
    ),
    "missing-head": (
        lambda d: change(d / WEIGHTS, **{"lm_head.weight": None}),
        [WEIGHTS, "lm_head.weight", "[64, 32]"],
    ),
    "another-head": (
        lambda d: change(d / WEIGHTS, **{"lm_head.weight": lambda t: t[:, :16]}),
        [WEIGHTS, "lm_head.weight", "[64, 16]", "[64, 32]"],
    ),
    "gap-in-layers": (lambda d: _rename_layer(d / WEIGHTS, 1, 5), [WEIGHTS, "layers [0, 5]", "0 to 5"]),
    "no-layers": (lambda d: save_file({"a": torch.ones(1)}, d / WEIGHTS), [WEIGHTS, "model.layers.0"]),
    "truncated": (lambda d: _truncate(d / WEIGHTS), [WEIGHTS, "damaged"]),
    "empty": (lambda d: (d / WEIGHTS).write_bytes(b""), [WEIGHTS, "damaged"]),
    "no-file": (lambda d: (d / WEIGHTS).unlink(), [WEIGHTS, "no such file"]),
    "bad-json": (lambda d: (d / CONFIG).write_text("{"), [CONFIG, "JSON"]),
    "list-json": (lambda d: (d / CONFIG).write_text("[]"), [CONFIG, "object", "list"]),
    "wrong-version": (lambda d: edit(d / CONFIG, format_version=99), [CONFIG, "version", "99", "1"]),
    "no-version": (lambda d: edit(d / CONFIG, format_version=None), [CONFIG, "version", "None"]),
    "no-K": (lambda d: edit(d / CONFIG, K=None), [CONFIG, "K is None"]),
    "another-T": (lambda d: edit(d / CONFIG, T=3), [CONFIG, "T is 3", "2 layers"]),
    "another-L": (lambda d: edit(d / CONFIG, L=32), [CONFIG, "'tiny'", "L = 32", "L = 6"]),
    "another-width": (
        lambda d: edit(d / CONFIG, hidden_size=64),
        [CONFIG, "'tiny'", "hidden_size = 64", "hidden_size = 32"],
    ),
    "other-weights": (lambda d: edit(d / CONFIG, base_signature=[0.1] * 16), [CONFIG, "'tiny'", "other weights"]),
    **{
        f"{key}-{value!r:.20}": (
            lambda d, key=key, value=value: edit(d / CONFIG, **{key: value}),
            [CONFIG, f"{key} is ", "needed"],
        )
        for key, value in (
            ("base_signature", "x"),
            ("base_signature", ["x"]),
            ("base_signature", [10**400] * 16),
            ("base_signature", [[0.1]] * 16),
            ("K", True),
            ("K", -1),
            ("K", 2.0),
            ("T", 2.0),
            ("L", 6.0),
            ("F", False),
            ("format_version", True),
            ("hidden_size", 32.0),
            ("tower_pruning", {"a": 1}),
            ("base", 3),
            ("base_revision", ["x"]),
            ("pruning_head", ["released"]),
        )
    },
    "large-weights": (lambda d: edit(d / CONFIG, base_signature=[10**30] * 16), [CONFIG, "other weights"]),
    "too-deep": (lambda d: edit(d / CONFIG, K=5), ["K + T is 5 + 2", "L = 6"]),
}


def _rename_layer(file: Path, old: int, new: int) -> None:
    state = {re.sub(rf"^model\.layers\.{old}\.", f"model.layers.{new}.", k): v for k, v in load_file(file).items()}
    save_file(state, file)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize("name", TWIGS)
def test_bad_twigs(name, base, twig):
    spoil, parts = TWIGS[name]
    twigvlm.load(base, twig)
    spoil(twig)
    refused([str(twig), *parts] if name != "too-deep" else parts, base, twig)


def test_a_signature_of_null_is_none(base, twig):
    (twig / CONFIG).write_text(json.dumps(json.loads((twig / CONFIG).read_text()) | {"base_signature": None}))
    assert twigvlm.load(base, twig).twig is not None


@pytest.mark.parametrize("letters", [{"K": True}, {"T": 2.0}, {"L": 6.0}, {"F": "5"}], ids=str)
def test_letters_are_whole_numbers(letters):
    with pytest.raises(InputError, match=rf"{min(letters)} is .*; a whole number of layers is needed"):
        TwigConfig(**({"L": 6, "K": 2, "T": 2} | letters))


def test_flags_that_disagree_with_the_twig(base, twig):
    refused([WEIGHTS, "K = 3", "K = 2"], base, twig, K=3)
    refused([WEIGHTS, "T = 1", "T = 2"], base, twig, T=1)
    refused(["F is 2", "K = 2"], base, twig, wipe_layer=2)
    refused(["K = 0", "K = 2"], base, twig, K=0)
    for flag, value in (("K", -1), ("T", 0), ("wipe_layer", 0)):
        refused([f"{flag} is {value}"], base, twig, **{flag: value})
        refused([f"{flag} is {value}"], base, **{flag: value})


def test_a_twig_of_another_base(twig, tmp_path):
    """Another shape, and the same shape with other weights."""
    wide = write_base(tmp_path / "wide", tiny_model(hidden=64), tokenizer=False)
    refused([CONFIG, "hidden_size = 32", "hidden_size = 64"], wide, twig)
    other = write_base(tmp_path / "other", tiny_model(seed=1), tokenizer=False)
    refused([CONFIG, "other weights"], other, twig)


@pytest.mark.parametrize("kind", ["bfloat16", "original"])
def test_a_twig_knows_its_base_under_another_dtype_and_layout(twig, base, original, kind):
    vlm = twigvlm.load(original, twig) if kind == "original" else twigvlm.load(base, twig, dtype="bfloat16")
    assert vlm.config.T == 2


BASES = {
    "missing-tensor": (
        lambda d: change(d / "model.safetensors", **_drop(d, "layers.3.mlp.up_proj.weight")),
        ["missing key", "layers.3.mlp.up_proj.weight", "[64, 32]"],
    ),
    "unexpected-tensor": (
        lambda d: change(d / "model.safetensors", extra=torch.ones(2)),
        ["model.safetensors", "unexpected key", "extra"],
    ),
    "mis-shaped-tensor": (
        lambda d: change(d / "model.safetensors", **_cut(d, "layers.3.mlp.up_proj.weight")),
        ["model.safetensors", "layers.3.mlp.up_proj.weight", "[64, 31]", "[64, 32]"],
    ),
    "truncated": (lambda d: _truncate(d / "model.safetensors"), ["model.safetensors", "damaged"]),
    "no-weights": (
        lambda d: (d / "model.safetensors").unlink(),
        ["no weights", "model.safetensors", "pytorch_model.bin"],
    ),
    "missing-shard": (
        lambda d: next(iter(split(d, "safetensors").glob("*2-of*"))).unlink(),
        ["1 of 2 shards", "model-00002-of-00002.safetensors"],
    ),
    "missing-bin-shard": (
        lambda d: next(iter(split(d, "bin").glob("*1-of*"))).unlink(),
        ["1 of 2 shards", "pytorch_model-00001-of-00002.bin"],
    ),
    "damaged-bin-shard": (
        lambda d: _truncate(next(iter(split(d, "bin").glob("*1-of*")))),
        ["pytorch_model-00001-of-00002.bin", "damaged"],
    ),
    "bad-index": (
        lambda d: (split(d, "safetensors") / "model.safetensors.index.json").write_text('{"a": 1}'),
        ["model.safetensors.index.json", "not a weight index"],
    ),
    "doubled-tensor": (
        lambda d: _double(split(d, "safetensors")),
        ["model-00002-of-00002.safetensors", "again", "model-00001-of-00002.safetensors"],
    ),
    "bad-json": (lambda d: (d / "config.json").write_text('{"model_type":'), ["config.json", "JSON"]),
    "no-config": (lambda d: (d / "config.json").unlink(), ["config.json", "no such file"]),
    "wrong-type": (
        lambda d: (d / "config.json").write_text('{"model_type": "bert"}'),
        ["config.json", "'bert'", "LLaVA"],
    ),
    "next": (lambda d: edit(d / "config.json", model_type="llava_next"), ["config.json", "'llava_next'", "LLaVA-1.5"]),
}


def _full_name(folder: Path, ending: str) -> str:
    return next(k for k in load_file(folder / "model.safetensors") if k.endswith(ending) and "vision" not in k)


def _drop(folder: Path, ending: str) -> dict:
    return {_full_name(folder, ending): None}


def _cut(folder: Path, ending: str) -> dict:
    return {_full_name(folder, ending): lambda t: t[:, 1:]}


def _double(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*.safetensors"))
    name, value = next(iter(load_file(first).items()))
    change(second, **{name: value})


# An original folder is known by its mm_ fields, whatever its model type is.
@pytest.mark.parametrize(
    ("name", "layout"), [(n, k) for n in BASES for k in ("base", "original") if (n, k) != ("next", "original")]
)
def test_bad_bases(name, layout, request):
    folder = request.getfixturevalue(layout)
    spoil, parts = BASES[name]
    spoil(folder)
    refused([str(folder), *parts], folder)


@pytest.mark.parametrize(
    ("facts", "parts"),
    [
        ({"mm_vision_tower": "../nothing"}, ["config.json", "../nothing", "no model folder"]),
        ({"mm_vision_tower": "/no/such/tower"}, ["config.json", "/no/such/tower", "no model folder"]),
        ({"mm_vision_tower": None}, ["config.json", "mm_vision_tower"]),
        ({"mm_projector_type": "linear"}, ["config.json", "'linear'", "mlp2x_gelu"]),
    ],
)
def test_bad_original_configurations(original, facts, parts):
    edit(original / "config.json", **facts)
    refused([str(original), *parts], original)


def test_a_damaged_tower(original):
    file = original.parent / "tower" / "model.safetensors"
    _truncate(file)
    refused([str(original.parent), "tower", "damaged"], original)
    file.unlink()
    refused(["tower", "no weights"], original)


def test_a_tower_on_the_hub_that_cannot_be_reached(original):
    edit(original / "config.json", mm_vision_tower="someone/no-such-tower")
    refused(["vision tower someone/no-such-tower", "hub"], original, error=RunError)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "nothing", "a/b/c"])
def test_no_such_base(name):
    refused([f"base model {name}", "no such folder"], name)


def test_the_hub_cannot_be_reached():
    refused(["base model someone/no-such-model", "no such folder here", "hub"], "someone/no-such-model", error=RunError)


def test_a_file_is_no_base(base):
    refused([str(base / "config.json"), "is a file"], base / "config.json")


def test_a_twig_in_another_file_format(base, twig):
    torch.save(load_file(twig / WEIGHTS), twig / "twig.bin")
    refused(["twig.bin", ".safetensors"], base, twig / "twig.bin")
    refused([f"twig {twig}-no", "no such folder"], base, f"{twig}-no")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"dtype": "float16", "device": "cpu"}, ["float16", "cpu", "bfloat16"]),
        ({"dtype": "int8"}, ["'int8'", "float32", "float16", "bfloat16"]),
        ({"device": "toaster"}, ["'toaster'", "cpu", "cuda"]),
        ({"device": "cuda:99"}, ["cuda:99"]),
        ({"attn_implementation": "flash"}, ["'flash'", "sdpa", "eager", "flash_attention_2"]),
        ({"attn_implementation": "flash_attention_2"}, ["flash-attn", "not installed", "pip install", "sdpa"]),
    ],
)
def test_bad_settings(base, settings, parts, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no flash-attn, wherever this runs
    refused(parts, base, **settings)


def test_cuda_where_there_is_none(base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(["cuda", "not available"], base, device="cuda")


def test_a_folder_without_a_tokenizer(base):
    vlm = twigvlm.load(base)
    with pytest.raises(InputError) as caught:
        vlm.answer(None, "What?")
    assert str(base) in str(caught.value) and "tokenizer" in str(caught.value)
