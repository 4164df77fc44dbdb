"""Serve a model as OpenAI's chat completions: python -m twigvlm.serving, then http://127.0.0.1:8000/v1.

Without flags: the embedded model, on this machine alone. Answers that are asked for at the same time are written
together. Flags of the model and of how to answer are what clients get who say nothing else.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from .settings import ServerSettings


def parse(argv: list[str] | None) -> argparse.Namespace:
    from .. import flags

    serving = flags.group("server", ServerSettings)
    from ..program import called

    parser = flags.parser(called("twigvlm.serving"), __doc__, flags.model(), flags.writing(), serving)
    flags.add_switches(parser)
    return flags.parse(parser, argv)


def run(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    import twigvlm

    from .. import flags
    from ..foresight import Wish, check
    from . import listen

    listen.need()
    from .desk import Desk

    settings = ServerSettings(**{f.name: getattr(args, f.name) for f in fields(ServerSettings)})
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wish = Wish(**vars(flags.model_settings(args)))
    options = flags.generation(args, wish.has_twig)
    check(wish, options)
    with listen.bind(settings) as sock:  # before the model is read: a port that is taken is known at once
        if not settings.local and settings.key is None:
            print(
                f"warning: anybody who reaches {settings.host} may ask; give --api-key to choose who", file=sys.stderr
            )
        vlm = twigvlm.load(**vars(flags.model_settings(args)))
        vlm.check(**options)  # else every client would be told what is wrong here
        desk = Desk(vlm, options, settings)
        if desk.vlm.twig is None:
            print("No twig given (--twig-block): plain decoding, nothing pruned.", file=sys.stderr)
        listen.serve(desk, sock)


def main(argv: list[str] | None = None) -> int:
    from ..program import run_program

    return run_program(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
