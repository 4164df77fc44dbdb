"""CLIP's other half, which no LLaVA checkpoint holds: its text tower, and what leads patches and text into one space."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPModel

from ..errors import InputError
from .find import HUB_DESCRIPTION, fetch_weights, read_json, resolve
from .weights import check_finite, weight_files


class TextTower:
    """A whole CLIP model, without the layers that look at pictures. Legend: M pieces of text, P width of the shared space."""

    def __init__(self, model: CLIPModel, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.width = model.config.vision_config.hidden_size
        self.context = model.config.text_config.max_position_embeddings

    def see(self, states: torch.Tensor) -> torch.Tensor:
        """The vision tower's states [..., C] → [..., P]."""
        norm, project = self.model.vision_model.post_layernorm, self.model.visual_projection
        return project(norm(states.to(project.weight)))

    def read(self, text: str) -> torch.Tensor:
        """[M, P]: a text in pieces of the tower's context, the last one padded with zeros, ids and mask."""
        ids = self.tokenizer(text).input_ids
        return self.embed([ids[i : i + self.context] for i in range(0, len(ids), self.context)])

    def embed(self, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
        device = self.model.visual_projection.weight.device
        ids, mask = torch.zeros(2, len(pieces), self.context, dtype=torch.long)
        for piece, row, there in zip(pieces, ids, mask, strict=True):
            row[: len(piece)], there[: len(piece)] = torch.tensor(piece), 1
        out = self.model.get_text_features(input_ids=ids.to(device), attention_mask=mask.to(device))
        return getattr(out, "pooler_output", out)


@lru_cache(maxsize=1)
def load_text_tower(name: str, device: torch.device, dtype: torch.dtype) -> TextTower:
    """From a folder or a hub id of a whole CLIP model. Raises InputError for anything else, RunError where no hub is."""
    what = "text tower"
    folder = resolve(name, what, HUB_DESCRIPTION)
    kind = read_json(Path(folder) / "config.json").get("model_type")
    if kind != "clip":
        raise InputError(f"{folder}: the {what} of a whole CLIP model is needed, and the model type is {kind!r}")
    folder = fetch_weights(name, folder, what)
    weight_files(folder)
    try:
        model, found = CLIPModel.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as fault:  # damaged files can raise anything
        reason = " ".join(str(fault).split())[:200]
        raise InputError(f"{folder}: no usable CLIP model ({reason}); fetch it again") from fault
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{folder}: {len(missing)} weights of CLIP are missing, first {missing[0]}; fetch it again")
    model.vision_model.encoder = None  # LLaVA has it already
    check_finite(folder, dict(model.named_parameters()), what)
    return TextTower(model.to(device).eval().requires_grad_(False), tokenizer)
