"""MME: a question with yes and one with no on each picture, by subtask."""

from __future__ import annotations

import re

from ..questions import SINGLE_WORD, YES_NO
from .folder import Folder
from .pool import pair_of

_MME = {  # subtask → kind of question and its wording
    "existence": ("exist", re.compile(r"(?!.* object\b).*")),
    "count": ("compare", re.compile(r"Are there more .*")),
    "position": ("relation", re.compile(r"(?!.* or ).*")),
    "color": ("exist", re.compile(r".* object\b.*")),
    "scene": ("compare", re.compile(r"Is .* larger than .*")),
    "commonsense_reasoning": ("compare", re.compile(r"Do .* have the same shape\?")),
}
_OWN_FOLDERS = ("scene",)  # subtasks that keep pictures and questions apart, as five real ones do
MME_PICTURES = 14  # a subtask


def write(out: Folder) -> None:
    release, lines = "MME_Benchmark_release_version", []
    for subtask, (kind, wording) in _MME.items():
        found = 0
        for seed in range(10 * MME_PICTURES):
            if found == MME_PICTURES:
                break
            pair = pair_of(f"mme {subtask}", kind, seed, lambda q, wording=wording: bool(wording.fullmatch(q.text)))
            if pair is None:
                continue
            found += 1
            images, texts = ("images/", "questions_answers_YN/") if subtask in _OWN_FOLDERS else ("", "")
            image = f"{subtask}/{images}{seed:012d}.jpg"
            out.picture(f"{release}/{image}", seed)
            rows = "".join(f"{q.text} {YES_NO}\t{q.answer}\n" for q in pair)
            out.text(f"{release}/{subtask}/{texts}{seed:012d}.txt", rows)
            for q in pair:
                text = f"{q.text}\n{SINGLE_WORD}"
                lines.append({"question_id": image, "image": image, "text": text, "category": subtask})
        assert found == MME_PICTURES, f"{subtask}: {found} pictures have both answers"
    out.lines("llava_mme.jsonl", lines)
