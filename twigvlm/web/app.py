"""What can be asked of the page's server: its files, the model, pictures, schedules, runs."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ..errors import InputError, RunError
from ..serving.engine import Busy, Closed, Engine
from . import methods
from .guard import LARGEST, Guard
from .pictures import Pictures
from .running import LONGEST_ANSWER, LONGEST_QUESTION, Lines, Run, Work
from .settings import PageSettings

STATIC = Path(__file__).parent / "static"
PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/:;,()'\"]+/)+([^\s/:;,()'\"]*)")  # of the machine; no client learns of it
log = logging.getLogger("twigvlm.web")


class Site:
    """One model and its engine, shown to whoever is let in."""

    def __init__(self, vlm: Any, engine: Engine):
        self.vlm, self.engine = vlm, engine
        mean = vlm.processor.image_processor.image_mean
        self.pictures = Pictures(vlm.pads, tuple(int(255 * m) for m in mean))

    def about(self) -> dict:
        """The model in the paper's letters, what can be asked of it, and within which limits."""
        shape = methods.shape_of(self.vlm)
        letters = {"L": shape.L, "V": shape.V, "K": shape.K, "F": shape.F, "T": self.vlm.config.T}
        return {
            "model": _last(self.vlm.base_name),
            "device": str(self.vlm.device),
            "dtype": str(self.vlm.dtype).removeprefix("torch."),
            "twig": self.vlm.twig is not None,
            **letters,
            "methods": methods.overview(self.vlm),
            "samples": list(self.pictures.samples),
            "limits": {"bytes": LARGEST, "question": LONGEST_QUESTION, "max_new_tokens": LONGEST_ANSWER},
        }

    def plan(self, method: str = Query(), R: float | None = Query(None)) -> dict:
        """Visual tokens that enter each layer, or the reason why this method cannot have this R."""
        found = methods.schedule(self.vlm, method, R)
        return found | {"reason": found["reason"] and private(found["reason"])}

    async def send(self, request: Request) -> dict:
        """Take a picture, a file's bytes as the body; the answer names it for runs."""
        data = await request.body()
        picture = await run_in_threadpool(self.pictures.add, data)
        return {"id": picture.name, "width": picture.image.width, "height": picture.image.height}

    def show(self, name: str) -> Response:
        """The picture as PNG: upright, the square that the model sees."""
        return Response(self.pictures.seen(self._picture(name)), media_type="image/png")

    async def run(self, run: Run) -> Lines:
        """Ask, and be told line by line (JSON): queued, started, step…, done, checked, or error. Leaving ends the work."""
        picture = self._picture(run.picture)
        methods.check(self.vlm, run.method, run.R)
        run.options()
        inputs = await run_in_threadpool(self.vlm.prepare, picture.image, run.question)
        length, context = inputs["input_ids"].shape[1], self.vlm.trunk.context
        if length >= context:
            raise InputError(f"the prompt has {length} tokens, and the context {context}; ask a shorter question")
        work = Work(self.engine, run, inputs, self.vlm.tokenizer)
        return Lines(work.lines(), work.leave, explain)

    def _picture(self, name: str):
        found = self.pictures.find(name)
        if found is None:
            raise HTTPException(404, f"picture {name[:50]!r} is not here (any more); send it again, or take a sample")
        return found


def make_app(vlm: Any, engine: Engine, settings: PageSettings) -> FastAPI:
    """The page's server over a loaded model."""
    site = Site(vlm, engine)
    app = FastAPI(title="TwigVLM", description="The page's own interface.", docs_url=None, redoc_url=None)
    app.add_api_route("/api/about", site.about, methods=["GET"])
    app.add_api_route("/api/plan", site.plan, methods=["GET"])
    app.add_api_route("/api/pictures", site.send, methods=["POST"], status_code=201)
    app.add_api_route("/api/pictures/{name}", site.show, methods=["GET"], response_class=Response)
    app.add_api_route("/api/run", site.run, methods=["POST"], response_class=Response)
    app.add_api_route("/", lambda: FileResponse(STATIC / "index.html"), methods=["GET"], include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    for kind, answer in ((InputError, 400), (Busy, 503), (Closed, 503), (RunError, 500), (Exception, 500)):
        app.add_exception_handler(kind, _answering(answer))
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_middleware(Guard, settings=settings)
    return app


def _answering(status: int):
    async def answer(_request: Request, fault: Exception) -> JSONResponse:
        heads = {"retry-after": "5"} if status == 503 else None
        return JSONResponse({"error": explain(fault)}, status, heads)

    return answer


async def _refused(_request: Request, fault: HTTPException) -> JSONResponse:
    return JSONResponse({"error": str(fault.detail)}, fault.status_code, fault.headers)


async def _invalid(_request: Request, fault: RequestValidationError) -> JSONResponse:
    """The first thing that is wrong, with what was given."""
    first = fault.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
    given = repr(first.get("input"))
    given = given if len(given) <= 80 else f"{given[:77]}…"
    reason = first.get("ctx", {}).get("error", "") or first["msg"]
    return JSONResponse({"error": private(f"{where} is {given}: {reason[:1].lower()}{reason[1:]}")}, 422)


def explain(fault: Exception) -> str:
    """One line for a client; what nobody foresaw goes to the log, and no client reads of it."""
    if isinstance(fault, (InputError, RunError)):
        return private(str(fault))
    log.error("a request failed", exc_info=fault)
    return f"the server failed ({type(fault).__name__}); its terminal says more, ask again"


def private(text: str) -> str:
    """One line without the machine's folders."""
    return PATH.sub(r"\1", " ".join(text.split()))


def _last(name: str) -> str:
    return private(name) if name.startswith("/") else name
