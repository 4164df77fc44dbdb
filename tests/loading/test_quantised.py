"""Weights in 8 and 4 bits: what is rounded and how, never a whole model on the way, and the lossless square over it."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import subprocess
import sys
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, ROOT, batch, one, prompts, stock, tiny, tiny_model, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import twigvlm
from twigvlm import flags
from twigvlm.config import GenerationSettings, ModelSettings
from twigvlm.errors import InputError
from twigvlm.evaluation.asking.setting import Setting
from twigvlm.evaluation.lmms.options import Options
from twigvlm.evaluation.speed import weight_bytes
from twigvlm.families import trunk_of
from twigvlm.foresight import Wish, check
from twigvlm.loading import quantise as rounding
from twigvlm.loading.base import Loaded
from twigvlm.loading.quantise import quantise
from twigvlm.loading.random import random_base
from twigvlm.model.packed import FEW, PackedLinear, held_bytes, sample, unpack
from twigvlm.model.twig import grow, save_twig, signature
from twigvlm.vlm import TwigVLM

HERE = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not HERE, reason='torchao is not installed: pip install "twigvlm[quant]"')
CPU = torch.device("cpu")
BITS = (8, 4)


def packed(out: int, width: int, bits: int, dtype=torch.float32, bias: bool = False, spread: float = 1.0):
    """A packed layer and the plain one that it was."""
    generator = torch.Generator().manual_seed(out * width)
    plain = nn.Linear(width, out, bias=bias, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(torch.randn(out, width, generator=generator) * spread)
    layers = nn.Sequential(copy.deepcopy(plain))
    quantise(layers, bits)
    return layers[0], plain


@cache
def rounded(bits: int, draft: bool = False, **shape) -> TwigVLM:
    """`tiny`, its base in so many bits and, if asked, its twig in 8."""
    vlm = tiny(**shape)
    model, twig = copy.deepcopy(vlm.model), copy.deepcopy(vlm.twig)
    quantise(model.model.language_model.layers, bits)
    if draft:
        quantise(twig.layers, 8)
    return TwigVLM(Loaded(model, Path("nowhere"), "tiny", False), twig)


# ---------------------------------------------------------------------- one layer


@needs_torchao
@settings(max_examples=30)
@given(
    st.integers(1, 70), st.integers(2, 90), st.sampled_from(BITS), st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(), st.sampled_from([1e-4, 1.0, 30.0]),
)  # fmt: skip
def test_a_weight_is_half_a_step_away_and_one_at_the_ends(out, width, bits, dtype, bias, spread):
    layer, plain = packed(out, width, bits, dtype, bias, spread)
    G = layer.scale.shape[1]
    error = (layer.unpacked(torch.float32) - plain.weight.float()).abs().view(out, G, -1)
    steps = layer.scale[..., None]
    found = layer.unpacked(torch.float32).view(out, G, -1).abs()
    within = found < (126.5 if layer.bits == 8 else 6.5) * steps
    slack = 2**-8 * found if dtype is torch.bfloat16 else 0  # torchao divides by a scale of 8 bits there
    assert (error <= torch.where(within, 0.501, 1.01) * steps + slack).all()
    most = plain.weight.float().abs().view(out, G, -1).amax(-1)
    assert (layer.scale <= most / (127 if layer.bits == 8 else 7) * 1.01 + 1e-9).all()
    assert layer.bits == (bits if width % 2 == 0 else 8)
    assert width // G <= rounding.GROUP or layer.bits == 8


@needs_torchao
@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(1, 45), st.sampled_from(BITS), st.integers(1, 20), st.booleans())
def test_the_product_is_that_of_the_unpacked_weight(out, half, bits, tokens, bias):
    layer, _ = packed(out, 2 * half, bits, bias=bias)
    x = torch.randn(2, tokens, 2 * half, generator=torch.Generator().manual_seed(tokens))
    expected = nn.functional.linear(x, layer.unpacked(torch.float32), layer.bias)
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-4)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(gradient, layer.unpacked(torch.float32).sum(0).expand_as(x), rtol=1e-5, atol=1e-4)


@needs_torchao
@pytest.mark.parametrize("bits", BITS)
def test_slabs_make_up_the_weight(bits, monkeypatch):
    layer, _ = packed(50, 24, bits)
    x = torch.randn(5, 24)
    whole = layer(x)
    for numbers in (1, 24 * 7, 24 * 50, 2**30):
        monkeypatch.setattr("twigvlm.model.packed.SLAB", numbers)
        assert torch.allclose(layer(x), whole, rtol=1e-5, atol=1e-5)


@needs_torchao
@pytest.mark.parametrize("bits", BITS)
def test_in_bfloat16_few_and_many_tokens_differ_by_a_rounding_at_most(bits):
    layer, _ = packed(64, 96, bits, torch.bfloat16)
    x = torch.randn(FEW + 5, 96).bfloat16()
    together = layer(x).float()
    exact = x.float() @ layer.unpacked(torch.float32).t()
    alone = torch.cat([layer(row[None]) for row in x]).float()
    for found in (together, alone):
        assert ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-3).all()
    assert torch.equal(layer(x[:1]), layer(x[:FEW])[:1]) or bits == 4


@needs_torchao
@pytest.mark.parametrize("bits", BITS)
def test_layers_move_and_are_copied(bits):
    layer, _ = packed(16, 32, bits)
    x = torch.randn(3, 32)
    whole = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), whole)
    assert torch.equal(copy.deepcopy(layer).to("cpu")(x), whole)
    assert torch.allclose(copy.deepcopy(layer).bfloat16()(x.bfloat16()).float(), whole, rtol=0.05, atol=0.1)
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == whole.shape
    assert f"bits={bits}" in repr(layer)


def test_numbers_from_all_over_a_large_weight():
    class Large:  # 2^26 + 1 numbers, of which none is held
        def detach(self):
            return self

        flatten, device = detach, CPU

        def __len__(self):
            return 2**26 + 1

        def __getitem__(self, picks):
            assert picks.max() < len(self) and picks.min() == 0
            return picks

    assert len(sample(Large())) == 16
    weight = torch.arange(32.0).view(4, 8)
    assert sample(weight)[0] == 0 and sample(weight)[-1] == 31


# ---------------------------------------------------------------------- loading


@needs_torchao
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoder_layers_are_rounded_and_nothing_else(bits, dtype, tmp_path):
    folder = write_base(tmp_path / "base", tiny_model())
    vlm = twigvlm.load(folder, device="cpu", dtype=dtype, **{f"load_{bits}bit": True})
    whole = dict(twigvlm.load(folder, device="cpu", dtype=dtype).model.named_parameters())
    assert {type(m) for m in vlm.trunk.layers.modules() if m.__class__.__name__.endswith("Linear")} == {PackedLinear}
    inside = [m for m in vlm.trunk.layers.modules() if isinstance(m, PackedLinear)]
    assert len(inside) == 7 * vlm.config.L and {m.bits for m in inside} == {bits}
    outside = dict(vlm.model.named_parameters())
    assert whole.keys() - outside.keys() == {
        k for k in whole if ".layers." in k and "_proj.weight" in k and "language" in k
    }
    assert all(torch.equal(value, whole[name]) for name, value in outside.items())
    assert not any(t.is_meta for t in (*vlm.model.parameters(), *vlm.model.buffers()))
    for name, layer in ((n, m) for n, m in vlm.model.named_modules() if isinstance(m, PackedLinear)):
        again = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, bias=False))
        again[0].weight = nn.Parameter(tiny_model().get_parameter(f"{name}.weight"), requires_grad=False)
        rounding.prepare(again, bits, CPU, vlm.dtype)
        again[0].weight.receive(tiny_model().get_parameter(f"{name}.weight"))
        assert torch.equal(again[0].codes, layer.codes) and torch.equal(again[0].scale, layer.scale)
    assert vlm.dtype == getattr(torch, dtype)


@needs_torchao
def test_no_two_weights_are_whole_at_once(tmp_path, monkeypatch):
    folder, alive, most = write_base(tmp_path / "base", tiny_model(hidden=64)), [], []
    own = rounding._rounded

    def watched(weight, *more):
        alive.append(weakref.ref(weight))
        most.append(sum(ref() is not None for ref in alive))
        return own(weight, *more)

    monkeypatch.setattr(rounding, "_rounded", watched)
    twigvlm.load(folder, device="cpu", load_8bit=True)
    assert len(alive) == 42 and max(most) == 1
    alive.clear(), most.clear()
    random_base("128x6", CPU, torch.bfloat16, bits=8)
    assert len(alive) == 42 and max(most) == 1


@needs_torchao
def test_layers_that_nobody_wants_are_not_read_either(tmp_path):
    from twigvlm.loading.base import load_base

    folder = write_base(tmp_path / "base", tiny_model())
    loaded = load_base(folder, CPU, torch.float32, "sdpa", lambda L: [0, 3], bits=8)
    layers = loaded.model.model.language_model.layers
    assert len(layers) == 2
    assert layers[1].mlp.up_proj.sample == sample(tiny_model().model.language_model.layers[3].mlp.up_proj.weight)


@needs_torchao
def test_a_quarter_and_an_eighth_of_the_memory():
    plain, eight, four = (
        weight_bytes(trunk_of(random_base("512x4", CPU, torch.float32, bits=b))) for b in (None, 8, 4)
    )
    head = held_bytes(random_base("512x4", CPU, torch.float32).lm_head)
    assert 3.9 < (plain - head) / (eight - head) <= 4.0
    assert 6.8 < (plain - head) / (four - head) < 7.2  # with a scale of 4 bytes for 64 numbers


@needs_torchao
@pytest.mark.parametrize("bits", BITS)
def test_a_twig_knows_its_base_however_that_is_rounded(bits, tmp_path):
    folder, vlm = write_base(tmp_path / "base", tiny_model()), tiny()
    save_twig(vlm.twig, vlm.trunk, tmp_path / "twig", "tiny")
    found = twigvlm.load(
        folder, tmp_path / "twig", device="cpu", load_8bit=bits == 8, load_4bit=bits == 4, draft_8bit=True
    )
    assert signature(found.trunk) == signature(vlm.trunk)
    assert all(isinstance(layer.mlp.up_proj, PackedLinear) for layer in found.twig.layers)
    assert type(found.twig.lm_head) is nn.Linear
    other = write_base(tmp_path / "other", tiny_model(seed=5))
    with pytest.raises(InputError, match="other weights"):
        twigvlm.load(other, tmp_path / "twig", device="cpu", load_8bit=True)
    plain = twigvlm.load(folder, tmp_path / "twig", device="cpu", load_8bit=True)
    save_twig(plain.twig, plain.trunk, tmp_path / "again", "tiny")  # of a whole twig on a rounded base
    assert json.loads((tmp_path / "again" / "twig_config.json").read_text())["base_signature"] == signature(vlm.trunk)


@needs_torchao
def test_a_twig_grown_on_a_rounded_base_is_whole():
    vlm = rounded(8)
    twig = grow(vlm.trunk, vlm.twig.config)
    own = vlm.trunk.layers[vlm.config.K].mlp.up_proj
    assert type(twig.layers[0].mlp.up_proj) is nn.Linear and isinstance(own, PackedLinear)
    assert torch.equal(twig.layers[0].mlp.up_proj.weight, own.unpacked(torch.float32))
    assert not any(isinstance(m, PackedLinear) for m in unpack(copy.deepcopy(vlm.model), torch.float32).modules())


@needs_torchao
def test_what_is_rounded_is_not_saved(tmp_path):
    vlm = rounded(8, draft=True)
    for save in (
        lambda: vlm.model.save_pretrained(tmp_path / "m"),
        lambda: save_twig(vlm.twig, vlm.trunk, tmp_path / "t", "tiny"),
        lambda: torch.save(vlm.model.state_dict(), tmp_path / "s"),
    ):
        with pytest.raises(InputError, match="cannot be saved"):
            save()


# ---------------------------------------------------------------------- the square


@st.composite
def cases(draw) -> tuple[TwigVLM, list, int, dict]:
    """A rounded model, the layouts of a batch, a seed, and how it is pruned and drafted."""
    shape = {"noise": draw(st.sampled_from([0.0, 0.2])), "kv_heads": draw(st.sampled_from([1, 2]))}
    vlm = rounded(draw(st.sampled_from(BITS)), draw(st.booleans()), **shape)
    layout = st.sampled_from([(3, IMAGE, 4), (IMAGE, 5), (2, IMAGE, 3, IMAGE, 2), (6,)])
    layouts = draw(st.lists(layout, min_size=1, max_size=3))
    method = draw(st.sampled_from(["twig", "random", "fastv", "visionzip"]))
    pruned = {"retained_tokens": 2.0, "pruning": method, "seed": 1} if draw(st.booleans()) else {}
    drafts = draw(
        st.sampled_from([{"draft_length": 3}, {"draft_length": 5, "draft_confidence": 0.0}, {"tree": "2,2,3,5"}])
    )
    return vlm, layouts, draw(st.integers(0, 9)), pruned | {"drafts": drafts}


@pytest.mark.slow
@needs_torchao
@settings(max_examples=12)
@given(cases())
def test_the_lossless_square_over_a_rounded_base(case):
    vlm, layouts, seed, options = case
    drafts = options.pop("drafts")
    rows, pictures = prompts(vlm, layouts, seed)
    ask = {"max_new_tokens": 10, "eos_token_id": [], **options}
    plain = vlm.generate(**batch(rows, pictures), **ask, draft_length=0).tokens
    assert vlm.generate(**batch(rows, pictures), **ask, **drafts).tokens == plain
    for b, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        alone = ask | ({"seed": 1 + b} if options else {})
        assert vlm.generate(**batch([row], [picture]), **alone, **drafts).tokens[0] == plain[b]
        if not options:
            assert stock(vlm, row, picture, eos=-1, max_new_tokens=10) == plain[b]


@needs_torchao
def test_a_rounded_twig_changes_no_token():
    whole, twig = tiny(), copy.deepcopy(tiny().twig)
    quantise(twig.layers, 8)
    light = TwigVLM(Loaded(whole.model, Path("nowhere"), "tiny", False), twig)
    for seed in range(6):
        given = one(whole, 3, IMAGE, 4, seed=seed)
        expected = whole.generate(**given, max_new_tokens=12, draft_length=0).tokens
        assert light.generate(**given, max_new_tokens=12, draft_confidence=0.0).tokens == expected


@needs_torchao
def test_likelihoods_of_a_rounded_base_are_those_of_its_unpacked_weights():
    vlm = rounded(4)
    model = unpack(copy.deepcopy(vlm.model), torch.float32)
    plain = TwigVLM(Loaded(model, Path("nowhere"), "tiny", False), vlm.twig)
    for options in ({}, {"retained_tokens": 2.0}, {"retained_tokens": 2.0, "pruning": "pdrop"}):
        given = one(vlm, 3, IMAGE, 4)
        found, expected = (
            v.score(given["input_ids"], [[5, 6, 7]], given["pixel_values"], **options) for v in (vlm, plain)
        )
        assert torch.allclose(found[0].log_probabilities, expected[0].log_probabilities, atol=1e-4)


# ---------------------------------------------------------------------- asking for it


def test_both_at_once_are_refused():
    with pytest.raises(InputError, match="load_8bit and load_4bit are both"):
        ModelSettings(load_8bit=True, load_4bit=True)
    with pytest.raises(InputError, match="load_8bit and load_4bit are both"):
        twigvlm.load(load_8bit=True, load_4bit=True)


@pytest.mark.parametrize("name", ["load_8bit", "load_4bit", "draft_8bit"])
def test_without_the_package_one_line_says_what_to_install(name, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "torchao" else found(n, *a))
    for ask in (lambda: twigvlm.load(**{name: True}), lambda: check(Wish(**{name: True}))):
        with pytest.raises(InputError, match=rf'{name} needs .*pip install "twigvlm\[quant\]"'):
            ask()
    check(Wish())


def test_a_torchao_that_cannot_be_imported_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match="torchao cannot be imported beside torch"):
        rounding._torchao()


def test_a_twig_that_is_not_there_cannot_be_rounded(tmp_path):
    with pytest.raises(InputError, match="no twig to round"):
        twigvlm.load(tmp_path, draft_8bit=True)
    with pytest.raises(InputError, match="no twig to round"):
        check(Wish(base=tmp_path, draft_8bit=True))
    with pytest.raises(InputError, match="no twig is asked for"):
        Setting(ModelSettings(draft_8bit=True), baseline=True)


@needs_torchao
def test_answers_of_differently_rounded_models_are_kept_apart():
    settings = [
        Setting(ModelSettings(**{name: True} if name else {}))
        for name in (None, "load_8bit", "load_4bit", "draft_8bit")
    ]
    assert len({s.name for s in settings}) == len({str(s.identity("gqa", "s", [])) for s in settings}) == 4
    assert settings[1].name == f"{settings[0].name}-load-8bit"
    assert settings[1].identity("gqa", "s", [])["load_8bit"] is True and "load_8bit" not in settings[0].identity(
        "gqa", "s", []
    )
    assert flags.of(ModelSettings(load_4bit=True), GenerationSettings())["load_4bit"] is True


def test_flags_and_options_of_other_programs():
    parser = flags.parser("some", None, flags.model(), flags.writing())
    args = flags.parse(parser, ["--load-8bit", "--draft-8bit"])
    assert flags.model_settings(args).bits == 8 and flags.model_settings(args).draft_8bit
    assert flags.resolved(args)["load_8bit"] is True and flags.resolved(args)["load_4bit"] is False
    assert Options.read({"load_4bit": "True"}).loading == {"load_4bit": True}
    with pytest.raises(InputError, match="load_4bit is 'some'"):
        Options.read({"load_4bit": "some"})


@pytest.mark.parametrize("word", ["--load-8bit", "--load_4bit=True", "--draft-8bit"])
def test_trainings_refuse_it(word, capsys):
    from twigvlm.training import launch, train

    for program in (train, launch):
        assert program.main([word, "--dry-run"]) == 2
        assert f"error: {word} is for answering" in capsys.readouterr().err


@needs_torchao
def test_what_the_kernel_on_cuda_is_asked_for(monkeypatch):
    """Its weights can be made on CUDA alone; here it is only seen which are."""
    asked = []
    monkeypatch.setattr(
        rounding, "_quantised", lambda weight, config: asked.append((weight.dtype, config)) or "a weight"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert rounding._kernel_weight(torch.zeros(8, 4096), torch.bfloat16) == "a weight"
    dtype, config = asked[0]
    assert dtype is torch.bfloat16 and config.group_size == 64 and config.int4_packing_format == "tile_packed_to_4d"
    assert rounding._kernel_weight(torch.zeros(8, 160), torch.bfloat16) and asked[1][1].group_size == 32
    assert rounding._kernel_weight(torch.zeros(8, 432), torch.bfloat16) is None  # no group of it: packed as elsewhere
    assert rounding._kernel_weight(torch.zeros(8, 4096), torch.float16) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert rounding._kernel_weight(torch.zeros(8, 4096), torch.bfloat16) is None


# ---------------------------------------------------------------------- the embedded model


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("flag", [pytest.param("--load-8bit", marks=pytest.mark.nightly), "--load-4bit"])
def test_the_demo_answers_and_says_nothing_beside(flag):
    done = subprocess.run(
        [sys.executable, "cli_demo.py", flag, "--draft-8bit", "--no-pruning", "--question", "How many objects are there?"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].rstrip(".").endswith("5")


@needs_torchao
@pytest.mark.slow
def test_the_embedded_base_answers_as_it_does_whole():
    from twigvlm.world.draw import draw
    from twigvlm.world.questions import ask
    from twigvlm.world.scenes import sample_scene

    asked, kinds = [], ["exist", "colour", "count", "where", "shape"]
    for seed in range(len(kinds)):
        scene = sample_scene("test", seed)
        found = (ask(scene, kind, random.Random(seed)) for kind in kinds)
        asked.append((draw(scene), next(q.text for q in found if q is not None)))
        kinds.append(kinds.pop(0))
    whole, *light = (twigvlm.load(device="cpu", **flags) for flags in ({}, {"load_8bit": True}, {"load_4bit": True}))
    answers = [[vlm.answer(*one, max_new_tokens=16) for one in asked] for vlm in (whole, *light)]
    in_8_bits, in_4_bits = (sum(a == b for a, b in zip(answers[0], found, strict=True)) for found in answers[1:])
    assert len(asked) == 5 and in_8_bits == 5 and in_4_bits >= 4
