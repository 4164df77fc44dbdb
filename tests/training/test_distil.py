"""Stage 1: the authors' losses and gradients, a teacher that is the base itself, and gradients only where they belong."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, tiny_tokenizer, write_base

import twigvlm
from training.conftest import twig_of
from training.test_training import CPU, FP32, a_batch, equal
from twigvlm.errors import InputError
from twigvlm.model.pruning_head import PruningHead
from twigvlm.model.tap import Tap, share
from twigvlm.training.data.examples import IGNORE
from twigvlm.training.objectives import Ntp
from twigvlm.training.plus.distil import Distil, teacher_layer
from twigvlm.training.plus.losses import (
    CLIP,
    LOSSES,
    accepted,
    attention_divergence,
    attention_loss,
    divergence,
    hybrid,
    softened,
    unlikely,
)
from twigvlm.training.plus.rows import asked_rows
from twigvlm.training.run import report
from twigvlm.training.run.device import Run
from twigvlm.training.run.ranks import ALONE
from twigvlm.training.settings import Settings
from twigvlm.training.train import subject_of
from twigvlm.training.twig import Start, TwigLesson, prepare_twig

pytest.importorskip("accelerate")


# ---------------------------------------------------------------------- the authors' numbers


@pytest.fixture(params=["clip", "ignored"])
def case(golden, request) -> dict[str, torch.Tensor]:
    with np.load(golden / "plus/stage1.npz") as arrays:
        name = f"{request.param}/"
        return {k.removeprefix(name): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(name)}


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.detach().float(), wanted.float(), rtol=0, atol=tolerance)


def gradient_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).norm() <= 2e-5 * wanted.norm()


def golden_attention(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PruningHead]:
    """Teacher's row and score [B, 1, 9], which samples are asked, and the head."""
    width = case["q_gate"].shape[0]
    head = PruningHead(width, width, width)
    head.q_gate.weight.data, head.k_gate.weight.data = case["q_gate"].clone(), case["k_gate"].clone()
    visual = torch.where(case["tags"] == 1, 0, -1)
    rows = asked_rows(case["labels"], visual)
    images = case["n_visual"] > 0
    assert rows[images, 0].tolist() == case["query"][images].tolist() and (rows[~images] == -1).all()
    columns = case["visual_from"].clamp(min=0)[:, None] + torch.arange(9)
    columns = columns.masked_fill(~images[:, None], -1)
    taps = []
    for q, k, x in (("base_q", "base_k", None), ("twig_q", "twig_k", "twig_x")):
        tap = Tap(torch.nn.Module(), rows, whole=True)
        tap.read(case[q], case[k], None)
        if x:
            tap.read_normed(case[x])
        taps.append(tap)
    teacher = share(taps[0].query, taps[0].at(columns)[1], taps[0].sees(columns), taps[0].scaling)
    return teacher, head.of_tap(taps[1], columns), rows >= 0, head


def test_losses_and_gradients_are_the_authors(case):
    learnt = case["labels"][:, 1:] != IGNORE
    assert learnt.nonzero().tolist() == case["rows"].tolist()
    student = case["student"][:, :-1][learnt].requires_grad_(True)
    base, targets = case["base"][:, :-1][learnt], case["labels"][:, 1:][learnt]
    T = float(case["temperature"])
    near(divergence(student, base, T), case["k"], 5e-5)
    ntp, prediction = F.cross_entropy(student, targets), softened(student, base, T)
    near(ntp, case["ntp"])
    near(prediction, case["pred_kl"])
    teacher, score, asked, head = golden_attention(case)
    score.retain_grad()
    for b in range(len(score)):
        if asked[b, 0]:
            near(score[b, 0], case[f"s_{b}"], 1e-6)
            near(teacher[b, 0], case[f"a_{b}"], 1e-6)
    near(attention_divergence(teacher, score)[:, 0], case["attn_kl_each"])
    attention = attention_loss(teacher, score, asked)
    near(attention, case["attn_kl"])
    total = ntp + float(case["alpha"]) * prediction + float(case["gamma"]) * attention
    near(total, case["total"])
    gradient_near(torch.autograd.grad(ntp, student, retain_graph=True)[0], case["grad_ntp"])
    gradient_near(torch.autograd.grad(prediction, student, retain_graph=True)[0], case["grad_pred_kl"])
    total.backward()
    gradient_near(student.grad, case["grad_total"])
    gradient_near(head.q_gate.weight.grad, case["grad_q_gate"])
    gradient_near(head.k_gate.weight.grad, case["grad_k_gate"])
    for b in range(len(score)):
        if asked[b, 0]:
            gradient_near(score.grad[b, 0], case[f"grad_s_{b}"])


# ---------------------------------------------------------------------- properties of the losses


def test_equal_models_lose_nothing():
    z = torch.randn(5, 11)
    for name in ("kl", "acceptance", "hybrid"):
        assert LOSSES[name](z, z.clone(), 5.0).item() == pytest.approx(0, abs=1e-6)
    a = torch.rand(2, 3, 7).softmax(-1)
    assert attention_loss(a, a.clone(), torch.ones(2, 3, dtype=torch.bool)).item() == pytest.approx(0, abs=1e-7)


def test_the_clip_keeps_the_direction():
    """Of a position far beyond it the loss says 4 and the gradient keeps its direction, at 4/k of its size."""
    base, far = torch.zeros(1, 6), torch.zeros(1, 6, requires_grad=True)
    far = (torch.eye(6)[:1] * 40).requires_grad_(True)
    k = divergence(far, base, 5.0)
    assert k.item() > CLIP
    (plain,) = torch.autograd.grad(k.sum(), far, retain_graph=True)
    loss = softened(far, base, 5.0)
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    (clipped,) = torch.autograd.grad(loss, far)
    torch.testing.assert_close(clipped, plain / k.item(), rtol=1e-5, atol=1e-8)


def test_acceptance_is_what_speculative_sampling_accepts():
    torch.manual_seed(0)
    draft, base = torch.randn(4, 9) * 2, torch.randn(4, 9) * 2
    p, q = base.softmax(-1), draft.softmax(-1)
    wanted = 1 - 0.5 * (p - q).abs().sum(-1)
    near(accepted(draft, base), wanted, 1e-6)
    near(unlikely(draft, base, 5.0), -wanted.log().mean(), 1e-6)
    kl = (p * (p / q).log()).sum(-1)
    weight = torch.exp(-3 * wanted)
    near(hybrid(draft, base, 5.0), (weight * kl + (1 - weight) * (1 - wanted)).mean(), 1e-5)


def test_a_draft_that_is_hardly_ever_accepted_still_learns():
    draft, base = torch.tensor([[120.0, -120.0, 0.0]], requires_grad=True), torch.tensor([[-120.0, 120.0, 0.0]])
    loss = unlikely(draft, base, 1.0)
    assert loss.item() == pytest.approx(120.0)
    loss.backward()
    assert torch.isfinite(draft.grad).all() and draft.grad.abs().max() > 0.1


def test_the_weight_of_the_hybrid_has_no_gradient():
    draft, base = torch.randn(1, 5, requires_grad=True), torch.randn(1, 5)
    (found,) = torch.autograd.grad(hybrid(draft, base, 1.0), draft)
    lam = torch.exp(-3 * accepted(draft, base).detach()).item()
    by_hand = lam * divergence(draft, base, 1.0).sum() + (1 - lam) * (1 - accepted(draft, base)).sum()
    torch.testing.assert_close(found, torch.autograd.grad(by_hand, draft)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_learn_is_no_loss(name):
    empty = torch.zeros(0, 7, requires_grad=True)
    assert LOSSES[name](empty, torch.zeros(0, 7), 5.0).item() == 0


def test_rows_that_are_asked():
    labels = torch.full((4, 12), IGNORE)
    labels[0, 5:7] = labels[0, 9:11] = 3  # two turns behind an image
    labels[1, 2:4] = labels[1, 8:10] = 3  # the first one before it
    labels[2, 3:5] = 3  # no image
    visual = torch.full((4, 12), -1)
    visual[0, 1:3] = visual[1, 5:7] = visual[3, 2:4] = 0
    assert asked_rows(labels, visual).tolist() == [[4], [7], [-1], [-1]]
    assert asked_rows(labels, visual, "all").tolist() == [[4, 8], [7, -1], [-1, -1], [-1, -1]]


def test_the_teachers_layer_scales_with_depth():
    assert teacher_layer(None, 2, 32) == 19 and teacher_layer(None, 2, 16) == 10 and teacher_layer(None, 5, 6) == 5
    for layer in (1, 32):
        with pytest.raises(InputError, match=r"attention_layer is .* 2 to 31"):
            teacher_layer(layer, 2, 32)


# ---------------------------------------------------------------------- on models


@pytest.fixture
def prepared(world):
    torch.manual_seed(3)
    return prepare_twig(world / "base", Start(2, 2, pruning_head="released"), CPU, FP32, whole=True)


def terms(prepared, batch, **settings):
    torch.manual_seed(5)
    loss, figures = TwigLesson(prepared.base, prepared.twig, Distil(**settings))(batch)
    return loss, figures


def test_the_loss_is_the_sum_of_its_parts(world, prepared):
    batch = a_batch(world, prepared.base)
    loss, figures = terms(prepared, batch, prediction=0.3, attention=0.7)
    means = figures["means"]
    near(loss, means["ntp"] + 0.3 * means["prediction"] + 0.7 * means["attention"], 1e-6)
    near(means["ntp"], TwigLesson(prepared.base, prepared.twig, Ntp())(batch)[0], 1e-6)
    assert min(m.item() for m in means.values()) > 0
    for alone in ("prediction", "attention"):
        other = terms(prepared, batch, **{"prediction": 0.0, "attention": 0.0, alone: 1.0})[1]["means"]
        near(other[alone], means[alone], 1e-6)


def test_a_twig_that_is_the_base_has_nothing_to_learn_from_it(tmp_path):
    """All layers above K copied: the divergence from the teacher is 0."""
    base = write_base(tmp_path / "base", tiny_model(vocabulary=len(tiny_tokenizer()), context=1024))
    found = prepare_twig(base, Start(2, 4, pruning_head="identity"), CPU, FP32, whole=True)
    ids = torch.randint(3, 60, (2, 14))
    ids[:, 2:6] = found.base.image_token_id
    labels = torch.where(torch.arange(14) > 9, ids, IGNORE)
    batch = {"input_ids": ids, "labels": labels, "lengths": [14, 14], "pixel_values": torch.randn(2, 3, 28, 28)}
    means = terms(found, batch, layer=5)[1]["means"]
    assert means["prediction"].item() == pytest.approx(0, abs=1e-6)
    assert means["attention"].item() == pytest.approx(0, abs=1e-6)  # gates of one, the same layer


def test_the_teachers_row_is_the_bases_attention(world, prepared):
    """Against Hugging Face's own eager attention, restricted to the image and renormalised."""
    batch = a_batch(world, prepared.base, [1])
    heard = []
    import twigvlm.training.plus.distil as distil

    real = distil.attention_loss
    try:
        distil.attention_loss = lambda teacher, score, asked: heard.append(teacher) or real(teacher, score, asked)
        terms(prepared, batch, layer=4)
    finally:
        distil.attention_loss = real
    vlm = twigvlm.load(world / "base", device="cpu", dtype="float32", attn_implementation="eager")
    with torch.no_grad():
        out = vlm.model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], output_attentions=True)
    image = batch["input_ids"][0] == vlm.image_token_id
    query = int((batch["labels"][0] != IGNORE).nonzero()[0]) - 1
    row = out.attentions[4][0, :, query][:, image]
    near(heard[0][0, 0], (row / row.sum(-1, keepdim=True)).mean(0), 1e-6)


def test_text_behind_the_question_changes_no_attention_term(world, prepared):
    batch = a_batch(world, prepared.base, [1])
    first = terms(prepared, batch)[1]["means"]["attention"]
    batch["input_ids"][0, -3:] = 9
    near(terms(prepared, batch)[1]["means"]["attention"], first, 1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"teacher": "pruned"}, {"loss": "hybrid", "turns": "all"}, {"loss": "acceptance"}]
)
def test_the_base_stays_and_all_of_the_twig_learns(world, prepared, settings):
    before = copy.deepcopy(prepared.base.model.state_dict())
    optimizer = torch.optim.AdamW(prepared.twig.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss, _ = terms(prepared, a_batch(world, prepared.base), **settings)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in prepared.twig.parameters())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert equal(before, prepared.base.model.state_dict())
    assert all(p.grad is None for p in prepared.base.model.parameters())


def test_a_batch_of_text_alone_learns_words_and_leaves_the_head(world, prepared):
    loss, figures = terms(prepared, a_batch(world, prepared.base, [0, 4]))
    loss.backward()
    assert figures["means"]["attention"].item() == 0 and figures["means"]["prediction"].item() > 0
    assert all(not p.grad.any() for p in prepared.twig.pruning_head.parameters())
    assert prepared.twig.lm_head.weight.grad.any()


@pytest.mark.parametrize("settings", [{}, {"turns": "all"}])
def test_a_sample_weighs_the_same_in_any_company(world, prepared, settings):
    """Of the attention term; one of text counts as 0."""
    places = [1, 2, 4, 5]
    alone = [terms(prepared, a_batch(world, prepared.base, [i]), **settings)[1]["means"]["attention"] for i in places]
    together = terms(prepared, a_batch(world, prepared.base, places), **settings)[1]["means"]["attention"]
    near(together, sum(alone) / 4, 1e-5)
    assert alone[2] == 0


def test_a_pruned_teacher_says_what_the_pruned_base_says(world, prepared):
    """The same logits as `score` reads behind the head's best r."""
    from twigvlm.decoding.prefill import embed
    from twigvlm.decoding.score import score
    from twigvlm.training.plus.budgets import Budgets
    from twigvlm.training.plus.pruned import plan_of

    batch, base, twig = a_batch(world, prepared.base, [1]), prepared.base, prepared.twig
    heard = []
    objective = Distil(teacher="pruned")
    real = type(objective)._kept

    class Spied(Distil):
        def _kept(self, *args):
            heard.append(real(self, *args))
            return heard[-1]

        def _teach(self, *args):
            heard.append(super()._teach(*args)[0])
            return heard[-1], None

    Spied(teacher="pruned", attention=0.0)(TwigLesson(base, twig, objective).read(batch), batch["labels"], twig, base)
    (kept, most), said = heard
    r = Budgets.of(twig.config, base.V, None).r
    assert r[0] <= int(kept.sum()) == most <= r[-1]
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0]
    first = int((labels != IGNORE).nonzero()[0])
    prompts = embed(base, plan_of(kept, most, twig.config), [ids[:first]], batch["pixel_values"])
    likely = score(base, None, plan_of(kept, most, twig.config), prompts, [ids[first:]])[0]
    learnt = labels[first:] != IGNORE
    mine = said.log_softmax(-1).gather(1, labels[labels != IGNORE][:, None])[:, 0]
    near(mine, likely.log_probabilities[learnt], 1e-5)


def test_checkpointed_gradients_are_the_same(world):
    """The last layer, to which the head listens, is kept as it was computed."""
    found = []
    for checkpointed in (False, True):
        settings = Settings(base=str(world / "base"), stage=1, K=2, T=3, gradient_checkpointing=checkpointed)
        torch.manual_seed(3)
        prepared = subject_of(settings).prepare(Run(settings, ALONE, CPU, "fp32", None))
        prepared.twig.train()
        terms(prepared, a_batch(world, prepared.base))[0].backward()
        found.append([p.grad.clone() for p in prepared.twig.parameters()])
        assert [getattr(layer, "gradient_checkpointing", False) for layer in prepared.twig.layers] == [
            checkpointed
        ] * 2 + [False]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_several_images_and_turns_are_all_seen(prepared):
    """Two images before the first answer are one row's keys; a third, later, is seen from the second turn on."""
    base, V = prepared.base, prepared.base.V
    ids = torch.randint(3, 60, (1, 40))
    for start in (2, 8, 22):
        ids[0, start : start + V] = base.image_token_id
    labels = torch.full_like(ids, IGNORE)
    labels[0, 15:18], labels[0, 30:33] = ids[0, 15:18], ids[0, 30:33]
    batch = {"input_ids": ids, "labels": labels, "lengths": [40], "pixel_values": torch.randn(3, 3, 28, 28)}
    scores = []
    head = prepared.twig.pruning_head
    handle = head.register_forward_hook(lambda module, args, out: scores.append(out.detach()))
    loss, _ = terms(prepared, batch, turns="all")
    handle.remove()
    (score,) = scores
    assert score.shape == (1, 2, 3 * V) and score.sum(-1).flatten().tolist() == pytest.approx([1, 1], abs=1e-5)
    assert not score[0, 0, 2 * V :].any() and score[0, 1, 2 * V :].any() and math.isfinite(loss.item())


def test_a_pruned_teacher_is_silent_behind_an_image_that_the_head_has_not_seen(prepared):
    """The kept set is of the images before the first answer, and so is what it teaches."""
    from training.test_policy import two_turns

    batch, turn = two_turns(prepared.base)
    heard = []

    class Spied(Distil):
        def _kept(self, *args):
            heard.append(super()._kept(*args))
            return heard[-1]

        def _teach(self, *args):
            heard.append(super()._teach(*args)[0])
            return heard[-1], None

    states = TwigLesson(prepared.base, prepared.twig, None).read(batch)
    _, figures = Spied(teacher="pruned", turns="all")(states, batch["labels"], prepared.twig, prepared.base)
    (kept, most), spoken = heard
    assert int(kept[:, :turn].sum()) == most <= prepared.base.V and not kept[:, turn:].any()
    assert len(spoken) == 4 and figures["answers"] == 8


# ---------------------------------------------------------------------- runs

FLAGS = ("--stage", "1", "--K", "2", "--T", "2", "--held-out", "4", "--agreement", "labels", "--max-steps", "6")


@pytest.mark.slow
def test_a_run_leaves_a_twig_with_a_head_and_goes_on_bit_for_bit(world, run, tmp_path, monkeypatch):
    code, said = run("whole", *FLAGS, "--teacher", "pruned", "--save-steps", "1")
    assert code == 0 and "with a pruning head" in said and "attention" in said, said
    folder = tmp_path / "whole"
    told = report.history(folder)
    assert {"ntp", "prediction", "attention"} <= told[-1].keys() and told[-1]["loss"] < told[0]["loss"]
    vlm = twigvlm.load(world / "base", folder, device="cpu")
    assert vlm.twig.config.pruning_head == "released"
    assert "Pruning head" in (folder / "README.md").read_text()
    real, count = TwigLesson.__call__, [0]

    def lesson(self, batch):
        count[0] += 1
        if count[0] == 13:  # measuring before the first step takes two
            raise KeyboardInterrupt
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TwigLesson, "__call__", lesson)
        assert run("broken", *FLAGS, "--teacher", "pruned", "--save-steps", "1")[0] == 130
    code, said = run("broken", *FLAGS, "--teacher", "pruned", "--save-steps", "1")
    assert code == 0 and "continuing from" in said
    assert equal(twig_of(folder), twig_of(tmp_path / "broken"))


@pytest.mark.slow
def test_it_starts_from_a_plain_twig_and_from_one_with_a_head(world, run, tmp_path):
    plain = ("--K", "2", "--T", "2", "--F", "5", "--held-out", "0", "--max-steps", "2")
    assert run("plain", *plain)[0] == 0
    one = (
        "--stage",
        "1",
        "--K",
        "2",
        "--T",
        "2",
        "--held-out",
        "0",
        "--max-steps",
        "1",
        "--lr",
        "1e-9",
        "--warmup",
        "0",
    )
    code, said = run("identity", *one, "--init", str(tmp_path / "plain"), "--head-init", "identity")
    assert code == 0, said
    before, after = twig_of(tmp_path / "plain"), twig_of(tmp_path / "identity")
    assert all((after[k] - v).abs().max() < 1e-6 for k, v in before.items()) and len(after) == len(before) + 2
    code, said = run("exported", *one, "--init", str(tmp_path / "identity"), "--export-release", "x.safetensors")
    assert code == 2 and "its pruning head began as the identity" in said, said
    code, said = run("again", *one, "--init", str(tmp_path / "identity"))
    assert code == 0, said
    facts = json.loads((tmp_path / "again/twig_config.json").read_text())
    assert facts["pruning_head"] == "identity" and facts["F"] == 5
    assert run("without", *plain[:4], "--held-out", "0", "--max-steps", "1", "--init", str(tmp_path / "again"))[0] == 0
    assert twig_of(tmp_path / "without").keys() == before.keys()


def test_what_belongs_to_another_stage_is_refused(world, run, tmp_path):
    for flags, match in (
        (("--head-init", "identity"), "head_init is 'identity'; it is for --stage 1 or 2"),
        (("--stage", "1", "--groups", "8"), "groups is 8; it is for --stage 2"),
        (("--stage", "1", "--attention-layer", "1"), "attention_layer is 1; a layer above the twig is needed, 2 to 5"),
        (("--stage", "1", "--temperature", "0"), "temperature is 0.0"),
        (("--stage", "1", "--attention-weight", "-1"), "attention_weight is -1.0"),
        (("--stage", "1", "--attention-weight", "inf"), "attention_weight is inf; 0 or more"),
        (("--stage", "2", "--attention-weight", "nan"), "attention_weight is nan; 0 or more"),
        (("--stage", "1", "--prediction-weight", "inf"), "prediction_weight is inf; 0 or more"),
        (("--stage", "1", "--learn", "projector"), "a projector has no stages"),
        (("--stage", "1", "--head-init", "identity", "--export-release", "x.safetensors"), "released heads only"),
        (("--stage", "2"), "stage 2 starts from a twig with a pruning head"),
    ):
        code, said = run("refused", "--K", "2", "--T", "2", *flags)
        assert code == 2 and match in said and "Traceback" not in said, said


def test_a_loss_that_is_no_number_stops(world, run, tmp_path, monkeypatch):
    real, count = TwigLesson.__call__, [0]

    def lesson(self, batch):
        loss, figures = real(self, batch)
        count[0] += 1
        return (loss * float("nan") if count[0] == 6 else loss), figures

    monkeypatch.setattr(TwigLesson, "__call__", lesson)
    code, said = run("nan", *FLAGS[:6], "--held-out", "0", "--max-steps", "6")
    assert code == 1 and "not finite at step 3" in said and "--lr" in said and "Traceback" not in said


@pytest.mark.slow
def test_adapters_go_with_a_whole_head(world, run, tmp_path):
    pytest.importorskip("peft")
    code, said = run("lora", *FLAGS, "--lora-rank", "2")
    assert code == 0, said
    vlm = twigvlm.load(world / "base", tmp_path / "lora", device="cpu")
    torch.manual_seed(42)
    fresh = prepare_twig(world / "base", Start(2, 2, pruning_head="released"), CPU, FP32, whole=True).twig
    assert not torch.equal(vlm.twig.pruning_head.q_gate.weight, fresh.pruning_head.q_gate.weight)


def test_what_a_run_writes_is_documented(run, tmp_path):
    from training.test_training import documented

    assert run("plain", "--K", "2", "--T", "2", "--held-out", "2", "--max-steps", "2")[0] == 0
    assert run("out", "--stage", "1", "--K", "2", "--T", "2", "--held-out", "2", "--max-steps", "2")[0] == 0
    more = {}
    for folder in ("plain", "out"):
        stored = json.loads((tmp_path / folder / "run.json").read_text())
        for name, found in (
            ("twig_config.json`", json.loads((tmp_path / folder / "twig_config.json").read_text())),
            ("identity` in stage 1", stored["identity"]),
            ("log.jsonl` in stage 1", report.history(tmp_path / folder)[-1]),
        ):
            more[name] = found.keys() - more.get(name, set())
    for name, keys in more.items():
        assert keys == documented("Of TwigVLM++'s stages", f"field of `{name}")


def test_every_choice_has_a_flag():
    from typing import get_args

    from twigvlm.training.plus import distil, losses, policy, sets
    from twigvlm.training.settings import BASELINES, PREDICTIONS, REWARDS, TEACHERS

    assert tuple(LOSSES) == PREDICTIONS == get_args(losses.Prediction)
    assert get_args(distil.Teacher) == TEACHERS and get_args(sets.Baseline) == BASELINES
    assert get_args(policy.Reward) == REWARDS
