"""The catalogue: one file a method, one line here."""

from __future__ import annotations

from ..plan import Method
from .dart import DART
from .fastv import FastV
from .layer_attention import LayerAttention
from .pdrop import PyramidDrop
from .random import Random
from .sieve import SIEVE
from .twig import Twig
from .twig_discount import TwigDiscount

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (Twig, FastV, PyramidDrop, LayerAttention, Random, DART, SIEVE, TwigDiscount)
}
