"""Conversation templates and image placeholders: the one place that knows how a prompt is written.

Ids equal those of the authors' code: the text is cut at `<image>`, and each piece is encoded by
itself, so that each starts with the tokenizer's prefix space.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Encoding, Tokenizer

from ..errors import InputError

IMAGE = "<image>"
HUMAN, MODEL = "human", "gpt"  # who speaks, as LLaVA's instruction files say it


class Unalignable(ValueError):
    """In this conversation it cannot be told which words the assistant spoke: (cause, detail)."""


@dataclass(frozen=True)
class Round:
    """What stands before an end token: `asked`, up to the space behind `ASSISTANT:`, then the answer."""

    asked: str
    answer: str


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

    def rounds(self, messages: Sequence[tuple[str, str]]) -> list[Round]:
        """A conversation of (HUMAN or MODEL, text) messages, cut behind every answer.

        An empty message is `ROLE:` without a space, and an empty answer has no end token: it runs
        into the next question. Raises Unalignable where the rounds, looked for in the finished
        text as the authors' code does, are not those that were spoken: such samples teach nothing
        there, and a wrong cut would teach the question.
        """
        self._check_turns(messages)
        open_, rounds = f"{self.system} ", []
        for speaker, text in messages:
            if speaker == MODEL and text:
                rounds.append(self._round(f"{open_}{self.assistant}: ", text))
                open_ = ""
            else:
                name = self.user if speaker == HUMAN else self.assistant
                open_ += f"{name}: {text} " if text else f"{name}:"
        if messages[-1][0] == HUMAN:
            raise Unalignable("ends with a question", "the last turn is the human's; nobody answers it")
        if open_:
            raise Unalignable("empty message", "the last answer is empty")
        return rounds

    def _check_turns(self, messages: Sequence[tuple[str, str]]) -> None:
        """HUMAN and MODEL in turn, no control word within."""
        if all(speaker != MODEL for speaker, _ in messages):
            raise Unalignable("no answer", "the assistant says nothing")
        for i, (speaker, text) in enumerate(messages):
            if speaker != (HUMAN, MODEL)[i % 2]:
                raise Unalignable("turns out of order", f"turn {i} is {speaker}'s; human and gpt must alternate")
            if self.end in text:
                raise Unalignable("control word in the text", f"turn {i} holds {self.end}, which ends an answer")

    def _round(self, asked: str, answer: str) -> Round:
        mark = f" {self.assistant}: "
        parts = (asked + answer).split(mark)
        if len(parts) == 1:
            raise Unalignable("empty message", "a question is empty")
        if len(parts) > 2 or parts[0] + mark != asked:
            raise Unalignable("control word in the text", f"a message holds {mark.strip()}, which begins an answer")
        return Round(asked, answer)


# The wording is part of the checkpoints: LLaVA-1.5 was trained behind exactly this sentence.
VICUNA_V1 = Template(
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    user="USER",
    assistant="ASSISTANT",
    end="</s>",
)


class TextEncoder:
    """Text to the ids that LLaVA was trained on, fast, without what a processor adds to a tokenizer.

    Those are the ids of transformers' fast tokenizer in its old ("legacy") form: a prefix space at
    the start and behind every special token, and no special tokens but unk, bos and eos. `<image>`
    is plain text here.
    """

    def __init__(self, tokenizer):
        """From a Hugging Face tokenizer. Raises InputError for one that has no end token or no fast backend."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or tokenizer.eos_token_id is None:
            raise InputError(f"{type(tokenizer).__name__}: a fast tokenizer with an end token is needed")
        facts = json.loads(backend.to_str())
        special = {tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token}
        facts["added_tokens"] = [t for t in facts["added_tokens"] if t["content"] in special]
        split = facts["pre_tokenizer"] or {}
        if split.get("type") == "Metaspace" and split.get("prepend_scheme") == "always" and not split.get("split"):
            # Metaspace leaves a piece that begins with a space without its prefix; the original did not.
            space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
            prefix = {"type": "Prepend", "prepend": "▁"}
            facts["normalizer"] = {"type": "Sequence", "normalizers": [prefix, space]}
            facts["pre_tokenizer"] = None
        self.description = json.dumps(facts, sort_keys=True)
        self._backend = Tokenizer.from_str(self.description)
        self.bos, self.eos, self.unk = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id

    def __call__(self, text: str) -> list[int]:
        """Ids of a text, without bos."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def round(self, said: Round, image_label: int | None) -> tuple[list[int], int]:
        """Ids of a round, its end token included, and how many of them stand before the answer.

        The space before the answer belongs to the answer, whose first token holds it. With
        `image_label` each `<image>` becomes this one. Raises Unalignable where the tokenizer joins
        the space with what was asked.
        """
        text, space, ids, asked = said.asked + said.answer, len(said.asked) - 1, [], 0
        begin = 0
        for piece in text.split(IMAGE) if image_label is not None else [text]:
            if begin:
                ids.append(image_label)
            if piece:
                encoded = self._backend.encode(piece, add_special_tokens=False)
                if begin <= space < begin + len(piece):
                    asked = len(ids) + self._first_token(encoded, space - begin)
                ids += encoded.ids
            begin += len(piece) + len(IMAGE)
        return [*ids, self.eos], asked

    @staticmethod
    def _first_token(encoded: Encoding, place: int) -> int:
        """The token that begins with this character."""
        token = encoded.char_to_token(place)
        if token is None or encoded.token_to_chars(token)[0] != place:
            raise Unalignable("token boundary", "the tokenizer joins a question with its answer")
        return token


@lru_cache(maxsize=4)
def text_encoder(tokenizer) -> TextEncoder:
    """The encoder of this tokenizer, made once."""
    return TextEncoder(tokenizer)


def encode(tokenizer, text: str, image_token_id: int, visual_tokens: int, bos: bool = True) -> list[int]:
    """Token ids of `text`, each `<image>` as `visual_tokens` times `image_token_id`."""
    words = text_encoder(tokenizer)
    ids = [words.bos] if bos and words.bos is not None else []
    for i, piece in enumerate(text.split(IMAGE)):
        if i:
            ids += [image_token_id] * visual_tokens
        if piece:
            ids += words(piece)
    return ids
