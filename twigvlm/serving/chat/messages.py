"""Chat messages as the model's template takes them: turns, a system message, and the pictures in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...files import whole
from ...prompt.template import PLACE, Talk
from ..faults import refused
from . import fields

SYSTEM = ("system", "developer")  # one thing under two names
ROLES = (*SYSTEM, "user", "assistant")
EMPTY = (None, "", [], {})
# What clients send back with an answer that they got: nothing, or what no template here can say.
ECHOED = ("name", "refusal", "annotations", "audio", "function_call", "tool_calls")
DETAILS = ("auto", "low", "high")  # every picture is V tokens, whatever is asked
MOST_MESSAGES = 4096


@dataclass(frozen=True)
class Picture:
    """Where one was named, and its address."""

    param: str
    url: str


@dataclass(frozen=True)
class Conversation:
    talk: Talk
    pictures: list[Picture]  # in the order of their places


def read(given: Any) -> Conversation:
    """The conversation of a request's `messages`. Raises Fault."""
    if given is None:
        raise fields.missing("messages", "give a list of messages, the last of them the user's")
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_MESSAGES:
        shown = f"has {len(given)} entries" if isinstance(given, list) else f"is {fields.kind(given)}"
        raise refused("messages", f"messages {shown}; an array of 1 to {MOST_MESSAGES} messages is needed")
    said: list[tuple[str, str]] = []
    pictures: list[Picture] = []
    for i, message in enumerate(given):
        role, text, seen = _message(message, f"messages[{i}]")
        said.append((role, text))
        pictures += seen
    system = []
    while said and said[0][0] == "system":
        system.append(said.pop(0)[1])
    return Conversation(Talk(_turns(said, len(system)), "\n".join(system) if system else None), pictures)


def _turns(said: Sequence[tuple[str, str]], before: int) -> list[tuple[str, str | None]]:
    """User and assistant in turn; the last question waits for its answer."""
    for i, (role, _) in enumerate(said):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise refused(
                f"messages[{before + i}].role",
                f"messages[{before + i}].role is {role!r}, and {expected!r} is needed: user and assistant take turns, "
                "system messages begin",
            )
    if len(said) % 2 == 0:
        last = "there is no user's message" if not said else "the last message is the assistant's"
        raise refused("messages", f"{last}; end with a question of the user")
    if not said[-1][1].strip():
        raise refused(f"messages[{before + len(said) - 1}].content", "the question is empty; ask something")
    answers = [text for _, text in said[1::2]] + [None]
    return list(zip((text for _, text in said[::2]), answers, strict=True))


def _message(given: Any, where: str) -> tuple[str, str, list[Picture]]:
    message = fields.mapping(given, where)
    fields.unknown(message, ("role", "content", *ECHOED), where)
    for name in ECHOED:
        if message.get(name) not in EMPTY:
            raise refused(f"{where}.{name}", f"{where}.{name} is not supported; leave it away", "unsupported_parameter")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise refused(f"{where}.role", f"{where}.role is {fields.shown(role)}; one of {', '.join(ROLES)} is needed")
    role = "system" if role in SYSTEM else role
    text, pictures = _content(message.get("content"), f"{where}.content")
    if pictures and role != "user":
        raise refused(
            pictures[0].param, f"{pictures[0].param}: a picture in a message of role {role!r}; users show them"
        )
    return role, text, pictures


def _content(given: Any, where: str) -> tuple[str, list[Picture]]:
    """Its text, PLACE for each of its pictures."""
    if isinstance(given, str):
        return whole(given), []
    if not isinstance(given, list) or not given:
        shown = "an empty array" if given == [] else fields.kind(given)
        raise refused(where, f"{where} is {shown}; a text or an array of parts is needed")
    parts = [_part(part, f"{where}[{i}]") for i, part in enumerate(given)]
    text = ""
    for part in _ordered(parts):
        text += f"{PLACE}\n" if isinstance(part, Picture) else part
    pictures = [part for part in parts if isinstance(part, Picture)]
    return text.removesuffix("\n") if text.endswith(f"{PLACE}\n") else text, pictures


def _ordered(parts: list[str | Picture]) -> list[str | Picture]:
    """Pictures in front of the text, as the model learnt to read; where text stands between pictures, all as given."""
    shape = "".join("p" if isinstance(part, Picture) else "t" for part in parts if part != "")
    between = "p" in shape.strip("p")
    return parts if between else sorted(parts, key=lambda part: not isinstance(part, Picture))


def _part(given: Any, where: str) -> str | Picture:
    part = fields.mapping(given, where)
    kind = part.get("type")
    if kind == "text":
        fields.unknown(part, ("type", "text"), where)
        return whole(fields.text(part.get("text"), f"{where}.text"))
    if kind != "image_url":
        raise refused(f"{where}.type", f"{where}.type is {fields.shown(kind)}; text or image_url is supported")
    fields.unknown(part, ("type", "image_url"), where)
    picture, place = part.get("image_url"), f"{where}.image_url"
    if isinstance(picture, Mapping):
        fields.unknown(picture, ("url", "detail"), place)
        if picture.get("detail") is not None:
            fields.chosen(picture["detail"], f"{place}.detail", DETAILS)
        picture, place = picture.get("url"), f"{place}.url"
    return Picture(place, fields.text(picture, place))
