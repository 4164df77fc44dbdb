"""Processes that load data: whatever goes wrong in one is told by name, and none outlives its program.

A worker's exception travels as text, since not every exception can be pickled or made again. Workers
ignore the signals that stop a program, which still needs their batches; so the program kills them
when it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.queues
import multiprocessing.util  # its own clean-up at exit waits for workers: ours is registered later, and so comes first
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .errors import InputError, RunError

IGNORED = ("SIGTERM", "SIGINT", "SIGHUP")
LONGEST = 2000  # letters of what an exception says
PATIENCE = 5.0  # seconds for a killed process to be gone
GRACE = 5.0  # seconds for a process that hung up to be gone: its memory is given back first, on a busy machine slowly
_STARTED: list = []  # processes, also those whose loader is gone by the time that their death is told
_HEARD: list = []  # torch's handler of dying workers, while it is not wanted


@dataclass(frozen=True)
class Failure:
    """What went wrong elsewhere: InputError's text (`asked`), or that of anything else."""

    text: str
    asked: bool = False

    def raised(self) -> Exception:
        return InputError(self.text) if self.asked else RunError(self.text)


def describe(fault: BaseException) -> str:
    """Type, text, notes and place of an exception, on one line that somebody can read."""
    told = traceback.TracebackException(type(fault), fault, None)
    every = list(told.format_exception_only())
    told.__notes__ = None
    plain = list(told.format_exception_only())  # the last line says what it is; notes stand behind it
    said = " ".join(" ".join([plain[-1], *every[len(plain) :]]).split())
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]} …"
    frames = traceback.extract_tb(fault.__traceback__)
    return f"{said} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else said


def attempt(work: Callable[..., Any], *args: Any, about: str = "") -> Any:
    """What `work` gives in a worker, or a Failure: of what it is `about`, unless the error says so itself."""
    try:
        return work(*args)
    except (InputError, RunError) as fault:
        return Failure(str(fault), isinstance(fault, InputError))
    except BaseException as fault:  # also what would end the worker without a word
        return Failure(f"{about or 'a process that loads data'}: {describe(fault)}{_remedy(fault)}")


def checked(found: Any) -> Any:
    """What `attempt` gave, or its error."""
    if isinstance(found, Failure):
        raise found.raised()
    return found


@contextlib.contextmanager
def named(name: Callable[[], str]) -> Iterator[None]:
    """Whatever goes wrong is the fault of `name()`: unforeseen exceptions become RunErrors that say so."""
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as fault:
        # contextlib takes a RuntimeError from a StopIteration for that StopIteration.
        cause = None if isinstance(fault, StopIteration) else fault
        raise RunError(f"{name()}: {describe(fault)}{_remedy(fault)}") from cause


def _remedy(fault: BaseException) -> str:
    return "; use fewer --workers or leave this one out" if isinstance(fault, MemoryError) else ""


# ---------------------------------------------------------------------- loading


class _Guarded(Dataset):
    """A dataset whose every failure in a worker is an answer."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return _here_or_there(self.dataset.__getitem__, index, about=f"item {index} of the data")

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return _here_or_there(self._several, indices, about=f"samples {', '.join(map(str, indices))}")

    def _several(self, indices: Sequence[int]) -> list:
        several = getattr(self.dataset, "__getitems__", None)
        return several(indices) if several else [self.dataset[i] for i in indices]


def _here_or_there(work: Callable[..., Any], *args: Any, about: str) -> Any:
    if get_worker_info() is not None:
        return attempt(work, *args, about=about)
    with named(lambda: about):
        return work(*args)


def _collate(collate: Callable[[Any], Any], found: Any) -> Any:
    if isinstance(found, Failure):
        return found
    return _here_or_there(collate, found, about="a batch")


def loader(
    dataset: Dataset,
    collate: Callable[[Any], Any],
    workers: int,
    ahead: int,
    enter: Callable[[], object] | None = None,
    **more: Any,
) -> DataLoader:
    """torch's DataLoader (`more` are its arguments); each worker prepares `ahead` batches and calls `enter` first.

    What it gives is to be read through `batches`.
    """
    if workers:
        more |= {"prefetch_factor": ahead, "worker_init_fn": partial(_enter, enter)}
        more["multiprocessing_context"] = _remembering()
    return DataLoader(_Guarded(dataset), num_workers=workers, collate_fn=partial(_collate, collate), **more)


def batches(loaded: Iterable) -> Iterator:
    """What a `loader` gives. Raises InputError or RunError, on one line, for what went wrong in its workers."""
    each = iter(loaded)
    while True:
        try:
            found = fetch(each)
        except StopIteration:
            return
        yield found


def fetch(loaded: Iterator) -> Any:
    """The next of what a `loader` gives. Raises as `batches` does, and StopIteration at the end."""
    with workers_told():
        try:
            return checked(next(loaded))
        except (ConnectionError, EOFError, FileNotFoundError) as fault:  # it died while it handed over a batch
            raise _death(fault) from fault


@contextlib.contextmanager
def workers_told() -> Iterator[None]:
    """torch notices a worker's death wherever the program is just then: a RunError that says so."""
    try:
        yield
    except RuntimeError as fault:
        if isinstance(fault, RunError) or "DataLoader worker" not in str(fault):
            raise
        raise _death(fault) from fault


def _death(fault: Exception) -> RunError:
    """A worker has died: of what, as far as its exit tells."""
    _deaf()
    end = time.monotonic() + GRACE
    while not any(codes := [p.exitcode for p in _STARTED]) and None in codes and time.monotonic() < end:
        time.sleep(0.02)
    code = next(filter(None, codes), 0)
    how = f"exit code {code}" if code else "exited unexpectedly"
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    memory = "; the memory may be full: use fewer --workers" if "SIGKILL" in how else ""
    return RunError(f"a process that loads data died ({how}){memory}; with --workers 0 an error shows itself")


def _deaf() -> None:
    """From here on the death of a worker is no news: torch's handler would raise wherever the program is."""
    with contextlib.suppress(ValueError, AttributeError):  # another thread's, or Windows'
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if callable(before):
            _HEARD.append(before)


def _enter(hook: Callable[[], object] | None, _number: int) -> None:
    """One thread, and no end but the program's."""
    torch.set_num_threads(1)
    for name in IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hook is not None:
        hook()


class _Queue(multiprocessing.queues.Queue):
    """A batch that cannot be sent is told of in its place: the usual queue, whose thread pickles, drops it, and it would
    be waited for in vain.
    """

    def put(self, item: tuple[int, Any], block: bool = True, timeout: float | None = None) -> None:
        try:
            data = ForkingPickler.dumps(item)
        except Exception as fault:
            failure = Failure(f"a batch cannot be handed over: {describe(fault)}{_remedy(fault)}")
            data = ForkingPickler.dumps((item[0], failure))
        super().put(bytes(data), block, timeout)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        return ForkingPickler.loads(super().get(block, timeout))


# ---------------------------------------------------------------------- the end


def _remembering() -> multiprocessing.context.BaseContext:
    """The usual way to start processes and to talk to them; those that it starts are known to `end_workers`."""
    usual = multiprocessing.get_context()

    class Remembering(type(usual)):
        def Process(self, *args: Any, **more: Any) -> multiprocessing.Process:
            process = usual.Process(*args, **more)
            _STARTED[:] = [*(p for p in _STARTED if p.is_alive()), process]
            return process

        def Queue(self, maxsize: int = 0) -> _Queue:
            return _Queue(maxsize, ctx=usual)

    return Remembering()


@atexit.register
def end_workers() -> None:
    """Kill the workers that this process has started."""
    left = [p for p in multiprocessing.active_children() if p in _STARTED]
    if left:
        _deaf()
    for process in left:
        process.kill()
    for process in left:
        process.join(PATIENCE)
    with contextlib.suppress(ValueError):
        while _HEARD:
            signal.signal(signal.SIGCHLD, _HEARD.pop())
