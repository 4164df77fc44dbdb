"""Stage 2: the pruning head learns to choose sets behind which the base finds the reference answer likely.

Kept sets are drawn from the head's score, the pruned base reads the answer behind each (teacher forcing, no roll-out),
and the head moves towards the sets that did better than their group (arXiv 2503.14075v3, Eq. 13-16). Everything but the
head is frozen and runs without gradients. Legend: B samples, S tokens, G sets of each, V' visual tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from ...model.stream import Stream, front
from ...model.tap import Tap, share
from ...model.trunk import Trunk
from ...model.twig import Twig
from ...pruning.methods.sieve import unsaid
from ...pruning.rule import highest
from ...pruning.select import cosine, discounted, spared
from ..data.examples import IGNORE
from .budgets import Budgets
from .distil import teacher_layer
from .losses import attention_divergence
from .pruned import Beginning
from .rows import asked_rows, drawn_row, unseen, visual_columns
from .sets import Baseline, advantage, draw, draw_discounted, policy_loss

Reward = Literal["answer", "fidelity"]
RewardTurns = Literal["all", "first", "random"]
Picks = Literal["highest", "discounted"]


@dataclass(frozen=True)
class Scored:
    """What the pruned base makes of the answers behind sets [G, B]: the reward, and how many learnt words it would say."""

    reward: torch.Tensor  # G B
    right: torch.Tensor  # G B
    answers: torch.Tensor  # B


@dataclass(frozen=True)
class Policy:
    """`groups` sets a sample, `at_once` of them in memory together; `attention` weighs the released code's extra term (w²
    times it), 0 leaves it out. `reward` "answer": mean log-likelihood of the learnt words behind the first image;
    "fidelity": minus the mean divergence from what the unpruned base says there, which no reference is needed for.
    The head is asked before the first answer behind an image. `turns` "first" rewards that answer alone, "all" every one up
    to the next image, which a set chosen before it says nothing about; "random" asks before one that is drawn, and rewards it alone. `floor`: see `advantage`; `temperature` divides the
    logarithm of the score that sets are drawn from: below 1 they are closer to the best set, which is what pruning keeps.
    `by_token` and `antithetic`: see `sets`. `picks` "discounted": sets are drawn as `twig-discount` picks, for which the head is then.
    """

    groups: int = 32
    baseline: Baseline = "group"
    reward: Reward = "answer"
    turns: RewardTurns = "all"
    budget: float | None = None
    attention: float = 0.0
    layer: int | None = None
    at_once: int = 8
    floor: float = 0.0
    temperature: float = 1.0
    by_token: bool = False
    antithetic: bool = False
    visual: int | None = None  # tokens of an image in layer 0; None: all of the base's
    picks: Picks = "highest"

    asks_base = True

    def budgets(self, twig: Twig, base: Trunk) -> Budgets:
        return Budgets.of(twig.config, self.visual or base.V, self.budget)

    def __call__(
        self, states: Stream, labels: torch.Tensor, twig: Twig, base: Trunk, progress: float = 1.0
    ) -> tuple[torch.Tensor, dict]:
        """See `objectives.Objective`. Without gradients (a measurement) the set is the best one, at the smallest budget.

        "right" and "answers" of the figures are those of the pruned base; "means" the rewards and their spread.
        """
        learns = torch.is_grad_enabled()
        asked = asked_rows(labels, states.visual, "all" if self.turns == "random" and learns else "first")
        asked = drawn_row(asked)
        here = (asked[:, 0] >= 0).nonzero()[:, 0]
        part, words, asked = states.select(here), labels.index_select(0, here), asked.index_select(0, here)
        seen = part.visual.masked_fill(unseen(asked[:, 0], part.visual), -1)
        columns = visual_columns(seen) if len(here) else asked
        score = self._score(part, asked, columns, twig, base) if len(here) else _idle(states, twig)
        budgets, device = self.budgets(twig, base), labels.device
        if not len(here):
            none = torch.zeros((), device=device)
            figures = {"answers": none.long(), "right": none.long(), "means": {"reward": none, "spread": none}}
            return score, figures
        images = (seen.max(1).values + 1).tolist()
        numbers = random.Random(int(torch.randint(2**62, ())))
        each = budgets.draw(progress, numbers, len(images)) if learns else [budgets.r[0]] * len(images)
        most = torch.tensor(budgets.most(images, each), device=device)
        log_s = score.clamp(min=torch.finfo(score.dtype).tiny).log().masked_fill(columns < 0, -torch.inf)
        log_s, stays, best = log_s / self.temperature, None, _best
        if self.picks == "discounted":
            log_s = 2 * log_s  # a token's worth is the square of its score
            likeness = _likeness(part, asked[:, 0], seen, columns)
            stays, best = spared(likeness), partial(_best_discounted, likeness)
        picks = self._draw(log_s, stays, most) if learns else best(score, columns, most)
        kept = _laid(picks, columns, part.width)
        with torch.no_grad():
            found = self._reward(part, words, kept, int(most.max()), twig, base, asked)
        figures = _figures(found, len(labels))
        if not learns:
            return torch.zeros((), device=device), figures
        gains = advantage(found.reward.T, self.baseline, self.floor)
        losses = policy_loss(log_s, picks, gains, self.by_token, stays)
        if self.attention:
            with torch.no_grad():
                looked = self._look(part, asked, columns, twig, base)
            far = attention_divergence(looked, score)
            weights = torch.tensor([budgets.weight(r) ** 2 for r in each], device=device)
            losses = losses + self.attention * weights * far
            figures["means"]["attention"] = far.detach().sum() / len(labels)
        return losses.sum() / len(labels), figures  # a sample weighs the same in any company

    def _draw(self, log_s: torch.Tensor, stays: torch.Tensor | None, most: torch.Tensor) -> torch.Tensor:
        if stays is None:
            return draw(log_s, most, self.groups, self.antithetic)
        return draw_discounted(log_s, stays, most, self.groups, self.antithetic)

    def _score(self, part: Stream, asked: torch.Tensor, columns: torch.Tensor, twig: Twig, base: Trunk) -> torch.Tensor:
        """[B, V']: gradients reach the head alone."""
        with torch.no_grad():
            below = base.run(twig.layers[:-1], part)
            tap = base.peek(twig.layers[-1], below, asked, whole=True)
        return twig.pruning_head.of_tap(tap, columns)[:, 0]

    def _look(self, part: Stream, asked: torch.Tensor, columns: torch.Tensor, twig: Twig, base: Trunk) -> torch.Tensor:
        """[B, V']: the unpruned base's attention at the teacher's layer."""
        K, layer = twig.config.K, teacher_layer(self.layer, twig.config.K, base.L)
        tap: Tap = base.peek(base.layers[layer], base.run(base.layers[K:layer], part), asked)
        return share(tap.query, tap.at(columns)[1], tap.sees(columns), tap.scaling)[:, 0]

    def _reward(
        self, part: Stream, labels: torch.Tensor, kept: torch.Tensor, most: int, twig: Twig, base: Trunk,
        asked: torch.Tensor | None = None,
    ) -> Scored:  # fmt: skip
        """Of kept sets [G, B, S]. The text before the first image is read once for all of them."""
        image = part.visual >= 0
        asked = asked_rows(labels, part.visual) if asked is None else asked
        begin = Beginning(base, twig.config, part, torch.where(image, part.place, part.width).min(1).values)
        targets = _targets(labels, part, self.turns, asked)
        whole = None
        if self.reward == "fidelity":
            whole = base.run(base.layers[twig.config.K :], part).hidden
        parts = [
            _read(begin.top(sets, most), targets, base, len(sets), whole) for sets in kept.split(max(1, self.at_once))
        ]
        reward, right = (torch.cat(found) for found in zip(*parts, strict=True))
        return Scored(reward, right, (targets != IGNORE).sum(1))


def _targets(labels: torch.Tensor, part: Stream, turns: RewardTurns, asked: torch.Tensor) -> torch.Tensor:
    """[B, S]: at each text token behind the first image the word to be said next, IGNORE where none is rewarded.

    `asked` [B, 1]: the rows where the head is asked; what stands behind an image that it does not see there is not rewarded.
    """
    following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], 1)
    behind = (part.visual >= 0).long().cumsum(1) > 0
    behind = behind & ~unseen(asked[:, 0], part.visual)
    following = following.masked_fill(~behind | (part.visual >= 0), IGNORE)
    if turns == "all":
        return following
    learnt = following != IGNORE
    begins = learnt & ~torch.cat([torch.zeros_like(learnt[:, :1]), learnt[:, :-1]], 1)
    number = begins.long().cumsum(1)
    if turns == "first":
        return following.masked_fill(number != 1, IGNORE)
    wanted = (
        number.gather(1, asked) + (~learnt.gather(1, asked)).long()
    )  # behind an image the answer's first word may be unsaid
    return following.masked_fill(number != wanted, IGNORE)


def _read(
    top: Stream, targets: torch.Tensor, base: Trunk, sets: int, whole: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and right words [G, B] of G x B rows that left the last layer; `whole` [B, S, D]: those of the unpruned base."""
    B = len(targets)
    words = targets.repeat(sets, 1).gather(1, top.place.clamp(min=0)).masked_fill(top.place < 0, IGNORE)
    row, column = (words != IGNORE).nonzero(as_tuple=True)
    logits, said = base.logits(top.hidden[row, column]), words[row, column]
    likely = logits.log_softmax(-1)
    if whole is None:
        value = likely.gather(1, said[:, None])[:, 0]
    else:
        full = base.logits(whole[row % B, top.place[row, column]]).log_softmax(-1)
        value = -(full.exp() * (full - likely)).sum(-1)
    count = torch.zeros(sets * B, device=row.device).index_add(0, row, torch.ones_like(value))
    reward = torch.zeros_like(count).index_add(0, row, value) / count.clamp(min=1)
    right = torch.zeros_like(count).index_add(0, row, (logits.argmax(-1) == said).float())
    return reward.view(sets, B), right.view(sets, B)


def _best(score: torch.Tensor, columns: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """[B, 1, r]: the set that pruning keeps."""
    return front(highest(score, columns >= 0, most), int(most.max()))[:, None]


def _best_discounted(
    likeness: torch.Tensor, score: torch.Tensor, columns: torch.Tensor, most: torch.Tensor
) -> torch.Tensor:
    """`_best`, as `twig-discount` picks."""
    order = discounted(score.square(), likeness, columns >= 0, int(most.max()))
    return order.masked_fill(torch.arange(order.shape[1], device=most.device) >= most[:, None], -1)[:, None]


def _likeness(part: Stream, asked: torch.Tensor, seen: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[B, V', V']: cosines of what the text between the image and the asked row [B] cannot say of the tokens at `columns`."""
    at = torch.arange(part.width, device=asked.device)
    last = at.expand_as(seen).masked_fill(seen < 0, -1).max(1, keepdim=True).values
    between = (at > last) & (at <= asked[:, None]) & part.real()
    text = part.take(front(between, int(between.sum(1).max())))
    return cosine(unsaid(part.take(columns).hidden, text.hidden, text.real())[0])


def _laid(picks: torch.Tensor, columns: torch.Tensor, width: int) -> torch.Tensor:
    """[G, B, S] bool over the tokens of each row, from picks [B, G, r] among `columns` [B, V']."""
    B, G, _ = picks.shape
    at = columns[:, None].expand(-1, G, -1).gather(2, picks.clamp(min=0)).masked_fill(picks < 0, width)
    laid = torch.zeros(B, G, width + 1, dtype=torch.bool, device=picks.device).scatter(2, at, True)
    return laid[..., :-1].transpose(0, 1)


def _idle(states: Stream, twig: Twig) -> torch.Tensor:
    """0 that hangs on the head: a batch without image asks nothing of it, and its gradient is 0, not absent."""
    attention, x = twig.layers[-1].self_attn, states.hidden[:1, :1]
    heads = [p.out_features // attention.head_dim for p in (attention.q_proj, attention.k_proj)]
    query, keys = (x.new_zeros(1, n, m, attention.head_dim) for n, m in zip(heads, (1, 0), strict=True))
    seen = torch.zeros(1, 1, 0, dtype=torch.bool, device=x.device)
    return twig.pruning_head(x, query, x[:, :0], keys, seen).sum()


def _figures(found: Scored, samples: int) -> dict:
    spread = found.reward.std(0) if len(found.reward) > 1 else torch.zeros_like(found.reward[0])
    means = {"reward": found.reward.mean(0).sum() / samples, "spread": spread.sum() / samples}
    # Of the sets of a sample one stands for all: the words are counted once.
    return {"answers": found.answers.sum(), "right": found.right.mean(0).sum(), "means": means}
