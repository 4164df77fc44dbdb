"""Pieces of an answer: together the answer, whole letters, nothing of what a stop string takes."""

from __future__ import annotations

import pytest
from conftest import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.decoding.loop import Step
from twigvlm.prompt.template import decode, text_encoder
from twigvlm.serving.chat.text import Text

WORDS = st.lists(
    st.sampled_from(["the ", "a", " red", "é", "日本", "🌱", "👩‍👩‍👧", " ", "there", "\n", "ß."]), max_size=10
).map("".join)
STOPS = st.lists(st.sampled_from(["e", "the", "日", "本", "🌱", "red t", " ", "\n", "hea", "ß.a", "a red"]), max_size=3)


def steps(tokens: list[int], sizes: list[int]) -> list[Step]:
    """The tokens in steps of these sizes."""
    out, at = [], 0
    while at < len(tokens):
        size = sizes[len(out) % len(sizes)]
        out.append(Step([], size - 1, tokens[at : at + size]))
        at += size
    return out


def pieces(text: Text, written: list[Step]) -> list[str]:
    return [*(text.add(step) for step in written), text.end()]


@given(WORDS, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_together_the_answer(said, sizes):
    tokenizer = tiny_tokenizer()
    tokens = text_encoder(tokenizer)(said)
    text = Text(tokenizer)
    found = pieces(text, steps(tokens, sizes))
    assert "".join(found) == decode(tokenizer, tokens).strip() == said.strip()
    assert text.tokens == len(tokens) and not any("\ufffd" in piece for piece in found)


@given(st.lists(st.integers(3, 3 + 255 + 20), max_size=16), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_any_bytes(tokens, sizes):
    """Half characters among them."""
    tokenizer = tiny_tokenizer()
    found = pieces(Text(tokenizer), steps(tokens, sizes))
    assert "".join(found) == decode(tokenizer, tokens).strip()


@given(WORDS, STOPS, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_cut_at_the_stop_string_that_is_complete_first(said, stops, sizes):
    tokenizer = tiny_tokenizer()
    tokens = text_encoder(tokenizer)(said)
    whole = decode(tokenizer, tokens).lstrip()
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    text = Text(tokenizer, stops)
    found = pieces(text, steps(tokens, sizes))
    assert "".join(found) == (whole[: min(ends)[1]] if ends else whole.rstrip())
    assert text.stopped == bool(ends) and text.tokens <= len(tokens)
    one = Text(tokenizer, stops)
    assert "".join(pieces(one, steps(tokens, [1]))) == "".join(found) and one.tokens == text.tokens


@pytest.mark.parametrize("stop", ["e", "the e", "end"])
def test_no_beginning_of_a_stop_string_goes_out(stop):
    tokenizer = tiny_tokenizer()
    text, said = Text(tokenizer, [stop]), "is that the end?"
    seen = ""
    for step in steps(text_encoder(tokenizer)(said), [1]):
        seen += text.add(step)
        assert said[: said.index(stop)].startswith(seen)
    assert seen + text.end() == said[: said.index(stop)]
