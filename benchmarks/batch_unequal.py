"""How fast eight unequal rows are written together: pictures and text alone, prompts and answers of different lengths.

    python benchmarks/batch_unequal.py [--tree FOLDER] [--repeats 5]

On the embedded model, with two threads. `--tree` measures the package of another checkout, of any age, on the same
rows and weights (those of this one, so that they are the same). Ends with one JSON line: seconds and tokens of every run, decoding alone, and the
CPU time of all of it, which is the better measure where others are at work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
ASKED = (  # question, pictures
    ("Describe the image in detail.", 1),
    ("How many objects are there?", 1),
    ("Describe the image in detail.", 1),
    ("Is there a circle on the left side of the image?", 1),
    ("Describe the image in detail.", 1),
    ("What is a circle?", 0),
    ("Describe the image in detail.", 1),
    ("How many objects are there in a picture of nothing?", 0),
)
METHODS = {"plain": (None, 0), "plain + TTP": (64, 0), "SSD": (None, 5), "SSD + TTP": (64, 5)}


def rows(vlm) -> dict:
    """Padded prompts, their mask and the pictures of all."""
    import torch
    from PIL import Image

    folder = HERE / "assets"
    picture = Image.open(folder / "image.png").convert("RGB")
    turned = [picture, *(picture.transpose(t) for t in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180))]
    ids, pixels = [], []
    for number, (question, pictures) in enumerate(ASKED):
        made = vlm.prepare(turned[number % len(turned)], question)
        row = made["input_ids"][0]
        if pictures:
            pixels.append(made["pixel_values"])
        else:
            row = row[row != vlm.image_token_id]
        ids.append(row)
    width = max(map(len, ids))
    padded, mask = torch.zeros(2, len(ids), width, dtype=torch.long)
    for place, row in enumerate(ids):
        padded[place, : len(row)], mask[place, : len(row)] = row, 1
    return {"input_ids": padded, "attention_mask": mask, "pixel_values": torch.cat(pixels)}


def measure(tree: Path, repeats: int) -> dict:
    """Every method after a warm-up, in turn."""
    sys.path.insert(0, str(tree))
    import twigvlm  # isort: skip  (before torch: it says how threads wait)

    import torch

    torch.set_num_threads(2)
    weights = HERE / "checkpoints"
    vlm = twigvlm.load(weights / "sprout-base", weights / "sprout-twig-K2-T3", device="cpu")
    batch, runs = rows(vlm), {name: [] for name in METHODS}
    for turn in range(repeats + 1):
        for name, (R, length) in METHODS.items():
            spent = time.process_time()
            out = vlm.generate(**batch, retained_tokens=R, draft_length=length, max_new_tokens=100)
            if turn:
                late = out.stats.new_tokens - sum(len(row[0].tokens) for row in out.steps)
                cpu = time.process_time() - spent
                runs[name].append({"seconds": out.stats.decode_seconds, "tokens": late, "cpu seconds, whole": cpu})
    rates = {name: statistics.median(r["tokens"] / r["seconds"] for r in found) for name, found in runs.items()}
    lengths = [len(row) for row in out.tokens]
    return {"tree": tree.name, "torch": torch.__version__, "answers": lengths, "decode tokens/s": rates, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tree", type=Path, default=HERE, help="checkout whose package is measured (default: this one)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each method (default %(default)s)")
    args = parser.parse_args()
    print(json.dumps(measure(args.tree.resolve(), args.repeats)))


if __name__ == "__main__":
    main()
