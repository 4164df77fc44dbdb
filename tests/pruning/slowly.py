"""Methods before the decoder once more, slowly, in plain Python: what the tests compare with.

A reference gets its numbers from an eager tower as lists and knows nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from conftest import tiny_model

from twigvlm.pruning.plan import Shape

LLAVA = Shape(32, 576, 2, 24)


# ---------------------------------------------------------------------- slow references

Vector = list[float]
Kept = list[
    tuple[Vector | None, int]
]  # the tower's state of each token (None: zeros behind the projector), and its patch


@dataclass
class Picture:
    """What an eager tower says of one picture, in numbers of Python. Patches are counted from 0, class token aside."""

    side: int
    states: list[Vector]  # class token first
    keys: list[Vector]  # mean over heads
    looks: list[Vector]  # of each head, from the class token to the patches
    received: list[Vector]  # of each layer, by the patches
    projected: list[Vector]
    text: list[Vector]  # embedded, behind the last picture

    @property
    def V(self) -> int:
        return self.side**2

    @property
    def attention(self) -> Vector:
        return [sum(head) for head in zip(*self.looks, strict=True)]

    def patches(self, chosen) -> Kept:
        return [(self.states[1 + i], i) for i in chosen]


def cos(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def mean(vectors: Sequence[Vector]) -> Vector:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def falling(values: Sequence[float], among=None) -> list[int]:
    return sorted(range(len(values)) if among is None else among, key=lambda i: (-values[i], i))


def slow_grid(n: int, side: int) -> list[tuple[list[int], list[int], int]]:
    """Rows, columns and middle of each of n cells."""
    fits = [h for h in range(1, side + 1) if n % h == 0 and h <= n // h <= min(side, 2 * h)]
    high = fits[-1] if fits else max(round(math.sqrt(n)), math.ceil(n / side))
    counts = [math.floor((i + 1) * n / high) - math.floor(i * n / high) for i in range(high)]

    def part(i, of):
        return list(range(math.floor(i * side / of), math.ceil((i + 1) * side / of)))

    return [
        (part(i, high), part(j, wide), math.floor((i + 0.5) * side / high) * side + math.floor((j + 0.5) * side / wide))
        for i, wide in enumerate(counts)
        for j in range(wide)
    ]


def slow_uniform(p: Picture, n: int) -> Kept:
    return p.patches(middle for _, _, middle in slow_grid(n, p.side))


def slow_downsample(p: Picture, n: int) -> Kept:
    cells = slow_grid(n, p.side)
    return [(mean([p.states[1 + r * p.side + c] for r in down for c in across]), at) for down, across, at in cells]


def slow_fastervlm(p: Picture, n: int) -> Kept:
    return p.patches(sorted(falling(p.attention)[:n]))


def slow_divprune(p: Picture, n: int) -> Kept:
    far = [[1 - cos(a, b) for b in p.projected] for a in p.projected]
    lonely = [min((d for j, d in enumerate(row) if j != i), default=0) for i, row in enumerate(far)]
    chosen = [falling(lonely)[0]]
    while len(chosen) < n:
        rest = [i for i in range(p.V) if i not in chosen]
        chosen.append(falling([min(far[i][j] for j in chosen) for i in range(p.V)], rest)[0])
    return p.patches(sorted(chosen))


def slow_visionzip(p: Picture, n: int, contextual: int | None = None, average: bool = False) -> Kept:
    contextual = round(n * 10 / 64) if contextual is None else contextual
    dominant = sorted(falling(p.attention)[: n - contextual - 1])
    rest = [i for i in range(p.V) if i not in dominant]
    step = max(1, len(rest) // max(contextual, 1))
    targets = rest[::step][:contextual]
    groups = {t: [] for t in targets}
    for i in (i for i in rest if i not in targets):
        if targets:
            near = [cos(p.keys[1 + i], p.keys[1 + t]) for t in targets]
            groups[targets[near.index(max(near))]].append(p.states[1 + i])
    out = [(p.states[0], -1), *p.patches(dominant)]
    for t, group in groups.items():
        own = p.states[1 + t]
        if average:
            out.append((mean([own, *group]), t))
        else:
            out.append(([x + y for x, y in zip(own, mean(group), strict=True)] if group else own, t))
    return out


def slow_vispruner(p: Picture, n: int, ratio: float = 0.5) -> Kept:
    important = int(n * ratio)
    order = falling(p.attention)
    rest = order[important:]
    while len(rest) > n - important:
        even, odd = rest[0::2], rest[1::2]
        near = {a: max((cos(p.states[1 + a], p.states[1 + b]) for b in odd), default=0) for a in even}
        even.sort(key=lambda a: -near[a])
        rest = even[min(8, len(rest) - (n - important), len(even)) :] + odd
    return p.patches(sorted(order[:important] + rest))


def slow_scope(p: Picture, n: int, power: float = 1.0) -> Kept:
    like = [[cos(a, b) for b in p.states[1:]] for a in p.states[1:]]
    covered, chosen = [0.0] * p.V, []
    for _ in range(n):
        gain = [p.attention[i] ** power * sum(max(0, like[i][j] - covered[j]) for j in range(p.V)) for i in range(p.V)]
        new = falling(gain, [i for i in range(p.V) if i not in chosen])[0]
        chosen.append(new)
        covered = [max(c, x) for c, x in zip(covered, like[new], strict=True)]
    return p.patches(sorted(chosen))


def slow_hiprune(p: Picture, n: int, alpha: float = 0.1) -> Kept:
    read = len(p.received) - 1
    early, late = p.received[round(8 / 22 * read)], p.received[read]
    anchors = falling(early)[: round(n * alpha / 5)]
    around = {min(max(a + s, 0), p.V - 1) for a in anchors for s in (-1, 1, -p.side, p.side)} - set(anchors)
    others = falling(late, [i for i in range(p.V) if i not in around and i not in anchors])
    return p.patches(sorted([*anchors, *falling(late, around), *others][:n]))


def slow_holov(p: Picture, n: int, crops: int | None = None, redistribute: bool = False) -> Kept:
    crops = min(max(1024 * p.V // (576 * n), 1), p.V) if crops is None else crops
    runs, start = [], 0
    for c in range(crops):
        runs.append(list(range(start, start + p.V // crops + (c < p.V % crops))))
        start = runs[-1][-1] + 1
    worth = [sum(p.attention[i] for i in run) / len(run) for run in runs]
    quotas = [math.floor(n * w / sum(worth)) for w in worth]
    for c in falling(worth)[: n - sum(quotas)]:
        quotas[c] += 1
    taken = [min(q, len(run)) for q, run in zip(quotas, runs, strict=True)]
    while redistribute and sum(taken) < n:
        room = [c for c in range(crops) if taken[c] < len(runs[c])]
        taken[falling([w * len(run) / (t + 1) for w, run, t in zip(worth, runs, taken, strict=True)], room)[0]] += 1
    out = []
    for run, quota in zip(runs, taken, strict=True):
        out += run if quota >= len(run) else falling(p.attention, run)[:quota]
    return p.patches(out) + [(None, -1)] * (n - len(out))


def slow_cdpruner(p: Picture, n: int, fit: Vector | None = None) -> Kept:
    if fit is None:
        fit = [cos(z, mean(p.text)) if p.text else 0 for z in p.projected]
    relevance = [(f - min(fit) + 1e-6) / max(max(fit) - min(fit), 1e-6) for f in fit]
    L = [[r * cos(a, b) * s for b, s in zip(p.projected, relevance, strict=True)]
         for a, r in zip(p.projected, relevance, strict=True)]  # fmt: skip
    chosen: list[int] = []
    for _ in range(n):
        rest = [i for i in range(p.V) if i not in chosen]
        volume = [
            float(
                np.linalg.det([[L[a][b] / (relevance[a] * relevance[b]) for b in [*chosen, i]] for a in [*chosen, i]])
            )
            * relevance[i] ** 2
            if i in rest
            else 0
            for i in range(p.V)
        ]
        chosen.append(falling(volume, rest)[0])
    return p.patches(sorted(chosen))


SLOW = {
    "uniform": slow_uniform,
    "downsample": slow_downsample,
    "fastervlm": slow_fastervlm,
    "divprune": slow_divprune,
    "visionzip": slow_visionzip,
    "visionzip:merge=average": lambda p, n: slow_visionzip(p, n, average=True),
    "visionzip:contextual=0": lambda p, n: slow_visionzip(p, n, 0),
    "visionzip:contextual=2": lambda p, n: slow_visionzip(p, n, 2),
    "vispruner": slow_vispruner,
    "vispruner:ratio=0": lambda p, n: slow_vispruner(p, n, 0),
    "vispruner:ratio=0.75": lambda p, n: slow_vispruner(p, n, 0.75),
    "vispruner:ratio=1": lambda p, n: slow_vispruner(p, n, 1),
    "scope": slow_scope,
    "scope:power=0.5": lambda p, n: slow_scope(p, n, 0.5),
    "hiprune": slow_hiprune,
    "hiprune:alpha=1": lambda p, n: slow_hiprune(p, n, 1),
    "holov": slow_holov,
    "holov:crops=3": lambda p, n: slow_holov(p, n, 3),
    "holov:crops=4,redistribute": lambda p, n: slow_holov(p, n, 4, True),
    "cdpruner:stand_in": slow_cdpruner,
}


@torch.inference_mode()
def pictures_of(shape: dict, row: list[int], pixels: torch.Tensor) -> list[Picture]:
    """What an eager tower, run by the stock model, says of a row's pictures."""
    model = tiny_model(**shape, attention="eager")
    tower, config = model.model.vision_tower, model.config
    read = config.vision_config.num_hidden_layers - 2
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    attention = torch.stack(out.attentions).double()  # layer, picture, head, query, key
    states, layer = out.hidden_states[read + 1], tower.encoder.layers[read]
    keys = layer.self_attn.k_proj(layer.layer_norm1(out.hidden_states[read]))
    keys = keys.unflatten(2, (config.vision_config.num_attention_heads, -1)).mean(2)
    projected = model.model.multi_modal_projector(states[:, 1:])
    last = max(i for i, t in enumerate(row) if t == config.image_token_id)
    text = model.model.language_model.embed_tokens(torch.tensor(row[last + 1 :], dtype=torch.long))
    return [
        Picture(
            config.vision_config.image_size // 14, states[i].tolist(), keys[i].tolist(),
            attention[read, i, :, 0, 1:].tolist(), attention[: read + 1, i, :, :, 1:].mean((1, 2)).tolist(),
            projected[i].tolist(), text.tolist(),
        )
        for i in range(len(pixels))
    ]  # fmt: skip


@torch.inference_mode()
def slow_tome(shape: dict, pixels: torch.Tensor, n: int, in_raster: bool) -> Kept:
    """One picture [3, h, w] through the layers of an eager tower, whose tokens are merged as lists."""
    model = tiny_model(**shape, attention="eager")
    tower, heads = model.model.vision_tower, model.config.vision_config.num_attention_heads
    states = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0].tolist()
    tokens = [
        (state, [i - 1]) for i, state in enumerate(states)
    ]  # and the patches that each stands for; -1: class token
    read, total = len(tower.encoder.layers) - 2, len(states) - 1 - n
    for number, layer in enumerate(tower.encoder.layers[: read + 1]):
        hidden = torch.tensor([[state for state, _ in tokens]])
        normed = layer.layer_norm1(hidden)
        size = torch.tensor([float(len(of)) for _, of in tokens]).log()[None, None, None]
        hidden = hidden + layer.self_attn(normed, attention_mask=size)[0]
        keys = layer.self_attn.k_proj(normed)[0].unflatten(1, (heads, -1)).mean(1).tolist()
        now = [(h, k, of) for h, k, (_, of) in zip(hidden[0].tolist(), keys, tokens, strict=True)]
        now = slow_merge(now, total // (read + 1) + (number < total % (read + 1)))
        hidden = torch.tensor([[h for h, _, _ in now]])
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        tokens = [(h, of) for h, (_, _, of) in zip(hidden[0].tolist(), now, strict=True)]
    out = [(state, min(of)) for state, of in tokens[1:]]
    return sorted(out, key=lambda token: token[1]) if in_raster else out


def slow_merge(tokens: list[tuple[Vector, Vector, list[int]]], r: int) -> list[tuple[Vector, Vector, list[int]]]:
    while r:
        even, odd = tokens[0::2], tokens[1::2]
        near = [[cos(a[1], b[1]) for b in odd] for a in even]
        gone = falling([max(row) if i else -math.inf for i, row in enumerate(near)])[: min(r, (len(tokens) - 1) // 2)]
        into = {i: near[i].index(max(near[i])) for i in gone}
        merged = []
        for j, own in enumerate(odd):
            group = [own, *(even[i] for i in gone if into[i] == j)]
            weights = [len(of) for _, _, of in group]
            state, key = (
                [
                    sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights)
                    for column in zip(*part, strict=True)
                ]
                for part in ([g[0] for g in group], [g[1] for g in group])
            )
            merged.append((state, key, [patch for _, _, of in group for patch in of]))
        tokens, r = [t for i, t in enumerate(even) if i not in gone] + merged, r - len(gone)
    return tokens
