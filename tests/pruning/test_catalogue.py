"""The catalogue says of each method what its class and its plans say, and how methods are written is one thing everywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import pytest
from conftest import ROOT

from twigvlm.errors import InputError
from twigvlm.pruning import METHODS, Keep, Method, Plan, Probe, Shape, catalogue, find_method, spec
from twigvlm.pruning.catalogue import compact, counted, describe, methods_of, reach
from twigvlm.pruning.spec import LLAVA, needs_of, some_plan, spec_of


@dataclass(frozen=True)
class Halver(Method):
    """Keeps half before layer 4; its authors count what leaves a layer. R = 324 and nothing else."""

    name: ClassVar[str] = "halver"
    paper: ClassVar[str] = "none: of a test"
    summary: ClassVar[str] = "half, once"
    level: int = 1
    faithful: bool = False

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        return Fraction(324), Fraction(324)

    def plan(self, R: float, shape: Shape) -> Plan:
        if R != 324:
            raise InputError(f"halver is for R = 324, not {R:g}")
        return Plan(((4, Keep(shape.V // 2, shape.V, Probe("twig", "last"))),))

    def authors(self, entering):
        return sum([*entering[1:], entering[-1]]) / len(entering)


@pytest.fixture
def halver(monkeypatch) -> Halver:
    monkeypatch.setitem(METHODS, "halver", Halver)
    return Halver()


def call(capsys, *argv: str) -> tuple[int, str, str]:
    code = catalogue.main(list(argv))
    return code, *capsys.readouterr()


def test_a_row_is_made_from_the_class_and_its_plan(halver):
    assert describe(halver) == {
        "method": "halver", "paper": "none: of a test", "in one line": "half, once", "acts": "before layer 4",
        "needs": "twig", "trained": "no", "settings": "level=1, faithful",
    }  # fmt: skip


def test_schedules_and_the_authors_own_count(halver):
    assert counted(reach(halver, 324, LLAVA)) == "576×4 288×28 [315.0]"
    assert counted(reach(halver, 64, LLAVA)) == "not: halver is for R = 324, not 64"
    assert counted(reach(METHODS["fastv"](), 64, LLAVA)) == "576×2 30×30"
    assert compact([5, 5, 3, 0, 0]) == "5×2 3×1 0×2" and compact([]) == ""


@pytest.mark.parametrize("form", [(), ("--markdown",)])
def test_every_method_stands_in_both_tables(capsys, form):
    code, out, _ = call(capsys, *form, "-R", "192,100")
    names = [re.match(r"[|` ]*([\w*-]+)", line)[1] for line in out.splitlines() if re.match(r"[|` ]*[a-z]", line)]
    assert code == 0 and "R = 192" in out and "R = 100" in out and "R = 64" not in out
    for name in METHODS:
        assert names.count(name) == 2, name


@pytest.mark.parametrize(("page", "whole"), [("README.md", False), ("docs/methods.md", True)])
def test_the_pages_hold_what_the_command_prints(capsys, page, whole):
    _, out, _ = call(capsys, "--markdown")
    text = (ROOT / page).read_text("utf-8").split("<!-- catalogue -->\n")[1].split("\n<!-- end of catalogue -->")[0]
    assert text == (out.rstrip("\n") if whole else catalogue.in_short()), (
        "python -m twigvlm.sprout.publish --methods-only"
    )
    assert all(f"`{name}`" in text for name in METHODS)


def test_every_row_is_filled():
    for kind in METHODS.values():
        row = describe(kind())
        for column in ("paper", "in one line", "acts"):
            assert row[column] and "\n" not in row[column], (kind.name, column)
        assert row["acts"] != "nowhere", kind.name
        assert set(filter(None, row["needs"].split(", "))) <= {
            "twig",
            "class token",
            "text tower",
            "calibration",
            "tuned projector",
        }


def test_what_is_no_budget(capsys):
    for text in ("much", ",", "64;32"):
        with pytest.raises(SystemExit) as end:
            catalogue.main(["-R", text])
        assert end.value.code == 2 and "192,128,64" in capsys.readouterr().err


# ---------------------------------------------------------------------- how methods are written


@pytest.mark.parametrize(
    ("written", "one_way"),
    [
        ("halver", "halver"),
        ("halver:level=1", "halver"),
        ("halver:faithful,level=2", "halver:level=2,faithful"),
        ("halver:level=2;faithful", "halver:level=2,faithful"),  # where a comma separates something else
        ("halver: level = 3 ", "halver:level=3"),
        ("halver:faithful=false,count=authors", "halver:count=authors"),
        ("twig:query=last", "twig"),
        ("twig:query=text", "twig:query=text"),
    ],
)
def test_one_way_to_write_it(halver, written, one_way):
    assert spec_of(find_method(written)) == one_way
    assert find_method(one_way) == find_method(written)


def test_a_query_given_elsewhere_is_no_setting():
    assert spec_of(find_method("twig", "text"), "text") == "twig"
    assert spec_of(find_method("twig:query=last", "text"), "text") == "twig:query=last"


def test_a_list_of_methods_and_of_their_settings(halver):
    text = "fastv:layer=3,twig,halver:level=2,faithful,pdrop"
    assert methods_of(text) == ["fastv:layer=3", "twig", "halver:level=2,faithful", "pdrop"]
    assert methods_of("twig, twig,") == ["twig"]
    for wrong, words in (
        ("twig,oak", ("'oak'", "known methods", "fastv")),
        ("halver:level=2,tall", ("'tall'", "faithful")),
        (",", ("no method", "twig")),
    ):
        with pytest.raises(InputError) as error:
            methods_of(wrong)
        assert all(word in str(error.value) for word in words)


def test_needs_are_those_of_the_plan(halver):
    assert needs_of(halver) == needs_of(METHODS["twig"]()) == ["twig"]
    assert needs_of(METHODS["fastv"]()) == needs_of(METHODS["random"]()) == []


def test_what_no_budget_can_reach_has_the_empty_plan(halver):
    assert some_plan(halver).stages
    assert some_plan(METHODS["fastv"](layer=99)) == Plan()
    assert spec.needs_of(METHODS["fastv"](layer=99)) == []
