"""SEED-Bench (version 1): four options about an image, or about one frame from the middle of a video.

Files, as in LLaVA's eval.zip: `seed_bench/llava-seed-bench.jsonl` (the prompt stands in it whole, suffix
included), `SEED-Bench.json` (answers, question types), and the pictures that the lines name below
`SEED-Bench-image/` and `SEED-Bench-video-image/`. Without the videos, ask the images only: put their lines
into `seed_bench/llava-seed-bench-image.jsonl` and choose the split `image`.

An answer is right when its text is the letter and nothing else. `score` is the share of right answers over
images and videos together ("SEED all" in LLaVA's table); many papers quote `image`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ...errors import InputError
from .base import Score
from .llava import LlavaTask, same_questions, truth_needed
from .pairing import pair, upload_path
from .reading import ID, locate, read_records, read_table, write_whole

LETTER = "\nAnswer with the option's letter from the given choices directly."
KINDS = ("image", "video")


class SEED(LlavaTask):
    name = "seed"
    title = "SEED-Bench"
    metric = "accuracy, %"
    splits = ("all", "image")
    suffix = LETTER
    upload_suffix = ".jsonl"
    published: ClassVar[Mapping[str, float]] = {"llava-1.5-7b": 58.6, "llava-1.5-13b": 61.6}
    source = "LLaVA-1.5 (arXiv 2310.03744), table 4; images alone 66.1 and 68.2, videos 37.3 and 42.7"
    folder = "seed_bench"
    layout: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "all": {"questions": "llava-seed-bench.jsonl", "images": ".", "annotations": "SEED-Bench.json"},
        "image": {"questions": "llava-seed-bench-image.jsonl", "images": ".", "annotations": "SEED-Bench.json"},
    }

    def score(self, questions: Path, annotations: Path | None, answers: Path, strict: bool = False) -> Score:
        annotations = truth_needed(self, annotations)
        truth, types = _read_truth(locate(annotations, "SEED-Bench.json"))
        asked = list(dict.fromkeys(str(line["question_id"]) for line in read_records(questions, question_id=ID)))
        texts, doubts = pair(answers, asked, strict)
        without = [key for key in asked if key not in truth]
        if strict:
            same_questions(asked, truth, questions, annotations)
        doubts.add("without truth", without)
        counted = [key for key in asked if key in truth]
        if not counted:
            raise InputError(f"{questions} and {annotations} share no question")
        hits: dict[str, list[bool]] = defaultdict(list)
        for key in counted:
            right = texts.get(key) == truth[key]["answer"]
            for part in ("all", truth[key]["data_type"], types[truth[key]["question_type_id"]]):
                hits[part].append(right)
        parts: dict[str, Any] = {kind: _percent(hits[kind]) for kind in KINDS if kind in hits}
        parts["question types"] = {name: _percent(hits[name]) for name in types.values() if name in hits}
        return Score(_percent(hits["all"]), {**parts, "count": len(counted)}, doubts.counts())

    def upload(self, questions: Path, annotations: Path | None, answers: Path, out: Path) -> Path:
        """Write the leaderboard's JSON lines, one {"question_id", "prediction"} a question."""
        asked = [str(line["question_id"]) for line in read_records(questions, question_id=ID)]
        texts, _ = pair(answers, asked)
        ids = [item["question_id"] for item in _read_truth(truth_needed(self, annotations))[0].values()]
        rows = [{"question_id": key, "prediction": texts[str(key)]} for key in ids if str(key) in texts]
        target = upload_path(out, answers, ".jsonl")
        write_whole(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return target


def _read_truth(path: Path) -> tuple[dict[str, dict], dict[Any, str]]:
    """Question id → annotation, and question type id → name."""
    data = read_table(path)
    try:
        types = {number: name for name, number in data["question_type"].items()}
        truth = {str(item["question_id"]): item for item in data["questions"]}
        for key, item in truth.items():
            if item["question_type_id"] not in types or item["answer"] not in "ABCD" or item["data_type"] not in KINDS:
                raise InputError(f"{path}, question {key}, is no annotation of SEED-Bench version 1")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no annotation file of SEED-Bench version 1 ({error!r} is not there)") from None
    return truth, types


def _percent(hits: list[bool]) -> float:
    return 100 * sum(hits) / len(hits)
