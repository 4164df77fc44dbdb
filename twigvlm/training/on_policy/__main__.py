"""Let the whole base answer N samples of a training's data: `python -m twigvlm.training.on_policy` with the flags of the training.

`twigvlm.training.launch` does so before the training, which holds a part of the base only. Goes on where it was stopped; under
torchrun or Slurm every process answers its share.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ...errors import InputError, RunError
from ...families import trunk_of
from ...loading.base import load_base
from ...loading.device import pick_dtype
from ...loading.twig import load_twig
from ...model.twig import signature
from ...processes import Stop, guarded
from ...prompt.template import decode
from ...vlm import TwigVLM
from ...workers import batches, loader
from ..cost import print_plan
from ..data.examples import Example, Skipped, TwigDataset
from ..data.loading import TrainingData, fill_in, read_data
from ..run.device import device_of
from ..run.ranks import find
from ..settings import Settings, parse
from ..twig import INITS
from .ask import Talk, Writing, answer
from .spoken import FILE, PARTS, Writer, choose, gather, header, read

AT_ONCE = {"cuda": 32}  # conversations in a batch, when nobody says
CPU_AT_ONCE = 8
AHEAD = 2  # batches that a worker prepares in advance


def run(settings: Settings, stop: Stop) -> int:
    """The exit code; a signal ends it behind a batch."""
    if not settings.on_policy:
        raise InputError("on_policy is 0; say how many samples the base is to answer: --on-policy N")
    settings, ranks = fill_in(settings), find()
    out, device = Path(settings.out), device_of(settings, ranks)
    loaded = load_base(settings.base, device, pick_dtype(None, device), settings.attention)
    data = read_data(settings, loaded, cache=out, progress=ranks.first)
    head = header(settings, signature(trunk_of(loaded.model)), loaded.name, data)
    places = choose(data.usable, settings).tolist()
    done = read(out, head)
    mine = [i for i in places[ranks.rank :: ranks.world] if i not in done]
    if mine:
        trunk = trunk_of(loaded.model)
        twig = None if settings.init in INITS else load_twig(settings.init, trunk, settings.K, settings.T, None)
        name = FILE if ranks.first else PARTS.format(ranks.rank)
        with Writer(out / name, head) as file:
            shown = len(done.keys() & set(places)) if ranks.first else None
            _answer_all(settings, TwigVLM(loaded, twig), data, mine, file, stop, shown)
    count = gather(out, head, places)
    if ranks.first or count == len(places) or stop:
        again = "; stopped, the same command goes on" if stop else ""
        print(f"{out / FILE}: the base's own answers to {count} of {len(places)} samples{again}")
    return stop.code if stop else 0


def _answer_all(
    settings: Settings,
    vlm: TwigVLM,
    data: TrainingData,
    places: Sequence[int],
    file: Writer,
    stop: Stop,
    done: int | None,
) -> None:
    """`done`: samples that were answered before, for a bar; None shows none."""
    size = settings.on_policy_batch or AT_ONCE.get(vlm.device.type, CPU_AT_ONCE)
    writing = Writing(settings.on_policy_tokens, data.dataset.max_length, settings.on_policy_temperature, settings.seed)
    # Alike in length, so that little is padded; the longest come first, since what does not fit fails at once.
    order = sorted(places, key=lambda i: -int(data.found.lengths[i]))
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    begun = done or 0
    bar = tqdm(total=begun + len(places), initial=begun, desc="The base answers", unit=" samples", disable=done is None)
    with bar:
        for batch in _batches(data.dataset, parts, settings.workers):
            examples = [item for item in batch if isinstance(item, Example)]
            try:
                talks = answer(vlm, examples, writing, data.dataset.text.eos) if examples else []
            except (torch.OutOfMemoryError, MemoryError) as fault:
                raise RunError(f"{len(batch)} conversations at once do not fit; lower --on-policy-batch") from fault
            file.write(
                [_line(vlm, talk) for talk in talks] + [_none(item) for item in batch if isinstance(item, Skipped)]
            )
            bar.update(len(batch))
            if stop:
                return


def _batches(dataset: TwigDataset, parts: Sequence[Sequence[int]], workers: int | None) -> Iterator[list]:
    """Samples with their pictures, as they were asked for; nothing stands in for one that cannot be read."""
    each = loader(_Plain(dataset), list, 1 if workers is None else workers, AHEAD, batch_sampler=parts)
    return batches(each)


class _Plain(torch.utils.data.Dataset):
    def __init__(self, dataset: TwigDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Example | Skipped:
        return self.dataset[i]


def _line(vlm: TwigVLM, talk: Talk) -> dict:
    texts = [decode(vlm.tokenizer, answer).strip() for answer in talk.said]
    return {"index": talk.example.index, "id": talk.example.id, "answers": talk.said, "cut": talk.cut, "texts": texts}


def _none(item: Skipped) -> dict:
    """Of a sample that cannot be read: none, so that it is not asked again."""
    return {"index": item.index, "id": item.id, "answers": [], "skipped": item.reason}


def main(argv: list[str] | None = None) -> int:
    def body(stop: Stop) -> int:
        settings, args = parse(argv, __doc__)
        return print_plan(settings, args.devices, args.samples) if args.dry_run else run(settings, stop)

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
