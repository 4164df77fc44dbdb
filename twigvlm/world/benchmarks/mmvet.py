"""MM-Vet: descriptions."""

from __future__ import annotations

from ..questions import DESCRIBE, describe
from .folder import Folder
from .pool import SPLIT, scene

LONG = range(30)  # scenes that are described


def write(out: Folder) -> None:
    lines, truth = [], {}
    for number, seed in enumerate(LONG):
        image, text = f"v1_{number}.jpg", DESCRIBE[number % len(DESCRIBE)]
        lines.append({"question_id": number, "image": image, "text": text, "category": "default"})
        truth[f"v1_{number}"] = {
            "imagename": image,
            "question": text,
            "answer": describe(scene(seed)),
            "imagesource": f"sprout, {SPLIT} split, scene {seed}",
            "capability": ["rec", "gen", "spat", *(["ocr"] if scene(seed).word else [])],
        }
        out.picture(f"images/{image}", seed)
    out.lines("llava-mm-vet.jsonl", lines)
    out.json("mm-vet.json", truth)
