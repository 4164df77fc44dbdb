"""Drafts that branch (arXiv 2503.14075v3, appendix A; the scheme is EAGLE-2's).

A level: the twig gives E children to each node that was fed to it, and of all of them the W with the best paths are
fed next. After D levels the N best paths of all levels are verified. A path is worth the product of what the twig
believes of its tokens; a child is never worth more than its parent and stands behind it, so that the N best hold
the parents of all. No node is looked at one by one. A given shape reads nothing of the device; where the machine chooses
(`worth`), the paths of each level are read.

Legend: B rows, W nodes of a level, E children each, F nodes fed so far, C candidates, N nodes kept.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ..config import TreeShape
from ..model.stream import Stream, fit, front, join_raw
from .draft import DraftTree, fetch
from .loop import Decoder, Draft
from .worth import CHILDREN

NEVER = float("-inf")  # the path of a node that is not there


def grow(decoder: Decoder, shape: TreeShape) -> Draft:
    """A tree behind the newest token of every row, no deeper than a row has room for."""
    rooms = decoder.rooms(shape.D)
    if max(rooms) <= 0:
        return decoder.no_draft()
    tree = Growth(decoder, rooms)
    hidden = decoder.state.catch_up()[:, None]
    for level in range(max(rooms)):
        tree.branch(hidden, shape.E)
        if level + 1 < max(rooms):
            hidden = tree.feed(shape.W)
    return tree.prune(shape.N)


def grow_as_it_pays(decoder: Decoder) -> Draft:
    """A tree whose widths, depth and size the decoder's pace, a `Worth`, chooses while it grows."""
    worth = decoder.pace
    worth.fused = decoder.state.awaiting.width > 1
    rooms = decoder.rooms()
    deepest = max(rooms)
    if deepest <= 0:
        return decoder.no_draft()
    tree, chances = Growth(decoder, rooms, ends=False), []
    children = min(CHILDREN, decoder.twig.lm_head.out_features)
    hidden = decoder.state.catch_up()[:, None]
    for level in range(deepest):
        tree.branch(hidden, children)
        read = fetch(torch.stack([tree.paths[-1], tree.fertile]).float())
        # A path that is no number is kept, so that it is noticed when the round is read.
        found, fertile = worth.chances(level, np.nan_to_num(np.exp(read), nan=1.0))
        chances.append(found)
        width = worth.widen(level, fertile) if level + 1 < deepest else 0
        if not width:
            break
        hidden = tree.feed(width)
    count = worth.keep(chances)
    return tree.prune(count) if count else decoder.no_draft()


def branches(chooser: object) -> bool:
    """Whether a chooser gives second choices: not where somebody's own `propose` stands for ours, without a `branch`."""
    for kind in type(chooser).__mro__:
        if "branch" in vars(kind) or "propose" in vars(kind):
            return "branch" in vars(kind)
    return False


class Growth:
    """Candidates, level by level, and which of them the twig has read. They are numbered from 1 over all levels; 0 is the root."""

    def __init__(self, decoder: Decoder, rooms: list[int], ends: bool = True):
        """Without `ends` no end token is a candidate: what a node buys is the token behind it, and there is none."""
        self.decoder, self.root, self.with_ends = decoder, decoder.place, ends
        rows, device = len(rooms), self.root.device
        self.room = torch.tensor(rooms, device=device)[:, None]
        self.ends = torch.tensor(sorted(decoder.eos), device=device)
        # One entry a level, [B, W*E]: tokens, log of how far each is believed after its parent, the same of
        # all from the root to it (NEVER: not there), parents.
        self.tokens: list[torch.Tensor] = []
        self.believed: list[torch.Tensor] = []
        self.paths: list[torch.Tensor] = []
        self.parents: list[torch.Tensor] = []
        # One entry a feeding, W nodes: their numbers (0: not there), their states behind layer K-1, and whom they
        # see of all that were fed up to them [B, W, F].
        self.fed: list[torch.Tensor] = []
        self.streams: list[Stream] = []
        self.lines: list[torch.Tensor] = []
        # Of the nodes that were fed last, the root at first: paths, numbers, the tokens behind the root that lead to them.
        self.here = torch.where(self.room > 0, 0.0, NEVER)
        self.number = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.words = self.number.new_empty(rows, 1, 0)
        self.line = self.words.bool()

    def branch(self, hidden: torch.Tensor, children: int) -> None:
        """One more level: children of the nodes whose states [B, W, D] left the twig.

        `fertile` are the paths that may go on: nothing follows an end token, nor a node that fills its row's room.
        """
        d = self.decoder
        logits = d.twig.logits(hidden)
        token, believed = d.chooser.branch(logits, d.voices(), self.words, children, d.trunk.vocabulary)
        self.tokens.append(token.flatten(1))
        self.believed.append(believed.flatten(1))
        self.paths.append((self.here[..., None] + believed).flatten(1))
        self.parents.append(self.number.repeat_interleave(children, 1))
        last = self.room <= len(self.tokens)
        if len(self.ends):
            ended = torch.isin(self.tokens[-1], self.ends)
            last = last | ended
            if not self.with_ends:
                self.paths[-1] = self.paths[-1].masked_fill(ended, NEVER)
        self.fertile = self.paths[-1].masked_fill(last, NEVER)

    def feed(self, width: int) -> torch.Tensor:
        """The best nodes of the last level, `width` at most, through layers 0..K-1 and the twig: their states [B, W, D]."""
        depth, tokens = len(self.tokens), self.tokens[-1]
        children = tokens.shape[1] // self.here.shape[1]
        self.here, pick = _best(self.fertile, width)
        there, slot, token = self.here > NEVER, pick // children, tokens.gather(1, pick)
        before = sum(level.shape[1] for level in self.tokens[:-1])
        self.number = torch.where(there, before + pick + 1, 0)
        self.words = torch.cat([_lines(self.words, slot), token[..., None]], 2)
        self.line = _and_itself(_lines(self.line, slot))
        self.fed.append(self.number)
        self.lines.append(self.line)
        straight = self.line.shape[2] == len(
            self.fed
        )  # one node a level: each sees all before it, which needs no table
        sight = None if straight else self.line
        stream = self._enter(token, torch.where(there, depth, -1), sight)
        return self.decoder.state.run_twig(stream, sight=sight).hidden

    def prune(self, count: int) -> Draft:
        """The `count` best paths; ties go to the shallower node, so that nobody's parent is missing."""
        paths = torch.cat(self.paths, 1)
        best, order = _best(paths, count)
        alive = best != NEVER  # also where it is no number, which is noticed when the round is read
        width, full = fit(alive, order.shape[1])
        beyond = paths.shape[1] + 1
        kept = torch.where(alive, order + 1, beyond).sort(1).values[:, :width]  # by level again, then those not there
        token, believed, parent = (_numbered(t).gather(1, kept) for t in (self.tokens, self.believed, self.parents))
        depth = _numbered([torch.full_like(t, n + 1) for n, t in enumerate(self.tokens)]).gather(1, kept)
        steps = torch.arange(width, device=kept.device).expand_as(kept)
        seat = torch.zeros_like(_numbered(self.parents)).scatter(1, kept, steps)
        seat[:, 0] = -1
        tree = DraftTree(token, seat.gather(1, parent), believed.exp(), alive.sum(1), len(self.tokens))
        fed = torch.cat(self.fed, 1) if self.fed else kept[:, :0]
        arrival = torch.full_like(seat, -1).scatter(
            1, fed, torch.arange(fed.shape[1], device=fed.device).expand_as(fed)
        )
        arrival[:, 0] = -1
        heard = arrival.gather(1, kept)
        low = self._complete(tree, depth, heard, arrival.gather(1, parent))
        nodes = join_raw(self.streams).take(torch.where(tree.used(), low, -1), full)
        if _straight(tree, low):
            tree = replace(tree, chain=True)
        return Draft(tree, nodes, low, heard)

    def _complete(
        self, tree: DraftTree, depth: torch.Tensor, heard: torch.Tensor, parent: torch.Tensor
    ) -> torch.Tensor:
        """Kept nodes that were never fed go through layers 0..K-1 as well; where every node stands there, [B, N].

        `heard` and `parent` [B, N]: where a node and its parent stand among the fed ones, -1 is none.
        """
        missing = tree.used() & (heard < 0)
        width, _ = fit(missing, tree.width)
        if not width:
            return heard
        fed = sum(level.shape[1] for level in self.fed)
        pick = front(missing, width)
        token, deep, up = (t.gather(1, pick.clamp(min=0)) for t in (tree.token, depth, parent))
        lines = [torch.nn.functional.pad(line, (0, fed - line.shape[2])) for line in self.lines]
        root = torch.zeros(len(up), 1, fed, dtype=torch.bool, device=up.device)
        sight = _and_itself(_lines(torch.cat([root, *lines], 1), up + 1))
        self._enter(token, torch.where(pick < 0, -1, deep), sight)
        return torch.where(missing, fed + missing.long().cumsum(1) - 1, heard)

    def _enter(self, token: torch.Tensor, depth: torch.Tensor, sight: torch.Tensor | None) -> Stream:
        """Nodes through layers 0..K-1; -1 instead of a depth is no node."""
        d = self.decoder
        stream = d.trunk.tokens(token, torch.where(depth < 0, -1, self.root[:, None] + depth))
        stream = d.state.climb(stream, d.state.low, sight=sight)
        self.streams.append(stream)
        return stream


def _straight(tree: DraftTree, low: torch.Tensor) -> bool:
    """Whether this is a chain, which is verified with less ado; asked where looking costs nothing."""
    if low.device.type != "cpu":
        return False
    steps = torch.arange(tree.width)
    return bool((((tree.parent == steps - 1) & (low == steps)) | ~tree.used()).all())


def _best(paths: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest entries of [B, C] and where they stand; of equal ones the earlier."""
    best, order = paths.sort(dim=1, descending=True, stable=True)
    return best[:, :count], order[:, :count]


def _numbered(levels: list[torch.Tensor]) -> torch.Tensor:
    """[B, C+2]: entries of all levels at the candidates' numbers, 0 for the root and for one beyond."""
    return torch.nn.functional.pad(torch.cat(levels, 1), (1, 1))


def _lines(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, W, n]: rows [B, W] of [B, R, n]."""
    return table.gather(1, rows[..., None].expand(-1, -1, table.shape[2]))


def _and_itself(line: torch.Tensor) -> torch.Tensor:
    """[B, W, F + W]: besides whom it sees so far, each new node sees itself."""
    own = torch.eye(line.shape[1], dtype=torch.bool, device=line.device)
    return torch.cat([line, own.expand(len(line), -1, -1)], 2)
