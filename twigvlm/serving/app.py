"""The web application: which address answers what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .chat import request
from .chat.completion import Completions
from .chat.reply import encoded
from .chat.schema import document
from .desk import Desk
from .faults import MISSING, Fault
from .gate import App, Gate, Told
from .http import JSON, Receive, Send, answer, answer_json

if TYPE_CHECKING:
    from starlette.requests import Request

CHAT, MODELS, HEALTH, METRICS, PAGE = "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/openapi.json"
MODEL = f"{MODELS}/{{name}}"
SHOWN = 80


def make_app(desk: Desk) -> App:
    """An ASGI application that serves this model."""
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    ways = {CHAT: ("POST", Completions(desk)), MODELS: ("GET", Models(desk)), f"{MODELS}/{{name:path}}": ("GET", Models(desk)),
            HEALTH: ("GET", Health(desk)), METRICS: ("GET", Figures(desk)), PAGE: ("GET", Page(desk))}  # fmt: skip
    routes = [Route(path, Told(endpoint), methods=[method]) for path, (method, endpoint) in ways.items()]
    app = FastAPI(
        routes=routes, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False,
        exception_handlers={HTTPException: _wrong_way},
    )  # fmt: skip
    return Gate(app, desk, (CHAT, MODELS, HEALTH, METRICS, PAGE))


async def _wrong_way(asked: Request, fault: Any) -> Any:
    """No such path, or not by this method."""
    from starlette.responses import Response

    where = f"{asked.method} {asked.url.path}"[:SHOWN]
    if fault.status_code == 405:
        allowed = (fault.headers or {}).get("Allow", "")
        said = Fault(405, f"{where} is not possible; {allowed or 'another method'} is", None, "method_not_allowed")
    else:
        said = Fault(
            fault.status_code, f"{where}: there is nothing here; {PAGE} says what is", None, "not_found", MISSING
        )

    return Response(encoded(said.body()), fault.status_code, fault.headers, JSON)


class Models:
    """The one model, as OpenAI lists several."""

    def __init__(self, desk: Desk):
        self.desk = desk

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        desk, name = self.desk, scope.get("path_params", {}).get("name")
        one = {"id": desk.model, "object": "model", "created": desk.started, "owned_by": "twigvlm"}
        if name is None:
            await answer_json(send, 200, {"object": "list", "data": [one]})
        elif name == desk.model:
            await answer_json(send, 200, one)
        else:
            raise request.not_here(name, desk.model)


class Health:
    """Whether it answers, and how many wait."""

    def __init__(self, desk: Desk):
        self.desk = desk

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        desk = self.desk
        facts = {"status": "ok" if desk.well else "ending", "model": desk.model}
        facts |= {"waiting": desk.engine.waiting, "running": desk.engine.running}
        await answer_json(send, 200 if desk.well else 503, facts)


class Figures:
    """For Prometheus."""

    def __init__(self, desk: Desk):
        self.desk = desk

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        body, kind = self.desk.metrics.text()
        await answer(send, 200, body, kind)


class Page:
    """The description of this interface."""

    def __init__(self, desk: Desk):
        self.facts = document(desk.model, desk.settings.key is not None)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        await answer_json(send, 200, self.facts)
