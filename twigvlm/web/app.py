"""The routes of the page. FastAPI is imported when they are made: the package is whole without the extra [web]."""

# Annotations are read by FastAPI, so they are no strings here.
from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import InputError, RunError
from ..files import PACKAGE
from ..serving.engine import Busy, Closed, Engine
from ..serving.faults import private
from .guard import Guard
from .running import Lines, Run
from .settings import PageSettings
from .site import Missing, Site, explain

STATIC = PACKAGE / "web" / "static"
STATUS: dict[type[Exception], int] = {
    Missing: 404,
    InputError: 400,
    Busy: 503,
    Closed: 503,
    RunError: 500,
    Exception: 500,
}
LATER = {"retry-after": "5"}  # seconds, of a full queue


def make_app(vlm: Any, engine: Engine, settings: PageSettings) -> Any:
    """The page's server over a loaded model, an ASGI application."""
    from fastapi import FastAPI
    from fastapi.responses import FileResponse
    from fastapi.staticfiles import StaticFiles

    app = FastAPI(title="TwigVLM", description="The page's own interface.", docs_url=None, redoc_url=None)
    _add_routes(app, Site(vlm, engine))
    app.add_api_route("/", lambda: FileResponse(STATIC / "index.html"), methods=["GET"], include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    _add_faults(app)
    app.add_middleware(Guard, settings=settings)
    return app


def _add_routes(app: Any, site: Site) -> None:
    from fastapi import Request
    from fastapi.responses import Response

    class Told(Response):
        """JSON lines as they come."""

        media_type = "application/x-ndjson"

        def __init__(self, lines: Lines):
            super().__init__()
            self.lines = lines

        async def __call__(self, scope, receive, send) -> None:
            await self.lines(scope, receive, send)

    @app.get("/api/about")
    def about() -> dict:
        """The model in the paper's letters, what can be asked of it, and within which limits."""
        return site.about()

    @app.get("/api/plan")
    def plan(method: str, R: float | None = None) -> dict:
        """Visual tokens that enter each layer, or the reason why this method cannot have this R."""
        return site.plan(method, R)

    @app.post("/api/pictures", status_code=201)
    async def take(request: Request) -> dict:
        """Take a picture, a file's bytes as the body; the answer names it for runs."""
        import asyncio

        return await asyncio.to_thread(site.take, await request.body())

    @app.get("/api/pictures/{name}", response_class=Response)
    def show(name: str) -> Response:
        """The picture as PNG: upright, the square that the model sees."""
        return Response(site.pictures.seen(site.picture(name)), media_type="image/png")

    @app.post("/api/run", response_class=Told, status_code=200)
    async def ask(run: Run) -> Response:
        """Ask, and be told line by line (JSON): queued, started, step…, done, checked, or error. Leaving ends the work."""
        work = await site.begin(run)
        return Told(Lines(work.lines(), work.leave, explain))


def _add_faults(app: Any) -> None:
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def answering(status: int) -> Callable[..., Awaitable]:
        async def answer(_request, fault: Exception):
            return JSONResponse({"error": explain(fault)}, status, LATER if status == 503 else None)

        return answer

    async def refused(_request, fault):
        return JSONResponse({"error": str(fault.detail)}, fault.status_code, fault.headers)

    async def invalid(_request, fault):
        return JSONResponse({"error": _first_wrong(fault.errors())}, 422)

    for kind, status in STATUS.items():
        app.add_exception_handler(kind, answering(status))
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)


def _first_wrong(faults: list[dict]) -> str:
    """The first thing that is wrong with a request, with what was given."""
    first = faults[0]
    reason = str(first.get("ctx", {}).get("error", "") or first["msg"])
    where = ".".join(str(part) for part in first["loc"][1:])
    if isinstance(first.get("ctx", {}).get("error"), InputError):  # our own, which says it all
        return private(reason)
    given = repr(first.get("input"))
    given = given if len(given) <= 80 else f"{given[:77]}…"
    return private(f"{where or 'the body'} is {given}: {reason[:1].lower()}{reason[1:]}")
