"""The one decode loop (paper sections 3.2 and 3.3): draft with the twig, verify with the base, roll back.

Plain decoding is zero drafts, the baseline is no twig, no pruning is the empty plan: all the same
code. The loop prints nothing and knows no text; whoever consumes its steps does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..config import GenerationSettings
from ..model.cache import Cache
from ..model.stream import Stream, join
from ..model.trunk import Trunk
from ..model.twig import Twig
from ..pruning.plan import Plan, Probe, Stage
from .choose import Chooser, Proposal

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


@dataclass
class Row:
    """One prompt and what has been written after it."""

    index: int  # in the batch
    prompt: list[int]
    limit: int  # new tokens
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def history(self) -> list[int]:
        return self.prompt + self.tokens


class Decoder:
    """One generation over a batch of prompts; make a new one for the next.

    `stopping` are Hugging Face stopping criteria, asked after every token. After iteration `kept`
    holds each row's kept visual indices (None without pruning) and `visual_per_layer` the measured
    visual tokens of each row that entered each base layer.
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
    ):
        self.trunk, self.twig, self.plan, self.settings = trunk, twig, plan, settings
        self.eos, self.stopping = frozenset(eos), list(stopping or [])
        self.chooser = chooser or Chooser(settings)
        self.speculative = twig is not None and settings.draft_length > 0
        self.twigged = twig is not None and (self.speculative or plan.needs_twig)
        self.depth = twig.config.K if self.twigged else 0
        self.kept: list[torch.Tensor] | None = None
        self.visual_per_layer: list[list[int]] = []
        self.cache: Cache | None = None
        self._pending = list(plan.stages)
        probed = {s.probe.layer for s in plan.stages if s.probe and s.probe.layer is not None}
        self._probed = probed
        self._boundaries = sorted({s.before for s in plan.stages} | probed | {p + 1 for p in probed})
        self._scores: dict[Probe, torch.Tensor] = {}

    @torch.inference_mode()
    def steps(self, prompt: Stream, ids: list[list[int]]) -> Iterator[list[tuple[int, Step]]]:
        """Write until every row is done; each round yields (row, step) of the rows that took part."""
        self.rows = self._rows(ids, prompt.lengths)
        slots = self.trunk.L + (self.twig.config.T if self.twig is not None else 0)
        self.cache = Cache(slots, len(self.rows), max(r.limit for r in self.rows) + self.settings.draft_length + 2)
        self.images = [n // self.trunk.V for n in prompt.visual.sum(1).tolist()]
        block, twig_out = self._prefill(prompt)
        while self.rows:
            drafts, drafted = self._draft(twig_out)
            block = join([block, *drafted])
            yield self._verify(block, drafts)
            if self.rows:
                block, twig_out = self._restart(block, drafts)

    def _rows(self, ids: list[list[int]], lengths: Sequence[int]) -> list[Row]:
        rows = []
        for index, (prompt, length) in enumerate(zip(ids, lengths, strict=True)):
            generator = torch.Generator()
            if self.settings.seed is None:
                generator.seed()
            else:
                generator.manual_seed((self.settings.seed + index) % SEED_SPACE)
            limit = min(self.settings.max_new_tokens, self.trunk.context - length)
            rows.append(Row(index, prompt, limit, generator))
        return rows

    # ------------------------------------------------------------------ prefill and pruning

    def _prefill(self, prompt: Stream) -> tuple[Stream, Stream | None]:
        """The prompt below the twig, then the twig, then its cut: (what awaits the base, the twig's output)."""
        self._last = [n - 1 for n in prompt.lengths]
        self._visual_places = [prompt.positions[b][prompt.visual[b]] for b in range(prompt.rows)]
        stream = self._climb(prompt, 0, self.depth)
        twig_out = None
        if self.twigged:
            head, last = self.twig.layers[:-1], self.twig.layers[-1:]
            below = self.trunk.run(head, stream, self.cache)
            twig_out = self.trunk.run(last, below, self.cache)
            for probe in self._probes("twig"):
                self._scores[probe] = self.trunk.attention(last[0], below, self.cache, self._queries(below, probe))
        return self._cut(stream, self.depth), twig_out

    def _climb(self, stream: Stream, first: int, last: int) -> Stream:
        """Through base layers first..last-1, with the plan's cuts on the way and its probes read."""
        layer = first
        while layer < last:
            stream = self._cut(stream, layer)
            stop = next((b for b in self._boundaries if layer < b < last), last)
            below = stream
            stream = self.trunk.run(self.trunk.layers[layer:stop], stream, self.cache)
            if len(self.visual_per_layer) == layer:
                self.visual_per_layer += [below.visual.sum(1).tolist()] * (stop - layer)
                if layer in self._probed and self._pending:
                    for probe in self._probes("base", layer):
                        rows = self._queries(below, probe)
                        self._scores[probe] = self.trunk.attention(self.trunk.layers[layer], below, self.cache, rows)
            layer = stop
        return stream

    def _probes(self, source: str, layer: int | None = None) -> set[Probe]:
        probes = {s.probe for s in self._pending if s.probe is not None}
        return {p for p in probes if p.source == source and p.layer == layer}

    def _queries(self, stream: Stream, probe: Probe) -> torch.Tensor:
        """[B, S] bool: the rows whose attention is the score."""
        ends = torch.tensor(self._last, device=stream.positions.device)[:, None]
        if probe.rows == "last":
            return (stream.positions == ends) & stream.valid()
        # The text after the last image; where an image is last, its last token, as with "last".
        places = [int(p[-1]) if len(p) else -1 for p in self._visual_places]
        after = torch.tensor(places, device=ends.device)[:, None].clamp(max=ends - 1)
        return (stream.positions > after) & (stream.positions <= ends) & stream.valid()

    def _cut(self, stream: Stream, layer: int) -> Stream:
        """Apply the stage before this layer, if one is due."""
        if not self._pending or self._pending[0].before != layer:
            return stream
        stage = self._pending.pop(0)
        scores = self._scores.get(stage.probe) if stage.probe is not None else None
        keep, kept = ~stream.visual, []
        for b in range(stream.rows):
            places = stream.visual[b].nonzero()[:, 0]
            chosen = self._select(stage, scores[b, places] if scores is not None else None, places, b)
            keep[b, places[chosen]] = True
            kept.append(torch.searchsorted(self._visual_places[b], stream.positions[b, places[chosen]]).cpu())
        if self.kept is None:
            self.kept = kept
        return stream.keep(keep)

    def _select(self, stage: Stage, scores: torch.Tensor | None, places: torch.Tensor, row: int) -> torch.Tensor:
        return stage.select(scores, len(places), stage.keep * self.images[row]).to(places.device)

    # ------------------------------------------------------------------ draft, verify, roll back

    def _draft(self, twig_out: Stream | None) -> tuple[list[Proposal], list[Stream]]:
        """Let the twig write ahead: the drafts, and their hidden states as they left layer K-1."""
        settings, twig = self.settings, self.twig
        drafts, streams = [Proposal() for _ in self.rows], []
        rooms = [min(settings.draft_length, r.limit - len(r.tokens) - 1) if self.speculative else 0 for r in self.rows]
        going = [room > 0 for room in rooms]
        histories = self._histories()
        generators = [r.generator for r in self.rows]
        hidden = twig_out.at([n - 1 for n in twig_out.lengths]) if any(going) else None
        while any(going):
            self.chooser.propose(twig.logits(hidden), drafts, histories, generators, going)
            new = self._tokens([d.tokens[-1] if d.tokens else 0 for d in drafts], drafts, going)
            streams.append(new)
            going = [
                go and len(d.tokens) < room and d.probabilities[-1] >= settings.draft_confidence and d.tokens[-1] not in self.eos
                for go, d, room in zip(going, drafts, rooms, strict=True)
            ]  # fmt: skip
            if any(going):
                hidden = self.trunk.run(twig.layers, new.limit([int(go) for go in going]), self.cache).hidden[:, 0]
        return drafts, streams

    def _tokens(self, tokens: list[int], drafts: list[Proposal], going: list[bool]) -> Stream:
        """One token of each going row through the layers below the twig."""
        ahead = zip(self.rows, drafts, strict=True)
        places = [min(len(r.prompt) + len(r.tokens) + len(d.tokens), self.trunk.context) - 1 for r, d in ahead]
        stream = self.trunk.tokens(tokens, places, [int(go) for go in going])
        return self.trunk.run(self.trunk.layers[: self.depth], stream, self.cache)

    def _verify(self, block: Stream, drafts: list[Proposal]) -> list[tuple[int, Step]]:
        """The base reads all drafts at once; accepted ones stay, the rest is rolled back."""
        top = self._climb(block, self.depth, self.trunk.L)
        logits = self.trunk.logits(top.tail([len(d.tokens) + 1 for d in drafts]))
        verdicts = self.chooser.judge(logits, drafts, self._histories(), [r.generator for r in self.rows])
        self._roll_back(drafts, [accepted for accepted, _ in verdicts])
        out = []
        for row, draft, (accepted, token) in zip(self.rows, drafts, verdicts, strict=True):
            written = self._write(row, [*draft.tokens[:accepted], token])
            out.append((row.index, Step(draft.tokens, accepted, written, draft.probabilities)))
        self._accepted = [accepted for accepted, _ in verdicts]
        return out

    def _roll_back(self, drafts: list[Proposal], accepted: list[int]) -> None:
        lost = [len(d.tokens) - a for d, a in zip(drafts, accepted, strict=True)]
        if any(lost):
            self.cache.drop_last(range(self.trunk.L), lost)
            if self.speculative:  # the twig has not read a draft's last token yet
                read = [max(len(d.tokens) - 1, 0) for d in drafts]
                gone = [n - min(n, a) for n, a in zip(read, accepted, strict=True)]
                self.cache.drop_last(range(self.trunk.L, self.trunk.L + self.twig.config.T), gone)

    def _write(self, row: Row, tokens: list[int]) -> list[int]:
        """Append to the answer up to its end; what was really written."""
        before = len(row.tokens)
        for token in tokens:
            if token in self.eos:
                row.done = True
                break
            row.tokens.append(token)
            if len(row.tokens) >= row.limit or self._stops(row):
                row.done = True
                break
        return row.tokens[before:]

    def _stops(self, row: Row) -> bool:
        if not self.stopping:
            return False
        ids = torch.tensor([row.history], device=self.trunk.device)
        return any(bool(torch.as_tensor(rule(ids, None)).any()) for rule in self.stopping)

    def _restart(self, block: Stream, drafts: list[Proposal]) -> tuple[Stream, Stream | None]:
        """Drop finished rows; each other row's newest token through the trunk, and through the twig what it has not read."""
        # A fully accepted draft leaves its last token unread by the twig: it goes along now.
        whole = [int(len(d.tokens) > 0 and a == len(d.tokens)) for d, a in zip(drafts, self._accepted, strict=True)]
        unread = Stream(
            block.tail([1] * block.rows), self._newest(block), torch.zeros_like(block.visual[:, :1]), tuple(whole)
        )  # fmt: skip
        active = [i for i, row in enumerate(self.rows) if not row.done]
        if len(active) < len(self.rows):
            self.rows = [self.rows[i] for i in active]
            if not self.rows:
                return block, None
            self.cache.select(active)
            unread = unread.select(active)
        fresh = self._tokens([r.tokens[-1] for r in self.rows], [Proposal()] * len(self.rows), [True] * len(self.rows))
        if not self.speculative:
            return fresh, None
        behind = join([unread, fresh]) if any(unread.lengths) else fresh
        return fresh, self.trunk.run(self.twig.layers, behind, self.cache)

    @staticmethod
    def _newest(block: Stream) -> torch.Tensor:
        rows = torch.arange(block.rows, device=block.positions.device)
        return block.positions[rows, torch.tensor(block.lengths, device=rows.device) - 1][:, None]

    def _histories(self) -> list[list[int]]:
        return [] if self.chooser.simple else [r.history for r in self.rows]
