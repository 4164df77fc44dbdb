"""The processes of a run: who they are, under any launcher, and how they agree.

Understands torchrun's and DeepSpeed's environment variables and Slurm's (`srun python -m ...`).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist

from ...errors import InputError, RunError
from ...processes import rank_of
from ...workers import end_workers

FAILED = "a process of the run has failed"  # a key of the store
LOOK, GRACE = 1.0, 5.0  # seconds between two looks at it; until a process that ends by itself should have done so
GONE = re.compile(r"closed by peer|reset by peer|broken pipe|gloo|nccl|timed out waiting", re.IGNORECASE)
PATIENCE = timedelta(hours=4)  # rank 0 may read a large data file before the others hear of it
SLURM_PORTS = (20000, 20000)  # first port, and how many to choose from by job id


class Elsewhere(Exception):
    """Another process has failed and says why; this one ends quietly, with the same exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, `local` on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def on_first(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on rank 0, on every rank. An error there ends all: it is raised on rank 0, others raise Elsewhere."""
        if self.world == 1:
            return work()
        fault, told = None, None
        if self.first:
            try:
                told = (True, work())
            except Exception as found:
                fault, told = found, (False, 2 if isinstance(found, InputError) else 1)
        box = [told]
        dist.broadcast_object_list(box, src=0)
        if fault is not None:
            raise fault
        good, value = box[0]
        if not good:
            raise Elsewhere(value)
        return value

    def everywhere(self, work: Callable[[], Any]) -> Any:
        """`work` on every rank; if it fails on one, all end, and the first that failed says why."""
        if self.world == 1:
            return work()
        value, fault = None, None
        try:
            value = work()
        except Exception as found:
            fault = found
        codes: list = [None] * self.world
        dist.all_gather_object(codes, None if fault is None else (2 if isinstance(fault, InputError) else 1))
        failed = [r for r, code in enumerate(codes) if code is not None]
        if not failed:
            return value
        if failed[0] == self.rank:
            raise fault
        raise Elsewhere(codes[failed[0]])

    def collect(self, value: Any) -> list:
        """Every rank's `value`, in order."""
        if self.world == 1:
            return [value]
        found: list = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def reduce(self, values: list[float], device: torch.device, largest: bool = False) -> list[float]:
        """Sums (or maxima) over all ranks."""
        if self.world == 1:
            return values
        numbers = torch.tensor(values, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return numbers.tolist()

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


def find(env: MutableMapping[str, str] = os.environ) -> Ranks:
    """From the environment; what Slurm says of a step (`srun`) is written there in torchrun's words."""
    if "RANK" not in env and "SLURM_STEP_ID" in env and rank_of(env, arrays=False):
        _adopt_slurm(env)
    found = rank_of({name: value for name, value in env.items() if not name.startswith("SLURM_")})
    return Ranks(found.index, found.count, found.local or 0) if found else ALONE


def _adopt_slurm(env: MutableMapping[str, str]) -> None:
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    env.setdefault(
        "MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost"))
    )
    start, count = SLURM_PORTS
    env.setdefault("MASTER_PORT", str(start + int(env.get("SLURM_JOB_ID", "0")) % count))


def first_host(nodes: str) -> str:
    """The first of Slurm's list: "gpu[03-05,9],big1" → "gpu03"."""
    match = re.match(r"([^\[,]*)(?:\[([^\]]*)\]([^,]*))?", nodes)
    if not match[2]:
        return match[1]
    return match[1] + re.split("[,-]", match[2])[0] + match[3]


def join(ranks: Ranks, device: torch.device) -> None:
    """Open the channel between the processes, before anything of Hugging Face's or DeepSpeed's asks for it."""
    if ranks.world == 1:
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as fault:
        reason = str(fault).splitlines()[0]
        raise RunError(
            f"process {ranks.rank} of {ranks.world} cannot reach the others ({reason}); check MASTER_ADDR "
            f"({os.environ.get('MASTER_ADDR')}) and MASTER_PORT ({os.environ.get('MASTER_PORT')})"
        ) from fault
    Thread(target=_watch, args=(ranks, _store()), daemon=True).start()


def _store() -> dist.Store:
    """Where the processes of a run leave words for each other."""
    return dist.distributed_c10d._get_default_store()


_LEFT = Event()  # this process is through, or has said that it failed


def _watch(ranks: Ranks, store: dist.Store) -> None:
    """End this process when another has failed: on GPUs it might wait for that one's part of a sum for hours."""
    while not _LEFT.wait(LOOK):
        try:
            failed = store.check([FAILED])
        except RuntimeError:  # the process that keeps the words is gone
            failed = True
        if failed and not _LEFT.wait(GRACE):
            print(f"process {ranks.rank}: another process has failed, see its message", file=sys.stderr, flush=True)
            end_workers()
            os._exit(1)


def tell_failure() -> None:
    """Let the other processes know that this one is about to end."""
    _LEFT.set()
    with contextlib.suppress(Exception):  # nobody is left to hear it, or nobody was there yet
        if dist.is_initialized():
            _store().set(FAILED, "1")


@contextlib.contextmanager
def others_told() -> Iterator[None]:
    """A message to a process that is gone fails, in words of the network: a quiet end, since that one has said why."""
    try:
        yield
    except RuntimeError as fault:
        if isinstance(fault, RunError) or not dist.is_initialized() or not GONE.search(str(fault)):
            raise
        reason = " ".join(str(fault).splitlines()[0].split()).split(". ")[0]
        raise RunError(f"another process has ended, see its message ({reason})") from fault


def leave(ranks: Ranks) -> None:
    """All together: a process that goes early makes the others' last messages fail."""
    if ranks.world > 1 and dist.is_initialized():
        dist.barrier()
        _LEFT.set()
        dist.destroy_process_group()


def alone(env: MutableMapping[str, str] = os.environ) -> None:
    """The variables that DeepSpeed wants even of a single process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        env.setdefault(name, str(value))
