"""What trains: a frozen trunk that runs without gradients, and the twig on it (method: paper section 3.1).

Of the base only the layers below K and those that the twig starts from are made or read. Knows the
loss; knows neither data files nor optimizers. Legend: B rows, S tokens, V visual tokens an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config import TwigConfig
from ..errors import InputError
from ..loading.base import HEAD, Loaded, load_base
from ..loading.describe import EMBEDDED_BASE, read_json
from ..loading.random import random_base, random_config
from ..loading.weights import Filling
from ..model.stream import Stream
from ..model.trunk import Trunk
from ..model.twig import CONFIG, WEIGHTS, Twig, randomise, signature
from .data.examples import IGNORE
from .run.clock import Clock

INITS = ("base", "random", "last")


@dataclass
class Planted:
    """A trunk of K layers and a twig with fp32 weights on it, which shares no tensor with it."""

    loaded: Loaded
    twig: Twig
    signature: list[float]

    @property
    def trunk(self) -> Trunk:
        return self.loaded.trunk


@dataclass(frozen=True)
class Seed:
    """Which twig to grow: K and T, the wipe layer F (0: three quarters of L), and from what (`INITS` or a twig)."""

    K: int
    T: int
    F: int = 0
    init: str = "base"

    def __post_init__(self) -> None:
        if self.init not in INITS and not Path(self.init).exists():
            raise InputError(f"init is {self.init!r}; {', '.join(INITS)} or the folder of a twig is needed")


def plant(
    base: str | Path | None,
    seed: Seed,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    shape: str | None = None,
) -> Planted:
    """Read what trains: the tower, the projector, embeddings and layers 0..K-1 of `base`, and the twig's start.

    `dtype` is the trunk's; the twig's weights are fp32, since small steps vanish in less. With
    `shape` the weights are drawn instead of read (`model.random`). Draws, where there are any, come
    from torch's global generator. Raises InputError for an impossible K, T or F before any weight
    is read.
    """
    configs: list[TwigConfig] = []

    def keep(L: int) -> list[int]:
        configs.append(TwigConfig(L, seed.K, seed.T, seed.F))
        return layers_needed(configs[-1], seed.init)

    if shape is not None:
        count = len(keep(random_config(shape).text_config.num_hidden_layers))
        model = random_base(shape, device, dtype, attention, layers=count)
        loaded = Loaded(Trunk(model), EMBEDDED_BASE, f"random {shape}", False)  # the folder has a tokenizer
    else:
        loaded = load_base(base, device, dtype, attention, keep)
    trunk, config = loaded.trunk, configs[-1]
    known_by = signature(trunk)
    twig = take_twig(trunk, config, seed.init)
    trim_tower(trunk)
    trunk.model.requires_grad_(False)
    if seed.init not in INITS:
        _copy_twig(seed, known_by, twig)
    return Planted(loaded, twig.float().requires_grad_(True), known_by)


def layers_needed(config: TwigConfig, init: str) -> list[int]:
    """The base layers that this training reads, in order: K below the twig and T that it starts from."""
    first = config.L - config.T if init == "last" else config.K
    below = range(max(config.K, 1))  # layer 0 says which base this is, even if nothing runs below the twig
    return sorted({*below, *range(first, first + config.T)})


def take_twig(trunk: Trunk, config: TwigConfig, init: str) -> Twig:
    """Make the topmost T layers, norm and head of a shortened base into a twig; the trunk keeps the first K."""
    decoder, model = trunk.decoder, trunk.model
    twig = Twig(config, trunk.layers[-config.T :], decoder.norm, model.lm_head)
    decoder.layers = trunk.layers = trunk.layers[: config.K]
    decoder.norm, model.lm_head = nn.Identity(), nn.Identity()
    if init == "random":
        randomise(twig, model.config.text_config.initializer_range)
    return twig


def _copy_twig(seed: Seed, known_by: list[float], twig: Twig) -> None:
    """Start from a stored twig of the same K, T and base."""
    folder = Path(seed.init)
    facts = read_json(folder / CONFIG)
    for letter, asked in (("K", seed.K), ("T", seed.T)):
        if facts.get(letter) != asked:
            raise InputError(
                f"{folder / CONFIG}: {letter} is {facts.get(letter)}, but {letter} = {asked} was asked for; "
                f"give {letter}={facts.get(letter)} or another start"
            )
    stored = torch.tensor(facts.get("base_signature", known_by))
    if not torch.allclose(stored, torch.tensor(known_by), rtol=0.02, atol=1e-4):
        raise InputError(f"{folder / CONFIG}: this twig grew on other weights ({facts.get('base')!r}) than this base's")
    filling = Filling(twig, lambda name: name)
    filling.fill([folder / WEIGHTS], torch.device("cpu"), folder / WEIGHTS, cut_rows=(HEAD,))


def trim_tower(trunk: Trunk) -> None:
    """Drop the tower's layers above the one whose features are used: they would be computed for nothing."""
    config, tower = trunk.model.config, trunk.model.model.vision_tower
    chosen = config.vision_feature_layer
    if not isinstance(chosen, int):
        return
    used = chosen if chosen >= 0 else len(tower.encoder.layers) + 1 + chosen
    tower.encoder.layers = tower.encoder.layers[:used]
    tower.config.num_hidden_layers = config.vision_feature_layer = used


class TwigForTraining(nn.Module):
    """The loss of a twig on batches of conversations. Its parameters are the twig's; the trunk is no part of it,
    so that nothing that wraps, saves, shards or casts a model ever touches the trunk.
    """

    accepts_loss_kwargs = False  # a micro-batch's loss is the mean over its own answer tokens

    def __init__(self, trunk: Trunk, twig: Twig, clock: Clock | None = None):
        super().__init__()
        self.twig = twig
        self.trunk = trunk  # no Module, hence not registered
        self.clock = clock or Clock(trunk.device)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        lengths: Sequence[int],
        pixel_values: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """ids and labels [B, S], right-padded, each image as V image tokens; pixels [images, 3, h, w] in their order.

        Gives "loss", the mean cross-entropy over the labels that are not IGNORE, "answers", their number, and "right", how many of them the twig would have drafted.
        """
        stream = self.read(input_ids, lengths, pixel_values)
        with self.clock.part("twig"):
            logits, targets = self.answers(stream, labels)
            loss = F.cross_entropy(logits, targets, reduction="sum") / max(1, len(targets))
            right = (logits.detach().argmax(-1) == targets).sum()
        return {
            "loss": loss,
            "answers": torch.tensor(len(targets), device=logits.device),
            "right": right,
        }

    def read(self, input_ids: torch.Tensor, lengths: Sequence[int], pixel_values: torch.Tensor | None) -> Stream:
        """What leaves layer K-1 of the trunk, which keeps no gradients."""
        with torch.no_grad(), self.clock.part("trunk"):
            stream = self.trunk.embed(input_ids, lengths, pixel_values)
            return self.trunk.run(self.trunk.layers, stream, None)

    def answers(self, stream: Stream, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 logits [n, vocabulary] at the n positions before a learnt token, and those tokens [n]."""
        hidden = self.trunk.run(self.twig.layers, stream, None).hidden
        targets = labels[:, 1:]
        chosen = targets != IGNORE
        # Only these rows meet the vocabulary: the full logits of a batch would be gigabytes.
        return self.twig.logits(hidden[:, :-1][chosen]), targets[chosen]


def checkpoint_gradients(twig: Twig) -> None:
    """Keep only what enters each layer, and compute the rest again on the way back."""
    for layer in twig.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
