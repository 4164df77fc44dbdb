"""What a picture file carries beside its pixels: which way is up, and how to do without the rest."""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections.abc import Iterator

from PIL import Image

ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
APP0, APP1, APP14, APP15, COMMENT, SCAN = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE, 0xDA  # JPEG's markers
ADOBE_BYTES = 12  # of the note that says how the colours of a JPEG are to be read
TIFF = {b"II*\0": "<", b"MM\0*": ">"}  # how one begins → the order of its bytes
# TIFF's tags that say where pixels stand and what they mean; by Pillow's numbers, which are the standard's.
PIXELS = {*range(254, 260), 262, *range(263, 267), 273, 277, 278, 279, 284, 292, 293, 317, *range(320, 326),
          330, 332, 338, 339, 340, 341, 347, *range(512, 522), *range(529, 533)}  # fmt: skip


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How to turn a picture upright, by its EXIF or XMP; None for one that is, or whose metadata cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # Pillow's readers raise whatever broken metadata make them
        return None


def bare(data: bytes) -> Iterator[bytes]:
    """A PNG, JPEG or TIFF file again: without all metadata but EXIF and transparency, then without these; nothing for
    other files.
    """
    strip = _bare_png if data.startswith(PNG) else _bare_jpeg if data.startswith(JPEG) else None
    strip = _bare_tiff if data[:4] in TIFF else strip
    for some in (True, False) if strip else ():
        with contextlib.suppress(struct.error, IndexError):  # cut short
            yield strip(data, some)


def _bare_png(data: bytes, some: bool) -> bytes:
    """Its critical chunks (a capital first letter), and `some` of the others."""
    kept, at = [PNG], len(PNG)
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind[:1].isupper() or (some and kind in (b"tRNS", b"eXIf")):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _bare_tiff(data: bytes, some: bool) -> bytes:
    """With a new directory of its first picture behind all that was there, so that everything else stays in its place."""
    order = TIFF[data[:4]]
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, at)
    entries = [data[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
    wanted = PIXELS | ({ORIENTATION} if some else set())
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in wanted]
    directory = b"".join([struct.pack(f"{order}H", len(kept)), *kept, bytes(4)])
    return data[:4] + struct.pack(f"{order}I", len(data)) + data[8:] + directory


def _bare_jpeg(data: bytes, some: bool) -> bytes:
    """Without what applications and people noted in front of the picture, but for `some` of it."""
    kept, at = [JPEG], len(JPEG)
    while data[at] == 0xFF and data[at + 1] != SCAN:
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        said = data[at + 4 : end]
        colours = marker == APP14 and said.startswith(b"Adobe") and len(said) >= ADOBE_BYTES
        turned = some and marker == APP1 and said.startswith(b"Exif\0")
        if colours or turned or not (APP0 <= marker <= APP15 or marker == COMMENT):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])
