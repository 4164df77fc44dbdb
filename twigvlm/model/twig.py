"""The twig: T decoder layers, a norm and a head that continue layer K's hidden states (paper section 3.1).

On disk: a folder with `model.safetensors` (`lm_head.weight`, `model.norm.weight`,
`model.layers.{0..T-1}.*`, with a pruning head `leaf_attention_module.{q,k}_gate.weight`: the release's names)
and `twig_config.json` (K, T, F, L, the base, shapes, format version). The bare release file, which stores no K,
is read as well.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import nn

from ..config import FORMAT_VERSION, TwigConfig
from ..files import replacing
from .pruning_head import NAME as HEAD
from .pruning_head import PruningHead, head_for
from .skinny import quick
from .trunk import Trunk

WEIGHTS, CONFIG = "model.safetensors", "twig_config.json"
START = "pruning_head"  # how the pruning head began, in the description and in the metadata of the weights
TUNED = "tower_pruning"  # the method before the decoder that the twig learnt behind, in the description
Init = Literal["base", "last", "random"]


class Twig(nn.Module):
    """Fresh twigs come from `grow`, stored ones from `loading.twig`."""

    def __init__(self, config: TwigConfig, layers: nn.ModuleList, norm: nn.Module, lm_head: nn.Linear):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.layers = layers
        self.model.norm = norm
        self.lm_head = lm_head
        for i, layer in enumerate(layers):
            layer.self_attn.layer_idx = config.L + i  # its own cache slots, behind the base's
        if config.pruning_head:
            self.add_module(HEAD, head_for(layers[-1].self_attn, config.pruning_head))

    @property
    def pruning_head(self) -> PruningHead | None:
        return getattr(self, HEAD, None)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] that left the last twig layer → fp32 [..., vocabulary]."""
        with quick([self.lm_head]):
            return self.lm_head(self.model.norm(hidden)).float()


def grow(trunk: Trunk, config: TwigConfig, init: Init = "base", copied: Sequence[nn.Module] | None = None) -> Twig:
    """A twig with the weights of base layers K..K+T-1 ("base"), of the last T ("last"), or random ones.

    Nothing is shared with the base. `copied` are these layers, where the trunk has them at other places.
    Source: paper section 3.1 and its ablation of the initialisation.
    """
    first = config.L - config.T if init == "last" else config.K
    copied = trunk.layers[first : first + config.T] if copied is None else copied
    text = trunk.decoder.config  # shared, not copied: one place says which attention is used
    layers = nn.ModuleList(copy.deepcopy(layer, {id(text): text}) for layer in copied)
    twig = Twig(config, layers, copy.deepcopy(trunk.decoder.norm), copy.deepcopy(trunk.model.lm_head))
    if twig.pruning_head is not None:
        like = layers[-1].self_attn.q_proj.weight
        twig.pruning_head.to(like.device, like.dtype)
    if init == "random":
        randomise(twig, trunk.model.config.text_config.initializer_range)
    return twig


def randomise(twig: Twig, std: float) -> None:
    """Fresh weights for every matrix, the language head included; the norms stay (paper's ablation of the initialisation)."""
    for module in (*twig.layers.modules(), twig.lm_head):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)


def twig_skeleton(trunk: Trunk, config: TwigConfig, vocabulary: int) -> Twig:
    """A twig of the right shapes on the meta device, to be filled from a file."""
    like = trunk.model.config.text_config
    with torch.device("meta"):
        kind = type(trunk.layers[0])
        text = trunk.decoder.config  # shared: one place says which attention is used
        layers = nn.ModuleList(kind(text, config.L + i) for i in range(config.T))
        norm = type(trunk.decoder.norm)(like.hidden_size, eps=like.rms_norm_eps)
        return Twig(config, layers, norm, nn.Linear(like.hidden_size, vocabulary, bias=False))


def save_twig(twig: Twig, trunk: Trunk, folder: Path, base: str, dtype: torch.dtype | None = None) -> None:
    """Write the folder format; `base` is the name of the model that it grew on."""
    state = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in twig.state_dict().items()}
    write_twig(folder, state, describe(twig, base, signature(trunk)))


def describe(twig: Twig, base: str, base_signature: list[float]) -> dict:
    """What twig_config.json says."""
    letters = {name: value for name, value in asdict(twig.config).items() if value != ""}  # most have no pruning head
    return {
        "format_version": FORMAT_VERSION,
        **letters,
        "base": base,
        "base_signature": base_signature,
        "hidden_size": twig.lm_head.in_features,
        "vocabulary": twig.lm_head.out_features,
    }


def write_twig(folder: Path, state: dict[str, torch.Tensor], facts: dict) -> None:
    """Tensors on the CPU and `describe`'s facts to a folder; each file is written whole or not at all."""
    with replacing(folder / CONFIG) as config, replacing(folder / WEIGHTS) as weights:  # the weights take place first
        config.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        # The bare file is a twig, too, and its gates are of one kind only.
        gates = {START: facts[START]} if START in facts else {}
        save_file(state, weights, metadata={"format": "pt", **gates})


def signature(trunk: Trunk, samples: int = 16) -> list[float]:
    """A few weights of the base, by which a twig knows it again under any name, layout or dtype."""
    weights = trunk.layers[0].self_attn.q_proj.weight.detach().flatten()
    picks = torch.linspace(0, len(weights) - 1, samples).long()
    return [round(float(w), 5) for w in weights[picks.to(weights.device)].float()]


def recognised(known: Sequence[float], trunk: Trunk) -> bool:
    """Whether a signature is this base's, whatever dtype either was in."""
    theirs, own = torch.tensor(list(known)), torch.tensor(signature(trunk))
    return theirs.shape == own.shape and torch.allclose(theirs, own, rtol=0.02, atol=1e-4)
