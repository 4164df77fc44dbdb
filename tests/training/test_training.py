"""Training a twig: equal to the authors' code where that is right, whole after any fault, honest about its plan."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import twigvlm
from training.conftest import quietly, twig_of
from twigvlm.config import TwigConfig
from twigvlm.errors import InputError
from twigvlm.families import trunk_of
from twigvlm.loading import base as loading
from twigvlm.loading import weights
from twigvlm.loading.base import load_base
from twigvlm.model.twig import grow, save_twig
from twigvlm.training import agreement, train
from twigvlm.training import cost as plan
from twigvlm.training.data.examples import IGNORE, Collator, Example, Records, Skipped, TwigDataset, encode
from twigvlm.training.data.loading import TrainingFeed, read_data
from twigvlm.training.objectives import Ntp, answers
from twigvlm.training.run import checkpoints, loop, ranks, report, zero
from twigvlm.training.settings import EMBEDDED_PRESET, Settings, parse, split_batch
from twigvlm.training.twig import Start, TwigLesson, checkpoint_gradients, layers_needed, prepare_twig, trim_tower

pytest.importorskip("accelerate")

slow = pytest.mark.slow
CPU, FP32 = torch.device("cpu"), torch.float32


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---------------------------------------------------------------------- the authors' numbers


def golden_batch(golden: Path, facts: dict, arrays, trunk) -> dict:
    """The collated batch of the golden file, with every picture's visual tokens written out."""
    rows, pixels = [], []
    for b, name in enumerate(facts["pixels"]):
        real = arrays["attention_mask"][b].astype(bool)
        rows.append(Example(arrays["input_ids"][b][real].tolist(), arrays["labels"][b][real].tolist(), (), 0))
        if name != "zeros":
            pixels.append(
                torch.from_numpy(np.load(golden / "images" / name).astype(np.float32)).reshape(1, 3, 336, 336)
            )
    batch = Collator(trunk.image_token_id, trunk.V)(rows)
    assert batch["lengths"] == facts["merged_lengths"]
    return {k: batch[k] for k in ("input_ids", "labels", "lengths")} | {"pixel_values": torch.cat(pixels)}


@pytest.mark.parametrize(
    "K,T,attention",
    [(2, 3, "sdpa"), (1, 2, "eager"), *(pytest.param(*c, marks=slow) for c in ((2, 3, "eager"), (1, 2, "sdpa")))],
)
def test_loss_gradients_and_steps_are_the_authors(golden, K, T, attention):
    facts = json.loads((golden / f"training/loss_A_K{K}T{T}.json").read_text())
    arrays = np.load(golden / f"training/loss_A_K{K}T{T}.npz")
    prepared = prepare_twig(golden / "A" / "base", Start(K, T), CPU, FP32, attention)
    model = TwigLesson(prepared.base, prepared.twig, Ntp())
    batch = golden_batch(golden, facts, arrays, prepared.base)
    optimizer = torch.optim.AdamW(prepared.twig.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0)
    named = dict(prepared.twig.named_parameters())
    for step, expected in enumerate(facts["losses"]):
        loss = model(batch)[0]
        assert abs(loss.item() - expected) < 1e-4
        if step == len(facts["losses"]) - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert sorted(facts["grad_norm"]) == sorted(named)
            for name, norm in facts["grad_norm"].items():
                assert named[name].grad.norm().item() == pytest.approx(norm, rel=1e-5)
            for key in (k for k in arrays.files if k.startswith("grad/")):
                torch.testing.assert_close(named[key[5:]].grad, torch.from_numpy(arrays[key]), rtol=1e-5, atol=1e-6)
        optimizer.step()
    apart = [
        (named[key[7:]].detach() - torch.from_numpy(arrays[key])).abs().flatten()
        for key in arrays.files
        if key.startswith("after3/")
    ]
    apart = torch.cat(apart)
    # Adam makes steps of gradients that are almost zero, so that another order of sums shows in a few of them.
    share = 0.9999 if attention == "eager" else 0.999
    allowed = max(1, round((1 - share) * len(apart)))  # a set that carries few of them may still hold one
    assert (apart > 1e-6).sum() <= allowed and apart.max() < 1e-4


class GoldenOrder:
    """A batch sampler: the authors' order."""

    def __init__(self, order: list[int], rows: int):
        self.cells = [order[i : i + rows] for i in range(0, len(order), rows)]

    def __iter__(self):
        return iter(self.cells)

    def __len__(self):
        return len(self.cells)

    def set_epoch(self, epoch):
        pass

    def set_start(self, batch):
        pass


class GoldenSet(TwigDataset):
    """As the authors' code: what cannot be aligned is in its batch and teaches nothing."""

    def __getitems__(self, indices):
        found = [self[i] for i in indices]
        rows = [f for f in found if isinstance(f, Example)]
        return rows or [Example([1, 5], [IGNORE, IGNORE], (), 2)]


@slow
def test_a_whole_run_is_the_authors(golden, tmp_path):
    """Through the loop as it trains: losses, learning rates and final weights."""
    facts = json.loads((golden / "training/e2e.json").read_text())
    rows, accumulation = facts["per_device_train_batch_size"], facts["gradient_accumulation_steps"]
    steps = facts["global_step_done"]
    settings = Settings(
        base=str(golden / "A/base"), data=str(golden / "training/e2e_conversations.json"), images=str(golden / "images"),
        lr=facts["learning_rate"], betas=(0.9, 0.999), attention="eager",
    )  # fmt: skip
    prepared = prepare_twig(settings.base, Start(2, 3), CPU, FP32, "eager")
    data = read_data(settings, prepared.loaded, progress=False)
    source = data.dataset
    data.dataset = GoldenSet(
        source.records, source.folder, _tokenizer(golden), source.image_processor, 2048, prepared.base.V
    )
    feed = TrainingFeed(data, GoldenOrder(facts["sample_order"], rows), accumulation, 0, False)

    class Heard(loop.Watch):
        losses, used = [], []

        def step(self, running, told):
            self.losses += [loss.item() for loss in told.losses]
            self.used.append(told.rate)

    plan = loop.Plan(steps, loop.rates("cosine", settings.lr, facts["max_steps_planned"], 1))
    lesson = TwigLesson(prepared.base, prepared.twig, Ntp())
    place = loop.Place(tmp_path, lambda folder, weights: None, CPU)
    optimizer = partial(loop.adamw, lr=settings.lr, betas=settings.betas, weight_decay=0.0)
    running = loop.Loop(plan, loop.Learner(prepared.twig, lesson), optimizer, feed, place, Heard())
    assert running.run()
    expected = [cell["loss"] for cell in facts["micro_batches"]]
    assert len(Heard.losses) == len(expected)
    for found, wanted in zip(Heard.losses, expected, strict=True):
        assert wanted is None or abs(found - wanted) < 1e-5
        assert wanted is not None or found == 0.0  # where theirs is NaN
    assert Heard.used[: len(facts["lr_used_per_step"])] == pytest.approx(facts["lr_used_per_step"], abs=1e-12)
    final = np.load(golden / "training/e2e_final.npz")
    named = dict(prepared.twig.named_parameters())
    assert final.files
    for key in final.files:
        torch.testing.assert_close(
            named[key.removeprefix("final/")].detach(), torch.from_numpy(final[key]), rtol=0, atol=1e-6
        )


def _tokenizer(golden: Path):
    from twigvlm.prompt.processor import make_processor

    loaded = load_base(golden / "A/base", CPU, FP32, "eager", lambda L: [0])
    return make_processor(loaded.model.config, loaded.folder, loaded.original).tokenizer


# ---------------------------------------------------------------------- what is read, what learns


@pytest.fixture
def read_keys(monkeypatch) -> list[str]:
    """Names of the tensors whose data were read from a file."""
    seen, real = [], weights.read_tensors

    def spy(file, device):
        for stored in real(file, device):

            def noted(stored=stored):
                seen.append(stored.name)
                return stored.read()

            yield replace(stored, read=noted)

    monkeypatch.setattr(weights, "read_tensors", spy)
    monkeypatch.setattr(loading, "read_tensors", spy)
    return seen


def layers_read(keys: list[str]) -> set[int]:
    return {int(k.split("layers.")[1].split(".")[0]) for k in keys if "layers." in k and "vision" not in k}


@pytest.mark.parametrize(
    "K,T,init,expected",
    [(2, 3, "base", {0, 1, 2, 3, 4}), (1, 1, "base", {0, 1}), (2, 3, "last", {0, 1, 3, 4, 5}), (0, 2, "base", {0, 1}),
     (0, 2, "last", {0, 4, 5})],
)  # fmt: skip
def test_only_the_layers_that_are_needed_are_read(world, read_keys, K, T, init, expected):
    prepared = prepare_twig(world / "base", Start(K, T, init=init), CPU, FP32)
    assert layers_read(read_keys) == expected
    assert len(prepared.base.layers) == K and len(prepared.twig.layers) == T
    assert prepared.twig.config.L == 6


def test_layers_above_need_not_even_be_there(world, tmp_path, golden):
    """In one file without them, and in a folder that lacks the shards that hold them, in either layout."""
    shutil.copytree(world / "base", tmp_path / "cut")
    state = load_file(tmp_path / "cut/model.safetensors")
    kept = {k: v for k, v in state.items() if not any(f"layers.{i}." in k and "vision" not in k for i in (4, 5))}
    assert len(kept) < len(state)
    save_file(kept, tmp_path / "cut/model.safetensors")
    whole, cut = (prepare_twig(f, Start(2, 2), CPU, FP32) for f in (world / "base", tmp_path / "cut"))
    assert equal(whole.twig.state_dict(), cut.twig.state_dict())
    shutil.copytree(golden / "A/base", tmp_path / "original/base")
    shutil.copytree(golden / "A/vision", tmp_path / "original/vision")
    folder = tmp_path / "original/base"
    for file in (folder, *folder.iterdir(), *(tmp_path / "original").rglob("*")):
        file.chmod(0o755)
    state = load_file(folder / "model.safetensors")
    upper = [k for k in state if k.startswith(("model.layers.5.", "model.layers.6.", "model.layers.7."))]
    (folder / "model.safetensors").unlink()
    save_file({k: v for k, v in state.items() if k not in upper}, folder / "lower.safetensors")
    places = {k: "upper.safetensors" if k in upper else "lower.safetensors" for k in state}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert len(prepare_twig(folder, Start(2, 3), CPU, FP32).twig.layers) == 3
    with pytest.raises(InputError, match="upper"):
        prepare_twig(folder, Start(2, 4), CPU, FP32)


def test_where_a_twig_starts(world):
    base = trunk_of(load_base(world / "base", CPU, FP32, "sdpa").model)

    def same(twig, first):
        return all(
            equal(layer.state_dict(), base.layers[first + i].state_dict()) for i, layer in enumerate(twig.layers)
        )

    start = {init: prepare_twig(world / "base", Start(2, 2, init=init), CPU, FP32).twig for init in ("base", "last")}
    assert same(start["base"], 2) and same(start["last"], 4)
    torch.manual_seed(3)
    one = prepare_twig(world / "base", Start(2, 2, init="random"), CPU, FP32).twig
    assert not same(one, 2) and not torch.equal(one.lm_head.weight, start["base"].lm_head.weight)
    assert torch.equal(one.model.norm.weight, start["base"].model.norm.weight)
    torch.manual_seed(3)
    assert equal(
        one.state_dict(), prepare_twig(world / "base", Start(2, 2, init="random"), CPU, FP32).twig.state_dict()
    )


@pytest.mark.parametrize("flags,word", [(("--K", "4", "--T", "3"), "K + T"), (("--T", "0"), "T is 0"), (("--F", "1"), "F is 1"),
                                        (("--init", "nowhere"), "init")])  # fmt: skip
def test_impossible_twigs_are_refused_before_a_weight_is_read(run, read_keys, flags, word):
    code, said = run("out", *flags)
    assert code == 2 and word in said and "Traceback" not in said and not read_keys


def test_a_trimmed_tower_sees_the_same(world):
    whole = trunk_of(load_base(world / "base", CPU, FP32, "sdpa").model)
    trimmed = trunk_of(load_base(world / "base", CPU, FP32, "sdpa").model)
    layers = len(trimmed.model.model.vision_tower.encoder.layers)
    trim_tower(trimmed)
    assert len(trimmed.model.model.vision_tower.encoder.layers) == layers - 1
    pixels = torch.randn(3, 3, 28, 28)
    assert torch.equal(torch.cat(whole.image_features(pixels)), torch.cat(trimmed.image_features(pixels)))


def a_batch(world: Path, trunk, indices=range(1, 4)) -> dict:
    records = Records(world / "data.json")
    processor = twigvlm.load(world / "base", device="cpu").processor
    dataset = TwigDataset(records, world / "images", processor.tokenizer, processor.image_processor, 512, trunk.V)
    batch = Collator(trunk.image_token_id, trunk.V)(dataset.__getitems__(list(indices)))
    return {k: batch[k] for k in ("input_ids", "labels", "lengths", "pixel_values")}


def test_gradients_stay_in_the_twig_and_the_trunk_stays_as_it_is(world):
    prepared = prepare_twig(world / "base", Start(2, 2), CPU, FP32)
    before = {k: v.clone() for k, v in prepared.base.model.state_dict().items()}
    model = TwigLesson(prepared.base, prepared.twig, Ntp())
    learner = loop.Learner(prepared.twig, model)
    assert {p.data_ptr() for p in learner.parameters()} == {p.data_ptr() for p in prepared.twig.parameters()}
    optimizer = torch.optim.AdamW(prepared.twig.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(model(a_batch(world, prepared.base))[0])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prepared.twig.parameters())
    assert all(p.grad is None for p in prepared.base.model.parameters())
    assert equal(before, prepared.base.model.state_dict())
    shared = {p.data_ptr() for p in prepared.base.model.parameters()} & {
        p.data_ptr() for p in prepared.twig.parameters()
    }
    assert not shared


def test_padding_and_company_change_nothing(world):
    """A batch's answers are those of its rows alone."""
    prepared = prepare_twig(world / "base", Start(2, 2), CPU, FP32)
    model = TwigLesson(prepared.base, prepared.twig, Ntp())
    together, figures = model(a_batch(world, prepared.base, [1, 2, 3]))
    alone = [model(a_batch(world, prepared.base, [i])) for i in (1, 2, 3)]
    counted = sum(int(f["answers"]) for _, f in alone)
    assert int(figures["answers"]) == counted
    mean = sum(one * int(f["answers"]) for one, f in alone) / counted
    torch.testing.assert_close(together, mean, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(world):
    found = []
    for wanted in (False, True):
        prepared = prepare_twig(world / "base", Start(2, 2), CPU, FP32)
        if wanted:
            checkpoint_gradients(prepared.twig.layers)
        model = TwigLesson(prepared.base, prepared.twig, Ntp())
        model(a_batch(world, prepared.base))[0].backward()
        found.append({n: p.grad for n, p in prepared.twig.named_parameters()})
    assert equal(*found)


# ---------------------------------------------------------------------- a run and its results


def test_a_run_leaves_a_twig_that_loads_in_both_formats(world, run, tmp_path):
    code, said = run("out", "--epochs", "3", "--export-release", str(tmp_path / "released/model.safetensors"))
    assert code == 0, said
    out = tmp_path / "out"
    for name in ("twig_config.json", "README.md", "curve.png", "log.jsonl", "skipped.jsonl", "run.json"):
        assert (out / name).stat().st_size > 0 or name == "skipped.jsonl"
    facts = json.loads((out / "twig_config.json").read_text())
    assert (facts["K"], facts["T"], facts["L"], facts["base"]) == (2, 3, 6, str(world / "base"))
    told = report.history(out)
    assert [t["step"] for t in told] == list(range(1, 19))
    assert {"loss", "learning_rate", "samples_per_second", "tokens_per_second", "agreement", "waiting_share"} <= told[
        0
    ].keys()
    assert told[-1]["loss"] < 0.7 * told[0]["loss"] and told[0]["learning_rate"] == 0.0
    assert "eta" in said and "agreement" in said and "batch 4 = 1 device x 2 samples x 2 accumulation" in said
    ours = twigvlm.load(world / "base", out, device="cpu")
    theirs = twigvlm.load(world / "base", tmp_path / "released", K=2, wipe_layer=ours.config.F, device="cpu")
    last = checkpoints.checkpoints(out)[0]
    for twig in (ours.twig, theirs.twig):
        assert equal(twig.state_dict(), twig_of(last))
    prompt = ours.prepare(world / "images/1.png", "is it red?")
    assert ours.generate(**prompt, max_new_tokens=8).tokens == theirs.generate(**prompt, max_new_tokens=8).tokens
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: twigvlm\n") and "K = 2, T = 3" in card and "curve.png" in card
    assert "| Data | `data.json`, " in card, "nobody else has this folder"
    code, said = run("out", "--epochs", "3")
    assert code == 0 and "finished" in said


def test_every_usable_sample_is_used_once(run, world, tmp_path, monkeypatch):
    records = json.loads((world / "data.json").read_text())
    records[5]["conversations"].append({"from": "human", "value": "and nobody answers"})
    records[9]["image"] = "not there.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    seen, real = [], TwigLesson.__call__

    def spy(self, batch):
        seen.extend(batch["indices"])
        assert (batch["labels"] != IGNORE).any()
        return real(self, batch)

    monkeypatch.setattr(TwigLesson, "__call__", spy)
    code, said = run("out", "--max-skipped", "0.2", "--batch-size", "8", data=tmp_path / "data.json")
    assert code == 0, said
    assert sorted(seen) == sorted(set(range(24)) - {5, 9})
    listed = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [(s["index"], s["reason"].split(":")[0]) for s in listed] == [
        (5, "labels cannot be aligned"),
        (9, "image missing"),
    ]
    assert "left out" in said and "skipped.jsonl" in said


def test_a_picture_that_breaks_while_training_is_listed(run, world, tmp_path):
    """It is there when the data are looked through, and cannot be decoded when it is its turn."""
    shutil.copytree(world / "images", tmp_path / "images")
    (tmp_path / "images/7.png").write_bytes(b"no picture")
    code, said = run("out", "--images", str(tmp_path / "images"), "--max-skipped", "0.2", "--workers", "1")
    assert code == 0, said
    listed = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [(s["index"], s["reason"]) for s in listed] == [(7, "image broken")]
    code, said = run("strict", "--images", str(tmp_path / "images"))
    assert code == 2 and "max_skipped" in said and "Traceback" not in said
    assert len((tmp_path / "strict/skipped.jsonl").read_text().splitlines()) == 1


def test_held_out_samples_measure_agreement_with_the_base(run, world, tmp_path):
    flags = ["--held-out", "4", "--epochs", "1", "--agreement-steps", "1"]
    argv = ["--base", str(world / "base"), "--data", str(world / "data.json"), "--images", str(world / "images")]
    argv += ["--out", str(tmp_path / "out"), "--device", "cpu", *flags]
    assert agreement.main(argv) == 0
    code, said = run("out", *flags)
    assert code == 0 and "(base)" in said, said
    told = report.history(tmp_path / "out")
    assert all(t["agreement_with"] == "base" for t in told)
    # By hand: the whole base and the finished twig over the held-out samples.
    with np.load(tmp_path / "out/base_answers.npz") as stored:
        places = stored["asked"].tolist()
    vlm = twigvlm.load(world / "base", tmp_path / "out", device="cpu")
    right = total = 0
    for place in places:
        batch = a_batch(world, vlm.trunk, [place])
        with torch.no_grad():
            stream = vlm.trunk.embed(batch["input_ids"], batch["lengths"], batch["pixel_values"])
            below = vlm.trunk.run(vlm.trunk.layers[:2], stream, None)
            said_by_twig = answers(below, batch["labels"], vlm.twig, vlm.trunk)[0].argmax(-1)
            hidden = vlm.trunk.run(vlm.trunk.layers, stream, None).hidden
            chosen = batch["labels"][:, 1:] != IGNORE
            said_by_base = vlm.trunk.logits(hidden[:, :-1][chosen]).argmax(-1)
        right, total = right + int((said_by_twig == said_by_base).sum()), total + len(said_by_base)
    assert told[-1]["agreement"] == pytest.approx(right / total, abs=1e-5)
    code, said = run("unasked", *flags)
    assert code == 0 and "(labels)" in said and "twigvlm.training.agreement" in said


@slow
def test_adapters(run, world, tmp_path):
    pytest.importorskip("peft")
    flags = ["--lora-rank", "4", "--lora-dropout", "0.1", "--epochs", "2", "--save-steps", "3"]
    code, said = run("out", *flags)
    assert code == 0, said
    told = report.history(tmp_path / "out")
    assert told[-1]["loss"] < told[0]["loss"]
    twig = twigvlm.load(world / "base", tmp_path / "out", device="cpu").twig
    start = prepare_twig(world / "base", Start(2, 3), CPU, FP32).twig.state_dict()
    moved = [k for k, v in twig.state_dict().items() if not torch.equal(v, start[k])]
    assert len(moved) == len(start)
    for key in ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        assert torch.linalg.matrix_rank(twig.state_dict()[key] - start[key], atol=1e-5) <= 4
    stopped_and_resumed(run, tmp_path, flags, at=5)
    assert equal(twig_of(tmp_path / "out"), twig_of(tmp_path / "resumed"))


# ---------------------------------------------------------------------- killed, full, broken


class Killed(BaseException):
    """Nothing catches it: as good as SIGKILL for what is on the disk."""


def stopped_and_resumed(run, tmp_path, flags, at: int, name: str = "resumed") -> None:
    """Kill a run in its micro-batch number `at`, then give the same command again."""
    with pytest.MonkeyPatch.context() as patch:
        real, count = TwigLesson.__call__, [0]

        def lesson(self, batch):
            count[0] += 1
            if count[0] == at:
                raise Killed
            return real(self, batch)

        patch.setattr(TwigLesson, "__call__", lesson)
        with pytest.raises(Killed):
            run(name, *flags)
    code, said = run(name, *flags)
    assert code == 0, said


@pytest.mark.parametrize("at", [13, *(pytest.param(at, marks=slow) for at in (1, 2, 8, 24))])
def test_a_killed_run_ends_with_the_same_weights(run, tmp_path, at):
    flags = ["--epochs", "2", "--save-steps", "1"]
    assert run("whole", *flags)[0] == 0
    stopped_and_resumed(run, tmp_path, flags, at)
    assert equal(twig_of(tmp_path / "whole"), twig_of(tmp_path / "resumed"))
    assert [t["loss"] for t in report.history(tmp_path / "whole")] == [
        t["loss"] for t in report.history(tmp_path / "resumed")
    ]


@pytest.mark.parametrize("where", ["seal", "write_results", *(pytest.param(w, marks=slow) for w in ("prune", "flush"))])
def test_killed_while_saving(run, tmp_path, monkeypatch, where):
    """Between any two of the file operations of a checkpoint, and after the last one."""
    flags = ["--epochs", "1", "--save-steps", "2", "--keep", "1"]
    assert run("whole", *flags)[0] == 0
    owner = train if where == "write_results" else checkpoints
    real, count = getattr(owner, where), [0]

    def die(*args, **kwargs):
        count[0] += 1
        if count[0] == 2 or where == "write_results":
            raise Killed
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, where, die)
        with pytest.raises(Killed):
            run("resumed", *flags)
    code, said = run("resumed", *flags)
    assert code == 0, said
    assert equal(twig_of(tmp_path / "whole"), twig_of(tmp_path / "resumed"))
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "resumed")] == ["checkpoint-6"]
    assert not [p for p in (tmp_path / "resumed").iterdir() if p.name.startswith((".saving", ".doomed"))]


@pytest.mark.parametrize("damage", ["flipped", *(pytest.param(d, marks=slow) for d in ("cut", "missing", "unsealed"))])
def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, damage):
    flags = ["--epochs", "1", "--save-steps", "2", "--keep", "3"]
    assert run("whole", *flags)[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    newest = tmp_path / "resumed/checkpoint-6"
    victim = newest / "optimizer.bin"
    data = bytearray(victim.read_bytes())
    if damage == "cut":
        victim.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 255
        victim.write_bytes(data)
    elif damage == "missing":
        victim.unlink()
    else:
        (newest / "whole.json").unlink()
    for name in ("model.safetensors", "twig_config.json"):
        (tmp_path / "resumed" / name).unlink()
    code, said = run("resumed", *flags)
    assert code == 0 and "checkpoint-6: damaged" in said and "continuing from" in said and "checkpoint-4" in said
    assert equal(twig_of(tmp_path / "whole"), twig_of(tmp_path / "resumed"))


def test_old_checkpoints_go(run, tmp_path):
    assert run("out", "--epochs", "1", "--save-steps", "1", "--keep", "2")[0] == 0
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "out")] == ["checkpoint-6", "checkpoint-5"]
    vlm = twigvlm.load(
        json.loads((tmp_path / "out/twig_config.json").read_text())["base"], tmp_path / "out/checkpoint-5"
    )
    assert vlm.config.T == 3  # a checkpoint is a twig


@slow
def test_saving_by_the_clock(run, tmp_path, monkeypatch):
    saved, real = [], checkpoints.seal
    monkeypatch.setattr(
        checkpoints, "seal", lambda part, place, told: (saved.append(place.name), real(part, place, told))
    )
    assert run("out", "--epochs", "1", "--save-seconds", "0.001")[0] == 0
    assert len(saved) >= 5
    saved.clear()
    assert run("never", "--epochs", "1", "--save-seconds", "0")[0] == 0
    assert saved == ["checkpoint-6"]


@pytest.mark.parametrize(
    "number,expected,at",
    [
        (signal.SIGTERM, 0, 5),
        *(pytest.param(signal.SIGTERM, 0, at, marks=slow) for at in (1, 4)),
        *(pytest.param(signal.SIGINT, 130, at, marks=slow) for at in (1, 4, 5)),
    ],
)
def test_a_signal_saves_and_stops(run, tmp_path, number, expected, at):
    """In the middle of a step as well as at its end; the same command ends with the same weights."""
    assert run("whole", "--epochs", "1")[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        real, count = TwigLesson.__call__, [0]

        def lesson(self, batch):
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), number)
            return real(self, batch)

        patch.setattr(TwigLesson, "__call__", lesson)
        code, said = run("resumed", "--epochs", "1")
    assert code == expected, said
    done = at // 2
    assert f"after step {done}" in said and (tmp_path / f"resumed/checkpoint-{done}").is_dir()
    code, said = run("resumed", "--epochs", "1")
    assert code == 0 and "continuing from" in said
    assert equal(twig_of(tmp_path / "whole"), twig_of(tmp_path / "resumed"))


def spoiled(patch, at: int, fault) -> None:
    """Let micro-batch number `at` go wrong."""
    real, count = TwigLesson.__call__, [0]

    def lesson(self, batch):
        count[0] += 1
        if count[0] == at and isinstance(fault, Exception):
            raise fault
        loss, figures = real(self, batch)
        return loss * fault if count[0] == at else loss, figures

    patch.setattr(TwigLesson, "__call__", lesson)


def test_a_loss_that_is_no_number(run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        spoiled(patch, 6, float("nan"))
        code, said = run("out", "--epochs", "1")
    assert code == 1 and "Traceback" not in said, said
    assert "not finite at step 3" in said and "--lr" in said and "checkpoint-2" in said
    assert all(torch.isfinite(t).all() for t in twig_of(tmp_path / "out/checkpoint-2").values())
    assert run("whole", "--epochs", "1")[0] == run("out", "--epochs", "1")[0] == 0
    assert equal(twig_of(tmp_path / "whole"), twig_of(tmp_path / "out"))


@pytest.mark.parametrize("part", ["base", "twig"])
def test_weights_that_are_no_numbers_are_not_a_matter_of_the_learning_rate(run, world, tmp_path, part):
    """Nothing is learnt from them, and they are named."""
    vlm = twigvlm.load(world / "base")
    save_twig(grow(vlm.trunk, TwigConfig(6, 2, 2)), vlm.trunk, tmp_path / "twig", "tiny")
    shutil.copytree(world / "base", tmp_path / "base")
    file = tmp_path / part / "model.safetensors"
    state = load_file(file)
    name = next(k for k in state if k.endswith("layers.1.self_attn.k_proj.weight") and "vision" not in k)
    state[name][0, 0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    flags = ["--init", str(tmp_path / "twig")] if part == "twig" else []
    code, said = run("out", "--K", "2", "--T", "2", *flags, base=tmp_path / "base")
    assert code == 1 and f"layer 1 of the {part} are not finite" in said and name in said, said
    assert "--lr" not in said and "Traceback" not in said


@slow
def test_gradients_that_are_no_numbers(run, tmp_path, monkeypatch):
    real = torch.Tensor.backward

    def backward(self, *args, **kwargs):
        real(self, *args, **kwargs)
        backward.count += 1
        if backward.count == 5:
            backward.twig.lm_head.weight.grad.fill_(float("inf"))

    backward.count = 0
    original = TwigLesson.__init__

    def init(self, base, twig, *args):
        backward.twig = twig
        original(self, base, twig, *args)

    monkeypatch.setattr(TwigLesson, "__init__", init)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    code, said = run("out", "--epochs", "1")
    assert code == 1 and "gradient norm" in said and "checkpoint-2" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "fault",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
     RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to allocate")],
)  # fmt: skip
def test_out_of_memory(run, tmp_path, fault):
    with pytest.MonkeyPatch.context() as patch:
        spoiled(patch, 6, fault)
        code, said = run("out", "--epochs", "1", "--save-steps", "1")
    assert code == 1 and "Traceback" not in said, said
    assert "out of memory at step 3" in said and "--per-device-batch 1" in said and "checkpoint-2" in said
    flags = ["--epochs", "1", "--save-steps", "1"]
    assert run("out", *flags, "--per-device-batch", "1")[0] == 0  # what the message says does work


def test_a_full_disk(run, tmp_path, monkeypatch):
    """Whichever library meets it: nothing of the last checkpoint is lost, and the run goes on when there is room."""
    flags = ["--epochs", "1", "--save-steps", "2"]
    assert run("whole", *flags)[0] == 0
    real = torch.save
    for fault in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] . file write failed")):
        with pytest.MonkeyPatch.context() as patch:

            def save(state, file, *args, fault=fault, **kwargs):
                if "checkpoint-4" in str(file):
                    Path(file).write_bytes(b"half")
                    raise fault
                return real(state, file, *args, **kwargs)

            patch.setattr(torch, "save", save)
            code, said = run("out", *flags)
        assert code == 1 and "Traceback" not in said, said
        assert "checkpoint of step 4" in said and "MiB free" in said and "last whole checkpoint" in said
        assert checkpoints.last_whole(tmp_path / "out")[0].name == "checkpoint-2"
        assert not (tmp_path / "out/.saving").exists()
    assert run("out", *flags)[0] == 0
    assert equal(twig_of(tmp_path / "whole"), twig_of(tmp_path / "out"))


# ---------------------------------------------------------------------- clear errors


def test_the_folder_of_another_run_is_refused(run, tmp_path):
    assert run("out", "--epochs", "1")[0] == 0
    before = {
        p: p.stat().st_mtime_ns
        for p in (tmp_path / "out").rglob("*")
        if p.is_file() and p.name not in (".lock", ".token")
    }
    for flags, name in ((("--lr", "2e-2"), "lr"), (("--T", "2"), "T"), (("--seed", "1"), "seed"), (("--batch-size", "8"), "batch_size")):  # fmt: skip
        code, said = run("out", "--epochs", "1", *flags)
        assert code == 2 and "another run" in said and f" {name} is" in said and str(tmp_path / "out") in said
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_folder_with_other_things_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("precious")
    code, said = run("out")
    assert code == 2 and "thesis.tex" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) in ([".lock", "thesis.tex"], ["thesis.tex"])
    (tmp_path / "file").write_text("")
    assert run("file")[0] == 2


def test_a_folder_in_use_is_refused(run, tmp_path):
    lock = checkpoints.occupy(tmp_path / "out")
    code, said = run("out")
    assert code == 2 and "another training is writing there" in said
    lock.release()


def test_machines_that_do_not_share_the_folder(tmp_path):
    with checkpoints.occupy(tmp_path / "here"):
        token = (tmp_path / "here/.token").read_text()
        checkpoints.same_folder(tmp_path / "here", token, patience=0)
        with checkpoints.occupy(tmp_path / "there"), pytest.raises(InputError, match="shared file system"):
            checkpoints.same_folder(tmp_path / "there", token, patience=0)


def test_other_data_under_the_same_name_is_another_run(run, world, tmp_path):
    data = tmp_path / "data.json"
    shutil.copy(world / "data.json", data)
    assert run("out", "--epochs", "1", data=data)[0] == 0
    records = json.loads(data.read_text())
    records[3]["conversations"][1]["value"] = "the red ring"
    data.write_text(json.dumps(records))
    code, said = run("out", "--epochs", "1", data=data)
    assert code == 2 and "data is" in said


@pytest.mark.parametrize(
    "text,word", [("", "empty"), ("[]", "no samples"), ('[{"id": 1', "broken JSON"), (None, "no such file")]
)
def test_bad_data_files(run, tmp_path, text, word):
    file = tmp_path / "bad.json"
    if text is not None:
        file.write_text(text)
    code, said = run("out", data=file)
    assert code == 2 and word in said and said.count("error:") == 1 and "Traceback" not in said


def test_wrong_folders(run, world, tmp_path):
    assert run("out", base=tmp_path / "no base")[0] == 2
    code, said = run("out", "--images", str(tmp_path / "none"))
    assert code == 2 and "no such folder" in said
    (tmp_path / "empty").mkdir()
    code, said = run("other", "--images", str(tmp_path / "empty"))
    assert code == 2 and "image missing: 18" in said and "skipped.jsonl" in said
    assert "Traceback" not in said


def test_nothing_usable(run, tmp_path):
    file = tmp_path / "useless.json"
    file.write_text(json.dumps([{"id": 1, "conversations": [{"from": "human", "value": "hm?"}]}] * 3))
    code, said = run("out", "--max-skipped", "1", data=file)
    assert code == 2 and "none of its 3 samples can be used" in said


@pytest.mark.parametrize("flags", [("--lr", "0"), ("--batch-size", "0"), ("--precision", "int8"), ("--zero", "7"), ("--wandb",),
                                   ("--export-release", "x.bin"), ("--bogus",), ("--random", "3x4", "--base", "b")])  # fmt: skip
def test_bad_flags_exit_with_2(run, flags):
    try:
        code, said = run("out", *flags)
    except SystemExit as stop:  # argparse's way
        code, said = stop.code, ""
    assert code == 2 and "Traceback" not in said


@given(st.integers(1, 512), st.integers(1, 64), st.none() | st.integers(1, 64), st.integers(1, 8))
def test_a_batch_is_split_exactly_or_refused(batch, processes, rows, usual):
    try:
        found, accumulation = split_batch(batch, processes, rows, usual)
    except InputError as fault:
        assert batch % processes or (rows and (batch // processes) % rows)
        assert "choose" in str(fault)
        return
    assert found * accumulation * processes == batch
    assert found == rows or (rows is None and found <= usual)


def test_a_log_line_that_a_kill_cut_short(tmp_path):
    report.Report(tmp_path, "base").start(0)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    told = report.Report(tmp_path, "base")
    told.start(1)
    logs = {
        "loss": 1.0,
        "learning_rate": 0.1,
        "samples_per_second": 1.0,
        "tokens_per_second": 9.0,
        "waiting_share": 0.0,
    }
    told.step(2, 4, logs)
    assert [(t["step"], t["loss"]) for t in report.history(tmp_path)] == [(1, 2.0), (2, 1.0)]


def test_settings_of_the_paper_and_of_the_embedded_base():
    paper = Settings(base="x")
    assert (paper.lr, paper.betas, paper.warmup, paper.epochs, paper.weight_decay, paper.batch_size, paper.schedule) == (
        1e-4, [0.9, 0.98], 0.03, 1.0, 0.0, 128, "cosine",
    )  # fmt: skip
    assert Settings().batch_size == EMBEDDED_PRESET["batch_size"] and Settings(lr=3e-4).lr == 3e-4


# ---------------------------------------------------------------------- processes


@pytest.mark.parametrize(
    "nodes,first",
    [
        ("gpu1", "gpu1"),
        ("gpu[03-05,9],big1", "gpu03"),
        ("a,b", "a"),
        ("rack1-node[7]", "rack1-node7"),
        ("n[1-2]-x", "n1-x"),
    ],
)
def test_the_first_of_slurms_hosts(nodes, first):
    assert ranks.first_host(nodes) == first


def test_slurm_is_understood():
    env = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
           "SLURM_JOB_NODELIST": "n[2-5]", "SLURM_JOB_ID": "123456"}  # fmt: skip
    assert ranks.find(env) == ranks.Ranks(3, 8, 1)
    assert env["MASTER_ADDR"] == "n2" and 1024 < int(env["MASTER_PORT"]) < 65536
    assert ranks.find({}) == ranks.Ranks(0, 1, 0)
    assert (
        ranks.find({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}).rank
        == 1
    )


# ---------------------------------------------------------------------- the plan


def planned(capsys, *flags: str) -> dict:
    assert train.main(["--dry-run", *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_plan_of_7b(capsys):
    told = planned(capsys, "--base", "liuhaotian/llava-v1.5-7b", "--devices", "8")
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert told["trainable_parameters"] == 3 * layer + 4096 + 32000 * 4096
    assert round(told["trainable_parameters"] / 1e6) == 738
    assert told["layers_loaded"] == [0, 1, 2, 3, 4] and told["L"] == 32
    assert told["per_device_batch"] * told["accumulation"] * 8 == told["batch_size"] == 128
    assert told["steps"] == -(-told["samples"] // 128)
    assert told["flops_per_sample"].keys() == {"tower", "trunk", "twig"}
    assert told["largest_batch"].keys() == {"24", "40", "80"}
    work = told["flops_per_sample"]
    assert work["trunk"] == pytest.approx(2 * 2 * layer * told["tokens_per_sample"], rel=0.05)
    assert work["twig"] > 3 * work["trunk"]


@pytest.mark.parametrize("name", ["liuhaotian/llava-v1.5-7b", "llava-hf/llava-1.5-7b-hf"])
def test_7b_fits_a_single_card_of_24_gb(capsys, name):
    """The arithmetic, from parameters counted on a model without data."""
    told = planned(capsys, "--base", name, "--K", "2", "--T", "3", "--devices", "1", "--per-device-batch", "1")
    assert all(told["fits_24_gb"].values())
    assert told["memory"]["none"]["total_bytes"] < 24e9 and told["memory"]["3_offload"]["total_bytes"] < 10e9
    P, frozen = told["trainable_parameters"], told["frozen_parameters"]
    counted = sum(told["parameters"].values())
    assert counted == P + frozen
    assert told["memory"]["none"]["fixed_bytes"] == 2 * frozen + 18 * P + plan.RESERVE
    assert told["memory"]["2"]["fixed_bytes"] == 2 * frozen + 20 * P + plan.BUCKETS + plan.RESERVE


def test_more_devices_need_less_each(capsys):
    one, eight = (planned(capsys, "--random", "llava-1.5-7b", "--devices", n) for n in ("1", "8"))
    for stage in ("2", "3"):
        assert eight["memory"][stage]["fixed_bytes"] < 0.6 * one["memory"][stage]["fixed_bytes"]
    assert one["largest_batch"]["24"] < one["largest_batch"]["40"] < one["largest_batch"]["80"]


def test_a_plan_needs_no_weights(world, tmp_path, capsys, golden, read_keys):
    shutil.copytree(world / "base", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    told = planned(capsys, "--base", str(tmp_path / "bare"), "--data", str(world / "data.json"), "--K", "1", "--T", "2")
    assert told["layers_loaded"] == [0, 1, 2] and told["samples"] == 24
    prepared = prepare_twig(world / "base", Start(1, 2), CPU, FP32)
    assert told["trainable_parameters"] == sum(p.numel() for p in prepared.twig.parameters())
    assert told["frozen_parameters"] == sum(p.numel() for p in prepared.base.model.parameters())
    read_keys.clear()
    assert planned(capsys, "--base", str(golden / "A/base"))["L"] == 8
    assert not read_keys
    assert train.main(["--dry-run", "--random", "llava-1.5-7b", "--K", "30", "--T", "3"]) == 2


@pytest.mark.parametrize("stage", ["none", "2"])
def test_the_memory_of_a_layer_is_what_autograd_keeps(stage):
    """Bytes per token, by difference of two lengths: fp32 weights under autocast, and pure bf16."""
    twig = TwigConfig(6, 2, 1)
    trunk = load_trunk_for_memory()
    layer = trunk.layers[2].float() if stage == "none" else trunk.layers[2].bfloat16()
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def kept(tokens: int) -> int:
        seen = {}

        def note(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hidden = torch.randn(1, tokens, trunk.model.config.text_config.hidden_size).bfloat16().requires_grad_()
        rotary = trunk.decoder.rotary_emb(hidden, torch.arange(tokens)[None])
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=stage == "none"),
        ):
            out = layer(hidden, attention_mask=None, position_embeddings=rotary)
        assert out.requires_grad
        return sum(seen.values())

    text = trunk.model.config.text_config
    measured = (kept(384) - kept(128)) / 256
    told = plan.kept_by_layer(text.hidden_size, text.intermediate_size, stage)
    assert told <= measured <= 1.15 * told, (told, measured, twig)


def load_trunk_for_memory():
    from twigvlm.families import trunk_of
    from twigvlm.loading.random import random_base

    model = random_base("512x3", CPU, FP32, layers=3)
    return trunk_of(model.requires_grad_(True))


def test_layers_that_are_needed():
    assert layers_needed(TwigConfig(32, 2, 3), "base") == [0, 1, 2, 3, 4]
    assert layers_needed(TwigConfig(32, 2, 3), "random") == [0, 1, 2, 3, 4]
    assert layers_needed(TwigConfig(32, 2, 3), "last") == [0, 1, 29, 30, 31]


def test_an_encoded_sample_is_what_is_trained_on(world):
    """The set's records are all usable: what the tests above count on."""
    assert not any(isinstance(encode(r, tiny_tokenizer(), 512, 4), Skipped) for r in Records(world / "data.json"))


# ---------------------------------------------------------------------- DeepSpeed's files


def zero_file(tmp_path: Path, text: str | None = None, **config) -> str:
    sizes = {"stage": 2, "reduce_bucket_size": "auto", "allgather_bucket_size": "auto"}
    whole = {"train_batch_size": "auto", "zero_allow_untested_optimizer": True, "zero_optimization": sizes, **config}
    (tmp_path / "zero.json").write_text(json.dumps(whole) if text is None else text)
    return str(tmp_path / "zero.json")


def test_sizes_of_a_deepspeed_file(tmp_path):
    stage3 = {"stage": 3, "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    file = Path(zero_file(tmp_path, zero_optimization=stage3, train_micro_batch_size_per_gpu=2))
    config = zero.settle(file, 32, 2, 3, 4, Settings(), False)
    assert config["zero_optimization"] == {
        "stage": 3, "stage3_prefetch_bucket_size": 921, "stage3_param_persistence_threshold": 320
    }  # fmt: skip
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (24, 3)
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        with pytest.raises(InputError, match=rf'zero\.json: {name} is 7, and this run has .*"auto"'):
            zero.settle(Path(zero_file(tmp_path, **{name: 7})), 32, 2, 3, 4, Settings(), False)
    for told in ({"gradient_clipping": 7.0}, {"bf16": {"enabled": True}}, {"scheduler": {"type": "WarmupLR"}},
                 {"optimizer": {"type": "AdamW", "params": {"lr": 3.0}}}):  # fmt: skip
        with pytest.raises(InputError, match=r"zero\.json: .*(7\.0|enabled is True|scheduler|lr is 3\.0)"):
            zero.settle(Path(zero_file(tmp_path, **told)), 32, 2, 3, 4, Settings(), False)
    with pytest.raises(InputError, match="sub_group_size"):
        zero.settle(
            Path(zero_file(tmp_path, zero_optimization={"stage": 3, "sub_group_size": "auto"})),
            32,
            2,
            3,
            4,
            Settings(),
            False,
        )


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"bf16": True}, ['"bf16" is True', "enabled"]),
        ({"bf16": [1]}, ['"bf16" is [1]']),
        ({"amp": {"enabled": True, "opt_level": "O1"}}, ['"amp" is enabled', "take it out"]),
        ({"amp": 1}, ['"amp" is 1']),
        ({"zero_optimisation": {"stage": 3}}, ['no "zero_optimisation"', "write zero_optimization"]),
        ({"_note": "mine"}, ['no "_note"', "take it out"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": 1}}}, ['"scheduler"']),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["fp16.enabled is True", "--precision"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled is True"]),
        ({"optimizer": None}, ['"optimizer" is None']),
        ({"optimizer": ["AdamW"]}, ['"optimizer" is [']),
        ({"optimizer": {"type": "AdamW", "params": None}}, ['"optimizer.params" is None']),
        ({"optimizer": {"type": "SGD"}}, ["optimizer.type is 'SGD'", "AdamW or Adam"]),
        ({"optimizer": {"type": "auto"}}, ["optimizer.type is 'auto'"]),
        ({"optimizer": {"params": {}}}, ["optimizer.type is None"]),
        ({"optimizer": {"type": "AdamW", "params": {"momentum": "auto"}}}, ['optimizer.params.momentum is "auto"']),
        ({"zero_optimization": None}, ['"zero_optimization" is None']),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "auto"}}},
            ["offload_optimizer.device is 'auto'", "cpu"],
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "foo"}}}, ["offload_param.device is 'foo'"]),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, ["\"offload_param\" is 'cpu'"]),
        ({"steps_per_print": "auto"}, ['steps_per_print is "auto"']),
        (
            {"activation_checkpointing": {"partition_activations": "auto"}},
            ["activation_checkpointing.partition_activations"],
        ),
    ],
)
def test_parts_of_a_deepspeed_file_that_cannot_be(tmp_path, told, words):
    with pytest.raises(InputError) as fault:
        zero.settle(Path(zero_file(tmp_path, **told)), 32, 2, 3, 4, Settings(), True)
    said = str(fault.value)
    assert said.startswith(str(tmp_path / "zero.json")) and all(word in said for word in words), said


def test_llavas_own_deepspeed_file_is_taken(tmp_path):
    fp16 = {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "min_loss_scale": 1,
    }
    params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    warmup = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
    told = {"fp16": fp16, "bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": params}}
    told["scheduler"] = {"type": "WarmupLR", "params": warmup}
    found = zero.settle(Path(zero_file(tmp_path, **told)), 32, 2, 3, 4, Settings(), True)
    assert found["fp16"]["enabled"] is False and found["bf16"]["enabled"] is True
    for other in (told, told | {"optimizer": {"type": "adamw"}}):
        found = zero.settle(Path(zero_file(tmp_path, **other)), 32, 2, 3, 4, Settings(), True)
        assert found["optimizer"]["type"] == "AdamW" and "scheduler" not in found
        assert found["optimizer"]["params"] == {
            "lr": Settings().lr, "betas": list(Settings().betas), "eps": zero.EPSILON, "weight_decay": Settings().weight_decay
        }  # fmt: skip


def test_what_deepspeed_itself_refuses_is_told_in_a_line(tmp_path, monkeypatch):
    class DeepSpeedConfigError(Exception):
        """As DeepSpeed has it: no ValueError."""

    def refuse(*_):
        raise DeepSpeedConfigError("has been\nremoved")

    one = SimpleNamespace(
        settings=Settings(), zero=tmp_path / "zero.json", out=tmp_path, device="cpu", ranks=None, form={}
    )
    text = SimpleNamespace(text_config=SimpleNamespace(hidden_size=8))
    base = SimpleNamespace(model=SimpleNamespace(config=text))
    prepared = SimpleNamespace(module=torch.nn.Linear(1, 1), base=base)
    subject = SimpleNamespace(lesson=lambda *_: None)
    for name in ("StepTimes", "_plan", "Learner", "TwigWatch", "has_adapters"):
        monkeypatch.setattr(train, name, lambda *_: None)
    monkeypatch.setattr(train, "Loop", refuse)
    with pytest.raises(
        InputError, match=r"zero\.json: not a DeepSpeed configuration for this run \(has been removed\)"
    ):
        train._loop(one, prepared, None, None, SimpleNamespace(facts={}), None, subject)


def test_parts_of_a_deepspeed_file_that_are_null_or_off(tmp_path):
    sizes = {"stage": 3, "offload_optimizer": None, "offload_param": None}
    off = {"enabled": False, "opt_level": "auto"}
    file = Path(zero_file(tmp_path, fp16=None, bf16=None, scheduler=None, amp=off, zero_optimization=sizes))
    found = zero.settle(file, 32, 2, 3, 4, Settings(), True)
    assert found["zero_optimization"] == {"stage": 3} and found["bf16"] == {"enabled": True}
    assert not {"fp16", "amp", "scheduler"} & {*found}


@pytest.mark.parametrize(
    "data", [b"\x1f\x8b\x08", "{}".encode("utf-16"), b"{" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_deepspeed_file_that_is_no_json_is_told_in_a_line(tmp_path, data):
    file = tmp_path / "zero.json"
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"zero\.json: (is|not a DeepSpeed)") as fault:
        zero.read_zero(file)
    assert "\n" not in str(fault.value) and "set_int_max_str_digits" not in str(fault.value)
    with pytest.raises(InputError, match="is a pipe or a device"):
        zero.read_zero(Path("/dev/zero"))


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", "[]", '{"zero_optimization": 3}', '{"zero_optimization": {"stage": 7}}', "{" * 10, "\ufeff{"],
)
def test_deepspeed_files_that_are_none(run, tmp_path, text):
    pytest.importorskip("deepspeed")
    code, said = run("out", "--zero", zero_file(tmp_path, text))
    last = said.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "zero.json" in last and "Traceback" not in said


@slow
@pytest.mark.parametrize(
    "config,expected",
    [({"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "torch_adam": True}}}, 0),
     *(pytest.param(c, 2, marks=pytest.mark.nightly) for c in ({"train_batch_size": 64}, {"gradient_clipping": 7.0})),
     pytest.param({}, 0, marks=pytest.mark.nightly)],
)  # fmt: skip
def test_a_deepspeed_file_of_ones_own(world, tmp_path, config, expected):
    pytest.importorskip("deepspeed")
    words = [
        "--base",
        world / "base",
        "--data",
        world / "data.json",
        "--images",
        world / "images",
        "--out",
        tmp_path / "o",
    ]
    words += [
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--batch-size",
        "4",
        "--per-device-batch",
        "2",
        "--max-steps",
        "2",
        "--held-out",
        "0",
        "--workers",
        "0",
    ]
    done = warm.run(["-m", "twigvlm.training.train", *words, "--zero", zero_file(tmp_path, **config)], ROOT)
    assert done.returncode == expected, done.stderr
    if expected:
        [told] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "zero.json" in told and next(iter(config)) in told and "Traceback" not in done.stderr


@pytest.mark.slow
def test_without_fcntl_everything_is_imported(tmp_path):
    """As on Windows."""
    (tmp_path / "windows.py").write_text(
        "import importlib, pkgutil, sys, accelerate, matplotlib.pyplot\n"  # others have their own ways without it
        "from transformers import LlavaForConditionalGeneration, LlavaProcessor, Trainer\n"
        "sys.modules['fcntl'] = sys.modules['resource'] = None\nimport twigvlm\n"
        "for found in pkgutil.walk_packages(twigvlm.__path__, 'twigvlm.'):\n"
        "    if not found.name.endswith('lmms'): importlib.import_module(found.name)\n"
    )
    done = warm.run([tmp_path / "windows.py"], ROOT, os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- flags and files


def test_flags_keep_their_spellings():
    words = [
        "--base-model",
        "x",
        "--data-path",
        "d",
        "--image-folder",
        "i",
        "--output-dir",
        "o",
        "--learning-rate",
        "1e-3",
    ]
    words += ["--lora-rank", "4", "--lora_alpha", "3", "--no-tensorboard", "--compile", "--betas", "0.8", "0.9"]
    settings, args = parse([*words, "--drop-indices", "3,5", "--dry-run", "--local_rank", "1"], "")
    assert (settings.base, settings.data, settings.images, settings.out, settings.lr) == ("x", "d", "i", "o", 1e-3)
    assert (settings.lora_rank, settings.lora_alpha, settings.tensorboard, settings.compile) == (4, 3.0, False, True)
    assert (settings.betas, settings.drop_indices, args.dry_run) == ([0.8, 0.9], (3, 5), True)
    assert parse([], "")[0] == Settings()
    for one in fields(Settings):
        assert one.metadata["help"], one.name


@pytest.mark.parametrize("words", [["--betas", "0.9"], ["--betas", "1", "0.9"], ["--drop-indices", "a"]])
def test_flags_that_are_no_numbers(words):
    with pytest.raises((InputError, SystemExit)):
        parse(words, "")


def documented(heading: str, table: str = "field") -> set[str]:
    """The fields in a table of docs/formats.md."""
    text = (ROOT / "docs/formats.md").read_text().split(f"### {heading}\n")[1].split("\n### ")[0]
    rows = text.split(f"| {table} | |\n")[1].split("\n\n")[0].splitlines()[1:]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_a_run_writes_what_is_documented_and_its_settings_make_it_again(run, tmp_path):
    assert run("out", "--epochs", "1", "--held-out", "2", "--warmup", "0.1")[0] == 0
    out = tmp_path / "out"
    from_the_hub = {"base_revision"}
    facts = json.loads((out / "twig_config.json").read_text())
    assert facts.keys() == documented("twig_config.json") - from_the_hub and not facts.keys() & from_the_hub
    stored = json.loads((out / "run.json").read_text())
    assert stored["identity"].keys() == documented("run.json", "field of `identity`")
    assert stored["finished"].keys() == documented("run.json", "field of `finished`")
    assert report.history(out)[-1].keys() == documented("log.jsonl")
    seal = json.loads((checkpoints.checkpoints(out)[0] / "whole.json").read_text())
    assert seal.keys() == documented("A checkpoint")
    assert quietly(["--config", str(out / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert equal(twig_of(out), twig_of(tmp_path / "again"))
    (tmp_path / "odd.yaml").write_text("lerning_rate: 1\n")
    with pytest.raises(SystemExit) as stop:
        quietly(["--config", str(tmp_path / "odd.yaml")])
    assert stop.value.code == 2
