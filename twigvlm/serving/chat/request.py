"""A chat request, read from its JSON: what is known is taken, what is not supported is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..faults import Fault, refused
from . import fields, messages, options
from .messages import Conversation

READ = (
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "stop", "twig",
)  # fmt: skip
# Who asks, and hints for others' caches: any text, which changes no answer.
UNHEEDED = ("user", "safety_identifier", "prompt_cache_key")
# What this server cannot do, and the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None,),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None,),
    "functions": (None,),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "metadata": (None, {}),
    "prompt_cache_retention": (None,),
}
KNOWN = (*READ, *UNHEEDED, *UNSUPPORTED)


@dataclass(frozen=True)
class Wanted:
    """What a client asks for; `options` are those of `TwigVLM.generate`."""

    conversation: Conversation
    options: options.Options
    stops: tuple[str, ...]
    stream: bool
    counted: bool  # the stream ends with a chunk of usage


def read(body: Mapping[str, Any], model: str, defaults: Mapping[str, Any]) -> Wanted:
    """Raises Fault for what is not known, not supported, or outside its limits."""
    fields.unknown(body, KNOWN)
    _check_model(body.get("model"), model)
    for name, neutral in UNSUPPORTED.items():
        if name in body and not any(_same(body[name], value) for value in neutral):
            allowed = " or ".join(fields.shown(value) for value in neutral if value is not None)
            remedy = f"leave it away or send {allowed}" if allowed else "leave it away"
            said = f"{name} is {fields.shown(body[name])}, which is not supported; {remedy}"
            raise refused(name, said, "unsupported_parameter")
    for name in UNHEEDED:
        if body.get(name) is not None:
            fields.text(body[name], name)
    stream = fields.flag(body["stream"], "stream") if body.get("stream") is not None else False
    counted = _counted(body.get("stream_options"), stream)
    wanted = options.read(body, defaults)
    stops = options.stops(body.get("stop"))
    return Wanted(messages.read(body.get("messages")), wanted, stops, stream, counted)


def _check_model(given: Any, model: str) -> None:
    if given is None:
        raise fields.missing("model", f"this server has {model!r}")
    if fields.text(given, "model") != model:
        raise not_here(given, model)


def not_here(name: str, model: str) -> Fault:
    said = f"the model {fields.shown(name)} does not exist; this server has {model!r}"
    return Fault(404, said, "model", "model_not_found")


def _counted(given: Any, stream: bool) -> bool:
    if given is None:
        return False
    asked = fields.mapping(given, "stream_options")
    fields.unknown(asked, ("include_usage", "include_obfuscation"), "stream_options")
    if not stream:
        raise refused("stream_options", "stream_options is given without a stream; leave it away or send stream: true")
    if asked.get("include_obfuscation") not in (None, False):
        raise refused(
            "stream_options.include_obfuscation", "stream_options.include_obfuscation is not supported; leave it away"
        )
    return fields.flag(asked["include_usage"], "stream_options.include_usage") if asked.get("include_usage") is not None else False  # fmt: skip


def _same(given: Any, neutral: Any) -> bool:
    """Equal, and true is no 1."""
    return given == neutral and isinstance(given, bool) == isinstance(neutral, bool)
