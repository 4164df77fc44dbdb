"""Drafts that branch: grown as the authors' function grows them, and nothing of them is seen in the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, IMAGE, batch, one, prompts, stock, tiny, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lossless import SAMPLING, cases, chi_square_p, ending, same
from transformers import LlavaForConditionalGeneration, LogitsProcessorList
from transformers.generation import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from twigvlm import flags
from twigvlm.config import GenerationSettings, TreeShape, TwigConfig
from twigvlm.decoding import Decoder, embed, loop, tree
from twigvlm.decoding.choose import Chooser, Voice
from twigvlm.decoding.draft import DraftTree, chain, walk
from twigvlm.errors import InputError, RunError
from twigvlm.evaluation.asking.setting import Setting
from twigvlm.evaluation.lmms.options import Options
from twigvlm.families import trunk_of
from twigvlm.loading.base import Loaded
from twigvlm.loading.device import set_attention
from twigvlm.model.stream import Stream
from twigvlm.model.twig import grow as grow_twig
from twigvlm.pruning import Keep, Plan, Probe, Wipe
from twigvlm.vlm import TwigVLM

NEW = 12
LAYOUTS = [(3, IMAGE, 4), (2, IMAGE, 3, IMAGE, 2), (IMAGE, 5), (6,)]
SHAPES = [(1, 1, 4, 4), (2, 2, 3, 6), (3, 2, 4, 8), (5, 1, 1, 5), (2, 4, 4, 4), (10, 10, 4, 60)]


# ---------------------------------------------------------------------- a drafter whose words are written down


@dataclass
class Written:
    """A decoder with a twig that knows `logits(depth, token, parent's token)` and no layers.

    A fed node finds its parent by what it sees of the others, so that a wrong mask gives wrong words.
    """

    logits: object
    root: int
    levels: list[int]  # room of each row
    ends: tuple[int, ...] = ()
    first: int = 0  # place of the first row's root; the others' follow
    sights: list[torch.Tensor] = field(default_factory=list)  # of each feeding

    def __post_init__(self):
        self.place = self.first + torch.arange(len(self.levels))
        self.eos, self.state, self.twig, self.chooser = self.ends, self, self, Chooser(GenerationSettings())
        self.trunk = SimpleNamespace(tokens=self.tokens, vocabulary=0)
        self.low, self.entered = [], []
        self.twig = SimpleNamespace(logits=lambda hidden: hidden)

    def rooms(self, longest):
        return [min(longest, n) for n in self.levels]

    def voices(self):
        return []

    def no_draft(self):
        return None

    def tokens(self, token, place):
        return Stream(torch.stack([token, place], -1).float(), place[None], place, torch.full_like(place, -1))

    def catch_up(self):
        return torch.stack([self.logits(0, self.root, None) for _ in self.levels])

    def climb(self, stream, _segments, sight):
        sight = self.seen(stream, sight)
        assert sight.shape == (stream.rows, stream.width, sum(s.width for s in self.entered) + stream.width)
        for b in range(stream.rows):
            for i in range(stream.width):
                if stream.place[b, i] >= 0:
                    assert self.depth(b, stream.place[b, i]) == sight[b, i].sum(), "it sees its ancestors and itself"
        self.entered.append(stream)
        return stream

    def seen(self, stream, sight):
        """What a mask of None means: all before it."""
        before = sum(s.width for s in self.entered if s is not stream)
        whole = torch.ones(stream.width, before + stream.width, dtype=torch.bool).tril(before)
        return whole.expand(stream.rows, -1, -1) if sight is None else sight

    def depth(self, b, place):
        return place - self.place[b]

    def run_twig(self, stream, sight):
        sight = self.seen(stream, sight)
        self.sights.append(sight)
        token = torch.cat([s.hidden[..., 0].long() for s in self.entered], 1)
        place = torch.cat([s.place for s in self.entered], 1)
        rows = []
        for b in range(stream.rows):
            row = []
            for i in range(stream.width):
                at = int(stream.place[b, i])
                seen = [j for j in sight[b, i].nonzero()[:, 0].tolist() if place[b, j] == at - 1]
                depth = at - int(self.place[b]) if at >= 0 else 1
                above = int(token[b, seen[0]]) if seen else self.root
                row.append(self.logits(depth, int(stream.hidden[b, i, 0]), above))
            rows.append(torch.stack(row))
        return SimpleNamespace(hidden=torch.stack(rows))


def slow_growth(logits, root, shape, room, ends=()):
    """[(tokens from the root, score)] of the kept nodes in order, by plain lists."""
    level, every = [((), 0.0)], []
    for depth in range(min(shape.D, room)):
        children = []
        for path, score in level:
            token, above = (path[-1], path[-2] if depth > 1 else root) if depth else (root, None)
            log = logits(depth, token, above).log_softmax(-1)
            best = log.topk(shape.E)
            children += [((*path, int(t)), score + float(p)) for p, t in zip(*best, strict=True)]
        every += children
        level = sorted((c for c in children if c[0][-1] not in ends), key=lambda c: -c[1])[: shape.W]
    kept = sorted(range(len(every)), key=lambda i: -every[i][1])[: shape.N]
    return [every[i] for i in sorted(kept)]


def paths_of(draft: DraftTree, row: int = 0) -> list[tuple[int, ...]]:
    """Tokens from the root down to each node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.token[row, : draft.count[row]], draft.parent[row], strict=False):
        found.append((*(found[parent] if parent >= 0 else ()), int(token)))
    return found


@settings(max_examples=40)
@given(st.data())
def test_a_tree_grows_as_by_hand(data):
    """Rows of unequal room and with end tokens; what was never fed goes through the low layers afterwards, and only that."""
    E, W, D = (data.draw(st.integers(1, n)) for n in (4, 4, 4))
    shape = TreeShape(E, W, D, 0)
    shape = shape._replace(N=data.draw(st.integers(1, shape.most)))
    rooms = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    table = torch.randn(6, 9, 10, 9, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) * 3

    def logits(depth, token, above):
        return table[depth, token, 9 if above is None else above]

    ends = data.draw(st.sampled_from([(), (2,), (0, 4, 7)]))
    decoder = Written(logits, 1, rooms, ends, first=7)
    draft = tree.grow(decoder, shape)
    if max(min(r, D) for r in rooms) == 0:
        assert draft is None
        return
    entered = torch.cat([s.place for s in decoder.entered], 1)
    heard = sum(s.shape[1] for s in decoder.sights)
    for b, room in enumerate(rooms):
        expected = slow_growth(logits, 1, shape, room, ends)
        paths = paths_of(draft.tree, b)
        assert paths == [path for path, _ in expected]
        ups = [0.0 if len(p) == 1 else dict(expected)[p[:-1]] for p in paths]
        scores = [score - up for (_, score), up in zip(expected, ups, strict=True)]
        assert draft.tree.score[b, : len(paths)].log().tolist() == pytest.approx(scores, abs=1e-5)
        for i, path in enumerate(paths):
            assert not set(path[:-1]) & set(ends) and len(path) <= room
            low = int(draft.low[b, i])
            assert entered[b, low] == draft.nodes.place[b, i] == 7 + b + len(path)
            assert draft.nodes.hidden[b, i, 0] == path[-1]
            assert draft.heard[b, i] == (low if low < heard else -1)
        assert (draft.nodes.place[b, len(paths) :] == -1).all()


@pytest.mark.parametrize("name", ["E10_W10_D4_N60", "E4_W3_D3_N12", "E1_W1_D4_N4"])
def test_the_authors_trees(name):
    with np.load(GOLDEN / "plus" / f"tree_{name}.npz") as found:
        g = dict(found)
    table, above = (torch.from_numpy(g[k].astype(np.float32)) for k in ("table", "above"))
    decoder = Written(
        lambda depth, token, up: table[depth, token] + (0 if up is None else above[depth, up]), int(g["root"]), [9]
    )
    shape = TreeShape(*g["shape"].tolist())
    rooms, growth = decoder.rooms(shape.D), None
    growth = tree.Growth(decoder, rooms)
    hidden = decoder.catch_up()[:, None]
    for level in range(1, shape.D + 1):
        np.testing.assert_allclose(hidden[0], g[f"level{level}/logits"], atol=1e-5)
        growth.branch(hidden, shape.E)
        assert growth.tokens[-1][0].tolist() == g[f"level{level}/token"].flatten().tolist()
        np.testing.assert_allclose(growth.paths[-1][0], g[f"level{level}/score"].flatten(), atol=1e-5)
        if level < shape.D:
            hidden = growth.feed(shape.W)
            before = sum(t.shape[1] for t in growth.tokens[:-1])
            assert (growth.fed[-1][0] - before - 1).tolist() == g[f"level{level}/expanded"].tolist()
            assert decoder.sights[-1][0].tolist() == g[f"level{level + 1}/mask"].tolist()
    draft = growth.prune(shape.N).tree
    assert draft.token[0].tolist() == g["token"].tolist()
    assert (draft.parent[0] + 1).tolist() == g["parent"].tolist()
    assert draft.depth()[0].tolist() == g["depth"].tolist()
    assert draft.ancestors()[0].tolist() == g["ancestors"].tolist()
    logs = draft.score[0].log().double()
    paths = (draft.ancestors()[0, 1:, 1:].double() * logs).sum(1)
    np.testing.assert_allclose(paths, g["score"], atol=1e-5)
    kept = torch.cat(growth.paths, 1)[0][torch.from_numpy(g["candidate"])]
    np.testing.assert_allclose(kept, g["score"], atol=1e-5)
    leaves = sorted(set(range(1, shape.N + 1)) - set(g["parent"].tolist()))
    lines = [draft.ancestors()[0, leaf].nonzero()[:, 0].tolist() for leaf in leaves]
    assert sorted(lines) == sorted([n for n in path if n >= 0] for path in g["paths"].tolist())
    for choice, accepted, emitted in zip(g["choice"], g["accepted"], g["emitted"], strict=True):
        check_walk(draft, choice.tolist(), accepted.tolist(), emitted.tolist())


def check_walk(draft: DraftTree, choice: list[int], accepted: list[int], emitted: list[int]) -> None:
    """`accepted` are nodes from 1 on."""
    path = [i for i in walk(draft, torch.tensor([choice]))[0].tolist() if i >= 0]
    assert [i + 1 for i in path] == [i for i in accepted if i >= 0]
    words = [int(draft.token[0, i]) for i in path]
    assert [*words, choice[path[-1] + 1 if path else 0]] == [t for t in emitted if t >= 0]


def test_a_short_path_does_not_end_in_the_last_node():
    """The released code pads paths with -1, which reads the last node, and accepts children that do not exist."""
    fault = json.loads((GOLDEN / "plus" / "released_fault.json").read_text(encoding="utf-8"))
    with np.load(GOLDEN / "plus" / fault["tree"]) as g:
        token, parent = torch.from_numpy(g["token"])[None], torch.from_numpy(g["parent"])[None] - 1
    draft = DraftTree(token, parent, torch.ones(token.shape), torch.tensor([token.shape[1]]), 4)
    assert len(fault["sentinel"]) > 3
    for case in fault["sentinel"]:
        check_walk(draft, case["choice"], case["right"]["accepted"], case["right"]["emitted"])


def test_ties_at_probability_one_keep_the_parent():
    ties = json.loads((GOLDEN / "plus" / "released_fault.json").read_text(encoding="utf-8"))["ties"]
    said = {}
    for name, values in ties["nonzero_logits"].items():  # "after root,2,3"
        told = [ties["root"], *map(int, name.split(",")[1:])]
        said[len(told) - 1, told[-1]] = values

    def logits(depth, token, _above):
        out = torch.zeros(ties["vocab"])
        for word, value in said.get((depth, token), {}).items():
            out[int(word)] = value
        return out

    shape = TreeShape(ties["E"], ties["W"], ties["D"], ties["N"])
    draft = tree.grow(Written(logits, ties["root"], [9]), shape).tree
    right = ties["right"]
    assert draft.token[0].tolist() == right["token"] and draft.depth()[0].tolist() == right["depth"]
    assert (draft.parent[0] + 1).tolist() == right["parent"]


# ---------------------------------------------------------------------- the answer does not know of it

_shapes = st.sampled_from([*SHAPES[1:], (2, 1, 3, 6), (3, 3, 2, 3), (4, 2, 5, 9), (6, 4, 3, 24)])


@settings(max_examples=40)
@given(cases(), _shapes)
def test_any_tree_gives_the_plain_answer(case, shape):
    """Over models, prompts, budgets, methods and batches; a row draws the same tree alone and among others."""
    vlm, (rows, pictures) = case.vlm, case.prompts()
    settings = {"eos_token_id": ending(case, **case.pruned), "max_new_tokens": case.new, **case.pruned}
    whole = batch(rows, pictures, case.left)
    plain = vlm.generate(**whole, **settings, draft_length=0)
    drafted = vlm.generate(**whole, **settings, tree=shape)
    same(drafted, plain)
    assert drafted.stats.draft_shape == f"tree {TreeShape(*shape)}"
    for b, pair in enumerate(zip(rows, pictures, strict=True)):
        alone = vlm.generate(**batch(*[[p] for p in pair]), **settings | {"seed": case.seed + b}, tree=shape)
        assert alone.tokens[0] == plain.tokens[b]
        assert [(s.drafted, s.parents, s.accepted, s.tokens) for s in alone.steps[0]] == [
            (s.drafted, s.parents, s.accepted, s.tokens) for s in drafted.steps[b]
        ]


@settings(max_examples=12)
@given(cases(), _shapes)
def test_any_tree_gives_the_unmodified_bases_answer(case, shape):
    vlm, (rows, pictures) = case.vlm, case.prompts()
    eos = ending(case)
    expected = [stock(vlm, *pair, eos=eos, max_new_tokens=case.new) for pair in zip(rows, pictures, strict=True)]
    wish = {**batch(rows, pictures, case.left), "max_new_tokens": case.new, "eos_token_id": eos}
    assert vlm.generate(**wish, tree=shape).tokens == expected


class Watched:
    """Answers, steps, and the committed part of every cache of the first row after each round."""

    def __init__(self, vlm, plan, rows, pictures, grow=None, length=4, confidence=0.0):
        options = GenerationSettings(draft_length=length, draft_confidence=confidence, max_new_tokens=NEW)
        decoder = Decoder(vlm.trunk, vlm.twig, plan, options, grow=grow)
        self.tokens, self.steps, self.caches = [[] for _ in rows], [], {}
        pixels = torch.cat(pictures) if any(len(p) for p in pictures) else None
        with torch.inference_mode():
            for round_ in decoder.steps(embed(vlm.trunk, plan, rows, pixels)):
                for b, step in round_:
                    self.tokens[b] += step.tokens
                    self.steps.append((b, step.drafted, step.parents, step.accepted, step.tokens, step.path))
                self.caches[len(self.tokens[0])] = [
                    (c.keys[:, 0, :, : c.used[0]].clone(), c.values[:, 0, :, : c.used[0]].clone())
                    for c in decoder.state.caches
                ]


def plans():
    cuts = ((2, Keep(5, 16, Probe("twig", "text"))), (4, Keep(2, 16, Probe("peek", "last", 4))), (5, Wipe()))
    return [Plan(), Plan(cuts), Plan(cuts, positions="compact")]


@pytest.mark.parametrize("plan", plans(), ids=["whole", "cut", "compacted"])
def test_a_tree_of_width_one_is_the_chain(plan):
    """Token for token and cache for cache, in a batch of unequal rows."""
    vlm = tiny(side=56, context=512, noise=0.1)
    rows, pictures = prompts(vlm, LAYOUTS, seed=4)
    line = Watched(vlm, plan, rows, pictures)
    grown = Watched(vlm, plan, rows, pictures, partial(tree.grow, shape=TreeShape(1, 1, 4, 4)))
    assert grown.tokens == line.tokens and grown.steps == line.steps
    assert grown.caches.keys() == line.caches.keys() and len(line.caches) > 2
    for written, caches in line.caches.items():
        for (keys, values), (own_keys, own_values) in zip(caches, grown.caches[written], strict=True):
            torch.testing.assert_close(own_keys, keys, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(own_values, values, atol=1e-5, rtol=1e-4)


def test_one_child_a_node_stops_where_the_chain_stops():
    vlm = tiny(noise=0.3)
    wish = {**batch(*prompts(vlm, LAYOUTS, seed=2)), "max_new_tokens": NEW, "eos_token_id": []}
    for confidence in (0.3, 0.6, 0.9):
        line = vlm.generate(**wish, draft_length=5, draft_confidence=confidence)
        grown = vlm.generate(**wish, tree=(1, 1, 5, 5), draft_confidence=confidence)
        assert grown.steps == line.steps and grown.tokens == line.tokens
        assert grown.stats.draft_shape == "chain"
        assert len({len(s.drafted) for row in line.steps for s in row}) > 2, "it must stop at several places"


@pytest.mark.parametrize("shape", [(2, 2, 3, 6), (10, 10, 4, 60)], ids=str)
@pytest.mark.parametrize("plan", plans(), ids=["whole", "cut", "compacted"])
def test_caches_are_those_of_plain_decoding(plan, shape):
    """In every group, after every round, whatever way of the tree was taken."""
    vlm, taken = tiny(side=56, context=512, noise=0.3, fade=0.5), set()
    for seed in range(3):
        rows, pictures = prompts(vlm, LAYOUTS[:1], seed=seed)
        slow = Watched(vlm, plan, rows, pictures, partial(tree.grow, shape=TreeShape(1, 1, 1, 1)), 1)
        fast = Watched(vlm, plan, rows, pictures, partial(tree.grow, shape=TreeShape(*shape)))
        assert slow.tokens == fast.tokens
        taken |= {accepted for _, _, _, accepted, _, _ in fast.steps}
        last = slow.caches[NEW]
        for caches in fast.caches.values():
            for (keys, values), (all_keys, all_values) in zip(caches, last, strict=True):
                n = min(keys.shape[2], all_keys.shape[2])
                torch.testing.assert_close(keys[:, :, :n], all_keys[:, :, :n], atol=2e-5, rtol=1e-4)
                torch.testing.assert_close(values[:, :, :n], all_values[:, :, :n], atol=2e-5, rtol=1e-4)
    assert {0, 1} <= taken and max(taken) > 1


def test_trees_find_what_chains_miss():
    """Second children are accepted, and what is written per verification grows."""
    vlm, second = tiny(side=56, noise=0.3, fade=0.5), 0
    wish = {"max_new_tokens": 40, "eos_token_id": []}
    for seed in range(4):
        arguments = {**one(vlm, 3, IMAGE, 4, seed=seed), **wish}
        line = vlm.generate(**arguments, draft_length=4, draft_confidence=0.0)
        wide = vlm.generate(**arguments, tree=(4, 4, 4, 16))
        assert wide.tokens == line.tokens
        assert wide.stats.tokens_per_step >= line.stats.tokens_per_step
        for step in wide.steps[0]:
            path = _path(step)
            second += any(step.parents.index(step.parents[node]) != node for node in path)
    assert second > 3


def _first(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _last(logits: torch.Tensor) -> torch.Tensor:
    return -logits


def _second(logits: torch.Tensor) -> torch.Tensor:
    """The two best change places."""
    best = logits.topk(2).indices
    return logits.scatter(-1, best, logits.gather(-1, best.flip(-1)))


@pytest.mark.parametrize(
    ("guess", "chained", "branched"),
    [(_first, 4, 4), (_last, 0, 0), (_second, 0, 4)],
    ids=["always", "never", "second child"],
)
def test_a_drafter_that_is_right_always_never_or_second(monkeypatch, guess, chained, branched):
    """The base's upper layers add nothing, so that the twig knows its words; then it guesses as it is told."""
    vlm = tiny(side=56, noise=0.0, fade=0.0)
    knows = vlm.twig.logits
    monkeypatch.setattr(vlm.twig, "logits", lambda hidden: guess(knows(hidden)))
    arguments = {**batch(*prompts(vlm, LAYOUTS)), "max_new_tokens": 21, "eos_token_id": []}
    plain = vlm.generate(**arguments, draft_length=0)
    nodes = 2 + 4 + 8 + 16  # all there are
    chain_of_four, tree_of_four = {"draft_length": 4, "draft_confidence": 0.0}, {"tree": (2, 8, 4, nodes)}
    for draft, size, accepted in ((chain_of_four, 4, chained), (tree_of_four, nodes, branched)):
        out = vlm.generate(**arguments, **draft)
        assert out.tokens == plain.tokens
        whole = [step for steps in out.steps for step in steps if len(step.drafted) == size]
        assert whole and {step.accepted for step in whole} == {accepted}
        assert out.stats.tokens_per_step == (21 / 5 if accepted else 1), "the last step has one word left"


def _path(step) -> list[int]:
    """The accepted nodes, from what a step says."""
    here, path = -1, []
    for token in step.tokens[: step.accepted]:
        here = next(
            i for i, (p, t) in enumerate(zip(step.parents, step.drafted, strict=True)) if (p, t) == (here, token)
        )
        path.append(here)
    return path


def test_the_figures_of_a_tree():
    vlm = tiny(side=56, noise=0.3, fade=0.5)
    out = vlm.generate(**one(vlm, 3, IMAGE, 4), max_new_tokens=30, eos_token_id=[], tree=(3, 2, 4, 8))
    steps, s = out.steps[0], out.stats
    assert s.tokens_per_step == 30 / len(steps) == 30 / s.steps
    assert [step.path for step in steps] == [_path(step) for step in steps]
    for depth, rate in enumerate(s.hit_rates):
        asked = [step for step in steps if step.accepted >= depth and _goes_on(step, depth)]
        assert rate == sum(step.accepted > depth for step in asked) / len(asked)
    assert len(s.hit_rates) == max(step.offered for step in steps) > 1
    assert vlm.generate(**one(vlm, 3, IMAGE, 4), draft_length=0).stats.hit_rates == []


@settings(max_examples=25)
@given(cases(), st.booleans())
def test_a_verification_yields_its_own_token_and_what_it_accepts(case, branches):
    """Whether or not an end token is among what it yields: that is not written, and plain decoding is no slower for it."""
    drafts = {"tree": (3, 2, 4, 8)} if branches else case.speculation
    arguments = {**batch(*case.prompts()), "max_new_tokens": case.new}
    arguments["eos_token_id"] = [] if case.ending is None else ending(case)
    assert case.vlm.generate(**arguments, draft_length=0).stats.tokens_per_step == 1
    out = case.vlm.generate(**arguments, **drafts)
    rounds = [step for row in out.steps for step in row]
    yielded = sum(step.accepted + 1 for step in rounds)
    assert out.stats.tokens_per_step == pytest.approx(yielded / len(rounds)) and out.stats.tokens_per_step >= 1
    # the end token, and the base's own behind one that was drafted
    assert 0 <= yielded - out.stats.new_tokens <= (0 if case.ending is None else 2 * len(out.steps))


def _goes_on(step, depth: int) -> bool:
    path = [-1, *_path(step)]
    return len(path) > depth and path[depth] in step.parents


# ---------------------------------------------------------------------- ends


@pytest.mark.parametrize("shape", [(2, 2, 3, 6), (4, 3, 4, 20)], ids=str)
def test_nothing_is_drafted_behind_an_end(shape):
    """Neither behind an end token nor behind what may still be written; and an end anywhere ends the answer there."""
    vlm, inside = tiny(side=56, noise=0.2, fade=0.5), 0
    arguments = one(vlm, 3, IMAGE, 4, seed=1)
    answer = vlm.generate(**arguments, max_new_tokens=NEW, eos_token_id=[], draft_length=0).tokens[0]
    for place in range(NEW):
        end = answer[place]
        out = vlm.generate(**arguments, max_new_tokens=NEW, eos_token_id=end, tree=shape)
        assert out.tokens[0] == answer[: answer.index(end)]
        for step in out.steps[0]:
            assert all(parent < 0 or step.drafted[parent] != end for parent in step.parents)
        inside += out.steps[0][-1].accepted > len(out.steps[0][-1].tokens)
    for limit in range(1, NEW):
        out = vlm.generate(**arguments, max_new_tokens=limit, eos_token_id=[], tree=shape)
        assert out.tokens[0] == answer[:limit]
        left = limit
        for step in out.steps[0]:
            depth = {-1: 0}
            for node, parent in enumerate(step.parents):
                depth[node] = depth[parent] + 1
            assert max(depth.values()) <= left - 1 and len(step.drafted) <= shape[3]
            left -= len(step.tokens)
    assert inside, "an end token must have been an accepted node"


# ---------------------------------------------------------------------- processors, choosers, sampling


def test_processors_are_asked_path_by_path():
    vlm = tiny(fade=0.3, noise=0.1)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (6,), (IMAGE, 2)])
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7), NoRepeatNGramLogitsProcessor(2)])
    wish = {**batch(rows, pictures), "logits_processor": processors, "max_new_tokens": NEW, "eos_token_id": []}
    plain = vlm.generate(**wish, draft_length=0)
    for shape in SHAPES[1:]:
        out = vlm.generate(**wish, tree=shape)
        assert out.tokens == plain.tokens and out.stats.draft_shape.startswith("tree")
    forbid = LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)])
    out = vlm.generate(**wish | {"logits_processor": forbid}, tree=(3, 2, 4, 8))
    for step in out.steps[0]:
        for node, parent in enumerate(step.parents):
            behind = []
            while parent >= 0:
                behind.append(step.drafted[parent])
                parent = step.parents[parent]
            assert step.drafted[node] not in behind, "a draft obeys them too"


class Proposing(Chooser):
    """Somebody's own, from before there were trees."""

    def propose(self, logits, voices, drafted, vocabulary):
        token, score = super().propose(logits, voices, drafted, vocabulary)
        return token, torch.ones_like(score)


class Branching(Proposing):
    def branch(self, logits, voices, paths, children, vocabulary):
        return super().branch(logits, voices, paths, children, vocabulary)


def test_a_chooser_without_second_choices_drafts_chains():
    vlm = tiny()
    wish = {**one(vlm, 3, IMAGE, 4), "max_new_tokens": NEW, "eos_token_id": []}
    plain = vlm.generate(**wish, draft_length=0)
    out = vlm.generate(**wish, tree=(3, 2, 4, 8), chooser=Proposing)
    assert out.tokens == plain.tokens and out.stats.draft_shape.startswith("chain: Proposing chooses no second")
    assert max(len(s.drafted) for s in out.steps[0]) == 4
    out = vlm.generate(**wish, tree=(3, 2, 4, 8), chooser=Branching)
    assert out.tokens == plain.tokens and out.stats.draft_shape == "tree 3,2,4,8"


@pytest.mark.parametrize("pruned", [{}, {"retained_tokens": 2.0}], ids=["whole", "pruned"])
@pytest.mark.parametrize("options", SAMPLING)
def test_a_seed_gives_the_same_answer_with_any_tree(options, pruned):
    vlm = tiny(sharpness=1.0, F=4)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (5,), (IMAGE, 3)])
    settings = {**options, **pruned, "do_sample": True, "max_new_tokens": NEW, "eos_token_id": [], "seed": 4}
    plain = vlm.generate(**batch(rows, pictures), draft_length=0, **settings)
    for shape in SHAPES[1:]:
        assert vlm.generate(**batch(rows, pictures), tree=shape, **settings).tokens == plain.tokens


def test_one_draw_a_node_follows_the_base():
    """Hand-written distributions over five words, drafts of two levels and three children a node: the joint frequencies of two words."""
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(6, 5, generator=generator).softmax(-1)  # after the root (5) and after each word
    q = (p.log() + torch.randn(6, 5, generator=generator)).log_softmax(-1)
    chooser, many = Chooser(GenerationSettings(do_sample=True)), 1500
    voices = [Voice(torch.Generator().manual_seed(seed), [1]) for seed in range(many)]
    decoder = Written(lambda depth, token, _up: q[token if depth else 5], 0, [2] * many)
    decoder.chooser, decoder.voices, decoder.trunk.vocabulary = chooser, lambda: voices, 5
    draft = tree.grow(decoder, TreeShape(3, 2, 2, 6)).tree
    rows = torch.cat([torch.full((many, 1), 5), draft.token], 1)
    choice = chooser.judge(p[rows].log(), draft, voices)
    path, counts, second = walk(draft, choice), torch.zeros(5, 5), 0
    for b, voice in enumerate(voices):
        nodes = [i for i in path[b].tolist() if i >= 0]
        words = [int(draft.token[b, i]) for i in nodes] + [int(choice[b, nodes[-1] + 1 if nodes else 0])]
        second += any(int((draft.parent[b] == draft.parent[b, i]).nonzero()[0]) != i for i in nodes)
        if len(words) == 1:  # the next round, without a draft
            voice.write(words[0])
            empty = torch.zeros(1, 0, dtype=torch.long)
            words.append(
                int(chooser.judge(p[words[0]].log()[None, None], chain(empty, empty, empty[:, 0:].sum(1)), [voice]))
            )
        counts[words[0], words[1]] += 1
    assert chi_square_p(counts.flatten(), (p[5][:, None] * p[:5]).flatten() * many) > 1e-3
    assert second > many / 20


# ---------------------------------------------------------------------- without a look at the device


@pytest.mark.parametrize("processors", [[], [RepetitionPenaltyLogitsProcessor(1.2)]], ids=["greedy", "processed"])
def test_a_round_with_a_tree_reads_the_device_once(processors, monkeypatch):
    """On the meta device there is nothing to read: only `fetch` may try, and only once a round; and processors' paths."""
    model = tiny_model(side=56)
    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(model.config)
    set_attention(empty.eval(), "sdpa")
    trunk = trunk_of(empty)
    vlm = TwigVLM(Loaded(empty, None, "meta", False), grow_twig(trunk, TwigConfig(6, 2, 2, 4)))
    reads = []

    def fake(tensor):
        """Zeros, but: one draft accepted, behind it token 1; all nodes are children of the root."""
        reads.append(tuple(tensor.shape))
        assert tensor.device.type == "meta"
        out = np.zeros(tensor.shape, dtype=np.int32)
        head = 4 + (len(decoder.state.caches) if not decoder.rows[0].tokens else 0)
        out[:, 3:head] = 1
        nodes = max(tensor.shape[1] - head - 1, 0) // 3  # and 1 to 3 levels
        out[:, 0], out[:, 1], out[:, 2], out[:, head - 1] = nodes > 0, 1, 0, nodes
        out[:, tensor.shape[1] - nodes :] = -1  # parents
        return out

    told = []

    def parents(tensor):
        told.append(tuple(tensor.shape))
        return np.full(tensor.shape, -1)

    monkeypatch.setattr(loop, "fetch", fake)
    monkeypatch.setattr("twigvlm.decoding.draft.fetch", parents)
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (2, IMAGE, IMAGE, 5), (4,)])
    plan = Plan(
        ((2, Keep(5, 16, Probe("twig", "text"))), (4, Keep(2, 16, Probe("peek", "last", 4))), (5, Wipe())),
        positions="compact",
    )
    options = GenerationSettings(max_new_tokens=7)
    decoder = Decoder(
        trunk,
        vlm.twig,
        plan,
        options,
        eos=[2],
        chooser=Chooser(options, processors),
        grow=partial(tree.grow, shape=TreeShape(3, 2, 3, 6)),
    )
    with torch.inference_mode():
        rounds = list(decoder.steps(embed(trunk, plan, rows, torch.cat(pictures))))
    assert decoder.rows == [] and len(rounds) == 4  # 2, 2, 2 and 1 tokens
    assert len(reads) == 4 and all(len(shape) == 2 for shape in reads)
    assert told == ([(3, 6), (3, 6), (3, 6)] if processors else [])  # none where nothing is drafted


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("2,2", ["'2,2'", "E,W,D,N", "3,2,4,8"]),
        ("a,b,c,d", ["a,b,c,d", "whole numbers"]),
        ("2,2,3,6,1", ["four"]),
        ("0,1,1,1", ["1 or more"]),
        ("-2,2,3,6", ["1 or more"]),
        ((2, 2, 3, 6.5), ["whole"]),
        ((2, 2, True, 6), ["whole"]),
        ("", ["four"]),
        ("2,2,3,11", ["N is 11", "10 nodes", "N <= 10"]),
        ("9,2,3,8", ["E is 9", "E <= 8", "N >= 9"]),
        ("2,9,3,8", ["W is 9"]),
        ("2,2,9,8", ["D is 9"]),
        ("1,2,3,3", ["W is 2", "E=1", "W=1"]),
        ("20,20,20,400", ["N is 400", "256"]),
        *((given, [repr(given), "four whole numbers E,W,D,N"]) for given in (5, 5.0, True, {3, 2, 4, 8})),
    ],
)
def test_bad_shapes_are_refused(given, words):
    with pytest.raises(InputError) as error:
        GenerationSettings(tree=given)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_no_more_nodes_are_advised_than_there_can_be():
    with pytest.raises(InputError, match=r"E is 900, .* choose E <= 250$"):
        GenerationSettings(tree="900,1,1,250")
    with pytest.raises(InputError, match=r"choose E <= 250 or N >= 256$"):
        GenerationSettings(tree="256,1,1,250")


def test_a_tree_and_a_chain_are_one_too_many():
    for other in ({"draft_length": 3}, {"draft_length": "auto"}, {"draft_confidence": 0.5}):
        with pytest.raises(InputError, match=next(iter(other))):
            GenerationSettings(tree="2,2,3,6", **other)
    assert GenerationSettings(tree="2,2,3,6", draft_length=0).tree == "2,2,3,6"
    assert GenerationSettings(tree="1,1,5,5", draft_confidence=0.5).shape == (1, 1, 5, 5)


def test_a_shape_may_be_written_in_three_ways():
    assert {
        GenerationSettings(tree=t).tree for t in ("2,2,3,6", "2;2;3;6", " 2, 2,3,6", (2, 2, 3, 6), [2, 2, 3, 6])
    } == {"2,2,3,6"}


def test_more_children_than_words():
    with pytest.raises(InputError, match="knows 64 words"):
        tiny().generate(**one(tiny(), 3, IMAGE, 4), tree=(65, 1, 1, 65))


def test_no_twig_and_no_drafts():
    bare = tiny(twig=False)
    out = bare.generate(**one(bare, 3, IMAGE, 4), tree=(2, 2, 3, 6), max_new_tokens=4)
    assert out.stats.draft_shape == "none" and out.stats.drafted == 0
    out = tiny().generate(**one(tiny(), 3, IMAGE, 4), tree=(2, 2, 3, 6), draft_length=0, max_new_tokens=4)
    assert out.stats.draft_shape == "none" and out.stats.drafted == 0


def test_words_that_are_no_numbers_are_noticed(monkeypatch):
    vlm = tiny()
    logits = vlm.twig.logits
    monkeypatch.setattr(vlm.twig, "logits", lambda hidden: logits(hidden) * float("nan"))
    with pytest.raises(RunError):
        vlm.generate(**one(vlm, 3, IMAGE, 4), tree=(2, 2, 3, 6))


def test_answers_of_trees_have_a_folder_of_their_own():
    writing = GenerationSettings(retained_tokens=64.0, max_new_tokens=128, seed=0, tree="2;2;3;6")
    line, wide = Setting(), Setting(writing=writing)
    assert wide.name == f"{line.name}-tree-2,2,3,6"
    asked = [s.identity("gqa", "test", []) for s in (line, wide)]
    assert asked[1] == asked[0] | {"tree": "2,2,3,6"} == json.loads(json.dumps(asked[1]))
    assert (
        Setting(writing=replace(writing, draft_length=0)).name
        == Setting(writing=replace(line.writing, draft_length=0)).name
    )


def test_a_tree_is_said_by_flags_and_model_args():
    parser = flags.parser("x", None, flags.writing())
    assert flags.generation(flags.parse(parser, ["--tree", "2,2,3,6", "-R", "64"]))["tree"] == "2,2,3,6"
    assert Options.read({"tree": "2;2;3;6"}).writing == {"tree": "2;2;3;6"}
    assert Options.read({"tree": "auto"}).writing == {"tree": "auto"}
