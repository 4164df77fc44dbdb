"""What a twig is taught: an objective is called with (states, labels, twig, base) and gives a loss and figures.

`states` is the Stream that leaves layer K-1 of the base, `labels` [B, S] the tokens of its rows (IGNORE: not to be
learnt), `base` the trunk below the twig, or the whole base for an objective that `asks_base`. Figures are sums over
the answers, so that those of micro-batches and processes add up; "means", where there are any, is a table of means over
the micro-batch. Those of TwigVLM++ are in `training.plus`.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from ..model.stream import Stream
from ..model.trunk import Trunk
from ..model.twig import Twig
from .data.examples import IGNORE


class Objective(Protocol):
    """`asks_base`: the base stays whole in memory and can be asked as a teacher; else only its lowest K layers do."""

    asks_base: bool

    def __call__(
        self, states: Stream, labels: torch.Tensor, twig: Twig, base: Trunk
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


class Ntp:
    """The next token of the data: mean cross-entropy over the labels (paper section 3.1)."""

    asks_base = False

    def __call__(
        self, states: Stream, labels: torch.Tensor, twig: Twig, base: Trunk
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Figures: "answers", the learnt tokens, and "right", how many of them the twig would have drafted."""
        logits, targets = answers(states, labels, twig, base)
        loss = F.cross_entropy(logits, targets, reduction="sum") / max(1, len(targets))
        right = (logits.detach().argmax(-1) == targets).sum()
        return loss, {"answers": torch.tensor(len(targets), device=logits.device), "right": right}


def answers(states: Stream, labels: torch.Tensor, twig: Twig, base: Trunk) -> tuple[torch.Tensor, torch.Tensor]:
    """The twig's fp32 logits [n, vocabulary] at the n positions before a learnt token, and those tokens [n]."""
    hidden = base.run(twig.layers, states, None).hidden
    targets = labels[:, 1:]
    chosen = targets != IGNORE
    # Only these rows meet the vocabulary: the full logits of a batch would be gigabytes.
    return twig.logits(hidden[:, :-1][chosen]), targets[chosen]
