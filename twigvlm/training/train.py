"""Train a twig: `python -m twigvlm.training.train`, or `bash scripts/v1_5/train_twig.sh`.

With --learn projector it is the base's projector that learns, while visual tokens are pruned in front
of it (`training.projector`); with --stage 1 and 2 a pruning head as well, or alone (`training.plus`). Of a plain twig's base only K+T layers of the base are read; layers 0..K-1 are frozen, the twig learns to say the answers of
the data. Runs on a CPU, one GPU, or many processes under torchrun, DeepSpeed or Slurm. The same
command continues a run that was stopped, from its last whole checkpoint.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError, RunError
from ..files import write_json
from ..loading.device import is_out_of_memory
from ..loading.find import read_json
from ..model.twig import WEIGHTS
from ..workers import end_workers, workers_told
from .agreement import FILE as ANSWERS
from .agreement import hold_out, load_answers
from .data.examples import TwigDataset
from .data.loading import TrainingData, TrainingFeed, fill_in, read_data, with_start
from .data.survey import SkipLog, Survey
from .lora import has_adapters
from .on_policy.spoken import on_policy_identity, with_answers
from .plus.subject import DistilSubject, PolicySubject
from .projector import ProjectorSubject
from .run import checkpoints
from .run.device import Run, device_of, flushed_denormals, precision_of, prepare_process
from .run.loop import FORMAT, Learner, Loop, NotFinite, Place, Plan, adamw, rates
from .run.ranks import Elsewhere, find, join, leave, others_told, tell_failure
from .run.report import Charts, Report, check_wandb
from .run.results import export_release, write_results
from .run.timing import StepTimes
from .run.watch import Job, Signals, TwigWatch
from .run.zero import has_open_scheduler, read_zero, settle
from .settings import ROWS_PER_DEVICE, SKIPPED, STOPPED, Settings, check_accelerate, parse, split_batch, store
from .subject import Subject, TwigSubject
from .twig import Prepared

GPU_WORKERS, CPU_WORKERS = 4, 1
# What a run is: another value of these makes another run. Devices and workers may change.
IDENTITY = (
    "max_length", "drop_indices", "epochs", "max_steps", "batch_size", "lr", "betas", "weight_decay",
    "warmup", "schedule", "max_grad_norm", "seed", "lora_rank", "lora_alpha", "lora_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class BatchShares:
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

            if settings.learn != "twig":
                raise InputError(f"--dry-run plans the training of a twig, not of a {settings.learn}; leave it out")
            return print_plan(with_start(settings), args.devices, args.samples)
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


def run(settings: Settings) -> int:
    """The whole of it; gives the exit code."""
    check_accelerate()
    ranks = find()
    device = device_of(settings, ranks)
    one = Run(settings, ranks, device, precision_of(settings, device), settings.zero_config(device.type, ranks.world))
    prepare_process(one)
    join(ranks, device)
    signals = Signals()
    one.settings = ranks.on_first(lambda: fill_in(settings))
    one.out = Path(one.settings.out)
    check_export(settings.export_release)
    check_wandb(settings.wandb)
    locks: list = []
    try:
        ranks.on_first(lambda: locks.append(checkpoints.occupy(one.out)))
        token = ranks.on_first(lambda: (one.out / checkpoints.TOKEN).read_text(encoding="utf-8"))
        ranks.everywhere(lambda: checkpoints.same_folder(one.out, token))
        with flushed_denormals():
            code = _run(one, signals, subject_of(one.settings))
        leave(ranks)
    finally:
        signals.forget()
        for lock in locks:
            lock.release()
    return code


def subject_of(settings: Settings) -> Subject:
    """What these settings train."""
    if settings.learn == "projector":
        return ProjectorSubject(settings)
    return {0: lambda _: TwigSubject(), 1: DistilSubject, 2: PolicySubject}[settings.stage](settings)


def _run(one: Run, signals: Signals, subject: Subject) -> int:
    """In the folder that is locked now."""
    settings, ranks, out = one.settings, one.ranks, one.out
    identity = subject.identity(settings) | {name: getattr(settings, name) for name in IDENTITY}
    identity |= {"base": _base_name(settings), "precision": one.precision} | on_policy_identity(settings)
    ranks.on_first(lambda: checkpoints.identify(out, identity, whole=False))
    torch.manual_seed(settings.seed)
    prepared = ranks.everywhere(lambda: subject.prepare(one))
    skips: list[SkipLog] = []
    data = _read_data(one, prepared, skips)
    if settings.on_policy:
        name = prepared.loaded.name
        data = ranks.everywhere(lambda: with_answers(data, settings, prepared.signature, name, out))
    identity |= {"base_signature": prepared.signature}
    ranks.on_first(lambda: checkpoints.identify(out, identity | {"data": data.fingerprint()}))
    ranks.on_first(lambda: store(settings, out))
    if ranks.on_first(lambda: _finished(out, subject)):
        ranks.on_first(lambda: _again(one))
        return 0
    return _train(one, prepared, data, skips[0] if skips else None, signals, subject)


def _base_name(settings: Settings) -> str:
    """The same from wherever the command is given."""
    if settings.base is None:
        return settings.random or "sprout"
    path = Path(settings.base).expanduser()
    return str(path.resolve()) if path.exists() else settings.base


def check_export(file: str | None) -> None:
    """Raises InputError for a name that loading would not know."""
    if file is not None and not file.endswith(".safetensors"):
        raise InputError(f"export_release is {file}; a name that ends in .safetensors is needed")


def _read_data(one: Run, prepared: Prepared, skips: list[SkipLog]) -> TrainingData:
    """The data; on the first process also the list of what is left out of it."""
    settings = one.settings

    def judge(dataset: TwigDataset, found: Survey) -> None:
        skips.append(SkipLog(one.out / SKIPPED, dataset, settings.max_skipped))
        skips[0].add(found.skipped)
        skips[0].write()
        if found.unshown:
            remedy = "write <image> into their text, or check them with python -m twigvlm.training.inspect"
            print(f"note: {found.unshown:,} samples name pictures that no <image> shows; {remedy}", file=sys.stderr)
        if settings.stage == 2 and (text := len(found.usable) - len(found.shown)):
            print(
                f"note: {text:,} samples without an image are left out: nothing is to be chosen there", file=sys.stderr
            )

    return read_data(settings, prepared.loaded, one.ranks, judge, one.out, one.ranks.first)


def _finished(out: Path, subject: Subject) -> bool:
    facts = read_json(out / checkpoints.RUN)
    return "finished" in facts and (out / WEIGHTS).exists() and (out / subject.config).exists()


def _again(one: Run) -> None:
    print(f"{one.out}: this training is finished; there is nothing to continue")
    if one.settings.export_release:
        export_release(one.out, Path(one.settings.export_release))


def _share(one: Run, data: TrainingData) -> tuple[BatchShares, TrainingFeed]:
    settings, ranks = one.settings, one.ranks
    usual = ROWS_PER_DEVICE[one.device.type]
    rows, accumulation = split_batch(settings.batch_size, ranks.world, settings.per_device_batch, usual)
    sampler = data.sampler(rows, ranks.world, ranks.rank, accumulation, settings.seed)
    cuda = one.device.type == "cuda"
    workers = settings.workers if settings.workers is not None else GPU_WORKERS if cuda else CPU_WORKERS
    feed = TrainingFeed(data, sampler, accumulation, workers, cuda)
    steps = settings.max_steps or math.ceil(settings.epochs * feed.steps_an_epoch)
    return BatchShares(rows, accumulation, ranks.world, steps, feed.steps_an_epoch), feed


def _plan(one: Run, shares: BatchShares, width: int) -> Plan:
    """How the loop runs, for a model of this width."""
    settings, half, zero = one.settings, one.precision == "bf16", None
    if one.zero is not None:
        zero = settle(one.zero, width, shares.rows, shares.accumulation, shares.processes, settings, half)
    return Plan(
        shares.steps,
        rates(settings.schedule, settings.lr, shares.steps, math.ceil(settings.warmup * shares.steps)),
        settings.max_grad_norm,
        settings.seed,
        half,
        zero,
        settings.save_steps,
        settings.save_seconds or math.inf,
        settings.keep,
    )


def _train(
    one: Run, prepared: Prepared, data: TrainingData, skips: SkipLog | None, signals: Signals, subject: Subject
) -> int:
    ranks = one.ranks
    shares, feed = ranks.everywhere(lambda: _share(one, data))
    resume = ranks.on_first(lambda: _last_checkpoint(one))
    job = _job(one, prepared, data, skips, shares, subject)
    if ranks.first:
        _announce(one, shares, job, resume, subject)
    end = one.out / f"{checkpoints.STEM}{shares.steps}"
    if resume == end:  # killed after its last step
        ranks.on_first(lambda: write_results(job, end, subject, prepared, _made(one, shares), {}))
        return 0
    loop = ranks.everywhere(lambda: _loop(one, prepared, shares, feed, job, signals, subject))
    try:
        if resume is not None:
            loop.resume(resume)
        whole = loop.run()
    except NotFinite as fault:
        raise RunError(_not_finite(one, fault)) from fault
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as fault:
        if isinstance(fault, RunError) or not is_out_of_memory(fault):
            raise
        raise RunError(_out_of_memory(one, shares, loop.done + 1)) from fault
    if not whole:
        return _stopped(one, loop.done, signals.caught)
    ranks.on_first(lambda: write_results(job, end, subject, prepared, _made(one, shares), loop.times.summary()))
    return 0


def _loop(
    one: Run,
    prepared: Prepared,
    shares: BatchShares,
    feed: TrainingFeed,
    job: Job,
    signals: Signals,
    subject: Subject,
) -> Loop:
    settings, module, times = one.settings, prepared.module, StepTimes(one.device)
    plan = _plan(one, shares, prepared.base.model.config.text_config.hidden_size)
    facts = {**job.facts, **({"adapters": True} if has_adapters(module) else {})}
    try:
        return Loop(
            plan,
            Learner(module, subject.lesson(prepared, times)),
            lambda module: adamw(module, settings.lr, settings.betas, settings.weight_decay),
            feed,
            Place(
                one.out, lambda folder, weights: subject.write(folder, weights, facts), one.device, one.ranks, one.form
            ),
            TwigWatch(job, signals),
            times,
        )
    except Exception as fault:
        ours = isinstance(fault, ValueError) or type(fault).__name__ == "DeepSpeedConfigError"  # which is no ValueError
        if not ours or isinstance(fault, InputError) or one.zero is None:
            raise
        raise InputError(
            f"{one.zero}: not a DeepSpeed configuration for this run ({' '.join(str(fault).split())})"
        ) from fault


def _job(
    one: Run, prepared: Prepared, data: TrainingData, skips: SkipLog | None, shares: BatchShares, subject: Subject
) -> Job:
    settings, ranks, answers = one.settings, one.ranks, None
    if settings.agreement == "base":
        answers = load_answers(one.out / ANSWERS, prepared.signature, data, settings.tower_pruning)
    held_out = hold_out(data, shares.rows, ranks, answers)
    facts = subject.describe(prepared)
    report = None
    if ranks.first:
        charts = Charts(one.out, settings.tensorboard, settings.wandb)
        report = Report(one.out, held_out.against if held_out else "batch", charts)
    return Job(settings, one.out, ranks, one.device, data, facts, shares.steps_an_epoch, held_out, skips, report)


def _made(one: Run, shares: BatchShares) -> dict:
    """How the twig was made, for its card."""
    made = {"split": str(shares), "batch_size": one.settings.batch_size, "precision": one.precision}
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
    if told.get("format") != FORMAT:
        raise InputError(
            f"{found} was written by an earlier version, whose states cannot be read any more; begin anew with another "
            f"--out, from this twig with --init {found} or from the base"
        )
    for key, value in one.form.items():
        if told.get(key) != value:
            name = {"zero": "ZeRO stage", "processes": "number of processes"}[key]
            raise InputError(
                f"{found} was written with {name} {told.get(key)}, this run has {value}; its states cannot be shared "
                f"anew: continue with {told.get(key)}, or choose another --out"
            )
    return found


def _announce(one: Run, shares: BatchShares, job: Job, resume: Path | None, subject: Subject) -> None:
    settings, held_out = one.settings, job.held_out
    aside = f", {held_out.samples} held out" if held_out else ""
    means = f"DeepSpeed {one.zero.name}" if one.zero else "DDP" if one.ranks.world > 1 else "no DeepSpeed"
    print(
        f"{shares}: {shares.steps:,} steps, {shares.steps_an_epoch:,} a pass over {len(job.data.usable):,} samples{aside}"
    )
    print(
        f"AdamW, lr {settings.lr:g}, betas {settings.betas[0]:g} {settings.betas[1]:g}, {settings.schedule}, "
        f"warm-up {100 * settings.warmup:g} %, seed {settings.seed}"
    )
    if one.zero and has_open_scheduler(read_zero(one.zero)):
        print(f"note: {one.zero}: its scheduler is not used, the learning rate is --schedule's", file=sys.stderr)
    if settings.on_policy:
        print(f"{settings.on_policy:,} of them with the base's own answers")
    print(f"{subject.words(settings)}; {one.precision} on {one.device.type}, {means}")
    if held_out and held_out.against != settings.agreement:
        print("agreement is measured with the labels; run python -m twigvlm.training.agreement first to ask the base")
    if resume:
        print(f"continuing from {resume}")
    sys.stdout.flush()


def _not_finite(one: Run, fault: NotFinite) -> str:
    """What to do about it."""
    found, _ = checkpoints.last_whole(one.out)
    kept = f"the last good checkpoint is {found}" if found else "there is no checkpoint yet"
    return (
        f"{fault}; {kept}; lower --lr (now {one.settings.lr:g}) or set --max-grad-norm 1 (now "
        f"{one.settings.max_grad_norm:g}), with a new --out; --init {found or 'FOLDER'} starts from a checkpoint's twig"
    )


def _out_of_memory(one: Run, shares: BatchShares, step: int) -> str:
    found, _ = checkpoints.last_whole(one.out)
    less = shares.rows // 2
    remedies = [f"--per-device-batch {less}"] if less else []
    remedies += ["--gradient-checkpointing"] if not one.settings.gradient_checkpointing else []
    others = ["a smaller --max-length"] + (["--zero 3_offload"] if one.device.type == "cuda" else [])
    return (
        f"process {one.ranks.rank} ran out of memory at step {step} with {shares.rows} samples per device; lower it: "
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
