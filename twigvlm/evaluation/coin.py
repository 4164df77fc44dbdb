"""Drafts that a coin accepts: what speculation would gain on models that have no trained twig."""

from __future__ import annotations

import random

import numpy as np
import torch

from ..decoding.choose import Chooser
from ..decoding.draft import DraftTree, fetch


class CoinChooser(Chooser):
    """Lets a seeded coin decide acceptance, for models whose drafts are never right. Figures are simulated.

    Of the children of a node each is right with the same probability P if those before it are wrong: the r-th with
    P (1-P)^(r-1). That is a kind assumption for wide trees (a real twig's second choice is right less often), and the twig knows it: it
    believes just that.
    """

    def __init__(self, settings, probability: float, seed: int = 0):
        super().__init__(settings)
        self.probability, self.coin = probability, random.Random(seed)

    def propose(self, logits, voices, drafted, vocabulary):
        token, score = super().propose(logits, voices, drafted, vocabulary)
        return token, torch.ones_like(score)  # random weights know no confidence: always the whole draft

    def branch(self, logits, voices, paths, children, vocabulary):
        tokens, believed = super().branch(logits, voices, paths, children, vocabulary)
        chances = [self.probability * (1 - self.probability) ** rank for rank in range(children)]
        return tokens, torch.tensor(chances, device=tokens.device).log().expand_as(believed)

    def judge(self, logits, tree, voices):
        """At each node the child that the coin chooses, or a token that is none of its children."""
        choice = logits.argmax(-1)
        return self._judge_chain(choice, tree, logits.shape[-1]) if tree.chain else self._judge_tree(choice, tree)

    def _judge_tree(self, choice: torch.Tensor, tree: DraftTree) -> torch.Tensor:
        """Children stand in their order behind one another; the coin is thrown for each until one is right."""
        table = fetch(torch.cat([choice, tree.token, tree.parent, tree.count[:, None]], 1))
        found, *told = (
            part.tolist() for part in np.split(table, np.cumsum([choice.shape[1], tree.width, tree.width]), 1)
        )
        for b, (tokens, parents, (count,)) in enumerate(zip(*told, strict=True)):
            for node in range(-1, count):
                children = [t for t, parent in zip(tokens[:count], parents, strict=False) if parent == node]
                right = next((t for t in children if self.coin.random() < self.probability), None)
                taken = {*children, -1}
                found[b][node + 1] = (
                    next(t for t in range(len(taken) + 1) if t not in taken) if right is None else right
                )
        return torch.tensor(found, device=choice.device)

    def _judge_chain(self, choice: torch.Tensor, tree: DraftTree, vocabulary: int) -> torch.Tensor:
        heads = [[self.coin.random() < self.probability for _ in range(tree.width)] for _ in range(len(choice))]
        right = torch.tensor(heads, dtype=torch.bool, device=choice.device).reshape(tree.token.shape)
        drafted = torch.where(right, tree.token, (tree.token + 1) % vocabulary)
        return torch.cat([drafted, choice[:, -1:]], 1)
