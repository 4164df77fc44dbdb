"""What a run tells: a line while it goes, log.jsonl, the curve and the model card."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import time
from collections import deque
from pathlib import Path

from ...config import hub_id
from ...errors import InputError
from ...files import add_line, replacing
from ...hub.card import HOMES, About, agreement, with_head

LOG, CURVE, CARD = "log.jsonl", "curve.png", "README.md"
RECENT = 20  # reports over which the remaining time is estimated
DIGITS = {
    "loss": 5,
    "grad_norm": 5,
    "agreement": 5,
    "samples_per_second": 3,
    "tokens_per_second": 1,
    "waiting_share": 5,
    "ntp": 5, "prediction": 5, "attention": 5, "reward": 5, "spread": 5,
}  # fmt: skip
TERMS = (
    "ntp",
    "prediction",
    "attention",
    "reward",
    "spread",
)  # of the loss, or of what it is made from: where there are any


def check_wandb(wanted: bool) -> None:
    if wanted and importlib.util.find_spec("wandb") is None:
        raise InputError("--wandb needs the package wandb: pip install wandb")


class Charts:
    """TensorBoard's files and Weights & Biases, where they are wanted."""

    def __init__(self, out: Path, tensorboard: bool, wandb: bool):
        self.board = self.wandb = None
        if tensorboard and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"))
        if wandb:
            import wandb as charts

            digest = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]
            # A continued run goes on in its own charts; WANDB_PROJECT and the like in the environment count.
            self.wandb = charts.init(
                dir=str(out), project=os.environ.get("WANDB_PROJECT", "twigvlm"), name=out.name,
                id=os.environ.get("WANDB_RUN_ID", digest), resume=os.environ.get("WANDB_RESUME", "allow"),
            )  # fmt: skip

    def step(self, step: int, logs: dict[str, float]) -> None:
        told = {f"train/{name}": value for name, value in logs.items()}
        if self.board is not None:
            for name, value in told.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
        if self.wandb is not None:
            self.wandb.log(told, step=step)


class Report:
    """Prints and stores what one process is told after every so many steps."""

    def __init__(self, out: Path, against: str, charts: Charts | None = None):
        """`against`: whose words agreement is measured with ("base", "labels" or "batch")."""
        self.out, self.against, self.charts = out, against, charts
        self.marks: deque[tuple[int, float]] = deque(maxlen=RECENT)

    def start(self, step: int) -> None:
        self.marks.append((step, time.monotonic()))

    def step(self, step: int, steps: int, logs: dict[str, float]) -> None:
        self.marks.append((step, time.monotonic()))
        told = {"step": step, "steps": steps, "agreement_with": self.against, "time": round(time.time(), 1)}
        told |= {k: round(v, DIGITS[k]) if k in DIGITS else v for k, v in logs.items()}
        add_line(told, self.out / LOG)
        if self.charts is not None:
            self.charts.step(step, logs)
        print(self.line(step, steps, logs), file=sys.stderr, flush=True)

    def line(self, step: int, steps: int, logs: dict[str, float]) -> str:
        (first, then), (_, now) = self.marks[0], self.marks[-1]
        left = (steps - step) * (now - then) / max(1, step - first)
        parts = [f"step {step}/{steps}", f"eta {duration(left)}"]
        parts += [f"{logs['samples_per_second']:.2f} samples/s", f"{logs['tokens_per_second']:,.0f} tokens/s"]
        parts += [f"loss {logs['loss']:.4f}", *(f"{name} {logs[name]:.4f}" for name in TERMS if name in logs)]
        if "agreement" in logs:
            parts += [f"agreement {100 * logs['agreement']:.1f} % ({self.against})"]
        parts += [f"lr {logs['learning_rate']:.3g}", f"waiting {100 * logs['waiting_share']:.1f} %"]
        return " | ".join(parts)


def duration(seconds: float) -> str:
    """Two units are enough: 1 h 05 min, 3 min 20 s, 12 s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
    return f"{seconds // 60} min {seconds % 60:02} s" if seconds >= 60 else f"{seconds} s"


def history(out: Path) -> list[dict]:
    """The reports of a run by step; what was done twice, after a kill, counts as it was done last."""
    found: dict[int, dict] = {}
    if (out / LOG).exists():
        for line in (out / LOG).read_text(encoding="utf-8").splitlines():
            try:
                told = json.loads(line)
            except ValueError:  # a kill may cut a line short
                continue
            found[told["step"]] = told
    return [found[step] for step in sorted(found)]


def plot(told: list[dict], path: Path, title: str) -> None:
    """Loss, agreement and learning rate against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, sharex=True, figsize=(7, 7), layout="constrained", height_ratios=(3, 2, 1))
    rows = (("loss", "loss", 1), ("agreement", "agreement (%)", 100), ("learning_rate", "learning rate", 1))
    for ax, (key, label, scale) in zip(axes, rows, strict=True):
        points = [(t["step"], scale * t[key]) for t in told if key in t]
        if points:
            ax.plot(*zip(*points, strict=True), linewidth=1, alpha=0.4 if key == "loss" else 1, color="C0")
        if key == "loss" and len(points) > RECENT:
            steps, losses = zip(*points, strict=True)
            ax.plot(steps, _smooth(losses), color="C0")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_title(title)
    axes[-1].set_xlabel("step")
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)


def _smooth(values: tuple[float, ...], share: float = 0.9) -> list[float]:
    """Exponential mean with the start corrected for."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + (1 - share)
        out.append(mean / weight)
    return out


HELD_OUT = ", on held-out samples"
WITH = {
    "base": f"the base's most probable token{HELD_OUT}",
    "labels": f"the data's labels{HELD_OUT}",
    "batch": "the data's labels, on each batch before it is learnt",
}


def card(text: str, facts: dict, learnt: dict, settings: dict, run: dict, told: list[dict], base: Path) -> str:
    """A model card in Markdown: `text` around a table of what was `learnt`, how, and what it reached.

    `base` is the folder of the base, whose own card tells its licence.
    """
    last = told[-1] if told else {}
    agreements = [t for t in told if "agreement" in t]
    rows = {
        "Base": f"`{facts['base']}`, {facts['L']} layers", **learnt,
        "Data": f"`{Path(settings['data']).name}`, {run['samples']:,} samples a pass, {run['skipped']:,} skipped, {run['held_out']} held out",
        "Steps": f"{last.get('step', 0):,} of {run['batch_size']} samples ({run['split']})",
        "Optimizer": f"AdamW, betas {settings['betas']}, peak lr {settings['lr']:g}, {settings['schedule']}, warm-up "
        f"{100 * settings['warmup']:g} %, weight decay {settings['weight_decay']:g}",
        "Precision": f"{run['precision']} on {run['processes']} x {run['device']}",
        "Last loss": f"{last['loss']:.4f}" if "loss" in last else "",
        "Agreement": f"{100 * agreements[-1]['agreement']:.2f} % with {WITH[agreements[-1]['agreement_with']]}" if agreements else "",
        "Command": f"`{run['command']}`",
        "Code": f"{run['commit']}, torch {run['torch']}, transformers {run['transformers']}, {run['time']}",
    }  # fmt: skip
    timing = run.get("clock") or {}
    if timing:
        rows["A step"] = (
            f"{timing['step_seconds']:.3f} s: trunk {timing['trunk_seconds']:.3f}, twig {timing['twig_seconds']:.3f}, "
            f"optimizer {timing['optimizer_seconds']:.3f} (x {timing['step_over_parts']:.3f}); "
            f"waiting for data {100 * timing['waiting_share']:.2f} %"
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    hub, data = hub_id(facts["base"]), Path(settings["data"]).name
    load = f'"{hub or "FOLDER OF THE BASE"}"' if settings["base"] or settings["random"] else "None"
    reached = [
        agreement(100 * last["agreement"], WITH[last["agreement_with"]].removesuffix(HELD_OUT), data)
        for last in agreements[-1:]
        if last["agreement_with"] != "batch"
    ]
    about = About(run["name"], hub, base, datasets=[HOMES[data]] if data in HOMES else [], results=reached)
    return with_head(text.format(table=table, load=load, **facts), about)


TWIG_CARD = """
# Twig of {base} (K = {K}, T = {T})

A twig for [TwigVLM](https://arxiv.org/abs/2503.14075): {T} decoder layers, a norm and a head that grow on layer {K} of the base, prune
its visual tokens and draft its words.

| | |
|---|---|
{table}

![Loss, agreement and learning rate](curve.png)

```python
import twigvlm

vlm = twigvlm.load({load}, "THIS FOLDER")
print(vlm.answer("picture.jpg", "Describe the image in detail.", retained_tokens=64))
```

It drafts for the base it grew on and no other; what it says is decided by that base, which verifies every word.
"""

PROJECTOR_CARD = """
# Projector of {base} behind {pruning} (R = {retained_tokens:g})

The projector of the base, tuned while {pruning} leaves {retained_tokens:g} visual tokens of an image; everything else of the base stays as it is.

| | |
|---|---|
{table}

![Loss, agreement and learning rate](curve.png)

```python
import twigvlm

vlm = twigvlm.load({load})
pruned = {{"retained_tokens": {retained_tokens:g}, "pruning": "{pruning}*:projector=THIS FOLDER"}}
print(vlm.answer("picture.jpg", "What is this?", **pruned))
```
"""
