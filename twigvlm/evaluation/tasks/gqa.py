"""GQA, balanced test-dev: short answers compared as they are.

The numbers are those of GQA's `eval.py` after LLaVA's conversion of the answers (final periods off, lower case).
Scene graphs and choices do not exist for this split, so validity and plausibility are 0, as that script prints.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ...errors import InputError
from .base import Score, Source
from .llava import LLAVA_PAPER, SHORT_ANSWER, LlavaTask, asked_part, same_questions, truth_needed
from .pairing import ids_of
from .reading import ID, Doubts, added, checked, first, last_by_id, locate, read_records, read_table, write_whole

NO_STEP = ("exist", "query: name", "choose name")  # a step whose text holds one of these is not counted
BY = {
    "Accuracy / structural type": lambda question: question["types"]["structural"],
    "Accuracy / semantic type": lambda question: question["types"]["semantic"],
    "Accuracy / steps number": lambda question: _steps(question),
    "Accuracy / words number": lambda question: len(question["question"].split()),
}


class GQA(LlavaTask):
    name = "gqa"
    title = "GQA"
    metric = "accuracy, %"
    splits = ("testdev_balanced",)
    suffix = SHORT_ANSWER
    published: ClassVar = {"llava-1.5-7b": 61.9, "llava-1.5-13b": 63.3}
    source = LLAVA_PAPER
    folder = "gqa"
    in_suite, column = True, 1
    layout: ClassVar = {
        "testdev_balanced": {
            "questions": "llava_gqa_testdev_balanced.jsonl",
            "annotations": "data/testdev_balanced_questions.json",
            "images": "data/images",
        }
    }

    def read_truth(self, annotations: Path | None, questions: Path) -> Source:
        path = locate(truth_needed(self, annotations), "testdev_balanced_questions.json", "annotations.json")
        return Source(path, _truth(path))

    def read_answers(self, path: Path) -> Source:
        """LLaVA's answers, or a file that its script has converted."""
        records = read_records(path)
        if not records or "questionId" not in records[0]:
            return super().read_answers(path)
        records = read_records(path, questionId=ID, prediction=str)
        return Source(path, [{"question_id": r["questionId"], "prediction": r["prediction"]} for r in records])

    def score_records(self, asked: Source, truth: Source | None, said: Source, strict: bool = False) -> Score:
        table, doubts = truth.rows, Doubts()
        names = set(ids_of(asked))
        found = last_by_id(_converted(said), doubts)
        doubts.add("foreign", [name for name in found if name not in table])
        if strict:
            same_questions(sorted(names), table, asked, truth)
            doubts.refuse(said.path)
        balanced = [name for name, question in table.items() if question["isBalanced"]]
        counted, note = asked_part(balanced, names, found, truth)
        missing = [name for name in counted if name not in found]
        if missing:  # the official script stops here too
            raise InputError(f"{said.path}: {len(missing)} balanced questions have no answer: {first(missing)}")
        uncounted = [name for name in names if name not in found]
        if uncounted:
            note = "; ".join(filter(None, (note, f"{len(uncounted)} questions without an answer are not balanced")))
        texts = {name: record["prediction"] for name, record in found.items()}
        parts = _parts({name: table[name] for name in counted}, texts)
        return Score(parts["accuracy"], parts, doubts.counts(), note)

    def upload(self, asked: Source, truth: Source | None, said: Source, out: Path) -> Path:
        """`testdev_balanced_predictions.json` of GQA's script."""
        rows = [{"questionId": row["question_id"], "prediction": row["prediction"]} for row in _converted(said)]
        write_whole(out, json.dumps(rows))
        return out


def _converted(said: Source) -> list[dict[str, Any]]:
    """LLaVA's answers without final periods, in lower case; what is converted already is taken as it is."""
    return [row if "prediction" in row else {**row, "prediction": row["text"].rstrip(".").lower()} for row in said.rows]


def _truth(path: Path) -> dict[str, Any]:
    truth = read_table(path)
    kinds = {"isBalanced": (bool, int), "answer": str, "question": str, "types": dict, "groups": dict, "semantic": list}
    for name, question in truth.items():
        checked(question, f"{path}: question {name}", **kinds)
        checked(question["types"], f"{path}: types of question {name}", structural=str, semantic=str)
        checked(question["groups"], f"{path}: groups of question {name}", **{"global": (str, type(None))})
        for step in question["semantic"]:
            checked(step, f"{path}: a step of question {name}", operation=str, argument=str)
    return truth


def _steps(question: Mapping[str, Any]) -> int:
    texts = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(word in text for word in NO_STEP) for text in texts)


def _parts(truth: Mapping[str, Any], said: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the official script prints, rounded as printed, and the exact accuracy."""
    right = {name: said[name] == question["answer"] for name, question in truth.items()}
    is_open = {name: question["types"]["structural"] == "query" for name, question in truth.items()}
    correct, count = sum(right.values()), len(right)
    parts: dict[str, Any] = {
        "binary": _percent([right[name] for name in truth if not is_open[name]]),
        "open": _percent([right[name] for name in truth if is_open[name]]),
        "accuracy": _percent(list(right.values())),
        "validity": 0.0,
        "plausibility": 0.0,
        "distribution": _printed(_distance(truth, said)),
    }
    for title, key in BY.items():
        cells = defaultdict(list)
        for name, question in truth.items():
            cells[key(question)].append(right[name])
        parts[title] = {str(cell): [_percent(cells[cell]), len(cells[cell])] for cell in sorted(cells)}
    parts["exact"] = {"correct": correct, "count": count, "accuracy": 100 * correct / count}
    parts["printed"] = _report(parts)
    return parts


def _distance(truth: Mapping[str, Any], said: Mapping[str, str]) -> float:
    """Chi-square between given and true answers, averaged over question groups by size, / 100."""
    gold: dict[str, Counter[str]] = {}
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for name, question in truth.items():
        group = question["groups"]["global"]
        if group is not None:
            gold.setdefault(group, Counter())[question["answer"]] += 1
            given[group][said[name]] += 1
    sizes = [answers.total() for answers in gold.values()]
    if not sizes:
        return 0.0  # the official script divides by zero here
    chi = [
        added(float(given[group][answer] - n) ** 2 / n for answer, n in answers.items())
        for group, answers in gold.items()
    ]
    return added(c * size for c, size in zip(chi, sizes, strict=True)) / sum(sizes) / 100


def _percent(right: list[bool]) -> float:
    return _printed(sum(right) / len(right) * 100) if right else 0.0


def _printed(value: float) -> float:
    return float(f"{value:.2f}")


def _report(parts: Mapping[str, Any]) -> list[str]:
    """The lines of the official script's report."""
    names = ("binary", "open", "accuracy", "validity", "plausibility")
    lines = [f"{name.capitalize()}: {parts[name]:.2f}%" for name in names]
    lines.append(f"Distribution: {parts['distribution']:.2f} (lower is better)")
    for title in BY:
        cells = parts[title].items()
        lines += ["", f"{title}:", *(f"  {cell}: {value:.2f}% ({n} questions)" for cell, (value, n) in cells)]
    return lines
