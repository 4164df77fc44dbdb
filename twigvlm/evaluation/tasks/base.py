"""What a benchmark is: where its files lie, what it asks, how an answer is counted.

Standard library only, so that a score can be recomputed without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Question:
    """One prompt. `images` are files, or encoded bytes where the benchmark carries its pictures inside a table."""

    id: str  # unique within a run, as the answer line's question_id reads as text
    prompt: str  # the user's turn after the pictures, the benchmark's suffix included
    images: tuple[Path | bytes, ...] = ()
    line: Mapping[str, Any] = field(default_factory=dict)  # fields that the answer line carries beside LLaVA's own


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
    suffix: ClassVar[str] = ""  # what the benchmark appends to a question; part of the protocol
    max_new_tokens: ClassVar[int] = 128
    upload_suffix: ClassVar[str] = ".json"  # how the name of the file that `export` writes ends; "" for a folder
    published: ClassVar[Mapping[str, float]] = {}  # "llava-1.5-7b", "llava-1.5-13b" → the number in the tables
    source: ClassVar[str] = ""  # of the published numbers
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
    def score(self, questions: Path, annotations: Path | None, answers: Path, strict: bool = False) -> Score:
        """Score an answer file as the benchmark's own scorer does; `strict` refuses what it would pass over."""

    def export(self, root: Path, split: str, answers: Path, out: Path) -> Path | None:
        """Write the file that the benchmark's server or judge takes; None where nothing is uploaded."""
        return None

    def clean(self, text: str) -> str:
        """The answer line's text from the model's words."""
        return text.strip()


Answer = Mapping[str, Any]  # one line of an answer file
Answers = Sequence[Answer]
