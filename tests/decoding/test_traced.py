"""What is noted of the road for those who draw it, and that noting changes nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import IMAGE, batch, one, prompts, spec_of, tiny

from twigvlm.pruning import METHODS


@pytest.mark.parametrize("manner", [{}, {"tree": "2,2,3,6"}, {"draft_length": 0}, {"draft_length": "auto"}])
def test_tracing_changes_nothing(manner):
    vlm = tiny(side=56)
    options = one(vlm, 3, IMAGE, 4) | {"retained_tokens": 8, "max_new_tokens": 10, "eos_token_id": [], **manner}
    plain, traced = vlm.generate(**options), vlm.generate(**options, traced=True)
    assert plain.tokens == traced.tokens and plain.kept[0].equal(traced.kept[0])
    assert plain.scores is None and all(step.seconds is None and not step.believed for step in plain.steps[0])
    spent = 0.0
    for step in traced.steps[0]:
        drafting, verifying = step.seconds
        assert verifying > 0 and (drafting > 0) == bool(step.drafted)
        spent += drafting + verifying
    assert spent <= traced.stats.prefill_seconds + traced.stats.decode_seconds


@pytest.mark.parametrize("manner", [{}, {"tree": "2,2,3,6"}, {"draft_length": 0}, {"do_sample": True, "seed": 3}])
def test_every_token_has_the_probability_that_the_base_gives_it(manner):
    """In a batch of unequal acceptance, with answers cut by an end token and by a limit."""
    vlm = tiny(side=56, fade=0.3)
    given = batch(*prompts(vlm, [(3, IMAGE, 4), (5,), (IMAGE, 2, IMAGE, 3)])) | {"retained_tokens": 8}
    limits = {"max_new_tokens": [9, 4, 12], "eos_token_id": list(range(40, 48))}
    out = vlm.generate(**given, **limits, **manner, traced=True)
    told = vlm.score(**given, targets=out.tokens)
    for steps, tokens, likelihood in zip(out.steps, out.tokens, told, strict=True):
        assert [len(step.believed) for step in steps] == [len(step.tokens) for step in steps]
        believed = torch.tensor([p for step in steps for p in step.believed])
        assert len(believed) == len(tokens)
        torch.testing.assert_close(believed.log(), likelihood.log_probabilities, atol=1e-4, rtol=1e-4)


def test_scores_are_what_decides():
    """The kept tokens of a method that keeps the highest are the highest, row by row, also where rows leave early."""
    vlm = tiny(side=56)
    layouts = [(3, IMAGE, 4), (5,), (IMAGE, 2, IMAGE, 3)]
    given = batch(*prompts(vlm, layouts)) | {"retained_tokens": 8, "max_new_tokens": [2, 9, 5], "traced": True}
    for method in ("twig", "fastv", "fastervlm"):
        out = vlm.generate(**given, pruning=method)
        for scores, kept, layout in zip(out.scores, out.kept, layouts, strict=True):
            assert scores.shape == (16 * layout.count(IMAGE),) and not scores.isnan().any()
            if method == "fastervlm":  # picks in each image
                for first in range(0, len(scores), 16):
                    mine = kept[(kept >= first) & (kept < first + 16)] - first
                    assert set(mine.tolist()) == set(scores[first : first + 16].topk(len(mine)).indices.tolist())
            else:
                assert set(kept.tolist()) == set(scores.topk(len(kept)).indices.tolist())
    alone = vlm.generate(**one(vlm, 3, IMAGE, 4), retained_tokens=8, pruning="twig", traced=True)
    row = vlm.generate(**given, pruning="twig").scores[0]
    torch.testing.assert_close(alone.scores[0], row, atol=1e-5, rtol=1e-4)


def test_a_second_cut_knows_what_the_first_has_left():
    vlm = tiny(side=56)
    out = vlm.generate(**one(vlm, 3, IMAGE, 4), retained_tokens=4, pruning="uniform:keep=8+twig", traced=True)
    assert int(out.scores[0].isnan().sum()) == 8 and not out.scores[0][out.kept[0]].isnan().any()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_scores_of_patches_or_none(method):
    vlm = tiny(side=56, layers=12)
    out = vlm.generate(
        **one(vlm, 3, IMAGE, 4), retained_tokens=8, pruning=spec_of(method), traced=True, max_new_tokens=2
    )
    assert out.scores is None or out.scores[0].shape == (16,)
