"""Question, annotation and answer files: read with the line of every fault, written whole or not at all.

Knows JSON and JSON lines, nothing of any benchmark. Lines end where Python's text files end them: a line
separator inside a JSON string (U+2028, U+0085) is part of the string.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import write_bytes, write_text

ID = (str, int)  # ids are numbers in some benchmarks' files and text in others
SHOWN = 5  # offenders that a message names


def read_json(path: Path) -> Any:
    """The file's one JSON value; InputError names file and line."""
    text = _text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as fault:
        raise InputError(f"{path}:{fault.lineno}: not JSON ({fault.msg}); fetch or write the file again") from None


def read_table(path: Path) -> dict[str, Any]:
    """A JSON object, by its keys."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {_kind(value)} where an object is expected")
    return value


def read_records(path: Path, **fields: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file or of one JSON list; each must have `fields` of these types. Empty lines are skipped."""
    text = _text(path)
    if text.lstrip().startswith("["):
        found = [(f"{path}: item {number}", item) for number, item in enumerate(read_json(path), 1)]
    else:
        lines = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        found = [(where, _line(where, line)) for where, line in lines]
    return [checked(record, where, **fields) for where, record in found]


def checked(record: Any, where: str, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """`record` itself, if it is an object with `fields` of these types."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: holds a JSON {_kind(record)} where an object is expected")
    for name, kind in fields.items():
        if name not in record:
            raise InputError(f"{where}: the field {name!r} is missing; it has {', '.join(map(repr, record)) or 'none'}")
        if not isinstance(record[name], kind):
            raise InputError(f"{where}: the field {name!r} is a JSON {_kind(record[name])}, which cannot be used")
    return record


def locate(path: Path, *names: str) -> Path:
    """`path` itself if it is a file, else the first of `names` that lies in this folder or in its `annotations`."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    homes = (path, path / "annotations")
    found = [home / name for home in homes for name in names if (home / name).exists()]
    if not found:
        raise InputError(f"{path}: holds none of {', '.join(names)}; name the file itself")
    return found[0]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file for other tools, whole or not at all. Raises InputError, with the place, where that cannot be."""
    try:
        write_text(content, path) if isinstance(content, str) else write_bytes(content, path)
    except OSError as fault:
        raise InputError(f"{path}: cannot be written ({fault.strerror}); name a place that can") from None


class Doubts:
    """What an official scorer passes over without a word: counted, named, or refused."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, name: str, offenders: Iterable[Any]) -> None:
        self._found.setdefault(name, []).extend(map(str, offenders))

    def counts(self) -> dict[str, int]:
        return {name: len(offenders) for name, offenders in self._found.items() if offenders}

    def refuse(self, answers: Path) -> None:
        """Raise InputError naming the first offenders of every kind, if there are any."""
        faults = [f"{len(items)} {name} ({first(items)})" for name, items in self._found.items() if items]
        if faults:
            raise InputError(
                f"{answers}: {'; '.join(faults)}; answer every question once, in order, or score without --strict"
            )


def first(items: Sequence[Any]) -> str:
    """The first few of `items`, for a message."""
    return ", ".join(map(str, items[:SHOWN])) + (", …" if len(items) > SHOWN else "")


def last_by_id(records: Sequence[Mapping[str, Any]], doubts: Doubts) -> dict[str, Mapping[str, Any]]:
    """Answer lines by question id; as in the official tools a later line replaces an earlier one."""
    found: dict[str, Mapping[str, Any]] = {}
    for record in records:
        key = str(record["question_id"])
        if key in found:
            doubts.add("duplicate", [key])
        found[key] = record
    return found


def added(values: Iterable[float]) -> float:
    """Sum from left to right. Python 3.12's `sum` corrects rounding, which moves the last digit of official scores."""
    total = 0.0
    for value in values:
        total += value
    return total


def _text(path: Path) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:  # universal newlines
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as fault:
        line = Path(path).read_bytes()[: fault.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text; fetch or write the file again") from None
    except OSError as fault:
        raise InputError(f"{path}: cannot be read ({fault.strerror})") from None


def _line(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as fault:
        raise InputError(f"{where}: not a line of JSON ({fault.msg} at column {fault.colno}); repair it") from None


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
