"""SEED-Bench: multiple choice on pictures, and on "videos" that stand still."""

from __future__ import annotations

from ..questions import LETTER, LETTERS
from .folder import Folder
from .pool import SCENES, UNANSWERED, choices

_TYPES = {"Scene Understanding": 1, "Instance Identity": 2, "Instance Attributes": 3, "Instance Location": 4,
          "Instances Counting": 5, "Spatial Relation": 6, "Instance Interaction": 7, "Visual Reasoning": 8,
          "Text Understanding": 9, "Action Recognition": 10, "Action Prediction": 11,
          "Procedure Understanding": 12}  # fmt: skip
_SEED_TYPE = {"colour": 3, "shape": 2, "where": 4, "count": 5, "read": 9}


def write(out: Folder) -> None:
    """Pictures, and "videos" that stand still: each is one frame."""
    images = choices("seed", SCENES, {"colour": 16, "shape": 14, "where": 12, "count": 10, "read": 4})
    videos = choices("seed video", UNANSWERED, {"colour": 6, "shape": 5, "where": 5})
    lines, questions = [], []
    names = {number: name for name, number in _TYPES.items()}
    for number, (q, video) in enumerate([*((q, False) for q in images), *((q, True) for q in videos)]):
        key = f"v{number}" if video else str(100_000 + number)
        kind = 10 + number % 3 if video else _SEED_TYPE[q.topic]
        place = f"SEED-Bench-video-image/{key}.jpg" if video else f"SEED-Bench-image/{q.seed}_0"
        options = [f"{letter}. {text}" for letter, text in zip(LETTERS, q.options, strict=True)]
        text = "\n".join([q.text, *options, LETTER])
        line_id = key if video else int(key)
        lines.append({"image": place, "text": text, "category": names[kind], "question_id": line_id})
        letters = {f"choice_{letter.lower()}": text for letter, text in zip(LETTERS, q.options, strict=True)}
        data = {"data_id": f"{key}.mp4" if video else f"{q.seed}_0", "data_type": "video" if video else "image"}
        rest = {"question": q.text, "question_id": key, "question_type_id": kind}
        questions.append({"answer": q.answer, **letters, **data, **rest})
        out.picture(place, q.seed)
    out.lines("llava-seed-bench.jsonl", lines)
    out.lines("llava-seed-bench-image.jsonl", lines[: len(images)])
    out.json("SEED-Bench.json", {"questions": questions, "question_type": _TYPES})
