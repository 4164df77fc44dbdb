"""Stages two to five of the recipe: the decoder learns to answer, from words, from pictures, in depth.

The batches are packed (packing.py): some 24 questions share one prefix. Pictures may enter with a
stratified quarter of their visual tokens at their original positions, which is what makes the
first thousands of pictures affordable.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from ..model.prompt import encode
from . import packing
from .draw import draw
from .tower import SIDE, pixels
from .world import sample_scene

LISTING_TOKENS = 72  # room for the longest scene in words
STREAMS = {"text": 1, "image": 2}  # disjoint seed ranges of the training split


def decoder_batch(step: int, rows: int, kind: str, keep_share: float, tokenizer, split: str = "train", offset: int = 0) -> dict:
    """Batch number `step` of `rows` scenes as "text" or "image".

    For pictures, one step in four shows all visual tokens, the others a share of `keep_share`
    (1 = always all), one random patch of each small block.
    """
    rng = random.Random(f"{kind} {offset} {step}")
    first = (STREAMS[kind] << 34) + (offset << 28) + step * rows
    scenes = [sample_scene(split, first + i) for i in range(rows)]
    packed = [packing.pack(s, random.Random(s.seed), tokenizer) for s in scenes]
    batch = {name: torch.from_numpy(np.stack([getattr(p, name) for p in packed])) for name in ("ids", "labels", "positions", "weights")}
    head = encode(tokenizer, packing.prefix_text().split("<image>")[0], -1, 0)
    if kind == "text":
        listings = [encode(tokenizer, packing.listing(s, rng), -1, 0, bos=False) for s in scenes]
        batch["prefix"] = torch.zeros(rows, len(head) + LISTING_TOKENS, dtype=torch.long)
        batch["length"] = torch.tensor([len(head) + len(x) for x in listings])
        for row, ids in zip(batch["prefix"], listings, strict=True):
            row[: len(head) + len(ids)] = torch.tensor(head + ids)
        return batch
    batch["prefix"] = torch.tensor(head).expand(rows, -1).clone()
    batch["pixels"] = pixels([draw(s) for s in scenes])
    whole = keep_share == 1 or rng.random() < 0.25
    batch["keep"] = torch.arange(SIDE * SIDE) if whole else _stratified(keep_share, rng)
    return batch


def _stratified(share: float, rng: random.Random) -> torch.Tensor:
    """One patch of every block of `1/share` (a square number) patches, raster order."""
    block = round(share**-0.5)
    steps = range(0, SIDE, block)
    picks = [(r + rng.randrange(block)) * SIDE + c + rng.randrange(block) for r in steps for c in steps]
    return torch.tensor(sorted(picks))


class PackedAnswers:
    """The loss of a LLaVA model on packed batches."""

    def __init__(self, model: LlavaForConditionalGeneration, train_tower: bool = False):
        self.model, self.train_tower = model, train_tower
        self.decoder = model.model.language_model
        self.decoder.config._attn_implementation = "sprout_packed"
        model.model.vision_tower.config._attn_implementation = "sdpa"

    def visual(self, values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Projected visual tokens [B, kept, D]."""
        with torch.set_grad_enabled(self.train_tower):
            tower = self.model.model.vision_tower
            hidden = tower.pre_layrnorm(tower.embeddings(values))
            for layer in tower.encoder.layers[: len(tower.encoder.layers) + 1 + self.model.config.vision_feature_layer]:
                hidden = layer(hidden, None)
        return self.model.model.multi_modal_projector(hidden[:, 1:][:, keep])

    def loss(self, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        embed = self.decoder.embed_tokens
        prefix, rows = embed(batch["prefix"]), len(batch["ids"])
        device, head = prefix.device, prefix.shape[1]
        mask = None
        if "pixels" in batch:
            prefix = torch.cat([prefix, self.visual(batch["pixels"], batch["keep"]).to(prefix.dtype)], 1)
            places = torch.cat([torch.arange(head, device=device), head + batch["keep"]]).expand(rows, -1)
            start = torch.full((rows, 1), head + SIDE * SIDE, device=device)
        else:
            places, start = torch.arange(head, device=device).expand(rows, -1), batch["length"][:, None]
            mask = torch.where(places < start, 0.0, -1e4)[:, None, None]
        hidden = torch.cat([prefix, embed(batch["ids"])], 1)
        rotary = self.decoder.rotary_emb(hidden, torch.cat([places, start + batch["positions"]], 1))
        for layer in self.decoder.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        targets = batch["labels"][:, 1:]
        chosen = targets != -100
        hidden, targets, weights = hidden[:, places.shape[1] : -1][chosen], targets[chosen], batch["weights"][:, 1:][chosen]
        logits = self.model.lm_head(self.decoder.norm(hidden)).float()
        losses = F.cross_entropy(logits, targets, reduction="none")
        right = (logits.argmax(-1) == targets).float()
        short = weights == 1
        figures = {"short": right[short].mean().item(), "long": right[~short].mean().item()}
        return (losses * weights).sum() / weights.sum(), figures
