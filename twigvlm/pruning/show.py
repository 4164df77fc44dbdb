"""Which patches stay, side by side for all methods: `python -m twigvlm.pruning.show --image FILE --question TEXT -R 64`.

One PNG: the picture as the unpruned base sees it, then one tile a method, what was dropped dimmed (of
several cuts in the decoder the first one is shown; a merged token stands where it takes its place), with the number
of patches kept, the measured R and the answer. A folder gives one row a picture. The embedded model
unless another is named. A method that cannot be asked so has a tile with the reason.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .. import flags
from ..errors import InputError
from ..files import check_folder
from ..program import called, run_program
from ..prompt.images import open_image
from .catalogue import methods_of
from .methods import METHODS
from .picture import Tile, check_target, sheet, write_png
from .spec import find_method, needs_of

if TYPE_CHECKING:
    from ..vlm import TwigVLM

MODULE = "twigvlm.pruning.show"
USUAL = Path("runs/kept.png")
QUESTION = "Describe the image in detail."
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
MOST, ALONE, TOKENS = 200, 6, 24  # pictures of a folder; tiles in a line where there is one picture; of an answer


def parse(argv: Sequence[str] | None) -> Namespace:
    writing = flags.writing(leave=("pruning",), max_new_tokens=TOKENS, seed=0)
    parser = flags.parser(called(MODULE), __doc__, flags.model(), writing)
    parser.add_argument(
        "--image", required=True, metavar="FILE", help="a picture, its http(s) address, or a folder of pictures"
    )
    parser.add_argument("--question", default=QUESTION, metavar="TEXT", help="default: %(default)s")
    parser.add_argument(
        "--methods", type=_methods, default=list(METHODS), metavar="M,M,…",
        help="with settings, as --pruning takes them elsewhere (default: all; python -m twigvlm.pruning.catalogue lists them)",
    )  # fmt: skip
    parser.add_argument(
        "--out", "--output", dest="output", type=Path, default=USUAL, metavar="FILE.png", help="default: %(default)s"
    )
    parser.add_argument(
        "--columns", type=int, metavar="N", help=f"tiles in a line (default: {ALONE}; of a folder all of a picture)"
    )
    return flags.parse(parser, argv)


def _methods(text: str) -> list[str]:
    try:
        return methods_of(text)
    except InputError as fault:
        raise argparse.ArgumentTypeError(str(fault)) from None


def pictures_of(place: str) -> list[str]:
    """The picture, or those of a folder by name. Raises InputError for one that cannot be read, before a model is opened."""
    folder = Path(place)
    if not folder.is_dir():
        found = [place]
    else:
        found = sorted(str(f) for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file())
        if not found:
            raise InputError(
                f"--image {place}: no picture in this folder ({', '.join(sorted(SUFFIXES))}); name another"
            )
        if len(found) > MOST:
            raise InputError(
                f"--image {place}: {len(found)} pictures, and {MOST} fit into one file; name a smaller folder"
            )
    for name in found:
        open_image(name)
    return found


def tile_of(vlm: TwigVLM, image: Image.Image, args: Namespace, spec: str | None) -> Tile:
    """One method (None: nothing pruned) on one picture."""
    options = flags.generation(Namespace(**vars(args) | {"pruning": spec or "twig", "no_pruning": spec is None}))
    name = spec or "unpruned"
    try:
        out = vlm.generate(**vlm.prepare(image, args.question), **options)
    except InputError as fault:
        if spec is None:
            raise
        return Tile(name, [f"not at R = {args.retained_tokens:g}: {fault}"])
    from ..prompt.template import decode

    kept = out.kept[0] if out.kept else None
    count = out.stats.visual_kept if kept is not None else out.stats.visual_tokens
    answer = " ".join(decode(vlm.tokenizer, out.tokens[0]).split())
    lines = [f"kept {count} of {out.stats.visual_tokens}, R {out.stats.visual_measured:.1f}", answer]
    return Tile(name, lines, image, kept, vlm.config.V, vlm.pads)


def impossible(args: Namespace, shape: Any, has_twig: bool) -> dict[str, str]:
    """Method → why it cannot be asked, as far as the description of the model tells."""
    reasons = {}
    for spec in args.methods:
        method = find_method(spec, args.query)
        try:
            method.plan(args.retained_tokens, shape)
            if "twig" in needs_of(method) and not has_twig:
                raise InputError("it needs a twig, and none is given (--twig-block)")
        except InputError as fault:
            reasons[spec] = str(fault)
    return reasons


def run(args: Namespace) -> None:
    from .. import load
    from ..foresight import Wish, check
    from .plan import Shape

    if args.output == USUAL:  # whose folder is made
        check_folder(USUAL.parent, "--out")
    else:
        check_target(args.output)
    if args.columns is not None and args.columns < 1:
        raise InputError(f"--columns is {args.columns}; 1 or more is needed")
    if not args.question.strip():
        raise InputError("--question is empty; ask something")
    settings = flags.model_settings(args)
    wish = Wish(**vars(settings))
    V, letters = wish.letters()
    reasons = impossible(args, Shape(letters.L, V, letters.K, letters.F, wish.name), wish.has_twig)
    if len(reasons) == len(args.methods):
        raise InputError(f"no method can be shown at R = {args.retained_tokens:g}: {next(iter(reasons.values()))}")
    check(wish, flags.generation(Namespace(**vars(args) | {"pruning": "twig", "no_pruning": True})))
    names = pictures_of(args.image)
    vlm = load(**vars(settings))
    rows = []
    for name in names:
        image = open_image(name)
        print(name, flush=True)
        row = [tile_of(vlm, image, args, None)]
        for spec in args.methods:
            told = f"not at R = {args.retained_tokens:g}: {reasons.get(spec)}"
            row.append(Tile(spec, [told]) if spec in reasons else tile_of(vlm, image, args, spec))
        for tile in row:
            print(f"  {tile.name}: {': '.join(tile.lines)}", flush=True)
        rows.append([tile.small() for tile in row])
    folder = Path(args.image).is_dir()
    columns = args.columns or (len(rows[0]) if folder else min(ALONE, len(rows[0])))
    write_png(sheet(rows, columns, [Path(n).name for n in names] if folder else [""]), args.output)
    print(f"picture: {args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
