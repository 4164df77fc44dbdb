"""MMBench, English and Chinese: four options, each question asked once per rotation of its options.

Files, as in LLaVA's eval.zip: `mmbench/<split>.tsv` with the columns index, question, hint, A to D,
answer, category, image (base64, or the index of the row that carries it), l2-category. The rotations
are rows of their own: index modulo 1,000,000 names the question, so 1,164 questions are 4,377 rows.

`score` is circular accuracy, the number of the tables: a question is right when all its rotations are.
`plain`, beside it, counts only the first pass. LLaVA's published numbers (64.3, 67.7; Chinese 58.3, 63.6)
were given by the OpenCompass server for an uploaded table of answers to the development split: circular,
with ChatGPT reading the answers that name no option by rule. Here such answers are wrong and counted as
`unmatched`.

An answer's option is found as in OpenCompass's public matcher: the one option letter that stands as a word
of its own (punctuation aside), else the one option whose text occurs in the answer, case aside.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import ClassVar

from ...errors import InputError
from .base import Question, Score, Source, Task
from .pairing import pair, upload_path
from .reading import locate, opened, write_whole

LETTERS = "ABCD"
ROTATION = 1_000_000  # added to a question's index by each rotation
REFERENCE = 64  # an `image` of at most so many characters is the index of the row that has it
PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
# What a table reader of the official tools takes for an empty cell.
EMPTY = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
CELL_LIMIT = 32_767  # characters; Excel refuses a file with more
MADE = datetime(1980, 1, 1)  # of every spreadsheet: the same answers give the same bytes
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # by XML
UPLOADED = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")


class MMBench(Task):
    name = "mmbench"
    title = "MMBench"
    metric = "circular accuracy, %"
    splits = (
        "mmbench_dev_20230712",
        "mmbench_dev_en_20231003",
        "mmbench_test_20230712",
        "mmbench_test_en_20231003",
    )
    suffix = "\nAnswer with the option's letter from the given choices directly."
    max_new_tokens = 1024
    upload_suffix = ".xlsx"
    in_suite, column = True, 2
    published: ClassVar[Mapping[str, float]] = {"llava-1.5-7b": 64.3, "llava-1.5-13b": 67.7}
    source = "LLaVA-1.5 (arXiv 2310.03744), table 4; the TwigVLM paper's base row has 64.7 for 7B"

    def files(self, root: Path, split: str) -> dict[str, Path]:
        table = root / "mmbench" / f"{split}.tsv"
        return {"questions": table, "annotations": table}

    def questions(self, root: Path, split: str) -> list[Question]:
        path = self.files(root, split)["questions"]
        rows = list(read_table(path))
        pictures = _pictures(path, rows)
        return [self._question(row, pictures(row)) for row in rows]

    def _question(self, row: dict[str, str], picture: bytes) -> Question:
        options = options_of(row)
        lines = [row["question"], *(f"{letter}. {text}" for letter, text in options.items())]
        if not empty(row["hint"]):
            lines.insert(0, row["hint"])
        line = {
            "question_id": int(row["index"]),
            "round_id": 0,
            "options": list(options.values()),
            "option_char": list(options),
        }
        return Question(row["index"], "\n".join(lines) + self.suffix, (picture,), line)

    def read_questions(self, path: Path) -> Source:
        return Source(path, list(read_table(path, images=False)))

    def read_truth(self, annotations: Path | None, questions: Path) -> Source | None:
        path = locate(annotations or questions, *(f"{split}.tsv" for split in self.splits))
        return None if path == questions else self.read_questions(path)

    def score_records(self, asked: Source, truth: Source | None, said: Source, strict: bool = False) -> Score:
        path, rows = _with_answers(asked, truth)
        texts, doubts = pair(said, [row["index"] for row in rows], strict)
        if all(empty(row["answer"]) for row in rows):
            note = f"not scored here: {path.name} has no answers; upload the exported table to the OpenCompass server"
            return Score(None, {"count": len(rows)}, doubts.counts(), note)
        right, unmatched = {}, 0
        for row in rows:
            if row["answer"] not in options_of(row):
                raise InputError(f"{path}, row {row['index']}, has the answer {row['answer']!r}; an option is needed")
            text = texts.get(row["index"])
            option = None if text is None else option_of(text, options_of(row))
            unmatched += text is not None and option is None
            right[row["index"]] = option == row["answer"]
        circular, lonely = _circular(rows, right)
        if not circular:
            raise InputError(f"{path} has rotations only; rows with an index below {ROTATION} are needed")
        doubts.add("rotations without their question", lonely)
        if strict and lonely:
            doubts.refuse(path)
        plain = {row["index"]: right[row["index"]] for row in rows if int(row["index"]) < ROTATION}
        parts = {"circular": _percent(circular), "plain": _percent(plain), "count": len(circular), "rows": len(rows)}
        for column in ("l2-category", "category"):
            parts[column] = _by(column, rows, circular)
        return Score(parts["circular"], {**parts, "unmatched": unmatched}, doubts.counts(), _note(rows))

    def upload(self, asked: Source, truth: Source | None, said: Source, out: Path) -> Path:
        """Write the server's table: one row a question of the TSV with the column `prediction`, as .xlsx."""
        rows = asked.rows
        texts, _ = pair(said, [row["index"] for row in rows])
        columns = [name for name in UPLOADED if name == "prediction" or name in rows[0]]

        def cells(row: dict[str, str]) -> Iterator[str | int | None]:
            for name in columns:
                value = texts.get(row["index"]) if name == "prediction" else row[name]
                yield int(value) if name == "index" else None if value is None or empty(value) else value

        target = upload_path(out, said, ".xlsx")
        write_spreadsheet(target, [columns, *(list(cells(row)) for row in rows)])
        return target


class MMBenchCN(MMBench):
    """The same questions in Chinese; the prompt ends in the Chinese sentence of LLaVA's script."""

    name = "mmbench_cn"
    title = "MMBench-CN"
    in_suite, column = False, 3
    splits = ("mmbench_dev_cn_20231003", "mmbench_test_cn_20231003")
    suffix = "\n请直接回答选项字母。"
    published: ClassVar[Mapping[str, float]] = {"llava-1.5-7b": 58.3, "llava-1.5-13b": 63.6}
    source = "LLaVA-1.5 (arXiv 2310.03744), table 4"


def write_spreadsheet(path: Path, rows: Sequence[Sequence[str | int | None]]) -> None:
    """Write one sheet, whole or not at all; the same rows give the same bytes. Characters that XML cannot hold are left out.

    Raises InputError for a text that is too long for a cell, and where XlsxWriter is not installed.
    """
    try:
        import xlsxwriter
    except ImportError:
        raise InputError(f'{path.name} needs XlsxWriter, which is not installed: pip install "twigvlm[eval]"') from None
    for number, row in enumerate(rows, 1):
        if long := [len(value) for value in row if isinstance(value, str) and len(value) > CELL_LIMIT]:
            raise InputError(
                f"a cell of row {number} would hold {long[0]} characters; {CELL_LIMIT} is the limit of .xlsx"
            )
    data = io.BytesIO()
    with xlsxwriter.Workbook(data, {"in_memory": True}) as book:
        book.set_properties({"created": MADE})
        sheet = book.add_worksheet()
        for at, row in enumerate(rows):
            for column, value in enumerate(row):
                if isinstance(value, int):
                    sheet.write_number(at, column, value)
                elif value is not None:
                    sheet.write_string(at, column, _FORBIDDEN.sub("", value))
    write_whole(path, data.getvalue())


def _with_answers(asked: Source, truth: Source | None) -> tuple[Path, list[dict[str, str]]]:
    """The table with the answers, and its rows that were asked."""
    if truth is None:
        return asked.path, asked.rows
    ids = {row["index"] for row in asked.rows}
    rows = [row for row in truth.rows if row["index"] in ids]
    if not rows:
        raise InputError(f"{asked.path} and {truth.path} share no row")
    return truth.path, rows


def empty(cell: str) -> bool:
    return cell in EMPTY or cell.lower() in ("nan", "none")


def options_of(row: Mapping[str, str]) -> dict[str, str]:
    """Letter → text; the first empty cell ends the options."""
    out = {}
    for letter in LETTERS:
        if empty(row.get(letter, "")):
            break
        out[letter] = row[letter]
    return out


def option_of(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer means, None when the rule finds none or several."""
    if any(refusal in answer for refusal in REFUSALS):
        return None
    words = answer.translate(PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    if not letters and "Z" in words:
        return None  # the server's own sign for "no option"
    texts = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return texts[0] if len(texts) == 1 else None


def read_table(path: Path, images: bool = True) -> Iterator[dict[str, str]]:
    """The rows of an MMBench table; `images=False` leaves the pictures out."""
    needed = ("index", "question", "hint", "A", "B", "answer", *(("image",) if images else ()))
    csv.field_size_limit(sys.maxsize)  # one cell holds one picture
    try:
        with opened(path, newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            absent = [name for name in needed if name not in (rows.fieldnames or ()) and name not in ("hint", "answer")]
            if absent:
                raise InputError(f"{path} has no column {', '.join(absent)}")
            seen = set()
            for row in rows:
                yield _checked(path, row, rows.line_num, seen, images)
    except csv.Error as error:
        raise InputError(f"{path} cannot be read: {error}; fetch it again") from None
    if not seen:
        raise InputError(f"{path} has no rows; fetch it again")


def _checked(path: Path, row: dict, line: int, seen: set[str], images: bool) -> dict[str, str]:
    if None in row or None in row.values():
        raise InputError(f"{path}, line {line}, has not as many cells as the head has columns; fetch it again")
    if not row["index"].isdecimal():
        raise InputError(f"{path}, line {line}, has the index {row['index']!r}; a number is needed")
    row["index"] = str(int(row["index"]))
    if row["index"] in seen:
        raise InputError(f"{path}, line {line}, repeats the index {row['index']}")
    seen.add(row["index"])
    if not images:
        row.pop("image", None)
    return {"hint": "", "answer": "", **row}


def _pictures(path: Path, rows: list[dict[str, str]]) -> Callable[[dict[str, str]], bytes]:
    """row → encoded picture; rotations share theirs."""
    raw = {row["index"]: row["image"] for row in rows}
    decoded: dict[str, bytes] = {}

    def picture(row: dict[str, str]) -> bytes:
        text = row["image"]
        if len(text) <= REFERENCE:
            text = raw.get(text, "")
        if text not in decoded:
            try:
                decoded[text] = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                decoded[text] = b""
        if not decoded[text]:
            raise InputError(f"{path}, row {row['index']}, has no whole picture; fetch it again")
        return decoded[text]

    return picture


def _circular(rows: list[dict[str, str]], right: Mapping[str, bool]) -> tuple[dict[str, bool], list[str]]:
    """Question → whether all its rotations are right; and the rotations that have no question."""
    rotations = defaultdict(list)
    for row in rows:
        rotations[str(int(row["index"]) % ROTATION)].append(right[row["index"]])
    lonely = [row["index"] for row in rows if str(int(row["index"]) % ROTATION) not in right]
    return {index: all(r) for index, r in rotations.items() if index in right}, lonely


def _note(rows: list[dict[str, str]]) -> str:
    """Where not every rotation was asked, circular accuracy is not what the tables mean."""
    asked = Counter(int(row["index"]) % ROTATION for row in rows)
    short = sum(asked[int(row["index"])] < len(options_of(row)) for row in rows if int(row["index"]) < ROTATION)
    return f"{short} of {len(asked)} questions lack rotations; they count by those asked" if short else ""


def _percent(hits: Mapping[str, bool]) -> float:
    return 100 * sum(hits.values()) / len(hits)


def _by(column: str, rows: list[dict[str, str]], circular: Mapping[str, bool]) -> dict[str, float]:
    groups: dict[str, dict[str, bool]] = defaultdict(dict)
    for row in rows:
        if row["index"] in circular and row.get(column):
            groups[row[column]][row["index"]] = circular[row["index"]]
    return {name: _percent(groups[name]) for name in sorted(groups)}
