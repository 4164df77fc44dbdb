"""A local task for lmms-eval from a POPE folder as LLaVA lays it out: `python -m twigvlm.evaluation.lmms.task OUT [--pope DIR]`.

Without --pope it is the embedded world's, so that the plug-in (plugin.py) can be tried without the hub.
Questions, suffix and metrics are those of lmms-eval's own task; only the pictures and labels come from the
folder. Needs `datasets` and an installed lmms-eval (docs/lmms-eval.md), both imported when used.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from ... import flags
from ...errors import InputError, RunError
from ...program import called, run_program
from ..tasks import TASKS
from ..tasks.reading import write_whole

DATA = "data"  # below the task's folder, beside its YAML file
BENCHMARK = next(task for task in TASKS.values() if task.lmms_task)
NAME = f"sprout_{BENCHMARK.name}"
HINT = "docs/lmms-eval.md says how to install lmms-eval and what it needs"


def write_task(out: Path, folder: Path | None = None, name: str = NAME) -> Path:
    """Write `out`/<name>.yaml and its data; what is there under these names is replaced. Returns the YAML file.

    `folder` holds the benchmark's files in LLaVA's layout; None is the embedded world's, written on first use.
    InputError for missing or damaged files and for what is not installed, RunError when the disk refuses.
    """
    datasets = _datasets()
    shipped = _shipped()
    if folder is None:
        from ...world.drawn import DEFAULT, ensure

        folder = ensure(DEFAULT, BENCHMARK.name) / BENCHMARK.folder
    rows = list(BENCHMARK.lmms_rows(folder))
    text = datasets.Value("string")
    features = datasets.Features({"question_id": text, "question": text, "answer": text, "category": text, "image": datasets.Image()})  # fmt: skip
    try:
        whole = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows, features=features)})
        whole.save_to_disk(out / DATA)
        facts = {"include": str(shipped), "task": name, "dataset_path": str((out / DATA).resolve())}
        facts["dataset_kwargs"] = {"load_from_disk": True}
        write_whole(out / f"{name}.yaml", json.dumps(facts, indent=1) + "\n")  # JSON is YAML
    except OSError as fault:
        raise RunError(f"{out} cannot be written ({fault}); name another folder") from fault
    return out / f"{name}.yaml"


def _datasets():
    try:
        import datasets
    except ImportError as fault:
        raise InputError(f"the package datasets is not installed ({fault}); {HINT}") from fault
    datasets.disable_progress_bars()
    return datasets


def _shipped() -> Path:
    """lmms-eval's own task, found without importing anything of it."""
    package = importlib.util.find_spec("lmms_eval")
    if package is None or not package.submodule_search_locations:
        raise InputError(f"lmms-eval is not installed; {HINT}")
    file = Path(package.submodule_search_locations[0]) / "tasks" / BENCHMARK.lmms_task
    if not file.is_file():
        raise InputError(f"{file}: lmms-eval ships no such task any more; version 0.7.3 does")
    return file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=called("twigvlm.evaluation.lmms.task"),
        description="Write a local task for lmms-eval from a benchmark's files.",
    )
    parser.add_argument("out", type=Path, help="folder for the task; give it to lmms-eval as --include_path")
    parser.add_argument(
        f"--{BENCHMARK.name}", dest="folder", type=Path,
        help="folder with labels and pictures as LLaVA lays them out (default: the embedded world's)",
    )  # fmt: skip
    parser.add_argument("--name", default=NAME, help="of the task (%(default)s)")
    arguments = flags.parse(parser, argv)

    def body() -> None:
        file = write_task(arguments.out, arguments.folder, arguments.name)
        print(f"{file}: --include_path {arguments.out} --tasks {arguments.name}")

    return run_program(body)


if __name__ == "__main__":
    sys.exit(main())
