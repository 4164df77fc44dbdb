"""POPE: is there such an object? Absent ones are picked in three ways."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

from ..questions import SINGLE_WORD
from ..scenes import COLOURS, SHAPES
from .folder import Folder
from .pool import SCENES, scene

POPE_SCENES, POPE_EACH = 10, 3  # pictures a setting; present and absent objects a picture


def write(out: Folder) -> None:
    seeds = [seed for seed in SCENES if len(scene(seed).objects) >= POPE_EACH][:POPE_SCENES]
    common = Counter(o.name for seed in SCENES for o in scene(seed).objects)
    frequent = sorted(common, key=lambda name: (-common[name], name))
    lines = []
    for setting in ("adversarial", "popular", "random"):
        labels = []
        for seed in seeds:
            image = f"COCO_val2014_{seed + 1:012d}.jpg"
            out.picture(f"val2014/{image}", seed)
            for name, label in _pope_objects(seed, setting, frequent):
                text = f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"
                labels.append({"question_id": len(labels) + 1, "image": image, "text": text, "label": label})
                line = {"question_id": len(lines) + 1, "image": image, "text": f"{text}\n{SINGLE_WORD}"}
                lines.append({**line, "category": setting})
        out.lines(f"coco/coco_pope_{setting}.json", labels)
    out.lines("llava_pope_test.jsonl", lines)


def _pope_objects(seed: int, setting: str, frequent: list[str]) -> Iterator[tuple[str, str]]:
    """Present and absent objects in turn; what is absent is picked as the setting says."""
    objects = scene(seed).objects
    present = [o.name for o in objects]
    near = {f"{a.colour} {b.shape}" for a in objects for b in objects}  # parts of it are in the picture
    similar = {f"{c} {s}" for c in COLOURS for s in SHAPES if any(c == o.colour or s == o.shape for o in objects)}
    rng = random.Random(f"pope {setting} {seed}")
    every = rng.sample([f"{c} {s}" for c in COLOURS for s in SHAPES], len(COLOURS) * len(SHAPES))
    order = {"random": every, "popular": frequent, "adversarial": [*sorted(near), *sorted(similar - near)]}[setting]
    absent = [name for name in order if name not in present][:POPE_EACH]
    for yes, no in zip(rng.sample(present, POPE_EACH), absent, strict=True):
        yield yes, "yes"
        yield no, "no"
