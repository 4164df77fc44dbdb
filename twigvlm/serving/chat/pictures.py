"""A picture that a request names: a data URL, or, where it is allowed, an address on the public internet."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote_to_bytes

from PIL import Image

from ...errors import InputError
from ...prompt.images import open_image
from ...prompt.web import download, is_url
from ..faults import Fault, refused
from .messages import Picture

LONGEST_HEAD = 1000  # letters of a data URL before its content
SHOWN = 60  # letters of an address in a message
REMEDY = "send the picture itself: data:image/png;base64,…"


def is_remote(picture: Picture) -> bool:
    """Whether somebody else has to be asked for it."""
    return is_url(picture.url.strip())


def open_picture(picture: Picture, data: bytes | None = None) -> Image.Image:
    """The picture, upright RGB; `data` is what was fetched of a remote one. Raises Fault for what is none."""
    with _told(picture):
        return open_image(_inline(picture) if data is None else data)


def fetch(picture: Picture, remote: bool) -> bytes:
    """What stands at a remote picture's address. Raises Fault where it cannot be had, or nothing `remote` may be fetched."""
    url = picture.url.strip()
    if not remote:
        said = "this server fetches no pictures (it would with --allow-remote-images)"
        raise refused(picture.param, f"{picture.param} is {_short(url)}, but {said}; {REMEDY}", "remote_image_off")
    with _told(picture):
        return download(url, public=True)


@contextmanager
def _told(picture: Picture) -> Iterator[None]:
    """What is wrong with a picture, by the name that the request has for it."""
    url = picture.url.strip()
    try:
        yield
    except InputError as fault:
        said = str(fault).replace(url, _short(url))
        raise refused(picture.param, f"{picture.param}: {said}", "invalid_image") from fault


def _inline(picture: Picture) -> bytes:
    """The bytes of a data URL."""
    url = picture.url.strip()
    scheme, colon, rest = url.partition(":")
    head, comma, content = rest.partition(",")
    if not colon or scheme.lower() != "data" or not comma or len(head) > LONGEST_HEAD:
        known = "its head ends with a comma" if scheme.lower() == "data" else "a data URL is needed"
        raise _fault(picture, f"is {_short(url) or 'empty'}; {known}, {REMEDY}")
    kind, *words = [word.strip().lower() for word in head.split(";")]
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise _fault(picture, f"is of type {kind[:SHOWN]}; an image is needed, {REMEDY}")
    if "base64" not in words:
        return unquote_to_bytes(content)
    letters = "".join(content.split())
    letters = unquote_to_bytes(letters).decode("latin-1") if "%" in letters else letters
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError) as fault:
        raise _fault(
            picture, f"is no base64 ({fault}); encode the whole file, without line numbers or quotes"
        ) from None


def _fault(picture: Picture, said: str) -> Fault:
    return refused(picture.param, f"{picture.param} {said}", "invalid_image")


def _short(url: str) -> str:
    return url if len(url) <= SHOWN else f"{url[:SHOWN]}…"
