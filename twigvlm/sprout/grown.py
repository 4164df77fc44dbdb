"""Twigs that a report trains for itself, as users train theirs, and figures that are not measured twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import RunError
from ..files import CHECKOUT, write_json
from ..training.run.checkpoints import RUN


def trained(folder: Path, flags: Sequence[str], steps: int, device: str | None = None) -> Path:
    """The folder of a twig, trained for so many steps at the first call; one that was stopped goes on.

    Raises RunError where its training fails.
    """
    if not finished(folder):
        flags = [*flags, "--out", str(folder.resolve()), "--max-steps", str(steps), "--held-out", "0"]
        flags += ["--agreement", "labels"]  # no answers of the base are made for it
        flags += ["--device", device] if device else []
        command = [sys.executable, "-m", "twigvlm.training.launch", *flags]
        if (code := subprocess.run(command, cwd=CHECKOUT, check=False).returncode) or not finished(folder):
            raise RunError(
                f"the training of {folder.name} ended with exit code {code}, see above; the same command goes on"
            )
    return folder


def finished(folder: Path) -> bool:
    file = folder / RUN
    return file.is_file() and "finished" in json.loads(file.read_text(encoding="utf-8"))


def kept(file: Path, settings: dict, measure) -> dict:
    """The figures of `file` where they were made under the same settings; else `measure` makes them."""
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["settings"] == settings:
            return found["figures"]
    figures = measure()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json({"settings": settings, "figures": figures}, file)
    return figures
