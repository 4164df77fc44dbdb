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

from ..model.prompt import IMAGE, VICUNA_V1, encode
from .questions import KINDS, ask, plural
from .world import COLOURS, PLACES, SHAPES, Scene

# (slots, tokens a slot): most questions are short, some carry a hint or options, one is a description.
GROUPS = ((15, 25), (4, 37), (2, 60), (1, 108))
DESCRIPTION_WEIGHT = 0.5  # of a description's tokens against a short answer's
TURN_SHARE = 0.15  # of the questions are followed by a second one


@dataclass
class Packed:
    """int64 arrays over the slots' tokens [S]: `ids`, `labels` (-100 = not learnt), `positions` from the prefix's end."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    looks: np.ndarray  # per token, bit c: it names what stands in cell c of the scene
    asked: int = field(default=0)


def prefix_text() -> str:
    return f"{VICUNA_V1.system} {VICUNA_V1.user}: {IMAGE}"


def pack(scene: Scene, rng: random.Random, tokenizer, groups: Sequence[tuple[int, int]] = GROUPS) -> Packed:
    """Fill every slot with questions about `scene`; what does not fit a free slot is dropped."""
    free = {length: slots for slots, length in groups}
    placed: dict[int, list[tuple[list[int], list[int], float]]] = {length: [] for length in free}
    wanted = ["describe", *rng.choices(KINDS, k=3 * sum(free.values()))]
    for kind in wanted:
        if not any(free.values()):
            break
        turns = [q for q in [ask(scene, kind, rng)] if q]
        if turns and kind != "describe" and rng.random() < TURN_SHARE:
            turns += [q for q in [ask(scene, rng.choice(KINDS), rng)] if q]
        if not turns:
            continue
        ids, labels = _tokens([(q.text, q.answer) for q in turns], tokenizer)
        fitting = [length for length, slots in free.items() if slots and length >= len(ids)]
        if fitting:
            free[min(fitting)] -= 1
            placed[min(fitting)].append((ids, labels, DESCRIPTION_WEIGHT if kind == "describe" else 1.0))
    total = sum(slots * length for slots, length in groups)
    empty = [np.full(total, v, np.int64) for v in (0, -100, 0)]
    out = Packed(*empty, np.zeros(total, np.float32), np.zeros(total, np.int64))
    start = 0
    for slots, length in groups:
        out.positions[start : start + slots * length] = np.tile(np.arange(length), slots)
        for i, (ids, labels, weight) in enumerate(placed[length]):
            place = slice(start + i * length, start + i * length + len(ids))
            out.ids[place], out.labels[place], out.weights[place] = ids, labels, weight
            out.looks[place] = looks(ids, scene, tokenizer)
            out.asked += 1
        start += slots * length
    return out


def _tokens(turns: list[tuple[str, str]], tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation as it continues after the picture."""
    ids: list[int] = []
    labels: list[int] = []
    for i, (text, answer) in enumerate(turns):
        head = f"\n{text}" if i == 0 else f"{VICUNA_V1.user}: {text}"
        asked = _encode(tokenizer, f"{head} {VICUNA_V1.assistant}:")
        # No token of ours spans two words, so question and answer may be encoded apart.
        told = _encode(tokenizer, f"{answer}{VICUNA_V1.end}")
        ids += [*asked, *told]
        labels += [*[-100] * len(asked), *told]
    return ids, labels


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
    words += [(p, "place") for p in ("top", "bottom", "left", "right", "centre")] + [("of", "of")]
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
