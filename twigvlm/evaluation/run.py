"""Ask a model a whole benchmark and score it: `python -m twigvlm.evaluation.run --task gqa -R 64`.

Without a model: the embedded one on its own data. Shards, one per visible CUDA device, are launched
and waited for here; over several nodes start the same command everywhere (torchrun, accelerate,
Slurm), and the process that ends last merges and scores. A run that was stopped goes on where it
was. stdout ends with the score and the path of result.json; with --json, or where it is no terminal,
its last line is one JSON object: result.json on one line.

Exit status: 0 done; 1 it could not be brought to its end (a shard died, a disk is full); 2 asked for
the impossible; 143 stopped by SIGTERM, 130 by Ctrl-C, with all answers kept.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import flags
from ..config import GenerationSettings
from ..errors import InputError, RunError
from ..files import check_folder
from ..processes import Placement, Stop, guarded, place
from ..program import called, print_json
from .asking.answers import LOGS, open_shard
from .asking.calibration import check_count, ensure, wanting
from .asking.job import Job, default_out, find_data, find_split
from .asking.progress import Progress
from .asking.setting import Setting
from .asking.shards import Ended, launch
from .tasks import ALIASES, OWN, TASKS, find
from .tasks.base import Task

MODULE = "twigvlm.evaluation.run"


# ---------------------------------------------------------------------- flags


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    return flags.parse(make_parser(), argv)


def make_parser() -> argparse.ArgumentParser:
    writing = flags.writing(max_new_tokens=None, seed=0)
    parser = flags.parser(called(MODULE), __doc__, flags.model(), writing)
    names = (*TASKS, *OWN, *ALIASES)
    parser.add_argument("--task", required=True, choices=names, metavar="T", help=f"one of {', '.join(names)}")
    own = parser.add_argument_group("your own questions (--task vqa)")
    own.add_argument(
        "--question-file", type=Path, metavar="FILE",
        help="JSON lines {question_id, image, text}, as LLaVA's model_vqa takes; scored where lines give answer or answers",
    )  # fmt: skip
    own.add_argument("--image-folder", type=Path, metavar="DIR", help="the folder that its images lie in")
    parser.add_argument("--split", metavar="S", help="of the benchmark (default: the first whose files are there)")
    flags.add_switches(parser)
    parser.add_argument("--baseline", action="store_true", help="the base alone: no twig, nothing pruned (no -R)")
    parser.add_argument("--json", action="store_true", help="end with the JSON line on a terminal too")
    add_options(parser)
    return parser


def config_of(args: argparse.Namespace, job: Job) -> Namespace:
    """The flags that ask this program for `job` alone, whichever program and part of it `args` are of."""
    setting, own = job.setting, ("data", "question_file", "image_folder", "skip_broken", "batch_size", "workers")
    said = flags.of(setting.model, setting.writing) | {"baseline": setting.baseline, "limit": setting.limit}
    said |= {"task": job.task.name, "split": job.split, "out": job.out}
    return Namespace(**said | {name: getattr(args, name, None) for name in own})


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags that hold for one benchmark and for all of them, beside those of the model and of writing."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, metavar="DIR",
        help="holds one folder a benchmark (default: playground/data/eval; for the embedded model playground/data/sprout, without "
        "a clone ~/.cache/twigvlm/sprout)",
    )  # fmt: skip
    data.add_argument("--limit", type=int, metavar="N", help="ask the first N questions only")
    data.add_argument("--skip-broken", action="store_true", help="count questions with broken pictures and go on")
    data.add_argument(
        "--out", type=Path, metavar="DIR", help="answers go to DIR/answers/… (default: the benchmark's data folder)"
    )
    work = parser.add_argument_group("how to work")
    work.add_argument(
        "--calibrate", type=int, metavar="N",
        help="first find thresholds on N questions for methods whose budget depends on the picture, where none are kept yet",
    )  # fmt: skip
    work.add_argument(
        "--batch-size", type=int, metavar="N",
        help="questions answered together, which changes no answer (default: 8 in fp32 on a CPU, else 1)",
    )  # fmt: skip
    work.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode pictures (default: up to 4 on CUDA, else 1)"
    )
    work.add_argument("--num-shards", type=int, metavar="N", help="parts (default: one per visible CUDA device)")
    work.add_argument("--shard", type=int, metavar="I", help="answer part I of N only")
    work.add_argument("--answer-only", action="store_true", help="neither merge nor score")


def setting_of(args: argparse.Namespace, task: Task) -> Setting:
    """Flags → what is asked of the model. Raises InputError for flags that contradict each other."""
    limit = args.limit
    if limit is not None:
        limit += -limit % task.together
    asked = (
        args if args.max_new_tokens is not None else Namespace(**vars(args) | {"max_new_tokens": task.max_new_tokens})
    )
    writing = GenerationSettings(**flags.generation(asked))
    return Setting(flags.model_settings(args), writing, args.baseline, limit)


def job_of(args: argparse.Namespace, task: Task, setting: Setting, out: Path | None, split: str | None = None) -> Job:
    for name, least in (("batch_size", 1), ("workers", 0)):
        name, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; {least} or more is needed")
    check_count(args.calibrate)
    data = find_data(setting, task, args.data)
    split = find_split(task, data, split)
    return Job(task, setting, data, split, out or default_out(task, data, split), args.skip_broken)


def task_of(args: argparse.Namespace) -> Task:
    """The benchmark, or the questions in the files that were given."""
    return find(args.task).given(args.question_file, args.image_folder, args.data)


def foresee(settings: Iterable[Setting]) -> None:
    """Raise InputError for what no weight need be read for; one look at each model."""
    from ..foresight import Wish, check

    wishes: dict[Wish, list[dict[str, Any]]] = {}
    for s in settings:
        facts = vars(s.model) | ({"twig": None, "K": None, "T": None} if s.baseline else {})  # needs and reads no twig
        wishes.setdefault(Wish(**facts), []).append(vars(s.writing))
    for wish, generations in wishes.items():
        check(wish, *generations)


def announce(setting: Setting, data: Path, given: bool) -> None:
    """The one line that says which model meets which data."""
    model = "embedded model sprout" if setting.embedded else f"model {setting.model.base}"
    twig = f"twig {setting.twig_name}" if setting.twig_name else "no twig"
    why = "as asked" if given else "its default"
    print(f"{model} ({twig}) on data {data} ({why})", flush=True)


# ---------------------------------------------------------------------- asking


class Models:
    """The model that was opened last: several benchmarks after one another need it once."""

    def __init__(self, local: int | None):
        self.local, self._key, self._vlm = local, None, None
        self._warm: set[str] = set()

    def get(self, setting: Setting) -> tuple[Any, float]:
        """(model, seconds that opening took)."""
        from transformers.utils import logging

        from .asking.ask import open_model

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        key = (setting.model, setting.baseline)
        start = time.perf_counter()
        if key != self._key:
            self._vlm = None  # the old one's memory first
            self._vlm, self._key = open_model(setting, self.local), key
            self._warm.clear()
        return self._vlm, time.perf_counter() - start

    def try_out(self, job: Job) -> None:
        """An untimed question, once a setting. Raises InputError for what this model cannot do, an illegal R above all."""
        from .asking.ask import Asker

        vlm, _ = self.get(job.setting)
        if job.setting.name not in self._warm:
            Asker(vlm, job.setting, job.task.clean).warm_up()
            self._warm.add(job.setting.name)


def answer(job: Job, part: int, count: int, args: argparse.Namespace, models: Models, stop: Stop) -> None:
    """Ask what is still open in a part. Raises InputError before the first question where it can."""
    found = job.open()
    todo = [[q for q in piece if q.id not in found] for piece in job.pieces(part, count, args.batch_size)]
    todo = [piece for piece in todo if piece]
    if not todo or stop:
        return
    from .asking.ask import Asker, batches, check_images, default_workers, dtype_name

    if not job.skip_broken:
        check_images(todo)
    vlm, seconds = models.get(job.setting)
    workers = default_workers(vlm, count) if args.workers is None else args.workers
    asker = Asker(vlm, job.setting, job.task.clean, job.skip_broken, workers)
    models.try_out(job)
    if stop:
        return
    late = {"dtype": dtype_name(vlm), "K": vlm.config.K, "T": vlm.config.T, "F": vlm.config.F}
    job.folder.record(job.identity | late)
    size = args.batch_size or asker.default_batch(job.task.timed_alone)
    lines, figures = open_shard(job.folder, part, count)
    flags.save(config_of(args, job), job.folder.path)
    with lines, figures, Progress(job, found, score=not args.answer_only) as progress:
        asker.begin(figures, seconds, size, part, count)
        asker.ask(batches(todo, size), lines, figures, stop, progress.look)


def answer_here(
    jobs: Sequence[Job], placement: Placement, args: argparse.Namespace, stop: Stop, each: Callable[[Job], None]
) -> None:
    """All jobs' part, in this process."""
    models = Models(placement.local)
    for job in jobs:
        try:
            answer(job, placement.parts[0], placement.count, args, models, stop)
        except InputError:
            job.folder.tidy()
            raise
        if stop:
            return
        each(job)


def answer_in_children(
    jobs: Sequence[Job], placement: Placement, command: Sequence[str], stop: Stop, each: Callable[[Job], None]
) -> None:
    """All jobs, in one process per part. Raises ShardsFailed when one of them did not come to its end."""
    waiting = []
    for job in jobs:
        if job.complete(job.open()):
            each(job)
        else:
            waiting.append(job)
    if not waiting:
        return
    with contextlib.ExitStack() as bars:
        shown: list[Progress] = []

        def follow() -> None:
            while waiting:
                job = waiting[0]
                if not shown:
                    shown.append(bars.enter_context(Progress(job, job.folder.answers(job.questions))))
                shown[0].look()
                if len(waiting) == 1 or not job.complete(shown[0].found):
                    return
                bars.pop_all().close()
                shown.clear()
                each(waiting.pop(0))

        logs = jobs[0].out / LOGS if len(jobs) > 1 else jobs[0].folder.path / LOGS
        failed = launch(command, placement, logs, stop, follow)
    if failed:
        raise ShardsFailed(failed, placement)
    for job in waiting if not stop else ():
        each(job)


class ShardsFailed(RunError):
    """Some shards died; the answers of all are kept."""

    def __init__(self, failed: Sequence[Ended], placement: Placement):
        self.code = 2 if all(end.status == 2 for end in failed) else 1
        for end in failed:
            print(f"--- last lines of {end.log}\n{end.tail}", file=sys.stderr)
        names = "; ".join(f"shard {end.part} of {placement.count} {end.reason}" for end in failed)
        super().__init__(f"{names}; no score. All answers so far are kept: the same command goes on from there")


def carry_out(
    jobs: Sequence[Job], args: argparse.Namespace, command: Sequence[str], stop: Stop
) -> list[dict[str, Any]]:
    """Answer every job's questions, as far as they are this process's business; the jobs' results."""
    results: list[dict[str, Any]] = []

    def each(job: Job) -> None:
        if not args.answer_only:
            results.append(conclude(job, placement))
            show(results[-1])

    placement = place(args.num_shards, args.shard, os.environ, args.device)
    later = [job for job in jobs if args.calibrate is not None and wanting(job) is not None]
    foresee(job.setting for job in jobs if job not in later and not job.done())
    if not args.answer_only:  # before hours of work, not behind them
        for job in {(job.task, job.split): job for job in jobs}.values():
            job.match()
    for out in {job.out for job in later}:
        check_folder(out, "--out")
    ensure(args.calibrate, later)
    foresee(job.setting for job in later if not job.done())
    if placement.launch:
        print(f"{placement.count} shards on this node", flush=True)
        answer_in_children(jobs, placement, command, stop, each)
    else:
        if placement.count > 1:
            print(f"shard {placement.parts[0]} of {placement.count} ({placement.source})", flush=True)
        answer_here(jobs, placement, args, stop, each)
    return results


# ---------------------------------------------------------------------- the end


def conclude(job: Job, placement: Placement) -> dict[str, Any]:
    """The result, or, while other processes still answer, how much they owe."""
    missing = job.missing()
    if missing and not placement.alone:
        facts = {
            "task": job.task.name,
            "split": job.split,
            "model": job.setting.model_name,
            "setting": job.setting.name,
        }
        facts |= {"score": None, "questions": len(job.questions), "missing": len(missing)}
        return facts | {"note": "other shards are still at work; the one that ends last merges and scores"}
    from ..record import provenance

    here = provenance()
    return job.finish(here["command"], here["commit"])


def show(result: dict[str, Any]) -> None:
    """For people, on stdout before the JSON line."""
    if "missing" in result:
        print(f"{result['missing']} of {result['questions']} questions still to be answered: {result['note']}")
        return
    if result["visual_measured"] is not None:
        asked = "all" if result["R"] is None else f"{result['R']:g}"
        own, wide = result["visual_twig_share"], result.get("visual_spread")
        varied = wide is not None and wide["sd"] >= 0.05
        spread = f" (sd {wide['sd']:.1f}, 5 to 95 %: {wide['5%']:.1f} to {wide['95%']:.1f})" if varied else ""
        theirs = result.get("visual_authors")
        other = theirs is not None and abs(theirs - result["visual_measured"]) >= 0.05
        counted = f", {theirs:.1f} as the method's authors count" if other else ""
        print(
            f"visual tokens per layer: {asked} asked, {result['visual_measured']:.1f} measured{spread}{counted}, "
            f"the twig's own {own:.1f}"
        )
    if result["tokens_per_second"]:
        print(speed_line(result))
    for name, count in result["doubts"].items():
        print(f"doubt: {count} {name}")
    if result["upload"]:
        print(f"file for the benchmark's server or tools: {result['upload']}")
    if result["note"]:
        print(f"note: {result['note']}")
    score = "not scored here" if result["score"] is None else f"{result['score']:.2f} ({result['metric']})"
    partial = (
        f" on the first {result['questions']} of {result['questions_in_all']} questions" if result["partial"] else ""
    )
    print(f"{result['title']}, {result['model']}, {result['setting']}: {score}{partial}")
    print(f"result: {result['result']}", flush=True)


def speed_line(result: dict[str, Any]) -> str:
    """Speed as the paper has it (per sample, prefill included), or over all; decoding and first token apart."""
    sample, decode = result["tokens_per_second_per_sample"], result["decode_tokens_per_second"]
    sizes = " or ".join(map(str, result["batch_sizes"]))
    parts = [
        f"{sample:.1f} tokens/s per sample"
        if sample
        else f"{result['tokens_per_second']:.1f} tokens/s in batches of {sizes}"
    ]
    if decode:
        parts.append(f"{decode:.1f} in decoding alone")
    parts.append(f"first token after {result['time_to_first_token']:.2f} s")
    if result["acceptance"] is not None:
        parts.append(f"{100 * result['acceptance']:.0f} % of drafts accepted")
    return ", ".join(parts)


def evaluate(args: argparse.Namespace, argv: Sequence[str], stop: Stop) -> int:
    task = task_of(args)
    setting = setting_of(args, task)
    job = job_of(args, task, setting, args.out, args.split)
    announce(setting, job.data, args.data is not None or task.own_files)
    command = [sys.executable, "-m", MODULE, *argv]
    results = carry_out([job], args, command, stop)
    if stop and not results:
        return stopped(stop, [job])
    for result in results:
        print_json(result, args.json)
    return 0


def stopped(stop: Stop, jobs: Sequence[Job]) -> int:
    done, total = sum(len(j.questions) - len(j.missing()) for j in jobs), sum(len(j.questions) for j in jobs)
    print(f"stopped: {done} of {total} answers are written; the same command goes on from there", file=sys.stderr)
    return stop.code


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda stop: evaluate(parse(argv), argv, stop))


if __name__ == "__main__":
    sys.exit(main())
