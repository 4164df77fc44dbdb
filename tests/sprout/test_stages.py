"""The recipe's stages: what each begins with, what it leaves, how it is stopped, and what the cut leaves untouched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from twigvlm.config import TwigConfig
from twigvlm.families import trunk_of
from twigvlm.loading.base import load_base
from twigvlm.model.twig import grow, save_twig
from twigvlm.prompt.template import VICUNA_V1, encode
from twigvlm.sprout import train
from twigvlm.sprout.recipe.language import start, tie
from twigvlm.sprout.recipe.lessons import FILL, lesson_batch
from twigvlm.sprout.recipe.pruned import Pruned
from twigvlm.sprout.recipe.tokenizer import build_tokenizer
from twigvlm.sprout.recipe.tower import SIDE, pixels
from twigvlm.sprout.train import EXPORTED, STAGES, TOWER, Course, config
from twigvlm.training.run import checkpoints
from twigvlm.vlm import TwigVLM
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
    assert train.main(["--out", str(tmp_path), "--stages", "pruned", "--device", "cpu"]) == 2
    assert "no base there" in capsys.readouterr().err
    Course(tmp_path, hidden=32).export(tiny(build_tokenizer(), 32), "whole")
    assert train.main(["--out", str(tmp_path), "--stages", "pruned", "--device", "cpu"]) == 2
    assert "--stages twig,pruned" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--stages", "words-5"), "words-5"),
        (("--steps", "words-4=many"), "NAME=N"),
        (("--steps", "words-5=1"), "words-5"),
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


@pytest.mark.slow
def test_a_killed_recipe_ends_with_the_same_weights(tmp_path):
    """Killed in the middle of a stage and started again: the run that was never disturbed, but for the last bits of sums."""
    command = [sys.executable, "-m", "twigvlm.sprout.train", "--hidden", "32", "--device", "cpu", "--workers", "0"]
    command += ["--stages", "words-4,short-4", "--steps", "words-4=6,short-4=2", "--save-seconds", "0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = subprocess.Popen([*command, "--out", broken], cwd=ROOT, stderr=subprocess.DEVNULL)
    steps = {"words-4": 6, "short-4": 2}
    courses = [Course(out, hidden=32, workers=0, steps=steps) for out in (whole, broken)]
    while not checkpoints.checkpoints(broken / "words-4-saved"):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (broken / "short-4-done.pt").exists(), "killed too late to prove anything"
    for run in courses:
        run.run(("words-4", "short-4"))
    one, other = (torch.load(d / "short-4-done.pt", weights_only=True) for d in (whole, broken))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0, msg=name)


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


def test_each_stage_begins_with_what_the_one_before_left(tmp_path, tokenizer):
    run = Course(tmp_path, hidden=32)
    by_name = {stage.name: stage for stage in STAGES}
    seeds = {stage.name: seed for seed, stage in enumerate(STAGES)}

    def left(name: str):
        return tiny(tokenizer, by_name[name].layers, seeds[name])

    for stage in STAGES:
        torch.save(left(stage.name).state_dict(), run.done(stage.name))
        if stage.name in EXPORTED:
            run.export(left(stage.name), EXPORTED[stage.name])
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
                torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3, msg=f"{stage.name}: {part}")


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
        run.export(model, "base")
        base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
        torch.testing.assert_close(base(input_ids=ids, pixel_values=values).logits, before, atol=1e-4, rtol=1e-4)
    assert base.lm_head.weight is not base.model.language_model.embed_tokens.weight


def test_rows_of_one_answer_end_with_it(tokenizer):
    lesson = replace(STAGES[-1].lesson, scenes=3)
    assert lesson.one_answer
    batch = lesson_batch(1, lesson, tokenizer)
    counted = batch["weights"] > 0
    for row, last in enumerate(batch["last"].tolist()):
        places = counted[row].nonzero().flatten()
        assert torch.equal(places, torch.arange(last + 1, last + 1 + len(places)))
        assert batch["ids"][row, places[-1]] == 2 and not batch["ids"][row, places[-1] + 1 :].any()
    assert batch["left"] in FILL


def test_a_row_behind_the_cut_is_what_the_road_scores(tokenizer, tmp_path):
    """The stage's loss is that of the answers under the twig's pruning, as `score` has it."""
    Course(tmp_path, hidden=32).export(tiny(tokenizer, 8), "whole")
    loaded = load_base(tmp_path / "whole", CPU, torch.float32, "sdpa")
    trunk = trunk_of(loaded.model)
    vlm = TwigVLM(loaded, grow(trunk, TwigConfig(trunk.L, 2, 2, 6)).eval())
    batch = lesson_batch(0, replace(STAGES[-1].lesson, scenes=1, talks=3), tokenizer)
    R = (2 * SIDE * SIDE + 4 * batch["left"]) / 8
    total = counted = 0.0
    for row, (ids, weights) in enumerate(zip(batch["ids"].tolist(), batch["weights"].tolist(), strict=True)):
        last, head = batch["last"][row].item(), batch["heads"][row].item()
        answer = [i for i, w in zip(ids, weights, strict=True) if w > 0]
        prompt = torch.tensor([[*ids[:head], *[vlm.image_token_id] * (SIDE * SIDE), *ids[head : last + 1]]])
        (found,) = vlm.score(prompt, [answer], pixel_values=batch["pixels"][:1], retained_tokens=R)
        total -= max(weights) * found.log_probabilities.sum().item()
        counted += max(weights) * len(answer)
    tie(loaded.model)
    with torch.no_grad():
        loss, _ = Pruned(loaded.model, vlm.twig.layers, vlm.twig.config).loss(batch)
    assert loss.item() == pytest.approx(total / counted, rel=1e-3)


def test_nothing_below_the_cut_learns_from_pruned_pictures(tmp_path, tokenizer, monkeypatch):
    """The twig goes on fitting: after the stage, all that it stands on is what it was."""
    run = Course(tmp_path, hidden=32, workers=0, steps={"pruned": 1})
    run.export(tiny(tokenizer, 32), "whole")
    trunk = trunk_of(load_base(tmp_path / "whole", CPU, torch.float32, "sdpa").model)
    save_twig(grow(trunk, TwigConfig(trunk.L)), trunk, tmp_path / "twig", base="whole")
    short = replace(STAGES[-1], lesson=replace(STAGES[-1].lesson, scenes=1, talks=1))
    monkeypatch.setattr(train, "STAGES", [short])
    run.run(("pruned",))
    before, after = (
        LlavaForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        for name in ("whole", "base")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    above = [f"model.language_model.layers.{layer}." for layer in range(2, 32)] + ["model.language_model.norm"]
    assert changed and all(any(name.startswith(part) for part in above) for name in changed), changed
