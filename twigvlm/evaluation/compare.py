"""All pruning methods at all budgets over all benchmarks, then one table: `python -m twigvlm.evaluation.compare`.

Without a model: the embedded one on its own data. Plain decoding, so that the methods differ in what
they prune alone; the unpruned base and the twig are asked with drafts besides. A method that draws is
asked with several seeds. One process opens the base once and the base with its twig once; answers lie
where `evaluation.run` puts them, so that a comparison that was stopped goes on where it was, and what
is answered already is not asked again. --report gets the figures (JSON), the table (markdown) and three plots.

A budget that a method cannot reach and a model that lacks what a method needs are listed with the
reason. A method that goes wrong stops no other; the exit status is 1 then. Else as `evaluation.run`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import flags
from ..errors import InputError
from ..files import check_folder, write_json, write_text
from ..processes import Placement, Stop, guarded, place
from ..program import called
from ..pruning import METHODS, Plan, Shape, find_method
from ..pruning.catalogue import methods_of
from ..pruning.cost import Cost
from ..threads import Clock
from .asking.answers import LOGS
from .asking.calibration import ensure, wanting
from .asking.job import Job
from .asking.setting import pruning_of
from .asking.shards import launch
from .comparing.entries import Entry, Refused, check, entries_of, rows_of, wish_of
from .comparing.rows import Measured, records, varies
from .comparing.shown import markdown, plot
from .comparing.spread import measure
from .run import Models, add_options, announce, answer, conclude, foresee, job_of, setting_of, stopped
from .suite import BUDGETS, MAIN, benchmarks_of
from .table import heading
from .tasks.literature import MODEL as PUBLISHED_MODEL
from .tasks.literature import model_of

MODULE = "twigvlm.evaluation.compare"
SEEDS = 3
CALIBRATE = 64  # questions, where nobody says how many
TEXT = 64  # text tokens of the prompt whose cost is computed
EMBEDDED = {"cdpruner": "cdpruner:stand_in"}  # what needs more than the embedded model has, and what is asked instead
NOTES = "refused-{}.json"  # in the report's folder: what a shard could not ask


def parse(argv: Sequence[str] | None) -> Namespace:
    writing = flags.writing(leave=("retained_tokens", "pruning"), max_new_tokens=None, seed=0)
    parser = flags.parser(called(MODULE), __doc__, flags.model(), writing)
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--methods", type=_methods, metavar="M,M,…",
        help="with settings, as --pruning takes them elsewhere (default: all; python -m twigvlm.pruning.catalogue lists them; "
        "with the embedded model, whose tower reads no text, cdpruner:stand_in)",
    )  # fmt: skip
    what.add_argument(
        "-R", "--retained-tokens", type=flags.budgets_of, default=flags.budgets_of(BUDGETS), metavar="R,R,…",
        help=f"averages of visual tokens that enter a layer (default {BUDGETS})",
    )  # fmt: skip
    what.add_argument(
        "--benchmarks", type=benchmarks_of, default=benchmarks_of(",".join(MAIN)), metavar="T,T,…",
        help=f"or 'all' (default {','.join(MAIN)})",
    )  # fmt: skip
    what.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"of methods that draw (default {SEEDS})")
    what.add_argument(
        "--speed-limit", type=int, metavar="N",
        help="ask the first N questions only where whole answers are timed (default: as --limit)",
    )  # fmt: skip
    what.add_argument("--published", action="store_true", help="LLaVA-1.5-7B's published rows beside any model's")
    parser.add_argument(
        "--recorded", action="store_true", help="ask nothing: a table of what is answered, and a list of what is not"
    )
    parser.add_argument(
        "--report", type=Path, default=Path("runs/compare"), metavar="DIR",
        help="where JSON, table and plots go (default %(default)s)",
    )  # fmt: skip
    add_options(parser)
    parser.set_defaults(calibrate=CALIBRATE)
    args = flags.parse(parser, argv)
    if args.methods is None:
        stand_ins = EMBEDDED if args.base_model is None else {}
        args.methods = [stand_ins.get(name, name) for name in METHODS]
    return args


def _methods(text: str) -> list[str]:
    try:
        return methods_of(text)
    except InputError as fault:
        raise argparse.ArgumentTypeError(str(fault)) from None


class Comparison:
    """The settings, their jobs, and what became of them."""

    def __init__(self, args: Namespace):
        self.args, self.wish = args, wish_of(args)
        check(args, self.wish)
        self.entries, self.refused = entries_of(args, self.wish)
        self.jobs = {entry: self._jobs(entry) for entry in self.entries}
        self.rows = {row: Measured(entries) for row, entries in rows_of(self.entries).items()}

    def _jobs(self, entry: Entry) -> list[Job]:
        variant, found = entry.variant(self.args), []
        for task in self.args.benchmarks:
            limit = self.args.speed_limit if task.timed_alone and self.args.speed_limit else self.args.limit
            setting = setting_of(Namespace(**vars(variant) | {"limit": limit}), task)
            found.append(job_of(variant, task, setting, self.args.out / task.name if self.args.out else None))
        return found

    @property
    def every(self) -> list[Job]:
        return [job for jobs in self.jobs.values() for job in jobs]

    def refuse(self, entry: Entry, fault: Exception, failed: bool) -> None:
        """Leave an entry's row out, and say why."""
        kind = "" if isinstance(fault, InputError) else f"{type(fault).__name__}: "
        self.refused.append(Refused(entry.label, entry.R, f"{kind}{' '.join(str(fault).split())}", failed))
        self.rows.pop(entry.row, None)
        print(
            f"{'error' if failed else 'not asked'}: {entry.title}: {self.refused[-1].reason}",
            file=sys.stderr,
            flush=True,
        )
        if kind and failed:
            traceback.print_exception(fault)

    # ------------------------------------------------------------------ asking

    def ask(self, placement: Placement, command: Sequence[str], stop: Stop) -> None:
        """All that is not answered, as far as it is this process's business."""
        foresee(job.setting for job in self.every if not job.done())
        if placement.launch:
            print(f"{placement.count} shards on this node", flush=True)
            launch(command, placement, self.args.report / LOGS, stop, lambda: None)
            self._read_notes(placement)
        else:
            self._ask_here(placement, stop)
            if placement.count > 1:
                notes = [vars(one) for one in self.refused]
                write_json(notes, self.args.report / NOTES.format(placement.parts[0]))

    def leave_open(self) -> None:
        """List what is not answered yet, and leave it out of the table."""
        for entry, jobs in self.jobs.items():
            missing = sum(len(job.missing()) for job in jobs)
            if missing and entry.row in self.rows:
                total = sum(len(job.questions) for job in jobs)
                reason = f"not asked yet: {total - missing} of {total} answers are there; the same command without --recorded goes on"
                self.refused.append(Refused(entry.label, entry.R, reason))
                self.rows.pop(entry.row)

    def _ask_here(self, placement: Placement, stop: Stop) -> None:
        models = Models(placement.local)
        for number, (entry, jobs) in enumerate(self.jobs.items(), 1):
            if stop:
                return
            if entry.row not in self.rows or all(job.done() for job in jobs):
                continue
            try:
                models.try_out(jobs[0])  # what the model cannot do is no fault of the method
            except InputError as fault:
                self.refuse(entry, fault, failed=False)
                continue
            except Exception as fault:
                self.refuse(entry, fault, failed=True)
                continue
            print(f"{number} of {len(self.jobs)}: {entry.title}", flush=True)
            try:
                for job in jobs:
                    answer(job, placement.parts[0], placement.count, self.args, models, stop)
            except Exception as fault:
                self.refuse(entry, fault, failed=True)

    def _read_notes(self, placement: Placement) -> None:
        """What the shards could not ask, once each."""
        for part in placement.parts:
            file = self.args.report / NOTES.format(part)
            told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
            self.refused += [one for note in told if (one := Refused(**note)) not in self.refused]
            file.unlink(missing_ok=True)
        for one in self.refused:
            self.rows.pop((one.label, one.R), None)

    # ------------------------------------------------------------------ the end

    def conclude(self, placement: Placement) -> int:
        """Merge and score every job that is done; how many questions others still owe."""
        waiting = 0
        for entry, jobs in self.jobs.items():
            if entry.row not in self.rows:
                continue
            try:
                found = [(job, conclude(job, placement)) for job in jobs]
                waiting += sum(result.get("missing", 0) for _, result in found)
                if waiting:
                    continue
                for job, result in found:
                    score = result["score"]
                    blocks = None if score is None else measure(job, score)
                    job.forget()
                    self.rows[entry.row].add(job.task.name, result, blocks)
            except Exception as fault:
                self.refuse(entry, fault, failed=True)
        return waiting

    def found(self, taken: float | None) -> dict[str, Any]:
        """All figures."""
        from ..record import provenance

        V, letters = self.wish.letters()
        shape = Shape(letters.L, V, letters.K, letters.F, self.wish.name)
        setting = self.every[0].setting
        model = PUBLISHED_MODEL if self.args.published else model_of(setting.model_name)
        if (None not in {R for _, R in self.rows}) or not next(iter(self.rows.values())).results:
            raise InputError(
                "the unpruned base has no results, so that nothing can be compared; see what was said above"
            )
        rows = records(list(self.rows.values()), self.args.benchmarks, shape, model, self.args.query, self.costs(shape))
        asked = (
            "all questions" if self.args.limit is None else f"the first {self.args.limit} questions of each benchmark"
        )
        facts = {"model": setting.model_name, "title": f"{setting.model_name}, {asked}", "shape": vars(shape)}
        facts["columns"] = {task.name: heading(task.name, self._results(task.name)) for task in self.args.benchmarks}
        facts |= {"limit": self.args.limit, "cores_taken_by_others": None if taken is None else round(taken, 2)}
        return (
            provenance()
            | facts
            | {"settings": flags.resolved(whole(self.args)), "rows": rows, "refused": [_told(r) for r in self.refused]}
        )

    def _results(self, task: str) -> list[Mapping[str, Any]]:
        return [result for row in self.rows.values() for result in row.results.get(task, ())]

    def costs(self, shape: Shape) -> dict[Entry, Cost]:
        """Operations of a prefill and bytes of cache, by arithmetic; not of what depends on the picture."""
        sizes, found = self.wish.sizes(), {}
        for entry in self.entries:
            method = find_method(entry.spec, self.args.query) if entry.spec else None
            if method is None or not varies(method):
                found[entry] = (method.plan(entry.R, shape) if method else Plan()).cost(sizes, TEXT)
        return found


def calibrated(args: Namespace) -> Iterator[Job]:
    """The first benchmark, asked with each method and budget: what a calibration can be made on."""
    task = args.benchmarks[0]
    for R in args.retained_tokens:
        for spec in args.methods:
            if pruning_of(spec, args.query).fitted:
                variant = Entry(spec, R).variant(args)
                yield job_of(variant, task, setting_of(variant, task), args.out / task.name if args.out else None)


def _told(one: Refused) -> dict[str, Any]:
    return {"method": one.label, "R": one.R, "reason": one.reason, "failed": one.failed}


def report(found: dict[str, Any], folder: Path) -> None:
    """Write figures, table and plots; print the table and where they are."""
    files = [folder / "comparison.json", folder / "comparison.md"]
    write_json(found, files[0])
    text = markdown(found)
    write_text(f"`{found['command']}`\n\n{text}\n", files[1])
    files += plot(found, folder)
    print(text)
    for file in files:
        print(f"report: {file}", flush=True)


def whole(args: Namespace) -> Namespace:
    """The flags that ask for all of the comparison, whichever part of it `args` are of."""
    part = {"num_shards": None, "shard": None, "answer_only": False}
    return Namespace(**vars(args) | part | {"benchmarks": [task.name for task in args.benchmarks]})


def prepared(args: Namespace) -> Comparison:
    """The comparison, its thresholds found. All that can be looked at without a model is looked at before one is opened."""
    this = Comparison(args)
    for job in {(job.task, job.split): job for job in this.every}.values():
        job.match() if not args.answer_only else job.check()  # before hours of work, not behind them
    check_folder(args.report, "--report")
    if args.out is not None:
        check_folder(args.out, "--out")
    if args.recorded:
        return this
    later = [job for job in calibrated(args) if wanting(job) is not None]
    able = {entry.R for entry in this.entries} | {job.setting.R for job in later}
    if idle := next((R for R in args.retained_tokens if R not in able), None):
        reason = next(one.reason for one in this.refused if idle == one.R)
        raise InputError(f"-R {idle:g}: none of the methods can do that ({reason}); name another R or other methods")
    foresee(job.setting for job in this.every if not job.done())
    ensure(args.calibrate, later)
    return Comparison(args) if later else this


def run(args: Namespace, argv: Sequence[str], stop: Stop) -> int:
    before = Clock.now()
    this = prepared(args)
    flags.save(whole(args), args.report)
    announce(this.every[-1].setting, this.every[0].data, args.data is not None)
    print(f"{len(args.benchmarks)} benchmarks x {len(this.entries)} settings", flush=True)
    placement = place(args.num_shards, args.shard, os.environ, args.device)
    if args.recorded:
        this.leave_open()
    else:
        this.ask(placement, [sys.executable, "-m", MODULE, *argv], stop)
    if stop:
        return stopped(stop, this.every)
    failed = any(one.failed for one in this.refused)
    if args.answer_only:
        return int(failed)
    if waiting := this.conclude(placement):
        print(f"{waiting} questions are still to be answered by other shards; the one that ends last makes the table")
        return int(failed)
    report(this.found(Clock.now().cores_taken(before)), args.report)
    return int(any(one.failed for one in this.refused))


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda stop: run(parse(argv), argv, stop))


if __name__ == "__main__":
    sys.exit(main())
