"""What stages 1 and 2 change: a twig with its pruning head, or that head alone."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ...config import TwigConfig
from ...errors import InputError
from ...loading.base import Loaded
from ...loading.twig import stored_twig
from ...model.pruning_head import NAME
from ...model.trunk import Trunk
from ...model.twig import Twig
from ...pruning import Reducer
from ..run.device import Run
from ..run.timing import StepTimes
from ..settings import BELONGS, LATER, PlusPart, Settings
from ..subject import TwigSubject, behind, start_of
from ..twig import INITS, Prepared, TwigLesson, entering
from .budgets import Budgets
from .distil import Distil, teacher_layer
from .policy import Policy


def distil_of(settings: Settings) -> Distil:
    return Distil(
        settings.prediction_weight, settings.attention_weight, settings.prediction_loss, settings.temperature,
        settings.attention_layer, settings.attention_turns, settings.teacher, entering(settings),
    )  # fmt: skip


def policy_of(settings: Settings) -> Policy:
    return Policy(
        settings.groups, settings.baseline, settings.reward, settings.reward_turns, settings.budget,
        settings.attention_weight, settings.attention_layer, settings.sets_at_once, settings.advantage_floor,
        settings.policy_temperature, settings.by_token, settings.antithetic, entering(settings),
        settings.picks,
    )  # fmt: skip


def stage_identity(settings: Settings) -> dict[str, Any]:
    """The stage and the settings that belong to it; those of LATER only where they are in use, as runs before them have none.

    How the head began is that of the head which learns, asked for or not; of stage 2 a fresh one's alone.
    """
    usual = {one.name: one.default for one in fields(PlusPart)}
    names = [
        name
        for name, stages in BELONGS.items()
        if settings.stage in stages and name not in ("sets_at_once", "head_init")
    ]
    names = [name for name in names if name not in LATER or getattr(settings, name) != usual[name]]
    told = settings.stage == 1 or settings.head_init == "identity"
    head = {"head_init": start_of(settings).pruning_head} if told else {}
    return {"stage": settings.stage, **head, **{name: getattr(settings, name) for name in names}}


class DistilSubject(TwigSubject):
    """Stage 1."""

    def __init__(self, settings: Settings):
        super().__init__(distil_of(settings))

    def identity(self, settings: Settings) -> dict[str, Any]:
        return super().identity(settings) | stage_identity(settings)

    def prepare(self, one: Run) -> Prepared:
        check_head_export(one.settings)
        prepared = super().prepare(one)
        teacher_layer(self.objective.layer, prepared.twig.config.K, prepared.base.L)
        return prepared

    def words(self, settings: Settings) -> str:
        weights = f"{settings.prediction_weight:g} {settings.prediction_loss} + {settings.attention_weight:g} attention"
        return f"stage 1: {super().words(settings)}, with a pruning head; next token + {weights}, from the {settings.teacher} base"

    def rows(self, facts: dict, settings: dict) -> dict[str, str]:
        return super().rows(facts, settings) | {
            "Pruning head": f"`{facts['pruning_head']}`, learnt with the twig (stage 1)",
            "Loss": f"next token + {settings['prediction_weight']:g} x {settings['prediction_loss']} + "
            f"{settings['attention_weight']:g} x attention, from the {settings['teacher']} base",
        }


class HeadAlone(nn.Module):
    """What learns in stage 2: the pruning head, under its name among a twig's weights."""

    def __init__(self, twig: Twig):
        super().__init__()
        self.add_module(NAME, twig.pruning_head)


@dataclass
class PreparedHead:
    """A whole base and a twig, both frozen, and the twig's pruning head in fp32, which is all that learns."""

    loaded: Loaded
    base: Trunk
    twig: Twig
    signature: list[float]
    module: HeadAlone
    reducer: Reducer | None = None


class PolicyLesson(TwigLesson):
    """The policy's loss on a batch: it hears how much of the training is done."""

    def __call__(self, batch: dict) -> tuple[torch.Tensor, dict]:
        states, labels = self.enter(batch)
        with self.times.part("twig"):
            return self.objective(states, labels, self.twig, self.base, batch.get("progress", 1.0))


class PolicySubject(TwigSubject):
    """Stage 2."""

    def __init__(self, settings: Settings):
        super().__init__(policy_of(settings))

    def identity(self, settings: Settings) -> dict[str, Any]:
        return super().identity(settings) | stage_identity(settings)

    def prepare(self, one: Run) -> PreparedHead:
        settings = one.settings
        check_stage_2(settings)
        check_head_export(settings)
        found = super().prepare(one)
        twig, base = found.twig, found.base
        teacher_layer(self.objective.layer, twig.config.K, base.L)
        self.objective.budgets(twig, base)  # an impossible R is refused here
        names = [name for name in twig.state_dict() if not name.startswith(f"{NAME}.")]
        stored = {k: tensor for file in stored_twig(settings.init).files for k, tensor in load_file(file).items()}
        self._rest = {name: stored[name] for name in names}
        twig.requires_grad_(False).to(base.dtype)
        twig.pruning_head.float().requires_grad_(True)
        return PreparedHead(found.loaded, base, twig, found.signature, HeadAlone(twig), found.reducer)

    def lesson(self, prepared: PreparedHead, times: StepTimes) -> PolicyLesson:
        return PolicyLesson(prepared.base, prepared.twig, self.objective, times, prepared.reducer)

    def write(self, folder: Path, weights: dict[str, torch.Tensor], facts: dict) -> None:
        """All but the head is as it was on disk, to the bit."""
        super().write(folder, self._rest | {k: v for k, v in weights.items() if k.startswith(f"{NAME}.")}, facts)

    def words(self, settings: Settings) -> str:
        budget = "the paper's budgets" if settings.budget is None else f"R = {settings.budget:g}"
        picked = " picked with discount" if settings.picks == "discounted" else ""
        return (
            f"stage 2: the pruning head of {settings.init}{behind(settings)} learns from {settings.groups} sets a sample{picked} at {budget}, "
            f"rewarded by {settings.reward}, over the {settings.baseline} baseline"
        )

    def rows(self, facts: dict, settings: dict) -> dict[str, str]:
        budget = "the paper's schedule" if settings["budget"] is None else f"R = {settings['budget']:g}"
        picked = " for `twig-discount`" if settings.get("picks") == "discounted" else ""
        return super().rows(facts, settings) | {
            "Pruning head": f"`{facts['pruning_head']}`, learnt alone (stage 2){picked}",
            "Rewards": f"{settings['reward']} of {settings['reward_turns']} answers, {settings['groups']} sets a sample, "
            f"{settings['baseline']} baseline, budget {budget}",
        }


def check_stage_2(settings: Settings) -> None:
    """Raises InputError unless it starts from a twig that has a pruning head, or is given one that does as the twig does."""
    said = f"init is {settings.init!r}; stage 2 starts from a twig with a pruning head: train one with --stage 1 and give its folder or file"
    if settings.init in INITS or not Path(settings.init).exists():
        raise InputError(said)
    if not start_of(settings).pruning_head:
        raise InputError(f"{said}, or let the head begin as this twig's own attention (--head-init identity)")


def check_head_export(settings: Settings) -> None:
    """Raises InputError for --export-release of a head that the authors' format does not know, or no head that can be."""
    if start_of(settings).pruning_head == "identity" and settings.export_release:
        raise InputError(
            f"{settings.init}: its pruning head began as the identity, which the authors' format does not know: leave "
            "--export-release out"
        )


def foresee_stage(settings: Settings, letters: TwigConfig, V: int) -> None:
    """Raises InputError for what cannot be, from descriptions alone: `letters` of the base, V visual tokens an image."""
    if settings.stage:
        teacher_layer(settings.attention_layer, letters.K, letters.L)
        if settings.stage == 2:
            check_stage_2(settings)
        check_head_export(settings)
    if settings.stage == 2:
        Budgets.of(replace(letters, F=start_of(settings).F or letters.F), entering(settings) or V, settings.budget)
