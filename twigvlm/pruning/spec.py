"""A pruning method as people write it: `fastv`, `sparsevlm:version=1.0,faithful`, `visionzip:keep=288+twig`."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import InputError
from .methods import METHODS
from .plan import Composed, Method, TowerMethod


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


def _one(spec: str, query: str) -> Method:
    name, _, rest = spec.strip().partition(":")
    if name not in METHODS:
        raise InputError(f"pruning is {name!r}; known methods: {', '.join(METHODS)}")
    kind = METHODS[name]
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
    given: dict[str, Any] = {}
    for word in filter(None, (w.strip() for w in rest.split(","))):
        key, equals, text = word.partition("=")
        key = key.strip()
        if key not in known:
            shown = ", ".join(_shown(f) for f in known.values())
            raise InputError(f"pruning {name!r} has no setting {key!r}; known: {shown}")
        given[key] = _read(name, key, text.strip() if equals else None, hints[key])
    if "query" in known:
        given.setdefault("query", query)
    return kind(**given)


def _shown(one: Field) -> str:
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
