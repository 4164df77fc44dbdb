"""Which visual tokens stay, and after which layer: a method answers with a selection, decoding.prefill cuts."""

from __future__ import annotations

from ..errors import InputError
from .budget import average_tokens, kept_tokens, legal_range
from .methods import METHODS
from .plan import Given, Keep, Method, Plan, Probe, Rule, Seen, Selection, Shape, Wipe

__all__ = [
    "METHODS", "Given", "Keep", "Method", "Plan", "Probe", "Rule", "Seen", "Selection", "Shape", "Wipe",
    "average_tokens", "find_method", "kept_tokens", "legal_range", "plan_for",
]  # fmt: skip


def find_method(name: str, query: str = "last") -> Method:
    """The method of that name. Raises InputError for an unknown name or query."""
    if name not in METHODS:
        raise InputError(f"pruning is {name!r}; known methods: {', '.join(METHODS)}")
    if query not in ("last", "text"):
        raise InputError(f"query is {query!r}; 'last' or 'text' is needed")
    kind = METHODS[name]
    return kind(query=query) if "query" in kind.__dataclass_fields__ else kind()


def plan_for(method: str, R: float | None, V: int, twig, query: str = "last") -> Plan:
    """The plan that leaves an average of R visual tokens per layer; R = None is the empty plan.

    `twig` is the TwigConfig that says L, K and F. Raises InputError for an unknown method or query, or
    an R outside the method's legal range.
    """
    found = find_method(method, query)
    return Plan() if R is None else found.plan(R, Shape(twig.L, V, twig.K, twig.F))
