"""Every benchmark's own files, written from the test split of the embedded world.

`python -m twigvlm.world.drawn [--out DIR] [--task T]`; the runner calls `ensure` on first use.
The layout is that of LLaVA's eval.zip, so that tasks read these files as they read the real ones; the wording
is what the embedded model was trained on. The same bytes come out every time.

A task's folder appears whole or not at all; `sprout.json` in it says by which code it was written, and other code
writes it again, leaving what else lies there (answers) alone. Pictures are kept once, in `.pictures`, and linked.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import flags
from ..errors import InputError, RunError
from ..files import PART, alone, home, write_json
from ..program import called, run_program
from .benchmarks import gqa, mmbench, mme, mmmu, mmvet, pope, scienceqa, seed, textvqa, vqav2
from .benchmarks.folder import Folder

DEFAULT = home() / "sprout"
STAMP = "sprout.json"
PICTURES, LOCK = ".pictures", ".lock"
HERE = Path(__file__).resolve().parent
SOURCES = sorted([*HERE.glob("*.py"), *HERE.glob("benchmarks/*.py")])

WRITERS: dict[str, Callable[[Folder], None]] = {
    "gqa": gqa.write,
    "MME": mme.write,
    "mmbench": mmbench.write,
    "scienceqa": scienceqa.write,
    "textvqa": textvqa.write,
    "vqav2": vqav2.write,
    "pope": pope.write,
    "mm-vet": mmvet.write,
    "seed_bench": seed.write,
    "mmmu": mmmu.write,
}
FOLDERS = {
    "gqa": "gqa",
    "mme": "MME",
    "mmbench": "mmbench",
    "mmbench_cn": "mmbench",
    "sqa": "scienceqa",
    "textvqa": "textvqa",
    "vqav2": "vqav2",
    "pope": "pope",
    "mmvet": "mm-vet",
    "seed": "seed_bench",
    "mmmu": "mmmu",
}


def ensure(root: Path, task: str | None = None) -> Path:
    """Write what is missing below `root` (all benchmarks, or the one of `task`) and return `root`.

    Several processes may call it at once. InputError for an unknown task and for a folder that holds other
    files of the same names; RunError when the disk refuses.
    """
    if task is not None and task not in FOLDERS:
        raise InputError(f"sprout has no benchmark {task!r}; one of {', '.join(FOLDERS)} is needed")
    root = Path(root)
    folders = dict.fromkeys(FOLDERS.values() if task is None else [FOLDERS[task]])
    if all(_is_current(root / folder) for folder in folders):
        return root
    try:
        with _alone(root):
            for folder in folders:
                if not _is_current(root / folder):
                    _generate(root, folder)
    except OSError as error:
        raise RunError(
            f"{root} cannot be written: {error}; name another folder for the embedded data, here or in TWIGVLM_HOME"
        ) from None
    return root


def version() -> str:
    """Of the code that writes: other code, other version."""
    text = hashlib.sha256()
    for file in SOURCES:
        text.update(file.read_bytes())
    return text.hexdigest()[:16]


def _is_current(folder: Path) -> bool:
    return _stamp(folder).get("version") == version()


def _stamp(folder: Path) -> dict:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _generate(root: Path, folder: str) -> None:
    """Write a folder beside its place, then move it there."""
    build = Path(tempfile.mkdtemp(prefix=f"{PART}{folder}-", dir=root))
    build.chmod(0o777 & ~_umask())
    try:
        files = Folder(build, root / PICTURES)
        files.pictures.mkdir(exist_ok=True)
        WRITERS[folder](files)
        names = sorted(entry.name for entry in build.iterdir())
        target = root / folder
        if not target.exists():
            _write_stamp(build, names)
            with contextlib.suppress(OSError):
                os.rename(build, target)
                return
            if _is_current(target):  # another process was first
                return
        _replace(build, target, names)
    finally:
        shutil.rmtree(build, ignore_errors=True)


def _replace(build: Path, target: Path, names: list[str]) -> None:
    """Exchange what was written here before, entry by entry; the stamp comes last."""
    stamp = _stamp(target)
    foreign = [name for name in names if name not in stamp.get("files", ()) and (target / name).exists()]
    if foreign:
        raise InputError(
            f"{target} holds {', '.join(foreign)}, which the embedded data did not write; name another folder"
        )
    _write_stamp(target, sorted({*stamp.get("files", ()), *names}), written="")
    for name in stamp.get("files", ()):
        _remove(target / name)
    for name in names:
        if name != STAMP:
            os.rename(build / name, target / name)
    _write_stamp(target, names)


def _write_stamp(folder: Path, names: list[str], written: str | None = None) -> None:
    facts = {
        "what": "embedded data of TwigVLM; may be deleted, it is written again",
        "version": version() if written is None else written,
        "files": [name for name in names if name != STAMP],
    }
    write_json(facts, folder / STAMP)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One writer at a time; what killed ones left behind is swept away."""
    root.mkdir(parents=True, exist_ok=True)
    with alone(root / LOCK):
        for rest in [*root.glob(f"{PART}*"), *(root / PICTURES).glob(f"{PART}*")]:
            _remove(rest)
        yield


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=called("twigvlm.world.drawn"), description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=DEFAULT, help="where one folder a benchmark is written (%(default)s)"
    )
    parser.add_argument("--task", choices=sorted(FOLDERS), help="only this one (default: all)")
    arguments = flags.parse(parser, argv)
    return run_program(lambda: _write(arguments))


def _write(arguments: argparse.Namespace) -> None:
    root = ensure(arguments.out, arguments.task)
    for folder in dict.fromkeys(FOLDERS.values() if arguments.task is None else [FOLDERS[arguments.task]]):
        files = [path for path in (root / folder).rglob("*") if path.is_file()]
        print(f"{root / folder}: {len(files)} files")


if __name__ == "__main__":
    sys.exit(main())
