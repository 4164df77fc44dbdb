"""What a training changes: a twig, or the base's projector. Everything else of a run is the same for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..config import STARTS
from ..errors import InputError, RunError
from ..loading.twig import stored_twig
from ..model.twig import CONFIG, TUNED, describe, write_twig
from .lora import add_adapters, has_adapters, merged
from .objectives import Ntp, Objective
from .run.device import Run
from .run.report import TWIG_CARD
from .run.timing import StepTimes
from .settings import Settings
from .twig import INITS, Prepared, Start, TwigLesson, checkpoint_gradients, entering, learnt_behind, prepare_twig


class Subject(Protocol):
    """`config` is the file that describes what was learnt, `card` the text of its card, `asks_base` as of `Objective`."""

    config: str
    card: str

    def identity(self, settings: Settings) -> dict[str, Any]:
        """What makes another run of it, besides data, schedule and base."""

    def prepare(self, one: Run) -> Any:
        """`loaded`, `base` (a trunk), `module` (what learns, fp32) and `signature`."""

    def lesson(self, prepared: Any, times: StepTimes) -> Callable[[dict], tuple[torch.Tensor, dict]]:
        """The loss of a batch, and figures."""

    def describe(self, prepared: Any) -> dict:
        """What `config` says."""

    def write(self, folder: Path, weights: dict[str, torch.Tensor], facts: dict) -> None:
        """Weights and description, as a folder that can be loaded."""

    def final(self, prepared: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of the last checkpoint as they are published."""

    def words(self, settings: Settings) -> str:
        """One line: what learns."""

    def rows(self, facts: dict, settings: dict) -> dict[str, str]:
        """Of the card's table."""

    def title(self, facts: dict) -> str: ...


class TwigSubject:
    """A twig under an objective."""

    config, card = CONFIG, TWIG_CARD

    def __init__(self, objective: Objective | None = None):
        self.objective = objective or Ntp()
        self.tower_pruning: str | None = None

    def identity(self, settings: Settings) -> dict[str, Any]:
        known = {name: getattr(settings, name) for name in ("K", "T", "F", "init")}
        return known | ({"tower_pruning": settings.tower_pruning} if settings.tower_pruning else {})

    def prepare(self, one: Run) -> Prepared:
        settings = one.settings
        self.tower_pruning = settings.tower_pruning
        entering(settings)  # what cannot be is refused before a weight is read
        dtype = torch.bfloat16 if one.precision == "bf16" else torch.float32
        start = start_of(settings)
        how = (settings.attention, settings.random, self.objective.asks_base, settings.tower_pruning)
        with room(one):
            prepared = prepare_twig(settings.base, start, one.device, dtype, *how)
        if settings.lora_rank:
            add_adapters(prepared.twig, settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.seed)
        # What a pruning head hears is taken from inside the last layer, which is then neither done twice nor compiled.
        unheard = prepared.twig.layers[: settings.T - (prepared.twig.pruning_head is not None)]
        if settings.gradient_checkpointing:
            checkpoint_gradients(unheard)
        if settings.compile:
            for layer in (*prepared.base.layers[: settings.K], *unheard):
                layer.compile(dynamic=True)
        return prepared

    def lesson(self, prepared: Prepared, times: StepTimes) -> TwigLesson:
        return TwigLesson(prepared.base, prepared.twig, self.objective, times, prepared.reducer)

    def describe(self, prepared: Prepared) -> dict:
        tuned = {TUNED: self.tower_pruning} if self.tower_pruning else {}
        loaded = prepared.loaded
        return describe(prepared.twig, loaded.name, prepared.signature, loaded.revision) | tuned

    def write(self, folder: Path, weights: dict[str, torch.Tensor], facts: dict) -> None:
        write_twig(folder, weights, facts)

    def final(self, prepared: Prepared, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return merged(weights, prepared.twig) if has_adapters(prepared.twig) else weights

    def words(self, settings: Settings) -> str:
        learning = "adapters" if settings.lora_rank else f"{settings.T} layers, norm and head"
        return f"{learning} learn on layer {settings.K}, from {settings.init}{behind(settings)}"

    def rows(self, facts: dict, settings: dict) -> dict[str, str]:
        rows = {"Twig": f"K = {facts['K']}, T = {facts['T']}, F = {facts['F']}; started from `{settings['init']}`"}
        if tuned := facts.get(TUNED):
            rows |= {"Learnt behind": f"`{tuned}`: ask with `--pruning {tuned}+twig`"}
        if own := settings.get("on_policy"):
            rows |= {"Answers": f"the base's own to {own:,} samples"}
        return rows

    def title(self, facts: dict) -> str:
        return f"Twig of {facts['base']}, K = {facts['K']}, T = {facts['T']}"


def behind(settings: Settings) -> str:
    """For `words`: the method before the decoder, and whether it came with the twig that begins."""
    if settings.tower_pruning is None:
        return ""
    taken = settings.stage and learnt_behind(settings.init)
    return f", behind {settings.tower_pruning}" + (" as that twig" if taken else "")


def start_of(settings: Settings) -> Start:
    """Which twig begins. In TwigVLM++'s stages a stored one keeps its pruning head and its F; a fresh head is as asked.

    Stage 2 has use for a fresh head only where it chooses as the twig does: random gates would draw random sets. Raises
    InputError where another head is asked for than the stored one.
    """
    start = Start(settings.K, settings.T, settings.F, settings.init)
    asked = settings.head_init
    fresh = (
        (asked or STARTS[0]) if settings.stage == 1 else "identity" if settings.stage and asked == "identity" else ""
    )
    if not settings.stage or settings.init in INITS:
        return replace(start, pruning_head=fresh)
    stored = stored_twig(settings.init)
    if asked and stored.pruning_head not in ("", asked):
        raise InputError(
            f"head_init is {asked!r}, but {settings.init} has a twig whose pruning head is {stored.pruning_head!r}; leave "
            "--head-init out"
        )
    return replace(start, F=start.F or stored.facts.get("F", 0), pruning_head=stored.pruning_head or fresh)


@contextmanager
def room(one: Run) -> Iterator[None]:
    """A device that is full before the first step is a plain word."""
    try:
        yield
    except torch.OutOfMemoryError as fault:
        raise RunError(f"{one.device} is full before the first step; use a larger one ({fault})") from fault
