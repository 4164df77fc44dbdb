"""Who follows the training of a twig: counts, held-out samples, reports, what workers could not read, signals."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..agreement import HeldOut
from ..data.examples import Skipped
from ..data.loading import TrainingData
from ..data.survey import SkipLog
from ..settings import Settings
from . import checkpoints
from .loop import Loop, Told, Watch
from .ranks import Ranks
from .report import Report

MEASUREMENTS = 20  # of agreement in a run
MANY_STEPS = 1000  # from here on not every step is reported


@dataclass
class Job:
    """What everybody who follows or ends a run needs to know of it."""

    settings: Settings
    out: Path
    ranks: Ranks
    device: torch.device
    data: TrainingData
    facts: dict  # for twig_config.json
    steps_an_epoch: int = 1
    held_out: HeldOut | None = None
    skips: SkipLog | None = None  # on the first process
    report: Report | None = None  # on the first process


@dataclass
class Tally:
    """What has happened since the last report, in this process."""

    steps: int = 0
    loss: float | torch.Tensor = 0.0
    samples: int = 0
    tokens: int = 0
    right: float | torch.Tensor = 0.0
    answers: float | torch.Tensor = 0.0
    means: dict[str, float | torch.Tensor] = field(default_factory=dict)  # of an objective's own, summed over steps
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


class TwigWatch(Watch):
    """Follows one job's loop."""

    def __init__(self, job: Job, signals: Signals):
        self.job, self.signals = job, signals
        self.tally, self.agreement = Tally(), None
        self.unreadable: list[Skipped] = []

    def begin(self, loop: Loop) -> None:
        settings, steps = self.job.settings, loop.plan.steps
        self.measured_every = settings.agreement_steps or max(1, steps // MEASUREMENTS)
        self.logged_every = settings.log_steps or (1 if steps < MANY_STEPS else 10)
        loop.model.train()
        self.agreement = self._measure(loop)
        self.tally = Tally()
        if self.job.report is not None:
            self.job.report.start(loop.done)

    def batch(self, batch: dict) -> None:
        self.unreadable += batch["skipped"]
        self.tally.samples += len(batch["lengths"])
        self.tally.tokens += sum(batch["lengths"])

    def stopping(self) -> bool:
        return self.signals.caught is not None

    def step(self, loop: Loop, told: Told) -> None:
        tally, ended = self.tally, loop.done == loop.plan.steps
        tally.steps += 1
        tally.waited += told.waited
        tally.loss = tally.loss + torch.stack(told.losses).mean()
        tally.right = tally.right + sum(f["right"] for f in told.figures)
        tally.answers = tally.answers + sum(f["answers"] for f in told.figures)
        for name in told.figures[0].get("means", {}):
            mean = torch.stack([f["means"][name].float() for f in told.figures]).mean()
            tally.means[name] = tally.means.get(name, 0.0) + mean
        self._note_unreadable()
        if ended or loop.done % self.measured_every == 0:
            self.agreement = self._measure(loop)
        if ended or loop.done % self.logged_every == 0:
            self._log(loop, told)

    def _note_unreadable(self) -> None:
        """List what workers could not read; too much of it stops all."""
        job = self.job
        if job.ranks.reduce([float(bool(self.unreadable))], job.device, largest=True)[0]:
            found = [s for part in job.ranks.collect(self.unreadable) for s in part]
            self.unreadable = []
            job.ranks.on_first(lambda: job.skips.add(found))

    def _measure(self, loop: Loop) -> float | None:
        """Agreement on the held-out samples."""
        held_out, times = self.job.held_out, loop.times
        if held_out is None:
            return None
        start = time.perf_counter()
        loop.model.eval()
        times.counting = False

        def figures(batch: dict) -> dict:
            with loop.autocast():
                return loop.model(loop.placed(batch))[1]

        share = held_out.measure(figures, self.job.ranks, self.job.device)
        loop.model.train()
        times.counting = True
        times.add("measuring", time.perf_counter() - start)
        return share

    def _log(self, loop: Loop, told: Told) -> None:
        job, tally = self.job, self.tally
        self.tally = Tally()
        sums = (
            tally.loss,
            tally.samples,
            tally.tokens,
            tally.right,
            tally.answers,
            tally.waited,
            *tally.means.values(),
        )
        loss, samples, tokens, right, answers, waited, *means = job.ranks.reduce([float(s) for s in sums], job.device)
        seconds = max(time.monotonic() - tally.since, 1e-9)
        logs = {"loss": loss / job.ranks.world / tally.steps}
        logs |= {name: mean / job.ranks.world / tally.steps for name, mean in zip(tally.means, means, strict=True)}
        logs |= {} if told.norm is None else {"grad_norm": told.norm}
        logs |= {"learning_rate": told.rate, "epoch": loop.done / job.steps_an_epoch}
        logs |= {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds}
        logs["waiting_share"] = waited / job.ranks.world / seconds
        if job.held_out is None:
            logs["agreement"] = right / max(1.0, answers)
        elif self.agreement is not None:
            logs["agreement"] = self.agreement
        if job.report is not None:
            with checkpoints.writing("the log", job.out):
                job.report.step(loop.done, loop.plan.steps, logs)
