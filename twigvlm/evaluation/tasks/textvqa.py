"""TextVQA 0.5.1, validation: short answers read off the picture, compared with ten people's.

The numbers are those of LLaVA's `eval_textvqa.py`: it finds a question by picture and wording, cut from the prompt,
and leaves questions without an answer out of the mean.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...errors import InputError
from .base import Score, Source
from .llava import LLAVA_PAPER, SHORT_ANSWER, LlavaTask, same_questions, truth_needed
from .reading import ID, Doubts, added, checked, first, locate, read_records, read_table
from .vqa_text import evalai, soft_score

PEOPLE = 10
REFERENCE = "Reference OCR token: "
_FRAMED = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
Key = tuple[Any, Any]  # picture, question in lower case (None where the prompt has none)


class TextVQA(LlavaTask):
    name = "textvqa"
    title = "TextVQA"
    metric = "VQA accuracy, %"
    splits = ("val",)
    suffix = SHORT_ANSWER
    published: ClassVar = {"llava-1.5-7b": 58.2, "llava-1.5-13b": 61.3}
    source = LLAVA_PAPER
    folder, shared_ids = "textvqa", True
    in_suite, column = True, 5
    layout: ClassVar = {
        "val": {
            "questions": "llava_textvqa_val_v051_ocr.jsonl",
            "annotations": "TextVQA_0.5.1_val.json",
            "images": "train_images",
        }
    }

    def read_questions(self, path: Path) -> Source:
        return Source(path, read_records(path, question_id=ID, text=str))

    def read_truth(self, annotations: Path | None, questions: Path) -> Source:
        path = locate(truth_needed(self, annotations), "TextVQA_0.5.1_val.json", "annotations.json")
        return Source(path, _truth(path))

    def read_answers(self, path: Path) -> Source:
        return Source(path, read_records(path, question_id=ID, prompt=str, text=str))

    def score_records(self, asked: Source, truth: Source | None, said: Source, strict: bool = False) -> Score:
        if strict:
            _match(asked, truth)
        keys = [_key(line["question_id"], line["prompt"]) for line in said.rows]
        both = list(zip(said.rows, keys, strict=True))
        foreign = [line["question_id"] for line, key in both if key not in truth.rows]
        if foreign:  # the official script stops here too
            raise InputError(f"{said.path}: {len(foreign)} answers whose question {truth.path} lacks: {first(foreign)}")
        if not both:
            raise InputError(f"{said.path}: holds no answer")
        doubts = _doubts(asked, keys)
        if strict:
            doubts.refuse(said.path)
        items = [_item(line, key, truth.rows[key], truth.path) for line, key in both]
        accuracy = added(item["score"] for item in items) / len(items)
        percent = 100.0 * accuracy
        printed = [said.path.stem, f"Samples: {len(items)}", f"Accuracy: {percent:.2f}%"]
        parts = {"accuracy": accuracy, "samples": len(items), "printed": printed, "items": items}
        return Score(percent, parts, doubts.counts())


def question_of(prompt: str) -> str | None:
    """The question in lower case, cut out of a prompt with or without OCR tokens; None where the form is not known."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = _FRAMED.search(prompt)
        return found.group(1).lower() if found else None
    if REFERENCE in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(REFERENCE.rstrip()) else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


def _key(picture: Any, prompt: str) -> Key:
    return picture, question_of(prompt)


def _truth(path: Path) -> dict[Key, Mapping[str, Any]]:
    rows = checked(read_table(path), str(path), data=list)["data"]
    kinds = {"image_id": ID, "question": str, "answers": list}
    rows = [checked(row, f"{path}: data item {number}", **kinds) for number, row in enumerate(rows, 1)]
    return {(row["image_id"], row["question"].lower()): row for row in rows}


def _match(asked: Source, truth: Source) -> None:
    names = {f"{line['question_id']} {question_of(line['text'])!r}": line for line in asked.rows}
    known = {name for name, line in names.items() if _key(line["question_id"], line["text"]) in truth.rows}
    same_questions(names, known, asked, truth)


def _doubts(asked: Source, keys: Sequence[Key]) -> Doubts:
    doubts, said = Doubts(), Counter(keys)
    wanted = Counter(_key(line["question_id"], line["text"]) for line in asked.rows)
    doubts.add("missing", [f"{picture} {question!r}" for picture, question in (wanted - said).elements()])
    known = Counter({key: max(1, wanted[key]) for key in said})
    doubts.add("duplicate", [f"{picture} {question!r}" for picture, question in (said - known).elements()])
    return doubts


def _item(line: Mapping[str, Any], key: Key, row: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if len(row["answers"]) != PEOPLE or not all(isinstance(answer, str) for answer in row["answers"]):
        raise InputError(f"{path}: question {key[1]!r} of {key[0]} needs {PEOPLE} answers as text")
    answer, given = evalai(line["text"]), [evalai(text) for text in row["answers"]]
    return {
        "question_id": line["question_id"],
        "question": key[1],
        "processed": answer,
        "processed_gt": given,
        "score": soft_score(answer, list(enumerate(given))),
    }
