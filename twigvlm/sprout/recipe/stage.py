"""A stage of a recipe on the training loop: a function of the step makes the batch, another makes the loss.

Knows the stage's schedule, its files and its progress bar; the loop is that of a user's twig.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from ...errors import RunError
from ...files import add_line, replacing, write_text
from ...model.twig import WEIGHTS
from ...processes import Stop
from ...training.run import checkpoints
from ...training.run.loop import Learner, Loop, LossOf, NotFinite, Place, Plan, Told, Watch, adamw, rates
from ...workers import batches, loader

LOGGED = 20  # steps a line of metrics
AHEAD = 4  # batches that a worker prepares in advance


@dataclass(frozen=True)
class StageConfig:
    """`lr` is the peak of a linear warm-up followed by a cosine to `final_lr` times the peak."""

    name: str
    steps: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    warmup: float = 0.03  # share of the steps
    final_lr: float = 0.02  # share of the peak
    clip: float = 1.0
    save_seconds: float = 120.0
    workers: int = 1
    seed: int = 0

    @property
    def plan(self) -> Plan:
        warm = max(1, round(self.warmup * self.steps))
        rate = rates("cosine", self.lr, self.steps, warm, self.final_lr, early=1)
        return Plan(self.steps, rate, self.clip, self.seed, save_seconds=self.save_seconds)


def usual_optimizer(module: torch.nn.Module, config: StageConfig) -> torch.optim.Optimizer:
    return adamw(module, config.lr, config.betas, config.weight_decay)


def fit(
    config: StageConfig,
    module: torch.nn.Module,
    make_batch: Callable[[int], dict],
    loss_of: LossOf,
    run_dir: Path,
    make_optimizer: Callable[[torch.nn.Module, StageConfig], torch.optim.Optimizer] = usual_optimizer,
) -> None:
    """Train the parameters of `module` that require a gradient, in place.

    `make_batch(step)` runs in worker processes; `loss_of(batch)` runs under bf16 autocast (where the
    device computes in bf16) and gives the loss and figures to log. Checkpoints go to `run_dir/<name>-saved/`, from whose last
    one it goes on; metrics go to `run_dir/<name>.jsonl`, one line every 20 steps.
    """
    out = run_dir / f"{config.name}-saved"
    out.mkdir(parents=True, exist_ok=True)
    device = next(module.parameters()).device
    learning = {name for name, p in module.named_parameters() if p.requires_grad}

    def write_model(folder: Path, weights: dict) -> None:
        save_file({name: weights[name] for name in weights if name in learning}, folder / WEIGHTS)

    feed = _Steps(make_batch, config, pinned=device.type == "cuda")
    plan = replace(config.plan, half=computes_bf16(device))
    watch = _Metrics(run_dir / f"{config.name}.jsonl", config.name)
    place = Place(out, write_model, device)
    loop = Loop(plan, Learner(module, loss_of), lambda m: make_optimizer(m, config), feed, place, watch)
    checkpoints.sweep(out)
    found, _ = checkpoints.last_whole(out)
    if found is not None:
        loop.resume(found)
    try:
        with Stop() as watch.stop:
            loop.run()
        if watch.stop.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if watch.stop:
            sys.exit(watch.stop.code)
    except NotFinite as fault:
        found, _ = checkpoints.last_whole(out)
        kept = f"the last good checkpoint is {found}" if found else "there is no checkpoint yet"
        raise RunError(f"{config.name}: {fault}; {kept}; lower lr (now {config.lr})") from fault
    finally:
        watch.close()


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 pays: a CPU without instructions for it emulates them, eleven times slower than fp32."""
    return device.type != "cpu" or any(word in _cpu_flags() for word in ("avx512_bf16", "amx_bf16", "bf16"))


@lru_cache
def _cpu_flags() -> frozenset[str]:
    """What /proc/cpuinfo says of the processor; "bf16" where there is no such file, as it was always assumed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset({"bf16"})
    return frozenset(word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split())


class _Steps(Dataset):
    """Batch number `step`, made in a worker; a step is one batch."""

    def __init__(self, make_batch: Callable[[int], dict], config: StageConfig, pinned: bool):
        self.make_batch, self.config, self.pinned, self.start = make_batch, config, pinned, 0

    def __len__(self) -> int:
        return self.config.steps - self.start

    def __getitem__(self, i: int) -> dict:
        return self.make_batch(self.start + i)

    def count(self, step: int) -> int:
        """One batch is a step."""
        return 1

    def batches(self, step: int) -> Iterator[dict]:
        """All batches from a step on."""
        self.start = step
        return batches(loader(self, _as_it_is, self.config.workers, AHEAD, batch_size=None, pin_memory=self.pinned))


def _as_it_is(batch: dict) -> dict:
    return batch


class _Metrics(Watch):
    """Means of the figures since the last line, and how long the loop waited for data, as JSON lines and on a bar."""

    def __init__(self, path: Path, name: str):
        self.path, self.name, self.figures, self.waited = path, name, [], 0.0
        self.bar: tqdm | None = None
        self.stop: Stop | None = None

    def stopping(self) -> bool:
        """A signal ends a stage between two steps, saved: an exception amid workers that hand over batches tells of them."""
        return bool(self.stop)

    def close(self) -> None:
        """Leave the terminal to others: an open bar would be drawn once more behind their last words."""
        if self.bar is not None:
            self.bar.close()

    def begin(self, loop: Loop) -> None:
        self.bar = tqdm(initial=loop.done, total=loop.plan.steps, desc=self.name, mininterval=2, smoothing=0.02)
        if self.path.exists():  # steps that a killed run logged but did not save come again
            lines = [line for line in self.path.read_text().splitlines() if _logged_step(line) <= loop.done]
            write_text("".join(f"{line}\n" for line in lines), self.path)

    def step(self, loop: Loop, told: Told) -> None:
        self.bar.update()
        self.waited += told.waited
        self.figures.append({"loss": told.losses[0].item(), **told.figures[0]})
        if loop.done % LOGGED and loop.done != loop.plan.steps:
            return
        mean = {k: float(sum(f[k] for f in self.figures)) / len(self.figures) for k in self.figures[0]}
        line = {"step": loop.done, **{k: round(v, 5) for k, v in mean.items()}}
        line |= {"grad_norm": round(told.norm, 4), "lr": told.rate, "waited_s": round(self.waited, 2)}
        add_line(line | {"time": round(time.time())}, self.path)
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in mean.items()}, refresh=False)
        self.figures, self.waited = [], 0.0


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # half a line, from a power loss


def save_weights(weights: dict[str, torch.Tensor], file: Path) -> None:
    """What a stage leaves, whole or not at all."""
    with replacing(file) as part:
        torch.save(weights, part)
