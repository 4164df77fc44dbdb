"""Where a training runs: which device, in which precision, and what a process must settle before libraries look around."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import InputError
from ...loading.device import pick_device
from ..settings import Settings
from .loop import FORMAT
from .ranks import Ranks, alone
from .zero import read_zero, stage_of

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass
class Run:
    """What every part of a run needs to know."""

    settings: Settings
    ranks: Ranks
    device: torch.device
    precision: str
    zero: Path | None  # DeepSpeed's configuration
    out: Path = Path()

    @property
    def form(self) -> dict:
        """What a checkpoint must agree with to be continued."""
        if self.zero is None:
            return {"format": FORMAT, "zero": 0}
        return {"format": FORMAT, "zero": stage_of(read_zero(self.zero)), "processes": self.ranks.world}


def device_of(settings: Settings, ranks: Ranks) -> torch.device:
    device = pick_device(settings.device)
    if device.type == "mps":  # half of what training needs is missing there
        device = torch.device("cpu")
    if device.type != "cuda":
        return device
    if ranks.local >= torch.cuda.device_count():
        raise InputError(
            f"process {ranks.local} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many processes"
        )
    torch.cuda.set_device(ranks.local)
    return torch.device("cuda", ranks.local)


def precision_of(settings: Settings, device: torch.device) -> str:
    if settings.precision != "auto":
        return settings.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    fast = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return "bf16" if fast else "fp32"


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Fading optimizer states would slow a CPU down. Whoever called gets the arithmetic back that it had."""
    before = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def prepare_process(one: Run) -> None:
    """Before anything of DeepSpeed or Hugging Face looks around."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    _die_with_launcher(one.ranks)
    if one.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if one.zero is None:
        return
    if one.ranks.world == 1:
        alone()
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed

    # Compiled for a minute and a half at the first start, and no faster than gloo here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _die_with_launcher(ranks: Ranks) -> None:
    """A killed launcher cannot end its processes: the kernel does, or they would train on and keep the folder."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ  # torchrun, DeepSpeed
    if ranks.world > 1 and launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
