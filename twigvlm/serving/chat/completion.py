"""One chat completion from the body to the last byte: prepared beside the event loop, queued, told as it is written."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..engine import Answer, Ask, Clock, Ended, Started, Written
from ..faults import Fault, closing, late, of, refused
from ..http import EVENTS, Gone, Receive, Send, answer_json, check_kind, read_body, start
from . import fields, options, pictures, request
from .reply import DONE, LENGTH, STOP, Reply, event, figures, usage
from .text import Text

if TYPE_CHECKING:
    from ..desk import Desk

GONE, LATE, CLOSING = "gone", "late", "closing"


class Completions:
    """The ASGI application of POST /v1/chat/completions."""

    def __init__(self, desk: Desk):
        self.desk = desk

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        arrived = Clock()
        with self.desk.admitted():
            limits = self.desk.settings
            try:
                check_kind(scope)
                body = await asyncio.wait_for(read_body(scope, receive, limits.body_bytes), limits.timeout)
            except asyncio.TimeoutError:
                raise Fault(
                    408, f"the body was not here after {limits.timeout:g} s; send it faster or less of it"
                ) from None
            async with Job(self.desk, arrived, receive).watching() as job:
                wanted = await job.prepare(body)
                del body
                await (self._stream if wanted.stream else self._whole)(job, send)

    async def _whole(self, job: Job, send: Send) -> None:
        async with contextlib.aclosing(job.pieces()) as pieces:
            text = "".join([piece async for piece in pieces])
        counts, twig = job.counted()
        await job.sending(answer_json(send, 200, Reply(self.desk.model).whole(text, job.reason, counts, twig)))

    async def _stream(self, job: Job, send: Send) -> None:
        """Headers go with the first word: what goes wrong before has a status of its own."""
        reply, begun = Reply(self.desk.model, job.wanted.counted), False

        async def put(data: bytes, more: bool = True) -> None:
            await job.sending(send({"type": "http.response.body", "body": data, "more_body": more}))

        async def begin() -> None:
            nonlocal begun
            begun = True
            await job.sending(start(send, 200, EVENTS, {"x-accel-buffering": "no"}))
            await put(reply.chunk({"role": "assistant", "content": ""}))

        try:
            async with contextlib.aclosing(job.pieces()) as pieces:
                async for piece in pieces:
                    if not begun:
                        await begin()
                    await put(reply.chunk({"content": piece}))
            if not begun:
                await begin()
        except Fault as fault:
            if not begun:
                raise
            await put(event(fault.body()), more=False)
            return
        counts, twig = job.counted()
        tail = reply.chunk({}, job.reason, twig=twig) + (reply.count(counts) if reply.counted else b"") + DONE
        await put(tail, more=False)


class Job:
    """One request's way through the engine. What happens to it, from any side, comes through one queue."""

    def __init__(self, desk: Desk, arrived: float, receive: Receive):
        self.desk, self.arrived, self.receive = desk, arrived, receive
        self.happened: asyncio.Queue = asyncio.Queue()
        self.ids: list[int] = []
        self.steps: list = []
        self.reason = STOP
        self.answer: Answer | None = None

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[Job]:
        """As long as it lasts, the client's hanging up, the time limit and the server's end are heard."""
        loop = asyncio.get_running_loop()
        watch = loop.create_task(self._until_gone())
        alarm = loop.call_later(max(0.0, self.left()), self.happened.put_nowait, LATE)
        self.desk.jobs.add(self)
        try:
            yield self
        finally:
            self.desk.jobs.discard(self)
            alarm.cancel()
            watch.cancel()

    async def _until_gone(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.happened.put_nowait(GONE)

    def left(self) -> float:
        return self.arrived + self.desk.settings.timeout - Clock()

    async def sending(self, sent) -> None:
        """A client that does not read holds nothing for ever."""
        try:
            await asyncio.wait_for(sent, max(self.left(), 1.0))
        except asyncio.TimeoutError:
            raise Gone from None

    async def prepare(self, body: bytes) -> request.Wanted:
        """Read the request and its pictures in threads. Raises Fault, or Gone."""
        desk = self.desk
        self.wanted, self.ids = await self._meanwhile(desk.beside(self._read, body))
        data = await self._meanwhile(self._fetched())
        self.ask = await self._meanwhile(desk.beside(ask, desk.vlm, self.wanted, self.ids, data))
        return self.wanted

    async def _meanwhile(self, work: Awaitable) -> Any:
        """What `work` gives, unless the client goes, or its time ends, before."""
        work = asyncio.ensure_future(work)
        waits = asyncio.ensure_future(self.happened.get())
        try:
            await asyncio.wait((work, waits), return_when=asyncio.FIRST_COMPLETED)
            if waits.done():
                self._give_up(waits.result())
            return work.result()
        finally:
            work.cancel()
            waits.cancel()

    def _read(self, body: bytes) -> tuple[request.Wanted, list[int]]:
        desk = self.desk
        wanted = request.read(fields.parse(body), desk.model, desk.defaults)
        desk.check(wanted.options)
        return wanted, prompt(desk.vlm, wanted)

    async def _fetched(self) -> list[bytes | None]:
        """What stands at the addresses of remote pictures, asked for beside each other."""

        async def one(picture) -> bytes | None:
            if not pictures.is_remote(picture):
                return None
            return await self.desk.afar(pictures.fetch, picture, self.desk.settings.allow_remote_images)

        return await asyncio.gather(*map(one, self.wanted.conversation.pictures))

    def _give_up(self, why: str) -> None:
        if why == GONE:
            raise Gone
        raise closing() if why == CLOSING else late(self.desk.settings.timeout)

    async def pieces(self) -> AsyncIterator[str]:
        """The answer's text as it may go out. Raises Fault, or Gone; the worker is free then."""
        loop, text = asyncio.get_running_loop(), Text(self.desk.vlm.tokenizer, self.wanted.stops)

        def tell(happening: Any) -> None:
            loop.call_soon_threadsafe(self.happened.put_nowait, happening)

        ticket = self.desk.engine.submit(self.ask, tell)
        try:
            while not isinstance(now := await self.happened.get(), Ended):
                if isinstance(now, Started):
                    continue
                if not isinstance(now, Written):
                    self._give_up(now)
                if text.stopped:
                    continue
                self.steps.append(now.step)
                if piece := text.add(now.step):
                    yield piece
                if text.stopped:
                    ticket.cancel()
        finally:
            ticket.cancel()
        if now.fault is not None:
            raise self.desk.told(now.fault)
        if now.answer.cancelled and not text.stopped:
            raise closing()
        self.answer, self.tokens = now.answer, text.tokens
        self.reason = LENGTH if now.answer.limited and not text.stopped else STOP
        if piece := text.end():
            yield piece

    def counted(self) -> tuple[dict[str, int], dict[str, Any]]:
        """(usage, the object `twig`), noted for the server's own figures too."""
        counts = usage(len(self.ids), self.tokens)
        twig = figures(self.answer, self.ids, self.desk.vlm.trunk, self.steps, self.tokens, self.arrived)
        self.desk.metrics.answered(self.answer, twig, counts, Clock() - self.arrived)
        return counts, twig


def prompt(vlm, wanted: request.Wanted) -> list[int]:
    """Its ids; no picture is fetched or opened before it is known that they fit. Raises Fault."""
    ids = vlm.prompts.ids(wanted.conversation.talk)
    if len(ids) >= vlm.trunk.context:
        raise refused(
            "messages",
            f"the prompt has {len(ids)} tokens ({len(wanted.conversation.pictures)} pictures of {vlm.config.V} among them) and the "
            f"context {vlm.trunk.context}; send less",
            "context_length_exceeded",
        )
    return ids


def ask(vlm, wanted: request.Wanted, ids: list[int], data: Sequence[bytes | None]) -> Ask:
    """The prompt with its pixels; `data` are remote pictures, None for others. Raises Fault."""
    opened = [pictures.open_picture(*pair) for pair in zip(wanted.conversation.pictures, data, strict=True)]
    pixels = vlm.pixels(opened) if opened else None
    return Ask(ids, pixels, options.within(wanted.options, vlm.trunk.context - len(ids)))


def note(fault: Exception) -> Fault:
    """What went wrong here, for the log; and what the client hears of it."""
    told = of(fault)
    if told.status == 500:
        print(f"error: {type(fault).__name__}: {' '.join(str(fault).split())}", file=sys.stderr, flush=True)
    return told
