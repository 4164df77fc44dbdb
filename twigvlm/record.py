"""What every result file says about its making: command, code, versions, device."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path

from .errors import InputError
from .files import CHECKOUT
from .program import PROGRAM

MARKDOWN = "github"  # as tabulate calls it


def provenance() -> dict:
    """Command line, commit, time, versions and device of this process."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "command": shlex.join(_argv()),
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def table(rows: Sequence[Mapping], digits: int = 1, form: str = MARKDOWN, words: Sequence[str] | None = None) -> str:
    """Rows below the keys of the first one, in a `form` of tabulate's.

    Columns are on the left, or, if `words` names those, all others on the right. Raises InputError where tabulate is
    not installed.
    """
    try:
        from tabulate import tabulate
    except ImportError:
        raise InputError("a table needs tabulate, which is not installed: pip install tabulate") from None

    def cell(value) -> str:
        text = "" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|") if form == MARKDOWN else text

    head = list(rows[0])
    cells = [[cell(row.get(key)) for key in head] for row in rows]
    sides = ["left" if words is None or key in words else "right" for key in head]
    return tabulate(cells, head, form, disable_numparse=True, colalign=sides)


def tokens_per_step(accepted: int, steps: int) -> float | None:
    """Tau: tokens that a verification yields, the accepted drafts and one of the base's own; None without verifications.

    Not what is written of them: an end token is not, nor what stands behind it, and its verification was one like the others.
    """
    return (steps + accepted) / steps if steps else None


def _argv() -> list[str]:
    if sys.argv[0].startswith(f"{PROGRAM} "):
        return [*sys.argv[0].split(), *sys.argv[1:]]
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = ["-m", module.name] if module is not None and module.name else [Path(sys.argv[0]).name]
    return [Path(sys.executable).name, *name, *sys.argv[1:]]


@cache
def _commit() -> str | None:
    """Of the clone; of an installed package its version."""
    if CHECKOUT is None:
        return f"v{version('twigvlm')}"
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
