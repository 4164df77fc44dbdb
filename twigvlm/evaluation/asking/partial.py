"""The first questions of a benchmark as a file of their own, so that a part of a run can be scored."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...errors import InputError
from ..tasks.base import Score, Task
from .answers import encode


class Head:
    """Scores a run's first n questions; the question file is read once."""

    def __init__(self, task: Task, files: Mapping[str, Path]):
        self.task, self.questions, self.annotations = task, files["questions"], files.get("annotations")

    def score(self, answers: Path, n: int, strict: bool) -> Score:
        """Of a file with answers to the first n questions, in their order."""
        if n == len(self._records):
            return self.task.score(self.questions, self.annotations, answers, strict=strict)
        with TemporaryDirectory() as folder:
            part = Path(folder) / self.questions.name
            self._write(part, n)
            annotations = part if self.annotations == self.questions else self.annotations
            try:
                return self.task.score(part, annotations, answers, strict=strict)
            except InputError as fault:  # names the file that people know
                raise InputError(str(fault).replace(str(part), str(self.questions))) from fault

    def score_lines(self, lines: Sequence[Mapping[str, Any]], strict: bool = False) -> Score:
        """Of answer lines to the first questions, in their order."""
        with TemporaryDirectory() as folder:
            answers = Path(folder) / "answers.jsonl"
            answers.write_bytes(b"".join(encode(line) for line in lines))
            return self.score(answers, len(lines), strict)

    def _write(self, target: Path, n: int) -> None:
        records = self._records[:n]
        if target.suffix == ".tsv":
            with open(target, "w", encoding="utf-8", newline="") as file:
                table = csv.writer(file, delimiter="\t")
                table.writerows([self._columns, *records])
        elif self._whole is not None:
            whole = self._whole | {"questions": records} if isinstance(self._whole, dict) else records
            target.write_text(json.dumps(whole), encoding="utf-8")
        else:
            target.write_text("".join(f"{line}\n" for line in records), encoding="utf-8")

    @cached_property
    def _records(self) -> list:
        """Rows of a table without its pictures, items of a JSON list, or lines."""
        if self.questions.suffix == ".tsv":
            csv.field_size_limit(sys.maxsize)
            with open(self.questions, encoding="utf-8-sig", newline="") as file:
                rows = csv.reader(file, delimiter="\t")
                columns = next(rows)
                keep = [i for i, name in enumerate(columns) if name != "image"]
                self._columns = [columns[i] for i in keep]
                return [[row[i] for i in keep] for row in rows if row]
        text = self.questions.read_text(encoding="utf-8-sig")
        self._whole = _one_value(text)
        if self._whole is None:
            return [line for line in text.split("\n") if line.strip()]
        return self._whole["questions"] if isinstance(self._whole, dict) else self._whole


def _one_value(text: str) -> list | dict | None:
    """The list, or the object with a list of questions, that a file is; None for JSON lines, whatever its name."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, list) or (isinstance(value, dict) and "questions" in value) else None
