"""Many questions about one picture in one training sequence, each seeing the picture and itself only.

Layout of a row: a prefix (system sentence, then the picture or its symbols) shared by all questions, then
groups of equally long slots, one question (or a short conversation) a slot. Every slot continues
the prefix's positions, so that training equals asking each question alone, while the prefix is
computed once. `attention` does the masking by shape: no S x S mask exists.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from transformers import AttentionInterface

from ...prompt.template import IMAGE, VICUNA_V1, encode
from ...world.questions import KINDS, LETTERS, Question, ask, plural
from ...world.scenes import COLOURS, PLACES, SHAPES, Scene

# (slots, tokens a slot): most questions are short, some carry a hint or options, one is a description.
GROUPS = ((12, 25), (4, 37), (5, 60), (1, 108))
# Reading, choosing and comparing are learnt last, so they are asked most.
ASKED = {"count": 3, "compare": 4, "read": 4, "choice": 3}
DESCRIPTION_WEIGHT = 0.5  # of a description's tokens against a short answer's
TURN_SHARE = 0.15  # of the questions are followed by a second one


@dataclass
class Packed:
    """int64 arrays over the slots' tokens [S]: `ids`, `labels` (-100 = not learnt), `positions` from the prefix's end.

    What a reader would look at while answering: `looks`, per token, bit c: it names what stands in cell
    c of the scene; `evidence`, at the last token of a question, the cells that the answer depends on;
    `points`, there too, the token in S that ends the right option (-1 = none).
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    looks: np.ndarray
    evidence: np.ndarray
    points: np.ndarray
    asked: int = field(default=0)


def prefix_text() -> str:
    return f"{VICUNA_V1.system} {VICUNA_V1.user}: {IMAGE}"


def pack(scene: Scene, rng: random.Random, tokenizer, groups: Sequence[tuple[int, int]] = GROUPS) -> Packed:
    """Fill every slot with questions about `scene`; what does not fit a free slot is dropped."""
    free = {length: slots for slots, length in groups}
    placed: dict[int, list[_Slot]] = {length: [] for length in free}
    asked = [ASKED.get(kind, 1) for kind in KINDS]
    wanted = ["describe", *rng.choices(KINDS, asked, k=4 * sum(free.values()))]
    for kind in wanted:
        if not any(free.values()):
            break
        turns = [q for q in [ask(scene, kind, rng)] if q]
        if turns and kind != "describe" and rng.random() < TURN_SHARE:
            turns += [q for q in [ask(scene, rng.choice(KINDS), rng)] if q]
        if not turns:
            continue
        slot = _slot(turns, scene, tokenizer)
        fitting = [length for length, slots in free.items() if slots and length >= len(slot.ids)]
        if fitting:
            free[min(fitting)] -= 1
            placed[min(fitting)].append(slot)
    total = sum(slots * length for slots, length in groups)
    ids, labels, positions, looks, evidence, points = (np.full(total, v, np.int64) for v in (0, -100, 0, 0, 0, -1))
    out = Packed(ids, labels, positions, np.zeros(total, np.float32), looks, evidence, points)
    start = 0
    for slots, length in groups:
        out.positions[start : start + slots * length] = np.tile(np.arange(length), slots)
        for i, slot in enumerate(placed[length]):
            first = start + i * length
            place = slice(first, first + len(slot.ids))
            out.ids[place], out.labels[place], out.weights[place] = slot.ids, slot.labels, slot.weight
            out.looks[place], out.evidence[place] = slot.looks, slot.evidence
            out.points[place] = [p if p < 0 else p + first for p in slot.points]
            out.asked += 1
        start += slots * length
    return out


@dataclass
class _Slot:
    """A conversation as it continues after the picture, token by token; `points` are offsets in the slot."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)
    evidence: list[int] = field(default_factory=list)
    points: list[int] = field(default_factory=list)
    weight: float = 1.0


def _slot(turns: list[Question], scene: Scene, tokenizer) -> _Slot:
    slot = _Slot(weight=DESCRIPTION_WEIGHT if turns[0].kind == "describe" else 1.0)
    for i, turn in enumerate(turns):
        head = f"\n{turn.text}" if i == 0 else f"{VICUNA_V1.user}: {turn.text}"
        asked = _encode(tokenizer, f"{head} {VICUNA_V1.assistant}:")
        # No token of ours spans two words, so question and answer may be encoded apart.
        told = _encode(tokenizer, f"{turn.answer}{VICUNA_V1.end}")
        point = _point(turn, asked, tokenizer)
        slot.points += [-1] * (len(asked) - 1) + [point if point < 0 else point + len(slot.ids)] + [-1] * len(told)
        slot.evidence += [0] * (len(asked) - 1) + [_evidence(turn, scene, tokenizer)] + [0] * len(told)
        slot.ids += [*asked, *told]
        slot.labels += [*[-100] * len(asked), *told]
    slot.looks = looks(slot.ids, scene, tokenizer)
    return slot


def _evidence(turn: Question, scene: Scene, tokenizer) -> int:
    """The cells (as bits) that the answer depends on: of what the question names, or of everything."""
    every = sum(1 << o.place for o in scene.objects)
    if turn.kind == "describe":
        return every | (1 << scene.word_place if scene.word else 0)
    ids = _encode(tokenizer, turn.text.split("\n")[0])  # options follow in further lines
    names = [_names(tokenizer).get(token, ("", ""))[0] for token in ids]
    after = [*names[1:], ""]
    seen = [
        cells
        for cells, name in zip(looks(ids, scene, tokenizer), after, strict=True)
        if name not in ("shape", "object")
    ]
    cells = 0
    for one in seen:
        cells |= one
    return every if not cells and set(names) <= {"", "object"} and "object" in names else cells


def _point(turn: Question, asked: Sequence[int], tokenizer) -> int:
    """Where in the question the right option ends; -1 without options."""
    if not turn.options:
        return -1
    upto = turn.text.split(f"{turn.answer}. ")[0] + f"{turn.answer}. {turn.options[LETTERS.index(turn.answer)]}"
    end = len(_encode(tokenizer, f"\n{upto}")) - 1
    return end if end < len(asked) else -1


@lru_cache(maxsize=100_000)
def _encode(tokenizer, text: str) -> tuple[int, ...]:
    """Most questions come up again and again; encoding was two thirds of a batch's cost."""
    return tuple(encode(tokenizer, text, -1, 0, bos=False))


def looks(ids: Sequence[int], scene: Scene, tokenizer) -> list[int]:
    """For each token, the cells (as bits) of the objects that it names: what a reader would look at.

    The last word of "red circle" means both, "top left" one cell, "word" the printed word.
    """
    names = _names(tokenizer)
    out, colour, place = [], None, []
    for i, token in enumerate(ids):
        kind, value = names.get(token, ("", ""))
        place = [*place, value] if kind == "place" else []
        cells = 0
        if kind in ("colour", "shape", "object"):
            for obj in scene.objects:
                fits = (kind != "shape" or obj.shape == value) and (colour is None or obj.colour == colour)
                if kind == "colour":
                    fits = obj.colour == value
                if fits and (kind != "object" or colour):
                    cells |= 1 << obj.place
        elif kind == "place" and (i + 1 == len(ids) or names.get(ids[i + 1], ("", ""))[0] not in ("place", "of")):
            cells = 1 << PLACES.index(" ".join(place)) if " ".join(place) in PLACES else 0
        elif kind == "text" and scene.word:
            cells = 1 << scene.word_place
        colour = value if kind == "colour" else None
        out.append(cells)
    return out


@lru_cache
def _names(tokenizer) -> dict[int, tuple[str, str]]:
    """Token id → what kind of name it is."""
    words = [(c, "colour") for c in COLOURS] + [(s, "shape") for s in SHAPES]
    words += [(p, "place") for p in ("top", "bottom", "left", "right", "centre")] + [("of", "of"), ("or", "of")]
    words += [("object", "object"), ("objects", "object"), ("word", "text"), ("text", "text")]
    table = {_encode(tokenizer, word)[0]: (kind, word) for word, kind in words}
    for shape in SHAPES:
        table[_encode(tokenizer, plural(shape))[0]] = ("shape", shape)
    return table


def attention(module, query, key, value, attention_mask, scaling, groups=GROUPS, **_):
    """[B, H, S, d] → [B, S, H, d]: causal inside the prefix; each slot sees the prefix and its own past.

    A tree mask whose branches are the slots, evaluated branch by branch.
    """
    packed = sum(slots * length for slots, length in groups)
    prefix = query.shape[2] - packed
    keys, values = key[:, :, :prefix], value[:, :, :prefix]
    outs = [_causal(query[:, :, :prefix] * scaling, keys, values)]
    to_prefix = (query[:, :, prefix:] * scaling) @ keys.transpose(2, 3)
    start = 0
    for slots, length in groups:
        part = slice(prefix + start, prefix + start + slots * length)
        q, k, v = (t[:, :, part].unflatten(2, (slots, length)) for t in (query, key, value))
        own = (q * scaling) @ k.transpose(3, 4) + _triangle(length, q)
        cross = to_prefix[:, :, start : start + slots * length].unflatten(2, (slots, length))
        weights = torch.cat([cross, own], -1).softmax(-1, dtype=torch.float32).to(v.dtype)
        seen = weights[..., :prefix].flatten(2, 3) @ values
        outs.append(seen + (weights[..., prefix:] @ v).flatten(2, 3))
        start += slots * length
    return torch.cat(outs, 2).transpose(1, 2), None


def _causal(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    scores = query @ keys.transpose(2, 3) + _triangle(query.shape[2], query)
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


def _triangle(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((size, size), -1e4, dtype=like.dtype, device=like.device).triu(1)


AttentionInterface.register("sprout_packed", attention)
