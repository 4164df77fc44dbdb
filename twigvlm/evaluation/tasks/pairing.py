"""Answers and questions by id, where the protocol looks answers up by id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .reading import ID, Doubts, last_by_id, read_records


def pair(answers: Path, asked: Sequence[str], strict: bool = False) -> tuple[dict[str, str], Doubts]:
    """Question id → answer text, for the ids `asked`; a later line with the same id counts.

    Missing, duplicate and foreign answers are counted, or, if `strict`, refused by name.
    """
    doubts = Doubts()
    found = last_by_id(read_records(answers, question_id=ID, text=str), doubts)
    doubts.add("missing", [key for key in asked if key not in found])
    known = set(asked)
    doubts.add("foreign", [key for key in found if key not in known])
    if strict:
        doubts.refuse(answers)
    return {key: str(line["text"]) for key, line in found.items() if key in known}, doubts


def upload_path(out: Path, answers: Path, suffix: str) -> Path:
    """`out` itself if it is named as such a file, else a file in the folder `out` named after the answers."""
    return out if out.suffix == suffix else out / f"{answers.stem}{suffix}"
