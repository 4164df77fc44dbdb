"""What a training run is asked to do: every setting with its default, the flags, and the split of a batch.

Defaults are the paper's (section 4.1). The embedded base has a preset of its own, since it learns
in minutes what LLaVA learns in hours.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from .. import flags
from ..config import BACKENDS, DEFAULT_K, DEFAULT_T, SHAPES, STARTS, option, pinned
from ..errors import InputError
from ..files import BROUGHT
from ..program import called
from .run.zero import read_zero

SCRIPTS = BROUGHT / "scripts"
ZERO = {"2": "zero2.json", "3": "zero3.json", "3_offload": "zero3_offload.json"}
SKIPPED = "skipped.jsonl"
STOPPED = "stopped.json"  # a training that a signal stopped leaves this
LEARNING = ("twig", "projector")
PREDICTIONS, TEACHERS = ("kl", "hybrid", "acceptance"), ("whole", "pruned")
BASELINES, REWARDS, REWARD_TURNS = ("group", "leave-one-out"), ("answer", "fidelity"), ("all", "first", "random")
PICKS = ("highest", "discounted")
PRECISIONS = ("auto", "bf16", "fp32")
ROUNDING = ("--load-8bit", "--load-4bit", "--draft-8bit")
SCHEDULES = ("cosine", "linear", "constant_with_warmup")
ROWS_PER_DEVICE = {"cuda": 4, "cpu": 8, "mps": 4}  # of a micro-batch, when nobody says
HELD_OUT, HELD_OUT_SHARE = 64, 100  # samples, if there are at least 100 times as many

# Measured on sprout (docs/LOG.md): the base is small enough for large steps.
EMBEDDED_PRESET = {"batch_size": 16, "lr": 5e-4, "per_device_batch": 8}
STAGE_2 = {"max_steps": 500, "groups": 32}  # arXiv 2503.14075v3
EMBEDDED_STAGE_2 = {"groups": 8, "max_steps": 100}
# Settings of TwigVLM++'s stages → the stages that read them.
BELONGS = {
    "head_init": (1, 2), "prediction_weight": (1,), "prediction_loss": (1,), "temperature": (1,), "teacher": (1,),
    "attention_turns": (1,), "attention_weight": (1, 2), "attention_layer": (1, 2), "groups": (2,), "sets_at_once": (2,),
    "baseline": (2,), "reward": (2,), "reward_turns": (2,), "budget": (2,),
    "advantage_floor": (2,), "policy_temperature": (2,), "by_token": (2,), "antithetic": (2,), "picks": (2,),
}  # fmt: skip
LATER = (
    "advantage_floor",
    "policy_temperature",
    "by_token",
    "antithetic",
    "picks",
)  # of them came when runs of the others were there


def _places(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(",") if n.strip())
    except ValueError as fault:
        raise ArgumentTypeError(f"{text!r}: whole numbers with commas between are needed") from fault


@dataclass
class ModelPart:
    base: str | None = option(
        None, "hub id or folder of a LLaVA-1.5 model (default: the embedded one)", "--base-model", "--model"
    )
    revision: str | None = option(None, "commit, branch or tag of the base, where it is on the hub", metavar="REV")
    random: str | None = option(
        None, f"random weights of a shape instead of a base: {', '.join(SHAPES)} or WIDTHxLAYERS"
    )
    K: int = option(DEFAULT_K, "base layers below the twig")
    T: int = option(DEFAULT_T, "layers of the twig")
    F: int = option(0, "layer before which the image is wiped when decoding (default: three quarters of L)")
    init: str = option(
        "base", "what the twig starts from: base (layers K..K+T-1), last, random, or a twig's folder or file"
    )
    tower_pruning: str | None = option(
        None,
        "the twig learns behind a method before the decoder, NAME:keep=N (visionzip:keep=288), for --pruning NAME:keep=N+twig",
    )
    attention: str = option("sdpa", "attention implementation", choices=BACKENDS)
    learn: str = option(
        "twig", "what learns: a twig, or the base's projector while tokens are pruned", choices=LEARNING
    )
    pruning: str = option("visionzip", "with --learn projector: the method before the decoder that is active")
    retained_tokens: float = option(64.0, "with --learn projector: visual tokens that it leaves", "-R")


@dataclass
class PlusPart:
    """TwigVLM++'s stages. What belongs to one stage is refused in another: see `BELONGS`."""

    stage: int = option(
        0, "0: the twig learns the next token; 1: with a pruning head, and from the base as well; 2: the pruning head, by rewards",
        choices=(0, 1, 2),
    )  # fmt: skip
    head_init: str | None = option(
        None,
        "how a fresh pruning head begins: released, with random gates (default), or as the twig's own attention (in stage 2 "
        "the latter alone)",
        choices=STARTS,
    )
    prediction_weight: float = option(0.1, "stage 1: of the loss that draws the drafts to the base's words")
    prediction_loss: str = option(
        "kl", "stage 1: divergence, a hybrid of it with acceptance, or -log acceptance", choices=PREDICTIONS
    )
    temperature: float = option(5.0, "stage 1: that softens both sides of the divergence")
    teacher: str = option(
        "whole", "stage 1: whose words teach, the whole base's or the pruned one's (random r)", choices=TEACHERS
    )
    attention_weight: float | None = option(
        None,
        "of the divergence of the pruning head from the base's attention (default 1; in stage 2 0, the released code has 1)",
    )
    attention_layer: int | None = option(
        None, "base layer whose attention teaches, from 0 (default: 19 of 32, at the same depth)"
    )
    attention_turns: str = option(
        "first", "stage 1: before which answers the pruning head is taught", choices=("first", "all")
    )
    groups: int | None = option(None, "stage 2: kept sets drawn of each sample (default 32)")
    sets_at_once: int = option(8, "stage 2: of them in memory together")
    baseline: str = option(
        "group", "stage 2: rewards over the group's mean in its spread, or over the others' mean", choices=BASELINES
    )
    reward: str = option(
        "answer", "stage 2: likelihood of the reference answer, or fidelity to the unpruned base", choices=REWARDS
    )
    reward_turns: str = option(
        "all", "stage 2: which answers count: all, the first, or one that is drawn, before which the head is asked then",
        choices=REWARD_TURNS,
    )  # fmt: skip
    advantage_floor: float = option(0.0, "stage 2: samples whose rewards spread by less (in nat) teach nothing")
    policy_temperature: float = option(
        1.0,
        "stage 2: divides the logarithm of the score that sets are drawn from; below 1 they are closer to the best set",
    )
    by_token: bool = option(False, "stage 2: divide a set's log-probability by its tokens")
    antithetic: bool = option(False, "stage 2: draw the sets in pairs of opposite noise")
    picks: str = option(
        "highest", "stage 2: which pruning is learnt for: the highest scores, or picks with discount (twig-discount)",
        choices=PICKS,
    )  # fmt: skip
    budget: float | None = option(None, "stage 2: R of every set (default: the paper's schedule from 192 to 64 of 576)")


@dataclass
class DataPart:
    data: str | None = option(None, "LLaVA's instruction JSON (default with the embedded base: drawn)", "--data-path")
    images: str | None = option(None, "folder that the image names start from", "--image-folder")
    max_length: int = option(2048, "tokens of a sample, visual ones included; longer samples are skipped")
    max_skipped: float = option(0.01, "share of unusable samples beyond which the run stops")
    drop_indices: tuple[int, ...] = option((), "places in the file to leave out: N,N,...", parse=_places)
    held_out: int | None = option(
        None,
        f"samples kept from training to measure agreement (default {HELD_OUT} of {HELD_OUT * HELD_OUT_SHARE} and more)",
    )
    held_out_data: str | None = option(None, "a file of its own for that")
    held_out_images: str | None = option(None, "and its image folder (default: that of --images)")
    workers: int | None = option(None, "processes that load samples, per device (default: 1, on GPUs 4)")
    on_policy: int = option(
        0, "samples that are learnt with the base's own answers, which it writes once before the training"
    )
    on_policy_tokens: int = option(
        512, "with --on-policy: tokens of an answer; one that is longer is cut and ends its sample"
    )
    on_policy_temperature: float = option(
        0.0, "with --on-policy: the answers are drawn at this temperature; 0 is greedy"
    )
    on_policy_batch: int | None = option(
        None, "with --on-policy: conversations that the base answers at once (default: 8, on GPUs 32)"
    )


@dataclass
class RunPart:
    out: str | None = option(None, "folder of the run (default runs/twig-BASE-K*-T*)", "--output-dir")
    epochs: float = option(1.0, "passes over the data")
    max_steps: int | None = option(
        None, "stop after so many steps (default 0: whole epochs; in stage 2 500); the schedule ends there"
    )
    batch_size: int | None = option(None, "samples per optimizer step, over all devices (default 128)")
    per_device_batch: int | None = option(None, "samples in memory at once per device; accumulation follows")
    lr: float | None = option(
        None, "peak learning rate (default 1e-4; of a projector and in stage 2 2e-5)", "--learning-rate"
    )
    betas: list[float] = option([0.9, 0.98], "AdamW's")
    weight_decay: float = option(0.0, "AdamW's")
    warmup: float = option(0.03, "share of the steps in which the learning rate rises")
    schedule: str = option("cosine", "of the learning rate", choices=SCHEDULES)
    max_grad_norm: float = option(0.0, "clip gradients to this norm (default 0: never, as the authors' runs)")
    seed: int = option(42, "of the order of samples and of random weights")
    export_release: str | None = option(None, "write the twig in the authors' format to this file as well")


@dataclass
class DevicePart:
    device: str | None = option(None, "cpu or cuda (default: the best there is)", choices=("cpu", "cuda"))
    precision: str = option("auto", "auto is bf16 where the device multiplies it fast", choices=PRECISIONS)
    zero: str = option(
        "auto", "DeepSpeed: none, 2, 3, 3_offload or a file; auto (default) is 2 on GPUs and for several processes"
    )
    gradient_checkpointing: bool = option(False, "compute the twig twice and keep less")
    compile: bool = option(False, "torch.compile the layers")
    lora_rank: int = option(
        0, "train adapters of this rank on the twig instead of its weights (peft; default 0: its weights)"
    )
    lora_alpha: float = option(0.0, "scale of the adapters (default: twice the rank)")
    lora_dropout: float = option(0.0, "dropout before the adapters")


@dataclass
class WatchPart:
    save_steps: int = option(0, "steps between checkpoints (default 0: by time only)")
    save_seconds: float = option(600.0, "seconds between checkpoints (0: by steps only)")
    keep: int = option(2, "checkpoints that are kept")
    log_steps: int | None = option(None, "steps between reports (default: 1, in long runs 10)")
    agreement: str = option(
        "base",
        "whose words the twig is measured with: the base's, asked once before the training, or the labels",
        choices=("base", "labels"),
    )
    agreement_steps: int | None = option(
        None, "steps between measurements on the held-out samples (default: 20 times a run)"
    )
    wandb: bool = option(False, "report to Weights & Biases")
    tensorboard: bool = option(True, "write TensorBoard's files")


@dataclass
class PlanPart:
    """What to do with the settings."""

    dry_run: bool = option(False, "print the plan, load no weights")
    devices: int | None = option(None, "devices to plan for (default: those here)")
    samples: int | None = option(None, "samples to plan for (default: those of --data; 665298)")
    # DeepSpeed's launcher says it this way and in the environment; the environment counts.
    local_rank: int | None = option(None, SUPPRESS)


PARTS = {
    "model": ModelPart, "TwigVLM++": PlusPart, "data": DataPart, f"run (with the embedded base: {', '.join(f'{k} {v:g}' for k, v in EMBEDDED_PRESET.items())})": RunPart,
    "devices": DevicePart, "checkpoints and reports": WatchPart, "plan": PlanPart,
}  # fmt: skip


@dataclass
class Settings(WatchPart, DevicePart, RunPart, DataPart, PlusPart, ModelPart):
    """What a training is asked to do. None means: decided by base, device or data, and printed."""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, legal: str) -> None:
            if not ok:
                raise InputError(f"{name} is {getattr(self, name)!r}; {legal}")

        self.base, self.revision = pinned(self.base, None, self.revision, None)[0], None
        self._check_stage(check)
        for name in ("batch_size", "lr", "per_device_batch", "max_steps", "groups", "attention_weight"):
            if getattr(self, name) is None:
                setattr(self, name, self._preset().get(name))
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
        check(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "betas",
            "two numbers from 0 to below 1 are needed",
        )
        check(0 <= self.max_skipped <= 1, "max_skipped", "a share from 0 to 1 is needed")
        check(0 <= self.lora_dropout < 1, "lora_dropout", "a share from 0 to below 1 is needed")
        check(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)} is needed")
        check(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)} is needed")
        check(self.learn in LEARNING, "learn", f"one of {', '.join(LEARNING)} is needed")
        check(self.attention in BACKENDS, "attention", f"one of {', '.join(BACKENDS)} is needed")
        if self.base is not None and self.random is not None:
            raise InputError(f"base {self.base} and random {self.random}: give one of them")
        check(
            self.tower_pruning is None or self.learn == "twig",
            "tower_pruning",
            "it is for twigs; a projector learns behind --pruning: leave it out",
        )
        self._check_on_policy(check)

    def _check_on_policy(self, check: Callable[[bool, str, str], None]) -> None:
        check(self.on_policy >= 0, "on_policy", "0 (none) or more samples are needed")
        check(self.on_policy_tokens >= 1, "on_policy_tokens", "1 or more is needed")
        good = math.isfinite(self.on_policy_temperature) and self.on_policy_temperature >= 0
        check(good, "on_policy_temperature", "0 (greedy) or more is needed")
        check(self.on_policy_batch is None or self.on_policy_batch >= 1, "on_policy_batch", "1 or more is needed")
        for name in ("on_policy_tokens", "on_policy_temperature", "on_policy_batch"):
            usual = next(one.default for one in fields(DataPart) if one.name == name)
            check(bool(self.on_policy) or getattr(self, name) == usual, name, "it is for --on-policy: leave it out")
        check(
            not (self.on_policy and self.random),
            "on_policy",
            "a base with random weights has nothing to say: leave it out",
        )

    def _check_stage(self, check: Callable[[bool, str, str], None]) -> None:
        check(self.stage in (0, 1, 2), "stage", "0, 1 or 2 is needed")
        check(not self.stage or self.learn == "twig", "stage", "a projector has no stages: leave it out")
        for name, stages in BELONGS.items():
            usual = next(one.default for one in fields(PlusPart) if one.name == name)
            fits = self.stage in stages or getattr(self, name) in (usual, self._preset().get(name))
            check(fits, name, f"it is for --stage {' or '.join(map(str, stages))}: leave it out")
        for name in ("prediction_weight", "attention_weight"):
            check(0 <= (getattr(self, name) or 0) < math.inf, name, "0 or more is needed")
        check(
            math.isfinite(self.advantage_floor) and self.advantage_floor >= 0, "advantage_floor", "0 or more is needed"
        )
        for name in ("temperature", "policy_temperature"):
            check(0 < getattr(self, name) < math.inf, name, "a number above 0 is needed")
        check(self.sets_at_once >= 1, "sets_at_once", "1 or more is needed")
        check(
            self.groups is None or self.groups >= 2, "groups", "2 or more are needed: a set is measured against others"
        )
        check(
            not (self.stage == 2 and self.lora_rank),
            "lora_rank",
            "in stage 2 only the pruning head learns: leave it out",
        )
        lost = self.export_release and self.stage and self.head_init == "identity"
        check(not lost, "head_init", "the authors' format knows released heads only: leave --export-release out")
        for name, legal in (
            ("head_init", (None, *STARTS)),
            ("prediction_loss", PREDICTIONS),
            ("teacher", TEACHERS),
            ("baseline", BASELINES),
            ("picks", PICKS),
            ("reward", REWARDS),
            ("reward_turns", REWARD_TURNS),
        ):
            check(getattr(self, name) in legal, name, f"one of {', '.join(filter(None, legal))} is needed")
        check(self.attention_turns in ("first", "all"), "attention_turns", "first or all is needed")

    @property
    def embedded(self) -> bool:
        """Whether the twig grows on the embedded base."""
        return self.base is None and self.random is None

    def _preset(self) -> dict:
        # A head's start is not filled in, but stored settings of any stage may say the usual one.
        usual = {"max_steps": 0, "attention_weight": float(self.stage == 1), "head_init": STARTS[0]}
        if self.stage == 2:
            usual |= STAGE_2
        if self.embedded:
            return usual | EMBEDDED_PRESET | (EMBEDDED_STAGE_2 if self.stage == 2 else {})
        # LLaVA's own rate of finetuning for a projector; the paper's for the rest.
        return usual | {"batch_size": 128, "lr": 2e-5 if self.learn == "projector" or self.stage == 2 else 1e-4}

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


def check_accelerate() -> None:
    """The package that trains is an extra."""
    if importlib.util.find_spec("accelerate") is None:
        raise InputError('training needs the package accelerate, which is not installed: pip install "twigvlm[train]"')


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


def parse(argv: list[str] | None, doc: str) -> tuple[Settings, Namespace]:
    """Settings and the flags that say what to do with them (--dry-run and its own)."""
    refuse_rounding(sys.argv[1:] if argv is None else argv)
    groups = [flags.group(title, part) for title, part in PARTS.items()]
    args = flags.parse(flags.parser(called("twigvlm.training.train"), doc, *groups), argv)
    return Settings(**{one.name: getattr(args, one.name) for one in fields(Settings)}), args


def refuse_rounding(argv: Sequence[str]) -> None:
    """Raise InputError for flags that round weights: those of answering, which no training knows."""
    for word in argv:
        if word.split("=")[0].replace("_", "-") in ROUNDING:
            raise InputError(
                f"{word} is for answering; a training reads only the K + T lowest layers of the base, whole, and its twig "
                "serves a rounded base as well: leave it away"
            )


def store(settings: Settings, out: Path) -> None:
    """Write the settings into the folder of their run, as --config takes them."""
    flags.save(Namespace(**vars(settings)), out)
