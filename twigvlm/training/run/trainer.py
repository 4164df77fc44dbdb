"""Hugging Face's Trainer, with what it lacks: an order of its own, checkpoints that are whole, processes that
stop together, and time that is accounted for. The loop, the optimizer, DeepSpeed and DDP are the Trainer's.
"""

from __future__ import annotations

import math
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ...errors import RunError
from ...model.twig import WEIGHTS, write_twig
from ...workers import fetch, loader
from ..agreement import HeldOut
from ..data.loading import Material
from ..data.survey import SkipLog
from ..lora import has_adapters
from ..settings import Settings
from ..twig import TwigForTraining
from . import checkpoints
from .clock import Clock
from .ranks import Ranks
from .report import Report

EXACT_EVERY = 20  # on a GPU one step in so many is timed by parts
PREFETCH = 4  # micro-batches that a worker prepares ahead
MEASUREMENTS = 20  # of agreement in a run
BATCH = ("input_ids", "labels", "lengths", "pixel_values")  # what the model reads of a batch


class NotFinite(RunError):
    """The loss or the gradients are no numbers. `spoilt`: the weights have taken the step already."""

    def __init__(self, message: str, spoilt: bool = False):
        super().__init__(message)
        self.spoilt = spoilt


@dataclass
class Job:
    """What a run knows beside its arguments."""

    settings: Settings
    out: Path
    ranks: Ranks
    device: torch.device
    material: Material
    facts: dict  # for twig_config.json
    form: dict  # how checkpoints are laid out: by which ZeRO stage and how many processes
    held_out: HeldOut | None = None
    skips: SkipLog | None = None  # on the first process
    report: Report | None = None  # on the first process


@dataclass
class Tally:
    """What has happened since the last report, in this process."""

    samples: int = 0
    tokens: int = 0
    right: float = 0.0
    answers: float = 0.0
    waited: float = 0.0
    since: float = field(default_factory=time.monotonic)


class Signals:
    """SIGTERM (a pre-empted node) and Ctrl-C ask the run to save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self.before = {number: signal.signal(number, self._catch) for number in (signal.SIGTERM, signal.SIGINT)}

    def forget(self) -> None:
        """Leave signals to whoever had them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.caught is not None:
            raise KeyboardInterrupt
        self.caught = number


class _Lazy:
    """The micro-batches of one step, fetched when they are needed, so that loading never waits for a whole step."""

    def __init__(self, batches: Iterator[dict], count: int, tally: Tally, clock: Clock):
        self.batches, self.count, self.tally, self.clock = batches, count, tally, clock

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict]:
        for _ in range(self.count):
            start = time.monotonic()
            batch = fetch(self.batches)
            waited = time.monotonic() - start
            self.tally.waited += waited
            self.clock.add("waiting", waited)
            yield batch


class TwigTrainer(Trainer):
    """Runs one job. Adds to the Trainer's arguments only what is in `Job`."""

    loss_is_scaled_for_ga = False  # every micro-batch's loss is a mean, and their mean is the step's

    def __init__(self, job: Job, model: TwigForTraining, args, sampler, signals: Signals):
        self.job, self.sampler, self.signals = job, sampler, signals
        self.clock, self.tally = model.clock, Tally()
        self.last_saved, self.resumed_at = time.monotonic(), 0
        self.asked = {"stop": False, "save": False, "skips": False}
        self.found_skips: list = []
        self.mid_step = False
        super().__init__(
            model=model, args=args, train_dataset=job.material.dataset, data_collator=job.material.collate,
            callbacks=[_Hooks(self)],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        backward = self.accelerator.backward

        def timed(loss, **how):
            with self.clock.part("twig"):
                backward(loss, **how)

        self.accelerator.backward = timed

    # ---- data

    def get_train_dataloader(self) -> DataLoader:
        """Not prepared by accelerate: the sampler already knows the processes."""
        return loader(
            self.train_dataset, self.data_collator, self.args.dataloader_num_workers, PREFETCH,
            batch_sampler=self.sampler, pin_memory=self.job.device.type == "cuda",
        )  # fmt: skip

    def num_examples(self, dataloader: DataLoader) -> int:
        return len(self.job.material.usable)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return _Lazy(epoch_iterator, num_batches, self.tally, self.clock), None

    # ---- one micro-batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; raises NotFinite, on all processes and before any gradient, if one of them has none."""
        out = model(**{name: inputs[name] for name in BATCH})
        self.found_skips += inputs["skipped"]
        self._agree(out["loss"])
        tally = self.tally
        tally.samples += len(inputs["lengths"])
        tally.tokens += sum(inputs["lengths"])
        tally.right, tally.answers = tally.right + out["right"], tally.answers + out["answers"]
        return (out["loss"], out) if return_outputs else out["loss"]

    def _agree(self, loss: torch.Tensor) -> None:
        """What one process sees, all act on: a loss that is none, a signal, the time to save, a new faulty sample."""
        settings = self.job.settings
        due = 0 < settings.save_seconds <= time.monotonic() - self.last_saved
        seen = [
            not torch.isfinite(loss.detach()).item(),
            self.signals.caught is not None,
            due and self.job.ranks.first,
            bool(self.found_skips),
        ]
        bad, stop, save, skips = self.job.ranks.reduce([float(s) for s in seen], self.job.device, largest=True)
        if bad:
            raise NotFinite(f"the loss is not finite at step {self.state.global_step + 1}")
        self.asked = {"stop": bool(stop), "save": bool(save), "skips": bool(skips)}

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            what = f"the gradient norm is {float(norm)} at step {self.state.global_step + 1}"
            raise NotFinite(what, spoilt=self.is_deepspeed_enabled)  # DeepSpeed steps before it tells
        return norm

    def note_skips(self) -> None:
        """List what workers could not read; too much of it stops all."""
        found = [s for part in self.job.ranks.gather(self.found_skips) for s in part]
        self.found_skips = []
        self.job.ranks.on_first(lambda: self.job.skips.add(found))

    # ---- held-out samples

    def measure_agreement(self) -> float | None:
        if self.job.held_out is None:
            return None
        start = time.perf_counter()
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        model.eval()
        counting, self.clock.counting = self.clock.counting, False

        def forward(batch: dict) -> dict:
            return model(**self._prepare_inputs({name: batch[name] for name in BATCH}))

        share = self.job.held_out.measure(forward, self.job.ranks, self.job.device)
        model.train()
        self.clock.counting = counting
        self.clock.add("measuring", time.perf_counter() - start)
        return share

    # ---- reports

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the Trainer does not know, and hands it to the report."""
        if "loss" in logs:
            tally, self.tally = self.tally, Tally()
            sums = [tally.samples, tally.tokens, float(tally.right), float(tally.answers), tally.waited]
            samples, tokens, right, answers, waited = self.job.ranks.reduce([float(s) for s in sums], self.job.device)
            seconds = max(time.monotonic() - tally.since, 1e-9)
            logs["samples_per_second"] = samples / seconds
            logs["tokens_per_second"] = tokens / seconds
            logs["waiting_share"] = waited / self.job.ranks.world / seconds
            if self.job.held_out is None:
                logs["agreement"] = right / max(1.0, answers)
            elif self.agreement is not None:
                logs["agreement"] = self.agreement
        with checkpoints.writing("the log", self.job.out):
            super().log(logs, start_time)
        if self.job.report is not None and "loss" in logs:
            with checkpoints.writing("the log", self.job.out):
                self.job.report.step(self.state.global_step, self.state.max_steps, logs)

    agreement: float | None = None

    # ---- checkpoints

    def _get_output_dir(self, trial) -> str:
        return str(self.job.out / checkpoints.SAVING)

    def _save_checkpoint(self, model, trial) -> None:
        """The Trainer's files, written aside, flushed, sealed, renamed; then old ones go."""
        start, out, step = time.perf_counter(), self.job.out, self.state.global_step
        self.last_saved = time.monotonic()
        place = out / f"checkpoint-{step}"
        if self.job.ranks.on_first(lambda: checkpoints.is_whole(place)):
            return
        self.job.ranks.on_first(lambda: shutil.rmtree(out / checkpoints.SAVING, ignore_errors=True))
        if self.mid_step:
            self._restore_random()
        with checkpoints.writing(f"the checkpoint of step {step}", out):
            super()._save_checkpoint(model, trial)
        self.job.ranks.wait()
        self.job.ranks.on_first(lambda: self._seal(place))
        self.clock.add("saving", time.perf_counter() - start)

    def _seal(self, place: Path) -> None:
        out = self.job.out
        with checkpoints.writing(f"the checkpoint {place.name}", out):
            checkpoints.seal(
                out / checkpoints.SAVING / place.name, place, {"step": self.state.global_step, **self.job.form}
            )
        shutil.rmtree(out / checkpoints.SAVING, ignore_errors=True)
        checkpoints.prune(out, self.job.settings.keep)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The twig as a folder that `twigvlm.load` reads (with adapters: only a training does)."""
        if not self.args.should_save:
            return
        state = self.model.state_dict() if state_dict is None else state_dict
        adapters = {"adapters": True} if has_adapters(self.model) else {}
        write_twig(Path(output_dir), plain_names(state), {**self.job.facts, **adapters})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        state = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        self.model.load_state_dict({f"twig.{name}": tensor for name, tensor in state.items()})

    def keep_random(self) -> None:
        """Note the random state before a step: a checkpoint made within it continues from its beginning."""
        cuda = torch.cuda.get_rng_state_all() if self.job.device.type == "cuda" else None
        self.random = (random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def _restore_random(self) -> None:
        python, numpy, cpu, cuda = self.random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def plain_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A training module's tensors under the twig's names, on the CPU and in the file's layout."""
    return {name.removeprefix("twig."): t.detach().cpu().contiguous() for name, t in state.items()}


class _Hooks(TrainerCallback):
    """Where in the Trainer's loop what happens."""

    def __init__(self, trainer: TwigTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_):
        t = self.trainer
        # A checkpoint brings the intervals of the run that wrote it; those of this command count.
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        t.resumed_at, t.last_saved, t.tally = state.global_step, time.monotonic(), Tally()
        self.every = t.job.settings.agreement_steps or max(1, state.max_steps // MEASUREMENTS)
        t.agreement = t.measure_agreement()
        t.tally = Tally()
        if t.job.report is not None:
            t.job.report.start(state.global_step)
        self.ended = time.perf_counter()

    def on_epoch_begin(self, args, state, control, **_):
        t = self.trainer
        each = -(-len(t.sampler) // args.gradient_accumulation_steps)
        t.sampler.set_epoch(state.global_step // each)

    def on_step_begin(self, args, state, control, **_):
        t = self.trainer
        t.keep_random()
        t.mid_step = True

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.optimizing = self.trainer.clock.now()

    def on_optimizer_step(self, args, state, control, **_):
        clock = self.trainer.clock
        clock.add("optimizer", clock.now() - self.optimizing)

    def on_substep_end(self, args, state, control, **_):
        if self.trainer.asked["stop"]:
            control.should_training_stop = control.should_save = True

    def on_step_end(self, args, state, control, **_):
        t = self.trainer
        t.mid_step = False
        t.clock.step()
        if t.asked["skips"]:
            t.note_skips()
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            t.agreement = t.measure_agreement()
        if t.asked["stop"]:
            control.should_training_stop = control.should_save = True
        if t.asked["save"]:
            control.should_save = True
        t.clock.exact = t.job.device.type != "cuda" or state.global_step % EXACT_EVERY == 0
