"""MMMU, validation: 900 college questions of 30 subjects, multiple choice and open.

LLaVA's eval.zip has no MMMU, so the layout is ours (playground/README.md has the lines that write it from the
hub's data): `mmmu/<split>.jsonl`, one object a question with the hub's fields id, question, options, answer
and question_type, beside `images`, a list of files below `mmmu/images/`. Options and answers may be lists or
the text of a Python list, as the hub has them. The answers may also stand in the official
`answer_dict_val.json`, given as annotations.

The prompt is the one of the authors' LLaVA script. Only the first picture is given, as for the published
numbers; `<image 1>` stays in the text.

How an answer is read (facts of the official parser, quirks included):
- multiple choice: punctuation at the ends aside, the letters in brackets, "(B)"; if there is none, the letters
  between spaces; if there is none and the answer has more than five words, the options whose text occurs. Of
  several the one that occurs last. Of none a letter is GUESSED, here with the official seed in the order of
  subjects: `guessed` counts them.
- open: from every line the shortest ending behind a word such as "is" or "answer" (in the last line also "="),
  else the whole; these and all numbers in them are compared: numbers by value to two decimals, text if the
  right answer occurs in it, case aside.
`score` is the share of right answers (micro average over what was answered, as there); the parts are the
official table's.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...errors import InputError
from .base import Question, Score, Source, Task
from .pairing import pair, upload_path
from .reading import ID, checked, locate, read_records, read_table, write_whole

CHOICE = "multiple-choice"
GUESS_SEED = 42
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
# The order in which the official evaluator goes through the subjects, and so draws its guesses.
SUBJECTS = (
    "Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory", "Basic_Medical_Science",
    "Biology", "Chemistry", "Clinical_Medicine", "Computer_Science", "Design", "Diagnostics_and_Laboratory_Medicine",
    "Economics", "Electronics", "Energy_and_Power", "Finance", "Geography", "History", "Literature", "Manage",
    "Marketing", "Materials", "Math", "Mechanical_Engineering", "Music", "Pharmacy", "Physics", "Psychology",
    "Public_Health", "Sociology",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One question; `options` is letter → text, empty for open ones; `answer` None where it is not at hand."""

    id: str
    subject: str
    question: str
    options: Mapping[str, str]
    answer: str | tuple[str, ...] | None
    images: tuple[str, ...]


class MMMU(Task):
    name = "mmmu"
    title = "MMMU"
    metric = "accuracy, %"
    splits = ("validation",)
    suffix = "\nAnswer with the option's letter from the given choices directly."
    column = 9
    open_suffix = "\nAnswer the question using a single word or phrase."
    published: ClassVar[Mapping[str, float]] = {"llava-1.5-7b": 36.3, "llava-1.5-13b": 36.4}
    source = "7B: base row of the TwigVLM paper (arXiv 2503.14075); 13B: MMMU's leaderboard, validation"

    def files(self, root: Path, split: str) -> dict[str, Path]:
        folder = root / "mmmu"
        questions = folder / f"{split}.jsonl"
        return {"questions": questions, "images": folder / "images", "annotations": questions}

    def questions(self, root: Path, split: str) -> list[Question]:
        files = self.files(root, split)
        return [self._ask(item, files["images"]) for item in read_items(files["questions"])]

    def _ask(self, item: Item, images: Path) -> Question:
        if item.options:
            options = "".join(f"({letter}) {text}\n" for letter, text in item.options.items())
            prompt = f"{item.question}\n{options}{self.suffix}"
        else:
            prompt = item.question + self.open_suffix
        return Question(item.id, prompt, tuple(images / name for name in item.images[:1]))

    def read_questions(self, path: Path) -> Source:
        return Source(path, read_items(path))

    def read_truth(self, annotations: Path | None, questions: Path) -> Source | None:
        """Question id → right answer or answers, where another file than the questions' has them."""
        if annotations is None or annotations == questions:
            return None
        path = locate(annotations, "answer_dict_val.json", questions.name)
        if path.suffix == ".json":
            return Source(path, {key: entry["ground_truth"] for key, entry in _answer_dict(path).items()})
        return Source(path, _answers_of(read_items(path)))

    def score_records(self, asked: Source, truth: Source | None, said: Source, strict: bool = False) -> Score:
        items = in_official_order(asked.rows)
        right_answers = _right_answers(items, truth or Source(asked.path, _answers_of(items)))
        texts, doubts = pair(said, [item.id for item in items], strict)
        if not right_answers:
            note = "not scored here: the answers are on the EvalAI server; upload the exported file there"
            return Score(None, {"count": len(items)}, doubts.counts(), note)
        guess, guessed = random.Random(GUESS_SEED), 0
        hits: dict[str, list[bool]] = {}
        for item in items:
            if item.id not in texts:
                continue  # leaves the denominator, as in the official evaluator
            text, right_ones = texts[item.id], _several(right_answers[item.id])
            if item.options:
                letter = read_letter(text, item.options)
                if letter is None:
                    letter, guessed = guess.choice(list(item.options)), guessed + 1
                right = letter in right_ones
            else:
                right = open_is_right(text, right_ones)
            hits.setdefault(item.subject, []).append(right)
        every = [right for subject in hits.values() for right in subject]
        if not every:
            raise InputError(f"{said.path}: answers none of the questions of {asked.path}")
        parts = {"guessed": guessed, "count": len(every), **_official_table(hits)}
        return Score(100 * sum(every) / len(every), parts, doubts.counts())

    def upload(self, asked: Source, truth: Source | None, said: Source, out: Path) -> Path:
        """Write the server's file, id → letter or open answer; a letter that cannot be read is guessed as in the score."""
        items = in_official_order(asked.rows)
        texts, _ = pair(said, [item.id for item in items])
        guess, rows = random.Random(GUESS_SEED), {}
        for item in items:
            if item.id in texts:
                text = texts[item.id]
                letter = read_letter(text, item.options) if item.options else text
                rows[item.id] = letter if letter is not None else guess.choice(list(item.options))
        target = upload_path(out, said, ".json")
        write_whole(target, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        return target


def read_items(path: Path) -> list[Item]:
    """The questions of a file in our layout, in its order."""
    out, seen = [], set()
    for record in read_records(path, id=ID, question=str, question_type=str):
        where = f"{path}: question {record['id']}"
        checked(record, where, images=list)
        options = _listed(record.get("options", []), where)
        if (record["question_type"] == CHOICE) != bool(options) or len(options) > 26:
            raise InputError(f"{where}: has {len(options)} options and the type {record['question_type']!r}")
        key = str(record["id"])
        if key in seen:
            raise InputError(f"{where}: stands there twice; fetch or write the file again")
        seen.add(key)
        subject = record.get("subject") or "_".join(key.split("_")[1:-1])
        letters = {chr(ord("A") + i): text for i, text in enumerate(options)}
        answer = record.get("answer")
        if answer in ("", "?", None):  # the hub's test split
            answer = None
        else:
            answer = tuple(_listed(answer, where)) if isinstance(answer, list) or _is_list(answer) else str(answer)
        out.append(Item(key, subject, record["question"], letters, answer, tuple(map(str, record["images"]))))
    if not out:
        raise InputError(f"{path}: has no questions")
    return out


def in_official_order(items: Sequence[Item]) -> list[Item]:
    """Subject by subject, in each as the file has them; subjects that MMMU does not know come last."""
    place = {subject: number for number, subject in enumerate(SUBJECTS)}
    return sorted(items, key=lambda item: (place.get(item.subject, len(place)), item.subject))


def read_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that a multiple-choice answer means; None where the official parser guesses."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    for form in ("({})", " {} "):
        places = {letter: answer.rfind(form.format(letter)) for letter in options}
        found = [letter for letter in options if places[letter] >= 0]
        if found:
            return max(found, key=places.get)
    if len(answer.split()) <= 5:
        return None
    places = {letter: answer.lower().rfind(text.lower()) for letter, text in options.items()}
    found = [letter for letter in options if places[letter] >= 0]
    return max(found, key=places.get) if found else None


_GROUPED = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MARKS = (":", ",", ".", "!", "?", ";", "'")


def open_is_right(answer: str, truth: Sequence[str]) -> bool:
    """Whether one of the values read from an open answer is one of the right ones."""
    right = [value for text in truth for value in _values(text)]
    for key in _key_phrases(answer):
        numbers = [match for form in (_GROUPED, _SCIENTIFIC, _PLAIN) for match in form.findall(key)]
        for value in (value for text in (key, *numbers) for value in _values(text)):
            if isinstance(value, float):
                if value in right:
                    return True
            elif any(isinstance(text, str) and text in value for text in right):
                return True
    return False


def _key_phrases(answer: str) -> list[str]:
    answer = answer.strip().strip(".").lower()
    lines, found = answer.split("\n"), []
    for number, line in enumerate(lines, 1):
        leads = (*_LEADS, "=") if number == len(lines) else _LEADS
        shortest = ""
        for tail in (line.split(lead)[-1].strip() for lead in leads if lead in line):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in _MARKS:
            found.append(shortest)
    return found or [answer]


def _values(text: str) -> list[str | float]:
    """What a text is compared by: its number, else itself in lower case (one letter: with a space on a side)."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _answers_of(items: Sequence[Item]) -> dict[str, Any]:
    return {item.id: item.answer for item in items if item.answer is not None}


def _right_answers(items: Sequence[Item], truth: Source) -> dict[str, Any]:
    """Question id → right answer or answers; empty where there is none for any question."""
    absent = [item.id for item in items if item.id not in truth.rows]
    if truth.rows and absent:
        raise InputError(f"{truth.path}: has no answer to {absent[0]} ({len(absent)} in all)")
    return truth.rows


def _answer_dict(path: Path) -> dict[str, Any]:
    data = read_table(path)
    for key, entry in data.items():
        checked(entry, f"{path}: {key}", ground_truth=(str, list))
    return data


def _several(answer: str | Sequence[str]) -> tuple[str, ...]:
    return (answer,) if isinstance(answer, str) else tuple(answer)


def _is_list(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("[") and value.endswith("]")


def _listed(value: Any, where: str) -> list[str]:
    """A list, or the text of a Python list."""
    if _is_list(value):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise InputError(f"{where}: {value[:40]!r} is not a list") from None
    if not isinstance(value, list):
        raise InputError(f"{where}: options are a list")
    return [str(entry) for entry in value]


def _official_table(hits: Mapping[str, Sequence[bool]]) -> dict[str, dict[str, float]]:
    """Domain and subject → number of questions and accuracy, with the names and digits of the official table."""

    def row(subjects: Sequence[str]) -> dict[str, float]:
        rights = [right for subject in subjects for right in hits[subject]]
        return {"num": len(rights), "acc": round(sum(rights) / len(rights), 3)}

    out = {}
    for domain, subjects in DOMAINS.items():
        present = [subject for subject in subjects if subject in hits]
        if present:
            out[f"Overall-{domain}"] = row(present)
            out.update({subject: row([subject]) for subject in present})
    out.update({subject: row([subject]) for subject in hits if subject not in SUBJECTS})
    return {**out, "Overall": row(list(hits))}
