"""The embedded world and recipe: deterministic, disjoint splits, answers that a second reading confirms."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import warm
from hypothesis import given, settings
from hypothesis import strategies as st

from twigvlm.prompt.template import encode
from twigvlm.sprout import ablate, grown, measure, plus, publish, quiz, report, shown
from twigvlm.sprout.recipe.base import base_config, build
from twigvlm.sprout.recipe.tokenizer import build_tokenizer
from twigvlm.training.settings import parse
from twigvlm.world import conversations
from twigvlm.world.draw import IMAGE_SIZE, draw, patch_labels
from twigvlm.world.questions import KINDS, ask, describe
from twigvlm.world.scenes import COLOURS, PLACES, SHAPES, SPLITS, WORDS, allowed_pairs, sample_scene

ROOT = Path(__file__).resolve().parents[2]
seeds = st.integers(0, 10**6)
splits = st.sampled_from(SPLITS)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_the_closed_lists_are_as_promised():
    assert (len(SHAPES), len(COLOURS), len(PLACES), len(set(WORDS))) == (8, 8, 9, 64)


def test_splits_share_no_combination():
    for place in range(len(PLACES)):
        parts = [set(allowed_pairs(split, place)) for split in SPLITS]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert set.union(*parts) == {(c, s) for c in COLOURS for s in SHAPES}


@given(splits, seeds)
@settings(max_examples=60, deadline=None)
def test_scenes_keep_to_their_split_and_to_the_rules(split, seed):
    scene = sample_scene(split, seed)
    assert scene == sample_scene(split, seed)
    assert 2 <= len(scene.objects) <= 6
    places = [o.place for o in scene.objects] + ([scene.word_place] if scene.word else [])
    assert len(set(places)) == len(places)
    assert all((o.colour, o.shape) in allowed_pairs(split, o.place) for o in scene.objects)
    assert len({o.name for o in scene.objects}) == len(scene.objects)


def test_pictures_repeat_and_show_their_objects():
    for seed in range(20):
        scene = sample_scene("test", seed)
        picture = draw(scene)
        assert picture.size == (IMAGE_SIZE, IMAGE_SIZE) and picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), np.asarray(draw(scene)))
        labels = patch_labels(scene)
        for obj in scene.objects:
            cell = labels[obj.row * 8 : obj.row * 8 + 8, obj.column * 8 : obj.column * 8 + 8]
            ours = (cell[..., 0] == 1 + SHAPES.index(obj.shape)) & (cell[..., 1] == 1 + COLOURS.index(obj.colour))
            assert ours.sum() >= 9, "an object is at least three by three patches"
            assert cell[..., 4].sum() == 1, "and has one centre"


def facts(scene):
    return [(o.colour, o.shape, o.size, PLACES[o.place], o.column, o.row) for o in scene.objects]


def find(scene, words):
    """The one object that a phrase like 'the red circle' or 'the object at the top left' means."""
    place = re.search(r"object (?:at|in) the ([a-z ]+)$", words)
    hits = [
        f
        for f in facts(scene)
        if (place and f[3] == place[1])
        or (
            not place
            and all(w in (f[0], f[1], "the", "object") for w in words.split())
            and (f[0] in words or f[1] in words)
        )
    ]
    assert len(hits) == 1, (words, hits)
    return hits[0]


def second_reading(scene, text):
    """Answer a question from its words and the scene's facts alone."""
    text = re.split(r"\nAnswer| Please", text)[0]
    if text.startswith(("Is there a word", "Is there any text")):
        return "Yes" if scene.word else "No"
    if m := re.match(
        r"(?:Is there|Can you see) an? (?:([a-z]+) )?(object|[a-z]+)(?: in the (?:image|picture))?\?", text
    ):
        colour, shape = m[1], m[2]
        return (
            "Yes"
            if any((not colour or f[0] == colour) and (shape == "object" or f[1] == shape) for f in facts(scene))
            else "No"
        )
    if m := re.match(r"(?:What|Which) (colour|shape) (?:is|does) (the .+?)(?: have)?\?", text):
        return find(scene, m[2])[0 if m[1] == "colour" else 1]
    if m := re.match(r"What is the (colour|shape) of (the .+)\?", text):
        return find(scene, m[2])[0 if m[1] == "colour" else 1]
    if m := re.match(r"(?:How many|Count the) (.+?)(?: are there| are in the image)?[?.]", text):
        what = m[1]
        if what == "objects":
            return str(len(scene.objects))
        wanted = what.removesuffix(" objects")
        return str(sum(f[0] == wanted or what in (f[1] + "s", f[1] + "es") for f in facts(scene)))
    if m := re.match(r"(?:Where is|Where in the image is|In which part of the picture is) (the .+)\?", text):
        return find(scene, m[1])[3]
    if m := re.match(r"Is (the .+) (left of or right of|above or below) (the .+)\?", text):
        a, b = find(scene, m[1]), find(scene, m[3])
        if m[2].startswith("left"):
            return "left" if a[4] < b[4] else "right"
        return "above" if a[5] < b[5] else "below"
    if m := re.match(r"Is (the .+) (left of|right of|above|below) (the .+)\?", text):
        a, b = find(scene, m[1]), find(scene, m[3])
        holds = {"left of": a[4] < b[4], "right of": a[4] > b[4], "above": a[5] < b[5], "below": a[5] > b[5]}[m[2]]
        return "Yes" if holds else "No"
    if m := re.match(r"Is (the .+) larger than (the .+)\?", text):
        return "Yes" if (find(scene, m[1])[2], find(scene, m[2])[2]) == ("large", "small") else "No"
    if m := re.match(r"Do (the .+) and (the .+) have the same (colour|shape)\?", text):
        i = 0 if m[3] == "colour" else 1
        return "Yes" if find(scene, m[1])[i] == find(scene, m[2])[i] else "No"
    if m := re.match(r"Are there more (.+) than (.+)\?", text):
        one, other = (second_reading(scene, f"How many {w} are there?") for w in (m[1], m[2]))
        return "Yes" if int(one) > int(other) else "No"
    assert any(w in text for w in ("word", "text say")), text
    return scene.word


@given(splits, seeds, st.sampled_from(KINDS), seeds)
@settings(max_examples=400, deadline=None)
def test_answers_agree_with_a_second_reading(split, seed, kind, draw_seed):
    scene = sample_scene(split, seed)
    question = ask(scene, kind, random.Random(draw_seed))
    if question is None:
        return
    if kind != "choice":
        assert second_reading(scene, question.text) == question.answer
        return
    text, *options = question.text.split("\n")[:5]
    listed = {line[0]: line[3:] for line in options}
    assert listed[question.answer] == second_reading(scene, text)
    assert len(set(listed.values())) == 4


def test_existence_is_balanced():
    answers = [ask(sample_scene("train", s), "exist", random.Random(s)).answer for s in range(600)]
    assert 0.44 < answers.count("Yes") / len(answers) < 0.56


def test_descriptions_name_everything():
    scene = sample_scene("test", 3)
    text = describe(scene)
    assert all(f"{o.size} {o.colour} {o.shape}" in text and PLACES[o.place] in text for o in scene.objects)


def test_tokenizer_survives_saving_and_reads_every_byte(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    from twigvlm.sprout.recipe.base import save_base

    save_base(
        build(base_config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"), layers=1, hidden=32)),
        tokenizer,
        tmp_path,
    )
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "USER: <image>\nWhere is the ring? ASSISTANT: top</s>USER: ok",
        "naïve 漢字 🙂",
        describe(sample_scene("test", 1)),
    ):
        ids = tokenizer(text).input_ids
        assert again(text).input_ids == ids
        assert ids == encode(tokenizer, text, tokenizer.convert_tokens_to_ids("<image>"), 1)
        assert tokenizer.decode(ids[1:]).replace(" ", "") == text.replace(" ", "")
    assert all(len(tokenizer.tokenize(word)) == 1 for word in WORDS)


def test_no_text_becomes_the_image_token(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert len(set(vocabulary.values())) == len(vocabulary) == len(tokenizer)
    image = vocabulary["<image>"]
    for text in (*WORDS, *PLACES, "a\nb", *(describe(sample_scene("test", s)) for s in range(50))):
        assert image not in tokenizer(text).input_ids


@pytest.fixture
def started(monkeypatch, tmp_path) -> list:
    """A study of seconds: few conversations, a sample a step, short answers of two kinds, the first words of descriptions.

    Trainings find their libraries loaded; which were started is written down.
    """
    drawn = tmp_path / "drawn"
    conversations.write("train", 12, drawn, False)
    few = ["--data", drawn / conversations.CONVERSATIONS, "--images", drawn / conversations.IMAGES]
    few += ["--batch-size", "1", "--per-device-batch", "1"]
    commands = []

    def run(command, cwd, check):
        commands.append(command)
        return warm.run([*command[1:], *few], cwd)

    monkeypatch.setattr(grown, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(quiz, "KINDS", ("colour", "count"))
    monkeypatch.setattr(quiz, "LONGEST", 8)
    for study in (ablate, plus):
        monkeypatch.setattr(study, "TIMED", 1)
    return commands


@pytest.mark.slow
def test_ablations(tmp_path, capsys, monkeypatch, started):
    """Twigs are grown, trained, kept and measured; every row of the tables asked for is there, with its comment."""
    few = {"initialisation": (2,), "parts": (0, 2), "signal": (0, 2)}  # one that is trained, one that is not
    monkeypatch.setattr(ablate, "SECTIONS", {s: tuple(ablate.SECTIONS[s][i] for i in few[s]) for s in few})
    flags = ["--ablate", ",".join(few), "--steps", "1", "--scenes", "1", "--work", str(tmp_path / "work")]
    flags += ["--out", str(tmp_path), "--device", "cpu"]
    assert report.main(flags) == 0
    made = {place: place.stat().st_mtime_ns for place in (tmp_path / "work").glob("*/model.safetensors")}
    names = ("K2-T3-base", "K2-T1-base-untrained")
    assert {place.parent.name for place in made} == set(names)
    result = json.loads((tmp_path / "ablations.json").read_text())
    variants = [v for section in few for v in ablate.SECTIONS[section]]
    assert [(row["ablation"], row["variant"]) for row in result["rows"]] == [(v.group, v.name) for v in variants]
    for row in result["rows"]:
        assert row["RelAcc, 95 %"][0] <= row["RelAcc"] <= row["RelAcc, 95 %"][1] and row["speed"] > 0
    assert len(list((tmp_path / "work" / "figures").iterdir())) == 4, "what two tables hold is measured once"
    assert (result["R"], result["settings"]["steps"]) == (64, 1) and len(result["comments"]) == 2
    assert (tmp_path / "ablations.png").stat().st_size > 10_000
    assert report.main(flags) == 0
    assert len(started) == 1 and made == {place: place.stat().st_mtime_ns for place in made}, "trained again"
    assert report.main([*flags, "--ablate", "colours"]) == 2
    assert "colours" in capsys.readouterr().err


@pytest.mark.slow
def test_the_stages_of_twigvlm_plus_are_compared(tmp_path, monkeypatch, capfd, started):
    """Each twig is trained once, by the users' command, from the one before it; each figure is measured once."""
    recipes = [plus.Recipe("stage 1", ("--stage", "1"))]
    recipes += [plus.Recipe("stage 2", ("--stage", "2", "--groups", "2", "--budget", "64"), "stage 1")]
    recipes += [plus.Recipe("stage 1, other", ("--stage", "1"), options=True)]
    monkeypatch.setattr(plus, "RECIPES", tuple(recipes))
    flags = ["--plus", "--steps", "12", "--scenes", "1", "--budgets", "64", "--device", "cpu"]
    flags += ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert report.main(flags) == 0
    result = json.loads((tmp_path / "plus.json").read_text())
    assert [(row["twig"], row["R"]) for row in result["rows"]] == [
        (name, R) for name in ("stage 1", "stage 2") for R in (None, 64)
    ]
    assert [row["RelAcc"] for row in result["rows"][::2]] == [100.0] * 2, "another base"
    for row in result["rows"]:
        assert (
            row["RelAcc, 95 %"][0] <= row["RelAcc"] <= row["RelAcc, 95 %"][1] and row["tau"] >= 1 and row["speed"] > 0
        )
    last = {row["twig"]: row["training s"] for row in result["rows"]}
    assert last["stage 2"] > last["stage 1"]
    assert (tmp_path / "plus.png").stat().st_size > 10_000
    made = {place: place.stat().st_mtime_ns for place in (tmp_path / "work").glob("*/*.safetensors")}
    assert len(made) == 2
    monkeypatch.setattr(plus, "short_answers", lambda *_: pytest.fail("measured again"))
    capfd.readouterr()
    assert report.main(flags) == 0
    assert len(started) == 2 and made == {place: place.stat().st_mtime_ns for place in made}, "trained again"
    assert report.main([*flags, "--ablate"]) == 2
    assert "ask for one of them" in capfd.readouterr().err
    assert report.main([*flags, "--base", "elsewhere"]) == 2
    assert "leave --base and --twig out" in capfd.readouterr().err
    assert report.main([*flags, "--only", "stage 1"]) == 0
    found = json.loads((tmp_path / "plus.json").read_text())
    assert {row["twig"] for row in found["rows"]} == {"stage 1"}
    assert report.main([*flags, "--only", "stage 9"]) == 2
    assert "unknown ['stage 9']" in capfd.readouterr().err
    assert report.main(["--only", "stage 1", "--out", str(tmp_path)]) == 2
    assert "--plus" in capfd.readouterr().err


def test_a_recipe_may_ask_anothers_twig_otherwise(tmp_path, monkeypatch):
    """It is trained once; every recipe starts from one that is there."""
    trained: list[tuple] = []
    monkeypatch.setattr(plus, "trained", lambda folder, flags, *rest: trained.append((folder.name, *flags)) or folder)
    study = plus.Study(tmp_path, 3)
    names = {recipe.name for recipe in plus.RECIPES}
    assert len(names) == len(plus.RECIPES) and len({recipe.folder for recipe in plus.RECIPES}) == len(names)
    for recipe in plus.RECIPES:
        assert {recipe.start, recipe.of} - {None} <= names
    behind = next(recipe for recipe in plus.RECIPES if recipe.of and recipe.pruning.startswith("visionzip"))
    assert study.train(behind) == study.train(plus.by_name("twig")) and {name for name, *_ in trained} == {"twig"}
    tuned = next(recipe for recipe in plus.RECIPES if "--tower-pruning" in recipe.flags)
    assert tuned.pruning == behind.pruning == f"{tuned.flags[1]}+twig"
    for recipe in plus.RECIPES:  # the flags are those of the training
        if recipe.of is None:
            parse([*recipe.flags, *(["--init", "base"] if recipe.start else [])], "")


def test_the_same_answers_are_all_of_them():
    """RelAcc of a base beside itself, and of half of what it knows."""
    base = [[True, True], [True, False], [True, True]]
    assert measure.relative(base, base) == (100.0, 100.0, 100.0)
    half, low, high = measure.relative([[True, False], [False, False], [True, True]], base)
    assert half == pytest.approx(60) and low < half < high


def test_reports_go_under_runs_unless_said_otherwise(tmp_path, monkeypatch):
    """The published figures are replaced by `publish` alone."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(report, "print_report", lambda args, _: asked.append(args.out))
    monkeypatch.setattr(report, "print_ablations", lambda args, _: asked.append(args.out))
    assert report.main([]) == report.main(["--ablate"]) == 0
    assert asked == [Path("runs/report"), Path("runs/report/ablations")], "each with its own settings beside it"


def test_commands_are_shown_without_where_their_results_went():
    command = "python -m twigvlm.evaluation.speed --prompts 2 --out benchmarks/results/speed.json --repeats 3"
    assert shown.command({"command": command}) == "python -m twigvlm.evaluation.speed --prompts 2 --repeats 3"


def test_nothing_is_published_without_figures_of_it(tmp_path, capsys):
    for name in ("base", "twig"):
        (tmp_path / name).mkdir()
    assert publish.main(["--run", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"--base {tmp_path}/base --twig {tmp_path}/twig --out {tmp_path}" in message


def test_figures_are_written_between_the_marks_of_both_pages(tmp_path):
    """Nothing else changes, and links are right where they stand."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/results.md", "docs/methods.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    publish.refresh(publish.RESULTS, tmp_path)
    for name, other in (("README.md", ""), ("docs/results.md", "../")):
        before, after = (root.joinpath(name).read_text() for root in (ROOT, tmp_path))
        for text in (before, after):
            assert text.count(publish.START) == text.count(publish.END) == 1
        around = [(t.split(publish.START)[0], t.split(publish.END)[1]) for t in (before, after)]
        assert around[0] == around[1]
        assert f"]({other}benchmarks/results/" in after.split(publish.START)[1].split(publish.END)[0]
    assert "python -m twigvlm.evaluation.speed" in (tmp_path / "docs/results.md").read_text()


def test_a_comparison_stands_in_both_pages(tmp_path):
    """The six rows of the papers' table in the README, all of it with its plots in docs/results.md."""
    row = {"measured": 64.1, "authors": 64.0, "schedule": "64×32", "scores": {"gqa": 50.0}, "interval": [80.0, 99.5], "batch": [8],
           "prefill_ms": 100.0, "decode_tokens_per_second": 30.0, "RelSpd": 150.0, "cache_bytes": 7e6, "flops": 2e9, "questions": 112,
           "computed_cache_bytes": 5e6, "source": "measured"}  # fmt: skip
    rows = [row | {"method": "unpruned", "R": None, "RelAcc": 100.0, "interval": None}]
    rows += [
        row | {"method": name, "R": R, "RelAcc": 90.0} for name in ("twig", "fastv", "dart") for R in (192.0, 64.0)
    ]
    found = {"rows": rows, "refused": [{"method": "pdrop", "R": 64.0, "reason": "not here", "failed": False}], "device": "a CPU",
             "command": "python -m twigvlm.evaluation.compare --limit 16 --report benchmarks/results/comparison",
             "threads": 1, "cores_taken_by_others": 1.5}  # fmt: skip
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/results.md", "docs/methods.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "results" / "comparison").mkdir(parents=True)
    (tmp_path / "results" / "comparison" / "comparison.json").write_text(json.dumps(found))
    publish.refresh_methods(tmp_path / "results", tmp_path)
    readme, details = (
        (tmp_path / name).read_text().split("<!-- comparison -->")[1].split("<!-- end of comparison -->")[0]
        for name in ("README.md", "docs/results.md")
    )
    assert "`python -m twigvlm.evaluation.compare --limit 16`" in readme and "112 questions in all" in readme
    assert (
        "| unpruned " in readme and "| twig " in readme and "| dart " not in readme and "90.0 (80.0 to 99.5)" in readme
    )
    assert "| dart " in details and "- `pdrop`, R = 64: not here" in details
    assert "](../benchmarks/results/comparison/relacc_R.png)" in details


def test_remarks_tell_ties_gaps_and_what_intervals_do_not_tell_apart():
    def row(variant, ours, paper, between, speed=None, paper_speed=None):
        return {"ablation": "T", "variant": variant, "RelAcc": ours, "paper RelAcc": paper, "RelAcc, 95 %": between,
                "speed": speed, "paper speed": paper_speed}  # fmt: skip

    rows = [
        row("T=1", 88.0, 93.9, [84, 92], 240.0, 154),
        row("T=3", 85.0, 96.0, [80, 90], 220.0, 154),
        row("T=9", 60.0, 80.0, [50, 70], 250.0, None),
    ]
    assert ablate.remarks(rows) == [
        "T, RelAcc: best is T=1, in the paper T=3 (3.0 points above it here); not told apart from T=3.",
        "T, speed: best is T=9, which the paper does not have; there T=1 and T=3 (10.0 points above it here).",
    ]
    assert ablate.remarks(rows[:2])[1] == "T, speed: best is T=1, as in the paper, where T=3 is as good."


def test_what_a_base_bears_is_shown_with_intervals_and_drawn(tmp_path):
    one = {"percent": 50.0, "low": 40.0, "high": 60.0, "asked": 9}
    found = {"layers": 3, "all": one, "turn 1": one, "turns over the same alone, %": [99.0, 98.0, 100.0], "lens": [one] * 3,
             "without those from": {"1": one, "2": one}, "looking": {"0": one, "1": one, "2": one, "random": one}}  # fmt: skip
    told = shown.answers(found)
    assert told.count("50.0 (40.0 to 60.0)") == 2 and "99.0 (98.0 to 100.0)" in told
    lines = shown.depth(found).splitlines()[2:]
    assert [line.count("50.0") for line in lines] == [2, 3, 3], "no block begins with layer 0"
    shown.plot(found, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 10_000 and not shown.curves({"layers": 3, "all": one})
