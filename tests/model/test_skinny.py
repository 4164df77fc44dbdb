"""oneDNN's product: the layer's own numbers, the same answers, nothing left behind, and only where it pays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import IMAGE, batch, legal_range_of, often, prompts, spec_of, stock, tiny, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from twigvlm.model import skinny
from twigvlm.pruning import METHODS

needs_op = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)

LAYOUTS = [(3, IMAGE, 4), (5,), (2, IMAGE, 1, IMAGE, 3)]


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """oneDNN wherever it can be, however small the layer; tokens of every call that it answered."""
    calls: list[int] = []
    real = torch.ops.mkldnn._linear_pointwise

    def counted(x, weight, bias, *rest):
        calls.append(x.numel() // x.shape[-1])
        return real(x, weight, bias, *rest)

    monkeypatch.setattr(skinny, "pays", lambda: True)
    monkeypatch.setattr(skinny, "LEAST", 1)
    monkeypatch.setattr(skinny, "_found", type(skinny._found)())
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted, raising=False)
    return calls


def linear(inside: int, outside: int, bias: bool = False, dtype=torch.float32) -> nn.Linear:
    generator = torch.Generator().manual_seed(inside * 1000 + outside)
    layer = nn.Linear(inside, outside, bias=bias, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(torch.randn(outside, inside, generator=generator))
    return layer


@needs_op
@settings(max_examples=60)
@given(
    rows=st.lists(st.integers(1, 12), min_size=1, max_size=2),
    inside=st.integers(1, 300),
    outside=st.integers(1, 300),
    bias=st.booleans(),
    turned=st.booleans(),
)
def test_the_product_is_the_layers(rows, inside, outside, bias, turned):
    layer = linear(inside, outside, bias)
    x = torch.randn(*rows, inside, generator=torch.Generator().manual_seed(1))
    if turned:  # the same numbers, in another order in memory
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    exact = nn.functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    with torch.inference_mode():
        found = skinny.product(layer, x)
    assert found.shape == exact.shape and found.is_contiguous()
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5 * inside**0.5)


def answers(draft_length: int, method: str = "", new: int = 16) -> list[list[int]]:
    """What a tiny model writes behind three prompts; pruned by a method to the middle of what it allows, if one is named."""
    vlm, wish = tiny(side=56, noise=0.1), {}
    if method:
        R = sum(legal_range_of(vlm, method)) / 2
        wish = {"retained_tokens": R, "pruning": spec_of(method), "seed": 1}
    given = batch(*prompts(vlm, LAYOUTS, seed=3))
    return vlm.generate(**given, **wish, max_new_tokens=new, eos_token_id=[], draft_length=draft_length).tokens


def same_either_way(used, monkeypatch, *asked) -> list[list[int]]:
    """The answers with oneDNN, which are those without it."""
    quick, count = answers(*asked), len(used)
    assert count > 50, "the layers were not taken"
    monkeypatch.setattr(skinny, "pays", lambda: False)
    assert answers(*asked) == quick
    assert len(used) == count
    return quick


@needs_op
@pytest.mark.parametrize(
    "method", often(sorted(METHODS), "twig", "sparsevlm", "visionzip")
)  # cuts, merges, in the tower
@pytest.mark.parametrize("draft_length", often([0, 4], 4))
def test_pruned_answers_stay(method, draft_length, used, monkeypatch):
    same_either_way(used, monkeypatch, draft_length, method, 8)


@needs_op
@pytest.mark.parametrize("draft_length", [0, 4])
def test_answers_without_pruning_are_the_stock_models(draft_length, used, monkeypatch):
    quick, vlm = same_either_way(used, monkeypatch, draft_length), tiny(side=56, noise=0.1)
    rows = zip(*prompts(vlm, LAYOUTS, seed=3), strict=True)
    assert quick == [stock(vlm, row, p, eos=-1, max_new_tokens=16) for row, p in rows]


@needs_op
def test_nothing_is_left_behind(used):
    vlm = tiny()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in vlm.model.state_dict().items()}
    rows, pictures = prompts(vlm, [(3, IMAGE, 4)])
    vlm.generate(**batch(rows, pictures), max_new_tokens=4)
    assert used
    after = vlm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == place and after[name].equal(old) for name, (place, old) in before.items())
    assert not [name for name, m in vlm.model.named_modules() if "forward" in m.__dict__]
    count = len(used)
    stock(vlm, rows[0], pictures[0])
    pickle.loads(pickle.dumps(vlm.trunk.layers[0]))
    copied = copy.deepcopy(vlm.trunk.layers[0])
    assert len(used) == count, "the stock model's own way is its own"
    assert not [m for m in copied.modules() if "forward" in m.__dict__]


@needs_op
def test_a_failure_in_between_leaves_nothing_either(used):
    layer = linear(8, 8)
    with torch.inference_mode(), pytest.raises(ZeroDivisionError), skinny.quick([layer]):
        assert "forward" in layer.__dict__
        raise ZeroDivisionError
    assert "forward" not in layer.__dict__


@needs_op
def test_one_token_gradients_and_other_numbers_go_the_usual_way(used):
    with torch.inference_mode():
        for layer, x in [
            (linear(8, 8), torch.ones(1, 1, 8)),
            (linear(8, 8), torch.ones(0, 8)),
            (linear(8, 8, dtype=torch.bfloat16), torch.ones(3, 8, dtype=torch.bfloat16)),
            (linear(8, 8, dtype=torch.float64), torch.ones(3, 8, dtype=torch.float64)),
            (nn.Linear(8, 8, device="meta"), torch.ones(3, 8, device="meta")),
        ]:
            with skinny.quick([layer]):
                out = layer(x)
            assert out.shape == (*x.shape[:-1], 8) and out.dtype == x.dtype and out.device == x.device
    learning = linear(8, 8).requires_grad_(True)
    with skinny.quick([learning]):
        learning(torch.ones(3, 8)).sum().backward()
    assert learning.weight.grad is not None
    assert not used


@needs_op
def test_a_foreign_forward_and_subclasses_stay(used):
    class Quantised(nn.Linear):
        def forward(self, x):
            return torch.full_like(x, 7)

    hooked, special = linear(8, 8), Quantised(8, 8)
    hooked.forward = lambda x: torch.full_like(x, 5)
    with torch.inference_mode(), skinny.quick([nn.ModuleList([hooked, special])]):
        assert hooked(torch.ones(3, 8)).unique().tolist() == [5]
        assert special(torch.ones(3, 8)).unique().tolist() == [7]
    assert "forward" in hooked.__dict__ and not used


@needs_op
def test_drafts_alone_go_it_with_a_single_token(used):
    """What the base writes one by one has the bits of the stock model's own way."""
    vlm = tiny(noise=0.1)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4)])
    vlm.generate(**batch(rows, pictures), max_new_tokens=8, eos_token_id=[], draft_length=0, retained_tokens=None)
    assert used and 1 not in used
    out = vlm.generate(**batch(rows, pictures), max_new_tokens=8, eos_token_id=[], draft_length=3, retained_tokens=None)
    steps = sum(len(step.drafted) for step in out.steps[0])
    assert steps < used.count(1) <= steps * (7 * vlm.config.T + 1), "its layers, beside its head"


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [
        ("AVX2", "GenuineIntel", True),
        ("AVX2", "AuthenticAMD", True),
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("DEFAULT", "AuthenticAMD", False),
    ],
)
@pytest.mark.parametrize("told", ["by a file", "by Python"])
def test_the_processor_decides(capability, vendor, told, expected, monkeypatch, tmp_path):
    if told == "by a file":
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(skinny, "CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(skinny.platform, "processor", lambda: f"AMD64 Family 25 Model 17 Stepping 1, {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None, raising=False)
    assert skinny.pays.__wrapped__() is expected


def test_small_layers_are_not_taken(monkeypatch):
    monkeypatch.setattr(skinny, "pays", lambda: True)
    assert not skinny._large(tiny_model())
    with torch.device("meta"):
        assert len(skinny._large(nn.ModuleList([nn.Linear(2048, 2048), nn.Linear(1024, 2048)]))) == 1
