"""Anybody's own questions, as LLaVA's `model_vqa` takes them: JSON lines {question_id, image, text}.

`text` is asked as it stands. `image` is a file below the image folder, `images` or a list several; a line without
them asks about none. A line may give the truth: `answer` (a text) or `answers` (texts, or objects with
an `answer`, as VQAv2, TextVQA and VizWiz have them); a file of annotations with a `question_id` does as well.

Two figures where there is truth, both in percent:
- exact match: the answer is one of those given, outer white space, case and a final period aside;
- VQA accuracy: all texts normalised as TextVQA's are, then the mean over people of min(1, agreeing others / 3). Of one
  to three answers it is the share of people who agree, since no three others can.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...config import IMAGE
from ...errors import InputError
from ...files import check_regular, is_file
from ...prompt.media import ADDRESS, PICTURES, SHOWN, fields_of, unread
from .base import Question, Score, Source, Task
from .pairing import ids_of, pair
from .reading import ID, checked, first, read_json, read_records
from .vqa_text import ENOUGH, evalai, soft_score

NO_QUESTIONS = "--task vqa asks your own questions; give --question-file FILE and --image-folder DIR"
TRUTH = ("answer", "answers")


@dataclass(frozen=True)
class VQA(Task):
    """`given` sets the files: there is no folder in which they would be looked for."""

    name = "vqa"
    title = "Own questions"
    metric = "VQA accuracy, %"
    max_new_tokens = 1024
    own_files = True
    published: ClassVar[Mapping[str, float]] = {}
    remedy = "repair the file"

    question_file: Path | None = None
    image_folder: Path | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The question file's name: it tells the folders of answers apart."""
        stem = self.question_file.stem if self.question_file else ""
        return (re.sub(r"[^\w.+-]+", "-", stem) or "questions",)

    def given(self, question_file: Path | None, image_folder: Path | None, data: Path | None = None) -> VQA:
        if data is not None:
            raise InputError("--data is a folder of benchmarks; --task vqa takes --question-file and --image-folder")
        if question_file is None:
            raise InputError(NO_QUESTIONS)
        check_regular(question_file)
        if not is_file(question_file):
            raise InputError(f"--question-file {question_file}: no such file")
        if image_folder is not None and not image_folder.is_dir():
            raise InputError(f"--image-folder {image_folder}: no such folder")
        return VQA(question_file, image_folder)

    def files(self, root: Path, split: str) -> dict[str, Path]:
        if self.question_file is None:
            raise InputError(NO_QUESTIONS)
        found = {"questions": self.question_file}
        return found if self.image_folder is None else found | {"images": self.image_folder}

    def questions(self, root: Path, split: str) -> list[Question]:
        path = self.files(root, split)["questions"]
        lines = read_records(path, question_id=ID, text=str)
        found = [self._question(line, f"{path}: question {line['question_id']}") for line in lines]
        if found and self.image_folder is not None and not any(question.images for question in found):
            raise InputError(
                f"{path}: none of its questions names a picture (their fields: {fields_of(lines)}), but --image-folder is "
                'given; name pictures under "image" or "images", or leave the flag out'
            )
        return found

    def _question(self, line: Mapping[str, Any], where: str) -> Question:
        if not line["text"].strip():
            raise InputError(f"{where}: its text is empty; ask something")
        names, marks = _names(line, where), line["text"].count(IMAGE)
        if marks not in (0, len(names)):
            raise InputError(f"{where}: has {marks} {IMAGE} marks for {len(names)} images; write none or one per image")
        if names and self.image_folder is None:
            raise InputError(f"{where}: has a picture, {names[0]}; give --image-folder DIR, the folder that holds it")
        pictures = tuple(self.image_folder / name for name in names) if self.image_folder else ()
        return Question(str(line["question_id"]), line["text"], pictures, {"question_id": line["question_id"]})

    def read_truth(self, annotations: Path | None, questions: Path) -> Source | None:
        return None if annotations is None else Source(annotations, _rows(annotations))

    def score_records(self, asked: Source, truth: Source | None, said: Source, strict: bool = False) -> Score:
        ids = ids_of(asked)
        given = _truth(truth or asked)
        texts, doubts = pair(said, ids, strict)
        counted = [name for name in ids if name in given]
        if truth is not None and not counted:
            raise InputError(
                f"{truth.path}: answers none of the questions of {asked.path}; do the files belong together?"
            )
        if not counted:
            note = "not scored: the question file gives no answers (a field answer or answers in its lines)"
            return Score(None, {"count": len(ids), "answered": len(texts)}, doubts.counts(), note)
        items = [_item(name, texts.get(name, ""), given[name]) for name in counted]
        parts = {
            "vqa_accuracy": _percent([item["vqa_accuracy"] for item in items]),
            "exact_match": _percent([item["exact_match"] for item in items]),
            "count": len(items),
            "items": items,
        }
        less = len(counted) < len(ids)
        note = f"scored on {len(counted)} of {len(ids)} questions: only these have answers" if less else ""
        return Score(parts["vqa_accuracy"], parts, doubts.counts(), note)


def _names(line: Mapping[str, Any], where: str) -> list[str]:
    """Of the pictures that a question is about, in the order of their marks."""
    if found := unread(line):
        raise InputError(f"{where}: {found[1]}")
    given = [key for key in PICTURES if line.get(key) not in (None, [])]
    if len(given) > 1:
        raise InputError(f"{where}: both {' and '.join(given)} name pictures; give one of them")
    if not given:
        return []
    value = line[given[0]]
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{where}: {given[0]} is {value!r}; a file's name, a list of them, or none is needed")
    if address := next(filter(ADDRESS.match, names), None):
        raise InputError(f"{where}: {address[:SHOWN]} is an address; fetch it into the image folder and name the file")
    return names


def vqa_accuracy(answer: str, given: list[str]) -> float:
    """0 to 1; see the head of this file. Nothing said is never right, even where normalising leaves nothing of an answer given.

    People who said nothing count among those who were asked.
    """
    if not answer.strip():
        return 0.0
    answer, given = (
        evalai(answer),
        [evalai(text) if text.strip() else None for text in given],
    )  # nobody agrees with silence
    if len(given) <= ENOUGH:
        return given.count(answer) / len(given)
    return soft_score(answer, list(enumerate(given)))


def exact_match(answer: str, given: list[str]) -> bool:
    return bool(answer.strip()) and _plain(answer) in [_plain(text) for text in given if text.strip()]


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().lower()


def _item(name: str, answer: str, given: list[str]) -> dict[str, Any]:
    return {
        "question_id": name,
        "answer": answer,
        "given": given,
        "vqa_accuracy": vqa_accuracy(answer, given),
        "exact_match": exact_match(answer, given),
    }


def _truth(source: Source) -> dict[str, list[str]]:
    """Question id → the answers given to it, for those that have any."""
    truth, twice, path = {}, [], source.path
    for line in source.rows:
        given = [text for field in TRUTH for text in _texts(line.get(field), f"{path}: question {line['question_id']}")]
        name = str(line["question_id"])
        if name in truth:
            twice.append(name)
        if given:
            truth[name] = given
    if twice:
        raise InputError(f"{path}: answers twice to {first(twice)}; give each question_id once")
    return truth


def _rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines, a JSON list, or VQAv2's object with `annotations`."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the file of annotations")
    if path.suffix == ".json":
        try:
            value = read_json(path)
        except InputError:  # lines under that name
            value = None
        if isinstance(value, dict) and isinstance(value.get("annotations"), list):
            return [
                checked(row, f"{path}: annotation {n}", question_id=ID) for n, row in enumerate(value["annotations"], 1)
            ]
    return read_records(path, question_id=ID)


def _texts(value: Any, where: str) -> list[str]:
    """The answers in a field: a text, a number, or a list of texts or of objects with an `answer`.

    None if it is null or an empty text; in a list that is one person, who said nothing.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list):
        return [_text(value, where)]
    found = [_text(one["answer"] if isinstance(one, dict) and "answer" in one else one, where) for one in value]
    if found and not any(text.strip() for text in found):
        raise InputError(f"{where}: all of its {len(found)} answers are empty; give one, or no such field")
    return found


def _text(value: Any, where: str) -> str:
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not (number or isinstance(value, str)):
        raise InputError(f"{where}: an answer is {value!r}; a text is needed, or no such field")
    return str(value)


def _percent(values: list[float]) -> float:
    return 100 * sum(values) / len(values)
