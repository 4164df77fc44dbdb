"""Shared by the tests of evaluation: a tiny model in folders, tiny data, the command in this process and as a script."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image
from warm import Program

from tests.conftest import *  # noqa: F403 (pytest knows one module `conftest`, the last that it has met)
from tests.conftest import ROOT, speaking, write_base
from twigvlm.evaluation import run
from twigvlm.files import write_json
from twigvlm.model.twig import save_twig
from twigvlm.world import drawn

SCRIPTS = ROOT / "scripts" / "v1_5" / "eval"
QUESTIONS = 20
MANY = 80
SUFFIX = "\nAnswer the question using a single word or phrase."


# ---------------------------------------------------------------------- a tiny model and tiny data


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny base and its twig (L=6, V=4, K=2, T=2)."""
    vlm, folder = speaking(), tmp_path_factory.mktemp("model")
    save_twig(vlm.twig, vlm.trunk, folder / "twig", "tiny")
    return str(write_base(folder / "base", vlm.model)), str(folder / "twig")


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data")


def write_data(root: Path) -> Path:
    """GQA in its own format, and VQAv2 whose truth is elsewhere."""
    pictures = root / "gqa" / "data" / "images"
    pictures.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (20 + i, 30), (60 * i, 10, 200)).save(pictures / f"{i}.jpg")
    asked = [
        {"question_id": str(100 + i), "image": f"{i % 4}.jpg", "text": f"q {i}?{SUFFIX}"} for i in range(QUESTIONS)
    ]
    lines(root / "gqa" / "llava_gqa_testdev_balanced.jsonl", asked)
    truth = {
        row["question_id"]: {
            "isBalanced": True, "answer": "a", "question": "q", "types": {"structural": "query", "semantic": "obj"},
            "groups": {"global": None}, "semantic": [],
        } for row in asked
    }  # fmt: skip
    write_json(truth, root / "gqa" / "data" / "testdev_balanced_questions.json")
    (root / "vqav2").mkdir()
    (root / "vqav2" / "test2015").symlink_to(pictures)
    rows = [{"question_id": i, "image": "0.jpg", "text": f"v {i}?{SUFFIX}"} for i in range(3)]
    lines(root / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    lines(root / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl", rows)
    return root


def lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def sprout(tmp_path_factory) -> Path:
    """The embedded world's benchmarks; do not change them."""
    return drawn.ensure(tmp_path_factory.mktemp("data") / "sprout")


class Runner:
    """The command in this process, on the tiny model."""

    def __init__(self, model: tuple[str, str], data: Path, capsys):
        base, twig = model
        self.flags = ["--base-model", base, "--twig-block", twig, "--data", str(data), "--workers", "0"]
        self.flags += ["--max-new-tokens", "6", "-R", "2", "--device", "cpu"]
        self.capsys = capsys

    def __call__(self, *flags: str, task: str = "gqa") -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = run.main(["--task", task, *self.flags, *flags])
        return code, *self.capsys.readouterr()

    def done(self, *flags: str, task: str = "gqa") -> dict:
        code, out, err = self(*flags, task=task)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    def refused(self, *flags: str, words: tuple = (), code: int = 2, task: str = "gqa") -> str:
        found, out, err = self(*flags, task=task)
        last = err.strip().splitlines()[-1]
        assert found == code and last.startswith("error: ") and "Traceback" not in err, err
        assert '"score"' not in out
        for word in words:
            assert word in last, last
        return last


@pytest.fixture(scope="session")
def reference(model, tmp_path_factory) -> bytes:
    """The answers of the plain command on the tiny data: all that must not change them is compared with these."""
    folder = tmp_path_factory.mktemp("reference")
    flags = Runner(model, write_data(folder / "data"), None).flags
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert run.main(["--task", "gqa", *flags, "--out", str(folder / "out")]) == 0
    return merged(folder / "out")


@pytest.fixture
def runner(model, data, capsys) -> Runner:
    return Runner(model, data, capsys)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The prompts that reach the model, one by one, without warm-ups."""
    from twigvlm.evaluation.asking.ask import Asker

    seen, answer = [], Asker._answer

    def listening(self, ready):
        seen.extend(q.id for q in ready.questions)
        return answer(self, ready)

    monkeypatch.setattr(Asker, "_answer", listening)
    return seen


def folder_of(out: Path, setting: str = "*") -> Path:
    (found,) = out.glob(f"answers/*/*/{setting}")
    return found


def merged(out: Path) -> bytes:
    return (folder_of(out) / "merge.jsonl").read_bytes()


# ---------------------------------------------------------------------- processes of their own


def script(name: str, *flags: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("MODEL", "TWIG", "DATA", "CUDA_VISIBLE_DEVICES")}
    return subprocess.run(
        ["bash", str(SCRIPTS / f"{name}.sh"), *flags],
        cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def many(data) -> Path:
    """More questions than a tiny model answers at once."""
    file = data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    truth = json.loads((data / "gqa" / "data" / "testdev_balanced_questions.json").read_text())
    more = [dict(rows[i % QUESTIONS], question_id=str(1000 + i), text=f"m {i}?{SUFFIX}") for i in range(MANY)]
    lines(file, more)
    write_json(
        {row["question_id"]: truth["100"] for row in more}, data / "gqa" / "data" / "testdev_balanced_questions.json"
    )
    return data


def started(model, data: Path, out: Path, *flags: str) -> Program:
    """The runner on a whole benchmark; what it starts itself is Python anew."""
    words = ["-m", run.MODULE, "--task", "gqa", "--base-model", model[0], "--twig-block", model[1], "--data", data]
    words += ["-R", "2", "--max-new-tokens", "8", "--batch-size", "1", "--out", out, *flags]
    return Program(words, ROOT)


def wait_for(out: Path, pattern: str, count: int) -> None:
    end = time.monotonic() + 300
    while sum(f.read_bytes().count(b"\n") for f in out.glob(f"answers/*/*/*/{pattern}")) < count:
        assert time.monotonic() < end
        time.sleep(0.005)


def children(pid: int) -> dict[int, str]:
    rows = subprocess.run(["ps", "-ewwo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    cells = [row.split(None, 2) for row in rows.splitlines()]
    return {int(p): args for p, parent, args in cells if int(parent) == pid}
