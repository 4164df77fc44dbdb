"""What all requests share: the model, its engine, limits, figures, and who is being served."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import GenerationSettings
from ..processes import cores
from ..vlm import TwigVLM
from .chat import completion, options
from .engine import Engine
from .faults import Fault, busy, closing
from .metrics import Metrics
from .settings import ServerSettings

if TYPE_CHECKING:
    from .chat.completion import Job

THREADS = 4  # that read requests at most: a large picture takes a second and a gigabyte
FETCHERS = 16  # threads that wait for others' servers, of which none may keep a request from being read


class Desk:
    """Where requests come in. `defaults` are options of `generate` for who says nothing. Close it in the end."""

    def __init__(self, vlm: TwigVLM, defaults: Mapping[str, Any], settings: ServerSettings):
        self.vlm, self.settings = vlm, settings
        self.defaults = {f.name: f.default for f in fields(GenerationSettings)} | dict(defaults)
        self.model = settings.model_name or name_of(vlm)
        self.open, self.ending = 0, False
        wait = settings.max_wait_ms / 1000
        self.engine = Engine(vlm, settings.max_batch, wait, settings.max_queue, lambda: self.open <= 1)
        self.metrics = Metrics(self.engine)
        self.check = options.checker(vlm, self.model)
        self.jobs: set[Job] = set()
        self.started = int(time.time())
        self._pool = ThreadPoolExecutor(min(THREADS, cores()), "reading")
        self._fetchers = ThreadPoolExecutor(FETCHERS, "fetching")
        vlm.prompts, vlm.tokenizer  # noqa: B018 (made once, before threads ask for them)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Nobody is let in whom the queue would not take: what waits outside takes no memory. Raises Fault."""
        limit = self.settings.max_queue + self.settings.max_batch
        if self.ending:
            raise closing()
        if self.open >= limit:
            raise busy(f"{self.open} requests are being served or wait, and no more may (--max-queue); ask again later")
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    def beside(self, work: Callable, *arguments: Any) -> asyncio.Future:
        """Run it in a thread, off the event loop."""
        return asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def afar(self, work: Callable, *arguments: Any) -> asyncio.Future:
        """`beside`, for what waits for another machine."""
        return asyncio.get_running_loop().run_in_executor(self._fetchers, work, *arguments)

    def told(self, fault: Exception) -> Fault:
        return completion.note(fault)

    @property
    def well(self) -> bool:
        return self.engine.alive and not self.ending

    def end(self) -> None:
        """Tell everybody who is still served that the server ends."""
        self.ending = True
        for job in self.jobs:
            job.happened.put_nowait(completion.CLOSING)

    def close(self) -> None:
        self.ending = True
        self.engine.close()
        for pool in (self._pool, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)


def name_of(vlm: TwigVLM) -> str:
    """What clients call the model: a hub id as it is, of a folder its name alone."""
    name = str(vlm.base_name)
    return (Path(name).resolve().name or "model") if Path(name).exists() or Path(name).is_absolute() else name
