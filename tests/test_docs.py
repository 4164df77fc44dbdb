"""The pages under docs do what they say."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import IMAGE, ROOT, batch, prompts, tiny

from twigvlm.config import TwigConfig
from twigvlm.errors import InputError
from twigvlm.evaluation import run as evaluation_run
from twigvlm.evaluation import score as evaluation_score
from twigvlm.evaluation.tasks import TASKS
from twigvlm.pruning import METHODS, plan_for


def test_adding_a_method(monkeypatch, tmp_path):
    """The page's code, as a reader would paste it: a method under the budget, in a batch, with drafts and without."""
    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    (tmp_path / "centre_of_the_page.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "centre", importlib.import_module("centre_of_the_page").Centre)
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
    code, data = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    ask, score = (shlex.split(block) for block in re.findall(r"```bash\n(.*?)```", page, flags=re.S))
    assert ask[:3] == ["python", "-m", "twigvlm.evaluation.run"] and score[2] == "twigvlm.evaluation.score"
    (tmp_path / "colours.py").write_text(code, encoding="utf-8")
    described = importlib.util.spec_from_file_location("twigvlm.evaluation.tasks.colours", tmp_path / "colours.py")
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
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
