"""Side by side for all methods: one PNG, a tile each with its caption, and a word for whatever cannot be shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import speaking, write_base
from PIL import Image

import twigvlm
from twigvlm.errors import RunError
from twigvlm.model.twig import save_twig
from twigvlm.pruning import METHODS, picture, show
from twigvlm.pruning.picture import GAP, LETTERS, LINES, SIDE, Tile, sheet, write_png


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny base and its twig (L=6, V=4, K=2, T=2)."""
    vlm, folder = speaking(), tmp_path_factory.mktemp("model")
    save_twig(vlm.twig, vlm.trunk, folder / "twig", "tiny")
    return str(write_base(folder / "base", vlm.model)), str(folder / "twig")


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size, colour in (("b.png", (60, 30), "red"), ("a.jpg", (30, 60), "blue"), ("c.PNG", (40, 40), "white")):
        Image.new("RGB", size, colour).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def call(model, pictures, tmp_path, capsys):
    """(exit status, output, errors, the PNG) of the command on the tiny model."""
    target = tmp_path / "kept.png"

    def made(*argv: str, twig: bool = True):
        flags = ["--base-model", model[0], *(("--twig-block", model[1]) if twig else ()), "--device", "cpu", "-R", "2"]
        flags += ["--image", str(pictures / "c.PNG"), "--output", str(target), "--max-new-tokens", "4"]
        code = show.main([*flags, *argv])
        return code, *capsys.readouterr(), Image.open(target) if target.exists() else None

    return made


def width(columns: int) -> int:
    return GAP + columns * (SIDE + GAP)


def height(lines: int, titles: int = 0) -> int:
    return GAP + lines * (SIDE + GAP + LINES * (LETTERS + 3)) + titles * (LETTERS + 3)


def test_a_tile_for_every_method_and_one_for_the_base(call):
    code, out, err, png = call()
    assert code == 0, err
    named = [line.split(":")[0].strip() for line in out.splitlines()[1:-1]]
    assert named == ["unpruned", *METHODS]
    assert png.size == (width(6), height(-(-(len(METHODS) + 1) // 6)))
    assert "  fastv: kept 1 of 4, R 2.0: " in out and "  twig: kept 2 of 4, R 2.0: " in out


def test_what_was_dropped_is_dim(call):
    """A white picture under FastV: one of four patches is light, and it is the one that the model kept."""
    code, _, _, png = call("--methods", "fastv")
    assert code == 0 and png.size == (width(2), height(1))
    left, dropped = GAP + SIDE + GAP, 0
    for y in (SIDE // 4, 3 * SIDE // 4):
        for x in (SIDE // 4, 3 * SIDE // 4):
            assert png.getpixel((GAP + x, GAP + y)) == (255, 255, 255), "the first tile is the whole picture"
            dropped += png.getpixel((left + x, GAP + y)) < (100, 100, 100)
    assert dropped == 3


def test_a_folder_has_one_row_a_picture(call, pictures):
    code, out, _, png = call("--methods", "fastv,twig", "--image", str(pictures))
    assert code == 0 and [Path(line).name for line in out.splitlines() if line.startswith("/")] == [
        "a.jpg",
        "b.png",
        "c.PNG",
    ]
    assert png.size == (width(3), height(3, titles=3))
    _, _, _, png = call("--methods", "fastv,twig", "--image", str(pictures), "--columns", "2")
    assert png.size == (width(2), height(6, titles=3))


def test_without_a_name_it_lies_among_the_runs(model, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--base-model",
        model[0],
        "--device",
        "cpu",
        "-R",
        "2",
        "--image",
        str(pictures / "c.PNG"),
        "--max-new-tokens",
        "4",
    ]
    assert show.main([*flags, "--methods", "fastv"]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "kept.png").is_file() and not (tmp_path / "kept.png").exists()


def test_a_method_that_cannot_has_a_tile_with_the_reason(call):
    code, out, _, png = call("--methods", "twig,fastv", "-R", "4")
    assert (
        code == 0
        and png.size[0] == width(3)
        and "  twig: not at R = 4: " in out
        and "V=4" in out
        and "fastv: kept 4 of 4" in out
    )
    code, out, _, _ = call("--methods", "twig,fastv", twig=False)
    assert code == 0 and "  twig: not at R = 2: it needs a twig" in out


def test_what_only_the_loaded_model_knows_has_a_tile_too(call, monkeypatch):
    generate = twigvlm.TwigVLM.generate

    def refusing(self, *args, **options):
        if options.get("pruning") == "fastv" and options["retained_tokens"] is not None:
            raise twigvlm.InputError("this tower has no class token")
        return generate(self, *args, **options)

    monkeypatch.setattr(twigvlm.TwigVLM, "generate", refusing)
    code, out, _, _ = call("--methods", "fastv,twig")
    assert code == 0 and "  fastv: not at R = 2: this tower has no class token" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--methods", "oak"), ("'oak'", "known methods", "fastv")),
        (("--methods", "fastv:deep"), ("no setting 'deep'",)),
        (("--methods", "twig", "-R", "4"), ("no method can be shown at R = 4", "legal")),
        (("--question", " "), ("--question is empty",)),
        (("--columns", "0"), ("--columns is 0",)),
        (("--image", "nowhere.png"), ("nowhere.png",)),
        (("--output", "kept.jpg"), ("PNG",)),
        (("--output", "nowhere/kept.png"), ("no folder",)),
        (("--out", "nowhere/kept.png"), ("no folder",)),
        (("--max-new-tokens", "0"), ("max_new_tokens",)),
        (("--dtype", "int8"), ("int8",)),
    ],
)
def test_impossible_wishes_are_one_line_before_a_model_is_opened(call, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(twigvlm, "load", lambda **_: pytest.fail("opened the model"))
    try:
        code, _, err, png = call(*flags)
    except SystemExit as end:
        code, err, png = end.code, capsys.readouterr().err, None
    last = err.strip().splitlines()[-1]
    assert code == 2 and "error: " in last and all(word in last for word in words[:1]) and png is None, err


def test_broken_pictures_and_empty_folders(call, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(twigvlm, "load", lambda **_: pytest.fail("opened the model"))
    (pictures / "b.png").write_bytes(b"no picture")
    code, _, err, png = call("--image", str(pictures))
    assert code == 2 and "b.png" in err and png is None
    (tmp_path / "empty").mkdir()
    code, _, err, _ = call("--image", str(tmp_path / "empty"))
    assert code == 2 and "no picture in this folder" in err
    monkeypatch.setattr(show, "MOST", 2)
    code, _, err, _ = call("--image", str(pictures))
    assert code == 2 and "3 pictures, and 2 fit" in err


def test_a_disk_that_takes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(RunError, match="No space left"):
        write_png(Image.new("RGB", (2, 2)), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_captions_fit_their_tiles():
    words = "a very long answer " * 30
    draw = picture.ImageDraw.Draw(Image.new("RGB", (9, 9)))
    font = picture.ImageFont.load_default(LETTERS)
    for caption in (["name", words], ["x" * 400], ["", ""], ["name", "ümläut 图", "lone \ud800"]):
        lines = picture._fitting(draw, caption, font)
        assert 1 <= len(lines) <= LINES and all(draw.textlength(line, font) <= SIDE + LETTERS for line in lines)
    assert picture._fitting(draw, ["name", words], font)[-1].endswith("…")
    assert picture._fitting(draw, ["name", "short"], font) == ["name", "short"]


def test_pictures_of_any_shape_are_squares_of_a_sheet():
    for size in ((3000, 2), (1, 1), (20, 500)):
        small, caption = Tile("a", ["b"], Image.new("RGB", size, "red"), torch.tensor([0]), 4).small()
        assert small.size == (SIDE, SIDE) and caption == ["a", "b"]
    page = sheet([[(Image.new("RGB", (SIDE, SIDE), "red"), ["a"])]], 3, [""])
    assert np.asarray(page)[GAP + 5, GAP + 5].tolist() == [255, 0, 0]
