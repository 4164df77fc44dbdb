"""A projector tuned for pruned tokens, as a folder: model.safetensors and projector_config.json beside each other."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import InputError
from ..files import replacing
from ..model.trunk import Trunk
from ..model.twig import WEIGHTS, recognised
from .find import read_json
from .weights import check_finite

CONFIG = "projector_config.json"


def write_projector(folder: Path, state: dict[str, torch.Tensor], facts: dict) -> None:
    """Tensors on the CPU and what they are, each file whole or not at all."""
    with replacing(folder / CONFIG) as config, replacing(folder / WEIGHTS) as weights:
        config.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        save_file(state, weights, metadata={"format": "pt"})


def load_projector(folder: str | Path, trunk: Trunk) -> nn.Module:
    """A copy of the base's projector with the weights of `folder`. Raises InputError where they are not for this base."""
    folder = Path(folder).expanduser()
    facts = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if not facts or not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: no tuned projector ({WEIGHTS} and {CONFIG} are needed); train one: "
                         "twigvlm train --learn projector")  # fmt: skip
    if not recognised(facts.get("base_signature", []), trunk):
        raise InputError(
            f"{folder}: this projector was tuned for other weights ({facts.get('base')!r}) than this base's"
        )
    projector = copy.deepcopy(trunk.model.model.multi_modal_projector)
    try:
        weights = load_file(folder / WEIGHTS)
        projector.load_state_dict(weights)
    except (RuntimeError, SafetensorError, OSError) as fault:
        raise InputError(
            f"{folder / WEIGHTS}: not this base's projector ({' '.join(str(fault).split())[:200]})"
        ) from fault
    check_finite(folder / WEIGHTS, weights, "projector")
    return projector.requires_grad_(False)
