"""Choosing tokens one by one, and on a grid: what several methods share.

Every loop is greedy, adds one token a step, keeps running vectors, and gives ties to the lower index.
Legend: B rows or images, N tokens to choose from, n tokens chosen.
"""

from __future__ import annotations

from functools import cache

import torch

SPENT = 1e-6  # of a token's own volume: less is what rounding leaves


def cosine(tokens: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 [..., N, M]: cosines of `tokens` [..., N, D] and `others` [..., M, D] (default: the same)."""
    one = torch.nn.functional.normalize(tokens.float(), dim=-1)
    return one @ (one if others is None else torch.nn.functional.normalize(others.float(), dim=-1)).transpose(-1, -2)


def farthest(similarity: torch.Tensor, nearest: torch.Tensor, taken: torch.Tensor, n: int) -> torch.Tensor:
    """[B, n]: farthest points in their order; each is the token whose largest similarity to all before it is least.

    `similarity` [B, N, N]; `nearest` [B, N] is each token's largest similarity to what is chosen already,
    and those `taken` [B, N] are not chosen.
    """
    order, row = [], torch.arange(len(similarity), device=similarity.device)
    nearest = nearest.masked_fill(taken, torch.inf)
    for _ in range(n):
        new = nearest.argmin(1)
        order.append(new)
        nearest = torch.maximum(nearest, similarity[row, new]).scatter(1, new[:, None], torch.inf)
    return torch.stack(order, 1) if order else taken.long()[:, :0]


def covering(similarity: torch.Tensor, weight: torch.Tensor, n: int) -> torch.Tensor:
    """[B, n]: tokens in their order that cover all N best; each is worth its `weight` [B, N] times what it adds.

    It adds, over all tokens j, by how much its `similarity` [B, N, N] to j exceeds that of the best before it (or 0).
    """
    covered, order = torch.zeros_like(weight), []
    row, gone = torch.arange(len(weight), device=weight.device), torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(n):
        gain = weight * (similarity - covered[:, None]).clamp_(min=0).sum(2)
        new = gain.masked_fill(gone, -torch.inf).argmax(1)
        order.append(new)
        gone = gone.scatter(1, new[:, None], True)
        covered = torch.maximum(covered, similarity[row, new])
    return torch.stack(order, 1)


def spanning(kernel: torch.Tensor, n: int) -> torch.Tensor:
    """[B, n]: tokens in their order that span most volume under `kernel` [B, N, N] (greedy MAP of a DPP, by Cholesky).

    Once all that is left lies in the span of what was chosen, the kernel's diagonal decides.
    """
    diagonal = kernel.diagonal(dim1=1, dim2=2)
    floor = SPENT * diagonal
    left, row = diagonal.clone(), torch.arange(len(kernel), device=kernel.device)
    parts = kernel.new_zeros(len(kernel), n, kernel.shape[1])
    order, gone = [], torch.zeros_like(left, dtype=torch.bool)
    for k in range(n):
        spent = left <= floor
        new = torch.where(spent, floor, left).masked_fill(gone, -torch.inf).argmax(1)
        order.append(new)
        gone = gone.scatter(1, new[:, None], True)
        known = (parts[row, :k, new][:, None] @ parts[:, :k])[:, 0]
        part = (kernel[row, new] - known) / left[row, new].clamp(min=torch.finfo(left.dtype).tiny).sqrt()[:, None]
        part = part.masked_fill(spent[row, new][:, None], 0)
        parts[:, k] = part
        left = left - part * part
    return torch.stack(order, 1)


@cache
def cells(n: int, side: int) -> tuple[tuple[range, range, int], ...]:
    """n parts of a grid of `side` x `side` patches, in raster order: rows, columns, and the patch in the middle.

    A grid of gh x gw = n cells, as near to a square as the factors of n allow, and wider than high: 12 x 16,
    8 x 16 and 8 x 8 for 192, 128 and 64. Where n has no two factors within a ratio of two (or none that fit),
    rows of cells as even as can be: round(sqrt(n)) of them, which hold floor or ceil of n / gh cells each.
    Part i of m of the rows or columns are floor(i side / m) .. ceil((i + 1) side / m) - 1, and its middle is
    floor((i + 1/2) side / m).
    """
    pairs = [(h, n // h) for h in range(1, side + 1) if n % h == 0 and h <= n // h <= side]
    high, wide = pairs[-1] if pairs else (0, 1)
    if wide > 2 * high:
        high = max(round(n**0.5), -(-n // side))
    parts = []
    for i in range(high):
        across = (i + 1) * n // high - i * n // high
        for j in range(across):
            middle = (2 * i + 1) * side // (2 * high) * side + (2 * j + 1) * side // (2 * across)
            parts.append((_part(i, high, side), _part(j, across, side), middle))
    return tuple(parts)


def _part(i: int, of: int, side: int) -> range:
    return range(i * side // of, -(-(i + 1) * side // of))


def spared(likeness: torch.Tensor) -> torch.Tensor:
    """Logarithm of what a pick leaves of another's worth, 1 - `likeness`^2 [..., N, N]; -inf where they are the same."""
    return (1 - likeness.float().square()).clamp(min=0).log()


def discounted(worth: torch.Tensor, likeness: torch.Tensor, real: torch.Tensor, n: int) -> torch.Tensor:
    """[B, n]: tokens in their order, each of the highest `worth` [B, N] that is left; it takes from the others, like for like.

    For what a pick leaves of another's worth see `spared` (`likeness` [B, N, N]). Only `real` [B, N] tokens are picked while there
    are any. In logarithms: after hundreds of picks the worth itself is no fp32 number any more.
    """
    least = torch.finfo(torch.float32).min / 2  # the worth of nothing
    stays = spared(likeness)
    left = worth.float().log().clamp(min=least).masked_fill(~real, -torch.inf)
    order, row = [], torch.arange(len(left), device=left.device)
    for _ in range(n):
        new = left.argmax(1)
        order.append(new)
        left = torch.where(left == -torch.inf, left, (left + stays[row, new]).clamp(min=least))
        left = left.scatter(1, new[:, None], -torch.inf)
    return torch.stack(order, 1) if order else real.long()[:, :0]


def among(order: torch.Tensor, real: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """[B, N] bool: the first `n` [B] of `order` [B, picks] among the `real` [B, N] tokens."""
    early = torch.arange(order.shape[1], device=order.device) < n[:, None]
    seats = torch.where(early, order, real.shape[1])  # the others crowd behind the end
    return torch.nn.functional.pad(torch.zeros_like(real), (0, 1)).scatter(1, seats, True)[:, :-1] & real
