"""The published twig with a pruning head: called by its name, and the plain twig in everything but its choice."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import ROOT
from safetensors.torch import load_file

import twigvlm
from twigvlm.config import pinned
from twigvlm.loading.describe import EMBEDDED_BASE, EMBEDDED_PLUS, EMBEDDED_TWIG
from twigvlm.model.twig import WEIGHTS
from twigvlm.sprout import publish


def test_it_is_called_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pinned(None, "sprout-plus", None, None) == (None, EMBEDDED_PLUS)
    assert pinned(None, "sprout-none", None, None)[1] == "sprout-none" and pinned(None, "", None, None)[1] == ""
    Path("sprout-plus").mkdir()
    assert pinned(None, "sprout-plus", None, None)[1] == "sprout-plus"  # a folder of one's own comes first


def test_it_is_the_plain_twig_with_a_head_that_chooses_otherwise():
    plain, plus = load_file(EMBEDDED_TWIG / WEIGHTS), load_file(EMBEDDED_PLUS / WEIGHTS)
    assert all(torch.equal(plus[name], tensor.half()) for name, tensor in plain.items())
    assert {name.split(".")[-2] for name in plus.keys() - plain.keys()} == {"q_gate", "k_gate"}
    kept = [
        twigvlm.load(None, twig).generate(
            **twigvlm.load().prepare(ROOT / "assets/image.png", "What is at the left?"), retained_tokens=64, max_new_tokens=1
        ).kept[0].tolist()
        for twig in (None, "sprout-plus")
    ]  # fmt: skip
    assert len(kept[0]) == len(kept[1]) == 41 and kept[0] != kept[1]


def test_all_that_is_published_stays_small():
    files = [file for place in (EMBEDDED_BASE, EMBEDDED_TWIG, EMBEDDED_PLUS) for file in place.iterdir()]
    assert sum(file.stat().st_size for file in files) < publish.LIMIT


def test_a_twig_without_a_head_is_not_published_as_one(capsys):
    assert publish.main(["--plus", str(EMBEDDED_TWIG)]) == 2
    assert "no pruning head" in capsys.readouterr().err
