"""POPE: is the object in the picture? Yes or no, in three settings of how the absent objects were picked.

The numbers are those of LLaVA's `eval_pope.py`. It pairs answers with labels by their position inside a setting,
so a missing answer shifts every later label; such answers are counted here. The table number is the mean F1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...errors import InputError
from .base import Score, Source
from .llava import LLAVA_PAPER, SHORT_ANSWER, LlavaTask, truth_needed
from .reading import ID, Doubts, added, checked, first, read_records

SETTINGS = ("adversarial", "random", "popular")
PREFIX, ENDING = "coco_pope_", ".json"
OTHER_VERSION = (
    "LLaVA's question file belongs to the labels of POPE's commit e3e3926, and newer ones are of other pictures"
)
LABELS = ("yes", "no")
NO_WORDS = {"No", "not", "no"}  # other spellings are yes


class POPE(LlavaTask):
    name = "pope"
    title = "POPE"
    metric = "mean F1 of three settings, %"
    splits = ("test",)
    suffix = SHORT_ANSWER
    published: ClassVar = {"llava-1.5-7b": 85.9, "llava-1.5-13b": 85.9}
    source = LLAVA_PAPER
    folder = "pope"
    in_suite, column = True, 8
    lmms_task = "pope/pope.yaml"
    layout: ClassVar = {"test": {"questions": "llava_pope_test.jsonl", "annotations": "coco", "images": "val2014"}}

    def read_questions(self, path: Path) -> Source:
        return Source(path, read_records(path, question_id=ID, image=str, text=str, category=str))

    def read_truth(self, annotations: Path | None, questions: Path) -> Source:
        return Source(truth_needed(self, annotations), _labels(annotations))

    def score_records(self, asked: Source, truth: Source | None, said: Source, strict: bool = False) -> Score:
        labels = truth.rows
        by_setting = _by_setting(asked.rows, labels)
        if strict:
            _match(by_setting, labels, asked.path, truth.path)
        lines = _answers_by_setting(said, by_setting)
        doubts = _doubts(by_setting, labels, lines)
        if strict:
            doubts.refuse(said.path)
        measured = {
            setting: _measures([line["text"] for line in lines[setting]], labels[setting], f"{said.path}: {setting}")
            for setting in labels
            if by_setting[setting]
        }
        if not measured:
            raise InputError(f"{asked.path}: asks nothing in {', '.join(labels)}; do the files belong together?")
        mean = added(measures["f1"] for measures in measured.values()) / len(measured)
        # the settings stand a second time under the name of their case, as reference files have them
        kind = "with_missing_predictions" if "missing" in doubts.counts() else "complete"
        parsed = {str(line["question_id"]): yes_or_no(line["text"]) for group in lines.values() for line in group}
        parts = {**measured, kind: measured, "settings": list(measured), "parsed": parsed, "average_f1": mean}
        note = "; ".join(filter(None, (_unasked(measured), _undefined(measured))))
        return Score(100 * mean, parts, doubts.counts(), note, _metric(measured))

    def lmms_rows(self, folder: Path) -> Iterator[dict[str, Any]]:
        """One a question of every setting; ids are unique over the settings."""
        labels = folder / "coco"
        found = [setting for setting in SETTINGS if (labels / f"{PREFIX}{setting}{ENDING}").exists()]
        if not found:
            raise InputError(f"{labels}: holds no {PREFIX}<setting>{ENDING}; give a folder laid out as LLaVA's pope")
        for setting in found:
            file = labels / f"{PREFIX}{setting}{ENDING}"
            for line in read_records(file, question_id=ID, image=str, text=str, label=str):
                picture = folder / "val2014" / line["image"]
                if not picture.is_file():
                    raise InputError(
                        f"{picture}: no such picture, but question {line['question_id']} of {file} shows it"
                    )
                row = {"question_id": f"{setting}-{line['question_id']}", "question": line["text"]}
                yield {**row, "answer": line["label"], "category": setting, "image": str(picture.resolve())}


def yes_or_no(text: str) -> str:
    """ "no" if the first sentence, without commas, has "No", "no" or "not" between spaces; else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "yes" if NO_WORDS.isdisjoint(words) else "no"


Lines = Sequence[Mapping[str, Any]]
Asked = Mapping[str, Mapping[str, Any]]  # question id → its line


def _labels(place: Path) -> dict[str, list[dict[str, Any]]]:
    """Label lines by setting, from `coco_pope_<setting>.json` in a folder, or from one such file."""
    homes = [home for home in (place, place / "coco", place / "annotations") if home.is_dir()]
    found = [place] if place.is_file() else [file for home in homes for file in home.glob(f"{PREFIX}*{ENDING}")]
    files = {file.name[len(PREFIX) : -len(ENDING)]: file for file in found if file.name.startswith(PREFIX)}
    if not files:
        raise InputError(f"{place}: holds no {PREFIX}<setting>{ENDING}")
    order = [name for name in SETTINGS if name in files] + sorted(set(files) - set(SETTINGS))
    return {name: _rows(files[name]) for name in order}


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = read_records(file, label=str)
    for number, row in enumerate(rows, 1):
        about = {name: str for name in ("image", "text") if name in row}
        checked(row, f"{file}: label {number}", **about)
        if row["label"] not in LABELS:
            raise InputError(f"{file}: label {number} is {row['label']!r}; yes or no is needed, fetch the file again")
    return rows


def _by_setting(questions: Lines, labels: Mapping[str, Lines]) -> dict[str, dict[str, Mapping[str, Any]]]:
    out: dict[str, dict[str, Mapping[str, Any]]] = {setting: {} for setting in labels}
    by_id = {str(line["question_id"]): line for line in questions}  # a later line with the same id counts
    for name, line in by_id.items():
        out.setdefault(line["category"], {})[name] = line
    return out


def _answers_by_setting(said: Source, asked: Mapping[str, Asked]) -> dict[str, list[Mapping[str, Any]]]:
    """Answers in their order; one to a question that was not asked stops here, as it stops the official script."""
    home = {name: setting for setting, lines in asked.items() for name in lines}
    foreign = [line["question_id"] for line in said.rows if str(line["question_id"]) not in home]
    if foreign:
        raise InputError(f"{said.path}: {len(foreign)} answers to questions that were not asked: {first(foreign)}")
    out: dict[str, list[Mapping[str, Any]]] = {setting: [] for setting in asked}
    for line in said.rows:
        out[home[str(line["question_id"])]].append(line)
    return out


def _match(asked: Mapping[str, Asked], labels: Mapping[str, Lines], questions: Path, place: Path) -> None:
    """Raise InputError where labels are not those of the questions, place by place, as they are paired."""
    absent = [setting for setting, lines in asked.items() if lines and setting not in labels]
    if absent:
        raise InputError(f"{place}: holds no {PREFIX}{absent[0]}{ENDING}, and {questions} asks {', '.join(absent)}")
    for setting, rows in labels.items():
        where, lines = f"{place}: {PREFIX}{setting}{ENDING}", list(asked[setting].values())
        if len(lines) > len(rows):
            raise InputError(
                f"{where} has {len(rows)} labels, but {questions} asks {len(lines)} questions there; {OTHER_VERSION}"
            )
        wrong = [n for n, (line, row) in enumerate(zip(lines, rows, strict=False)) if not _own(line, row, True)]
        if wrong:
            row, line = rows[wrong[0]], lines[wrong[0]]
            raise InputError(
                f"{where}: {len(wrong)} of {len(lines)} labels are of other questions than {questions} asks; the first, "
                f"label {wrong[0] + 1}, is of {row['image']} {row['text']!r}, but question {line['question_id']} is "
                f"about {line['image']}; {OTHER_VERSION}"
            )


def _doubts(asked: Mapping[str, Mapping[str, Any]], labels: Mapping[str, Lines], said: Mapping[str, Lines]) -> Doubts:
    doubts = Doubts()
    for setting, rows in labels.items():
        names = [str(line["question_id"]) for line in said[setting]]
        place = {name: index for index, name in enumerate(asked[setting])}
        doubts.add("missing", [name for name in place if name not in set(names)])
        doubts.add("duplicate", [name for name, n in Counter(names).items() for _ in range(n - 1)])
        doubts.add("unlabelled", names[len(rows) :])
        for index, (name, label) in enumerate(zip(names, rows, strict=False)):
            if not _own(asked[setting][name], label, place[name] == index):
                doubts.add("shifted_labels", [name])
    return doubts


def _own(question: Mapping[str, Any], label: Mapping[str, Any], same_place: bool) -> bool:
    """Whether the label belongs to the question; by place where the label does not say what it is for."""
    if "image" not in label or "text" not in label:
        return same_place
    return label["image"] == question["image"] and question["text"].startswith(label["text"])


def _measures(texts: Sequence[str], rows: Lines, where: str) -> dict[str, float]:
    if not texts or not rows:
        raise InputError(f"{where}: {len(texts)} answers, {len(rows)} labels; nothing to compare")
    yes = [yes_or_no(text) == "yes" for text in texts]
    cells = Counter((said, row["label"] != "no") for said, row in zip(yes, rows, strict=False))
    tp, fp, tn, fn = cells[True, True], cells[True, False], cells[False, False], cells[False, True]
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return {
        "samples": len(texts),
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "accuracy": (tp + tn) / (tp + tn + fp + fn),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": sum(yes) / len(yes),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _unasked(measured: Mapping[str, Any]) -> str:
    absent = [setting for setting in SETTINGS if setting not in measured]
    return f"asked: {', '.join(measured)}; not asked: {', '.join(absent)}" if absent else ""


def _metric(measured: Mapping[str, Any]) -> str:
    """Says which settings the mean is over, where these are not the benchmark's three."""
    if set(measured) == set(SETTINGS):
        return ""
    return f"{'F1' if len(measured) == 1 else 'mean F1'} of {', '.join(measured)}, %"


def _undefined(measured: Mapping[str, Mapping[str, float]]) -> str:
    """Where the official script divides by zero: no answer or no label says yes, or no yes is right."""
    settings = [setting for setting, measures in measured.items() if not measures["TP"]]
    return f"no right yes in {', '.join(settings)}: F1 taken as 0 where it is undefined" if settings else ""
