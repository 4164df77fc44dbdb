"""Conversation templates and image placeholders: the one place that knows how a prompt is written.

Ids equal those of the authors' code: the text is cut at `<image>` and at the end token, and each
piece is encoded by itself, so that each starts with the tokenizer's prefix space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

IMAGE = "<image>"


@dataclass(frozen=True)
class Template:
    """`system USER: … ASSISTANT: …</s>USER: …`; `end` closes every answer."""

    system: str
    user: str
    assistant: str
    end: str

    def render(self, turns: Sequence[tuple[str, str | None]]) -> str:
        """Text of a conversation of (user, assistant) turns; the last answer may be None: to be written."""
        text = f"{self.system} "
        for user, assistant in turns:
            text += f"{self.user}: {user} {self.assistant}:"
            if assistant is not None:
                text += f" {assistant}{self.end}"
        return text


# The wording is part of the checkpoints: LLaVA-1.5 was trained behind exactly this sentence.
VICUNA_V1 = Template(
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    user="USER",
    assistant="ASSISTANT",
    end="</s>",
)


def encode(tokenizer, text: str, image_token_id: int, visual_tokens: int, bos: bool = True) -> list[int]:
    """Token ids of `text`, each `<image>` as `visual_tokens` times `image_token_id`."""
    ids = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    for piece in re.split(f"({re.escape(IMAGE)}|{re.escape(VICUNA_V1.end)})", text):
        if piece == IMAGE:
            ids += [image_token_id] * visual_tokens
        elif piece == VICUNA_V1.end:
            ids.append(tokenizer.eos_token_id)
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False).input_ids
    return ids
