"""What trains: a frozen base that runs without gradients, and a twig grown from copies of its layers (paper section 3.1).

Of the base only the layers below K and those that the twig starts from are made or read, unless the
objective asks the whole of it. Knows neither data files nor optimizers. Legend: B rows, S tokens, V
visual tokens an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config import TwigConfig
from ..decoding.reduce import reduce
from ..errors import InputError
from ..families import trunk_of
from ..loading.base import Loaded, load_base
from ..loading.describe import EMBEDDED_BASE
from ..loading.random import random_base, random_config
from ..loading.twig import fill_twig, read_description, read_twig_letters, stored_twig
from ..model.stream import Stream
from ..model.trunk import Trunk
from ..model.twig import TUNED, Twig, grow, signature
from ..pruning import Reducer, Shape, TowerMethod, find_method
from .data.examples import IGNORE
from .objectives import Objective
from .run.timing import StepTimes
from .settings import Settings

INITS = ("base", "random", "last")


@dataclass
class Prepared:
    """A base and a twig with fp32 weights on its layer K, which shares no tensor with it."""

    loaded: Loaded
    base: Trunk
    twig: Twig
    signature: list[float]
    reducer: Reducer | None = None  # what is cut of every image before layer 0

    @property
    def module(self) -> Twig:
        """What learns."""
        return self.twig


@dataclass(frozen=True)
class Start:
    """Which twig to train: K and T, the wipe layer F (0: three quarters of L), from what (`INITS` or a twig), and with which
    pruning head ("": none; a stored twig's is taken along if it has one).
    """

    K: int
    T: int
    F: int = 0
    init: str = "base"
    pruning_head: str = ""

    def __post_init__(self) -> None:
        if self.init not in INITS and not Path(self.init).exists():
            raise InputError(f"init is {self.init!r}; {', '.join(INITS)} or a twig's folder or file is needed")


def prepare_twig(
    base: str | Path | None,
    start: Start,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    shape: str | None = None,
    whole: bool = False,
    tower_pruning: str | None = None,
) -> Prepared:
    """Read what trains: the tower, the projector, embeddings and layers 0..K-1 of `base` (all of them, head and norm
    for a `whole` one), and the twig's start.

    `dtype` is the base's; the twig's weights are fp32, since small steps vanish in less. With
    `shape` the weights are drawn instead of read (`loading.random`). Draws, where there are any, come
    from torch's global generator. Raises InputError for an impossible K, T or F before any weight
    is read. `tower_pruning` "NAME:keep=N": see `reducer_of`.
    """
    configs: list[TwigConfig] = []

    def keep(L: int) -> list[int]:
        configs.append(TwigConfig(L, start.K, start.T, start.F, start.pruning_head))
        return list(range(L)) if whole else layers_needed(configs[-1], start.init)

    if shape is not None:
        count = len(keep(random_config(shape).text_config.num_hidden_layers))
        model = random_base(shape, device, dtype, attention, layers=count)
        loaded = Loaded(model, EMBEDDED_BASE, f"random {shape}", False)  # the folder has a tokenizer
    else:
        loaded = load_base(base, device, dtype, attention, keep)
    trunk, config = trunk_of(loaded.model), configs[-1]
    known_by = signature(trunk)
    init = start.init if start.init in INITS else "base"
    twig = grow(trunk, config, init, None if whole else trunk.layers[-config.T :])
    if not whole:
        shorten(trunk, config.K)
    reducer = reducer_of(tower_pruning, config, trunk.V)
    trim_tower(trunk, reducer.beyond if reducer is not None else 0)
    trunk.model.requires_grad_(False)
    if start.init not in INITS:
        _copy_twig(start, known_by, twig)
    return Prepared(loaded, trunk, twig.float().requires_grad_(True), known_by, reducer)


def layers_needed(config: TwigConfig, init: str) -> list[int]:
    """The base layers that this training reads, in order: K below the twig and T that it starts from."""
    first = config.L - config.T if init == "last" else config.K
    below = range(max(config.K, 1))  # layer 0 says which base this is, even if nothing runs below the twig
    return sorted({*below, *range(first, first + config.T)})


def shorten(trunk: Trunk, K: int) -> None:
    """Leave the layers below K: nothing above them is asked any more."""
    trunk.decoder.layers = trunk.layers = trunk.layers[:K]
    trunk.decoder.norm, trunk.model.lm_head = nn.Identity(), nn.Identity()


def _copy_twig(start: Start, known_by: list[float], twig: Twig) -> None:
    """Start from a stored twig of the same K, T and base; a bare file, as the authors release it, says T alone."""
    facts = read_twig_letters(start.init, twig.config.L, twig.lm_head.in_features, start.K, start.T)
    stored = torch.tensor(facts.get("base_signature") or known_by)
    if not torch.allclose(stored, torch.tensor(known_by), rtol=0.02, atol=1e-4):
        raise InputError(f"{start.init}: this twig grew on other weights ({facts.get('base')!r}) than this base's")
    fill_twig(twig, stored_twig(start.init).files, torch.device("cpu"))


def learnt_behind(init: str) -> str | None:
    """The method before the decoder that the twig to start from learnt behind; None for none, or no twig there."""
    place = Path(init)
    if init in INITS or not place.exists():
        return None
    return read_description(place if place.is_dir() else place.parent).get(TUNED)


def tower_method(spec: str) -> TowerMethod:
    """What `--tower-pruning` says. Raises InputError unless it is a method before the decoder that keeps a number of tokens."""
    method = find_method(spec)
    if not isinstance(method, TowerMethod) or method.keep is None:
        raise InputError(
            f"tower_pruning is {spec!r}; a method before the decoder with keep=N is needed: visionzip:keep=288"
        )
    return method


def reducer_of(spec: str | None, config: TwigConfig, V: int) -> Reducer | None:
    """That leaves what `spec` keeps of an image's V tokens, as in generation under `SPEC+twig`; None for no spec.

    Raises InputError for what cannot be.
    """
    if spec is None:
        return None
    method = tower_method(spec)
    if not 1 <= method.keep <= V:
        raise InputError(f"tower_pruning is {spec!r}; 1 to {V} tokens of an image can stay")
    reducer = method.reducer(method.keep, Shape(config.L, V, config.K, config.F))
    if type(reducer).bind is not Reducer.bind:
        raise InputError(
            f"tower_pruning is {spec!r}, which needs weights beside the base's; choose another: visionzip:keep=288"
        )
    return reducer


def entering(settings: Settings) -> int | None:
    """Tokens of an image that `--tower-pruning` leaves; None without it."""
    return None if settings.tower_pruning is None else tower_method(settings.tower_pruning).keep


def enter(base: Trunk, batch: dict, reducer: Reducer | None) -> tuple[Stream, torch.Tensor]:
    """(what enters layer 0 of the batch of `TwigLesson`, the labels [B, S'] of its rows)."""
    if reducer is None:
        return base.embed(batch["input_ids"], batch["lengths"], batch["pixel_values"]), batch["labels"]
    return shortened(base, reducer, batch)


def shortened(
    base: Trunk, reducer: Reducer, batch: dict, project: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[Stream, torch.Tensor]:
    """`enter` behind a reducer: what it has left of the pictures stands where they stood, and all are numbered anew.

    `project` stands in for the base's projector.
    """
    pixels, lengths = batch["pixel_values"], batch["lengths"]
    stream = base.lay_out(batch["input_ids"], lengths, pixels)
    if pixels is not None and len(pixels):
        ids = [row[:n].tolist() for row, n in zip(batch["input_ids"].cpu(), lengths, strict=True)]
        draws = torch.randint(2**62, (len(ids),)).tolist() if reducer.draws else ()
        stream = reduce(reducer, base, stream, ids, pixels, draws, project).stream
    labels = batch["labels"].gather(1, stream.place.clamp(min=0)).masked_fill(~stream.real(), IGNORE)
    steps = torch.arange(stream.width, device=stream.place.device).expand(stream.rows, -1)
    return replace(stream, positions=steps[None], place=torch.where(stream.real(), steps, -1)), labels


def trim_tower(trunk: Trunk, beyond: int = 0) -> None:
    """Drop the tower's layers above the one whose features are used, and `beyond` more: they would be computed for nothing."""
    config, tower = trunk.model.config, trunk.model.model.vision_tower
    chosen = config.vision_feature_layer
    if not isinstance(chosen, int):
        return
    used = chosen if chosen >= 0 else len(tower.encoder.layers) + 1 + chosen
    tower.encoder.layers = tower.encoder.layers[: used + beyond]
    tower.config.num_hidden_layers, config.vision_feature_layer = len(tower.encoder.layers), used


class TwigLesson:
    """The loss of a twig on a batch of conversations: what leaves layer K-1 of the base, handed to the objective."""

    def __init__(
        self,
        base: Trunk,
        twig: Twig,
        objective: Objective,
        times: StepTimes | None = None,
        reducer: Reducer | None = None,
    ):
        self.base, self.twig, self.objective, self.reducer = base, twig, objective, reducer
        self.times = times or StepTimes(base.device)

    def __call__(self, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`input_ids` and `labels` [B, S], right-padded, of `lengths`, each image as V image tokens; `pixel_values`
        [images, 3, h, w] in their order. Gives the objective's loss and figures.
        """
        states, labels = self.enter(batch)
        with self.times.part("twig"):
            return self.objective(states, labels, self.twig, self.base)

    def read(self, batch: dict) -> Stream:
        """What leaves layer K-1 of the base, which keeps no gradients."""
        return self.enter(batch)[0]

    def enter(self, batch: dict) -> tuple[Stream, torch.Tensor]:
        """`read`, and the labels of its rows."""
        with torch.no_grad(), self.times.part("trunk"):
            stream, labels = enter(self.base, batch, self.reducer)
            return self.base.run(self.base.layers[: self.twig.config.K], stream, None), labels


def checkpoint_gradients(layers: Iterable[nn.Module]) -> None:
    """Keep only what enters each layer, and compute the rest again on the way back."""
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
