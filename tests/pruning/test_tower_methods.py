"""Methods that act before the decoder: the authors' functions, slow references in plain Python, and the stock model.

A reference gets its numbers from an eager tower as lists and knows nothing of the package.
"""

from __future__ import annotations

import copy
import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGE, batch, prompts, speaking, spec_of, tiny, tiny_model, write_base
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, SiglipVisionConfig, SiglipVisionModel

import twigvlm
from twigvlm.config import TwigConfig
from twigvlm.decoding import embed
from twigvlm.errors import InputError
from twigvlm.loading.base import Loaded
from twigvlm.model.tower import Tower
from twigvlm.pruning import METHODS, TowerMethod, find_method, plan_for, select
from twigvlm.pruning.methods import cdpruner, divprune, hiprune, holov, vispruner
from twigvlm.pruning.methods.visionzip import VisionZip, Zip
from twigvlm.pruning.plan import Shape
from twigvlm.pruning.reducer import View, best
from twigvlm.vlm import TwigVLM

LLAVA = Shape(32, 576, 2, 24)


# ---------------------------------------------------------------------- the authors' functions


def arrays(golden: Path, name: str) -> dict[str, torch.Tensor]:
    with np.load(golden / "pruning" / f"{name}.npz") as found:
        tensors = {key: torch.from_numpy(found[key]) for key in found.files}
    return {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}


def chosen(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


class Heads:
    """A layer's tap: attention [1, H, N] of the first token, and keys [1, N, d] of one head."""

    def __init__(self, attention: torch.Tensor, keys: torch.Tensor):
        self.attention, self.keys = attention, keys[:, None]

    def weights(self) -> torch.Tensor:
        return self.attention[:, :, None]


@pytest.mark.parametrize(("R", "contextual"), [(192, 30), (128, 20), (64, 10)])
def test_visionzip_is_the_authors(golden, R, contextual):
    data = arrays(golden, "functions")
    reducer = VisionZip().reducer(R, LLAVA)
    assert reducer == Zip(R, contextual)
    view = View(reducer, 576, 1, lambda x: x, None, [], states=data["visionzip_hidden"])
    view.taps[0] = Heads(data["visionzip_cls_attention"], data["visionzip_keys"])
    found = reducer(view)
    torch.testing.assert_close(
        found.features, data[f"visionzip_out_{R - contextual}_{contextual}"], atol=1e-5, rtol=1e-5
    )
    patches = [s for s in found.source[0].tolist() if s >= 0]
    assert found.source[0, 0] == -1 and len(set(patches)) == len(patches) == R - 1
    dominant, merged = patches[: R - 1 - contextual], patches[R - 1 - contextual :]
    assert dominant == sorted(dominant) and merged == sorted(merged)


@pytest.mark.parametrize("R", [192, 64])
def test_divprune_is_the_authors(golden, R):
    data = arrays(golden, "functions")
    found = divprune.diverse(select.cosine(data["divprune_features"])[None], R)
    assert found[0].tolist() == data[f"divprune_order_{R}"].tolist()


@pytest.mark.parametrize(("R", "ratio"), [(192, 0.5), (64, 0.5), (64, 0.75)])
def test_vispruner_is_the_authors(golden, R, ratio):
    data = arrays(golden, "functions")
    reducer = vispruner.VisPruner(ratio=ratio).reducer(R, LLAVA)
    similarity = select.cosine(data["vispruner_features"])
    # In one round patches 44 and 520 are equally similar, in fp32; the authors' sort, which is not stable, took 520 first.
    similarity[:, 520] += 2e-7
    found = vispruner.prune(data["vispruner_cls_attention"], similarity, R, reducer.important)
    assert found[0].tolist() == chosen(data[f"vispruner_mask_{R}_{ratio}"])


def test_scope_is_the_authors(golden):
    data = arrays(golden, "scope")
    found = select.covering(select.cosine(data["features"]), data["cls_attention_sum"], 192)
    assert found[0].tolist() == data["order_192"].tolist()


@pytest.mark.parametrize(("R", "alpha"), [(192, 0.1), (128, 0.1), (64, 0.1), (64, 0.5), (64, 0), (192, 0.5)])
def test_hiprune_is_the_authors(golden, R, alpha):
    data = arrays(golden, "hiprune")
    received = []
    for part in ("object", "deep"):
        weights = (data[f"{part}_q"] @ data[f"{part}_k"].transpose(1, 2) / 2).softmax(-1)
        received.append(weights.mean((0, 1))[None, 1:])
        torch.testing.assert_close(received[-1][0], data[f"{part}_scores"], atol=1e-5, rtol=1e-5)
    reducer = hiprune.HiPrune(alpha=alpha).reducer(R, LLAVA)
    assert reducer.anchors == round(R * alpha / 5)
    found = hiprune.choose(*received, R, reducer.anchors, 24)
    assert found[0].tolist() == chosen(data[f"mask_{R}_{alpha}"])


def test_hiprune_asks_the_authors_layers():
    reducer = hiprune.HiPrune().reducer(64, LLAVA)
    assert [layer for layer in range(24) if reducer.listens(layer, 22)] == [8, 22]


@pytest.mark.parametrize("attention", ["plain", "sink"])
@pytest.mark.parametrize(("R", "crops"), [(64, 16), (128, 8), (192, 5)])
def test_holov_is_the_authors(golden, attention, R, crops):
    data = arrays(golden, "holov")
    reducer = holov.HoloV().reducer(R, LLAVA)
    assert reducer.crops == crops
    scores = data[f"attention_{attention}"][None]
    found = holov.choose(scores, R, crops, False)[0].tolist()
    assert found == data[f"kept_{attention}_{crops}_{R}"].tolist()
    full = holov.choose(scores, R, crops, True)[0].tolist()
    assert -1 not in full and len(set(full)) == R
    kept = [i for i in found if i >= 0]
    assert set(kept) <= set(full) and (full == found if -1 not in found else len(kept) < R)


def test_fastervlm_keeps_what_is_looked_at_most():
    assert best(torch.tensor([[1.0, 5, 3, 5, 3, 0]]), 3).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("R", "grid"), [(192, (12, 16)), (128, (8, 16)), (64, (8, 8)), (576, (24, 24))])
def test_grids_of_the_tables(R, grid):
    high, wide = grid
    cells = select.cells(R, 24)
    rows = [int((i + 0.5) * 24 / high) for i in range(high)]
    columns = [int((j + 0.5) * 24 / wide) for j in range(wide)]
    assert [middle for _, _, middle in cells] == [24 * r + c for r in rows for c in columns]
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.arange(576.0).reshape(1, 24, 24), grid).flatten()
    found = [np.mean([24 * r + c for r in down for c in across]) for down, across, _ in cells]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float32), pooled)


def test_cdpruner_is_the_authors(golden):
    """The sets of one picture under one and two pieces of text; the carried golden set has the small case alone."""
    data = arrays(golden, "cdpruner")
    for pieces in (1, 2) if "features" in data else ():
        fit = cdpruner.clip_fit(data["image_embeds"], [data[f"text_embeds_{pieces}"]])
        matrix = cdpruner.kernel(data["features"], fit)
        for R in (192, 128, 64):
            assert sorted(select.spanning(matrix, R)[0].tolist()) == chosen(data[f"mask_{pieces}_{R}"])
        if pieces == 1:
            assert select.spanning(matrix, 64)[0].tolist() == data["order_1_64"].tolist()


def test_cdpruner_is_the_authors_but_for_what_two_pictures_share(golden):
    """In the authors' batch all pictures share one least and one largest relevance; here each has its own."""
    data = arrays(golden, "cdpruner")
    text = data["batch_text_embeds"]
    fit = cdpruner.clip_fit(data["batch_image_embeds"], [text, text])
    whole = (fit - fit.min() + cdpruner.LEAST) / (fit.max() - fit.min())
    shared = whole[:, :, None] * select.cosine(data["batch_features"]) * whole[:, None]
    for kernel, mask in zip(shared, data["batch_mask_16"], strict=True):
        assert sorted(select.spanning(kernel[None], 16)[0].tolist()) == chosen(mask)
    alone = [cdpruner.kernel(data["batch_features"][i : i + 1], fit[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(cdpruner.kernel(data["batch_features"], fit), torch.cat(alone))


def test_volume_that_is_used_up_leaves_no_nan():
    """Features of rank 3, five of eight tokens wanted, two of them the same."""
    features = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0))
    features[0, 5] = features[0, 2]
    order = select.spanning(select.cosine(features), 8)[0].tolist()
    assert sorted(order) == list(range(8))
    same = select.spanning(torch.ones(1, 4, 4), 4)
    assert same[0].tolist() == [0, 1, 2, 3]


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
def written(vlm, row: list[int], tokens: list[torch.Tensor], new: int) -> list[int]:
    """What the stock model writes behind a prompt in which `tokens` [n, D] stand for each picture."""
    hidden, V, i = [], vlm.config.V, 0
    waiting = list(tokens)
    while i < len(row):
        if row[i] == vlm.image_token_id:
            hidden += list(waiting.pop(0))
            i += V
        else:
            hidden.append(vlm.trunk.embed_text([row[i]])[0])
            i += 1
    out = vlm.model.generate(
        inputs_embeds=torch.stack(hidden)[None], attention_mask=torch.ones(1, len(hidden), dtype=torch.long),
        max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0].tolist()


@st.composite
def shapes(draw) -> tuple[dict, int, tuple, int]:
    """A model, R, the layout of a prompt, a seed."""
    shape = {"side": 14 * draw(st.sampled_from([2, 4, 5])), "sight": draw(st.integers(2, 5))}
    V = (shape["side"] // 14) ** 2
    layout = draw(st.sampled_from([(3, IMAGE, 4), (2, IMAGE, 1, IMAGE, 3), (IMAGE, 2), (4, IMAGE)]))
    return shape, draw(st.integers(1, V) | st.just(V)), layout, draw(st.integers(0, 99))


def check(spec: str, shape: dict, R: int, layout: tuple, seed: int, slow: Callable[[Picture, int], Kept]) -> None:
    """Tokens, places, and the answer."""
    vlm = tiny(**shape, twig=False)
    (row,), (pixels,) = prompts(vlm, [layout], seed)
    expected = [slow(picture, R) for picture in pictures_of(shape, row, pixels)]
    plan = plan_for(spec, R, vlm.config.V, TwigConfig(vlm.config.L, 2, 1))
    with torch.inference_mode():
        reduced = embed(vlm.trunk, plan, [row], pixels).reduced
        width = vlm.model.config.text_config.hidden_size
        tokens = [
            torch.stack([
                torch.zeros(width) if state is None else vlm.model.model.multi_modal_projector(torch.tensor(state))
                for state, _ in kept
            ])
            for kept in expected
        ]  # fmt: skip
    assert all(len(kept) == R for kept in expected)
    found = reduced.stream.hidden[0][reduced.stream.visual[0] >= 0]
    torch.testing.assert_close(found, torch.cat(tokens), atol=1e-4, rtol=1e-4)
    V = vlm.config.V
    places = [V * i + source for i, kept in enumerate(expected) for _, source in kept if source >= 0]
    assert reduced.source[reduced.source >= 0].tolist() == places
    out = vlm.generate(**batch([row], [pixels]), retained_tokens=R, pruning=spec, max_new_tokens=5, eos_token_id=[])
    assert out.tokens[0] == written(vlm, row, tokens, 5)
    assert out.stats.visual_by_layer == [R] * vlm.config.L


@pytest.mark.parametrize("spec", SLOW)
@settings(max_examples=12)
@given(data=st.data())
def test_against_plain_python(spec, data):
    shape, R, layout, seed = data.draw(shapes())
    V = (shape["side"] // 14) ** 2
    if spec.startswith("cdpruner"):
        R = min(R, 16)  # of features 32 wide
    if spec == "visionzip:contextual=2" and R < 3:
        R = 3
    assume(V >= R)
    check(spec, shape, R, layout, seed, SLOW[spec])


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


@pytest.mark.parametrize("spec", ["tome", "tome:sort"])
@settings(max_examples=12)
@given(data=st.data())
def test_tome_against_plain_python(spec, data):
    shape, R, layout, seed = data.draw(shapes())
    _, (pixels,) = prompts(tiny(**shape, twig=False), [layout], seed)
    kept = iter([slow_tome(shape, picture, R, spec == "tome:sort") for picture in pixels])
    check(spec, shape, R, layout, seed, lambda picture, n: next(kept))


@pytest.mark.parametrize(
    ("R", "counts"), [(192, [17] * 16 + [16] * 7), (128, [20] * 11 + [19] * 12), (64, [23] * 6 + [22] * 17)]
)
def test_tome_merges_in_the_layers_that_the_decoder_sees(R, counts):
    """23 of CLIP's 24."""
    reducer, left = METHODS["tome"]().reducer(R, LLAVA), 577
    for layer, count in enumerate(counts):
        assert reducer.within_tokens(layer, 22, left) == left - count
        left -= count
    assert left == R + 1


# ---------------------------------------------------------------------- budgets, towers, draws


BEFORE = sorted(name for name, kind in METHODS.items() if issubclass(kind, TowerMethod))


@given(st.integers(1, 30), st.data())
def test_a_grid_of_any_count(side, data):
    """Just n cells, whose middles are n patches in raster order; together they are the whole picture."""
    n = data.draw(st.integers(1, side**2))
    cells = select.cells(n, side)
    middles = [middle for _, _, middle in cells]
    assert len(cells) == n and middles == sorted(set(middles)) and middles[0] >= 0 and middles[-1] < side**2
    assert {side * r + c for rows, columns, _ in cells for r in rows for c in columns} == set(range(side**2))
    assert all(middle // side in rows and middle % side in columns for rows, columns, middle in cells)


@pytest.mark.parametrize("method", BEFORE)
def test_exactly_R_tokens_at_every_R(method):
    vlm = tiny(side=56, sight=3, twig=False)
    (row,), (pixels,) = prompts(vlm, [(2, IMAGE, 1, IMAGE, 3)])
    for R in range(1, 17):
        plan = plan_for(spec_of(method), R, 16, TwigConfig(6, 2, 1))
        assert plan.tokens_per_layer(6, 16) == [R] * 6
        with torch.inference_mode():
            reduced = embed(vlm.trunk, plan, [row], pixels).reduced
        assert int((reduced.stream.visual >= 0).sum()) == 2 * R and reduced.stream.width == 6 + 2 * R


@pytest.mark.parametrize("method", BEFORE)
def test_half_precision_is_kept(method):
    half = copy.deepcopy(tiny_model(side=56, sight=3)).bfloat16()
    vlm = TwigVLM(Loaded(half, Path("nowhere"), "half", False), None)
    (row,), (pixels,) = prompts(vlm, [(2, IMAGE, 3)])
    plan = plan_for(spec_of(method), 7, 16, TwigConfig(6, 2, 1))
    with torch.inference_mode():
        reduced = embed(vlm.trunk, plan, [row], pixels).reduced
    assert reduced.stream.hidden.dtype == torch.bfloat16 and reduced.stream.hidden.isfinite().all()
    assert reduced.stream.width == 12


def classless_tower() -> Tower:
    """Three layers, of which the last is not read, behind embeddings without a class token, as SigLIP has them."""
    config = SiglipVisionConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=56, patch_size=14
    )
    model = copy.deepcopy(tiny_model(side=56, sight=3).model.vision_tower)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        donor = SiglipVisionModel(config).eval().requires_grad_(False)
    model.embeddings = getattr(donor, "vision_model", donor).embeddings
    return Tower(model, 1)


@pytest.mark.parametrize("method", BEFORE)
def test_a_tower_without_a_class_token(method):
    """Who needs one says so; the others leave R of its patches."""
    tower, reducer = classless_tower(), find_method(spec_of(method)).plan(6, Shape(6, 16, 2, 4)).tower
    view = View(
        reducer, 16, tower.class_tokens, lambda states: states, lambda ids: torch.ones(len(ids), 16), [[4, 5]] * 2
    )
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    assert reducer.class_token == ("class token" in METHODS[method].needs)
    with torch.inference_mode():
        if reducer.class_token:
            with pytest.raises(InputError, match="class token"):
                tower.look(pixels, view)
        else:
            view.states = tower.look(pixels, view)
            found = reducer(view)
            assert found.features.shape == (2, 6, 16) and all(len(set(s)) == 6 for s in found.source.tolist())


def test_without_a_class_token_it_is_said_which_methods_are_left(monkeypatch):
    vlm = tiny(side=56)
    monkeypatch.setattr(Tower, "class_tokens", 0)
    with pytest.raises(InputError, match="class token") as error:
        vlm.generate(**batch(*prompts(vlm, [(3, IMAGE, 4)])), retained_tokens=6, pruning="fastervlm")
    assert all(name in str(error.value) for name in ("'fastervlm'", "tome", "divprune", "uniform"))
    assert "scope" not in str(error.value)


def drawn(spec: str, layouts, seed, pictures: int = 0) -> list[list[int]]:
    vlm = tiny(side=56)
    out = vlm.generate(
        **batch(*prompts(vlm, layouts, pictures)), retained_tokens=8, pruning=spec, seed=seed, max_new_tokens=1
    )
    return [kept.tolist() for kept in out.kept]


def test_random_before_the_decoder_repeats_by_seed_row_and_picture():
    spec, single, pair = "random:schedule=input", (3, IMAGE, 4), (2, IMAGE, 1, IMAGE, 3)
    first, second = drawn(spec, [single, pair], [7, 8])
    assert drawn(spec, [single], 7) == [first] != drawn(spec, [single], 8)
    assert drawn(spec, [single, single], 7)[0] == first
    assert drawn(spec, [single], 7, pictures=1) != [first]
    assert len(first) == 8 and first == sorted(first) and second == sorted(second)
    halves = [i for i in second if i < 16], [i - 16 for i in second if i >= 16]
    assert [len(half) for half in halves] == [8, 8] and halves[0] != halves[1]


@pytest.mark.parametrize(
    ("spec", "entering"),
    [
        ("random", [576] * 2 + [41] * 22 + [0] * 8),
        ("random:schedule=fastv", [576] * 2 + [30] * 30),
        ("random:schedule=input", [64] * 32),
    ],
)
def test_random_under_other_schedules(spec, entering):
    plan = plan_for(spec, 64, 576, TwigConfig(32, 2, 3))
    assert plan.tokens_per_layer(32, 576) == entering and plan.random and not plan.needs_twig
    assert (plan.tower is None) == ("input" not in spec)  # else numbered as in the shorter prompt
    low, high = find_method(spec).legal(LLAVA)
    for wrong in (float(low) - 1, float(high) + 1):
        with pytest.raises(InputError, match="legal is"):
            plan_for(spec, wrong, 576, TwigConfig(32, 2, 3))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("visionzip:contextual=64", ("contextual=64", "0 to 63")),
        ("visionzip:contextual=-1", ("contextual=-1", "0 to 63")),
        ("visionzip:merge=mean", ("'mean'", "add, average")),
        ("vispruner:ratio=1.5", ("ratio=1.5", "0 to 1")),
        ("vispruner:ratio=nan", ("ratio=nan", "0 to 1")),
        ("hiprune:alpha=-0.1", ("alpha=-0.1", "0 to 1")),
        ("scope:power=-1", ("power=-1", "0 to 10")),
        ("holov:crops=0", ("crops=0", "1 to V=576")),
        ("holov:crops=577", ("crops=577", "1 to V=576")),
        ("random:schedule=pdrop", ("'pdrop'", "twig, input, fastv")),
        ("cdpruner:stand_in,text_tower=x", ("not both",)),
    ],
)
def test_settings_that_cannot_be(spec, words):
    with pytest.raises(InputError) as error:
        plan_for(spec, 64, 576, TwigConfig(32, 2, 3))
    assert all(word in str(error.value) for word in words), error.value


# ---------------------------------------------------------------------- CLIP's text tower

WORDS = [
    "<|startoftext|>",
    "<|endoftext|>",
    *string.ascii_lowercase,
    "?",
    *(f"{c}</w>" for c in string.ascii_lowercase + "?"),
]
CONTEXT = 11  # of the tiny text tower, where CLIP has 77
QUESTION = "how many red things are here?"
PROMPTS = [  # what is asked about a picture, and what of it is the question
    ([], QUESTION),
    ([("what is this?", "a tree")], QUESTION),
    ([], f"{QUESTION}\nAnswer the question using a single word or phrase."),
    ([], f"{QUESTION}\nAnswer with the option's letter from the given choices directly."),
]


def write_clip(folder: Path, width: int = 16) -> CLIPModel:
    """A whole CLIP model of random weights, in Hugging Face's layout."""
    shape = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    text = {**shape, "hidden_size": 16, "vocab_size": len(WORDS), "max_position_embeddings": CONTEXT}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**shape, "hidden_size": width, "image_size": 56, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
        model.vision_model.post_layernorm.weight.data.uniform_(0.5, 2)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    """A model that has a tokenizer."""
    return twigvlm.load(write_base(tmp_path_factory.mktemp("base"), speaking(side=56).model))


@torch.inference_mode()
@pytest.mark.parametrize(("history", "question"), PROMPTS)
def test_cdpruner_reads_the_question_with_clip(asking, tmp_path, history, question):
    """CLIP's own model embeds patches and the bare question, cut into pieces and padded with zeros by hand."""
    clip, vlm = write_clip(tmp_path / "clip"), asking
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 255, (56, 56, 3), np.uint8))
    inputs = vlm.prepare(picture, question, history)
    ids = [0, *(WORDS.index(c) for c in spelt(QUESTION)), 1]
    pieces = [ids[i : i + CONTEXT] for i in range(0, len(ids), CONTEXT)]
    assert len(pieces) == 3 and len(pieces[-1]) < CONTEXT
    zeros = [[0] * (CONTEXT - len(piece)) for piece in pieces]
    texts = clip.get_text_features(
        input_ids=torch.tensor([a + b for a, b in zip(pieces, zeros, strict=True)]),
        attention_mask=torch.tensor([[1] * len(a) + b for a, b in zip(pieces, zeros, strict=True)]),
    )
    texts = getattr(texts, "pooler_output", texts).tolist()
    states = vlm.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    seen = clip.visual_projection(clip.vision_model.post_layernorm(states))[0].tolist()
    fit = [-sum(cos(patch, text) for text in texts) / len(texts) for patch in seen]
    projected = vlm.model.model.multi_modal_projector(states)[0].tolist()
    expected = slow_cdpruner(Picture(4, [[], *states[0].tolist()], [], [], [], projected, []), 6, fit)
    settings = {"retained_tokens": 6, "max_new_tokens": 1}
    out = vlm.generate(**inputs, **settings, pruning=f"cdpruner:text_tower={tmp_path / 'clip'}")
    assert out.kept[0].tolist() == [patch for _, patch in expected]
    substitute = vlm.generate(**inputs, **settings, pruning="cdpruner:stand_in")
    assert substitute.kept[0].tolist() != out.kept[0].tolist()


def spelt(text: str) -> list[str]:
    """Letters of a text as CLIP's tokenizer without merges has them: the last one of a word is marked."""
    words = text.replace("?", " ?").split()
    return [c if i < len(word) - 1 else f"{c}</w>" for word in words for i, c in enumerate(word)]


def test_cdpruner_says_what_it_needs(asking, tmp_path):
    inputs = asking.prepare(Image.new("RGB", (56, 56)), "what?")
    write_clip(tmp_path / "wide", width=32)
    write_clip(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    write_base(tmp_path / "llava", tiny_model())
    for given_, words in (
        ("", ("text_tower=", "clip-vit-large-patch14-336", "stand_in")),
        (f":text_tower={tmp_path / 'nothing'}", ("nothing", "no such folder")),
        (f":text_tower={tmp_path / 'llava'}", ("llava", "a whole CLIP model")),
        (f":text_tower={tmp_path / 'empty'}", ("empty", "no weights")),
        (f":text_tower={tmp_path / 'wide'}", ("width of 32", "has 16")),
    ):
        with pytest.raises(InputError) as error:
            asking.generate(**inputs, retained_tokens=6, pruning=f"cdpruner{given_}", max_new_tokens=1)
        assert all(word in str(error.value) for word in words), error.value
