"""Values of a request's JSON, each of its kind and within its limits, or a Fault that names it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from ..faults import Fault, refused

KINDS = {dict: "an object", list: "an array", str: "a text", bool: "true or false", type(None): "null"}
MOST_DIGITS = 1000  # of a whole number: Python refuses longer ones with advice for programmers
SHOWN = 80  # letters of a value that a message repeats


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises Fault for anything else."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    def integer(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise ValueError(f"a number has {len(digits)} digits, and at most {MOST_DIGITS} are read")
        return int(digits)

    try:
        found = json.loads(body.decode("utf-8-sig"), parse_constant=constant, parse_int=integer)
    except UnicodeDecodeError as fault:
        raise refused(None, f"the body is not UTF-8 (byte {fault.start}); send JSON in UTF-8", "invalid_json") from None
    except RecursionError:
        raise refused(None, "the body's JSON is nested too deeply; send a chat request", "invalid_json") from None
    except ValueError as fault:
        raise refused(None, f"the body is not JSON ({fault}); send an object", "invalid_json") from None
    if not isinstance(found, dict):
        raise refused(None, f"the body is {kind(found)}; an object is needed", "invalid_json")
    return found


def kind(value: Any) -> str:
    return KINDS.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value as a message repeats it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def unknown(given: Collection[str], known: Collection[str], where: str = "") -> None:
    """Raises Fault for a key that nobody knows, with the list of those that are."""
    for name in given:
        if name not in known:
            param = f"{where}.{name}" if where else name
            told = f"unknown {'key' if where else 'parameter'} {shown(name)}{f' in {where}' if where else ''}"
            raise refused(param[:SHOWN], f"{told}; known: {', '.join(known)}", "unknown_parameter")


def whole(value: Any, param: str, least: int, most: int) -> int:
    """A whole number; 3.0 is one."""
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
        raise refused(param, f"{param} is {shown(value)}; a whole number from {least} to {most} is needed")
    return number


def number(value: Any, param: str, least: float, most: float) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not least <= value <= most:  # which no NaN is, and no whole number is too large for
        raise refused(param, f"{param} is {shown(value)}; a number from {least:g} to {most:g} is needed")
    return float(value)


def flag(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise refused(param, f"{param} is {shown(value)}; true or false is needed")
    return value


def text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise refused(param, f"{param} is {kind(value)}; a text is needed")
    return value


def mapping(value: Any, param: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise refused(param, f"{param} is {kind(value)}; an object is needed")
    return value


def chosen(value: Any, param: str, legal: Collection[str]) -> str:
    if not isinstance(value, str) or value not in legal:
        raise refused(param, f"{param} is {shown(value)}; {' or '.join(legal)} is needed")
    return value


def missing(param: str, what: str) -> Fault:
    return refused(param, f"{param} is missing; {what}", "missing_required_parameter")
