"""The OpenAPI description: what is taken is what `request` reads, what is told is what `reply` writes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ...config import AUTO, MOST_NODES
from .messages import DETAILS, ECHOED, MOST_MESSAGES
from .options import HOTTEST, LONGEST_STOP, MOST_STOPS, MOST_TOKENS, SEEDS
from .request import UNHEEDED, UNSUPPORTED

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
OUTCOMES = {
    400: "What was asked cannot be: the error names the parameter",
    401: "The API key is missing or wrong",
    404: "No such model or path",
    405: "Not by this method",
    408: "The body did not come in time",
    413: "The body is too long",
    415: "The body is not application/json",
    429: "Too many wait; Retry-After says when to come again",
    500: "Something is wrong with the server; its log says what",
    503: "The server is shutting down",
    504: "Not answered in time",
}


def document(model: str, locked: bool) -> Schema:
    """For a server of this model; `locked`: behind a key."""
    paths = {
        "/v1/chat/completions": {"post": _chat()},
        "/v1/models": {"get": _get("List the model", "Models", (401,), locked)},
        "/v1/models/{name}": {"get": _get("The model", "Model", (401, 404), locked) | {"parameters": [_name(model)]}},
        "/health": {"get": _get("Whether it answers", "Health", (), False)},
        "/metrics": {"get": _told("Figures for Prometheus", {"text/plain": {"schema": TEXT}})},
        "/openapi.json": {"get": _told("This page", {"application/json": {"schema": {"type": "object"}}})},
    }
    paths["/health"]["get"]["responses"]["503"] = _json("It is ending", "Health")
    parts: Schema = {"schemas": _asked(model) | _replies(model)}
    if locked:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        paths["/v1/chat/completions"]["post"]["security"] = [{"key": []}]
    about = {"title": "TwigVLM", "version": _version(), "description": "Chat completions as OpenAI has them."}
    return {"openapi": "3.1.0", "info": about, "paths": paths, "components": parts}


def _version() -> str:
    try:
        return version("twigvlm")
    except PackageNotFoundError:
        return "0"


def _chat() -> Schema:
    told = {"application/json": {"schema": _ref("Completion")}, "text/event-stream": {"schema": TEXT}}
    outcomes = {str(code): _json(said, "Error") for code, said in OUTCOMES.items() if code != 405}
    return {
        "summary": "Answer a conversation about pictures, whole or as a stream",
        "operationId": "chat",
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("Request")}}},
        "responses": {"200": {"description": "The answer", "content": told}} | outcomes,
    }


def _get(summary: str, name: str, faults: tuple[int, ...], locked: bool) -> Schema:
    outcomes = {str(code): _json(OUTCOMES[code], "Error") for code in faults}
    lock = {"security": [{"key": []}]} if locked else {}
    return {"summary": summary, "responses": {"200": _json(summary, name)} | outcomes} | lock


def _told(summary: str, content: Schema) -> Schema:
    return {"summary": summary, "responses": {"200": {"description": summary, "content": content}}}


def _json(said: str, name: str) -> Schema:
    return {"description": said, "content": {"application/json": {"schema": _ref(name)}}}


def _name(model: str) -> Schema:
    return {"name": "name", "in": "path", "required": True, "schema": TEXT | {"minLength": 1}, "example": model}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(properties: Schema, required: tuple[str, ...] | None = None) -> Schema:
    """One without other keys; all of them are there unless it is said which."""
    needed = list(properties if required is None else required)
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


# ---------------------------------------------------------------------- what may be asked


def _asked(model: str) -> Schema:
    whole = {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS}
    stop = TEXT | {"minLength": 1, "maxLength": LONGEST_STOP}
    properties = {
        "model": {"type": "string", "enum": [model]},
        "messages": {"type": "array", "items": _ref("Message"), "minItems": 1, "maxItems": MOST_MESSAGES},
        "stream": _or_null({"type": "boolean"}),
        "stream_options": _or_null(_object({"include_usage": _or_null({"type": "boolean"}), "include_obfuscation": {"enum": [None, False]}}, ())),
        "max_tokens": _or_null(whole),
        "max_completion_tokens": _or_null(whole),
        "temperature": _or_null({"type": "number", "minimum": 0, "maximum": HOTTEST}),
        "top_p": _or_null({"type": "number", "minimum": 0, "maximum": 1}),
        "seed": _or_null({"type": "integer", "minimum": SEEDS[0], "maximum": SEEDS[1]}),
        "stop": {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": MOST_STOPS}, {"type": "null"}]},
        "twig": _or_null(_ref("Twig")),
        **{name: _or_null(TEXT) for name in UNHEEDED},
        **{name: {"enum": list(values), "description": "not supported"} for name, values in UNSUPPORTED.items()},
    }  # fmt: skip
    return {"Request": _object(properties, ("model", "messages")), "Twig": _twig()} | _messages()


def _twig() -> Schema:
    share = {"type": "number", "minimum": 0, "maximum": 1}
    nodes = {"type": "integer", "minimum": 1, "maximum": MOST_NODES}
    properties = {
        "tokens": _or_null({"type": "number", "minimum": 0}) | {"description": "R, average of visual tokens a layer; null prunes nothing"},
        "method": _or_null(TEXT) | {"description": "how visual tokens are chosen"},
        "query": {"enum": [None, "last", "text"]},
        "draft": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": MOST_NODES}, {"enum": [AUTO, None]}]},
        "tree": {"anyOf": [TEXT, {"type": "array", "items": nodes, "minItems": 4, "maxItems": 4}, {"type": "null"}], "description": "E,W,D,N or auto"},
        "confidence": _or_null(share),
        "top_k": _or_null({"type": "integer", "minimum": 1, "maximum": MOST_TOKENS}),
    }  # fmt: skip
    return _object(properties, ())


def _messages() -> Schema:
    empty = {name: {"enum": [None, "", [], {}]} for name in ECHOED}
    parts = {"type": "array", "minItems": 1}
    picture = _object({"url": TEXT, "detail": {"enum": [None, *DETAILS]}}, ("url",))
    words = _object({"type": {"enum": ["text"]}, "text": TEXT})
    shown = _object({"type": {"enum": ["image_url"]}, "image_url": {"anyOf": [picture, TEXT]}})

    def message(roles: list[str], part: Schema) -> Schema:
        content = {"anyOf": [TEXT, parts | {"items": part}]}
        return _object({"role": {"enum": roles}, "content": content, **empty}, ("role", "content"))

    asked = message(["user"], {"anyOf": [_ref("Text"), _ref("Image")]})
    told = message(["system", "developer", "assistant"], _ref("Text"))
    return {"Message": {"anyOf": [asked, told]}, "Text": words, "Image": shown}


# ---------------------------------------------------------------------- what is told


def _replies(model: str) -> Schema:
    usage = {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT}
    message = _object({"role": {"enum": ["assistant"]}, "content": TEXT, "refusal": {"type": "null"}})
    choice = {
        "index": {"enum": [0]},
        "message": message,
        "logprobs": {"type": "null"},
        "finish_reason": {"enum": ["stop", "length"]},
    }
    head = {"id": TEXT, "object": {"enum": ["chat.completion"]}, "created": COUNT, "model": {"enum": [model]}}
    one = {"id": {"enum": [model]}, "object": {"enum": ["model"]}, "created": COUNT, "owned_by": TEXT}
    error = {"message": TEXT, "type": TEXT, "param": _or_null(TEXT), "code": _or_null(TEXT)}
    choices = {"type": "array", "items": _object(choice), "minItems": 1, "maxItems": 1}
    return {
        "Completion": _object(head | {"choices": choices, "usage": _object(usage), "twig": _ref("Figures")}),
        "Figures": _figures(),
        "Model": _object(one),
        "Models": _object({"object": {"enum": ["list"]}, "data": {"type": "array", "items": _ref("Model")}}),
        "Health": _object({"status": {"enum": ["ok", "ending"]}, "model": {"enum": [model]}, "waiting": COUNT, "running": COUNT}),
        "Error": _object({"error": _object(error)}),
    }  # fmt: skip


def _figures() -> Schema:
    time = _or_null({"type": "number", "minimum": 0})
    counts = ("visual_tokens", "visual_kept", "drafted", "accepted", "steps", "batch")
    times = ("time_to_first_token", "queue_time", "tokens_per_second", "visual_measured")
    return _object(
        dict.fromkeys(counts, COUNT) | dict.fromkeys(times, time) | {"kept": _or_null({"type": "array", "items": COUNT})}
    )  # fmt: skip
