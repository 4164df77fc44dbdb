"""The one decode loop (paper sections 3.2 and 3.3): draft with the twig, verify with the base, keep what was right.

Plain decoding is a draft of no tokens, the baseline is no twig, no pruning is the empty plan: all the
same code. The device is read once a round, and once more a drafted token where drafting may stop.
The loop prints nothing and knows no text; whoever consumes its steps does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..config import GenerationSettings
from ..model.finite import NotFinite, ScoresNotFinite
from ..model.stream import Stream, join, join_raw
from ..model.trunk import Trunk
from ..model.twig import Twig
from ..pruning.plan import Plan
from .choose import NO_SCORES, NO_TOKEN, Chooser, Voice
from .draft import DraftTree, chain, fetch, walk
from .pace import PATIENCE, Pace, now
from .prefill import Prompts, State, read

SEED_SPACE = 2**63


@dataclass(frozen=True)
class Step:
    """One round of a row: what the twig drafted, how much of it the base accepted, what was written.

    `tokens` are the accepted drafts and one token of the base, cut at the end of the answer (the end
    token itself is never among them), so that the steps' tokens in a row are the answer.
    """

    drafted: list[int]
    accepted: int
    tokens: list[int]
    probabilities: list[float] = field(default_factory=list)  # the twig's, of the drafted tokens
    parents: list[int] = field(
        default_factory=list
    )  # the drafted token that each stands behind; -1 is what was written
    path: list[int] = field(default_factory=list)  # the drafted tokens that were accepted
    seconds: tuple[float, float] | None = None  # of the round: drafting, and the base's forward; where it is traced
    believed: list[float] = field(
        default_factory=list
    )  # the base's probability of each of `tokens`; where it is traced

    @property
    def offered(self) -> int:
        """Drafted tokens in a row whose fate is known: those accepted, and one more if any stood behind them."""
        return len(self.path) + ((self.path[-1] if self.path else -1) in self.parents)


@dataclass
class Row:
    """One prompt and what has been written after it."""

    index: int  # in the batch
    voice: Voice
    limit: int  # new tokens
    tokens: list[int] = field(default_factory=list)
    done: bool = False


@dataclass(frozen=True)
class Draft:
    """Proposed tokens, and their hidden states as they left layer K-1."""

    tree: DraftTree
    nodes: Stream | None  # B N; None for an empty draft
    low: torch.Tensor  # B N, where a node stands among the scratch tokens of the caches below the twig
    heard: torch.Tensor  # B N, and of the twig's; -1: the twig has not read it


@dataclass(frozen=True)
class Verdict:
    """What the host reads of a round; lists have one entry a row."""

    accepted: list[int]
    token: list[int]  # the base's own, behind the accepted ones
    drafted: list[list[int]]  # the tree's tokens in its order
    probabilities: list[list[float]]
    parents: list[list[int]]
    path: list[list[int]]  # accepted nodes
    unread: list[bool]  # the last accepted node has not passed the twig
    entered: list[list[int]]  # prompt tokens in each cache, in the first round
    believed: list[list[float]]  # the base's probability of what is written, if it was asked for


class Decoder:
    """One generation over a batch of prompts; make a new one for the next.

    `stopping` are Hugging Face stopping criteria, asked after every token; one that has a parameter `row` is told
    which it is, and finds the ids on the host. `grow` replaces the chain of drafts: a function of this decoder
    that gives a Draft; `pace` chooses how long drafts are. While it writes and afterwards `state` holds caches
    and what was pruned.
    """

    def __init__(
        self,
        trunk: Trunk,
        twig: Twig | None,
        plan: Plan,
        settings: GenerationSettings,
        eos: Sequence[int] = (),
        chooser: Chooser | None = None,
        stopping: Sequence[Callable] | None = None,
        grow: Callable[[Decoder], Draft] | None = None,
        pace: Pace | None = None,
    ):
        self.trunk, self.plan, self.settings, self.pace = trunk, plan, settings, pace
        self.eos, self.stopping = frozenset(eos), [(rule, takes_row(rule)) for rule in stopping or ()]
        self.chooser = chooser or Chooser(settings)
        wanted = settings.draft_length if pace is None else plan.needs_twig or pace.length()
        self.speculative = twig is not None and bool(wanted)
        self.twig = twig if self.speculative or plan.needs_twig else None
        self.waits = pace is not None and not plan.needs_twig  # the twig's reading must pay as well
        self.grow = grow or Decoder.draft_chain
        self.state: State | None = None
        self.rows: list[Row] = []
        self._clock = 0.0

    @torch.inference_mode()
    def steps(self, prompts: Prompts) -> Iterator[list[tuple[int, Step]]]:
        """Write until every row is done; each round yields (row, step) of the rows that took part."""
        self.rows = self._rows(prompts)
        self.state = state = read(self.trunk, self.twig, self.plan, prompts, self.waits)
        if not self.speculative:
            state.dismiss_twig()
        self.place = state.length - 1  # B, of the newest token
        self._lap()
        first = True
        while self.rows:
            # What is evicted after prefill must be gone before a draft is read.
            draft = self.no_draft() if first and self.plan.evict is not None else self.grow(self)
            drafting = self._lap()
            top, root = self._verify(draft)
            verdict = self._judge(top, root, draft, first)
            seconds = self._split(draft, drafting, self._lap())
            yield self._write(verdict, seconds)
            self._lap()  # whoever consumes the steps took this one
            if first and self.plan.evict is not None:
                state.evict()
            first = False
            self._go_on(draft, verdict)

    def _lap(self) -> float:
        """Seconds since the last call, the device synchronised; nothing is measured unless the settings ask for it."""
        if not self.settings.traced:
            return 0.0
        before, self._clock = self._clock, now(self.trunk.device)
        return self._clock - before

    def _split(self, draft: Draft, drafting: float, verifying: float) -> tuple[float, float] | None:
        """A round's seconds; where nothing was drafted, the newest token's way through the low layers is the base's."""
        if not self.settings.traced:
            return None
        return (drafting, verifying) if draft.nodes is not None else (0.0, drafting + verifying)

    def _rows(self, prompts: Prompts) -> list[Row]:
        rows = []
        for index, ids in enumerate(prompts.ids):
            generator = torch.Generator()
            if prompts.seeds:
                generator.manual_seed(prompts.seeds[index] % SEED_SPACE)
            else:
                generator.seed()
            limit = self.settings.max_new_tokens
            limit = min(limit if isinstance(limit, int) else limit[index], self.trunk.context - len(ids))
            rows.append(Row(index, Voice(generator, list(ids)), limit))
        return rows

    # ------------------------------------------------------------------ draft

    def no_draft(self) -> Draft:
        empty = self.place.new_empty(len(self.rows), 0)
        nothing = DraftTree(empty, empty, empty.float(), torch.zeros_like(self.place), 0, True)
        return Draft(nothing, None, empty, empty)

    def rooms(self, longest: int | None = None) -> list[int]:
        """Tokens that may be drafted in each row, one behind the other, `longest` at most: a draft that could not be used is none."""
        short = self.waits and max(len(r.tokens) for r in self.rows) < PATIENCE
        if not self.speculative or short:
            return [0] * len(self.rows)
        if longest is None:
            longest = self.settings.draft_length if self.pace is None else self.pace.length()
        return [min(longest, r.limit - len(r.tokens) - 1) for r in self.rows]

    def draft_chain(self) -> Draft:
        """Let the twig write ahead, token by token, until it is unsure (a token it was unsure of is kept)."""
        rooms, settings, state = self.rooms(), self.settings, self.state
        longest = max(rooms)
        if longest <= 0:
            return self.no_draft()
        room = torch.tensor(rooms, device=self.place.device)
        ends = torch.tensor(sorted(self.eos), device=room.device)
        going, sure = room > 0, min(rooms) > 0  # `sure`: every row is known to go on
        hidden, tokens, scores, alive, nodes = state.catch_up(), [], [], [], []
        for n in range(longest):
            token, score = self.chooser.propose(self.twig.logits(hidden), self.voices(), tokens, self.trunk.vocabulary)
            goes = None if sure else going[:, None]
            nodes.append(self._enter(token[:, None], (self.place + (n + 1))[:, None], goes, sure))
            tokens.append(token)
            scores.append(score)
            alive.append(going)
            going = going & (room > n + 1) & (score >= settings.draft_confidence)
            if len(ends):
                going = going & ~torch.isin(token, ends)
            if n + 1 == longest:
                break
            if settings.draft_confidence > 0:
                told = fetch(going)
                if not told.any():
                    break
                sure = bool(told.all())
            else:
                sure = sure and not len(ends) and min(rooms) > n + 1
            hidden = state.run_twig(nodes[-1]).hidden[:, 0]
        count = torch.stack(alive, 1).sum(1)
        tree = chain(torch.stack(tokens, 1), torch.stack(scores, 1), count)
        low = torch.arange(len(tokens), device=count.device).expand_as(tree.token)
        return Draft(tree, join_raw(nodes), low, torch.where(low < count[:, None] - 1, low, -1))

    def _enter(
        self, token: torch.Tensor, place: torch.Tensor, alive: torch.Tensor | None = None, full: bool = True
    ) -> Stream:
        """Tokens [B, n] at `place` [B, n] through the layers below the twig."""
        place = place if alive is None else torch.where(alive, place, -1)
        stream = self.trunk.tokens(token, place, full)
        return self.state.climb(stream, self.state.low)

    # ------------------------------------------------------------------ verify

    def _verify(self, draft: Draft) -> tuple[Stream, torch.Tensor | None]:
        """The base's other layers over what awaits them and all drafts; and where the newest token stands.

        None is right before the drafts, in every row.
        """
        state = self.state
        parts = [state.awaiting] if draft.nodes is None else [state.awaiting, draft.nodes]
        top = state.climb(join(parts), state.high, draft.tree)
        whole = draft.nodes is None or draft.nodes.full  # else nodes that no row has are not among the top's
        return top, None if top.full and whole else top.count() - draft.tree.count - 1

    def _judge(self, top: Stream, root: torch.Tensor | None, draft: Draft, first: bool) -> Verdict:
        """Ask the base's head, read the answer, and commit to it."""
        tree, caches = draft.tree, self.state.caches
        hidden = top.hidden[:, top.width - tree.width - 1 :] if root is None else top.tail(root, tree.width + 1)
        logits = self.trunk.logits(hidden)
        choice = self.chooser.judge(logits, tree, self.voices())
        path = walk(tree, choice)
        accepted = (path >= 0).sum(1)
        last = _pick(path, accepted - 1)
        token = choice.gather(1, (last + 1)[:, None])[:, 0]
        if first and self.state.sound is not None:
            token = token.where(self.state.sound, NO_SCORES)
        unread = (accepted > 0) & (_pick(draft.heard, last) < 0)
        entered = self.state.prompts() if first else []
        believed = believe(logits, choice, path) if self.settings.traced else logits.new_empty(len(path), 0)
        verdict = _read(tree, path, [accepted, token, unread, *entered], believed)
        _check(verdict, self.plan.needs_twig)
        if first:
            for cache, known in zip(caches, verdict.entered, strict=True):
                cache.expect(known)
        self._commit(draft, path, accepted, unread, entered, verdict)
        self.newest, self.last, self.unread = token, last, unread
        self.place = self.place + accepted + 1
        return verdict

    def _commit(self, draft: Draft, path, accepted, unread, entered, verdict: Verdict) -> None:
        """Every cache keeps what awaited it and the accepted path; of a chain that is a prefix, of a tree rows move."""
        state, tree = self.state, draft.tree
        moving = None if tree.chain else path
        for i, segment in enumerate(state.segments):
            if segment.first < state.depth:
                segment.cache.commit(accepted, verdict.accepted, _at(draft.low, moving))
                continue
            before = entered[i] if entered else torch.ones_like(accepted)
            known = verdict.entered[i] if entered else [1] * len(self.rows)
            behind = None if moving is None else torch.where(moving < 0, -1, moving + before[:, None])
            total = [n + a for n, a in zip(known, verdict.accepted, strict=True)]
            segment.cache.commit(before + accepted, total, behind, before)
        if state.above is not None:
            heard = [a - u for a, u in zip(verdict.accepted, verdict.unread, strict=True)]
            state.above.commit(accepted - unread.long(), heard, _at(draft.heard, moving))

    # ------------------------------------------------------------------ write and go on

    def _write(self, verdict: Verdict, seconds: tuple[float, float] | None) -> list[tuple[int, Step]]:
        """Append to the answers, each up to its end."""
        out = []
        for b, row in enumerate(self.rows):
            drafted, path = verdict.drafted[b], verdict.path[b]
            written = self._append(row, [*(drafted[node] for node in path), verdict.token[b]])
            believed = verdict.believed[b][: len(written)]
            step = Step(
                drafted, len(path), written, verdict.probabilities[b], verdict.parents[b], path, seconds, believed
            )
            out.append((row.index, step))
        if self.pace is not None:
            self.pace.note([step for _, step in out])
        return out

    def _append(self, row: Row, tokens: list[int]) -> list[int]:
        """What was really written of `tokens`."""
        before = len(row.tokens)
        for token in tokens:
            if token in self.eos:
                row.done = True
                break
            row.tokens.append(token)
            row.voice.write(token)
            if len(row.tokens) >= row.limit or self._stops(row):
                row.done = True
                break
        return row.tokens[before:]

    def _stops(self, row: Row) -> bool:
        here = torch.tensor([row.voice.history]) if self.stopping else None
        for rule, aware in self.stopping:  # Hugging Face's own expect ids beside the model
            answer = rule(here, None, row=row.index) if aware else rule(here.to(self.trunk.device), None)
            if fetch(answer.any()) if torch.is_tensor(answer) else np.any(answer):
                return True
        return False

    def _go_on(self, draft: Draft, verdict: Verdict) -> None:
        """Finished rows leave; each other row's newest token goes through the trunk, and through the twig what it has not read."""
        state, nodes, unread = self.state, draft.nodes, verdict.unread
        order = _fill([not row.done for row in self.rows])
        if len(order) < len(self.rows):
            index = state.leave(order)
            self.rows, unread = [self.rows[i] for i in order], [unread[i] for i in order]
            if not self.rows:
                return
            self.newest, self.last, self.unread, self.place = (
                t.index_select(0, index) for t in (self.newest, self.last, self.unread, self.place)
            )
            nodes = nodes.select(index) if nodes is not None else None
        fresh = state.awaiting = self._enter(self.newest[:, None], self.place[:, None])
        state.commit_low(1)
        if state.above is not None:
            if any(unread):
                state.missed.append(nodes.take(torch.where(self.unread, self.last, -1)[:, None], full=all(unread)))
            state.missed.append(fresh)

    def voices(self) -> list[Voice]:
        return [row.voice for row in self.rows]


def takes_row(rule: Callable) -> bool:
    """Whether a stopping criterion has a parameter `row`."""
    try:
        return "row" in inspect.signature(rule).parameters
    except (TypeError, ValueError):  # some callables have no signature to look at
        return False


def believe(logits: torch.Tensor, choice: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """[B, D+1] fp32: the base's probability, before any processor, of each token on a path [B, D] and of the one behind.

    `logits` [B, N+1, vocabulary] are its own, `choice` [B, N+1] what was chosen; entries behind the path's end say nothing.
    """
    sure = logits.float().softmax(-1).gather(2, choice.clamp(min=0)[..., None])[..., 0]
    return sure.gather(1, torch.nn.functional.pad(path + 1, (1, 0)))


def _read(tree: DraftTree, path: torch.Tensor, columns: Sequence[torch.Tensor], believed: torch.Tensor) -> Verdict:
    """The one read of a round: everything in one table of 32-bit words, numbers as they are."""
    head = torch.stack([*columns, tree.count], 1)
    words = torch.cat([head, path, tree.token], 1).to(torch.int32)
    numbers = torch.cat([tree.score, believed], 1).view(torch.int32)
    behind = [] if tree.chain else [tree.parent.to(torch.int32)]
    table = fetch(torch.cat([words, numbers, *behind], 1))
    n, N = head.shape[1], tree.width
    drafts, scored, ends = n + path.shape[1], words.shape[1], words.shape[1] + numbers.shape[1]
    accepted, token, unread, *entered, counts = table[:, :n].T.tolist()
    found, drafted = table[:, n:drafts].tolist(), table[:, drafts:scored].tolist()
    told = np.ascontiguousarray(table[:, scored:ends]).view(np.float32)
    scores, sure = told[:, :N].tolist(), told[:, N:].tolist()
    parents = [range(-1, N - 1)] * len(token) if tree.chain else table[:, ends:].tolist()
    return Verdict(
        accepted,
        token,
        *([list(row[:k]) for row, k in zip(part, counts, strict=True)] for part in (drafted, scores, parents)),
        [row[:k] for row, k in zip(found, accepted, strict=True)],
        [bool(u) for u in unread],
        entered,
        [row[: k + 1] for row, k in zip(sure, accepted, strict=True)],
    )


def _check(verdict: Verdict, needs_twig: bool) -> None:
    if NO_SCORES in verdict.token:
        raise ScoresNotFinite(needs_twig)
    if NO_TOKEN in verdict.token:
        raise NotFinite("the base's logits are not finite")
    if any(math.isnan(p) for row in verdict.probabilities for p in row):
        raise NotFinite("the twig's logits are not finite")


def _pick(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table[b, index[b]] for [B, N] and [B]; -1 where the index is negative."""
    if not table.shape[1]:
        return torch.full_like(index, -1)
    return torch.where(index < 0, -1, table.gather(1, index.clamp(min=0)[:, None])[:, 0])


def _at(table: torch.Tensor, path: torch.Tensor | None) -> torch.Tensor | None:
    """The entries [B, D] of `table` [B, N] along a path [B, D]; -1 stays."""
    return None if path is None else torch.where(path < 0, -1, table.gather(1, path.clamp(min=0)))


def _fill(stays: Sequence[bool]) -> list[int]:
    """Which old row each new one is: those that stay keep their place, the last ones fill the holes."""
    movers = [i for i, stay in enumerate(stays) if stay and i >= sum(stays)]
    return [i if stays[i] else movers.pop() for i in range(sum(stays))]
