"""What is its own in each family of models: one file each, one line in FAMILIES."""

from __future__ import annotations

from torch import nn

from ..model.trunk import Trunk
from .llava import Llava

FAMILIES = {"llava": Llava}


def trunk_of(model: nn.Module) -> Trunk:
    """The road through a stock model, which stays as it is."""
    return Trunk(FAMILIES[model.config.model_type](model))
