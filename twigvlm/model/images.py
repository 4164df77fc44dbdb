"""Pictures of any kind to LLaVA's pixels: opened safely, upright, RGB, square."""

from __future__ import annotations

import http.client
import io
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from ..errors import InputError

MAX_PIXELS = 100_000_000  # decoded; more is a bomb or a mistake
MAX_BYTES = 32 * 2**20  # of a download
TIMEOUT = 15.0  # seconds without an answer
CHUNK = 1 << 16


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """A path, an http(s) URL or a PIL image → upright RGB picture.

    Raises InputError for what is no picture, is cut short or beyond MAX_PIXELS, and for a URL that
    does not answer within TIMEOUT seconds or sends more than MAX_BYTES.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source, "image")
    name = str(source)
    if name.startswith(("http://", "https://")):
        return _decode(io.BytesIO(_download(name)), name)
    path = Path(source)
    if not _exists(path):
        raise InputError(f"{name}: no such file; give a path or an http(s) URL of a picture")
    if path.is_dir():
        raise InputError(f"{name}: is a folder; give a picture file")
    try:
        with open(path, "rb") as file:
            return _decode(file, name)
    except PermissionError as fault:
        raise InputError(f"{name}: may not be read ({fault.strerror}); check its permissions") from fault


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have: too long, say
        return False


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Turn by EXIF orientation and convert any mode to RGB (transparency on white)."""
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are accepted, make it smaller"
        )
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16 and 32 bit greys: scale to what is there
            low, high = image.getextrema()
            spread = (high - low) or 1
            image = image.convert("F").point(lambda v: (v - low) * (255 / spread)).convert("L")
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as fault:
        raise InputError(f"{name}: cannot be decoded ({fault}); save it again as PNG or JPEG") from fault


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre the picture on a square of its longer side, as LLaVA does."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _decode(file, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are accepted, make it smaller"
                )
            image.load()
    except Image.UnidentifiedImageError as fault:
        raise InputError(f"{name}: not a picture that can be read; give PNG, JPEG, WebP, GIF, BMP or TIFF") from fault
    except Image.DecompressionBombError as fault:
        raise InputError(f"{name}: too many pixels ({fault}); at most {MAX_PIXELS} are accepted") from fault
    except (OSError, SyntaxError, ValueError, EOFError) as fault:
        if isinstance(fault, InputError):
            raise
        raise InputError(f"{name}: damaged picture ({fault}); fetch or save it again") from fault
    return to_rgb(image, name)


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "twigvlm"})
    try:
        end = time.monotonic() + TIMEOUT
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            data = bytearray()
            while chunk := answer.read1(CHUNK):
                data += chunk
                if len(data) > MAX_BYTES:
                    raise InputError(f"{url}: more than {MAX_BYTES} bytes; fetch it yourself and give the file")
                if time.monotonic() > end:
                    raise InputError(f"{url}: not complete after {TIMEOUT:g} s; fetch it yourself and give the file")
    except InputError:
        raise
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as fault:
        reason = getattr(fault, "reason", fault)
        raise InputError(f"{url}: cannot be fetched ({reason}); check the address or give a file") from fault
    return bytes(data)
