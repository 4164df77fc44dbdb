"""The little of HTTP that this server needs beyond its routes: answers, bodies within limits, who hangs up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from .chat.reply import encoded
from .faults import Fault, refused

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
JSON = "application/json"
EVENTS = "text/event-stream"


class Gone(Exception):
    """The client has hung up."""


def headers_of(scope: Mapping[str, Any], name: str) -> list[bytes]:
    """Values of a header, which a client may say more than once."""
    wanted = name.lower().encode("ascii")
    return [value for key, value in scope["headers"] if key.lower() == wanted]


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def start(send: Send, status: int, kind: str, more: Mapping[str, str] | None = None) -> None:
    headers = {"content-type": kind, "cache-control": "no-store", "x-content-type-options": "nosniff"} | dict(
        more or {}
    )
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def answer(send: Send, status: int, body: bytes, kind: str = JSON, more: Mapping[str, str] | None = None) -> None:
    await start(send, status, kind, {"content-length": str(len(body))} | dict(more or {}))
    await send({"type": "http.response.body", "body": body})


async def answer_json(send: Send, status: int, facts: Any, more: Mapping[str, str] | None = None) -> None:
    await answer(send, status, encoded(facts), JSON, more)


async def answer_fault(send: Send, fault: Fault) -> None:
    await answer_json(send, fault.status, fault.body(), fault.headers)


def check_kind(scope: Mapping[str, Any]) -> None:
    """JSON says that it is: what any page in a browser can send elsewhere without asking is not taken for it."""
    said = [value.decode("latin-1").partition(";")[0].strip().lower() for value in headers_of(scope, "content-type")]
    if said != [JSON]:
        shown = said[0][:80] if said else "missing"
        raise Fault(415, f"Content-Type is {shown}; send {JSON}", None, "unsupported_media_type")


async def read_body(scope: Mapping[str, Any], receive: Receive, limit: int) -> bytes:
    """The whole body, given up as soon as it is too long. Raises Fault, or Gone."""
    told = headers_of(scope, "content-length")
    if told and told[0].isdigit() and len(told[0]) < 20 and int(told[0]) > limit:
        raise _too_long(limit)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Gone
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_long(limit)
        if not message.get("more_body", False):
            break
    if not body:
        raise refused(None, "the body is empty; send a JSON object", "invalid_json")
    return bytes(body)


def _too_long(limit: int) -> Fault:
    said = f"the body is longer than {limit} bytes; send smaller pictures, or start the server with a larger --max-body"
    return Fault(413, said, None, "body_too_large")
