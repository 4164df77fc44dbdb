"""Pictures that a page asks about: opened once, kept in memory while there is room, and shown as the model sees them."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from dataclasses import dataclass

from PIL import Image

from ..errors import InputError
from ..files import PACKAGE
from ..prompt.images import open_image, pad_to_square

SAMPLES = PACKAGE / "web" / "static" / "samples"
SHOWN = 672  # pixels of a picture on the page, at most
ROOM = 256 * 2**20  # bytes of pixels that are kept
NAME_LETTERS = 24  # of a digest


@dataclass(frozen=True)
class Picture:
    """`image` is upright RGB."""

    name: str
    image: Image.Image

    @property
    def bytes(self) -> int:
        return 3 * self.image.width * self.image.height


class Pictures:
    """The samples, and the last pictures that were sent. `cut` is how the model makes a square: padded, or its middle."""

    def __init__(self, padded: bool, colour: tuple[int, int, int]):
        self.padded, self.colour = padded, colour
        self._lock = threading.Lock()
        self._sent: OrderedDict[str, Picture] = OrderedDict()
        self.samples = {file.stem: file for file in sorted(SAMPLES.glob("*.*"))}

    def add(self, data: bytes) -> Picture:
        """A picture from a file's bytes; the same bytes are the same picture. Raises InputError for what is none."""
        if not data:
            raise InputError("the picture has 0 bytes; send the file's bytes as the body of the request")
        name = hashlib.sha256(data).hexdigest()[:NAME_LETTERS]
        picture = Picture(name, open_image(data))
        with self._lock:
            self._sent[name] = picture
            self._sent.move_to_end(name)
            while len(self._sent) > 1 and sum(p.bytes for p in self._sent.values()) > ROOM:
                self._sent.popitem(last=False)
        return picture

    def find(self, name: str) -> Picture | None:
        """By a sample's name or what `add` called it."""
        if name in self.samples:
            return Picture(name, open_image(self.samples[name]))
        with self._lock:
            if name in self._sent:
                self._sent.move_to_end(name)
            return self._sent.get(name)

    def seen(self, picture: Picture) -> bytes:
        """PNG of the square that the model sees, upright, `SHOWN` pixels at most."""
        image = picture.image
        if self.padded:
            image = image.copy()
            image.thumbnail((SHOWN, SHOWN))  # before it is padded: a long picture would need a huge square
            image = pad_to_square(image, self.colour)
        else:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            image.thumbnail((SHOWN, SHOWN))
        out = io.BytesIO()
        image.save(out, "PNG", compress_level=3)
        return out.getvalue()
