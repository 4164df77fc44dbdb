"""What every result file says about its making: command, code, versions, device."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict:
    """Command line, commit, time, versions and device of this process."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "command": " ".join([Path(sys.executable).name, *_argv()]),
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def table(rows: list[dict], digits: int = 1) -> str:
    """Markdown with the keys of the first row as its head."""

    def cell(value) -> str:
        return "" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---" for _ in head) + "|"]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in head) + " |" for row in rows]
    return "\n".join(lines)


def _argv() -> list[str]:
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = ["-m", module.name] if module is not None and module.name else [Path(sys.argv[0]).name]
    return [*name, *sys.argv[1:]]


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
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
