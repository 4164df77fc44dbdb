"""One thread owns the model; asks wait in a bounded queue and are answered together where their options agree.

It knows neither HTTP nor text. What it tells, it tells on its own thread (`listener`), and no listener's fault reaches
another's answer.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..config import GenerationSettings
from ..decoding.loop import Step
from ..errors import InputError, RunError
from ..prompt.batch import together
from ..vlm import Output, Stats, TwigVLM

Clock = time.perf_counter


class Busy(RunError):
    """As many wait as may wait."""


class Closed(RunError):
    """The engine takes no more asks."""


@dataclass(frozen=True)
class Ask:
    """A prompt (ids [S]; pixels [images, 3, h, w] or None) and options of `TwigVLM.generate`.

    `alone`: never in a batch with others, so that its times are its own. `stop` is asked after every token, with the
    answer so far, whether it ends there.
    """

    ids: list[int]
    pixels: torch.Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    stop: Callable[[list[int]], bool] | None = None


@dataclass(frozen=True)
class Started:
    """Its batch begins; seconds are those of `engine.Clock`."""

    at: float


@dataclass(frozen=True)
class Written:
    step: Step
    at: float


@dataclass(frozen=True)
class Ended:
    """The last event: an answer, or what went wrong."""

    answer: Answer | None
    fault: Exception | None = None


@dataclass(frozen=True)
class Answer:
    """One row's part of an `Output`; `stats` are its whole batch's, None for a row that was done before its batch was."""

    tokens: list[int]
    steps: list[Step]
    times: list[float]  # when each step was there, by `Clock`
    kept: torch.Tensor | None
    visual: float | None  # visual tokens of an image, average per base layer
    stats: Stats | None  # None as well if it was cancelled before it began
    asked: float
    started: float | None
    ended: float
    rows: int  # of its batch
    cancelled: bool = False
    limited: bool = False  # ended by max_new_tokens or by the context
    scores: torch.Tensor | None = None  # of the visual tokens, where `traced` was asked for and a probe gave some


class Ticket:
    """An ask on its way."""

    def __init__(self, engine: Engine, ask: Ask, listener: Callable[[Any], None] | None):
        self.ask, self.asked = ask, Clock()
        settings = GenerationSettings(**ask.options)
        self.seed, self.limit = settings.seed, settings.max_new_tokens
        self.settings = replace(settings, max_new_tokens=1, seed=None)  # what rows of a batch share
        self.times: list[float] = []
        self.steps: list[Step] = []
        self.cancelled = False
        self.started: float | None = None
        self.rows = 0
        self._engine, self._listener = engine, listener
        self._future: Future = Future()

    def cancel(self) -> None:
        """End it: at once where it still waits, else after the token in work. What is written stays its answer."""
        self.cancelled = True
        self._engine._forget(self)

    def place(self) -> int:
        """How many asks are answered before it; 0 once it has begun."""
        return self._engine._place(self)

    def done(self) -> bool:
        return self._future.done()

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the answer; raises what went wrong, or TimeoutError."""
        return self._future.result(timeout)

    def agrees(self, other: Ticket) -> bool:
        """Whether both may be rows of one batch."""
        alone = self.ask.alone or other.ask.alone
        return not alone and self.settings == other.settings and (self.seed is None) == (other.seed is None)

    def stops(self, tokens: list[int]) -> bool:
        return self.cancelled or (self.ask.stop is not None and self.ask.stop(tokens))

    # ------------------------------------------------------------------ a streamer of `generate`, for its row

    def put(self, _ids: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass

    def put_step(self, step: Step) -> None:
        at = Clock()
        self.times.append(at)
        self.steps.append(step)
        self.tell(Written(step, at))

    def put_end(self, kept: torch.Tensor | None, visual: float | None) -> None:
        """Who asked for few words does not wait for those of a batch who asked for many."""
        if self.rows > 1:
            self.finish(self.answer(kept, visual))

    # ------------------------------------------------------------------ its end

    @property
    def room(self) -> int:
        """Tokens that its answer may have."""
        return min(self.limit, self._engine.vlm.trunk.context - len(self.ask.ids))

    def answer(
        self,
        kept: torch.Tensor | None = None,
        visual: float | None = None,
        stats: Stats | None = None,
        scores: torch.Tensor | None = None,
    ) -> Answer:
        """What is written by now, which is nothing where it never began."""
        tokens = [t for step in self.steps for t in step.tokens]
        return Answer(
            tokens=tokens,
            steps=self.steps,
            times=self.times,
            kept=kept,
            visual=visual,
            stats=stats,
            asked=self.asked,
            started=self.started,
            ended=self.times[-1] if self.times else Clock(),
            rows=self.rows,
            cancelled=self.cancelled,
            limited=len(tokens) >= self.room,
            scores=scores,
        )

    def tell(self, event: Any) -> None:
        if self._listener is None:
            return
        try:
            self._listener(event)
        except Exception:  # nobody listens any more
            self._listener, self.cancelled = None, True

    def finish(self, answer: Answer | None, fault: Exception | None = None) -> None:
        if self._future.done():
            return
        if fault is None:
            self._future.set_result(answer)
        else:
            self._future.set_exception(fault)
        self.tell(Ended(answer, fault))


class Engine:
    """A queue of at most `max_queue` asks before one worker, who takes up to `max_batch` at once.

    The first of a batch waits up to `max_wait` seconds for others that agree with it, counted from the end of the batch
    before, whose askers may come again; where `lonely` says that nobody else is near, it does not wait. Raises InputError
    for limits that cannot be.
    """

    def __init__(
        self,
        vlm: TwigVLM,
        max_batch: int = 8,
        max_wait: float = 0.005,
        max_queue: int = 64,
        lonely: Callable[[], bool] | None = None,
    ):
        for name, value, least in (("max_batch", max_batch, 1), ("max_queue", max_queue, 1), ("max_wait", max_wait, 0)):
            if not value >= least:
                raise InputError(f"{name} is {value}; {least} or more is needed")
        self.vlm, self.max_batch, self.max_wait, self.max_queue = vlm, max_batch, max_wait, max_queue
        self._lonely, self._free = lonely, 0.0  # when the last batch ended
        self.batches: Counter[int] = Counter()  # rows → how many batches had so many
        self._queue: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask, listener: Callable[[Any], None] | None = None) -> Ticket:
        """Queue it. `listener` hears Started, Written of each step, and Ended.

        Raises InputError for options that cannot be, Busy where the queue is full, Closed after `close`.
        """
        ticket = Ticket(self, ask, listener)
        with self._change:
            if self._closed:
                raise Closed("the server is shutting down; ask again later")
            if len(self._queue) >= self.max_queue:
                raise Busy(f"{len(self._queue)} asks wait and no more may (limit {self.max_queue}); ask again later")
            self._queue.append(ticket)
            self._change.notify_all()
        return ticket

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def close(self, patience: float = 0.0) -> None:
        """Take no more; whatever is not answered within `patience` seconds is cancelled."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join(patience)
        with self._change:
            left = [*self._queue, *self._running]
        for ticket in left:
            ticket.cancel()
        self._thread.join()

    # ------------------------------------------------------------------ for tickets

    def _forget(self, ticket: Ticket) -> None:
        with self._change:
            waited = ticket in self._queue
            if waited:
                self._queue.remove(ticket)
            self._change.notify_all()
        if waited:
            ticket.finish(ticket.answer())

    def _place(self, ticket: Ticket) -> int:
        with self._change:
            return len(self._running) + self._queue.index(ticket) if ticket in self._queue else 0

    # ------------------------------------------------------------------ the worker

    def _work(self) -> None:
        while batch := self._next():
            self._answer(batch)
            with self._change:
                self._running, self._free = [], Clock()

    def _next(self) -> list[Ticket]:
        """The oldest ask and those that agree with it; nothing once the engine is closed and nobody waits."""
        with self._change:
            while True:
                self._change.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return []
                self._change.wait_for(self._full, self._left())
                if batch := self._batch():
                    break
            for ticket in batch:
                self._queue.remove(ticket)
            self._running = batch
            return batch

    def _batch(self) -> list[Ticket]:
        first = self._queue[0] if self._queue else None
        others = [t for t in self._queue if t is not first and t.agrees(first)]
        return [first, *others[: self.max_batch - 1]] if first is not None else []

    def _left(self) -> float:
        """Seconds that the oldest ask may still wait for others."""
        first = self._queue[0]
        if not first.agrees(first) or (self._lonely is not None and self._lonely()):
            return 0.0
        return max(0.0, max(first.asked, self._free) + self.max_wait - Clock())

    def _full(self) -> bool:
        return not self._queue or self._closed or len(self._batch()) >= self.max_batch

    def _answer(self, batch: list[Ticket]) -> None:
        """Answer a batch; where it fails before a word is written, each row alone, so that a fault is its own row's."""
        started = Clock()
        self.batches[len(batch)] += 1
        for ticket in batch:
            ticket.started, ticket.rows = started, len(batch)
            ticket.tell(Started(started))
        try:
            out = self._generate(batch)
        except Exception as fault:
            if len(batch) > 1:
                for ticket in batch:
                    if ticket.steps:
                        ticket.finish(None, fault)
                    else:
                        self._answer([ticket])
            else:
                batch[0].finish(None, fault)
            return
        for row, ticket in enumerate(batch):
            kept, scores = (None if of is None else of[row] for of in (out.kept, out.scores))
            ticket.finish(ticket.answer(kept, out.stats.visual_rows[row], out.stats, scores))

    def _generate(self, batch: Sequence[Ticket]) -> Output:
        prompts = [{"input_ids": torch.tensor([t.ask.ids]), "pixel_values": t.ask.pixels} for t in batch]

        def over(ids: torch.Tensor, _scores: Any, row: int) -> bool:
            return batch[row].stops(ids[0, len(batch[row].ask.ids) :].tolist())

        options = batch[0].ask.options | {
            "max_new_tokens": [t.limit for t in batch],
            "seed": None if batch[0].seed is None else [t.seed for t in batch],
        }
        return self.vlm.generate(**together(prompts), streamer=list(batch), stopping_criteria=over, **options)
