"""Where files lie, the one way to write one (whole or not at all) and to hold a lock. Knows nothing of what is in them.

filelock is imported with the first lock: reading and scoring need the standard library alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import FileLock

PART = ".part-"  # begins the name of what is not whole yet
PACKAGE = Path(__file__).resolve().parent
# The clone (or unpacked source distribution) that this code runs from; None where it was installed.
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else None
# What comes along with the code: checkpoints/, assets/, scripts/. A wheel carries it inside the package.
BROUGHT = CHECKOUT or PACKAGE / "carried"


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
