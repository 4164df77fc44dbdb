"""Scenes to pixels, and the label of every patch. Pillow and numpy only."""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scenes import COLOURS, GRID, SHAPES, SIZES, WORDS, Scene, SceneObject

IMAGE_SIZE = 336
PATCH = 14
CELL = IMAGE_SIZE // GRID
DIAMETER = {"small": (56, 62), "large": (88, 100)}  # pixels; 4 to 7 patches
SUPERSAMPLE = 3
FONT_SIZE = 30

RGB = {
    "red": (220, 30, 35), "orange": (250, 135, 10), "yellow": (250, 225, 30), "green": (25, 150, 55),
    "blue": (30, 75, 215), "purple": (135, 45, 170), "black": (20, 20, 22), "white": (252, 252, 252),
}  # fmt: skip


def _polygon(points: list[tuple[float, float]]):
    def draw(canvas: ImageDraw.ImageDraw, side: int, fill) -> None:
        canvas.polygon([(x * side, y * side) for x, y in points], fill=fill)

    return draw


def _star_points(tips: int = 5, inner: float = 0.42) -> list[tuple[float, float]]:
    turns = [math.pi * (i / tips - 0.5) for i in range(2 * tips)]
    radii = [0.5 if i % 2 == 0 else 0.5 * inner for i in range(2 * tips)]
    return [(0.5 + r * math.cos(a), 0.5 + r * math.sin(a)) for r, a in zip(radii, turns, strict=True)]


def _heart_points(n: int = 60) -> list[tuple[float, float]]:
    ts = [2 * math.pi * i / n for i in range(n)]
    xs = [16 * math.sin(t) ** 3 for t in ts]
    ys = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in ts]
    return [(0.5 + x / 34, 0.46 - y / 34) for x, y in zip(xs, ys, strict=True)]


def _ring(canvas: ImageDraw.ImageDraw, side: int, fill) -> None:
    canvas.ellipse((0, 0, side - 1, side - 1), outline=fill, width=int(side * 0.24))


_DRAW = {
    "circle": lambda canvas, side, fill: canvas.ellipse((0, 0, side - 1, side - 1), fill=fill),
    "square": _polygon([(0.07, 0.07), (0.93, 0.07), (0.93, 0.93), (0.07, 0.93)]),
    "triangle": _polygon([(0.5, 0.02), (1, 0.92), (0, 0.92)]),
    "diamond": _polygon([(0.5, 0), (0.86, 0.5), (0.5, 1), (0.14, 0.5)]),
    "star": _polygon(_star_points()),
    "cross": _polygon([(a / 3, b / 3) for a, b in
                       [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]]),
    "heart": _polygon(_heart_points()),
    "ring": _ring,
}  # fmt: skip


@cache
def _stencil(shape: str, diameter: int) -> Image.Image:
    side = diameter * SUPERSAMPLE
    mask = Image.new("L", (side, side), 0)
    _DRAW[shape](ImageDraw.Draw(mask), side, 255)
    return mask.resize((diameter, diameter), Image.Resampling.BOX)


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=FONT_SIZE)


def _box(obj: SceneObject) -> tuple[int, int, int]:
    """(left, top, diameter) of an object in pixels; it never leaves its cell."""
    low, high = DIAMETER[obj.size]
    diameter = round(low + (high - low) * (0.5 + 0.5 * math.sin(7 * obj.dx + 3 * obj.dy)))
    room = (CELL - diameter) / 2 - 2
    left = round(obj.column * CELL + (CELL - diameter) / 2 + obj.dx * room)
    top = round(obj.row * CELL + (CELL - diameter) / 2 + obj.dy * room)
    return left, top, diameter


def _word_box(scene: Scene) -> tuple[int, int, int, int]:
    left, top, right, bottom = _font().getbbox(scene.word)
    row, column = divmod(scene.word_place, GRID)
    x = column * CELL + (CELL - (right - left)) // 2
    y = row * CELL + (CELL - (bottom - top)) // 2
    return x, y, x + right - left, y + bottom - top


def _background(seed: int) -> Image.Image:
    """A pastel tint with a gentle gradient and blotches."""
    rng = np.random.default_rng(seed)
    tint = rng.uniform(150, 215) + rng.uniform(-22, 22, 3)
    slope = rng.uniform(-14, 14, 2)
    axis = np.linspace(-1, 1, 48)
    field = tint + (slope[0] * axis[:, None] + slope[1] * axis[None, :])[..., None]
    field = field + rng.normal(0, rng.uniform(2, 9), (48, 48, 1))
    return Image.fromarray(field.clip(0, 255).astype(np.uint8)).resize((IMAGE_SIZE,) * 2, Image.Resampling.BILINEAR)


def draw(scene: Scene) -> Image.Image:
    """RGB picture of 336 x 336 pixels, the same for the same scene everywhere."""
    image = _background(scene.background)
    rng = random.Random(scene.background)
    for obj in scene.objects:
        left, top, diameter = _box(obj)
        fill = tuple(max(0, min(255, v + rng.randint(-10, 10))) for v in RGB[obj.colour])
        image.paste(fill, (left, top), _stencil(obj.shape, diameter))
    if scene.word:
        font_left, font_top, *_ = _font().getbbox(scene.word)
        x, y, *_ = _word_box(scene)
        ImageDraw.Draw(image).text((x - font_left, y - font_top), scene.word, font=_font(), fill=(15, 15, 60))
    return image


def patch_labels(scene: Scene) -> np.ndarray:
    """What each patch shows: int64 [24, 24, 5] = shape, colour, size, word (0 = none), centre (0 or 1).

    A patch belongs to an object when its centre lies in the object's bounding box, so that a label
    asks for the object and not for the one edge that crosses the patch.
    """
    side = IMAGE_SIZE // PATCH
    labels = np.zeros((side, side, 5), np.int64)

    def rows(start: float, end: float) -> slice:
        return slice(math.ceil(start / PATCH - 0.5), math.floor(end / PATCH - 0.5) + 1)

    for obj in scene.objects:
        left, top, diameter = _box(obj)
        what = (1 + SHAPES.index(obj.shape), 1 + COLOURS.index(obj.colour), 1 + SIZES.index(obj.size), 0, 0)
        labels[rows(top, top + diameter), rows(left, left + diameter)] = what
        labels[(top + diameter // 2) // PATCH, (left + diameter // 2) // PATCH, 4] = 1
    if scene.word:
        x0, y0, x1, y1 = _word_box(scene)
        labels[rows(y0, y1), rows(x0, x1)] = (0, 0, 0, 1 + WORDS.index(scene.word), 0)
    return labels
