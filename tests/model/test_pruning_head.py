"""The pruning head: equal to the authors' function, right for any head layout, a part of the twig on disk and on the road."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import IMAGE, batch, one, prompts, tiny, tiny_model, write_base
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import twigvlm
from twigvlm.config import TwigConfig
from twigvlm.decoding.prefill import embed, read
from twigvlm.errors import InputError
from twigvlm.model.pruning_head import NAME, PruningHead
from twigvlm.model.stream import front
from twigvlm.model.tap import Tap, share
from twigvlm.model.twig import CONFIG, WEIGHTS, describe, grow, save_twig, signature
from twigvlm.pruning import Plan, plan_for
from twigvlm.pruning.rule import highest

MODELS = {"plain": {}, "grouped": {"heads": 4, "kv_heads": 2}, "one key head": {"heads": 4, "kv_heads": 1}}


@pytest.fixture(params=["a", "b"])
def case(golden, request):
    with np.load(golden / "plus/pruning_head.npz") as arrays:
        found = {k[2:]: torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(f"{request.param}/")}
    if not found:
        pytest.skip("not in the carried set")
    head = PruningHead(len(found["x_q"]), *(len(found[name]) for name in ("q_gate", "k_gate")))
    for name in ("q_gate", "k_gate"):
        getattr(head, name).weight.data = found[name]
    return head, found


def ask(head: PruningHead, x_q, q, x_v, k) -> torch.Tensor:
    """s [V] of one query over all visual tokens."""
    seen = torch.ones(1, 1, len(x_v), dtype=torch.bool)
    return head(x_q[None, None], q[None, :, None], x_v[None], k[None], seen)[0, 0]


def test_score_kept_sets_and_gradients_are_the_authors(case):
    head, found = case
    s = ask(head, found["x_q"], found["q"], found["x_v"], found["k"])
    torch.testing.assert_close(s, found["s"], rtol=0, atol=1e-6)
    for kept in (found["kept_few"], found["kept_many"]):
        chosen = highest(s[None], torch.ones(1, len(s), dtype=torch.bool), torch.tensor([len(kept)]))[0]
        assert chosen.nonzero()[:, 0].tolist() == kept.tolist()
    teacher, small = found["teacher"], 1e-9
    loss = ((teacher + small) * ((teacher + small).log() - (s + small).log())).sum()
    torch.testing.assert_close(loss, found["attn_kl"], rtol=0, atol=1e-5)
    loss.backward()
    for name in ("q_gate", "k_gate"):
        wanted = found[f"grad_{name}"]
        assert (getattr(head, name).weight.grad - wanted).norm() < 2e-5 * wanted.norm()


def test_the_score_sums_to_one_and_goes_along_with_the_order(case):
    head, found = case
    x, k = found["x_v"], found["k"]
    s = ask(head, found["x_q"], found["q"], x, k)
    assert s.sum().item() == pytest.approx(1, abs=1e-5) and s.dtype == torch.float32
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ask(head, found["x_q"], found["q"], x[order], k[:, order]), s[order], rtol=0, atol=1e-6)


def test_grouped_heads_are_a_repetition():
    """A gate for every key head, whose keys are then repeated, as the layer itself does."""
    torch.manual_seed(0)
    grouped, wide = PruningHead(16, 32, 16), PruningHead(16, 32, 32)
    wide.q_gate.weight.data = grouped.q_gate.weight.data
    wide.k_gate.weight.data = grouped.k_gate.weight.data.view(2, 8, 16).repeat_interleave(2, 0).reshape(32, 16)
    x_q, q, x_v, k = torch.randn(1, 3, 16), torch.randn(1, 4, 3, 8), torch.randn(1, 9, 16), torch.randn(1, 2, 9, 8)
    seen = torch.ones(1, 3, 9, dtype=torch.bool)
    torch.testing.assert_close(
        grouped(x_q, q, x_v, k, seen), wide(x_q, q, x_v, k.repeat_interleave(2, 1), seen), rtol=0, atol=1e-7
    )


def test_a_row_that_sees_nothing_is_zero_and_has_a_gradient():
    head = PruningHead(8, 8, 8)
    seen = torch.zeros(2, 1, 5, dtype=torch.bool)
    seen[0] = True
    s = head(torch.randn(2, 1, 8), torch.randn(2, 2, 1, 4), torch.randn(2, 5, 8), torch.randn(2, 2, 5, 4), seen)
    assert s[1].abs().max() == 0 and s[0].sum().item() == pytest.approx(1, abs=1e-6)
    (s * torch.arange(5.0)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    nothing = head(
        torch.randn(2, 1, 8), torch.randn(2, 2, 1, 4), torch.randn(2, 0, 8), torch.randn(2, 2, 0, 4), seen[..., :0]
    )
    head.zero_grad()
    nothing.sum().backward()
    assert nothing.shape == (2, 1, 0) and all(p.grad is not None and not p.grad.any() for p in head.parameters())


# ---------------------------------------------------------------------- on the road


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("rows", ["last", "text"])
def test_an_identity_head_is_the_twigs_attention_among_the_visual_tokens(model, rows):
    """Gates of one: the softmax over the image alone is the causal row, renormalised head by head."""
    vlm = tiny(pruning_head="identity", noise=0.0, **model)
    ids, pictures = prompts(vlm, [[4, IMAGE, 6], [3, IMAGE, 2, IMAGE, 4], [5]])
    plan = plan_for("twig:score=head", vlm.config.V * 0.6, vlm.config.V, vlm.twig.config, rows)
    with torch.inference_mode():
        made = embed(vlm.trunk, plan, ids, torch.cat(pictures))
        state = read(vlm.trunk, vlm.twig, plan, made)
        (scores,) = state._scores.values()
        lower = vlm.trunk.run(vlm.trunk.layers[:2], made.stream)
        asked = state._rows(lower, plan.stages[0][1].probe)
        tap = Tap(vlm.twig.layers[-1].self_attn, asked)
        vlm.trunk.run(vlm.twig.layers, lower, taps=[tap])
        image = made.stream.visual >= 0
        whole = tap.weights() * image[:, None, None]
        wanted = (whole / whole.sum(-1, keepdim=True).clamp(min=1e-30)).mean(1).masked_fill((asked < 0)[..., None], 0)
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-7)
    assert scores[0, 0].sum().item() == pytest.approx(1, abs=1e-5)


def test_company_and_padding_change_nothing():
    vlm = tiny(pruning_head="released")
    ids, pictures = prompts(vlm, [[4, IMAGE, 6], [3, IMAGE, 2, IMAGE, 4], [9], [1, IMAGE, 14]])
    asked = {"retained_tokens": 2.5, "max_new_tokens": 6}
    together = vlm.generate(**batch(ids, pictures, left=True), **asked)
    for b, (row, pixels) in enumerate(zip(ids, pictures, strict=True)):
        alone = vlm.generate(**batch([row], [pixels]), **asked)
        assert together.tokens[b] == alone.tokens[0] and together.kept[b].tolist() == alone.kept[0].tolist()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_pruning_takes_the_head_where_there_is_one(model):
    vlm, plain = tiny(pruning_head="released", side=112, **model), tiny(side=112, **model)
    asked, settings = one(vlm, 5, IMAGE, 9), {"retained_tokens": 26, "max_new_tokens": 4}
    kept = {
        spec: vlm.generate(**asked, **settings, pruning=spec).kept[0].tolist()
        for spec in (
            "twig",
            "twig:score=head",
            "twig:score=attention",
            "twig-discount",
            "twig-discount:score=attention",
        )
    }
    assert kept["twig"] == kept["twig:score=head"] != kept["twig:score=attention"]
    assert kept["twig-discount"] != kept["twig-discount:score=attention"]
    for spec in ("twig", "twig:score=attention"):
        assert plain.generate(**asked, **settings, pruning=spec).kept[0].tolist() == kept["twig:score=attention"]
    with pytest.raises(InputError, match=r"asks a pruning head.*none.*STAGE=1"):
        plain.generate(**asked, **settings, pruning="twig:score=head")


def test_drafts_change_no_answer():
    vlm = tiny(pruning_head="released", fade=0.3)
    ids, pictures = prompts(vlm, [[4, IMAGE, 6], [7], [3, IMAGE, 2, IMAGE, 4]])
    answers = [
        vlm.generate(**batch(ids, pictures), retained_tokens=2.5, max_new_tokens=10, draft_length=n).tokens
        for n in (0, 4)
    ]
    assert answers[0] == answers[1]


def test_scores_are_what_the_head_makes_of_the_layers_own_numbers():
    """Read on the road against the same read by hand, with a head of grouped keys."""
    vlm = tiny(pruning_head="released", heads=4, kv_heads=2)
    ids, pictures = prompts(vlm, [[4, IMAGE, 6]])
    plan = plan_for("twig", 2.5, vlm.config.V, vlm.twig.config)
    with torch.inference_mode():
        made = embed(vlm.trunk, plan, ids, pictures[0])
        (scores,) = read(vlm.trunk, vlm.twig, plan, made)._scores.values()
        hidden = vlm.trunk.run(vlm.trunk.layers[:2], made.stream)
        hidden = vlm.trunk.run(vlm.twig.layers[:-1], hidden)
        layer, head = vlm.twig.layers[-1], vlm.twig.pruning_head
        x = layer.input_layernorm(hidden.hidden)
        image = range(4, 4 + vlm.config.V)
        cos, sin = vlm.trunk.rotary_at(hidden.positions)

        def rotated(linear, heads):
            y = linear(x).view(1, -1, heads, 8).transpose(1, 2)
            half = torch.cat((-y[..., 4:], y[..., :4]), -1)
            return y * cos[:, None] + half * sin[:, None]

        q, k = rotated(layer.self_attn.q_proj, 4), rotated(layer.self_attn.k_proj, 2)
        z_q, z_k = head.q_gate(x[0, -1]), head.k_gate(x[0, image])
        g_q, g_k = (z.clamp(min=0) * torch.sigmoid(z) for z in (z_q, z_k))
        logits = torch.stack([
            (g_k.view(-1, 2, 8)[:, h // 2] * k[0, h // 2, image]) @ (g_q.view(4, 8)[h] * q[0, h, -1]) / 8**0.5
            for h in range(4)
        ])  # fmt: skip
    torch.testing.assert_close(scores[0, 0, image], logits.softmax(-1).mean(0), rtol=1e-5, atol=1e-7)


def test_the_share_is_that_of_a_tap():
    q, k, seen = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8), torch.rand(2, 3, 7) > 0.3
    found = share(q, k, seen, 0.2)
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.2).masked_fill(~seen[:, None], -torch.inf)
    torch.testing.assert_close(found, scores.softmax(-1).nan_to_num().mean(1), rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------- on disk


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", tiny_model(), tokenizer=False)


def saved(base, folder, start: str, **letters):
    vlm = twigvlm.load(base, device="cpu", dtype="float32")
    twig = grow(vlm.trunk, TwigConfig(6, **{"K": 2, "T": 2, **letters}, pruning_head=start))
    for linear in (twig.pruning_head.q_gate, twig.pruning_head.k_gate):
        linear.weight.data.normal_()
    save_twig(twig, vlm.trunk, folder, "tiny")
    return twig


@pytest.mark.parametrize("start", ["released", "identity"])
@pytest.mark.parametrize("shape", ["folder", "bare file", "two shards"])
def test_saved_and_loaded(base, tmp_path, start, shape):
    """The kind of gate is kept even where the description is lost."""
    twig, folder = saved(base, tmp_path / "twig", start), tmp_path / "twig"
    assert {f"{NAME}.q_gate.weight", f"{NAME}.k_gate.weight"} <= set(load_file(folder / WEIGHTS))
    assert json.loads((folder / CONFIG).read_text())["pruning_head"] == start
    source = folder
    if shape == "bare file":
        source = (folder / WEIGHTS).rename(tmp_path / "alone.safetensors")
    if shape == "two shards":
        tensors = load_file(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, "pt") as opened:
            told = opened.metadata()
        (folder / WEIGHTS).unlink()
        (folder / CONFIG).unlink()
        names = sorted(tensors)
        parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, own in parts.items():
            save_file({name: tensors[name] for name in own}, folder / file, told)
        places = {name: file for file, own in parts.items() for name in own}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    found = twigvlm.load(base, source, device="cpu", dtype="float32").twig
    assert found.config.pruning_head == start and found.pruning_head.start == start
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in twig.state_dict().items())


def test_what_the_release_stores_beside_a_twig_is_named_and_left(base, tmp_path, capsys):
    """Released checkpoints hold frozen copies of the base."""
    saved(base, tmp_path / "twig", "released")
    tensors = load_file(tmp_path / "twig" / WEIGHTS)
    copies = {"model.bkb_layers.0.mlp.up_proj.weight": 3, "model.bkb_norm.weight": 2, "bkb_lm_head.weight": 1}
    save_file(tensors | {k: torch.ones(n) for k, n in copies.items()}, tmp_path / "whole.safetensors")
    found = twigvlm.load(base, tmp_path / "whole.safetensors", device="cpu", dtype="float32").twig
    assert all(torch.equal(tensors[k], v) for k, v in found.state_dict().items())
    said = capsys.readouterr().err
    assert "3 tensors are copies of the base" in said and "bkb" in said and said.count("\n") == 1


def test_faulty_heads_are_refused_in_words(base, tmp_path):
    folder = tmp_path / "twig"
    saved(base, folder, "released")
    tensors, facts = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())

    def refused(match: str, change: dict | None = None, **said) -> None:
        save_file({k: v for k, v in (tensors | (change or {})).items() if v is not None}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(facts | said))
        with pytest.raises(InputError, match=match):
            twigvlm.load(base, folder, device="cpu")

    q, k = (f"{NAME}.{gate}_gate.weight" for gate in "qk")
    refused(rf"missing key {NAME}.k_gate.weight, expected with shape \[32, 32\]", {k: None})
    refused(rf"missing key {NAME}.*twig_config.json says that the twig has a pruning head", {q: None, k: None})
    refused(rf"{NAME}.q_gate.weight has shape \[16, 32\], expected \[32, 32\]", {q: torch.zeros(16, 32)})
    refused(rf"unexpected key {NAME}.v_gate", {f"{NAME}.v_gate.weight": torch.zeros(32, 32)})
    refused("pruning_head is 'tanh'; released or identity is expected", pruning_head="tanh")
    refused("twig grew on other weights", base_signature=[9.0] * 16)
    refused("T is 1, but the weights beside it have 2 layers", T=1)
    # a description that contradicts the file
    (folder / CONFIG).write_text(json.dumps(facts | {"pruning_head": "identity"}))
    save_file(tensors, folder / WEIGHTS, {"pruning_head": "released"})
    with pytest.raises(InputError, match="is 'released', but 'identity' is said"):
        twigvlm.load(base, folder, device="cpu")


def test_a_twig_without_a_head_says_nothing_of_one(base, tmp_path):
    vlm = twigvlm.load(base, device="cpu", dtype="float32")
    twig = grow(vlm.trunk, TwigConfig(6, 2, 2))
    assert "pruning_head" not in describe(twig, "tiny", signature(vlm.trunk)) and twig.pruning_head is None
    assert not [name for name in twig.state_dict() if name.startswith(NAME)]


def test_foresight_knows_of_the_head(base, tmp_path):
    """The same word before any weight of the base is read."""
    from twigvlm.foresight import Wish, check

    saved(base, tmp_path / "twig", "identity")
    wish = Wish(str(base), str(tmp_path / "twig"))
    assert wish.letters()[1].pruning_head == "identity" and wish.sizes().pruning_head
    check(wish, {"retained_tokens": 2.0, "pruning": "twig:score=head"})
    plain = tmp_path / "plain"
    vlm = twigvlm.load(base, device="cpu", dtype="float32")
    save_twig(grow(vlm.trunk, TwigConfig(6, 2, 2)), vlm.trunk, plain, "tiny")
    with pytest.raises(InputError, match="asks a pruning head"):
        check(replace(wish, twig=str(plain)), {"retained_tokens": 2.0, "pruning": "twig:score=head"})


@pytest.mark.parametrize(
    "spec,without",
    [
        ("twig:score=head", "twig:score=attention"),
        ("visionzip:keep=3+twig:score=head", "visionzip:keep=3+twig:score=attention"),
        ("twig-discount: score = head", "twig-discount: score=attention"),
    ],
)
def test_what_to_ask_in_place_of_a_head_is_a_method(spec, without):
    """All of the method but the head, and legal at the same budget."""
    plain = TwigConfig(6, 2, 2)
    with pytest.raises(InputError) as refused:
        plan_for(spec, 1.8, 4, plain)
    assert f"take its attention ({without})" in str(refused.value)
    assert plan_for(without, 1.8, 4, plain)


def test_columns_of_a_text_prompt_are_none():
    vlm = tiny(pruning_head="released")
    out = vlm.generate(**one(vlm, 7), retained_tokens=2, max_new_tokens=3)
    assert out.kept[0].tolist() == [] and out.tokens == vlm.generate(**one(vlm, 7), max_new_tokens=3).tokens
    assert front(torch.zeros(2, 4, dtype=torch.bool), 0).shape == (2, 0) and not Plan().needs_head
