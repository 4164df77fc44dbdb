"""The benchmarks, by the name of their script. Standard library only: a score needs no torch."""

from __future__ import annotations

from ...errors import InputError
from .base import Task
from .gqa import GQA
from .mmbench import MMBench, MMBenchCN
from .mme import MME
from .mmmu import MMMU
from .mmvet import MMVet
from .pope import POPE
from .seed import SEED
from .sqa import SQA
from .textvqa import TextVQA
from .vqa import VQA
from .vqav2 import VQAv2

TASKS: dict[str, Task] = {
    "gqa": GQA(),
    "mme": MME(),
    "mmbench": MMBench(),
    "mmbench_cn": MMBenchCN(),
    "sqa": SQA(),
    "textvqa": TextVQA(),
    "vqav2": VQAv2(),
    "pope": POPE(),
    "mmvet": MMVet(),
    "mmmu": MMMU(),
    "seed": SEED(),
}
OWN: dict[str, Task] = {"vqa": VQA()}  # no benchmark: whoever asks gives the files
ALIASES = {alias: name for name, task in TASKS.items() for alias in task.aliases}


def find(name: str) -> Task:
    """The benchmark of that name; InputError lists what there is."""
    task = (TASKS | OWN).get(ALIASES.get(name, name))
    if task is None:
        raise InputError(f"no benchmark {name!r}; there are {', '.join(TASKS)} (and {', '.join((*OWN, *ALIASES))})")
    return task
