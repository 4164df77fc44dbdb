"""TwigVLM: a small twig on a frozen vision-language model prunes its visual tokens and drafts its words."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from . import threads

__version__ = "0.1.0"
__all__ = ["InputError", "Output", "RunError", "Stats", "Step", "TwigConfig", "TwigVLM", "load"]

_HOMES = {
    "InputError": "errors",
    "RunError": "errors",
    "TwigConfig": "config",
    "Step": "decoding.loop",
    **dict.fromkeys(("Output", "Stats", "TwigVLM", "load"), "vlm"),
}

# transformers imports torchao wherever it is installed, and torchao names every kernel for GPUs that does not fit this
# torch; nothing here asks those. Logger → how its messages that are left out begin.
_NOISE = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("%s is an Enum subclass and is now natively supported",),
}

if TYPE_CHECKING:
    from .config import TwigConfig
    from .decoding.loop import Step
    from .errors import InputError, RunError
    from .vlm import Output, Stats, TwigVLM, load


def _stopped_early(kind, fault, trace, others=sys.excepthook) -> None:
    """Ctrl-C while a program still loads its libraries: no traceback, as later."""
    if issubclass(kind, KeyboardInterrupt):
        print(file=sys.stderr)
    else:
        others(kind, fault, trace)


if sys.argv[:1] == ["-m"]:  # Python looks for a module of this package that is to be run
    sys.excepthook = _stopped_early
threads.settle()  # before anything here loads torch
for _logger, _starts in _NOISE.items():
    logging.getLogger(_logger).addFilter(lambda record, starts=_starts: not str(record.msg).startswith(starts))


def __getattr__(name: str):
    """Import on first use: `import twigvlm` costs nothing, and scoring needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
