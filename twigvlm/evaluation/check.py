"""Which benchmarks are there, whole or damaged: `python -m twigvlm.evaluation.check --data DIR [--deep] [--json]`.

Reads every question file, looks for every picture and scores a file of dummy answers, so that annotations that
do not fit are found before a run and not after it. A benchmark is complete; or broken, when something of it is
missing or damaged; or present, when there is no more than the question file that LLaVA's eval.zip brings; or absent.
Exit code 1 if something is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import flags
from ..errors import InputError
from ..files import is_file
from ..program import called, run_program
from .asking.setting import REAL_DATA
from .tasks import TASKS
from .tasks.base import Question, Source, Task

ABSENT, PRESENT, COMPLETE, BROKEN = "absent", "present", "complete", "broken"
SAMPLE = 3  # names of missing pictures that are shown
DUMMY = "No"  # an answer that every scorer takes


@dataclass
class Finding:
    """What was found of one split; `problems` are whole sentences that name the file."""

    split: str
    status: str = COMPLETE
    questions: int = 0
    pictures: int = 0
    missing: int = 0
    damaged: int = 0
    problems: list[str] = field(default_factory=list)
    doubts: dict[str, int] = field(default_factory=dict)

    def fault(self, problem: str) -> None:
        self.status = BROKEN
        self.problems.append(problem)

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "split"}


def check(root: Path, tasks: Sequence[str] | None = None, deep: bool = False) -> dict[str, list[Finding]]:
    """Task → findings by split. InputError when `root` is no folder."""
    if not root.is_dir():
        raise InputError(f"{root} is no folder; give the one that holds one folder a benchmark")
    return {name: check_task(TASKS[name], root, deep) for name in tasks or TASKS}


def check_task(task: Task, root: Path, deep: bool = False) -> list[Finding]:
    places = {split: _needed(task, root, split) for split in task.splits}
    findings = []
    for split, needed in places.items():
        shared = {path for other, paths in places.items() if other != split for path in paths.values()}
        own = [path for path in needed.values() if path not in shared]
        there = any(path.exists() for path in own)
        findings.append(_check_split(task, root, split, deep) if there else Finding(split, ABSENT))
    first = task.splits[0]
    if all(f.status == ABSENT for f in findings) and any(path.exists() for path in places[first].values()):
        findings[0] = _check_split(task, root, first, deep)
    return findings


def status_of(findings: Sequence[Finding]) -> str:
    """Of a task: broken if a split is, else complete if one is, else present if one is, else absent."""
    found = {finding.status for finding in findings}
    return next(status for status in (BROKEN, COMPLETE, PRESENT, ABSENT) if status in found)


def _needed(task: Task, root: Path, split: str) -> dict[str, Path]:
    """Role → path, without the benchmark's own folder, which says nothing."""
    files = {role: Path(os.path.normpath(path)) for role, path in task.files(root, split).items()}
    return {role: path for role, path in files.items() if path.parent != Path(os.path.normpath(root))}


def _check_split(task: Task, root: Path, split: str, deep: bool) -> Finding:
    finding = Finding(split)
    for role, path in _needed(task, root, split).items():
        if not path.exists():
            finding.fault(f"{role}: {path} is missing")
        elif _is_empty(path):
            finding.fault(f"{role}: {path} is empty")
    if not task.files(root, split)["questions"].exists():
        return finding
    try:
        questions = task.questions(root, split)
    except InputError as error:
        finding.fault(f"questions: {error}")
        return finding
    finding.questions = len(questions)
    rest = [path for role, path in _needed(task, root, split).items() if role in ("images", "annotations")]
    rest = [path for path in rest if path != task.files(root, split)["questions"]]
    if rest and not any(path.exists() for path in rest):
        finding.status = PRESENT
        return finding
    if not questions:
        finding.fault(f"questions: {task.files(root, split)['questions']} holds none")
        return finding
    _check_pictures(finding, f"{task.name} {split}", questions, deep)
    _check_truth(finding, task, root, split, questions)
    return finding


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else not path.stat().st_size


def _check_pictures(finding: Finding, label: str, questions: Sequence[Question], deep: bool) -> None:
    pictures = list(dict.fromkeys(image for question in questions for image in question.images))
    finding.pictures = len(pictures)
    bar = {"desc": f"{label}: pictures", "leave": False, "disable": None, "delay": 1}
    missing = [p for p in tqdm(pictures, **bar) if isinstance(p, Path) and not (is_file(p) and p.stat().st_size)]
    finding.missing = len(missing)
    if missing:
        finding.fault(f"{len(missing)} of {len(pictures)} pictures missing or empty: {_sample(missing)}")
    if not deep:
        return
    gone = set(missing)
    there = [picture for picture in pictures if picture not in gone]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar["desc"] = f"{label}: opening"
        refused = [why for why in tqdm(pool.map(_refusal, there), total=len(there), **bar) if why]
    finding.damaged = len(refused)
    if refused:
        more = ", …" if len(refused) > SAMPLE else ""
        finding.fault(
            f"{len(refused)} of {len(pictures)} pictures cannot be opened: {', '.join(refused[:SAMPLE])}{more}"
        )


def _refusal(picture: Path | bytes) -> str | None:
    """Why a picture cannot be asked about."""
    from ..prompt.images import open_image

    try:
        open_image(picture)
    except InputError as fault:
        return str(fault)
    return None


def _sample(pictures: Sequence[Path]) -> str:
    return ", ".join(map(str, pictures[:SAMPLE])) + (", …" if len(pictures) > SAMPLE else "")


def _check_truth(finding: Finding, task: Task, root: Path, split: str, questions: Sequence[Question]) -> None:
    """Score dummy answers to all questions; what the scorer refuses, annotations lack."""
    files = task.files(root, split)
    truth = files.get("annotations")
    if truth is None or not truth.exists():
        return
    lines = [{"question_id": q.id, "prompt": q.prompt, "text": DUMMY, "metadata": {}, **q.line} for q in questions]
    try:
        asked, known = task.read_questions(files["questions"]), task.read_truth(truth, files["questions"])
        said = Source(Path("answers to all questions"), lines)
        finding.doubts = dict(task.score_records(asked, known, said).doubts)
    except InputError as error:
        finding.fault(f"annotations: {truth}: {error}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=called("twigvlm.evaluation.check"), description="Which benchmarks are there, whole or damaged."
    )
    parser.add_argument("--data", type=Path, default=REAL_DATA, help="holds one folder a benchmark (%(default)s)")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this one; may be given again")
    parser.add_argument("--deep", action="store_true", help="also open every picture")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = flags.parse(parser, argv)
    return run_program(lambda: _print_check(arguments))


def _print_check(arguments: argparse.Namespace) -> int:
    found = check(arguments.data, arguments.task, arguments.deep)
    if arguments.json:
        tasks = {
            name: {
                "status": status_of(findings),
                "problems": [problem for finding in findings for problem in finding.problems],
                "splits": {finding.split: finding.as_json() for finding in findings},
            }
            for name, findings in found.items()
        }
        print(json.dumps({"data": str(arguments.data), "tasks": tasks}, indent=1, ensure_ascii=False))
    else:
        print("\n".join(_report(found)))
    return int(any(status_of(findings) == BROKEN for findings in found.values()))


def _report(found: dict[str, list[Finding]]) -> list[str]:
    lines = []
    for name, findings in found.items():
        shown = [finding for finding in findings if finding.status != ABSENT]
        if not shown:
            lines.append(f"{name:11}{ABSENT}")
        for finding in shown:
            counts = f"{finding.questions:,} questions, {finding.pictures:,} pictures"
            lines.append(f"{name:11}{finding.status:10}{finding.split}: {counts}")
            lines += [f"{'':21}{problem}" for problem in finding.problems]
            if finding.doubts:
                doubts = ", ".join(f"{what} {number:,}" for what, number in finding.doubts.items())
                lines.append(f"{'':21}doubtful: {doubts}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
