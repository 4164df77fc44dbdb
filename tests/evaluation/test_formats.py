"""docs/formats.md, evaluation: every field that the page names is in a real file, and every field of a file is on the page."""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import ROOT
from tests.evaluation.conftest import folder_of
from twigvlm import flags
from twigvlm.config import GenerationSettings
from twigvlm.evaluation import run, suite
from twigvlm.evaluation.asking.job import Job
from twigvlm.evaluation.asking.setting import OF_THE_MODEL, Setting
from twigvlm.evaluation.tasks import TASKS, find

PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").split("\n## Evaluation\n")[1].split("\n## ")[0]


def fields(title: str) -> set[str]:
    """The words in code letters in the first column of the table under a heading."""
    part = PAGE.split(f"### {title}\n")[1].split("\n### ")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return {name for cell in rows for name in re.findall(r"`([^`]+)`", cell)}


def uploads() -> dict[str, str]:
    """Benchmark → what the page says of its upload file."""
    part = PAGE.split("### Upload files\n")[1]
    rows = [line.split("|")[1:3] for line in part.splitlines() if line.startswith("| `")]
    return {name: text for names, text in rows for name in re.findall(r"`([^`]+)`", names)}


def test_the_files_of_a_run_hold_what_the_page_says(runner, tmp_path):
    result = runner.done("--out", str(tmp_path / "out"), "--batch-size", "8")
    folder = folder_of(tmp_path / "out")
    assert json.loads((folder / "result.json").read_text()) == result
    assert set(result) == fields("result.json")
    settings = json.loads((folder / "settings.json").read_text())
    assert set(settings) == fields("settings.json") and settings == result["configuration"]["identity"] | {
        name: settings[name] for name in ("K", "T", "F", "dtype")
    }
    for line in map(json.loads, (folder / "merge.jsonl").read_text().splitlines()):
        assert set(line) == fields("N_I.jsonl and merge.jsonl")
    session, *batches = map(json.loads, (folder / "1_0.figures").read_text().splitlines())
    assert set(session) == {"session"} and all(set(batch) == fields("N_I.figures") for batch in batches)
    here = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    assert here == {
        "settings.json",
        "config.yaml",
        "1_0.jsonl",
        "1_0.figures",
        "merge.jsonl",
        "result.json",
        "upload.json",
    }


def test_whatever_else_changes_answers_is_named():
    """By its own name, in a line below the table of settings.json."""
    part = PAGE.split("### settings.json\n")[1].split("\n### ")[0].split("\nAny other option")[1].split("\n\n")[0]
    usual = {f.name for f in dataclasses.fields(GenerationSettings)} - {"do_sample", "traced", "retained_tokens"}
    other = (usual | {*OF_THE_MODEL}) - fields("settings.json") - {"seed"}
    assert set(re.findall(r"`(\w+)`", part)) == other


@pytest.mark.parametrize("asked", [["-R", "2"], ["--baseline"], ["-R", "3", "--no-speculation"], ["--no-pruning"]])
def test_the_flags_of_a_folder_ask_for_that_folder(model, data, tmp_path, asked):
    """Also where a part of the work, or several settings at once, were asked for."""
    given = [
        "--base-model",
        model[0],
        "--twig-block",
        model[1],
        "--data",
        str(data),
        "--limit",
        "4",
        "--out",
        str(tmp_path),
    ]
    args = run.parse(["--task", "gqa", *given, *asked, "--num-shards", "2", "--shard", "1", "--answer-only"])
    job = run.job_of(args, find("gqa"), run.setting_of(args, find("gqa")), args.out)
    flags.save(run.config_of(args, job), tmp_path)
    again = run.parse(["--config", str(tmp_path / flags.CONFIG)])
    assert run.job_of(again, find("gqa"), run.setting_of(again, find("gqa")), again.out) == job
    assert again.shard is None and again.num_shards is None and not again.answer_only
    several = suite.parse(["--tasks", "gqa,vqav2", "-R", "2,3", *given])
    for job in suite.jobs_of(several):
        flags.save(run.config_of(several, job), tmp_path)
        again = run.parse(["--config", str(tmp_path / flags.CONFIG)])
        assert run.job_of(again, job.task, run.setting_of(again, job.task), again.out, again.split) == job


@pytest.mark.parametrize("name", list(TASKS))
def test_upload_files(sprout, tmp_path, name):
    """Of answers that are all "yes", to every question of the embedded data."""
    task = TASKS[name]
    job = Job(task, Setting(), sprout, task.splits[0], tmp_path / "out")
    lines = [job._empty_answer(q) | {"text": "yes"} for q in job.questions]
    asked = task.read_questions(job.files["questions"])
    assert len(asked.rows) == len(lines)
    job.folder.path.mkdir(parents=True)
    (job.folder.path / "1_0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = job.finish("command", None)["upload"]
    assert (written is None) == (name not in uploads())
    if written is None:
        return
    said, file = uploads()[name], Path(written)
    names = set(re.findall(r"`([^`]+)`", said)) - {file.name, "<subtask>.txt", "eval", "v1_<id>"}
    assert f"`{file.name}`" in said
    if file.is_dir():
        rows = [row for part in file.glob("*.txt") for row in part.read_text().splitlines()]
        assert len(rows) == len(lines) and all(row.count("\t") == 3 for row in rows)
    elif file.suffix == ".xlsx":
        with zipfile.ZipFile(file) as book:
            texts = ["".join(t.itertext()) for t in ElementTree.fromstring(book.read("xl/sharedStrings.xml"))]
        assert names == set(texts[:9])
    elif file.suffix == ".jsonl":
        assert all(set(json.loads(row)) == names for row in file.read_text().splitlines())
    else:
        value = json.loads(file.read_text())
        first = value[0] if isinstance(value, list) else value
        assert set(first) == names if names else all(key.startswith("v1_") for key in value) or len(value) == len(lines)
