"""What the embedded model is asked on its test split, and how answers are judged: short ones by kind, whole descriptions."""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

import twigvlm

from ..prompt.template import decode
from ..record import tokens_per_step
from ..world.draw import draw
from ..world.questions import KINDS, Question, ask, describe
from ..world.scenes import Scene, sample_scene

SENTENCE = re.compile(r"(?:At|In) the ([a-z ]+) there is an? (?:small|large) ([a-z]+) ([a-z]+)\.")


@dataclass(frozen=True)
class Setting:
    """One row of the report: pruned how and to what average (R None keeps everything), drafts of what length."""

    pruning: str = "twig"
    R: float | None = None
    draft_length: int = 5

    @property
    def name(self) -> str:
        return "base" if self.R is None else f"{self.pruning} R={self.R}"


PLAIN = Setting(draft_length=0)
LONGEST = 160  # tokens of a description


def quiz(scenes: int, split: str = "test") -> list[tuple[Scene, list[Question]]]:
    """One question of each kind about each scene (where it has one)."""
    out = []
    for seed in range(scenes):
        scene = sample_scene(split, seed)
        rng = random.Random(f"quiz {split} {seed}")
        asked = [q for q in (ask(scene, kind, rng) for kind in KINDS) if q]
        out.append((scene, asked))
    return out


def batch(vlm: twigvlm.TwigVLM, scene: Scene, texts: list[str]) -> dict[str, torch.Tensor]:
    """Several questions about one picture as rows of `generate`."""
    picture = draw(scene)
    rows = [vlm.prepare(picture, text) for text in texts]
    width = max(r["input_ids"].shape[1] for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : row["input_ids"].shape[1]] = row["input_ids"][0]
        mask[i, : row["input_ids"].shape[1]] = 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat([r["pixel_values"] for r in rows])}


def short_answers(
    vlm: twigvlm.TwigVLM, asked: Sequence[tuple[Scene, list[Question]]], setting: Setting
) -> list[list[bool]]:
    """Of each scene, whether the answer to each of its questions is exactly right."""
    right = []
    for scene, questions in tqdm(asked, desc=setting.name, leave=False):
        inputs = batch(vlm, scene, [q.text for q in questions])
        out = vlm.generate(
            **inputs,
            retained_tokens=setting.R,
            pruning=setting.pruning,
            draft_length=0,
            max_new_tokens=8,
            seed=scene.seed,
        )
        told = [decode(vlm.tokenizer, tokens).strip() for tokens in out.tokens]
        right.append([text == q.answer for text, q in zip(told, questions, strict=True)])
    return right


@dataclass(frozen=True)
class Told:
    """Of each description, whether every object (place, colour, shape) is right and whether the text is; and what drafts gave."""

    objects: list[bool]
    exact: list[bool]
    acceptance: float | None  # percent
    tau: float  # tokens that a verification yields


def descriptions(vlm: twigvlm.TwigVLM, scenes: Sequence[Scene], setting: Setting) -> Told:
    objects, exact, drafted, accepted, steps = [], [], 0, 0, 0
    for scene in tqdm(scenes, desc=f"describe, {setting.name}", leave=False):
        out = _described(vlm, scene, setting)
        text, truth = decode(vlm.tokenizer, out.tokens[0]).strip(), describe(scene)
        objects.append(sorted(SENTENCE.findall(text)) == sorted(SENTENCE.findall(truth)))
        exact.append(text == truth)
        drafted, accepted = drafted + out.stats.drafted, accepted + out.stats.accepted
        steps += out.stats.steps
    return Told(objects, exact, 100 * accepted / drafted if drafted else None, tokens_per_step(accepted, steps))


def relative_speed(vlm: twigvlm.TwigVLM, scenes: Sequence[Scene], setting: Setting) -> float:
    """Percent: tokens per second of a description under `setting`, prefill included, of plain decoding without pruning right before it; the median."""
    ratios = []
    for scene in scenes:
        plain, out = _described(vlm, scene, PLAIN), _described(vlm, scene, setting)
        ratios.append(100 * out.stats.tokens_per_second / plain.stats.tokens_per_second)
    return statistics.median(ratios)


def _described(vlm: twigvlm.TwigVLM, scene: Scene, setting: Setting):
    return vlm.generate(
        **vlm.prepare(draw(scene), "Describe the image in detail."),
        retained_tokens=setting.R,
        pruning=setting.pruning,
        draft_length=setting.draft_length,
        max_new_tokens=LONGEST,
    )


def percent(right: Iterable[bool]) -> float:
    right = list(right)
    return 100 * sum(right) / len(right)
