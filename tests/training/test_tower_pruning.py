"""A twig that learns behind a method before the decoder: it sees in training what it will see when it drafts and prunes."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import batch as padded

import twigvlm
from training.test_training import CPU, FP32, a_batch
from twigvlm.config import TwigConfig
from twigvlm.decoding.prefill import State, embed
from twigvlm.errors import InputError
from twigvlm.pruning import Shape, find_method
from twigvlm.training.data.examples import IGNORE
from twigvlm.training.plus.distil import Distil
from twigvlm.training.plus.policy import Policy
from twigvlm.training.plus.subject import PolicyLesson
from twigvlm.training.twig import Start, TwigLesson, prepare_twig, reducer_of, tower_method

pytest.importorskip("accelerate")
SPECS = ("visionzip:keep=3", "divprune:keep=2", "uniform:keep=1")


def prepare(world, spec: str | None, head: str = "", F: int = 0):
    torch.manual_seed(3)
    return prepare_twig(world / "base", Start(2, 2, F, pruning_head=head), CPU, FP32, whole=True, tower_pruning=spec)


def ids_of(batch: dict) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(batch["input_ids"], batch["lengths"], strict=True)]


@pytest.mark.parametrize("spec", SPECS)
def test_the_training_sees_what_inference_sees(world, spec):
    """Two pictures' worth of rows and one without: tokens, positions, and what leaves the twig."""
    prepared = prepare(world, spec)
    batch = a_batch(world, prepared.base, [1, 4, 5, 7])
    lesson = TwigLesson(prepared.base, prepared.twig, None, reducer=prepared.reducer)
    with torch.no_grad():
        states, labels = lesson.enter(batch)
        twig = prepared.base.run(prepared.twig.layers, states).hidden
    vlm = twigvlm.load(world / "base", device="cpu", dtype="float32")
    config, keep = prepared.twig.config, tower_method(spec).keep
    R = (config.K * keep + config.F - config.K) / config.L
    plan = find_method(f"{spec}+twig").plan(R, Shape(config.L, vlm.trunk.V, config.K, config.F))
    with torch.no_grad():
        state = State(vlm.trunk, prepared.twig, plan, embed(vlm.trunk, plan, ids_of(batch), batch["pixel_values"]))
        stream = state.climb(state.awaiting, state.low)
        wanted = state.run_twig(stream).hidden
    assert states.count().tolist() == stream.count().tolist()
    assert (states.visual >= 0).sum(1).tolist() == [keep, 0, keep, keep]
    for b, n in enumerate(states.count().tolist()):
        assert torch.equal(states.visual[b, :n], stream.visual[b, :n])
        assert torch.equal(
            states.positions[0, 0 if len(states.positions[0]) == 1 else b, :n], stream.positions[0, b, :n]
        )
        torch.testing.assert_close(states.hidden[b, :n], stream.hidden[b, :n], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(twig[b, :n], wanted[b, :n], rtol=1e-5, atol=1e-5)
        row = batch["labels"][b]
        assert labels[b][labels[b] != IGNORE].tolist() == row[row != IGNORE].tolist()


@pytest.mark.parametrize("spec", SPECS[:2])
def test_rewards_are_likelihoods_under_that_pruning(world, spec):
    """A measurement of stage 2: the base behind both methods, as `score` asks it."""
    prepared = prepare(world, spec, "released")
    keep = tower_method(spec).keep
    policy = Policy(visual=keep)
    assert policy.budgets(prepared.twig, prepared.base).r[0] == 1
    batch = a_batch(world, prepared.base, [1])
    with torch.no_grad():
        _, figures = PolicyLesson(prepared.base, prepared.twig, policy, reducer=prepared.reducer)(batch)
    vlm = twigvlm.load(world / "base", device="cpu", dtype="float32")
    vlm.twig = prepared.twig
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    first = int((labels != IGNORE).nonzero()[0])
    config = prepared.twig.config
    R = (config.K * keep + config.F - config.K) / config.L
    found = vlm.score(
        ids[None, :first], [ids[first:].tolist()], batch["pixel_values"], retained_tokens=R, pruning=f"{spec}+twig"
    )
    learnt = labels[first:] != IGNORE
    assert figures["means"]["reward"].item() == pytest.approx(
        found[0].log_probabilities[learnt].mean().item(), abs=1e-5
    )


@pytest.mark.parametrize("teacher", ["whole", "pruned"])
def test_a_teacher_behind_the_same_method(world, teacher):
    """Stage 1: gradients are there, and a sample is worth the same in any company."""
    prepared = prepare(world, "visionzip:keep=3", "released")
    objective = Distil(teacher=teacher, visual=3)
    lesson = TwigLesson(prepared.base, prepared.twig, objective, reducer=prepared.reducer)
    torch.manual_seed(0)
    loss, figures = lesson(a_batch(world, prepared.base, [1, 2, 4]))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in prepared.twig.parameters())
    assert figures["means"]["attention"] > 0 and all(p.grad is None for p in prepared.base.model.parameters())


def test_all_tokens_kept_is_no_pruning(world):
    """`uniform:keep=V` changes nothing."""
    plain, whole = prepare(world, None), prepare(world, "uniform:keep=4")
    batch = a_batch(world, plain.base, [1, 4, 5])
    a, b = (TwigLesson(p.base, p.twig, None, reducer=p.reducer).read(batch) for p in (plain, whole))
    real = a.real()
    torch.testing.assert_close(a.hidden[real], b.hidden[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec,match",
    [
        ("fastv", "a method before the decoder with keep=N is needed"),
        ("visionzip", "a method before the decoder with keep=N is needed"),
        ("visionzip:keep=3+twig", "a method before the decoder with keep=N is needed"),
        ("visionzip:keep=0", "1 to 4 tokens of an image can stay"),
        ("visionzip:keep=9", "1 to 4 tokens of an image can stay"),
        ("visionzip*:keep=2", "needs weights beside the base's"),
        ("cdpruner:keep=2", "needs weights beside the base's"),
        ("nonsense:keep=2", "known methods"),
        ("visionzip:keep=x", "a whole number is needed"),
    ],
)
def test_what_cannot_be(spec, match):
    with pytest.raises(InputError, match=match.replace("(", r"\(")):
        reducer_of(spec, TwigConfig(6, 2, 2), 4)


FLAGS = ("--K", "2", "--T", "2", "--max-steps", "2", "--held-out", "4", "--tower-pruning", "visionzip:keep=3")


@pytest.mark.slow
def test_a_run_of_every_stage(world, run, tmp_path, capfd):
    code, said = run("plain", *FLAGS, "--agreement", "labels")
    assert code == 0 and "behind visionzip:keep=3" in said, said
    facts = json.loads((tmp_path / "plain/twig_config.json").read_text())
    assert (
        facts["tower_pruning"] == "visionzip:keep=3"
        and "visionzip:keep=3+twig" in (tmp_path / "plain/README.md").read_text()
    )
    vlm = twigvlm.load(world / "base", tmp_path / "plain", device="cpu", dtype="float32")
    assert (
        "learnt behind visionzip:keep=3; it is at its best with pruning visionzip:keep=3+twig" in capfd.readouterr().err
    )
    ids = torch.tensor([[1, *[vlm.image_token_id] * 4, 9, 8, 7]])
    out = vlm.generate(
        **padded(ids.tolist(), [torch.randn(1, 3, 28, 28)]), pruning="visionzip:keep=3+twig", retained_tokens=1.5
    )
    assert out.stats.visual_by_layer[0] == 3
    assert run("one", *FLAGS, "--agreement", "labels", "--stage", "1")[0] == 0
    more = ("--stage", "2", "--init", str(tmp_path / "one"), "--groups", "2", "--agreement", "labels")
    code, said = run("two", *FLAGS, *more)
    assert (
        code == 0 and json.loads((tmp_path / "two/twig_config.json").read_text())["tower_pruning"] == "visionzip:keep=3"
    ), said
    assert json.loads((tmp_path / "two/run.json").read_text())["identity"]["tower_pruning"] == "visionzip:keep=3"
    for flags, match in (
        ((*FLAGS[:-1], "visionzip:keep=5"), "1 to 4 tokens"),
        ((*FLAGS[:-1], "fastv"), "a method before the decoder with keep=N"),
        ((*FLAGS, "--learn", "projector"), "it is for twigs"),
    ):
        code, said = run("refused", *flags)
        assert code == 2 and match in said and "Traceback" not in said, said


def test_the_bases_words_are_those_behind_it(world, tmp_path, capfd, run):
    from twigvlm.training import agreement

    where = ["--base", str(world / "base"), "--data", str(world / "data.json"), "--images", str(world / "images")]
    argv = [*where, "--out", str(tmp_path / "out"), "--device", "cpu", *FLAGS]
    assert agreement.main(argv) == 0 and "answer positions of 4" in capfd.readouterr().out
    assert agreement.main(argv) == 0 and "already there" in capfd.readouterr().out
    code, said = run("out", *FLAGS)
    assert code == 0 and "measured with the labels" not in said
    code, said = run("other", *FLAGS[:-2])
    (tmp_path / "third").mkdir()
    (tmp_path / "out/base_answers.npz").rename(tmp_path / "third/base_answers.npz")
    code, said = run("third", *FLAGS[:-2])
    assert code == 0 and "measured with the labels" in said, "words behind another stream are not used"


def test_the_plan_counts_what_is_left():
    from twigvlm.training.cost import make_plan
    from twigvlm.training.settings import Settings

    base = {"base": "liuhaotian/llava-v1.5-7b", "device": "cuda"}
    whole, half = (make_plan(Settings(**base, tower_pruning=spec), 8) for spec in (None, "visionzip:keep=288"))
    assert whole["tokens_per_sample"] - half["tokens_per_sample"] == 288 and half["visual_tokens"] == 288
    assert half["flops_per_sample"]["twig"] < 0.75 * whole["flops_per_sample"]["twig"]
    with pytest.raises(InputError, match="1 to 576 tokens"):
        make_plan(Settings(**base, tower_pruning="visionzip:keep=577"), 8)
    answered = make_plan(Settings(**base, on_policy=1000), 8)["on_policy"]
    assert answered["samples"] == 1000 and 0 < answered["flops_least"] < answered["flops_most"]
    assert 13e9 < answered["base_bytes"] < 15e9
    with pytest.raises(InputError, match="choose 665298 or less"):
        make_plan(Settings(**base, on_policy=700_000), 8)
