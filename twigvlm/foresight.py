"""What is wrong with a wish, said before any weight is read: a 7B model takes minutes to load.

Everything here comes from the descriptions beside the weights (config.json, twig_config.json, the head of a weight
file). What only the weights can tell, loading finds out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .config import DEFAULT_K, DEFAULT_T, GenerationSettings, ModelSettings, TwigConfig
from .errors import InputError
from .loading.describe import EMBEDDED_TWIG, read_config, visual_tokens
from .loading.device import check_attention, pick_device, pick_dtype
from .loading.find import HUB_DESCRIPTION
from .loading.quantise import check_quantisation
from .loading.random import random_config
from .loading.twig import read_twig_letters
from .pruning import plan_for
from .pruning.cost import Sizes

if TYPE_CHECKING:
    from transformers import LlavaConfig


@dataclass(frozen=True)
class Wish(ModelSettings):
    """The model that flags name; `shape` is one with random weights (`loading.random`) instead."""

    shape: str | None = None

    @property
    def name(self) -> str:
        """The base's, as a loaded model has it."""
        return str(self.base) if self.base is not None else "sprout"

    def letters(self) -> tuple[int, TwigConfig]:
        """(V, L with the twig's letters), those of the paper's default twig where there is none.

        Raises InputError for a K or T that the twig's files or the base contradict.
        """
        config, facts = self._config(), {}
        text, L = config.text_config, config.text_config.num_hidden_layers
        if self.shape is None and self.has_twig:
            twig = EMBEDDED_TWIG if self.twig is None else self.twig
            facts = read_twig_letters(twig, L, text.hidden_size, self.K, self.T, HUB_DESCRIPTION)
        K = facts.get("K", DEFAULT_K if self.K is None else self.K)
        T = facts.get("T", DEFAULT_T if self.T is None else self.T)
        F = self.wipe_layer or facts.get("F", 0)
        return visual_tokens(config), TwigConfig(L, K, T, F, facts.get("pruning_head", ""))

    @property
    def V(self) -> int:
        """Visual tokens an image."""
        return visual_tokens(self._config())

    def base_letters(self, K: int, T: int, F: int) -> TwigConfig:
        """L with the letters of a twig that is to be grown. Raises InputError where the base has too few layers."""
        return TwigConfig(self._config().text_config.num_hidden_layers, K, T, F)

    def check_start(self, twig: str, K: int, T: int) -> None:
        """Raises InputError unless this twig's files could be those of a twig of these letters on the base."""
        text = self._config().text_config
        read_twig_letters(twig, text.num_hidden_layers, text.hidden_size, K, T)

    def sizes(self) -> Sizes:
        """What the cost of a plan follows from, on the device and in the numbers that this model would have."""
        device = pick_device(self.device)
        element = torch.empty(0, dtype=pick_dtype(self.dtype, device)).element_size()
        letters = self.letters()[1]
        T = letters.T if self.has_twig else 0
        return Sizes.of(self._config(), letters.K, T, element, bool(letters.pruning_head))

    def _config(self) -> LlavaConfig:
        return read_config(self.base)[1] if self.shape is None else random_config(self.shape)


def check(wish: Wish, *generations: Mapping[str, Any]) -> None:
    """Raise InputError for a model or for arguments of `TwigVLM.generate` that cannot be."""
    pick_dtype(wish.dtype, pick_device(wish.device))
    check_attention(wish.attn_implementation)
    check_quantisation(wish, wish.has_twig or wish.shape is not None)
    settings = [GenerationSettings(**options) for options in generations]
    for one in settings:
        plan_for(one.pruning, None, 1, TwigConfig(L=10**6))  # the name alone needs no file
    V, twig = wish.letters()
    for one in settings:
        plan = plan_for(one.pruning, one.retained_tokens, V, twig, one.query, wish.name)
        if plan.needs_twig and not wish.has_twig and wish.shape is None:
            raise InputError(
                f"pruning {one.pruning!r} needs a twig, and {wish.name} comes without one; give --twig-block FOLDER, another "
                "--pruning, or leave -R and --pruning out"
            )
