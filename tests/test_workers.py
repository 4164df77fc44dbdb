"""Whatever goes wrong in a process that loads data, its program ends within seconds and says what it was."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, often
from torch.utils.data import Dataset

from twigvlm import workers
from twigvlm.errors import InputError, RunError

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Needy(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


class Lying(Exception):
    message = "torch makes it again from its message, which fails"

    def __init__(self, number):
        super().__init__(number)


class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")


def local() -> type[Exception]:
    class Local(Exception):
        """Cannot be pickled."""

    return Local


def noted(fault: Exception) -> Exception:
    fault.__notes__ = ["a hint only"]  # what add_note does from Python 3.11 on
    return fault


RAISED = {
    "KeyError": (lambda: KeyError("x"), "KeyError: 'x'"),
    "SystemExit": (lambda: SystemExit(0), "SystemExit: 0"),
    "KeyboardInterrupt": (KeyboardInterrupt, "KeyboardInterrupt"),
    "StopIteration": (StopIteration, "StopIteration"),
    "GeneratorExit": (GeneratorExit, "GeneratorExit"),
    "unpicklable": (lambda: local()("y"), "Local: y"),
    "needs-more": (lambda: Needy(1, 2), "Needy: 1 2"),
    "lying": (lambda: Lying(3), "Lying: 3"),
    "mute": (Mute, "Mute"),
    "MemoryError": (MemoryError, "MemoryError"),
    "RecursionError": (lambda: RecursionError("deep"), "RecursionError: deep"),
    "RuntimeError": (lambda: RuntimeError("a\nb"), "RuntimeError: a b"),
    "noted": (lambda: noted(KeyError("cause")), "KeyError: 'cause'"),
    "endless": (lambda: RuntimeError("a" * 10**6), "RuntimeError: " + "a" * 100),
    "holds-a-lock": (lambda: RuntimeError(multiprocessing.Lock()), "RuntimeError: <Lock"),
}
DEATHS = {
    "_exit-0": (lambda: os._exit(0), "exited unexpectedly"),
    "_exit-3": (lambda: os._exit(3), "exit code 3"),
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
}
HOW = [*RAISED, *DEATHS]


def fail(how: str) -> None:
    if how in DEATHS:
        DEATHS[how][0]()
    raise RAISED[how][0]()


def told(how: str) -> str:
    return (RAISED.get(how) or DEATHS[how])[1]


class Numbers(Dataset):
    def __init__(self, how: str):
        self.how = how

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> int:
        if i == 5:
            fail(self.how)
        return i


def gone() -> bool:
    """Whether every worker has ended."""
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.02)
    return not multiprocessing.active_children()


def as_it_is(found):
    return found


@pytest.mark.parametrize("count", often([1, 3], 1))
@pytest.mark.parametrize("how", often(HOW, *RAISED, "_exit-3", "killed"))  # torch looks for the others every 5 s
def test_a_failure_is_told_on_one_line(how, count):
    loaded = workers.batches(workers.loader(Numbers(how), as_it_is, count, 2, batch_size=2))
    found, start = [], time.monotonic()
    with pytest.raises(RunError) as caught:
        found += loaded
    text = str(caught.value)
    assert told(how) in text and "\n" not in text and time.monotonic() - start < 20
    if how in RAISED:
        assert found == [[0, 1], [2, 3]] and "samples 4, 5" in text and "test_workers.py, line" in text
    del loaded, caught
    workers.end_workers()
    assert gone()


@pytest.mark.parametrize(
    "how", [how for how in RAISED if how not in ("SystemExit", "KeyboardInterrupt", "GeneratorExit")]
)
def test_without_workers_it_is_the_same(how):
    with pytest.raises(RunError, match="samples 4, 5: ") as caught:
        list(workers.batches(workers.loader(Numbers(how), as_it_is, 0, 2, batch_size=2)))
    assert told(how) in str(caught.value)


def test_what_is_asked_wrongly_stays_so():
    class Wrong(Numbers):
        def __getitem__(self, i):
            raise InputError("nothing there")

    for count in (0, 1):
        with pytest.raises(InputError, match=r"^nothing there$"):
            list(workers.batches(workers.loader(Wrong(""), as_it_is, count, 2, batch_size=2)))


def only_the_second(found):
    return (lambda: found) if 2 in found else torch.tensor(found)


def test_a_batch_that_cannot_be_sent():
    """It would be waited for in vain; those before it arrive."""
    loaded = workers.batches(workers.loader(Numbers("KeyError"), only_the_second, 1, 2, batch_size=2))
    assert next(loaded).tolist() == [0, 1]
    with pytest.raises(RunError, match=r"^a batch cannot be handed over: .*only_the_second"):
        next(loaded)


def test_a_collator_that_fails():
    def collate(found):
        raise Needy(1, 2)

    for count in (0, 1):
        with pytest.raises(RunError, match=r"a batch: .*Needy: 1 2"):
            list(workers.batches(workers.loader(Numbers("KeyError"), collate, count, 2, batch_size=2)))


@pytest.mark.slow
def test_signals_do_not_stop_workers_and_the_end_of_the_program_does():
    """Also an end that nobody foresaw, with the loader still in somebody's hands."""
    code = (
        "import multiprocessing, os, signal, sys\nfrom twigvlm import workers\n"
        "class Numbers(list):\n    def __getitem__(self, i): return i if i != 17 else {}['x']\n"
        "loaded = iter(workers.loader(Numbers(range(20)), list, 2, 2, batch_size=2))\nnext(loaded), next(loaded)\n"
        "[os.kill(p.pid, n) for p in multiprocessing.active_children() for n in (signal.SIGTERM, signal.SIGINT)]\n"
        "[next(loaded) for _ in range(6)]  # more than were under way\n"
        "print(type(next(loaded)).__name__, *(p.pid for p in multiprocessing.active_children()), flush=True)\n"
        "raise KeyError('nobody foresaw this')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "nobody foresaw this" in done.stderr
    kind, *pids = done.stdout.split()
    assert kind == "Failure" and len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


# ---------------------------------------------------------------------- reading the data
