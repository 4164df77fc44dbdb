"""A page's server in this process: over a tiny model, or over an engine that says what a test wrote down."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import uvicorn
from conftest import speaking, tiny_tokenizer, write_base
from PIL import Image

from twigvlm.decoding import Step
from twigvlm.prompt.processor import make_processor
from twigvlm.serving.engine import Answer, Busy, Ended, Engine, Started, Written
from twigvlm.web.app import make_app
from twigvlm.web.settings import PageSettings, listen

FIRST_BYTE = 3  # in `tiny_tokenizer`


@cache
def model(twig: bool = True):
    """A tiny model of 4 x 4 patches that speaks, with all that prepares a prompt."""
    vlm = speaking(side=56, twig=twig)
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), vlm.model)
        vlm.__dict__["processor"] = make_processor(vlm.model.config, Path(folder), False)
    return vlm


def spelt(text: str) -> list[int]:
    """Tokens of a text, a byte each."""
    return [FIRST_BYTE + byte for byte in text.encode()]


class ScriptedTicket:
    def __init__(self, engine: Scripted, listener, steps: Sequence[Step]):
        self.engine, self.listener, self.steps = engine, listener, steps
        self.cancelled, self.told = False, 0
        self.over = threading.Event()
        self.answer: Answer | None = None

    def cancel(self) -> None:
        self.cancelled = True
        if self in self.engine.queue:
            self.engine.queue.remove(self)
            self._end()

    def place(self) -> int:
        queue = self.engine.queue
        return queue.index(self) + 1 if self in queue else 0

    def result(self, timeout=None) -> Answer:
        assert self.over.wait(timeout)
        return self.answer

    def play(self) -> None:
        began = time.perf_counter()
        self.listener(Started(began))
        for step in self.steps:
            if self.cancelled:
                break
            time.sleep(self.engine.pause)
            self.told += 1
            if self.told == self.engine.held_at:
                self.engine.go.wait(20)
            self.listener(Written(step, time.perf_counter()))
        self._end()

    def _end(self) -> None:
        steps = list(self.steps[: self.told])
        tokens = [t for step in steps for t in step.tokens]
        self.answer = Answer(tokens, steps, [], None, None, None, 0, 0, 0, 1, self.cancelled)
        self.over.set()
        self.listener(Ended(self.answer))


class Scripted:
    """An engine that writes given steps, one every `pause` seconds, for one asker after the other."""

    def __init__(self, steps: Sequence[Step], pause: float = 0.05, room: int = 8):
        self.steps, self.pause, self.room = steps, pause, room
        self.tickets: list[ScriptedTicket] = []
        self.queue: list[ScriptedTicket] = []
        self.asks: list = []
        self.held_at, self.go = 0, threading.Event()  # at so many steps it waits to be told to go on
        self._change = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, ask, listener) -> ScriptedTicket:
        if len(self.queue) >= self.room:
            raise Busy(f"{len(self.queue)} asks wait and no more may; ask again later")
        ticket = ScriptedTicket(self, listener, self.steps)
        with self._change:
            self.asks.append(ask)
            self.tickets.append(ticket)
            self.queue.append(ticket)
            self._change.notify()
        return ticket

    def close(self) -> None:
        pass

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self.queue))
                ticket = self.queue.pop(0)
            with contextlib.suppress(RuntimeError):  # a server that has ended hears nothing any more
                ticket.play()


@contextlib.contextmanager
def serving(engine=None, vlm=None, **settings) -> Iterator[str]:
    """The address (host:port) of a page in a thread."""
    vlm = vlm or model()
    own = engine is None
    engine = engine or Engine(vlm)
    page = PageSettings(**{"port": 0, **settings})
    with listen(page) as made:
        config = uvicorn.Config(make_app(vlm, engine, page), log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None
        thread = threading.Thread(target=lambda: server.run(sockets=[made]), daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{made.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            if own:
                engine.close()


def ask(place: str, path: str, body=None, method: str | None = None, **headers) -> tuple[int, dict, bytes]:
    """Status, headers in lower case, body. A dictionary is sent as JSON."""
    if isinstance(body, dict):
        body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    link = http.client.HTTPConnection(place, timeout=60)
    try:
        heads = {name.replace("_", "-"): value for name, value in headers.items()}
        link.request(method or ("GET" if body is None else "POST"), path, body, heads)
        answer = link.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        link.close()


def wish(**more) -> dict:
    """The body of a run."""
    return {"picture": "scene-1", "question": "what?", "method": "unpruned", "max_new_tokens": 8, **more}


def run(place: str, **more) -> list[dict]:
    """The lines of a run."""
    status, _, body = ask(place, "/api/run", wish(**more))
    assert status == 200, body
    return [json.loads(line) for line in body.splitlines()]


def file_of(image: Image.Image, form: str = "PNG", **more) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **more)
    return out.getvalue()


def tokens_of(text: str) -> list[int]:
    """As `tiny_tokenizer` writes it."""
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
