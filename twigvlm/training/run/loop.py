"""One resumable training loop: a pure function of the step makes the batch, another makes the loss.

Knows optimizer, schedule, autocast, checkpoints, progress and metrics; knows neither the data nor
the model. Because batch `n` depends on `n` alone, a run that is killed and started again sees
exactly the batches that it would have seen.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...workers import batches, loader

LOGGED = 20  # steps a line of metrics
AHEAD = 4  # batches that a worker prepares in advance


@dataclass(frozen=True)
class LoopConfig:
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


class _Steps(Dataset):
    def __init__(self, make_batch: Callable[[int], dict], start: int, end: int):
        self.make_batch, self.start, self.end = make_batch, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, i: int) -> dict:
        return self.make_batch(self.start + i)


def save_atomically(state: object, path: Path) -> None:
    """Write beside the target, flush to the disk, rename: a reader sees the old file or the new one."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _lr_share(step: int, config: LoopConfig) -> float:
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(module: torch.nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    """The optimizer of all parameters that require a gradient."""
    learning = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(learning, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


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


def fit(
    config: LoopConfig,
    module: torch.nn.Module,
    make_batch: Callable[[int], dict],
    loss_fn: Callable[[dict], tuple[torch.Tensor, dict[str, float]]],
    run_dir: Path,
    make_optimizer: Callable[[torch.nn.Module, LoopConfig], torch.optim.Optimizer] = adamw,
) -> None:
    """Train the parameters of `module` that require a gradient, in place.

    `make_batch(step)` runs in worker processes; `loss_fn(batch)` runs under bf16 autocast (where the
    device computes in bf16) and gives the loss and figures to log. Resumes from `run_dir/<name>.pt`; metrics go to
    `run_dir/<name>.jsonl`, one line every 20 steps.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    learning = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(module, config)
    checkpoint = run_dir / f"{config.name}.pt"
    start = _resume(checkpoint, module, optimizer)

    def save(step: int) -> None:
        weights = {n: p.detach() for n, p in learning.items()}
        save_atomically({"weights": weights, "optimizer": optimizer.state_dict(), "step": step}, checkpoint)

    device = next(module.parameters()).device
    half = computes_bf16(device)
    loaded = batches(_loader(make_batch, start, config, pinned=device.type == "cuda"))
    bar = tqdm(loaded, initial=start, total=config.steps, desc=config.name, mininterval=2, smoothing=0.02)
    metrics = _Metrics(run_dir / f"{config.name}.jsonl", start)
    saved = time.monotonic()
    for step, batch in enumerate(bar, start):
        metrics.batch_came()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _lr_share(step, config)
        batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        torch.manual_seed(config.seed + step)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss, extra = loss_fn(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(learning.values()), config.clip)
        if not torch.isfinite(norm):
            save(step)  # this step has changed nothing yet
            raise FloatingPointError(
                f"{config.name}: gradient norm {norm.item()} at step {step}; the last good checkpoint is "
                f"{checkpoint}; lower lr (now {config.lr})"
            )
        optimizer.step()
        metrics.add({"loss": loss.item(), **extra})
        if (step + 1) % LOGGED == 0 or step + 1 == config.steps:
            facts = {"grad_norm": round(norm.item(), 4), "lr": optimizer.param_groups[0]["lr"]}
            mean = metrics.write(step + 1, facts)
            bar.set_postfix({k: f"{v:.3f}" for k, v in mean.items()}, refresh=False)
        if time.monotonic() - saved > config.save_seconds:
            save(step + 1)
            saved = time.monotonic()
        metrics.step_done()
    save(config.steps)


def _resume(checkpoint: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore weights and optimizer where there is a checkpoint; the step to go on with."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    module.load_state_dict(state["weights"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _loader(make_batch: Callable[[int], dict], start: int, config: LoopConfig, pinned: bool) -> DataLoader:
    steps = _Steps(make_batch, start, config.steps)
    return loader(steps, _as_it_is, config.workers, AHEAD, batch_size=None, pin_memory=pinned)


def _as_it_is(batch: dict) -> dict:
    return batch


class _Metrics:
    """Means of the figures since the last line, and how long the loop waited for data, as JSON lines."""

    def __init__(self, path: Path, start: int):
        self.path, self.figures, self.waited, self.mark = path, [], 0.0, time.monotonic()
        if path.exists():  # steps that a killed run logged but did not save come again
            lines = [line for line in path.read_text().splitlines() if _logged_step(line) <= start]
            path.write_text("".join(f"{line}\n" for line in lines))

    def batch_came(self) -> None:
        self.waited += time.monotonic() - self.mark

    def step_done(self) -> None:
        self.mark = time.monotonic()

    def add(self, figures: dict[str, float]) -> None:
        self.figures.append(figures)

    def write(self, step: int, facts: dict[str, float]) -> dict[str, float]:
        """Append a line and start anew; the means."""
        mean = {k: sum(f[k] for f in self.figures) / len(self.figures) for k in self.figures[0]}
        line = {"step": step, **{k: round(v, 5) for k, v in mean.items()}, **facts}
        with open(self.path, "a") as log:
            log.write(json.dumps(line | {"waited_s": round(self.waited, 2), "time": round(time.time())}) + "\n")
        self.figures, self.waited = [], 0.0
        return mean


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # half a line, from a power loss
