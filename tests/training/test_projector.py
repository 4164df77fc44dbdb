"""A projector that learns behind a pruning method: the loss that generation would see, what changes, and how it is used."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import twigvlm
from training.test_training import CPU, a_batch, equal
from twigvlm.errors import InputError
from twigvlm.loading.projector import CONFIG
from twigvlm.model.twig import WEIGHTS
from twigvlm.training.data.examples import IGNORE
from twigvlm.training.projector import ProjectorLesson, ProjectorSubject
from twigvlm.training.run.device import Run
from twigvlm.training.run.ranks import ALONE
from twigvlm.training.settings import Settings

FLAGS = ("--learn", "projector", "-R", "2", "--held-out", "4", "--max-steps", "6", "--lr", "0.01")


@pytest.fixture
def prepared(world):
    settings = Settings(base=str(world / "base"), learn="projector", retained_tokens=2.0)
    subject = ProjectorSubject(settings)
    found = subject.prepare(Run(settings, ALONE, CPU, "fp32", None))
    return found, ProjectorLesson(found.base, found.module, subject.reducer(found.base))


def test_the_loss_is_what_the_pruned_base_thinks_of_the_answers(world, prepared):
    """`score` reads the same tokens behind the same reduction."""
    found, lesson = prepared
    vlm = twigvlm.load(world / "base", device="cpu", dtype="float32")
    for sample in (1, 2, 3, 4):  # one of them without a picture
        batch = a_batch(world, found.base, [sample])
        loss, figures = lesson(batch)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        first = int((labels != IGNORE).nonzero()[0])
        likely = vlm.score(
            ids[None, :first], [ids[first:].tolist()], batch["pixel_values"], retained_tokens=2, pruning="visionzip"
        )
        learnt = labels[first:] != IGNORE
        torch.testing.assert_close(loss.detach(), -likely[0].log_probabilities[learnt].mean(), rtol=1e-4, atol=1e-5)
        assert int(figures["answers"]) == int(learnt.sum())
        assert int(figures["right"]) == int(likely[0].greedy[learnt].sum())


def test_only_the_projector_learns(world, prepared):
    found, lesson = prepared
    before = {k: v.clone() for k, v in found.base.model.state_dict().items()}
    optimizer = torch.optim.AdamW(found.module.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(lesson(a_batch(world, found.base))[0])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert equal(before, found.base.model.state_dict())
    assert all(p.grad is None for p in found.base.model.parameters())


def test_company_changes_nothing(world, prepared):
    found, lesson = prepared
    together, figures = lesson(a_batch(world, found.base, [1, 2, 4]))
    alone = [lesson(a_batch(world, found.base, [i])) for i in (1, 2, 4)]
    mean = sum(one * int(f["answers"]) for one, f in alone) / int(figures["answers"])
    torch.testing.assert_close(together, mean, rtol=1e-5, atol=1e-6)


def test_a_run_leaves_a_projector_that_the_method_takes(world, run, tmp_path):
    code, out = run("tuned", *FLAGS)
    assert code == 0 and "the projector learns, visionzip leaves 2 tokens of an image" in out
    folder = tmp_path / "tuned"
    facts = json.loads((folder / CONFIG).read_text())
    assert facts["pruning"] == "visionzip" and facts["retained_tokens"] == 2
    assert "visionzip*:projector=" in (folder / "README.md").read_text()
    vlm = twigvlm.load(world / "base", device="cpu", dtype="float32")
    batch = a_batch(world, vlm.trunk, [1])
    asked = {
        "input_ids": batch["input_ids"],
        "pixel_values": batch["pixel_values"],
        "retained_tokens": 2,
        "max_new_tokens": 6,
    }
    own = vlm.score(asked["input_ids"], [[5, 6, 7]], batch["pixel_values"], retained_tokens=2, pruning="visionzip")
    tuned = vlm.score(asked["input_ids"], [[5, 6, 7]], batch["pixel_values"], retained_tokens=2,
                      pruning=f"visionzip*:projector={folder}")  # fmt: skip
    assert not torch.equal(own[0].log_probabilities, tuned[0].log_probabilities)
    vlm.model.model.multi_modal_projector.load_state_dict(load_file(folder / WEIGHTS))
    within = vlm.score(asked["input_ids"], [[5, 6, 7]], batch["pixel_values"], retained_tokens=2, pruning="visionzip")
    torch.testing.assert_close(within[0].log_probabilities, tuned[0].log_probabilities)
    code, out = run("tuned", *FLAGS)
    assert code == 0 and "nothing to continue" in out


def test_a_stopped_run_goes_on_to_the_same_bits(run, tmp_path, monkeypatch):
    run("whole", *FLAGS, "--save-steps", "2")
    real, calls = ProjectorLesson.__call__, [0]

    def killed(self, batch):
        calls[0] += 1
        if calls[0] == 20:
            raise KeyboardInterrupt
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ProjectorLesson, "__call__", killed)
        assert run("again", *FLAGS, "--save-steps", "2")[0] != 0
    code, out = run("again", *FLAGS, "--save-steps", "2")
    assert code == 0 and "continuing from" in out
    assert equal(load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--pruning", "fastv"), "a method before the decoder"),
        (("--pruning", "nothing"), "known methods"),
        (("-R", "99"), "legal is"),
        (("--lora-rank", "2"), "is for twigs"),
        (("--dry-run",), "plans the training of a twig"),
    ],
)
def test_what_cannot_be_is_refused(run, flags, word):
    code, out = run("no", *FLAGS, *flags)
    assert code == 2 and word in out


def test_a_projector_of_another_base_is_refused(world, run, tmp_path):
    run("tuned", *FLAGS)
    folder = tmp_path / "tuned"
    vlm = twigvlm.load(world / "base", device="cpu", dtype="float32")

    def ask():
        batch = a_batch(world, vlm.trunk, [1])
        vlm.score(
            batch["input_ids"],
            [[5]],
            batch["pixel_values"],
            retained_tokens=2,
            pruning=f"visionzip*:projector={folder}",
        )

    facts = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(facts | {"base_signature": [1.0] * 16}))
    with pytest.raises(InputError, match="tuned for other weights"):
        ask()
    (folder / CONFIG).write_text(json.dumps(facts))
    save_file({"linear_1.weight": torch.zeros(2, 2)}, folder / WEIGHTS)
    with pytest.raises(InputError, match="not this base's projector"):
        ask()
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="no tuned projector"):
        ask()
    with pytest.raises(InputError, match="needs a projector tuned for R = 2"):
        batch = a_batch(world, vlm.trunk, [1])
        vlm.score(batch["input_ids"], [[5]], batch["pixel_values"], retained_tokens=2, pruning="visionzip*")
