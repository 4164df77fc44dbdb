"""The last stage: the layers above the cut learn to answer from what pruning leaves.

What is below the cut stays as it is, so that the twig that chooses, trained on this very base, fits afterwards too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from ...config import TwigConfig
from ...model.trunk import rotate_half
from .language import Talk


def attention(task: Talk, layer, hidden: torch.Tensor, positions: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """What the tokens at `last` [B] attend to in a layer that `hidden` [B, S, D] enters: head mean [B, S]."""
    part, normed = layer.self_attn, layer.input_layernorm(hidden)
    cos, sin = (t[:, :, None] for t in task.decoder.rotary_emb(hidden, positions))
    query, key = (p(normed).unflatten(-1, (-1, part.head_dim)) for p in (part.q_proj, part.k_proj))
    query, key = (t * cos + rotate_half(t) * sin for t in (query, key))
    query = query[torch.arange(len(last), device=last.device), last]
    scores = torch.einsum("bhd,bshd->bhs", query, key) * part.scaling
    future = torch.arange(hidden.shape[1], device=last.device) > last[:, None]
    return scores.masked_fill(future[:, None], -torch.inf).softmax(-1).mean(1)


def take(hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[B, S, D] at `places` [B, S'] → [B, S', D]."""
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def through_pruned(
    task: Talk, batch: dict, hidden: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor, K: int, F: int
) -> torch.Tensor:
    """Logits [B, S, vocabulary] of what enters layer K if only the visual tokens `kept` [B, r] (places in `hidden`) go
    through layers K..F-1, and none above (paper section 3.2).
    """
    count = hidden.shape[1] - batch["ids"].shape[1]
    places = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
    heads = batch["heads"][:, None]
    text = places[(places < heads) | (places >= heads + count)].view(len(hidden), -1)
    stay = torch.cat([text, kept], 1).sort().values
    hidden, positions = take(hidden, stay), positions.gather(1, stay)
    hidden = task.run(hidden, positions, task.layers[K:F])
    seen = (stay[:, :, None] == kept[:, None]).any(-1)
    words = (~seen).nonzero()[:, 1].view(len(hidden), -1)
    hidden, positions = take(hidden, words), positions.gather(1, words)
    return task.guesses(task.run(hidden, positions, task.layers[F:]), batch)


class Pruned(Talk):
    """The next-token loss on one answer of each row, behind the cut by the attention of a twig's last layer."""

    def __init__(self, model: LlavaForConditionalGeneration, twig: Sequence[nn.Module], config: TwigConfig):
        super().__init__(model)
        self.twig, self.K, self.F = list(twig), config.K, config.F

    def loss(self, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted cross-entropy with `batch["left"]` visual tokens, and the shares of tokens guessed right."""
        with torch.no_grad():
            hidden, positions = self.embed(batch)
            hidden = self.run(hidden, positions, self.layers[: self.K])
            count = hidden.shape[1] - batch["ids"].shape[1]
            below = self.run(hidden, positions, self.twig[:-1])
            scores = attention(self, self.twig[-1], below, positions, batch["last"] + count)
            visual = batch["heads"][:, None] + torch.arange(count, device=hidden.device)
            kept = visual.gather(1, scores.gather(1, visual).topk(batch["left"]).indices.sort().values)
        logits = through_pruned(self, batch, hidden, positions, kept, self.K, self.F)[:, :-1]
        targets, weights, short = batch["ids"][:, 1:], batch["weights"][:, 1:], batch["short"][:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        right, told = logits.argmax(-1) == targets, weights > 0
        which = {"short": told & short, "long": told & ~short}
        figures = {name: (right & some).sum() / some.sum().clamp(min=1) for name, some in which.items()}
        return (losses * weights).sum() / weights.sum(), figures
