"""Text as it is written, with the drafted words marked."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..prompt.template import decode
from .loop import Step

REPLACEMENT = "\ufffd"  # what an unfinished utf-8 sequence decodes to


class DraftStreamer:
    """Calls `on_text(text, drafted)` with every new piece, whole characters only, none twice.

    Takes whole steps from `generate`; fed tokens one by one, as Hugging Face feeds its streamers, it
    works too and calls nothing drafted.
    """

    def __init__(self, tokenizer, on_text: Callable[[str, bool], None], skip_prompt: bool = True):
        self.tokenizer, self.on_text, self.skip_prompt = tokenizer, on_text, skip_prompt
        self._tokens: list[int] = []
        self._shown = 0  # tokens whose text has been given out
        self._context = 0  # where decoding starts, so that spaces between words come out right
        self._prompt = True
        self._started = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt and self.skip_prompt:
            self._prompt = False
            return
        self._prompt = False
        for token in value.flatten().tolist():
            self._add(token, drafted=False)

    def put_step(self, step: Step) -> None:
        for i, token in enumerate(step.tokens):
            self._add(token, drafted=i < step.accepted)

    def end(self) -> None:
        self._give(drafted=False, final=True)
        self._tokens, self._shown, self._context, self._prompt, self._started = [], 0, 0, True, False

    def _add(self, token: int, drafted: bool) -> None:
        self._tokens.append(token)
        self._give(drafted)

    def _give(self, drafted: bool, final: bool = False) -> None:
        before = self._decode(self._tokens[self._context : self._shown])
        now = self._decode(self._tokens[self._context :])
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not final):
            return
        text = now[len(before) :]
        if not self._started:
            text = text.lstrip()
        if text:
            self._started = True
            self.on_text(text, drafted)
        self._context, self._shown = self._shown, len(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        return decode(self.tokenizer, tokens) if tokens else ""


def feed(streamer, step: Step) -> None:
    """Ours takes whole steps (it knows which tokens were drafted), Hugging Face's take tokens."""
    if hasattr(streamer, "put_step"):
        streamer.put_step(step)
        return
    for token in step.tokens:
        streamer.put(torch.tensor([token]))
