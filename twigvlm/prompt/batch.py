"""Prompts of any lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence


def together(prompts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor | None]:
    """What `TwigVLM.prepare` gives, [1, S] each, as arguments of `generate`: right-padded ids [B, S] with their mask, the
    pictures of all rows in order.
    """
    rows = [p["input_ids"][0] for p in prompts]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    pixels = [p["pixel_values"] for p in prompts if p.get("pixel_values") is not None]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat(pixels) if pixels else None}
