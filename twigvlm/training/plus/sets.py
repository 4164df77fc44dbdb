"""Kept sets as draws without replacement (Plackett-Luce), and the policy gradient over them; knows no transformer.

Legend: B samples, G sets of each, r tokens of a set, V' visual tokens. log s is -inf (or anything very small) where
there is no token.
"""

from __future__ import annotations

from typing import Literal

import torch

FLOOR = 1e-6  # added to the spread of a group's rewards, as released
NOTHING = -1e30  # stands for the logarithm of 0 where -inf would spoil a gradient

Baseline = Literal["group", "leave-one-out"]


def draw(log_s: torch.Tensor, r: torch.Tensor, groups: int, antithetic: bool = False) -> torch.Tensor:
    """[B, G, most r] indices in the order drawn, -1 behind the r [B] of a sample; from torch's global generator.

    Gumbel noise and a sort: equal in law to drawing one token after the other in proportion to what is left of s
    [B, V'], and it cannot fail where s is so small that its logarithm alone says so. `antithetic`: the sets come in pairs,
    what the noise favours in one it disfavours in the other; each by itself is drawn as it would be.
    """
    noise = _gumbel(log_s, groups, antithetic)
    order = (log_s.detach().clamp(min=NOTHING)[:, None] + noise).argsort(dim=2, descending=True)
    return _first(order[..., : int(r.max())], r)


def draw_discounted(
    log_s: torch.Tensor, stays: torch.Tensor, r: torch.Tensor, groups: int, antithetic: bool = False
) -> torch.Tensor:
    """`draw`, where a pick takes from what is like it: `stays` [B, V', V'] is the logarithm of what it leaves of another's s.

    One token after the other in proportion to what is left, with fresh noise each time. Without noise these are the picks of
    `pruning.select.discounted`.
    """
    left = (
        log_s.detach().clamp(min=NOTHING).masked_fill(log_s == -torch.inf, -torch.inf)[:, None].expand(-1, groups, -1)
    )
    row, order = torch.arange(len(left), device=left.device)[:, None], []
    for _ in range(int(r.max())):
        new = (left + _gumbel(log_s, groups, antithetic)).argmax(2)
        order.append(new)
        left = torch.where(left == -torch.inf, left, (left + stays[row, new]).clamp(min=NOTHING))
        left = left.scatter(2, new[..., None], -torch.inf)
    return _first(torch.stack(order, 2), r)


def _gumbel(log_s: torch.Tensor, groups: int, antithetic: bool) -> torch.Tensor:
    """[B, G, V'] noise for log s [B, V']."""
    B, V = log_s.shape
    uniform = torch.rand(B, -(-groups // 2) if antithetic else groups, V, device=log_s.device)
    if antithetic:
        uniform = torch.stack([uniform, 1 - uniform], 2).flatten(1, 2)[:, :groups]
    uniform = uniform.clamp(min=torch.finfo(torch.float32).tiny)
    return -(-uniform.log()).clamp(min=torch.finfo(torch.float32).tiny).log()


def _first(order: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """-1 behind the first r [B] of order [B, G, most r]."""
    return order.masked_fill(torch.arange(order.shape[2], device=r.device) >= r[:, None, None], -1)


def log_probability(log_s: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
    """[B, G] of drawing just these `picks` [B, G, r] (-1 pads) in this order; log s [B, V'] may be off by a constant.

    Closed form: the j-th factor is s of the token over the sum of s of what was left before it, which one logcumsumexp
    from the end gives for all j.
    """
    log_s = log_s.clamp(min=NOTHING)[:, None].expand(-1, picks.shape[1], -1)
    real = picks >= 0
    chosen = log_s.gather(2, picks.clamp(min=0)).masked_fill(~real, NOTHING)
    spare = log_s.new_zeros(*log_s.shape[:2], log_s.shape[2] + 1)  # one column more, for what pads
    taken = spare.scatter(2, torch.where(real, picks, log_s.shape[2]), 1.0)[..., :-1] > 0
    left = log_s.masked_fill(taken, NOTHING).logsumexp(-1, keepdim=True)
    tails = torch.cat([chosen, left], 2).flip(2).logcumsumexp(2).flip(2)[..., :-1]
    return (chosen - tails).masked_fill(~real, 0).sum(2)


def discounted_log_probability(log_s: torch.Tensor, stays: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
    """[B, G], as `log_probability`, of picks [B, G, r] by `draw_discounted`; gradients reach log s [B, V'] alone."""
    real, at = picks >= 0, picks.clamp(min=0)
    row = torch.arange(len(at), device=at.device)[:, None, None]
    taken = stays.detach().clamp(min=NOTHING)[row, at]  # B G r V', by each pick
    here = torch.zeros_like(taken).scatter(3, at[..., None], 1.0)
    lost, gone = (torch.nn.functional.pad(t[:, :, :-1], (0, 0, 1, 0)).cumsum(2) for t in (taken, here))
    left = log_s.clamp(min=NOTHING)[:, None, None] + lost.clamp(min=NOTHING)
    # Below all that is worth nothing: it cannot be drawn, and no factor is -inf.
    left = left.masked_fill((gone > 0) | (log_s == -torch.inf)[:, None, None], 4 * NOTHING)
    factors = left.gather(3, at[..., None])[..., 0] - left.logsumexp(3)
    return factors.masked_fill(~real, 0).sum(2)


def advantage(reward: torch.Tensor, baseline: Baseline = "group", floor: float = 0.0) -> torch.Tensor:
    """[B, G] of rewards [B, G]: over the group's mean in units of its spread, or over the mean of the others as it is.

    0 for a sample whose rewards spread by less than `floor`: what it says is chance, which units of its spread would enlarge.
    """
    spread = reward.std(1, keepdim=True)
    if baseline == "leave-one-out":
        others = (reward.sum(1, keepdim=True) - reward) / (reward.shape[1] - 1)
        gains = reward - others
    else:
        gains = (reward - reward.mean(1, keepdim=True)) / (spread + FLOOR)
    return gains.masked_fill(spread < floor, 0)


def policy_loss(
    log_s: torch.Tensor,
    picks: torch.Tensor,
    gains: torch.Tensor,
    by_token: bool = False,
    stays: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B]: -mean of advantage [B, G] x log-probability of the sets; its gradient is the policy's.

    `by_token`: that over the tokens of a set, so that a budget's weight does not grow with it. `stays`: the picks were
    drawn with discount.
    """
    likely = log_probability(log_s, picks) if stays is None else discounted_log_probability(log_s, stays, picks)
    if by_token:
        likely = likely / (picks >= 0).sum(2).clamp(min=1)
    return -(gains.detach() * likely).mean(1)
