"""Ask a vision-language model about a picture and watch its twig draft the answer.

Without flags: the embedded model and its picture. With LLaVA-1.5-7B:
twigvlm demo --stream --base-model liuhaotian/llava-v1.5-7b --twig-block FOLDER --image-file PICTURE
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from ..files import BROUGHT, whole
from ..program import called, run_program

DEFAULT_IMAGE = BROUGHT / "assets" / "image.png"
DEFAULT_QUESTION = "Describe the image in detail."
USE_LLAVA = (
    "Embedded model. For LLaVA-1.5-7B: twigvlm demo --base-model liuhaotian/llava-v1.5-7b "
    "--twig-block FOLDER --image-file PICTURE"
)
GREEN, RESET = "\033[32m", "\033[0m"


def parse(argv: list[str] | None) -> argparse.Namespace:
    from .. import flags

    parser = flags.parser(called("twigvlm demo"), __doc__, flags.model(), flags.writing())
    flags.add_switches(parser)
    ask = parser.add_argument_group("what to ask")
    ask.add_argument(
        "--image-file",
        default=str(DEFAULT_IMAGE),
        metavar="FILE",
        help="path or http(s) URL (default: a picture that comes along)",
    )
    ask.add_argument(
        "--question",
        metavar="TEXT",
        help="ask this and stop (default: a conversation, ended by an empty line or Ctrl-D)",
    )
    show = parser.add_argument_group("what to show")
    show.add_argument(
        "--stream", action="store_true", help="print words as they come, drafted ones in green on a terminal"
    )
    show.add_argument("--json", action="store_true", help="print one JSON object per answer and nothing else")
    show.add_argument("--show-kept", metavar="FILE.png", help="write the picture with the dropped patches dimmed")
    return flags.parse(parser, argv)


def coloured() -> bool:
    """Colour is for terminals, and only where it is welcome (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printer() -> Callable[[str, bool], None]:
    paint = coloured()

    def show(text: str, drafted: bool) -> None:
        print(f"{GREEN}{text}{RESET}" if paint and drafted else text, end="", flush=True)

    return show


def questions(args: argparse.Namespace) -> Iterator[str]:
    """The one question, or one a line until an empty line or the end."""
    if args.question is not None:
        yield whole(args.question)
        return
    if sys.stdin is None or not sys.stdin.isatty():
        lines = [line.strip() for line in sys.stdin or []]
        yield from lines[: lines.index("")] if "" in lines else lines or [DEFAULT_QUESTION]
        return
    print("Ask about the picture; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("You: ").strip()
        except EOFError:
            print()
            return
        if not line:
            return
        yield line


def figures(stats) -> str:
    """One line for people."""
    drafts = "no drafts"
    if stats.drafted:
        hits = "/".join(f"{100 * rate:.0f}" for rate in stats.hit_rates)
        drafts = f"drafts {stats.accepted}/{stats.drafted} accepted, {stats.tokens_per_step:.1f} tokens a step, right by depth {hits} %"
    return (
        f"[{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, first token after {stats.prefill_seconds:.2f} s, "
        f"{drafts}, visual tokens kept {stats.visual_kept} of {stats.visual_tokens}]"
    )


class Interrupt:
    """A stopping criterion that Ctrl-C meets: the answer ends after the token in work. A second Ctrl-C ends it at once."""

    def __init__(self):
        self.came = False

    def __enter__(self) -> Interrupt:
        self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_fault) -> None:
        signal.signal(signal.SIGINT, self.before)

    def __call__(self, _ids, _scores) -> bool:
        return self.came

    def _note(self, _number, _frame) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True


def answer(vlm, image, question: str, history: list, options: dict, args: argparse.Namespace) -> str:
    """Ask one question, print the answer and its figures; the answer's text."""
    from ..decoding import DraftStreamer
    from ..prompt.template import decode

    streamer = DraftStreamer(vlm.tokenizer, printer()) if args.stream and not args.json else None
    with Interrupt() as interrupt:
        out = vlm.generate(
            **vlm.prepare(image, question, history), streamer=streamer, stopping_criteria=interrupt, **options
        )
    text = decode(vlm.tokenizer, out.tokens[0]).strip()
    if args.show_kept:
        from ..pruning.picture import save_kept

        save_kept(image, out.kept[0] if out.kept else None, vlm.config.V, Path(args.show_kept), vlm.pads)
    if args.json:
        facts = {"question": question, "text": text, "model": vlm.base_name, **asdict(vlm.config), **asdict(out.stats)}
        kept = {"kept": out.kept[0].tolist() if out.kept else None, "steps": [asdict(s) for s in out.steps[0]]}
        print(json.dumps(facts | kept, ensure_ascii=False), flush=True)
        return text
    print("" if args.stream else text)
    if interrupt.came:
        print("[stopped by Ctrl-C; the next question follows on what is written above]", file=sys.stderr, flush=True)
    print(figures(out.stats), flush=True)
    return text


def run(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    import twigvlm

    from .. import flags
    from ..foresight import Wish, check
    from ..prompt.images import open_image
    from ..pruning.picture import check_target

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.show_kept:
        check_target(Path(args.show_kept))
    if args.question is not None and not args.question.strip():
        raise twigvlm.InputError("--question is empty; ask something")
    wish = Wish(**vars(flags.model_settings(args)))
    options = flags.generation(args, wish.has_twig)
    check(wish, options)
    image = open_image(args.image_file)
    if args.base_model is None and args.twig_block is None:
        print(USE_LLAVA, file=sys.stderr if args.json else sys.stdout, flush=True)
    vlm = twigvlm.load(**vars(flags.model_settings(args)))
    if vlm.twig is None:
        print("No twig given (--twig-block): plain decoding, nothing pruned.", file=sys.stderr)
    converse(vlm, image, options, args)


def converse(vlm, image, options: dict, args: argparse.Namespace) -> None:
    """All questions in turn. Ctrl-C ends an answer with what is written; where somebody types, they go on asking."""
    history: list[tuple[str, str]] = []
    typed = args.question is None and sys.stdin is not None and sys.stdin.isatty()
    for question in questions(args):
        try:
            history.append((question, answer(vlm, image, question, history, options, args)))
        except KeyboardInterrupt:  # before the first word, or a second one
            if not typed:
                raise
            print("\n[stopped; this question is forgotten]", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
