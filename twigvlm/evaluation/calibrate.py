"""Find thresholds for a method whose budget depends on picture and question: `python -m twigvlm.evaluation.calibrate --pruning mustdrop -R 64`.

They are fitted so that, on questions of a benchmark (`--task`, evenly drawn from it), R visual tokens enter a layer on
average, and are kept as JSON with what was measured: every later run of that method, R and base finds them. A
calibration that is there is made anew. The last line of stdout is one JSON object with --json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import flags
from ..processes import guarded
from ..program import called, print_json
from .asking.calibration import calibrate, said
from .run import add_options, announce, job_of, setting_of
from .suite import MAIN
from .tasks import ALIASES, TASKS, find

QUESTIONS = 64


def make_parser() -> argparse.ArgumentParser:
    writing = flags.writing(max_new_tokens=None, seed=0)
    parser = flags.parser(called("twigvlm.evaluation.calibrate"), __doc__, flags.model(), writing)
    parser.add_argument(
        "--task", default=MAIN[0], choices=(*TASKS, *ALIASES), metavar="T",
        help="whose questions are asked (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--split", metavar="S", help="of the benchmark (default: the first whose files are there)")
    parser.add_argument("--baseline", action="store_true", help="load no twig")
    parser.add_argument("--json", action="store_true", help="end with the JSON line on a terminal too")
    add_options(parser)
    flags.add_switches(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    task = find(args.task)
    setting = setting_of(args, task)
    job = job_of(args, task, setting, args.out, args.split)
    announce(setting, job.data, args.data is not None)
    facts, file = calibrate(job, QUESTIONS if args.calibrate is None else args.calibrate)
    print(f"{said(facts)}\ncalibration: {file}")
    print_json(facts, args.json)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(lambda stop: run(flags.parse(make_parser(), argv)))


if __name__ == "__main__":
    sys.exit(main())
