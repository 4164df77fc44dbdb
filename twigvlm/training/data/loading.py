"""What a run learns from: the usable samples, those that are held out, and the batches of this process."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import LlavaProcessor

from ...errors import InputError
from ...families import trunk_of
from ...loading.base import Loaded
from ...model.twig import WEIGHTS
from ...prompt.processor import make_processor, make_prompts
from ...prompt.template import VicunaPrompts
from ...workers import batches, loader
from ...world.conversations import CONVERSATIONS, DRAWN, IMAGES, ensure_drawn
from ..run.ranks import ALONE, Ranks
from ..settings import HELD_OUT, HELD_OUT_SHARE, Settings
from ..twig import learnt_behind
from .examples import Collator, Records, TwigDataset
from .sampler import LengthGroupedSampler
from .survey import Survey, check_named, survey

PREFETCH = 4  # micro-batches that a worker prepares ahead


@dataclass
class TrainingData:
    """The data of a run. `held_out` are dataset places that are not in `usable`."""

    dataset: TwigDataset
    found: Survey
    usable: np.ndarray
    held_out_set: TwigDataset
    held_out: np.ndarray
    collate: Collator
    spoken: str = ""  # digest of the base's answers that stand in place of the data's

    def sampler(self, rows: int, world: int, rank: int, accumulation: int, seed: int) -> LengthGroupedSampler:
        """Micro-batches of this process; every usable sample once an epoch."""
        chosen = self.usable
        return LengthGroupedSampler(
            self.found.lengths[chosen], self.found.images[chosen], chosen, rows, world, rank, accumulation, seed
        )

    def fingerprint(self) -> dict:
        """By which a resumed run knows its data again."""
        return {
            "samples": len(self.usable),
            "content": self.dataset.records.digest(),
            "lengths": self.found.fingerprint(),
            "held_out": len(self.held_out),
        } | ({"on_policy": self.spoken} if self.spoken else {})


@dataclass
class TrainingFeed:
    """The micro-batches of this process by step; those of an epoch's last step may be fewer."""

    data: TrainingData
    sampler: LengthGroupedSampler
    accumulation: int
    workers: int
    pinned: bool

    @property
    def steps_an_epoch(self) -> int:
        return -(-len(self.sampler) // self.accumulation)

    def count(self, step: int) -> int:
        """Micro-batches of a step."""
        return min(self.accumulation, len(self.sampler) - step % self.steps_an_epoch * self.accumulation)

    def batches(self, step: int) -> Iterator[dict]:
        """All micro-batches from a step on, without end."""
        while True:
            epoch, place = divmod(step, self.steps_an_epoch)
            self.sampler.set_epoch(epoch)
            self.sampler.set_start(place * self.accumulation)
            yield from batches(
                loader(
                    self.data.dataset, self.data.collate, self.workers, PREFETCH, batch_sampler=self.sampler,
                    pin_memory=self.pinned,
                )
            )  # fmt: skip
            step = (epoch + 1) * self.steps_an_epoch


def read_data(
    settings: Settings,
    loaded: Loaded,
    ranks: Ranks = ALONE,
    judge: Callable[[TwigDataset, Survey], None] = lambda dataset, found: None,
    cache: Path | None = None,
    progress: bool = True,
) -> TrainingData:
    """Open the data, find what is usable, and set the held-out samples aside.

    One process looks and tells all; `judge` sees there what is unusable. Raises InputError for files
    that are not there or hold nothing usable.
    """
    processor = make_processor(loaded.model.config, loaded.folder, loaded.original)
    if not isinstance(make_prompts(processor, loaded.model.config), VicunaPrompts):
        raise InputError(
            f"{loaded.folder}: this model is asked in its own chat template, but a twig is trained on conversations in "
            "vicuna_v1; give a LLaVA-1.5 model"
        )
    images = settings.held_out_images or settings.images
    dataset = ranks.everywhere(lambda: open_file(settings, settings.data, settings.images, processor, loaded))
    aside = dataset
    if settings.held_out_data and settings.held_out != 0:
        aside = ranks.everywhere(lambda: open_file(settings, settings.held_out_data, images, processor, loaded))

    def look() -> Survey:
        found = survey(dataset, cache, progress=progress)
        judge(dataset, found)
        check_named(found, dataset)
        return found

    found = ranks.on_first(look)
    usable = _of_use(settings, found)
    if not len(found.usable):
        raise InputError(f"{settings.data}: none of its {len(found)} samples can be used; see the list of skipped ones")
    if not len(usable):
        raise InputError(
            f"{settings.data}: none of its {len(found)} samples has an image to choose from, as stage 2 needs"
        )
    if aside is not dataset:
        places = _of_use(settings, ranks.on_first(lambda: survey(aside, cache, progress=False)))
        places = places[: settings.held_out or HELD_OUT]
    else:
        places = choose_held_out(usable, settings.held_out, settings.seed)
        usable = np.setdiff1d(usable, places)
    dataset.usable = usable
    trunk = trunk_of(loaded.model)
    pad = processor.tokenizer.pad_token_id
    collate = Collator(trunk.image_token_id, trunk.V, 0 if pad is None else pad)
    return TrainingData(dataset, found, usable, aside, places, collate)


def _of_use(settings: Settings, found: Survey) -> np.ndarray:
    """Places of the usable samples; in stage 2 of those with an image, since the others ask nothing of what learns."""
    return found.shown if settings.stage == 2 else found.usable


def fill_in(settings: Settings) -> Settings:
    """Fill in what nobody gave: without a base there are drawn conversations to learn from; the folder of the run."""
    if settings.base is None and settings.data is None:
        train, aside = (DRAWN / split for split in ("train", "validation"))
        settings = replace(
            settings,
            data=str(train / CONVERSATIONS),
            images=str(train / IMAGES),
            held_out_data=settings.held_out_data or str(aside / CONVERSATIONS),
            held_out_images=settings.held_out_images or str(aside / IMAGES),
        )
        ensure_drawn()
    settings = with_start(settings)
    if settings.out is None:
        name = _name(settings)
        what = _twig_run(settings, settings.stage)
        if settings.learn == "projector":
            what = f"projector-{name}-{re.sub(r'[^a-z0-9.]+', '-', settings.pruning)}-R{settings.retained_tokens:g}"
        settings = replace(settings, out=f"runs/{what}")
    return settings


def with_start(settings: Settings) -> Settings:
    """Stage 2 starts from the twig that stage 1 leaves at its usual place, where nobody gives one and it is there.

    In both stages a twig that learnt behind a method before the decoder goes on behind it: its head would choose among
    tokens that the twig never sees. Raises InputError where another method is asked for.
    """
    usual = Path("runs") / _twig_run(settings, 1)
    if settings.stage == 2 and settings.init == "base" and (usual / WEIGHTS).exists():
        settings = replace(settings, init=str(usual))
    learnt = learnt_behind(settings.init) if settings.stage else None
    if learnt is None:
        return settings
    if settings.tower_pruning not in (None, learnt):
        raise InputError(
            f"tower_pruning is {settings.tower_pruning!r}, but {settings.init} has a twig that learnt behind {learnt}; leave "
            "--tower-pruning out"
        )
    return replace(settings, tower_pruning=learnt)


def _twig_run(settings: Settings, stage: int) -> str:
    return f"twig-{_name(settings)}-K{settings.K}-T{settings.T}" + (f"-stage{stage}" if stage else "")


def _name(settings: Settings) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(settings.base or settings.random or "sprout").name)


def open_file(
    settings: Settings, data: str | None, images: str | None, processor: LlavaProcessor, loaded: Loaded
) -> TwigDataset:
    if data is None:
        raise InputError("no data: give --data FILE (LLaVA's instruction JSON) and --images FOLDER")
    trunk = trunk_of(loaded.model)
    limit = min(settings.max_length, trunk.context)
    dataset = TwigDataset(Records(data), images, processor.tokenizer, processor.image_processor, limit, trunk.V)
    if settings.drop_indices and data == settings.data:
        dataset.drop(settings.drop_indices)
    return dataset


def choose_held_out(usable: np.ndarray, asked: int | None, seed: int) -> np.ndarray:
    """Places set aside: as many as asked, by default HELD_OUT, but none of a small set, which is needed whole."""
    count = asked if asked is not None else HELD_OUT if len(usable) >= HELD_OUT * HELD_OUT_SHARE else 0
    if count >= len(usable):
        raise InputError(f"{count} samples to hold out of {len(usable)} usable ones leave nothing to train on")
    return usable[sorted(random.Random(seed).sample(range(len(usable)), count))]
