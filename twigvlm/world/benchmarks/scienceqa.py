"""ScienceQA: closed choice, with and without a picture."""

from __future__ import annotations

import random
from collections.abc import Iterator

from ..questions import LETTERS
from ..scenes import COLOURS, PLACES, SHAPES, WORDS
from .folder import Folder
from .pool import FEW, Asked, choices

_VOCABULARY = {"a colour": COLOURS, "a shape": SHAPES, "a place": PLACES, "an animal": WORDS}
SCIENCE_BLIND = 40  # questions without a picture


def write(out: Folder) -> None:
    asked = choices("scienceqa", FEW, {"colour": 48, "shape": 44, "where": 40, "count": 20, "read": 8})
    problems, records = {}, []
    for number, q in enumerate([*asked, *_without_picture(SCIENCE_BLIND)], 1):
        key = str(number)
        problems[key] = _problem(q)
        lines = [q.text, *(f"{letter}. {text}" for letter, text in zip(LETTERS, q.options, strict=True))]
        mark = "<image>\n" if q.seed >= 0 else ""
        record = {"id": key, "conversations": _turns(mark + "\n".join(lines), f"The answer is {q.answer}.")}
        if q.seed >= 0:
            record["image"] = f"{key}/image.png"
            out.picture(f"images/test/{key}/image.png", q.seed)
        records.append(record)
    every = list(problems)
    splits = {"train": [], "val": [], "test": every, "trainval": [], "minitrain": [], "minival": []}
    out.json("llava_test_CQM-A.json", records)
    out.json("problems.json", problems)
    out.json("pid_splits.json", {**splits, "minitest": every[::10]})


def _turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _without_picture(count: int) -> Iterator[Asked]:
    rng = random.Random("scienceqa without picture")
    for number in range(count):
        name, words = list(_VOCABULARY.items())[number % len(_VOCABULARY)]
        others = [word for other, values in _VOCABULARY.items() if other != name for word in values]
        right = rng.choice(words)
        options = rng.sample(others, len(LETTERS) - 1)
        options.insert(rng.randrange(len(LETTERS)), right)
        answer = LETTERS[options.index(right)]
        yield Asked(-1, "choice", f"Which of these is {name}?", answer, tuple(options))


def _problem(q: Asked) -> dict:
    return {
        "question": q.text,
        "choices": list(q.options),
        "answer": LETTERS.index(q.answer),
        "hint": "",
        "image": "image.png" if q.seed >= 0 else None,
        "task": "closed choice",
        "grade": "grade1",
        "subject": "natural science" if q.seed >= 0 else "language science",
        "topic": q.topic if q.seed >= 0 else "vocabulary",
        "category": "sprout",
        "skill": "sprout",
        "lecture": "",
        "solution": "",
        "split": "test",
    }
