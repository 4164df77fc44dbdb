"""Where a benchmark's files are written; each picture is kept once, however many benchmarks show it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...files import write_bytes
from ..draw import draw
from .pool import scene

FORMATS = {"jpeg": {"quality": 85, "optimize": True}, "png": {"compress_level": 6}}


@dataclass(frozen=True)
class Folder:
    """Where a benchmark's files are written."""

    path: Path
    pictures: Path

    def text(self, name: str, text: str) -> None:
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text.encode())

    def json(self, name: str, value: Any) -> None:
        self.text(name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def lines(self, name: str, rows: Iterable[dict]) -> None:
        self.text(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def picture(self, name: str, seed: int) -> None:
        """The picture of a scene; one copy on the disk, however many benchmarks show it."""
        form = "png" if name.endswith(".png") else "jpeg"
        kept, data = self.pictures / f"{seed}.{form}", encoded(seed, form)
        if not kept.exists() or kept.read_bytes() != data:
            write_bytes(data, kept)
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            return
        try:
            os.link(kept, place)
        except OSError:  # no hard links here
            place.write_bytes(data)


@cache
def encoded(seed: int, form: str) -> bytes:
    """A scene as a file of `form`, a key of FORMATS."""
    data = io.BytesIO()
    draw(scene(seed)).save(data, form, **FORMATS[form])
    return data.getvalue()
