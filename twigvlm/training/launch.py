"""Start a training on what is here: `python -m twigvlm.training.launch` with the flags of the training.

One process on one device, torchrun for several, DeepSpeed's launcher for a hostfile, nothing of its
own under Slurm (`srun`), torchrun or DeepSpeed. Before that it draws the embedded base's data, asks the
base for its words on the held-out samples and, with --on-policy, has it answer samples, once. Environment: NPROC_PER_NODE, HOSTFILE,
NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import check_folder
from ..processes import PARENT
from ..program import run_program
from .data.records import Records, check_there
from .settings import HELD_OUT, HELD_OUT_SHARE, STOPPED, Settings, check_accelerate, parse

if TYPE_CHECKING:
    import torch

TRAIN, ASK, ANSWER = (f"twigvlm.training.{name}" for name in ("train", "agreement", "on_policy"))
SAVING_TIME = 1800  # seconds that processes have to save after SIGTERM, before they are killed


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def body() -> int:
        settings, args = parse(argv, __doc__)  # a wrong flag is told before torch is loaded
        return _train(argv) if args.dry_run else start(settings, argv)

    return run_program(body)


def start(settings: Settings, argv: list[str]) -> int:
    """The exit code: of the training within this process where it is one, else of those it has started."""
    from .data.loading import fill_in

    foresee(settings)
    env = os.environ
    rank = int(env.get("RANK", env.get("SLURM_PROCID", "0")))
    if rank == 0 and int(env.get("NODE_RANK", "0")) == 0:
        settings = fill_in(settings)
        _ask_base(settings, argv)
    if settings.on_policy and int(env.get("NODE_RANK", "0")) == 0 and (code := _write_answers(settings, argv)):
        return code
    processes, nodes = _processes(settings), int(env.get("NNODES", "1"))
    launched = _launched() is not None
    if "HOSTFILE" in env and not launched:
        if settings.device == "cpu":
            env.setdefault("DS_ACCELERATOR", "cpu")
        sys.stdout.flush()
        deepspeed = ["-m", "deepspeed.launcher.runner", *_deepspeed(env["HOSTFILE"])]
        os.execv(sys.executable, [sys.executable, *deepspeed, TRAIN, *argv])
    if not launched and (processes > 1 or nodes > 1):
        return _torchrun(settings, processes, nodes, argv)
    return _train(argv)


def _train(argv: list[str]) -> int:
    from . import train

    return train.main(argv)


def foresee(settings: Settings) -> None:
    """Raise InputError for what cannot be, before data are drawn and the base is asked: both take minutes."""
    check_accelerate()
    from ..foresight import Wish
    from ..loading.device import check_attention, pick_device
    from .data.loading import with_start
    from .plus.subject import foresee_stage
    from .projector import ProjectorSubject
    from .train import check_export
    from .twig import INITS, Start, reducer_of

    settings = with_start(settings)
    Start(settings.K, settings.T, settings.F, settings.init)
    if settings.data is None and settings.base is not None:
        raise InputError("no data: give --data FILE (LLaVA's instruction JSON) and --images FOLDER")
    check_attention(settings.attention)
    check_export(settings.export_release)
    device = pick_device(settings.device)
    wish = Wish(settings.base, shape=settings.random)
    letters = wish.base_letters(settings.K, settings.T, settings.F)
    reducer_of(settings.tower_pruning, letters, wish.V)
    foresee_stage(settings, letters, wish.V)
    if settings.learn == "projector":
        ProjectorSubject(settings).reducer_of(letters.L, wish.V)
    if settings.init not in INITS:
        wish.check_start(settings.init, settings.K, settings.T)
    _check_places(settings)
    if int(os.environ.get("NNODES", "1")) == 1 and "HOSTFILE" not in os.environ:
        _check_shares(settings, device, _launched() or _processes(settings))


def _check_places(settings: Settings) -> None:
    """Raise InputError for files and folders that are not there, or cannot be made."""
    from .data.examples import check_image_folder

    for file in filter(None, (settings.data, settings.held_out_data)):
        check_there(Path(file))
    for folder in filter(None, (settings.images, settings.held_out_images)):
        check_image_folder(Path(folder))
    check_folder(Path(settings.out or "runs"), "--out")


def _check_shares(settings: Settings, device: torch.device, world: int) -> None:
    """Raise InputError where these processes cannot share a batch as the flags and DeepSpeed's file have it."""
    from .run.device import precision_of
    from .run.zero import settle
    from .settings import ROWS_PER_DEVICE, split_batch

    shares = split_batch(settings.batch_size, world, settings.per_device_batch, ROWS_PER_DEVICE[device.type])
    if file := settings.zero_config(device.type, world):
        settle(file, 1, *shares, world, settings, precision_of(settings, device) == "bf16")  # of any width


def _launched() -> int | None:
    """Processes of this run, where somebody else started them (torchrun, srun)."""
    env = os.environ
    if "RANK" in env:
        return int(env.get("WORLD_SIZE", "1"))
    tasks = int(env.get("SLURM_NTASKS", "1"))
    return tasks if tasks > 1 and "SLURM_STEP_ID" in env else None


def _processes(settings: Settings) -> int:
    asked = os.environ.get("NPROC_PER_NODE")
    if asked is not None:
        if not asked.isdigit() or int(asked) < 1:
            raise InputError(f"NPROC_PER_NODE is {asked!r}; 1 or more is needed")
        return int(asked)
    if settings.device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _deepspeed(hostfile: str) -> list[str]:
    """The flags of DeepSpeed's launcher. A file that names this machine alone needs no ssh."""
    file = Path(hostfile)
    if not file.is_file():
        raise InputError(f"HOSTFILE is {hostfile!r}; no such file (lines: HOST slots=GPUS)")
    hosts = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", line.split("#")[0].strip())
        if match:
            hosts[match[1]] = match[2]
        elif line.split("#")[0].strip():
            raise InputError(f"{file}, line {number}: {line.strip()!r}; HOST slots=GPUS is needed")
    if not hosts:
        raise InputError(f"{file}: names no host (lines: HOST slots=GPUS)")
    where = ["--hostfile", str(file.resolve())]
    if set(hosts) <= {"localhost", "127.0.0.1", socket.gethostname()}:
        where = ["--hostfile", os.devnull, "--num_gpus", str(sum(map(int, hosts.values())))]
    address = ["--master_addr", os.environ["MASTER_ADDR"]] if "MASTER_ADDR" in os.environ else []
    return [*where, *address, "--master_port", os.environ.get("MASTER_PORT", "29500"), "--module"]


def _ask_base(settings: Settings, argv: list[str]) -> None:
    """The base's words, by a process of its own: the training itself never holds the whole base."""
    from .agreement import FILE as ANSWERS

    if settings.agreement != "base" or settings.random or (Path(settings.out) / ANSWERS).exists():
        return
    if settings.held_out == 0 or (settings.held_out is None and not settings.held_out_data and _small(settings.data)):
        return
    code = subprocess.run([sys.executable, "-m", ASK, *argv], check=False).returncode
    if code:
        print("the base could not be asked (see above); agreement is measured with the labels", file=sys.stderr)


def _write_answers(settings: Settings, argv: list[str]) -> int:
    """The base's own answers, by processes of their own: one a device, or this one's share where others stand beside it."""
    count, command = 1 if _launched() else _processes(settings), [sys.executable, "-m", ANSWER, *argv]
    env = dict(os.environ) | {PARENT: str(os.getpid())}
    if count == 1:
        return subprocess.run(command, env=env, check=False).returncode
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with contextlib.ExitStack() as files:
        said = [files.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        started = [
            subprocess.Popen(
                command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(count)}, stderr=said[r] if r else None
            )
            for r in range(count)
        ]  # fmt: skip
        codes = [one.wait() for one in started]
        if not codes[0] and (failed := next((r for r, code in enumerate(codes) if code), None)) is not None:
            said[failed].seek(0)  # what all would say the first has said
            last = said[failed].read().decode(errors="replace").strip().rpartition("\n")[2]
            print(last or f"error: process {failed} ended with exit code {codes[failed]}", file=sys.stderr)
    return next((code if code > 0 else 1 for code in codes if code), 0)


def _small(data: str | None) -> bool:
    """Whether nothing of this file is held out unless asked."""
    return data is None or len(Records(data)) < HELD_OUT * HELD_OUT_SHARE


def _torchrun(settings: Settings, processes: int, nodes: int, argv: list[str]) -> int:
    """torchrun in this process, so that SIGTERM ends as it should: saved, exit code 0."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from .data.loading import fill_in

    env = os.environ
    if settings.device == "cpu":
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    where = ["--standalone"]
    if nodes > 1:
        where = ["--nnodes", str(nodes), "--node-rank", env.get("NODE_RANK", "0")]
        where += [
            "--master-addr",
            env.get("MASTER_ADDR", "127.0.0.1"),
            "--master-port",
            env.get("MASTER_PORT", "29500"),
        ]
    flags = ["--nproc-per-node", str(processes), "--shutdown-timeout", str(SAVING_TIME), *where]
    began = time.time()
    try:
        run.run(run.parse_args([*flags, "-m", TRAIN, *argv]))
    except ChildFailedError as fault:
        for rank, failure in fault.failures.items():  # another's message may only say that this one has ended
            if failure.exitcode < 0:
                print(f"error: process {rank} was killed by signal {-failure.exitcode}", file=sys.stderr)
        return max(1, fault.get_first_failure()[1].exitcode)
    except SignalException as fault:
        return 0 if _stopped_since(fill_in(settings), began) else 128 + int(fault.sigval)
    return 0


def _stopped_since(settings: Settings, began: float) -> bool:
    try:
        return json.loads((Path(settings.out) / STOPPED).read_text(encoding="utf-8"))["time"] >= began
    except (OSError, ValueError, KeyError):
        return False


if __name__ == "__main__":
    sys.exit(main())
