"""Pictures of any kind to LLaVA's pixels: opened safely, upright, RGB, square."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..errors import InputError
from .metadata import bare, turn_of
from .web import download, is_url

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow knows more, some of which start other programs
MAX_PIXELS = 100_000_000  # of the padded square; more is a bomb or a mistake
MAX_STRIPPED = 1 << 28  # bytes of a file that is tried again without its metadata
MEMORY = (MemoryError, Image.DecompressionBombError)  # what no other reading of the file changes


def open_image(source: str | os.PathLike | bytes | Image.Image) -> Image.Image:
    """A path, an http(s) URL, a file's bytes or a PIL image → upright RGB picture, without metadata.

    Raises InputError for whatever cannot be used: no picture of FORMATS, cut short, damaged, more
    than MAX_PIXELS once it is padded to a square, a URL that does not give one in time.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source, "image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), f"a picture of {len(source)} bytes")
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"a picture is a {type(source).__name__}; give a path, a URL, a file's bytes or a PIL image")
    name = str(source)
    if is_url(name):
        return _decode(io.BytesIO(download(name)), name)
    with _opened(Path(source)) as file:
        return _decode(file, name)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Turn by EXIF orientation and convert any mode to RGB (transparency on white)."""
    _check_size(image, name)
    try:
        turn = turn_of(image)
        image = image if turn is None else image.transpose(turn)
        if image.mode.startswith(("I", "F")):  # 16 and 32 bit greys of any order of bytes: scale to what is there
            image = image.convert("I") if image.mode.startswith("I;16") else image
            image = _finite(image, name) if image.mode == "F" else image
            low, high = image.getextrema()
            spread = (high - low) or 1
            image = image.convert("F").point(lambda v: (v - low) * (255 / spread)).convert("L")
        image = _opaque(image).convert("RGB")
    except InputError:
        raise
    except Exception as fault:  # of a lazy file, anything that its reader raises
        raise _fault(name, fault) from fault
    image.info = {}  # it is upright now, whatever the metadata say
    return image


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre the picture on a square of its longer side, as LLaVA does."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _finite(image: Image.Image, name: str) -> Image.Image:
    """A grey of floats with its lowest value where there is none: one NaN or infinity would else turn all of it black."""
    values = np.asarray(image)
    known = np.isfinite(values)
    if known.all():
        return image
    if not known.any():
        raise InputError(f"{name}: not one of its values is a finite number; save the picture again")
    return Image.fromarray(np.where(known, values, values[known].min()))


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode not in ("LA", "PA", "RGBA", "La", "RGBa") and "transparency" not in image.info:
        return image
    try:
        image = image.convert("LA") if image.mode == "La" else image  # Pillow knows no other way from it
        image = image.convert("RGBA")
    except Exception:
        if image.info.pop("transparency", None) is None:
            raise
        return image  # what should say which colour is transparent does not
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _check_size(image: Image.Image, name: str) -> None:
    side = max(image.size)
    if not min(image.size):
        raise InputError(f"{name}: {image.width} x {image.height} pixels; a picture needs one at least")
    if side * side > MAX_PIXELS:
        raise InputError(
            f"{name}: {image.width} x {image.height} pixels, {side * side} when padded to a square; at most "
            f"{MAX_PIXELS} are accepted, make it smaller"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file that is one. Raises InputError for all else."""
    try:
        if not path.is_file():
            raise InputError(
                f"{path}: is a folder or a device; give a picture file"
                if path.exists()
                else f"{path}: no such file; give a path or an http(s) URL of a picture"
            )
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except InputError:
        raise
    except PermissionError as fault:
        raise InputError(f"{path}: may not be read ({fault.strerror}); check its permissions") from fault
    except (OSError, ValueError) as fault:  # a name that no file can have: too long, say
        raise InputError(f"{path}: no such file; give a path or an http(s) URL of a picture") from fault
    with file:
        yield file


def _decode(file: BinaryIO, name: str) -> Image.Image:
    try:
        return to_rgb(_load(file, name), name)
    except InputError:
        raise
    except MEMORY as fault:
        raise _fault(name, fault) from fault
    except Exception as fault:
        for plain in bare(_start_of(file)):  # a picture is not lost for its broken metadata
            with contextlib.suppress(Exception):
                return to_rgb(_load(io.BytesIO(plain), name), name)
        raise _fault(name, fault) from fault


def _load(file: BinaryIO, name: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures and odd metadata: the limit here is our own
        image = Image.open(file, formats=FORMATS)
        _check_size(image, name)
        image.load()
    return image


def _start_of(file: BinaryIO) -> bytes:
    """The file again, or nothing where even that fails."""
    try:
        file.seek(0)
        return file.read(MAX_STRIPPED)
    except OSError:
        return b""


def _fault(name: str, fault: Exception) -> InputError:
    """What is wrong with a picture that made Pillow raise this."""
    if isinstance(fault, Image.UnidentifiedImageError):
        return InputError(f"{name}: not a picture that can be read; give PNG, JPEG, WebP, GIF, BMP or TIFF")
    if isinstance(fault, Image.DecompressionBombError):
        return InputError(f"{name}: too many pixels ({fault}); at most {MAX_PIXELS} are accepted")
    if isinstance(fault, MemoryError):
        return InputError(f"{name}: takes more memory to decode than there is; make it smaller")
    reason = str(fault) or type(fault).__name__
    return InputError(f"{name}: damaged picture ({reason}); fetch or save it again")
