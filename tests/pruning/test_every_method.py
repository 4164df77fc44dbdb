"""What holds for every method of the catalogue, whatever it chooses: its selections are written down while an answer
comes about, and a dense reference carries them out on the whole sequence, with stock layers and Python lists."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
from conftest import IMAGE, batch, legal_range_of, often, one, prompts, spec_of, tiny, tiny_model
from decoding.test_lossless import chi_square_p
from torch.utils.flop_counter import FlopCounterMode

import twigvlm.vlm
from twigvlm.config import TwigConfig
from twigvlm.errors import InputError
from twigvlm.pruning import METHODS, Reducer, Rule, Shape, find_method, plan_for
from twigvlm.pruning.cost import Sizes

NEW = 8
FEW = often(sorted(METHODS), "twig", "fastv", "pdrop", "sparsevlm", "visionzip", "tome")  # a test of seconds goes over
LAYOUTS = [(3, IMAGE, 4), (2, IMAGE, 3, IMAGE, 2), (6,), (IMAGE, 5)]


def middle(vlm, method: str, share: float = 0.5) -> float:
    found = legal_range_of(vlm, method)
    if found is None:
        pytest.skip(f"{method} cannot be on this model, and says so")
    low, high = found
    return float(low + (high - low) * share)


# ---------------------------------------------------------------------- writing down what is chosen


@dataclass(frozen=True)
class Noting(Rule):
    """A rule, and what it answered: for every row the places that stay, and (state, place behind, place) of what came."""

    rule: Rule
    notes: list = field(default_factory=list)

    @property
    def probe(self):
        return self.rule.probe

    @property
    def exact(self):
        return self.rule.exact

    @property
    def draws(self):
        return self.rule.draws

    def most(self, total):
        return self.rule.most(total)

    def __call__(self, seen):
        chosen, place = self.rule(seen), seen.visual.place
        for b in range(len(place)):
            stays = place[b][chosen.keep[b] & (place[b] >= 0)].tolist()
            new = []
            if chosen.merged is not None:
                instead = chosen.behind if chosen.instead is None else chosen.instead
                for state, behind, own in zip(
                    chosen.merged[b], chosen.behind[b].tolist(), instead[b].tolist(), strict=True
                ):
                    if behind >= 0:
                        new.append((state, int(place[b, behind]), int(place[b, own])))
            assert len({own for _, _, own in new} | set(stays)) == len(new) + len(stays), "two tokens in one place"
            self.notes.append((set(stays), new))
        return chosen


@dataclass(frozen=True)
class NotingTower(Reducer):
    """A reducer, and the tokens it made of every image."""

    reducer: Reducer
    notes: list = field(default_factory=list)

    def __getattribute__(self, name):
        if name in ("reducer", "notes", "bind", "__class__", "__dict__"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "reducer"), name)

    def most(self, V): ...

    def bind(self, vlm):
        return NotingTower(self.reducer.bind(vlm), self.notes)

    def __call__(self, view):
        tokens = self.reducer(view)
        for i, features in enumerate(tokens.features):
            n = len(features) if tokens.count is None else int(tokens.count[i])
            source = tokens.source[i, :n].tolist()
            real = [s for s in source if s >= 0]
            assert len(set(real)) == len(real), "two tokens of one patch"
            self.notes.append((features[:n], source))
        return tokens


def noting(monkeypatch):
    """From now on plans write down what they choose, in the list that this gives."""
    plans = []
    make = twigvlm.vlm.plan_for

    def plan(*args):
        made = make(*args)
        made = replace(made, stages=tuple((before, Noting(rule)) for before, rule in made.stages),
                       tower=None if made.tower is None else NotingTower(made.tower))  # fmt: skip
        plans.append(made)
        return made

    monkeypatch.setattr(twigvlm.vlm, "plan_for", plan)
    return plans


# ---------------------------------------------------------------------- the reference


@dataclass
class Token:
    hidden: torch.Tensor
    position: int
    place: int
    visual: bool


def numbered(tokens: list[Token]) -> list[Token]:
    return [replace(t, position=i) for i, t in enumerate(tokens)]


def entering(vlm, plan, row: list[int], answer: list[int], pictures, first: int) -> list[Token]:
    """What layer 0 reads; `first` is the number of the row's first picture in the call."""
    trunk, V = vlm.trunk, vlm.config.V
    image = [i for i, t in enumerate(row) if t == vlm.image_token_id]
    words = trunk.decoder.embed_tokens(torch.tensor([0 if i in image else t for i, t in enumerate(row + answer)]))
    features = torch.cat(trunk.image_features(pictures)) if len(pictures) else []
    out = []
    for i, word in enumerate(words):
        if i not in image:
            out.append(Token(word, i, i, False))
        elif plan.tower is None:
            out.append(Token(features[image.index(i)], i, i, True))
        elif image.index(i) % V == 0:
            made, source = plan.tower.notes[first + image.index(i) // V]
            free = [i + p for p in range(V) if p not in source]
            places = [i + s if s >= 0 else free.pop(0) for s in source]
            out += [Token(h, p, p, True) for h, p in zip(made, places, strict=True)]
    return numbered(out) if plan.tower is not None else out


def cut(tokens: list[Token], note, compact: bool) -> list[Token]:
    stays, new = note
    position = {t.place: t.position for t in tokens}
    out = []
    for t in tokens:
        if not t.visual or t.place in stays:
            out.append(t)
        out += [Token(state, position[own], own, True) for state, behind, own in new if behind == t.place]
    return numbered(out) if compact else out


@torch.inference_mode()
def reference(vlm, plan, b: int, row, answer, pictures, first: int) -> torch.Tensor:
    """[n, vocabulary]: logits of the places of an answer, all of it read at once under each layer's own mask."""
    stages = {before: rule.notes[b] for before, rule in plan.stages} if vlm.image_token_id in row else {}
    tokens = entering(vlm, plan, row, answer[:-1], pictures, first)
    edges = sorted({0, *stages, plan.evict or 0, vlm.config.L})
    last = None if plan.evict is None else survivors(tokens, stages, plan.positions == "compact")
    for begin, end in itertools.pairwise(edges):
        if begin in stages:
            tokens = cut(tokens, stages[begin], plan.positions == "compact")
        hidden = torch.stack([t.hidden for t in tokens])[None]
        seen = torch.ones(len(tokens), len(tokens)).tril().bool()
        if last is not None and begin >= plan.evict:
            gone = torch.tensor([t.visual and t.place not in last for t in tokens])
            later = torch.tensor([t.place >= len(row) for t in tokens])
            seen &= ~(gone & later[:, None])
        rotary = vlm.trunk.decoder.rotary_emb(hidden, torch.tensor([[t.position for t in tokens]]))
        for layer in vlm.trunk.layers[begin:end]:
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=seen[None, None])
        tokens = [replace(t, hidden=h) for t, h in zip(tokens, hidden[0], strict=True)]
    top = torch.stack([t.hidden for t in tokens])
    return vlm.trunk.logits(top)[-len(answer) :]


def survivors(tokens: list[Token], stages: dict, compact: bool) -> set[int]:
    for _, note in sorted(stages.items()):
        tokens = cut(tokens, note, compact)
    return {t.place for t in tokens if t.visual}


# ---------------------------------------------------------------------- properties


@pytest.mark.parametrize("draft_length", [0, 4])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_prefill_and_decoding_equal_a_dense_reference(method, draft_length, monkeypatch):
    """Ragged rows, several pictures, a row without any; with drafts and without."""
    vlm = tiny(side=56)
    rows, pictures = prompts(vlm, LAYOUTS, seed=4)
    plans = noting(monkeypatch)
    out = vlm.generate(
        **batch(rows, pictures), retained_tokens=middle(vlm, method), pruning=spec_of(method), seed=5, eos_token_id=[],
        draft_length=draft_length, draft_confidence=0.0, max_new_tokens=NEW,
    )  # fmt: skip
    first = 0
    for b, (row, pixels, answer) in enumerate(zip(rows, pictures, out.tokens, strict=True)):
        assert answer == reference(vlm, plans[0], b, row, answer, pixels, first).argmax(-1).tolist()
        first += len(pixels)
    assert out.stats.visual_by_layer[0] <= vlm.config.V
    assert out.stats.visual_measured == pytest.approx(sum(out.stats.visual_by_layer) / vlm.config.L)
    assert out.stats.visual_authors == find_method(spec_of(method)).authors(out.stats.visual_by_layer)


@pytest.mark.parametrize("method", FEW)
def test_a_row_in_a_batch_is_the_row_alone(method):
    vlm = tiny(side=56)
    rows, pictures = prompts(vlm, LAYOUTS, seed=7)
    asked = {
        "retained_tokens": middle(vlm, method),
        "pruning": spec_of(method),
        "eos_token_id": [],
        "max_new_tokens": NEW,
    }
    whole = vlm.generate(**batch(rows, pictures), **asked, seed=3)
    for b, (row, pixels) in enumerate(zip(rows, pictures, strict=True)):
        alone = vlm.generate(**batch([row], [pixels]), **asked, seed=3 + b)
        assert alone.tokens[0] == whole.tokens[b]
        if vlm.image_token_id in row:
            assert sorted(alone.kept[0].tolist()) == sorted(whole.kept[b].tolist())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_text_alone_is_untouched(method):
    vlm = tiny(side=56)
    (row,), _ = prompts(vlm, [(7,)])
    asked = {"max_new_tokens": NEW, "eos_token_id": []}
    pruned = vlm.generate(**batch([row]), **asked, retained_tokens=middle(vlm, method), pruning=spec_of(method))
    assert pruned.tokens == vlm.generate(**batch([row]), **asked).tokens


@pytest.mark.parametrize("method", FEW)
def test_samples_follow_the_pruned_base(method, monkeypatch):
    """The second word of many seeds, drafted and verified, against the reference's exact distribution."""
    vlm, many = tiny(vocabulary=10, sharpness=1.0, noise=0.5, side=56), 600
    (row,), (pictures,) = prompts(vlm, [(3, IMAGE, 2)], seed=3)
    rule = METHODS[method]
    plans = noting(monkeypatch)
    out = vlm.generate(
        **batch([row] * many, [pictures] * many), retained_tokens=middle(vlm, method), pruning=spec_of(method),
        do_sample=True, seed=[5] + [5 + b for b in range(1, many)], max_new_tokens=3, eos_token_id=[], draft_length=2,
        draft_confidence=0.0,
    )  # fmt: skip
    assert out.stats.drafted and rule.name == method
    if plans[0].random:
        pytest.skip("each seed has its own picture; the lossless test compares seeds")
    counts = torch.tensor([tokens[0] * 10 + tokens[1] for tokens in out.tokens]).bincount(minlength=100).double()
    first = reference(vlm, plans[0], 0, row, [0], pictures, 0)[0].softmax(-1)
    second = torch.stack([reference(vlm, plans[0], 0, row, [t, 0], pictures, 0)[1].softmax(-1) for t in range(10)])
    assert chi_square_p(counts, (first[:, None] * second).flatten().double() * many) > 1e-3


@pytest.mark.parametrize("method", sorted(METHODS))
def test_impossible_budgets_say_what_is_possible(method):
    vlm = tiny(side=56)
    low, high = legal_range_of(vlm, method) or pytest.skip("cannot be on this model, and says so")
    for wrong in (float(low) - 0.6, float(high) + 1, float("nan")):
        with pytest.raises(InputError, match=r"legal is|a number is needed"):
            vlm.generate(**one(vlm, 3, IMAGE, 4), retained_tokens=wrong, pruning=spec_of(method))


@pytest.mark.parametrize("before", [m for m in sorted(METHODS) if "tower" in str(METHODS[m].__mro__).lower()])
@pytest.mark.parametrize("then", often(["twig", "fastv", "pdrop"], "twig"))
def test_methods_join(before, then, monkeypatch):
    vlm = tiny(side=56)
    rows, pictures = prompts(vlm, LAYOUTS, seed=9)
    plans = noting(monkeypatch)
    name, _, settings = spec_of(before).partition(":")
    spec = f"{name}:{settings + ',' if settings else ''}keep=9+{then}"
    out = vlm.generate(
        **batch(rows, pictures), retained_tokens=5, pruning=spec, seed=2, eos_token_id=[], max_new_tokens=NEW
    )
    assert out.stats.visual_by_layer[0] == pytest.approx(9, abs=1e-6) and abs(out.stats.visual_measured - 5) <= 1
    first = 0
    for b, (row, pixels, answer) in enumerate(zip(rows, pictures, out.tokens, strict=True)):
        assert answer == reference(vlm, plans[0], b, row, answer, pixels, first).argmax(-1).tolist()
        first += len(pixels)


# ---------------------------------------------------------------------- names and settings


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("fastvv", ["'fastvv'", "known methods", "fastv", "twig"]),
        ("fastv:depth=3", ["'fastv'", "no setting 'depth'", "layer=2", "count=entering"]),
        ("fastv:layer", ["needs a value"]),
        ("fastv:layer=two", ["'two'", "a whole number"]),
        ("fastv:count=mine", ["'mine'", "entering, authors"]),
        ("twig+fastv", ["one method before the decoder"]),
        ("twig+", ["known methods"]),
        ("", ["known methods"]),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(spec, parts):
    with pytest.raises(InputError) as error:
        find_method(spec)
    assert all(part in str(error.value) for part in parts), error.value


def test_settings_are_read_as_their_fields_want_them():
    assert find_method("fastv:layer=3").layer == 3
    assert find_method("twig:query=text").query == find_method("twig", "text").query == "text"
    assert find_method("twig:query=last", "text").query == "last"


def test_a_method_that_needs_a_twig_says_so():
    bare = tiny(side=56, twig=False)
    for method in (m for m in METHODS if METHODS[m].needs == "twig"):
        with pytest.raises(InputError, match="needs a twig, and none is loaded"):
            bare.generate(
                **one(bare, 3, IMAGE, 4), retained_tokens=middle(bare_shape(), method), pruning=spec_of(method)
            )


def bare_shape():
    return tiny(side=56)


# ---------------------------------------------------------------------- cost


@pytest.mark.parametrize("method", FEW)
def test_counted_operations_are_those_that_are_done(method):
    """Against torch's counter, which sees matrix products; attention must be eager for it to see them all."""
    model = {"hidden": 128, "heads": 4, "kv_heads": 2, "side": 112, "layers": 8, "attention": "eager"}
    vlm = tiny(**model)
    R = middle(vlm, method, 0.4)
    arguments = one(vlm, 5, IMAGE, 12)
    with FlopCounterMode(display=False) as counter:
        out = vlm.generate(
            **arguments,
            retained_tokens=R,
            pruning=spec_of(method),
            draft_length=0,
            max_new_tokens=1,
            seed=0,
            eos_token_id=[],
        )
    sizes = Sizes.of(tiny_model(**model).config, vlm.config.K, vlm.config.T, element=4)
    plan = plan_for(spec_of(method), R, vlm.config.V, TwigConfig(8, vlm.config.K, vlm.config.T, vlm.config.F))
    cost = plan.cost(sizes, text=17)
    if METHODS[method].adaptive:
        assert cost.flops >= 0.98 * counter.get_total_flops()  # at most
        return
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert cost.cache_bytes == out.stats.cache_bytes_used


def test_the_shape_of_a_plan_knows_no_layer_by_heart():
    """Every method on a base of another depth and grid, or a word of why not."""
    for method in METHODS:
        for L, V in ((12, 49), (40, 576), (80, 256)):
            try:
                found = find_method(spec_of(method))
                low, high = found.legal(Shape(L, V, 2, round(0.75 * L)))
                counts = found.plan(float(low + high) / 2, Shape(L, V, 2, round(0.75 * L))).tokens_per_layer(L, V)
            except InputError as error:
                assert method in str(error), error
                continue
            assert len(counts) == L and max(counts) <= V + 1


@pytest.mark.parametrize("head", ["", "released"])
def test_a_twig_on_the_embeddings_is_counted_as_well(head):
    """K = 0: the twig reads what enters layer 0, before anything is cut. A pruning head's gates are products, too."""
    model = {"hidden": 128, "heads": 4, "kv_heads": 2, "side": 112, "layers": 8, "attention": "eager"}
    vlm = tiny(K=0, pruning_head=head, **model)
    asked = {"retained_tokens": 10, "draft_length": 0, "max_new_tokens": 1, "eos_token_id": []}
    with FlopCounterMode(display=False) as counter:
        vlm.generate(**one(vlm, 5, IMAGE, 12), **asked)
    sizes = Sizes.of(tiny_model(**model).config, 0, vlm.config.T, element=4, pruning_head=bool(head))
    plan = plan_for("twig", 10, vlm.config.V, TwigConfig(8, 0, vlm.config.T, vlm.config.F))
    assert plan.cost(sizes, text=17).flops == pytest.approx(counter.get_total_flops(), rel=1e-4)
