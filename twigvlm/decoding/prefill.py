"""From prompts to a state that can go on: the one way through the layers, with the plan's cuts on it.

Generation, likelihoods and whatever else asks the pruned base share it. Nothing here reads the
device. Legend: B rows, S tokens, P places of the prompt, D width, V' visual tokens now, Q asked rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..model.cache import CacheGroup, Tally
from ..model.stream import Stream, fit, front, join
from ..model.tap import Tap
from ..model.trunk import Trunk
from ..model.twig import Twig
from ..pruning.plan import Plan
from ..pruning.rule import TWIG, Heard, Probe, Seen, Selection
from .draft import DraftTree
from .reduce import Reduced, reduce


@dataclass(frozen=True)
class Prompts:
    """Prompts as they were embedded, and what the host knows of them: ids of each row, a seed for each."""

    stream: Stream
    ids: Sequence[Sequence[int]]
    seeds: Sequence[int] = ()  # of sampling
    draws: Sequence[int] = ()  # of pruning that draws
    reduced: Reduced | None = None  # what a plan's reducer has left of the pictures


@dataclass
class Segment:
    """Base layers `first`..`last`-1, which hold the same tokens, and their cache."""

    first: int
    last: int
    layers: Sequence[nn.Module]
    cache: CacheGroup
    prompt: torch.Tensor | None = None  # B, tokens of the prompt that entered
    places: tuple[torch.Tensor, torch.Tensor] | None = None  # `place` and `visual` of them, for eviction


class State:
    """A batch on its way through base and twig; `read` makes it. `above`: prompts hold what has left the layers below that one.

    `kept` [B, W] are the visual tokens (0.. over a row's images, -1 is none) that the first cut left,
    None without one; `entered` pairs a number of layers with the visual tokens [B] that entered each.
    """

    def __init__(self, trunk: Trunk, twig: Twig | None, plan: Plan, prompts: Prompts, above: int = 0):
        self.trunk, self.twig, self.plan = trunk, twig, plan
        self.depth = twig.config.K if twig is not None else above
        stream = self.prompt = prompts.stream
        self.lengths = [len(row) for row in prompts.ids]
        self.length = torch.tensor(self.lengths, device=stream.place.device)
        self.draws = list(prompts.draws)
        self.totals = [sum(t == trunk.image_token_id for t in row) for row in prompts.ids]  # visual tokens
        self._tally = Tally()
        self._most_used = torch.zeros((), dtype=torch.long, device=self.length.device)  # bytes, so far
        self.segments = self._segments(above)
        self.above = self._group(twig.layers) if twig is not None else None
        self.missed: list[Stream] = []  # left layer K-1, and the twig has not read it
        self.heard_prompt: torch.Tensor | None = None  # B, tokens of the prompt that the twig has read
        self.hint: torch.Tensor | None = None  # B D, the twig's state of the newest token
        self.kept: torch.Tensor | None = None
        self.sound: torch.Tensor | None = None  # B, whether all scores that a cut went by are finite
        self._uncut = True  # no stage has acted yet
        self._probed: tuple[torch.Tensor, torch.Tensor] | None = None  # scores and ordinals, B V'
        self.entered: list[tuple[int, torch.Tensor]] = []
        self._pending = list(plan.stages)
        self._scores: dict[Probe, torch.Tensor] = {}  # fp32 B Q P
        self._taps: dict[Probe, tuple[Tap, torch.Tensor]] = {}  # and the places [B, S] of what entered the layer
        self._memory: dict = {}
        reduced = prompts.reduced
        self.entering = reduced.room if reduced is not None else self.totals  # visual tokens of each row in layer 0
        self._marked = reduced.marks if reduced is not None else {}
        self._room = list(self.entering)  # visual tokens that a row can still have
        image = stream.visual >= 0
        self._ordinal = image.long().cumsum(1) - 1  # B P
        self._last_image = torch.where(image, stream.place, -1).max(1).values
        self._text = [_after(row, trunk.image_token_id) for row in prompts.ids]
        self.awaiting = self.entry = stream  # about to enter the next segment; and what entered the first
        if plan.tower is not None:
            self.kept = stream.place[:, :0] if reduced is None else reduced.source
            self._probed = None if reduced is None else reduced.scores
        if reduced is not None:
            self.awaiting = self.entry = self._compact(reduced.stream, 0)
            if self.above is not None:
                self.above.shift = self.segments[0].cache.shift

    # ------------------------------------------------------------------ the layers

    @property
    def low(self) -> list[Segment]:
        """Below the twig: shared by drafts and their verification."""
        return [s for s in self.segments if s.last <= self.depth]

    @property
    def high(self) -> list[Segment]:
        return [s for s in self.segments if s.first >= self.depth]

    @property
    def caches(self) -> list[CacheGroup]:
        return [s.cache for s in self.segments] + ([self.above] if self.above is not None else [])

    @property
    def bytes(self) -> int:
        """Allocated for keys and values: the most at once so far. Where rows left, the last ones' buffers hold less."""
        return self._tally.most

    @property
    def bytes_used(self) -> int:
        """Filled by committed tokens: the most at once so far. Reads the device."""
        self._note_used()
        return int(self._most_used)

    def _note_used(self) -> None:
        """Due before tokens go: between such moments there are only more of them."""
        self._most_used = torch.maximum(self._most_used, sum(cache.used_bytes() for cache in self.caches))

    def per_image(self) -> list[float | None]:
        """Visual tokens of an image that entered a base layer on average, of every prompt. Reads the device."""
        spent = sum(layers * counts for layers, counts in self.entered).tolist()
        V, L = self.trunk.V, self.trunk.L
        return [n * V / total / L if total else None for n, total in zip(spent, self.totals, strict=True)]

    def climb(
        self,
        stream: Stream,
        segments: Sequence[Segment],
        tree: DraftTree | None = None,
        sight: torch.Tensor | None = None,
    ) -> Stream:
        """Through these segments, with the cuts that are due.

        `tree` are the nodes at the end of `stream`; of a tree that is not whole yet, `sight` says who sees whom
        (see `CacheGroup.begin`).
        """
        for segment in segments:
            before, stream = stream, self.cut(stream, segment.first, tree)
            if tree is not None and (sight is None or stream is not before):
                sight = _sight(stream, tree)
            stream = self._placed(stream, segment.cache)
            taps = self._listen("layer", stream, range(segment.first, segment.last))
            if segment.prompt is None:
                self._note(segment, stream)
            attention = self.trunk.attend(stream, segment.cache, sight)
            entered, stream = stream, self.trunk.run(segment.layers, stream, attention, list(taps.values()))
            self._hear(taps, entered)
        return stream

    def run_twig(self, stream: Stream, tree: DraftTree | None = None, sight: torch.Tensor | None = None) -> Stream:
        """Through the twig's layers, behind what its cache holds; `tree` and `sight` as for `climb`."""
        stream = self._placed(stream, self.above)
        taps = self._listen("twig", stream)
        attention = self.trunk.attend(stream, self.above, _sight(stream, tree) if sight is None else sight)
        out = self.trunk.run(self.twig.layers, stream, attention, list(taps.values()))
        self._hear(taps, stream)
        return out

    def catch_up(self) -> torch.Tensor:
        """[B, D], what the twig makes of the newest token, after it has read all that it missed."""
        if self.missed:
            block = join(self.missed)
            self.missed = []
            out = self.run_twig(block)
            self.above.commit(block.width if block.full else block.count())
            self.hint = out.hidden[:, -1] if out.full else out.at(out.count() - 1)
        return self.hint

    def commit_low(self, count: torch.Tensor | int, known: Sequence[int] | None = None, path=None) -> None:
        for segment in self.low:
            segment.cache.commit(count, known, path)

    def prompts(self) -> list[torch.Tensor]:
        """Tokens [B] of the prompt that entered each of `caches`."""
        found = [s.prompt for s in self.segments]
        return found + ([self.heard_prompt] if self.above is not None else [])

    def leave(self, order: Sequence[int]) -> torch.Tensor:
        """Row i becomes what row order[i] was, the others leave; `order` as a tensor."""
        self._note_used()
        index = torch.tensor(order, dtype=torch.long, device=self.length.device)
        for cache in self.caches:
            cache.leave(order, index)
        self.length = self.length.index_select(0, index)
        self.lengths = [self.lengths[r] for r in order]
        self.missed = [stream.select(index) for stream in self.missed]
        return index

    def dismiss_twig(self) -> None:
        """It has pruned, and is not needed again."""
        if self.above is not None:
            self._note_used()
            self.above.forget()
            self.above = self.hint = None

    def settle(self) -> Stream:
        """The prompt alone to the top and into the caches; what left the last layer."""
        top = self.climb(self.awaiting, self.high)
        for segment in self.high:
            segment.cache.commit(segment.prompt)
        if self.plan.evict is not None:
            self.evict()
        return top

    def evict(self) -> None:
        """After prefill: caches from the plan's layer on keep only the visual tokens that reached the last segment."""
        self._note_used()
        place, visual = self.segments[-1].places
        alive = self._by_place(((visual >= 0) & (place >= 0)).float()[:, None], place)[:, 0] > 0  # B P
        for segment in self.segments:
            if segment.first >= self.plan.evict:
                place, visual = segment.places
                keep = (visual < 0) | alive.gather(1, place.clamp(min=0))
                short = segment.cache.reach - keep.shape[1]  # tokens written since the prompt
                held = segment.cache.used
                segment.cache.evict(torch.nn.functional.pad(keep, (0, max(short, 0)), value=True))
                if self.plan.behind_cache:
                    segment.cache.shift = segment.cache.shift + held - segment.cache.used

    # ------------------------------------------------------------------ cutting

    def cut(self, stream: Stream, layer: int, tree: DraftTree | None = None) -> Stream:
        """Apply the stage before this layer, if one is due."""
        if not self._pending or self._pending[0][0] != layer:
            return stream
        _, rule = self._pending.pop(0)
        if not any(self.totals):
            self._remember(stream.place[:, :0], stream.place[:, :0] >= 0)
            return stream
        image = stream.visual >= 0
        width, _ = fit(image, max(self._room))
        order = front(image, width)
        part = stream.take(order)
        seen = self._seen(rule.probe, stream, part)
        chosen = rule(seen)
        self._remember(part.place, chosen.keep, seen.scores)
        self._room = [min(n, rule.most(t)) for n, t in zip(self._room, self.entering, strict=True)]
        return self._carry_out(stream, order, chosen, rule.exact, layer, tree)

    def _carry_out(
        self, stream: Stream, order: torch.Tensor, chosen: Selection, exact: bool, layer: int, tree: DraftTree | None
    ) -> Stream:
        """The stream without what was not chosen, with what was merged in."""
        fate = torch.where(chosen.keep, order, -1)
        stays = torch.zeros(stream.rows, stream.width + 1, dtype=torch.bool, device=order.device)
        stays = stays.scatter(1, torch.where(fate < 0, stream.width, fate), True)[:, :-1]
        stays = stays | (stream.visual < 0)
        if chosen.merged is not None:
            behind, instead = (
                None if index is None else torch.where(chosen.behind < 0, -1, order.gather(1, index.clamp(min=0)))
                for index in (chosen.behind, chosen.instead)
            )
            stream, stays = stream.insert(chosen.merged, behind, stays, instead)
        keep = stays & stream.real()
        nodes = tree.width if tree is not None else 0
        left = [n - t + r for n, t, r in zip(self.lengths, self.totals, self._room, strict=True)]
        width, full = fit(keep, max(left) + nodes, exact and stream.full and len(set(left)) == 1)
        stream = stream.keep(keep, width, full)
        return self._compact(stream, layer) if self.plan.positions == "compact" else stream

    def _compact(self, stream: Stream, layer: int) -> Stream:
        """Number the prompt anew; all that comes later moves down by as much."""
        prompt = self._of_prompt(stream)
        shift = self.length - prompt.sum(1)
        for cache in [s.cache for s in self.segments if s.first >= layer]:
            cache.shift = shift
        steps = torch.arange(stream.width, device=shift.device).expand(stream.rows, -1)
        return replace(stream, positions=torch.where(prompt, steps, stream.positions))

    def _placed(self, stream: Stream, cache: CacheGroup) -> Stream:
        """New tokens stand where the layers of this cache have them: behind a prompt that may have been compacted."""
        if self.plan.positions == "keep" and self.plan.tower is None:
            return stream
        later = stream.place >= self.length[:, None]
        moved = (stream.place - cache.shift[:, None]).clamp(0, self.trunk.context - 1)
        return replace(stream, positions=torch.where(later, moved, stream.positions))

    # ------------------------------------------------------------------ probing

    def _listen(self, source: str, stream: Stream, layers: range = range(0)) -> dict[Probe, Tap]:
        """Taps for the probes of pending stages that these layers answer."""
        probes = {rule.probe for _, rule in self._pending if rule.probe is not None} - self._taps.keys()
        taps = {}
        for probe in probes:
            if source == "twig" and probe.source in TWIG:
                taps[probe] = Tap(
                    self.twig.layers[-1].self_attn, self._rows(stream, probe), whole=self._asks_head(probe)
                )
            elif probe.source == source and probe.layer in layers:
                taps[probe] = Tap(self.trunk.layers[probe.layer].self_attn, self._rows(stream, probe))
        return taps

    def _asks_head(self, probe: Probe) -> bool:
        """Whether the pruning head answers, and not an attention."""
        return probe.source == "head" or (probe.source == "twig" and self.twig.pruning_head is not None)

    def _hear(self, taps: dict[Probe, Tap], stream: Stream) -> None:
        for probe, tap in taps.items():
            self._taps[probe] = tap, stream.place
            if self._asks_head(probe):
                columns = front(stream.visual >= 0, fit(stream.visual >= 0, max(self._room))[0])
                weights = self.twig.pruning_head.of_tap(tap, columns)
                place = torch.where(columns < 0, -1, stream.place.gather(1, columns.clamp(min=0)))
                tap.entered = None  # of the whole prompt: not needed again
            else:
                weights, place = tap.weights().mean(1).masked_fill((tap.rows < 0)[..., None], 0), stream.place
            self._scores[probe] = self._by_place(weights, place)

    def _seen(self, probe: Probe | None, stream: Stream, part: Stream) -> Seen:
        """What a rule is shown of the visual tokens `part`."""
        scores = heard = None
        if probe is not None:
            rows = self._rows(stream, probe)
            if probe.source == "peek":
                self._hear({probe: self.trunk.peek(self.trunk.layers[probe.layer], stream, rows)}, stream)
            scores = self._scores[probe]
            scores = scores.gather(2, part.place.clamp(min=0)[:, None].expand(-1, scores.shape[1], -1))
            good = (scores.sum(1).isfinite() | ~part.real()).all(1)
            self.sound = good if self.sound is None else self.sound & good
            heard = Heard(*self._taps[probe], stream.take(rows))
        text = stream.take(self._rows(stream, Probe("layer", "text")))
        return Seen(part, scores, self.entering, self.entry, text, heard, self.draws, self.prompt.width, self._marked,
                    self._memory, self.trunk.decoder.norm, self.trunk.rotary_at)  # fmt: skip

    def _rows(self, stream: Stream, probe: Probe) -> torch.Tensor:
        """[B, Q]: indices of the asked rows, -1 pads."""
        prompt = self._of_prompt(stream)
        if probe.rows == "last":
            return prompt.sum(1, keepdim=True) - 1
        # The text after the last image; where an image is last, its last token, as with "last".
        after = torch.minimum(self._last_image, self.length - 2)
        asked = prompt & (stream.place > after[:, None])
        steps = torch.arange(stream.width, device=asked.device)
        none = ~asked.any(1, keepdim=True)  # it has left
        asked = asked | (none & (steps == prompt.sum(1, keepdim=True) - 1))
        return front(asked, max(self._text))

    def _by_place(self, values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """[B, Q, S] of the tokens at `place` [B, S] → [B, Q, P]."""
        P = self.prompt.width
        at = torch.where((place < 0) | (place >= P), P, place)[:, None].expand_as(values)
        return values.new_zeros(*values.shape[:2], P + 1).scatter(2, at, values)[..., :P]

    # ------------------------------------------------------------------ keeping books

    def _of_prompt(self, stream: Stream) -> torch.Tensor:
        return stream.real() & (stream.place < self.length[:, None])

    def _note(self, segment: Segment, stream: Stream) -> None:
        """What of the prompt enters a segment."""
        prompt = self._of_prompt(stream)
        segment.prompt = prompt.sum(1)
        self.entered.append((segment.last - segment.first, ((stream.visual >= 0) & prompt).sum(1)))
        if self.plan.evict is not None:
            segment.places = stream.place, stream.visual

    def _remember(self, place: torch.Tensor, keep: torch.Tensor, scores: torch.Tensor | None = None) -> None:
        if self._uncut:
            self._uncut = False
            ordinal = self._ordinal.gather(1, place.clamp(min=0))
            self.kept = torch.where(keep & (place >= 0), ordinal, -1)
            self._probed = None if scores is None else (scores.sum(1), ordinal.masked_fill(place < 0, -1))

    def scores(self) -> list[torch.Tensor] | None:
        """What the first cut's probe gave the visual tokens of each row, fp32 [all of its images], summed over the rows asked.

        NaN for those that it was not shown; None where nothing is asked. Reads the device.
        """
        if self._probed is None:
            return None
        scores, ordinal = self._probed
        most = max(self.totals)
        table = scores.new_full((len(scores), most + 1), torch.nan)
        table = table.scatter(1, torch.where(ordinal < 0, most, ordinal), scores).cpu()
        return [row[:n] for row, n in zip(table, self.totals, strict=True)]

    def _segments(self, above: int) -> list[Segment]:
        L = self.trunk.L
        cuts = {above, self.depth, self.plan.evict or above, *(before for before, _ in self.plan.stages)}
        edges = [*sorted(cut for cut in cuts if cut < L), L]
        found = [(a, b, tuple(self.trunk.layers[a:b])) for a, b in itertools.pairwise(edges)]
        return [Segment(a, b, layers, self._group(layers)) for a, b, layers in found]

    def _group(self, layers) -> CacheGroup:
        slots = [layer.self_attn.layer_idx for layer in layers]
        return CacheGroup(slots, self.prompt.rows, self.prompt.place.device, self._tally)


def read(trunk: Trunk, twig: Twig | None, plan: Plan, prompts: Prompts, later: bool = False) -> State:
    """Prompts through the layers below the twig and through the twig; what awaits the base's other layers is cut.

    `later`: the twig reads the prompt when its first draft is wanted (for a plan that does not ask it).
    """
    state = State(trunk, twig, plan, prompts)
    stream = state.climb(state.awaiting, state.low)
    for segment in state.low:
        segment.cache.commit(segment.prompt, None if plan else state.lengths)
    if twig is not None and later:
        state.missed.append(stream)
        state.heard_prompt = torch.zeros_like(state.length)
    elif twig is not None:
        out = state.run_twig(stream)
        state.heard_prompt = out.count()
        state.above.commit(state.heard_prompt, None if plan else state.lengths)
        state.hint = out.at(state.heard_prompt - 1)
    state.awaiting = state.cut(stream, state.depth)
    return state


def _sight(stream: Stream, tree: DraftTree | None) -> torch.Tensor | None:
    """Who sees whom in a block that ends in the nodes of `tree`."""
    if tree is None or tree.chain:
        return None
    return tree.sight(stream.count() - tree.count - 1, stream.width)


def embed(
    trunk: Trunk,
    plan: Plan,
    ids: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | None = None,
    seeds: Sequence[int] = (),
    draws: Sequence[int] = (),
) -> Prompts:
    """Prompts of any lengths, as lists of token ids, and the images of all of them → what `read` reads."""
    padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for out, row in zip(padded, ids, strict=True):
        out[: len(row)] = torch.tensor(row)
    lengths = [len(row) for row in ids]
    if plan.tower is None or pixel_values is None or not len(pixel_values):
        return Prompts(trunk.embed(padded, lengths, pixel_values), ids, seeds, draws)
    stream = trunk.lay_out(padded, lengths, pixel_values)
    return Prompts(stream, ids, seeds, draws, reduce(plan.tower, trunk, stream, ids, pixel_values, draws))


def _after(row: Sequence[int], image: int) -> int:
    """Tokens after the last image token, one at least."""
    count = next((i for i, token in enumerate(reversed(row)) if token == image), len(row))
    return max(count, 1)
