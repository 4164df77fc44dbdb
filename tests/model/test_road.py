"""The road against dense references: surgery on tokens, caches, probes and trees on tiny random models.

A reference reads the whole sequence at once, with the stock layers, and moves tokens about as Python
lists: nothing of model.stream, model.cache or decoding is in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import IMAGE, batch, one, prompts, tiny, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration, Qwen3Config
from transformers.generation import RepetitionPenaltyLogitsProcessor

from twigvlm.config import GenerationSettings, TwigConfig
from twigvlm.decoding import Decoder, embed, loop, score
from twigvlm.decoding.choose import Chooser
from twigvlm.decoding.draft import DraftTree, chain, walk
from twigvlm.decoding.loop import Draft
from twigvlm.decoding.pace import Costs, Pace, measure
from twigvlm.families import trunk_of
from twigvlm.loading.base import Loaded
from twigvlm.loading.device import set_attention
from twigvlm.model.cache import STEP, CacheGroup
from twigvlm.model.tap import Tap
from twigvlm.model.twig import grow
from twigvlm.pruning import Given, Keep, Plan, Probe, Reducer, Rule, Seen, Selection, Tokens, Wipe
from twigvlm.pruning.reducer import CLASS, best
from twigvlm.vlm import TwigVLM

NEW = 8
LAYOUTS = [(3, IMAGE, 4), (2, IMAGE, 3, IMAGE, 2), (IMAGE, 5)]


def answers(vlm, plan, rows, pictures, draft_length=4, twig=True, grow=None, **more):
    """Tokens of each row under a plan of one's own, and the decoder that wrote them."""
    options = GenerationSettings(draft_length=draft_length, draft_confidence=0.0, max_new_tokens=NEW)
    decoder = Decoder(vlm.trunk, vlm.twig if twig else None, plan, options, grow=grow, **more)
    pixels = torch.cat(list(pictures)) if any(len(p) for p in pictures) else None
    out = [[] for _ in rows]
    with torch.inference_mode():
        for round_ in decoder.steps(embed(vlm.trunk, plan, rows, pixels)):
            for b, step in round_:
                out[b] += step.tokens
    return out, decoder


# ---------------------------------------------------------------------- the reference


@dataclass
class Token:
    """A token of the reference: its state, its rotary position, its place in the prompt, its picture (None: text)."""

    hidden: torch.Tensor
    position: int
    place: int
    picture: int | None


def tokens_of(vlm, row, answer, pictures) -> list[Token]:
    trunk = vlm.trunk
    ids = torch.tensor(row + answer)
    image = [t == vlm.image_token_id for t in row] + [False] * len(answer)
    hidden = trunk.decoder.embed_tokens(ids.masked_fill(torch.tensor(image), 0))
    if len(pictures):
        hidden[torch.tensor(image)] = (
            vlm.model.get_image_features(pixel_values=pictures)
            .pooler_output[0]
            .new_tensor(
                torch.stack(list(vlm.model.get_image_features(pixel_values=pictures).pooler_output))
                .flatten(0, 1)
                .tolist()
            )
        )
    seen, out = 0, []
    for i, h in enumerate(hidden):
        out.append(Token(h, i, i, seen // vlm.config.V if image[i] else None))
        seen += image[i]
    return out


def through(vlm, layers, tokens: list[Token], hide: Callable[[int], torch.Tensor] | None = None) -> list[Token]:
    """Stock layers over all tokens; `hide(layer)` is the bool mask [S, S] of who sees whom (None: causal)."""
    hidden = torch.stack([t.hidden for t in tokens])[None]
    rotary = vlm.trunk.decoder.rotary_emb(hidden, torch.tensor([[t.position for t in tokens]]))
    for i, layer in enumerate(layers):
        mask = hide(i)[None, None] if hide else None
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=mask)
    return [Token(h, t.position, t.place, t.picture) for h, t in zip(hidden[0], tokens, strict=True)]


@torch.inference_mode()
def reference(vlm, row, answer, pictures, surgery: dict[int, Callable]) -> list[int]:
    """What the base writes at each place of the answer; `surgery` maps a layer to what is done to the tokens before it."""
    tokens = tokens_of(vlm, row, answer[:-1], pictures)
    edges = [0, *sorted(surgery), vlm.config.L]
    for first, last in itertools.pairwise(edges):
        if first in surgery:
            tokens = surgery[first](tokens)
        tokens = through(vlm, vlm.trunk.layers[first:last], tokens)
    top = torch.stack([t.hidden for t in tokens])
    return vlm.trunk.logits(top)[-len(answer) :].argmax(-1).tolist()


def compacted(tokens: list[Token]) -> list[Token]:
    return [Token(t.hidden, i, t.place, t.picture) for i, t in enumerate(tokens)]


def keeping(places: set[int], compact: bool = False) -> Callable:
    def cut(tokens: list[Token]) -> list[Token]:
        left = [t for t in tokens if t.picture is None or t.place in places]
        return compacted(left) if compact else left

    return cut


def given_mask(rows, kept: list[set[int]]) -> torch.Tensor:
    mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    for line, places in zip(mask, kept, strict=True):
        line[sorted(places)] = True
    return mask


def some_places(vlm, row, share: float, seed: int) -> set[int]:
    image = [i for i, t in enumerate(row) if t == vlm.image_token_id]
    draw = torch.rand(len(image), generator=torch.Generator().manual_seed(seed))
    return {i for i, d in zip(image, draw.tolist(), strict=True) if d < share}


# ---------------------------------------------------------------------- positions, counts, pictures


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("draft_length", [0, 4])
@pytest.mark.parametrize("cuts", [(1,), (2, 4), (0, 3, 5)], ids=str)
def test_cuts_with_positions_kept_and_compacted(positions, draft_length, cuts):
    """Several stages below, at and above the twig, of counts that differ from row to row and picture to picture."""
    vlm = tiny(side=56)
    rows, pictures = prompts(vlm, [*LAYOUTS, (6,)], seed=3)
    kept = {
        cut: [some_places(vlm, row, 0.7 - 0.2 * i, 9 * i + b) for b, row in enumerate(rows)]
        for i, cut in enumerate(cuts)
    }
    for earlier, later in itertools.pairwise(cuts):
        kept[later] = [a & b for a, b in zip(kept[earlier], kept[later], strict=True)]
    plan = Plan(tuple((cut, Given(given_mask(rows, kept[cut]))) for cut in cuts), positions=positions)
    found, _ = answers(vlm, plan, rows, pictures, draft_length)
    for b, (row, pixels) in enumerate(zip(rows, pictures, strict=True)):
        surgery = {cut: keeping(kept[cut][b], positions == "compact") for cut in cuts}
        assert found[b] == reference(vlm, row, found[b], pixels, surgery)
        alone = Plan(tuple((cut, Given(given_mask([row], [kept[cut][b]]))) for cut in cuts), positions=positions)
        assert answers(vlm, alone, [row], [pixels], draft_length)[0] == [found[b]]


def test_positions_matter_to_the_answer():
    """Else the test above would say little."""
    vlm, changed = tiny(side=56), 0
    for seed in range(6):
        rows, pictures = prompts(vlm, LAYOUTS, seed)
        kept = given_mask(rows, [some_places(vlm, row, 0.4, seed) for row in rows])
        both = [answers(vlm, Plan(((2, Given(kept)),), positions=p), rows, pictures)[0] for p in ("keep", "compact")]
        changed += both[0] != both[1]
    assert changed >= 3


@dataclass(frozen=True)
class Positive(Rule):
    """Keeps what has a positive first feature: a count that only the device knows."""

    exact: ClassVar[bool] = False

    def most(self, total: int) -> int:
        return total

    def __call__(self, seen: Seen) -> Selection:
        return Selection((seen.visual.hidden[..., 0] > 0) & seen.visual.real())


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("draft_length", [0, 4])
def test_a_stage_whose_count_differs_by_row(positions, draft_length):
    vlm = tiny(side=56)
    rows, pictures = prompts(vlm, LAYOUTS, seed=1)
    plan = Plan(((1, Positive()), (4, Positive())), positions=positions)
    found, decoder = answers(vlm, plan, rows, pictures, draft_length)

    def cut(tokens):
        left = [t for t in tokens if t.picture is None or t.hidden[0] > 0]
        return compacted(left) if positions == "compact" else left

    for row, pixels, answer in zip(rows, pictures, found, strict=True):
        assert answer == reference(vlm, row, answer, pixels, {1: cut, 4: cut})
    counts = [int(n) for n in decoder.state.entered[-1][1]]
    assert len(set(counts)) > 1, "rows must differ"


def test_two_pictures_keep_different_counts():
    vlm = tiny(side=56)
    (row,), (pixels,) = prompts(vlm, [(2, IMAGE, 3, IMAGE, 2)], seed=2)
    kept = {2, 3, 4, 5, 6, 7, 2 + 16 + 3 + 15}  # six of the first, one of the second
    found, decoder = answers(vlm, Plan(((2, Given(given_mask([row], [kept]))), (5, Wipe()))), [row], [pixels])
    assert found[0] == reference(vlm, row, found[0], pixels, {2: keeping(kept), 5: keeping(set())})
    assert sorted(int(k) for k in decoder.state.kept[0] if k >= 0) == [0, 1, 2, 3, 4, 5, 31]


def test_pictures_of_unequal_size_in_one_prompt(monkeypatch):
    """Sizes and features of another family's tower: four, one and three tokens."""
    vlm, sizes = tiny(), [4, 1, 3]
    features = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in sizes]
    monkeypatch.setattr(vlm.trunk.family, "sizes", lambda pixels: sizes)
    monkeypatch.setattr(vlm.trunk.family, "see", lambda pixels: features)
    mark = vlm.image_token_id
    row = [5, *[mark] * 5, 6, 7, *[mark] * 3, 8, 9]
    stream = vlm.trunk.embed(torch.tensor([row]), [len(row)], torch.zeros(3, 3, 28, 28))
    assert stream.visual[0].tolist() == [-1, 0, 0, 0, 0, 1, -1, -1, 2, 2, 2, -1, -1]
    hidden = vlm.trunk.decoder.embed_tokens(torch.tensor([row]).masked_fill(torch.tensor([row]) == mark, 0))
    hidden[0, [i for i, t in enumerate(row) if t == mark]] = torch.cat(features)
    assert torch.equal(stream.hidden, hidden)
    with torch.inference_mode():
        expected = vlm.model.generate(inputs_embeds=hidden, attention_mask=torch.ones(1, len(row)), max_new_tokens=NEW,
                                      do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
    found, _ = answers(vlm, Plan(), [row], [torch.zeros(3, 3, 28, 28)])
    assert found == expected.tolist()


# ---------------------------------------------------------------------- merging, reducing, evicting


@dataclass(frozen=True)
class Merging(Rule):
    """Keeps every third token and puts the mean of each half of the others behind the first of that half."""

    def most(self, total: int) -> int:
        return -(-total // 3) + 2

    def __call__(self, seen: Seen) -> Selection:
        real = seen.visual.real()
        nth = real.long().cumsum(1) - 1
        keep = real & (nth % 3 == 0)
        gone = real & ~keep
        order = gone.long().cumsum(1) - 1
        half = (gone.sum(1, keepdim=True) + 1) // 2
        merged, behind = [], []
        for part in (gone & (order < half), gone & (order >= half)):
            weight = part.float()[..., None]
            merged.append((seen.visual.hidden * weight).sum(1) / weight.sum(1).clamp(min=1))
            behind.append(torch.where(part.any(1), part.long().argmax(1), -1))
        return Selection(keep, torch.stack(merged, 1), torch.stack(behind, 1))


def merging(compact: bool) -> Callable:
    def cut(tokens: list[Token]) -> list[Token]:
        image = [t for t in tokens if t.picture is not None]
        gone = [t for i, t in enumerate(image) if i % 3]
        half = (len(gone) + 1) // 2
        keep = {id(t) for i, t in enumerate(image) if i % 3 == 0}
        new = {}
        for part in (gone[:half], gone[half:]):
            if part:
                mean = torch.stack([t.hidden for t in part]).mean(0)
                new[id(part[0])] = Token(mean, part[0].position, part[0].place, part[0].picture)
        out = []
        for t in tokens:
            if t.picture is None or id(t) in keep:
                out.append(t)
            if id(t) in new:
                out.append(new[id(t)])
        return compacted(out) if compact else out

    return cut


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("draft_length", [0, 4])
def test_merged_tokens_stand_behind_their_centre(positions, draft_length):
    """Twice, so that merged tokens are themselves pruned and merged."""
    vlm = tiny(side=56)
    rows, pictures = prompts(vlm, [*LAYOUTS, (4,)], seed=4)
    plan = Plan(((1, Merging()), (3, Merging())), positions=positions)
    found, _ = answers(vlm, plan, rows, pictures, draft_length)
    for row, pixels, answer in zip(rows, pictures, found, strict=True):
        surgery = merging(positions == "compact")
        assert answer == reference(vlm, row, answer, pixels, {1: surgery, 3: surgery})


@dataclass(frozen=True)
class Best(Reducer):
    """The five tokens that the class token looks at most, and the mean of the others behind the last of them."""

    class_token: ClassVar[bool] = True

    def most(self, V: int) -> int:
        return 6

    def listens(self, layer: int, read: int) -> str | None:
        return CLASS if layer == read else None

    def __call__(self, view):
        scores = view.attention().mean(1)
        chosen = best(scores, 5)
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
        rest = (view.projected * ~keep[..., None]).sum(1, keepdim=True) / (~keep).sum(1)[:, None, None]
        seat = torch.full_like(chosen[:, :1], -1)
        return Tokens(torch.cat([view.select(chosen).features, rest], 1), torch.cat([chosen, seat], 1))


@pytest.mark.parametrize("twig", [True, False])
@pytest.mark.parametrize("more", [(), ((2, Positive()),)], ids=["alone", "with-a-stage"])
def test_a_reducer_in_the_vision_tower(twig, more):
    """The stock model reads the shortened prompt as embeddings."""
    vlm = tiny(side=56)
    rows, pictures = prompts(vlm, [*LAYOUTS, (4,)], seed=6)
    found, decoder = answers(vlm, Plan(more, tower=Best()), rows, pictures, twig=twig)
    eager = tiny_model(side=56, attention="eager").model.vision_tower
    for b, (row, pixels) in enumerate(zip(rows, pictures, strict=True)):
        hidden, picks = [], []
        with torch.inference_mode():
            whole = torch.stack([t.hidden for t in tokens_of(vlm, row, [], pixels)])
            cls = eager(pixels, output_attentions=True).attentions[-2].mean(1)[:, 0, 1:] if len(pixels) else []
        start = 0
        image = [i for i, t in enumerate(row) if t == vlm.image_token_id]
        for n, weights in enumerate(cls):
            best = weights.topk(5).indices.sort().values.tolist()
            places = image[16 * n : 16 * n + 16]
            hidden += list(whole[start : places[0]]) + [whole[places[i]] for i in best]
            hidden.append(torch.stack([whole[places[i]] for i in range(16) if i not in best]).mean(0))
            start = places[-1] + 1
            picks += [16 * n + i for i in best]
        hidden += list(whole[start:])
        if not more:
            with torch.inference_mode():
                expected = vlm.model.generate(inputs_embeds=torch.stack(hidden)[None], attention_mask=torch.ones(1, len(hidden)),
                                              max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
            assert found[b] == expected[0].tolist()
            assert [int(k) for k in decoder.state.kept[b] if k >= 0] == picks
        alone, _ = answers(vlm, Plan(more, tower=Best()), [row], [pixels], draft_length=0, twig=False)
        assert alone == [found[b]]


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("draft_length", [0, 4])
def test_cached_visual_tokens_are_evicted_after_prefill(positions, draft_length):
    """The prompt reads everything; the answer sees, from layer 1 on, only what the last layers kept."""
    vlm = tiny(side=56, K=1)
    rows, pictures = prompts(vlm, LAYOUTS, seed=8)
    first = [some_places(vlm, row, 0.7, b) for b, row in enumerate(rows)]
    last = [p & some_places(vlm, row, 0.6, 50 + b) for b, (row, p) in enumerate(zip(rows, first, strict=True))]
    stages = ((2, Given(given_mask(rows, first))), (4, Given(given_mask(rows, last))))
    found, decoder = answers(vlm, Plan(stages, positions=positions, evict=1), rows, pictures, draft_length)
    for b, (row, pixels) in enumerate(zip(rows, pictures, strict=True)):
        assert found[b] == evicting(vlm, row, found[b], pixels, first[b], last[b], positions == "compact")
    plain, whole = answers(vlm, Plan(stages, positions=positions), rows, pictures, draft_length)
    assert decoder.state.bytes_used < whole.state.bytes_used
    assert plain != found, "eviction must matter"


@torch.inference_mode()
def evicting(vlm, row, answer, pixels, first, last, compact) -> list[int]:
    tokens = tokens_of(vlm, row, answer[:-1], pixels)
    cuts = {2: keeping(first, compact), 4: keeping(last, compact)}
    for begin, end in ((0, 1), (1, 2), (2, 4), (4, 6)):
        tokens = cuts[begin](tokens) if begin in cuts else tokens
        place = torch.tensor([t.place for t in tokens])
        gone = torch.tensor([t.picture is not None and t.place not in last for t in tokens])
        seen = torch.ones(len(tokens), len(tokens)).tril().bool()
        if begin >= 1:
            seen = seen & ~(gone & (place[:, None] >= len(row)))
        tokens = through(vlm, vlm.trunk.layers[begin:end], tokens, lambda _, seen=seen: seen)
    top = torch.stack([t.hidden for t in tokens])
    return vlm.trunk.logits(top)[-len(answer) :].argmax(-1).tolist()


def test_likelihoods_under_every_kind_of_plan():
    """`score` gives what the loop chose from, one token at a time."""
    vlm = tiny(side=56)
    rows, pictures = prompts(vlm, [*LAYOUTS, (5,)], seed=5)
    kept = Given(given_mask(rows, [some_places(vlm, row, 0.5, b) for b, row in enumerate(rows)]))
    plans = [
        Plan(),
        Plan(((2, kept),), positions="compact"),
        Plan(((2, kept),), evict=1),
        Plan(((1, Merging()),)),
        Plan(tower=Best()),
    ]
    for plan in plans:
        seen = [[] for _ in rows]

        class Watch(Chooser):
            def judge(self, logits, tree, voices, seen=seen):
                for voice, row in zip(voices, logits[:, 0].log_softmax(-1), strict=True):
                    seen[rows.index(voice.history[: len(rows[voice_index(rows, voice)])])].append(row)
                return super().judge(logits, tree, voices)

        found, _ = answers(vlm, plan, rows, pictures, 0, chooser=Watch(GenerationSettings()))
        targets = [answer[: 3 + b] for b, answer in enumerate(found)]
        with torch.inference_mode():
            likely = score(vlm.trunk, vlm.twig, plan, embed(vlm.trunk, plan, rows, torch.cat(pictures)), targets)
        for b, target in enumerate(targets):
            expected = torch.stack([seen[b][i][t] for i, t in enumerate(target)])
            torch.testing.assert_close(likely[b].log_probabilities, expected, atol=1e-4, rtol=0)
            assert likely[b].greedy.all()


def voice_index(rows, voice) -> int:
    return next(b for b, row in enumerate(rows) if voice.history[: len(row)] == row)


# ---------------------------------------------------------------------- probes


def qwen3(attention: str) -> LlavaForConditionalGeneration:
    """A tower in front of a decoder that norms query and key."""
    donor = tiny_model(side=56)
    config = type(donor.config).from_dict(donor.config.to_dict())
    config.text_config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
                                     num_key_value_heads=2, head_dim=16, max_position_embeddings=256)  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).float().eval().requires_grad_(False)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_norm.weight.uniform_(0.5, 2)
        layer.self_attn.k_norm.weight.uniform_(0.5, 2)
        layer.self_attn.q_proj.weight.normal_(0, 0.3)
        layer.self_attn.k_proj.weight.normal_(0, 0.3)
    set_attention(model, attention)
    return model


@pytest.mark.parametrize("heads", ["multi-head", "grouped", "q/k-normed"])
@pytest.mark.parametrize("peek", [False, True], ids=["ran", "peek"])
def test_a_probe_equals_rows_of_eager_attention(heads, peek):
    make = {
        "multi-head": lambda a: tiny_model(side=56, attention=a),
        "grouped": lambda a: tiny_model(side=56, heads=4, kv_heads=2, attention=a),
        "q/k-normed": qwen3,
    }[heads]
    trunk, eager = trunk_of(make("sdpa")), trunk_of(make("eager"))
    stream = trunk.embed(torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1)), [12, 9], None)
    rows = torch.tensor([[11, 4, -1], [8, 0, 3]])
    layer = trunk.layers[2]
    with torch.inference_mode():
        below = trunk.run(trunk.layers[:2], stream)
        tap = trunk.peek(layer, below, rows) if peek else Tap(layer.self_attn, rows)
        if not peek:
            tapped = trunk.run([layer], below, taps=[tap])
            assert torch.equal(tapped.hidden, trunk.run([layer], below).hidden), "listening changes nothing"
        mask = torch.full((12, 12), torch.finfo(torch.float32).min).triu(1)[None, None]
        rotary = eager.decoder.rotary_emb(below.hidden, torch.arange(12)[None])
        normed = eager.layers[2].input_layernorm(below.hidden)
        _, weights = eager.layers[2].self_attn(normed, position_embeddings=rotary, attention_mask=mask)
    found = tap.weights()
    for b, asked in enumerate(rows.tolist()):
        for q, at in enumerate(asked):
            if at >= 0:
                torch.testing.assert_close(found[b, :, q], weights[b, :, at], atol=1e-6, rtol=0)
                assert torch.allclose(tap.normed[b, q], normed[b, at], atol=1e-6)
    assert tap.query.shape[2] == 3 and tap.keys.shape[2] == 12


def test_probes_of_several_layers_and_rows_in_one_plan():
    """FastV's row below the twig and another above it, with drafts in the same pass."""
    vlm = tiny(side=56)
    rows, pictures = prompts(vlm, LAYOUTS, seed=7)
    stages = (
        (2, Keep(9, 16, Probe("layer", "last", 1))),
        (4, Keep(5, 16, Probe("layer", "text", 3))),
        (5, Keep(2, 16, Probe("peek", "last", 5))),
    )
    plain, _ = answers(vlm, Plan(stages), rows, pictures, 0)
    fast, decoder = answers(vlm, Plan(stages), rows, pictures, 4)
    assert plain == fast
    assert [[int(n) for n in counts] for _, counts in decoder.state.entered] == [
        [16, 32, 16],
        [9, 18, 9],
        [5, 10, 5],
        [2, 4, 2],
    ]


@pytest.mark.parametrize("method", ["fastv", "pdrop"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_methods_with_a_budget_of_their_own_against_eager_scores(method, layout):
    vlm, eager = tiny(side=56), tiny(side=56, attention="eager")
    (row,), (pixels,) = prompts(vlm, [layout], seed=9)
    out = vlm.generate(**batch([row], [pixels]), retained_tokens=9, pruning=method, max_new_tokens=NEW, eos_token_id=[])
    answer, images = out.tokens[0], len(pixels)
    end = len(row) - 1

    def best(tokens, layer, count, before):
        """The places that the last prompt token looks at most in `layer`, over tokens about to enter it."""
        hidden = torch.stack([t.hidden for t in tokens])[None]
        rotary = eager.trunk.decoder.rotary_emb(hidden, torch.tensor([[t.position for t in tokens]]))
        mask = torch.full((len(tokens),) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
        module = eager.trunk.layers[layer]
        _, weights = module.self_attn(module.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask)
        asked = next(i for i, t in enumerate(tokens) if t.place == end)
        scores = weights[0].mean(0)[asked]
        image = [i for i, t in enumerate(tokens) if t.picture is not None]
        ranked = sorted(image, key=lambda i: -float(scores[i]))[: count * images]
        return {tokens[i].place for i in ranked}

    if method == "fastv":
        n = round((6 * 9 - 2 * 16) / 4)
        with torch.inference_mode():
            below = through(vlm, vlm.trunk.layers[:1], tokens_of(vlm, row, [], pixels))
            kept = best(below, 1, n, 2)
        surgery = {2: keeping(kept)}
    else:
        counts = {before: rule.most(16) for before, rule in vlm._plan("pdrop", 9, "last").stages}
        surgery = {
            cut: (lambda tokens, cut=cut: keeping(best(tokens, cut, counts[cut], cut), True)(tokens)) for cut in counts
        }
    assert answer == reference(vlm, row, answer, pixels, surgery)


# ---------------------------------------------------------------------- trees


def full_tree(guide: list[int], never: int | None, width: int, levels: int, seed: int) -> DraftTree:
    """Every node has `width` children; a path at random places says the guide's words, and `never` does not follow it."""
    generator = torch.Generator().manual_seed(seed)
    token, parent, level, right = [], [], [-1], -1
    for depth in range(levels):
        nodes, next_right = [], None
        for up in level:
            words = torch.randperm(60, generator=generator)[:width].tolist()
            if up == right and depth < len(guide):
                words = [w if w != guide[depth] else 61 for w in words]
                words[int(torch.randint(width, (1,), generator=generator))] = guide[depth]
            elif up == right:
                words = [w if w != never else 62 for w in words]
            for word in words:
                if up == right and depth < len(guide) and word == guide[depth]:
                    next_right = len(token)
                token.append(word)
                parent.append(up)
                nodes.append(len(token) - 1)
        level, right = nodes, next_right if next_right is not None else -2
    n = len(token)
    return DraftTree(torch.tensor([token]), torch.tensor([parent]), torch.ones(1, n), torch.tensor([n]), levels)


def growing(guides: list[list[int]], hits: list[int], width: int = 3, levels: int = 3):
    """Drafts of full trees that follow each row's own answer for `hits` levels and then something else."""

    def grow_tree(decoder: Decoder) -> Draft:
        decoder.state.catch_up()
        trees = []
        for b, row in enumerate(decoder.rows):
            done = len(row.tokens)
            right = hits[(done + row.index) % len(hits)]
            ahead = guides[row.index][done : done + levels + 1]
            never = ahead[right] if right < len(ahead) else None
            trees.append(full_tree(ahead[:right], never, width, levels, seed=7 * done + b))
        tree = DraftTree(
            *(torch.cat([getattr(t, name) for t in trees]) for name in ("token", "parent", "score", "count")), levels
        )
        place = decoder.place[:, None] + tree.depth()
        nodes = decoder.state.climb(decoder.trunk.tokens(tree.token, place, full=True), decoder.state.low, tree)
        decoder.state.run_twig(nodes, tree)
        scratch = torch.arange(tree.width).expand_as(tree.token)
        return Draft(tree, nodes, scratch, scratch)

    return grow_tree


@pytest.mark.parametrize("positions", [None, "keep", "compact"])
@pytest.mark.parametrize("hits", [[0], [3], [1, 2, 0, 3]], ids=["never", "always", "mixed"])
def test_a_tree_is_verified_in_one_pass(positions, hits):
    """Width 3, depth 3: 39 nodes, the accepted path committed; caches equal to plain decoding's in every group."""
    vlm = tiny(side=56, context=512)
    rows, pictures = prompts(vlm, [*LAYOUTS, (5,)], seed=11)
    plan = Plan(((2, Merging()), (4, Positive())), positions=positions) if positions else Plan()
    plain, _ = answers(vlm, plan, rows, pictures, 0)
    for b in range(len(rows)):
        alone = Watched(vlm, plan, rows[b], pictures[b], 4, growing([plain[b]], hits))
        assert alone.tokens == plain[b]
        slow = Watched(vlm, plan, rows[b], pictures[b], 1, growing([[]], [0], 1, 1))
        assert slow.tokens == plain[b]
        taken = [s.accepted for s in alone.steps]
        assert max(taken) <= 3 and (max(taken) > 0) == (max(hits) > 0)
        for group, (keys, values) in enumerate(alone.caches):
            n = min(keys.shape[2], slow.caches[group][0].shape[2])
            assert n > 0
            torch.testing.assert_close(keys[:, :, :n], slow.caches[group][0][:, :, :n], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(values[:, :, :n], slow.caches[group][1][:, :, :n], atol=2e-5, rtol=1e-4)
    together, _ = answers(vlm, plan, rows, pictures, 4, grow=growing(plain, hits))
    assert together == plain


class Watched:
    """One answer, its steps, and the committed part of every cache after the last round."""

    def __init__(self, vlm, plan, row, pixels, draft_length, grow_tree):
        options = GenerationSettings(draft_length=draft_length, max_new_tokens=NEW)
        decoder = Decoder(vlm.trunk, vlm.twig, plan, options, grow=grow_tree)
        self.tokens, self.steps = [], []
        with torch.inference_mode():
            for ((_, step),) in decoder.steps(embed(vlm.trunk, plan, [row], pixels if len(pixels) else None)):
                self.tokens += step.tokens
                self.steps.append(step)
                self.caches = [(c.keys[:, 0, :, : c.used[0]].clone(), c.values[:, 0, :, : c.used[0]].clone())
                               for c in decoder.state.caches]  # fmt: skip


@settings(max_examples=40)
@given(st.data())
def test_walking_a_tree_equals_walking_it_by_hand(data):
    n = data.draw(st.integers(1, 12))
    parent = [data.draw(st.integers(-1, i - 1)) for i in range(n)]
    depths = []
    for p in parent:
        depths.append(1 if p < 0 else depths[p] + 1)
    token = [data.draw(st.integers(0, 3)) for _ in range(n)]
    choice = [data.draw(st.integers(0, 3)) for _ in range(n + 1)]
    tree = DraftTree(torch.tensor([token]), torch.tensor([parent]), torch.ones(1, n), torch.tensor([n]), max(depths))
    here, expected = -1, []
    while True:
        fits = [i for i in range(n) if parent[i] == here and token[i] == choice[here + 1]]
        if not fits:
            break
        here = fits[0]
        expected.append(here)
    found = [i for i in walk(tree, torch.tensor([choice]))[0].tolist() if i >= 0]
    assert found == expected
    assert tree.depth()[0].tolist() == depths
    for i in range(n):
        line, up = {i + 1, 0}, parent[i]
        while up >= 0:
            line.add(up + 1)
            up = parent[up]
        assert set(tree.ancestors()[0, i + 1].nonzero()[:, 0].tolist()) == line


def test_a_chain_is_a_tree_of_width_one():
    tokens = torch.tensor([[4, 5, 6], [4, 4, 4]])
    line = chain(tokens, torch.ones(2, 3), torch.tensor([3, 2]))
    tree = DraftTree(line.token, line.parent, line.score, line.count, 3)
    for choice in ([[4, 5, 6, 1]] * 2, [[4, 5, 1, 1], [4, 4, 4, 4]], [[1, 5, 6, 1]] * 2):
        assert torch.equal(walk(line, torch.tensor(choice)), walk(tree, torch.tensor(choice)))


# ---------------------------------------------------------------------- caches


@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 5), min_size=3, max_size=3)), min_size=1, max_size=30)
)
@settings(max_examples=40)
def test_a_cache_keeps_what_is_committed_and_nothing_else(calls):
    """Rows commit at their own pace; a written number comes back at its own place, whatever was dropped between."""
    cache, expected, number = CacheGroup([4, 5], 3), [[], [], []], 0
    for width, keep in calls:
        cache.begin(width)
        fresh = torch.arange(number, number + 3 * width, dtype=torch.float32).view(3, 1, width, 1)
        number += 3 * width
        for layer in (4, 5):
            keys, values = cache.update(fresh, -fresh, layer)
        assert torch.equal(keys, -values)
        for b in range(3):
            expected[b] += fresh[b, 0, : min(keep[b], width), 0].tolist()
        cache.commit(torch.tensor([min(k, width) for k in keep]))
        for b, row in enumerate(expected):
            assert cache.keys[1, b, 0, : len(row), 0].tolist() == row
        assert cache.known == [len(row) for row in expected] and cache.reach == max(map(len, expected))
        assert cache.keys.shape[3] <= -(-(cache.reach + 5) // STEP) * STEP
    order = [2, 1]
    assert int(cache.used_bytes()) == sum(map(len, expected)) * 2 * 2 * 4
    cache.leave(order, torch.tensor(order))
    assert [cache.keys[0, i, 0, : len(expected[o]), 0].tolist() for i, o in enumerate(order)] == [
        expected[o] for o in order
    ]
    assert int(cache.used_bytes()) == sum(len(expected[o]) for o in order) * 2 * 2 * 4


@given(
    st.integers(STEP - 12, STEP - 7),  # what is committed: seven more just fit
    st.lists(st.lists(st.integers(0, 5), unique=True, max_size=6), min_size=2, max_size=2),
    st.integers(6, 20),
)
@settings(max_examples=40)
def test_a_path_moves_up_wherever_a_buffer_ends(before, paths, levels):
    """A tree may be said to be deeper than it has nodes, and its scratch tokens may be the last that there is room for."""
    cache, paths = CacheGroup([0], 2), [sorted(path) for path in paths]
    told = torch.arange(2.0 * before).view(2, 1, before, 1)
    cache.begin(before)
    cache.update(told, told, 0)
    cache.commit(before)
    cache.begin(7)  # the newest token and six nodes
    fresh = 1000 + torch.arange(14.0).view(2, 1, 7, 1)
    cache.update(fresh, fresh, 0)
    path = torch.full((2, levels), -1)
    for row, nodes in zip(path, paths, strict=True):
        row[: len(nodes)] = torch.tensor(nodes) + 1
    cache.commit(torch.tensor([len(p) + 1 for p in paths]), path=path, first=torch.ones(2, dtype=torch.long))
    for b, nodes in enumerate(paths):
        wanted = [*told[b, 0, :, 0].tolist(), *fresh[b, 0, [0, *(n + 1 for n in nodes)], 0].tolist()]
        assert cache.keys[0, b, 0, : len(wanted), 0].tolist() == wanted


def test_a_cache_of_one_prefix_for_many_continuations():
    prefix, cache = CacheGroup([0], 2), CacheGroup([0], 6)
    prefix.begin(3)
    prefix.update(torch.arange(6.0).view(2, 1, 3, 1), torch.zeros(2, 1, 3, 1), 0)
    prefix.commit(torch.tensor([3, 2]))
    cache.begin_behind(prefix, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert cache.used.tolist() == [3, 3, 3, 2, 2, 2] and cache.known == [3, 3, 3, 2, 2, 2]
    cache.begin(1)
    keys, _ = cache.update(torch.full((6, 1, 1, 1), 9.0), torch.zeros(6, 1, 1, 1), 0)
    assert keys[4, 0, :3, 0].tolist() == [3, 4, 9] and keys[1, 0, :, 0].tolist() == [0, 1, 2, 9]
    assert prefix.used.tolist() == [3, 2] and not (prefix.keys == 9).any()  # it may be gone on from again
    most = cache.allocated_bytes()
    cache.forget()
    assert cache.allocated_bytes() == cache.tally.now == 0 and cache.tally.most == most > 0


def test_the_cache_follows_the_answer_and_not_the_limit():
    vlm = tiny(side=56, context=2048)
    arguments = one(vlm, 3, IMAGE, 4)
    end = vlm.generate(**arguments, max_new_tokens=6, eos_token_id=[]).tokens[0][5]
    short, long = (vlm.generate(**arguments, max_new_tokens=n, eos_token_id=end) for n in (8, 1500))
    assert short.tokens == long.tokens
    assert short.stats.cache_bytes == long.stats.cache_bytes
    assert short.stats.cache_bytes_used == long.stats.cache_bytes_used <= short.stats.cache_bytes
    far = vlm.generate(**arguments, max_new_tokens=300, eos_token_id=[], draft_length=0)
    whole = (23 + 299) * 6 * 2 * 32 * 4  # tokens, layers, key and value, width, bytes
    assert far.stats.cache_bytes_used == whole <= far.stats.cache_bytes <= whole * 1.25


TOKEN = 6 * 2 * 32 * 4  # bytes of one token: layers, key and value, width, fp32


def test_bytes_are_the_most_there_were_at_once():
    """Three rows leave before the last one's buffer has to grow: what is held in the end is less than what was."""
    vlm = tiny(side=56, context=2048)
    given = batch(*prompts(vlm, [(3, IMAGE, 4)] * 4))
    stats = vlm.generate(**given, max_new_tokens=[60, 60, 60, 200], eos_token_id=[], draft_length=0).stats
    assert stats.cache_bytes_used == 4 * (23 + 59) * TOKEN  # the last row alone never has so many
    assert stats.cache_bytes == 4 * 2 * STEP * TOKEN


MANNERS = [{"draft_length": 0}, {"draft_length": 4, "draft_confidence": 0.0}, {}, {"tree": "3,2,3,6"}]
PRUNINGS = [
    {},
    {"retained_tokens": 8},
    {"retained_tokens": 8, "pruning": "pdrop"},
    {"retained_tokens": 6, "pruning": "visionzip"},
    {"pruning": "mustdrop:threshold=0.05"},
]


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
    st.sampled_from(MANNERS),
    st.sampled_from(PRUNINGS),
    st.booleans(),
)
@settings(max_examples=25)
def test_no_more_is_used_than_is_allocated(limits, manner, pruning, ends):
    """Whatever ends when; and neither is less than a witness of every round adds up."""
    vlm, seen = tiny(side=56, fade=0.3), []

    class Witness(Decoder):
        def _write(self, *told):
            seen.append(
                [
                    sum(int(of(c)) for c in self.state.caches)
                    for of in (CacheGroup.allocated_bytes, CacheGroup.used_bytes)
                ]
            )
            return super()._write(*told)

    given = batch(*prompts(vlm, [LAYOUTS[b % len(LAYOUTS)] for b in range(len(limits))], seed=len(limits)))
    end = list(range(40, 44)) if ends else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twigvlm.vlm.Decoder", Witness)
        stats = vlm.generate(**given, **manner, **pruning, max_new_tokens=limits, eos_token_id=end).stats
    held, used = (max(column) for column in zip(*seen, strict=True))
    assert 0 < used <= stats.cache_bytes_used <= stats.cache_bytes >= held


def test_rows_that_end_are_not_copied():
    """The last row moves into the hole; the others stay where they are in memory."""
    cache = CacheGroup([0], 4)
    cache.begin(2)
    cache.update(torch.arange(8.0).view(4, 1, 2, 1), torch.zeros(4, 1, 2, 1), 0)
    cache.commit(2)
    before = cache.keys.data_ptr()
    cache.leave([0, 3, 2], torch.tensor([0, 3, 2]))
    assert cache.keys.data_ptr() == before and cache.rows == 3
    assert cache.keys[0, :3, 0, :2, 0].tolist() == [[0, 1], [6, 7], [4, 5]]


# ---------------------------------------------------------------------- without a look at the device


def never(ids: torch.Tensor, _scores, row: int) -> bool:
    """A stopping criterion of ours, which looks at the words."""
    return row < 0 or ids[0, -1].item() < 0


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("processors", [[], [RepetitionPenaltyLogitsProcessor(1.2)]], ids=["plain", "processed"])
@pytest.mark.parametrize("draft_length", [0, 3])
def test_a_round_reads_the_device_once(draft_length, processors, sampling, monkeypatch):
    """On the meta device there is nothing to read: only `fetch` may try, and only once a round and once a draft."""
    model = tiny_model(side=56)
    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(model.config)
    set_attention(empty.eval(), "sdpa")
    trunk = trunk_of(empty)
    vlm = TwigVLM(Loaded(empty, None, "meta", False), grow(trunk, TwigConfig(6, 2, 2, 4)))
    reads = []

    def fake(tensor):
        """A table of ones: one draft accepted, behind it token 1; the accepted node is the first."""
        assert tensor.device.type == "meta"
        reads.append(tuple(tensor.shape))
        out = np.ones(tensor.shape, dtype=bool if tensor.dtype is torch.bool else np.int32)
        if tensor.dim() == 2:
            head = 4 + (len(decoder.state.caches) if len(decoder.rows[0].tokens) == 0 else 0)
            drafted = (tensor.shape[1] - head) // 3
            out[:, head : head + drafted] = 0
            out[:, [0, 2]] = drafted > 0
            out[:, head - 1] = drafted > 0
        return out

    monkeypatch.setattr(loop, "fetch", fake)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (2, IMAGE, IMAGE, 5), (4,)])
    plan = Plan(
        (
            (2, Keep(5, 16, Probe("twig", "text"))),
            (3, Merging()),
            (4, Keep(2, 16, Probe("peek", "last", 4))),
            (5, Wipe()),
        ),
        positions="compact",
    )
    options = GenerationSettings(draft_length=draft_length, draft_confidence=0.5, max_new_tokens=7, **sampling)
    decoder = Decoder(trunk, vlm.twig, plan, options, chooser=Chooser(options, processors), stopping=[never])
    with torch.inference_mode():
        rounds = list(decoder.steps(embed(trunk, plan, rows, torch.cat(pictures))))
    assert [len(row.tokens) for row in decoder.rows] == []
    assert len(rounds) == (4 if draft_length else 7)  # 2, 2, 2 and 1 tokens
    drafting = [1, 1, 2, 1, 1, 2, 1, 2, 2]  # of 3, 3, 2 and no drafts
    assert [len(shape) for shape in reads] == (drafting if draft_length else [2] * 7)


# ---------------------------------------------------------------------- the length of a draft


def costs(draft: float, rows: list[float]) -> Costs:
    return Costs(draft, tuple(rows))


FLAT = [1.0] * 9  # a verification costs the same for all lengths
STEEP = [1.0 + i for i in range(9)]  # or as much as its tokens would one by one


def test_drafts_are_as_long_as_they_pay():
    """Long where rows are free and drafts right, short where they are wrong, none where rows cost as much as steps."""
    free = costs(0.1, FLAT)
    assert Pace(free, 95, 100).length() == 8
    assert 1 <= Pace(free, 30, 100).length() <= 2
    assert Pace(costs(0.1, STEEP), 99, 100).length() == 0
    assert Pace(costs(2.0, FLAT), 80, 100).length() == 0, "a draft step that costs two steps pays never"
    for accepted in range(0, 101, 5):
        pace = Pace(costs(0.2, [1, 1.3, 1.5, 1.7, 1.9, 2.1, 2.3, 2.5, 2.7]), accepted, 100)
        chosen = pace.length()
        best = max(range(9), key=lambda n, a=pace.acceptance, c=pace.costs: c.rate(n, a))
        assert chosen == (
            best if pace.costs.rate(best, pace.acceptance) >= 1.02 * pace.costs.rate(0, pace.acceptance) else 0
        )


def test_a_pace_learns_and_tries_again():
    pace = Pace(costs(0.2, [1, 1.3, 1.6, 1.9, 2.2, 2.5, 2.8, 3.1, 3.4]))
    before = pace.length()
    for _ in range(40):
        pace.learn(5, 0)
    assert pace.acceptance < 0.1 and before > 0
    lengths = [pace.length() for _ in range(200)]
    assert 1 <= sum(lengths) <= 4 and max(lengths) == 1, "one token once in a while"
    for _ in range(100):
        pace.learn(5, 5)
    assert pace.acceptance > 0.9 and pace.length() >= before


@pytest.mark.parametrize("draft, rows", [(0.05, FLAT), (1.0, STEEP)], ids=["pays", "does-not"])
@pytest.mark.parametrize("pruned", [{}, {"retained_tokens": 8}, {"retained_tokens": 8, "pruning": "pdrop"}], ids=str)
def test_an_answer_does_not_depend_on_the_pace(draft, rows, pruned, monkeypatch):
    vlm = tiny(side=56)
    monkeypatch.setattr("twigvlm.decoding.drafting.measure", lambda *_: costs(draft, rows))
    monkeypatch.setattr(vlm._drafting, "paces", {})
    given = batch(*prompts(vlm, [*LAYOUTS, (4,)], seed=2))
    options = {**given, **pruned, "max_new_tokens": 20, "eos_token_id": []}
    plain = vlm.generate(**options, draft_length=0)
    auto = vlm.generate(**options, draft_length="auto")
    assert auto.tokens == plain.tokens
    assert (auto.stats.drafted > 0) == (draft < 1)
    assert list(vlm._drafting.paces) == [(4, Pace)]


def test_the_parts_of_a_round_are_measured():
    vlm = tiny()
    found = measure(vlm.trunk, vlm.twig, 2, repeats=1)
    assert found.draft > 0 and len(found.verify) == 9 and min(found.verify) > 0
