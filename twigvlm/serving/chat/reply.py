"""Answers in OpenAI's shape, whole or in chunks."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ...decoding.loop import Step
from ...model.trunk import Trunk
from ..engine import Answer

STOP, LENGTH = "stop", "length"
DONE = b"data: [DONE]\n\n"
DIGITS = 4  # of seconds and rates


@dataclass
class Reply:
    """What every part of one reply says."""

    model: str
    counted: bool = False  # the stream ends with a chunk of usage
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str, usage: dict, twig: dict) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return self._head("chat.completion") | {"choices": [choice], "usage": usage, "twig": twig}

    def chunk(self, delta: dict[str, str], reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        said = {"choices": [choice]} | ({"usage": None} if self.counted else {})
        return event(self._head("chat.completion.chunk") | said | more)

    def count(self, usage: dict) -> bytes:
        return event(self._head("chat.completion.chunk") | {"choices": [], "usage": usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(facts: dict[str, Any]) -> bytes:
    """One of a stream of server-sent events; no letter of it is taken for the end of a line by anybody."""
    said = encoded(facts)
    for letter in "\x85\u2028\u2029":
        said = said.replace(letter.encode(), f"\\u{ord(letter):04x}".encode())
    return b"data: " + said + b"\n\n"


def encoded(facts: Any) -> bytes:
    return json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def usage(prompt: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def figures(
    answer: Answer, ids: list[int], trunk: Trunk, steps: list[Step], tokens: int, arrived: float
) -> dict[str, Any]:
    """The object `twig`: what was kept of the pictures, what was drafted, how fast it was; times in seconds."""
    shown = ids.count(trunk.image_token_id)
    kept = None if answer.kept is None or not shown else answer.kept.tolist()
    first = answer.times[0] if answer.times else None
    spent = answer.ended - answer.started if answer.started is not None else 0.0
    return {
        "visual_tokens": shown,
        "visual_kept": shown if kept is None else len(kept),
        "visual_measured": None if answer.visual is None else round(answer.visual, DIGITS),
        "kept": kept,
        "drafted": sum(len(step.drafted) for step in steps),
        "accepted": sum(step.accepted for step in steps),
        "steps": len(steps),
        "time_to_first_token": None if first is None else round(first - arrived, DIGITS),
        "queue_time": None if answer.started is None else round(answer.started - answer.asked, DIGITS),
        "tokens_per_second": round(tokens / spent, DIGITS) if spent > 0 else None,
        "batch": answer.rows,
    }
