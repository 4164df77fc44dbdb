"""Which patches stayed, as a picture; of many methods side by side."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..errors import InputError, RunError
from ..files import replacing, whole
from ..prompt.images import open_image

DIM = 0.25  # brightness of a dropped patch


def kept_picture(image: Image.Image, kept: torch.Tensor | None, visual: int, padded: bool = True) -> Image.Image:
    """The picture with the dropped ones of its `visual` patches dimmed.

    `kept` are indices in raster order over the square that the model saw, behind the tower's class
    token where that counts among the `visual`; None keeps all. The square holds the whole picture
    (`padded`), or its middle: what was cut off is dimmed.
    """
    image = open_image(image)
    side = isqrt(visual)
    class_token = visual - side**2  # 0 or 1
    light = np.full(visual, DIM if kept is not None else 1.0, np.float32)
    if kept is not None:
        light[kept.cpu().numpy()] = 1.0
    seen = max(image.size) if padded else min(image.size)
    patches = Image.fromarray((light[class_token:] * 255).astype(np.uint8).reshape(side, side))
    mask = Image.new("L", image.size, round(DIM * 255))
    place = ((image.width - seen) // 2, (image.height - seen) // 2)
    mask.paste(patches.resize((seen, seen), Image.Resampling.NEAREST), place)
    return Image.composite(image, Image.new("RGB", image.size), mask)


def check_target(path: Path) -> None:
    """Raises InputError when a PNG cannot be written there, before any work is done."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: the picture of kept patches is a PNG; give a name that ends in .png")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(
            f"{path}: {'is a folder' if path.is_dir() else f'no folder {path.parent}'}; give a file in an existing folder"
        )
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: folder {path.parent} may not be written; choose another")


def save_kept(image: Image.Image, kept: torch.Tensor | None, visual: int, path: Path, padded: bool = True) -> None:
    """Write `kept_picture` as PNG, whole or not at all."""
    write_png(kept_picture(image, kept, visual, padded), path)


def write_png(image: Image.Image, path: Path) -> None:
    """Whole or not at all; raises RunError where it cannot be."""
    try:
        with replacing(path) as part:
            image.save(part, format="PNG")
    except OSError as fault:
        raise RunError(
            f"{path}: cannot be written ({fault.strerror or fault}); free some space or choose another place"
        ) from fault


# ---------------------------------------------------------------------- many side by side

SIDE, GAP, LETTERS, LINES = 224, 8, 12, 5  # pixels of a picture and between two; size of letters; lines of a caption


@dataclass(frozen=True)
class Tile:
    """What a method kept of a picture, and its caption: its name and `lines`. Without a picture there is none to show."""

    name: str
    lines: list[str]
    image: Image.Image | None = None
    kept: torch.Tensor | None = None
    visual: int = 1
    padded: bool = True

    def small(self) -> tuple[Image.Image, list[str]]:
        """The picture at the size of a sheet, and its caption."""
        square = Image.new("RGB", (SIDE, SIDE), "white")
        if self.image is not None:
            share = SIDE / max(self.image.size)
            part = self.image.resize(tuple(max(1, round(share * n)) for n in self.image.size))
            shown = kept_picture(part, self.kept, self.visual, self.padded)
            square.paste(shown, ((SIDE - part.width) // 2, (SIDE - part.height) // 2))
        return square, [self.name, *self.lines]


def sheet(rows: Sequence[Sequence[tuple[Image.Image, list[str]]]], columns: int, titles: Sequence[str]) -> Image.Image:
    """All tiles on one picture, `columns` in a line; each row begins a new line, under its title."""
    font = ImageFont.load_default(LETTERS)
    high, step = LETTERS + 3, SIDE + GAP
    tile = SIDE + high * LINES + GAP
    lines = [-(-len(row) // columns) for row in rows]
    head = high if any(titles) else 0
    size = (GAP + columns * step, GAP + sum(head + n * tile for n in lines))
    page = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(page), GAP
    for row, title, count in zip(rows, titles, lines, strict=True):
        draw.text((GAP, top), title, "black", font)
        for i, (picture, caption) in enumerate(row):
            left, upper = GAP + i % columns * step, top + head + i // columns * tile
            page.paste(picture, (left, upper))
            for n, line in enumerate(_fitting(draw, caption, font)):
                draw.text((left, upper + SIDE + n * high), line, "black" if n else "darkblue", font)
        top += head + count * tile
    return page


def _letters(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont) -> int:
    """How many of its letters are no wider than a picture, one at least."""
    return max(1, bisect_right(range(len(text) + 1), SIDE, key=lambda n: draw.textlength(text[:n], font)) - 1)


def _fitting(draw: ImageDraw.ImageDraw, caption: Sequence[str], font: ImageFont.ImageFont) -> list[str]:
    """The caption in lines as wide as a picture; what does not fit ends in an ellipsis."""
    out: list[str] = []
    for text in caption:
        rest = whole(text)
        while rest or not out:
            fit = _letters(draw, rest, font)
            space = rest.rfind(" ", 0, fit + 1)
            fit = space if fit < len(rest) and space > 0 else fit
            out.append(rest[:fit].strip())
            rest = rest[fit:].strip()
            if len(out) == LINES:
                return [*out[:-1], f"{out[-1][:-1]}…"] if rest else out
    return out
