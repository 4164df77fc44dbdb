"""What the benchmarks of LLaVA's eval.zip share: one folder each, a file of questions, a folder of pictures.

Questions are JSON lines {question_id, image, text, …} whose text holds the prompt suffix already; answers are
JSON lines {question_id, prompt, text, …}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from ...errors import InputError
from .base import Question, Source, Task
from .reading import ID, first, read_records

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LLAVA_PAPER = "7B: TwigVLM (arXiv 2503.14075), base row; 13B: LLaVA-1.5 (arXiv 2310.03744)"


class LlavaTask(Task):
    """A benchmark in LLaVA's layout. `layout` names, by split and role, what lies below the benchmark's folder."""

    folder: ClassVar[str]
    layout: ClassVar[Mapping[str, Mapping[str, str]]]
    shared_ids: ClassVar[bool] = False  # several questions stand under one id

    def files(self, root: Path, split: str) -> dict[str, Path]:
        if split not in self.layout:
            raise InputError(f"{self.name} has no split {split!r}; it has {', '.join(self.layout)}")
        return {role: root / self.folder / place for role, place in self.layout[split].items()}

    def questions(self, root: Path, split: str) -> list[Question]:
        files = self.files(root, split)
        lines = read_records(files["questions"], question_id=ID, image=str, text=str)
        names = [str(line["question_id"]) for line in lines]
        names = distinct(names) if self.shared_ids else names
        return [
            Question(name, line["text"], (files["images"] / line["image"],), {"question_id": line["question_id"]})
            for name, line in zip(names, lines, strict=True)
        ]


def distinct(names: Iterable[str]) -> list[str]:
    """The names, a second "x" as "x#2": MME and TextVQA ask several questions under one id."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out


def truth_needed(task: Task, annotations: Path | None) -> Path:
    """`annotations`, or InputError where a benchmark cannot be scored without them."""
    if annotations is None:
        raise InputError(f"{task.name} is scored against its annotations; name them (--annotations)")
    return annotations


def same_questions(ids: Iterable[str], known: Container[str], asked: Source, truth: Source) -> None:
    """Raise InputError where questions have no annotation: the two files do not belong together."""
    ids = list(ids)
    unknown = [name for name in ids if name not in known]
    if unknown:
        raise InputError(
            f"{truth.path}: holds no answer to {len(unknown)} of the {len(ids)} questions of {asked.path} "
            f"({first(unknown)}); the two files are of different versions or splits"
        )


def asked_part(ids: Iterable[str], asked: set[str], answered: Iterable[str], truth: Source) -> tuple[list[str], str]:
    """Annotated ids that count, and a note if a run asked only some of them.

    Ids that were neither asked nor answered are left out, so that a run on the first few questions can be scored;
    with the benchmark's whole question file nothing is.
    """
    every, known = list(ids), asked | set(answered)
    kept = [name for name in every if name in known]
    if not kept:
        raise InputError(f"{truth.path}: annotates none of the questions asked; do the two files belong together?")
    note = "" if len(kept) == len(every) else f"scored on {len(kept)} of {len(every)} questions: only these were asked"
    return kept, note
