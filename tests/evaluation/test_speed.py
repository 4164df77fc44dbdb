"""The speed benchmark: its figures are consistent, simulated ones are labelled, bad input is refused."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import IMAGE, one, tiny

from twigvlm.config import GenerationSettings
from twigvlm.decoding.choose import Chooser
from twigvlm.decoding.draft import DraftTree, chain, walk
from twigvlm.evaluation import speed
from twigvlm.loading.random import random_config


def run(capsys, *flags: str) -> tuple[dict, str]:
    assert speed.main(["--repeats", "1", "--prompts", "1", "--device", "cpu", *flags]) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_random_model_is_measured_and_simulation_is_labelled(capsys, tmp_path):
    target = tmp_path / "speed.json"
    facts, text = run(
        capsys, "--random", "64x8", "--tokens", "12", "-R", "200", "--assume-acceptance", "1", "--out", str(target)
    )
    assert json.loads(target.read_text()) == facts
    rows = {row["method"]: row for row in facts["rows"]}
    assert rows["stock generate"]["tokens"] == rows["plain"]["tokens"] == 12
    assert all("simulated" in name for name in rows if "SSD" in name)
    assert all(row["accepted %"] == 100 for name, row in rows.items() if "SSD" in name)
    assert rows["stock generate"]["x stock generate"] == 1 and rows["plain"]["x plain"] == 1
    assert rows["plain + TTP"]["x plain + TTP"] == 1 and facts["draft_length"] == 5
    band = facts["bandwidth"]
    assert band["limit_tokens_per_s"] == pytest.approx(band["measured_GB_per_s"] / band["weights_GB"])
    assert {"draft 1 token", "verify 1 token", "verify 8 tokens"} <= facts["step_ms"].keys()
    assert {"model", "R", "threads", "torch", "transformers", "device", "commit"} <= facts.keys()
    assert re.search(r"^\| method +\| ", text, re.M)


def test_figures_outlive_a_table_that_cannot_be_made(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    facts = {"rows": [{"method": "plain"}], "letters": {}, "cores_taken_by_others": None, "bandwidth": {}}
    facts |= dict.fromkeys(("model", "dtype", "attention", "device", "threads", "torch", "transformers"), "x") | {
        "R": 1
    }
    monkeypatch.setattr(speed, "measure", lambda args: facts)
    assert speed.main(["--out", str(tmp_path / "speed.json")]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == json.loads((tmp_path / "speed.json").read_text()) == facts
    assert "pip install tabulate" in err


def test_drafts_as_long_as_they_pay(capsys):
    facts, _ = run(capsys, "--random", "64x8", "--tokens", "6", "-R", "200", "--draft-length", "auto")
    rows = {row["method"]: row for row in facts["rows"]}
    assert facts["draft_length"] == "auto"
    assert {"SSD auto", "SSD auto + TTP"} <= rows.keys() and "SSD" not in rows
    assert rows["SSD auto"]["tokens"] == 6


@pytest.mark.slow
def test_trees_stand_beside_the_chain(capsys):
    facts, text = run(
        capsys, "--random", "64x8", "--tokens", "12", "-R", "200", "--tree", "2,2,3,6", "--trees", "3;2;2;4", "2,2,3,6", "auto",
        "--assume-acceptance", "0.9",
    )  # fmt: skip
    rows = {row["method"].partition(" (")[0]: row for row in facts["rows"]}
    assert {"SSD", "SSD + TTP", "SSD tree 2,2,3,6", "SSD tree 3,2,2,4 + TTP", "SSD tree auto"} <= rows.keys() and len(
        rows
    ) == 11
    for name, row in rows.items():
        assert (row["x chain"] is not None) == ("tree" in name)
        if "auto" in name:
            assert row["tokens/step"] >= 1  # and whether any draft pays is the machine's business
        elif "SSD" in name:
            assert row["tokens/step"] >= 1 and row["hits by depth"][0] > 0.5
        else:
            assert row["tokens/step"] is None and row["hits by depth"] == []
    assert rows["SSD tree 2,2,3,6"]["tokens/step"] <= 4 < rows["SSD"]["tokens/step"]
    assert "SSD tree 3,2,2,4 (simulated: acceptance 0.9 by coin): right at each depth" in text


@pytest.mark.slow
def test_short_answers(capsys):
    facts, _ = run(capsys, "--short", "--draft-length", "2", "--tokens", "6")
    assert facts["short"] and facts["draft_length"] == 2
    rows = {row["method"]: row for row in facts["rows"]}
    assert rows["stock generate"]["tokens"] == rows["plain"]["tokens"] == 1, "an end token is no word"


def test_every_run_has_its_own_luck(monkeypatch):
    """One coin for all runs would make a figure of its first few tosses."""
    seeds = []
    monkeypatch.setattr(speed, "CoinChooser", lambda settings, coin, seed: seeds.append(seed) or Chooser(settings))
    vlm = tiny()
    options = {"retained_tokens": 2, "draft_length": 5, "max_new_tokens": 2}
    bench = speed.Bench(vlm, options, [one(vlm, 3, IMAGE, 2)] * 2, True, 0.5)
    bench.run(2)
    assert seeds[2:] == [1, 1, 2, 2, 3, 3, 4, 4], "SSD and SSD + TTP share it"


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_the_coin_accepts_as_often_as_it_is_told(probability):
    chooser = speed.CoinChooser(GenerationSettings(), probability, seed=1)
    logits = torch.zeros(1, 2, 5)
    draft = chain(torch.tensor([[3]]), torch.ones(1, 1), torch.tensor([1]))
    accepted = sum(int(walk(draft, chooser.judge(logits, draft, []))[0, 0]) == 0 for _ in range(2000))
    assert accepted / 2000 == pytest.approx(probability, abs=0.04)


def test_the_coin_reads_a_tree_at_once(monkeypatch):
    """On the meta device there is nothing to read but by `fetch`."""
    reads = []
    monkeypatch.setattr("twigvlm.evaluation.coin.fetch", lambda t: reads.append(t.shape) or np.zeros(t.shape, int))
    there = {"dtype": torch.long, "device": "meta"}
    tree = DraftTree(*(torch.empty(2, 4, **there) for _ in range(3)), torch.empty(2, **there), 2)
    choice = speed.CoinChooser(GenerationSettings(), 0.6).judge(torch.empty(2, 5, 9, device="meta"), tree, [])
    assert choice.shape == (2, 5) and reads == [(2, 5 + 4 + 4 + 1)]


def test_the_coin_is_thrown_for_each_child_of_a_tree():
    """In their order, until one is right; else the base says something that is none of them."""
    chooser = speed.CoinChooser(GenerationSettings(), 0.6, seed=1)
    tree = DraftTree(
        torch.tensor([[3, 4, 1, 2]]), torch.tensor([[-1, -1, 0, 1]]), torch.ones(1, 4), torch.tensor([4]), 2
    )
    counts = torch.zeros(3)
    for _ in range(2000):
        path = walk(tree, chooser.judge(torch.zeros(1, 5, 9), tree, []))[0].tolist()
        counts[path[0]] += 1  # -1 is the last
    assert (counts / 2000).tolist() == pytest.approx([0.6, 0.4 * 0.6, 0.4 * 0.4], abs=0.04)
    token, believed = chooser.branch(torch.randn(1, 2, 9), [], torch.zeros(1, 2, 0, dtype=torch.long), 3, 9)
    assert token.shape == (1, 2, 3) and believed[0, 1].exp().tolist() == pytest.approx([0.6, 0.24, 0.096])


def test_named_shapes_are_llavas():
    small, large = random_config("llava-1.5-7b"), random_config("llava-1.5-13b")
    assert (small.text_config.hidden_size, small.text_config.num_hidden_layers) == (4096, 32)
    assert (large.text_config.hidden_size, large.text_config.num_hidden_layers) == (5120, 40)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--random", "huge"], ["huge", "WIDTHxLAYERS"]),
        (["--random", "64x8", "--base-model", "x/y"], ["--random"]),
        (["--random", "64x8", "--assume-acceptance", "2"], ["2", "0 to 1"]),
        (["--random", "64x4"], ["K + T", "L = 4"]),
        (["--draft-length", "-1"], ["draft_length", "-1", "auto"]),
        (["--random", "64x8", "--short"], ["--short"]),
        (["--random", "64x8", "--tree", "2,2"], ["tree", "E,W,D,N"]),
        (["--random", "64x8", "--trees", "auto", "2,2,3,60"], ["N is 60", "10 nodes"]),
    ],
)
def test_bad_flags_are_refused(flags, words, capsys):
    assert speed.main(["--device", "cpu", *flags]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
