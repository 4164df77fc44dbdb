"""What TwigVLM++'s stages add to a training's plan: operations and memory of teacher, rewards and pruning head, by arithmetic.

The counting is `training.cost`'s: a multiply-add is two operations, a backward pass twice a forward pass, causal attention
half of the square. Legend: D width, H feed-forward width, S tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...config import TwigConfig
from ..settings import Settings
from .budgets import Budgets
from .distil import teacher_layer

BEFORE = 35  # text tokens before the first image, in LLaVA's template
LOGITS = (
    10  # bytes a word of the vocabulary and position without gradient: bf16 logits, fp32 logits and their logarithm
)
STATES = 8  # numbers of D a visual token that autograd keeps of the pruning head: its input, gates, gated keys, in fp32
SINGLE, HALF = 4, 2


@dataclass(frozen=True)
class Base:
    """Parameters of one decoder layer, of the language head and of the pruning head, and the sizes that work follows from."""

    layer: int
    head: int
    gates: int
    D: int
    H: int
    vocabulary: int
    visual: int
    letters: TwigConfig

    def forward(self, layers: int, tokens: int, behind: int = 0) -> int:
        """Through so many layers: `tokens` new ones behind others."""
        return layers * (2 * self.layer * tokens + 4 * self.D * (tokens * behind + tokens * tokens // 2))


def expected_r(base: Base, settings: Settings) -> float:
    """Visual tokens of an image that a set keeps, averaged over stage 2, or those behind which stage 1's pruned teacher reads."""
    budgets = Budgets.of(base.letters, base.visual, settings.budget)
    if settings.stage == 1:
        return (budgets.r[0] + budgets.r[-1]) / 2
    steps = 1000
    each = [budgets.probabilities(step / steps) for step in range(steps)]
    return sum(p * r for row in each for p, r in zip(row, budgets.r, strict=True)) / steps


def stage_flops(base: Base, settings: Settings, tokens: int, answers: int) -> dict[str, int]:
    """Floating-point operations of one sample with one image, by part, beside tower, trunk and twig."""
    K, L, F = base.letters.K, base.letters.L, min(base.letters.F, base.letters.L)
    text, said = tokens - base.visual, 2 * base.head * answers
    look = base.forward(teacher_layer(settings.attention_layer, K, L) - K, tokens)
    parts = {"pruning head": 3 * base.gates * (base.visual + 1)}  # two products' halves, forward and backward
    r = round(expected_r(base, settings))
    if settings.stage == 1:
        if settings.prediction_weight and settings.teacher == "whole":
            return {"teacher": base.forward(L - K, tokens) + said} | parts
        pruned = base.forward(F - K, text + r) + base.forward(L - F, text) + said if settings.prediction_weight else 0
        return {"teacher": pruned + (look if settings.attention_weight else 0)} | parts
    after = text - BEFORE
    one = base.forward(F - K, after + r, BEFORE) + base.forward(L - F, after, BEFORE) + said
    teacher = base.forward(L - K, tokens) + said if settings.reward == "fidelity" else 0
    teacher += look if settings.attention_weight else 0
    rewards = base.forward(L - K, BEFORE) + settings.groups * one
    return ({"teacher": teacher} if teacher else {}) | {"rewards": rewards} | parts


def stage_memory(base: Base, settings: Settings, tokens: int, answers: int) -> int:
    """Bytes a sample of what the stage holds at its peak beside a twig that learns (stage 1), or in all (stage 2)."""
    kept = SINGLE * STATES * base.D * (base.visual + 1)
    flight = HALF * (6 * base.D + 3 * base.H)  # of a token in one layer, without gradient
    if settings.stage == 1:
        return kept + tokens * flight + answers * LOGITS * base.vocabulary
    r, K, L = Budgets.of(base.letters, base.visual, settings.budget).r[-1], base.letters.K, base.letters.L
    sets, text, F = min(settings.sets_at_once, settings.groups), tokens - base.visual, min(base.letters.F, L)
    caches = HALF * 2 * base.D * (BEFORE * (L - K) + sets * (text + r) * max(F - K, L - F))
    one = (text + r) * (flight + 2 * HALF * base.D) + answers * LOGITS * base.vocabulary
    return kept + tokens * (flight + HALF * base.D) + caches + sets * (one + HALF * base.D * tokens)
