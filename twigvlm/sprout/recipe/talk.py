"""Whole conversations about scenes as training rows: any kinds of question in any order, short and long.

A row is what a user and sprout would write: with or without the system sentence, the picture (here
as a few visual tokens, in words or as patches), then turns until the row is full. Nothing is packed
or masked: plain causal rows, as a language model is trained on. One scene a row.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch

from ...prompt.template import VICUNA_V1, encode
from ...world.phrasing import rephrase
from ...world.questions import Question, ask
from ...world.scenes import Scene
from .drills import drill
from .naming import encoded

SYSTEM_SHARE = 0.35  # of the conversations begin with the system sentence
# What is learnt last is asked most.
ASKED = {"exist": 1, "colour": 0.7, "shape": 0.7, "count": 2.5, "where": 1, "relation": 2, "compare": 3,
         "read": 1, "choice": 3}  # fmt: skip
AGAIN = 0.7  # of the questions whose answer is the usual one of their kind are drawn again
DESCRIPTION_WEIGHT = 0.5  # of a description's tokens against a short answer's


@dataclass
class Row:
    """One conversation: `ids` without the visual tokens, which stand before ids[head]; `weights` of each token as a target."""

    head: int
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    short: list[bool] = field(default_factory=list)  # it is part of a short answer
    turns: list[tuple[Question, int, int]] = field(default_factory=list)  # question, its answer's place in ids


def empty_row(tokenizer, system: bool) -> Row:
    """What stands before the picture, with or without the system sentence."""
    ids = encode(tokenizer, f"{VICUNA_V1.system} {VICUNA_V1.user}: " if system else f"{VICUNA_V1.user}: ", -1, 0)
    return Row(len(ids), list(ids), [0.0] * len(ids), [False] * len(ids))


def converse(scene: Scene, rng: random.Random, tokenizer, lesson) -> Row:
    """A row of at most `lesson.length` tokens: as many turns as fit; the questions' own words count `lesson.asked_weight`.

    A share `lesson.described` of the rows holds a description, in front, in between or at the end.
    """
    row = empty_row(tokenizer, rng.random() < SYSTEM_SHARE)
    long = rephrase(ask(scene, "describe", rng), rng) if rng.random() < lesson.described else None
    before = rng.choice((0, 0, 1, 2, 9))  # turns in front of the description, where they fit
    room = cost(long, tokenizer) if long else 0
    misses = 0
    while misses < 3:
        if long and (len(row.turns) == before or misses == 2):
            add_turn(row, long, tokenizer, lesson.length, lesson.asked_weight)
            long, room, misses = None, 0, 0
        question = short_question(scene, rng, lesson.drilled)
        if question and not add_turn(row, question, tokenizer, lesson.length - room, lesson.asked_weight):
            misses += 1
    return row


def short_question(scene: Scene, rng: random.Random, drilled: float) -> Question | None:
    """A question with a short answer, of a share `drilled` a drill; None where the scene has none of the kind drawn."""
    if rng.random() < drilled:
        return drill(scene, rng)
    kind = rng.choices(tuple(ASKED), tuple(ASKED.values()))[0]
    question = ask(scene, kind, rng)
    if question and _usual(question) and rng.random() < AGAIN:
        question = ask(scene, kind, rng)
    return question and rephrase(question, rng)


def _usual(question: Question) -> bool:
    """Its answer is the one that guessing gets right most often."""
    if question.kind == "count":
        return question.answer == "1"
    return question.kind == "compare" and question.answer == "No" and "larger" not in question.text


def cost(question: Question, tokenizer) -> int:
    """Tokens of a turn that is not the first."""
    asked = f"{VICUNA_V1.user}: {question.text} {VICUNA_V1.assistant}:"
    return len(encoded(tokenizer, asked)) + len(encoded(tokenizer, f"{question.answer}{VICUNA_V1.end}"))


def add_turn(row: Row, question: Question, tokenizer, length: int, asked_weight: float) -> bool:
    """Append a question and its answer; False when they do not fit."""
    head = f"{VICUNA_V1.user}: {question.text}" if row.turns else f"\n{question.text}"
    asked = encoded(tokenizer, f"{head} {VICUNA_V1.assistant}:")
    told = encoded(tokenizer, f"{question.answer}{VICUNA_V1.end}")
    if len(row.ids) + len(asked) + len(told) > length:
        return False
    start = len(row.ids) + len(asked)
    row.turns.append((question, start, start + len(told)))
    row.ids += [*asked, *told]
    long = question.kind == "describe"
    row.weights += [asked_weight] * len(asked) + [DESCRIPTION_WEIGHT if long else 1.0] * len(told)
    row.short += [False] * len(asked) + [not long] * len(told)
    return True


def single(question: Question, tokenizer, system: bool = True) -> Row:
    """One question alone."""
    row = empty_row(tokenizer, system)
    add_turn(row, question, tokenizer, 10_000, 0.0)
    return row


def collate(rows: list[Row], width: int = 0) -> dict[str, torch.Tensor]:
    """Rows as tensors [B, S], padded at the right, to `width` if none is longer; `heads` [B]: where the visual tokens go."""
    width = max(width, *(len(row.ids) for row in rows))
    out = {
        "ids": np.zeros((len(rows), width), np.int64),
        "weights": np.zeros((len(rows), width), np.float32),
        "short": np.zeros((len(rows), width), bool),
    }
    for i, row in enumerate(rows):
        for name, values in (("ids", row.ids), ("weights", row.weights), ("short", row.short)):
            out[name][i, : len(values)] = values
    batch = {name: torch.from_numpy(values) for name, values in out.items()}
    batch["looks"] = torch.zeros_like(batch["ids"])
    batch["heads"] = torch.tensor([row.head for row in rows])
    return batch
