"""The plan of TwigVLM++'s stages: parameters and operations against those of real models."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, write_base
from torch.utils.flop_counter import FlopCounterMode

from training.test_training import CPU, FP32
from twigvlm.training import train
from twigvlm.training.cost import count, flops, staged
from twigvlm.training.data.examples import IGNORE
from twigvlm.training.plus import cost
from twigvlm.training.plus.cost import stage_flops
from twigvlm.training.plus.subject import PolicyLesson, distil_of, policy_of
from twigvlm.training.settings import Settings
from twigvlm.training.twig import Start, TwigLesson, prepare_twig

SEVEN_B = ("--dry-run", "--base", "liuhaotian/llava-v1.5-7b", "--devices", "8")
BEFORE, AFTER, ANSWERS = 40, 60, 20


def planned(capsys, *flags: str) -> dict:
    assert train.main([*SEVEN_B, *flags]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_the_plans_of_7b(capsys):
    plain, one, two = (planned(capsys, "--stage", stage) for stage in ("0", "1", "2"))
    assert one["parameters"]["pruning_head"] == two["trainable_parameters"] == 2 * 4096**2
    assert one["trainable_parameters"] == plain["trainable_parameters"] + 2 * 4096**2
    assert one["layers_loaded"] == list(range(32)) and two["steps"] == 500
    for told in (one, two):
        assert sum(told["parameters"].values()) == told["trainable_parameters"] + told["frozen_parameters"]
        assert told["memory"]["2"]["fixed_bytes"] > plain["memory"]["2"]["fixed_bytes"] + 5e9  # the whole base
    # 41 passes of 1 layer against 11, and the tower: arXiv 2503.14075v3 says twice the time
    assert 3 < sum(one["flops_per_sample"].values()) / sum(plain["flops_per_sample"].values()) < 3.8
    pruned = planned(capsys, "--stage", "1", "--teacher", "pruned")["flops_per_sample"]
    assert pruned["teacher"] > one["flops_per_sample"]["teacher"]  # the attention still asks the unpruned base
    words = planned(capsys, "--stage", "1", "--teacher", "pruned", "--attention-weight", "0")["flops_per_sample"]
    assert words["teacher"] < 0.5 * one["flops_per_sample"]["teacher"]
    few = planned(capsys, "--stage", "2", "--groups", "8", "--budget", "64")["flops_per_sample"]
    assert few["rewards"] < 0.3 * two["flops_per_sample"]["rewards"] and "teacher" not in few
    assert "teacher" in planned(capsys, "--stage", "2", "--attention-weight", "1")["flops_per_sample"]


def test_stage_2_counts_samples_with_pictures(tmp_path, capsys):
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    file = tmp_path / "data.json"
    file.write_text(
        json.dumps([{"conversations": said}, *({"conversations": said, k: "x"} for k in ("image", "images"))])
    )
    samples = [planned(capsys, "--data", str(file), "--stage", stage)["samples"] for stage in ("0", "1", "2")]
    assert samples == [3, 3, 2]
    file.write_text(json.dumps([{"conversations": said}]))
    assert train.main([*SEVEN_B, "--data", str(file), "--stage", "2"]) == 2
    assert "none of 1 samples has a picture" in capsys.readouterr().err


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = tiny_model(
        vocabulary=len(tiny_tokenizer()), context=1024, hidden=128, heads=4, side=112, layers=8, attention="eager"
    )
    return write_base(tmp_path_factory.mktemp("wide") / "base", model)


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (1, {}),
        (1, {"teacher": "pruned", "attention_layer": 4}),
        (2, {"groups": 4, "budget": 24.0}),
        (2, {"groups": 2, "budget": 24.0, "reward": "fidelity", "attention_weight": 1.0, "attention_layer": 4}),
    ],
)
def test_operations_are_those_that_are_done(base, monkeypatch, stage, more):
    """Against torch's counter, which sees matrix products; attention must be eager for it to see them all."""
    monkeypatch.setattr(cost, "BEFORE", BEFORE)
    settings = Settings(base=str(base), stage=stage, K=2, T=2, **more)
    torch.manual_seed(0)
    start = Start(2, 2, pruning_head="released")
    prepared = prepare_twig(base, start, CPU, FP32, "eager", whole=True)
    V, tokens = prepared.base.V, BEFORE + prepared.base.V + AFTER
    ids = torch.randint(3, 60, (1, tokens))
    ids[0, BEFORE : BEFORE + V] = prepared.base.image_token_id
    labels = torch.where(torch.arange(tokens) >= tokens - ANSWERS, ids, IGNORE)
    batch = {"input_ids": ids, "labels": labels, "lengths": [tokens], "pixel_values": torch.randn(1, 3, 112, 112)}
    if stage == 1:
        lesson = TwigLesson(prepared.base, prepared.twig, distil_of(settings))
    else:
        prepared.twig.requires_grad_(False)
        prepared.twig.pruning_head.requires_grad_(True)
        lesson = PolicyLesson(prepared.base, prepared.twig, policy_of(settings))
    with FlopCounterMode(display=False) as counter:
        loss, _ = lesson({**batch, "progress": 0.5})
        loss.backward()
    counts = count(settings)
    told = flops(counts, 2, 2, tokens, ANSWERS, False)
    told["twig"] //= 3 if stage == 2 else 1
    total = sum((told | stage_flops(staged(counts, settings), settings, tokens, ANSWERS)).values())
    assert total == pytest.approx(counter.get_total_flops(), rel=0.15)
