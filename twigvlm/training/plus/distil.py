"""Stage 1: twig and pruning head learn from the data and from the frozen base (arXiv 2503.14075v3, Eq. 9-11).

The base is the teacher in the same forward: its layers below K are shared, above K it runs without gradients, and only
rows whose next token is learnt meet either vocabulary. Legend: B rows, S tokens, Q asked rows, V' visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ...errors import InputError
from ...model.stream import Stream
from ...model.tap import Tap, share
from ...model.trunk import Trunk
from ...model.twig import Twig
from ...pruning.budget import PAPER_L
from ...pruning.rule import highest
from ..data.examples import IGNORE
from .budgets import Budgets
from .losses import LOSSES, Prediction, attention_loss
from .pruned import pruned_top
from .rows import Turns, asked_rows, unseen, visual_columns

TEACHER_LAYER = 19  # of 32, counted from 0: the authors' script
Teacher = Literal["whole", "pruned"]


def teacher_layer(asked: int | None, K: int, L: int) -> int:
    """The base layer whose attention teaches: the one asked for, or the paper's at the same depth."""
    layer = max(K, round(TEACHER_LAYER / PAPER_L * L)) if asked is None else asked
    if not K <= layer < L:
        raise InputError(
            f"attention_layer is {layer}; a layer above the twig is needed, {K} to {L - 1} (counted from 0)"
        )
    return layer


@dataclass(frozen=True)
class Distil:
    """Next token + `prediction` x divergence of the next token from the base's + `attention` x divergence of the score.

    `teacher` "pruned": the base whose words teach is the one that will verify, behind the head's own best r tokens (r
    random, in the range of the paper's budgets) and without image from F on; the attention is always the unpruned base's.
    """

    prediction: float = 0.1
    attention: float = 1.0
    loss: Prediction = "kl"
    temperature: float = 5.0
    layer: int | None = None
    turns: Turns = "first"
    teacher: Teacher = "whole"
    visual: int | None = None  # tokens of an image in layer 0; None: all of the base's

    asks_base = True

    def __call__(
        self, states: Stream, labels: torch.Tensor, twig: Twig, base: Trunk
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `objectives.Objective`; "means" of its figures are the three terms before they are weighed."""
        rows, columns = asked_rows(labels, states.visual, self.turns), visual_columns(states.visual)
        tap = Tap(twig.layers[-1].self_attn, rows, whole=True)
        hidden = base.run(twig.layers, states, None, [tap]).hidden
        score = twig.pruning_head.of_tap(tap, columns)
        chosen = labels[:, 1:] != IGNORE
        targets = labels[:, 1:][chosen]
        logits = twig.logits(hidden[:, :-1][chosen])
        said = chosen
        if self.teacher == "pruned":  # behind F no image is left that could say a next word
            said = chosen & ((states.visual < 0) & ~unseen(rows[:, 0], states.visual))[:, :-1]
        with torch.no_grad():
            spoken, looked = self._teach(states, said, rows, columns, score.detach(), twig, base)
        ntp = F.cross_entropy(logits, targets, reduction="sum") / max(1, len(targets))
        prediction = logits.new_zeros(())
        if spoken is not None:
            prediction = LOSSES[self.loss](logits[said[chosen]], spoken, self.temperature)
        # Without images the head has seen nothing: its gradient is 0 then, not absent.
        attention = attention_loss(looked, score, rows >= 0) if looked is not None else 0 * score.sum()
        total = ntp + self.prediction * prediction + self.attention * attention
        right = (logits.detach().argmax(-1) == targets).sum()
        means = {"ntp": ntp.detach(), "prediction": prediction.detach(), "attention": attention.detach()}
        return total, {"answers": torch.tensor(len(targets), device=logits.device), "right": right, "means": means}

    def _teach(
        self, states: Stream, chosen: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor,
        score: torch.Tensor, twig: Twig, base: Trunk,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
        """The base's logits [n, vocabulary] where `chosen`, and its attention [B, Q, V']; None for what nobody weighs."""
        K, layer = twig.config.K, teacher_layer(self.layer, twig.config.K, base.L)
        looks = bool(self.attention) and columns.shape[1] > 0
        whole = bool(self.prediction) and self.teacher == "whole"
        top = tap = None
        if whole:
            tap = Tap(base.layers[layer].self_attn, rows) if looks else None
            top = base.run(base.layers[K:], states, None, [tap] if looks else [])
        elif looks:
            tap = base.peek(base.layers[layer], base.run(base.layers[K:layer], states), rows)
        looked = share(tap.query, tap.at(columns)[1], tap.sees(columns), tap.scaling) if looks else None
        if whole:
            return base.logits(top.hidden[:, :-1][chosen]), looked
        if self.prediction:
            top = pruned_top(base, states, *self._kept(states, rows, columns, score, twig, base), twig.config)
            return base.logits(_at_places(top, states, chosen)), looked
        return None, looked

    def _kept(
        self, states: Stream, rows: torch.Tensor, columns: torch.Tensor, score: torch.Tensor, twig: Twig, base: Trunk
    ) -> tuple[torch.Tensor, int]:
        """[B, S] bool: the head's best r tokens of an image seen at the first asked row, for a random r; and the most of a row."""
        r = Budgets.of(twig.config, self.visual or base.V, None).r
        count = int(torch.randint(r[0], r[-1] + 1, ()))
        real = (columns >= 0) & (columns <= rows[:, :1])
        images = states.visual.masked_fill(unseen(rows[:, 0], states.visual), -1).max(1).values + 1
        best = highest(score[:, 0], real, images * count)
        kept = torch.zeros(states.rows, states.width + 1, dtype=torch.bool, device=columns.device)
        kept = kept.scatter(1, torch.where(best, columns, states.width), True)[:, :-1]
        return kept, int(images.max()) * count


def _at_places(top: Stream, states: Stream, chosen: torch.Tensor) -> torch.Tensor:
    """[n, D]: what left the last layer at the tokens of `states` under `chosen` [B, S-1], in their order; 0 for those that left."""
    B, S, D = states.hidden.shape
    laid = top.hidden.new_zeros(B, S + 1, D)
    at = torch.where(top.place < 0, S, top.place)[..., None].expand(-1, -1, D)
    return laid.scatter(1, at, top.hidden)[:, : S - 1][chosen]
