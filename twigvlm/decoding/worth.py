"""As wide and as deep a draft as pays on this machine: `tree="auto"`.

A node of a draft is worth the chance that the base goes that way, the product of what the twig believes of the tokens
on its path, set right by how often it was right at each depth. A round is worth the tokens that it may write, at the
seconds that a token takes nowadays, less the seconds of its draft steps and of its verification. So a node is
verified if it pays for its row, another level is drafted if the best nodes of it would pay for the step, and where one
path is all that pays the draft is a chain. The host decides, with one small read of the device a level. The answer
does not depend on it (beyond the last bits of sums).

Legend: B rows, C nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .pace import LONGEST, PRIOR, WEIGHT, Pace

if TYPE_CHECKING:
    from .loop import Step

DEEPEST = 16  # levels
CHILDREN = 4  # of a node: what is less likely than three others never pays
WIDEST = 8  # nodes of a level that have children
ROUNDS = 50.0  # that are remembered
MOST_RIGHT = 1.25  # belief is raised by no more than this


@dataclass
class Worth(Pace):
    """Chooses the shape of every draft while it grows; one for a model and a batch size, kept between generations."""

    rows: int = 1
    asked: np.ndarray = field(
        default_factory=lambda: np.zeros(DEEPEST)
    )  # drafts that went on at a depth, all right before
    right: np.ndarray = field(default_factory=lambda: np.zeros(DEEPEST))  # and there too
    believed: np.ndarray = field(default_factory=lambda: np.zeros(DEEPEST))  # what the twig believed of it
    seconds: float = 0.0  # of the last rounds, by the measured costs
    tokens: float = 0.0  # that they wrote
    spent: float = 0.0  # of the round in work
    fused: bool = False  # this round's draft is verified with the prompt, where a row costs its share of a large block

    def row(self) -> float:
        """Seconds for one more node in a verification that has some."""
        some, many, n = self.costs.verify[1], self.costs.verify[-1], len(self.costs.verify)
        return many / n if self.fused else max(many - some, 0.0) / (n - 2)

    def length(self) -> int:
        """Levels at most."""
        pays = self.hit(0) * self.token() > self.costs.draft + self.row()
        found = DEEPEST * pays if self.fused else super().length()
        self.spent = self.costs.verify[0] + (self.costs.draft if found else 0.0)
        return DEEPEST if found and not self.fused and not self.idle else found

    def token(self) -> float:
        """Seconds that a token takes nowadays."""
        start = 1 / (self.rows * max(self.costs.rate(n, PRIOR) for n in range(LONGEST + 1)))
        return (self.seconds + WEIGHT * self.rows * start) / (self.tokens + WEIGHT * self.rows)

    def hit(self, depth: int) -> float:
        """How often a draft goes right at this depth (0 is the first)."""
        usual = (self.right.sum() + PRIOR * WEIGHT) / (self.asked.sum() + WEIGHT)
        at = min(depth, DEEPEST - 1)
        return float((self.right[at] + usual * WEIGHT) / (self.asked[at] + WEIGHT))

    def chances(self, level: int, paths: np.ndarray) -> np.ndarray:
        """Beliefs in paths down to the nodes of a level, as they have proved."""
        factor = ((self.right + WEIGHT) / (self.believed + WEIGHT)).clip(max=MOST_RIGHT)
        return (paths * factor[: level + 1].prod()).clip(max=1.0)

    def widen(self, level: int, fertile: np.ndarray) -> int:
        """How many nodes of a level are to have children, 0 to draft no further; `fertile` [B, C] are chances, 0 where nothing may follow.

        A child costs its row of the verification, each node beside the first its place in the draft step.
        """
        chances = np.sort(fertile, 1)[:, ::-1].sum(0)
        gains = chances[:WIDEST] * self.hit(level + 1) * self.token() - self.row()
        width = 1 + int((gains[1:] > self.costs.beside).sum())
        step = self.costs.draft + (width - 1) * self.costs.beside
        if gains[:width].sum() <= step:
            return 0
        self.spent += step
        return width

    def keep(self, chances: Sequence[np.ndarray]) -> int:
        """How many nodes of a row are to be verified; 0: none pays."""
        likely = np.sort(np.concatenate(chances, 1), 1)[:, ::-1].sum(0)[: len(self.costs.verify) - 1]
        costs = np.array(self.costs.verify[: len(likely) + 1])
        if self.fused:
            costs = costs[0] + self.row() * np.arange(len(costs))
        count = int((np.concatenate([[0.0], likely.cumsum() * self.token()]) - costs).argmax())
        self.spent += costs[count] - costs[0]
        return count

    def note(self, steps: Sequence[Step]) -> None:
        """What a round of all rows has shown."""
        fade = 1 - 1 / ROUNDS
        for counts in (self.asked, self.right, self.believed):
            counts *= fade
        if not self.fused:  # the prompt's seconds are not a token's
            self.seconds = fade * self.seconds + self.spent
            self.tokens = fade * self.tokens + sum(s.accepted + 1 for s in steps)
        for s in steps:
            self.learn(s.offered, s.accepted)
            parents, beliefs = np.array(s.parents), np.array(s.probabilities)
            for depth, node in enumerate([-1, *s.path][: min(s.offered, DEEPEST)]):
                self.asked[depth] += 1
                self.right[depth] += depth < s.accepted
                self.believed[depth] += beliefs[parents == node].sum()
