"""Where files lie, the one way to write one (whole or not at all), to add lines to one and to hold a lock; what is no file to read, or no text.

filelock is imported with the first lock: reading and scoring need the standard library alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, RunError

if TYPE_CHECKING:
    from filelock import FileLock

PART = ".part-"  # begins the name of what is not whole yet
PACKAGE = Path(__file__).resolve().parent
# The clone (or unpacked source distribution) that this code runs from; None where it was installed.
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else None
# What comes along with the code: checkpoints/, assets/, scripts/. A wheel carries it inside the package.
BROUGHT = CHECKOUT or PACKAGE / "carried"

# What is not text in UTF-8, by how it begins, and what to do with it.
OTHERS = (
    (b"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it with unzip"),
    (b"BZh", "compressed by bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "compressed by xz", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with unzstd"),
    (b"PAR1", "a Parquet table", "write its rows as JSON lines"),
    (b"\xff\xfe\x00\x00", "UTF-32", "write it in UTF-8: iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32", "write it in UTF-8: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16", "write it in UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16", "write it in UTF-8: iconv -f UTF-16 -t UTF-8"),
)


def home(env: Mapping[str, str] = os.environ) -> Path:
    """Where programs keep what they make and could make again (drawn data, calibrations).

    TWIGVLM_HOME goes first; then playground/data of a clone; else `twigvlm` in the user's cache folder, which
    XDG_CACHE_HOME may name. Never the folder that the package was installed to.
    """
    if env.get("TWIGVLM_HOME"):
        return Path(os.path.abspath(os.path.expanduser(env["TWIGVLM_HOME"])))
    if CHECKOUT is not None:
        return CHECKOUT / "playground" / "data"
    named = env.get("XDG_CACHE_HOME") or (env.get("LOCALAPPDATA") if os.name == "nt" else None)
    cache = Path(named) if named and os.path.isabs(named) else Path(os.path.expanduser("~/.cache"))
    return cache / "twigvlm"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` for somebody to write to; it becomes `path` when all went well, even if the power fails.

    The suffix is the same, since libraries choose a format by it. Whatever goes wrong leaves `path` as it was.
    """
    part = path.with_name(f"{PART}{os.getpid()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        os.chmod(part, 0o666 & ~umask())  # some libraries write for the owner's eyes only
        flush(part)
        os.replace(part, path)
        flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(data: bytes, path: Path) -> None:
    """Whole or not at all."""
    with replacing(path) as part:
        part.write_bytes(data)


def write_text(text: str, path: Path) -> None:
    """UTF-8, lines ended by \\n on every system; whole or not at all."""
    write_bytes(whole(text).encode(), path)


def write_json(facts: Any, path: Path) -> None:
    """Whole or not at all."""
    write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", path)


def copy(source: Path, path: Path) -> None:
    """Whole or not at all."""
    with replacing(path) as part:
        shutil.copyfile(source, part)


def is_file(path: Path) -> bool:
    return exists(path) and path.is_file()


def exists(path: Path) -> bool:
    """Whether anything lies there; not under a name that no file can have, nor in a folder that may not be entered."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def check_folder(folder: Path, flag: str) -> None:
    """Raise InputError where no file could be written in this folder, be it there or still to be made; nothing stays behind."""
    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if exists(place))
    try:
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder")
        probe = above / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as fault:
        raise InputError(
            f"{flag} {folder}: {above} cannot be written to ({fault.strerror}); name another place"
        ) from fault


def check_regular(path: Path) -> None:
    """Raise InputError for what is there and no file: a pipe is waited for, a device may have no end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # whoever opens it says why
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{path}: is a pipe or a device; write what it gives into a file, and name that")


def not_text(head: bytes) -> tuple[str, str] | None:
    """What a file that begins so is, where text in UTF-8 is expected, and the remedy; None for what may be such text."""
    for begin, what, remedy in OTHERS:
        if head.startswith(begin):
            return what, remedy
    if b"\0" in head[:4]:  # no text in UTF-8 has one; UTF-16 without its mark does
        width, order = 32 if b"\0\0" in head[:4] else 16, "BE" if head.startswith(b"\0") else "LE"
        name = f"UTF-{width}{order}"
        return f"binary or {name}", f"if it is {name}, write it in UTF-8: iconv -f {name} -t UTF-8"
    return None


class Doubled(dict):
    """A JSON object that names a key twice: it keeps the last value."""

    key = ""


def told_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As `object_pairs_hook` of `json.loads`: JSON itself passes over the first of two values without a word."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    found, seen = Doubled(found), set()
    found.key = next(key for key, _ in pairs if key in seen or seen.add(key))
    return found


def json_fault(fault: Exception) -> str:
    """What a parser of JSON stumbled over."""
    if isinstance(fault, RecursionError):
        return "brackets within brackets, too deep"
    if isinstance(fault, json.JSONDecodeError):
        return fault.msg
    return "a number of too many digits" if "digits" in str(fault) else str(fault)


def flush(path: Path) -> None:
    """Have a file or folder on the disk when this returns."""
    if os.name == "nt":  # flushes neither a folder nor what is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as fault:  # some file systems cannot flush a folder
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def hold(path: Path) -> FileLock | None:
    """Lock `path`, a file for this purpose alone, until `release` or the end of the process; None if another has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, mode=0o644)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time, the others wait; `path` is a file for this purpose alone."""
    from filelock import FileLock

    with FileLock(path, mode=0o644):
        yield


def whole(text: str) -> str:
    """The text with U+FFFD for half a character (a lone surrogate, which JSON can write and no encoding can)."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def umask() -> int:
    """Of this process: what files are not to be."""
    now = os.umask(0)
    os.umask(now)
    return now


# ---------------------------------------------------------------------- files that are added to

# A line is written once, whole, and is on the disk when `write` returns. What a power cut leaves behind, a last line
# without its end, counts as never written.


def encode(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; a last line that was cut short is not there.

    Raises InputError for a damaged line before the last.
    """
    try:
        rows = file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as fault:
        raise InputError(f"{file}: cannot be read ({fault.strerror})") from fault
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            line = json.loads(row)
            if not isinstance(line, dict):
                raise ValueError("not an object")
        except ValueError as fault:
            if number == len(rows):
                break
            raise InputError(f"{file}: line {number} is damaged ({fault}); delete it, and it is asked again") from fault
        lines.append(line)
    return lines


class Appender:
    """A file of JSON lines, open for one writer: repaired, locked, and, unless said otherwise, durable line by line."""

    def __init__(self, file: Path, durable: bool = True):
        self.file, self.durable = file, durable
        new = not file.exists()
        self._lock = lock(file)
        try:
            self._fd = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
            keep = sum(len(row) + 1 for row in _whole_rows(file))
            os.ftruncate(self._fd, keep)
            os.lseek(self._fd, keep, os.SEEK_SET)
            os.fsync(self._fd)
            if new:
                flush(file.parent)
        except OSError as fault:
            raise InputError(f"{file}: cannot be written ({fault.strerror}); choose another --out") from fault

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append; on the disk when this returns, if durable. Raises RunError when the disk does not take them."""
        rest = memoryview(b"".join(encode(line) for line in lines))
        if not rest:
            return
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            if self.durable:
                os.fsync(self._fd)
        except OSError as fault:
            raise RunError(
                f"{self.file}: cannot be written ({fault.strerror}); the same command goes on when there is room"
            ) from fault

    def close(self) -> None:
        os.close(self._fd)
        self._lock.release()

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_fault) -> None:
        self.close()


def lock(file: Path) -> FileLock:
    """Hold a file that is added to. Raises InputError when somebody else does."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = hold(file.with_name(f".{file.name}.lock"))
    except OSError as fault:
        raise InputError(f"{file}: cannot be written ({fault.strerror}); choose another --out") from fault
    if held is None:
        raise InputError(f"{file}: another process is writing it; wait for its end, or stop it")
    return held


def _whole_rows(file: Path) -> list[bytes]:
    """The rows that `read_lines` reads: a last one that was cut short is left out."""
    rows = file.read_bytes().split(b"\n")[:-1]
    return rows[: len(read_lines(file))]


def add_line(facts: Mapping[str, Any], file: Path) -> None:
    """One more line of what is told on the way, for one writer; readers pass over one that a kill cut short. Not flushed."""
    with open(file, "ab+") as opened:
        if opened.tell():
            opened.seek(-1, os.SEEK_END)
        cut = opened.read(1) not in (b"", b"\n")
        opened.write(b"\n" * cut + encode(facts))
