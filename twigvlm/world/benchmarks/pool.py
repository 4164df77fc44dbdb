"""Questions about scenes of the test split, as benchmarks ask for them: so many of a kind, none twice.

Everything is a pure function of its arguments. Knows the embedded world, no file format.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from ..questions import YES_NO, ask
from ..scenes import COLOURS, PLACES, SHAPES, WORDS, Scene, sample_scene

SPLIT = "test"
SCENES = range(48)  # of most benchmarks
FEW = range(24)  # of those whose pictures are lossless
UNANSWERED = range(60, 72)  # of test questions, whose answers nobody has
PEOPLE = 10  # answers a question in TextVQA and VQAv2
ROUNDS = 60  # draws from a scene
OPTIONS = {"colour": COLOURS, "shape": SHAPES, "where": PLACES, "count": tuple("0123456"), "read": WORDS}


@dataclass(frozen=True)
class Asked:
    """One question: `text` without any hint; `options` only for multiple choice, whose answer is a letter."""

    seed: int
    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()

    @property
    def topic(self) -> str:
        """What a multiple choice is about."""
        return next((name for name, values in OPTIONS.items() if set(self.options) <= set(values)), self.kind)

    @property
    def right(self) -> str:
        """The answer in words."""
        return self.options[ord(self.answer) - ord("A")] if self.options else self.answer


Fits = Callable[[Asked], bool]


@cache
def scene(seed: int) -> Scene:
    return sample_scene(SPLIT, seed)


def with_word(count: int, word: bool = True) -> list[int]:
    """The first `count` scenes that show a word (or show none)."""
    found: list[int] = []
    seed = 0
    while len(found) < count:
        if bool(scene(seed).word) == word:
            found.append(seed)
        seed += 1
    return found


def draws(label: str, kind: str, seed: int) -> Iterator[Asked]:
    """Questions of a kind about one scene, some of them more than once."""
    for round_ in range(ROUNDS):
        found = ask(scene(seed), kind, random.Random(f"{label} {kind} {seed} {round_}"))
        if found:
            text = found.text.split("\n")[0].removesuffix(f" {YES_NO}")  # other hints and options stand below
            yield Asked(seed, kind, text, found.answer, found.options)


def gather(label: str, kind: str, seeds: Iterable[int], count: int, fits: Fits = lambda _: True) -> list[Asked]:
    """`count` questions that fit, spread over the scenes as evenly as they allow."""
    seeds = list(seeds)
    random.Random(f"{label} {kind}").shuffle(seeds)
    streams = {seed: draws(label, kind, seed) for seed in seeds}
    out: list[Asked] = []
    seen: set[tuple[int, str]] = set()
    while len(out) < count and streams:
        for seed in list(streams):
            fresh = (q for q in streams[seed] if fits(q) and (seed, q.text) not in seen)
            question = next(fresh, None)
            if question is None:
                del streams[seed]
            elif len(out) < count:
                seen.add((seed, question.text))
                out.append(question)
    if len(out) < count:
        raise ValueError(f"{len(seeds)} scenes have {len(out)} questions for {label}, {kind}; {count} are needed")
    return out


def balanced(label: str, kind: str, seeds: Iterable[int], count: int, fits: Fits = lambda _: True) -> list[Asked]:
    """As `gather`, half of them with the answer Yes and half with No."""
    yes = gather(f"{label} yes", kind, seeds, count // 2, lambda q: q.answer == "Yes" and fits(q))
    no = gather(f"{label} no", kind, seeds, count - count // 2, lambda q: q.answer == "No" and fits(q))
    return yes + no


def pair_of(label: str, kind: str, seed: int, fits: Fits) -> tuple[Asked, Asked] | None:
    """A question whose answer is Yes and one whose answer is No about the same scene, if it has both."""
    found: dict[str, Asked] = {}
    for question in draws(label, kind, seed):
        if fits(question):
            found.setdefault(question.answer, question)
        if "Yes" in found and "No" in found:
            return found["Yes"], found["No"]
    return None


def in_order(questions: Iterable[Asked]) -> list[Asked]:
    """By scene, so that questions about one picture follow each other."""
    return sorted(questions, key=lambda q: (q.seed, q.kind, q.text))


def choices(label: str, seeds: Iterable[int], topics: dict[str, int]) -> list[Asked]:
    """Multiple-choice questions, so many of each topic."""
    seeds = list(seeds)
    found = []
    for topic, count in topics.items():
        found += gather(f"{label} {topic}", "choice", seeds, count, lambda q, topic=topic: q.topic == topic)
    return in_order(found)


def people(answer: str, label: str) -> list[str]:
    """Ten answers: most people are right, and enough of them that the right answer earns everything."""
    rng = random.Random(label)
    wrong = rng.choice((0, 0, 1, 2))
    answers = [answer] * (PEOPLE - wrong) + ["unanswerable"] * wrong
    rng.shuffle(answers)
    return answers
