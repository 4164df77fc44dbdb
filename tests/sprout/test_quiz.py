"""What descriptions say of drafts, and how the figures of TwigVLM++'s stages are shown."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from twigvlm.errors import InputError
from twigvlm.sprout import plus, publish, quiz, report
from twigvlm.world.scenes import sample_scene


@pytest.mark.parametrize("accepted, tau", [(0, 1), (8, 3)])
def test_what_a_verification_of_a_description_yields(monkeypatch, accepted, tau):
    """The end token is not written, and its verification counts like the others."""
    stats = SimpleNamespace(drafted=10, accepted=accepted, steps=4, new_tokens=3 + accepted)
    out = SimpleNamespace(tokens=[[]], stats=stats, steps=[[None] * 4])
    monkeypatch.setattr(quiz, "_described", lambda *_: out)
    monkeypatch.setattr(quiz, "decode", lambda *_: "")
    scenes = [sample_scene("test", seed) for seed in range(3)]
    assert quiz.descriptions(SimpleNamespace(tokenizer=None), scenes, quiz.Setting()).tau == tau


def studied(twig: str, R: float | None, **other) -> dict:
    """A row of a study."""
    found = dict.fromkeys(("RelAcc", "descriptions", "acceptance", "tau", "speed"), float(R or 576))
    return {"twig": twig, "R": R, "RelAcc, 95 %": [0.0, 600.0], "descriptions, 95 %": [0.0, 600.0]} | found | other


ROWS = [studied(twig, R) for twig in ("stage 1", "twig") for R in (None, 64, 192, 128.5)]


def test_a_line_a_twig_with_every_budget_beside_each_other():
    head, _, *lines = ([c.strip() for c in one.strip("|").split("|")] for one in plus.side_by_side(ROWS).splitlines())
    budgets = ["192", "128.5", "64"]
    assert head == [
        "twig",
        *(f"{what} R={R}" for what in ("RelAcc", "right descriptions") for R in budgets),
        *(f"{what} R=64" for what in ("acceptance", "tau", "speed")),
    ]
    numbers = ["192.0", "128.5", "64.0"]
    assert lines == [[twig, *numbers, *numbers, *["64.0"] * 3] for twig in ("stage 1", "twig")]


def test_the_paper_has_static_budgets_before_the_dynamic_one():
    names = [recipe.name for recipe in plus.choose(options=False)]
    static = [f"stage 2, static R={R}" for R in (192, 128, 64)]
    assert names == ["twig", "stage 1", *static, "stage 2, dynamic"]


def test_a_plot_of_all_figures_against_r(tmp_path, monkeypatch):
    """Also of rows without an interval or without drafts."""
    from matplotlib import pyplot as plt

    rows = [*ROWS, studied("undrafted", 64, acceptance=None)]
    monkeypatch.setattr(plt, "close", lambda _: None)
    plus.plot(rows, tmp_path / "plus.png")
    figure = plt.gcf()
    monkeypatch.undo()
    plt.close(figure)
    *panels, corner = figure.axes
    assert [axes.get_ylabel() for axes in panels] == list(plus.PANELS.values())
    assert [text.get_text() for text in corner.get_legend().get_texts()] == ["stage 1", "twig", "undrafted"]
    assert (tmp_path / "plus.png").stat().st_size > 10_000


def test_studies_that_were_published_are_shown_both_ways():
    text = publish._stages(publish.RESULTS)
    for file in publish.RESULTS.glob("plus*.json"):
        rows = json.loads(file.read_text())["rows"]
        assert text.index(plus.side_by_side(rows)) < text.index(plus.shown({"rows": rows}))


@pytest.mark.parametrize("text", ["", ",", " , ", "many"])
def test_budgets_that_are_no_numbers(text):
    with pytest.raises(InputError, match="numbers with commas between are needed"):
        report.budgets(text)
