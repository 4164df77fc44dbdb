"""Flags come from the settings that they set, for every program alike, and a file may stand for them."""

from __future__ import annotations

import argparse
import importlib
import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT

import twigvlm
from twigvlm import flags
from twigvlm.config import GenerationSettings, ModelSettings, option
from twigvlm.errors import InputError
from twigvlm.evaluation import compare
from twigvlm.evaluation.lmms.options import Options
from twigvlm.sprout import ablate, plus, train

DOORS = {"twigvlm.sprout.benchmarks", "twigvlm.sprout.conversations", "twigvlm.evaluation.lmms_task"}
NO_COMMANDS = {"twigvlm.__main__"}  # finds them
COMMANDS = sorted(
    str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for file in (ROOT / "twigvlm").rglob("*.py")
    if '__name__ == "__main__"' in file.read_text()
)
WRITERS = ("twigvlm.commands.demo", "twigvlm.evaluation.run", "twigvlm.evaluation.suite", "twigvlm.evaluation.speed")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in DOORS | NO_COMMANDS])
def test_every_command_takes_a_file_and_refuses_what_it_does_not_know(command, tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text("tempratur: 1\n")
    try:
        code = importlib.import_module(command).main(["--config", str(tmp_path / "flags.yaml")])
    except SystemExit as end:
        code = end.code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and "unknown key 'tempratur'" in last and "known are " in last


@pytest.mark.parametrize("door", sorted(DOORS))
def test_moved_commands_keep_a_door(door, capsys):
    assert door in COMMANDS
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(door).main(["--help"])
    assert "--config" in capsys.readouterr().out


@pytest.mark.parametrize("command", WRITERS)
def test_every_option_of_generate_reaches_every_program(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(command).parse(["--help"])
    shown = capsys.readouterr().out
    left = {"do_sample", "traced", *(("max_new_tokens", "temperature", "top_k", "top_p") if "speed" in command else ())}
    for one in fields(GenerationSettings):
        assert (f"--{one.name.replace('_', '-')} " in shown) == (one.name not in left), one.name
    for one in fields(ModelSettings):
        assert f"--{one.metadata.get('flag', one.name).replace('_', '-')} " in shown
    assert {f.name for f in fields(GenerationSettings)} <= set(inspect.signature(twigvlm.TwigVLM.generate).parameters)


def test_lmms_eval_takes_every_option_that_a_task_does_not_say():
    given = {"draft_length": "auto", "query": "text", "R": "64", "pruning": "random", "draft_confidence": "0.5"}
    read = Options.read(given).writing
    assert read == {
        "draft_length": "auto", "query": "text", "retained_tokens": 64.0, "pruning": "random", "draft_confidence": 0.5,
    }  # fmt: skip
    with pytest.raises(InputError, match="draft_length is 'many'"):
        Options.read({"draft_length": "many"})


@dataclass
class Some:
    """For a parser of its own."""

    width: int = option(3, "of it", "-w")
    heat: float | None = option(None, "of it")
    places: list[int] = option((), "some")
    loud: bool = option(False, "or not")
    silent: int = 4  # no help: no flag


def some() -> argparse.ArgumentParser:
    parser = flags.parser("some", None, flags.group("some", Some))
    parser.add_argument("--names", type=lambda text: text.split(","), default=["a"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-colour", dest="colour", action="store_false")
    parser.add_argument("--pair", nargs=2, type=float)
    parser.add_argument("--each", action="append")
    return parser


def read(text: str, folder: Path) -> argparse.Namespace:
    """What a file with this text says."""
    (folder / "f.yaml").write_text(text)
    return flags.parse(some(), ["--config", str(folder / "f.yaml")])


def test_a_file_is_read_before_the_command_line(tmp_path):
    file = tmp_path / "f.yaml"
    told = {"width": 5, "heat": -0.5, "places": [1, 2], "loud": True, "names": ["x", "y"], "quick": True}
    file.write_text(yaml.safe_dump({**told, "colour": False, "pair": [1, 2]}))
    args = flags.parse(some(), ["--config", str(file), "-w", "7"])
    assert (args.width, args.heat, args.places, args.loud) == (7, -0.5, [1, 2], True)
    assert (args.names, args.quick, args.colour, args.pair) == (["x", "y"], True, False, [1.0, 2.0])
    args = flags.parse(some(), [])
    assert (args.width, args.names, args.colour, args.quick, args.loud) == (3, ["a"], True, False, False)
    assert not hasattr(args, "silent")


def test_what_is_saved_asks_for_the_same(tmp_path):
    args = flags.parse(some(), ["--width", "9", "--names", "p,q", "--pair", "1", "2", "--no-colour", "--places", "3"])
    flags.save(args, tmp_path)
    again = flags.parse(some(), ["--config", str(tmp_path / flags.CONFIG)])
    assert args.typed == {"width", "names", "pair", "colour", "places"} and again.typed == {"config"}
    assert {**vars(again), "config": None, "typed": args.typed} == vars(args)


@pytest.fixture
def brief(monkeypatch) -> None:
    """Commands that make folders of results end where their work would begin."""

    def enough(*_args, **_more):
        raise InputError("enough")

    job = SimpleNamespace(setting=None, data=None)
    monkeypatch.setattr(compare, "prepared", lambda _: SimpleNamespace(every=[job]))
    for place, name in (
        (compare, "announce"), (train.Course, "run"), (twigvlm, "load"), (ablate, "ablate"), (plus, "study"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, enough)


@pytest.mark.parametrize("command, folder, asked", [
    ("evaluation.compare", "--report", ["--methods", "random,visionzip:keep=1", "-R", "64,32", "--benchmarks", "gqa", "--num-shards", "2", "--shard", "1"]),
    ("sprout.train", "--out", ["--stages", "words-4,twig", "--steps", "words-4=3", "--hidden", "32", "--no-compile"]),
    ("sprout.report", "--out", ["--scenes", "2", "--budgets", "64,64.5", "--device", "cpu"]),
    ("sprout.report", "--out", ["--ablate", "parts,signal", "--steps", "3", "--device", "cpu"]),
    ("sprout.report", "--out", ["--ablate", "--device", "cpu"]),
    ("sprout.report", "--out", ["--plus", "--only", "twig", "--only", "stage 2, dynamic", "--device", "cpu"]),
    ("commands.export", "--out", ["--as", "draft-vlm", "--dtype", "float16", "--max-shard-size", "10MB"]),
])  # fmt: skip
@pytest.mark.usefixtures("brief")
def test_a_folder_of_results_holds_the_settings_that_make_it_again(command, folder, asked, tmp_path, capsys):
    main, out = importlib.import_module(f"twigvlm.{command}").main, tmp_path / "out"
    main([folder, str(out), *asked])
    written = (out / flags.CONFIG).read_text()
    kept = yaml.safe_load(written)
    assert kept[folder[2:]] == str(out) and "shard" not in kept
    (out / flags.CONFIG).rename(tmp_path / "kept.yaml")
    main(["--config", str(tmp_path / "kept.yaml")])
    assert (out / flags.CONFIG).read_text() == written, capsys.readouterr().err
    typed = {word[2:].replace("-", "_") for word in asked if word.startswith("--")} - {"as", "num_shards", "shard"}
    assert typed <= kept.keys()


@pytest.mark.parametrize("text, word", [("- a\n", "mapping"), ("a: [\n", "cannot be read"), (None, "cannot be read")])
def test_files_that_are_none(text, word, tmp_path, capsys):
    if text is not None:
        (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        flags.parse(some(), ["--config", str(tmp_path / "f.yaml")])
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("word, on", [
    ("true", True), ("yes", True), ("on", True), ("True", True), ("false", False), ("no", False), ("off", False),
])  # fmt: skip
def test_a_switch_is_read_with_quotes_and_without(word, on, tmp_path):
    for text in (word, f"'{word}'"):
        assert read(f"quick: {text}", tmp_path).quick is on
        assert read(f"loud: {text}", tmp_path).loud is on
        assert read(f"colour: {text}", tmp_path).colour is on
        assert read(f"no-colour: {text}", tmp_path).colour is not on


@pytest.mark.parametrize("text", ["quick: maybe", "quick: 1", "quick: ''", "quick: [true]", "no_colour: 'yess'"])
def test_a_switch_that_is_none_is_refused(text, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        read(text, tmp_path)
    said = capsys.readouterr().err
    assert "f.yaml: " + text.split(":")[0] + " is " in said and "true or false is needed" in said


def test_a_flag_that_may_be_given_again_takes_a_list(tmp_path):
    assert read("each: [a/b, 'c, d']", tmp_path).each == ["a/b", "c, d"]
    assert read("each: a/b", tmp_path).each == ["a/b"]
    assert read("each: []", tmp_path).each is None
    flags.save(flags.parse(some(), ["--each", "a", "--each", "b,c"]), tmp_path)
    assert flags.parse(some(), ["--config", str(tmp_path / flags.CONFIG)]).each == ["a", "b,c"]


@pytest.mark.parametrize("text, first, second", [
    ("width: 1\nwidth: 2", "'width' (line 1)", "'width' (line 2)"),
    ("w: 1\nheat: 0\nwidth: 2", "'w' (line 1)", "'width' (line 3)"),
    ("colour: true\nno-colour: true", "'colour' (line 1)", "'no-colour' (line 2)"),
])  # fmt: skip
def test_what_is_said_twice_is_refused(text, first, second, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        read(text, tmp_path)
    said = capsys.readouterr().err
    assert f"{first} and {second}" in said and "f.yaml" in said


def test_flags_that_contradict_each_other():
    args = dict.fromkeys(f.name for f in fields(GenerationSettings))
    args |= {"temperature": 0.0, "pruning": "twig", "draft_length": 5}
    for name in ("top_p", "top_k"):
        with pytest.raises(InputError, match=name.replace("_", "-")):
            flags.generation(SimpleNamespace(**args | {name: 0.5}))
    assert flags.generation(SimpleNamespace(**args), has_twig=False)["retained_tokens"] is None
    assert not flags.generation(SimpleNamespace(**args))["do_sample"]


@pytest.mark.parametrize("asked", [
    [], ["--no-pruning"], ["--no-speculation", "-R", "96"], ["--temperature", "0.5", "--top-p", "0.9", "--seed", "3"],
    ["--draft-length", "auto", "--query", "text", "--pruning", "random", "--twig-F", "20", "--base-model", "a/b", "--twig-block", "c"],
])  # fmt: skip
def test_settings_say_the_flags_that_they_came_from(asked, tmp_path):
    def read(argv: list[str]) -> tuple[ModelSettings, GenerationSettings]:
        parser = flags.parser("some", None, flags.model(), flags.writing(seed=0))
        flags.add_switches(parser)
        args = flags.parse(parser, argv)
        return flags.model_settings(args), GenerationSettings(**flags.generation(args))

    found = read(asked)
    flags.save(argparse.Namespace(**flags.of(*found)), tmp_path)
    assert read(["--config", str(tmp_path / flags.CONFIG)]) == found
