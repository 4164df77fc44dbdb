"""What a run cost, from the figures beside its answers."""

from __future__ import annotations

import json

from twigvlm.evaluation.asking.costs import SUMMED, summary


def figures(**known) -> dict:
    empty = dict.fromkeys((*SUMMED, "images", "visual_measured", "visual_kept", "visual_twig_share", "cache_bytes"), 0)
    return empty | {"peak_memory_bytes": 0} | known


def test_plain_decoding_yields_one_token_a_verification_whatever_ends_the_answers(tmp_path):
    """Four rounds of which one wrote an end token, and three that the limit ended."""
    batches = [figures(questions=["a", "b"], tokens=3, steps=4), figures(questions=["c"], tokens=3, steps=3)]
    (tmp_path / "0_1.figures").write_text("".join(json.dumps(b) + "\n" for b in batches))
    assert summary(tmp_path, ["a", "b", "c"])["tokens_per_step"] == 1
    more = figures(questions=["d"], tokens=9, steps=3, drafted=10, accepted=6)
    with (tmp_path / "0_1.figures").open("a") as file:
        file.write(json.dumps(more) + "\n")
    assert summary(tmp_path, ["a", "b", "c", "d"])["tokens_per_step"] == (10 + 6) / 10


def test_without_verifications_there_is_no_mean(tmp_path):
    assert summary(tmp_path, [])["tokens_per_step"] is None
