"""DeepSpeed's configuration file: read, checked against the run, its "auto" sizes filled in.

What is "auto" there is filled in with what the run has; what is not must agree with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError

if TYPE_CHECKING:
    from ..settings import Settings

AUTO, CLIPPING = "auto", "gradient_clipping"
EPSILON = 1e-8  # AdamW's
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


def settle(
    file: Path, width: int, rows: int, accumulation: int, processes: int, settings: Settings, half: bool
) -> dict:
    """The configuration for a run: rows x accumulation x processes = batch, on a model of this width, in bf16 or not.

    Raises InputError for a file that fixes what the run has otherwise.
    """
    config = read_zero(file)
    part, optimizer = config.get("zero_optimization", {}), config.get("optimizer", {}).get("params", {})
    shares = f"{rows} samples x {accumulation} accumulation x {processes} processes"
    batch = {ROWS: rows, ACCUMULATION: accumulation, BATCH: rows * accumulation * processes}
    _fill(file, config, batch, shares, ", or give --batch-size and --per-device-batch that fit")
    _fill(file, config, {CLIPPING: settings.max_grad_norm}, "--max-grad-norm")
    _fill(file, config.setdefault("bf16", {}), {"enabled": half}, "--precision, or what the device computes in")
    wanted = {"lr": settings.lr, "betas": list(settings.betas), "weight_decay": settings.weight_decay, "eps": EPSILON}
    _fill(file, optimizer, {k: v for k, v in wanted.items() if k in optimizer}, "its flags")
    if "scheduler" in config:
        raise InputError(f'{file}: "scheduler": the learning rate is --schedule\'s here; take it out')
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


def _fill(file: Path, part: dict, wanted: dict, source: str, other: str = "") -> None:
    for name, value in wanted.items():
        if part.get(name, AUTO) not in (AUTO, value):
            raise InputError(
                f'{file}: {name} is {part[name]!r}, and this run has {value} ({source}); write "auto" there{other}'
            )
        part[name] = value
