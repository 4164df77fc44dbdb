"""What a training starts from: our folder, a released file that says T alone, a pruning head of its own or a fresh one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.conftest import quietly, twig_of
from training.test_training import CPU, FP32
from twigvlm.errors import InputError
from twigvlm.loading.twig import stored_twig
from twigvlm.model.twig import CONFIG, WEIGHTS, describe, stored_state, write_twig
from twigvlm.training.data.loading import with_start
from twigvlm.training.launch import foresee
from twigvlm.training.plus.subject import PolicyLesson, stage_identity
from twigvlm.training.run import report
from twigvlm.training.run.results import export_release
from twigvlm.training.settings import Settings
from twigvlm.training.subject import behind
from twigvlm.training.twig import Start, prepare_twig

pytest.importorskip("accelerate")
LETTERS = ("--K", "2", "--T", "2")
FLAGS = (*LETTERS, "--held-out", "0", "--max-steps", "1")


@pytest.fixture
def a_twig(world, tmp_path):
    """The folder of a twig, untrained, whose pruning head began as said."""

    def make(head: str = "", **facts) -> Path:
        torch.manual_seed(3)
        start = Start(2, 2, 5, pruning_head=head)
        found = prepare_twig(world / "base", start, CPU, FP32)
        folder = tmp_path / f"twig-{head or 'plain'}{len(facts) or ''}"
        write_twig(folder, stored_state(found.twig), describe(found.twig, "tiny", found.signature) | facts)
        return folder

    return make


@pytest.fixture
def settings(world):
    """Of a training of the launcher."""

    def make(**more) -> Settings:
        data = {"data": str(world / "data.json"), "images": str(world / "images"), "device": "cpu"}
        return Settings(base=str(world / "base"), K=2, T=more.pop("T", 2), **data, **more)

    return make


# ---------------------------------------------------------------------- as released


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("stage,head", [(0, ""), (1, ""), (1, "released"), (2, "released")])
def test_a_released_file_is_a_start(a_twig, settings, run, tmp_path, stage, head, bare):
    """The bare file, or a folder that holds nothing else."""
    folder = a_twig(head)
    export_release(folder, tmp_path / "released" / WEIGHTS)
    init = tmp_path / "released" / WEIGHTS if bare else tmp_path / "released"
    foresee(settings(stage=stage, init=str(init)))
    more = ("--stage", str(stage), "--init", str(init), *(("--groups", "2") if stage == 2 else ()))
    code, said = run("out", *FLAGS, *more, "--lr", "1e-9", "--warmup", "0")
    assert code == 0, said
    before, after = twig_of(folder), twig_of(tmp_path / "out")
    assert all((after[name] - tensor).abs().max() < 1e-6 for name, tensor in before.items())
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["F"] == 4, "the usual one: the file says none"


def test_a_released_file_without_head_is_no_start_of_stage_2(a_twig, settings, run, tmp_path):
    export_release(a_twig(), tmp_path / "rel.safetensors")
    init = str(tmp_path / "rel.safetensors")
    with pytest.raises(InputError, match="--head-init identity"):
        foresee(settings(stage=2, init=init))
    code, said = run("out", *FLAGS, "--stage", "2", "--groups", "2", "--init", init, "--head-init", "identity")
    assert code == 0 and stored_twig(tmp_path / "out").pruning_head == "identity", said


def test_letters_that_the_weights_contradict(a_twig, settings, run, tmp_path):
    export_release(a_twig("released"), tmp_path / "rel.safetensors")
    init, match = str(tmp_path / "rel.safetensors"), "T = 3 was asked for, but the twig was grown with T = 2"
    with pytest.raises(InputError, match=match):
        foresee(settings(T=3, init=init))
    code, said = run("out", "--K", "2", "--T", "3", "--init", init)
    assert code == 2 and match in said and "Traceback" not in said, said
    with pytest.raises(InputError, match="or a twig's folder or file is needed"):
        Start(2, 2, init=str(tmp_path / "nowhere.safetensors"))


def test_a_signature_counts_where_there_is_one(world, a_twig, tmp_path):
    folder = a_twig(base_signature=[9.0] * 16)
    with pytest.raises(InputError, match="this twig grew on other weights"):
        prepare_twig(world / "base", Start(2, 2, init=str(folder)), CPU, FP32)
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / WEIGHTS, tmp_path / "bare")
    prepare_twig(world / "base", Start(2, 2, init=str(tmp_path / "bare")), CPU, FP32)


# ---------------------------------------------------------------------- a pruning head


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("has,asked", [("released", "identity"), ("identity", "released")])
def test_another_head_than_the_twigs_is_refused(a_twig, settings, run, stage, has, asked):
    """Before data are drawn, and by the training itself; the twig's own head needs no flag."""
    init = str(a_twig(has))
    match = f"head_init is '{asked}', but {init} has a twig whose pruning head is '{has}'; leave --head-init out"
    with pytest.raises(InputError, match=match):
        foresee(settings(stage=stage, init=init, head_init=asked))
    code, said = run("out", *FLAGS, "--stage", str(stage), "--init", init, "--head-init", asked)
    assert code == 2 and match in said and "Traceback" not in said, said
    for fitting in (None, has):
        foresee(settings(stage=stage, init=init, head_init=fitting))


def test_the_head_that_learns_makes_the_run(a_twig, settings):
    """Not the one that would have been fresh; in stage 2 only a fresh one is told."""

    def told(**more) -> str | None:
        return stage_identity(settings(**more)).get("head_init")

    assert told(stage=1) == "released" and told(stage=1, head_init="identity") == "identity"
    assert told(stage=1, init=str(a_twig("identity"))) == "identity"
    assert told(stage=1, init=str(a_twig())) == "released"
    assert told(stage=2, init=str(a_twig("released"))) is None
    assert told(stage=2, init=str(a_twig("released")), head_init="released") is None
    assert told(stage=2, init=str(a_twig()), head_init="identity") == "identity"


def test_stored_settings_may_say_the_usual_head(settings):
    """Those of earlier runs do, whatever their stage."""
    assert settings(head_init="released").stage == 0
    with pytest.raises(InputError, match="head_init is 'identity'; it is for --stage 1 or 2"):
        settings(head_init="identity")


# ---------------------------------------------------------------------- a method before the decoder


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_goes_on_behind_what_its_start_learnt_behind(a_twig, settings, run, tmp_path, stage):
    """Taken over and announced; another method is refused before data are drawn, and by the training itself."""
    init = str(a_twig("released", tower_pruning="visionzip:keep=3"))
    for fitting in (None, "visionzip:keep=3"):
        foresee(settings(stage=stage, init=init, tower_pruning=fitting))
    words = (*FLAGS, "--stage", str(stage), "--init", init, *(("--groups", "2") if stage == 2 else ()))
    code, said = run("out", *words)
    assert code == 0 and "behind visionzip:keep=3 as that twig" in said, said
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["tower_pruning"] == "visionzip:keep=3"
    assert json.loads((tmp_path / "out/run.json").read_text())["identity"]["tower_pruning"] == "visionzip:keep=3"
    match = f"tower_pruning is 'visionzip:keep=2', but {init} has a twig that learnt behind visionzip:keep=3"
    with pytest.raises(InputError, match=match):
        foresee(settings(stage=stage, init=init, tower_pruning="visionzip:keep=2"))
    code, said = run("other", *words, "--tower-pruning", "visionzip:keep=2")
    assert code == 2 and match in said and "Traceback" not in said, said


def test_a_plan_and_a_plain_twig_know_the_method_of_the_start(a_twig, run, world):
    """A plan is made behind it; stage 0 learns anew what it is asked, and a stage may begin behind a method."""
    tuned = Settings(stage=1, init=str(a_twig("released", tower_pruning="visionzip:keep=3")))
    code, said = run("out", *LETTERS, "--stage", "1", "--init", tuned.init, "--dry-run")
    assert code == 0 and "visionzip:keep=3 leaves 3 tokens" in said, said
    assert with_start(Settings(init=tuned.init)).tower_pruning is None
    plain = replace(tuned, init=str(a_twig("released")), tower_pruning="visionzip:keep=3")
    assert with_start(plain).tower_pruning == "visionzip:keep=3" and "as that twig" not in behind(plain)


# ---------------------------------------------------------------------- samples


@pytest.mark.parametrize("aside", [False, True])
def test_stage_2_leaves_samples_without_an_image_out(world, a_twig, run, tmp_path, capfd, aside):
    """Of what is learnt and of what is held out; they are counted, and a file of such alone is refused."""
    init = str(a_twig("released"))
    words = ("--stage", "2", "--init", init, "--groups", "2", *LETTERS, "--agreement", "labels", "--epochs", "1")
    more = ("--held-out", "9", "--held-out-data", str(world / "data.json")) if aside else ("--held-out", "2")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = PolicyLesson.__call__
        patch.setattr(PolicyLesson, "__call__", lambda self, batch: seen.append(batch) or real(self, batch))
        code, said = run("out", *words, *more, "--max-steps", "0")
    assert code == 0 and "note: 6 samples without an image are left out" in said, said
    assert all(index % 4 for batch in seen for index in batch["indices"])
    facts = json.loads((tmp_path / "out/run.json").read_text())
    assert facts["identity"]["data"]["samples"] == (18 if aside else 16)
    assert all(line["reward"] < 0 for line in report.history(tmp_path / "out"))
    assert (tmp_path / "out/skipped.jsonl").read_text() == "", "nothing is wrong with them"
    records = json.loads((world / "data.json").read_text())
    (tmp_path / "text.json").write_text(json.dumps([record for record in records if "image" not in record]))
    where = ("--base", str(world / "base"), "--data", str(tmp_path / "text.json"), "--out", str(tmp_path / "none"))
    assert quietly([*where, *words, "--device", "cpu", "--held-out", "0"]) == 2
    assert "none of its 6 samples has an image to choose from" in capfd.readouterr().err
