"""The batches of the decoder's stages: conversations about scenes seen as nine symbols, as many, or as pictures.

A symbol is the sum of the embeddings of the words for what one patch shows. Batch number `n` of a
lesson depends on `n` alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from ...world.draw import draw
from ...world.scenes import WORDS, Scene, sample_scene
from .align import align_batch
from .naming import looks
from .symbols import CELL_CENTRES, NOTHING, cell_symbols, patch_symbols, stratified, word_ids
from .talk import collate, converse
from .tower import SIDE, pixels

STREAM = 5 << 34  # far from the seeds of the packed stages and of the drawn conversations
FAMILY = 8  # seeds that differ in their upper bits
LOST = 0.1  # share of the words that a symbol lacks in the stage of many symbols
LOOKING_WEIGHT = 0.3
FILL = (41, 41, 134, 227)  # visual tokens that pruning leaves: r at R = 64 (twice as often), 128, 192


@dataclass(frozen=True)
class Lesson:
    """`scenes` a batch, each seen as `kind` and talked about in `talks` rows of at most `length` words' tokens.

    `shares` are the parts of the patches that are seen (one is drawn a step): 1 is all, 1/n one
    random patch of every n; 0 is what pruning might leave (and nothing of it in the last quarter of the layers). `asked_weight` is what a question's own
    words count as targets; over the first `helped` steps there is a (fading) loss on looking.
    `offset` chooses the scenes; a share `described` of the rows holds a description, a share
    `drilled` of the short turns are drills, and
    a share `worded` of the scenes certainly has a printed word (else two in five do).
    """

    offset: int
    kind: str = "cells"  # or "patches" (symbols), "pictures", or windows of them: "labels" and "windows"
    scenes: int = 16
    talks: int = 1
    shares: tuple[float, ...] = (1.0,)
    asked_weight: float = 0.15
    helped: int = 0
    length: int = 160
    described: float = 0.2
    drilled: float = 0.2
    worded: float = 0.5
    window: int = SIDE // 2  # patches a side


def lesson_batch(step: int, lesson: Lesson, tokenizer) -> dict:
    """Batch number `step`: rows [scenes x talks] and what is seen of each scene."""
    first = STREAM + (lesson.offset << 28) + step * lesson.scenes
    scenes = [_scene(first + i, lesson.worded) for i in range(lesson.scenes)]
    of = [i for i in range(lesson.scenes) for _ in range(lesson.talks)]
    seeds = [f"{scenes[i].seed} {n % lesson.talks}" for n, i in enumerate(of)]
    talks = [converse(scenes[i], random.Random(seed), tokenizer, lesson) for i, seed in zip(of, seeds, strict=True)]
    batch = collate(talks, lesson.length) | {"of": torch.tensor(of), "help": 0.0}
    if step < lesson.helped:
        batch["help"] = LOOKING_WEIGHT * (1 - step / lesson.helped)
        for row, (i, talk) in enumerate(zip(of, talks, strict=True)):
            batch["looks"][row, : len(talk.ids)] = torch.tensor(looks(talk.ids, scenes[i], tokenizer))
    return batch | _seen(scenes, lesson, random.Random(first), tokenizer)


def _scene(seed: int, worded: float) -> Scene:
    """Training scene `seed`, or for a share `worded` of the seeds the next of its family that shows a word."""
    scene = sample_scene("train", seed)
    for other in range(1, FAMILY):
        if scene.word or random.Random(f"worded {seed}").random() >= worded:
            break
        scene = sample_scene("train", seed + (other << 37))
    return scene


def _seen(scenes: list[Scene], lesson: Lesson, rng: random.Random, tokenizer) -> dict:
    """`keep` [V'] and `symbols` [scenes, V', SYMBOLS] or `pixels`."""
    if lesson.kind == "cells":
        symbols = torch.stack([cells(s, tokenizer) for s in scenes])
        return {"keep": torch.tensor(CELL_CENTRES), "symbols": symbols, "nothing": nothing(tokenizer)}
    share = rng.choice(lesson.shares)
    wiped = {"wiped": share == 0}
    if share == 0:
        keep = torch.tensor(sorted(rng.sample(range(SIDE * SIDE), rng.choice(FILL))))
    else:
        keep = torch.arange(SIDE * SIDE) if share == 1 else stratified(share, rng)
    if lesson.kind == "pictures":
        return wiped | {"keep": keep, "pixels": pixels([draw(s) for s in scenes])}
    symbols = torch.stack([patches(s, tokenizer)[keep] for s in scenes])
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    lost = torch.rand(symbols.shape, generator=generator) < LOST
    return wiped | {"keep": keep, "symbols": symbols.masked_fill(lost, 0), "nothing": nothing(tokenizer)}


def nothing(tokenizer) -> int:
    """The word for an empty patch."""
    return int(word_ids(tokenizer, (NOTHING,))[0])


def cells(scene: Scene, tokenizer) -> torch.Tensor:
    """Nine symbols of a scene, token ids [9, SYMBOLS]."""
    return name_words(cell_symbols(scene, tokenizer), tokenizer)


def patches(scene: Scene, tokenizer) -> torch.Tensor:
    """A symbol for every patch, token ids [576, SYMBOLS]."""
    return name_words(patch_symbols(scene, tokenizer), tokenizer)


def name_words(symbols: torch.Tensor, tokenizer) -> torch.Tensor:
    """Patches of a printed word say "word" besides it: 64 words have nothing else in common by which to find them."""
    written = torch.from_numpy(np.isin(symbols[..., 6].numpy(), word_ids(tokenizer, WORDS)))
    out = symbols.clone()
    out[..., 0][written] = int(word_ids(tokenizer, ("word",))[0])
    return out


def window_batch(step: int, images: int, window: int, tokenizer) -> dict:
    """As align_batch, in the symbols of this recipe."""
    batch = align_batch(step, images, window, tokenizer)
    return batch | {"symbols": name_words(batch["symbols"], tokenizer)}
