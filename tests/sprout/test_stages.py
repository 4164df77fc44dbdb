"""The recipe's stages: what each begins with, what it leaves, how it is stopped, and what the cut leaves untouched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from transformers import LlavaForConditionalGeneration

import twigvlm
from twigvlm.prompt.template import VICUNA_V1, encode
from twigvlm.sprout import train
from twigvlm.sprout.recipe.language import start
from twigvlm.sprout.recipe.tokenizer import build_tokenizer
from twigvlm.sprout.recipe.tower import SIDE, pixels
from twigvlm.sprout.train import STAGES, TOWER, Course, config
from twigvlm.training.run import checkpoints
from twigvlm.world.draw import draw
from twigvlm.world.scenes import sample_scene

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def tiny(tokenizer, layers: int, seed: int = 0):
    return start(config(layers, 32, tokenizer), seed)


def test_a_stage_without_the_one_before_says_so(tmp_path, capsys):
    assert train.main(["--out", str(tmp_path), "--stages", "words-8", "--device", "cpu"]) == 2
    assert "short-4 has not finished" in capsys.readouterr().err
    assert train.main(["--out", str(tmp_path), "--stages", "twig", "--device", "cpu"]) == 2
    assert "no base there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--stages", "words-5"), "words-5"),
        (("--steps", "words-4=many"), "NAME=N"),
        (("--steps", "words-5=1"), "words-5"),
        (("--steps", "twig=5"), "twig"),
        (("--hidden", "100"), "multiple of 32"),
        (("--workers", "-1"), "--workers"),
        (("--save-seconds", "-1"), "--save-seconds"),
    ],
)
def test_senseless_flags_are_refused(tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as ended:
        train.main(["--out", str(tmp_path / "run"), *flags])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def one_thread():
    """Sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_killed_recipe_ends_with_the_same_weights(tmp_path, monkeypatch, one_thread):
    """Killed in the middle of a stage and started again: the run that was never disturbed, to the bit where one thread sums."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["-m", "twigvlm.sprout.train", "--hidden", "32", "--device", "cpu", "--workers", "0"]
    command += ["--stages", "words-4,short-4,tower", "--steps", "words-4=4,short-4=2,tower=2", "--save-seconds", "0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = warm.Program([*command, "--out", broken], ROOT)
    steps = {"words-4": 4, "short-4": 2, "tower": 2}
    courses = [Course(out, hidden=32, workers=0, steps=steps) for out in (whole, broken)]
    while not checkpoints.checkpoints(broken / "words-4-saved"):
        assert process.poll() is None
        time.sleep(0.01)  # the processor is the recipe's
    process.kill()
    process.communicate()
    assert not (broken / "short-4-done.pt").exists(), "killed too late to prove anything"
    for run in courses:
        run.run(tuple(steps))
    for stage in ("short-4", "tower"):
        one, other = (torch.load(d / f"{stage}-done.pt", weights_only=True) for d in (whole, broken))
        assert one.keys() == other.keys() and not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.slow
def test_ctrl_c_ends_the_recipe_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "twigvlm.sprout.train", "--hidden", "32", "--stages", "words-4"]
    command += ["--device", "cpu", "--workers", "1", "--save-seconds", "0.1", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not checkpoints.checkpoints(tmp_path / "words-4-saved"):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the processes that draw as well
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert "the same command goes on" in said.strip().splitlines()[-1]


@pytest.mark.slow
def test_each_stage_begins_with_what_the_one_before_left(tmp_path, tokenizer):
    run = Course(tmp_path, hidden=32)
    by_name = {stage.name: stage for stage in STAGES}
    seeds = {stage.name: seed for seed, stage in enumerate(STAGES)}

    @cache
    def left(name: str):
        return tiny(tokenizer, by_name[name].layers, seeds[name])

    for stage in STAGES:
        torch.save(left(stage.name).state_dict(), run.done(stage.name))
    for stage in STAGES:
        model = run.before(stage)
        assert len(model.model.language_model.layers) == stage.layers
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        if stage.after:
            eyes = TOWER if stage.lesson.kind == "windows" else stage.after  # the eyes come from the tower's stages
            for name, part in (
                (stage.after, "language_model.embed_tokens.weight"),
                (eyes, "vision_tower.embeddings.class_embedding"),
            ):
                ours, theirs = model.model.get_parameter(part), left(name).model.get_parameter(part)
                torch.testing.assert_close(ours, theirs, msg=f"{stage.name}: {part}")


def test_the_exported_base_says_what_the_trained_model_said(tmp_path, tokenizer):
    """Rounded to fp16, head and embedding both in the file."""
    model, run = tiny(tokenizer, 4), Course(tmp_path, hidden=32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half())
        text = f"{VICUNA_V1.user}: <image>\nWhat colour is the star? {VICUNA_V1.assistant}:"
        ids = torch.tensor([encode(tokenizer, text, model.config.image_token_index, SIDE * SIDE)])
        values = pixels([draw(sample_scene("test", 0))])
        before = model(input_ids=ids, pixel_values=values).logits
        run.export(model)
        base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
        torch.testing.assert_close(base(input_ids=ids, pixel_values=values).logits, before, atol=1e-4, rtol=1e-4)
    assert base.lm_head.weight is not base.model.language_model.embed_tokens.weight


@pytest.mark.slow
def test_the_recipe_trains_its_twig_by_the_users_program(tmp_path, tokenizer, monkeypatch):
    """Once; what comes out is a base and a twig that fit."""
    flags = ("--batch-size", "2", "--max-steps", "1", "--held-out", "0", "--max-length", "4000")
    monkeypatch.setattr(train, "TWIG_FLAGS", flags)
    started = []
    monkeypatch.setattr(
        train,
        "subprocess",
        SimpleNamespace(run=lambda words, cwd, check: started.append(words) or warm.run(words[1:], cwd)),
    )
    run = Course(tmp_path, hidden=32, workers=0)
    run.export(tiny(tokenizer, 32))
    run.run(("twig",))
    assert twigvlm.load(tmp_path / "base", tmp_path / "twig", device="cpu").config.T == 3
    run.run(("twig",))
    assert len(started) == 1, "trained again"
