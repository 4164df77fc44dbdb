"""What distillation minimises, on rows that were gathered: how far a draft's next token and a score are from the base's.

Knows no model. Legend: n positions whose next token is learnt, B samples, Q asked rows, V' visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

SMALL = 1e-9  # added to shares before their logarithm, as published
CLIP = 4.0  # a position that is further off counts as this far, and the mean is divided by it: as released
HYBRID = 3.0  # how fast acceptance takes the weight from the divergence: arXiv 2602.23881

Prediction = Literal["kl", "hybrid", "acceptance"]


def divergence(draft: torch.Tensor, base: torch.Tensor, temperature: float) -> torch.Tensor:
    """fp32 [n]: temperature² KL(base ‖ draft) of two sets of logits [n, vocabulary], both softened by the temperature."""
    p, q = ((z.float() / temperature).log_softmax(-1) for z in (base, draft))
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def softened(draft: torch.Tensor, base: torch.Tensor, temperature: float) -> torch.Tensor:
    """The paper's prediction loss as released: positions beyond CLIP keep their direction and lose their size."""
    k = divergence(draft, base, temperature)
    k = torch.where(k > CLIP, k * (CLIP / k.detach().clamp(min=CLIP)), k)
    return k.sum() / max(1, len(k)) / CLIP


def accepted(draft: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """fp32 [n]: the chance that a token drawn from the draft is taken for one of the base, sum of min(p, q)."""
    p, q = (z.float().softmax(-1) for z in (base, draft))
    return torch.minimum(p, q).sum(-1)


def hybrid(draft: torch.Tensor, base: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL where little is accepted yet, total variation where much is (arXiv 2602.23881); the temperature is not asked."""
    alpha = accepted(draft, base)
    weight = torch.exp(-HYBRID * alpha.detach())
    return (weight * divergence(draft, base, 1.0) + (1 - weight) * (1 - alpha)).sum() / max(1, len(alpha))


def unlikely(draft: torch.Tensor, base: torch.Tensor, temperature: float) -> torch.Tensor:
    """-log of the chance of acceptance, of logarithms, since the chance itself may be too small for fp32; the temperature is
    not asked.
    """
    log_p, log_q = (z.float().log_softmax(-1) for z in (base, draft))
    return -torch.minimum(log_p, log_q).logsumexp(-1).sum() / max(1, len(log_p))


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "kl": softened,
    "hybrid": hybrid,
    "acceptance": unlikely,
}


def attention_divergence(teacher: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """[...]: KL(teacher ‖ score) over the last axis, of shares that make up 1; where both are 0 nothing is added."""
    a, s = teacher + SMALL, score + SMALL
    return (a * (a.log() - s.log())).sum(-1)


def attention_loss(teacher: torch.Tensor, score: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Mean over ALL samples of what their asked rows [B, Q] bool differ by on average; a sample without counts as 0.

    As released: so a sample weighs the same in any company.
    """
    each = attention_divergence(teacher, score).masked_fill(~asked, 0).sum(1) / asked.sum(1).clamp(min=1)
    return each.sum() / max(1, len(each))
