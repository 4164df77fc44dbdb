"""What the page's server does, whatever carries it over HTTP: the model, pictures, schedules, runs."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ..config import MOST_NODES
from ..errors import InputError, RunError
from ..serving.engine import Engine
from ..serving.faults import private
from . import methods
from .guard import LARGEST
from .pictures import Picture, Pictures
from .running import LONGEST_ANSWER, LONGEST_QUESTION, Run, Work

log = logging.getLogger("twigvlm.web")


class Missing(InputError):
    """A picture that is not here."""


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
            "model": private(self.vlm.base_name),
            "device": str(self.vlm.device),
            "dtype": str(self.vlm.dtype).removeprefix("torch."),
            "twig": self.vlm.twig is not None,
            **letters,
            "methods": methods.overview(self.vlm),
            "samples": list(self.pictures.samples),
            "limits": {
                "bytes": LARGEST,
                "question": LONGEST_QUESTION,
                "max_new_tokens": LONGEST_ANSWER,
                "draft_length": MOST_NODES,
            },
        }

    def plan(self, method: str, R: float | None) -> dict:
        """Visual tokens that enter each layer, or the reason why this method cannot have this R."""
        found = methods.schedule(self.vlm, method, R)
        return found | {"reason": found["reason"] and private(found["reason"])}

    def take(self, data: bytes) -> dict:
        """A picture's bytes; the answer names it for runs."""
        picture = self.pictures.add(data)
        return {"id": picture.name, "width": picture.image.width, "height": picture.image.height}

    def picture(self, name: str) -> Picture:
        """Raises Missing."""
        found = self.pictures.find(name)
        if found is None:
            raise Missing(f"picture {name[:50]!r} is not here (any more); send it again, or take a sample")
        return found

    async def begin(self, run: Run) -> Work:
        """Raises InputError for what cannot be asked, Busy where the queue is full."""
        picture = await asyncio.to_thread(self.picture, run.picture)
        methods.check(self.vlm, run.method, run.R)
        run.options()
        inputs = await asyncio.to_thread(self.vlm.prepare, picture.image, run.question)
        length, context = inputs["input_ids"].shape[1], self.vlm.trunk.context
        if length >= context:
            raise InputError(f"the prompt has {length} tokens, and the context {context}; ask a shorter question")
        return Work(self.engine, run, inputs, self.vlm.tokenizer)


def explain(fault: Exception) -> str:
    """One line for a client; what nobody foresaw goes to the log, and no client reads of it."""
    if isinstance(fault, (InputError, RunError)):
        return private(str(fault))
    log.error("a request failed", exc_info=fault)
    return f"the server failed ({type(fault).__name__}); its terminal says more, ask again"
