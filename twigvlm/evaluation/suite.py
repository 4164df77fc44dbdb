"""All benchmarks under all settings of the paper, then the table: `python -m twigvlm.evaluation.suite -R 192,128,64`.

The settings: the base alone; pruning and drafts (TTP+SSD) at every budget; pruning alone at the
smallest; drafts alone. The model is opened once for the base and once with its twig. Everything that
`python -m twigvlm.evaluation.run` says about shards, stopping and going on holds here too.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from .. import flags
from ..errors import InputError
from ..processes import Stop, guarded
from ..program import called, print_json
from .asking.job import Job
from .run import MODULE as RUN
from .run import add_options, announce, carry_out, job_of, setting_of, stopped
from .table import FORMATS, Table, collect, plot
from .tasks import OWN, TASKS, find
from .tasks.base import Task

MODULE = "twigvlm.evaluation.suite"
MAIN = tuple(name for name, task in TASKS.items() if task.in_suite)
BUDGETS = "192,128,64"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    writing = flags.writing(leave=("retained_tokens",), max_new_tokens=None, seed=0)
    parser = flags.parser(called(MODULE), __doc__, flags.model(), writing)
    parser.add_argument(
        "-R", "--retained-tokens", type=flags.budgets_of, default=flags.budgets_of(BUDGETS), metavar="R,R,…",
        help=f"averages of visual tokens kept per layer (default {BUDGETS})",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", type=benchmarks_of, default=benchmarks_of(",".join(MAIN)), metavar="T,T,…",
        help=f"benchmarks, or 'all' (default {','.join(MAIN)})",
    )  # fmt: skip
    parser.add_argument("--baseline", action="store_true", help="the base alone")
    flags.add_switches(parser)
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="of the table (default markdown)")
    parser.add_argument("--published", action="store_true", help="with the paper's rows, marked as such")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw accuracy against R and against speed")
    add_options(parser)
    return flags.parse(parser, argv)


def benchmarks_of(text: str) -> list[Task]:
    """`gqa,mme`, or `all`, as benchmarks."""
    names = list(TASKS) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    if own := [name for name in names if name in OWN]:
        raise argparse.ArgumentTypeError(f"{own[0]} is no benchmark; ask your own questions with {RUN} --task {own[0]}")
    try:
        found = [find(name) for name in names]
    except InputError as fault:
        raise argparse.ArgumentTypeError(str(fault)) from None
    if not found:
        raise argparse.ArgumentTypeError(f"no benchmark given; {','.join(MAIN)}, say")
    return list(dict.fromkeys(found))


def variants(args: argparse.Namespace) -> list[Namespace]:
    """The flags of one `run` per setting, in the order of the table."""
    R = args.retained_tokens
    every = [
        {"baseline": True},
        *({"retained_tokens": r} for r in R),
        {"retained_tokens": min(R), "no_speculation": True},
        {"no_pruning": True},
    ]
    if args.baseline:
        every = every[:1]
    if args.no_pruning:
        every = [v for v in every if "retained_tokens" not in v]
    if args.no_speculation:
        every = [v for v in every if v.get("baseline") or v.get("no_speculation")]
    plain = {"retained_tokens": min(R), "no_pruning": False, "no_speculation": False, "baseline": False}
    return [Namespace(**(vars(args) | plain | v)) for v in every]


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Setting by setting, so that the model changes once."""
    return [
        job_of(variant, task, setting_of(variant, task), args.out / task.name if args.out else None)
        for variant in variants(args)
        for task in args.tasks
    ]


def run(args: argparse.Namespace, argv: Sequence[str], stop: Stop) -> int:
    jobs = jobs_of(args)
    announce(jobs[-1].setting, jobs[0].data, args.data is not None)
    for job in jobs:
        job.check()  # before hours of work, not in their middle
    print(f"{len(args.tasks)} benchmarks x {len(jobs) // len(args.tasks)} settings", flush=True)
    results = carry_out(jobs, args, [sys.executable, "-m", MODULE, *argv], stop)
    if stop and len(results) < len(jobs):
        return stopped(stop, jobs)
    if args.answer_only:
        return 0
    if waiting := [r for r in results if "missing" in r]:
        print_json({"missing": sum(r["missing"] for r in waiting), "note": waiting[0]["note"]}, False)
        return 0
    table = Table(collect(results), published=args.published)
    if args.plots:
        plot(table, args.plots)
    print(table.render(args.format), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda stop: run(parse(argv), argv, stop))


if __name__ == "__main__":
    sys.exit(main())
