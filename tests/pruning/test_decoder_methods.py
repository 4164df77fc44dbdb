"""Methods that act within the decoder: published values, published counts, and each rule against a slow plain one."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import IMAGE, batch, prompts, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from twigvlm.config import TwigConfig
from twigvlm.decoding.prefill import State
from twigvlm.errors import InputError
from twigvlm.pruning import METHODS, Rule, Seen, Selection, Shape, plan_for
from twigvlm.pruning.methods import dart, mustdrop, occamtoken, sieve, sparsevlm, tops, trevs
from twigvlm.pruning.rule import highest
from twigvlm.pruning.select import cosine, discounted
from twigvlm.pruning.spec import find_method

SEVEN_B = TwigConfig(32, 2, 3, 24)


@pytest.fixture(scope="module")
def arrays(golden):
    """Arrays of a golden file, floats as fp32 with an axis for rows in front."""

    def read(name: str) -> SimpleNamespace:
        with np.load(golden / "pruning" / f"{name}.npz") as file:
            found = {k: torch.from_numpy(file[k]) for k in file.files}
        return SimpleNamespace(**{k: v.float() if v.dtype == torch.float16 else v for k, v in found.items()})

    return read


def true(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------- golden values


def test_dart_is_the_authors_function(arrays):
    """Pivots; and what they keep, in the order in which the authors' run took them."""
    g = arrays("dart")
    P, V = int(g.prefix), int(g.visual)
    keys, own, after = g.keys.transpose(1, 2), g.states[:, P : P + V], g.states[:, P:]
    images = dart.Spread._pivots(keys[:, P : P + V], true(1, V), torch.tensor([4]))
    texts = dart.Spread._pivots(keys[:, P + V :], true(1, keys.shape[1] - P - V), torch.tensor([4]))
    assert images[0].tolist() == g.image_pivots.tolist() and texts[0].tolist() == g.text_pivots.tolist()
    assert {*g.pivot_order.tolist()} == {*images[0].tolist(), *(texts[0] + V).tolist()}
    stay = torch.zeros(1, V, dtype=torch.bool).scatter(1, images, True)
    likeness = cosine(after[:, g.pivot_order], own)
    for n in (192, 128, 64, 166):
        kept = stay | dart.least_like(likeness, true(1, 8), ~stay, torch.tensor([n // 8 * 8]))
        assert kept[0].nonzero()[:, 0].tolist() == getattr(g, f"kept_{n}").tolist()


def test_sieve_is_its_formula(arrays):
    g = arrays("formula_sieve")
    text, visual, rows = g.text[None], g.visual[None], g.attention[None]
    left, share = sieve.unsaid(visual, text, true(1, text.shape[1]))
    centred = text - text.mean(1, keepdim=True)
    close(sieve.ridge(sieve.spectrum(centred @ centred.transpose(1, 2))[0]), g.lam[None])
    close(share[0], g.cmr)
    relevance = sieve.attended(rows, true(1, visual.shape[1]))
    close(relevance[0], g.relevance)
    worth = (relevance * share).square()
    close(worth[0], g.score)
    order = discounted(worth, cosine(left), true(1, visual.shape[1]), len(g.order))
    assert order[0].tolist() == g.order.tolist()


def test_sparsevlms_clusters_are_the_authors(arrays):
    """As their function makes them, but for its noise; with padding and without."""
    g = arrays("functions")
    x, count = g.sparsevlm_x, int(g.sparsevlm_clusters)
    padded = torch.cat([x, torch.full_like(x[:, :5], 9.0)], 1)
    centres, merged = sparsevlm.density_peaks(
        padded.expand(2, -1, -1), torch.arange(45) < torch.tensor([[40], [12]]), torch.tensor([count, 2]), count
    )
    close(merged[:1], g.sparsevlm_merged)
    alone = sparsevlm.density_peaks(x[:, :12], true(1, 12), torch.tensor([2]), 2)
    assert centres[1].tolist() == [*alone[0][0].tolist(), -1, -1]
    close(merged[1, :2], alone[1][0])


def test_trevs_is_its_formula(arrays):
    g = arrays("formula_trevs")
    salience = trevs.standing_out(g.cls_attention[None], 1.4)
    said = trevs.likeness_to(g.text, g.projected)
    relevance = trevs.standing_out(said[None], 1.0)
    score = trevs.fused(salience, relevance)
    close(said, g.text_relevance)
    for found, expected in ((salience, g.saliency_hat), (relevance, g.relevance_hat), (score, g.score)):
        torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)
    chosen = trevs.pivots_and_others(score, g.projected[None], int(g.K_r + g.K_d))
    assert chosen[0].tolist() == sorted([*g.pivots.tolist(), *g.diverse_order.tolist()])
    rows = g.stage2_attention[None]
    variance, score = trevs.varying(rows, true(1, rows.shape[2]), true(1, rows.shape[3]))
    close(variance[0, g.heads], g.head_variance[g.heads])
    close(score[0], g.stage2_score)
    kept = highest(score, true(1, rows.shape[3]), torch.tensor([len(g.stage2_kept)]))
    assert kept[0].nonzero()[:, 0].tolist() == sorted(g.stage2_kept.tolist())


@pytest.mark.parametrize("norm", ["mean", "minmax"])
def test_tops_is_its_formula(arrays, norm):
    g = arrays("formula_tops")
    order = tops.picked(g.features[None], g.relevance[None], true(1, len(g.relevance)), 108, float(g.lam), norm)
    assert float(g.alpha) == tops.DIVERSITY
    assert order[0].tolist() == getattr(g, f"order_{norm}").tolist()


def test_mustdrops_windows_are_the_authors(arrays):
    """18 of 64 windows merged, most alike first, then the other patches; another picture of the batch merges none."""
    g = arrays("functions")
    hidden, expected = g.mustdrop_hidden, g.mustdrop_merged
    other = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    merged, source = mustdrop.merge_windows(torch.cat([other, hidden])[:, 1:], 24)
    assert (source >= 0).sum(1).tolist() == [576, 432]
    found = torch.cat([hidden[:, :1], merged[1:, :432]], 1)[:, : expected.shape[1]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert source[1, :432].unique().tolist() == sorted(source[1, :432].tolist())
    assert torch.equal(merged[0], other[0, 1:])


# ---------------------------------------------------------------------- published counts

TABLE = {  # method: layers before which it cuts, tokens of 576 after each at R = 192, 128 and 64
    "fastv": ([2], [[166], [98], [30]]),
    "fastv:count=authors": ([2], [[166], [98], [30]]),
    "dart": ([2], [[166], [98], [30]]),
    "dart:count=authors": ([2], [[196], [132], [68]]),
    "sieve": ([2], [[166], [98], [30]]),
    "sieve:cuts=two": ([2, 16], [[224, 116], [136, 65], [40, 21]]),
    "pdrop": ([2, 10, 20], [[312, 156, 78], [184, 92, 46], [56, 28, 14]]),
    "sparsevlm:count=authors": ([3, 7, 16], [[309, 204, 113], [312, 117, 39], [82, 32, 18]]),
    "sparsevlm:faithful": ([3, 7, 16], [[309, 204, 113], [312, 117, 39], [82, 32, 18]]),
    "sparsevlm:version=2.0,faithful": ([3, 7, 16], [[300, 200, 118], [238, 108, 60], [66, 34, 20]]),
    "sparsevlm": ([3, 7, 16], [[278, 184, 103], [252, 96, 31], [29, 12, 6]]),
    "sparsevlm:version=2.0": ([3, 7, 16], [[271, 180, 107], [194, 88, 50], [25, 12, 7]]),
    "trevs": ([0, 9], [[376, 120], [243, 83], [133, 37]]),
    "tops": ([0, 12, 24], [[324, 162, 39], [216, 108, 26], [108, 54, 13]]),
    "tops:norm=minmax": ([0, 12, 24], [[324, 162, 39], [216, 108, 26], [108, 54, 13]]),
    "trevs:count=authors": ([0, 9], [[384, 128], [256, 85], [128, 42]]),
    "tops:count=authors": ([0, 12, 24], [[384, 192, 48], [256, 128, 32], [128, 64, 16]]),
    "twig-discount": ([2, 24], [[227, 0], [134, 0], [41, 0]]),
}


@pytest.mark.parametrize("spec", TABLE)
def test_counts_on_llava(spec):
    cuts, kept = TABLE[spec]
    for R, left in zip((192, 128, 64), kept, strict=True):
        plan = plan_for(spec, R, 576, SEVEN_B)
        first = [plan.tower.most(576)] if plan.tower is not None else []
        assert [0] * len(first) + [before for before, _ in plan.stages] == cuts
        assert first + [rule.most(first[0] if first else 576) for _, rule in plan.stages] == left


ENTERING = [  # what the tables say of R where it is not what the label says, and the authors' own count
    ("dart:count=authors", 192, 219.8, 192),
    ("dart:count=authors", 128, 159.8, 128),
    ("dart:count=authors", 64, 99.8, 64),
    ("dart", 64, 64.1, 26),
    ("pdrop:count=authors", 270, 270, 270),
    ("trevs:count=authors", 128, 133.1, 127.75),
    ("trevs:count=authors", 64, 66.2, 63.5),
    ("tops:count=authors", 128, 152, 128),
    ("tops:count=authors", 32, 38, 32),
    ("tops", 64, 64, 54),
    ("sparsevlm:faithful", 192, 206.5, 192.03),
    ("sparsevlm:faithful", 128, 145.4, 128.6),
    ("sparsevlm:count=authors", 64, 82.3, 64.8),
    ("sparsevlm", 192, 192, 177.22),
    ("sparsevlm:version=2.0,count=authors", 64, 81.8, 64.44),
]


@pytest.mark.parametrize(("spec", "R", "entering", "label"), ENTERING)
def test_the_authors_count(spec, R, entering, label):
    counts = plan_for(spec, R, 576, SEVEN_B).tokens_per_layer(32, 576)
    assert sum(counts) / 32 == pytest.approx(entering, abs=0.051)
    assert find_method(spec).authors(counts) == pytest.approx(label, abs=0.05)


@pytest.mark.parametrize("spec", ["pdrop:cuts=authors", "pdrop:count=authors"])
def test_pyramiddrops_own_cuts(spec):
    """Half, a quarter and an eighth before 8, 16 and 24; R below 144 is out of their reach."""
    plan = plan_for(spec, 270, 576, SEVEN_B)
    assert [(b, rule.most(576)) for b, rule in plan.stages] == [(8, 288), (16, 144), (24, 72)]
    with pytest.raises(InputError, match="legal is 144 to 576"):
        plan_for(spec, 128, 576, SEVEN_B)


# ---------------------------------------------------------------------- what a rule saw and chose


@dataclass(frozen=True)
class Spy(Rule):
    """Another rule, whose dealings are written down."""

    rule: Rule
    log: list

    @property
    def probe(self):
        return self.rule.probe

    @property
    def exact(self):
        return self.rule.exact

    @property
    def draws(self):
        return self.rule.draws

    def most(self, total: int) -> int:
        return self.rule.most(total)

    def __call__(self, seen: Seen) -> Selection:
        chosen = self.rule(seen)
        self.log.append((self.rule, seen, chosen))
        return chosen


@contextmanager
def spied(vlm):
    """Lists (rule, seen, selection) of every cut that `vlm` makes meanwhile."""
    log, plain = [], vlm._plan

    def spying(*arguments):
        plan = plain(*arguments)
        return replace(plan, stages=tuple((before, Spy(rule, log)) for before, rule in plan.stages))

    with patch.object(vlm, "_plan", spying):
        yield log


class Row:
    """Row b of what a rule saw, without padding, in float64."""

    def __init__(self, seen: Seen, b: int):
        visual, text = seen.visual.real()[b], seen.text.real()[b]
        self.total = seen.total[b]
        self.visual, self.text = seen.visual.hidden[b, visual].double(), seen.text.hidden[b, text].double()
        self.scores = seen.scores[b][:, visual].double()  # Q V'
        heads, there = seen.heard.by_head(seen.visual)[b].double(), seen.heard.asked.real()[b]
        self.heads = heads[:, there][..., visual]  # H Q V'
        self.width = seen.heard.tap.query.shape[-1]
        self.keys = seen.heard.keys(seen.visual)[b, visual].double()
        self.text_keys = seen.heard.keys(seen.heard.asked)[b, there].double()
        image = seen.prompt.visual[b] >= 0
        self.first = seen.prompt.hidden[b, image].double(), seen.first(seen.text)[b, text].double()
        self.positions = seen.heard.asked.positions[0, b, there].tolist(), seen.visual.positions[0, b, visual].tolist()
        self.marked = seen.marks("key")[b, visual].nonzero()[:, 0].tolist() if "key" in seen.marked else []
        first = seen.prompt.take((seen.prompt.visual < 0).to(torch.uint8).argmax(1, keepdim=True))
        self.reference = float(seen.heard.by_head(first)[b, :, there, 0].double().mean())
        self.norm = lambda x: seen.norm(x.float()).double()


def chosen(selection: Selection, seen: Seen, b: int) -> list[int]:
    return selection.keep[b][seen.visual.real()[b]].nonzero()[:, 0].tolist()


def budget(rule, row: Row) -> int:
    return -(-rule.r * row.total // rule.V)


def cosines(a: torch.Tensor, b: torch.Tensor) -> list[list[float]]:
    """Of all rows; that of nothing is 0."""
    return (a @ b.T / (a.norm(dim=1)[:, None] * b.norm(dim=1)).clamp(min=1e-30)).tolist()


def plain_dart(rule, row: Row) -> list[int]:
    n = budget(rule, row)
    norms = [float(k.abs().sum()) for k in row.keys]
    images = sorted(range(len(norms)), key=lambda i: -norms[i])[: min(4, n)]
    norms = [float(k.abs().sum()) for k in row.text_keys]
    texts = sorted(range(len(norms)), key=lambda i: -norms[i])[:4]
    own, other = row.norm(row.visual), row.norm(row.text)
    likeness = cosines(torch.stack([own[i] for i in images] + [other[i] for i in texts]), own)
    kept, each = list(images), divmod(n - len(images), len(likeness))
    for p, like in enumerate(likeness):
        pool = [j for j in range(len(own)) if j not in kept]
        kept += sorted(pool, key=lambda j: like[j])[: each[0] + (p < each[1])]
    return sorted(kept)


def plain_picks(worth: list[float], residual: torch.Tensor, n: int) -> list[int]:
    worth, kept, like = list(worth), [], cosines(residual, residual)
    for _ in range(n):
        new = max((j for j in range(len(worth)) if j not in kept), key=lambda j: worth[j])
        kept.append(new)
        for j in range(len(worth)):
            worth[j] *= 1 - like[new][j] ** 2
    return sorted(kept)


def plain_residual(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    T, V = row.text - row.text.mean(0), row.visual - row.text.mean(0)
    G = T @ T.T
    w = torch.linalg.eigvalsh(G).flip(0).clamp(min=0)
    k = next(k for k in range(len(w)) if w[: k + 1].sum() >= 0.75 * w.sum())
    B = V @ T.T @ torch.linalg.inv(G + (w[k] + 1e-6) * torch.eye(len(T), dtype=torch.float64))
    r = V - B @ T
    return r, r.norm(dim=1) / V.norm(dim=1).clamp(min=1e-30)


def plain_sieve(rule, row: Row) -> list[int]:
    residual, share = plain_residual(row)
    g = row.heads.sum(1)
    loudest = sorted(range(len(g)), key=lambda h: -float(g[h].sum()))[: max(1, round(len(g) * 12 / 32))]
    a = g[loudest].sum(0)
    return plain_picks((a**2 * share**2).tolist(), residual, budget(rule, row))


def plain_twig(rule, row: Row) -> list[int]:
    return plain_picks((row.scores.sum(0) ** 2).tolist(), plain_residual(row)[0], budget(rule, row))


def plain_raters(row: Row) -> list[int]:
    V, T = row.first
    g = (V @ T.T).softmax(1).mean(0).tolist()
    return [i for i, x in enumerate(g) if x > sum(g) / len(g)] or list(range(len(g)))


def plain_clusters(x: torch.Tensor, count: int) -> list[tuple[int, torch.Tensor]]:
    """(centre, mean of its members)"""
    d = [[float((a - b).norm()) / len(a) ** 0.5 for b in x] for a in x]
    rho = [-sum(e**2 for e in sorted(row)[:count]) / count for row in d]
    top = max(map(max, d))
    delta = [min([d[i][j] for j in range(len(x)) if rho[j] > rho[i]], default=top) for i in range(len(x))]
    centres = sorted(range(len(x)), key=lambda i: -math.exp(rho[i]) * delta[i])[:count]
    member = [
        centres.index(i) if i in centres else min(range(count), key=lambda c: d[i][centres[c]]) for i in range(len(x))
    ]
    return [(c, x[[i for i in range(len(x)) if member[i] == k]].mean(0)) for k, c in enumerate(centres)]


def plain_sparse(rule, row: Row):
    """Kept tokens, and (token whose place it takes, value) of each merged one."""
    n, entering = -(-rule.n * row.total // rule.V), -(-rule.entering * row.total // rule.V)
    asked, heads = plain_raters(row), row.heads
    assert entering == len(row.visual)
    if not rule.merges:
        theta = [10000 ** (-2 * f / row.width) for f in range(row.width // 2)]
        W = [
            [sum(2 * math.cos((i - j) * t) for t in theta) / row.width**0.5 for j in row.positions[1]]
            for i in row.positions[0]
        ]
        heads = heads / torch.tensor(W, dtype=torch.float64)
        mass = heads[:, asked].sum((1, 2)).tolist()
        heads = heads[sorted(range(len(mass)), key=lambda h: -mass[h])[: max(1, round(len(mass) * 14 / 32))]]
    s = heads.mean(0)[asked].mean(0).tolist()
    order = sorted(range(len(s)), key=lambda j: -s[j])
    if not rule.merges:
        return sorted(order[:n]), []

    def total(k):
        return k + (int((int(0.3 * (entering - k)) + 1) / 10) + 1 if k < entering else 0)

    k = max([k for k in range(n + 1) if total(k) <= n], default=0)
    C = min(total(k) - k, n - k)
    pool = sorted(order[k : k + int(0.3 * (entering - k)) + 1]) if C else []
    clusters = plain_clusters(row.visual[pool], C) if C else []
    return sorted(order[:k]), [(pool[c], value) for c, value in clusters]


def plain_trevs(rule, row: Row) -> list[int]:
    u = [float(h.var(1, unbiased=False).mean()) for h in row.heads]
    best = sorted(range(len(u)), key=lambda h: -u[h])[: max(1, len(u) // 2)]
    score = row.heads[best].mean(0).max(0).values.tolist()
    return sorted(sorted(range(len(score)), key=lambda j: -score[j])[: budget(rule, row)])


def plain_tops(r: list[float], features: torch.Tensor, n: int, coverage: float, norm: str) -> list[int]:
    F = cosines(features, features)
    S = [max(range(len(r)), key=lambda j: r[j])][:n]
    while len(S) < n:
        U = [j for j in range(len(r)) if j not in S]
        m = [max(F[j][s] for s in S) for j in range(len(r))]
        score = dict.fromkeys(U, 0.0)
        for weight, x in (
            (1, r),
            (0.5, [1 - m[i] for i in range(len(r))]),
            (coverage, [sum(max(0.0, F[i][j] - m[j]) for j in U) for i in range(len(r))]),
        ):
            low, high, mean = min(x[i] for i in U), max(x[i] for i in U), sum(x[i] for i in U) / len(U)
            for i in U:
                score[i] += weight * (x[i] / mean if norm == "mean" else (x[i] - low) / max(high - low, 1e-30))
        S.append(max(U, key=lambda i: score[i]))
    return sorted(S)


def plain_tops_rule(rule, row: Row) -> list[int]:
    mass = row.scores[: len(row.text)].sum(1).tolist()
    asked = [t for t in range(len(mass)) if mass[t] >= sum(mass) / len(mass) - 1e-12]
    r = row.scores[asked].mean(0).tolist()
    return plain_tops(r, row.visual, budget(rule, row), rule.coverage, rule.norm)


def plain_ranked(rule, row: Row):
    asked = plain_raters(row)
    rows = row.heads.mean(0)[asked].float()
    n, rank = len(row.visual), int(torch.linalg.matrix_rank(rows))
    s = row.heads.mean(0)[asked].mean(0).tolist()
    if rank == n:
        return list(range(n)), []
    k = max(min(int(rank * rule.scale + rule.bias), n - 1), 0)
    m = int(0.3 * (n - k)) + 1
    order = sorted(range(n), key=lambda j: -s[j])
    pool = sorted(order[k : k + m])
    return sorted(order[:k]), [(pool[c], value) for c, value in plain_clusters(row.visual[pool], int(m / 10) + 1)]


def plain_mustdrop(rule, row: Row) -> list[int]:
    got, high = row.scores.sum(0).tolist(), row.scores.max(0).values.tolist()
    little = [g < rule.threshold * sum(got) for g in got]
    return [j for j in range(len(got)) if j in row.marked or not (little[j] and high[j] < rule.individual)]


def plain_occam(rule, row: Row) -> list[int]:
    return [j for j, high in enumerate(row.scores.max(0).values.tolist()) if high >= rule.second * row.reference]


def middle(values: list[float]) -> float:
    ranked = sorted(values)
    return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2


def plain_trevs_first(reducer, view, i: int) -> list[int]:
    z, x = view.project(view.patches)[i].double(), view.text[i].double()
    seen = view.attention()[i].double().mean(0).tolist()
    said = [(sum(max(0, c) ** 2 for c in row) / len(row)) ** 0.5 if row else 0.0 for row in cosines(z, x)]
    hats = []
    for s, tau in ((seen, 1.4), (said, 1.0)):
        spread = middle([abs(v - middle(s)) for v in s]) + 1e-6
        hats.append([max(0.0, (v - middle(s)) / spread) / tau for v in s])
    score = [max(a, b) + (a * b) ** 0.5 for a, b in zip(*hats, strict=True)]
    S = sorted(range(len(score)), key=lambda j: -score[j])[: reducer.n - reducer.n // 4]
    F = cosines(z, z)
    while len(S) < reducer.n:
        S.append(min((j for j in range(len(score)) if j not in S), key=lambda j: max(F[j][s] for s in S)))
    return sorted(S)


def plain_tops_first(reducer, view, i: int) -> list[int]:
    r = view.attention()[i].double().mean(0).tolist()
    return plain_tops(r, view.project(view.patches)[i].double(), reducer.n, 0.5, reducer.norm)


def plain_occam_first(reducer, view, i: int) -> list[int]:
    row = view.taps[view.read].weights()[i, :, 0].double().mean(0).tolist()
    return [j for j, a in enumerate(row[1:]) if a >= reducer.first * row[0]] or [row.index(max(row[1:])) - 1]


FIRST = {
    "trevs": (trevs.StandingOut, plain_trevs_first),
    "tops": (tops.First, plain_tops_first),
    "occamtoken": (occamtoken.Above, plain_occam_first),
}


@contextmanager
def viewed(kind):
    """A list of (reducer, view, tokens) of what reducers of this kind make meanwhile."""
    log, plain = [], kind.__call__

    def spying(reducer, view):
        tokens = plain(reducer, view)
        log.append((reducer, view, tokens))
        return tokens

    with patch.object(kind, "__call__", spying):
        yield log


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("spec", ["trevs", "tops", "tops:norm=minmax", "occamtoken:first=1,second=1"])
def test_a_first_choice_is_its_plain_form(spec, share):
    """Picture by picture, whatever stands beside it."""
    vlm = tiny(side=84)
    kind, plain = FIRST[spec.partition(":")[0]]
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (2, IMAGE, 1, IMAGE, 6), (5,), (2, IMAGE)], seed=3)
    with viewed(kind) as log:
        vlm.generate(**batch(rows, pictures), retained_tokens=legal(vlm, spec, share), pruning=spec, max_new_tokens=1)
    ((reducer, view, tokens),) = log
    for i in range(4):
        count = tokens.source.shape[1] if tokens.count is None else int(tokens.count[i])
        assert tokens.source[i, :count].tolist() == plain(reducer, view, i)


PLAIN = {
    "trevs": plain_trevs,
    "tops": plain_tops_rule,
    "tops:norm=minmax": plain_tops_rule,
    "sparsevlm:version=1.0,scale=1.5,bias=2": plain_ranked,
    "mustdrop:threshold=0.04,individual=0.09": plain_mustdrop,
    "occamtoken:first=1,second=1.1": plain_occam,
    "dart": plain_dart,
    "sieve": plain_sieve,
    "sieve:cuts=two": plain_sieve,
    "twig-discount": plain_twig,
    "sparsevlm": plain_sparse,
    "sparsevlm:version=2.0": plain_sparse,
}
_piece = st.integers(1, 5)
LAYOUTS = st.one_of(
    st.tuples(_piece, st.just(IMAGE), _piece),
    st.tuples(st.just(IMAGE), _piece, st.just(IMAGE), _piece),
    st.tuples(_piece, st.just(IMAGE)),
    st.tuples(_piece),
)


def legal(vlm, spec: str, share: float) -> float:
    low, high = find_method(spec).legal(Shape(vlm.config.L, vlm.config.V, vlm.config.K, vlm.config.F))
    return float(low) + (float(high) - float(low)) * share


def check_merged(selection: Selection, b: int, row: Row, expected) -> None:
    """Behind the last visual token, at its centre's place, the mean of its members."""
    if selection.merged is None:
        assert not expected
        return
    there = selection.behind[b] >= 0
    assert selection.instead[b][there].tolist() == [centre for centre, _ in expected]
    assert selection.behind[b][there].tolist() == [len(row.visual) - 1] * len(expected)
    for found, (_, value) in zip(selection.merged[b][there], expected, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-6)


@settings(max_examples=12)
@given(
    layouts=st.lists(LAYOUTS, min_size=1, max_size=3),
    seed=st.integers(0, 999),
    share=st.sampled_from([0.02, 0.2, 0.5, 0.9]),
    K=st.sampled_from([1, 2]),
    kv_heads=st.sampled_from([1, 4]),
    query=st.sampled_from(["last", "text"]),
    side=st.sampled_from([42, 70, 112]),
)
@pytest.mark.parametrize("spec", PLAIN)
def test_a_rule_is_its_plain_form(spec, layouts, seed, share, K, kv_heads, query, side):
    """Row by row of ragged batches with several pictures, or none."""
    vlm = tiny(K=K, T=2, F=5, side=side, kv_heads=kv_heads, heads=4, layers=7)
    rows, pictures = prompts(vlm, layouts, seed)
    R = legal(vlm, spec, share)
    with spied(vlm) as log:
        vlm.generate(**batch(rows, pictures), retained_tokens=R, pruning=spec, query=query, max_new_tokens=1)
    for rule, seen, selection in log:
        if rule.probe is None:  # the wipe
            continue
        for b, layout in enumerate(layouts):
            if IMAGE in layout:
                row = Row(seen, b)
                expected = PLAIN[spec](rule, row)
                expected, merged = expected if isinstance(expected, tuple) else (expected, [])
                assert chosen(selection, seen, b) == expected
                check_merged(selection, b, row, merged)


@pytest.mark.parametrize("spec", [s for s in TABLE if "count" not in s and "faithful" not in s])
def test_measured_is_asked(spec):
    """On a sweep of R, what went through the layers, for one picture and several."""
    vlm = tiny(side=70)
    for share in (0.0, 0.13, 0.4, 0.77, 1.0):
        R = legal(vlm, spec, share)
        for layout in ([3, IMAGE, 4], [IMAGE, 2, IMAGE, 5]):
            out = vlm.generate(
                **batch(*prompts(vlm, [layout])), retained_tokens=R, pruning=spec, max_new_tokens=1, seed=1
            )
            assert out.stats.visual_measured == pytest.approx(R, abs=1)


@pytest.mark.parametrize("draft_length", [0, 3])
def test_mustdrops_released_positions(draft_length):
    """`faithful`: what is written stands behind what the cut caches hold; the first word, read in prefill, is the same."""
    vlm = tiny(side=84, layers=8)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (2, IMAGE, 1, IMAGE, 6)], seed=3)
    asked = {**batch(rows, pictures), "retained_tokens": 20, "max_new_tokens": 6, "eos_token_id": []}
    behind, plain = [], State.evict

    def evict(state):
        """By how much a cache is shorter than where its next token stands, in each group of layers."""
        plain(state)
        behind.append([(state.length - s.cache.shift - s.cache.used).tolist() for s in state.segments])

    with patch.object(State, "evict", evict):
        right, fault = (
            vlm.generate(**asked, pruning=f"mustdrop:threshold=0.06{word}", draft_length=draft_length)
            for word in ("", ",faithful")
        )
    assert [row[0] for row in right.tokens] == [row[0] for row in fault.tokens]
    assert right.tokens != fault.tokens, "the positions must matter"
    assert all(gap == [0, 0] for gap in behind[1]) and any(min(gap) > 0 for gap in behind[0])
    if draft_length:
        alone = vlm.generate(**asked, pruning="mustdrop:threshold=0.06,faithful", draft_length=0)
        assert alone.tokens == fault.tokens


def test_settings_that_cannot_be():
    vlm = tiny()
    with pytest.raises(InputError, match="sieve prunes after layer 9; 1 to 5 is possible with L = 6"):
        find_method("sieve:layer=9").plan(2, Shape(6, 4, 2, 4))
    with pytest.raises(InputError, match="cuts is 'three'; one, two can be"):
        find_method("sieve:cuts=three")
    with pytest.raises(InputError, match=r"pdrop cuts before 3 layers .* L = 3 layers"):
        find_method("pdrop").plan(2, Shape(3, 4, 2, 3))
    with pytest.raises(InputError, match=r"published settings of version 1.5 for R = 192, 128, 96, 64, and R is 100"):
        plan_for("sparsevlm:faithful", 100, 576, SEVEN_B)
    with pytest.raises(InputError, match=r"published settings of version 2.0 for R = 48, 32, 24, 16, and R is 100"):
        plan_for("sparsevlm:version=2.0,count=authors", 100, 144, SEVEN_B)
    assert vlm.config.L == 6 and set(METHODS) >= {s.split(":")[0] for s in TABLE}
