"""A page on which to look at a model: which patches a method keeps, which words were drafted, and what it costs.

Without flags: the embedded model and six drawn pictures. One process, one port, no network: what the page
needs lies in the package. Answers are computed one after the other.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields

from .. import flags
from ..errors import InputError
from ..program import called, extra, run_program
from .settings import PageSettings, address_of, listen

MODULE = "twigvlm.web"
PATIENCE = 2  # seconds that open answers get when the page ends


def parse(argv: Sequence[str] | None) -> Namespace:
    page = flags.group("where the page is", PageSettings)
    parser = flags.parser(called(MODULE), __doc__, flags.model(), page)
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    parser.add_argument("--no-browser", dest="open", action="store_false", help="do not (the default)")
    return flags.parse(parser, argv)


def run(args: Namespace) -> int:
    try:
        import fastapi  # noqa: F401 (asked early, before a model is loaded)
        import uvicorn
    except ModuleNotFoundError as fault:
        raise InputError(f"the page needs {fault.name}, which is not installed: {extra('web')}") from fault
    from transformers.utils import logging

    from .. import load
    from ..foresight import Wish, check
    from ..serving.engine import Engine
    from ..serving.listen import ending
    from .app import make_app

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = PageSettings(**{f.name: getattr(args, f.name) for f in fields(PageSettings)})
    model = flags.model_settings(args)
    check(Wish(**vars(model)))
    with listen(settings) as made:
        vlm = load(**vars(model))
        engine = Engine(vlm, max_batch=1)
        try:
            config = uvicorn.Config(
                make_app(vlm, engine, settings), log_level="warning", access_log=False, server_header=False,
                timeout_graceful_shutdown=PATIENCE,
            )  # fmt: skip
            server = uvicorn.Server(config)
            with ending(server):
                address = address_of(made, settings)
                print(f"{address}  {vlm.base_name} on {vlm.device}; Ctrl-C ends it", flush=True)
                if args.open:
                    import webbrowser

                    webbrowser.open(address)
                server.run(sockets=[made])
        finally:
            engine.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_program(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
