"""The page's sample pictures, drawn anew: `python -m twigvlm.web.samples` writes them into the package.

The first is assets/image.png as it is; the others are scenes of the test split.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .. import flags
from ..files import BROUGHT, replacing, write_bytes
from ..program import called, run_program
from ..world.draw import draw
from ..world.scenes import sample_scene
from .pictures import SAMPLES

SEEDS = (12, 29, 38, 26, 33)  # of the test split
QUALITY = 92  # of JPEG


def write(folder: Path) -> None:
    write_bytes((BROUGHT / "assets" / "image.png").read_bytes(), folder / "scene-1.png")
    for nth, seed in enumerate(SEEDS, 2):
        with replacing(folder / f"scene-{nth}.jpg") as part:
            draw(sample_scene("test", seed)).save(part, format="JPEG", quality=QUALITY)


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(called("twigvlm.web.samples"), __doc__)
    parser.add_argument("--out", type=Path, default=SAMPLES, metavar="DIR", help="where to (default: the package)")
    args = flags.parse(parser, argv)
    return run_program(lambda: write(args.out))


if __name__ == "__main__":
    sys.exit(main())
