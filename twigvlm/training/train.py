"""Train a twig: `python -m twigvlm.training.train`, or `bash scripts/v1_5/train_twig.sh`.

Only K+T layers of the base are read; layers 0..K-1 are frozen, the twig learns to say the answers of
the data. Runs on a CPU, one GPU, or many processes under torchrun, DeepSpeed or Slurm. The same
command continues a run that was stopped, from its last whole checkpoint.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import math
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError, RunError
from ..files import write_json
from ..loading.base import pick_device
from ..loading.describe import read_json
from ..model.twig import CONFIG, WEIGHTS, describe
from ..workers import end_workers, workers_told
from .agreement import FILE as ANSWERS
from .agreement import hold_out, load_answers
from .data.examples import TwigDataset
from .data.loading import Material, complete, gather
from .data.sampler import LengthGroupedSampler
from .data.survey import SkipLog, Survey
from .lora import add_adapters
from .run import checkpoints
from .run.finish import export_release, finish
from .run.ranks import Elsewhere, Ranks, alone, find, join, leave, others_told, tell_failure
from .run.report import Report
from .settings import ROWS_PER_DEVICE, SKIPPED, STOPPED, Settings, parse, split_batch
from .twig import Planted, Seed, TwigForTraining, checkpoint_gradients, plant
from .zero import read_zero, settle, stage_of

NEVER = 10**9  # steps
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
MANY_STEPS = 1000  # from here on not every step is reported
GPU_WORKERS, CPU_WORKERS = 4, 1
# What a run is: another value of these makes another run. Devices and workers may change.
IDENTITY = (
    "K", "T", "F", "init", "max_length", "drop_indices", "epochs", "max_steps", "batch_size", "lr", "betas", "weight_decay",
    "warmup", "schedule", "max_grad_norm", "seed", "lora_rank", "lora_alpha", "lora_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Split:
    """How a step is shared: rows x accumulation x processes = batch; steps of the whole run."""

    rows: int
    accumulation: int
    processes: int
    steps: int
    steps_an_epoch: int

    def __str__(self) -> str:
        return (
            f"batch {self.rows * self.accumulation * self.processes} = {self.processes} device"
            f"{'s' * (self.processes > 1)} x {self.rows} samples x {self.accumulation} accumulation"
        )


def main(argv: list[str] | None = None) -> int:
    code = 1
    try:
        code = _main(argv)
    except SystemExit as fault:  # of the flags
        if _alone():
            raise
        code = fault.code if isinstance(fault.code, int) else 1
    except BaseException:  # a fault of this code: the whole story, and the same end
        if _alone():
            raise
        traceback.print_exc()
    finally:
        end_workers()
    if not _alone():
        # Other processes may wait for this one in vain: they hear of it, and the launcher sees it go.
        if code:
            tell_failure()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) <= 1


def _main(argv: list[str] | None) -> int:
    """The exit code; what can go wrong is told on one line."""
    try:
        settings, args = parse(argv, __doc__)
        if args.dry_run:
            from .cost import print_plan

            return print_plan(settings, args.devices, args.samples)
        with workers_told(), others_told():
            return run(settings)
    except Elsewhere as fault:
        return fault.code
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except RunError as fault:
        print(f"error: {fault}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as fault:  # a full disk, a folder that may not be written
        print(f"error: {fault}; free space or choose another --out; the same command continues", file=sys.stderr)
    return 1


@dataclass
class Run:
    """What every part of a run needs to know."""

    settings: Settings
    ranks: Ranks
    device: torch.device
    precision: str
    zero: Path | None  # DeepSpeed's configuration
    out: Path = Path()

    @property
    def form(self) -> dict:
        """What a checkpoint must agree with to be continued."""
        if self.zero is None:
            return {"zero": 0}
        return {"zero": stage_of(read_zero(self.zero)), "processes": self.ranks.world}


def run(settings: Settings) -> int:
    """The whole of it; gives the exit code."""
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("training needs the package accelerate, which is not installed: pip install -e '.[train]'")
    ranks = find()
    device = _device(settings, ranks)
    one = Run(settings, ranks, device, _precision(settings, device), settings.zero_config(device.type, ranks.world))
    _prepare_process(one)
    join(ranks, device)
    signals = _signals()
    one.settings = ranks.on_first(lambda: complete(settings))
    one.out = Path(one.settings.out)
    check_export(settings.export_release)
    locks: list = []
    try:
        ranks.on_first(lambda: locks.append(checkpoints.occupy(one.out)))
        token = ranks.on_first(lambda: (one.out / checkpoints.TOKEN).read_text(encoding="utf-8"))
        ranks.everywhere(lambda: checkpoints.same_folder(one.out, token))
        code = _run(one, signals)
        leave(ranks)
    finally:
        signals.forget()
        for lock in locks:
            lock.release()
    return code


def _run(one: Run, signals) -> int:
    """In the folder that is locked now."""
    settings, ranks, out = one.settings, one.ranks, one.out
    identity = {name: getattr(settings, name) for name in IDENTITY}
    identity |= {"base": _base_name(settings), "precision": one.precision}
    ranks.on_first(lambda: checkpoints.identify(out, identity, whole=False))
    torch.manual_seed(settings.seed)
    planted = ranks.everywhere(lambda: _plant(one))
    skips: list[SkipLog] = []
    material = _gather(one, planted, skips)
    identity |= {"base_signature": planted.signature}
    ranks.on_first(lambda: checkpoints.identify(out, identity | {"data": material.fingerprint()}))
    if ranks.on_first(lambda: _finished(out)):
        ranks.on_first(lambda: _again(one))
        return 0
    return _train(one, planted, material, skips[0] if skips else None, signals)


def _base_name(settings: Settings) -> str:
    """The same from wherever the command is given."""
    if settings.base is None:
        return settings.random or "sprout"
    path = Path(settings.base).expanduser()
    return str(path.resolve()) if path.exists() else settings.base


def _device(settings: Settings, ranks: Ranks) -> torch.device:
    device = pick_device(settings.device)
    if device.type == "mps":  # half of what training needs is missing there
        device = torch.device("cpu")
    if device.type != "cuda":
        return device
    if ranks.local >= torch.cuda.device_count():
        raise InputError(
            f"process {ranks.local} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many processes"
        )
    torch.cuda.set_device(ranks.local)
    return torch.device("cuda", ranks.local)


def _precision(settings: Settings, device: torch.device) -> str:
    if settings.precision != "auto":
        return settings.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    fast = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return "bf16" if fast else "fp32"


def _prepare_process(one: Run) -> None:
    """Before anything of DeepSpeed or Hugging Face looks around."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    _die_with_launcher(one.ranks)
    if one.device.type == "cpu":
        torch.set_flush_denormal(True)  # fading optimizer states would slow a CPU down
        os.environ["DS_ACCELERATOR"] = "cpu"
    if one.zero is None:
        return
    if one.ranks.world == 1:
        alone()
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed

    # Compiled for a minute and a half at the first start, and no faster than gloo here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _die_with_launcher(ranks: Ranks) -> None:
    """A killed launcher cannot end its processes: the kernel does, or they would train on and keep the folder."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ  # torchrun, DeepSpeed
    if ranks.world > 1 and launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _signals():
    from .run.trainer import Signals

    return Signals()


def check_export(file: str | None) -> None:
    """Raises InputError for a name that loading would not know."""
    if file is not None and not file.endswith(".safetensors"):
        raise InputError(f"export_release is {file}; a name that ends in .safetensors is needed")


def _plant(one: Run) -> Planted:
    settings = one.settings
    dtype = torch.bfloat16 if one.precision == "bf16" else torch.float32
    seed = Seed(settings.K, settings.T, settings.F, settings.init)
    try:
        planted = plant(settings.base, seed, one.device, dtype, settings.attention, settings.random)
    except torch.OutOfMemoryError as fault:
        raise RunError(f"{one.device} is full before the first step; use a larger one ({fault})") from fault
    if settings.lora_rank:
        add_adapters(planted.twig, settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.seed)
    if settings.gradient_checkpointing:
        checkpoint_gradients(planted.twig)
    if settings.compile:
        for layer in (*planted.trunk.layers, *planted.twig.layers):
            layer.compile(dynamic=True)
    return planted


def _gather(one: Run, planted: Planted, skips: list[SkipLog]) -> Material:
    """The data; on the first process also the list of what is left out of it."""
    settings = one.settings

    def judge(dataset: TwigDataset, found: Survey) -> None:
        skips.append(SkipLog(one.out / SKIPPED, dataset, settings.max_skipped))
        skips[0].add(found.skipped)
        skips[0].write()

    return gather(settings, planted.loaded, one.ranks, judge, one.out, one.ranks.first)


def _finished(out: Path) -> bool:
    facts = read_json(out / checkpoints.RUN)
    return "finished" in facts and (out / WEIGHTS).exists() and (out / CONFIG).exists()


def _again(one: Run) -> None:
    print(f"{one.out}: this training is finished; there is nothing to continue")
    if one.settings.export_release:
        export_release(one.out, Path(one.settings.export_release))


def _share(one: Run, material: Material) -> tuple[Split, LengthGroupedSampler]:
    settings, ranks = one.settings, one.ranks
    usual = ROWS_PER_DEVICE[one.device.type]
    rows, accumulation = split_batch(settings.batch_size, ranks.world, settings.per_device_batch, usual)
    sampler = material.sampler(rows, ranks.world, ranks.rank, accumulation, settings.seed)
    each = -(-len(sampler) // accumulation)
    steps = settings.max_steps or math.ceil(settings.epochs * each)
    return Split(rows, accumulation, ranks.world, steps, each), sampler


def _arguments(one: Run, split: Split, width: int):
    """The Trainer's, for a model of this width."""
    from transformers import TrainingArguments

    settings = one.settings
    reports = ["tensorboard"] if settings.tensorboard and importlib.util.find_spec("tensorboard") else []
    if settings.wandb:
        if importlib.util.find_spec("wandb") is None:
            raise InputError("--wandb needs the package wandb: pip install wandb")
        digest = hashlib.sha256(str(one.out.resolve()).encode()).hexdigest()[:12]
        wanted = {
            "WANDB_DIR": str(one.out),
            "WANDB_PROJECT": "twigvlm",
            "WANDB_RUN_ID": digest,
            "WANDB_RESUME": "allow",
        }
        for name, value in wanted.items():  # a continued run goes on in its own charts
            os.environ.setdefault(name, value)
        reports.append("wandb")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(one.out / "tensorboard")
    workers = settings.workers
    if workers is None:
        workers = GPU_WORKERS if one.device.type == "cuda" else CPU_WORKERS
    arguments = TrainingArguments(
        output_dir=str(one.out),
        run_name=one.out.name,
        per_device_train_batch_size=split.rows,
        gradient_accumulation_steps=split.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=math.ceil(settings.warmup * split.steps),
        optim="adamw_torch_fused",
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=one.precision == "bf16",
        seed=settings.seed,
        use_cpu=one.device.type == "cpu",
        deepspeed=None
        if one.zero is None
        else settle(one.zero, width, split.rows, split.accumulation, split.processes),
        ddp_find_unused_parameters=False,
        dataloader_num_workers=workers,
        logging_steps=settings.log_steps or (1 if split.steps < MANY_STEPS else 10),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps or NEVER,
        report_to=reports,
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
    )
    if one.zero is None and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else the Trainer would use the other GPUs by threads; they want processes
    return arguments


def _train(one: Run, planted: Planted, material: Material, skips: SkipLog | None, signals) -> int:
    from .run.trainer import NotFinite, TwigTrainer

    ranks = one.ranks
    split, sampler = ranks.everywhere(lambda: _share(one, material))
    resume = ranks.on_first(lambda: _last_checkpoint(one))
    job = _job(one, planted, material, skips, split.rows)
    if ranks.first:
        _announce(one, split, job, resume)
    end = one.out / f"checkpoint-{split.steps}"
    if resume == end:  # killed after its last step
        ranks.on_first(lambda: finish(job, end, planted.twig, _made(one, split), {}))
        return 0
    model = TwigForTraining(planted.trunk, planted.twig)
    width = planted.trunk.model.config.text_config.hidden_size
    trainer = ranks.everywhere(lambda: TwigTrainer(job, model, _arguments(one, split, width), sampler, signals))
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except NotFinite as fault:
        raise RunError(_not_finite(one, trainer, fault)) from fault
    except ValueError as fault:
        if isinstance(fault, InputError) or one.zero is None or trainer.state.global_step:
            raise
        raise InputError(
            f"{one.zero}: not a DeepSpeed configuration for this run ({' '.join(str(fault).split())})"
        ) from fault
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as fault:
        if isinstance(fault, RunError) or not _is_out_of_memory(fault):
            raise
        raise RunError(_out_of_memory(one, split, trainer.state.global_step + 1)) from fault
    if trainer.state.global_step < trainer.state.max_steps:
        return _stopped(one, trainer.state.global_step, signals.caught)
    ranks.on_first(lambda: finish(job, end, planted.twig, _made(one, split), trainer.clock.summary()))
    return 0


def _job(one: Run, planted: Planted, material: Material, skips: SkipLog | None, rows: int):
    from .run.trainer import Job

    answers = None
    if one.settings.agreement == "base":
        answers = load_answers(one.out / ANSWERS, planted.signature, material)
    held_out = hold_out(material, rows, one.ranks, answers)
    facts = describe(planted.twig, planted.loaded.name, planted.signature)
    report = Report(one.out, held_out.against if held_out else "batch") if one.ranks.first else None
    return Job(one.settings, one.out, one.ranks, one.device, material, facts, one.form, held_out, skips, report)


def _made(one: Run, split: Split) -> dict:
    """How the twig was made, for its card."""
    made = {"split": str(split), "batch_size": one.settings.batch_size, "precision": one.precision}
    return made | {"processes": one.ranks.world}


def _last_checkpoint(one: Run) -> Path | None:
    """Where to go on; raises InputError if these processes cannot read it."""
    checkpoints.sweep(one.out)
    found, damaged = checkpoints.last_whole(one.out)
    for folder in damaged:
        print(f"{folder}: damaged or cut short, not used", file=sys.stderr)
    if found is None:
        return None
    told = checkpoints.facts(found)
    for key, value in one.form.items():
        if told.get(key) != value:
            name = {"zero": "ZeRO stage", "processes": "number of processes"}[key]
            raise InputError(
                f"{found} was written with {name} {told.get(key)}, this run has {value}; its states cannot be shared "
                f"anew: continue with {told.get(key)}, or choose another --out"
            )
    return found


def _announce(one: Run, split: Split, job, resume: Path | None) -> None:
    settings, held_out = one.settings, job.held_out
    aside = f", {held_out.samples} held out" if held_out else ""
    learning = "adapters" if settings.lora_rank else f"{settings.T} layers, norm and head"
    means = f"DeepSpeed {one.zero.name}" if one.zero else "DDP" if one.ranks.world > 1 else "no DeepSpeed"
    print(
        f"{split}: {split.steps:,} steps, {split.steps_an_epoch:,} a pass over {len(job.material.usable):,} samples{aside}"
    )
    print(
        f"AdamW, lr {settings.lr:g}, betas {settings.betas[0]:g} {settings.betas[1]:g}, {settings.schedule}, "
        f"warm-up {100 * settings.warmup:g} %, seed {settings.seed}"
    )
    print(
        f"{learning} learn on layer {settings.K}, from {settings.init}; {one.precision} on {one.device.type}, {means}"
    )
    if held_out and held_out.against != settings.agreement:
        print("agreement is measured with the labels; run python -m twigvlm.training.agreement first to ask the base")
    if resume:
        print(f"continuing from {resume}")
    sys.stdout.flush()


def _not_finite(one: Run, trainer, fault) -> str:
    """Save the state before the step that went wrong, unless it is spoilt already, and say what to do."""
    good = not fault.spoilt and all(
        torch.isfinite(getattr(p, "ds_tensor", p)).all() for p in trainer.model.parameters()
    )
    spoilt = one.ranks.reduce([0.0 if good else 1.0], one.device, largest=True)[0]
    if not spoilt and trainer.state.global_step:
        trainer._save_checkpoint(trainer.model_wrapped, None)
    found, _ = checkpoints.last_whole(one.out)
    kept = f"the last good checkpoint is {found}" if found else "there is no checkpoint yet"
    return (
        f"{fault}; {kept}; lower --lr (now {one.settings.lr:g}) or set --max-grad-norm 1 (now "
        f"{one.settings.max_grad_norm:g}), with a new --out; --init {found or 'FOLDER'} starts from a checkpoint's twig"
    )


def _is_out_of_memory(fault: Exception) -> bool:
    text = str(fault).lower()
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(fault, kinds) or any(
        t in text for t in ("out of memory", "not enough memory", "can't allocate memory")
    )


def _out_of_memory(one: Run, split: Split, step: int) -> str:
    found, _ = checkpoints.last_whole(one.out)
    less = split.rows // 2
    remedies = [f"--per-device-batch {less}"] if less else []
    remedies += ["--gradient-checkpointing"] if not one.settings.gradient_checkpointing else []
    others = ["a smaller --max-length"] + (["--zero 3_offload"] if one.device.type == "cuda" else [])
    return (
        f"process {one.ranks.rank} ran out of memory at step {step} with {split.rows} samples per device; lower it: "
        f"{' or '.join(remedies) or 'nothing is left to lower here'} (the batch of {one.settings.batch_size} stays), and give "
        f"the same command otherwise: {f'it continues from {found}' if found else 'there is no checkpoint yet'}; "
        f"or, with a new --out, {' or '.join(others)}"
    )


def _stopped(one: Run, step: int, number: int | None) -> int:
    """A pre-empted node's job has done what it should: it saved, and exits with 0. Ctrl-C exits as it always does."""
    name = signal.Signals(number).name if number else "another process's signal"
    if one.ranks.first:
        told = {"step": step, "by": name, "time": time.time()}
        write_json(told, one.out / STOPPED)
        print(
            f"stopped by {name} after step {step}: saved {one.out / f'checkpoint-{step}'}; the same command continues"
        )
    return 130 if number == signal.SIGINT else 0


if __name__ == "__main__":
    sys.exit(main())
