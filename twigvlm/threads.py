"""How torch's CPU threads wait for one another; and who else is at work. Standard library only.

OpenMP's threads meet after every operation, some thousand times a second while a small model decodes. By default they
spin until the others arrive. Where every thread has a core that is best: who sleeps must be woken, which costs a small
model up to a fifth of its speed. Where not, everything waits for a thread that is not running while its core spins for
others. Torch's wheels for Linux bring GNU's libgomp, whose GOMP_SPINCOUNT says after how many turns a thread goes to sleep;
other libraries know the standard's OMP_WAIT_POLICY. Both are read when torch is loaded, never again. benchmarks/threads.py
measures it, docs/LOG.md has figures.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them is somebody's decision
FEW = "1000"  # turns
LOOKS, APART = 3, 0.005  # at who wants a core, and the seconds between them
STAT, LOAD = Path("/proc/stat"), Path("/proc/loadavg")
IDLE = (3, 4)  # places of "idle" and "iowait" in its first line
GUESTS = 8  # from here on its figures are counted already


def settle(env: MutableMapping[str, str] = os.environ) -> None:
    """Where others want the cores, let threads sleep early, unless somebody has said how they wait or torch, which
    would not hear it, is loaded."""
    if "torch" in sys.modules or any(name in env for name in WAITING):
        return
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return
    if not crowded():
        return
    libraries = Path(found.submodule_search_locations[0]) / "lib"
    if any(libraries.glob("libgomp*")):
        env["GOMP_SPINCOUNT"] = FEW
    else:
        env["OMP_WAIT_POLICY"] = "passive"


def crowded() -> bool:
    """Whether others leave this process fewer cores than it may use; also where nothing tells.

    It counts threads that want a core now: an average over minutes would hold programs that have ended.
    """
    others = []
    for look in range(LOOKS):
        time.sleep(APART * (look > 0))
        try:
            others.append(int(LOAD.read_text().split()[3].split("/")[0]) - 1)  # all but the one that looks
        except (OSError, ValueError, IndexError):
            return True
    cores = os.cpu_count() or 1
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return statistics.median(others) + own > cores


@dataclass(frozen=True)
class Clock:
    """Seconds of CPU time since the machine and this process with its children began; None where it is not told."""

    busy: float | None
    own: float
    wall: float

    @staticmethod
    def now() -> Clock:
        times = os.times()
        return Clock(_busy(), sum(times[:4]), times.elapsed)

    def cores_taken(self, before: Clock) -> float | None:
        """Cores that others kept busy since `before`, averaged."""
        if self.busy is None or before.busy is None or self.wall <= before.wall:
            return None
        others = (self.busy - before.busy) - (self.own - before.own)
        return max(0.0, others / (self.wall - before.wall))


def _busy() -> float | None:
    try:
        ticks = [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[1 : GUESTS + 1]]
    except (OSError, ValueError):
        return None
    return sum(n for place, n in enumerate(ticks) if place not in IDLE) / os.sysconf("SC_CLK_TCK")
