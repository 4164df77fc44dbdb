"""Linear layers whose weights stand in 8 or 4 bits: unpacked a slab at a time where they are multiplied.

The weights alone are rounded, never what they are multiplied with, so that a row's answer does not hang on the rows
beside it: drafts stay lossless against the same rounded base. Sums are fp32 on a CPU, whatever the model's numbers.
Whole weights would be unpacked into fresh memory at every call, which costs ten times the product (docs/LOG.md);
a slab stays in the cache. Who rounds them is `loading.quantise`. Legend: N out, D in, G groups of a row, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import InputError

SLAB = 2**19  # numbers that are unpacked at once on a CPU: 2 MB, which its caches hold
FEW = 8  # tokens for which torch's own kernel of bf16 times int8 is the quicker one
SAMPLES = 16  # of a weight, by which a twig knows its base


def sample(weight: torch.Tensor, samples: int = SAMPLES) -> list[float]:
    """A few numbers from all over a weight."""
    flat = weight.detach().flatten()
    picks = torch.linspace(0, len(flat) - 1, samples).long().clamp(max=len(flat) - 1)  # fp32 counts to 2^24 only
    return [round(float(w), 5) for w in flat[picks.to(flat.device)].float()]


class PackedLinear(nn.Module):
    """What `nn.Linear` is, with `codes` [N, D] int8 (4 bits: [N, D/2], columns d and d + D/2 share a byte) times `scale` [N, G].

    Until `hold` is called `weight` is a place on the meta device that says what is to come; afterwards it is None, or a
    weight of torchao's that knows its own product. `sample` are numbers of the weight before it was rounded.
    """

    def __init__(self, linear: nn.Linear, bits: int):
        super().__init__()
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        self.bias = linear.bias
        self.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
        self.sample: list[float] = []
        self.register_buffer("codes", None)
        self.register_buffer("scale", None)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"

    def hold(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        """Take whole numbers [N, D] int8 and fp32 scales [N, G]."""
        half = self.in_features // 2
        self.codes = codes if self.bits == 8 else (codes[:, :half] & 15) | (codes[:, half:] << 4)
        self.scale, self.weight = scale, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.unpacked(x.dtype), self.bias)
        flat = x.reshape(-1, self.in_features)  # S D
        if self.bits == 8 and x.is_cpu and x.dtype is torch.bfloat16 and len(flat) <= FEW:
            out = torch._weight_int8pack_mm(flat.contiguous(), self.codes, self.scale[:, 0].to(x.dtype))
        else:
            flat = flat.float() if x.is_cpu else flat
            out = torch.cat([flat @ slab.t() for slab in self._slabs(flat.dtype)], 1).to(x.dtype)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The rounded weight [N, D]."""
        if self.codes is None:
            raise InputError("this weight lies in torchao's own layout and cannot be unpacked; use --load-8bit")
        return self._unpack(
            slice(None), torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.codes.device)
        )

    def _slabs(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Neighbouring rows of the weight, in memory that the next ones overwrite; all at once but on a CPU."""
        N, D = self.out_features, self.in_features
        rows = min(N, max(1, SLAB // D)) if self.codes.is_cpu else N
        room = torch.empty(rows, D, dtype=dtype, device=self.codes.device)
        for first in range(0, N, rows):
            yield self._unpack(slice(first, first + rows), room[: N - first])

    def _unpack(self, rows: slice, out: torch.Tensor) -> torch.Tensor:
        codes, scale = self.codes[rows], self.scale[rows].to(out.dtype)
        if self.bits == 8:
            out.copy_(codes)
        else:
            half = self.in_features // 2
            out[:, :half].copy_((codes << 4) >> 4)  # shifts of whole numbers keep the sign
            out[:, half:].copy_(codes >> 4)
        out.view(*scale.shape, -1).mul_(scale[..., None])
        return out

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        raise InputError(
            "a model with load_8bit, load_4bit or draft_8bit cannot be saved, its weights are rounded and packed; "
            "load it without these to save it"
        )


def unpack(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with plain linear layers, of the same rounded weights, in place of packed ones."""
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, PackedLinear):
                plain = nn.Linear(child.in_features, child.out_features, bias=False, device="meta", dtype=dtype)
                plain.weight, plain.bias = nn.Parameter(child.unpacked(dtype), requires_grad=False), child.bias
                setattr(owner, name, plain)
    return module


def held_bytes(module: nn.Module) -> int:
    """Of all weights of a module, as they lie in memory."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
