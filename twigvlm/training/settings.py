"""What a training run is asked to do: every setting with its default, the flags, and the split of a batch.

Defaults are the paper's (section 4.1). The embedded base has a preset of its own, since it learns
in minutes what LLaVA learns in hours.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass, fields
from pathlib import Path

from .. import flags
from ..config import DEFAULT_K, DEFAULT_T
from ..errors import InputError
from ..loading.base import BACKENDS
from ..loading.random import SHAPES
from .zero import read_zero

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ZERO = {"2": "zero2.json", "3": "zero3.json", "3_offload": "zero3_offload.json"}
SKIPPED = "skipped.jsonl"
STOPPED = "stopped.json"  # a training that a signal stopped leaves this
PRECISIONS = ("auto", "bf16", "fp32")
SCHEDULES = ("cosine", "linear", "constant_with_warmup")
ROWS_PER_DEVICE = {"cuda": 4, "cpu": 8, "mps": 4}  # of a micro-batch, when nobody says
HELD_OUT, HELD_OUT_SHARE = 64, 100  # samples, if there are at least 100 times as many

# Measured on sprout (docs/LOG.md): the base is small enough for large steps.
EMBEDDED_PRESET = {"batch_size": 16, "lr": 5e-4, "per_device_batch": 8}


@dataclass
class Settings:
    """None means: decided by base, device or data, and printed."""

    base: str | None = None
    random: str | None = None
    K: int = DEFAULT_K
    T: int = DEFAULT_T
    F: int = 0
    init: str = "base"
    data: str | None = None
    images: str | None = None
    max_length: int = 2048
    max_skipped: float = 0.01
    drop_indices: tuple[int, ...] = ()
    held_out: int | None = None
    held_out_data: str | None = None
    held_out_images: str | None = None
    out: str | None = None
    epochs: float = 1.0
    max_steps: int = 0
    batch_size: int | None = None
    per_device_batch: int | None = None
    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    warmup: float = 0.03
    schedule: str = "cosine"
    max_grad_norm: float = 0.0
    seed: int = 42
    precision: str = "auto"
    attention: str = "sdpa"
    device: str | None = None
    zero: str = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0
    workers: int | None = None
    save_steps: int = 0
    save_seconds: float = 600.0
    keep: int = 2
    log_steps: int | None = None
    agreement: str = "base"
    agreement_steps: int | None = None
    wandb: bool = False
    tensorboard: bool = True
    export_release: str | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, legal: str) -> None:
            if not ok:
                raise InputError(f"{name} is {getattr(self, name)!r}; {legal}")

        for name in ("batch_size", "per_device_batch", "log_steps", "agreement_steps"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, "1 or more is needed")
        for name in ("max_length", "keep"):
            check(getattr(self, name) >= 1, name, "1 or more is needed")
        for name in ("max_steps", "save_steps", "save_seconds", "weight_decay", "max_grad_norm", "lora_rank"):
            check(getattr(self, name) >= 0, name, "0 or more is needed")
        check(self.workers is None or self.workers >= 0, "workers", "0 or more is needed")
        check(self.held_out is None or self.held_out >= 0, "held_out", "0 or more is needed")
        check(self.epochs > 0, "epochs", "a number above 0 is needed")
        check(self.lr is None or 0 < self.lr < 1, "lr", "a number above 0 and below 1 is needed")
        check(0 <= self.warmup < 1, "warmup", "a share from 0 to below 1 is needed")
        check(all(0 <= b < 1 for b in self.betas), "betas", "two numbers from 0 to below 1 are needed")
        check(0 <= self.max_skipped <= 1, "max_skipped", "a share from 0 to 1 is needed")
        check(0 <= self.lora_dropout < 1, "lora_dropout", "a share from 0 to below 1 is needed")
        check(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)} is needed")
        check(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)} is needed")
        check(self.attention in BACKENDS, "attention", f"one of {', '.join(BACKENDS)} is needed")
        if self.base is not None and self.random is not None:
            raise InputError(f"base {self.base} and random {self.random}: give one of them")
        for name in ("batch_size", "lr", "per_device_batch"):
            if getattr(self, name) is None:
                setattr(self, name, self._preset().get(name))

    @property
    def embedded(self) -> bool:
        """Whether the twig grows on the embedded base."""
        return self.base is None and self.random is None

    def _preset(self) -> dict:
        return EMBEDDED_PRESET if self.embedded else {"batch_size": 128, "lr": 1e-4}

    def zero_config(self, device: str, processes: int) -> Path | None:
        """The DeepSpeed configuration file, or None for plain training (DDP where there are several processes).

        "auto" is ZeRO-2 on GPUs and for several processes, where DeepSpeed is installed.
        """
        installed = importlib.util.find_spec("deepspeed") is not None
        name = self.zero
        if name == "auto":
            name = "2" if installed and (device == "cuda" or processes > 1) else "none"
        if name == "none":
            return None
        file = SCRIPTS / ZERO[name] if name in ZERO else Path(name)
        if not file.is_file():
            raise InputError(f"zero is {self.zero!r}; auto, none, {', '.join(ZERO)} or a DeepSpeed file is needed")
        if not installed:
            raise InputError(
                f"zero is {self.zero!r}, but deepspeed is not installed: pip install deepspeed, or --zero none"
            )
        read_zero(file)
        return file


def split_batch(batch: int, processes: int, rows: int | None, usual: int) -> tuple[int, int]:
    """(rows of a micro-batch, gradient accumulation) that make `batch` samples a step on `processes` devices.

    `rows` None takes the largest that fits and is at most `usual`. Raises InputError for what cannot be.
    """
    share, rest = divmod(batch, processes)
    if rest or not share:
        near = sorted({max(1, share) * processes, (share + 1) * processes})
        raise InputError(
            f"batch size {batch} cannot be shared by {processes} devices; choose "
            f"{' or '.join(map(str, near))}, or a number of devices that divides {batch}"
        )
    fitting = [r for r in range(1, share + 1) if share % r == 0]
    if rows is None:
        rows = max(r for r in fitting if r <= usual)
    if rows not in fitting:
        raise InputError(
            f"batch size {batch} on {processes} devices is {share} samples each, which is no multiple of "
            f"{rows} per device; choose --per-device-batch from {', '.join(map(str, fitting))}"
        )
    return rows, share // rows


def parse(argv: list[str] | None, doc: str) -> tuple[Settings, argparse.Namespace]:
    """Settings and the flags that say what to do with them (--dry-run and its own)."""
    parser = argparse.ArgumentParser(
        prog="python -m twigvlm.training.train",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_flags(parser)
    args = flags.parse(parser, argv)
    chosen = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    return Settings(**chosen), args


def _places(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(",") if n.strip())
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers with commas between are needed") from fault


def _add_flags(parser: argparse.ArgumentParser) -> None:
    default = Settings.__dataclass_fields__
    preset = ", ".join(f"{k} {v:g}" for k, v in EMBEDDED_PRESET.items())

    def flag(group, name: str, text: str, **kind) -> None:
        names = [f"--{name.replace('_', '-')}"] + ([f"--{name}"] if "_" in name else []) + kind.pop("also", [])
        value = kind.pop("default", default[name].default)
        if kind.get("action") != "store_true" and value not in (None, (), 0) and "default" not in text:
            text += f" (default {value if not isinstance(value, tuple) else ' '.join(map(str, value))})"
        group.add_argument(*names, dest=name, default=value, help=text.replace("%", "%%"), **kind)

    model = parser.add_argument_group("model")
    flag(
        model,
        "base",
        "hub id or folder of a LLaVA-1.5 model (default: the embedded one)",
        also=["--base-model", "--model"],
    )
    flag(model, "random", f"random weights of a shape instead of a base: {', '.join(SHAPES)} or WIDTHxLAYERS")
    flag(model, "K", "base layers below the twig", type=int)
    flag(model, "T", "layers of the twig", type=int)
    flag(model, "F", "layer before which the image is wiped when decoding (default: three quarters of L)", type=int)
    flag(model, "init", "what the twig starts from: base (layers K..K+T-1), last, random, or a twig's folder")
    flag(model, "attention", "attention implementation", choices=BACKENDS)
    data = parser.add_argument_group("data")
    flag(data, "data", "LLaVA's instruction JSON (default with the embedded base: drawn)", also=["--data-path"])
    flag(data, "images", "folder that the image names start from", also=["--image-folder"])
    flag(data, "max_length", "tokens of a sample, visual ones included; longer samples are skipped", type=int)
    flag(data, "max_skipped", "share of unusable samples beyond which the run stops", type=float)
    flag(data, "drop_indices", "places in the file to leave out: N,N,...", type=_places)
    flag(data, "held_out", f"samples kept from training to measure agreement (default {HELD_OUT} of {HELD_OUT * HELD_OUT_SHARE} and more)", type=int)  # fmt: skip
    flag(data, "held_out_data", "a file of its own for that")
    flag(data, "held_out_images", "and its image folder (default: that of --images)")
    flag(data, "workers", "processes that load samples, per device (default: 2, on GPUs 4)", type=int)
    run = parser.add_argument_group(f"run (with the embedded base: {preset})")
    flag(run, "out", "folder of the run (default runs/twig-BASE-K*-T*)", also=["--output-dir"])
    flag(run, "epochs", "passes over the data", type=float)
    flag(run, "max_steps", "stop after so many steps (default: whole epochs); the schedule ends there", type=int)
    flag(run, "batch_size", "samples per optimizer step, over all devices (default 128)", type=int)
    flag(run, "per_device_batch", "samples in memory at once per device; accumulation follows", type=int)
    flag(run, "lr", "peak learning rate (default 1e-4)", type=float, also=["--learning-rate"])
    flag(run, "betas", "AdamW's", type=float, nargs=2)
    flag(run, "weight_decay", "AdamW's", type=float)
    flag(run, "warmup", "share of the steps in which the learning rate rises", type=float)
    flag(run, "schedule", "of the learning rate", choices=SCHEDULES)
    flag(run, "max_grad_norm", "clip gradients to this norm (default 0: never, as the authors' runs)", type=float)
    flag(run, "seed", "of the order of samples and of random weights", type=int)
    flag(run, "export_release", "write the twig in the authors' format to this file as well")
    device = parser.add_argument_group("devices")
    flag(device, "device", "cpu or cuda (default: the best there is)", choices=("cpu", "cuda"))
    flag(device, "precision", "auto is bf16 where the device multiplies it fast", choices=PRECISIONS)
    flag(device, "zero", "DeepSpeed: none, 2, 3, 3_offload or a file; auto is 2 on GPUs and for several processes")
    flag(device, "gradient_checkpointing", "compute the twig twice and keep less", action="store_true")
    flag(device, "compile", "torch.compile the layers", action="store_true")
    flag(device, "lora_rank", "train adapters of this rank on the twig instead of its weights (peft)", type=int)
    flag(device, "lora_alpha", "scale of the adapters (default: twice the rank)", type=float)
    flag(device, "lora_dropout", "dropout before the adapters", type=float)
    watch = parser.add_argument_group("checkpoints and reports")
    flag(watch, "save_steps", "steps between checkpoints (default 0: by time only)", type=int)
    flag(watch, "save_seconds", "seconds between checkpoints (0: by steps only)", type=float)
    flag(watch, "keep", "checkpoints that are kept", type=int)
    flag(watch, "log_steps", "steps between reports (default: 1, in long runs 10)", type=int)
    flag(
        watch,
        "agreement",
        "whose words the twig is measured with: the base's, asked once before the training, or the labels",
        choices=("base", "labels"),
    )
    flag(
        watch,
        "agreement_steps",
        "steps between measurements on the held-out samples (default: 20 times a run)",
        type=int,
    )
    flag(watch, "wandb", "report to Weights & Biases", action="store_true")
    watch.add_argument("--no-tensorboard", dest="tensorboard", action="store_false", help="no TensorBoard files")
    # DeepSpeed's launcher says it this way and in the environment; the environment counts.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    plan = parser.add_argument_group("plan")
    plan.add_argument("--dry-run", action="store_true", help="print the plan, load no weights")
    plan.add_argument("--devices", type=int, help="devices to plan for (default: those here)")
    plan.add_argument("--samples", type=int, help="samples to plan for (default: those of --data; 665298)")
