"""What descriptions say of drafts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from twigvlm.sprout import quiz
from twigvlm.world.scenes import sample_scene


@pytest.mark.parametrize("accepted, tau", [(0, 1), (8, 3)])
def test_what_a_verification_of_a_description_yields(monkeypatch, accepted, tau):
    """The end token is not written, and its verification counts like the others."""
    stats = SimpleNamespace(drafted=10, accepted=accepted, steps=4, new_tokens=3 + accepted)
    out = SimpleNamespace(tokens=[[]], stats=stats, steps=[[None] * 4])
    monkeypatch.setattr(quiz, "_described", lambda *_: out)
    monkeypatch.setattr(quiz, "decode", lambda *_: "")
    scenes = [sample_scene("test", seed) for seed in range(3)]
    assert quiz.descriptions(SimpleNamespace(tokenizer=None), scenes, quiz.Setting()).tau == tau
