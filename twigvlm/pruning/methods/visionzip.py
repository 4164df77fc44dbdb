"""VisionZip (CVPR 2025): the patches that the class token looks at most, and the others merged into a few.

Of R tokens 10 in 64 are contextual (162 + 30, 108 + 20 and 54 + 10 at 192, 128 and 64, as published; other R in the
same proportion, rounded, are our choice); `contextual` sets their number (30 of R = 221 is the README's default).
One of the dominant ones is the class token itself. Targets are every so many of the patches left, in raster order;
the others go to the target of nearest keys (mean over heads). The paper averages a target with those; the released code
adds their mean to the target, which about doubles its norm, and the published rows are the code's: `merge=add`.
`merge=average` is the mean of the target and all that go to it. At R = V one patch is still merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...errors import InputError
from ..plan import Shape, TowerMethod
from ..reducer import Attended, Reducer, Tokens, View, best
from ..select import cosine

SHARE = 10, 64  # contextual tokens of R
Merge = Literal["add", "average"]


def merge_rest(hidden: torch.Tensor, keys: torch.Tensor, targets: int, how: Merge) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, targets, C] merged, and the indices [targets] at which they stood, of `hidden` [B, N, C] by `keys` [B, N, d]."""
    B, N, _ = hidden.shape
    step = max(1, N // max(targets, 1))
    chosen = range(0, targets * step, step)
    others = [i for i in range(N) if i not in chosen]
    seats, others = (torch.tensor(index, dtype=torch.long, device=hidden.device) for index in (list(chosen), others))
    target = cosine(keys[:, others], keys[:, seats]).argmax(2) if targets else others.expand(B, -1)[:, :0]
    goes = torch.nn.functional.one_hot(target, max(targets, 1)).transpose(1, 2).float()  # B targets others
    count = goes.sum(2, keepdim=True)
    total = goes @ hidden[:, others[: target.shape[1]]].float()
    own = hidden[:, seats].float()
    merged = own + total / count.clamp(min=1) if how == "add" else (own + total) / (1 + count)
    return merged.to(hidden), seats


@dataclass(frozen=True)
class Zip(Attended):
    """n tokens, `contextual` of them merged."""

    contextual: int
    merge: Merge = "add"

    def __call__(self, view: View) -> Tokens:
        states, V = view.states, view.V
        scores = view.attention().sum(1)
        dominant = best(scores, self.n - self.contextual - 1)
        rest = torch.ones_like(scores, dtype=torch.bool).scatter(1, dominant, False)
        rest = rest.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : V - dominant.shape[1]]
        hidden, keys = (_at(t, rest + 1) for t in (states, view.keys()))
        merged, seats = merge_rest(hidden, keys, self.contextual, self.merge)
        kept = torch.cat([states[:, :1], _at(states, dominant + 1), merged], 1)
        source = torch.cat([torch.full_like(rest[:, :1], -1), dominant, rest[:, seats]], 1)
        return Tokens(view.project(kept), source)


def _at(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


@dataclass(frozen=True)
class VisionZip(TowerMethod):
    """`contextual`: merged tokens among the R, at least 0; `merge`: how others come to them."""

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "VisionZip, CVPR 2025"
    summary: ClassVar[str] = "the class token and what it looks at, the rest merged by keys"
    needs: ClassVar[str] = "class token"
    selects: ClassVar[bool] = False
    contextual: int | None = None
    merge: Merge = "add"

    def reducer(self, n: int, shape: Shape) -> Reducer:
        merged = round(n * SHARE[0] / SHARE[1]) if self.contextual is None else self.contextual
        if not 0 <= merged < n:
            raise InputError(
                f"visionzip:contextual={merged} of {n} tokens; 0 to {n - 1} can be, since the class token is one of them"
            )
        return Zip(n, merged, self.merge)
