"""How likely given answers are: one pass over prompt and answer, under the same pruning as an answer is written.

Legend: B rows, n tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..model.finite import NotFinite, ScoresNotFinite, finite
from ..model.stream import join
from ..model.trunk import Trunk
from ..model.twig import Twig
from ..pruning.plan import Plan
from .prefill import Prompts, State, read


@dataclass(frozen=True)
class Likelihood:
    """Of one answer: natural log-probability of each token (fp32), and whether it was the base's first choice."""

    log_probabilities: torch.Tensor
    greedy: torch.Tensor


@torch.inference_mode()
def score(
    trunk: Trunk, twig: Twig | None, plan: Plan, prompts: Prompts, targets: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """Token ids of one answer a prompt, of any lengths → their likelihoods. Prompt and answer must fit the context."""
    state = read(trunk, twig if plan.needs_twig else None, plan, prompts)
    width = max(max(map(len, targets)), 1)
    wanted = torch.zeros(len(targets), width, dtype=torch.long)
    for row, target in zip(wanted, targets, strict=True):
        row[: len(target)] = torch.tensor(target, dtype=torch.long)
    wanted = wanted.to(state.length.device)
    fed = torch.tensor([max(len(t) - 1, 0) for t in targets], device=wanted.device)  # the last one is asked, not read
    logits = trunk.logits(_hidden(state, wanted, fed))
    found = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0].where(finite(logits), torch.nan)
    if state.sound is not None:
        found = found.where(state.sound[:, None], torch.inf)  # no probability is that large
    found = found.cpu()
    if found.isposinf().any():
        raise ScoresNotFinite(plan.needs_twig)
    greedy = (logits.argmax(-1) == wanted).cpu()
    likely = [Likelihood(found[b, : len(t)], greedy[b, : len(t)]) for b, t in enumerate(targets)]
    if any(one.log_probabilities.isnan().any() for one in likely):
        raise NotFinite("the base's logits are not finite")
    return likely


def _hidden(state: State, wanted: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
    """[B, n, D] that left the last layer at the token before each wanted one."""
    n = wanted.shape[1]
    steps = torch.arange(n - 1, device=wanted.device)
    place = torch.where(steps < fed[:, None], state.length[:, None] + steps, -1)
    nodes = [state.climb(state.trunk.tokens(wanted[:, :-1], place), state.low)] if n > 1 else []
    if state.plan.evict is None:
        top = state.climb(join([state.awaiting, *nodes]), state.high)
        return top.tail(top.count() - fed - 1, n)
    top = state.settle()  # what is evicted after prefill must be gone before the answer is read
    return torch.cat([top.tail(top.count() - 1, 1), *(state.climb(s, state.high).hidden for s in nodes)], 1)
