"""What flags ask for is checked before a model is loaded, by every program; scripts without an environment say so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, speaking, write_base

import cli_demo
import twigvlm
from twigvlm.errors import InputError
from twigvlm.evaluation import calibrate, run, speed, suite
from twigvlm.foresight import Wish, check
from twigvlm.loading import base as load
from twigvlm.loading import describe
from twigvlm.model.twig import CONFIG, WEIGHTS, save_twig
from twigvlm.sprout import report
from twigvlm.sprout import train as recipe
from twigvlm.training import launch
from twigvlm.training.data import loading
from twigvlm.training.settings import Settings


@pytest.fixture(autouse=True)
def unloaded(monkeypatch):
    """No weight may be read."""
    for place in (load, twigvlm.vlm):
        monkeypatch.setattr(place, "load_base", lambda *_, **__: pytest.fail("loaded a model"))


TWIG = [
    (["-R", "500"], ["500", "36 to 432"]),
    (["-R", "20"], ["20", "36 to 432"]),
    (["--twig-K", "3"], ["K = 3", "K = 2"]),
    (["--twig-T", "4"], ["T = 4", "T = 3"]),
    (["--device", "toaster"], ["toaster"]),
    (["--dtype", "int3"], ["int3"]),
    (["--attn-implementation", "magic"], ["magic", "sdpa"]),
]
ANSWER = [
    (["--pruning", "magic"], ["magic", "layer-attention"]),
    (["--top-p", "0.9"], ["--top-p", "--temperature"]),
    (["--top-p", "1.5", "--temperature", "1"], ["top_p", "1.5"]),
    (["--max-new-tokens", "0"], ["0", "1 or more"]),
    (["--temperature", "-1"], ["-1"]),
    (["--temperature", "nan"], ["nan"]),
]
PROGRAMS = {
    "demo": (cli_demo.main, ["--question", "Is there a circle?"], TWIG + ANSWER),
    "run": (
        run.main,
        ["--task", "gqa", "--limit", "2"],
        [
            *TWIG,
            *ANSWER,
            (["--pruning", "mustdrop", "-R", "61", "--calibrate", "2", "--out", "/dev/null/x"], ["--out", "/dev/null"]),
            (["--pruning", "mustdrop", "-R", "61", "--calibrate", "0"], ["--calibrate is 0"]),
        ],
    ),
    "calibrate": (
        calibrate.main,
        ["--pruning", "mustdrop", "--baseline"],
        [(["--calibrate", "0"], ["--calibrate is 0"]), (["--calibrate", "-1"], ["--calibrate is -1"])],
    ),
    "suite": (suite.main, ["--tasks", "gqa", "--limit", "2"], [*TWIG[2:], *ANSWER, (["-R", "192,500"], ["500"])]),
    "speed": (
        speed.main,
        [],
        [
            *TWIG,
            *((["--" + name, "0"], ["--" + name]) for name in ("prompts", "repeats", "threads")),
            (["--out", "/dev/null/y.json"], ["--out", "/dev/null cannot be written to"]),
            (["--out", "/proc/y/z.json"], ["--out", "/proc"]),
        ],
    ),
    "report": (
        report.main,
        [],
        [
            (["--budgets", "64,500"], ["500", "36 to 432"]),
            (["--budgets", "many"], ["--budgets", "many"]),
            (["--methods", "twig,magic"], ["magic", "random"]),
            (["--scenes", "0"], ["--scenes"]),
            (["--device", "toaster"], ["toaster"]),
            (["--ablate", "colours"], ["colours", "signal"]),
            (["--ablate", "T", "--steps", "0"], ["--steps"]),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("program", "flags", "words"),
    [(name, flags, words) for name, (_, _, cases) in PROGRAMS.items() for flags, words in cases],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else value,
)
def test_flags_are_checked_before_a_model_is_loaded(program, flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, usual, _ = PROGRAMS[program]
    out = ["--out", str(tmp_path / "out")] if program != "demo" else []
    assert main([*usual, *out, *flags]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert not [place for place in tmp_path.rglob("*") if place.is_file()]


@pytest.mark.parametrize("flags", [["-R", "5000"], ["-R64"], ["--retained_tokens=64"], ["--pruning", "twig"]])
def test_what_was_asked_in_words_is_not_dropped_for_want_of_a_twig(flags, capsys, tmp_path):
    """A base alone answers unpruned, unless somebody asked for its pruning."""
    (tmp_path / "config.yaml").write_text("retained_tokens: 64\npruning: twig\n")  # the resolved flags of such a base
    base = ["--base-model", str(describe.EMBEDDED_BASE), "--question", "Is there a circle?"]
    assert cli_demo.main([*base, *flags]) == 2
    assert ("R is 5000" if "5000" in flags else "needs a twig") in capsys.readouterr().err
    with pytest.raises(pytest.fail.Exception, match="loaded a model"):
        cli_demo.main([*base, "--config", str(tmp_path / "config.yaml")])


def test_methods_have_their_own_conditions(tmp_path):
    """layer-attention reads base layer K - 1, and a twig on the embeddings has none below it."""
    vlm = speaking(K=0)
    save_twig(vlm.twig, vlm.trunk, tmp_path / "twig", "tiny")
    base = write_base(tmp_path / "base", vlm.model)
    wish = Wish(base, tmp_path / "twig", device="cpu")
    check(wish, {"pruning": "twig", "retained_tokens": 2})
    with pytest.raises(InputError, match="layer-attention"):
        check(wish, {"pruning": "layer-attention", "retained_tokens": 2})


def test_a_twig_says_before_loading_that_it_grew_elsewhere(tmp_path):
    vlm = speaking()
    base = write_base(tmp_path / "base", vlm.model)
    save_twig(vlm.twig, vlm.trunk, tmp_path / "twig", "tiny")
    assert Wish(base, tmp_path / "twig").letters() == (vlm.config.V, vlm.twig.config)
    with pytest.raises(InputError, match="this twig grew on 'tiny' with L = 6, but the base has L = 32"):
        Wish(None, tmp_path / "twig").letters()
    released = tmp_path / "released"
    released.mkdir()
    shutil.copy(tmp_path / "twig" / WEIGHTS, released)
    with pytest.raises(InputError, match="T = 3 was asked for, but the twig was grown with T = 2"):
        Wish(base, released, T=3).letters()
    (released / WEIGHTS).unlink()
    with pytest.raises(InputError, match="no such file"):
        Wish(base, released).letters()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"K": 30}, ["K + T", "L = 32"]),
        ({"F": 1}, ["wipe layer F"]),
        ({"init": "nowhere"}, ["init", "nowhere"]),
        ({"init": str(describe.EMBEDDED_TWIG), "K": 1}, ["K = 1", "K = 2"]),
        ({"zero": "9"}, ["zero", "9"]),
        ({"batch_size": 12, "per_device_batch": 5}, ["12", "5"]),
        ({"export_release": "twig.bin"}, ["twig.bin", ".safetensors"]),
        ({"random": "huge"}, ["huge", "WIDTHxLAYERS"]),
        ({"base": "./nowhere", "data": "x.json"}, ["nowhere"]),
        ({"base": str(describe.EMBEDDED_BASE)}, ["--data"]),
        ({"data": "nowhere.json"}, ["nowhere.json: no such file"]),
        ({"data": str(ROOT)}, [f"{ROOT}: is a folder"]),
        ({"data": "/dev/zero"}, ["/dev/zero: is a pipe or a device"]),
        ({"data": __file__, "images": "/nope"}, ["/nope: no such folder"]),
        ({"data": __file__, "held_out_data": "nowhere.json"}, ["nowhere.json: no such file"]),
        ({"data": __file__, "held_out_images": "/nope"}, ["/nope: no such folder"]),
        ({"out": "/proc/x"}, ["--out /proc/x", "cannot be written to"]),
        ({"out": "/dev/null/x"}, ["--out /dev/null/x", "not a folder"]),
        ({"learn": "projector", "pruning": "nonsense"}, ["nonsense"]),
        ({"learn": "projector", "pruning": "fastv"}, ["fastv", "before the decoder"]),
        ({"learn": "projector", "retained_tokens": 0}, ["0"]),
        ({"learn": "projector", "lora_rank": 4}, ["lora_rank"]),
    ],
)
def test_a_training_is_checked_before_data_are_drawn_and_the_base_is_asked(settings, words, monkeypatch):
    monkeypatch.setattr(loading, "fill_in", lambda *_: pytest.fail("drew data"))
    with pytest.raises(InputError) as fault:
        launch.start(Settings(**{"device": "cpu"} | settings), [])
    assert all(word in str(fault.value) for word in words), fault.value


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"train_batch_size": 99}, ["train_batch_size is 99"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled is True"]),
        ({"fp16": True}, ['"fp16" is True']),
        ({"optimizer": {"type": "SGD"}}, ["SGD", "AdamW"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler"]),
    ],
)
def test_a_deepspeed_file_is_held_against_the_run_before(config, words, monkeypatch, tmp_path):
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(loading, "fill_in", lambda *_: pytest.fail("drew data"))
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 2}} | config))
    with pytest.raises(InputError) as fault:
        launch.start(Settings(device="cpu", precision="fp32", zero=str(file)), [])
    assert all(word in str(fault.value) for word in [str(file), *words]), fault.value


@pytest.mark.parametrize(
    "flags", [["--scale", "0"], ["--hidden", "50"], ["--workers", "-1"], ["--steps", "x"], ["--stages", "flower"]]
)
def test_the_recipe_checks_its_flags(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        recipe.main(["--out", str(tmp_path / "out"), *flags])
    assert end.value.code == 2 and flags[0] in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_descriptions_of_a_twig_are_read_as_loading_reads_them(tmp_path):
    folder = tmp_path / "twig"
    shutil.copytree(describe.EMBEDDED_TWIG, folder)
    facts = json.loads((folder / CONFIG).read_text()) | {"format_version": 99}
    (folder / CONFIG).write_text(json.dumps(facts))
    with pytest.raises(InputError, match="format version is 99"):
        Wish(None, folder).letters()


# ---------------------------------------------------------------------- where nothing is installed


@pytest.fixture
def clone(tmp_path) -> Path:
    """A fresh clone, and a python that has nothing installed."""
    home = tmp_path / "clone"
    home.mkdir()
    for name in ("cli_demo.py", "twigvlm", "scripts", "Makefile"):
        (home / name).symlink_to(ROOT / name) if name != "scripts" else shutil.copytree(ROOT / name, home / name)
    (tmp_path / "bin").mkdir()
    for name in ("python3", "python"):
        file = tmp_path / "bin" / name
        file.write_text(f'#!/bin/sh\nexec "{os.path.realpath(shutil.which("python3"))}" -S "$@"\n')
        file.chmod(0o755)
    return home


def alone(clone: Path, *command: str) -> subprocess.CompletedProcess:
    env = {"PATH": f"{clone.parent / 'bin'}:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", [("bash", "scripts/v1_5/eval/gqa.sh"), ("bash", "scripts/v1_5/eval/all.sh"), ("python3", "cli_demo.py", "--question", "x")])  # fmt: skip
def test_a_fresh_clone_says_what_to_run(clone, command):
    done = alone(clone, *command)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert (
        line.startswith("error: ")
        and any(name in line for name in ("torch", "transformers", "numpy"))
        and "make" in line
    ), line


@pytest.mark.skipif(os.name == "nt", reason="no such bit there")
def test_every_script_can_be_started():
    scripts = [*(ROOT / "scripts").rglob("*.sh"), *(ROOT / "docs").rglob("*.sh"), *ROOT.glob("*.sh")]
    assert scripts and not [script for script in scripts if not os.access(script, os.X_OK)]
