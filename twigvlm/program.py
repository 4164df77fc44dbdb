"""How every program of this project ends: what is wrong as one line on stderr, and an exit status."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable

from .errors import InputError, RunError
from .files import CHECKOUT

PROGRAM = "twigvlm"
PATIENCE = 50_000  # objects before unreachable ones are looked for: with Python's 700 it takes a tenth of the time that libraries load
INSTALL = "install what this project needs: " + (
    "`make demo` sets up .venv, or pip install -r requirements.txt && pip install -e ."
    if CHECKOUT
    else 'pip install "twigvlm[train,eval]"'
)


def extra(name: str) -> str:
    """How the packages of an extra are installed."""
    return f'pip install -e ".[{name}]"' if CHECKOUT else f'pip install "twigvlm[{name}]"'


def called(module: str) -> str:
    """How a command is written where somebody asks how to use it: `twigvlm NAME`, or `python -m` its module."""
    return sys.argv[0] if sys.argv[0].startswith(f"{PROGRAM} ") else f"python -m {module}"


def run_program(body: Callable[[], int | None]) -> int:
    """Run `body`; its exit status (None is 0), 2 for what cannot be asked, 1 for what went wrong, 130 for Ctrl-C."""
    gc.set_threshold(PATIENCE)
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # text holds any letter, or no letter, whatever the locale says
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        code = body() or 0
        sys.stdout.flush()
        return code
    except InputError as fault:
        return _fail(fault, 2)
    except ModuleNotFoundError as fault:
        return _fail(InputError(f"{fault}; {INSTALL}"), 2)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RunError, OSError, RuntimeError, MemoryError) as fault:
        return _fail(fault, getattr(fault, "code", 1))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def print_json(facts: object, asked: bool) -> None:
    """One line for programs; on a terminal, which is read by people, only if it was asked for."""
    if asked or not sys.stdout.isatty():
        print(json.dumps(facts), flush=True)


def _fail(fault: Exception, code: int) -> int:
    print(f"error: {' '.join(str(fault).split()) or type(fault).__name__}", file=sys.stderr, flush=True)
    return code
