"""What a program of this package writes to a terminal, run in this process."""

from __future__ import annotations

import os
import pty
import threading
from collections.abc import Callable
from contextlib import redirect_stdout

import pytest


def on_a_terminal(main: Callable[[list[str]], int], flags: list[str], **env: str) -> str:
    """What is shown in the end; it is read meanwhile, since a terminal holds little."""
    leader, follower = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(leader, 4096):
                shown.append(part)
        except OSError:  # closed by the other side
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with pytest.MonkeyPatch.context() as patch, open(follower, "w", encoding="utf-8") as out, redirect_stdout(out):
            patch.delenv("NO_COLOR", raising=False)
            for name, value in {"TERM": "xterm", **env}.items():
                patch.setenv(name, value)
            assert main(flags) == 0
    finally:
        reader.join(60)
        os.close(leader)
    return b"".join(shown).decode()
