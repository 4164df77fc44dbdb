"""Answers and questions by id, where the protocol looks answers up by id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .base import Source
from .reading import Doubts, last_by_id


def ids_of(asked: Source) -> list[str]:
    return [str(line["question_id"]) for line in asked.rows]


def pair(said: Source, asked: Sequence[str], strict: bool = False) -> tuple[dict[str, str], Doubts]:
    """Question id → answer text, for the ids `asked`; a later line with the same id counts.

    Missing, duplicate and foreign answers are counted, or, if `strict`, refused by name.
    """
    doubts = Doubts()
    found = last_by_id(said.rows, doubts)
    doubts.add("missing", [key for key in asked if key not in found])
    known = set(asked)
    doubts.add("foreign", [key for key in found if key not in known])
    if strict:
        doubts.refuse(said.path)
    return {key: str(line["text"]) for key, line in found.items() if key in known}, doubts


def upload_path(out: Path, said: Source, suffix: str) -> Path:
    """`out` itself if it is named as such a file, else a file in the folder `out` named after the answers."""
    return out if out.suffix == suffix else out / f"{said.path.stem}{suffix}"
