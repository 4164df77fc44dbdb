"""The prompt behind a reducer: what it has left of each picture stands where the picture stood.

Legend: B rows, S tokens, D width, I images, V visual tokens an image, n tokens left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..model.stream import Stream, fit, front
from ..model.trunk import Trunk
from ..pruning.reducer import Reducer, Tokens, View


@dataclass(frozen=True)
class Reduced:
    """What enters the decoder, in places of the whole prompt."""

    stream: Stream  # B S'
    source: torch.Tensor  # B W, the patches (0.. over a row's images) that are left, -1 is none
    room: list[int]  # visual tokens of each row, at most
    marks: dict[str, torch.Tensor]  # bool B S, over the places of the prompt
    scores: tuple[torch.Tensor, torch.Tensor] | None = None  # fp32 B W' of the patches (0.. over a row's images) beside


def reduce(
    reducer: Reducer,
    trunk: Trunk,
    stream: Stream,
    ids: Sequence[Sequence[int]],
    pixel_values: torch.Tensor,
    draws: Sequence[int] = (),
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Reduced:
    """Ask `reducer` about every image of the prompts laid out in `stream`; images are blocks of V tokens, in their order.

    `project` stands in for the base's projector.
    """
    V, device = trunk.V, stream.place.device
    columns = [[i for i, t in enumerate(row) if t == trunk.image_token_id] for row in ids]
    images = [
        (b, nth, cols[i : i + V]) for b, cols in enumerate(columns) for nth, i in enumerate(range(0, len(cols), V))
    ]
    tower = trunk.family.tower()
    view = View(
        reducer, V, tower.class_tokens, project or trunk.family.project, trunk.embed_text,
        [ids[b][columns[b][-1] + 1 :] for b, _, _ in images], [_mixed(draws[b], nth) for b, nth, _ in images] if draws else (),
    )  # fmt: skip
    view.states = trunk.look(pixel_values, view)
    blocks = Blocks(
        torch.tensor([b for b, _, _ in images], device=device)[:, None],
        torch.tensor([nth for _, nth, _ in images], device=device)[:, None],
        torch.tensor([cols for _, _, cols in images], device=device),
    )
    room = [len(cols) // V * reducer.most(V) for cols in columns]
    most = [len(row) - len(cols) + n for row, cols, n in zip(ids, columns, room, strict=True)]
    reduced = _put(stream, reducer(view), blocks, room, most, reducer.exact)
    return replace(reduced, scores=_scores(view, [b for b, _, _ in images], len(ids)))


@dataclass(frozen=True)
class Blocks:
    """Where images lie: their row and number in it [I, 1], and the columns of their tokens [I, V]."""

    row: torch.Tensor
    nth: torch.Tensor
    columns: torch.Tensor


def _put(stream: Stream, tokens: Tokens, at: Blocks, room: list[int], most: list[int], exact: bool) -> Reduced:
    n, V = tokens.source.shape[1], at.columns.shape[1]
    there = torch.arange(n, device=at.row.device) < (n if tokens.count is None else tokens.count[:, None])
    there = there.expand_as(tokens.source)
    slots = (at.row, at.columns[:, :n])  # the first of each image's columns; who stands there has its source's place
    places = at.columns.gather(1, _seats(tokens.source, there, V))
    moved = replace(
        stream,
        hidden=stream.hidden.index_put(slots, tokens.features.to(stream.hidden)),
        place=stream.place.index_put(slots, places),
    )
    keep = (stream.visual < 0).index_put(slots, there) & stream.real()
    width, full = fit(keep, max(most), exact and stream.full and len(set(most)) == 1)
    patch = torch.where(there & (tokens.source >= 0), at.nth * V + tokens.source, -1)
    source = torch.full_like(stream.place, -1).index_put(slots, patch)
    nothing = torch.zeros_like(stream.place, dtype=torch.bool)
    marks = {name: nothing.index_put((at.row, places), mark & there) for name, mark in tokens.marks.items()}
    return Reduced(moved.keep(keep, width, full), source, room, marks)


def _scores(view: View, rows: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What the class token looked at in the layer that is read, where the reducer listened to it alone, and whose it is."""
    tap = view.taps.get(view.read)
    if tap is None or not view.class_tokens or tap.rows.shape[1] != 1:
        return None
    heat, V, seen = view.attention().mean(1), view.V, [0] * count  # I V
    if heat.shape[1] != V:  # merged on the way: no patches any more
        return None
    scores = heat.new_zeros(count, V * max(rows.count(b) for b in set(rows)))
    ordinal = torch.full_like(scores, -1, dtype=torch.long)
    steps = torch.arange(V, device=heat.device)
    for image, b in enumerate(rows):
        part = slice(seen[b] * V, (seen[b] + 1) * V)
        scores[b, part], ordinal[b, part] = heat[image], steps + seen[b] * V
        seen[b] += 1
    return scores, ordinal


def _seats(source: torch.Tensor, there: torch.Tensor, V: int) -> torch.Tensor:
    """[I, n]: the patch whose place each token takes; what is no patch takes those that nobody has."""
    taken = torch.zeros(len(source), V + 1, dtype=torch.bool, device=source.device)
    patches = there & (source >= 0)
    taken = taken.scatter(1, torch.where(patches, source, V), True)[:, :V]
    nobodys = front(~taken, source.shape[1]).clamp(min=0)
    nth = ((~patches).long().cumsum(1) - 1).clamp(min=0, max=nobodys.shape[1] - 1)
    return torch.where(patches, source, nobodys.gather(1, nth))


def _mixed(seed: int, nth: int) -> int:
    """A seed of the nth image of a row."""
    return (seed + nth * 0x9E3779B97F4A7C15) % 2**63
