"""A pruning method with settings, or two that are joined, in the names of folders, in tables and in lmms-eval's options."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from twigvlm.config import ModelSettings
from twigvlm.errors import InputError
from twigvlm.evaluation.asking.setting import Setting, file_name
from twigvlm.evaluation.lmms.options import Options
from twigvlm.pruning import METHODS, Reducer, Tokens, TowerMethod, View
from twigvlm.pruning.reducer import best

LEGAL = re.compile(r"[^<>:\"/\\|?*\x00-\x1f]+[^. <>:\"/\\|?*\x00-\x1f]")  # on Windows, the strictest


@dataclass(frozen=True)
class First(Reducer):
    n: int
    draws: ClassVar[bool] = True

    def most(self, V: int) -> int:
        return self.n

    def __call__(self, view: View) -> Tokens:
        return view.select(best(-view.patches[..., 0], self.n))


@dataclass(frozen=True)
class Front(TowerMethod):
    name: ClassVar[str] = "front"
    paper: ClassVar[str] = "none: of a test"
    summary: ClassVar[str] = "lowest first channel"
    file: str = ""
    faithful: bool = False
    version: float = 2.0

    def reducer(self, n, shape):
        return First(n)


@dataclass(frozen=True)
class Star(Front):
    name: ClassVar[str] = "front*"


@pytest.fixture(autouse=True)
def front(monkeypatch):
    monkeypatch.setitem(METHODS, "front", Front)
    monkeypatch.setitem(METHODS, "front*", Star)


def setting(pruning: str, model: ModelSettings | None = None, **writing) -> Setting:
    usual = Setting().writing
    return Setting(model or ModelSettings(), replace(usual, pruning=pruning, **writing))


SPECS = [
    "twig", "front", "front*", "front:version=1.0,faithful", "front:faithful", "front:version=1.0", "front:keep=288+twig",
    "front+twig", "front:keep=28+twig:query=text", "front:file=/a/b.json", "front:file=/a-b.json", "front:file=" + "x" * 300,
    "front:file=" + "x" * 301, "twig:query=text", "fastv:layer=3", "front:file=ümlaut", "front:file=a b",
]  # fmt: skip


def test_folders_are_legal_and_distinct():
    names = {spec: setting(spec).name for spec in SPECS}
    for spec, name in names.items():
        assert LEGAL.fullmatch(name) and len(name.encode()) < 140, (spec, name)
    assert len(set(map(str.casefold, names.values()))) == len(SPECS)
    assert names["twig"] == "twig-R64" and names["front:faithful"] == "front~faithful-R64"
    assert names["front:keep=288+twig"] == "front~keep=288+twig-R64"
    assert file_name("sparsevlm:version=1.0,faithful") == "sparsevlm~version=1.0,faithful"


def test_one_method_has_one_folder_however_it_is_written():
    one, other = setting("front:version=1.0,faithful"), setting("front:faithful;version=1")
    assert one.name == other.name and one.method == other.method
    assert one.identity("gqa", "s", []) == other.identity("gqa", "s", [])
    assert setting("twig:query=last").name == setting("twig").name
    assert setting("twig:query=text").method == "twig:query=text+SSD"


def test_who_needs_a_twig_is_asked_of_the_plan():
    bare = ModelSettings("/nowhere/llava")
    for spec in ("twig", "twig:query=text", "front+twig", "front:keep=9+twig"):
        with pytest.raises(InputError, match=r"needs one; give --twig-block"):
            setting(spec, bare)
        assert setting(spec, replace(bare, twig="/nowhere/twig")).speculation
    for spec in ("front", "fastv", "front+fastv", "random"):
        assert not setting(spec, bare).speculation


def test_whatever_draws_has_its_seed_in_name_and_identity():
    for spec in ("front", "random", "front+twig"):
        assert setting(spec, seed=3).name.endswith("-seed3")
        assert setting(spec, seed=3).identity("gqa", "s", [])["seed"] == 3
    assert setting("fastv", seed=3).name == "fastv-R64" and "seed" not in setting("fastv", seed=3).identity(
        "g", "s", []
    )


def test_unknown_ones_are_refused_when_they_are_asked_for():
    for spec, words in (
        ("oak", "known methods"),
        ("front:tall", "has no setting 'tall'"),
        ("twig+front", "in this order"),
    ):
        with pytest.raises(InputError, match=words):
            setting(spec)


def test_lmms_evals_options_take_settings():
    """Its model_args are split at commas, so that settings are separated by semicolons there."""
    options = Options.read({"pruning": "front:version=1.0;faithful", "R": "64"})
    assert setting(options.writing["pruning"]).name == setting("front:version=1.0,faithful").name
    with pytest.raises(InputError, match="semicolon"):
        Options.read({"pruning": "front:version=1.0", "faithful": "", "R": "64"})
