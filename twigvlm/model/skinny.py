"""A few tokens times large weights on a CPU: oneDNN's product where that of `nn.Linear` is slow.

On processors with AVX2 and nothing newer the BLAS behind `nn.Linear` lays the weights out anew at every call
with more than one token, so that verifying six tokens costs five times as much as writing one and no draft
could pay. oneDNN reads the weights where they lie, without a second copy. Nothing of a model changes: layers
get another `forward` while our own loop runs them, and only then. docs/LOG.md has the figures, and those of
the ways that were not taken. `torch.backends.mkldnn.flags(enabled=False)` switches it off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

LEAST = 2**22  # weights of a layer: with fewer the call itself costs what the product saves
MOST = 256  # tokens: with more the usual product is as good
_found: WeakKeyDictionary[nn.Module, list[tuple[nn.Linear, Callable]]] = WeakKeyDictionary()


@functools.cache
def pays() -> bool:
    """Whether this processor is one of those (a rule rather than a race, so that two runs give the same bits)."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and torch.backends.cpu.get_cpu_capability() == "AVX2"


@contextmanager
def quick(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, and where it pays, large linear layers of these modules multiply with oneDNN.

    Layers that somebody else has given another `forward` keep that one. Gradients are left alone.
    """
    taken = []
    if pays() and not torch.is_grad_enabled() and torch.backends.mkldnn.enabled:
        taken = [pair for module in modules for pair in _large(module) if "forward" not in pair[0].__dict__]
    for linear, forward in taken:
        linear.__dict__["forward"] = forward
    try:
        yield
    finally:
        for linear, _ in taken:
            linear.__dict__.pop("forward", None)


def product(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What `linear` makes of `x` [..., in]: the same but for the last bits."""
    weight, bias = linear.weight, linear.bias
    tokens = x.numel() // x.shape[-1]  # a single one reads the weights once in the usual product as well
    if not 1 < tokens <= MOST or not (x.is_cpu and weight.is_cpu and x.dtype == weight.dtype == torch.float32):
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _large(module: nn.Module) -> list[tuple[nn.Linear, Callable]]:
    """Its large linear layers with their other `forward`. Subclasses (quantised, adapted) are not touched."""
    if module not in _found:
        linears = [m for m in module.modules() if type(m) is nn.Linear and m.weight.numel() >= LEAST]
        _found[module] = [(m, functools.partial(product, m)) for m in linears]
    return _found[module]
