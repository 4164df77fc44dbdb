"""Checkpoint folders that are whole or not there, and the folder of a run, which belongs to one run.

Knows files; knows nothing of what is in them. A checkpoint is written beside its place, flushed to
the disk, sealed with a list of its files and their checksums, and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from ...errors import InputError, RunError
from ...files import flush, hold, write_json, write_text

SEAL, RUN = "whole.json", "run.json"
SAVING, DOOMED, LOCK, TOKEN = ".saving", ".doomed", ".lock", ".token"
STEM = "checkpoint-"  # and the steps that it holds
CHUNK = 1 << 22
OURS = re.compile(
    r"checkpoint-\d+|run\.json|log\.jsonl|skipped\.jsonl|base_answers\.npz|on_policy(-\d+)?\.jsonl|tensorboard|plan\.json|stopped\.json|"
    r"model\.safetensors|twig_config\.json|config\.yaml|README\.md|curve\.png|wandb|survey-\w+\.npz|\..*|.*\.part"
)


def checkpoints(out: Path) -> list[Path]:
    """All checkpoint folders of a run, whole or not, newest first."""
    found = [p for p in out.glob(f"{STEM}*") if p.name.removeprefix(STEM).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(STEM))


def last_whole(out: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint whose every byte is as it was written, and the newer ones that are damaged."""
    damaged = []
    for folder in checkpoints(out):
        if is_whole(folder):
            return folder, damaged
        damaged.append(folder)
    return None, damaged


def is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
        return all(_checksum(folder / name) == tuple(stored) for name, stored in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def facts(folder: Path) -> dict:
    """What `seal` was told about a whole checkpoint."""
    return json.loads((folder / SEAL).read_text(encoding="utf-8"))


def seal(part: Path, place: Path, told: dict) -> None:
    """Flush every file of `part` to the disk, list them, and make the folder `place` in one step."""
    files = {}
    for file in sorted(p for p in part.rglob("*") if p.is_file()):
        flush(file)
        files[str(file.relative_to(part))] = _checksum(file)
    write_json({**told, "files": files}, part / SEAL)
    for folder in (part, *(p for p in part.rglob("*") if p.is_dir())):
        flush(folder)
    remove(place)  # a damaged one of the same step
    os.rename(part, place)
    flush(place.parent)


def put(part: Path, place: Path, told: dict, keep: int) -> None:
    """Make what was written to `part` the checkpoint `place`, and delete all but the newest `keep`."""
    with writing(f"the checkpoint {place.name}", place.parent):
        seal(part, place, told)
    shutil.rmtree(part.parent, ignore_errors=True)
    prune(place.parent, keep)


def prune(out: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; a kill while deleting leaves none that looks whole."""
    for folder in checkpoints(out)[keep:]:
        remove(folder)


def remove(folder: Path) -> None:
    if folder.exists():
        doomed = folder.with_name(f"{DOOMED}-{folder.name}-{os.getpid()}")
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(out: Path) -> None:
    """Remove what a killed run left half done."""
    shutil.rmtree(out / SAVING, ignore_errors=True)
    for leftover in out.glob(f"{DOOMED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _checksum(file: Path) -> tuple[int, int]:
    """(size, CRC-32): finds what a power cut or a full disk damaged, at the speed of the disk."""
    size = total = 0
    with open(file, "rb") as opened:
        while chunk := opened.read(CHUNK):
            size, total = size + len(chunk), zlib.crc32(chunk, total)
    return size, total


@contextlib.contextmanager
def writing(what: str, out: Path, remedy: str = "free space and give the same command again") -> Iterator[None]:
    """Turn a failing disk into a RunError that says where the last whole checkpoint is."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as fault:  # torch reports a full disk as RuntimeError
        if isinstance(fault, RunError):
            raise
        raise _failed(what, out, fault, remedy) from fault


def _failed(what: str, out: Path, fault: Exception, remedy: str) -> RunError:
    shutil.rmtree(out / SAVING, ignore_errors=True)
    last, _ = last_whole(out)
    free = shutil.disk_usage(out).free if out.exists() else 0
    reason = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
    return RunError(
        f"{what} could not be written to {out} ({reason}; {free / 2**20:.0f} MiB free); "
        + (f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet")
        + f"; {remedy}"
    )


def occupy(out: Path) -> FileLock:
    """Make the folder of a run and lock it; gives the lock to hold.

    Raises InputError when it is no folder of a training, or is in use.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = hold(out / LOCK)
    except OSError as fault:
        raise InputError(f"output folder {out}: cannot be used ({fault.strerror}); choose another --out") from fault
    if lock is None:
        raise InputError(
            f"output folder {out}: another training is writing there; wait for it, or choose another --out"
        )
    names = sorted(p.name for p in out.iterdir())
    strange = [n for n in names if not OURS.fullmatch(n)]
    results = [n for n in names if n.startswith("checkpoint-") or n.endswith(".safetensors")]
    if not (out / RUN).exists() and (strange or results):
        raise InputError(
            f"output folder {out}: holds {', '.join((strange + results)[:3])}, but no {RUN} of a training; "
            "choose an empty --out"
        )
    write_text(uuid.uuid4().hex, out / TOKEN)
    return lock


def same_folder(out: Path, token: str, patience: float = 30.0) -> None:
    """Raise InputError unless this machine sees what the first process wrote into `out` (network folders may lag)."""
    end = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError):
            if (out / TOKEN).read_text(encoding="utf-8") == token:
                return
        if time.monotonic() > end:
            raise InputError(
                f"output folder {out}: this machine ({platform.node()}) does not see what the first one writes there; "
                "all machines need the same --out, on a shared file system"
            )
        time.sleep(0.2)


def identify(out: Path, identity: dict, whole: bool = True) -> None:
    """Note whose folder this is, or raise InputError naming each setting in which its run differs.

    Not `whole`: compare what is given so far, note nothing.
    """
    file = out / RUN
    if not file.exists():
        if whole:
            with writing(RUN, out):
                write_json({"identity": identity}, file)
        return
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))["identity"]
        keys = dict.fromkeys([*stored, *identity] if whole else identity)
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise InputError(f"{file}: not readable ({fault}); choose another --out") from fault
    same = json.loads(json.dumps(identity))
    differing = [
        f"{key} is {stored.get(key)!r} there and {same.get(key)!r} here"
        for key in keys
        if stored.get(key) != same.get(key)
    ]
    if differing:
        raise InputError(
            f"output folder {out} belongs to another run: {'; '.join(differing)}; "
            "choose another --out, or give the settings of that run to continue it"
        )
