"""An answer's text as it comes, cut at stop strings: what has gone out is never taken back."""

from __future__ import annotations

from collections.abc import Sequence

from ...decoding.loop import Step
from ...decoding.streamer import DraftStreamer


class Text:
    """Steps in, pieces out; together they are the answer as `TwigVLM.answer` gives it, up to the first stop string.

    Held back is what may yet turn out otherwise: half a character, the beginning of a stop string, white space that
    may end the answer.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = ()):
        self.stops, self.tokens, self.stopped = [s for s in stops if s], 0, False
        self._whole, self._sent, self._cut = "", 0, 0
        self._streamer = DraftStreamer(tokenizer, self._hear)

    def add(self, step: Step) -> str:
        """What may go out now; `tokens` counts those up to the one that ended a stop string."""
        for i, token in enumerate(step.tokens):
            if self.stopped:
                break
            self.tokens += 1
            self._streamer.put_step(Step([], int(i < step.accepted), [token]))
        return self._release(self._cut if self.stopped else self._safe())

    def end(self) -> str:
        """The rest."""
        if not self.stopped:
            self._streamer.end()
        return self._release(self._cut if self.stopped else len(self._whole.rstrip()))

    def _hear(self, text: str, _drafted: bool) -> None:
        if self.stopped:
            return
        before = len(self._whole)
        self._whole += text
        found = [(at + len(s), at) for s in self.stops if (at := self._whole.find(s, max(0, before - len(s) + 1))) >= 0]
        if found:  # the one that is complete first, however the text was cut into tokens
            self.stopped, self._cut = True, min(found)[1]

    def _safe(self) -> int:
        """Letters that stay whatever comes."""
        end = len(self._whole) - max((_begun(self._whole, stop) for stop in self.stops), default=0)
        return len(self._whole[:end].rstrip())

    def _release(self, end: int) -> str:
        piece = self._whole[self._sent : end]
        self._sent = max(self._sent, end)
        return piece


def _begun(text: str, stop: str) -> int:
    """Letters at the end of the text with which the stop string begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
