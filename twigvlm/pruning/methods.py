"""The catalogue of pruning methods: name → plan."""

from __future__ import annotations

from collections.abc import Callable

from ..config import TwigConfig
from ..errors import InputError
from .budget import kept_tokens
from .plan import Plan, Probe, Rows, Stage


def _between(probe: Probe | None, r: int, twig: TwigConfig, seed: int = 0) -> Plan:
    """Keep r between K and F, none above: one budget for every signal, so that signals compare."""
    wipe = (Stage(twig.F, 0),) if twig.F < twig.L else ()
    return Plan((Stage(twig.K, r, probe, seed), *wipe))


def _twig(r: int, twig: TwigConfig, query: Rows, seed: int) -> Plan:
    return _between(Probe("twig", query), r, twig)


def _layer_attention(r: int, twig: TwigConfig, query: Rows, seed: int) -> Plan:
    if twig.K == 0:
        raise InputError(
            "pruning 'layer-attention' reads base layer K - 1, and with K = 0 there is none; K >= 1 is needed"
        )
    return _between(Probe("base", query, layer=twig.K - 1), r, twig)


def _random(r: int, twig: TwigConfig, query: Rows, seed: int) -> Plan:
    return _between(None, r, twig, seed)


METHODS: dict[str, Callable[[int, TwigConfig, Rows, int], Plan]] = {
    "twig": _twig,  # the last twig layer's attention: TwigVLM, paper section 3.2
    "layer-attention": _layer_attention,  # the base's own layer K-1: FastV's signal under the same budget
    "random": _random,  # the floor
}


def plan_for(method: str, R: float | None, V: int, twig: TwigConfig, query: Rows = "last", seed: int = 0) -> Plan:
    """The plan that leaves an average of R visual tokens per layer; R = None is the empty plan.

    Raises InputError for an unknown method or query, or an R outside the legal range.
    """
    if method not in METHODS:
        raise InputError(f"pruning is {method!r}; known methods: {', '.join(METHODS)}")
    if query not in ("last", "text"):
        raise InputError(f"query is {query!r}; 'last' or 'text' is needed")
    if R is None:
        return Plan()
    r = kept_tokens(R, twig.L, V, twig.K, twig.F)
    return METHODS[method](r, twig, query, seed)
