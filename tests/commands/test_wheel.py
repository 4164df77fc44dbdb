"""Both distributions, built and tried where no clone is: a wheel in an environment of its own, the source unpacked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import site
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import warm
from conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("build", "hatchling"))),
        reason="needs build and hatchling: pip install -e .[dev]",
    ),
]
LIMIT = 40 * 2**20  # bytes of a wheel
BELOW = "below.pth"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of both, the wheel made from the source distribution."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


def clean(**more: str) -> dict[str, str]:
    """An environment that leads to no clone."""
    left = ("PYTHONPATH", "TWIGVLM_HOME", "PYTHONDONTWRITEBYTECODE")
    return {k: v for k, v in os.environ.items() if k not in left} | {"HF_HUB_OFFLINE": "1"} | more


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel above the packages of this one; nobody may write to where it lies."""
    place = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True, timeout=120)
    python = place / "bin" / "python"
    (packages_of(place) / BELOW).write_text("\n".join(site.getsitepackages()) + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, env=clean(), cwd=place, timeout=300)
    return place


def packages_of(installed: Path) -> Path:
    return next((installed / "lib").glob("python*/site-packages"))


def contents(installed: Path) -> dict[str, int]:
    packages = packages_of(installed)
    return {
        str(f.relative_to(packages)): f.stat().st_mtime_ns for f in packages.rglob("*") if "__pycache__" not in f.parts
    }


@pytest.fixture
def call(installed, tmp_path):
    """Runs `twigvlm …` in an empty folder, with caches of its own."""
    before, work = contents(installed), tmp_path / "work"
    work.mkdir()
    env = clean(XDG_CACHE_HOME=str(tmp_path / "cache"))
    forked = env | {"PYTHONPATH": str(packages_of(installed))}

    def run(*argv: str) -> subprocess.CompletedProcess:
        return warm.run([installed / "bin" / "twigvlm", *argv], work, forked)

    def fork(*argv: str) -> warm.Program:
        return warm.Program([installed / "bin" / "twigvlm", *argv], work, forked)

    def start(*argv: str) -> subprocess.Popen:
        return subprocess.Popen(
            [installed / "bin" / "twigvlm", *argv], cwd=work, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    run.work, run.cache, run.start, run.fork = work, tmp_path / "cache" / "twigvlm", start, fork
    yield run
    assert contents(installed) == before, "nothing is written to where the package lies"


def test_a_wheel_carries_what_it_needs(wheel):
    assert wheel.stat().st_size < LIMIT
    names = set(zipfile.ZipFile(wheel).namelist())
    page = ROOT / "twigvlm" / "web" / "static"
    assert {f.relative_to(ROOT).as_posix() for f in page.rglob("*") if f.is_file()} <= names
    carried = {n.removeprefix("twigvlm/carried/") for n in names if n.startswith("twigvlm/carried/")}
    wanted = {
        f"checkpoints/{f.relative_to(ROOT / 'checkpoints')}" for f in (ROOT / "checkpoints").rglob("*") if f.is_file()
    }
    assert carried == wanted | {"assets/image.png", *(f"scripts/{f.name}" for f in (ROOT / "scripts").glob("*.json"))}
    sources = {str(f.relative_to(ROOT)) for f in (ROOT / "twigvlm").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == sources and "twigvlm/py.typed" in names


def test_its_metadata_are_those_of_an_index(wheel):
    with zipfile.ZipFile(wheel) as opened:
        text = opened.read(next(n for n in opened.namelist() if n.endswith(".dist-info/METADATA"))).decode()
        names = opened.namelist()
        console = opened.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    facts = Parser().parsestr(text)
    assert facts["Description-Content-Type"] == "text/markdown" and facts.get_payload().startswith("# TwigVLM")
    assert facts["License-Expression"] == "Apache-2.0" and facts["Requires-Python"] == "<3.14,>=3.10"
    assert {"web", "serve", "train", "eval", "quant"} <= set(facts.get_all("Provides-Extra"))
    for file in facts.get_all("License-File"):
        assert any(n.endswith(f".dist-info/licenses/{file}") for n in names), file
    cards = {f"checkpoints/{f.parent.name}/README.md" for f in (ROOT / "checkpoints").glob("*/README.md")}
    assert set(facts.get_all("License-File")) == {"LICENSE"} | cards and len(facts.get_all("Classifier")) >= 8
    assert all(", http" in url for url in facts.get_all("Project-URL"))
    assert "twigvlm = twigvlm.__main__:main" in console and "twigvlm = twigvlm.evaluation.lmms:manifest" in console


def test_it_answers_scores_and_measures_alone(call):
    assert "usage: twigvlm COMMAND" in call("--help").stdout
    said = call("demo", "--question", "How many objects are there?", "--json", "--device", "cpu")
    assert said.returncode == 0 and json.loads(said.stdout)["text"].strip(), said.stderr
    assert list(call.work.iterdir()) == []
    asked = call("eval", "--task", "gqa", "-R", "64", "--limit", "2", "--device", "cpu", "--workers", "0")
    assert asked.returncode == 0, asked.stderr
    result = json.loads(asked.stdout.splitlines()[-1])
    assert result["questions"] == 2 and Path(result["answers"]).is_relative_to(call.cache)
    assert result["command"].startswith("twigvlm eval ") and result["commit"].startswith("v")
    files = call.cache / "sprout" / "gqa"
    questions = files / "llava_gqa_testdev_balanced.jsonl"
    ids = [json.loads(line)["question_id"] for line in questions.read_text().splitlines()]
    (call.work / "said.jsonl").write_text("".join(json.dumps({"question_id": i, "text": "yes"}) + "\n" for i in ids))
    again = call("score", "--task", "gqa", "--questions", str(questions), "--annotations", str(files / "data"), "--answers", "said.jsonl", "--json")  # fmt: skip
    assert again.returncode == 0, again.stderr
    timed = call("speed", "--prompts", "1", "--repeats", "1", "--short", "--device", "cpu")
    assert timed.returncode == 0 and timed.stdout.strip(), timed.stderr


def test_it_trains_exports_and_shares_alone(call):
    drawn = call("conversations", "--out", "drawn", "--samples", "12")
    assert drawn.returncode == 0, drawn.stderr
    data = ["--data", "drawn/train/conversations.json", "--images", "drawn/train/images", "--held-out", "0"]
    trained = call("train", *data, "--max-steps", "1", "--batch-size", "2", "--per-device-batch", "2", "--agreement", "labels", "--device", "cpu", "--workers", "0", "--zero", "none", "--out", "grown")  # fmt: skip
    assert trained.returncode == 0, trained.stdout + trained.stderr
    shown = call("push", "grown", "somebody/grown", "--dry-run")
    assert shown.returncode == 0 and "license: apache-2.0" in shown.stdout, shown.stderr
    out = call("export", "--as", "draft-vlm", "--twig-block", "grown", "--out", "draft", "--json")
    assert out.returncode == 0 and json.loads(out.stdout)["layers"] == 5, out.stderr
    planned = call("train", *data, "--dry-run", "--device", "cpu", "--zero", "2")
    assert planned.returncode == 0, planned.stderr


def answers(line: str, path: str, words: str) -> bool:
    """Whether a server with this first line says so."""
    address = re.search(r"http://[\d.]+:\d+", line)
    assert address, line
    with urllib.request.urlopen(address[0] + path, timeout=60) as answer:
        return answer.status == 200 and words in answer.read().decode()


def test_the_page_opens(call):
    """The script that was installed, as people start it."""
    with call.start("web", "--port", "0", "--device", "cpu") as process:
        try:
            assert answers(process.stdout.readline() or process.stderr.read(), "", "TwigVLM</title>")
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()


def test_the_server_opens(call):
    process = call.fork("serve", "--port", "0", "--device", "cpu")
    try:
        assert answers(process.line() or process.communicate()[1], "/health", '"ok"')
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_bad_words_end_in_one_line(call):
    for argv, words in ((["evl"], "did you mean eval"), (["demo", "--image-file", "none.png"], "none.png")):
        done = call(*argv)
        assert done.returncode == 2 and words in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_the_source_is_whole_and_passes_its_own_tests(built, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as opened:
        opened.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        missing = [
            name for name in tracked.stdout.splitlines() if not (source / name).exists() and (ROOT / name).exists()
        ]
        assert not missing
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "tests/test_architecture.py", "tests/commands", "tests/test_flags.py"]  # fmt: skip
    done = warm.run(command, source, clean())
    assert done.returncode == 0, done.stdout
