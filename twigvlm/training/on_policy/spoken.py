"""The base's own answers to samples of the training data, as a file of JSON lines, and a training's data with them.

The first line of `on_policy.jsonl` says whose answers follow and how they were written, each other one holds a sample's:
token ids, as a training learns them. Of several processes each writes a file of its own beside it, and what all have
written becomes the one file. An answer depends on the base, its sample and the settings alone, so more can be added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...files import Appender, alone, write_text
from ..data.examples import Example
from ..data.loading import TrainingData
from ..settings import Settings

FILE, PARTS, LOCK = "on_policy.jsonl", "on_policy-{}.jsonl", ".on_policy.lock"
FORMAT = 1
Answers = dict[int, list[np.ndarray]]  # place in the data's file → ids of its answers, end tokens included


def choose(usable: np.ndarray, settings: Settings) -> np.ndarray:
    """Places of the samples whose answers are the base's; those of a smaller number are among those of a larger.

    Raises InputError for more than there are.
    """
    if settings.on_policy > len(usable):
        raise InputError(
            f"on_policy is {settings.on_policy}, but {settings.data} has {len(usable)} samples to train on; "
            f"choose {len(usable)} or less"
        )
    return np.random.default_rng(settings.seed % 2**63).permutation(usable)[: settings.on_policy]


def header(settings: Settings, signature: Sequence[float], base: str, data: TrainingData) -> dict[str, Any]:
    """What every answer depends on."""
    drawn = settings.on_policy_temperature > 0
    return {
        "format": FORMAT,
        "base": base,
        "base_signature": list(signature),
        "data": data.dataset.records.digest(),
        "max_length": data.dataset.max_length,
        "tokens": settings.on_policy_tokens,
        "temperature": settings.on_policy_temperature,
        "seed": settings.seed if drawn else None,
    }


def on_policy_identity(settings: Settings) -> dict[str, Any]:
    """What makes another run of one that learns from them."""
    names = ("on_policy", "on_policy_tokens", "on_policy_temperature")
    return {name: getattr(settings, name) for name in names} if settings.on_policy else {}


def read(out: Path, wanted: Mapping[str, Any]) -> Answers:
    """All answers in a folder. Raises InputError for a damaged line, or for answers that were written another way than `wanted`."""
    found: Answers = {}
    for file in files(out):
        rows = file.read_bytes().split(b"\n")[:-1]  # a last line that was cut short is not there
        for number, row in enumerate(rows, 1):
            try:
                line = json.loads(row)
                if number == 1:
                    _compare(file, line, wanted)
                else:
                    found[line["index"]] = [np.array(answer, np.int32) for answer in line["answers"]]
            except (ValueError, KeyError, TypeError) as fault:
                if isinstance(fault, InputError):
                    raise
                raise InputError(
                    f"{file}: line {number} is damaged ({fault}); delete it, and the sample is answered again"
                ) from fault
    return found


def files(out: Path) -> list[Path]:
    return sorted(file for file in (out / FILE, *out.glob(PARTS.format("*"))) if file.exists())


def _compare(file: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    near = np.allclose(stored["base_signature"], wanted["base_signature"], rtol=0.02, atol=1e-4)
    differ = [] if near else [f"the base {stored['base']!r} with other weights than {wanted['base']!r}"]
    if stored["data"] != wanted["data"]:
        differ.append("other data")
    for key in ("format", "max_length", "tokens", "temperature", "seed"):
        if stored.get(key) != wanted[key]:
            differ.append(f"{key} {stored.get(key)!r}, not {wanted[key]!r}")
    if differ:
        raise InputError(
            f"{file}: holds answers of {'; '.join(differ)}; choose another --out, or delete the file to have them written anew"
        )


class Writer(Appender):
    """A file of answers, open for one process, with `head` as its first line."""

    def __init__(self, file: Path, head: Mapping[str, Any]):
        super().__init__(file)
        if not file.stat().st_size:
            self.write([head])


def gather(out: Path, wanted: Mapping[str, Any], places: Sequence[int]) -> int:
    """How many of the samples at `places` are answered; once all are, one file holds them, in the order of the data."""
    with alone(out / LOCK):
        found = read(out, wanted)
        written = files(out)
        if set(places) <= found.keys() and written != [out / FILE]:
            heads = [file.read_text(encoding="utf-8").split("\n", 1) for file in written]
            lines = {json.loads(line)["index"]: line for _, rest in heads for line in rest.splitlines()}
            write_text("\n".join([heads[0][0], *(lines[i] for i in sorted(lines))]) + "\n", out / FILE)
            for file in written:
                if file != out / FILE:
                    file.unlink()
    return len(found.keys() & set(places))


# ---------------------------------------------------------------------- a training's side


def with_answers(
    data: TrainingData, settings: Settings, signature: Sequence[float], base: str, out: Path
) -> TrainingData:
    """The data with the base's answers in place of their own for the samples that were chosen.

    Raises InputError where they are not all there, or were written another way.
    """
    places = choose(data.usable, settings)
    found = read(out, header(settings, signature, base, data))
    missing = len(places) - len(found.keys() & set(places.tolist()))
    if missing:
        raise InputError(
            f"{out / FILE}: {missing} of {len(places)} samples have no answer of the base yet; write them with "
            "python -m twigvlm.training.on_policy and the flags of this training, as scripts/v1_5/train_twig.sh does"
        )
    # A sample whose picture turned out to be broken has none: the training finds out as well.
    answers = {int(i): found[int(i)] for i in places if found[int(i)]}
    data.dataset.spoken = answers
    lengths, learnt, images = (part.copy() for part in (data.found.lengths, data.found.learnt, data.found.images))
    for i in answers:
        sample = data.dataset.encode(i)
        if isinstance(sample, Example):
            lengths[i], learnt[i], images[i] = sample.length, sample.learnt, len(sample.images)
    survey = replace(data.found, lengths=lengths, learnt=learnt, images=images)
    return replace(data, found=survey, spoken=digest(answers))


def digest(answers: Answers) -> str:
    """To recognise them by."""
    hashed = hashlib.blake2b(digest_size=16)
    for i in sorted(answers):
        hashed.update(np.array([i, *map(len, answers[i])], np.int64).tobytes())
        for one in answers[i]:
            hashed.update(one.tobytes())
    return hashed.hexdigest()
