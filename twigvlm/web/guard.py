"""What stands before every request: who may ask, how much may come in, and what a browser may do with the answer."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from ..serving.http import host_name
from .settings import PageSettings

LARGEST = 20 * 2**20  # bytes of a body
POLICY = "default-src 'self'; base-uri 'none'; object-src 'none'; frame-ancestors 'none'; form-action 'self'"
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
SAFE = ("GET", "HEAD")


class Guard:
    """Pure ASGI, so that answers are streamed as they come and a browser that leaves is noticed."""

    def __init__(self, app, settings: PageSettings):
        self.app, self.settings = app, settings

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if refused := self._refusal(scope):
            await _refuse(send, *refused)
            return

        async def dressed(message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in given]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        if scope["method"] == "HEAD":  # as GET; the server that carries it sends no body
            scope = {**scope, "method": "GET"}
        size = 0

        async def counted():  # a body need not say how long it is
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST:
                from starlette.exceptions import HTTPException  # which FastAPI lets through

                raise HTTPException(413, too_large(size))
            return message

        await self.app(scope, counted, dressed)

    def _refusal(self, scope) -> tuple[int, str] | None:
        """Status and reason, of a request that goes no further."""
        heads = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = heads.get(b"host", "")
        if not self.settings.welcomes(host_name(host)):
            return 421, f"host is {host[:100]!r}, by which this page is not known; --allow-host NAME lets it in"
        if scope["method"] in SAFE:
            return None
        origin = heads.get(b"origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, f"origin is {origin[:100]!r}, another site; ask from the page itself"
        if heads.get(b"sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "the request comes from another site; ask from the page itself"
        length = heads.get(b"content-length", "0")
        if length.isdecimal() and int(length) > LARGEST:
            return 413, too_large(int(length))
        return None


def too_large(size: int) -> str:
    return f"the body has {size / 2**20:.1f} MB or more; at most {LARGEST >> 20} MB are taken, send a smaller picture"


async def _refuse(send, status: int, reason: str) -> None:
    said = json.dumps({"error": reason}).encode()
    heads = {**HEADERS, "content-type": "application/json", "content-length": str(len(said)), "connection": "close"}
    pairs = [(k.encode(), v.encode()) for k, v in heads.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": said})
