"""One run: a question about a picture by one method, told line by line while it is written."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import AUTO, DIGITS, MOST_NODES, SHOWN, GenerationSettings
from ..errors import InputError
from ..serving.engine import Ask, Engine, Started, Written
from .methods import UNPRUNED
from .telling import Teller, difference, figures, patches

LONGEST_QUESTION, LONGEST_ANSWER = 4000, 1024  # letters, tokens
LAST_SEED = 2**53 - 1  # the last whole number that every browser can write
POLL = 0.25  # seconds between two looks at the queue


@dataclass
class Run:
    """What is asked: `picture` is a sample's name or the id of a picture that was sent, `method` unpruned or one of the
    catalogue with its settings, `R` the average of visual tokens per layer (for those alone), `draft_length` the tokens
    drafted a step at most (0: none) or auto, `tree` E,W,D,N or auto instead; `seed` repeats what is drawn; `check` decodes
    again without drafts.

    Raises InputError for texts and numbers outside their range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (FastAPI makes a schema of this class)

    picture: str
    question: str
    method: str = UNPRUNED
    R: float | None = None
    draft_length: int | str = 5
    tree: str | None = None
    max_new_tokens: int = 128
    seed: int | None = None
    check: bool = False

    def __post_init__(self) -> None:
        if len(self.question) > LONGEST_QUESTION:
            raise InputError(
                f"question is of {len(self.question)} letters; at most {LONGEST_QUESTION} are read, shorten it"
            )
        if not 1 <= self.max_new_tokens <= LONGEST_ANSWER:
            raise InputError(f"max_new_tokens is {_shown(self.max_new_tokens)}; 1 to {LONGEST_ANSWER} is possible here")

        if self.draft_length != AUTO and not (_whole(self.draft_length) and 0 <= int(self.draft_length) <= MOST_NODES):
            raise InputError(
                f"draft_length is {_shown(self.draft_length)}; 0 (no drafts) to {MOST_NODES}, or auto, is possible here"
            )
        if self.seed is not None and not 0 <= self.seed <= LAST_SEED:
            raise InputError(f"seed is {_shown(self.seed)}; 0 to {LAST_SEED} is possible here")

    @property
    def drafts(self) -> bool:
        return self.tree is not None or self.draft_length != 0

    def options(self, plain: bool = False) -> dict[str, Any]:
        """Those of `TwigVLM.generate`. Raises InputError for values that cannot be."""
        pruned = self.method != UNPRUNED
        if pruned and self.R is None:
            raise InputError(f"R is missing; {self.method} needs the average of visual tokens per layer, 64 say")
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "seed": self.seed, "traced": True}
        if pruned:
            options |= {"pruning": self.method, "retained_tokens": self.R}
        if plain or not self.drafts:
            options["draft_length"] = 0
        elif self.tree is not None:
            options["tree"] = self.tree
        else:
            options["draft_length"] = int(self.draft_length) if _whole(self.draft_length) else self.draft_length
        GenerationSettings(**options)
        return options


def _whole(value: int | str) -> bool:
    return isinstance(value, int) or (value.isdecimal() and len(value) <= DIGITS)


def _shown(value: int | str) -> str:
    """As a message repeats it."""
    try:
        text = str(value)
    except ValueError:  # more digits than Python writes out
        return "endless"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


class Listening:
    """An ask on its way, as the event loop hears of it; `events` may be read once."""

    def __init__(self, engine: Engine, ask: Ask):
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue()

        def hear(event: Any) -> None:  # on the engine's thread
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.ticket = engine.submit(ask, hear)

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """("queued", how many are before it), ("started", when), ("step", (step, when)), at last ("answer", answer).

        Raises what went wrong with the answer.
        """
        place, started = None, False
        while True:
            if not started and (now := self.ticket.place()) != place:
                place = now
                yield "queued", place
            try:
                event = await asyncio.wait_for(self._events.get(), POLL)
            except asyncio.TimeoutError:
                continue
            if isinstance(event, Started):
                started = True
                yield "started", event.at
            elif isinstance(event, Written):
                yield "step", (event.step, event.at)
            else:
                break
        yield "answer", self.ticket.result(0)


class Work:
    """What an engine does for one reader: an answer, and perhaps the same without drafts.

    Raises Busy where the queue is full. `leave` ends it within a step.
    """

    def __init__(self, engine: Engine, run: Run, inputs: dict[str, Any], tokenizer: Any):
        self.engine, self.run, self.tokenizer = engine, run, tokenizer
        self.ids, self.pixels = inputs["input_ids"][0].tolist(), inputs.get("pixel_values")
        self.left = False
        self.now = self._ask()

    def leave(self) -> None:
        self.left = True
        self.now.ticket.cancel()

    def _ask(self, plain: bool = False) -> Listening:
        return Listening(self.engine, Ask(self.ids, self.pixels, self.run.options(plain), alone=True))

    async def lines(self) -> AsyncIterator[dict]:
        """All that a page is told, in the order of `event`: queued, started, step…, done, checked."""
        teller, steps, began, answer = Teller(self.tokenizer), [], 0.0, None
        async for kind, what in self.now.events():
            if kind == "queued":
                yield {"event": "queued", "before": what}
            elif kind == "started":
                began = what
                yield {"event": "started"}
            elif kind == "step":
                steps.append(teller.step(what[0], what[1] - began))
                yield {"event": "step", **steps[-1]}
            else:
                answer = what
        done: dict[str, Any] = {"event": "done", "rest": teller.rest(), "text": teller.text}
        done["stopped"] = bool(answer.cancelled)
        if steps and answer.stats is not None:
            done |= {"figures": figures(answer.stats, steps), **patches(answer.kept, answer.scores)}
        yield done
        if self.run.check and self.run.drafts and not answer.cancelled and not self.left:
            async for line in self._compare(answer.tokens):
                yield line

    async def _compare(self, tokens: Sequence[int]) -> AsyncIterator[dict]:
        """The same prompt under the same pruning, one forward a token: is it the same text?"""
        self.now = self._ask(plain=True)
        async for kind, what in self.now.events():
            if kind == "answer" and not what.cancelled:
                place = difference(tokens, what.tokens)
                yield {"event": "checked", "same": place is None, "differs_at": place, "tokens": len(what.tokens)}


class Lines:
    """JSON lines as an ASGI answer, each sent when it is there. A reader that leaves ends the work behind them at once."""

    def __init__(self, lines: AsyncIterator[dict], leave: Callable[[], None], explain: Callable[[Exception], str]):
        self.lines, self.leave, self.explain = lines, leave, explain

    async def __call__(self, _scope, receive, send) -> None:
        heads = [(b"content-type", b"application/x-ndjson"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": heads})
        watch = asyncio.create_task(self._watch(receive))
        try:
            async with contextlib.aclosing(self._told()) as lines:
                async for line in lines:
                    await send({"type": "http.response.body", "body": _line(line), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the reader has left
            pass
        finally:
            watch.cancel()
            self.leave()

    async def _told(self) -> AsyncIterator[dict]:
        """The lines, and what went wrong as the last one."""
        async with contextlib.aclosing(self.lines) as lines:
            try:
                async for line in lines:
                    yield line
            except Exception as fault:
                yield {"event": "error", "error": self.explain(fault)}

    async def _watch(self, receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.leave()


def _line(facts: dict) -> bytes:
    return json.dumps(facts, ensure_ascii=False).encode() + b"\n"
