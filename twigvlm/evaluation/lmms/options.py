"""What lmms-eval says: model_args, read into arguments of `load` and `generate`, and a task's generation_kwargs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_args, get_type_hints

from ...config import GenerationSettings, ModelSettings
from ...errors import InputError

DEFAULT_NEW_TOKENS = 1024  # where a task names no limit


def _text(name: str, value: Any) -> str:
    return str(value)


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return value if isinstance(value, (int, float)) else float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} is {value!r}; a number is needed") from None


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if not math.isfinite(number) or number != int(number):
        raise InputError(f"{name} is {value!r}; a whole number is needed")
    return int(number)


def _switch(name: str, value: Any) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False, "on": True, "off": False, "yes": True, "no": False}
    if (word := str(value).lower()) not in known:
        raise InputError(f"{name} is {value!r}; true or false is needed")
    return known[word]


Reader = Callable[[str, Any], Any]


def _reader(one: Field, hint: Any) -> Reader:
    """How a value of this field is read, by its type."""
    if read := one.metadata.get("parse"):

        def parsed(name: str, value: Any) -> Any:
            try:
                return read(str(value))
            except ValueError:
                raise InputError(f"{name} is {value!r}; {one.metadata['help']}") from None

        return parsed
    kinds = get_args(hint) or (hint,)
    return next((reader for kind, reader in ((bool, _switch), (int, _whole), (float, _number)) if kind in kinds), _text)


def _readers(kind: type, leave: Collection[str] = ()) -> dict[str, Reader]:
    hints = get_type_hints(kind)
    return {f.name: _reader(f, hints[f.name]) for f in fields(kind) if f.name not in leave}


TASKS_OWN = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p")  # what a task's generation_kwargs say
LOADING = _readers(ModelSettings)  # arguments of twigvlm.load
WRITING = _readers(GenerationSettings, (*TASKS_OWN, "seed", "traced"))  # options of TwigVLM.generate
RUNNING: dict[str, Reader] = {"speculation": _switch, "batch_size": _whole, "seed": _whole, "blank_line_stops": _switch}
OTHER_NAMES = {"pretrained": "base", "R": "retained_tokens"}
NAMES = (*OTHER_NAMES, *LOADING, *WRITING, *RUNNING)


@dataclass(frozen=True)
class Options:
    """The model_args, sorted by who takes them; what was not given is absent."""

    loading: dict[str, Any] = field(default_factory=dict)
    writing: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    seed: int | None = None
    speculation: bool | None = None  # None: where there is a twig
    # lmms-eval gives a task that names no `until` the blank line, which its own LLaVA models do not heed.
    blank_line_stops: bool = True

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Options:
        """Raises InputError for an unknown name, a value of the wrong kind, or two that contradict."""
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name == "max_batch_size" or value is None or (str(value).lower() == "none" and name != "pruning"):
                continue  # lmms-eval passes max_batch_size to every model; it belongs to batch_size=auto
            key = OTHER_NAMES.get(name, name)
            reader = {**LOADING, **WRITING, **RUNNING}.get(key)
            if reader is None:
                raise InputError(
                    f"model_args: unknown option {name!r}{_resembling(name)}; known: {', '.join(NAMES)}{_of_a_method(given)}"
                )
            if key in values:
                both = next(f"{other} and {key}" for other in OTHER_NAMES if OTHER_NAMES[other] == key)
                raise InputError(f"model_args: {both} are one option under two names; give one of them")
            values[key] = reader(f"model_args: {name}", value)
        _settle(values)
        parts = ({k: v for k, v in values.items() if k in kind} for kind in (LOADING, WRITING, RUNNING))
        loading, writing, running = parts
        return cls(loading, writing, **running)


def _settle(values: dict[str, Any]) -> None:
    """What options mean for each other."""
    if values.get("batch_size", 1) < 1:
        raise InputError(f"model_args: batch_size is {values['batch_size']}; 1 or more is needed")
    if values.get("pruning") == "none":
        if "retained_tokens" in values:
            raise InputError("model_args: pruning=none and R contradict each other; leave one out")
        del values["pruning"]
    if values.get("speculation") is False and values.setdefault("draft_length", 0) != 0:
        raise InputError("model_args: speculation=false and draft_length contradict each other; leave one out")


def _of_a_method(given: Mapping[str, Any]) -> str:
    """lmms-eval splits model_args at commas, those between a method's settings too."""
    return (
        " (settings of one pruning method are separated by semicolons here)" if ":" in str(given.get("pruning")) else ""
    )


def _resembling(name: str) -> str:
    folded = {n.lower(): n for n in NAMES}
    close = difflib.get_close_matches(str(name).lower(), folded, 1)
    return f" (did you mean {folded[close[0]]}?)" if close else ""


# ---------------------------------------------------------------------- generation_kwargs of a task

ONLY_ONE = ("num_beams", "n", "best_of", "num_return_sequences", "repetition_penalty")
UNHEEDED = ("image_aspect_ratio", "skip_special_tokens")  # always LLaVA's square padding; never special tokens


def _strings(name: str, value: Any) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise InputError(f"{name} is {value!r}; a string or a list of strings is needed")
    return tuple(word for word in words if word)


@dataclass(frozen=True)
class Manner:
    """How a task wants its answers written; requests of one manner go into one batch."""

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    until: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Manner:
        """Raises InputError for what this model cannot do, beams above all.

        `do_sample` decides; where it is not given, a temperature above 0 samples. Temperature 0 and
        top_p 0 are greedy.
        """
        asked = {name: value for name, value in given.items() if value is not None}

        def take(name: str, default: Any, reader: Reader) -> Any:
            return reader(f"generation_kwargs: {name}", asked.pop(name, default))

        for name in ONLY_ONE:
            if take(name, 1, _number) != 1:
                raise InputError(f"generation_kwargs: {name} is {given[name]!r}; only 1 is supported")
        until = take("until", (), _strings)
        limit = take("max_gen_toks", DEFAULT_NEW_TOKENS, _whole)  # its name in older tasks
        limit = take("max_new_tokens", limit, _whole)
        temperature = take("temperature", 1.0 if asked.get("do_sample") else 0.0, _number)
        top_k, top_p = take("top_k", 0, _whole), take("top_p", 1.0, _number)
        sampled = take("do_sample", temperature > 0, _switch) and temperature > 0 and top_p > 0
        seed = take("seed", None, lambda name, value: None if value is None else _whole(name, value))
        unknown = tuple(sorted(set(asked) - set(UNHEEDED)))
        if not sampled:
            return cls(limit, until=until, unknown=unknown)
        return cls(limit, True, temperature, top_k if top_k > 0 else None, top_p, seed, until, unknown)

    def settings(self) -> dict[str, Any]:
        """Arguments of `TwigVLM.generate`; the seed is the caller's."""
        return {name: getattr(self, name) for name in TASKS_OWN}
