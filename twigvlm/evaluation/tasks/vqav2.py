"""VQAv2: short answers to questions about photographs, compared with ten people's.

The numbers are those of `vqaEval.py` (GT-Vision-Lab/VQA). The truth of test-dev is on a server: there LLaVA's
conversion of the answers is written for it and nothing is scored here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...errors import InputError
from .base import Question, Score, Source
from .llava import LLAVA_PAPER, SHORT_ANSWER, LlavaTask, asked_part, same_questions
from .pairing import ids_of
from .reading import (
    ID,
    Doubts,
    added,
    checked,
    first,
    last_by_id,
    locate,
    read_json,
    read_records,
    read_table,
    write_whole,
)
from .vqa_text import evalai, flat, soft_score, vqa

SERVER = "https://eval.ai/web/challenges/challenge-page/830"
NOT_SCORED = (
    f"not scored here: no annotations given; test-dev's are on a server ({SERVER}) that takes the exported file"
)


class VQAv2(LlavaTask):
    name = "vqav2"
    title = "VQAv2"
    metric = "VQA accuracy, %"
    splits = ("test-dev", "val")
    suffix = SHORT_ANSWER
    published: ClassVar = {"llava-1.5-7b": 78.5, "llava-1.5-13b": 80.0}
    source = LLAVA_PAPER
    folder = "vqav2"
    in_suite, column = True, 7
    layout: ClassVar = {
        "test-dev": {
            "questions": "llava_vqav2_mscoco_test-dev2015.jsonl",
            "upload": "llava_vqav2_mscoco_test2015.jsonl",  # the server wants a row for every test question
            "images": "test2015",
        },
        "val": {
            "questions": "v2_OpenEnded_mscoco_val2014_questions.json",
            "annotations": "v2_mscoco_val2014_annotations.json",
            "images": "val2014",
        },
    }

    def questions(self, root: Path, split: str) -> list[Question]:
        if split != "val":
            return super().questions(root, split)
        files = self.files(root, split)
        return [
            Question(
                str(line["question_id"]),
                line["question"] + self.suffix,
                (files["images"] / f"COCO_val2014_{line['image_id']:012d}.jpg",),
                {"question_id": line["question_id"]},
            )
            for line in _questions(files["questions"], question=str, image_id=int)
        ]

    def read_questions(self, path: Path) -> Source:
        return Source(path, _questions(path))

    def read_truth(self, annotations: Path | None, questions: Path) -> Source | None:
        if annotations is None:
            return None
        path = locate(annotations, "v2_mscoco_val2014_annotations.json", "annotations.json")
        return Source(path, _truth(path))

    def read_answers(self, path: Path) -> Source:
        """LLaVA's answers, or the rows of the server's file."""
        records = read_records(path, question_id=ID)
        if not records or not _is_submission(records[0]):
            return super().read_answers(path)
        return Source(path, read_records(path, question_id=ID, answer=str))

    def score_records(self, asked: Source, truth: Source | None, said: Source, strict: bool = False) -> Score:
        doubts = Doubts()
        rows, kind = _submission(asked, said, doubts)
        if strict:
            doubts.refuse(said.path)
        if truth is None:
            return Score(None, {}, doubts.counts(), NOT_SCORED)
        ids = set(ids_of(asked))
        answers = {str(row["question_id"]): row["answer"] for row in rows}
        names, note = asked_part(truth.rows, ids, answers, truth)
        same_questions(sorted(ids), truth.rows, asked, truth)
        _refuse_difference(names, answers, said.path)
        parts = _parts({name: truth.rows[name] for name in names}, answers)
        return Score(parts["overall"], {**parts, kind: parts}, doubts.counts(), note)

    def upload_questions(self, asked: Source) -> Source:
        place = asked.path.resolve().parts[-2:]
        for files in self.layout.values():
            if "upload" in files and place == (self.folder, files["questions"]):
                return self.read_questions(asked.path.with_name(files["upload"]))
        return asked

    def upload(self, asked: Source, truth: Source | None, said: Source, out: Path) -> Path:
        """The server's file: a row for every question of the question file."""
        rows, _ = _submission(asked, said, Doubts())
        write_whole(out, json.dumps(rows))
        return out


def _questions(path: Path, **fields: Any) -> list[dict[str, Any]]:
    """Lines of LLaVA's question file, or the `questions` of the official one (one object, named .json)."""
    table = read_json(path) if path.suffix == ".json" else None
    if not isinstance(table, dict):
        return read_records(path, question_id=ID, **fields)
    rows = checked(table, str(path), questions=list)["questions"]
    return [checked(row, f"{path}: question {n}", question_id=ID, **fields) for n, row in enumerate(rows, 1)]


def _is_submission(row: Mapping[str, Any]) -> bool:
    return "answer" in row and "text" not in row


def _submission(asked: Source, said: Source, doubts: Doubts) -> tuple[list[dict[str, Any]], str]:
    """Rows {question_id, answer} and the name of their kind, under which the parts stand a second time.

    Such rows are taken as they are; LLaVA's answers become one row a question, "" where there is none.
    """
    last = last_by_id(said.rows, doubts)
    if said.rows and _is_submission(said.rows[0]):
        rows = [{"question_id": row["question_id"], "answer": row["answer"]} for row in last.values()]
        return rows, "raw_predictions"
    ids = [line["question_id"] for line in asked.rows]
    doubts.add("missing", [name for name in ids if str(name) not in last])
    doubts.add("foreign", sorted(set(last) - set(map(str, ids))))
    texts = {name: evalai(row["text"]) for name, row in last.items()}
    return [
        {"question_id": name, "answer": texts.get(str(name), "")} for name in ids
    ], "converted_submission_with_missing"


def _truth(path: Path) -> dict[str, dict[str, Any]]:
    rows = checked(read_table(path), str(path), annotations=list)["annotations"]
    kinds = {"question_id": ID, "question_type": str, "answer_type": str, "answers": list}
    rows = [checked(row, f"{path}: annotation {number}", **kinds) for number, row in enumerate(rows, 1)]
    for row in rows:
        if not row["answers"]:
            raise InputError(f"{path}: question {row['question_id']} has no answers")
        for given in row["answers"]:
            checked(given, f"{path}: an answer of question {row['question_id']}", answer=str)
    return {str(row["question_id"]): row for row in rows}


def _refuse_difference(names: Sequence[str], said: Mapping[str, str], answers: Path) -> None:
    """The official evaluation takes exactly one row for every annotated question."""
    missing = [name for name in names if name not in said]
    foreign = sorted(set(said) - set(names))
    if missing or foreign:
        faults = [
            f"{len(ids)} {word} ({first(ids)})" for ids, word in ((missing, "missing"), (foreign, "foreign")) if ids
        ]
        raise InputError(f"{answers}: does not answer the annotated questions: {', '.join(faults)}")


def _parts(truth: Mapping[str, Mapping[str, Any]], said: Mapping[str, str]) -> dict[str, Any]:
    """The official results; every number is rounded from unrounded values."""
    scores = {name: _score(said[name], row["answers"]) for name, row in truth.items()}
    return {
        "overall": _percent(scores.values()),
        "perQuestionType": _means(truth, scores, "question_type"),
        "perAnswerType": _means(truth, scores, "answer_type"),
        "evalQA": {name: _percent([score]) for name, score in scores.items()},
    }


def _score(answer: str, people: Sequence[Mapping[str, Any]]) -> float:
    """Where all people agree, nothing is normalised but line breaks and outer white space."""
    given = [flat(one["answer"]) for one in people]
    answer = flat(answer)
    if len(set(given)) > 1:
        given, answer = [vqa(text) for text in given], vqa(answer)
    marks = [{name: value for name, value in one.items() if name != "answer"} for one in people]
    return soft_score(answer, list(zip(marks, given, strict=True)))


def _means(truth: Mapping[str, Mapping[str, Any]], scores: Mapping[str, float], field: str) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for name, row in truth.items():
        groups.setdefault(row[field], []).append(scores[name])
    return {group: _percent(values) for group, values in groups.items()}


def _percent(scores: Iterable[float]) -> float:
    values = list(scores)
    return round(100 * added(values) / len(values), 2)
