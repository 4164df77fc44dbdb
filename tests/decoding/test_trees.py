"""Drafts that branch: grown as the authors' function grows them, and nothing of them is seen in the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, IMAGE, batch, legal_range_of, one, prompts, spec_of, stock, tiny, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration, LogitsProcessorList
from transformers.generation import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from twigvlm.config import GenerationSettings, TreeShape, TwigConfig
from twigvlm.decoding import Decoder, embed, loop, tree
from twigvlm.decoding.choose import Chooser, Voice
from twigvlm.decoding.draft import DraftTree, walk
from twigvlm.decoding.loop import Draft
from twigvlm.errors import InputError
from twigvlm.families import trunk_of
from twigvlm.loading.base import Loaded
from twigvlm.loading.device import set_attention
from twigvlm.model.stream import Stream
from twigvlm.model.twig import grow as grow_twig
from twigvlm.pruning import METHODS, Keep, Plan, Probe, Wipe
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
        assert sight.shape == (stream.rows, stream.width, sum(s.width for s in self.entered) + stream.width)
        for b in range(stream.rows):
            for i in range(stream.width):
                if stream.place[b, i] >= 0:
                    assert self.depth(b, stream.place[b, i]) == sight[b, i].sum(), "it sees its ancestors and itself"
        self.entered.append(stream)
        return stream

    def depth(self, b, place):
        return place - self.place[b]

    def run_twig(self, stream, sight):
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
