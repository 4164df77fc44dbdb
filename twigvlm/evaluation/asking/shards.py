"""The parts of a run in processes of their own, on this machine: started, watched, waited for. Knows nothing of questions and models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...processes import PARENT, Placement, Stop, cores

TAIL = 12  # last lines of a dead shard's log
POLL = 0.1  # seconds between two looks at the children


@dataclass(frozen=True)
class Ended:
    """A child that failed: its part, its exit status, the last lines of its log."""

    part: int
    status: int
    log: Path
    tail: str

    @property
    def cause(self) -> str:
        """The last thing that it said."""
        return self.tail.splitlines()[-1] if self.tail else "it said nothing"

    @property
    def reason(self) -> str:
        if self.status < 0:
            return f"was killed by {signal.Signals(-self.status).name}"
        return f"ended with status {self.status}"


def launch(
    command: Sequence[str], placement: Placement, logs: Path, stop: Stop, tick: Callable[[], None]
) -> list[Ended]:
    """Run `command --num-shards N --shard i --answer-only` for every part and wait for all of them.

    A child that dies leaves the others at work. `tick` is called about once a second. Returns the
    children that failed; on a stop the signal is passed on and their clean ends are no failures.
    """
    logs.mkdir(parents=True, exist_ok=True)
    children: dict[int, subprocess.Popen] = {}
    failed: list[Ended] = []
    try:
        for part in placement.parts:
            children[part] = _start(command, placement, part, logs)
        last, told = 0.0, False
        while children:
            for part, child in list(children.items()):
                status = child.poll()
                if status is None:
                    continue
                del children[part]
                if status and not (stop and status in (stop.code, -stop.signal)):  # the latter: before it could listen
                    failed.append(_ended(part, placement, status, logs))
                    print(f"shard {part} {failed[-1].reason}: {failed[-1].cause}", file=sys.stderr, flush=True)
            if stop and not told:
                told = True
                for child in children.values():
                    child.send_signal(stop.signal)
            if time.monotonic() - last > 1:
                tick()
                last = time.monotonic()
            time.sleep(POLL)
    finally:
        for child in children.values():  # only after an error here: nobody is left behind
            child.kill()
            child.wait()
    tick()
    return failed


def _start(command: Sequence[str], placement: Placement, part: int, logs: Path) -> subprocess.Popen:
    env = dict(os.environ) | {PARENT: str(os.getpid())}
    if placement.devices:
        env["CUDA_VISIBLE_DEVICES"] = placement.devices[part % len(placement.devices)]
    else:
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // len(placement.parts))))
    with open(log_file(logs, placement.count, part), "wb") as log:
        return subprocess.Popen(
            [*command, "--num-shards", str(placement.count), "--shard", str(part), "--answer-only"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
        )


def log_file(logs: Path, count: int, part: int) -> Path:
    return logs / f"{count}_{part}.log"


def _ended(part: int, placement: Placement, status: int, logs: Path) -> Ended:
    log = log_file(logs, placement.count, part)
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return Ended(part, status, log, "\n".join([line for line in lines if line.strip()][-TAIL:]))
