"""MM-Vet: questions that want whole sentences; a paid judge (GPT-4) scores them, so nothing is scored here.

Files, as in LLaVA's eval.zip: `mm-vet/llava-mm-vet.jsonl` (no suffix: the question as it is), `mm-vet/images/`
and `mm-vet/mm-vet.json` (the reference answers, for the judge). `upload` writes the file that the official
evaluator (https://huggingface.co/spaces/whyu/MM-Vet_Evaluator) takes: {"v1_0": "answer", ...}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from .base import Score, Source
from .llava import LlavaTask, same_questions
from .pairing import ids_of, pair, upload_path
from .reading import read_table, write_whole

PREFIX = "v1_"  # of an id in the judge's file


class MMVet(LlavaTask):
    name = "mmvet"
    title = "MM-Vet"
    metric = "GPT-4's mark, %"
    splits = ("mm-vet",)
    max_new_tokens = 1024
    published: ClassVar[Mapping[str, float]] = {"llava-1.5-7b": 31.1, "llava-1.5-13b": 36.1}
    source = "LLaVA-1.5 (arXiv 2310.03744), table 4"
    folder = "mm-vet"
    in_suite, column, timed_alone = True, 11, True
    layout: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "mm-vet": {"questions": "llava-mm-vet.jsonl", "images": "images", "annotations": "mm-vet.json"}
    }

    def read_truth(self, annotations: Path | None, questions: Path) -> Source | None:
        """For the judge, who needs it whole."""
        return None if annotations is None else Source(annotations, read_table(annotations))

    def score_records(self, asked: Source, truth: Source | None, said: Source, strict: bool = False) -> Score:
        texts, doubts = pair(said, ids_of(asked), strict)
        if strict and truth is not None:
            same_questions(map(_judged, ids_of(asked)), truth.rows, asked, truth)
        words = [len(text.split()) for text in texts.values()]
        parts = {"count": len(asked.rows), "answered": len(words), "words": sum(words) / max(1, len(words))}
        note = "not scored here: a paid judge is needed; give the exported file to the MM-Vet evaluator"
        return Score(None, parts, doubts.counts(), note)

    def upload(self, asked: Source, truth: Source | None, said: Source, out: Path) -> Path:
        """Write {"v1_<id>": answer} in the order of the questions."""
        ids = ids_of(asked)
        texts, _ = pair(said, ids)
        rows = {_judged(key): texts[key] for key in ids if key in texts}
        target = upload_path(out, said, ".json")
        write_whole(target, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        return target


def _judged(key: str) -> str:
    return key if key.startswith(PREFIX) else PREFIX + key
