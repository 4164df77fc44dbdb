"""What the embedded model is asked on its test split, and how answers are judged: short ones by kind, whole descriptions."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from tqdm import tqdm

import twigvlm

from ..prompt.template import decode
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
    vlm: twigvlm.TwigVLM, asked: list[tuple[Scene, list[Question]]], setting: Setting
) -> dict[str, list[bool]]:
    """Kind → whether each answer is exactly right."""
    right: dict[str, list[bool]] = defaultdict(list)
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
        for question, tokens in zip(questions, out.tokens, strict=True):
            right[question.kind].append(decode(vlm.tokenizer, tokens).strip() == question.answer)
    return right


def descriptions(vlm: twigvlm.TwigVLM, scenes: list[Scene], setting: Setting) -> dict[str, float]:
    """Shares of scenes with every object (place, colour, shape) right, of exact texts, and the drafts' acceptance."""
    objects = exact = drafted = accepted = 0.0
    for scene in tqdm(scenes, desc=f"describe, {setting.name}", leave=False):
        inputs = vlm.prepare(draw(scene), "Describe the image in detail.")
        out = vlm.generate(
            **inputs,
            retained_tokens=setting.R,
            pruning=setting.pruning,
            draft_length=setting.draft_length,
            max_new_tokens=160,
        )
        text = decode(vlm.tokenizer, out.tokens[0]).strip()
        truth = describe(scene)
        objects += sorted(SENTENCE.findall(text)) == sorted(SENTENCE.findall(truth))
        exact += text == truth
        drafted, accepted = drafted + out.stats.drafted, accepted + out.stats.accepted
    count = len(scenes)
    return {
        "objects": 100 * objects / count,
        "exact": 100 * exact / count,
        "acceptance": 100 * accepted / drafted if drafted else None,
    }
