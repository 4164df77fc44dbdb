"""Files that one process holds: the only place that knows how a system locks them.

Windows has no such locks in Python; there a second process is not kept out.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def hold(file: int, wait: bool = False) -> bool | None:
    """Lock an open file (its descriptor) until it is closed; False where another process holds it.

    None where the system or the file system has no locks, so that nobody knows.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        return False if fault.errno in (errno.EWOULDBLOCK, errno.EAGAIN) else None
    return True


@contextlib.contextmanager
def alone(file: Path) -> Iterator[bool]:
    """One process at a time, the others wait; gives whether that is sure."""
    opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield bool(hold(opened, wait=True))
    finally:
        os.close(opened)


def whole(text: str) -> str:
    """The text with U+FFFD for half a character (a lone surrogate, which JSON can write and no encoding can)."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
