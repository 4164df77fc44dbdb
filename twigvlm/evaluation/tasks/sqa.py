"""ScienceQA, test split: a letter among up to five choices; the table number is the accuracy with pictures.

The numbers are those of LLaVA's `eval_science_qa.py`. A question without an answer is wrong and, as its prompt is
not known, not counted among those with a picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .base import Question, Score, Source
from .llava import LlavaTask, asked_part, same_questions, truth_needed
from .reading import ID, Doubts, checked, last_by_id, locate, read_records, read_table, write_whole

OPTIONS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"
PICTURE = "<image>"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


class SQA(LlavaTask):
    name = "sqa"
    title = "ScienceQA-IMG"
    metric = "accuracy with picture, %"
    splits = ("test",)
    suffix = "\nAnswer with the option's letter from the given choices directly."
    max_new_tokens = 1024
    published: ClassVar = {"llava-1.5-7b": 69.5, "llava-1.5-13b": 71.6}
    source = "7B: TwigVLM (arXiv 2503.14075), base row (66.8 in LLaVA-1.5); 13B: LLaVA-1.5 (arXiv 2310.03744)"
    folder = "scienceqa"
    aliases = ("scienceqa",)
    in_suite, column = True, 6
    layout: ClassVar = {
        "test": {
            "questions": "llava_test_CQM-A.json",
            "annotations": "problems.json",
            "splits": "pid_splits.json",
            "images": "images/test",
        }
    }

    def questions(self, root: Path, split: str) -> list[Question]:
        files = self.files(root, split)
        lines = read_records(files["questions"], id=ID, conversations=list)
        return [self._question(line, files) for line in lines]

    def read_questions(self, path: Path) -> Source:
        return Source(path, read_records(path, id=ID))

    def read_truth(self, annotations: Path | None, questions: Path) -> Source:
        path = locate(truth_needed(self, annotations), "problems.json")
        return Source(path, _split(path))

    def read_answers(self, path: Path) -> Source:
        return Source(path, read_records(path, question_id=ID, prompt=str, text=str))

    def score_records(self, asked: Source, truth: Source | None, said: Source, strict: bool = False) -> Score:
        split, doubts = truth.rows, Doubts()
        ids = {str(line["id"]) for line in asked.rows}
        found = last_by_id(said.rows, doubts)
        names, note = asked_part(split, ids, found, truth)
        doubts.add("missing", [name for name in names if name not in found])
        doubts.add("foreign", [name for name in found if name not in split])
        if strict:
            same_questions(sorted(ids), split, asked, truth)
            doubts.refuse(said.path)
        parts = _parts({name: split[name] for name in names}, found)
        if not parts["img_total"]:
            note = "; ".join(filter(None, (note, "no answered question has a picture: nothing to score")))
        return Score(parts["img_accuracy"], parts, doubts.counts(), note)

    def upload(self, asked: Source, truth: Source | None, said: Source, out: Path) -> Path:
        """The result file of LLaVA's script."""
        found = last_by_id(said.rows, Doubts())
        parts = _parts(truth.rows, found)
        result = {"acc": parts["accuracy"], "correct": parts["correct"], "count": parts["count"]}
        texts = {name: found[name]["text"] if name in found else FAILED for name in truth.rows}
        write_whole(out, json.dumps({**result, "results": parts["pred_idx"], "outputs": texts}, indent=2))
        return out

    def _question(self, line: Mapping[str, Any], files: Mapping[str, Path]) -> Question:
        where = f"{files['questions']}: question {line['id']}"
        first = checked(line["conversations"][0] if line["conversations"] else None, where, value=str)
        prompt = first["value"].replace(PICTURE, "").strip() + self.suffix
        fields: dict[str, Any] = {"question_id": line["id"]}
        if "image" not in line:
            return Question(str(line["id"]), prompt, (), fields)
        fields["prompt"] = f"{PICTURE}\n{prompt}"  # the scorer tells pictures by this
        checked(line, where, image=str)
        return Question(str(line["id"]), prompt, (files["images"] / line["image"],), fields)


def letter(text: str) -> str:
    """The option that an answer names, or "FAILED": alone, before ". ", or once in "The answer is X?"."""
    if text in OPTIONS:
        return text
    if text[:1] in OPTIONS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def _split(problems: Path) -> dict[str, dict[str, Any]]:
    """The problems of the test split in its order; `pid_splits.json` lies beside them."""
    table = read_table(problems)
    place = problems.with_name("pid_splits.json")
    names = checked(read_table(place), str(place), test=list)["test"]
    checked(table, f"{problems}: the test split of {place.name}", **dict.fromkeys(map(str, names), dict))
    return {
        str(name): checked(table[str(name)], f"{problems}: problem {name}", choices=list, answer=int) for name in names
    }


def _parts(split: Mapping[str, Any], said: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    parsed = {name: letter(said[name]["text"]) if name in said else FAILED for name in split}
    chosen = {name: _index(parsed[name], len(problem["choices"])) for name, problem in split.items()}
    right = [name for name, problem in split.items() if chosen[name] == problem["answer"]]
    pictured = {name for name in split if name in said and PICTURE in said[name]["prompt"]}
    img_correct = sum(name in pictured for name in right)
    accuracy = len(right) / len(split) * 100
    img_accuracy = img_correct / len(pictured) * 100 if pictured else None
    parts = {
        "accuracy": accuracy,
        "correct": len(right),
        "count": len(split),
        "img_correct": img_correct,
        "img_total": len(pictured),
        "img_accuracy": img_accuracy,
        "pred_idx": chosen,
        "parsed": parsed,
        "correct_ids": right,
    }
    if img_accuracy is not None:
        head = f"Total: {len(split)}, Correct: {len(right)}"
        parts["printed"] = f"{head}, Accuracy: {accuracy:.2f}%, IMG-Accuracy: {img_accuracy:.2f}%"
    return parts


def _index(option: str, choices: int) -> int:
    """-1 for what is no option of this question."""
    return OPTIONS.index(option) if option in OPTIONS[:choices] else -1
