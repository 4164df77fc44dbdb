"""Where a model lives, in which numbers, and which attention it uses."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from ..config import BACKENDS
from ..errors import InputError, RunError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(device: str | torch.device | None) -> torch.device:
    """The one asked for, else CUDA, MPS, CPU in this order."""
    if device is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    try:
        chosen = torch.device(device)
    except RuntimeError as fault:
        raise InputError(f"device is {device!r}; cpu, cuda, cuda:N or mps is needed") from fault
    usable = {"cpu": True, "meta": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(chosen.type, False):
        raise InputError(f"device {device} is not available here; use {pick_device(None)}")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise InputError(f"device {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return chosen


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """bf16 on CUDA where it has it, else fp16; fp16 on MPS; fp32 on the CPU."""
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
    if dtype is None:
        if device.type == "cuda":
            return torch.bfloat16 if bf16 else torch.float16
        return torch.float16 if device.type == "mps" else torch.float32
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise InputError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)} is needed")
    if chosen is torch.float16 and device.type == "cpu":
        raise InputError("dtype float16 is not supported on cpu; use float32 or bfloat16")
    if chosen is torch.bfloat16 and not bf16:
        raise InputError(f"dtype bfloat16 is not supported on {device}; use float16 or float32")
    return chosen


def check_attention(attention: str) -> None:
    """Raises InputError for a backend that is unknown or not installed."""
    if attention not in BACKENDS:
        raise InputError(f"attn_implementation is {attention!r}; one of {', '.join(BACKENDS)} is needed")
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise InputError(
            "attn_implementation flash_attention_2 needs the package flash-attn, which is not installed: "
            'pip install "twigvlm[flash]" --no-build-isolation (a CUDA device is needed), or use sdpa'
        )


def set_attention(model: LlavaForConditionalGeneration, attention: str) -> None:
    """The backend of every layer. Raises InputError as `check_attention` does."""
    check_attention(attention)
    tower = "sdpa" if attention == "flash_attention_2" else attention
    model.model.vision_tower.config._attn_implementation = tower
    text = "flash_or_sdpa" if attention == "flash_attention_2" else attention
    model.model.language_model.config._attn_implementation = text


def is_out_of_memory(fault: Exception) -> bool:
    """The CPU's allocator says so in a RuntimeError."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(fault, (torch.OutOfMemoryError, MemoryError)) or any(w in str(fault).lower() for w in words)


@contextmanager
def fits(device: torch.device, folder: Path) -> Iterator[None]:
    """A device that cannot hold the weights of a folder is a plain word."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as fault:
        if isinstance(fault, RunError) or not is_out_of_memory(fault):
            raise
        raise RunError(
            f"{folder}: {device} has no room for these weights; use a larger one, --dtype bfloat16, --load-8bit or --load-4bit"
        ) from fault
