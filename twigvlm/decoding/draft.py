"""A draft as tensors: a tree of tokens behind the newest token of each row; a chain is a tree of width 1.

No model inside. Nodes stand in level order, a parent before its children; -1 is the root, the newest
token that is already written. Legend: B rows, N nodes, D levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


def fetch(tensor: torch.Tensor) -> np.ndarray:
    """Read the device: the host waits here, and nowhere else."""
    return tensor.cpu().numpy()


@dataclass(frozen=True)
class DraftTree:
    """`score`: how far the drafter believes in each token after its parent. Rows may use fewer than N nodes."""

    token: torch.Tensor  # B N
    parent: torch.Tensor  # B N
    score: torch.Tensor  # B N fp32
    count: torch.Tensor  # B, nodes of a row; the others are padding
    levels: int  # of the deepest row, or more
    chain: bool = False  # every node's parent is the node before it

    @property
    def width(self) -> int:
        return self.token.shape[1]

    def used(self) -> torch.Tensor:
        """[B, N] bool: which nodes are there."""
        return torch.arange(self.width, device=self.token.device) < self.count[:, None]

    def depth(self) -> torch.Tensor:
        """[B, N]: 1 for children of the root."""
        return self.ancestors()[:, 1:, 1:].sum(2)

    def parents(self) -> list[list[int]]:
        """`parent` on the host, which knows a chain's without reading the device."""
        if self.chain:
            return [list(range(-1, self.width - 1)) for _ in self.token]
        return fetch(self.parent).tolist()

    def ancestors(self) -> torch.Tensor:
        """[B, N+1, N+1] bool, root first: row i marks node i itself and all that it stands behind."""
        return self._ancestors

    @cached_property
    def _ancestors(self) -> torch.Tensor:
        rows, width = self.token.shape
        seen = torch.eye(width + 1, dtype=torch.bool, device=self.token.device).expand(rows, -1, -1)
        up = torch.nn.functional.pad(self.parent + 1, (1, 0))[..., None].expand(-1, -1, width + 1)
        for _ in range(self.levels):
            seen = seen | seen.gather(1, up)
        return seen

    def sight(self, root: torch.Tensor, width: int) -> torch.Tensor | None:
        """[B, S, S] bool for a block of S = `width` tokens whose nodes stand behind index `root` [B].

        All before the root sees what came before it, nodes see that and their ancestors. None for a
        chain, where that is the lower triangle.
        """
        if self.chain:
            return None
        steps = torch.arange(width, device=root.device)
        node = (steps - root[:, None]).clamp(0, self.width)  # B S, 0 up to the root
        seen = self.ancestors().gather(1, node[..., None].expand(-1, -1, self.width + 1))
        seen = seen.gather(2, node[:, None].expand(-1, width, -1))
        before = steps <= root[:, None, None]  # B 1 S
        return (seen | before) & (steps <= steps[:, None])


def chain(tokens: torch.Tensor, score: torch.Tensor, count: torch.Tensor) -> DraftTree:
    """The tree of width 1: tokens [B, N] one after the other."""
    width = tokens.shape[1]
    parent = torch.arange(-1, width - 1, device=tokens.device).expand_as(tokens)
    return DraftTree(tokens, parent, score, count, width, True)


def walk(tree: DraftTree, choice: torch.Tensor) -> torch.Tensor:
    """[B, D]: the nodes that the base would have written itself, from the root down; -1 behind the last.

    `choice` [B, N+1] is what the base writes after the root and after each node.
    """
    if not tree.width:
        return choice.new_empty(len(choice), 0)
    right = (tree.token == choice.gather(1, tree.parent + 1)) & tree.used()
    if tree.chain:
        good = right.long().cumprod(1) > 0
        return torch.arange(tree.width, device=choice.device).expand_as(good).masked_fill(~good, -1)
    here, path = torch.full_like(tree.count, -1), []
    going = torch.ones_like(here, dtype=torch.bool)
    for _ in range(tree.levels):
        fits = right & (tree.parent == here[:, None]) & going[:, None]
        going = fits.any(1)
        here = torch.where(going, fits.long().argmax(1), here)
        path.append(torch.where(going, here, -1))
    return torch.stack(path, 1)
