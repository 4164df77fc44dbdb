"""The training loop: resumes bit for bit, never leaves half a checkpoint, stops at NaN."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from twigvlm.errors import RunError
from twigvlm.sprout.recipe import stage
from twigvlm.sprout.recipe.stage import StageConfig, fit
from twigvlm.training.run import checkpoints
from twigvlm.training.run.device import flushed_denormals
from twigvlm.training.run.loop import rates

CONFIG = StageConfig("toy", steps=30, lr=5e-2, workers=0, save_seconds=0)


def make_batch(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(128, 3, generator=generator), "step": step}


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.3), torch.nn.Linear(3, 1))


def loss_of(module, fail_at: int | None = None, nan_at: int | None = None):
    def loss_fn(batch):
        if batch["step"] == fail_at:
            raise KeyboardInterrupt
        loss = (module(batch["x"]).float() - batch["x"].sum(1, keepdim=True)).square().mean()
        return loss * (float("nan") if batch["step"] == nan_at else 1.0), {"twice": 2 * loss.item()}

    return loss_fn


def train(module, folder, **faults):
    fit(CONFIG, module, make_batch, loss_of(module, **faults), folder)
    return module.state_dict()


@pytest.mark.parametrize("fail_at", [0, 1, 17, 29])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, fail_at):
    whole = train(model(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(model(), tmp_path / "broken", fail_at=fail_at)
    resumed = train(model(), tmp_path / "broken")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "toy.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 30


def test_loss_falls_and_is_logged(tmp_path):
    train(model(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 30]
    assert lines[1]["loss"] < lines[0]["loss"]
    assert lines[0]["twice"] == pytest.approx(2 * lines[0]["loss"], rel=1e-3)


def test_nan_stops_with_the_last_good_checkpoint(tmp_path):
    with pytest.raises(RunError, match=r"toy: .*step 10.*checkpoint-9.*lower lr"):
        train(model(), tmp_path, nan_at=9)
    found, damaged = checkpoints.last_whole(tmp_path / "toy-saved")
    assert found.name == "checkpoint-9" and not damaged
    assert all(torch.isfinite(w).all() for w in load_file(found / "model.safetensors").values())


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        train(model(), tmp_path, fail_at=5)

    def full(state, file, *args, **more):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"checkpoint of step 6.*No space.*checkpoint-5"):
        train(model(), tmp_path)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "toy-saved").iterdir()] == ["checkpoint-5"]
    whole = train(model(), tmp_path / "whole")
    resumed = train(model(), tmp_path)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup"])
def test_rates_are_those_of_hugging_face(kind):
    """The names are theirs, and so is every value."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=5, num_training_steps=40)
    ours = rates(kind, 0.1, 40, 5)
    for step in range(40):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_what_does_not_learn_stays(tmp_path):
    module = model()
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    train(module, tmp_path)
    assert torch.equal(module[0].weight, before)


@pytest.mark.parametrize(("flags", "half"), [({"avx2", "fma"}, False), ({"avx512_bf16"}, True), ({"bf16"}, True)])
def test_bf16_is_used_where_the_processor_computes_in_it(tmp_path, monkeypatch, flags, half):
    """A processor without such instructions emulates them, eleven times slower than fp32."""
    monkeypatch.setattr(stage, "_cpu_flags", lambda: frozenset(flags))
    module, seen = model(), []

    def loss_fn(batch):
        out = module(batch["x"])
        seen.append(out.dtype)
        return out.float().square().mean(), {}

    fit(replace(CONFIG, steps=1), module, make_batch, loss_fn, tmp_path)
    assert seen == [torch.bfloat16 if half else torch.float32]


def test_who_trains_in_this_process_gets_its_arithmetic_back():
    """Hypothesis, for one, refuses to make numbers where the smallest ones are taken for zero."""
    smallest = sys.float_info.min
    with pytest.raises(RunError), flushed_denormals():
        with flushed_denormals():
            assert smallest / 2 == 0
        assert smallest / 2 == 0
        raise RunError("stopped")
    assert smallest / 2 > 0
