"""Trees as wide and deep as they pay: nodes for their rows, levels for their step, and the same answers."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from conftest import IMAGE, batch, often, one, prompts, tiny
from test_trees import LAYOUTS, Proposing

from twigvlm.decoding import loop, tree
from twigvlm.decoding.pace import Costs, measure_wide, times
from twigvlm.decoding.worth import DEEPEST, Worth
from twigvlm.errors import RunError

FREE = Costs(0.01, tuple(1 + 1e-4 * n for n in range(65)), 1e-4)  # rows cost next to nothing
ROWS = Costs(0.1, tuple(1 + 0.1 * n for n in range(34)), 0.02)  # two cores and a small model
DEAR = Costs(0.5, tuple(1.0 + n for n in range(34)), 0.5)  # a row costs a step


def table(*chances: float) -> np.ndarray:
    return np.array([chances])


def told(costs: Costs, rounds: int = 40, accepted: int = 6) -> Worth:
    """After rounds whose chains of six were right up to `accepted`."""
    worth = Worth(costs)
    step = loop.Step([5] * 6, accepted, [5] * (accepted + 1), [0.9] * 6, list(range(-1, 5)), list(range(accepted)))
    for _ in range(rounds):
        worth.length()
        worth.keep([table(0.9, 0.05)] * 6)
        worth.note([step])
    return worth


def test_a_node_is_verified_if_it_pays_for_its_row():
    """As by hand: the n with the most seconds saved."""
    worth = told(ROWS)
    chances = [table(0.9, 0.05, 0.02), table(0.6, 0.25, 0.04)]
    token, ordered = worth.token(), [0.9, 0.6, 0.25, 0.05, 0.04, 0.02]
    saved = [sum(ordered[:n]) * token - ROWS.verify[n] for n in range(7)]
    assert worth.keep(chances) == saved.index(max(saved))
    assert 2 <= worth.keep(chances) < 6, "a likely one pays, an unlikely one does not"
    assert told(FREE).keep(chances) == 6 and told(DEAR, accepted=0).keep(chances) == 0


def test_a_level_is_drafted_if_it_pays_for_its_step():
    worth = told(ROWS)
    assert worth.widen(0, table(0.95, 0.01)) == 1
    assert worth.widen(0, table(0.05, 0.01)) == 0
    assert worth.widen(0, table(0.0, 0.0)) == 0, "nothing may follow"
    assert told(FREE).widen(0, table(0.5, 0.4, 0.05, 0.0)) >= 3
    cheap = told(Costs(0.1, tuple(1 + 0.01 * n for n in range(34)), 0.005))
    assert cheap.widen(0, table(0.45, 0.0)) == 0 and cheap.widen(0, table(0.45, 0.44)) == 2, "together they pay"
    edge = next(p for p in np.linspace(1, 0, 200) if not worth.widen(0, table(p)))
    gain = edge * worth.hit(1) * worth.token() - worth.row()
    assert gain == pytest.approx(ROWS.draft, rel=0.1)


def test_what_is_verified_with_the_prompt_pays_for_its_share_of_a_large_block():
    """There a node costs what a token of the prompt costs, and not the little that one more costs among few."""
    worth, chances = (
        told(Costs(0.01, tuple(1 + 0.01 * n for n in range(33)), 1e-4)),
        [table(0.9, 0.08, 0.02, 0.001)] * 3,
    )
    alone, share = worth.keep(chances), (1 + 0.32) / 33
    worth.fused = True
    assert worth.row() == pytest.approx(share)
    likely = sorted([0.9, 0.08, 0.02, 0.001] * 3, reverse=True)
    assert worth.keep(chances) == sum(chance * worth.token() > share for chance in likely) < alone


def test_rows_decide_together():
    """What pays for one row of a batch alone pays less for many that have nothing to gain."""
    worth = Worth(ROWS, rows=4)
    unsure, sure = [0.05, 0.01], [0.99, 0.001]
    assert worth.widen(0, np.array([unsure] * 4)) == 0
    assert worth.widen(0, np.array([sure] * 4)) == 1


def test_beliefs_are_set_right_by_what_came_of_them():
    right, wrong = told(ROWS, accepted=6), told(ROWS, accepted=1)
    paths = table(0.9)
    assert right.chances(0, paths) > 0.9 and right.chances(0, table(1.0)) <= 1
    assert wrong.chances(0, paths) > 0.9 and wrong.chances(1, paths) < 0.2, "by depth"
    assert wrong.hit(1) < 0.2 < right.hit(1)
    assert wrong.length() in (0, 1, DEEPEST) and right.length() == DEEPEST


def test_a_token_takes_what_the_last_rounds_took():
    worth = told(ROWS, rounds=300)
    one_round = ROWS.verify[0] + ROWS.draft + (ROWS.verify[6] - ROWS.verify[0])
    assert worth.keep([table(0.9, 0.05)] * 6) == 6
    assert worth.token() == pytest.approx(one_round / 7, rel=0.05)


def test_one_word_answers_make_no_token_dear():
    """A draft that is verified with the prompt, and an answer that ends there, say nothing of what a token takes."""
    worth, fresh = Worth(ROWS), Worth(ROWS)
    worth.fused = True
    for _ in range(50):
        worth.length()
        worth.keep([table(0.9, 0.05)] * 2)
        worth.note([loop.Step([5, 2], 2, [5], [0.9, 0.9], [-1, 0], [0, 1])])
    assert worth.token() == fresh.token() and worth.hit(0) > fresh.hit(0)


def test_with_the_prompt_a_draft_need_not_pay_for_the_first_row():
    """A jump between one token and two is none where there is a prompt."""
    jump = Costs(0.3, (1.0, *(2.0 + 0.01 * n for n in range(32))), 0.01)
    worth = Worth(jump, accepted=1.0, tried=4.0)
    assert worth.length() <= 1
    worth.fused = True
    assert worth.length() == DEEPEST
    assert not Worth(Costs(2.0, jump.verify), fused=True).length()


def test_drafts_that_never_come_right_end():
    """All but one token once in a while."""
    worth = told(DEAR, accepted=0)
    assert sum(worth.length() for _ in range(200)) <= 4


@pytest.mark.parametrize("costs", often([FREE, ROWS, DEAR], ROWS), ids=["free", "rows", "dear"])
@pytest.mark.parametrize("pruned", [{}, {"retained_tokens": 8}, {"retained_tokens": 8, "pruning": "pdrop"}], ids=str)
def test_an_answer_does_not_depend_on_what_pays(costs, pruned, monkeypatch):
    vlm = tiny(side=56, noise=0.1)
    monkeypatch.setattr("twigvlm.decoding.drafting.measure_wide", lambda *_: costs)
    monkeypatch.setattr(vlm._drafting, "paces", {})
    for extra in ({}, {"do_sample": True, "seed": 3}):
        wish = {
            **batch(*prompts(vlm, LAYOUTS, seed=2)),
            **pruned,
            **extra,
            "max_new_tokens": 20,
            "eos_token_id": [5, 9],
        }
        plain = vlm.generate(**wish, draft_length=0)
        auto = vlm.generate(**wish, tree="auto")
        assert auto.tokens == plain.tokens and auto.stats.draft_shape == "tree auto"
        if costs is not ROWS:
            assert (auto.stats.drafted > 4 * len(LAYOUTS)) == (costs is FREE)


def test_what_pays_as_a_chain_is_verified_as_one(monkeypatch):
    """Without a mask of who sees whom; the nodes are those of the tree."""
    vlm, made = tiny(side=56, noise=0.0, fade=0.1), []
    rows_only = Costs(1e-3, tuple(1 + 0.2 * n for n in range(34)), 10.0)  # a second node in a step never pays
    monkeypatch.setattr("twigvlm.decoding.drafting.measure_wide", lambda *_: rows_only)
    monkeypatch.setattr(vlm._drafting, "paces", {})
    grow = tree.grow_as_it_pays
    monkeypatch.setattr("twigvlm.decoding.drafting.grow_as_it_pays", lambda d: made.append(grow(d)) or made[-1])
    wish = {**one(vlm, 3, IMAGE, 4), "max_new_tokens": 40, "eos_token_id": []}
    auto = vlm.generate(**wish, tree="auto")
    assert auto.tokens == vlm.generate(**wish, draft_length=0).tokens
    chains = [draft.tree for draft in made if draft.tree.chain and draft.tree.width > 1]
    assert chains
    for line in chains:
        assert line.parent.tolist() == [list(range(-1, line.width - 1))]


def test_no_end_token_is_verified(monkeypatch):
    """The node before it says so already, and nothing comes behind it."""
    vlm, met = tiny(side=56, noise=0.1, fade=0.5), 0
    monkeypatch.setattr("twigvlm.decoding.drafting.measure_wide", lambda *_: FREE)
    for seed in range(4):
        monkeypatch.setattr(vlm._drafting, "paces", {})
        wish = {**one(vlm, 3, IMAGE, 4, seed=seed), "max_new_tokens": 20}
        answer = vlm.generate(**wish, eos_token_id=[], draft_length=0).tokens[0]
        out = vlm.generate(**wish, eos_token_id=answer[9], tree="auto")
        assert out.tokens[0] == answer[: answer.index(answer[9])]
        assert not any(answer[9] in step.drafted for step in out.steps[0])
        met += any(
            answer[9] in s.drafted for s in vlm.generate(**wish, eos_token_id=answer[9], tree=(4, 2, 4, 16)).steps[0]
        )
    assert met, "the twig must think of it"


def test_a_chooser_without_second_choices(monkeypatch):
    vlm = tiny()
    monkeypatch.setattr(vlm._drafting, "paces", {})
    wish = {**one(vlm, 3, IMAGE, 4), "max_new_tokens": 8, "eos_token_id": []}
    out = vlm.generate(**wish, tree="auto", chooser=Proposing)
    assert out.tokens == vlm.generate(**wish, draft_length=0).tokens
    assert out.stats.draft_shape.startswith("chain: Proposing")


def test_beliefs_that_are_no_numbers_are_noticed(monkeypatch):
    vlm = tiny()
    logits = vlm.twig.logits
    monkeypatch.setattr("twigvlm.decoding.drafting.measure_wide", lambda *_: FREE)
    monkeypatch.setattr(vlm._drafting, "paces", {})
    monkeypatch.setattr(vlm.twig, "logits", lambda hidden: logits(hidden) * float("nan"))
    with pytest.raises(RunError):
        vlm.generate(**one(vlm, 3, IMAGE, 4), tree="auto")


def test_one_small_read_a_level(monkeypatch):
    """Beside the one of a round, as a chain that may stop has it."""
    vlm, reads = tiny(side=56, noise=0.0, fade=0.1), []
    monkeypatch.setattr("twigvlm.decoding.drafting.measure_wide", lambda *_: FREE)
    monkeypatch.setattr(vlm._drafting, "paces", {})
    for name in ("loop", "tree"):
        monkeypatch.setattr(f"twigvlm.decoding.{name}.fetch", lambda t: reads.append(t.numel()) or t.cpu().numpy())
    out = vlm.generate(**one(vlm, 3, IMAGE, 4), tree="auto", max_new_tokens=30, eos_token_id=[])
    levels = sum(max(_depths(step)) for step in out.steps[0] if step.drafted)
    assert levels <= len(reads) - out.stats.steps <= levels + out.stats.steps


def _depths(step) -> list[int]:
    depths: list[int] = []
    for parent in step.parents:
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    return depths


def test_the_parts_of_a_tree_are_measured():
    vlm = tiny()
    found = measure_wide(vlm.trunk, vlm.twig, 2, repeats=1)
    assert found.draft > 0 and found.beside >= 0 and min(found.verify) > 0
    assert len(found.verify) in (17, 33, 65)
    with torch.inference_mode():
        assert Worth(found, rows=2).length() in (0, 1, DEEPEST)


def test_large_models_are_not_measured_for_minutes():
    runs = []

    def work():
        runs.append(time.sleep(0.02))

    assert len(times(work, torch.device("cpu"), 5, 1)) == 5 and len(runs) == 6
    assert len(times(work, torch.device("cpu"), 5, 1, enough=0.03)) == 2
    assert len(times(work, torch.device("cpu"), 5, 1, enough=0.0)) == 1
