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
from .base import Score, Source
from .llava import LlavaTask, same_questions, truth_needed
from .pairing import ids_of, pair, upload_path
from .reading import ID, checked, locate, read_table, write_whole

LETTER = "\nAnswer with the option's letter from the given choices directly."
KINDS, LETTERS = ("image", "video"), "ABCD"


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
    column = 10
    layout: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "all": {"questions": "llava-seed-bench.jsonl", "images": ".", "annotations": "SEED-Bench.json"},
        "image": {"questions": "llava-seed-bench-image.jsonl", "images": ".", "annotations": "SEED-Bench.json"},
    }

    def read_truth(self, annotations: Path | None, questions: Path) -> Source:
        path = locate(truth_needed(self, annotations), "SEED-Bench.json")
        return Source(path, _read_truth(path))

    def score_records(self, asked: Source, truth: Source | None, said: Source, strict: bool = False) -> Score:
        table, types = truth.rows
        ids = list(dict.fromkeys(ids_of(asked)))
        texts, doubts = pair(said, ids, strict)
        if strict:
            same_questions(ids, table, asked, truth)
        doubts.add("without truth", [key for key in ids if key not in table])
        counted = [key for key in ids if key in table]
        if not counted:
            raise InputError(f"{asked.path} and {truth.path} share no question")
        hits: dict[str, list[bool]] = defaultdict(list)
        for key in counted:
            right = texts.get(key) == table[key]["answer"]
            for part in ("all", table[key]["data_type"], types[str(table[key]["question_type_id"])]):
                hits[part].append(right)
        parts: dict[str, Any] = {kind: _percent(hits[kind]) for kind in KINDS if kind in hits}
        parts["question types"] = {name: _percent(hits[name]) for name in types.values() if name in hits}
        return Score(_percent(hits["all"]), {**parts, "count": len(counted)}, doubts.counts())

    def upload(self, asked: Source, truth: Source | None, said: Source, out: Path) -> Path:
        """Write the leaderboard's JSON lines, one {"question_id", "prediction"} a question."""
        texts, _ = pair(said, ids_of(asked))
        ids = [item["question_id"] for item in truth.rows[0].values()]
        rows = [{"question_id": key, "prediction": texts[str(key)]} for key in ids if str(key) in texts]
        target = upload_path(out, said, ".jsonl")
        write_whole(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return target


def _read_truth(path: Path) -> tuple[dict[str, dict], dict[Any, str]]:
    """Question id → annotation, and question type id → name."""
    data = checked(read_table(path), str(path), question_type=dict, questions=list)
    types, truth = {str(number): name for name, number in data["question_type"].items()}, {}
    for number, item in enumerate(data["questions"], 1):
        where = f"{path}: item {number} of questions"
        checked(item, where, question_id=ID, question_type_id=ID, answer=str, data_type=str)
        kind, letter = str(item["question_type_id"]), item["answer"]
        if kind not in types or letter not in tuple(LETTERS) or item["data_type"] not in KINDS:
            raise InputError(
                f"{where}: type {kind}, answer {letter!r}, {item['data_type']!r} are not SEED-Bench version 1's; fetch it again"
            )
        truth[str(item["question_id"])] = item
    return truth, types


def _percent(hits: list[bool]) -> float:
    return 100 * sum(hits) / len(hits)
