"""The stage between tower and decoder: the projector learns to say in the decoder's words what a patch shows.

LLaVA aligns its projector on captions; here the labels of the patches are known, so each projected
patch is pulled towards the sum of the embeddings of the words for it, and the tower with it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from ...world.draw import PATCH, draw, patch_labels
from ...world.scenes import sample_scene
from .symbols import patch_symbols, spell
from .tower import BACKGROUND_WEIGHT, SIDE, PatchReader, pixels


class Aligner(nn.Module):
    """A model's tower and projector under the alignment loss; the embedding table stays as it is."""

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__()
        self.reader = PatchReader(model.model.vision_tower, model.config.vision_feature_layer)
        self.reader.heads.requires_grad_(False)
        self.projector = model.model.multi_modal_projector
        self.register_buffer("table", model.model.language_model.embed_tokens.weight.detach().clone(), persistent=False)

    def loss(self, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """Squared distance in units of the target's variance, empty patches weighted down; `explained` is 1 - it."""
        hidden = self.reader.features(batch["pixels"], batch["row"], batch["column"])
        target = spell(batch["symbols"], self.table)
        error = (self.projector(hidden).float() - target).square().mean(-1)
        shown = batch["shown"]
        weights = torch.where(shown, 1.0, BACKGROUND_WEIGHT)
        loss = (error * weights).sum() / weights.sum() / target.var()
        return loss, {"explained": 1 - (error[shown].mean() / target[shown].var()).item()}


def align_batch(step: int, images: int, window: int, tokenizer) -> dict:
    """Batch number `step`: one window of `window` patches a side from each of `images` training pictures."""
    rng = np.random.default_rng((23, step))
    row, column = rng.integers(0, SIDE - window + 1, 2).tolist()
    scenes = [sample_scene("train", (99 << 32) + step * images + i) for i in range(images)]
    rows, columns = slice(row, row + window), slice(column, column + window)
    box = (column * PATCH, row * PATCH, (column + window) * PATCH, (row + window) * PATCH)
    symbols = [patch_symbols(s, tokenizer).unflatten(0, (SIDE, SIDE))[rows, columns].flatten(0, 1) for s in scenes]
    values = pixels([draw(s).crop(box) for s in scenes])
    # A printed word counts as much as an object: weighted as background, the tower unlearns to read.
    labels = np.stack([patch_labels(s)[rows, columns] for s in scenes])
    shown = torch.from_numpy((labels[..., 0] > 0) | (labels[..., 3] > 0)).flatten(1, 2)
    return {"pixels": values, "symbols": torch.stack(symbols), "shown": shown, "row": row, "column": column}
