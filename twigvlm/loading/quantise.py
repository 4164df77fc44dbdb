"""Weights in 8 or 4 bits, rounded by torchao one matrix at a time while they are read: no model is ever held whole.

Linear layers of decoder layers are rounded; embeddings, norms, heads, tower and projector are not. The package is
imported where it is needed: docs/quantisation.md.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import nn

from ..config import ModelSettings
from ..errors import InputError
from ..model.packed import PackedLinear, sample

GROUP = 64  # numbers that share a scale in 4 bits, at most; in 8 bits it is a row of the weight
KERNEL_GROUPS = (64, 32)  # that the 4-bit kernel on CUDA takes, nearest to GROUP first
KERNEL_CAPABILITY = (8, 0)


def check_quantisation(settings: ModelSettings, has_twig: bool) -> None:
    """Raise InputError for what cannot be rounded, or where the package for it is not installed."""
    asked = [name for name in ("load_8bit", "load_4bit", "draft_8bit") if getattr(settings, name)]
    if settings.draft_8bit and not has_twig:
        raise InputError("draft_8bit is asked for, but there is no twig to round; give twig=, or leave it away")
    if asked and importlib.util.find_spec("torchao") is None:
        raise InputError(f'{asked[0]} needs the package torchao, which is not installed: pip install "twigvlm[quant]"')


def prepare(layers: nn.Module, bits: int, device: torch.device, dtype: torch.dtype) -> None:
    """Put packed layers in place of linear ones, whose weights are still to come: a place's `receive` rounds what it is given."""
    for owner in list(layers.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is nn.Linear:
                packed = PackedLinear(child, bits if child.in_features % 2 == 0 else 8)
                packed.weight.receive = functools.partial(_take, packed, device, dtype)
                setattr(owner, name, packed)


def quantise(layers: nn.Module, bits: int) -> None:
    """Round the linear layers of what is loaded already."""
    weights = {name: p for name, p in layers.named_parameters() if p.dim() == 2}
    one = next(iter(weights.values()))
    prepare(layers, bits, one.device, one.dtype)
    for name, place in list(layers.named_parameters()):
        if hasattr(place, "receive"):
            place.receive(weights.pop(name))


def _take(packed: PackedLinear, device: torch.device, dtype: torch.dtype, weight: torch.Tensor) -> None:
    """Round a weight [N, D] of any float type for a model of `dtype`."""
    weight = weight.detach().to(device, torch.float32)
    packed.sample = sample(weight)
    kernel = _kernel_weight(weight, dtype) if packed.bits == 4 and device.type == "cuda" else None
    if kernel is not None:
        packed.weight = kernel
    else:
        packed.hold(*_rounded(weight, packed.bits, dtype))


def _rounded(weight: torch.Tensor, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers [N, D] int8 and scales [N, G] fp32 that `dtype` holds exactly where it is bf16."""
    ao = _torchao()
    D = weight.shape[1]
    group = max(n for n in range(1, min(GROUP, D) + 1) if D % n == 0)
    config = ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int8 if bits == 8 else torch.int4,
        granularity=ao.PerAxis(0) if bits == 8 else ao.PerGroup(group),
        scale_dtype=torch.bfloat16 if dtype is torch.bfloat16 else torch.float32,
    )
    found = _quantised(weight, config)
    return found.qdata, found.scale.float()


def _kernel_weight(weight: torch.Tensor, dtype: torch.dtype) -> nn.Parameter | None:
    """A weight that torch's 4-bit CUDA kernel multiplies with; None where it cannot."""
    group = next((n for n in KERNEL_GROUPS if weight.shape[1] % n == 0), None)
    if (
        group is None
        or dtype is not torch.bfloat16
        or torch.cuda.get_device_capability(weight.device) < KERNEL_CAPABILITY
    ):
        return None
    config = _torchao().Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    return _quantised(weight.to(dtype), config)


def _quantised(weight: torch.Tensor, config: Any) -> nn.Parameter:
    """What torchao puts in place of a linear layer's weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    _torchao().quantize_(linear, config)
    return linear.weight


def _torchao() -> Any:
    """torchao's quantisation."""
    try:
        import torchao.quantization as found
    except Exception as fault:  # a release for another torch can fail in many ways
        why = " ".join(str(fault).split())[:200]
        raise InputError(
            f"torchao cannot be imported beside torch {torch.__version__} ({why}); another release of it is needed: "
            'pip install -U "twigvlm[quant]"'
        ) from fault
    return found
