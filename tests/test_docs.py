"""The pages under docs do what they say."""

from __future__ import annotations

import importlib
import re

import pytest
from conftest import IMAGE, ROOT, batch, prompts, tiny

from twigvlm.config import TwigConfig
from twigvlm.errors import InputError
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


@pytest.mark.parametrize("module", ["cli_demo", "twigvlm.evaluation.run", "twigvlm.evaluation.suite"])
def test_help_names_every_method(module, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(module).parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in METHODS), text
