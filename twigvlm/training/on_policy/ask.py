"""Conversations answered by the base itself, turn by turn, many at once: its own earlier answers are what later turns follow.

Greedy, the data's answers are drafts: one pass reads a conversation to its end, and as far as the base would say the same
nothing need be written. Where it would not, `TwigVLM.generate` writes on from there, and the turns behind are read again.
So the answers are those that it would have written, word by word, at the price of few passes. Drawn at a temperature they
are written turn by turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...vlm import TwigVLM
from ..data.examples import IMAGE_LABEL, Example, Turn, turns


@dataclass(frozen=True)
class Writing:
    """How answers come about: `tokens` of one and `length` of a whole conversation at most; 0 is greedy."""

    tokens: int
    length: int
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Talk:
    """A conversation that is being answered; `said` are its answers, with the end token where they have one."""

    example: Example
    writing: Writing
    visual: int  # tokens of a picture
    image: int  # the token of a picture
    turns: list[Turn] = field(default_factory=list)
    said: list[list[int]] = field(default_factory=list)
    cut: bool = False  # its last answer found no end: what would follow is not asked

    def __post_init__(self) -> None:
        self.turns = turns(self.example)

    @property
    def done(self) -> bool:
        return self.cut or len(self.said) == len(self.turns)

    def asked(self) -> list[int]:
        """Ids of all up to the answer that is wanted next, every picture with all its visual tokens as IMAGE_LABEL."""
        ids: list[int] = []
        for turn, answer in zip(self.turns, [*self.said, []], strict=False):
            ids += [*self._spread(turn.asked), *answer]
        return ids

    def rest(self) -> tuple[list[int], list[int]]:
        """(the conversation with the data's answers where there are none yet, where each of these begins), as long as it may be.

        Turns that do not fit are not there.
        """
        ids, begins = [], []
        for n, turn in enumerate(self.turns):
            asked = self._spread(turn.asked)
            if len(ids) + len(asked) >= self.writing.length:
                break
            ids += asked
            if n >= len(self.said):
                begins.append(len(ids))
            ids += self.said[n] if n < len(self.said) else turn.drafted
        return ids[: self.writing.length], begins

    def add(self, words: list[int], ended: bool) -> None:
        """The next answer; a picture, which some models name by mistake, is no word and cuts it."""
        if self.image in words:
            words, ended = words[: words.index(self.image)], False
        if words:
            self.said.append(words)
        self.cut = not ended

    def room(self, used: int) -> int:
        """New tokens of an answer behind so many of the conversation."""
        return min(self.writing.tokens, self.writing.length - used)

    def pixels(self, count: int) -> torch.Tensor | None:
        """Of the pictures that the first `count` turns show."""
        shown = [i for turn in self.turns[:count] for i in turn.pictures]
        return self.example.pixels[shown] if shown else None

    def _spread(self, ids: Sequence[int]) -> list[int]:
        return [t for token in ids for t in ([token] * self.visual if token == IMAGE_LABEL else [token])]


def answer(vlm: TwigVLM, examples: Sequence[Example], writing: Writing, end: int) -> list[Talk]:
    """Answer these conversations together; `end` is the token that ends an answer."""
    talks = [Talk(example, writing, vlm.config.V, vlm.image_token_id) for example in examples]
    while True:
        for talk in talks:
            if not talk.done and talk.room(len(talk.asked())) < 1:  # the next question does not fit
                talk.cut = True
        going = [talk for talk in talks if not talk.done]
        if not going:
            return talks
        begun = [[] for _ in going] if writing.temperature else _agreed(vlm, going, end)
        both = list(zip(going, begun, strict=True))
        if both := [(talk, words) for talk, words in both if words or writing.temperature]:
            _write(vlm, both, writing, end)


def _agreed(vlm: TwigVLM, talks: Sequence[Talk], end: int) -> list[list[int]]:
    """Take over answers as far as the base would write them; of each conversation how the next one begins, if it has to be written."""
    rest = [talk.rest() for talk in talks]
    said = _likeliest(vlm, talks, rest)
    return [_take_over(talk, *one, words, end) for talk, one, words in zip(talks, rest, said, strict=True)]


def _take_over(talk: Talk, ids: Sequence[int], begins: Sequence[int], said: Sequence[int], end: int) -> list[int]:
    """How the first answer begins that the base would not end as it stands in `ids`; those before it are `talk`'s now.

    `said[i]`: the base's word at place begins[0] + i of the conversation `ids`, were all before it as it stands there."""
    for begin in begins:
        drafted, room, words = talk.turns[len(talk.said)].drafted, talk.room(begin), []
        while len(words) < room and begin + len(words) <= len(ids):
            words.append(said[begin + len(words) - begins[0]])
            if words[-1] == end or words != drafted[: len(words)]:
                break
        if words[-1] != end and len(words) < room:
            return words
        talk.add(words, words[-1] == end)
        if talk.cut or words != drafted:  # what was read behind it is void
            return []
    return []


def _likeliest(vlm: TwigVLM, talks: Sequence[Talk], rest: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
    """Of each row (ids, where answers begin): the base's most probable word at every place from the first begin to behind the end."""
    rows, trunk = [ids for ids, _ in rest], vlm.trunk
    shown = [talk.pixels(len(talk.said) + len(begins)) for talk, (_, begins) in zip(talks, rest, strict=True)]
    ids, _ = _padded(vlm, rows)
    with torch.inference_mode():
        hidden = trunk.run(trunk.layers, trunk.embed(ids, [len(row) for row in rows], _joined(shown))).hidden
        found = [trunk.logits(hidden[b, begins[0] - 1 : len(row)]) for b, (row, begins) in enumerate(rest)]
    return [logits.argmax(-1).tolist() for logits in found]


def _write(vlm: TwigVLM, begun: Sequence[tuple[Talk, list[int]]], writing: Writing, end: int) -> None:
    """The next answer of each conversation, from how it begins."""
    ids, mask = _padded(vlm, [[*talk.asked(), *words] for talk, words in begun])
    pixels = _joined([talk.pixels(len(talk.said) + 1) for talk, _ in begun])
    rooms = [talk.room(len(talk.asked())) - len(words) for talk, words in begun]
    options: dict = {"max_new_tokens": rooms}
    if writing.temperature:
        seeds = [_seed(writing.seed, talk) for talk, _ in begun]
        options |= {"do_sample": True, "temperature": writing.temperature, "seed": seeds}
    out = vlm.generate(ids, pixels, mask, eos_token_id=end, **options)
    for (talk, words), tokens, room in zip(begun, out.tokens, rooms, strict=True):
        ended = len(tokens) < room
        talk.add([*words, *tokens, *([end] if ended else [])], ended)


def _padded(vlm: TwigVLM, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask [B, S] of rows in which pictures are IMAGE_LABEL."""
    ids, mask = torch.zeros(2, len(rows), max(map(len, rows)), dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = torch.tensor(row), 1
    return ids.masked_fill(ids == IMAGE_LABEL, vlm.image_token_id), mask


def _joined(pictures: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    there = [p for p in pictures if p is not None]
    return torch.cat(there) if there else None


def _seed(seed: int, talk: Talk) -> int:
    """Of one answer, whatever is answered beside it."""
    name = f"{seed}\0{talk.example.index}\0{len(talk.said)}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
