"""DeepSpeed's configuration file: read, checked against the run, its "auto" sizes filled in.

The Trainer fills in what it knows (batch, precision, clipping); sizes that follow from the model's
width it looks for in a configuration that a twig in training does not have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError

AUTO = "auto"
BATCH, ROWS, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def read_zero(file: Path) -> dict[str, Any]:
    """The configuration as it is written. Raises InputError for what is no JSON object, or has no stage."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as fault:
        raise InputError(f"{file}: not a DeepSpeed configuration, which is JSON ({fault}); repair it") from fault
    if not isinstance(found, dict):
        raise InputError(f"{file}: a JSON object is expected, found {type(found).__name__}; repair it")
    part = found.get("zero_optimization", {})
    if not isinstance(part, dict) or part.get("stage", 0) not in (0, 1, 2, 3) or isinstance(part.get("stage"), bool):
        raise InputError(f'{file}: "zero_optimization" is {part!r}; an object with a "stage" from 0 to 3 is expected')
    return found


def stage_of(config: dict[str, Any]) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def settle(file: Path, width: int, rows: int, accumulation: int, processes: int) -> dict[str, Any]:
    """The configuration for a run: rows x accumulation x processes = batch, on a model of this width.

    Raises InputError for a file that fixes another batch.
    """
    config = read_zero(file)
    wanted = {ROWS: rows, ACCUMULATION: accumulation, BATCH: rows * accumulation * processes}
    for name, value in wanted.items():
        if config.get(name, AUTO) not in (AUTO, value):
            raise InputError(
                f"{file}: {name} is {config[name]!r}, and this run has {value} ({rows} samples x {accumulation} "
                f'accumulation x {processes} processes); write "auto" there, or give --batch-size and --per-device-batch that fit'
            )
        config[name] = value
    part = config.get("zero_optimization", {})
    sizes = {
        "reduce_bucket_size": width * width,
        "allgather_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    for name, size in sizes.items():
        if part.get(name) == AUTO:
            part[name] = size
    left = [name for name, value in part.items() if value == AUTO]
    if left:
        raise InputError(f'{file}: zero_optimization.{left[0]} is "auto", which nothing here fills in; write a value')
    return config
