"""One training loop over accelerate, for a user's twig and for every stage of the embedded model.

prepare → for each step: micro-batches → objective → backward → step → report → checkpoint. Rate, random
numbers and batches of a step are functions of its number, so that a run that was killed goes on from
its last checkpoint and ends with the same bits. Knows neither the data nor the model; accelerate
knows DDP and DeepSpeed.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from ...errors import RunError
from ...model.twig import WEIGHTS
from ..settings import check_accelerate
from . import checkpoints
from .ranks import ALONE, Ranks
from .timing import StepTimes

EXACT_EVERY = 20  # on a GPU one step in so many is timed by parts
FORMAT = 2  # of a checkpoint's states; 1 were those of Hugging Face's Trainer

LossOf = Callable[[dict], tuple[torch.Tensor, dict]]


class NotFinite(RunError):
    """The loss or the gradients are no numbers. `spoilt`: the weights have taken the step already."""

    def __init__(self, message: str, spoilt: bool = False):
        super().__init__(message)
        self.spoilt = spoilt


@dataclass(frozen=True)
class Plan:
    """How a loop runs. `rate` gives the learning rate of a step, counted from 0; `clip` 0 clips nothing."""

    steps: int
    rate: Callable[[int], float]
    clip: float = 0.0
    seed: int = 0
    half: bool = False  # bf16 autocast
    zero: dict | None = None  # DeepSpeed's configuration, complete
    save_steps: int = 0
    save_seconds: float = 120.0
    keep: int = 1  # checkpoints


class Feed(Protocol):
    """The micro-batches of this process, as a function of the step."""

    def count(self, step: int) -> int:
        """Micro-batches of a step."""

    def batches(self, step: int) -> Iterator[dict]:
        """All micro-batches from a step on."""


class Learner(nn.Module):
    """What accelerate wraps. Parameters are those of `module`; what else `loss_of` needs (a frozen trunk) is no part
    of it, so that nothing that wraps, saves, shards or casts a model ever touches that.
    """

    def __init__(self, module: nn.Module, loss_of: LossOf):
        super().__init__()
        self.module, self.loss_of = module, loss_of

    def forward(self, batch: dict) -> tuple[torch.Tensor, dict]:
        return self.loss_of(batch)


@dataclass(frozen=True)
class Told:
    """What a step of this process has given: `losses` and `figures` of its micro-batches.

    Every micro-batch has been told in "progress" which share of the training was done before it.
    """

    losses: list[torch.Tensor]
    figures: list[dict]
    norm: float | None
    rate: float
    waited: float  # seconds for data


class Watch:
    """Who follows a loop. This one says nothing."""

    def begin(self, loop: Loop) -> None:
        """Before the first step."""

    def batch(self, batch: dict) -> None:
        """A micro-batch has come."""

    def stopping(self) -> bool:
        """Whether this process is asked to save and stop."""
        return False

    def step(self, loop: Loop, told: Told) -> None:
        """A step is done, and `loop.done` counts it."""


def adamw(module: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """Of all parameters that require a gradient; norms and biases do not decay."""
    learning = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


def rates(kind: str, peak: float, steps: int, warm: int, floor: float = 0.0, early: int = 0) -> Callable[[int], float]:
    """Learning rate by step: a linear rise over `warm` steps to `peak`, then "cosine" or "linear" to `floor` times it
    or "constant_with_warmup". `early` 1 begins with the first part of the rise, 0 with none.
    """

    def rate(step: int) -> float:
        if step < warm:
            return peak * (step + early) / warm
        progress = min(1.0, (step - warm) / max(1, steps - warm))
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}.get(kind, 1.0)
        return peak * (floor + (1 - floor) * left)

    return rate


def open_accelerator(device: torch.device, zero: dict | None):
    """accelerate on this device; DeepSpeed by its configuration."""
    check_accelerate()
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin

    if zero is None:
        return Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    if device.type == "cpu" and torch.cuda.is_available():
        PartialState(cpu=True)  # else it would take the GPU
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    half = "bf16" if zero.get("bf16", {}).get("enabled") else "no"
    return Accelerator(mixed_precision=half, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero))


@dataclass(frozen=True)
class Place:
    """Where a loop runs and what it leaves: checkpoints under `out`.

    `write_model(folder, weights)` puts the weights that learn beside a checkpoint's states, as a file WEIGHTS;
    `form` is what another run must agree with to read these states.
    """

    out: Path
    write_model: Callable[[Path, dict], None]
    device: torch.device
    ranks: Ranks = ALONE
    form: dict = field(default_factory=lambda: {"format": FORMAT})


class Loop:
    """One training, in place, of what learns in `learner`."""

    def __init__(
        self,
        plan: Plan,
        learner: Learner,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        feed: Feed,
        place: Place,
        watch: Watch | None = None,
        times: StepTimes | None = None,
    ):
        self.plan, self.module, self.feed, self.place = plan, learner.module, feed, place
        self.device, self.ranks, self.out = place.device, place.ranks, place.out
        self.watch, self.times = watch or Watch(), times or StepTimes(place.device)
        self.learning = [p for p in self.module.parameters() if p.requires_grad]
        self.done, self.waited, self.saved = 0, 0.0, time.monotonic()
        self.stop = self.due = False
        self.accelerator = open_accelerator(place.device, plan.zero)
        # The states are accelerate's to write, the weights are ours: a checkpoint is a folder that can be loaded.
        self.accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        self.accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        self.model, self.optimizer = self.accelerator.prepare(learner, self._optimizer(make_optimizer))

    def _optimizer(self, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]):
        """The loop's own, or that of DeepSpeed's configuration."""
        if self.plan.zero is None or "optimizer" not in self.plan.zero:
            return make_optimizer(self.module)
        from accelerate.utils import DummyOptim

        return DummyOptim(self.learning)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        self.accelerator.load_state(str(folder))
        if self.plan.zero is None:
            self.module.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        self.done = checkpoints.step_of(folder)

    def run(self) -> bool:
        """Train to the last step; False if somebody asked to stop before. Raises NotFinite, with a checkpoint of the
        state before the step that went wrong, where that is still there.
        """
        self.watch.begin(self)
        self.saved = time.monotonic()
        micro_batches = self.feed.batches(self.done)
        while self.done < self.plan.steps:
            try:
                told = self._step(micro_batches)
            except NotFinite as fault:
                self._rescue(fault)
                raise
            if told is not None:
                self.done += 1
                self.times.step()
                self.watch.step(self, told)
                self.times.exact = self.device.type != "cuda" or self.done % EXACT_EVERY == 0
            ended = self.done == self.plan.steps
            if self.stop or ended or self.due or (self.plan.save_steps and self.done % self.plan.save_steps == 0):
                self.save()
            if self.stop and not ended:
                return False
        return True

    def _step(self, micro_batches: Iterator[dict]) -> Told | None:
        """One optimizer step; None if it was broken off, before it changed anything."""
        count, rate = self.feed.count(self.done), self.plan.rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, figures, self.waited = [], [], 0.0
        for number in range(count):
            progress = (self.done + number / count) / self.plan.steps
            batch = {**self._next(micro_batches), "progress": progress}
            self._seed(number)
            loss, found = self._micro_batch(batch, count, last=number == count - 1)
            losses.append(loss)
            figures.append(found)
            if self.stop and number < count - 1:
                return None
        return Told(losses, figures, self._update(), rate, self.waited)

    def _seed(self, number: int) -> None:
        """Random numbers of a micro-batch: of its step, its number in it and its process. A loader draws some as well,
        whenever it begins: so this comes behind.
        """
        torch.manual_seed((self.plan.seed + self.done + (self.ranks.rank << 32) + (number << 48)) % (1 << 63))

    def _next(self, micro_batches: Iterator[dict]) -> dict:
        start = time.monotonic()
        batch = next(micro_batches)
        waited = time.monotonic() - start
        self.waited += waited
        self.times.add("waiting", waited)
        self.watch.batch(batch)
        return self.placed(batch)

    def placed(self, batch: dict) -> dict:
        """The batch with its tensors on the device."""
        return {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.half and self.plan.zero is None)

    def _micro_batch(self, batch: dict, count: int, last: bool) -> tuple[torch.Tensor, dict]:
        """A micro-batch's loss is a mean, and the mean of `count` of them is the step's."""
        self.accelerator.sync_gradients = last
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            with self.autocast():
                loss, figures = self.model(batch)
            self._agree(loss)
            with self.times.part("twig"):
                how: dict[str, Any] = {} if self.plan.zero is None else {"scale_wrt_gas": False}
                self.accelerator.backward(loss / count, **how)
        return loss.detach(), figures

    def _agree(self, loss: torch.Tensor) -> None:
        """What one process sees, all act on: a loss that is none, a signal, the time to save."""
        due = self.ranks.first and self.plan.save_seconds <= time.monotonic() - self.saved
        seen = [not torch.isfinite(loss.detach()).item(), self.watch.stopping(), due]
        bad, stop, save = self.ranks.reduce([float(s) for s in seen], self.device, largest=True)
        if bad:
            raise NotFinite(f"the loss is not finite at step {self.done + 1}")
        self.stop, self.due = bool(stop), bool(save)

    def _update(self) -> float | None:
        """Let the gradients change the weights; their norm. DeepSpeed has done so already, with its last backward."""
        if self.plan.zero is not None:
            norm = self.model.get_global_grad_norm()
            return None if norm is None else self._finite(float(norm), spoilt=True)
        with self.times.part("optimizer"):
            if self.plan.clip:
                norm = self.accelerator.clip_grad_norm_(self.learning, self.plan.clip)
            else:
                norm = nn.utils.get_total_norm([p.grad for p in self.learning if p.grad is not None])
            found = self._finite(norm.item(), spoilt=False)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return found

    def _finite(self, norm: float, spoilt: bool) -> float:
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient norm is {norm} at step {self.done + 1}", spoilt)
        return norm

    def _rescue(self, fault: NotFinite) -> None:
        """Save the state before the step that went wrong, unless it is spoilt on some process."""
        good = not fault.spoilt and all(torch.isfinite(getattr(p, "ds_tensor", p)).all() for p in self.learning)
        spoilt = self.ranks.reduce([0.0 if good else 1.0], self.device, largest=True)[0]
        if not spoilt and self.done:
            self.save()

    def save(self) -> None:
        """Write a checkpoint aside, flush it, seal it, rename it; then old ones go."""
        start, self.saved = self.times.now(), time.monotonic()
        place, saving = self.out / f"{checkpoints.STEM}{self.done}", self.out / checkpoints.SAVING
        if self.ranks.on_first(lambda: checkpoints.is_whole(place)):
            return
        self.ranks.on_first(lambda: shutil.rmtree(saving, ignore_errors=True))
        with checkpoints.writing(f"the checkpoint of step {self.done}", self.out):
            self.accelerator.save_state(str(saving / place.name))
            weights = self.accelerator.get_state_dict(self.model)  # on all: ZeRO-3 puts them together
            if self.ranks.first:
                self.place.write_model(saving / place.name, self._own(weights))
        self.ranks.wait()
        self.ranks.on_first(lambda: checkpoints.put(saving / place.name, place, self.place.form, self.plan.keep))
        self.times.add("saving", self.times.now() - start)

    def _own(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Under the names of `module`, on the CPU and in a file's layout."""
        plain = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in plain.items()}
