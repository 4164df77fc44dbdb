"""The decoder's stages of the recipe: it learns to answer, from symbols, from pictures, in depth.

The batches are packed (packing.py): some 22 questions share one prefix. Visual tokens may enter as
a stratified part of all, at their original positions, which is what makes the first thousands of
scenes affordable.
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from ...model.twig import Twig
from ...prompt.template import encode
from ...world.draw import centre_patches, draw, patch_labels
from ...world.scenes import COLOURS, GRID, PLACES, SHAPES, SIZES, WORDS, Scene, sample_scene
from . import looking, packing
from .base import CORE_PLACES, LAYERS
from .looking import SPAN
from .tower import SIDE, pixels

LOOKING_WEIGHT = 0.3  # of the look-up losses against the answers'
STREAMS = {"symbols": 1, "image": 2, "cells": 3}  # disjoint seed ranges of the training split
MARK, NOTHING = "object", "image"  # the words for an object's centre and for an empty patch
SYMBOLS = 8  # tokens that describe one patch, at most
SPARSE = (41, 41, 134, 227)  # visual tokens left: r at R = 64 (twice as often), 128, 192
AROUND = [row * SIDE + column for row in (-1, 0, 1) for column in (-1, 0, 1)]  # a patch and its neighbours
CELLS = [
    [(r * SPAN + i) * SIDE + c * SPAN + j for i in range(SPAN) for j in range(SPAN)]
    for r in range(GRID)
    for c in range(GRID)
]
CELL_CENTRES = [cell[len(cell) // 2 + SPAN // 2] for cell in CELLS]


def decoder_batch(
    step: int, rows: int, kind: str, keep_share: float, tokenizer, offset: int = 0, whole_share: float = 0.0
) -> dict:
    """Batch number `step` of `rows` training scenes, as "cells", as "symbols" or as pictures ("image").

    A share `whole_share` of the steps shows all visual tokens, the others a part `keep_share`, one
    random patch of each small block.
    """
    rng = random.Random(f"{kind} {offset} {step}")
    first = (STREAMS[kind] << 34) + (offset << 28) + step * rows
    scenes = [sample_scene("train", first + i) for i in range(rows)]
    packed = [packing.pack(s, random.Random(s.seed), tokenizer) for s in scenes]
    names = ("ids", "labels", "positions", "weights", "looks", "evidence", "points")
    batch = {name: torch.from_numpy(np.stack([getattr(p, name) for p in packed])) for name in names}
    batch["centres"] = torch.tensor([centre_patches(s) for s in scenes])
    head = encode(tokenizer, packing.prefix_text().split("<image>")[0], -1, 0)
    batch["prefix"] = torch.tensor(head).expand(rows, -1).clone()
    batch["keep"] = torch.arange(SIDE * SIDE) if rng.random() < whole_share else _stratified(keep_share, rng)
    if kind == "cells":
        batch["keep"] = torch.tensor(CELL_CENTRES)
        batch["centres"] = torch.where(batch["centres"] < 0, -1, batch["keep"])
        batch["symbols"] = torch.stack([cell_symbols(s, tokenizer) for s in scenes])
    else:
        batch["symbols"] = torch.stack([patch_symbols(s, tokenizer)[batch["keep"]] for s in scenes])
    batch["nothing"] = int(_word_ids(tokenizer, (NOTHING,))[0])
    if kind == "image":
        batch["pixels"] = pixels([draw(s) for s in scenes])
    return batch


def sparse_batch(step: int, tokenizer, whole_share: float, offset: int) -> dict:
    """One training picture, of which a share `whole_share` of the steps shows all, the others what pruning might leave.

    That is some patches around the centres of things, filled up with chance ones: without such
    pictures a decoder counts by how much of the background it sees.
    """
    rng = random.Random(f"sparse {offset} {step}")
    batch = decoder_batch(step, 1, "image", 1, tokenizer, offset)
    if rng.random() < whole_share:
        return batch
    kept = rng.choice(SPARSE)
    near = (batch["centres"][0][:, None] + torch.tensor(AROUND)).clamp(0, SIDE * SIDE - 1)
    things = [p for centre, around in zip(batch["centres"][0], near.tolist(), strict=True) if centre >= 0
              for p in rng.sample(around, rng.randint(3, len(AROUND)))]  # fmt: skip
    things = rng.sample(sorted(set(things)), min(kept, len(set(things))))
    rest = sorted(set(range(SIDE * SIDE)) - set(things))
    batch["keep"] = torch.tensor(sorted(things + rng.sample(rest, kept - len(things))))
    batch["symbols"] = batch["symbols"][:, batch["keep"]]
    return batch


def patch_symbols(scene: Scene, tokenizer) -> torch.Tensor:
    """What each patch shows, in words: token ids [576, SYMBOLS], 0 = none.

    The sum of these words' embeddings is what a perfect tower and projector would say.
    """
    labels = patch_labels(scene).reshape(-1, 5)
    out = np.zeros((len(labels), SYMBOLS), np.int64)
    out[:, 3:6] = _place_words(tokenizer)
    words = [_word_ids(tokenizer, names) for names in (SHAPES, COLOURS, SIZES)]
    for i, table in enumerate(words):
        out[:, i] = np.concatenate([[0], table])[labels[:, i]]
    out[:, 6] = np.concatenate([[0], _word_ids(tokenizer, WORDS)])[labels[:, 3]]
    empty = (labels[:, 0] == 0) & (labels[:, 3] == 0)
    out[empty, 6] = _word_ids(tokenizer, (NOTHING,))[0]
    out[labels[:, 4] == 1, 7] = _word_ids(tokenizer, (MARK,))[0]
    return torch.from_numpy(out)


def cell_symbols(scene: Scene, tokenizer) -> torch.Tensor:
    """One patch for each cell of the grid, the one that tells most: token ids [9, SYMBOLS]."""
    symbols = patch_symbols(scene, tokenizer).numpy()
    told = (symbols > 0).sum(1) + (symbols[:, 6] != _word_ids(tokenizer, (NOTHING,))[0])
    cells = np.array(CELLS)
    return torch.from_numpy(symbols[cells[np.arange(len(cells)), told[cells].argmax(1)]])


@lru_cache
def _word_ids(tokenizer, words: tuple[str, ...]) -> np.ndarray:
    return np.array([encode(tokenizer, word, -1, 0, bos=False)[0] for word in words])


@lru_cache
def _place_words(tokenizer) -> np.ndarray:
    """[576, 3]: the words of the cell that each patch lies in."""
    names = [PLACES[(r // SPAN) * GRID + c // SPAN].split() for r in range(SIDE) for c in range(SIDE)]
    return np.array([[*_word_ids(tokenizer, tuple(n)), 0, 0][:3] for n in names])


def spell(symbols: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Ids [..., SYMBOLS] → the sum of their rows of the embedding table [..., D]."""
    return (F.embedding(symbols, table) * (symbols > 0)[..., None]).sum(-2)


def _stratified(share: float, rng: random.Random) -> torch.Tensor:
    """One patch of every block of `1/share` (a square number) patches, raster order."""
    block = round(share**-0.5)
    steps = range(0, SIDE, block)
    picks = [(r + rng.randrange(block)) * SIDE + c + rng.randrange(block) for r in steps for c in steps]
    return torch.tensor(sorted(picks))


def visual_tokens(
    model: LlavaForConditionalGeneration, values: torch.Tensor, keep: torch.Tensor, train_tower: bool = False
) -> torch.Tensor:
    """Projected visual tokens [B, kept, D] of pixels [B, 3, h, w]; no gradient enters the tower unless it is trained."""
    with torch.set_grad_enabled(train_tower):
        tower = model.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(values))
        for layer in tower.encoder.layers[: len(tower.encoder.layers) + 1 + model.config.vision_feature_layer]:
            hidden = layer(hidden, None)
    return model.model.multi_modal_projector(hidden[:, 1:][:, keep])


class PackedAnswers:
    """The loss on packed batches of a LLaVA model, or of a twig on it.

    What is `frozen` runs without gradients: the tower unless it is trained, and the trunk's layers
    below a twig.
    """

    def __init__(self, model: LlavaForConditionalGeneration, twig: Twig | None = None, train_tower: bool = False):
        self.model, self.train_tower = model, train_tower
        self.decoder = model.model.language_model
        self.decoder.config._attn_implementation = "sprout_packed"
        model.model.vision_tower.config._attn_implementation = "sdpa"
        deep = len(self.decoder.layers) == LAYERS
        self.looks = {} if twig else {CORE_PLACES[i] if deep else i: look for i, look in looking.LOOKS.items()}
        self.frozen = list(self.decoder.layers[: twig.config.K]) if twig else []
        self.layers = list(twig.layers) if twig else list(self.decoder.layers)
        self.norm, self.head = (twig.model.norm, twig.lm_head) if twig else (self.decoder.norm, model.lm_head)

    def embed(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Hidden states [B, S, D] and positions [B, S] of the packed rows, and the prefix's length."""
        embed = self.decoder.embed_tokens
        prefix, rows = embed(batch["prefix"]), len(batch["ids"])
        head = prefix.shape[1]
        if "pixels" in batch:
            visual = visual_tokens(self.model, batch["pixels"], batch["keep"], self.train_tower).to(prefix.dtype)
        else:
            visual = spell(batch["symbols"], embed.weight)
        places = torch.cat([torch.arange(head, device=prefix.device), head + batch["keep"]]).expand(rows, -1)
        hidden = torch.cat([prefix, visual, embed(batch["ids"])], 1)
        return hidden, torch.cat([places, head + SIDE * SIDE + batch["positions"]], 1), places.shape[1]

    def loss(self, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean cross-entropy of the answer tokens, and the shares predicted right: short answers, descriptions."""
        with torch.set_grad_enabled(not self.frozen):
            hidden, positions, prefix = self.embed(batch)
            rotary = self.decoder.rotary_emb(hidden, positions)
            for layer in self.frozen:
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        told = {}
        for i, layer in enumerate(self.layers):
            if look := self.looks.get(i):
                told[look.__name__] = look(layer, looking.Scope(hidden, rotary, prefix), batch)
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        targets = batch["labels"][:, 1:]
        chosen = targets != -100
        hidden, targets, weights = hidden[:, prefix:-1][chosen], targets[chosen], batch["weights"][:, 1:][chosen]
        logits = self.head(self.norm(hidden)).float()
        losses = F.cross_entropy(logits, targets, reduction="none")
        right = (logits.argmax(-1) == targets).float()
        short = weights == 1
        figures = {"short": right[short].mean().item(), "long": right[~short].mean().item()}
        loss = (losses * weights).sum() / weights.sum()
        figures |= {name: distance.item() for name, distance in told.items()}
        return loss + LOOKING_WEIGHT * sum(told.values()), figures
