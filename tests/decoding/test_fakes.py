"""The decode loop on models whose words are written by hand: exact drafts, exact ends, exact rollbacks."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_tokenizer
from transformers import StoppingCriteriaList
from transformers.generation import StopStringCriteria

from twigvlm.config import GenerationSettings, TwigConfig
from twigvlm.decoding import Decoder, embed
from twigvlm.model.stream import Stream
from twigvlm.pruning import Plan

VOCABULARY, PROMPT, L, K, T = 40, 3, 4, 1, 2
LOST = VOCABULARY - 1  # what the fake base says when it was fed a wrong history
WRONG = 38  # a draft that the base never writes
TEXT = list(range(10, 30))  # what the base writes


def _layers(first: int, count: int) -> list:
    return [SimpleNamespace(self_attn=SimpleNamespace(layer_idx=first + i)) for i in range(count)]


def _peaked(token: int, probability: float = 0.99) -> torch.Tensor:
    rest = torch.full((VOCABULARY,), (1 - probability) / (VOCABULARY - 1))
    rest[token] = probability
    return rest.log()


class FakeTrunk:
    """Writes `text` after any prompt, as long as it reads its own words.

    Hidden states are (token, position). Every layer run checks that each token lands in the cache at
    its own position, so a wrong commit cannot pass.
    """

    V, L, device, vocabulary, image_token_id = 1, L, torch.device("cpu"), VOCABULARY, -1

    def __init__(self, text: list[int], context: int = 1000):
        self.text, self.context = text, context
        self.layers = _layers(0, L)

    def embed(self, ids, lengths, pixel_values=None, tap=None) -> Stream:
        return self.tokens(ids, torch.arange(ids.shape[1]).expand_as(ids), True)

    def tokens(self, ids, place, full=False) -> Stream:
        hidden = torch.stack([ids, place], -1).double()
        return Stream(hidden, place.clamp(min=0)[None], place, torch.full_like(place, -1), full)

    def attend(self, stream: Stream, cache, sight=None):
        start = cache.used + cache.ahead
        for b, count in enumerate(stream.count().tolist()):
            expected = list(range(int(start[b]), int(start[b]) + count))
            assert stream.place[b, :count].tolist() == expected, f"layers {cache.layers}"
            assert stream.positions[0, b, :count].tolist() == expected
        cache.begin(stream.width, sight)
        return cache

    def run(self, layers, stream: Stream, attention, taps=()) -> Stream:
        assert tuple(layer.self_attn.layer_idx for layer in layers) == attention.layers
        return stream

    def word(self, hidden: torch.Tensor) -> tuple[int, bool]:
        """Place in the answer that comes after this token, and whether the token is the base's own."""
        token, position = hidden.long().tolist()
        place = position - PROMPT + 1
        return place, place <= 0 or self.text[place - 1] == token

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        out = torch.empty(*hidden.shape[:-1], VOCABULARY)
        for at in [(b, s) for b in range(hidden.shape[0]) for s in range(hidden.shape[1])]:
            place, right = self.word(hidden[at])
            out[at] = _peaked(self.text[place] if right and 0 <= place < len(self.text) else LOST)
        return out


class FakeTwig:
    """Drafts what `guess(place)` says for each place of the answer: (token, probability)."""

    def __init__(self, trunk: FakeTrunk, guess):
        self.config = TwigConfig(L, K, T, L)
        self.layers, self.trunk, self.guess = _layers(L, T), trunk, guess

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(hidden), VOCABULARY)
        for b, one in enumerate(hidden):
            place, _ = self.trunk.word(one)
            out[b] = _peaked(*(self.guess(place) if 0 <= place < len(self.trunk.text) else (WRONG, 0.99)))
        return out


def always(place: int) -> tuple[int, float]:
    return TEXT[place], 0.99


def never(place: int) -> tuple[int, float]:
    return WRONG, 0.99


def every_third_wrong(place: int) -> tuple[int, float]:
    return (WRONG if place % 3 == 2 else TEXT[place]), 0.99


def unsure_at_even(place: int) -> tuple[int, float]:
    return TEXT[place], 0.5 if place % 2 == 0 else 0.99


@dataclass
class Answer:
    tokens: list[int]
    steps: list[tuple[int, int]]  # drafted, accepted
    written: list[list[int]]


def write(guess=always, rows: int = 1, eos=(), stopping=None, context: int = 1000, **settings) -> list[Answer]:
    """Run the loop; `guess` None is no twig."""
    trunk = FakeTrunk(TEXT, context)
    twig = FakeTwig(trunk, guess) if guess else None
    prompts = embed(trunk, Plan(), [[1] * PROMPT] * rows)
    decoder = Decoder(trunk, twig, Plan(), GenerationSettings(**settings), eos, stopping=stopping)
    answers = [Answer([], [], []) for _ in range(rows)]
    for round_ in decoder.steps(prompts):
        for b, step in round_:
            answers[b].tokens += step.tokens
            answers[b].steps.append((len(step.drafted), step.accepted))
            answers[b].written.append(step.tokens)
    return answers


@pytest.mark.parametrize(
    ("guess", "steps"),
    [
        (None, [(0, 0)] * 12),
        (always, [(5, 5), (5, 5)]),
        (never, [(5, 0)] * 7 + [(4, 0), (3, 0), (2, 0), (1, 0), (0, 0)]),
        # 0 1 x | 3 4 x | 6 7 x | 9 10 x: two of five are taken, the base corrects the third
        (every_third_wrong, [(5, 2), (5, 2), (5, 2), (2, 2)]),
        # An unsure token is kept and ends the draft: 0 | (1 by the base) 2 | (3) 4 | ...
        (unsure_at_even, [(1, 1)] * 5 + [(1, 1)]),
    ],
    ids=["no-twig", "always", "never", "every-third-wrong", "unsure"],
)
def test_exact_drafts(guess, steps):
    (answer,) = write(guess, max_new_tokens=12)
    assert answer.tokens == TEXT[:12]
    assert answer.steps == steps


@pytest.mark.parametrize("draft_length", [0, 1, 2, 7])
def test_draft_length(draft_length):
    (answer,) = write(always, max_new_tokens=16, draft_length=draft_length)
    full, rest = divmod(16, draft_length + 1)
    assert answer.steps == [(draft_length, draft_length)] * full + ([(rest - 1, rest - 1)] if rest else [])


@pytest.mark.parametrize(("confidence", "length"), [(0.0, 5), (0.5, 5), (0.51, 1), (0.99, 1), (1.0, 1)])
def test_confidence_is_asked_after_the_token_is_kept(confidence, length):
    """The twig is 0.50001 sure of each word."""
    (answer,) = write(lambda place: (TEXT[place], 0.50001), max_new_tokens=12, draft_confidence=confidence)
    assert answer.steps[0] == (length, length)


@pytest.mark.parametrize("place", range(9))
@pytest.mark.parametrize("guess", [None, always, never, every_third_wrong])
def test_end_token_anywhere(guess, place):
    """Inside a draft, as its last word, as the base's own word, as the very first."""
    (answer,) = write(guess, eos=[TEXT[place]], max_new_tokens=12)
    assert answer.tokens == TEXT[:place]


def test_nothing_is_drafted_behind_the_end_token():
    (answer,) = write(always, eos=[TEXT[2]], max_new_tokens=12)
    assert answer.steps == [(3, 3)] and answer.written == [TEXT[:2]]


@pytest.mark.parametrize("limit", range(1, 14))
@pytest.mark.parametrize("guess", [None, always, never, every_third_wrong, unsure_at_even])
def test_limit_anywhere(guess, limit):
    """Exactly as many words as allowed, and never a draft that could not be used."""
    (answer,) = write(guess, max_new_tokens=limit)
    assert answer.tokens == TEXT[:limit]
    left = limit
    for (drafted, _), written in zip(answer.steps, answer.written, strict=True):
        assert drafted <= min(5, left - 1)
        left -= len(written)


def test_one_token_only():
    for guess in (None, always, never):
        (answer,) = write(guess, max_new_tokens=1)
        assert answer.tokens == TEXT[:1] and answer.steps == [(0, 0)]


def test_a_full_context_ends_the_answer():
    (answer,) = write(always, context=PROMPT + 8, max_new_tokens=100)
    assert answer.tokens == TEXT[:8]


@pytest.mark.parametrize("place", range(1, 9))
def test_stopping_inside_a_draft(place):
    """Criteria are asked after each token, not after each draft."""
    seen = []

    def rule(ids, scores):
        seen.append(ids[0].tolist())
        return torch.tensor([ids.shape[1] >= PROMPT + place])

    (answer,) = write(always, stopping=[rule], max_new_tokens=12)
    assert answer.tokens == TEXT[:place]
    assert seen == [[1, 1, 1, *TEXT[:n]] for n in range(1, place + 1)]


def test_stop_string_inside_a_draft():
    tokenizer = tiny_tokenizer()
    words = tokenizer.convert_tokens_to_ids(["t", "h", "e", "r", "e", "a", "d", "o", "n", "l", "y", "x"])
    table = dict(zip(TEXT, words, strict=False))
    rule = StopStringCriteria(tokenizer, ["ead"])

    def translated(ids, scores):
        return rule(torch.tensor([[table.get(t, 1) for t in ids[0].tolist()]]), scores)

    (answer,) = write(always, stopping=StoppingCriteriaList([translated]), max_new_tokens=12)
    assert answer.tokens == TEXT[:7]
    assert answer.steps == [(5, 5), (5, 5)]


def test_rows_end_by_themselves():
    """Rows of a batch draft, stop and leave at their own pace; who stays goes on undisturbed."""
    rows = 4
    places = iter(range(1000))

    def stop(ids, scores):  # every fourth token that is written anywhere ends its row
        return torch.tensor([next(places) == 3])

    answers = write(every_third_wrong, rows=rows, stopping=[stop], max_new_tokens=11)
    lengths = [len(a.tokens) for a in answers]
    assert sorted(lengths)[1:] == [11, 11, 11] and min(lengths) < 11
    assert all(a.tokens == TEXT[: len(a.tokens)] for a in answers)


def test_a_draft_of_unequal_rows():
    """Two rows at the same words, one of them cut short: the longer one keeps its full drafts."""
    alone = write(every_third_wrong, max_new_tokens=12)[0]
    together = write(every_third_wrong, rows=3, max_new_tokens=12)
    assert [a.steps for a in together] == [alone.steps] * 3
