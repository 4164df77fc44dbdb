"""One worker, many who ask: batches equal single answers, nothing is lost, whoever goes frees the worker."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import IMAGE, one, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from twigvlm.errors import InputError
from twigvlm.serving.engine import Ask, Busy, Closed, Ended, Engine, Started, Written

LAYOUTS = ((3, IMAGE, 4), (2, IMAGE, 7), (5,), (1, IMAGE, 2, IMAGE, 3))


@pytest.fixture(scope="module")
def vlm():
    return tiny()


def ask(vlm, layout, prompt: int = 0, alone: bool = False, stop=None, **options) -> Ask:
    given = one(vlm, *layout, seed=prompt)
    ids = given["input_ids"][0].tolist()
    return Ask(ids, given.get("pixel_values"), {"max_new_tokens": 12, **options}, alone, stop)


def direct(vlm, wish: Ask) -> list[int]:
    return vlm.generate(torch.tensor([wish.ids]), wish.pixels, **wish.options).tokens[0]


class Gate:
    """A listener that holds the worker at the first token until it is opened."""

    def __init__(self):
        self.reached, self.open, self.events = threading.Event(), threading.Event(), []

    def __call__(self, event) -> None:
        self.events.append(event)
        if isinstance(event, Written) and not self.reached.is_set():
            self.reached.set()
            assert self.open.wait(20)


@given(
    st.lists(st.tuples(st.sampled_from(LAYOUTS), st.integers(0, 5), st.integers(1, 20)), min_size=1, max_size=6),
    st.sampled_from([{}, {"retained_tokens": 2.0}, {"draft_length": 0}, {"do_sample": True}]),
)
@settings(max_examples=12)
def test_answers_together_are_those_of_each_alone(asked, options):
    vlm = tiny()
    wishes = [ask(vlm, layout, seed, **options, seed=seed, max_new_tokens=n) for layout, seed, n in asked]
    engine = Engine(vlm, max_batch=4, max_wait=0.05)
    try:
        tickets = [engine.submit(wish) for wish in wishes]
        answers = [ticket.result(30) for ticket in tickets]
    finally:
        engine.close(10)
    for wish, found in zip(wishes, answers, strict=True):
        assert found.tokens == direct(vlm, wish)
        assert [t for step in found.steps for t in step.tokens] == found.tokens and len(found.times) == len(found.steps)
        assert found.limited == (len(found.tokens) == wish.options["max_new_tokens"]) and not found.cancelled
    assert sum(n * k for n, k in engine.batches.items()) == len(wishes) and max(engine.batches) <= 4


def test_events_tell_the_answer(vlm):
    engine, gate = Engine(vlm), Gate()
    gate.open.set()
    found = engine.submit(ask(vlm, LAYOUTS[0]), gate).result(20)
    engine.close(10)
    kinds = [type(event) for event in gate.events]
    assert kinds == [Started, *[Written] * len(found.steps), Ended]
    assert [e.step for e in gate.events[1:-1]] == found.steps and gate.events[-1].answer is found


def test_who_waits_is_answered_in_one_batch(vlm):
    engine, gate = Engine(vlm, max_batch=3, max_wait=0), Gate()
    first = engine.submit(ask(vlm, LAYOUTS[0]), gate)
    assert gate.reached.wait(20)
    others = [engine.submit(ask(vlm, layout)) for layout in LAYOUTS]
    other_kind = engine.submit(ask(vlm, LAYOUTS[0], draft_length=0))
    alone = engine.submit(ask(vlm, LAYOUTS[0], alone=True))
    assert [t.place() for t in (first, *others, other_kind, alone)] == [0, 1, 2, 3, 4, 5, 6]
    gate.open.set()
    rows = [t.result(20).rows for t in (first, *others, other_kind, alone)]
    engine.close(10)
    assert rows == [1, 3, 3, 3, 1, 1, 1]


def test_few_words_do_not_wait_for_many(vlm):
    """A row that is written is answered, with what was kept for it, while its batch goes on."""
    engine, gate = Engine(vlm, max_batch=2, max_wait=5), Gate()
    wish = {"retained_tokens": 2.0}
    many = engine.submit(ask(vlm, LAYOUTS[0], max_new_tokens=60, **wish), gate)
    ends: list[bool] = []
    few = engine.submit(
        ask(vlm, LAYOUTS[1], max_new_tokens=1, **wish),
        lambda event: ends.append(many.done()) if isinstance(event, Ended) else None,
    )
    assert gate.reached.wait(20)
    gate.open.set()
    answer, whole = few.result(20), many.result(20)
    engine.close(10)
    assert answer.rows == whole.rows == 2 and answer.limited and ends == [False]
    wish = ask(vlm, LAYOUTS[1], max_new_tokens=1, **wish)
    out = vlm.generate(torch.tensor([wish.ids]), wish.pixels, **wish.options)
    assert answer.tokens == out.tokens[0] and answer.kept.tolist() == out.kept[0].tolist()
    assert answer.visual == out.stats.visual_rows[0]


def test_who_was_answered_may_come_again(vlm):
    """A batch waits from the end of the one before, unless nobody else is near."""
    for lonely, rows in ((False, 3), (True, 2)):
        engine, gate = Engine(vlm, max_batch=3, max_wait=10, lonely=lambda lonely=lonely: lonely), Gate()
        first = [engine.submit(ask(vlm, layout), gate) for layout in LAYOUTS[:3]]
        assert gate.reached.wait(20)
        again = [engine.submit(ask(vlm, layout)) for layout in LAYOUTS[:2]]
        if lonely:
            gate.open.set()
            assert [t.result(20).rows for t in again][-1] <= rows
        else:
            gate.open.set()
            first[0].result(20)
            again.append(engine.submit(ask(vlm, LAYOUTS[2])))
            assert [t.result(20).rows for t in again] == [rows] * 3
        engine.close(10)


def test_a_full_queue_and_a_closed_engine(vlm):
    engine, gate = Engine(vlm, max_queue=2), Gate()
    engine.submit(ask(vlm, LAYOUTS[0]), gate)
    assert gate.reached.wait(20)
    waiting = [engine.submit(ask(vlm, LAYOUTS[0])) for _ in range(2)]
    with pytest.raises(Busy, match="2 asks wait and no more may"):
        engine.submit(ask(vlm, LAYOUTS[0]))
    waiting[0].cancel()
    assert waiting[0].result(0).cancelled and engine.waiting == 1
    gate.open.set()
    engine.close(20)
    assert waiting[1].result(0).tokens == direct(vlm, ask(vlm, LAYOUTS[0]))
    with pytest.raises(Closed):
        engine.submit(ask(vlm, LAYOUTS[0]))


def test_cancelling_ends_one_row_within_a_step(vlm):
    engine, gate = Engine(vlm, max_batch=2, max_wait=5), Gate()
    gone = engine.submit(ask(vlm, LAYOUTS[0], max_new_tokens=100), gate)
    stays = engine.submit(ask(vlm, LAYOUTS[1], max_new_tokens=100))
    assert gate.reached.wait(20)
    gone.cancel()
    gate.open.set()
    ended, whole = gone.result(20), stays.result(20)
    engine.close(10)
    assert ended.cancelled and ended.rows == 2 and len(ended.steps) <= 2
    assert whole.tokens == direct(vlm, ask(vlm, LAYOUTS[1], max_new_tokens=100))


def test_closing_without_patience_ends_all(vlm):
    engine, gate = Engine(vlm), Gate()
    running = engine.submit(ask(vlm, LAYOUTS[0], max_new_tokens=200, draft_length=0), gate)
    assert gate.reached.wait(20)
    waiting = engine.submit(ask(vlm, LAYOUTS[0], alone=True))
    threading.Timer(0.2, gate.open.set).start()
    engine.close()
    assert waiting.result(0).cancelled and running.result(0).cancelled and len(running.result(0).steps) <= 2
    assert not engine.alive


def test_a_fault_is_its_own_rows(vlm):
    """A prompt whose picture is missing fails; who stood in the same batch gets an answer."""
    engine = Engine(vlm, max_batch=3, max_wait=5)
    good, bad = ask(vlm, LAYOUTS[0]), ask(vlm, LAYOUTS[1])
    tickets = [engine.submit(wish) for wish in (good, Ask(bad.ids, None, bad.options), ask(vlm, LAYOUTS[2]))]
    with pytest.raises(InputError):
        tickets[1].result(20)
    assert tickets[0].result(20).tokens == direct(vlm, good)
    assert tickets[2].result(20).tokens
    engine.close(10)


def test_a_listener_that_fails_ends_its_own_answer(vlm):
    engine = Engine(vlm, max_batch=2, max_wait=5)

    def gone(event):
        raise ConnectionError("nobody there")

    tickets = [
        engine.submit(ask(vlm, LAYOUTS[0], draft_length=0), gone),
        engine.submit(ask(vlm, LAYOUTS[1], draft_length=0)),
    ]
    assert tickets[0].result(20).cancelled
    assert tickets[1].result(20).tokens == direct(vlm, ask(vlm, LAYOUTS[1], draft_length=0))
    engine.close(10)


def test_stop_rules_and_limits_are_each_rows_own(vlm):
    engine = Engine(vlm, max_batch=3, max_wait=5)
    wishes = [
        ask(vlm, LAYOUTS[0], stop=lambda tokens: len(tokens) == 3),
        ask(vlm, LAYOUTS[1], max_new_tokens=5),
        ask(vlm, LAYOUTS[2]),
    ]
    answers = [t.result(20) for t in [engine.submit(w) for w in wishes]]
    engine.close(10)
    assert [len(a.tokens) for a in answers[:2]] == [3, 5] and [a.limited for a in answers[:2]] == [False, True]
    assert answers[0].tokens == direct(vlm, wishes[0])[:3]


@pytest.mark.parametrize("limits", [{"max_batch": 0}, {"max_queue": 0}, {"max_wait": -1.0}])
def test_limits_that_cannot_be(vlm, limits):
    with pytest.raises(InputError, match=next(iter(limits))):
        Engine(vlm, **limits)


def test_options_that_cannot_be_are_told_at_once(vlm):
    engine = Engine(vlm)
    with pytest.raises(InputError, match="max_new_tokens"):
        engine.submit(ask(vlm, LAYOUTS[0], max_new_tokens=0))
    engine.close(10)
