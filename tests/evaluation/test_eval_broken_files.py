"""Question and label files that are damaged, foreign or no files at all: one line that names the file, never a traceback."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from twigvlm.errors import InputError
from twigvlm.evaluation.asking.ask import check_images
from twigvlm.evaluation.asking.job import Job
from twigvlm.evaluation.asking.setting import Setting
from twigvlm.evaluation.check import BROKEN, check_task
from twigvlm.evaluation.tasks import TASKS
from twigvlm.evaluation.tasks.reading import read_json, read_records
from twigvlm.world import drawn as benchmarks

WRONG = (None, [], {}, 7, True, "", "\0nonsense")


def home_of(sprout: Path, name: str, tmp_path: Path) -> tuple[Job, dict[str, list[Path]]]:
    """A benchmark of links, any of which may be replaced, and its files of text by role."""
    folder = benchmarks.FOLDERS[name]
    shutil.copytree(sprout / folder, tmp_path / "data" / folder, copy_function=os.symlink)
    task = TASKS[name]
    split = "val" if "val" in task.splits else next(
        s for s in task.splits if all(path.exists() for path in task.files(sprout, s).values())
    )  # fmt: skip
    files = {
        role: path for role, path in task.files(tmp_path / "data", split).items() if role not in ("images", "upload")
    }
    texts = {
        role: [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".json"))[:1]
        for role, path in files.items()
    }
    return Job(task, Setting(), tmp_path / "data", split, tmp_path / "out"), texts


def write(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)


def fault(job: Job) -> str:
    """What `match` says; nothing if it is content."""
    try:
        Job(job.task, job.setting, job.data, job.split, job.out).match()
    except InputError as found:
        assert "\n" not in str(found)
        return str(found)
    return ""


@pytest.mark.parametrize("name", list(TASKS))
def test_what_is_no_text_is_called_by_its_name(sprout, tmp_path, name):
    job, texts = home_of(sprout, name, tmp_path)
    for file in (file for files in texts.values() for file in files):
        good = file.read_bytes()
        for data, what in ((gzip.compress(good), "gunzip"), (good.decode().encode("utf-16"), "iconv -f UTF-16")):
            write(file, data)
            said = fault(job)
            assert what in said and str(file) in said, said
        file.unlink()
        os.mkfifo(file)
        assert "is a pipe" in fault(job) and str(file) in fault(job)
        file.unlink()
        file.write_bytes(good)
        assert not fault(job)


def rows_of(value) -> list[dict]:
    """The longest list or table of objects in what a file holds."""
    if isinstance(value, list):
        return [row for row in value if isinstance(row, dict)]
    if not isinstance(value, dict):
        return []
    rows = [row for row in value.values() if isinstance(row, dict)]
    return max([rows if len(rows) > 10 else [], *map(rows_of, value.values())], key=len)


@pytest.mark.parametrize("name", list(TASKS))
def test_fields_of_any_kind_never_break_a_reader(sprout, tmp_path, name):
    job, texts = home_of(sprout, name, tmp_path)
    for file in (file for files in texts.values() for file in files if file.suffix in (".json", ".jsonl")):
        good = file.read_text(encoding="utf-8")
        try:
            value, lines = json.loads(good), False
        except ValueError:
            value, lines = [json.loads(line) for line in good.splitlines()], True
        if not (rows := rows_of(value)):
            continue
        for key in list(rows[0]):
            kept = rows[0][key]
            for wrong in WRONG:
                rows[0][key] = wrong
                write(file, ("\n".join(map(json.dumps, value)) if lines else json.dumps(value)).encode())
                said = fault(job)
                assert not said or "data/" in said, said
            rows[0][key] = kept
        write(file, good.encode())


@pytest.mark.parametrize("name", ["gqa", "mme", "pope", "mmvet", "seed"])
def test_a_question_that_stands_twice_is_the_question_file_s_fault(sprout, tmp_path, name):
    job, texts = home_of(sprout, name, tmp_path)
    (file,) = texts["questions"]
    rows = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    write(file, "\n".join([*rows, rows[-1]]).encode())
    said = fault(job)
    assert str(file) in said and "twice" in said and "merge" not in said and "--strict" not in said


@pytest.mark.parametrize("text", ["{}", '{"v1_0": {}}', "[]", "nonsense", ""])
def test_what_the_judge_needs_is_whole(sprout, tmp_path, text):
    job, texts = home_of(sprout, "mmvet", tmp_path)
    (file,) = texts["annotations"]
    write(file, text.encode())
    assert str(file) in fault(job)


@pytest.mark.parametrize("label", ["Yes", "maybe", "", None])
def test_labels_of_pope_are_yes_and_no(sprout, tmp_path, label):
    job, texts = home_of(sprout, "pope", tmp_path)
    (file,) = texts["annotations"]
    rows = read_records(file)
    rows[3]["label"] = label
    write(file, "\n".join(map(json.dumps, rows)).encode())
    assert str(file) in fault(job)


@pytest.mark.parametrize(
    "text", ["9" * 5000, "[" * 100_000 + "]" * 100_000, '{"a": ' * 50_000], ids=["digits", "deep", "deep objects"]
)
def test_json_that_no_parser_takes_is_named(tmp_path, text):
    file = tmp_path / "a.json"
    for whole in (f'{{"question_id": {text}}}', f'[{{"question_id": {text}}}]'):
        file.write_text(whole)
        for read in (read_json, read_records):
            with pytest.raises(InputError, match=r"a\.json"):
                read(file)


def test_pictures_of_names_that_no_file_can_have_are_missing(sprout, tmp_path):
    job, texts = home_of(sprout, "gqa", tmp_path)
    (file,) = texts["questions"]
    rows = read_records(file)
    rows[0]["image"], rows[1]["image"], rows[2]["image"] = "x" * 4000, "a\0b", "."
    write(file, "\n".join(map(json.dumps, rows)).encode())
    (found,) = check_task(job.task, job.data)
    assert found.status == BROKEN and found.missing == 3
    for n in range(3):
        with pytest.raises(InputError, match=f"question {rows[n]['question_id']}: "):
            check_images([job.questions[n:]])
