"""The table: means over the same benchmarks of the same questions, published rows never mistaken for measured ones."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest

from twigvlm.errors import InputError
from twigvlm.evaluation import table
from twigvlm.evaluation.table import Table, collect, find_results, plot
from twigvlm.evaluation.tasks import TASKS
from twigvlm.evaluation.tasks.published import BASE, ROWS, SIX

SETTINGS = {
    "base": ("base", None),
    "twig-R64": ("TTP+SSD", 64.0),
    "twig-R192": ("TTP+SSD", 192.0),
    "ssd": ("SSD only", None),
}


def result(root: Path, task: str, setting: str, score: float | None, speed: float = 10.0, **more) -> Path:
    """A result.json where the runner would write it."""
    method, R = SETTINGS.get(setting.split("-first")[0], ("base", None))
    facts = {
        "task": task, "split": "test", "model": "sprout", "setting": setting, "method": method, "R": R, "score": score,
        "questions": 9, "limit": None, "tokens_per_second": speed, "visual_measured": R or 576, "acceptance": None,
        "configuration": {"identity": {"questions": f"of {task}"}},
    }  # fmt: skip
    file = root / task / "answers" / "test" / "sprout" / setting / "result.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts | more))
    return file


@pytest.fixture
def runs(tmp_path) -> Path:
    for task, base, small, large in (("gqa", 60.0, 54.0, 60.0), ("mme", 1800.0, 1710.0, 1800.0)):
        result(tmp_path, task, "base", base)
        result(tmp_path, task, "twig-R64", small, 14.0)
        result(tmp_path, task, "twig-R192", large, 12.0)
    result(tmp_path, "mmvet", "base", None, 40.0, tokens_per_second_per_sample=40.0)
    result(tmp_path, "mmvet", "twig-R64", None, 66.0, tokens_per_second_per_sample=60.0)
    result(tmp_path, "mmvet", "twig-R192", None, 50.0, tokens_per_second_per_sample=44.0)
    return tmp_path


def call(capsys, *flags) -> tuple[int, str, str]:
    code = table.main([str(flag) for flag in flags])
    return code, *capsys.readouterr()


def narrow(out: str) -> list[str]:
    """The rows of a table without the spaces that make columns equally wide."""
    return [re.sub(r" +", " ", line) for line in out.splitlines()]


def test_one_row_per_method_and_R(runs, capsys):
    code, out, _ = call(capsys, runs)
    rows = [line for line in narrow(out) if line.startswith("|")]
    assert code == 0
    assert rows[0] == "| method | R | measured | GQA | MME | RelAcc | RelSpd | accepted |"
    assert rows[2:] == [
        "| base | all | 576.0 | 60.0 | 1800 | 100.0 | 100.0 | |",
        "| TTP+SSD | 192 | 192.0 | 60.0 | 1800 | 100.0 | 110.0 | |",
        "| TTP+SSD | 64 | 64.0 | 54.0 | 1710 | 92.5 | 150.0 | |",  # (0.9 + 0.95) / 2; 60 / 40 on MM-Vet
    ]


def test_without_mm_vet_speed_is_a_mean_and_says_so(runs, capsys):
    _, out, _ = call(capsys, runs / "gqa", runs / "mme", "--format", "json")
    found = json.loads(out)
    assert found["rows"][2]["RelSpd"] == pytest.approx(140) and "MM-Vet" in found["notes"][0]


def test_csv_holds_the_numbers_unrounded(runs, capsys):
    result(runs, "gqa", "twig-R64", 54.321)
    _, out, _ = call(capsys, runs, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert float(rows[2]["GQA"]) == 54.321 and rows[0]["R"] == ""
    assert float(rows[2]["RelAcc"]) == pytest.approx(100 * (54.321 / 60 + 0.95) / 2)


def test_latex(runs, capsys):
    _, out, _ = call(capsys, runs, "--format", "latex")
    assert out.startswith("\\begin{tabular}{lrrrrrrr}") and "\\end{tabular}" in out
    assert " TTP+SSD & 64 & 64.0 & 54.0 & 1710 & 92.5 & 150.0 & \\\\" in narrow(out)


def test_published_rows_are_marked(runs, capsys):
    _, out, _ = call(capsys, runs, "--published")
    rows = [line for line in narrow(out) if line.startswith("|")][2:]
    marked = [row for row in rows if "(published)" in row]
    assert len(rows) == 3 + len(ROWS) and len(marked) == len(ROWS) and "not measured here" in out
    assert not any("published" in row for row in rows[:3])
    assert any("| TwigVLM | 64 | | 58.8 | 60.4 | 1760 | 55.8 |" in row and "| 96.0 | 153.6 |" in row for row in marked)
    _, out, _ = call(capsys, runs, "--published", "--format", "json")
    assert {row["source"].split(",")[0] for row in json.loads(out)["rows"]} == {"measured", "published"}


def test_published_means_follow_from_published_scores():
    for row in ROWS:
        if row.scores and row.R:
            mean = 100 * sum(row.scores[task] / BASE.scores[task] for task in SIX) / len(SIX)
            assert mean == pytest.approx(row.rel_acc, abs=0.35), row  # the paper rounds its scores


def test_a_row_that_lacks_a_benchmark_has_no_mean(runs, capsys):
    (runs / "mme" / "answers" / "test" / "sprout" / "twig-R64" / "result.json").unlink()
    _, out, _ = call(capsys, runs)
    row = next(line for line in narrow(out) if line.startswith("| TTP+SSD | 64"))
    assert row == "| TTP+SSD | 64 | 64.0 | 54.0 | | | 150.0 | |" and "no RelAcc for twig-R64: without mme" in out


def test_another_baseline(runs, tmp_path, capsys):
    other = tmp_path / "other"
    for task in ("gqa", "mme"):
        result(other, task, "base", 50.0 if task == "gqa" else 1800.0)
    _, out, _ = call(capsys, runs / "gqa", runs / "mme", "--baseline", other, "--format", "json")
    assert json.loads(out)["rows"][0]["RelAcc"] == pytest.approx(110)


def test_without_a_baseline_there_is_no_ratio(runs, capsys):
    _, out, _ = call(capsys, *runs.glob("*/answers/*/*/twig-R64"), "--format", "json")
    (row,) = json.loads(out)["rows"]
    assert row["RelAcc"] is None and row["RelSpd"] is None and row["GQA"] == 54


def test_limited_runs_are_rows_of_their_own_with_their_own_baseline(runs, capsys):
    result(runs, "gqa", "base-first4", 80.0, limit=4)
    result(runs, "gqa", "twig-R64-first4", 40.0, limit=4)
    _, out, _ = call(capsys, runs / "gqa", "--format", "json")
    rows = {row["method"] + str(row["R"]): row["RelAcc"] for row in json.loads(out)["rows"]}
    assert rows["TTP+SSD, first 4 questions64.0"] == 50 and rows["TTP+SSD64.0"] == 90


def test_a_column_says_which_part_of_the_benchmark_its_score_is_of(runs, capsys):
    result(runs, "pope", "base", 80.0, metric="F1 of adversarial, %")
    _, out, _ = call(capsys, runs)
    assert "POPE (F1 of adversarial)" in narrow(out)[0]
    result(runs, "pope", "twig-R64", 80.0, metric=TASKS["pope"].metric)
    _, out, _ = call(capsys, runs)
    assert "POPE (F1 of adversarial; mean F1 of three settings)" in narrow(out)[0]


def test_two_splits_are_two_columns(runs, capsys):
    file = result(runs, "gqa", "base", 70.0)
    other = file.parents[3] / "dev" / "result.json"
    other.parent.mkdir()
    other.write_text(json.dumps(json.loads(file.read_text()) | {"split": "dev"}))
    _, out, _ = call(capsys, runs)
    assert "GQA (dev) | GQA (test)" in narrow(out)[0]


def test_what_is_refused(runs, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    double = tmp_path / "double"
    result(double, "gqa", "base", 1.0)
    broken = tmp_path / "broken" / "result.json"
    broken.parent.mkdir()
    for content, places, words in (
        ("{", [broken.parent], "cannot be read"),
        ('{"score": 1}', [broken.parent], "lacks task"),
        ("[1]", [broken.parent], "no object"),
        ("", [empty], "no result.json"),
        ("", [tmp_path / "nowhere"], "no result.json"),
        ("", [runs / "gqa", double], "two results for gqa"),
    ):
        broken.write_text(content or "{}")
        code, out, err = call(capsys, *places)
        assert code == 2 and not out and err.startswith("error: ") and words in err


def test_other_questions_do_not_compare(runs):
    changed = {"configuration": {"identity": {"questions": "others"}}}
    result(runs, "gqa", "twig-R64", 54.0, **changed)
    with pytest.raises(InputError, match="not asked the same questions"):
        Table(collect(find_results([runs]))).render()


def test_plots(runs, tmp_path, capsys):
    code, _, err = call(capsys, runs, "--plots", tmp_path / "plots")
    names = {file.name for file in (tmp_path / "plots").glob("*.png")}
    assert code == 0 and {"accuracy_gqa_test.png", "accuracy_mme_test.png", "relacc_speed.png"} <= names
    assert all(file.stat().st_size > 5000 for file in (tmp_path / "plots").glob("*.png")) and "plot:" in err
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        plot(Table(collect(find_results([runs]))), tmp_path / "file")


def test_without_tabulate_numbers_are_told_all_the_same(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    code, out, err = call(capsys, runs, "--plots", tmp_path / "plots")
    assert code == 2 and not out and err.splitlines()[-1].startswith("error: ") and "pip install tabulate" in err
    assert (tmp_path / "plots" / "relacc_speed.png").exists()
    for form in ("csv", "json"):
        assert call(capsys, runs, "--format", form)[0] == 0


def test_letters_of_markdown_and_latex_in_a_name_are_no_table(runs, capsys):
    result(runs, "gqa", "base", 60.0, model="a|b_c")
    markdown, latex = (call(capsys, runs / "gqa", "--format", form)[1] for form in ("markdown", "latex"))
    assert "a\\|b_c" in markdown and "a|b\\_c" in latex


def test_unknown_options(capsys):
    with pytest.raises(SystemExit) as end:
        table.main(["--sideways"])
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err
