"""VQAv2: validation with the answers of ten people, test questions without."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator

from ..questions import SINGLE_WORD
from .folder import Folder
from .pool import SCENES, UNANSWERED, Asked, balanced, gather, in_order, people


def write(out: Folder) -> None:
    val = balanced("vqav2", "exist", SCENES, 50) + balanced("vqav2", "compare", SCENES, 30)
    for kind, count in (("colour", 30), ("count", 30), ("shape", 20), ("where", 20)):
        val += gather("vqav2", kind, SCENES, count)
    test = balanced("vqav2 test", "exist", UNANSWERED, 24) + gather("vqav2 test", "colour", UNANSWERED, 24)
    info = {"info": {"description": "the embedded world of TwigVLM"}, "license": {"name": "Apache-2.0"}}
    info |= {"data_type": "mscoco"}
    rows = _numbered(val)
    questions = [{"image_id": image, "question": q.text, "question_id": key} for key, image, q in rows]
    head = {**info, "task_type": "Open-Ended", "data_subtype": "val2014"}
    out.json("v2_OpenEnded_mscoco_val2014_questions.json", {**head, "questions": questions})
    annotations = [_vqav2_annotation(key, image, q) for key, image, q in rows]
    out.json("v2_mscoco_val2014_annotations.json", {**info, "data_subtype": "val2014", "annotations": annotations})
    out.lines("llava_vqav2_mscoco_val2014.jsonl", _vqav2_lines(rows, "val2014"))
    rows = _numbered(test)
    out.lines("llava_vqav2_mscoco_test2015.jsonl", _vqav2_lines(rows, "test2015"))
    out.lines("llava_vqav2_mscoco_test-dev2015.jsonl", _vqav2_lines(rows[::2], "test2015"))
    for split, asked in (("val2014", val), ("test2015", test)):
        for q in asked:
            out.picture(f"{split}/COCO_{split}_{q.seed + 1:012d}.jpg", q.seed)


def _numbered(asked: list[Asked]) -> list[tuple[int, int, Asked]]:
    """(question id, image id, question); the id is the image's times 1,000 and a number, as in VQAv2."""
    out, taken = [], Counter()
    for q in in_order(asked):
        image = q.seed + 1
        out.append((image * 1000 + taken[image], image, q))
        taken[image] += 1
    return out


def _vqav2_lines(rows: Iterable[tuple[int, int, Asked]], split: str) -> Iterator[dict]:
    for key, image, q in rows:
        name = f"COCO_{split}_{image:012d}.jpg"
        yield {"question_id": key, "image": name, "text": f"{q.text}\n{SINGLE_WORD}", "category": "default"}


def _vqav2_annotation(key: int, image: int, q: Asked) -> dict:
    answer = q.right.lower()
    sure = random.Random(f"sure {key}")
    answers = [
        {"answer": given, "answer_confidence": sure.choice(("yes", "yes", "maybe")), "answer_id": number}
        for number, given in enumerate(people(answer, f"vqav2 {key}"), 1)
    ]
    kind = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
    return {
        "question_type": " ".join(q.text.lower().rstrip("?.").split()[:2]),
        "multiple_choice_answer": answer,
        "answers": answers,
        "image_id": image,
        "answer_type": kind,
        "question_id": key,
    }
