"""Which of many processes this one is, and the signals that tell it to stop.

A process learns its part from flags, else from torchrun's or accelerate's RANK and WORLD_SIZE, else from Slurm's
array or task number; without any of them the parts are all its own, one per visible device. No torch at import.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .errors import InputError
from .program import run_program

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
IMPATIENCE = 2.0  # seconds between two signals that make the second one an order
PARENT = "TWIGVLM_LAUNCHER"  # its process id, for the processes that it started


@dataclass(frozen=True)
class Rank:
    """This process among `count`; `local` on its machine, None where nobody says. `source` names who said it."""

    index: int
    count: int
    local: int | None
    source: str


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
    found = rank_of(env)
    if found is None:
        return _local(device, num_shards, env)
    if num_shards not in (None, found.count):
        raise InputError(
            f"--num-shards is {num_shards}, but {found.source} says {found.count} processes; leave the flag away"
        )
    return Placement(found.count, (found.index,), local=found.local, source=found.source)


def rank_of(env: Mapping[str, str] = os.environ, arrays: bool = True) -> Rank | None:
    """What a launcher says in the environment; None for one process alone.

    `arrays`: whether the elements of a Slurm array are parts of one whole, or each a whole of its own. Raises
    InputError for numbers that cannot be.
    """
    return _torchrun(env) or _slurm(env, arrays)


def _torchrun(env: Mapping[str, str]) -> Rank | None:
    if "RANK" not in env or "WORLD_SIZE" not in env or (count := _number(env, "WORLD_SIZE")) == 1:
        return None
    index = _number(env, "RANK")
    if not 0 <= index < count:
        raise InputError(f"RANK is {index}; 0 to {count - 1} is needed with {count} processes")
    return Rank(index, count, _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else None, "RANK")


def _slurm(env: Mapping[str, str], in_array: bool) -> Rank | None:
    """The array's number and, inside each element, the task's."""
    arrays = tasks = 1
    index = 0
    if in_array and "SLURM_ARRAY_TASK_ID" in env:
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
    return Rank(index, arrays * tasks, local, "SLURM")


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


# ---------------------------------------------------------------------- stopping


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
        if self._parent and os.getppid() != self._parent:  # the launcher was killed: nobody waits for this process
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


def guarded(work: Callable[[Stop], int]) -> int:
    """Run a program's body, which ends at a clean place when it is told to stop; its exit status."""

    def body() -> int:
        with Stop() as stop:
            return work(stop)

    return run_program(body)
