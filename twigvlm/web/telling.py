"""From what the engine reports to what a page shows: words with where they come from, figures, patches.

It runs beside the engine's thread, so that no time is spent between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..decoding import DraftStreamer, Step
from ..prompt.template import decode

MOST_REJECTED = 16  # drafted tokens of a step that are told
CONTEXT = 8  # tokens before a rejected one, so that spaces come out right
MEGA = 1e6


class Teller:
    """Tells one answer, step by step."""

    def __init__(self, tokenizer):
        self.tokenizer, self.tokens = tokenizer, []
        self._streamer = DraftStreamer(tokenizer, self._hear)
        self._pieces: list[dict] = []
        self._drafted, self._probability, self._believed = False, None, None

    def step(self, step: Step, seconds: float) -> dict:
        """What was written `seconds` after the start: pieces of text, whole characters only, and what was rejected."""
        rejected = self._rejected(step)
        for i, token in enumerate(step.tokens):
            self._drafted = i < step.accepted
            self._probability = step.probabilities[step.path[i]] if self._drafted and step.path else None
            self._believed = step.believed[i] if step.believed else None
            self._streamer.put_step(Step([], int(self._drafted), [token]))
        self.tokens += step.tokens
        return {
            "at": seconds,
            "pieces": self._taken(),
            "rejected": rejected,
            "drafted": len(step.drafted),
            "accepted": step.accepted,
            "tokens": len(step.tokens),
            "seconds": step.seconds,
        }

    def rest(self) -> list[dict]:
        """What is left at the end: a character that was never finished."""
        self._drafted, self._probability, self._believed = False, None, None
        self._streamer.end()
        return self._taken()

    @property
    def text(self) -> str:
        return decode(self.tokenizer, self.tokens).strip() if self.tokens else ""

    def _hear(self, text: str, drafted: bool) -> None:
        sure = {"probability": self._probability, "believed": self._believed}
        self._pieces.append({"text": text, "drafted": drafted, **sure})

    def _taken(self) -> list[dict]:
        taken, self._pieces = self._pieces, []
        return taken

    def _rejected(self, step: Step) -> list[dict]:
        """Drafted tokens that the base did not write, each with its text behind those that lead to it."""
        right, paths, out = set(step.path), [], []
        before = self.tokens[-CONTEXT:]
        for node, token in enumerate(step.drafted):
            parent = step.parents[node] if step.parents else node - 1
            path = [*(paths[parent] if parent >= 0 else []), token]
            paths.append(path)
            if node not in right and len(out) < MOST_REJECTED:
                text = self._after([*before, *path[:-1]], token)
                out.append({"text": text, "probability": step.probabilities[node], "depth": len(path)})
        return out

    def _after(self, before: Sequence[int], token: int) -> str:
        stem = decode(self.tokenizer, before) if before else ""
        return decode(self.tokenizer, [*before, token])[len(stem) :]


def figures(stats: Any, steps: Sequence[dict]) -> dict:
    """An answer's meters; seconds are between the start of its work and the moment that a step was written.

    `split`: the prompt with the first verification, drafts, and verifications. `cache_mb`: filled, not allocated.
    """
    last, first = steps[-1]["at"], steps[0]["at"]
    tokens, accepted = sum(s["tokens"] for s in steps), sum(s["accepted"] for s in steps)
    timed = [s["seconds"] for s in steps if s["seconds"] is not None]
    draft = sum(d for d, _ in timed)
    prefill = max(first - (timed[0][0] if timed else 0.0), 0.0)
    return {
        "tokens": tokens,
        "steps": len(steps),
        "first": first,
        "seconds": last,
        "tokens_per_second": tokens / last if last > 0 else None,
        "accepted_per_step": accepted / len(steps),
        "drafted": sum(s["drafted"] for s in steps),
        "accepted": accepted,
        "cache_mb": stats.cache_bytes_used / MEGA,
        "split": {"prefill": prefill, "draft": draft, "verify": max(last - prefill - draft, 0.0)},
        "visual_measured": stats.visual_measured,
        "visual_kept": stats.visual_kept,
        "visual_tokens": stats.visual_tokens,
        "layers": list(stats.visual_by_layer),
        "drafts": stats.draft_shape,
    }


def patches(kept: Any, scores: Any) -> dict:
    """Indices of the kept visual tokens (None: all), and the score of each (None: none was given)."""
    return {
        "kept": None if kept is None else [int(k) for k in kept],
        "scores": None if scores is None else [None if math.isnan(s) else s for s in scores.tolist()],
    }


def difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place where two answers differ; None where they do not."""
    if list(one) == list(other):
        return None
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
