"""MMBench, English and Chinese: one table each, every question once for each rotation of its options."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable

from .. import chinese
from ..questions import LETTERS
from .folder import Folder, encoded
from .pool import SCENES, Asked, choices

_TOPICS = {"colour": 12, "shape": 12, "where": 12, "count": 8, "read": 4}  # questions of the English file
_CATEGORIES = {
    "colour": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "shape": ("physical_property_reasoning", "attribute_reasoning"),
    "where": ("object_localization", "finegrained_perception (instance-level)"),
    "count": ("structuralized_imagetext_understanding", "logic_reasoning"),
    "read": ("ocr", "finegrained_perception (instance-level)"),
}
_COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
    "comment", "split",
)  # fmt: skip
ROTATION = 1_000_000


def write(out: Folder) -> None:
    asked = choices("mmbench", SCENES, _TOPICS)
    out.text("mmbench_dev_20230712.tsv", _mmbench_table(asked, str, str))
    half = asked[::2]
    out.text("mmbench_dev_cn_20231003.tsv", _mmbench_table(half, chinese.question, chinese.option))


def _mmbench_table(asked: list[Asked], question: Callable, option: Callable) -> str:
    """All first passes, then all first rotations, and so on."""
    table = io.StringIO()
    writer = csv.writer(table, delimiter="\t", lineterminator="\n")
    writer.writerow(_COLUMNS)
    pictures = {q.seed: base64.b64encode(encoded(q.seed, "jpeg")).decode() for q in asked}
    for turn in range(len(LETTERS)):
        for number, q in enumerate(asked):
            options = [option(text) for text in q.options[turn:] + q.options[:turn]]
            answer = LETTERS[(LETTERS.index(q.answer) - turn) % len(LETTERS)]
            category, ability = _CATEGORIES[q.topic]
            index = number + turn * ROTATION
            row = [index, question(q.text), "", *options, answer, category, pictures[q.seed], "sprout", ability, ""]
            writer.writerow([*row, "dev"])
    return table.getvalue()
