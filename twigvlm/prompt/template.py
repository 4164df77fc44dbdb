"""Conversation templates and image placeholders: the one place that knows how a prompt is written, and an answer read.

Ids equal those of the authors' code: the text is cut at `<image>`, and each piece is encoded by
itself, so that each starts with the tokenizer's prefix space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

from tokenizers import Encoding, Tokenizer

from ..config import IMAGE
from ..errors import InputError
from ..files import whole
from ..loading.judge.probe import heard, says

# Inside this module: a picture's place, and `<image>` where it is a word. No text holds them, `whole` sees to it.
PLACE, WORD = "\ud800", "\ud801"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token that stands for one byte
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

    def render(self, turns: Sequence[tuple[str, str | None]], system: str | None = None) -> str:
        """Text of a conversation of (user, assistant) turns; the last answer may be None: to be written."""
        text = f"{self.system if system is None else system} "
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

    def __init__(self, tokenizer, special: Collection[str] | None = None):
        """From a Hugging Face tokenizer; `special` tokens instead of those three.

        Raises InputError for one that has no end token or no fast backend.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or tokenizer.eos_token_id is None:
            raise InputError(f"{type(tokenizer).__name__}: a fast tokenizer with an end token is needed")
        facts = json.loads(backend.to_str())
        special = special or {tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token}
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
        self.frame: tuple[list[int], list[int]] = getattr(tokenizer, "image_frame", ([], []))  # around each picture

    def __call__(self, text: str) -> list[int]:
        """Ids of a text, without bos."""
        return self._backend.encode(whole(text), add_special_tokens=False).ids

    def pieces(self, parts: Sequence[str], image: Sequence[int]) -> list[int]:
        """Ids of text cut at its pictures, each of them as `image` in its frame."""
        before, after = self.frame
        ids = self(parts[0]) if parts[0] else []
        for piece in parts[1:]:
            ids += [*before, *image, *after, *(self(piece) if piece else [])]
        return ids

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
                ids += [*self.frame[0], image_label, *self.frame[1]]
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
    start = [words.bos] if bos and words.bos is not None else []
    return start + words.pieces(text.split(IMAGE), [image_token_id] * visual_tokens)


def decode(tokenizer, tokens: Sequence[int]) -> str:
    """The text of an answer, without special tokens.

    A character that was cut, or never finished, becomes one U+FFFD: its neighbours stay, which the
    tokenizer alone would lose with it where they are written in bytes too.
    """
    tokens = list(tokens)
    words = tokenizer.convert_ids_to_tokens(tokens) if hasattr(tokenizer, "convert_ids_to_tokens") else []
    values = [int(found[1], 16) if word and (found := BYTE.fullmatch(word)) else None for word in words]
    if any(value is not None for value in values):
        tokens = _mended(tokenizer, tokens, values)
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _mended(tokenizer, tokens: list[int], values: list[int | None]) -> list[int]:
    """The same tokens with every run of bytes valid UTF-8; `values` are the bytes that tokens stand for."""
    out: list[int] = []
    for is_byte, run in groupby(zip(tokens, values, strict=True), lambda pair: pair[1] is not None):
        if is_byte:
            data = bytes(value for _, value in run).decode("utf-8", "replace").encode()
            out += tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in data])
        else:
            out += [token for token, _ in run]
    return out


# ---------------------------------------------------------------------- conversations


@dataclass(frozen=True)
class Talk:
    """A conversation that waits for an answer; PLACE stands where a picture is, and `leading` more stand before all."""

    turns: list[tuple[str, str | None]]
    system: str | None = None
    leading: int = 0


def converse(history: Sequence, question: str | Sequence[Mapping], images: int) -> Talk:
    """A question after `history`: (question, answer) pairs or chat messages, about `images` pictures.

    A message is {"role": "system" | "user" | "assistant", "content": text or parts}, a part
    {"type": "text", "text": …} or {"type": "image"}. Pictures stand where the image parts are, or
    where the first question has `<image>`, else before it; `<image>` anywhere else is a word.
    Raises InputError for other content, roles that do not alternate, and marks that are not as many
    as the pictures.
    """
    system, turns = _turns(history)
    turns.append((_content(question, "the question"), None))
    first, reply = turns[0]
    marked = sum(text.count(PLACE) for text, _ in turns)
    if not marked and (marked := first.count(IMAGE)):
        turns[0] = (first.replace(IMAGE, PLACE), reply)
    if marked not in (0, images):
        raise InputError(f"the question has {marked} {IMAGE} marks for {images} images; write none or one per image")
    return Talk(turns, system, 0 if marked else images)


def _turns(history: Sequence) -> tuple[str | None, list[tuple[str, str | None]]]:
    """(text of a system message, turns) of pairs or chat messages."""
    if not history:
        return None, []
    if not isinstance(history[0], Mapping):
        for i, pair in enumerate(history):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
                raise InputError(
                    f"history, entry {i}: a (question, answer) pair of texts, or a chat message, is needed"
                )
        return None, [(whole(asked), whole(told)) for asked, told in history]
    said: list[tuple[str, str]] = []
    for i, message in enumerate(history):
        role = message.get("role") if isinstance(message, Mapping) else None
        expected = ("user", "assistant")[sum(r != "system" for r, _ in said) % 2]
        if role != expected and not (role == "system" and i == 0):
            raise InputError(
                f"history, message {i}: role is {role!r}, {expected!r} is needed: user and assistant take turns, "
                "a system message may begin"
            )
        text = _content(message.get("content"), f"history, message {i}")
        if role != "user" and PLACE in text:
            raise InputError(f"history, message {i}: a picture in a message of role {role!r}; the user shows them")
        said.append((role, text))
    system = said.pop(0)[1] if said[0][0] == "system" else None
    if len(said) % 2:
        raise InputError("history: its last message is the user's; end it with the assistant's answer")
    return system, [(said[i][1], said[i + 1][1]) for i in range(0, len(said), 2)]


def _content(content: Any, where: str) -> str:
    """The text of a message, PLACE for each of its pictures."""
    if isinstance(content, str):
        return whole(content)
    if not isinstance(content, (list, tuple)):
        raise InputError(f"{where}: content is a {type(content).__name__}; a text or a list of parts is needed")
    out = ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            out += whole(part["text"])
        elif kind in ("image", "image_url"):
            out += f"{PLACE}\n"
        else:
            raise InputError(f"{where}: a part of type {kind!r} is not understood; 'text' with a text or 'image' is")
    return out.removesuffix("\n") if out.endswith(f"{PLACE}\n") else out


class VicunaPrompts:
    """Prompts as LLaVA-1.5 was trained on them; `visual_tokens` ids `image_token_id` for each picture."""

    template = VICUNA_V1

    def __init__(self, tokenizer, image_token_id: int, visual_tokens: int):
        self.tokenizer, self.image = tokenizer, [image_token_id] * visual_tokens

    def ids(self, talk: Talk) -> list[int]:
        (first, reply), *rest = talk.turns
        turns = [(f"{PLACE}\n" * talk.leading + first, reply), *rest]
        words = text_encoder(self.tokenizer)
        start = [] if words.bos is None else [words.bos]
        return start + words.pieces(self.template.render(turns, talk.system).split(PLACE), self.image)

    def continuation(self, text: str) -> list[int]:
        """Ids of an answer as they follow the template's last word."""
        words, before = text_encoder(self.tokenizer), f"{self.template.assistant}:"
        return words(f"{before} {text.lstrip()}")[len(words(before)) :]


class CheckpointPrompts:
    """Prompts by the chat template that a checkpoint brings; `render` makes text of chat messages."""

    def __init__(self, render: Callable[[list[dict]], str], tokenizer, image_token_id: int, visual_tokens: int):
        self.render, self.image = render, [image_token_id] * visual_tokens
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        special = {token["content"] for token in backend["added_tokens"]} - {IMAGE}
        self.words = TextEncoder(tokenizer, special)
        adds_bos = self.words.bos is not None and tokenizer("a").input_ids[:1] == [self.words.bos]
        self._begin = tokenizer.bos_token if adds_bos else None
        self._forms = {pictures: _forms(render, pictures) for pictures in (0, 1)}

    def ids(self, talk: Talk) -> list[int]:
        pictures = talk.leading + sum(text.count(PLACE) for text, _ in talk.turns)
        for form in self._forms[min(pictures, 1)]:
            try:
                text = self.render(form(talk))
            except Exception as fault:  # a template is a program
                problem = " ".join(str(fault).split())[:200]
                continue
            problem = f"{text.count(IMAGE)} marks for {pictures} pictures"
            if text.count(IMAGE) == pictures:
                break
        else:
            raise InputError(
                f"the checkpoint's chat template cannot write this conversation ({problem}); "
                "make the prompt yourself and give its ids to generate"
            )
        pieces = [piece.replace(WORD, IMAGE) for piece in text.split(IMAGE)]
        start = [self.words.bos] if self._begin and not text.startswith(self._begin) else []
        return start + self.words.pieces(pieces, self.image)

    def continuation(self, text: str) -> list[int]:
        return self.words(text.lstrip())


def _forms(render: Callable[[list[dict]], str], pictures: int) -> list[Callable[[Talk], list[dict]]]:
    """How messages are given to this template: some take parts, others texts, and print parts as Python does."""
    found = heard(render, pictures)
    fit = [in_parts for in_parts, text in found.items() if says(text) and text.count(IMAGE) == pictures]
    # Where neither fits, it may still write another conversation, or say why not.
    return [_parts if in_parts else _plain for in_parts in fit or (True, False)]


def _parts(talk: Talk) -> list[dict]:
    """Chat messages whose contents are lists of parts."""
    messages = [("system", talk.system)] if talk.system is not None else []
    messages += [m for asked, told in talk.turns for m in (("user", asked), ("assistant", told)) if m[1] is not None]
    out: list[dict] = []
    lead = talk.leading
    for role, text in messages:
        content: list[dict] = []
        if role == "user":
            content, lead = [{"type": "image"}] * lead, 0
        for i, piece in enumerate(text.replace(IMAGE, WORD).split(PLACE)):
            content += [{"type": "image"}] * (i > 0)
            if piece := piece.removeprefix("\n") if i else piece:
                content.append({"type": "text", "text": piece})
        out.append({"role": role, "content": content})
    return out


def _plain(talk: Talk) -> list[dict]:
    """Chat messages whose contents are texts."""
    lead, out = f"{IMAGE}\n" * talk.leading, []
    for message in _parts(Talk(talk.turns, talk.system)):
        text = "".join(part.get("text", f"{IMAGE}\n") for part in message["content"])
        if message["role"] == "user":
            text, lead = lead + text, ""
        out.append({"role": message["role"], "content": text})
    return out
