"""Python programs that need not load torch and transformers: each is forked from a process that has (a fork server).

Loading takes four seconds of a core, longer than what most programs do in a test. What has its say before torch is
loaded, pipes and terminals need a Python started anew, and so does one test of each way to start a program.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import get_context, set_start_method
from pathlib import Path

LIBRARIES = ("torch.distributed.launcher.api", "torch.utils.data", "accelerate", "deepspeed", "matplotlib.pyplot", "torchao.quantization",
             "transformers.models.auto", "transformers.models.llava.modeling_llava")  # fmt: skip
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(list(LIBRARIES))  # those that are missing are left out


class Program:
    """`python WORDS` in a session of its own, where WORDS are `-m MODULE …` or `FILE …`; to be used as a Popen of text."""

    def __init__(self, words: Sequence[object], cwd: Path, env: Mapping[str, str] = os.environ, merged: bool = False):
        self.args = [*map(str, words)]
        self._said = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(1 if merged else 2)]  # noqa: SIM115
        files = [self._said[0].name, self._said[-1].name]
        self._process = SERVER.Process(target=_become, args=(self.args, str(cwd), dict(env), files))
        self._process.start()
        self.pid, self.kill, self.terminate = self._process.pid, self._process.kill, self._process.terminate

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def line(self, timeout: float = 120) -> str:
        """The first line that it says on stdout, as soon as it does; what is there by then if it ends without one."""
        until, said = time.monotonic() + timeout, self._said[0]
        while not (found := said.readline()).endswith("\n") and self.poll() is None and time.monotonic() < until:
            said.seek(0)
            time.sleep(0.02)
        return found

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it said on stdout and on stderr, on both if they are merged. Raises TimeoutExpired if it goes on."""
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._said[0].read(), "" if len(self._said) == 1 else self._said[1].read()


def run(words: Sequence[object], cwd: Path, env: Mapping[str, str] = os.environ, timeout: float = 900) -> subprocess.CompletedProcess:  # fmt: skip
    """As `subprocess.run` does it with `capture_output` and `text`."""
    program = Program(words, cwd, env)
    try:
        said = program.communicate(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(program.args, program.returncode, *said)


def _become(words: list[str], cwd: str, env: dict[str, str], said: list[str]) -> None:
    """In a fork of the server: be that program."""
    import torch

    set_start_method(None, force=True)  # the usual one
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, file in enumerate((os.devnull, *said)):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), number)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", os.cpu_count())))
    homes = (sys.prefix, sys.base_prefix)
    libraries = [path for path in sys.path if any(Path(path).is_relative_to(home) for home in homes)]
    named = env["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in env else []
    if words[0] == "-m":
        sys.argv, sys.path[:] = words[1:], [cwd, *named, *libraries]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:] = words, [str(Path(words[0]).resolve().parent), *named, *libraries]
        runpy.run_path(words[0], run_name="__main__")
