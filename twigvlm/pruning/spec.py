"""A pruning method as people write it: `fastv`, `sparsevlm:version=1.0,faithful`, `visionzip:keep=288+twig`."""

from __future__ import annotations

import re
from dataclasses import Field, fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import InputError
from .calibrated import missing
from .methods import METHODS
from .plan import Composed, Method, Plan, Shape, TowerMethod

LLAVA = Shape(L=32, V=576, K=2, F=24)  # LLaVA-1.5-7B with the released twigs
BUDGETS = (192.0, 128.0, 64.0)  # of the papers' tables


def find_method(spec: str, query: str = "last") -> Method:
    """The method that `spec` says, with its settings. Raises InputError for what is unknown, with the list of what is known.

    `query` goes to a decoder method that has such a setting and was not given one.
    """
    if query not in ("last", "text"):
        raise InputError(f"query is {query!r}; 'last' or 'text' is needed")
    parts = [_one(part, query) for part in str(spec).split("+")]
    if len(parts) == 1:
        return parts[0]
    if len(parts) > 2 or not isinstance(parts[0], TowerMethod) or isinstance(parts[1], TowerMethod):
        before = ", ".join(name for name, kind in METHODS.items() if issubclass(kind, TowerMethod))
        raise InputError(
            f"pruning is {spec!r}; one method before the decoder ({before}) and one within it can be joined, in this order"
        )
    return Composed(first=parts[0], then=parts[1])


def spec_of(method: Method, query: str = "last") -> str:
    """The one way to write a method: its settings in their order, without those that are as they usually are."""
    if isinstance(method, Composed):
        return f"{spec_of(method.first, query)}+{spec_of(method.then, query)}"
    usual = _one(method.name, query)
    said = [(f.name, getattr(method, f.name)) for f in fields(method)]
    words = [_word(name, value) for name, value in said if value != getattr(usual, name)]
    return f"{method.name}:{','.join(words)}" if words else method.name


def _word(name: str, value: Any) -> str:
    return name if value is True else f"{name}={str(value).lower() if value is False else value}"


@lru_cache(maxsize=256)
def some_plan(method: Method, shape: Shape = LLAVA) -> Plan:
    """A plan of the method, for what does not depend on budget and base: whether it asks a twig, whether it draws.

    The empty plan where no budget that is tried can be had.
    """
    # Thresholds change neither the one nor the other.
    method = replace(method, **dict.fromkeys(missing(method), 1.0))
    try:
        low, high = method.legal(shape)
    except InputError:
        return Plan()
    for R in (*BUDGETS, (low + high) / 2, high):
        try:
            if plan := method.plan(float(R), shape):
                return plan
        except InputError:
            continue
    return Plan()


def needs_of(method: Method) -> list[str]:
    """What a method needs beyond a base: "twig", "class token", …; what its plan asks for is among it, said or not."""
    plan = some_plan(method)
    said = [part.needs for part in (method, *_parts(method))]
    asked = ["twig"] * plan.needs_twig + ["class token"] * (plan.tower is not None and plan.tower.class_token)
    asked += ["calibration"] * any(missing(part) for part in (method, *_parts(method)))
    return list(dict.fromkeys(need for text in (*said, *asked) for need in filter(None, text.split(", "))))


def classless() -> list[str]:
    """Names of the methods before the decoder that do without a class token."""
    return [name for name, kind in METHODS.items() if issubclass(kind, TowerMethod) and "class token" not in kind.needs]


def _parts(method: Method) -> tuple[Method, ...]:
    return (method.first, method.then) if isinstance(method, Composed) else ()


def _one(spec: str, query: str) -> Method:
    name, _, rest = spec.strip().partition(":")
    if name not in METHODS:
        raise InputError(f"pruning is {name!r}; known methods: {', '.join(METHODS)}")
    kind = METHODS[name]
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
    given: dict[str, Any] = {}
    for word in filter(None, (w.strip() for w in re.split("[,;]", rest))):
        key, equals, text = word.partition("=")
        key = key.strip()
        if key not in known:
            listed = ", ".join(shown(f) for f in known.values())
            raise InputError(f"pruning {name!r} has no setting {key!r}; known: {listed}")
        given[key] = _read(name, key, text.strip() if equals else None, hints[key])
    if "query" in known:
        given.setdefault("query", query)
    return kind(**given)


def shown(one: Field) -> str:
    """A setting and its usual value, as people write it."""
    return one.name if one.default is False else f"{one.name}={'...' if one.default is None else one.default}"


def _read(name: str, key: str, text: str | None, hint: Any) -> Any:
    """A setting's value as its field wants it; a word without = is a switch."""
    kinds = [
        kind
        for kind in (get_args(hint) if get_origin(hint) not in (None, Literal) else [hint])
        if kind is not type(None)
    ]
    kind = kinds[0]
    if kind is bool:
        if text in (None, "true", "false"):
            return text != "false"
        raise InputError(f"{name}:{key} is {text!r}; it is a switch: write it, or {key}=false")
    if text is None:
        raise InputError(f"{name}:{key} needs a value: {key}=...")
    if get_origin(kind) is Literal:
        legal = get_args(kind)
        if found := [one for one in legal if str(one) == text]:
            return found[0]
        raise InputError(f"{name}:{key} is {text!r}; {', '.join(map(str, legal))} can be")
    try:
        return kind(text)
    except ValueError:
        what = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise InputError(f"{name}:{key} is {text!r}; {what} is needed") from None
