"""Drawn training data in LLaVA's instruction format: `python -m twigvlm.world.conversations`.

A pure function of the numbers below: the same files on every machine. Scenes come from the splits
of the embedded world, so that nothing of the test split is learnt.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from .. import flags
from ..errors import InputError, RunError
from ..files import alone, home
from ..program import called, run_program
from .draw import draw
from .questions import KINDS, Question, ask
from .scenes import sample_scene

DRAWN = home() / "sprout"
CONVERSATIONS, IMAGES, FACTS = "conversations.json", "images", "drawn.json"
VERSION = 1  # of what is drawn: raise it when scenes, questions or pixels change
SAMPLES = {"train": 3200, "validation": 64}
FIRST_SEED = 1 << 33  # far from the scenes that the base saw
TURNS = (3, 8)  # questions about a picture
DESCRIPTION_SHARE = 0.6  # of the conversations hold a full description
JPEG_QUALITY = 95


def conversation(split: str, number: int) -> dict:
    """Record `number` of a split, as LLaVA's instruction files hold it; its picture is scene FIRST_SEED + number."""
    scene = sample_scene(split, FIRST_SEED + number)
    rng = random.Random(f"conversation {scene.seed}")
    turns = []
    for question in _questions(scene, rng):
        turns.append({"from": "human", "value": question.text})
        turns.append({"from": "gpt", "value": question.answer})
    first = turns[0]["value"]
    turns[0]["value"] = f"<image>\n{first}" if rng.random() < 0.5 else f"{first}\n<image>"
    return {"id": f"sprout-{split}-{number:05}", "image": f"{number:05}.jpg", "conversations": turns}


def _questions(scene, rng: random.Random) -> list[Question]:
    kinds = rng.choices(KINDS, k=rng.randint(*TURNS))
    if rng.random() < DESCRIPTION_SHARE:
        kinds.insert(rng.randrange(len(kinds) + 1), "describe")
    found: dict[str, Question] = {}
    for kind in kinds:
        question = ask(scene, kind, rng)
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values()) or [ask(scene, "describe", rng)]


def write(split: str, samples: int, folder: Path, progress: bool = True) -> None:
    """The file and the pictures of a split; nothing is there before everything is."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / IMAGES).mkdir(parents=True)
    records = []
    for number in tqdm(range(samples), desc=f"Drawing {split} pictures", disable=not progress, mininterval=1):
        records.append(conversation(split, number))
        picture = draw(sample_scene(split, FIRST_SEED + number))
        picture.save(part / IMAGES / records[-1]["image"], quality=JPEG_QUALITY)
    (part / CONVERSATIONS).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    (part / FACTS).write_text(json.dumps(_facts(samples)) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def _facts(samples: int) -> dict:
    return {"version": VERSION, "samples": samples}


def is_drawn(split: str, samples: int, folder: Path) -> bool:
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8")) == _facts(samples)
    except (OSError, ValueError):
        return False


def ensure_drawn(root: Path = DRAWN, samples: dict[str, int] = SAMPLES, progress: bool = True) -> None:
    """Draw what is not there yet; of several processes one draws and the others wait."""
    if all(is_drawn(split, count, root / split) for split, count in samples.items()):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with alone(root / ".lock"):
            for split, count in samples.items():
                if not is_drawn(split, count, root / split):
                    write(split, count, root / split, progress)
    except OSError as fault:
        raise RunError(
            f"{root}: the drawn data cannot be written ({fault}); free space, or name a writable folder in TWIGVLM_HOME"
        ) from fault


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=called("twigvlm.world.conversations"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=DRAWN, help="folder of the splits (default %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES["train"], help="of the training split (default %(default)s)"
    )
    args = flags.parse(parser, argv)

    def body() -> None:
        if args.samples < 1:
            raise InputError(f"samples is {args.samples}; 1 or more is needed")
        ensure_drawn(args.out, {**SAMPLES, "train": args.samples})
        print(f"{args.out}: {args.samples} conversations to train on, {SAMPLES['validation']} held out")

    return run_program(body)


if __name__ == "__main__":
    sys.exit(main())
