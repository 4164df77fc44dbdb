"""The one program: `twigvlm COMMAND`, or `python -m twigvlm COMMAND`. No command is imported before it is asked for."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import NamedTuple

from . import __version__
from .errors import InputError
from .program import PROGRAM, run_program


class Command(NamedTuple):
    """What it does, the module whose `main` does it, and the extra that brings the packages which it cannot start without."""

    does: str
    module: str
    extra: str = ""
    needs: tuple[str, ...] = ()


WEB = ("web", ("fastapi", "uvicorn"))
SERVE = ("serve", (*WEB[1], "prometheus_client"))
GROUPS: dict[str, dict[str, Command]] = {
    "use a model": {
        "demo": Command("ask about a picture on the command line", "twigvlm.commands.demo"),
        "web": Command("a page to ask on and to look at", "twigvlm.web.__main__", *WEB),
        "serve": Command("an API that speaks OpenAI's language", "twigvlm.serving.__main__", *SERVE),
        "show": Command("which patches pruning methods keep of a picture", "twigvlm.pruning.show"),
        "catalogue": Command("the pruning methods", "twigvlm.pruning.catalogue"),
    },
    "train": {
        "train": Command("train a twig, or a projector behind a pruning method", "twigvlm.training.launch"),
        "inspect": Command("look at training data", "twigvlm.training.inspect"),
        "on-policy": Command("write the base's own answers to training samples", "twigvlm.training.on_policy.__main__"),
        "agreement": Command("ask the base for its words on held-out samples", "twigvlm.training.agreement"),
    },
    "measure": {
        "eval": Command("ask a whole benchmark and score it", "twigvlm.evaluation.run"),
        "suite": Command("all benchmarks at all budgets, and their table", "twigvlm.evaluation.suite"),
        "score": Command("score a file of answers without a model", "twigvlm.evaluation.score"),
        "table": Command("results as one table", "twigvlm.evaluation.table"),
        "compare": Command("all pruning methods side by side", "twigvlm.evaluation.compare"),
        "calibrate": Command("fit the thresholds of a pruning method to a budget", "twigvlm.evaluation.calibrate"),
        "speed": Command("how fast, against stock generate", "twigvlm.evaluation.speed"),
        "check": Command("which benchmarks' files are here, whole or damaged", "twigvlm.evaluation.check"),
        "lmms-task": Command("a local task for lmms-eval", "twigvlm.evaluation.lmms.task"),
    },
    "share": {
        "push": Command("upload a twig to the hub", "twigvlm.commands.push"),
        "export": Command("write a twig as a stock checkpoint that drafts", "twigvlm.commands.export"),
    },
    "the embedded model": {
        "report": Command("how good it is on its test split", "twigvlm.sprout.report"),
        "measure": Command("whether a base uses its depth", "twigvlm.sprout.measure"),
        "sprout": Command("grow it again from nothing", "twigvlm.sprout.train"),
        "publish": Command("put a grown one into a clone", "twigvlm.sprout.publish"),
        "drawn": Command("draw its benchmarks", "twigvlm.world.drawn"),
        "conversations": Command("draw its training data", "twigvlm.world.conversations"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def overview() -> str:
    """What `twigvlm --help` prints."""
    lines = [f"usage: {PROGRAM} COMMAND [flags]", "", "A twig on a frozen vision-language model prunes and drafts.", ""]
    for title, group in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<14} {command.does}" for name, command in group.items()), ""]
    return "\n".join([*lines, f"{PROGRAM} COMMAND --help tells a command's flags; {PROGRAM} --version."])


def find(name: str) -> Command:
    """Raises InputError for what is no command, with those that it may have meant."""
    if name in COMMANDS:
        return COMMANDS[name]
    if name.startswith("-"):
        raise InputError(
            f"{name} stands before a command; write {PROGRAM} COMMAND {name} ({PROGRAM} --help lists them)"
        )
    near = difflib.get_close_matches(name, COMMANDS)
    meant = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(COMMANDS)} is needed"
    raise InputError(f"{PROGRAM} has no command {name!r}; {meant} ({PROGRAM} --help lists them)")


def run(argv: Sequence[str]) -> int:
    """One command, in this process: its module then sees itself called by this name."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help", "help") and not rest:
        print(overview())
        return 0
    if name in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return 0
    if name == "help":
        name, rest = rest[0], ["--help"]
    command = find(name)
    if missing := [package for package in command.needs if importlib.util.find_spec(package) is None]:
        raise InputError(
            f'{PROGRAM} {name} needs {", ".join(missing)}, not installed: pip install "{PROGRAM}[{command.extra}]"'
        )
    before, sys.argv = sys.argv, [f"{PROGRAM} {name}", *rest]
    try:
        return importlib.import_module(command.module).main(rest)
    finally:
        sys.argv = before


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_program(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
