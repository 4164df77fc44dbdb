"""Score answer files without a model: `python -m twigvlm.evaluation.score`.

Reads questions, annotations and answers as the benchmark's own files are, prints the number that its official
scorer prints, and beside it what that scorer passes over. Needs neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import flags
from ..errors import InputError
from ..files import check_regular, is_file
from ..program import called, run_program
from .tasks import ALIASES, OWN, TASKS, find
from .tasks.base import Score, Source, Task
from .tasks.reading import write_whole

LONG = 40  # entries of a part that a table for people does not list


def main(argv: Sequence[str] | None = None) -> int:
    args = flags.parse(_arguments(), argv)
    return run_program(lambda: _print_score(args))


def _print_score(args: argparse.Namespace) -> None:
    task = find(args.task)
    asked, truth, said = _read(task, args)
    score = task.score_records(asked, truth, said, args.strict)
    if args.per_question:
        write_whole(args.per_question, json.dumps(score.per_question, ensure_ascii=False) + "\n")
        print(f"per question: {args.per_question}", file=sys.stderr)
    print(json.dumps(_facts(task, score)) if args.json else "\n".join(_lines(task, score)), flush=True)
    if args.export:  # last: a score is worth having without it
        written = task.upload(task.upload_questions(asked), truth, said, args.export)
        if written is None:
            raise InputError(f"--export: nothing is uploaded for {task.name}; its tools take the answers as they are")
        print(f"upload file: {written}", file=sys.stderr)


def _facts(task: Task, score: Score) -> dict[str, Any]:
    """One JSON object of sums; what lists single questions goes to a file (--per-question)."""
    facts = {"task": task.name, "score": score.score, "metric": score.metric or task.metric, **score.sums}
    return facts | {"doubts": dict(score.doubts), "note": score.note}


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=called("twigvlm.evaluation.score"),
        description="Score an answer file as the benchmark's official scorer does.",
        allow_abbrev=False,
    )
    say = parser.add_argument
    say("--task", required=True, metavar="T", help=f"benchmark: {', '.join((*TASKS, *OWN, *ALIASES))}")
    say(
        "--questions",
        "--question-file",
        dest="questions",
        required=True,
        type=Path,
        metavar="Q",
        help="the question file",
    )
    say("--annotations", type=Path, metavar="A", help="file or folder with the truth; not where it is on a server")
    say(
        "--answers",
        "--answers-file",
        dest="answers",
        required=True,
        type=Path,
        metavar="P",
        help="the answers: JSON lines as LLaVA writes them",
    )
    say("--split", metavar="S", help="split of the benchmark that the files belong to; default: whichever they fit")
    say("--strict", action="store_true", help="refuse missing, duplicate, foreign, shifted answers instead of counting")
    say("--json", action="store_true", help="print one JSON object: score, parts, doubts, note")
    say("--per-question", type=Path, metavar="FILE", help="also write what the score says of single questions, as JSON")
    say(
        "--export",
        type=Path,
        metavar="FILE",
        help="also write what the benchmark's server or tools take (MME: a folder)",
    )
    return parser


def _read(task: Task, args: argparse.Namespace) -> tuple[Source, Source | None, Source]:
    """Questions, truth and answers in the files that were given."""
    if args.split is not None and args.split not in task.splits:
        raise InputError(f"--split {args.split}: {task.name} has {', '.join(task.splits)}")
    for flag, path in (("--questions", args.questions), ("--answers", args.answers)):
        check_regular(path)
        if not is_file(path):
            raise InputError(f"{flag} {path}: no such file")
    if args.annotations is not None and not args.annotations.exists():
        raise InputError(f"--annotations {args.annotations}: no such file or folder")
    truth = task.read_truth(args.annotations, args.questions)
    return task.read_questions(args.questions), truth, task.read_answers(args.answers)


def _lines(task: Task, score: Score) -> Iterator[str]:
    """For people: the score, parts that are short, doubts."""
    value = "-" if score.score is None else f"{score.score:.2f}"
    yield f"{task.title}: {value} ({score.metric or task.metric})"
    if "printed" in score.parts:
        printed = score.parts["printed"]
        yield from (f"  {line}".rstrip() for line in ([printed] if isinstance(printed, str) else printed))
    else:
        parts = {name: part for name, part in score.sums.items() if not _again(part, score.sums)}
        yield from (f"  {name}: {number}" for name, number in _numbers(parts))
    yield from (f"doubt: {count} {name}" for name, count in score.doubts.items())
    if score.note:
        yield f"note: {score.note}"


def _again(part: Any, parts: Mapping[str, Any]) -> bool:
    """Whether a group only repeats what the parts hold."""
    return isinstance(part, Mapping) and all(name in parts and parts[name] == value for name, value in part.items())


def _numbers(parts: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    for name, part in parts.items():
        if isinstance(part, Mapping) and len(part) <= LONG:
            yield from _numbers(part, (*path, str(name)))
        elif isinstance(part, (int, float)):
            yield " / ".join((*path, str(name))), f"{part:.2f}" if isinstance(part, float) else str(part)


if __name__ == "__main__":
    sys.exit(main())
