"""DeepSpeed's configuration file: read, checked against the run, its "auto" sizes filled in.

What is "auto" there is filled in with what the run has; what is not must agree with it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...files import check_regular, json_fault, not_text

if TYPE_CHECKING:
    from ..settings import Settings

AUTO, CLIPPING = "auto", "gradient_clipping"
ZERO, OFFLOADS, PLACES = "zero_optimization", ("offload_optimizer", "offload_param"), ("cpu", "nvme", "none")
OPTIMIZER, OPTIMIZERS, HALVES = "optimizer", ("AdamW", "Adam"), ("bf16", "fp16")
EPSILON = 1e-8  # AdamW's
AMP, SCHEDULER = "amp", "scheduler"
BATCH, ROWS, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
_KNOWN = """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
    compression_training csv_monitor curriculum_learning data_efficiency data_parallel_size data_types dataloader_drop_last
    datastates_ckpt ddp_bf16 disable_allgather disable_python_gc dump_state eigenvalue elasticity expert_parallel
    flops_profiler fp16 fp32_allreduce gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor graph_harvesting hybrid_engine log_level managed_gradient_accumulation memory_breakdown msamp
    nebula optimizer pipeline prescale_gradients progressive_layer_drop quantize_training scheduler
    seq_parallel_communication_data_type sequence_parallel_size sparse_attention sparse_gradients steps_per_print
    tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
KNOWN = frozenset(_KNOWN.split())  # DeepSpeed's own, of earlier versions too; it passes over all others without a word


def read_zero(file: Path) -> dict[str, Any]:
    """The configuration as it is written, without parts that are null or off.

    Raises InputError for what is no JSON object, has parts of another shape, or ones that nothing here trains with.
    """
    check_regular(file)
    try:
        data = file.read_bytes()
        if other := not_text(data[:8]):
            raise InputError(f"{file}: is {other[0]}, not JSON in UTF-8; {other[1]}")
        found = json.loads(data.decode("utf-8-sig"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else json_fault(fault)
        raise InputError(f"{file}: not a DeepSpeed configuration, which is JSON ({why}); repair it") from fault
    if not isinstance(found, dict):
        raise InputError(f"{file}: a JSON object is expected, found {type(found).__name__}; repair it")
    _drop_nulls(found)
    _check_names(file, found)
    _check_zero(file, found)
    for name in HALVES:
        _object(file, found, name, 'an object with "enabled"')
    if _object(file, found, AMP, 'an object with "enabled"').get("enabled", AUTO) not in (False, AUTO):
        raise InputError(
            f'{file}: "{AMP}" is enabled, but nothing here trains with it; take it out (--precision decides)'
        )
    found.pop(AMP, None)
    _check_optimizer(file, found)
    return found


def _drop_nulls(found: dict[str, Any]) -> None:
    """A part that may be left out is left out by null as well."""
    for whole, names in ((found, (*HALVES, AMP, SCHEDULER)), (found.get(ZERO), OFFLOADS)):
        for name in names if isinstance(whole, dict) else ():
            if name in whole and whole[name] is None:
                del whole[name]


def _check_names(file: Path, found: dict[str, Any]) -> None:
    if (name := next((name for name in found if name not in KNOWN), None)) is not None:
        near = difflib.get_close_matches(name, sorted(KNOWN), 1)
        meant = f"write {near[0]}, or take it out" if near else "take it out"
        raise InputError(f'{file}: DeepSpeed knows no "{name}"; {meant}')


def _check_zero(file: Path, found: dict[str, Any]) -> None:
    part = _object(file, found, ZERO, 'an object with a "stage" from 0 to 3')
    if part.get("stage", 0) not in (0, 1, 2, 3) or isinstance(part.get("stage"), bool):
        raise InputError(f'{file}: "{ZERO}" is {part!r}; an object with a "stage" from 0 to 3 is expected')
    for name in OFFLOADS:
        offload = _object(file, part, name, f'an object with a "device", one of {", ".join(PLACES)},')
        if offload.get("device", PLACES[0]) not in PLACES:
            raise InputError(
                f"{file}: {ZERO}.{name}.device is {offload['device']!r}; one of {', '.join(PLACES)} is needed"
            )


def _check_optimizer(file: Path, found: dict[str, Any]) -> None:
    """Its type is written as here afterwards: DeepSpeed knows it in any case."""
    optimizer = _object(file, found, OPTIMIZER, 'an object with "type" and "params"')
    if OPTIMIZER in found:
        known = {name.lower(): name for name in OPTIMIZERS}
        kind = known.get(str(optimizer.get("type")).lower())
        if kind is None:
            raise InputError(
                f"{file}: {OPTIMIZER}.type is {optimizer.get('type')!r}; {' or '.join(OPTIMIZERS)} is needed, or no such part"
            )
        optimizer["type"] = kind
    _object(file, optimizer, "params", "an object", of=f"{OPTIMIZER}.")


def _object(file: Path, whole: dict[str, Any], name: str, wanted: str, of: str = "") -> dict[str, Any]:
    """A part of the configuration, an empty one where it is not there."""
    part = whole.get(name, {})
    if not isinstance(part, dict):
        raise InputError(f'{file}: "{of}{name}" is {part!r}; {wanted} is expected')
    return part


def stage_of(config: dict[str, Any]) -> int:
    return config.get(ZERO, {}).get("stage", 0)


def has_open_scheduler(config: dict[str, Any]) -> bool:
    """Whether its scheduler, as LLaVA's own files have one, leaves all to the run: then --schedule takes its place."""
    scheduler = config.get(SCHEDULER)
    params = scheduler.get("params") if isinstance(scheduler, dict) else None
    return isinstance(params, dict) and bool(params) and all(value == AUTO for value in params.values())


def settle(
    file: Path, width: int, rows: int, accumulation: int, processes: int, settings: Settings, half: bool
) -> dict:
    """The configuration for a run: rows x accumulation x processes = batch, on a model of this width, in bf16 or not.

    Raises InputError for a file that fixes what the run has otherwise.
    """
    config = read_zero(file)
    part = config.get(ZERO, {})
    shares = f"{rows} samples x {accumulation} accumulation x {processes} processes"
    batch = {ROWS: rows, ACCUMULATION: accumulation, BATCH: rows * accumulation * processes}
    _fill(file, config, batch, shares, ", or give --batch-size and --per-device-batch that fit")
    _fill(file, config, {CLIPPING: settings.max_grad_norm}, "--max-grad-norm")
    config.setdefault("bf16", {})
    for name, on in zip(HALVES, (half, False), strict=True):  # nothing here trains in fp16
        if name in config:
            _fill(file, config[name], {"enabled": on}, "--precision, or what the device computes in", of=f"{name}.")
    wanted = {"lr": settings.lr, "betas": list(settings.betas), "weight_decay": settings.weight_decay, "eps": EPSILON}
    if OPTIMIZER in config:  # whatever it leaves out would be DeepSpeed's own
        _fill(file, config[OPTIMIZER].setdefault("params", {}), wanted, "its flags")
    if has_open_scheduler(config):
        del config[SCHEDULER]
    if SCHEDULER in config:
        raise InputError(f'{file}: "{SCHEDULER}": the learning rate is --schedule\'s here; take it out')
    sizes = {
        "reduce_bucket_size": width * width,
        "allgather_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    for name, size in sizes.items():
        if part.get(name) == AUTO:
            part[name] = size
    if left := next(_left(config), None):
        raise InputError(f'{file}: {left} is "auto", which nothing here fills in; write a value')
    return config


def _left(part: Any, name: str = "") -> Iterator[str]:
    """What is still "auto", by its name with those above it."""
    if part == AUTO:
        yield name
    for key, value in part.items() if isinstance(part, dict) else ():
        yield from _left(value, f"{name}.{key}" if name else key)


def _fill(file: Path, part: dict, wanted: dict, source: str, other: str = "", of: str = "") -> None:
    for name, value in wanted.items():
        if part.get(name, AUTO) not in (AUTO, value):
            raise InputError(
                f'{file}: {of}{name} is {part[name]!r}, and this run has {value} ({source}); write "auto" there{other}'
            )
        part[name] = value
