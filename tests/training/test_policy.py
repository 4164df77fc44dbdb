"""Stage 2: kept sets drawn as they should be, rewards that are the pruned base's own likelihoods, and a head that alone learns."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import twigvlm
from training.conftest import twig_of
from training.test_training import CPU, FP32, a_batch, documented, equal
from twigvlm.config import TwigConfig
from twigvlm.decoding.prefill import embed
from twigvlm.decoding.score import score
from twigvlm.errors import InputError
from twigvlm.loading.twig import stored_twig
from twigvlm.pruning import Plan
from twigvlm.pruning.select import cosine, discounted, spared
from twigvlm.training.data.examples import IGNORE
from twigvlm.training.plus import sets
from twigvlm.training.plus.budgets import Budgets
from twigvlm.training.plus.losses import attention_divergence
from twigvlm.training.plus.policy import Policy
from twigvlm.training.plus.pruned import Beginning, plan_of, pruned_top
from twigvlm.training.plus.sets import (
    advantage,
    discounted_log_probability,
    draw,
    draw_discounted,
    log_probability,
    policy_loss,
)
from twigvlm.training.plus.subject import PolicyLesson
from twigvlm.training.run import report
from twigvlm.training.twig import Start, TwigLesson, prepare_twig

pytest.importorskip("accelerate")
PAPER = Budgets((41, 72, 103, 134, 165, 196, 227), 576)
LLAVA = TwigConfig(32, 2, 3, 24)

# ---------------------------------------------------------------------- the authors' numbers


@pytest.fixture(params=["all", "small", "middle", "large", "wide"])
def case(golden, request) -> dict[str, torch.Tensor]:
    with np.load(golden / "plus/stage2.npz") as arrays:
        name = f"{request.param}/"
        return {k.removeprefix(name): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(name)}


def gradient_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).norm() <= 2e-5 * wanted.norm() + 1e-9


def test_probabilities_losses_and_gradients_are_the_authors(case):
    s, picks, r = case["s"].clone().requires_grad_(True), case["picks"][None], case["picks"].shape[1]
    found = log_probability(s.log()[None], picks)[0]
    torch.testing.assert_close(found, case["log_prob"], rtol=1e-6, atol=1e-5)
    gains = advantage(case["reward"][None])
    torch.testing.assert_close(gains[0], case["advantage"], rtol=1e-5, atol=1e-5)
    policy = policy_loss(s.log()[None], picks, gains)[0]
    torch.testing.assert_close(policy, case["policy"], rtol=1e-4, atol=1e-4)
    gradient_near(torch.autograd.grad(policy, s, retain_graph=True)[0], case["grad_s"])
    far = attention_divergence(case["teacher"], s)
    torch.testing.assert_close(far, case["attn_kl"], rtol=0, atol=1e-5)
    gradient_near(torch.autograd.grad(far, s, retain_graph=True)[0], case["grad_attn_kl"])
    assert PAPER.weight(r) == pytest.approx(float(case["w"]), abs=1e-12)
    total = policy + PAPER.weight(r) ** 2 * far
    torch.testing.assert_close(total, case["total"], rtol=1e-4, atol=1e-4)
    gradient_near(torch.autograd.grad(total, s)[0], case["grad_total"])


def test_advantages_from_logits_are_the_authors(golden):
    with np.load(golden / "plus/stage2.npz") as arrays:
        logits, labels, wanted, mean = (
            torch.from_numpy(arrays[f"reward/{k}"]) for k in ("logits", "labels", "advantage", "mean_over_supervised")
        )
    learnt = labels != -100
    likely = logits.log_softmax(-1)[:, learnt].gather(2, labels[learnt][None, :, None].expand(len(logits), -1, -1))
    rewards = likely[..., 0].mean(1)
    torch.testing.assert_close(rewards, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(advantage(rewards[None])[0], wanted, rtol=0, atol=1e-4)


def test_the_schedule_is_the_authors(golden):
    facts = json.loads((golden / "plus/budget.json").read_text())
    budgets = Budgets.of(LLAVA, 576, None)
    assert list(budgets.r) == facts["r"]
    for progress, wanted in facts["P"].items():
        assert budgets.probabilities(float(progress)) == pytest.approx(wanted, abs=1e-12)
    weights = [budgets.weight(r) ** 2 for r in budgets.r]
    assert weights == pytest.approx(facts["weight_of_attn_kl"], abs=1e-12)
    for one in facts["draws"]:
        numbers = random.Random(one["python_seed"])
        assert [budgets.draw(t / one["T"], numbers)[0] for t in one["t"]] == one["r"]
    assert (
        Budgets.of(LLAVA, 576, 64).r == (41,) and Budgets.of(LLAVA, 576, 64).draw(0.0, random.Random(1), 3) == [41] * 3
    )


def test_budgets_of_other_shapes():
    assert Budgets.of(TwigConfig(16, 1, 1, 12), 64, None).r[0] >= 1
    few = Budgets.of(TwigConfig(6, 2, 2), 4, None)
    assert all(1 <= r <= 4 for r in few.r) and sum(few.probabilities(0.3)) == pytest.approx(1)
    assert PAPER.probabilities(1.0) == [1.0] + [0.0] * 6 and PAPER.most([1, 2], [41, 134]) == [41, 268]
    with pytest.raises(InputError, match="R is 20; legal is 36 to 432"):
        Budgets.of(LLAVA, 576, 20)
    with pytest.raises(InputError, match="keeps no visual token"):
        Budgets.of(LLAVA, 576, 36)


# ---------------------------------------------------------------------- Plackett-Luce


S = torch.tensor([0.05, 0.1, 0.15, 0.2, 0.22, 0.28])


def by_hand(s: torch.Tensor, order: tuple[int, ...]) -> float:
    left, product = 1.0, 1.0
    for token in order:
        product *= float(s[token]) / left
        left -= float(s[token])
    return product


def test_against_the_product_and_sums_to_one():
    orders = list(itertools.permutations(range(6), 3))
    found = log_probability(S.log()[None], torch.tensor(orders)[None])[0]
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert found.tolist() == pytest.approx([math.log(by_hand(S, order)) for order in orders], abs=1e-5)
    shifted = log_probability(S.log()[None] + 7.3, torch.tensor(orders)[None])[0]
    torch.testing.assert_close(shifted, found, rtol=1e-5, atol=1e-5)


def test_frequencies_are_the_probabilities():
    """Chi-square over all ordered pairs of 6 tokens, 30,000 draws; the 99.9 % point at 29 degrees of freedom is 58.3."""
    torch.manual_seed(0)
    count = 30_000
    drawn = draw(S.log()[None], torch.tensor([2]), count)[0].tolist()
    seen, pairs = Counter(map(tuple, drawn)), list(itertools.permutations(range(6), 2))
    expected = [count * by_hand(S, pair) for pair in pairs]
    assert sum((seen[p] - e) ** 2 / e for p, e in zip(pairs, expected, strict=True)) < 58.3


def test_draws_are_without_replacement_and_padded():
    torch.manual_seed(0)
    log_s = torch.randn(3, 9).log_softmax(-1)
    log_s[1, 5:] = -torch.inf  # a row with fewer tokens
    picks = draw(log_s, torch.tensor([4, 3, 9]), 50)
    assert picks.shape == (3, 50, 9)
    for b, r in enumerate((4, 3, 9)):
        for row in picks[b].tolist():
            assert len(set(row[:r])) == r and row[r:] == [-1] * (9 - r)
    assert picks[1].max() < 5
    found = log_probability(log_s.requires_grad_(True), picks)
    alone = log_probability(log_s[1:2, :5], picks[1:2, :, :3])
    torch.testing.assert_close(found[1:2], alone, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), log_s)
    assert torch.isfinite(gradient).all() and not gradient[1, 5:].any()


def test_a_score_that_underflows_is_drawn_last_and_has_a_number():
    log_s = torch.tensor([[0.0, -50.0, -300.0, -1000.0]])
    torch.manual_seed(0)
    picks = draw(log_s, torch.tensor([3]), 200)
    assert (picks[..., :3].sort(2).values == torch.tensor([0, 1, 2])).all()
    assert torch.isfinite(log_probability(log_s, picks)).all()


@pytest.fixture
def likeness():
    """Cosines of eight tokens in a plane, two of them the same."""
    torch.manual_seed(5)
    states = torch.randn(1, 8, 2)
    states[0, 6] = states[0, 1]
    return cosine(states)


def discounted_by_hand(s: torch.Tensor, likeness: torch.Tensor, order: tuple[int, ...]) -> float:
    left, product = s.double().clone(), 1.0
    for token in order:
        product *= float(left[token] / left.sum())
        left = left * (1 - likeness[0, token].double() ** 2).clamp(min=0)
        left[token] = 0
    return product


def test_discounted_sets_against_the_product(likeness):
    s, r = torch.rand(8) + 0.1, 3
    orders = [o for o in itertools.permutations(range(8), r) if discounted_by_hand(s, likeness, o) > 1e-9]
    found = discounted_log_probability(s.log()[None], spared(likeness), torch.tensor(orders)[None])[0]
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
    wanted = [math.log(discounted_by_hand(s, likeness, order)) for order in orders]
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)
    torch.manual_seed(0)
    count = 30_000
    seen = Counter(map(tuple, draw_discounted(s.log()[None], spared(likeness), torch.tensor([2]), count)[0].tolist()))
    pairs = list(itertools.permutations(range(8), 2))
    expected = [count * discounted_by_hand(s, likeness, pair) for pair in pairs]
    often = [(seen[p], e) for p, e in zip(pairs, expected, strict=True) if e > 5]
    assert sum(seen.values()) == count and not seen[(1, 6)] and len(often) > 30
    assert sum((n - e) ** 2 / e for n, e in often) < 100  # 55 degrees of freedom at most; their 99.97 % point


def test_where_nothing_is_alike_they_are_the_usual_ones():
    apart, picks = torch.zeros(1, 6, 6), torch.tensor([[[2, 0, 5], [1, 4, -1]]])
    torch.testing.assert_close(
        discounted_log_probability(S.log()[None], apart, picks), log_probability(S.log()[None], picks)
    )


def test_without_noise_they_are_what_pruning_picks(likeness, monkeypatch):
    """As long as anything is worth something, and each token once also behind that."""
    monkeypatch.setattr(sets, "_gumbel", lambda log_s, groups, _: torch.zeros(len(log_s), groups, log_s.shape[1]))
    s = torch.rand(1, 8) + 0.1
    picks = draw_discounted(s.log(), spared(likeness), torch.tensor([8]), 1)[0]
    assert sorted(picks[0].tolist()) == list(range(8))
    assert picks[0, :7].tolist() == discounted(s, likeness, torch.ones(1, 8, dtype=torch.bool), 7)[0].tolist()


def test_discounted_draws_are_without_replacement_padded_and_have_gradients(likeness):
    torch.manual_seed(0)
    log_s = torch.randn(2, 8).log_softmax(-1)
    log_s[1, 5:] = -torch.inf
    stays = spared(torch.cat([likeness, torch.ones(1, 8, 8)]))  # of the second row all are the same
    picks = draw_discounted(log_s, stays, torch.tensor([8, 3]), 50)
    for b, r in enumerate((8, 3)):
        for row in picks[b].tolist():
            assert len(set(row[:r])) == r and row[r:] == [-1] * (8 - r)
    assert picks[1].max() < 5
    found = discounted_log_probability(log_s.requires_grad_(True), stays, picks)
    (gradient,) = torch.autograd.grad(found.sum(), log_s)
    assert torch.isfinite(found).all() and torch.isfinite(gradient).all() and not gradient[1, 5:].any()


def test_the_gradient_of_the_estimator_is_the_exact_one():
    """Of the expected reward of 2 of 6 tokens: 40 groups of 512 sets under leave-one-out, against the sum over all pairs."""
    torch.manual_seed(1)
    worth = torch.tensor([1.0, 0.2, -0.5, 0.7, -1.0, 0.4])
    logits = S.log().clone().requires_grad_(True)
    pairs = torch.tensor(list(itertools.permutations(range(6), 2)))
    expected = (log_probability(logits.log_softmax(-1)[None], pairs[None])[0].exp() * worth[pairs].sum(1)).sum()
    (exact,) = torch.autograd.grad(expected, logits)
    found = []
    for _ in range(40):
        log_s = logits.log_softmax(-1)[None]
        picks = draw(log_s, torch.tensor([2]), 512)
        gains = advantage(worth[picks].sum(2), "leave-one-out")
        found.append(-torch.autograd.grad(policy_loss(log_s, picks, gains)[0], logits)[0])
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() < 4 * error).all() and error.max() < 0.1 * exact.abs().max()


def test_baselines():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    torch.testing.assert_close(advantage(rewards, "leave-one-out"), torch.tensor([[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]))
    group = advantage(rewards)
    assert group[0].std().item() == pytest.approx(1, abs=1e-5) and not group[1].any()


# ---------------------------------------------------------------------- rewards


@pytest.fixture
def prepared(world):
    torch.manual_seed(3)
    return prepare_twig(world / "base", Start(2, 2, pruning_head="released"), CPU, FP32, whole=True)


def states_of(prepared, batch):
    return TwigLesson(prepared.base, prepared.twig, None).read(batch)


def naive(prepared, batch, row: int, kept: torch.Tensor) -> torch.Tensor:
    """Log-likelihoods of the learnt words behind the first image, by the program that scores answers."""
    base, n = prepared.base, batch["lengths"][row]
    ids, labels = batch["input_ids"][row, :n].tolist(), batch["labels"][row, :n]
    first = int((labels != IGNORE).nonzero()[0])
    images = [int((r == base.image_token_id).sum()) // base.V for r in batch["input_ids"]]
    at = sum(images[:row])
    plan = plan_of(kept[None], int(kept.sum()), prepared.twig.config)
    prompts = embed(base, plan, [ids[:first]], batch["pixel_values"][at : at + images[row]])
    return score(base, None, plan, prompts, [ids[first:]])[0].log_probabilities[labels[first:] != IGNORE]


@pytest.mark.parametrize("K,F", [(2, 4), (1, 6), (2, 3)])
def test_rewards_are_the_pruned_bases_likelihoods(world, K, F):
    """Prefix shared, sets in one batch, two at a time: the same as one prompt and set after the other."""
    torch.manual_seed(3)
    prepared = prepare_twig(world / "base", Start(K, 2, F, pruning_head="released"), CPU, FP32, whole=True)
    batch = a_batch(world, prepared.base, [1, 2, 3])
    states, labels = states_of(prepared, batch), batch["labels"]
    image = states.visual >= 0
    torch.manual_seed(0)
    kept = (torch.rand(5, *image.shape) < 0.5) & image
    kept[0] = image
    kept[1] = False
    with torch.no_grad():
        found = Policy(at_once=2)._reward(states, labels, kept, prepared.base.V, prepared.twig, prepared.base)
    for g in range(5):
        for b in range(3):
            likely = naive(prepared, batch, b, kept[g, b])
            assert found.reward[g, b].item() == pytest.approx(likely.mean().item(), abs=1e-5)
            assert found.answers[b] == len(likely)


def test_a_full_set_that_stays_is_the_unpruned_base(world):
    prepared = prepare_twig(world / "base", Start(2, 2, 6, pruning_head="released"), CPU, FP32, whole=True)
    batch = a_batch(world, prepared.base, [1, 2])
    states = states_of(prepared, batch)
    with torch.no_grad():
        every = Policy()._reward(states, batch["labels"], (states.visual >= 0)[None], 4, prepared.twig, prepared.base)
        faithful = Policy(reward="fidelity")._reward(
            states, batch["labels"], (states.visual >= 0)[None], 4, prepared.twig, prepared.base
        )
        hidden = prepared.base.run(prepared.base.layers[2:], states).hidden
    for b in range(2):
        learnt = batch["labels"][b, 1:] != IGNORE
        logits = prepared.base.logits(hidden[b, :-1][learnt]).log_softmax(-1)
        wanted = logits.gather(1, batch["labels"][b, 1:][learnt][:, None]).mean()
        assert every.reward[0, b].item() == pytest.approx(wanted.item(), abs=1e-5)
        assert faithful.reward[0, b].item() == pytest.approx(0, abs=1e-5)


def test_fidelity_is_the_divergence_from_the_unpruned_base(world, prepared):
    batch = a_batch(world, prepared.base, [1])
    states, base = states_of(prepared, batch), prepared.base
    kept = torch.zeros_like(states.visual, dtype=torch.bool)
    with torch.no_grad():
        found = Policy(reward="fidelity")._reward(states, batch["labels"], kept[None], 0, prepared.twig, base)
        full = base.run(base.layers[2:], states).hidden
        cut = pruned_top(base, states, kept, 0, prepared.twig.config)
        places = (batch["labels"][0, 1:] != IGNORE).nonzero()[:, 0]
        p = base.logits(full[0, places]).log_softmax(-1)
        at = [cut.place[0].tolist().index(int(i)) for i in places]
        q = base.logits(cut.hidden[0, at]).log_softmax(-1)
    assert found.reward.item() == pytest.approx(-(p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-5)
    assert found.reward.item() < 0


def test_only_the_first_answer_is_rewarded_where_that_is_asked(world, prepared):
    batch = a_batch(world, prepared.base, [2])  # three turns
    states = states_of(prepared, batch)
    kept = states.visual >= 0
    labels = batch["labels"].clone()
    starts = (labels[0, 1:] != IGNORE) & (labels[0, :-1] == IGNORE)
    assert int(starts.sum()) == 3
    second = int(starts.nonzero()[1]) + 1
    alone = labels.clone()
    alone[0, second:] = IGNORE
    with torch.no_grad():
        one, other = (
            Policy(turns=turns)._reward(states, words, kept[None], 4, prepared.twig, prepared.base)
            for turns, words in (("first", labels), ("all", alone))
        )
        every = Policy()._reward(states, labels, kept[None], 4, prepared.twig, prepared.base)
    torch.testing.assert_close(one.reward, other.reward)
    assert one.answers < every.answers and one.reward != every.reward


def test_the_beginning_is_read_once(world, prepared, monkeypatch):
    """Tokens that enter a layer above K: the prefix of each row once, not for every set."""
    batch = a_batch(world, prepared.base, [1, 3])
    states = states_of(prepared, batch)
    kept = torch.zeros(6, *states.visual.shape, dtype=torch.bool)
    seen = []
    layer = prepared.base.layers[3]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2]))
    first = torch.where(states.visual >= 0, states.place, 10**6).min(1).values
    with torch.no_grad():
        begin = Beginning(prepared.base, prepared.twig.config, states, first)
        begin.top(kept[:3], 0)
        begin.top(kept[3:], 0)
    handle.remove()
    assert seen[0] == (2, int(first.max())) and len(seen) == 3
    assert all(rows == 6 and width < states.width - int(first.min()) for rows, width in seen[1:])


# ---------------------------------------------------------------------- the policy on models


def loss_of(prepared, batch, progress=0.3, **settings):
    torch.manual_seed(11)
    settings = {"groups": 6, **settings}
    lesson = PolicyLesson(prepared.base, prepared.twig, Policy(**settings))
    return lesson({**batch, "progress": progress})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reward": "fidelity", "turns": "first"},
        {"baseline": "leave-one-out", "attention": 1.0, "budget": 2.0},
        {"picks": "discounted", "budget": 2.0},
    ],
)
def test_gradients_reach_the_head_alone(world, prepared, settings):
    before = copy.deepcopy(prepared.base.model.state_dict())
    prepared.twig.requires_grad_(False)
    prepared.twig.pruning_head.requires_grad_(True)
    twig = {k: v.clone() for k, v in prepared.twig.state_dict().items() if "gate" not in k or "proj" in k}
    loss, figures = loss_of(prepared, a_batch(world, prepared.base, [1, 2, 4, 5]), **settings)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in prepared.twig.pruning_head.parameters())
    assert all(p.grad is None for p in prepared.base.model.parameters())
    assert equal(before, prepared.base.model.state_dict())
    assert all(torch.equal(prepared.twig.state_dict()[k], v) for k, v in twig.items())
    assert figures["means"]["reward"] < 0 and int(figures["answers"]) > 0


def test_text_alone_asks_nothing_of_the_head(world, prepared):
    loss, figures = loss_of(prepared, a_batch(world, prepared.base, [0, 4]))
    loss.backward()
    assert loss.item() == 0 and all(
        p.grad is not None and not p.grad.any() for p in prepared.twig.pruning_head.parameters()
    )
    assert int(figures["answers"]) == 0


@pytest.mark.parametrize(("picks", "pruning"), [("highest", "twig"), ("discounted", "twig-discount")])
@pytest.mark.parametrize(("budget", "R"), [(None, 1.6), (2.0, 2.0)])
def test_a_measurement_takes_the_best_set(world, prepared, picks, pruning, budget, R):
    """Without gradients: what generation under the smallest budget would keep, 1 and 2 of 4."""
    batch = a_batch(world, prepared.base, [1])
    with torch.no_grad():
        _, figures = loss_of(prepared, batch, picks=picks, budget=budget)
    vlm = twigvlm.load(world / "base", device="cpu", dtype="float32")
    vlm.twig = prepared.twig
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    first = int((labels != IGNORE).nonzero()[0])
    assert Policy(budget=budget).budgets(prepared.twig, prepared.base).r[0] == (1 if budget is None else 2)
    how = {"retained_tokens": R, "pruning": pruning}
    likely = vlm.score(ids[None, :first], [ids[first:].tolist()], batch["pixel_values"], **how)
    learnt = labels[first:] != IGNORE
    assert int(figures["right"]) == int(likely[0].greedy[learnt].sum())
    assert figures["means"]["reward"].item() == pytest.approx(
        likely[0].log_probabilities[learnt].mean().item(), abs=1e-5
    )


@dataclass(frozen=True)
class Toy(Policy):
    """A set is worth 1 if it keeps the token at `place`."""

    place: int = 0

    def _reward(self, part, labels, kept, *rest):
        found = kept[..., self.place].float()
        return SimpleNamespace(reward=found, right=found, answers=torch.ones(1))


def test_the_head_finds_the_patch_that_decides(world, prepared):
    """A toy reward: one token is worth all. After some steps it is the first."""
    batch = a_batch(world, prepared.base, [1])
    image = (batch["input_ids"][0] == prepared.base.image_token_id).nonzero()[:, 0]
    for wanted in (3, 0):
        head = prepared.twig.pruning_head
        with torch.no_grad():
            head.q_gate.weight.normal_(0, 0.3)
            head.k_gate.weight.normal_(0, 0.3)
        optimizer = torch.optim.AdamW(head.parameters(), lr=3e-2, weight_decay=0)
        lesson = PolicyLesson(prepared.base, prepared.twig, Toy(groups=16, budget=1.6, place=int(image[wanted])))
        torch.manual_seed(0)
        for _ in range(40):
            optimizer.zero_grad()
            lesson({**batch, "progress": 0.5})[0].backward()
            optimizer.step()
        with torch.no_grad():
            assert lesson(batch)[1]["right"] == 1


def test_a_sample_is_worth_the_same_in_any_company(world, prepared):
    """Measured rewards of a batch are those of its samples, whatever their lengths and images."""
    places = [1, 2, 4, 5]
    with torch.no_grad():
        together = loss_of(prepared, a_batch(world, prepared.base, places))[1]["means"]["reward"]
        alone = [loss_of(prepared, a_batch(world, prepared.base, [i]))[1]["means"]["reward"] for i in places]
    assert together.item() == pytest.approx(sum(a.item() for a in alone) / 4, abs=1e-5)


def test_several_images_share_a_budget(prepared):
    base, V = prepared.base, prepared.base.V
    ids = torch.randint(3, 60, (2, 30))
    ids[0, 2 : 2 + V] = ids[0, 8 : 8 + V] = ids[1, 5 : 5 + V] = base.image_token_id
    labels = torch.full_like(ids, IGNORE)
    labels[:, 20:24] = ids[:, 20:24]
    batch = {"input_ids": ids, "labels": labels, "lengths": [30, 28], "pixel_values": torch.randn(3, 3, 28, 28)}
    seen = []

    class Spy(Policy):
        def _reward(self, part, labels, kept, most, *rest):
            seen.append(kept)
            return super()._reward(part, labels, kept, most, *rest)

    torch.manual_seed(0)
    PolicyLesson(base, prepared.twig, Spy(groups=3, budget=2.0))({**batch, "progress": 0.1})[0].backward()
    r = Budgets.of(prepared.twig.config, V, 2.0).r[0]
    assert seen[0].sum(2).tolist() == [[2 * r, r]] * 3 and not Plan().random


def two_turns(base) -> tuple[dict, int]:
    """A sample with an image in either of two turns, and where the second turn begins; each answer has four words."""
    V = base.V
    turn = 3 + V + 4 + 4
    ids = torch.randint(3, 60, (1, 2 * turn))
    labels = torch.full_like(ids, IGNORE)
    for at in (0, turn):
        ids[0, at + 3 : at + 3 + V] = base.image_token_id
        labels[0, at + turn - 4 : at + turn] = ids[0, at + turn - 4 : at + turn]
    return {"input_ids": ids, "labels": labels, "lengths": [2 * turn], "pixel_values": torch.randn(2, 3, 28, 28)}, turn


def test_an_image_behind_the_asked_row_has_no_part(prepared):
    """Neither budget nor rewards: a measurement is that of the sample cut before it. Asked behind both, both count."""
    torch.manual_seed(0)
    base, seen = prepared.base, []
    batch, turn = two_turns(base)
    r = Budgets.of(prepared.twig.config, base.V, 2.0).r[0]

    class Spy(Policy):
        def _reward(self, part, labels, kept, *rest):
            found = super()._reward(part, labels, kept, *rest)
            seen.append((kept[:, 0, :turn].sum(1).tolist(), kept[:, 0, turn:].sum(1).tolist(), int(found.answers)))
            return found

    for turns in ("all", "first"):
        PolicyLesson(base, prepared.twig, Spy(groups=3, budget=2.0, turns=turns))({**batch, "progress": 0.1})[
            0
        ].backward()
        assert seen.pop() == ([r] * 3, [0] * 3, 4)
    lesson = PolicyLesson(base, prepared.twig, Spy(groups=3, budget=2.0, turns="random", attention=1.0))
    for _ in range(20):
        lesson({**batch, "progress": 0.1})
    for first, second, answers in seen:
        kept = [a + b for a, b in zip(first, second, strict=True)]
        assert answers == 4 and kept == ([2 * r] * 3 if any(second) else [r] * 3)
    assert {any(second) for _, second, _ in seen} == {True, False}
    cut = {name: batch[name][:, :turn] for name in ("input_ids", "labels")}
    cut |= {"lengths": [turn], "pixel_values": batch["pixel_values"][:1]}
    for reward in ("answer", "fidelity"):
        with torch.no_grad():
            one, other = (loss_of(prepared, b, budget=2.0, reward=reward)[1] for b in (batch, cut))
        assert one["means"]["reward"].item() == pytest.approx(other["means"]["reward"].item(), abs=1e-5)
        assert one["answers"] == other["answers"]


# ---------------------------------------------------------------------- runs


@pytest.fixture
def first(run, tmp_path):
    flags = ("--stage", "1", "--K", "2", "--T", "2", "--held-out", "0", "--max-steps", "2")
    assert run("first", *flags)[0] == 0
    return tmp_path / "first"


FLAGS = (
    "--stage",
    "2",
    "--K",
    "2",
    "--T",
    "2",
    "--held-out",
    "4",
    "--agreement",
    "labels",
    "--max-steps",
    "5",
    "--groups",
    "4",
)


@pytest.mark.slow
def test_a_run_changes_the_head_alone_and_goes_on_bit_for_bit(world, run, first, tmp_path, monkeypatch):
    words = (*FLAGS, "--init", str(first), "--save-steps", "1")
    code, said = run("whole", *words)
    assert code == 0 and "stage 2" in said and "reward" in said, said
    folder = tmp_path / "whole"
    before, after = twig_of(first), twig_of(folder)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"leaf_attention_module.q_gate.weight", "leaf_attention_module.k_gate.weight"}
    assert before.keys() == after.keys() and twigvlm.load(world / "base", folder, device="cpu").twig.config.pruning_head
    assert "Rewards" in (folder / "README.md").read_text()
    assert json.loads((folder / "run.json").read_text())["identity"].keys() - documented(
        "run.json", "field of `identity`"
    ) == documented("Of TwigVLM++'s stages", "field of `identity` in stage 2")
    assert report.history(folder)[-1].keys() - documented("log.jsonl") == documented(
        "Of TwigVLM++'s stages", "field of `log.jsonl` in stage 2"
    ) - {"attention"}
    real, count = PolicyLesson.__call__, [0]

    def lesson(self, batch):
        count[0] += 1
        if count[0] == 11:
            raise KeyboardInterrupt
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyLesson, "__call__", lesson)
        assert run("broken", *words)[0] == 130
    code, said = run("broken", *words)
    assert code == 0 and "continuing from" in said and equal(after, twig_of(tmp_path / "broken"))


def test_a_loss_that_is_no_number_stops(world, run, first, monkeypatch):
    real, count = PolicyLesson.__call__, [0]

    def lesson(self, batch):
        loss, figures = real(self, batch)
        count[0] += 1
        return (loss * float("nan") if count[0] == 4 else loss), figures

    monkeypatch.setattr(PolicyLesson, "__call__", lesson)
    code, said = run("nan", *FLAGS[:6], "--held-out", "0", "--max-steps", "5", "--groups", "4", "--init", str(first))
    assert code == 1 and "not finite at step 2" in said and "Traceback" not in said


def test_what_cannot_start_is_refused(world, run, first, tmp_path):
    plain = ("--K", "2", "--T", "2", "--held-out", "0", "--max-steps", "1")
    assert run("plain", *plain)[0] == 0
    for flags, match in (
        ((), "stage 2 starts from a twig with a pruning head"),
        (("--init", str(tmp_path / "plain")), "stage 2 starts from a twig with a pruning head"),
        (("--init", str(tmp_path / "plain"), "--head-init", "released"), "(--head-init identity)"),
        (("--init", str(first), "--groups", "1"), "groups is 1; 2 or more"),
        (("--init", str(first), "--budget", "9"), "R is 9; legal is"),
        (("--init", str(first), "--lora-rank", "2"), "only the pruning head learns"),
        (("--init", str(first), "--temperature", "2"), "temperature is 2.0; it is for --stage 1"),
        (("--init", str(first), "--T", "3"), "T = 3 was asked for, but the twig was grown with T = 2"),
        (("--init", str(first), "--attention-layer", "9"), "attention_layer is 9"),
    ):
        code, said = run("refused", "--stage", "2", "--K", "2", *(() if "--T" in flags else ("--T", "2")), *flags)
        assert code == 2 and match in said and "Traceback" not in said, said


def test_a_plain_twig_learns_to_choose_from_its_own_attention(world, run, tmp_path):
    """The twig stays the same to the bit, and both gates have moved from nothing."""
    plain = ("--K", "2", "--T", "2", "--held-out", "0", "--max-steps", "1")
    assert run("plain", *plain)[0] == 0
    words = (
        "--stage",
        "2",
        "--K",
        "2",
        "--T",
        "2",
        "--init",
        str(tmp_path / "plain"),
        "--head-init",
        "identity",
        "--groups",
        "4",
    )
    code, said = run("chooses", *words, "--held-out", "0", "--max-steps", "2")
    assert code == 0, said
    before, after = twig_of(tmp_path / "plain"), twig_of(tmp_path / "chooses")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    fresh = {name: tensor for name, tensor in after.items() if name not in before}
    assert {name.split(".")[-2] for name in fresh} == {"q_gate", "k_gate"} and all(
        tensor.any() for tensor in fresh.values()
    )
    assert stored_twig(tmp_path / "chooses")[1] == "identity"


def test_stage_2_finds_what_stage_1_left(tmp_path, monkeypatch):
    from twigvlm.training.data.loading import with_start
    from twigvlm.training.settings import Settings

    monkeypatch.chdir(tmp_path)
    settings = Settings(stage=2, base="some/llava", K=1)
    assert with_start(settings).init == "base"
    place = tmp_path / "runs/twig-llava-K1-T3-stage1"
    place.mkdir(parents=True)
    (place / "model.safetensors").touch()
    assert with_start(settings).init == "runs/twig-llava-K1-T3-stage1"
    assert with_start(Settings(stage=1, base="some/llava", K=1)).init == "base"
    assert with_start(Settings(stage=2, base="some/llava", K=1, init="other")).init == "other"


# ---------------------------------------------------------------------- beyond the released code


def test_samples_without_spread_teach_nothing():
    rewards = torch.tensor([[1.0, 1.001, 0.999], [1.0, 2.0, 6.0]])
    for baseline in ("group", "leave-one-out"):
        gains, usual = advantage(rewards, baseline, 0.02), advantage(rewards, baseline)
        assert not gains[0].any() and usual[0].any() and torch.equal(gains[1], usual[1])


def test_a_log_probability_by_token():
    log_s = torch.randn(2, 9).log_softmax(-1)
    picks = draw(log_s, torch.tensor([4, 2]), 6)
    gains = torch.randn(2, 6)
    found = policy_loss(log_s, picks, gains, by_token=True)
    torch.testing.assert_close(found, policy_loss(log_s, picks, gains) / torch.tensor([4.0, 2.0]))


def test_antithetic_sets_are_drawn_as_they_would_be_and_oppose_each_other():
    """Chi-square as above over the second of each pair; pairs share fewer tokens than strangers do."""
    torch.manual_seed(0)
    count = 30_000
    drawn = draw(S.log()[None], torch.tensor([2]), 2 * count, antithetic=True)[0]
    pairs = list(itertools.permutations(range(6), 2))
    expected = [count * by_hand(S, pair) for pair in pairs]
    for half in (drawn[::2], drawn[1::2]):
        seen = Counter(map(tuple, half.tolist()))
        assert sum((seen[p] - e) ** 2 / e for p, e in zip(pairs, expected, strict=True)) < 58.3
    shared = (drawn[::2, :, None] == drawn[1::2, None]).any(2).float().mean()
    strangers = (drawn[::2, :, None] == drawn[1::2].roll(1, 0)[:, None]).any(2).float().mean()
    assert shared < 0.8 * strangers
    assert draw(S.log()[None], torch.tensor([2]), 5, antithetic=True).shape == (1, 5, 2)


def test_a_lower_temperature_draws_closer_to_the_best_set(world, prepared):
    batch, seen = a_batch(world, prepared.base, [1, 2, 3]), {}
    for temperature in (1e-4, 1.0, 50.0):

        class Spy(Policy):
            def _reward(self, part, labels, kept, *rest):
                seen.setdefault(self.temperature, []).append(kept)
                return super()._reward(part, labels, kept, *rest)

        torch.manual_seed(0)
        lesson = PolicyLesson(prepared.base, prepared.twig, Spy(groups=64, budget=1.6, temperature=temperature))
        lesson({**batch, "progress": 1.0})[0].backward()
    with torch.no_grad():
        lesson(batch)
    best = seen[50.0][-1]
    hits = [(seen[t][0] & best).sum() / seen[t][0].sum() for t in (1e-4, 1.0, 50.0)]
    assert hits[0] > 0.9 > hits[1] >= hits[2] - 0.05


def test_a_drawn_turn_is_asked_and_rewarded_alone(world, prepared):
    """A sample of three turns: each is drawn, its row is asked, its answer alone is counted; measured, it is the first."""
    batch = a_batch(world, prepared.base, [5])
    labels = batch["labels"]
    begins = ((labels[:, 1:] != IGNORE) & (labels[:, :-1] == IGNORE)).nonzero()[:, 1].tolist()
    assert len(begins) == 3
    said = (labels[0] != IGNORE).long().cumsum(0)
    ends = [int(said[n]) for n in (*begins[1:], -1)]
    sizes = [end - before for before, end in zip([0, *ends], ends, strict=False)]
    seen: Counter = Counter()

    class Spy(Policy):
        def _reward(self, part, labels, kept, most, twig, base, asked=None):
            found = super()._reward(part, labels, kept, most, twig, base, asked)
            seen[int(asked), int(found.answers)] += 1
            return found

    torch.manual_seed(0)
    lesson = PolicyLesson(prepared.base, prepared.twig, Spy(groups=2, turns="random"))
    for _ in range(30):
        lesson({**batch, "progress": 0.5})
    assert set(seen) == set(zip(begins, sizes, strict=True)) and min(seen.values()) >= 4
    seen.clear()
    with torch.no_grad():
        lesson(batch)
    assert set(seen) == {(begins[0], sizes[0])}


def test_a_run_with_all_of_them(run, first, tmp_path):
    more = (
        "--reward-turns",
        "random",
        "--advantage-floor",
        "0.0001",
        "--policy-temperature",
        "0.5",
        "--by-token",
        "--antithetic",
        "--picks",
        "discounted",
    )
    code, said = run("out", *FLAGS, "--init", str(first), *more)
    assert code == 0, said
    identity = json.loads((tmp_path / "out/run.json").read_text())["identity"]
    assert identity["policy_temperature"] == 0.5 and identity["by_token"] and identity["reward_turns"] == "random"
    assert identity["picks"] == "discounted"
    for flags, match in (
        (("--policy-temperature", "0"), "policy_temperature is 0.0; a number above 0"),
        (("--advantage-floor", "-1"), "advantage_floor is -1.0; 0 or more"),
    ):
        code, said = run("refused", *FLAGS, "--init", str(first), *flags)
        assert code == 2 and match in said, said
    code, said = run("refused", "--stage", "1", "--antithetic")
    assert code == 2 and "antithetic is True; it is for --stage 2" in said
