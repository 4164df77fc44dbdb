"""Adapters on a twig's matrices instead of the matrices themselves (peft), and back to a plain twig."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InputError
from ..model.pruning_head import NAME
from ..model.twig import Twig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def add_adapters(twig: Twig, rank: int, alpha: float, dropout: float, seed: int) -> None:
    """Freeze the twig but for its norms and its pruning head, and put adapters of this rank on every matrix, the head included."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as fault:
        raise InputError("lora_rank needs the package peft: pip install peft, or train the whole twig") from fault
    config = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, lora_dropout=dropout, target_modules=list(TARGETS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, twig)
    for name, parameter in twig.named_parameters():
        parameter.requires_grad_("lora_" in name or "norm" in name or name.startswith(NAME))


def merged(state: dict[str, torch.Tensor], twig: Twig) -> dict[str, torch.Tensor]:
    """A plain twig's tensors from those of one with adapters."""
    plain = {name: tensor for name, tensor in state.items() if "lora_" not in name}
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in plain.items()}
    for name, module in twig.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        for adapter in module.lora_A:
            down = state[f"{name}.lora_A.{adapter}.weight"].float()
            up = state[f"{name}.lora_B.{adapter}.weight"].float()
            weight = plain[f"{name}.weight"]
            plain[f"{name}.weight"] = (weight.float() + module.scaling[adapter] * (up @ down)).to(weight)
    return plain


def has_adapters(module: nn.Module) -> bool:
    return any(hasattr(m, "lora_A") for m in module.modules())
