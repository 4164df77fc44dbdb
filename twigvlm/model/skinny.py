"""A few tokens times large weights on a CPU: oneDNN's product where that of `nn.Linear` is slow.

On AMD's processors, and on those with AVX2 and nothing newer, the BLAS behind `nn.Linear` lays the weights out anew at
every call with more than one token, so that verifying six tokens costs two to five times as much as writing one and
hardly a draft could pay. oneDNN reads the weights where they lie, without a second copy. Nothing of a model changes: layers
get another `forward` while our own loop runs them, and only then. docs/LOG.md has the figures, and those of
the ways that were not taken. `torch.backends.mkldnn.flags(enabled=False)` switches it off.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

LEAST = 2**22  # weights of a layer: with fewer the call itself costs what the product saves
CPU = Path("/proc/cpuinfo")
MOST = 256  # tokens: with more the usual product is as good
_found: WeakKeyDictionary[nn.Module, list[nn.Linear]] = WeakKeyDictionary()


@functools.cache
def pays() -> bool:
    """Whether this processor is one of those (a rule rather than a race, so that two runs give the same bits)."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    capability = torch.backends.cpu.get_cpu_capability()
    return known and (capability == "AVX2" or (capability == "AVX512" and _by_amd()))


def _by_amd() -> bool:
    try:
        return "AuthenticAMD" in CPU.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return "AuthenticAMD" in platform.processor()


@contextmanager
def quick(modules: Iterable[nn.Module], fewest: int = 2) -> Iterator[None]:
    """While it lasts, and where it pays, large linear layers of these modules multiply `fewest` tokens and more with oneDNN.

    A single token goes the usual way unless asked otherwise, so that plain decoding has the bits of the stock model's; drafts
    need not. Layers that somebody else has given another `forward` keep that one. Gradients are left alone.
    """
    taken = []
    if pays() and not torch.is_grad_enabled() and torch.backends.mkldnn.enabled:
        taken = [linear for module in modules for linear in _large(module) if "forward" not in linear.__dict__]
    for linear in taken:
        linear.__dict__["forward"] = functools.partial(product, linear, fewest=fewest)
    try:
        yield
    finally:
        for linear in taken:
            linear.__dict__.pop("forward", None)


def product(linear: nn.Linear, x: torch.Tensor, fewest: int = 2) -> torch.Tensor:
    """What `linear` makes of `x` [..., in]: the same but for the last bits."""
    weight, bias = linear.weight, linear.bias
    tokens = x.numel() // x.shape[-1]
    if not fewest <= tokens <= MOST or not (x.is_cpu and weight.is_cpu and x.dtype == weight.dtype == torch.float32):
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _large(module: nn.Module) -> list[nn.Linear]:
    """Its large linear layers. Subclasses (quantised, adapted) are not touched."""
    found = _found.get(module)
    if found is None:
        found = [m for m in module.modules() if type(m) is nn.Linear and m.weight.numel() >= LEAST]
        _found[module] = found
    return found
