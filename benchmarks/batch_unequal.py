"""How fast eight unequal rows are written together: pictures and text alone, prompts and answers of different lengths.

    python benchmarks/batch_unequal.py [--tree FOLDER] [--repeats 5 | --profile | --bare]

On the embedded model, with two threads. `--tree` measures the package of another checkout, of any age, on the same
rows and weights (those of this one, so that they are the same). Ends with one JSON line: seconds and tokens of every run, decoding alone, and the
CPU time of all of it, which is the better measure where others are at work. `--profile` tells instead what plain
decoding behind the prompt spends its time on: torch's operations and Python between them; and how much of it passes in
the model's own layers, which no loop around them can shorten. `--bare` tells what a round of the loop takes by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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


def load(tree: Path):
    """The embedded model, by the package of that checkout."""
    sys.path.insert(0, str(tree))
    import twigvlm  # isort: skip  (before torch: it says how threads wait)

    import torch

    torch.set_num_threads(2)
    weights = HERE / "checkpoints"
    return twigvlm.load(weights / "sprout-base", weights / "sprout-twig-K2-T3", device="cpu")


def decoding(vlm, batch: dict, R: float | None, tokens: int) -> float:
    """Milliseconds of plain decoding behind the prompt."""
    out = vlm.generate(**batch, retained_tokens=R, draft_length=0, max_new_tokens=tokens)
    return 1e3 * out.stats.decode_seconds


def profile(tree: Path) -> None:
    """Prints milliseconds of torch's operations, those of the prompt taken off, and of all that is between them."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watching

    vlm = load(tree)
    batch = rows(vlm)
    for name in ("plain", "plain + TTP"):
        R = METHODS[name][0]

        def spent(tokens: int, R: float | None = R) -> tuple[Counter, float]:
            with watching(activities=[ProfilerActivity.CPU]) as seen:
                whole = decoding(vlm, batch, R, tokens)
            return Counter({one.key: one.self_cpu_time_total / 1e3 for one in seen.key_averages()}), whole

        spent(2)
        (few, begun), (all_, ended) = spent(2), spent(100)
        all_.subtract(few)
        whole = ended - begun
        print(f"{name}: decoding {whole:.0f} ms, of which outside torch's operations {whole - sum(all_.values()):.0f}")
        for key, ms in all_.most_common(8):
            print(f"  {key:48} {ms:7.0f} ms {100 * ms / whole:5.1f} %")
        shares = [inside(vlm, batch, R) for _ in range(5)]
        print(f"  in the model's layers, without the profiler: {100 * statistics.median(shares):.1f} %")


def bare(tree: Path) -> None:
    """Prints milliseconds of a round with layers that do nothing, for one row and for all."""
    vlm = load(tree)
    one = vlm.prepare(HERE / "assets" / "image.png", ASKED[0][0])
    eight = rows(vlm)
    for layer in (*vlm.trunk.decoder.layers, *vlm.twig.layers):
        layer.forward = lambda hidden, *_, **__: hidden
    for name, batch in (("one row", one), ("eight rows", eight)):
        for method in ("plain", "SSD"):
            took = []
            for _ in range(6):
                out = vlm.generate(**batch, retained_tokens=None, draft_length=METHODS[method][1], max_new_tokens=60)
                took.append(1e3 * out.stats.decode_seconds / (max(map(len, out.steps)) - 1))
            print(f"{name}, {method}: {statistics.median(took[1:]):.2f} ms a round beside the layers")


def inside(vlm, batch: dict, R: float | None) -> float:
    """The share of decoding that passes in the model's own layers."""
    with timed(vlm.trunk.decoder.layers) as calls:
        whole = decoding(vlm, batch, R, 100)
    return 1e3 * sum(calls) / whole


@contextmanager
def timed(layers) -> Iterator[list[float]]:
    """Seconds of every call of these layers for a single token a row, while it lasts."""
    calls: list[float] = []

    def around(forward):
        def call(hidden, *given, **named):
            begun = time.perf_counter()
            out = forward(hidden, *given, **named)
            if hidden.shape[1] == 1:
                calls.append(time.perf_counter() - begun)
            return out

        return call

    for layer in layers:
        layer.forward = around(layer.forward)
    try:
        yield calls
    finally:
        for layer in layers:
            del layer.forward


def measure(tree: Path, repeats: int) -> dict:
    """Every method after a warm-up, in turn."""
    vlm = load(tree)
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
    return {
        "tree": tree.name,
        "torch": sys.modules["torch"].__version__,
        "answers": lengths,
        "decode tokens/s": rates,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tree", type=Path, default=HERE, help="checkout whose package is measured (default: this one)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each method (default %(default)s)")
    parser.add_argument("--profile", action="store_true", help="what plain decoding spends its time on, instead")
    parser.add_argument("--bare", action="store_true", help="what a round takes beside the layers, instead")
    args = parser.parse_args()
    if args.profile or args.bare:
        return (profile if args.profile else bare)(args.tree.resolve())
    print(json.dumps(measure(args.tree.resolve(), args.repeats)))


if __name__ == "__main__":
    main()
