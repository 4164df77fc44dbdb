"""How a request wants its answer: OpenAI's parameters and the object `twig`, over the server's own flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields as fields_of
from typing import Any, get_type_hints

from ...config import AUTO, MOST_NODES, GenerationSettings
from ...errors import InputError
from ...pruning import find_method
from ...pruning.plan import Composed
from ..faults import refused
from . import fields

SEEDS = (-(2**63), 2**63 - 1)
MOST_TOKENS = 2**31 - 1
MOST_STOPS, LONGEST_STOP = 16, 1000
HOTTEST = 2.0
TWIG = ("tokens", "method", "query", "draft", "tree", "confidence", "top_k")
USUAL = {f.name: f.default for f in fields_of(GenerationSettings)}

Options = dict[str, Any]


def read(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> Options:
    """Arguments of `TwigVLM.generate`; `defaults` are the server's. Raises Fault."""
    options = dict(defaults)
    if (limit := _limit(body)) is not None:
        options["max_new_tokens"] = limit
    if body.get("seed") is not None:
        options["seed"] = fields.whole(body["seed"], "seed", *SEEDS)
    twig = fields.mapping(body["twig"], "twig") if body.get("twig") is not None else {}
    fields.unknown(twig, TWIG, "twig")
    _sampling(body, twig, options)
    _pruning(twig, options, defaults)
    _drafting(twig, options)
    try:
        GenerationSettings(**options)
    except InputError as fault:
        raise refused("twig", f"twig: {_named(str(fault))}") from fault
    return options


def stops(given: Any) -> tuple[str, ...]:
    """One stop string or several."""
    if given is None:
        return ()
    words = [given] if isinstance(given, str) else given
    good = isinstance(words, list) and len(words) <= MOST_STOPS and all(isinstance(word, str) for word in words)
    if not good or not all(0 < len(word) <= LONGEST_STOP for word in words):
        raise refused(
            "stop", f"stop is {fields.shown(given)}; a text or up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} letters are needed"
        )  # fmt: skip
    return tuple(words)


def _limit(body: Mapping[str, Any]) -> int | None:
    """The longest answer, under the older of its names or the newer."""
    names = ("max_tokens", "max_completion_tokens")
    given = {name: fields.whole(body[name], name, 1, MOST_TOKENS) for name in names if body.get(name) is not None}
    if len(set(given.values())) > 1:
        raise refused(names[0], f"{names[0]} and {names[1]} are one limit under two names; give one of them")
    return next(iter(given.values()), None)


def _sampling(body: Mapping[str, Any], twig: Mapping[str, Any], options: Options) -> None:
    """Temperature 0 is greedy, and then nothing filters; so is top_p 0."""
    heat = options["temperature"] if options["do_sample"] else 0.0
    if body.get("temperature") is not None:
        heat = fields.number(body["temperature"], "temperature", 0, HOTTEST)
    top_p = options["top_p"]
    if body.get("top_p") is not None:
        top_p = fields.number(body["top_p"], "top_p", 0, 1)
    top_k = options["top_k"]
    if "top_k" in twig:
        top_k = None if twig["top_k"] is None else fields.whole(twig["top_k"], "twig.top_k", 1, MOST_TOKENS)
    sampled = heat > 0 and (top_p is None or top_p > 0)
    options |= {"do_sample": sampled, "temperature": heat if sampled else 1.0}
    options |= {"top_p": top_p if sampled else None, "top_k": top_k if sampled else None}


def _pruning(twig: Mapping[str, Any], options: Options, defaults: Mapping[str, Any]) -> None:
    if "tokens" in twig:
        told = twig["tokens"]
        options["retained_tokens"] = None if told is None else fields.number(told, "twig.tokens", 0, MOST_TOKENS)
    if twig.get("query") is not None:
        options["query"] = fields.chosen(twig["query"], "twig.query", ("last", "text"))
    if twig.get("method") is not None:
        options["pruning"] = fields.text(twig["method"], "twig.method")
        if options["pruning"] != defaults["pruning"]:
            _check_harmless(options["pruning"], options["query"])


def _check_harmless(spec: str, query: str) -> None:
    """A client chooses a method and its numbers; files are the server's to name."""
    try:
        method = find_method(spec, query)
    except InputError as fault:
        raise refused("twig.method", f"twig.method: {fault}") from fault
    for part in (method.first, method.then) if isinstance(method, Composed) else (method,):
        hints = get_type_hints(type(part))
        for one in fields_of(part):
            if hints[one.name] in (str, str | None) and getattr(part, one.name) != one.default:
                raise refused(
                    "twig.method", f"twig.method sets {part.name}:{one.name}, which names files; only the server's --pruning can"
                )  # fmt: skip


def _drafting(twig: Mapping[str, Any], options: Options) -> None:
    """A tree and a chain say the same thing otherwise: what is asked takes the place of what the server would do."""
    asked: Options = {}
    if twig.get("draft") is not None:
        auto = twig["draft"] == AUTO
        asked["draft_length"] = AUTO if auto else fields.whole(twig["draft"], "twig.draft", 0, MOST_NODES)
    if twig.get("confidence") is not None:
        asked["draft_confidence"] = fields.number(twig["confidence"], "twig.confidence", 0, 1)
    if twig.get("tree") is not None:
        tree = twig["tree"]
        if not isinstance(tree, str):
            numbers = tree if isinstance(tree, list) else [tree]
            tree = ",".join(str(fields.whole(n, "twig.tree", 1, MOST_NODES)) for n in numbers)
        options |= {name: USUAL[name] for name in ("draft_length", "draft_confidence")}
        asked["tree"] = tree
    elif asked and not (asked.keys() == {"draft_length"} and asked["draft_length"] == 0):
        options["tree"] = None
    options |= asked


def checker(vlm, name: str) -> Callable[[Options], None]:
    """Raises Fault for options that this model cannot follow; `name` is what clients call it."""
    good: dict[tuple, None] = {}

    def check(options: Options) -> None:
        key = tuple(options[part] for part in ("pruning", "retained_tokens", "query"))
        if key in good:
            return
        try:
            vlm.check(**options)
        except InputError as fault:
            raise refused("twig", f"twig: {_named(str(fault)).replace(str(vlm.base_name), name)}") from fault
        if len(good) > 1000:
            good.clear()
        good[key] = None

    return check


def _named(message: str) -> str:
    """By the names that clients know."""
    for ours, theirs in (("draft_length", "draft"), ("draft_confidence", "confidence"), ("retained_tokens", "tokens")):
        message = message.replace(ours, theirs)
    return message


def within(options: Options, room: int) -> Options:
    """An answer ends where the context does, so that no number is too large."""
    return {**options, "max_new_tokens": min(options["max_new_tokens"], max(room, 1))}
