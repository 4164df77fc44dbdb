"""The pages under docs do what they say."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import warm
from conftest import IMAGE, ROOT, batch, prompts, tiny

from twigvlm.config import TwigConfig
from twigvlm.errors import InputError
from twigvlm.evaluation import run as evaluation_run
from twigvlm.evaluation import score as evaluation_score
from twigvlm.evaluation.tasks import TASKS
from twigvlm.pruning import METHODS, plan_for


def pasted(page: str, name: str, monkeypatch) -> ModuleType:
    """A page's first block of code as the module `name` of the package, for as long as a test lasts."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.S)[0]
    module = ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, page, "exec"), vars(module))
    return module


def test_adding_a_method(monkeypatch):
    """The page's code: a method under the budget, in a batch, with drafts and without."""
    module = pasted("adding-a-method.md", "twigvlm.pruning.methods.centre", monkeypatch)
    monkeypatch.setitem(METHODS, "centre", module.Centre)
    vlm = tiny(side=56)
    options = {
        **batch(*prompts(vlm, [(3, IMAGE, 4), (5,), (IMAGE, IMAGE, 2)])),
        "max_new_tokens": 8,
        "eos_token_id": [],
    }
    plain = vlm.generate(**options, retained_tokens=4, pruning="centre", draft_length=0)
    fast = vlm.generate(**options, retained_tokens=4, pruning="centre")
    assert plain.tokens == fast.tokens
    assert [k.tolist() for k in fast.kept] == [[5, 6, 9, 10], [], [5, 6, 9, 10, 21, 22, 25, 26]]
    assert fast.stats.visual_measured == 4
    with pytest.raises(InputError, match="legal is 0 to 576"):
        plan_for("centre", 577, 576, TwigConfig(32))


def test_adding_a_benchmark(monkeypatch, tmp_path, capsys):
    """The page's five steps, as a reader would take them: written, laid out, registered, asked, scored."""
    page = (ROOT / "docs" / "adding-a-benchmark.md").read_text(encoding="utf-8")
    _, data = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    ask, score = (shlex.split(block) for block in re.findall(r"```bash\n(.*?)```", page, flags=re.S))
    assert ask[:3] == ["python", "-m", "twigvlm.evaluation.run"] and score[2] == "twigvlm.evaluation.score"
    module = pasted("adding-a-benchmark.md", "twigvlm.evaluation.tasks.colours", monkeypatch)
    monkeypatch.chdir(tmp_path)
    exec(compile(data, "the page", "exec"), {})
    monkeypatch.setitem(TASKS, "colours", module.Colours())
    assert evaluation_run.main([*ask[3:], "--device", "cpu", "--workers", "0"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["questions"] == 3 and result["visual_measured"] == pytest.approx(64, abs=0.5)
    assert result["score"] == pytest.approx(100 * result["parts"]["right"] / 3)
    said = {
        line["question_id"]: line["text"] for line in map(json.loads, Path(result["answers"]).read_text().splitlines())
    }
    right = sum(text.rstrip(".").lower() == ("red", "blue", "green", "yellow")[int(n)] for n, text in said.items())
    assert evaluation_score.main(score[3:]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["right"], facts["count"], facts["doubts"]) == (right, 4, {"missing": 1})
    assert result["parts"]["right"] == right


@pytest.fixture
def clone(tmp_path):
    """A copy of the code and its tests, into which both pages' files are written and registered as the pages say."""
    written = ("twigvlm", "tests", "docs")
    for name in written:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in (*written, "README.md", "runs", "build", "dist"):
            (tmp_path / path.name).symlink_to(path)
    for page, file, word in (
        ("adding-a-method.md", "pruning/methods/centre.py", "Centre"),
        ("adding-a-benchmark.md", "evaluation/tasks/colours.py", "Colours"),
    ):
        code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.S)[0]
        place = tmp_path / "twigvlm" / file
        place.write_text(code, encoding="utf-8")
        catalogue = place.parent / "__init__.py"
        text = catalogue.read_text(encoding="utf-8")
        text = text.replace("\nfrom .", f"\nfrom .{place.stem} import {word}\nfrom .", 1)
        text = text.replace("        Twig,\n", "        Twig,\n        Centre,\n")
        catalogue.write_text(text.replace('    "gqa": GQA(),\n', '    "gqa": GQA(),\n    "colours": Colours(),\n'))
    return tmp_path


@pytest.mark.slow
def test_both_pages_literally(clone):
    """The demo answers with the new method, the runner knows the new benchmark, and the tests that go over all hold."""

    def python(*words: str) -> str:
        env = os.environ | {"PYTHONPATH": str(clone), "HF_HUB_OFFLINE": "1"}
        done = warm.run(["-m", *words], clone, env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    question = ["--question", "What is at the left?", "--device", "cpu"]
    assert json.loads(python("twigvlm", "demo", "--pruning", "centre", "-R", "64", "--json", *question))["text"]
    assert "colours" in python("twigvlm.evaluation.run", "--help")
    python("twigvlm.sprout.publish", "--methods-only")
    files = ["tests/test_architecture.py", "tests/pruning/test_catalogue.py", "tests/evaluation/test_scorers.py"]
    every = "centre or colours or architecture or catalogue or of_the_paper"
    assert " passed" in python("pytest", "-p", "no:cacheprovider", "-m", "not slow", "-k", every, *files)


def test_every_entry_of_the_log_says_when_and_with_which_code():
    entries = (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert not [
        entry.split("\n")[0]
        for entry in entries
        if not re.match(r".+\n\*20\d\d-\d\d-\d\d, commits? [0-9a-f]{7}", entry)
    ]


def test_pages_name_what_exists():
    """Every file and folder that a page links to or puts in a code word is there."""
    for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md"):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    for name in re.findall(
        r"`((?:decoding|model|pruning)/[\w/]+\.py)`", (ROOT / "docs" / "architecture.md").read_text()
    ):
        assert (ROOT / "twigvlm" / name).exists(), name


@pytest.mark.parametrize("module", ["twigvlm.commands.demo", "twigvlm.evaluation.run", "twigvlm.evaluation.suite"])
def test_help_names_every_method(module, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(module).parse(["--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # lines break at hyphens, too
    assert all(name in text for name in METHODS), text
