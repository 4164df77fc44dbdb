"""The golden set that the repository carries, made from the whole one: `python tests/golden/reduce.py WHOLE`.

Files are taken as they are; of some arrays only a part fits (`_part`), and random pictures are drawn again when
the set is unpacked. The same whole set gives the same members, whatever the machine. What belongs to pruning
methods, to drafts that branch, and to the stages of TwigVLM++ lies in archives of their own, beside their tests.
"""

from __future__ import annotations

import io
import lzma
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ARCHIVE = Path(__file__).with_name("golden.tar.xz")
PRUNING = ARCHIVE.parents[1] / "pruning" / ARCHIVE.name
TREES = ARCHIVE.parents[1] / "decoding" / ARCHIVE.name
STAGES = ARCHIVE.parents[1] / "training" / ARCHIVE.name
LIMIT, PRUNING_LIMIT, TREES_LIMIT = 3_000_000, 700_000, 100_000  # bytes of all files in this folder, and of the others
STAGES_LIMIT = 400_000
TAKEN = ("A/**/*", "images/*.png", "images/*.npz", "scorers/**/*", "training/*.json", "training/*.npz")
METHODS = ("pruning/*.npz",)
DRAFTS = ("plus/tree_*.npz", "plus/released_fault.json")
LEARNING = ("plus/pruning_head.npz", "plus/stage?.npz", "plus/budget.json")
STEPS = 4  # of an answer, of whose logits all are carried
CHANNELS = 16  # of every patch's features
# Weights are of four bytes, and that is where the coder looks for what repeats.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 1, "lp": 2, "pb": 2}]


def _part(file: str, key: str, array: np.ndarray) -> np.ndarray | None:
    """What is carried of an array of the whole set; None: nothing."""
    if (file, key) in PARTS:
        return PARTS[file, key](array)
    if file == "cdpruner":  # the small case of two images
        return array if key.startswith("batch") else None
    if key.endswith("/all_logits"):
        return array[:STEPS]
    if key.endswith("/image_features"):
        return array[:, :CHANNELS]
    if key.startswith(("after3/", "final/")):  # a trained layer: its norms and one matrix
        return array if array.ndim == 1 or "q_proj" in key else None
    return None if key == "supervised_logits" else array


def _chosen_heads(attention: np.ndarray) -> np.ndarray:
    """Attention [H, Q, V] of the half of the heads whose rows vary most; the others' is zero."""
    variance = attention.astype(np.float64).var(-1).mean(-1)
    low = np.argsort(-variance, kind="stable")[len(variance) // 2 :]
    attention = attention.copy()
    attention[low] = 0
    return attention


# Of random numbers, which no coder shrinks, what the rules ask: sums that they take first, heads that they choose.
PARTS = {
    ("formula_sieve", "attention"): lambda rows: rows.sum(1, keepdims=True),
    ("formula_trevs", "stage2_attention"): _chosen_heads,
    ("dart", "keys"): lambda keys: np.abs(keys.astype(np.float32)).sum((1, 3), keepdims=True),
    ("functions", "mustdrop_merged"): lambda tokens: tokens[:, :40],  # from there on they are as they were
}


def _reduced(file: Path) -> bytes:
    """An npz file with what is carried of it; stored as it is, so that the archive's compression sees it."""
    with np.load(file) as arrays:
        parts = {key: part for key in arrays.files if (part := _part(file.stem, key, arrays[key])) is not None}
    out = io.BytesIO()
    np.savez(out, **parts)
    return out.getvalue()


def members(whole: Path, taken: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file under the patterns that is carried, in the archive's order."""
    for file in sorted({file for pattern in taken for file in whole.glob(pattern) if file.is_file()}):
        content = _reduced(file) if file.suffix == ".npz" else file.read_bytes()
        yield file.relative_to(whole).as_posix(), content


def random_pixels() -> dict[str, np.ndarray]:
    """The two random pictures, as they were drawn; numpy promises that RandomState's numbers stay."""
    draw = np.random.RandomState(5)
    return {f"random_pixels_{n}.npy": draw.randn(3, 336, 336).astype(np.float16) for n in range(2)}


def pack(whole: Path, archive: Path = ARCHIVE, taken: Sequence[str] = TAKEN) -> None:
    for name, pixels in random_pixels().items():
        if not np.array_equal(np.load(whole / "images" / name), pixels):
            raise SystemExit(f"{whole / 'images' / name}: not the numbers that unpacking draws; mend random_pixels")
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as opened:
        for name, content in members(whole, taken):
            entry = tarfile.TarInfo(name)  # no owner and no date
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))
    archive.write_bytes(lzma.compress(tar.getvalue(), filters=FILTERS))


def unpack(folder: Path, archives: Sequence[Path] = (ARCHIVE, PRUNING, TREES, STAGES)) -> Path:
    """Lay the carried set out in a folder, which then looks like the whole one."""
    for archive in archives:
        with tarfile.open(archive, "r:xz") as opened:
            for entry in opened:
                file = folder / entry.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(opened.extractfile(entry).read())
    for name, pixels in random_pixels().items():
        np.save(folder / "images" / name, pixels)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "A" / "cases.json").is_file():
        raise SystemExit("usage: python tests/golden/reduce.py FOLDER, a whole golden set (with A/cases.json)")
    for made, patterns in ((ARCHIVE, TAKEN), (PRUNING, METHODS), (TREES, DRAFTS), (STAGES, LEARNING)):
        pack(Path(sys.argv[1]), made, patterns)
        print(f"{made}: {made.stat().st_size:,} bytes")
