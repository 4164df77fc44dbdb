"""A LLaVA instruction file as a sequence: found by one fast pass, read record by record, never held as a whole.

Knows JSON's brackets and quotes; knows nothing of conversations. What stays in memory is two
numbers per record, so worker processes share it, forked or pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...files import check_regular, exists, is_file, json_fault, not_text, told_twice

CHUNK = 1 << 22  # bytes looked at in one go
MUCH = 1 << 24  # bytes, more than any record has
OPEN, CLOSE, QUOTE = 1, 2, 4
_KIND = np.zeros(256, np.uint8)
_KIND[[ord("{"), ord("[")]] = OPEN
_KIND[[ord("}"), ord("]")]] = CLOSE
_KIND[ord('"')] = QUOTE
_WANTED = (_KIND > 0).astype(np.uint8).tobytes()  # for bytes.translate, the fastest table there is
BLANK = b" \t\r\n"
BOM = b"\xef\xbb\xbf"


class Records(Sequence):
    """The records of a JSON list or of JSON lines, in file order.

    `records[i]` is what JSON makes of record i. Raises InputError, with file, line and byte, for a
    missing, empty or broken file: at once where brackets or quotes do not match, else when the
    record is read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: int | None = None
        self._stamp = self._open()
        self._starts, self._ends = _Scan(self).spans()
        if not len(self):
            raise InputError(f"{self.path}: holds no samples; a JSON list of conversations is expected")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> object:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        start, end = int(self._starts[i]), int(self._ends[i])
        text = self.read(start, end)
        try:
            return json.loads(text, object_pairs_hook=told_twice)
        except (ValueError, RecursionError) as fault:
            raise self.broken(start + _byte_of(fault, text), json_fault(fault)) from fault

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._stamp[0]

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the file."""
        if self._file is None and self._open() != self._stamp:
            raise InputError(f"{self.path}: has changed since this run began; start again")
        found = _read_at(self._file, end - start, start)
        if len(found) != end - start:
            raise InputError(f"{self.path}: has become shorter since this run began; start again")
        return found

    def digest(self) -> str:
        """Of the content, to recognise the file by."""
        hashed = hashlib.blake2b(digest_size=16)
        for start in range(0, self.size, CHUNK):
            hashed.update(self.read(start, min(start + CHUNK, self.size)))
        return hashed.hexdigest()

    def broken(self, byte: int, what: str) -> InputError:
        """The error for a fault at this byte."""
        line = 1 + sum(
            self.read(start, min(start + CHUNK, byte)).count(b"\n") for start in range(0, min(byte, self.size), CHUNK)
        )
        return InputError(
            f"{self.path}, line {line}, byte {byte}: broken JSON ({what}); repair or fetch the file again"
        )

    def _open(self) -> tuple[int, int]:
        """(size, time of change) of the file, which is open from here on."""
        check_there(self.path)
        try:
            self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except (OSError, ValueError) as fault:
            why = getattr(fault, "strerror", fault)
            raise InputError(f"{self.path}: cannot be opened ({why}); check the path") from fault
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def __del__(self):
        if getattr(self, "_file", None) is not None:
            os.close(self._file)


def check_there(path: Path) -> None:
    """Raise InputError for what is no file of records from afar."""
    check_regular(path)
    if not is_file(path):
        what = "is a folder" if exists(path) else "no such file"
        raise InputError(f"{path}: {what}; give a JSON list of conversations")


def _read_at(file: int, count: int, start: int) -> bytes:
    """Forked processes share one place in an open file: where they exist, it is left alone."""
    if hasattr(os, "pread"):
        return os.pread(file, count, start)
    os.lseek(file, start, os.SEEK_SET)
    return os.read(file, count)


class _Fault(Exception):
    """Structure that is no list of records: (byte, what)."""


class _Scan:
    """One pass over the file: where do its records begin and end?

    numpy looks at brackets outside strings only, many times faster than a parser. Every escaped
    character is blotted out beforehand, so that each quote left opens or ends a string.
    """

    def __init__(self, records: Records):
        self.records = records
        self.depth, self.in_string = 0, 0
        self.begin = self._first()
        self.is_list = records.read(self.begin, self.begin + 1) == b"["
        self.last = self.begin + self.is_list  # end of the last record so far

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """(starts, ends) of the records, bytes in the file."""
        starts, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        try:
            for at, chunk in self._chunks():
                self._look(at, chunk, starts, ends)
            if self.in_string:
                raise _Fault(self.last, "the file ends within a text; cut short?")
            if self.depth:
                raise _Fault(self.last, "the file ends before its last bracket; cut short?")
            self._check_gap(self.last, self.records.size, b"]" if self.is_list else b"")
        except _Fault as fault:
            self._blame(np.concatenate(starts), np.concatenate(ends), fault)
        return np.concatenate(starts), np.concatenate(ends)

    def _first(self) -> int:
        """The byte of the opening bracket."""
        head = self.records.read(0, min(CHUNK, self.records.size))
        if other := not_text(head):
            raise InputError(f"{self.records.path}: is {other[0]}, not JSON in UTF-8; {other[1]}")
        text = head.removeprefix(BOM).lstrip(BLANK)
        if not text:
            raise InputError(f"{self.records.path}: is empty; a JSON list of conversations is expected")
        if text[:1] not in (b"[", b"{"):
            raise self.records.broken(len(head) - len(text), "a list of conversations is expected")
        return len(head) - len(text)

    def _chunks(self) -> Iterator[tuple[int, bytes]]:
        at, size = self.begin, self.records.size
        while at < size:
            end = min(at + CHUNK, size)
            chunk = self.records.read(at, end)
            while chunk.endswith(b"\\") and end < size:  # an escape stays in one piece
                more = self.records.read(end, min(end + 64, size))
                chunk, end = chunk + more, end + len(more)
            yield at, chunk
            at = end

    def _look(self, at: int, chunk: bytes, starts: list[np.ndarray], ends: list[np.ndarray]) -> None:
        """Add where records begin, and behind which byte they end, in this chunk."""
        plain = chunk.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        places = np.flatnonzero(np.frombuffer(plain.translate(_WANTED), np.bool_))
        kinds = _KIND[np.frombuffer(plain, np.uint8)[places]]
        quotes = kinds == QUOTE
        inside = (np.cumsum(quotes, dtype=np.int32) + self.in_string) & 1
        brackets = np.flatnonzero(~quotes & (inside == 0))
        places, opens = places[brackets], kinds[brackets] == OPEN
        depth = self.depth + np.cumsum(np.where(opens, 1, -1))
        begun = places[opens & (depth == self.is_list + 1)] + at
        ended = places[~opens & (depth == self.is_list)] + at + 1
        if (depth < 0).any():
            raise _Fault(at + int(places[np.argmax(depth < 0)]), "a bracket too many")
        starts.append(begun)
        ends.append(ended)
        self._check_gaps(at, chunk, begun.tolist(), ended.tolist(), self.depth > self.is_list)
        self.in_string = int(inside[-1]) if len(inside) else self.in_string
        self.depth = int(depth[-1]) if len(depth) else self.depth

    def _check_gaps(self, at: int, chunk: bytes, begun: list[int], ended: list[int], within: bool) -> None:
        """`within`: the chunk begins in the middle of a record, so that an end comes first."""
        separator = b"," if self.is_list else b""
        before = ended if within else [self.last, *ended]
        first = self.begin + self.is_list  # nothing stands before the first record
        for end, start in zip(before, begun, strict=False):
            if end < at or end == first or chunk[end - at : start - at].strip(BLANK) != separator:
                self._check_gap(end, start, b"" if end == first else separator)
        if ended:
            self.last = ended[-1]

    def _check_gap(self, start: int, end: int, expected: bytes) -> None:
        """Bytes [start, end) lie outside all records: white space, and what is expected."""
        text = self.records.read(start, end)
        if text.strip(BLANK) != expected:
            found = text.strip(BLANK)[:20].decode("utf-8", "replace")
            wanted = f"{expected.decode()!r} is expected" if expected else "nothing is expected"
            at = start + len(text) - len(text.lstrip(BLANK))
            raise _Fault(at, f"{wanted} beside a conversation, found {found!r}")

    def _blame(self, starts: np.ndarray, ends: np.ndarray, fault: _Fault) -> None:
        """Raise for the first record that is no JSON, since brackets go astray far behind a lost quote."""
        pairs = min(len(starts), len(ends))
        self.records._starts, self.records._ends = starts[:pairs], ends[:pairs]
        for i in range(pairs):
            self.records[i]
        if len(starts) > pairs:
            self._parse(int(starts[pairs]))
        raise self.records.broken(*fault.args)

    def _parse(self, start: int) -> None:
        """Raise for what is wrong with the record that begins here, unless it is merely cut short."""
        text = self.records.read(start, min(start + MUCH, self.records.size)).decode("utf-8", "surrogateescape")
        try:
            json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError as fault:
            if fault.pos < len(text.rstrip()) and not fault.msg.startswith("Unterminated"):
                before = text[: fault.pos].encode("utf-8", "surrogateescape")
                raise self.records.broken(start + len(before), fault.msg) from fault


def _byte_of(fault: Exception, text: bytes) -> int:
    """Where in `text` JSON stumbled."""
    if isinstance(fault, json.JSONDecodeError):
        return len(fault.doc[: fault.pos].encode("utf-8", "surrogatepass"))
    return getattr(fault, "start", 0)
