"""How often the twig would draft what the base says: the share of answer positions of held-out samples
where both have the same most probable token.

A training holds K+T layers of the base and cannot ask it. So the base's words are found once,
beforehand, by a program of its own that reads the whole base:
`python -m twigvlm.training.agreement` with the flags of the training. Without them agreement is
measured against the labels, and is called so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..config import TwigConfig
from ..errors import InputError
from ..families import trunk_of
from ..files import replacing
from ..loading.base import load_base
from ..loading.device import pick_device, pick_dtype
from ..model.trunk import Trunk
from ..model.twig import signature
from ..program import run_program
from .data.examples import IGNORE, Collator, Example, TwigDataset
from .data.loading import TrainingData, fill_in, read_data
from .run.ranks import Ranks
from .settings import Settings, parse
from .twig import enter, reducer_of

FILE = "base_answers.npz"
ROWS = 4  # samples that the whole base reads at once


@dataclass
class HeldOut:
    """Batches of this process, kept in memory; `against` says whose words their labels are: the base's or the data's."""

    batches: list[dict]
    weights: list[int]  # 0: a repetition, for every process to do as many forwards
    against: str
    samples: int

    def measure(self, forward: Callable[[dict], dict], ranks: Ranks, device: torch.device) -> float:
        """Share of answer positions, over all processes, where the twig's most probable token is right."""
        right = answers = 0.0
        with torch.no_grad():
            for batch, weight in zip(self.batches, self.weights, strict=True):
                out = forward(batch)
                right, answers = right + weight * float(out["right"]), answers + weight * float(out["answers"])
        right, answers = ranks.reduce([right, answers], device)
        return right / answers if answers else 0.0


def hold_out(data: TrainingData, rows: int, ranks: Ranks, answers: dict[int, np.ndarray] | None) -> HeldOut | None:
    """This process's share of the held-out samples; None if there are none. `answers`: the base's words by place."""
    if not len(data.held_out):
        return None
    parts = [data.held_out[i : i + rows] for i in range(0, len(data.held_out), rows)]
    mine = parts[ranks.rank :: ranks.world]
    each = -(-len(parts) // ranks.world)
    weights = [1] * len(mine) + [0] * (each - len(mine))
    mine += [parts[0]] * (each - len(mine))
    batches = list(_batches(data.held_out_set, mine, data.collate))
    if answers is not None:
        for batch in batches:
            _relabel(batch, answers)
    return HeldOut(batches, weights, "labels" if answers is None else "base", len(data.held_out))


def _batches(dataset: TwigDataset, parts: list[np.ndarray], collate: Collator) -> Iterator[dict]:
    for part in parts:
        items = [dataset[int(i)] for i in part]
        if any(isinstance(item, Example) for item in items):
            yield collate(items)
        else:
            raise InputError(
                f"{dataset.records.path}: held-out samples {part.tolist()} cannot be read: {items[0].detail}"
            )


def _relabel(batch: dict, answers: dict[int, np.ndarray]) -> None:
    """The base's words in place of the data's, at the same positions."""
    for row, index in zip(batch["labels"], batch["indices"], strict=True):
        places = (row[1:] != IGNORE).nonzero()[:, 0] + 1
        row[places] = torch.from_numpy(answers[index]).to(row)


def load_answers(
    file: Path, known_by: list[float], data: TrainingData, tower_pruning: str | None = None
) -> dict[int, np.ndarray] | None:
    """The base's words as `find_answers` stored them, or None if they are of another base or other samples."""
    try:
        with np.load(file) as stored:
            asked, places, sizes, words = (stored[name] for name in ("asked", "places", "sizes", "words"))
            if not np.allclose(stored["signature"], known_by, rtol=0.02, atol=1e-4):
                return None
            if (str(stored["behind"]) if "behind" in stored else "") != (tower_pruning or ""):
                return None
    except (OSError, ValueError, KeyError, EOFError):
        return None
    if not np.array_equal(asked, data.held_out):
        return None
    return dict(zip(places.tolist(), np.split(words, np.cumsum(sizes)[:-1]), strict=True))


def find_answers(
    trunk: Trunk, data: TrainingData, file: Path, autocast: AbstractContextManager, tower_pruning: str | None = None
) -> int:
    """Let the whole base read the held-out samples; its most probable token at every answer position, to `file`."""
    reducer = reducer_of(tower_pruning, TwigConfig(trunk.L, 1, 1), trunk.V)
    words: dict[int, np.ndarray] = {}
    parts = [data.held_out[i : i + ROWS] for i in range(0, len(data.held_out), ROWS)]
    with torch.no_grad(), autocast:
        for batch in tqdm(_batches(data.held_out_set, parts, data.collate), total=len(parts), desc="The base's words"):
            stream, labels = enter(trunk, batch, reducer)
            hidden = trunk.run(trunk.layers, stream, None).hidden
            chosen = labels[:, 1:] != IGNORE
            said = trunk.logits(hidden[:, :-1][chosen.to(hidden.device)]).argmax(-1).cpu().numpy()
            sizes = chosen.sum(1).tolist()
            words |= dict(zip(batch["indices"], np.split(said, np.cumsum(sizes)[:-1]), strict=True))
    places = np.array(sorted(words))
    with replacing(file) as part:
        np.savez(
            part,
            asked=data.held_out,
            places=places,
            sizes=np.array([len(words[p]) for p in places]),
            words=np.concatenate([words[p] for p in places]),
            signature=np.array(signature(trunk)),
            behind=np.array(tower_pruning or ""),
        )
    return sum(map(len, words.values()))


def run(settings: Settings) -> None:
    settings = fill_in(settings)
    file = Path(settings.out) / FILE
    device = pick_device(settings.device)
    dtype = pick_dtype(None, device)
    loaded = load_base(settings.base, device, dtype, settings.attention)
    data = read_data(settings, loaded, cache=Path(settings.out))
    if not len(data.held_out):
        print("No samples are held out; agreement is measured on each batch before it is learnt.")
        return
    trunk, behind = trunk_of(loaded.model), settings.tower_pruning
    if load_answers(file, signature(trunk), data, behind) is not None:
        print(f"{file}: already there")
        return
    count = find_answers(trunk, data, file, nullcontext(), behind)
    print(f"{file}: the base's words at {count} answer positions of {len(data.held_out)} held-out samples")


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: run(parse(argv, __doc__)[0]))


if __name__ == "__main__":
    sys.exit(main())
