"""Which patches stayed, as a picture."""

from __future__ import annotations

import os
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import InputError, RunError
from ..files import replacing
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
    try:
        with replacing(path) as part:
            kept_picture(image, kept, visual, padded).save(part, format="PNG")
    except OSError as fault:
        raise RunError(
            f"{path}: cannot be written ({fault.strerror or fault}); free some space or choose another place"
        ) from fault
