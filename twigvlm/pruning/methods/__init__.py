"""The catalogue: one file a method, one line here."""

from __future__ import annotations

from ..plan import Method
from .fastv import FastV
from .layer_attention import LayerAttention
from .pdrop import PyramidDrop
from .random import Random
from .twig import Twig

METHODS: dict[str, type[Method]] = {m.name: m for m in (Twig, FastV, PyramidDrop, LayerAttention, Random)}
