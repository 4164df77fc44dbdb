"""Who answers which part: one process per device here, or one of many on several nodes.

A process learns its part from flags, else from torchrun's or accelerate's RANK and WORLD_SIZE, else
from Slurm's array or task number; without any of them it launches one process per visible device
and waits for all. Knows nothing of questions and models.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError

TAIL = 12  # last lines of a dead shard's log
POLL = 0.1  # seconds between two looks at the children
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
IMPATIENCE = 2.0  # seconds between two signals that make the second one an order
PARENT = "TWIGVLM_LAUNCHER"  # its process id, for the shards that it started


@dataclass(frozen=True)
class Placement:
    """The parts that this process sees to: `parts` of `count`, one child per entry if `launch`."""

    count: int
    parts: tuple[int, ...]
    launch: bool = False
    devices: tuple[str, ...] = ()  # entries of CUDA_VISIBLE_DEVICES, dealt out in turn
    local: int | None = None  # which device of the node, where a launcher of several nodes says so
    source: str = "flags"

    @property
    def alone(self) -> bool:
        """Nobody else answers questions of this run."""
        return len(self.parts) == self.count


def place(num_shards: int | None, shard: int | None, env: Mapping[str, str], device: str | None = None) -> Placement:
    """Which parts fall to this process. Raises InputError for numbers that contradict each other."""
    if num_shards is not None and num_shards < 1:
        raise InputError(f"--num-shards is {num_shards}; 1 or more is needed")
    if shard is not None:
        if num_shards is None:
            raise InputError("--shard says which part, but not of how many; give --num-shards too")
        if not 0 <= shard < num_shards:
            raise InputError(f"--shard is {shard}; 0 to {num_shards - 1} is needed with --num-shards {num_shards}")
        return Placement(num_shards, (shard,))
    for source, found in (("RANK", _torchrun(env)), ("SLURM", _slurm(env))):
        if found is None:
            continue
        index, count, local = found
        if num_shards not in (None, count):
            raise InputError(f"--num-shards is {num_shards}, but {source} says {count} processes; leave the flag away")
        return Placement(count, (index,), local=local, source=source)
    return _local(device, num_shards, env)


def _torchrun(env: Mapping[str, str]) -> tuple[int, int, int | None] | None:
    if "RANK" not in env or "WORLD_SIZE" not in env or _number(env, "WORLD_SIZE") == 1:
        return None
    return _checked(env, "RANK", _number(env, "WORLD_SIZE"), "LOCAL_RANK")


def _slurm(env: Mapping[str, str]) -> tuple[int, int, int | None] | None:
    """The array's number and, inside each element, the task's."""
    arrays = tasks = 1
    index = 0
    if "SLURM_ARRAY_TASK_ID" in env:
        arrays = _number(env, "SLURM_ARRAY_TASK_COUNT", 1)
        step = _number(env, "SLURM_ARRAY_TASK_STEP", 1)
        index = (_number(env, "SLURM_ARRAY_TASK_ID") - _number(env, "SLURM_ARRAY_TASK_MIN", 0)) // max(step, 1)
    local = None
    if "SLURM_PROCID" in env:
        tasks = _number(env, "SLURM_NTASKS", 1)
        index = index * tasks + (_number(env, "SLURM_PROCID") if tasks > 1 else 0)
        local = _number(env, "SLURM_LOCALID", 0) if tasks > 1 else None
    if arrays * tasks == 1:
        return None
    if not 0 <= index < arrays * tasks:
        raise InputError(
            f"Slurm's numbers give part {index} of {arrays * tasks}; check SLURM_ARRAY_TASK_* and SLURM_PROCID"
        )
    return index, arrays * tasks, local


def _checked(env: Mapping[str, str], name: str, count: int, local: str) -> tuple[int, int, int | None]:
    index = _number(env, name)
    if not 0 <= index < count:
        raise InputError(f"{name} is {index}; 0 to {count - 1} is needed with {count} processes")
    return index, count, _number(env, local) if local in env else None


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    try:
        return int(env[name]) if name in env or default is None else default
    except ValueError as fault:
        raise InputError(f"{name} is {env[name]!r}; a whole number is needed") from fault


def _local(device: str | None, num_shards: int | None, env: Mapping[str, str]) -> Placement:
    """All parts, here: one per visible CUDA device, unless a number or a device is given.

    Without CUDA a list of devices is taken as a wish for as many processes, as far as there are cores.
    """
    named = tuple(d.strip() for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip() not in ("", "-1"))
    devices: tuple[str, ...] = ()
    count = num_shards
    if device in (None, "cuda") and num_shards != 1:
        import torch

        if torch.cuda.is_available():
            devices = named or tuple(str(i) for i in range(torch.cuda.device_count()))
            count = num_shards or len(devices)
        elif len(named) > 1 and num_shards is None:
            count = min(len(named), cores())
            print(
                f"{len(named)} devices are named, but there is no CUDA here: {count} processes on the CPU", flush=True
            )
    count = count or 1
    return Placement(count, tuple(range(count)), count > 1, devices, source="this node")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------- stopping and launching


class Stop:
    """Notes a signal to stop, so that work can end at a clean place; a second one ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._parent = int(os.environ.get(PARENT, 0))

    def __enter__(self) -> Stop:
        self._before = {}
        for name in SIGNALS:
            if hasattr(signal, name):
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_fault) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        if self._parent and os.getppid() != self._parent:  # the launcher was killed: nobody waits for this shard
            self.signal = self.signal or signal.SIGTERM
        return self.signal is not None

    @property
    def code(self) -> int:
        """The shell's convention: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + (self.signal or 0)

    def _note(self, number: int, _frame) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = number, now
        elif now - self._since > IMPATIENCE:  # not the same signal once from the terminal and once from the launcher
            os._exit(128 + number)


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
