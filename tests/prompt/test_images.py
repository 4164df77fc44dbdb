"""Pictures of every kind become upright RGB squares, and what is no picture is refused by name."""

from __future__ import annotations

import io
import socket
import struct
import threading
import time
import urllib.parse
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one, tiny, tiny_model, write_base
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps, PngImagePlugin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import twigvlm
from twigvlm.errors import InputError
from twigvlm.prompt import images, web
from twigvlm.prompt.images import open_image, pad_to_square, to_rgb

RED, GREEN, WHITE = (255, 0, 0), (0, 128, 0), (255, 255, 255)
ORIENTATION = 0x0112  # the EXIF tag


def png(image: Image.Image, **settings) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **settings)
    return out.getvalue()


def halves(left=RED, right=GREEN, size=(40, 20)) -> Image.Image:
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def close(image: Image.Image, expected: Image.Image, tolerance: int = 2) -> None:
    assert image.mode == "RGB" and image.size == expected.size
    difference = np.abs(np.asarray(image, int) - np.asarray(expected.convert("RGB"), int))
    assert difference.max() <= tolerance


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A model with a tokenizer, so with a processor."""
    return twigvlm.load(write_base(tmp_path_factory.mktemp("model"), tiny_model(vocabulary=311)))


# ---------------------------------------------------------------------- modes


def _transparent_palette() -> Image.Image:
    image = Image.new("P", (40, 20), 0)
    image.putpalette([*RED, *GREEN])
    image.paste(1, (20, 0, 40, 20))
    return image


MODES = {
    "grey": (Image.new("L", (40, 20), 77), Image.new("RGB", (40, 20), (77,) * 3), {}),
    "LA": (Image.new("LA", (40, 20), (0, 0)), Image.new("RGB", (40, 20), WHITE), {}),
    "LA-opaque": (Image.new("LA", (40, 20), (9, 255)), Image.new("RGB", (40, 20), (9,) * 3), {}),
    "1-bit": (Image.new("1", (40, 20), 1), Image.new("RGB", (40, 20), WHITE), {}),
    "RGBA": (Image.new("RGBA", (40, 20), (*RED, 255)), Image.new("RGB", (40, 20), RED), {}),
    "RGBA-half": (Image.new("RGBA", (40, 20), (255, 0, 0, 128)), Image.new("RGB", (40, 20), (255, 127, 127)), {}),
    "P": (_transparent_palette(), halves(), {}),
    "P-transparent": (_transparent_palette(), halves(WHITE, GREEN), {"transparency": 0}),
    "P-table": (_transparent_palette(), halves(RED, WHITE), {"transparency": b"\xff\x00"}),
    "RGB-transparent": (halves(), halves(WHITE, GREEN), {"transparency": RED}),
    "L-transparent": (Image.new("L", (40, 20), 5), Image.new("RGB", (40, 20), WHITE), {"transparency": 5}),
}


@pytest.mark.parametrize("name", MODES)
def test_modes(name, tmp_path):
    image, expected, settings = MODES[name]
    (tmp_path / "picture.png").write_bytes(png(image, **settings))
    close(open_image(tmp_path / "picture.png"), expected)
    close(open_image(str(tmp_path / "picture.png")), expected)
    if not settings:
        close(open_image(image), expected)
        assert to_rgb(image, "picture") is not image


def test_cmyk(tmp_path):
    image = halves().convert("CMYK")
    image.save(tmp_path / "picture.jpg", quality=100)
    image.save(tmp_path / "picture.tif")
    close(open_image(tmp_path / "picture.tif"), halves(), 6)
    found = np.asarray(open_image(tmp_path / "picture.jpg"), int)
    assert (found[:, :15, 0] > 200).all() and (found[:, 25:, 1] > 90).all() and (found[:, 25:, 0] < 60).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize(("low", "high"), [(0, 65535), (1000, 5000), (0, 255)])
def test_sixteen_bits(low, high, mode, tmp_path):
    """Scaled to the values that are there, so that twelve-bit cameras do not come out black."""
    ramp = np.linspace(low, high, 40).round().astype(">u2" if mode.endswith("B") else "<u2")[None].repeat(20, 0)
    file = tmp_path / ("picture.tif" if mode.endswith("B") else "picture.png")
    Image.frombytes(mode, (40, 20), ramp.tobytes()).save(file)
    assert Image.open(file).mode.startswith("I")
    expected = Image.fromarray(np.linspace(0, 255, 40).round().astype(np.uint8)[None].repeat(20, 0))
    close(open_image(file), expected)


@pytest.mark.parametrize(
    "mode", ["I;16", "I;16B", "I;16L", "I;16N", "La", "RGBa", "LA", "PA", "F", "I", "1", "LAB", "HSV", "CMYK"]
)
def test_a_picture_in_memory_of_any_mode(mode):
    image = Image.new(mode, (40, 20))
    assert open_image(image).size == (40, 20) and image.mode == mode


@pytest.mark.parametrize(
    ("source", "words"),
    [(3, "is a int"), (io.BytesIO(b"x"), "is a BytesIO"), (None, "is a NoneType"), ([b"x"], "is a list"),
     (Image.new("RGB", (0, 0)), "0 x 0 pixels"), (Image.new("RGB", (3, 0)), "3 x 0 pixels"), (bytearray(b"x"), "1 bytes: not a picture")],
)  # fmt: skip
def test_what_is_no_picture_at_all(source, words):
    with pytest.raises(InputError, match=words):
        open_image(source)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite(odd, tmp_path):
    """One value that is no number is as dark as the darkest, and leaves the rest as it is."""
    ramp = np.linspace(-3, 7, 40, dtype=np.float32)[None].repeat(20, 0)
    whole, spoilt = Image.fromarray(ramp), ramp.copy()
    spoilt[0, -1] = odd
    Image.fromarray(spoilt).save(tmp_path / "picture.tif")
    expected = np.array(open_image(whole))
    expected[0, -1] = 0
    for source in (Image.fromarray(spoilt), tmp_path / "picture.tif"):
        assert np.array_equal(np.array(open_image(source)), expected) and expected.max() == 255
    spoilt[:] = odd
    Image.fromarray(spoilt).save(tmp_path / "picture.tif")
    with pytest.raises(InputError, match=r"picture\.tif: not one of its values is a finite number; save"):
        open_image(tmp_path / "picture.tif")


def test_sixteen_bits_with_transparency(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add(b"tRNS", (300).to_bytes(2, "big"))
    Image.fromarray(np.full((20, 40), 300, np.uint16)).save(tmp_path / "picture.png", pnginfo=info)
    assert open_image(tmp_path / "picture.png").mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_by_exif(orientation, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = tmp_path / "picture.png"
    halves().save(file, exif=exif)
    turned = open_image(file)
    with Image.open(file) as plain:
        close(turned, ImageOps.exif_transpose(plain))
    assert turned.size == ((40, 20) if orientation < 5 else (20, 40))
    corner = turned.getpixel((2, 2))
    assert corner == (RED if orientation in (1, 4, 5, 6) else GREEN)


def test_the_first_of_many_frames(tmp_path):
    frames = [Image.new("RGB", (40, 20), colour) for colour in (RED, GREEN)]
    frames[0].save(tmp_path / "picture.gif", save_all=True, append_images=frames[1:])
    close(open_image(tmp_path / "picture.gif"), frames[0])


# ---------------------------------------------------------------------- to pixels


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3000, 2), (40, 20), (21, 50)])
def test_extreme_shapes(vlm, size):
    pixels = vlm.pixels([Image.new("RGB", size, RED)])
    assert pixels.shape == (1, 3, 28, 28) and pixels.isfinite().all()


def test_padding_is_centred_and_of_the_mean_colour(vlm):
    square = pad_to_square(halves(size=(40, 20)), (1, 2, 3))
    assert square.size == (40, 40)
    assert [square.getpixel((5, y)) for y in (0, 9, 10, 29, 30, 39)] == [(1, 2, 3)] * 2 + [RED] * 2 + [(1, 2, 3)] * 2
    assert pad_to_square(square, (0, 0, 0)) is square
    pixels = vlm.pixels([Image.new("RGB", (400, 4), RED)])[0]
    assert pixels[:, :10].abs().max() < 0.02, "the mean colour becomes zero"


def test_several_pictures_and_a_question(vlm, tmp_path):
    halves().save(tmp_path / "picture.png")
    inputs = vlm.prepare([tmp_path / "picture.png", halves(GREEN, RED)], "What?")
    assert inputs["pixel_values"].shape == (2, 3, 28, 28)
    assert (inputs["input_ids"] == vlm.image_token_id).sum() == 2 * vlm.config.V
    marked = vlm.prepare([halves(), halves()], "<image> or <image>?")
    assert (marked["input_ids"] == vlm.image_token_id).sum() == 2 * vlm.config.V
    assert "pixel_values" not in vlm.prepare(None, "What?")
    assert isinstance(vlm.answer(tmp_path / "picture.png", "What?", max_new_tokens=3), str)
    with pytest.raises(InputError, match="1 <image> marks for 2 images"):
        vlm.prepare([halves(), halves()], "<image>?")
    for nothing in ("", "  \n"):
        with pytest.raises(InputError, match="question is empty"):
            vlm.prepare(None, nothing)


def test_the_processor_does_the_same(vlm):
    """Through the Hugging Face processor as a program of its own would call it."""
    image = halves()
    made = vlm.processor(images=[image], text="<image>\nWhat?", return_tensors="pt")
    assert torch.equal(made["pixel_values"], vlm.pixels([image]))
    assert (made["input_ids"] == vlm.image_token_id).sum() == vlm.config.V


def test_pixels_that_do_not_fit_the_prompt():
    model = tiny()
    arguments = one(model, 3, "image", 4)
    for pixels, part in [
        (None, "0 images"),
        (torch.zeros(2, 3, 28, 28), "2 images"),
        (torch.zeros(1, 3, 56, 56), "[images, 3, 28, 28]"),
    ]:
        with pytest.raises(InputError) as caught:
            model.generate(**{**arguments, "pixel_values": pixels})
        assert part in str(caught.value)
    image = model.image_token_id  # six and two image tokens are no two pictures of four
    ids = torch.tensor([[image] * 6 + [5, 5], [image] * 2 + [5] * 6])
    with pytest.raises(InputError, match="row 0 of input_ids holds 6 image tokens"):
        model.generate(ids, torch.zeros(2, 3, 28, 28))


# ---------------------------------------------------------------------- what is refused


def _write(content: bytes):
    return lambda file: file.write_bytes(content)


REFUSED = {
    "text": (_write(b"not a picture at all"), "not a picture"),
    "empty": (_write(b""), "not a picture"),
    "truncated-png": (_write(png(halves(size=(400, 400)))[:-300]), "damaged"),
    "truncated-jpeg": (
        lambda f: (Image.effect_noise((200, 200), 90).save(f, "JPEG"), f.write_bytes(f.read_bytes()[:2000])),
        "damaged",
    ),
    "header-only": (_write(png(halves())[:40]), "not a picture"),
    "missing": (lambda file: None, "no such file"),
    "folder": (lambda file: file.mkdir(), "is a folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    make, part = REFUSED[name]
    file = tmp_path / "picture.png"
    make(file)
    with pytest.raises(InputError) as caught:
        open_image(file)
    assert str(file) in str(caught.value) and part in str(caught.value)


def test_a_name_that_no_file_can_have():
    with pytest.raises(InputError, match="no such file"):
        open_image("x" * 5000)


def test_too_many_pixels(tmp_path, monkeypatch):
    halves().save(tmp_path / "picture.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 40 - 1)
    for source in (tmp_path / "picture.png", halves()):
        with pytest.raises(InputError, match="40 x 20 pixels, 1600 when padded to a square; at most 1599"):
            open_image(source)
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 40)
    assert open_image(tmp_path / "picture.png").size == (40, 20)


@pytest.mark.parametrize("size", [(60000, 3), (3, 20000)])
def test_a_thin_picture_counts_as_the_square_that_it_is_padded_to(size, tmp_path):
    """A file of a few hundred bytes, which would take seconds and gigabytes."""
    Image.new("1", size).save(tmp_path / "picture.png")
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]} pixels, {max(size) ** 2} when padded"):
        open_image(tmp_path / "picture.png")


def test_a_large_picture_has_the_pixels_of_the_stock_processor(vlm):
    stock = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    square = pad_to_square(Image.fromarray(noise), tuple(int(255 * m) for m in stock.image_mean))
    expected = stock([square], return_tensors="pt")["pixel_values"]
    assert torch.equal(vlm.pixels([Image.fromarray(noise)]), expected)


def test_a_decompression_bomb(tmp_path, monkeypatch):
    """Pillow's own limit, of which it warns at once and double of which it refuses."""
    halves().save(tmp_path / "picture.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert open_image(tmp_path / "picture.png").size == (40, 20)  # a warning only, and ours is the limit
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(InputError, match="too many pixels"):
        open_image(tmp_path / "picture.png")


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PPM", "ICO", "TGA", "SGI", "PCX", "DDS", "IM", "ICNS"])
def test_formats_that_nobody_means(kind, tmp_path):
    """Pillow would read most of these, some of them by another program."""
    file = tmp_path / "picture.png"
    halves(size=(32, 32)).save(file, kind)
    with pytest.raises(InputError, match="not a picture that can be read"):
        open_image(file)


def test_no_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("started Ghostscript"))
    halves().save(tmp_path / "picture.eps")
    with pytest.raises(InputError, match="not a picture that can be read"):
        open_image(tmp_path / "picture.eps")


@pytest.mark.parametrize("kind", images.FORMATS)
def test_formats_that_are_meant(kind, tmp_path):
    halves().save(tmp_path / "picture", kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert open_image(tmp_path / "picture").size == (40, 20)


# ---------------------------------------------------------------------- metadata


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _jpeg(*segments: bytes) -> bytes:
    out = io.BytesIO()
    halves().save(out, "JPEG", quality=100, subsampling=0)
    return out.getvalue()[:2] + b"".join(segments) + out.getvalue()[2:]


def _chunk(kind: bytes, content: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


def _png(*chunks: bytes) -> bytes:
    whole = png(halves())
    return whole[:33] + b"".join(chunks) + whole[33:]


def _exif(kind: int, count: int, value: bytes) -> bytes:
    """Orientation 6 and a tag 0x011a of any type, count and value."""
    entries = struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x011A, kind, count, value)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entries + bytes(4)


def _tiff(order: str, tag: int, kind: int, count: int, value: int, orientation: int = 1) -> bytes:
    """Pixels, an orientation, and one more tag of any type, count and value; tags in their order."""
    pixels, (width, height) = halves().tobytes(), halves().size
    bits = struct.pack(f"{order}3H", 8, 8, 8)
    behind = 8 + len(pixels)
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, behind), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8),
            (ORIENTATION, 3, 1, orientation), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(pixels)), (tag, kind, count, value)]  # fmt: skip
    directory = struct.pack(f"{order}H", len(tags))
    for number, what, many, said in sorted(tags):
        short = what == 3 and many == 1
        directory += struct.pack(
            f"{order}HHI{'HH' if short else 'I'}", number, what, many, *((said, 0) if short else (said,))
        )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", behind + len(bits))
    return head + pixels + bits + directory + bytes(4)


BROKEN_METADATA = {
    **{
        f"tiff-{name}-{order}": (_tiff(order, *tag, orientation=6), True)
        for order in "<>"
        for name, tag in {
            "text": (270, 2, 10**9, 10**9),
            "xmp": (700, 7, 2**31, 12),
            "colours": (34675, 7, 999, 2**31),
            "exif": (34665, 4, 1, 2**31),
            "resolution": (282, 5, 1, 2**31),
            "place": (34853, 4, 1, 3),
            "strange": (65000, 5, 2**30, 8),
        }.items()
    },
    "jpeg-rational-as-text": (_jpeg(_segment(0xE1, _exif(2, 4, b"abc\0"))), True),
    "jpeg-rational-as-bytes": (_jpeg(_segment(0xE1, _exif(7, 4, b"abc\0"))), True),
    "jpeg-rational-as-float": (_jpeg(_segment(0xE1, _exif(11, 1, struct.pack(">f", 1.5)))), True),
    "jpeg-rational-nowhere": (_jpeg(_segment(0xE1, _exif(5, 1, b"\x7f\xff\xff\xff"))), True),
    "jpeg-exif-is-none": (_jpeg(_segment(0xE1, b"Exif\0\0nonsense")), False),
    "jpeg-jfif": (_jpeg(_segment(0xE0, b"JFIF")), False),
    "jpeg-adobe": (_jpeg(_segment(0xEE, b"Adobe")), False),
    "jpeg-colours": (_jpeg(_segment(0xE2, b"ICC_PROFILE\0")), False),
    "jpeg-colours-and-exif": (
        _jpeg(_segment(0xE2, b"ICC_PROFILE\0"), _segment(0xE1, _exif(2, 4, b"abc\0"))),
        True,
    ),
    "png-colours": (_png(_chunk(b"iCCP", b"x")), False),
    "png-size": (_png(_chunk(b"pHYs", b"12")), False),
    "png-gamma": (_png(_chunk(b"gAMA", b"")), False),
    "png-frames": (_png(_chunk(b"fcTL", b"12")), False),
    "png-text": (_png(_chunk(b"tEXt", b"a\0b", wrong=1)), False),
    "png-bomb": (_png(_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))), False),
    "png-exif": (_png(_chunk(b"eXIf", b"nonsense")), False),
    "png-exif-and-size": (_png(_chunk(b"pHYs", b"12"), _chunk(b"eXIf", _exif(2, 4, b"abc\0")[6:])), True),
    "png-transparency": (_png(_chunk(b"tRNS", b"1")), False),
}


@pytest.mark.parametrize("name", BROKEN_METADATA)
def test_a_picture_is_used_without_its_broken_metadata(name, tmp_path):
    content, turned = BROKEN_METADATA[name]
    (tmp_path / "picture").write_bytes(content)
    for source in (tmp_path / "picture", content):
        expected = halves().transpose(Image.Transpose.ROTATE_270) if turned else halves()
        close(open_image(source), expected, 3)


def test_an_upright_picture_stays_upright():
    """What was opened is opened again by whoever gets it."""
    once = open_image(_jpeg(_segment(0xE1, _exif(3, 1, bytes(4)))))
    assert once.size == open_image(once).size == (20, 40)


class Strange(Exception):
    def __init__(self, one, two):
        super().__init__()


FAULTS = [struct.error("unpack"), KeyError("x"), MemoryError(), RecursionError("deep"), Strange(1, 2), RuntimeError()]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("where", ["open", "load", "getexif", "transpose", "convert"])
def test_whatever_pillow_raises_is_a_fault_of_the_picture(fault, where, tmp_path, monkeypatch):
    def fail(*_args, **_more):
        raise fault

    (tmp_path / "picture.png").write_bytes(_png(_chunk(b"eXIf", _exif(3, 1, bytes(4))[6:])))
    owner = Image if where == "open" else ImageFile.ImageFile if where == "load" else Image.Image
    monkeypatch.setattr(owner, where, fail)
    if where == "getexif":
        assert open_image(tmp_path / "picture.png").size == (40, 20)
        return
    with pytest.raises(InputError, match=r"picture\.png: (damaged picture|takes more memory)"):
        open_image(tmp_path / "picture.png")


def test_a_lazy_picture_of_somebody_elses(tmp_path):
    (tmp_path / "picture.png").write_bytes(png(halves(size=(400, 400)))[:-300])
    with pytest.raises(InputError, match="damaged"):
        open_image(Image.open(tmp_path / "picture.png"))


# ---------------------------------------------------------------------- from the web


class Handler(BaseHTTPRequestHandler):
    """Each path is one way for a server to behave."""

    released = threading.Event()
    ended = threading.Event()

    def do_GET(self):
        getattr(self, urllib.parse.unquote(self.path).strip("/").partition("?")[0])()

    def answer(self, body: bytes, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def good(self):
        self.answer(png(halves()))

    def missing(self):
        self.answer(b"no", status=404)

    def 日本(self):
        self.answer(self.path.encode(), status=404)

    def text(self):
        self.answer(b"<html>sorry</html>")

    def cut(self):
        self.answer(png(halves(size=(400, 400)))[:200], length=5000)

    def huge(self):
        self.answer(b"x" * 300_000)

    def hanging(self):
        self.released.wait(10)

    def dripping(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(100):  # five seconds, should nobody hang up
            if self.released.wait(0.05):
                break
            self.wfile.write(b"x")
            self.wfile.flush()

    def headers_that_drip(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        try:
            for _ in range(100):
                if self.released.wait(0.05):
                    break
                self.wfile.write(b"X-A: b\r\n")
                self.wfile.flush()
        finally:
            self.ended.set()

    def away(self):
        self.send_response(302)
        self.send_header("Location", "ftp://127.0.0.1/picture.png")
        self.end_headers()

    def named(self):
        self.send_response(302)
        self.send_header("Location", f"http://user:geheim@{self.headers['Host']}/good")
        self.end_headers()

    def inside(self):
        self.send_response(302)
        self.send_header("Location", "file:///etc/passwd")
        self.end_headers()

    def circle(self):
        self.send_response(302)
        self.send_header("Location", "/circle")
        self.end_headers()

    def nonsense(self):
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def moved(self):
        self.send_response(302)
        self.send_header("Location", "/good")
        self.end_headers()

    def log_message(self, *_):
        pass


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that hangs up is what some tests are about."""


@contextmanager
def _serving():
    server = QuietServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        Handler.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def site(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(web, "TIMEOUT", 0.4)
    monkeypatch.setattr(web, "MAX_BYTES", 200_000)
    Handler.released.clear()
    with _serving() as url:
        yield url


@pytest.mark.parametrize("path", ["good", "moved"])
def test_a_picture_from_the_web(site, path):
    close(open_image(f"{site}/{path}"), halves())


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("missing", "(404 Not Found)"),
        ("日本?q=ü", "(404 Not Found)"),
        ("text", "not a picture"),
        ("cut", "damaged"),
        ("huge", "more than 200000 bytes"),
        ("hanging", "0.4 s"),
        ("dripping", "not complete after 0.4 s"),
        ("headers_that_drip", "not complete after 0.4 s"),
        ("away", "leads to 'ftp://127.0.0.1/picture.png', which is no http(s) address"),
        ("inside", "'file:///etc/passwd' is not allowed"),
        ("circle", "cannot be fetched"),
        ("nonsense", "cannot be fetched"),
        ("a b", "cannot be fetched"),
    ],
)
def test_trouble_on_the_web(site, path, part):
    begin = time.monotonic()
    with pytest.raises(InputError) as caught:
        open_image(f"{site}/{path}")
    assert f"{site}/{path}" in str(caught.value) and part in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - begin < 5


def test_a_connection_is_given_up_for_good(site):
    Handler.ended.clear()
    with pytest.raises(InputError):
        open_image(f"{site}/headers_that_drip")
    assert Handler.ended.wait(5), "the thread that waits has hung up"


@pytest.mark.parametrize(
    "url",
    ["http://", "http://127.0.0.1:1/picture.png", "https://127.0.0.1:1/picture.png", "HTTP://127.0.0.1:1/picture.png",
     "http://[::1", "http://[x]/", "http://127.0.0.1:port/", "http://127.0.0.1:99999999/", "http://a b/", "http://\ud800/",
     "http://127.0.0.1:1/\r\nX: y", "http://%zz/", "http://./", "http://" + "a" * 300 + "/", "http://user@:1@/", "http://\0/",
     "http://a\nb/", "http://a\r\nb/c d"],
)  # fmt: skip
def test_no_such_server(url):
    with pytest.raises(InputError, match="cannot be fetched") as caught:
        open_image(url)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("user", ["user:geheim", "user:ge@heim", "geheim", "geheim:"])
def test_no_password_is_said(site, user):
    for url in (site.replace("//", f"//{user}@") + "/good", f"{site}/named"):
        with pytest.raises(InputError, match=r"://…@127.*with a user name cannot be fetched.*give the file") as caught:
            open_image(url)
        assert "heim" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_blanks_around_an_address(site):
    assert open_image(f" \n{site}/good ").size == open_image(f"{site}/good").size


def test_a_name_that_takes_forever(monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: time.sleep(0.6))
    start = time.monotonic()
    with pytest.raises(InputError, match="not complete after"):
        open_image("http://picture.invalid/")
    assert time.monotonic() - start < 0.5


def test_other_schemes_are_file_names():
    for name in ("file:///etc/passwd", "ftp://127.0.0.1/a.png"):
        with pytest.raises(InputError, match="no such file"):
            open_image(name)
        assert not Path(name).exists()
