"""The lossless square: every road to an answer gives the answer of the unmodified base.

plain = stock generate; speculative = plain under every pruning; R = all = unpruned; prefill and
steps = one forward; dropped tokens = hidden tokens; a row in a batch = the row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from conftest import (
    EOS,
    IMAGE,
    batch,
    drafts,
    legal_range_of,
    often,
    one,
    prompts,
    speaking,
    spec_of,
    stock,
    tiny,
    tiny_tokenizer,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    MaxTimeCriteria,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
)

from twigvlm.config import GenerationSettings
from twigvlm.decoding.choose import Chooser, Voice
from twigvlm.decoding.draft import chain
from twigvlm.pruning import METHODS, TowerMethod

QUERIES = ("last", "text")
NEW = 10  # tokens an answer


@dataclass(frozen=True)
class Case:
    """A model, a batch of prompts and the way to answer them."""

    shape: tuple  # of the model, as items
    layouts: tuple[tuple, ...]
    seed: int
    share: float  # of the legal range of R
    method: str
    query: str
    draft_length: int
    confidence: float
    new: int
    left: bool
    ending: int | None  # the end token is the one that the first row writes at this place

    @property
    def vlm(self):
        return tiny(**dict(self.shape))

    def prompts(self):
        return prompts(self.vlm, self.layouts, self.seed)

    @property
    def R(self) -> float:
        low, high = legal_range_of(self.vlm, self.method)
        return float(low + (high - low) * Fraction(self.share).limit_denominator(10))

    @property
    def pruned(self) -> dict:
        return {"retained_tokens": self.R, "pruning": spec_of(self.method), "query": self.query, "seed": self.seed}

    @property
    def speculation(self) -> dict:
        return {"draft_length": self.draft_length, "draft_confidence": self.confidence}


_piece = st.integers(1, 5)
_pictures = st.tuples(_piece, st.just(IMAGE), _piece)
_layout = st.one_of(
    _pictures,
    st.tuples(_piece),
    st.tuples(st.just(IMAGE), _piece),
    st.tuples(_piece, st.just(IMAGE)),
    st.tuples(_piece, st.just(IMAGE), st.just(IMAGE), _piece),
    st.tuples(st.just(IMAGE), _piece, st.just(IMAGE), _piece, st.just(IMAGE), _piece),
)


@st.composite
def cases(draw) -> Case:
    K, T = draw(st.sampled_from([(1, 1), (2, 2), (2, 3), (3, 1), (1, 3), (3, 3), (0, 2)]))
    shape = {
        "K": K,
        "T": T,
        "F": draw(st.integers(K + 1, 6)),
        "noise": draw(st.sampled_from([0.0, 0.1, 0.2, 3.0])),
        "fade": draw(st.sampled_from([0.1, 1.0, 2.0])),
        "kv_heads": draw(st.sampled_from([1, 2])),
        "side": draw(st.sampled_from([28, 56])),
    }
    possible = [m for m in sorted(METHODS) if legal_range_of(tiny(**shape), m)]
    return Case(
        shape=tuple(shape.items()),
        layouts=tuple(draw(st.lists(_layout, min_size=1, max_size=3))),
        seed=draw(st.integers(0, 999)),
        share=draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])),
        method=draw(st.sampled_from(possible)),
        query=draw(st.sampled_from(QUERIES)),
        draft_length=draw(st.integers(1, 6)),
        confidence=draw(st.sampled_from([0.0, 0.4, 0.6, 0.9, 1.0])),
        new=draw(st.integers(1, NEW)),
        left=draw(st.booleans()),
        ending=draw(st.none() | st.integers(0, NEW - 1)),
    )


def ending(case: Case, **settings) -> int:
    """The id of the end token of a case; without one, an id that is never written."""
    if case.ending is None:
        return case.vlm.image_token_id
    rows, pictures = case.prompts()
    answer = case.vlm.generate(
        **batch(rows[:1], pictures[:1]), draft_length=0, max_new_tokens=NEW, eos_token_id=[], **settings
    ).tokens[0]
    return answer[case.ending]


def same(a, b) -> None:
    """Equal answers, from equal image tokens."""
    assert a.tokens == b.tokens
    assert (a.kept is None) == (b.kept is None)
    for one_row, other in zip(a.kept or [], b.kept or [], strict=True):
        assert one_row.tolist() == other.tolist()


# ---------------------------------------------------------------------- greedy


@settings(max_examples=25)
@given(cases())
def test_plain_and_speculative_equal_stock_generate(case):
    vlm, (rows, pictures) = case.vlm, case.prompts()
    eos = ending(case)
    expected = [stock(vlm, *pair, eos=eos, max_new_tokens=case.new) for pair in zip(rows, pictures, strict=True)]
    arguments = {**batch(rows, pictures, case.left), "max_new_tokens": case.new, "eos_token_id": eos}
    assert vlm.generate(**arguments, draft_length=0).tokens == expected
    assert vlm.generate(**arguments, **case.speculation).tokens == expected
    base = tiny(**dict(case.shape), twig=False)
    assert base.generate(**arguments).tokens == expected


@settings(max_examples=50)
@given(cases())
def test_speculative_equals_plain_when_pruned(case):
    vlm, (rows, pictures) = case.vlm, case.prompts()
    settings = {"eos_token_id": ending(case, **case.pruned), "max_new_tokens": case.new, **case.pruned}
    whole = batch(rows, pictures, case.left)
    plain = vlm.generate(**whole, **settings, draft_length=0)
    fast = vlm.generate(**whole, **settings, **case.speculation)
    same(fast, plain)
    for b, pair in enumerate(zip(rows, pictures, strict=True)):
        own = settings | {"seed": case.seed + b}  # what row b draws from
        alone = vlm.generate(**batch(*[[p] for p in pair]), **own, **case.speculation)
        assert alone.tokens[0] == plain.tokens[b]
        assert alone.kept[0].tolist() == plain.kept[b].tolist()
        assert [(s.drafted, s.accepted, s.tokens) for s in alone.steps[0]] == [
            (s.drafted, s.accepted, s.tokens) for s in fast.steps[b]
        ]
    if METHODS[case.method].needs != "twig":
        same(tiny(**dict(case.shape), twig=False).generate(**whole, **settings), plain)


@settings(max_examples=15)
@given(cases())
def test_keeping_all_equals_not_pruning(case):
    """With F = L and r = V nothing is dropped, whatever the method, if it only chooses."""
    assume(METHODS[case.method].selects)
    vlm = tiny(**{**dict(case.shape), "F": 6})
    rows, pictures = prompts(vlm, case.layouts, case.seed)
    arguments = {**batch(rows, pictures, case.left), "max_new_tokens": case.new, "eos_token_id": [], **case.speculation}
    whole = vlm.generate(**arguments)
    pruned = vlm.generate(**arguments, retained_tokens=vlm.config.V, pruning=spec_of(case.method), query=case.query)
    assert pruned.tokens == whole.tokens
    for kept, row in zip(pruned.kept, rows, strict=True):
        assert kept.tolist() == list(range(row.count(vlm.image_token_id)))
    assert pruned.stats.visual_measured == whole.stats.visual_measured


@settings(max_examples=15)
@given(cases())
def test_sdpa_equals_eager(case):
    arguments = {**batch(*case.prompts(), case.left), "max_new_tokens": case.new, "eos_token_id": []}
    eager = tiny(**dict(case.shape), attention="eager")
    # Before the decoder some choose between near equals of a random tower: rounding decides, on every processor otherwise.
    within = not issubclass(METHODS[case.method], TowerMethod)
    for pruning in ({}, case.pruned) if within else ({},):
        arguments |= pruning | case.speculation
        same(case.vlm.generate(**arguments), eager.generate(**arguments))


def test_the_tiny_models_draft_right_and_wrong():
    """Else the square would say little: drafts of every fate, and answers that pruning changes."""
    fates, changed = set(), 0
    for seed in range(12):
        vlm = tiny(side=56)
        arguments = {**one(vlm, 3, IMAGE, 4, seed=seed), "max_new_tokens": 16, "eos_token_id": []}
        whole, pruned = vlm.generate(**arguments), vlm.generate(**arguments, retained_tokens=8)
        changed += whole.tokens != pruned.tokens
        for drafted, accepted in drafts(whole) + drafts(pruned):
            fates.add("none" if not drafted else "all" if accepted == drafted else "some" if accepted else "refused")
            fates.add("long" if drafted == 5 else "unsure" if drafted else "none")
    assert fates == {"none", "all", "some", "refused", "long", "unsure"}
    assert changed >= 6


# ---------------------------------------------------------------------- against a road of masks


def road(layers, hidden, visible, rotary):
    """[1, S, D] through `layers` (eager), each with its own [S, S] bool mask; the last layer's attention [H, S, S]."""
    weights = None
    for layer, seen in zip(layers, visible, strict=True):
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        out, weights = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask)
        hidden = hidden + out
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden, weights[0]


@torch.inference_mode()
def masked_forward(vlm, row, answer, pictures, r, method, query):
    """(kept, logits of every answer place) of a forward in which nothing is dropped, only hidden from K or F on."""
    trunk, config = vlm.trunk, vlm.config
    ids = torch.tensor([row + answer])
    visual = ids[0] == vlm.image_token_id
    visual[len(row) :] = False
    hidden = trunk.decoder.embed_tokens(ids)
    hidden[0, visual] = torch.cat(trunk.image_features(pictures))
    rotary = trunk.decoder.rotary_emb(hidden, torch.arange(len(ids[0]))[None])
    causal = torch.ones(len(ids[0]), len(ids[0])).tril().bool()
    below, first = road(trunk.layers[: config.K], hidden, [causal] * config.K, rotary)
    _, last = road(vlm.twig.layers, below, [causal] * config.T, rotary)
    attention = {"twig": last, "layer-attention": first}[method].mean(0)
    places = visual.nonzero()[:, 0]
    start = len(row) - 1 if query == "last" or places[-1] == len(row) - 1 else int(places[-1]) + 1
    scores = attention[start : len(row), places].sum(0)
    chosen = scores.argsort(descending=True)[: r * len(pictures)].sort().values
    hidden_between, hidden_above = visual.clone(), visual
    hidden_between[places[chosen]] = False
    masks = [causal & ~hidden_between] * (config.F - config.K) + [causal & ~hidden_above] * (config.L - config.F)
    top, _ = road(trunk.layers[config.K :], below, masks, rotary)
    # Where the image is last, the last token that is left speaks.
    gone = hidden_above if config.F < config.L else hidden_between
    ends = [int((~gone[: len(row)]).nonzero()[-1]), *range(len(row), len(ids[0]))]
    return chosen, trunk.logits(top[0, ends])


@pytest.mark.parametrize("method", ["twig", "layer-attention"])
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("layout", [(3, IMAGE, 4), (IMAGE, 5), (2, IMAGE, 3, IMAGE, 2), (4, IMAGE)], ids=str)
@pytest.mark.parametrize(("K", "T", "F", "r"), [(2, 2, 4, 5), (1, 3, 6, 3), (3, 1, 5, 0)])
def test_dropping_equals_hiding(method, query, layout, K, T, F, r):
    shape = {"K": K, "T": T, "F": F, "side": 56}
    vlm, masked = tiny(**shape), tiny(**shape, attention="eager")
    (row,), (pictures,) = prompts(vlm, [layout], seed=5)
    R = (K * vlm.config.V + (F - K) * r) / 6
    settings = {"retained_tokens": R, "pruning": method, "query": query, "max_new_tokens": NEW, "eos_token_id": []}
    out = vlm.generate(**batch([row], [pictures]), **settings)
    answer = out.tokens[0]
    kept, logits = masked_forward(masked, row, answer[:-1], pictures, len(out.kept[0]) // len(pictures), method, query)
    assert out.kept[0].tolist() == kept.tolist()
    assert answer == logits.argmax(-1).tolist()


@pytest.mark.parametrize("draft_length", [0, 3])
@pytest.mark.parametrize("layout", [(3, IMAGE, 4), (7,), (IMAGE, 2, IMAGE, 3)], ids=str)
def test_prefill_and_steps_equal_one_forward(draft_length, layout, monkeypatch):
    """The logits behind every written token are those of the stock model that reads the whole answer at once."""
    vlm = tiny(side=56)
    (row,), (pictures,) = prompts(vlm, [layout], seed=1)
    seen, plain = [], vlm.trunk.logits
    monkeypatch.setattr(vlm.trunk, "logits", lambda hidden: seen.append(plain(hidden)) or seen[-1])
    out = vlm.generate(**batch([row], [pictures]), draft_length=draft_length, max_new_tokens=NEW, eos_token_id=[])
    ours = torch.cat([logits[0, : len(step.tokens)] for logits, step in zip(seen, out.steps[0], strict=True)])
    ids = torch.tensor([row + out.tokens[0][:-1]])
    with torch.inference_mode():
        whole = vlm.model(input_ids=ids, pixel_values=pictures if len(pictures) else None).logits[0, len(row) - 1 :]
    torch.testing.assert_close(ours, whole, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- processors and criteria


def _processors(name: str, row: list[int]) -> LogitsProcessorList:
    made = {
        "repetition": lambda: [RepetitionPenaltyLogitsProcessor(1.7)],
        "ngram": lambda: [NoRepeatNGramLogitsProcessor(2)],
        "minimum": lambda: [MinNewTokensLengthLogitsProcessor(len(row), 7, EOS)],
        "all": lambda: [
            RepetitionPenaltyLogitsProcessor(1.2),
            NoRepeatNGramLogitsProcessor(3),
            MinNewTokensLengthLogitsProcessor(len(row), 4, EOS),
        ],
    }
    return LogitsProcessorList(made[name]())


@pytest.mark.parametrize("name", ["repetition", "ngram", "minimum", "all"])
@pytest.mark.parametrize("seed", often(range(4), 0, 1))
def test_logits_processors(name, seed):
    vlm = tiny(fade=0.3, noise=0.1)
    (row,), (pictures,) = prompts(vlm, [(3, IMAGE, 4)], seed)
    eos = stock(vlm, row, pictures, eos=vlm.image_token_id)[2] if name in ("minimum", "all") else EOS
    processors = _processors(name, row)
    for processor in processors:
        if isinstance(processor, MinNewTokensLengthLogitsProcessor):
            processor.eos_token_id = torch.tensor([eos])
    expected = stock(vlm, row, pictures, eos=eos, logits_processor=processors, max_new_tokens=16)
    bare = stock(vlm, row, pictures, eos=eos, max_new_tokens=16)
    for draft_length in (0, 1, 4):
        out = vlm.generate(
            **batch([row], [pictures]), logits_processor=processors, draft_length=draft_length,
            draft_confidence=0.2, max_new_tokens=16, eos_token_id=eos,
        )  # fmt: skip
        assert out.tokens[0] == expected
    if name in ("ngram", "minimum"):
        assert bare != expected, "the processor must matter"


def test_processors_in_a_batch():
    """Each row with its own history."""
    vlm = tiny(fade=0.3, noise=0.1)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (6,), (IMAGE, 2)])
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7), NoRepeatNGramLogitsProcessor(2)])
    out = vlm.generate(**batch(rows, pictures), logits_processor=processors, max_new_tokens=NEW, draft_confidence=0.2)
    pairs = zip(rows, pictures, strict=True)
    assert out.tokens == [stock(vlm, *p, logits_processor=processors, max_new_tokens=NEW) for p in pairs]


def test_drafts_obey_the_processors_too():
    """Else all drafts behind the first would be refused: each is judged behind those before it."""
    vlm, repeated = tiny(fade=0.3, noise=0.1), 0
    forbid = LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)])
    for seed in range(4):
        arguments = {
            **one(vlm, 3, IMAGE, 4, seed=seed),
            "max_new_tokens": NEW,
            "draft_confidence": 0.0,
            "eos_token_id": [],
        }
        for step in vlm.generate(**arguments, logits_processor=forbid).steps[0]:
            assert len(set(step.drafted)) == len(step.drafted)
        repeated += any(len(set(s.drafted)) < len(s.drafted) for s in vlm.generate(**arguments).steps[0])
    assert repeated, "without the processor the twig must repeat itself somewhere"


def test_maximal_time():
    vlm = tiny()
    (row,), (pictures,) = prompts(vlm, [(3, IMAGE, 4)])
    over = StoppingCriteriaList([MaxTimeCriteria(max_time=0.0)])
    out = vlm.generate(**batch([row], [pictures]), stopping_criteria=over, eos_token_id=[], max_new_tokens=NEW)
    assert out.tokens[0] == stock(vlm, row, pictures, eos=vlm.image_token_id, stopping_criteria=over)
    assert len(out.tokens[0]) == 1


def test_stop_string_inside_a_draft():
    vlm, tokenizer = speaking(noise=0.0, fade=0.05, sharpness=2.0), tiny_tokenizer()
    inside = 0
    for seed in range(6):
        (row,), (pictures,) = prompts(vlm, [(3, IMAGE, 4)], seed)
        free = vlm.generate(**batch([row], [pictures]), max_new_tokens=14, draft_confidence=0.0, eos_token_id=[])
        string = tokenizer.decode(free.tokens[0][3:6]).strip()
        rules = StoppingCriteriaList([StopStringCriteria(tokenizer, [string])])
        expected = stock(vlm, row, pictures, eos=vlm.image_token_id, stopping_criteria=rules, max_new_tokens=14)
        for draft_length in (0, 5):
            out = vlm.generate(
                **batch([row], [pictures]), stopping_criteria=rules, draft_length=draft_length,
                draft_confidence=0.0, max_new_tokens=14, eos_token_id=[],
            )  # fmt: skip
            assert out.tokens[0] == expected
        inside += len(expected) < 14 and out.steps[0][-1].accepted > len(out.steps[0][-1].tokens)
    assert inside, "in one case at least the string must end within an accepted draft"


def test_one_criterion_as_it_is():
    """A bare callable, as Hugging Face takes it only in a list."""
    vlm = tiny()
    arguments = {**one(vlm, 3, IMAGE, 4), "max_new_tokens": NEW, "eos_token_id": []}
    prompt = arguments["input_ids"].shape[1]
    out = vlm.generate(**arguments, stopping_criteria=lambda ids, scores: ids.shape[1] >= prompt + 4)
    assert out.tokens[0] == vlm.generate(**arguments).tokens[0][:4]


# ---------------------------------------------------------------------- sampling

SAMPLING = [
    pytest.param({}, id="plain"),
    pytest.param({"temperature": 0.6}, id="cool"),
    pytest.param({"temperature": 1.8, "top_k": 5}, id="hot-top_k"),
    pytest.param({"top_p": 0.7}, id="top_p"),
    pytest.param({"temperature": 1.3, "top_k": 8, "top_p": 0.8}, id="all"),
]


def filtered(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """[N, vocabulary] → probabilities that sampling should follow, written out slowly."""
    result = torch.zeros_like(logits)
    for row, out in zip(logits / temperature, result, strict=True):
        order = row.argsort(descending=True)[: top_k or None]
        p = row[order].softmax(-1)
        if top_p is not None:
            before = p.cumsum(-1) - p  # a token stays while those before it do not fill top_p
            order, p = order[before < top_p], p[before < top_p]
        out[order] = p / p.sum()
    return result


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How probable counts at least as far from `expected` are; rare cells are put together."""
    assert not counts[expected == 0].any(), "something impossible was sampled"
    big = expected >= 5
    cells = [(counts[big], expected[big])]
    if expected[~big].sum() >= 5:
        cells.append((counts[~big].sum()[None], expected[~big].sum()[None]))
    found, wanted = (torch.cat(c) for c in zip(*cells, strict=True))
    wanted = wanted * found.sum() / wanted.sum()
    statistic = ((found - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), statistic.double() / 2))


CHAIN, TREE = {"draft_length": 2, "draft_confidence": 0.0}, {"tree": (3, 2, 2, 6)}


@pytest.mark.parametrize("pruned", often([False, True], True), ids=["whole", "pruned"])
@pytest.mark.parametrize(
    ("options", "drafts"),
    [
        *(pytest.param(*p.values, CHAIN, id=p.id) for p in SAMPLING),
        pytest.param({"temperature": 1.8, "top_k": 5}, TREE, id="tree"),
    ],
)
def test_samples_follow_the_base(options, drafts, pruned):
    """The first two words of 1,500 seeds against the base's exact joint distribution."""
    vlm = tiny(vocabulary=10, sharpness=1.0, noise=0.5, F=4)
    masked = tiny(vocabulary=10, sharpness=1.0, noise=0.5, F=4, attention="eager")
    (row,), (pictures,) = prompts(vlm, [(3, IMAGE, 2)], seed=3)
    many = 1500
    arguments = batch([row] * many, [pictures] * many)
    out = vlm.generate(
        **arguments, **options, retained_tokens=2.0 if pruned else None, do_sample=True, seed=11,
        max_new_tokens=3, eos_token_id=[], **drafts,
    )  # fmt: skip
    assert 0.1 < out.stats.acceptance < 0.95, "drafts must be accepted and refused"
    pairs = [tokens[0] * 10 + tokens[1] for tokens in out.tokens]
    counts = torch.tensor(pairs).bincount(minlength=100).double()

    def logits(answer):
        if pruned:
            return masked_forward(masked, row, answer, pictures, len(out.kept[0]), "twig", "last")[1]
        with torch.inference_mode():  # by embeddings: the answer may hold the image token as a word
            prompt = vlm.trunk.embed(torch.tensor([row]), [len(row)], pictures).hidden
            words = vlm.trunk.decoder.embed_tokens(torch.tensor([answer], dtype=torch.long))
            hidden = vlm.trunk.decoder(inputs_embeds=torch.cat([prompt, words], 1)).last_hidden_state
            return vlm.model.lm_head(hidden)[0, len(row) - 1 :]

    first = filtered(logits([]), **options)[0]
    second = torch.cat([filtered(logits([token])[1:], **options) for token in range(10)])
    expected = (first[:, None] * second).flatten().double() * many
    assert chi_square_p(counts, expected) > 1e-3


def test_one_draw_a_place_follows_the_base():
    """Hand-written distributions of the drafter and the base, with words that only one of them knows."""
    q = torch.tensor([[0.7, 0.1, 0.1, 0.1, 0.0]])
    p = torch.tensor([[0.2, 0.3, 1e-30, 0.2, 0.3, 1e-30]])  # the base's vocabulary is padded by one
    chooser = Chooser(GenerationSettings(do_sample=True))
    voice = Voice(torch.Generator().manual_seed(5), [1])
    counts, accepted = torch.zeros(6), 0
    many = 4000
    for _ in range(many):
        token, score = chooser.propose(q.log(), [voice], [], 6)
        assert score == pytest.approx(q[0, token])
        draft = chain(token[:, None], score[:, None], torch.tensor([1]))
        word = chooser.judge(torch.stack([p.log(), p.log()], 1), draft, [voice])[0, 0]
        counts[word] += 1
        accepted += int(word == token)
        voice.write(int(word))
    assert chi_square_p(counts, p[0] * many) > 1e-3
    # Drafter and base share the noise: they agree at least as often as sharing it allows (1 - d) / (1 + d).
    distance = 1 - torch.minimum(q, p[:, :5]).sum().item()
    assert accepted / many > (1 - distance) / (1 + distance) - 0.03


@pytest.mark.parametrize("pruned", [{}, {"retained_tokens": 2.0}], ids=["whole", "pruned"])
@pytest.mark.parametrize("options", SAMPLING)
def test_a_seed_gives_the_same_answer_with_any_draft(options, pruned):
    """And in any batch: the noise belongs to the row's seed and the place, not to what was drafted."""
    vlm = tiny(sharpness=1.0, F=4)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (5,), (IMAGE, 3)])
    settings = {**options, **pruned, "do_sample": True, "max_new_tokens": NEW, "eos_token_id": []}
    plain = vlm.generate(**batch(rows, pictures), seed=4, draft_length=0, **settings)
    for draft_length, confidence in ((1, 0.6), (4, 0.0), (6, 0.3)):
        drafted = vlm.generate(
            **batch(rows, pictures), seed=[4, 5, 6], draft_length=draft_length, draft_confidence=confidence, **settings
        )
        assert drafted.tokens == plain.tokens


@pytest.mark.parametrize("draft_length", [0, 4])
def test_a_seed_repeats(draft_length):
    vlm = tiny(sharpness=1.0)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (5,), (IMAGE, 3)])
    settings = {
        "do_sample": True,
        "max_new_tokens": NEW,
        "draft_length": draft_length,
        "draft_confidence": 0.1,
        "eos_token_id": [],
    }
    first = vlm.generate(**batch(rows, pictures), seed=4, **settings)
    assert vlm.generate(**batch(rows, pictures), seed=4, **settings).tokens == first.tokens
    assert vlm.generate(**batch(rows, pictures), seed=5, **settings).tokens != first.tokens
    for b, pair in enumerate(zip(rows, pictures, strict=True)):  # a row's seed is its place more than the batch's
        alone = vlm.generate(**batch(*[[p] for p in pair]), seed=4 + b, **settings)
        assert alone.tokens[0] == first.tokens[b]


def test_without_a_seed_answers_differ():
    vlm = tiny(sharpness=0.5)
    settings = {**one(vlm, 3, IMAGE, 4), "do_sample": True, "max_new_tokens": NEW, "eos_token_id": []}
    assert len({tuple(vlm.generate(**settings).tokens[0]) for _ in range(5)}) > 1


def test_torchs_own_random_state_is_left_alone():
    vlm = tiny()
    before = torch.get_rng_state()
    vlm.generate(**one(vlm, 3, IMAGE, 4), do_sample=True, max_new_tokens=4, retained_tokens=2, pruning="random", seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_coldest_sampling_is_greedy():
    vlm = tiny()
    arguments = {**one(vlm, 3, IMAGE, 4), "max_new_tokens": NEW, "eos_token_id": []}
    greedy = vlm.generate(**arguments)
    assert vlm.generate(**arguments, do_sample=True, top_k=1).tokens == greedy.tokens
    assert vlm.generate(**arguments, do_sample=True, temperature=1e-3).tokens == greedy.tokens
