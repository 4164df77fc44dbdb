"""In front of all routes: who may come in, what is counted, and that whatever goes wrong is said in one shape."""

from __future__ import annotations

import hmac
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from .faults import AUTH, Fault, of
from .http import Gone, Message, Receive, Send, answer_fault, headers_of, host_name

if TYPE_CHECKING:
    from .desk import Desk

App = Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]
OPEN = ("/health", "/metrics", "/openapi.json")  # to anybody, key or none
SHOWN = 80  # letters of a name that a message repeats
GONE = 499  # what a client that hung up is counted as


class Told:
    """An ASGI application whose faults are answers, as long as none has begun."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Gone:
            return
        except Exception as fault:
            if not isinstance(fault, Fault):
                traceback.print_exception(fault, file=sys.stderr)  # for who runs the server, not for who asks it
            if not begun:
                await answer_fault(send, of(fault))


class Gate:
    """Around the whole application: the key, and how often what was answered."""

    def __init__(self, app: App, desk: Desk, paths: tuple[str, ...]):
        self.app, self.desk, self.paths = app, desk, paths

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        status = GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await Told(self._inside)(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.desk.metrics.requests.labels(path, str(status)).inc()

    async def _inside(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        self._check_host(scope)
        self._check_key(scope)
        await self.app(scope, receive, send)

    def _check_host(self, scope: Mapping[str, Any]) -> None:
        for told in headers_of(scope, "host"):
            name = host_name(told.decode("latin-1"))
            if not self.desk.settings.welcomes(name):
                raise Fault(
                    421, f"Host is {name[:SHOWN]!r}, by which this server is not known; ask for localhost, or start it with --api-key"
                )  # fmt: skip

    def _check_key(self, scope: Mapping[str, Any]) -> None:
        key = self.desk.settings.key
        if key is None or scope["path"] in OPEN:
            return
        told = headers_of(scope, "authorization")
        kind, _, given = (told[0] if len(told) == 1 else b"").partition(b" ")
        if kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), key):
            return
        said = "the API key is wrong" if given else "no API key was given"
        raise Fault(
            401,
            f"{said}; send Authorization: Bearer KEY",
            None,
            "invalid_api_key",
            AUTH,
            {"WWW-Authenticate": "Bearer"},
        )
