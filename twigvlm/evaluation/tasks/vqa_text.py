"""Answers of VQAv2 and TextVQA: the two official ways to normalise them and the soft score over ten people.

Both ways share their steps and differ in what comes before. Their quirks are part of the published numbers:
only the first 32 periods go (a flag is passed where a count belongs), a mark is deleted or becomes a space
depending on how it stands anywhere in the text, and the table of contractions knows lower case only.
Sources: GT-Vision-Lab/VQA `vqaEval.py`; facebookresearch/pythia `EvalAIAnswerProcessor`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from .reading import added

MARKS = ';/[]"{}()=+\\_-><@`,?!'
PERIODS = 32  # how many are deleted: the value of re.UNICODE
NUMBERS = {
    word: str(number)
    for number, words in enumerate(
        ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
ARTICLES = {"a", "an", "the"}
REMEMBERED = 1 << 16  # texts: people's answers repeat a lot
ENOUGH = 3  # people who must agree for the full score

# Written without an apostrophe, these get it back.
_ONE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# Written with one of two apostrophes, these get the other.
_TWO = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
# What follows no rule; the first entry takes an apostrophe away, as the official table does.
_ODD = {
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}

_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")


def _contractions() -> dict[str, str]:
    table = dict(_ODD)
    for word in _ONE.split():
        table[word.replace("'", "")] = word
    for word in _TWO.split():
        head, middle, tail = word.split("'")
        table[f"{head}{middle}'{tail}"] = table[f"{head}'{middle}{tail}"] = word
    return table


CONTRACTIONS = _contractions()


@lru_cache(maxsize=REMEMBERED)
def evalai(text: str) -> str:
    """As TextVQA normalises every answer, and as LLaVA converts answers for VQAv2's server."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _plain_words(_without_marks(flat(text)))


@lru_cache(maxsize=REMEMBERED)
def vqa(text: str) -> str:
    """As VQAv2's evaluation normalises where people disagree; `text` is `flat` already."""
    return _plain_words(_without_marks(text))


def flat(text: str) -> str:
    """On one line, without white space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def soft_score(answer: str, given: Sequence[tuple[Any, str]]) -> float:
    """Mean over people of min(1, agreeing others / 3).

    `given` are pairs of whatever tells two people apart and what they said: pairs that are equal count as one
    person's, as in the official code.
    """
    agreeing = [pair for pair in given if pair[1] == answer]
    shares = [min(1.0, (len(agreeing) - agreeing.count(pair)) / ENOUGH) for pair in given]
    return added(shares) / len(shares)


def _without_marks(text: str) -> str:
    out = text
    thousands = _THOUSANDS.search(text) is not None  # one "1,000" and every mark of the text goes without a space
    for mark in MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or thousands else " ")
    return _PERIOD.sub("", out, count=PERIODS)


def _plain_words(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
