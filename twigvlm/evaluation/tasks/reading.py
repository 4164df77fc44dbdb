"""Question, annotation and answer files: read with the line of every fault, written whole or not at all.

Knows JSON and JSON lines, nothing of any benchmark. Lines end where Python's text files end them: a line
separator inside a JSON string (U+2028, U+0085) is part of the string.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ...errors import InputError
from ...files import Doubled, check_regular, json_fault, not_text, told_twice, write_bytes, write_text

ID = (str, int)  # ids are numbers in some benchmarks' files and text in others
SHOWN = 5  # offenders that a message names


def read_json(path: Path) -> Any:
    """The file's one JSON value; InputError names file and line."""
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=told_twice)
    except (ValueError, RecursionError) as fault:
        line = f":{fault.lineno}" if isinstance(fault, json.JSONDecodeError) else ""
        raise InputError(f"{path}{line}: not JSON ({json_fault(fault)}); fetch or write the file again") from None


def read_table(path: Path) -> dict[str, Any]:
    """A JSON object, by its keys."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {_kind(value)} where an object is expected")
    return value


def read_records(path: Path, **fields: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file or of one JSON list; each must have `fields` of these types. Empty lines are skipped."""
    text = read_text(path)
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
    if isinstance(record, Doubled):
        raise InputError(f"{where}: names the field {record.key!r} twice; keep one")
    for name, kind in fields.items():
        if name not in record:
            raise InputError(f"{where}: the field {name!r} is missing; it has {', '.join(map(repr, record)) or 'none'}")
        if kind is ID and record[name] == "":
            raise InputError(f"{where}: the field {name!r} is empty; give every record its own")
        no_id = kind is ID and isinstance(record[name], bool)  # to Python, true is a number
        if no_id or not isinstance(record[name], kind):
            raise InputError(f"{where}: the field {name!r} is a JSON {_kind(record[name])}, which cannot be used")
    return record


def locate(path: Path, *names: str) -> Path:
    """`path` itself if it is a file, else the first of `names` that lies in this folder or in its `annotations`."""
    check_regular(path)
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
                f"{answers}: {'; '.join(faults)}; answer every question once, in order, or score them without --strict"
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


@contextlib.contextmanager
def opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file of text in UTF-8, its line ends as `newline` tells `open`; InputError says what else the file is."""
    check_regular(path)
    try:
        file = open(path, encoding="utf-8-sig", newline=newline)  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as fault:
        raise InputError(f"{path}: cannot be read ({getattr(fault, 'strerror', fault)})") from None
    with file:
        if other := not_text(file.buffer.peek(8)[:8]):
            raise InputError(f"{path}: is {other[0]}, not text in UTF-8; {other[1]}")
        try:
            yield file
        except UnicodeDecodeError:
            raise InputError(f"{path}:{_foreign_line(path)}: not UTF-8 text; fetch or write the file again") from None
        except OSError as fault:
            raise InputError(f"{path}: cannot be read ({fault.strerror})") from None


def _foreign_line(path: Path) -> int:
    """Of the first byte that is not UTF-8."""
    data = Path(path).read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError as fault:
        return data[: fault.start].count(b"\n") + 1
    return 1


def read_text(path: Path) -> str:
    with opened(path) as file:
        return file.read()


def _line(where: str, line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=told_twice)
    except (ValueError, RecursionError) as fault:
        column = f" at column {fault.colno}" if isinstance(fault, json.JSONDecodeError) else ""
        raise InputError(f"{where}: not a line of JSON ({json_fault(fault)}{column}); repair it") from None


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
