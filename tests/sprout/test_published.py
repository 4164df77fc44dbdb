"""What the published weights know: questions about two scenes of the test split, their descriptions; and that the depth is used."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import LlavaForConditionalGeneration

import twigvlm
from twigvlm.loading.describe import EMBEDDED_BASE
from twigvlm.sprout import measure
from twigvlm.sprout.quiz import Setting, descriptions, quiz, short_answers
from twigvlm.sprout.recipe.language import Talk
from twigvlm.sprout.recipe.tokenizer import build_tokenizer
from twigvlm.world.draw import draw
from twigvlm.world.scenes import sample_scene

SCENES = 2  # of 8 and 9 questions
# Twig (None: the plain one), method and R (None: unpruned) → short answers and descriptions (every object right) that were
# right when the weights were published, of the second scene and of both.
RECORDED = {
    (None, "twig", None): ((9, 1), (17, 2)),
    (None, "twig", 64): ((9, 0), (15, 0)),
    (None, "twig-discount", 64): ((9, 1), (16, 2)),
    ("sprout-plus", "twig-discount", 64): ((9, 1), (16, 2)),
}
FIRST = (4, 16, 28)  # layers that a skipped block of four begins with
LOOKED_AT = ("colour", "count", "where", "describe")  # kinds of questions about a scene that tell what they do
GROWTH = 2.0  # of the surprise at the right answers, at least


@pytest.mark.slow
@pytest.mark.parametrize(
    ("twig", "method", "R"), [pytest.param(*one, marks=pytest.mark.nightly) if one[0] else one for one in RECORDED]
)
@pytest.mark.parametrize("scenes", [1, pytest.param(SCENES, marks=pytest.mark.nightly)])
def test_the_published_weights_answer_as_well_as_recorded(twig, method, R, scenes):
    vlm, setting = twigvlm.load(None, twig, device="cpu"), Setting(method, R)
    asked = quiz(SCENES)[-scenes:]
    right = sum(map(sum, short_answers(vlm, asked, setting)))
    told = sum(descriptions(vlm, [scene for scene, _ in asked], setting).objects)
    least = RECORDED[twig, method, R][scenes - 1]
    assert right >= least[0] and told >= least[1], (right, told)


@pytest.mark.slow
def test_every_part_of_the_depth_is_used():
    """Without any four layers in a row the right answers are less probable, most of all those of descriptions."""
    base = LlavaForConditionalGeneration.from_pretrained(EMBEDDED_BASE, dtype=torch.float32)
    task, tokenizer = Talk(base), build_tokenizer()
    scenes = measure.scenes_of("test", 1)
    numbers, _, rows = map(list, zip(*measure.quiz(scenes, tokenizer, LOOKED_AT), strict=True))
    asked = measure.Asked(numbers, [], rows, *measure.views(scenes, tokenizer, True))

    @torch.no_grad()
    def surprise(layers) -> float:
        """Nats a token of the right answers."""
        nats = []
        for some, batch in asked.batches(task.device):
            chances = task.logits(batch, layers).log_softmax(-1)[:, :-1].gather(-1, batch["ids"][:, 1:, None])[..., 0]
            nats += [-chances[i, begin - 1 : end - 1] for i, row in enumerate(some) for _, begin, end in row.turns]
        return torch.cat(nats).mean().item()

    whole = surprise(task.layers)
    without = {first: surprise([*task.layers[:first], *task.layers[first + 4 :]]) for first in FIRST}
    assert all(nats > GROWTH * whole for nats in without.values()), (whole, without)


@pytest.mark.slow
def test_the_demo_picture_is_described_right():
    """The picture that people see first: unpruned, as the README's first picture has it, and as `make demo` asks."""
    scene, vlm = sample_scene("test", 18), twigvlm.load(device="cpu")
    with Image.open(ROOT / "assets" / "image.png") as picture:
        assert picture.convert("RGB").tobytes() == draw(scene).tobytes()
    for setting in (Setting(), Setting("twig", 192), Setting("twig-discount", 64)):
        assert descriptions(vlm, [scene], setting).objects == [True], setting.name
