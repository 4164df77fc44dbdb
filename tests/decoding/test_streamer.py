"""Text as it is written: whole, once, in whole characters, with the drafted words marked; and interruptions."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import IMAGE, Numbers, batch, drafts, often, one, prompts, speaking, tiny, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import StoppingCriteriaList, TextIteratorStreamer, TextStreamer

from twigvlm.decoding import DraftStreamer, Step
from twigvlm.errors import InputError
from twigvlm.sprout.recipe.tokenizer import build_tokenizer

NEW = 24
WAYS = [  # of every fate: all drafts accepted, some, none, and no draft at all
    pytest.param({"noise": 0.0, "fade": 0.02}, {}, id="accepted"),
    pytest.param({"noise": 0.2}, {"draft_confidence": 0.2}, id="mixed"),
    pytest.param({"noise": 3.0}, {}, id="refused"),
    pytest.param({}, {"draft_length": 0}, id="plain"),
]


class Shown:
    """Remembers what a DraftStreamer shows."""

    def __init__(self, tokenizer=None, **settings):
        self.pieces: list[tuple[str, bool]] = []
        self.streamer = DraftStreamer(
            tokenizer or tiny_tokenizer(), lambda *piece: self.pieces.append(piece), **settings
        )

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def decoded(tokens, tokenizer=None) -> str:
    return (tokenizer or tiny_tokenizer()).decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(("shape", "settings"), WAYS)
@pytest.mark.parametrize("seed", often(range(3), 0))
def test_the_pieces_are_the_answer(shape, settings, seed):
    vlm, shown = speaking(**shape), Shown()
    arguments = {**one(vlm, 3, IMAGE, 4, seed=seed), "max_new_tokens": NEW, "eos_token_id": [], **settings}
    out = vlm.generate(**arguments, streamer=shown.streamer)
    assert out.tokens == vlm.generate(**arguments).tokens, "being watched changes nothing"
    assert shown.text == decoded(out.tokens[0]).lstrip()
    assert all(text for text, _ in shown.pieces)


@pytest.mark.parametrize(("shape", "settings"), WAYS)
def test_drafted_words_are_marked(shape, settings):
    """Each letter is a token here, so that the marks of pieces are those of tokens."""
    vlm, shown = speaking(**shape), Shown(Numbers())
    out = vlm.generate(
        **one(vlm, 3, IMAGE, 4), max_new_tokens=NEW, eos_token_id=[], streamer=shown.streamer, **settings
    )
    marks = [i < step.accepted for step in out.steps[0] for i in range(len(step.tokens))]
    assert [drafted for _, drafted in shown.pieces] == marks
    assert [text for text, _ in shown.pieces] == [f"{t}." for t in out.tokens[0]]
    assert sum(marks) == sum(accepted for _, accepted in drafts(out))


@pytest.fixture(scope="module")
def sprout_tokenizer():
    return build_tokenizer()


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffd"), max_size=12)
PIECES = st.lists(
    st.sampled_from(["the ", "a", " red", "é", "日本", "🌱", " ", "there", "\n", "ß."]) | TEXTS, max_size=8
)


@given(PIECES, st.integers(1, 6), st.booleans())
def test_any_text_in_any_steps(sprout_tokenizer, pieces, width, by_steps):
    """Characters of several bytes come out whole, wherever a step ends."""
    for tokenizer in (tiny_tokenizer(), sprout_tokenizer):
        tokens = tokenizer("".join(pieces), add_special_tokens=False).input_ids
        shown = Shown(tokenizer, skip_prompt=False)
        for start in range(0, len(tokens), width):
            part = tokens[start : start + width]
            if by_steps:
                shown.streamer.put_step(Step(part, len(part) - 1, part))
            else:
                shown.streamer.put(torch.tensor(part))
        for text, _ in shown.pieces:
            assert "\ufffd" not in text, "half a character was shown"
        shown.streamer.end()
        assert shown.text == decoded(tokens, tokenizer).lstrip()


def test_an_unfinished_character_is_shown_at_the_end():
    shown = Shown(skip_prompt=False)
    begun = tiny_tokenizer().convert_tokens_to_ids(["a", "<0xE6>", "<0x97>"])
    shown.streamer.put(torch.tensor(begun))
    assert shown.text == "a"
    shown.streamer.end()
    assert shown.text.startswith("a\ufffd")


def test_the_prompt_is_shown_when_asked():
    tokenizer = tiny_tokenizer()
    prompt, answer = (tokenizer.convert_tokens_to_ids(list(word)) for word in ("red", "the"))
    for skip, expected in ((True, "the"), (False, "redthe")):
        shown = Shown(skip_prompt=skip)
        for _ in range(2):  # the second answer through the same streamer starts afresh
            shown.pieces.clear()
            shown.streamer.put(torch.tensor([prompt]))
            shown.streamer.put_step(Step(answer, 2, answer))
            shown.streamer.end()
            assert shown.text == expected


@pytest.mark.parametrize(("shape", "settings"), WAYS)
def test_hugging_face_streamers(shape, settings, capsys):
    vlm, tokenizer = speaking(**shape), tiny_tokenizer()
    arguments = {**one(vlm, 3, IMAGE, 4), "max_new_tokens": NEW, "eos_token_id": [], **settings}
    expected = decoded(vlm.generate(**arguments).tokens[0])
    vlm.generate(**arguments, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out == expected + "\n"

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=20)
    writer = threading.Thread(target=vlm.generate, kwargs={**arguments, "streamer": streamer})
    writer.start()
    assert "".join(streamer) == expected
    writer.join()


def test_a_streamer_takes_one_row():
    vlm = speaking()
    with pytest.raises(InputError, match="a streamer takes one row, but input_ids have 2"):
        vlm.generate(**batch(*prompts(vlm, [(3,), (4,)])), streamer=Shown().streamer)


def test_a_streamer_is_not_begun_for_a_bad_prompt():
    """Who waits in another thread for its end would wait for ever."""
    vlm, called = speaking(), []
    arguments = {**one(vlm, 3, IMAGE, 4), "pixel_values": None}

    class Streamer:
        def put(self, value):
            called.append(value)

    with pytest.raises(InputError):
        vlm.generate(**arguments, streamer=Streamer())
    assert not called


# ---------------------------------------------------------------------- interruptions


def _raise(error: BaseException):
    def after_five(*_):
        after_five.calls += 1
        if after_five.calls == 5:
            raise error

    after_five.calls = 0
    return after_five


@pytest.mark.parametrize("error", [RuntimeError("broken pipe"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["streamer", "criterion", "processor"])
@pytest.mark.parametrize("R", often([None, 2.5], 2.5))
def test_an_interrupted_answer_leaves_no_trace(error, where, R):
    """The same error comes out, and the next answer is what it would have been."""
    vlm = tiny()
    arguments = {**one(vlm, 3, IMAGE, 4), "max_new_tokens": NEW, "eos_token_id": [], "retained_tokens": R}
    weights = [p.clone() for p in (*vlm.model.parameters(), *vlm.twig.parameters())]
    before = vlm.generate(**arguments)
    trouble = {
        "streamer": {"streamer": DraftStreamer(Numbers(), _raise(error))},
        "criterion": {"stopping_criteria": StoppingCriteriaList([_falsely(_raise(error))])},
        "processor": {"logits_processor": [_unchanged(_raise(error))]},
    }[where]
    with pytest.raises(type(error)) as caught:
        vlm.generate(**arguments, **trouble)
    assert caught.value is error
    assert not torch.is_inference_mode_enabled()
    after = vlm.generate(**arguments)
    assert after.tokens == before.tokens and drafts(after) == drafts(before)
    for old, new in zip(weights, (*vlm.model.parameters(), *vlm.twig.parameters()), strict=True):
        assert torch.equal(old, new)


def _falsely(call):
    def rule(ids, scores, **_):
        call()
        return torch.zeros(len(ids), dtype=torch.bool)

    return rule


def _unchanged(call):
    def process(ids, scores):
        call()
        return scores

    return process


def test_steps_abandoned_halfway():
    """A consumer that raises leaves nothing behind, and whoever waits for the end of the stream gets it."""
    vlm = tiny()
    arguments = {**one(vlm, 3, IMAGE, 4), "max_new_tokens": NEW, "eos_token_id": []}
    before = vlm.generate(**arguments).tokens
    streamer = _Stopping()
    with pytest.raises(StopIteration):
        vlm.generate(**arguments, streamer=streamer)
    assert streamer.seen and streamer.ended == 1
    assert vlm.generate(**arguments).tokens == before


class _Stopping:
    def __init__(self):
        self.seen, self.ended = [], 0

    def put(self, value):
        self.seen.append(value)
        if len(self.seen) > 2:
            raise StopIteration

    def end(self):
        self.ended += 1
