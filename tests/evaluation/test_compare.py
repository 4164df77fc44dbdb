"""The comparison: every method beside the base, nothing asked twice, nothing left out without a word."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from argparse import Namespace
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tests.evaluation.conftest import QUESTIONS, Runner, script, write_data
from twigvlm.errors import InputError
from twigvlm.evaluation import compare, run
from twigvlm.evaluation.asking import ask
from twigvlm.evaluation.asking.ask import Asker
from twigvlm.evaluation.comparing import shown, spread
from twigvlm.evaluation.comparing.entries import Entry
from twigvlm.evaluation.comparing.rows import Measured, _named
from twigvlm.evaluation.comparing.shown import AXES, _measured, legend, markdown, short
from twigvlm.evaluation.comparing.spread import Blocks, blocks_of, interval
from twigvlm.evaluation.run import Models
from twigvlm.evaluation.tasks import TASKS, published
from twigvlm.evaluation.tasks.base import Question, Score
from twigvlm.evaluation.tasks.literature import ROWS, SOURCES, model_of, reported
from twigvlm.pruning import METHODS, Keep, Method, Plan, Shape


class Comparer:
    """The command in this process, on the tiny model and data."""

    def __init__(self, model, data: Path, out: Path, capsys):
        base, twig = model
        self.out, self.capsys, self.folder = out, capsys, out / "report"
        self.flags = [
            "--base-model",
            base,
            "--twig-block",
            twig,
            "--data",
            str(data),
            "--device",
            "cpu",
            "--workers",
            "0",
        ]
        self.flags += ["--max-new-tokens", "6", "--benchmarks", "gqa", "--out", str(out / "answers")]
        self.flags += ["--report", str(self.folder), "--methods", "twig,fastv", "-R", "2"]

    def __call__(self, *flags: str) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = compare.main([*self.flags, *flags])
        return code, *self.capsys.readouterr()

    def done(self, *flags: str, code: int = 0) -> dict:
        found, _, err = self(*flags)
        assert found == code, err
        return self.read()

    def read(self) -> dict:
        return json.loads((self.folder / "comparison.json").read_text())


@pytest.fixture(scope="session")
def spoken(model, tmp_path_factory) -> dict[str, str]:
    """What the base alone says to the tiny data, by question."""
    folder = tmp_path_factory.mktemp("spoken")
    flags = [*Runner(model, write_data(folder / "data"), None).flags, "--baseline", "--answer-only"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert run.main(["--task", "gqa", *flags, "--out", str(folder / "out")]) == 0
    (file,) = folder.glob("out/answers/*/*/*/1_0.jsonl")
    return {row["question_id"]: row["text"] for row in map(json.loads, file.read_text().splitlines())}


@pytest.fixture
def comparer(model, data, tmp_path, capsys, spoken, monkeypatch) -> Comparer:
    """The base is right in three of four questions. Nothing is drawn, which would take most of the time."""
    monkeypatch.setattr(shown, "AXES", ())
    file = data / "gqa" / "data" / "testdev_balanced_questions.json"
    truth = json.loads(file.read_text())
    for number, (name, text) in enumerate(spoken.items()):
        truth[name]["answer"] = text.rstrip(".").lower() if number % 4 else "never"
    file.write_text(json.dumps(truth))
    return Comparer(model, data, tmp_path, capsys)


def rows_of(found: dict) -> dict[tuple[str, float | None], dict]:
    return {(row["method"], row["R"]): row for row in found["rows"] if row["source"] == "measured"}


# ---------------------------------------------------------------------- a whole comparison


def test_every_row_says_everything(comparer):
    found = comparer.done("-R", "2,4")
    rows = rows_of(found)
    assert list(rows) == [
        ("unpruned", None), ("unpruned + drafts", None), ("twig", 2.0), ("twig + drafts", 2.0), ("fastv", 2.0), ("fastv", 4.0),
    ]  # fmt: skip
    for row in rows.values():
        assert row["scores"]["gqa"] is not None and row["batch"] == [8] and row["questions"] == QUESTIONS
        for name in (
            "measured",
            "prefill_ms",
            "decode_tokens_per_second",
            "RelSpd",
            "cache_bytes",
            "flops",
            "computed_cache_bytes",
        ):
            assert row[name] > 0, name
    base, twig, drafts, fastv = (rows[k] for k in (("unpruned", None), ("twig", 2), ("twig + drafts", 2), ("fastv", 2)))
    assert base["scores"]["gqa"] == 75 and base["RelAcc"] == base["RelSpd"] == 100 and base["interval"] is None
    low, high = twig["interval"]
    assert low <= twig["RelAcc"] <= high and rows["fastv", 4.0]["interval"] == [100, 100]
    assert base["RelAcc"] == base["RelSpd"] == 100 and base["schedule"] == "4×6" and base["measured"] == 4
    assert fastv["flops"] < base["flops"] and fastv["computed_cache_bytes"] < base["computed_cache_bytes"]
    assert twig["schedule"] == "4×2 2×2 0×2" and twig["measured"] == twig["authors"] == 2
    assert fastv["schedule"] == "4×2 1×4" and twig["accepted"] is None and drafts["accepted"] is not None
    assert drafts["scores"] == twig["scores"] and rows["fastv", 4.0]["scores"] == base["scores"]
    (refused,) = found["refused"]
    assert (
        (refused["method"], refused["R"], refused["failed"]) == ("twig", 4, False) and "legal" in refused["reason"]
    ) or refused["reason"]
    assert found["settings"]["methods"] == ["twig", "fastv"] and found["command"] and found["commit"]


def test_the_table_and_the_plots(comparer, monkeypatch):
    monkeypatch.setattr(shown, "AXES", AXES)
    code, out, _ = comparer("-R", "2,4")
    text = (comparer.folder / "comparison.md").read_text()
    assert (
        code == 0
        and "| fastv " in text
        and "4×2 1×4" in text
        and "- `twig`, R = 4: " in text
        and "95 % interval" in text
    )
    for name in ("relacc_R.png", "relacc_speed.png", "relacc_flops.png"):
        assert (comparer.folder / name).stat().st_size > 5000
        assert f"report: {comparer.folder / name}" in out


def test_the_legend_says_whose_times_they_are():
    assert "of MM-Vet's answers, asked one by one" in legend({"rows": [{"timed": ["MM-Vet"]}]})
    assert "of whole batches" in legend({"rows": [{"timed": []}, {}]})


def test_a_budget_that_varies_is_told_with_its_spread(comparer):
    row = Measured([Entry("mustdrop", 64.0)])
    row.add("gqa", {"visual_spread": {"sd": 8.0}}, None)
    row.add("mme", {"visual_spread": {"sd": 12.0}}, None)
    row.add("pope", {"visual_spread": None}, None)
    assert row.spread == 10
    assert _measured({"measured": 64.25, "spread": 10.0}) == "64.2 ± 10.0"
    assert _measured({"measured": 64.25, "spread": 0.0}) == _measured({"measured": 64.25}) == "64.2"
    found = rows_of(comparer.done("--methods", "mustdrop:threshold=0.1,individual=0.1,fastv"))
    row = found["mustdrop:threshold=0.1,individual=0.1", 2.0]
    assert row["schedule"] == "as many as it takes" and row["authors"] is row["flops"] is None and row["measured"] > 0


def test_the_short_table(comparer):
    found = comparer.done("-R", "2")
    text = short(found, ["unpruned", "fastv", "mustdrop", "twig"])
    first = [line.split("|")[1].strip() for line in text.splitlines()]
    assert first[0] == "method" and first[2:] == ["unpruned", "fastv", "twig"] and "RelAcc at R = 2" in text


def test_seeds_are_one_row_and_each_is_told(comparer):
    row = rows_of(comparer.done("--methods", "random", "--seeds", "3"))["random", 2.0]
    assert row["seeds"] == [0, 1, 2] and len(row["by_seed"]) == 3
    assert row["RelAcc"] == pytest.approx(sum(row["by_seed"]) / 3)
    answers = {folder.name for folder in comparer.out.glob("answers/gqa/answers/*/*/random-*")}
    assert answers == {"random-R2-plain@twig", "random-R2-plain-seed1@twig", "random-R2-plain-seed2@twig"}


def test_methods_with_settings(comparer):
    rows = rows_of(comparer.done("--methods", "fastv:layer=1,count=authors,twig:query=text,fastv"))
    assert {name for name, _ in rows} >= {"fastv:layer=1,count=authors", "twig:query=text", "fastv"}


def test_a_base_without_a_twig_says_what_it_cannot(comparer):
    at = comparer.flags.index("--twig-block")
    del comparer.flags[at : at + 2]
    found = comparer.done()
    assert list(rows_of(found)) == [("unpruned", None), ("fastv", 2.0)]
    assert [(one["method"], "--twig-block" in one["reason"]) for one in found["refused"]] == [("twig", True)]


def test_a_partial_score_is_marked(comparer):
    code, out, err = comparer("--methods", "fastv", "--limit", "4")
    assert code == 0, err
    assert (
        f"GQA (first 4 of {QUESTIONS})" in out
        and f"GQA (first 4 of {QUESTIONS})" in (comparer.folder / "comparison.md").read_text()
    )
    _, out, _ = comparer("--methods", "fastv")
    assert "GQA" in out and "first 4" not in out


def test_a_limit_for_what_is_timed_alone(comparer):
    args = compare.parse([*comparer.flags, "--benchmarks", "gqa,mmvet", "--limit", "6", "--speed-limit", "2"])
    shutil.copytree(Path(args.data) / "gqa", Path(args.data) / "mm-vet")
    jobs = compare.Comparison(args).every
    assert {(job.task.name, job.setting.limit) for job in jobs} == {("gqa", 6), ("mmvet", 2)}


# ---------------------------------------------------------------------- going on


def test_what_is_answered_is_not_asked_again(comparer, asked, monkeypatch):
    """The second table comes from the answers alone: no model is opened."""
    first = comparer.done()
    assert len(asked) == 5 * QUESTIONS
    with monkeypatch.context() as patch:
        patch.setattr(Models, "get", lambda *_: pytest.fail("opened the model"))
        second = comparer.done()
    assert first["rows"] == second["rows"] and len(asked) == 5 * QUESTIONS
    comparer.done("--methods", "twig,fastv,pdrop")
    assert len(asked) == 6 * QUESTIONS


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_stop_loses_nothing_and_asks_nothing_twice(comparer, asked, monkeypatch, number):
    answer, calls = Asker._answer, []

    def stopping(self, ready):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), getattr(signal, number))
        return answer(self, ready)

    with monkeypatch.context() as patch:
        patch.setattr(Asker, "_answer", stopping)
        code, _, err = comparer("--batch-size", "4")
    assert code == 128 + getattr(signal, number) and "28 of 100 answers are written" in err
    assert not (comparer.folder / "comparison.json").exists()
    comparer.done("--batch-size", "4")
    assert len(asked) == 5 * QUESTIONS


def test_all_methods_are_asked_of_the_embedded_model():
    """Also the one whose text tower it lacks: by its stand-in; of another model, which may have it, as it is."""
    assert compare.parse([]).methods == [*(m if m != "cdpruner" else "cdpruner:stand_in" for m in METHODS)]
    assert compare.parse(["--base-model", "liuhaotian/llava-v1.5-7b"]).methods == list(METHODS)


def test_a_table_of_what_is_answered(comparer, monkeypatch):
    """Nothing is asked for it, and what is not answered yet is listed, with how far it is."""
    comparer.done("--methods", "fastv")
    (answers,) = comparer.out.glob("answers/gqa/answers/*/*/fastv-*/1_0.jsonl")
    rows = answers.read_bytes().splitlines(keepends=True)
    with monkeypatch.context() as patch:
        patch.setattr(Models, "get", lambda *_: pytest.fail("opened the model"))
        found = comparer.done("--recorded", "--methods", "fastv,twig", "-R", "2,4")
        assert [row for row, _ in rows_of(found)] == ["unpruned", "unpruned + drafts", "fastv"]
        told = {(one["method"], one["R"]): one["reason"] for one in found["refused"]}
        assert set(told) == {("twig", 2.0), ("twig + drafts", 2.0), ("twig", 4.0), ("fastv", 4.0)}
        assert "0 of 20 answers" in told["twig", 2.0]
        answers.write_bytes(b"".join(rows[:7]))
        found = comparer.done("--recorded", "--methods", "fastv")
        assert "7 of 20 answers" in found["refused"][0]["reason"] and ("fastv", 2.0) not in rows_of(found)


# ---------------------------------------------------------------------- what goes wrong


@dataclass(frozen=True)
class Broken(Method):
    """Plans well, and cannot be carried out."""

    name: ClassVar[str] = "broken"
    paper: ClassVar[str] = "none: of a test"
    summary: ClassVar[str] = "goes wrong"
    polite: bool = False
    late: bool = False

    def legal(self, shape: Shape):
        return Fraction(0), Fraction(shape.V)

    def plan(self, R: float, shape: Shape) -> Plan:
        return Plan(((0, Fails(1, shape.V, polite=self.polite, late=self.late)),))


@dataclass(frozen=True)
class Fails(Keep):
    polite: bool = False
    late: bool = False
    seen: ClassVar[list] = []

    def __call__(self, seen):
        if self.polite:
            raise InputError("this method asks for a text tower, and there is none")
        self.seen.append(1)
        if self.late and len(self.seen) <= 2:  # the trial and the first batch
            return super().__call__(seen)
        raise RuntimeError("out of luck")


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setitem(METHODS, "broken", Broken)
    monkeypatch.setattr(Fails, "seen", [])


@pytest.mark.parametrize("spec", ["broken", "broken:late"])
def test_a_method_that_fails_stops_no_other(comparer, broken, spec):
    code, out, err = comparer("--methods", f"{spec},fastv")
    found = comparer.read()
    assert code == 1 and "out of luck" in err and f"error: {spec} R=2" in err
    assert list(rows_of(found))[-1] == ("fastv", 2.0)
    assert [(r["method"], r["failed"], r["reason"]) for r in found["refused"]] == [
        (spec, True, "RuntimeError: out of luck")
    ]
    assert f"`{spec}`, R = 2: failed: RuntimeError: out of luck" in out


def test_what_the_model_cannot_do_is_listed_and_is_no_failure(comparer, broken):
    found = comparer.done("--methods", "broken:polite,fastv")
    assert [(r["method"], r["failed"]) for r in found["refused"]] == [("broken:polite", False)]
    assert "text tower" in found["refused"][0]["reason"] and ("fastv", 2.0) in rows_of(found)


def test_a_broken_picture_is_told_and_the_rest_is_compared(comparer, data):
    (data / "gqa" / "data" / "images" / "2.jpg").write_bytes(b"no picture")
    code, _, err = comparer()
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and "question 102" in err
    rows = rows_of(comparer.done("--skip-broken"))
    assert len(rows) == 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--methods", "twig,oak"), ("'oak'", "known methods", "fastv")),
        (("--methods", "fastv:depth=3"), ("no setting 'depth'", "layer=2")),
        (("-R", "many"), ("'many'", "192,128,64")),
        (("--benchmarks", "gqa,quiz"), ("quiz",)),
        (("--benchmarks", "vqa"), ("no benchmark",)),
        (("--seeds", "0"), ("--seeds is 0",)),
        (("--limit", "0"), ("--limit is 0",)),
        (("--speed-limit", "-1"), ("--speed-limit is -1",)),
        (("--calibrate", "0"), ("--calibrate is 0",)),
        (("--draft-length", "-1"), ("draft", "-1")),
        (("-R", "0"), ("-R is 0", "more than 0")),
        (("-R", "2,nan"), ("-R is nan",)),
        (("-R", "9999"), ("-R is 9999", "at most")),
        (("-R", "0.01"), ("-R 0.01", "none of the methods")),
        (("--report", "/dev/null/x"), ("--report /dev/null/x", "/dev/null cannot be written to")),
        (("--out", "/proc/x"), ("--out /proc/x",)),
    ],
)
@pytest.mark.parametrize("methods", [(), ("--methods", "fastv,mustdrop", "--calibrate", "2")])
def test_impossible_wishes_are_refused_before_anything_is_opened(comparer, monkeypatch, flags, words, methods):
    """Nor is anything calibrated, which opens the model too."""
    monkeypatch.setattr(Models, "get", lambda *_: pytest.fail("opened the model"))
    monkeypatch.setattr(ask, "open_model", lambda *_: pytest.fail("opened the model"))
    if methods and flags == ("-R", "0.01"):
        return  # what mustdrop leaves only the model can tell
    try:
        code, _, err = comparer(*methods, *flags)
    except SystemExit as end:
        code, err = end.code, comparer.capsys.readouterr().err
    assert code == 2 and all(word in err for word in words), err
    assert not comparer.out.joinpath("answers").exists()


def test_a_report_that_cannot_be_written_is_known_before(comparer, monkeypatch):
    monkeypatch.setattr(Models, "get", lambda *_: pytest.fail("opened the model"))
    comparer.folder.write_text("a file")
    code, _, err = comparer()
    assert code == 2 and "--report" in err


@pytest.mark.slow
def test_shards_answer_and_the_launcher_makes_the_table(comparer):
    found = comparer.done("--num-shards", "2", "--methods", "fastv")
    alone = comparer.done("--methods", "fastv", "--out", str(comparer.out / "other"))
    assert {k: v["scores"] for k, v in rows_of(found).items()} == {k: v["scores"] for k, v in rows_of(alone).items()}


@pytest.mark.slow
@pytest.mark.nightly  # the pages' own command runs it as well
def test_the_script(model, data, tmp_path):
    out = script(
        "compare", "--methods", "fastv", "-R", "2", "--benchmarks", "gqa", "--limit", "4", "--out", str(tmp_path / "out"),
        "--report", str(tmp_path / "report"), MODEL=model[0], TWIG=model[1], DATA=str(data),
    )  # fmt: skip
    assert out.returncode == 0 and (tmp_path / "report" / "comparison.json").exists(), out.stderr


# ---------------------------------------------------------------------- intervals


def job(sizes: list[int], right: list[int], together: int = 1) -> Namespace:
    """A job whose score is the percentage of right answers; `sizes` questions a picture."""
    questions = [Question(str(i), "?", (f"{n}.png",)) for n, size in enumerate(sizes) for i in range(size)]

    def without(rows, gone):
        left = [r for i, r in enumerate(right) if i not in gone]
        return Score(100 * sum(left) / len(left))

    return Namespace(questions=questions, task=Namespace(together=together), score_without=without, folder=None)


@pytest.fixture
def read(monkeypatch):
    monkeypatch.setattr(spread, "read_lines", lambda _: [{}] * 7)


def measured(sizes: list[int], right: list[int]) -> Blocks:
    found = job(sizes, right)
    found.folder = Namespace(path=Path())
    return spread.measure(found, 100 * sum(right) / len(right))


def test_a_blocks_value_is_its_mean_where_the_score_is_one(read):
    found = measured([2, 1, 4], [1, 0, 1, 0, 0, 1, 1])
    assert found.sizes.tolist() == [2, 1, 4] and found.values == pytest.approx([50, 100, 50])


def test_the_same_answers_have_no_spread_and_others_have(read):
    one, other = measured([2, 1, 4], [1, 0, 1, 0, 1, 1, 1]), measured([2, 1, 4], [1, 0, 1, 0, 0, 1, 1])
    assert interval([(one, one)]) == (100, 100)
    low, high = interval([(other, one), (one, one)])
    assert low < 100 * (1 + (4 / 5)) / 2 < high <= 100.001
    assert interval([(other, one)]) == interval([(other, one)]), "the draws are the same every time"


def test_the_interval_is_that_of_a_bootstrap():
    """Against the textbook's: 400 questions, each its own block, of which the base has all right."""
    rng = np.random.default_rng(1)
    right = rng.random(400) < 0.8
    base = Blocks(np.ones(400), np.full(400, 100.0))
    low, high = interval([(Blocks(np.ones(400), 100.0 * right), base)])
    error = 100 * np.sqrt(0.8 * 0.2 / 400)
    assert 100 * right.mean() - low == pytest.approx(1.96 * error, rel=0.15)
    assert high - 100 * right.mean() == pytest.approx(1.96 * error, rel=0.15)


def test_questions_of_one_picture_are_one_block():
    assert blocks_of(job([2, 1, 3], [0] * 6)) == [[0, 1], [2], [3, 4, 5]]
    assert blocks_of(job([1, 1, 2], [0] * 4, together=2)) == [[0, 1], [2, 3]]
    assert len(blocks_of(job([1] * 1000, [0] * 1000))) == spread.BLOCKS


# ---------------------------------------------------------------------- published rows


def test_published_rows_stand_beside_and_are_marked(comparer):
    code, out, _ = comparer("--published", "-R", "2")
    assert code == 0
    marked = [row for row in comparer.read()["rows"] if row["source"] != "measured"]
    assert [(row["method"], row["R"]) for row in marked] == [("unpruned", None)], "there is none for R = 2"
    row = next(row for row in reported("fastv", 64.0, "llava-1.5-7b") if row.source == "twigvlm")
    assert row.scores["gqa"] == 44.1 and row.scores["pope"] == 55.6
    assert "| unpruned (published: TwigVLM, arXiv 2503.14075)" in out and " 61.9 " in out


def test_a_published_row_is_found_however_R_is_counted():
    assert _named(Entry("fastv:count=authors", 64.0)) == _named(Entry("fastv", 64.0)) == "fastv"
    assert _named(Entry("fastv:layer=3,count=authors", 64.0)) == "fastv:layer=3" and _named(Entry()) == "unpruned"
    assert _named(Entry("visionzip*:projector=/a/b", 64.0)) == "visionzip*"


def test_only_llava_1_5_7b_has_published_rows(comparer):
    assert {row["source"] for row in comparer.done()["rows"]} == {"measured"}
    for name in ("llava-v1.5-7b", "llava-1.5-7b-hf", "LLaVA-v1.5-7b"):
        assert model_of(name) == "llava-1.5-7b"
    for name in ("sprout", "llava-v1.5-13b", "base", "llava-v1.6-7b"):
        assert not model_of(name) and not list(reported("fastv", 64.0, model_of(name)))


def test_published_rows_hold_together():
    """Of known benchmarks and sources, with plausible numbers, and the same as in the paper's own table."""
    keys = [(row.method, row.R, row.source) for row in ROWS]
    assert len(set(keys)) == len(keys)
    for row in ROWS:
        assert row.source in SOURCES and row.R in (None, 192.0, 128.0, 64.0) and len(row.scores) >= 6
        assert set(row.scores) <= {*TASKS, "mme_perception"}
        for name, score in row.scores.items():
            assert (1000 < score < 1900) if name.startswith("mme") else (30 < score < 92), row
    by = {(row.method, row.R): row for row in ROWS if row.source == "twigvlm"}
    paper = {(row.method, row.R): row for row in published.ROWS}
    assert by["twig", 64.0].scores.items() >= paper["TwigVLM", 64].scores.items()


def test_a_table_without_tabulate_is_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tabulate", None)
    with pytest.raises(InputError, match="tabulate"):
        markdown({"rows": [{"source": "measured", "method": "a", "R": None, "measured": 1.0, "authors": None, "scores": {},
                            "RelAcc": None, "interval": None, "schedule": ""}], "refused": []})  # fmt: skip
