"""Stage one of the recipe: the vision tower learns to name what each patch shows.

Patch labels are dense (576 answers an image), so the tower learns in minutes what it would take
the decoder's sparse answers hours to teach it. First on windows of 168 pixels cut from whole
pictures (same scale, a quarter of the attention), then on whole pictures.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from ...world.draw import IMAGE_SIZE, PATCH, draw, patch_labels
from ...world.scenes import COLOURS, SHAPES, SIZES, WORDS, sample_scene

SIDE = IMAGE_SIZE // PATCH
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BACKGROUND_WEIGHT = 0.3  # against an object's patch: two thirds of the patches show nothing
HEADS = {
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "size": 1 + len(SIZES),
    "word": 1 + len(WORDS),
    "centre": 2,
}


def pixels(images: list) -> torch.Tensor:
    """Square RGB pictures of the right size to CLIP's normalised pixels [B, 3, 336, 336]."""
    array = np.stack([np.asarray(i, np.float32) for i in images]) / 255
    array = (array - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())


class PatchReader(nn.Module):
    """The live layers of a tower under one linear head per kind of label."""

    def __init__(self, tower: CLIPVisionModel, select_layer: int = -2):
        super().__init__()
        self.tower = tower
        self.live = len(tower.encoder.layers) + 1 + select_layer
        self.heads = nn.ModuleDict({k: nn.Linear(tower.config.hidden_size, n) for k, n in HEADS.items()})
        for parameter in [*tower.encoder.layers[self.live :].parameters(), *tower.post_layernorm.parameters()]:
            parameter.requires_grad_(False)

    def features(self, values: torch.Tensor, row: int = 0, column: int = 0) -> torch.Tensor:
        """[B, 3, h, w] → [B, h*w/196, D] for the window whose first patch is (row, column)."""
        parts = self.tower.embeddings
        grid = parts.patch_embedding(values)  # B D h w
        rows, columns = grid.shape[-2:]
        table = parts.position_embedding.weight
        window = table[1:].view(SIDE, SIDE, -1)[row : row + rows, column : column + columns].flatten(0, 1)
        first = (parts.class_embedding + table[0]).expand(len(values), 1, -1)
        hidden = self.tower.pre_layrnorm(torch.cat([first, grid.flatten(2).transpose(1, 2) + window], 1))
        for layer in self.tower.encoder.layers[: self.live]:
            hidden = layer(hidden, None)
        return hidden[:, 1:]

    def loss(self, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        hidden = self.features(batch["pixels"], batch["row"], batch["column"])
        total, figures = 0.0, {}
        for i, (kind, head) in enumerate(self.heads.items()):
            logits, labels = head(hidden).flatten(0, 1).float(), batch["labels"][..., i].flatten()
            weights = torch.ones(logits.shape[1], device=logits.device)
            weights[0] = BACKGROUND_WEIGHT
            total = total + F.cross_entropy(logits, labels, weight=weights)
            there = labels > 0
            figures[kind] = (logits.argmax(-1) == labels)[there].float().mean().item() if there.any() else 1.0
        return total, figures


def tower_batch(step: int, images: int, window: int, split: str = "train") -> dict:
    """Batch number `step`: one window of `window` patches a side from each of `images` pictures."""
    rng = np.random.default_rng((17, step))
    row, column = rng.integers(0, SIDE - window + 1, 2).tolist()
    scenes = [sample_scene(split, (window << 32) + step * images + i) for i in range(images)]
    rows, columns = slice(row, row + window), slice(column, column + window)
    labels = torch.from_numpy(np.stack([patch_labels(s)[rows, columns] for s in scenes]))
    box = (column * PATCH, row * PATCH, (column + window) * PATCH, (row + window) * PATCH)
    values = pixels([draw(s).crop(box) for s in scenes])
    return {"pixels": values, "labels": labels.flatten(1, 2), "row": row, "column": column}
