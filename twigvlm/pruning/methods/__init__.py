"""The catalogue: one file a method, one line here."""

from __future__ import annotations

from ..plan import Method
from .cdpruner import CDPruner
from .dart import DART
from .divprune import DivPrune
from .downsample import Downsample
from .fastervlm import FasterVLM
from .fastv import FastV
from .hiprune import HiPrune
from .holov import HoloV
from .layer_attention import LayerAttention
from .mustdrop import MustDrop
from .occamtoken import OccamToken
from .pdrop import PyramidDrop
from .random import Random
from .scope import Scope
from .sieve import SIEVE
from .sparsevlm import SparseVLM
from .tome import ToMe
from .tops import TOPS
from .trevs import TReVS
from .twig import Twig
from .twig_adaptive import TwigAdaptive
from .twig_discount import TwigDiscount
from .uniform import Uniform
from .visionzip import VisionZip
from .visionzip_tuned import VisionZipTuned
from .vispruner import VisPruner

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        Twig,
        FastV,
        SparseVLM,
        MustDrop,
        PyramidDrop,
        VisionZip,
        VisionZipTuned,
        FasterVLM,
        VisPruner,
        DivPrune,
        ToMe,
        HiPrune,
        HoloV,
        DART,
        Scope,
        CDPruner,
        SIEVE,
        TOPS,
        TReVS,
        OccamToken,
        TwigDiscount,
        TwigAdaptive,
        LayerAttention,
        Downsample,
        Uniform,
        Random,
    )
}
