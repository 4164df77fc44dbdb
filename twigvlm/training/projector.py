"""VisionZip*'s second half: the base's projector learns while tokens are pruned in front of it, everything else frozen.

The whole base reads the shortened prompts; the loss is LLaVA's, the next token of the answers. The
authors published neither code nor rate: a tenth of mix665k (--epochs 0.1) with LLaVA's own recipe of
finetuning is what their paper and their answers to users say. Legend: B rows, S tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..families import trunk_of
from ..loading.base import Loaded, load_base
from ..loading.describe import EMBEDDED_BASE
from ..loading.projector import CONFIG, write_projector
from ..loading.random import random_base
from ..model.trunk import Trunk
from ..model.twig import signature
from ..pruning import Reducer, Shape, TowerMethod, find_method
from .data.examples import IGNORE
from .run.device import Run
from .run.report import PROJECTOR_CARD
from .run.timing import StepTimes
from .settings import Settings
from .subject import room
from .twig import checkpoint_gradients, shortened


@dataclass
class PreparedProjector:
    """A whole frozen base, and an fp32 copy of its projector."""

    loaded: Loaded
    base: Trunk
    module: nn.Module
    signature: list[float]


class ProjectorLesson:
    """The next-token loss of the pruned base on a batch of conversations, with the projector that learns."""

    def __init__(self, base: Trunk, projector: nn.Module, reducer: Reducer, times: StepTimes | None = None):
        self.base, self.projector, self.reducer = base, projector, reducer
        self.times = times or StepTimes(base.device)

    def __call__(self, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The batch of `TwigLesson`. Figures: "answers", the learnt tokens, and "right", how many the base would say."""
        with self.times.part("trunk"):
            stream, labels = shortened(self.base, self.reducer, batch, self.projector)
        with self.times.part("twig"):
            hidden, targets = self.base.run(self.base.layers, stream).hidden, labels[:, 1:]
            chosen = targets != IGNORE
            logits = self.base.logits(hidden[:, :-1][chosen])  # only these rows meet the vocabulary
            loss = F.cross_entropy(logits, targets[chosen], reduction="sum") / max(1, int(chosen.sum()))
            # A batch of text alone asks the projector nothing; its gradient is 0 then, not absent.
            loss = loss + 0 * sum(p.sum() for p in self.projector.parameters())
        right = (logits.detach().argmax(-1) == targets[chosen]).sum()
        return loss, {"answers": chosen.sum(), "right": right}


class ProjectorSubject:
    """See `training.subject`."""

    config, card, asks_base = CONFIG, PROJECTOR_CARD, True

    def __init__(self, settings: Settings):
        method = find_method(settings.pruning)
        if not isinstance(method, TowerMethod):
            raise InputError(f"pruning is {settings.pruning!r}; a projector learns behind a method before the decoder")
        for name, least in (("lora_rank", 0), ("export_release", None)):
            if getattr(settings, name) != least:
                raise InputError(
                    f"{name} is {getattr(settings, name)!r}; it is for twigs, leave it out with --learn projector"
                )
        self.method, self.R = method, settings.retained_tokens

    def reducer(self, base: Trunk) -> Reducer:
        return self.reducer_of(base.L, base.V)

    def reducer_of(self, L: int, V: int) -> Reducer:
        """Of a base with L layers and V visual tokens an image. Raises InputError for an R that cannot be."""
        return self.method.plan(self.R, Shape(L, V, 1, L)).tower

    def identity(self, settings: Settings) -> dict[str, Any]:
        return {"learn": "projector", "pruning": settings.pruning, "retained_tokens": settings.retained_tokens}

    def prepare(self, one: Run) -> PreparedProjector:
        settings = one.settings
        dtype = torch.bfloat16 if one.precision == "bf16" else torch.float32
        with room(one):
            if settings.random is not None:
                model = random_base(settings.random, one.device, dtype, settings.attention)
                loaded = Loaded(model, EMBEDDED_BASE, f"random {settings.random}", False)
            else:
                loaded = load_base(settings.base, one.device, dtype, settings.attention)
        base = trunk_of(loaded.model)
        base.model.requires_grad_(False)
        self.reducer(base)  # an impossible R is refused here
        if settings.gradient_checkpointing:
            checkpoint_gradients(base.layers)
        if settings.compile:
            for layer in base.layers:
                layer.compile(dynamic=True)
        projector = copy.deepcopy(base.model.model.multi_modal_projector).float().requires_grad_(True)
        return PreparedProjector(loaded, base, projector, signature(base))

    def lesson(self, prepared: PreparedProjector, times: StepTimes) -> ProjectorLesson:
        return ProjectorLesson(prepared.base, prepared.module, self.reducer(prepared.base), times)

    def describe(self, prepared: PreparedProjector) -> dict:
        return {
            "format_version": 1, "base": prepared.loaded.name, "base_signature": prepared.signature, "L": prepared.base.L,
            "pruning": self.method.name, "retained_tokens": self.R,
        }  # fmt: skip

    def write(self, folder: Path, weights: dict[str, torch.Tensor], facts: dict) -> None:
        write_projector(folder, weights, {k: v for k, v in facts.items() if k != "adapters"})

    def final(self, prepared: PreparedProjector, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return weights

    def words(self, settings: Settings) -> str:
        return f"the projector learns, {settings.pruning} leaves {settings.retained_tokens:g} tokens of an image"

    def rows(self, facts: dict, settings: dict) -> dict[str, str]:
        return {"Pruning": f"{settings['pruning']}, {settings['retained_tokens']:g} tokens of an image"}

    def title(self, facts: dict) -> str:
        return f"Projector of {facts['base']} behind {facts['pruning']}, R = {facts['retained_tokens']:g}"
