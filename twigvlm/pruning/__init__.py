"""Which visual tokens stay, and after which layer: a method answers with a selection, decoding.prefill cuts."""

from __future__ import annotations

import re

from ..errors import InputError
from .budget import average_tokens, kept_tokens, legal_range
from .methods import METHODS
from .plan import Composed, Method, Plan, Shape, TowerMethod
from .reducer import Reducer, Tokens, View
from .rule import Given, Keep, Probe, Rule, Seen, Selection, Wipe
from .spec import find_method

__all__ = [
    "METHODS", "Composed", "Given", "Keep", "Method", "Plan", "Probe", "Reducer", "Rule", "Seen", "Selection", "Shape",
    "Tokens", "TowerMethod", "View", "Wipe", "average_tokens", "find_method", "kept_tokens", "legal_range", "plan_for",
]  # fmt: skip


def plan_for(method: str, R: float | None, V: int, twig, query: str = "last", base: str = "") -> Plan:
    """The plan that leaves an average of R visual tokens per layer; R = None is the empty plan.

    `method` is a name with settings (`spec.find_method`), `twig` the TwigConfig that says L, K and F,
    `base` the name of the base on which methods are calibrated. Raises
    InputError for an unknown method, setting or query, an R outside the method's legal range, or a pruning head that is
    asked and not there.
    """
    found = find_method(method, query)
    plan = Plan() if R is None else found.plan(R, Shape(twig.L, V, twig.K, twig.F, base))
    if plan.needs_head and not twig.pruning_head:
        without = re.sub(r"score\s*=\s*head", "score=attention", method)
        raise InputError(
            f"pruning {method!r} asks a pruning head, and this twig has none; take its attention ({without}), or "
            "train a head: STAGE=1 bash scripts/v1_5/train_twig.sh"
        )
    return plan
