"""From LLaVA's instruction records to batches: which tokens, which of them to learn, which pictures.

Knows neither the model nor the order of training. An unusable record is an answer (`Skipped`), not an
exception: nothing is masked, cut or mended silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ...errors import InputError, RunError
from ...files import exists
from ...prompt.images import open_image
from ...prompt.template import VICUNA_V1, TextEncoder, Unalignable, text_encoder
from ...workers import named
from .conversation import NO_LABELS, Conversation, Skipped, read
from .records import Records

__all__ = ["IGNORE", "IMAGE_LABEL", "Collator", "Example", "Records", "Skipped", "TwigDataset", "encode", "read"]

IMAGE_LABEL = -200  # stands in `input_ids` for one whole picture, as in the authors' code
IGNORE = -100  # a label that is not learnt
TRIES = 1000  # records that are looked at for a stand-in

TOO_LONG, IMAGE_MISSING, IMAGE_BROKEN = "too long", "image missing", "image broken"
DROPPED = "dropped on request"


@dataclass(frozen=True)
class Example:
    """One usable record.

    input_ids hold IMAGE_LABEL once per picture. labels are input_ids where the assistant speaks,
    its end token included, and IGNORE elsewhere (a picture within an answer keeps IMAGE_LABEL and is
    not learnt either). `length` counts every picture with all its visual tokens.
    """

    input_ids: list[int]
    labels: list[int]
    images: tuple[str, ...]
    length: int
    unshown: int = 0
    index: int | None = None
    id: object = None
    pixels: torch.Tensor | None = None  # [pictures, 3, h, w]

    @property
    def learnt(self) -> int:
        """Number of tokens that are learnt."""
        return sum(label >= 0 for label in self.labels)


@dataclass(frozen=True)
class Turn:
    """A piece of an example: what stands before an answer, the answer with its end token, which pictures the former shows."""

    asked: list[int]
    answer: list[int]
    pictures: list[int]  # numbers among the example's

    @property
    def drafted(self) -> list[int]:
        """The answer up to a picture, which nobody can say."""
        return self.answer[: self.answer.index(IMAGE_LABEL)] if IMAGE_LABEL in self.answer else self.answer


def turns(example: Example) -> list[Turn]:
    """The example cut behind every answer."""
    found, shown = [], 0
    pairs = zip(example.input_ids, example.labels, strict=True)
    runs = [[token for token, _ in run] for _, run in groupby(pairs, lambda pair: pair[1] == IGNORE)]
    for asked, answer in zip(runs[::2], runs[1::2], strict=True):
        before, within = asked.count(IMAGE_LABEL), answer.count(IMAGE_LABEL)
        found.append(Turn(asked, answer, list(range(shown, shown + before))))
        shown += before + within
    return found


def respoken(example: Example, answers: Sequence[Sequence[int]], visual_tokens: int) -> Example:
    """The example with other answers (ids, each with its end token); turns beyond them are not there, nor are their pictures."""
    ids, labels, pictures = [], [], []
    for turn, answer in zip(turns(example), answers, strict=False):
        said = [int(token) for token in answer]
        ids += turn.asked + said
        labels += [IGNORE] * len(turn.asked) + said
        pictures += turn.pictures
    images = tuple(example.images[i] for i in pictures)
    return replace(
        example, input_ids=ids, labels=labels, images=images, length=len(ids) + len(images) * (visual_tokens - 1)
    )


def encode(record: object, tokenizer, max_length: int, visual_tokens: int = 576) -> Example | Skipped:
    """Ids and labels of a record: a Hugging Face tokenizer (or TextEncoder), lengths in tokens."""
    text = tokenizer if isinstance(tokenizer, TextEncoder) else text_encoder(tokenizer)
    talk = read(record)
    if isinstance(talk, Skipped):
        return talk
    try:
        ids, labels = _tokens(talk, text)
    except Unalignable as fault:
        cause, detail = fault.args
        return Skipped(f"{NO_LABELS}: {cause}", detail)
    length = len(ids) + len(talk.images) * (visual_tokens - 1)
    if length > max_length:
        pictures = f", {len(talk.images)} x {visual_tokens} of them visual" if talk.images else ""
        return Skipped(TOO_LONG, f"{length} tokens{pictures}; the maximum length is {max_length}")
    return Example(ids, labels, talk.images, length, talk.unshown)


def _tokens(talk: Conversation, text: TextEncoder) -> tuple[list[int], list[int]]:
    label = IMAGE_LABEL if talk.marked else None
    ids = [] if text.bos is None else [text.bos]
    labels = [IGNORE] * len(ids)
    template = VICUNA_V1 if talk.system is None else replace(VICUNA_V1, system=talk.system)
    for said in template.rounds(talk.messages):
        said_ids, asked = text.round(said, label)
        ids += said_ids
        labels += [IGNORE] * asked + said_ids[asked:]
    if text.unk is not None and text.unk in ids:
        raise Unalignable("control word in the text", "an unknown token, which also pads")
    return ids, labels


class TwigDataset(Dataset):
    """Examples by their place in the file, encoded and opened when asked for; faulty ones are `Skipped`.

    `usable` are the places that training draws from, once a survey has found them; a batch whose
    every picture turns out to be broken borrows from there.
    """

    def __init__(
        self,
        records: Records,
        image_folder: str | Path | None,
        tokenizer,
        image_processor,
        max_length: int,
        visual_tokens: int = 576,
        usable: np.ndarray | None = None,
    ):
        """`image_processor`: PIL images → pixel_values; None opens no pictures. Raises InputError for a missing folder."""
        self.folder = None if image_folder is None else Path(image_folder)
        check_image_folder(self.folder)
        self.records, self.text = records, TextEncoder(tokenizer)
        self.image_processor = image_processor
        self.max_length, self.visual_tokens = max_length, visual_tokens
        self.usable = usable
        self.dropped: frozenset[int] = frozenset()
        self.spoken: Mapping[int, Sequence[np.ndarray]] = {}  # answers in place of the data's: see `training.on_policy`

    def drop(self, places: Iterable[int]) -> None:
        """Leave these places of the file out, for reasons of the user's. Raises InputError for places beyond it."""
        self.dropped = frozenset(places)
        if beyond := [i for i in self.dropped if not 0 <= i < len(self)]:
            raise InputError(
                f"index {min(beyond)} to drop: {self.records.path} holds {len(self)} records, counted from 0; "
                "such indices belong to one file"
            )

    def __len__(self) -> int:
        return len(self.records)

    def encode(self, i: int) -> Example | Skipped:
        """Record i without opening its pictures."""
        with self._named(i):
            return self._encode(i)

    def _named(self, i: int):
        """What nobody foresaw (a memory that is full) is told of the sample that it happened to."""
        return named(lambda: f"{self.records.path}, sample {i}")

    def _encode(self, i: int) -> Example | Skipped:
        record = self.records[i]
        if i in self.dropped:
            found = Skipped(DROPPED, "by its index")
        else:
            found = encode(record, self.text, self.max_length, self.visual_tokens)
        if i in self.spoken and isinstance(found, Example):
            found = respoken(found, self.spoken[i], self.visual_tokens)
        return replace(found, index=int(i), id=record.get("id") if isinstance(record, dict) else None)

    def __getitem__(self, i: int) -> Example | Skipped:
        with self._named(i):
            return self._pixels(i)

    def _pixels(self, i: int) -> Example | Skipped:
        found, opened = self._look(i)
        if not opened or self.image_processor is None:
            return found
        return replace(found, pixels=self.image_processor(opened, return_tensors="pt")["pixel_values"])

    def __getitems__(self, indices: Sequence[int]) -> list[Example | Skipped]:
        """A batch, as torch's DataLoader asks for it; it has at least one example.

        What cannot be used is left out of its batch, whose loss is then a mean over fewer tokens. A
        batch that loses all borrows the next usable example of the file, of the same kind where
        there is one, so that a resumed run sees the same.
        """
        batch = [self[i] for i in indices]
        if not any(isinstance(b, Example) for b in batch):
            batch += self._stand_in(indices)
        return batch

    def check(self, i: int) -> Example | Skipped:
        """Record i, its pictures opened for the sake of it."""
        with self._named(i):
            return self._look(i)[0]

    def _look(self, i: int) -> tuple[Example | Skipped, list[Image.Image]]:
        """Record i and its pictures, if any is shown and all can be read."""
        found, opened = self.encode(i), []
        for name in found.images if isinstance(found, Example) else ():
            path = self._path(name)
            try:
                opened.append(open_image(path))
            except InputError as fault:
                reason = IMAGE_BROKEN if exists(path) else IMAGE_MISSING
                return Skipped(reason, str(fault), found.index, found.id), []
        return found, opened

    def missing(self, images: Sequence[str]) -> str | None:
        """The first of these pictures that is not there."""
        return next((str(self._path(name)) for name in images if not exists(self._path(name))), None)

    def _path(self, name: str) -> Path:
        if self.folder is None:
            raise InputError("the samples have images; give the folder that their names start from")
        return self.folder / name

    def _stand_in(self, indices: Sequence[int]) -> list[Example | Skipped]:
        usable = np.arange(len(self)) if self.usable is None else self.usable
        first = int(np.searchsorted(usable, max(indices), side="right"))
        tried, spare = [], None
        for step in range(min(len(usable), TRIES)):
            i = int(usable[(first + step) % len(usable)])
            if i in indices:
                continue
            found = self[i]
            if isinstance(found, Example) and found.images:
                return [*tried, found]
            if isinstance(found, Example):
                spare = spare or found
            else:
                tried.append(found)
        if spare is None:
            raise RunError(
                f"{self.records.path}: no usable sample among {TRIES} in a row ({tried[0].detail if tried else 'none'}); "
                "check the image folder with python -m twigvlm.training.inspect"
            )
        return [*tried, spare]


def check_image_folder(folder: Path | None) -> None:
    if folder is not None and not (exists(folder) and folder.is_dir()):
        raise InputError(f"{folder}: no such folder; give the one that the file's image names start from")


@dataclass(frozen=True)
class Collator:
    """Examples to a right-padded batch, every picture with all its visual tokens.

    Gives input_ids [B, S] (a picture is visual_tokens times `image_token_id`), labels [B, S] (IGNORE
    where nothing is learnt), attention_mask [B, S], lengths (list), pixel_values [pictures, 3, h, w] in
    the order of their tokens or None, indices (list, of the rows) and skipped (list of Skipped).
    """

    image_token_id: int
    visual_tokens: int
    pad_token_id: int = 0

    def __call__(self, items: Sequence[Example | Skipped]) -> dict:
        examples = [item for item in items if isinstance(item, Example)]
        rows = [self._row(e) for e in examples]
        width = max((len(ids) for ids, _ in rows), default=0)
        ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORE)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for b, (row, learnt) in enumerate(rows):
            ids[b, : len(row)] = torch.tensor(row)
            labels[b, : len(row)] = torch.tensor(learnt)
            mask[b, : len(row)] = 1
        pixels = [e.pixels for e in examples if e.pixels is not None]
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": mask,
            "lengths": [len(row) for row, _ in rows],
            "pixel_values": torch.cat(pixels) if pixels else None,
            "indices": [e.index for e in examples],
            "skipped": [item for item in items if isinstance(item, Skipped)],
        }

    def _row(self, example: Example) -> tuple[list[int], list[int]]:
        ids, labels = [], []
        for token, label in zip(example.input_ids, example.labels, strict=True):
            if token == IMAGE_LABEL:
                ids += [self.image_token_id] * self.visual_tokens
                labels += [IGNORE] * self.visual_tokens
            else:
                ids.append(token)
                labels.append(label)
        return ids, labels
