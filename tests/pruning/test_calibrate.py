"""Methods whose budget depends on picture and question: thresholds found, kept, found again, and refused where they are not."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import IMAGE, batch, often, one, prompts, tiny

from twigvlm.config import GenerationSettings, TwigConfig
from twigvlm.errors import InputError
from twigvlm.evaluation.asking import calibration
from twigvlm.evaluation.asking.ask import Ready
from twigvlm.evaluation.asking.calibration import ensure, entering, fit, solve, wanting
from twigvlm.evaluation.asking.costs import spread
from twigvlm.evaluation.asking.setting import Setting
from twigvlm.model.twig import score_signature, signature
from twigvlm.pruning import Shape, calibrated, find_method, plan_for

ADAPTIVE = ["mustdrop", "occamtoken", "sparsevlm:version=1.0", "twig-adaptive"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrated, "FOLDER", tmp_path)
    return tmp_path


def keep(method, R: float, base: str = "tiny", **facts) -> None:
    """A calibration, as the command leaves it."""
    file = calibrated.file_of(method, R, base)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps({"base": base, "L": 6, "V": 16, "thresholds": dict.fromkeys(method.fitted, 1.0)} | facts)
    )


# ---------------------------------------------------------------------- fitting


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("where", [3e-6, 0.0012, 0.7, 41.0])
@pytest.mark.parametrize("few", [1.0, 1.6])
def test_a_threshold_is_found(rising, where, few):
    """Also where few questions say something else, and in less than the guesses that are allowed."""
    asked = []

    def off(value: float, coarse: bool) -> float:
        asked.append(coarse)
        way = math.tanh(math.log(value / (where * (few if coarse else 1))) / 3)
        return 100 * (way if rising else -way)

    found = solve(off, rising, 0.1)
    assert abs(math.log(found / where)) < 0.01
    assert asked.count(False) <= calibration.FINE + 10


def test_where_no_value_is_exact_the_nearest_is_taken():
    """Tokens are whole: the mean jumps."""
    found = solve(lambda v, coarse: 7.0 if v < 0.02 else 1.0 if v < 0.05 else -3.0, False, 0.1)
    assert 0.02 <= found < 0.05


def test_an_r_out_of_reach_says_what_can_be():
    method = find_method("mustdrop")
    with pytest.raises(InputError, match=r"mustdrop leaves 5\.0 to 9\.0 tokens on this sample.* and 12\.0 are wanted"):
        fit(method, 12, Shape(6, 16, 2, 4), lambda m, few: [[9.0 if m.threshold < 1 else 5.0] * 6])


@torch.inference_mode()
@pytest.mark.parametrize("share", often([0.35, 0.6], 0.35))
@pytest.mark.parametrize("spec", ADAPTIVE)
def test_measured_is_asked_on_the_sample(spec, share):
    """On real prompts: the mean of what enters the layers is R, as near as whole tokens allow."""
    vlm = tiny(side=84, layers=8)
    c = vlm.config
    shape, method = Shape(c.L, c.V, c.K, c.F, vlm.base_name), find_method(spec)
    rows, pictures = prompts(vlm, [(3, IMAGE, n % 5 + 2) for n in range(16)], seed=1)
    ready = Ready([], rows, torch.cat(pictures).numpy())
    low, high = (float(end) for end in method.legal(shape))
    if method.name == "sparsevlm":
        low = high * 0.5  # few text tokens, so that the rank is low
    R = low + (high - low) * share
    found = fit(method, R, shape, lambda m, few: entering(vlm, m, R, shape, ready))
    measured = entering(vlm, found, R, shape, ready)
    assert statistics.fmean(map(statistics.fmean, measured)) == pytest.approx(R, abs=1.5)
    if method.name == "occamtoken":  # three times as many before the cut as behind it
        before = statistics.fmean(row[0] for row in measured)
        assert before == pytest.approx(found.aim("first", R, shape)[1], abs=1.5)
    said = ",".join(f"{name}={getattr(found, name)}" for name in method.fitted)
    out = vlm.generate(
        **batch(rows, pictures),
        retained_tokens=R,
        max_new_tokens=1,
        pruning=f"{spec}{',' if ':' in spec else ':'}{said}",
    )
    assert out.stats.visual_rows == pytest.approx([statistics.fmean(row) for row in measured])


# ---------------------------------------------------------------------- kept and found


@pytest.mark.parametrize("spec", ADAPTIVE)
def test_without_a_calibration_the_command_is_said(spec):
    vlm = tiny(side=56, layers=8)
    with pytest.raises(InputError) as error:
        vlm.generate(**one(vlm, 3, IMAGE, 4), retained_tokens=9, pruning=spec)
    for part in (
        f"python -m twigvlm.evaluation.calibrate --pruning {spec} -R 9 --base-model tiny",
        "--calibrate N",
        "=…",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("spec", ADAPTIVE)
def test_a_calibration_is_found_and_what_is_given_by_hand_goes_before(spec):
    method, shape = find_method(spec), Shape(8, 16, 2, 6, "some/tiny")
    keep(method, 9, "some/tiny", L=8, thresholds=dict.fromkeys(method.fitted, 0.25))
    found = calibrated.settled(method, 9.0, shape)
    assert all(getattr(found, name) == 0.25 for name in method.fitted)
    hand = replace(method, **dict.fromkeys(method.fitted, 0.5))
    assert calibrated.settled(hand, 9.0, shape) is hand
    assert method.plan(9, shape) == found.plan(9, shape) != hand.plan(9, shape)
    for other in (replace(shape, base="another"), shape):
        with pytest.raises(InputError, match="no thresholds are known for R = "):
            calibrated.settled(method, 9.0 if other is not shape else 8.0, other)


def test_settings_have_calibrations_of_their_own():
    assert calibrated.file_of(find_method("mustdrop"), 64, "a/b").name == "mustdrop-R64.json"
    assert (
        calibrated.file_of(find_method("mustdrop:individual=0.5"), 64, "a/b").name == "mustdrop~individual=0.5-R64.json"
    )
    assert calibrated.file_of(find_method("sparsevlm:version=1.0"), 6.5, "a/b").parent.name == "b"


def test_a_base_of_the_same_last_name_is_another():
    method = find_method("mustdrop")
    keep(method, 9, "mine/tiny")
    assert calibrated.stored(method, 9, "mine/tiny") is not None
    assert calibrated.stored(method, 9, "theirs/tiny") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"L": 6, "V": 16, "thresholds": {"threshold": "x"}}',
        '{"L": 6, "V": 16, "thresholds": {"threshold": 1}, "base_signature": "weights"}',
    ],
)
def test_what_is_no_calibration(text):
    method = find_method("mustdrop")
    keep(method, 9)
    calibrated.file_of(method, 9, "tiny").write_text(text)
    with pytest.raises(InputError, match=r"mustdrop-R9\.json: no calibration .*delete it and calibrate anew"):
        calibrated.settled(method, 9, Shape(6, 16, 2, 4, "tiny"))


def test_a_calibration_of_other_weights_of_that_name():
    """A base that was trained on keeps its name, and thresholds of before would miss R without a word."""
    vlm, method = tiny(side=84), find_method("occamtoken")
    mine = signature(vlm.trunk)
    shape = {"L": vlm.config.L, "V": vlm.config.V}
    keep(method, 9, vlm.base_name, base_signature=mine, **shape)
    ask = {**one(vlm, 5, IMAGE, 7), "pruning": "occamtoken", "retained_tokens": 9, "max_new_tokens": 1}
    vlm.generate(**ask)
    keep(method, 9, vlm.base_name, base_signature=[w + 0.1 for w in mine], **shape)
    with pytest.raises(
        InputError, match=r"occamtoken-R9\.json was made on other weights than these of .*calibrate anew"
    ):
        vlm.generate(**ask)
    vlm.generate(**ask | {"pruning": "occamtoken:first=1,second=1"})


def test_a_calibration_with_another_twig_of_that_base():
    """A twig scores in its own way, and with a pruning head in another: thresholds are not another's."""
    plain, other, head = tiny(side=84), tiny(side=84, noise=0.3), tiny(side=84, pruning_head="identity")
    for vlm in (other, head):
        torch.testing.assert_close(signature(vlm.trunk), signature(plain.trunk))
    shape = {letter: getattr(plain.config, letter) for letter in "LVKF"}
    ask = {"retained_tokens": 12, "max_new_tokens": 1}
    for made, strangers in ((plain, (other, head)), (head, (plain,))):
        mine = score_signature(made.twig)
        keep(find_method("twig-adaptive"), 12, plain.base_name, twig_signature=mine, **shape)
        keep(find_method("occamtoken"), 12, plain.base_name, **shape)
        made.generate(**one(made, 5, IMAGE, 7), pruning="twig-adaptive", **ask)
        for vlm in strangers:
            with pytest.raises(
                InputError, match=r"twig-adaptive-R12\.json was made with another twig .*calibrate anew"
            ):
                vlm.generate(**one(vlm, 5, IMAGE, 7), pruning="twig-adaptive", **ask)
            vlm.generate(**one(vlm, 5, IMAGE, 7), pruning="twig-adaptive:mass=0.5", **ask)
            vlm.generate(**one(vlm, 5, IMAGE, 7), pruning="occamtoken", **ask)


@pytest.mark.parametrize("letters", [{"K": 1}, {"F": 5}])
def test_a_calibration_with_a_twig_elsewhere(letters):
    """Where the image is cut and wiped says how many tokens R is; other methods ask neither."""
    known = {"K": 2, "F": 4}
    for spec in ("twig-adaptive", "mustdrop"):
        keep(find_method(spec), 9, **known)
    shape = Shape(6, 16, **known | letters, base="tiny")
    ((letter, value),) = letters.items()
    with pytest.raises(InputError, match=f"was made for {letter} = {known[letter]}, and here it is {value}"):
        calibrated.settled(find_method("twig-adaptive"), 9.0, shape)
    assert calibrated.settled(find_method("mustdrop"), 9.0, shape).threshold == 1.0


def test_a_calibration_of_another_shape():
    method = find_method("mustdrop")
    keep(method, 9)
    with pytest.raises(InputError, match="was made for V = 16, and here it is 25"):
        calibrated.settled(method, 9, Shape(6, 25, 2, 4, "tiny"))


@pytest.mark.parametrize(
    ("spec", "R", "published"),
    [("mustdrop:count=authors", 192, [0.001, 0.001]), ("mustdrop:count=authors", 128, [0.0012, 0.001]),
     ("mustdrop:count=authors", 64, [0.011, 0.01]), ("sparsevlm:version=1.0,faithful", 192, [13.5, 0]),
     ("sparsevlm:version=1.0,count=authors", 128, [9, 6]), ("sparsevlm:version=1.0,faithful", 64, [0.8, 0])],
)  # fmt: skip
def test_published_thresholds(spec, R, published):
    found = find_method(spec)
    for _, rule in found.plan(R, Shape(32, 576, 2, 24)).stages:
        names = ("threshold", "individual") if found.name == "mustdrop" else ("scale", "bias")
        assert [getattr(rule, name) for name in names] == published
    with pytest.raises(InputError, match="R = 192, 128, 64, and R is 100"):
        found.plan(100, Shape(32, 576, 2, 24))


def test_the_authors_count_what_leaves():
    entering = [500.0] * 3 + [300.0] * 4 + [200.0] * 4 + [100.0] * 4 + [50.0] * 17
    assert find_method("mustdrop").authors(entering) == pytest.approx(
        (500 * 2 + 300 * 4 + 200 * 4 + 100 * 4 + 50 * 18) / 32
    )
    assert find_method("occamtoken").authors(entering) == 50


def test_windows_and_cuts_stand_at_the_papers_layers():
    plan = plan_for("mustdrop:threshold=0.001", 192, 576, TwigConfig(32, 2, 3, 24))
    assert [before for before, _ in plan.stages] == [3, 7, 11, 15] and plan.evict == 2 and plan.positions == "compact"
    assert [b for b, _ in plan_for("occamtoken:first=1,second=1", 64, 576, TwigConfig(32, 2, 3, 24)).stages] == [12]


# ---------------------------------------------------------------------- runs


def job(spec: str, R: float | None = 64.0):
    return SimpleNamespace(setting=Setting(writing=GenerationSettings(retained_tokens=R, pruning=spec)))


def test_a_run_calibrates_what_needs_it(monkeypatch, capsys):
    made = []
    facts = {
        "settings": "",
        "R": 64.0,
        "thresholds": {},
        "measured": spread([1.0]),
        "sample": {"task": "", "questions": 1},
    }
    monkeypatch.setattr(
        calibration, "calibrate", lambda job, n: (made.append((job.setting.writing.pruning, n)), (facts, "x"))[1]
    )
    keep(find_method("occamtoken"), 64, "sprout")
    jobs = [job(s) for s in ("twig", "fastv", "mustdrop", "mustdrop:threshold=0.1", "occamtoken", "sparsevlm")]
    ensure(5, [*jobs, job("mustdrop", None)])
    assert made == [("mustdrop", 5)]
    ensure(None, jobs)
    assert len(made) == 1
    with pytest.raises(InputError, match="--calibrate is 0; 1 or more"):
        ensure(0, jobs)


def test_answers_under_other_thresholds_are_other_answers():
    """Else a folder would mix them."""
    setting = job("occamtoken").setting
    assert wanting(SimpleNamespace(setting=setting)) is not None
    assert setting.identity("t", "s", [])["thresholds"] is None
    keep(find_method("occamtoken"), 64, "sprout", thresholds={"first": 0.5, "second": 2.0})
    assert setting.identity("t", "s", [])["thresholds"] == {"first": 0.5, "second": 2.0}
    assert "thresholds" not in job("occamtoken:first=1,second=1").setting.identity("t", "s", [])


def test_spread():
    found = spread([float(n) for n in range(1, 101)])
    assert found == {"mean": 50.5, "sd": pytest.approx(28.866, abs=1e-3), "5%": 6.0, "95%": 95.0}
    assert spread([]) is None


@pytest.mark.slow
def test_a_whole_run_with_its_calibration(folder, tmp_path, capsys):
    """On the embedded model: thresholds are made, the run uses them and says how its tokens spread; the next one finds them."""
    from twigvlm.evaluation.run import main

    flags = ["--task", "gqa", "--pruning", "mustdrop", "-R", "96", "--limit", "3", "--max-new-tokens", "2"]
    assert main([*flags, "--out", str(tmp_path / "none")]) == 2
    assert "twigvlm.evaluation.calibrate --pruning mustdrop -R 96 finds them" in capsys.readouterr().err
    assert main([*flags, "--calibrate", "2", "--out", str(tmp_path / "one")]) == 0
    said = capsys.readouterr().out
    facts = json.loads(said.splitlines()[-1])
    assert facts["visual_spread"]["mean"] == pytest.approx(facts["visual_measured"], abs=0.01)
    assert "calibrating mustdrop to R = 96" in said and "5 to 95 %" in said
    kept = json.loads((folder / "sprout" / "mustdrop-R96.json").read_text())
    assert kept["measured"]["mean"] == pytest.approx(96, abs=2) and kept["sample"]["questions"] == 2
    assert main([*flags, "--out", str(tmp_path / "two")]) == 0
    assert "calibrating" not in capsys.readouterr().out
