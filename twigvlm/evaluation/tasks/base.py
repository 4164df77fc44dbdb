"""What a benchmark is: where its files lie, what it asks, how an answer is counted.

Standard library only, so that a score can be recomputed without torch. Whatever the programs want to know of a
benchmark is an attribute or a method here; none of them asks for a name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ...errors import InputError
from .reading import ID, read_records


@dataclass(frozen=True)
class Question:
    """One prompt. `images` are files, or encoded bytes where the benchmark carries its pictures inside a table."""

    id: str  # unique within a run, as the answer line's question_id reads as text
    prompt: str  # the user's turn after the pictures, the benchmark's suffix included
    images: tuple[Path | bytes, ...] = ()
    line: Mapping[str, Any] = field(default_factory=dict)  # fields that the answer line carries beside LLaVA's own


@dataclass(frozen=True)
class Source:
    """What a file held, and its name for messages. `rows` of questions and answers are records, one each, in order."""

    path: Path
    rows: Any  # of annotations: whatever the benchmark makes of them

    def first(self, n: int) -> Source:
        return Source(self.path, self.rows[:n])


# Parts with an entry a question: they belong in a file of their own, not in a result.
PER_QUESTION = ("evalQA", "items", "parsed", "pred_idx", "correct_ids")
MANY = 100  # entries of any other part that are no summary any more


@dataclass(frozen=True)
class Score:
    """`score` stands in the tables (percent; points for MME), None where the truth is not at hand.

    `doubts` counts what the official protocol does without complaint and a reader should know of:
    missing, duplicate, foreign answers and the like, by name.
    """

    score: float | None
    parts: Mapping[str, Any] = field(default_factory=dict)
    doubts: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    metric: str = ""  # where it is not the task's, since not all of the benchmark was asked

    @property
    def sums(self) -> dict[str, Any]:
        """The parts without what lists single questions."""
        return _sums(self.parts)

    @property
    def per_question(self) -> dict[str, Any]:
        """What `sums` leaves out; a part that stands there under two names is listed once."""
        return {name: part for name, part in self.parts.items() if _lists_questions(name, part)}


def _sums(parts: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: part for name, part in parts.items() if not _lists_questions(name, part)}
    return {name: _sums(part) if isinstance(part, Mapping) else part for name, part in kept.items()}


def _lists_questions(name: str, part: Any) -> bool:
    return name in PER_QUESTION or (isinstance(part, (Mapping, list)) and len(part) > MANY)


class Task(ABC):
    """A benchmark; `root` is the folder that holds one folder a task, as LLaVA's eval.zip lays them out."""

    name: ClassVar[str]  # of its folder, its script and its row
    title: ClassVar[str]
    metric: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]  # the first is the default
    aliases: ClassVar[tuple[str, ...]] = ()  # names of folders that people also use
    suffix: ClassVar[str] = ""  # what the benchmark appends to a question; part of the protocol
    max_new_tokens: ClassVar[int] = 128
    together: ClassVar[int] = 1  # so many neighbouring questions count as one
    timed_alone: ClassVar[bool] = False  # speed is told by it: asked one by one, so that each question has its time
    own_files: ClassVar[bool] = False  # no benchmark: whoever asks gives the files (`given`)
    in_suite: ClassVar[bool] = False  # asked by the suite unless others are named
    column: ClassVar[float] = math.inf  # its place in a table
    decimals: ClassVar[int] = 1  # of its score in a table
    upload_suffix: ClassVar[str] = ".json"  # how the name of the file that `upload` writes ends; "" for a folder
    published: ClassVar[Mapping[str, float]] = {}  # "llava-1.5-7b", "llava-1.5-13b" → the number in the tables
    source: ClassVar[str] = ""  # of the published numbers
    lmms_task: ClassVar[str] = ""  # lmms-eval's own of it, below its tasks, where `lmms_rows` can feed that
    remedy: ClassVar[str] = (
        "put the files there that playground/README.md links"  # where questions and truth do not fit
    )

    @abstractmethod
    def files(self, root: Path, split: str) -> dict[str, Path]:
        """Every file and folder that the split needs, by role: "questions", "images", "annotations" (where there are)."""

    @abstractmethod
    def questions(self, root: Path, split: str) -> list[Question]:
        """All questions in the order of the file. Missing or damaged files raise InputError with the path."""

    @abstractmethod
    def score_records(self, asked: Source, truth: Source | None, said: Source, strict: bool = False) -> Score:
        """Score answers as the benchmark's own scorer does; `strict` refuses what it would pass over.

        Takes what the three methods below read. `asked` may be the first questions only.
        """

    def read_questions(self, path: Path) -> Source:
        """The question file's records, one a question."""
        return Source(path, read_records(path, question_id=ID))

    def read_truth(self, annotations: Path | None, questions: Path) -> Source | None:
        """The annotations, None where there are none or the questions carry them."""
        return None

    def read_answers(self, path: Path) -> Source:
        return Source(path, read_records(path, question_id=ID, text=str))

    def score(self, questions: Path, annotations: Path | None, answers: Path, strict: bool = False) -> Score:
        """`score_records` of files."""
        truth = self.read_truth(annotations, questions)
        return self.score_records(self.read_questions(questions), truth, self.read_answers(answers), strict)

    def upload(self, asked: Source, truth: Source | None, said: Source, out: Path) -> Path | None:
        """Write what the benchmark's server, judge or tools take; None where they take the answers as they are."""
        return None

    def lmms_rows(self, folder: Path) -> Iterator[dict[str, Any]]:
        """The rows of `lmms_task` from the benchmark's own folder; pictures are paths."""
        raise NotImplementedError

    def upload_questions(self, asked: Source) -> Source:
        """The questions that the server's file answers, where they are others than were asked."""
        return asked

    def export(self, root: Path, split: str, answers: Path, out: Path) -> Path | None:
        """`upload` of a file of answers to the split's questions."""
        files = self.files(root, split)
        questions = files["questions"]
        truth = self.read_truth(files.get("annotations"), questions)
        asked = self.upload_questions(self.read_questions(questions))
        return self.upload(asked, truth, self.read_answers(answers), out)

    def given(self, question_file: Path | None, image_folder: Path | None, data: Path | None) -> Task:
        """This task on the files of whoever asks. Raises InputError where they cannot be taken."""
        for flag, value in (("--question-file", question_file), ("--image-folder", image_folder)):
            if value is not None:
                raise InputError(f"{flag} goes with --task vqa; {self.name} has its own files (--data)")
        return self

    def clean(self, text: str) -> str:
        """The answer line's text from the model's words."""
        return text.strip()
