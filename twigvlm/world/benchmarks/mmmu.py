"""MMMU: multiple choice and open questions, by subject."""

from __future__ import annotations

from collections import Counter

from .folder import Folder
from .pool import FEW, choices, gather, in_order

_SUBJECT = {"colour": "Design", "shape": "Art", "where": "Geography", "count": "Math", "read": "Literature"}


def write(out: Folder) -> None:
    asked = choices("mmmu", FEW, {"colour": 12, "shape": 10, "where": 10, "count": 6, "read": 2})
    asked += in_order(gather("mmmu open", "count", FEW, 10) + gather("mmmu open", "colour", FEW, 10))
    lines, taken = [], Counter()
    for q in asked:
        subject = _SUBJECT[q.topic]
        taken[subject] += 1
        key = f"validation_{subject}_{taken[subject]}"
        image = f"{key}_1.png"
        rest = {"options": list(q.options), "answer": q.answer, "images": [image]}
        kind = "multiple-choice" if q.options else "open"
        lines.append({"id": key, "question": f"<image 1> {q.text}", "question_type": kind, **rest})
        out.picture(f"images/{image}", q.seed)
    out.lines("validation.jsonl", lines)
