"""One pass over all records before training: which are usable, how long, with how many pictures.

So that batches can be planned and every process plans the same: what cannot be used is known before
the first step, but for pictures that are there and turn out to be broken when they are opened.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import numpy as np
from tqdm import tqdm

from ...errors import InputError, RunError
from ...files import encode, replacing, write_bytes
from ...prompt.media import fields_of, names_pictures
from ...workers import Failure, attempt, checked
from .conversation import Conversation, Skipped, read
from .examples import DROPPED, IMAGE_BROKEN, IMAGE_MISSING, TwigDataset

VERSION = 4  # of what `encode` does: raise it when a record's ids, labels or reasons change
PART = 500  # records a worker takes at a time
MAX_SKIPPED = 0.01  # share of all records


@dataclass
class Survey:
    """What is known of every record [n], in file order.

    `lengths` are tokens with all visual ones and `learnt` the tokens with a label (0 where
    skipped); `images` counts pictures that are shown; `skipped` says what is wrong with the others.
    """

    lengths: np.ndarray
    learnt: np.ndarray
    images: np.ndarray
    skipped: list[Skipped]
    unshown: int = 0  # records that name pictures which no `<image>` shows

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def usable(self) -> np.ndarray:
        """Places in the file of the records to train on, ascending."""
        return np.flatnonzero(self.lengths)

    @property
    def shown(self) -> np.ndarray:
        """Of them those with a picture."""
        return np.flatnonzero((self.lengths > 0) & (self.images > 0))

    def fingerprint(self) -> str:
        """Equal for equal plans: to refuse a resumed run whose data has changed."""
        hashed = hashlib.blake2b(digest_size=16)
        for part in (self.lengths, self.learnt, self.images):
            hashed.update(part.tobytes())
        return hashed.hexdigest()


def survey(
    dataset: TwigDataset,
    cache: str | Path | None = None,
    workers: int | None = None,
    drop: Iterable[int] = (),
    progress: bool = True,
) -> Survey:
    """Encode every record once and look whether its pictures are there.

    `cache`: a folder that keeps the first part, by content of the file, tokenizer and maximum
    length. `drop`: places in the file to leave out. Raises InputError for broken JSON and for pictures
    without a folder.
    """
    if drop:
        dataset.drop(drop)
    workers = default_workers() if workers is None else workers
    return _without_missing(_cached(dataset, cache, workers, progress), dataset, workers, progress)


def check_named(found: Survey, dataset: TwigDataset) -> None:
    """Raise InputError if no record names a picture, though a folder of pictures is given: all would be learnt blind."""
    if dataset.folder is None or not len(found.usable) or found.images.any() or found.unshown:
        return
    records = dataset.records
    skipped = (records[s.index] for s in found.skipped)
    if not any(isinstance(record, dict) and names_pictures(record) for record in skipped):
        fields = fields_of(records[i] for i in range(min(len(records), PART)))
        raise InputError(
            f"{records.path}: none of its {len(records)} records names a picture (their fields: {fields}), but --images is "
            'given; name pictures under "image" or "images", or leave --images out'
        )


def counts(skipped: Iterable[Skipped]) -> dict[str, int]:
    """Reason → number, the most frequent first."""
    found = Counter(s.reason for s in skipped)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def default_workers() -> int:
    """Processes that this one may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parts(
    work: Callable[[TwigDataset, Sequence[int]], list],
    dataset: TwigDataset,
    indices: Sequence[int],
    workers: int,
    progress: str | None,
    part: int = PART,
) -> Iterator:
    """`work(dataset, some indices)` over all indices, by worker processes; its items in order, lazily.

    `progress` names a bar on stderr. Raises InputError or RunError for what goes wrong in a worker, and when one dies.
    """
    parts = [indices[start : start + part] for start in range(0, len(indices), part)]
    with tqdm(total=len(indices), desc=progress, unit=" samples", disable=progress is None, mininterval=0.5) as bar:
        answers = (
            _here(work, dataset, parts) if workers <= 1 or len(parts) == 1 else _there(work, dataset, parts, workers)
        )
        for done, answer in zip(parts, answers, strict=True):
            yield from answer
            bar.update(len(done))


def _here(work, dataset: TwigDataset, parts: list) -> Iterator[list]:
    return (work(dataset, part) for part in parts)


_worker: tuple = ()


def _enter(work, dataset: TwigDataset, parent: int) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    Thread(target=_follow, args=(parent,), daemon=True).start()
    _worker = (work, dataset)


def _follow(parent: int) -> None:
    """End with the main process, even if it was killed: nothing else would tell a worker that waits for work."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(part: Sequence[int]) -> list | Failure:
    work, dataset = _worker
    return attempt(work, dataset, part, about=f"{dataset.records.path}, samples {part[0]} to {part[-1]}")


def _there(work, dataset: TwigDataset, parts: list, workers: int) -> Iterator[list]:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(), _enter, (work, dataset, os.getpid()))
    waiting: list[Future] = []
    try:
        for part in parts:
            waiting.append(pool.submit(_work, part))
            if len(waiting) > 4 * workers:  # a bounded window, so that answers do not pile up
                yield checked(waiting.pop(0).result())
        while waiting:
            yield checked(waiting.pop(0).result())
    except BrokenProcessPool as fault:
        raise RunError("a worker process died while reading the data (out of memory?); use fewer workers") from fault
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode_all(dataset: TwigDataset, indices: Sequence[int]) -> list[tuple[int, int, int, bool] | Skipped]:
    found = (dataset.encode(i) for i in indices)
    return [f if isinstance(f, Skipped) else (f.length, f.learnt, len(f.images), f.unshown > 0) for f in found]


def _missing(dataset: TwigDataset, indices: Sequence[int]) -> list[Skipped | None]:
    return [_missing_one(dataset, int(i)) for i in indices]


def _missing_one(dataset: TwigDataset, i: int) -> Skipped | None:
    record = dataset.records[i]
    talk = read(record)
    path = dataset.missing(talk.images) if isinstance(talk, Conversation) else None
    return path and Skipped(IMAGE_MISSING, f"{path}: no such file", i, record.get("id"))


def _texts(dataset: TwigDataset, workers: int, progress: bool) -> Survey:
    n = len(dataset)
    found = Survey(np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int16), [])
    answers = in_parts(_encode_all, dataset, range(n), workers, "Reading conversations" if progress else None)
    for i, answer in enumerate(answers):
        if isinstance(answer, Skipped):
            found.skipped.append(answer)
        else:
            found.lengths[i], found.learnt[i], found.images[i], unshown = answer
            found.unshown += unshown
    return found


def _cached(dataset: TwigDataset, cache: str | Path | None, workers: int, progress: bool) -> Survey:
    if cache is None:
        return _texts(dataset, workers, progress)
    key = hashlib.blake2b(digest_size=12)
    limits = (dataset.max_length, dataset.visual_tokens, sorted(dataset.dropped))
    key.update(repr((VERSION, dataset.records.digest(), dataset.text.description, limits)).encode())
    file = Path(cache) / f"survey-{key.hexdigest()}.npz"
    found = _load(file, len(dataset))
    if found is None:
        found = _texts(dataset, workers, progress)
        _save(found, file)
    return found


def _load(file: Path, n: int) -> Survey | None:
    try:
        with np.load(file) as stored:
            skipped = [Skipped(*s) for s in json.loads(str(stored["skipped"]))]
            found = Survey(stored["lengths"], stored["learnt"], stored["images"], skipped, int(stored["unshown"]))
    except (OSError, ValueError, KeyError, EOFError):  # none, or one that cannot be trusted
        return None
    return found if len(found) == n else None


def _save(found: Survey, file: Path) -> None:
    skipped = np.array(json.dumps([(s.reason, s.detail, s.index, s.id) for s in found.skipped]))
    try:
        with replacing(file) as part:
            np.savez(part, **vars(found) | {"skipped": skipped})
    except OSError as fault:
        raise RunError(
            f"{file}: cannot be written ({fault.strerror}); free the disk or choose another folder"
        ) from fault


def _without_missing(found: Survey, dataset: TwigDataset, workers: int, progress: bool) -> Survey:
    """Pictures may come and go between runs, so that nothing of this is kept."""
    shown = np.flatnonzero(found.images)
    if not len(shown):
        return found
    if dataset.folder is None:
        raise InputError(
            f"{dataset.records.path}: {len(shown)} of {len(found)} samples have images; give the folder that their names start from"
        )
    answers = in_parts(_missing, dataset, shown, workers, "Looking for pictures" if progress else None)
    missing = [m for m in answers if m]
    places = [m.index for m in missing]
    lengths, learnt, images = (part.copy() for part in (found.lengths, found.learnt, found.images))
    for part in (lengths, learnt, images):
        part[places] = 0
    return Survey(lengths, learnt, images, sorted([*found.skipped, *missing], key=lambda s: s.index), found.unshown)


class SkipLog:
    """The list of what was left out, as a file of JSON lines, and the judge of whether it is too much.

    One process keeps it. Faults found while training are added as they come; a record counts once.
    Of a list that is already there (the run was stopped) those pictures count that are still broken.
    """

    def __init__(self, file: str | Path, dataset: TwigDataset, max_skipped: float = MAX_SKIPPED):
        """`max_skipped`: share of the records (0 to 1) beyond which training stops."""
        if not 0 <= max_skipped <= 1:
            raise InputError(f"max_skipped is {max_skipped}; a share from 0 to 1 is needed")
        self.file, self.max_skipped = Path(file), max_skipped
        self.records = len(dataset) - len(dataset.dropped)
        known = [dataset.check(i) for i in self._listed() if 0 <= i < len(dataset)]
        self._found = {k.index: k for k in known if isinstance(k, Skipped)}

    @property
    def skipped(self) -> list[Skipped]:
        """In file order, without what was dropped on request."""
        return [self._found[i] for i in sorted(self._found) if self._found[i].reason != DROPPED]

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Note them. Raises InputError, the list written, when they are too many."""
        new = {s.index: s for s in skipped if s.index not in self._found}
        if new:
            self._found.update(new)
            self.write()
        self.check()

    def check(self) -> None:
        """Raise InputError when more than the set share is unusable."""
        found = self.skipped
        if len(found) > self.max_skipped * self.records:
            self.write()
            reasons = ", ".join(f"{reason}: {n}" for reason, n in counts(found).items())
            raise InputError(
                f"{len(found)} of {self.records} samples cannot be used ({reasons}), more than max_skipped = "
                f"{self.max_skipped:.4g} of them; they are listed in {self.file}: repair them, or raise --max-skipped"
            )

    def write(self) -> None:
        """The file, whole or not at all: id, index, reason, detail of each."""
        try:
            write_bytes(b"".join(encode(_line(self._found[i])) for i in sorted(self._found)), self.file)
        except OSError as fault:
            raise RunError(f"{self.file}: cannot be written ({fault.strerror}); free the disk") from fault

    def _listed(self) -> list[int]:
        """Records whose pictures the file that is already there calls broken."""
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
            return [f["index"] for f in map(json.loads, lines) if f["reason"] in (IMAGE_BROKEN, IMAGE_MISSING)]
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise InputError(f"{self.file}: not a list of skipped samples ({fault}); move it away") from fault


def _line(skipped: Skipped) -> dict:
    return {"id": skipped.id, "index": skipped.index, "reason": skipped.reason, "detail": skipped.detail}
