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
    B, V = log_s.shape
    uniform = torch.rand(B, -(-groups // 2) if antithetic else groups, V, device=log_s.device)
    if antithetic:
        uniform = torch.stack([uniform, 1 - uniform], 2).flatten(1, 2)[:, :groups]
    uniform = uniform.clamp(min=torch.finfo(torch.float32).tiny)
    noise = -(-uniform.log()).clamp(min=torch.finfo(torch.float32).tiny).log()
    order = (log_s.detach().clamp(min=NOTHING)[:, None] + noise).argsort(dim=2, descending=True)
    most = int(r.max())
    return order[..., :most].masked_fill(torch.arange(most, device=r.device) >= r[:, None, None], -1)


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


def policy_loss(log_s: torch.Tensor, picks: torch.Tensor, gains: torch.Tensor, by_token: bool = False) -> torch.Tensor:
    """[B]: -mean of advantage [B, G] x log-probability of the sets; its gradient is the policy's.

    `by_token`: that over the tokens of a set, so that a budget's weight does not grow with it.
    """
    likely = log_probability(log_s, picks)
    if by_token:
        likely = likely / (picks >= 0).sum(2).clamp(min=1)
    return -(gains.detach() * likely).mean(1)
