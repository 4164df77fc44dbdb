"""MME: two yes/no questions a picture; a subtask gives its accuracy and the share of pictures with both right.

The numbers are those of the benchmark's `calculation.py` after LLaVA's conversion of the answers. It pairs lines
two by two in the order of the answers, whatever their picture; such pairs are counted here. A tab or a line break
in an answer, or an odd number of lines, breaks it: refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...errors import InputError
from .base import Score, Source
from .llava import SHORT_ANSWER, LlavaTask, same_questions, truth_needed
from .reading import Doubts, added, first, read_records, read_text, write_whole

SUBTASKS = {
    "Perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
RELEASE = "MME_Benchmark_release_version"
PLEASE = "Please answer yes or no."
Truth = Mapping[tuple[str, str, str], str]  # (subtask, file, question) → "Yes" or "No"


@dataclass(frozen=True)
class Line:
    """One line of a converted file."""

    subtask: str
    file: str
    question: str
    gold: str
    text: str

    def right(self) -> bool:
        return label(self.text) == self.gold.lower()


class MME(LlavaTask):
    name = "mme"
    title = "MME"
    metric = "perception + cognition, points"
    splits = ("test",)
    suffix = SHORT_ANSWER
    upload_suffix = ""
    published: ClassVar = {"llava-1.5-7b": 1862.0, "llava-1.5-13b": 1826.7}
    source = (
        "7B: TwigVLM (arXiv 2503.14075), base row; 13B: 1531.3 perception (LLaVA-1.5, arXiv 2310.03744)"
        " + 295.4 cognition (ShareGPT4V, arXiv 2311.12793)"
    )
    folder, shared_ids = "MME", True
    in_suite, column, decimals = True, 4, 0
    together = 2  # the two questions about a picture
    layout: ClassVar = {"test": {"questions": "llava_mme.jsonl", "annotations": RELEASE, "images": RELEASE}}

    def clean(self, text: str) -> str:
        """On one line and without tabs, which the benchmark's files cannot hold."""
        return text.strip().replace("\t", " ").replace("\r", " ").replace("\n", " ")

    def read_questions(self, path: Path) -> Source:
        return Source(path, read_records(path, question_id=str, text=str))

    def read_truth(self, annotations: Path | None, questions: Path) -> Source:
        return Source(truth_needed(self, annotations), _truth(annotations))

    def read_answers(self, path: Path) -> Source:
        return Source(path, read_records(path, question_id=str, prompt=str, text=str))

    def score_records(self, asked: Source, truth: Source | None, said: Source, strict: bool = False) -> Score:
        if strict:
            _match(asked, truth)
        lines = _converted(said, truth.rows)
        doubts = _doubts(asked.rows, truth.rows, lines)
        if strict:
            doubts.refuse(said.path)
        by_subtask = _by_subtask(lines, said.path)
        absent = [name for names in SUBTASKS.values() for name in names if name not in by_subtask]
        silent = [name for name in absent if name in {line["question_id"].split("/")[0] for line in asked.rows}]
        if silent:
            raise InputError(f"{said.path}: no answer in {', '.join(silent)}")
        parts: dict[str, Any] = {}
        for kind, names in SUBTASKS.items():
            points = {name: _points(by_subtask[name]) for name in names if name in by_subtask}
            parts[kind] = {"tasks": points, "total": added(points.values())}
        parts["total"] = added(parts[kind]["total"] for kind in SUBTASKS)
        return Score(parts["total"], parts, doubts.counts(), f"not asked: {', '.join(absent)}" if absent else "")

    def upload(self, asked: Source, truth: Source | None, said: Source, out: Path) -> Path:
        """A folder with `<subtask>.txt`, which the benchmark's `calculation.py --results_dir` takes."""
        lines = _converted(said, truth.rows)
        for subtask, group in _by_subtask(lines, said.path).items():
            rows = ("\t".join((line.file, line.question, line.gold, line.text)) for line in group)
            write_whole(out / f"{subtask}.txt", "".join(row + "\n" for row in rows))
        return out


def label(text: str) -> str:
    """ "yes", "no" or "other" from the first four characters, in lower case."""
    start = text.lower()[:4]  # lower case first: it may be longer
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _truth(place: Path) -> dict[tuple[str, str, str], str]:
    """Gold answers of every subtask folder; `place` is the release's folder or the one that holds it."""
    homes = [home for home in (place / RELEASE, place / "annotations" / RELEASE, place) if home.is_dir()]
    truth: dict[tuple[str, str, str], str] = {}
    for folder in sorted(homes[0].iterdir()) if homes else ():
        inner = folder / "questions_answers_YN"
        for file in sorted((inner if inner.is_dir() else folder).glob("*.txt")):
            for question, gold in _pairs(file):
                truth[folder.name, file.name, question] = gold
    if not truth:
        raise InputError(f"{place}: no <subtask>/<picture>.txt with questions; is it {RELEASE}?")
    return truth


def _pairs(file: Path) -> list[tuple[str, str]]:
    pairs, lines = [], read_text(file).split("\n")
    for number, line in enumerate(lines, 1):
        fields = line.strip().split("\t")
        if number == len(lines) and fields == [""]:
            continue
        if len(fields) != 2 or fields[1].lower() not in ("yes", "no"):
            raise InputError(f"{file}:{number}: not a question, a tab and Yes or No: {line!r}")
        pairs.append((fields[0], fields[1]))
    return pairs


def _converted(said: Source, truth: Truth) -> list[Line]:
    """LLaVA's answers as lines of the benchmark; an answer without a gold one stops here, as it stops LLaVA's tool."""
    lines, foreign = [], []
    for record in said.rows:
        subtask, file, question = _key(record["question_id"], record["prompt"], truth)
        if (subtask, file, question) not in truth:
            foreign.append(f"{record['question_id']}: {question!r}")
            continue
        _refuse_breaks(record["text"], f"{said.path}: {record['question_id']}")
        lines.append(Line(subtask, file, question, truth[subtask, file, question], record["text"]))
    if foreign:
        raise InputError(f"{said.path}: {len(foreign)} answers to questions without annotation: {first(foreign)}")
    return lines


def _key(question_id: str, prompt: str, truth: Truth) -> tuple[str, str, str]:
    """Subtask, file and question as the annotations write them: some have two spaces before the request."""
    path = question_id.split("/")
    subtask, file = path[0], path[-1].split(".")[0] + ".txt"
    ending = SHORT_ANSWER.strip()
    question = prompt.replace(ending, "").strip() if ending in prompt else prompt
    if PLEASE not in question:
        single, double = f"{question} {PLEASE}", f"{question}  {PLEASE}"
        question = single if (subtask, file, single) in truth else double
    return subtask, file, question


def _match(asked: Source, truth: Source) -> None:
    names = [f"{line['question_id']} {line['text']!r}" for line in asked.rows]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{asked.path}: {first(twice)} stand there twice; repair the file")
    keys = {
        name: _key(line["question_id"], line["text"], truth.rows) for name, line in zip(names, asked.rows, strict=True)
    }
    same_questions(keys, {name for name, key in keys.items() if key in truth.rows}, asked, truth)


def _refuse_breaks(text: str, where: str) -> None:
    """A lone carriage return ends a line too, unless it is the last character."""
    for sign, name in (("\t", "a tab"), ("\n", "a line break"), ("\r", "a carriage return")):
        if sign in (text[:-1] if sign == "\r" else text):
            raise InputError(f"{where}: {name} in the answer {text!r} breaks the benchmark's file; replace it")


def _by_subtask(lines: Sequence[Line], answers: Path) -> dict[str, list[Line]]:
    out: dict[str, list[Line]] = {}
    for line in lines:
        out.setdefault(line.subtask, []).append(line)
    odd = [f"{name} ({len(group)})" for name, group in out.items() if len(group) % 2]
    if odd:
        raise InputError(f"{answers}: odd number of answers in {first(odd)}; every picture needs two")
    return out


def _doubts(asked: Sequence[Mapping[str, str]], truth: Truth, lines: Sequence[Line]) -> Doubts:
    doubts = Doubts()
    said = Counter((line.subtask, line.file, line.question) for line in lines)
    keys = [(line["question_id"], _key(line["question_id"], line["text"], truth)) for line in asked]
    doubts.add("missing", [name for name, key in keys if key not in said])
    doubts.add("duplicate", [f"{subtask}/{file}" for (subtask, file, _), n in said.items() for _ in range(n - 1)])
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.subtask, []).append(line)
    known = {name for names in SUBTASKS.values() for name in names}
    for name, group in groups.items():
        if name not in known:
            doubts.add("outside_subtasks", [f"{name}/{line.file}" for line in group])
        for one, two in zip(group[::2], group[1::2], strict=False):
            if one.file != two.file:
                doubts.add("pairs_across_images", [f"{name}/{one.file}+{two.file}"])
    return doubts


def _points(group: Sequence[Line]) -> float:
    """100 times accuracy plus 100 times the share of pairs with both answers right."""
    right = [line.right() for line in group]
    both = sum(one and two for one, two in zip(right[::2], right[1::2], strict=True))
    return sum(right) / len(right) * 100 + both / (len(right) // 2) * 100
