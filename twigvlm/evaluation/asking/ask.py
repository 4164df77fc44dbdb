"""The model's side of a run: pictures decoded ahead in worker processes, batches answered, answers made durable.

Knows neither benchmarks nor scores. A batch is a fixed piece of the list of questions, so that no
shard, no pause and no other session changes what is asked together.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ... import load
from ...errors import InputError
from ...files import is_file
from ...loading.base import load_base
from ...loading.device import pick_device, pick_dtype
from ...processes import Stop, cores
from ...prompt.images import open_image
from ...prompt.template import converse, decode
from ...record import provenance
from ...vlm import Output, TwigVLM
from ...workers import batches as loaded
from ...workers import loader, named, workers_told
from ..tasks.base import Question
from .answers import Appender, answer_line
from .setting import Setting

CPU_BATCH = 8  # in fp32 on a CPU; long answers gain, short ones lose nothing
CUDA_WORKERS = 4
WARM_TOKENS = 4
AHEAD = 2  # batches that each worker prepares in advance


# ---------------------------------------------------------------------- the model


def open_model(setting: Setting, local: int | None = None) -> TwigVLM:
    """The model of a setting; `local` is the node's device that falls to this process."""
    model = setting.model
    device = model.device
    if device is None and local is not None and torch.cuda.is_available():
        device = f"cuda:{local % torch.cuda.device_count()}"
    if setting.baseline:
        where = pick_device(device)
        dtype = pick_dtype(model.dtype, where)
        return TwigVLM(load_base(model.base, where, dtype, model.attn_implementation, bits=model.bits), None)
    return load(**vars(model) | {"device": device})


def default_workers(vlm: TwigVLM, shards: int) -> int:
    """Decoding a photograph takes a core as long as a GPU needs to answer; a CPU's own cores are better left alone."""
    return max(1, min(CUDA_WORKERS, cores() // shards)) if vlm.device.type == "cuda" else 1


def dtype_name(vlm: TwigVLM) -> str:
    return str(vlm.dtype).removeprefix("torch.")


# ---------------------------------------------------------------------- questions to tensors


@dataclass(frozen=True)
class Ready:
    """A batch as a worker hands it over; `broken` are questions that cannot be asked, with the reason."""

    questions: list[Question]
    ids: list[list[int]] = field(default_factory=list)
    pixels: np.ndarray | None = None  # [images, 3, h, w]
    broken: list[tuple[str, str]] = field(default_factory=list)


class Prepared(Dataset):
    """Batches of questions as token ids and pixels. Holds no model, so that it travels to worker processes."""

    def __init__(self, batches: Sequence[Sequence[Question]], vlm: TwigVLM):
        self.batches = batches
        self.prompts, self.pictures, self.context = vlm.prompts, vlm.processor.image_processor, vlm.trunk.context

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Ready:
        ready = Ready([])
        pixels = []
        for question in self.batches[index]:
            try:
                with named(lambda question=question: f"question {question.id}"):
                    ids, images = self._ids(question), self._pixels(question)
            except InputError as fault:
                ready.broken.append((question.id, str(fault)))
                continue
            ready.questions.append(question)
            ready.ids.append(ids)
            pixels += images
        return Ready(ready.questions, ready.ids, np.concatenate(pixels) if pixels else None, ready.broken)

    def _ids(self, question: Question) -> list[int]:
        ids = self.prompts.ids(converse((), question.prompt, len(question.images)))
        if len(ids) >= self.context:
            raise InputError(f"its prompt of {len(ids)} tokens leaves no room in the context of {self.context}")
        return ids

    def _pixels(self, question: Question) -> list[np.ndarray]:
        opened = [open_image(image) for image in question.images]
        return [self.pictures([image], return_tensors="np")["pixel_values"] for image in opened]


def check_images(pieces: Iterable[Sequence[Question]]) -> None:
    """Raise InputError, with the question's id, for a picture file that is not there."""
    known: set[Path] = set()
    for question in (q for piece in pieces for q in piece):
        for image in question.images:
            if isinstance(image, Path) and image not in known:
                if not is_file(image):
                    raise InputError(
                        f"question {question.id}: {image} is not there, or no file; fetch it, or go on with --skip-broken"
                    )
                known.add(image)


def batches(pieces: Iterable[Sequence[Question]], size: int) -> list[list[Question]]:
    """Each piece in batches of at most `size`."""
    return [list(piece[i : i + size]) for piece in pieces for i in range(0, len(piece), size)]


def _as_it_is(ready: Ready) -> Ready:
    return ready


# ---------------------------------------------------------------------- asking


@dataclass(frozen=True)
class Asker:
    """Asks batches and writes what comes back. `clean` makes the answer's text from the model's words."""

    vlm: TwigVLM
    setting: Setting
    clean: Callable[[str], str]
    skip_broken: bool = False
    workers: int = 1

    def default_batch(self, timed_alone: bool) -> int:
        """1 where an answer's last bits could depend on its neighbours (half precision), or for samples' own times."""
        vlm = self.vlm
        return CPU_BATCH if vlm.dtype is torch.float32 and vlm.device.type == "cpu" and not timed_alone else 1

    def warm_up(self) -> None:
        """An untimed question. Raises InputError for a setting that this model cannot do."""
        options = vars(self.setting.writing) | {"max_new_tokens": WARM_TOKENS}
        side = self.vlm.model.config.vision_config.image_size
        self.vlm.generate(**self.vlm.prepare(Image.new("RGB", (side, side), "grey"), "What is this?"), **options)

    def begin(self, figures: Appender, load_seconds: float, batch_size: int, part: int, count: int) -> None:
        """Note in the figures that this process starts to ask."""
        if self.vlm.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.vlm.device)
        facts = provenance() | {"device_type": self.vlm.device.type, "dtype": dtype_name(self.vlm)}
        facts |= {"letters": dict(vars(self.vlm.config)), "load_seconds": load_seconds, "batch_size": batch_size}
        facts |= {"workers": self.workers, "shard": part, "num_shards": count}
        figures.write([{"session": facts}])

    def ask(
        self,
        batches: Sequence[Sequence[Question]],
        answers: Appender,
        figures: Appender,
        stop: Stop,
        tell: Callable[[], None],
    ) -> None:
        """All batches, until `stop`; `tell` is called after each. Raises InputError, with its id, for a broken one."""
        with workers_told():
            self._ask(batches, answers, figures, stop, tell)

    def _ask(self, batches, answers: Appender, figures: Appender, stop: Stop, tell: Callable[[], None]) -> None:
        start = time.perf_counter()
        for ready in self._ready(batches):
            if ready.broken and not self.skip_broken:
                name, reason = ready.broken[0]
                raise InputError(f"question {name}: {reason}; or go on with --skip-broken")
            figures.write([{"broken": name, "reason": reason} for name, reason in ready.broken])
            if ready.questions:
                out, texts = self._answer(ready)
                names = self.setting.model_name, self.setting.name
                answers.write([answer_line(q, t, *names) for q, t in zip(ready.questions, texts, strict=True)])
                now = time.perf_counter()
                figures.write([_figures(ready, out, now - start, self.vlm.device)])
                start = now
            tell()
            if stop:
                return

    def _ready(self, batches: Sequence[Sequence[Question]]) -> Iterator[Ready]:
        workers = min(self.workers, len(batches))
        return loaded(loader(Prepared(batches, self.vlm), _as_it_is, workers, AHEAD, batch_size=None))

    def _answer(self, ready: Ready) -> tuple[Output, list[str]]:
        width = max(map(len, ready.ids))
        ids, mask = torch.zeros(2, len(ready.ids), width, dtype=torch.long)
        for b, row in enumerate(ready.ids):
            ids[b, : len(row)], mask[b, : len(row)] = torch.tensor(row), 1
        pixels = None if ready.pixels is None else torch.from_numpy(ready.pixels)
        # Each question draws from its own seed, whatever is asked before or beside it.
        seeds = [question_seed(self.setting.writing.seed, question.id) for question in ready.questions]
        options = vars(self.setting.writing) | {"seed": seeds}
        out = self.vlm.generate(ids, pixels, mask, **options)
        return out, [self.clean(decode(self.vlm.tokenizer, tokens)) for tokens in out.tokens]


def question_seed(seed: int, name: str) -> int:
    """Of one question, for sampling and random pruning."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()[:6], "big")


def _figures(ready: Ready, out: Output, wall: float, device: torch.device) -> dict[str, Any]:
    s = out.stats
    return {
        "questions": [q.id for q in ready.questions],
        "images": 0 if ready.pixels is None else len(ready.pixels),
        "prompt_tokens": s.prompt_tokens,
        "tokens": s.new_tokens,
        "late_tokens": s.new_tokens - sum(len(row[0].tokens) for row in out.steps if row),
        "prefill_seconds": s.prefill_seconds,
        "decode_seconds": s.decode_seconds,
        "wall_seconds": wall,
        "drafted": s.drafted,
        "accepted": s.accepted,
        "steps": s.steps,
        "visual_kept": s.visual_kept / max(1, 0 if ready.pixels is None else len(ready.pixels)),
        "visual_measured": s.visual_measured,
        "visual_authors": s.visual_authors,
        "visual_rows": [round(n, 3) for n in s.visual_rows if n is not None],
        "visual_twig_share": s.visual_twig_share,
        "cache_bytes": s.cache_bytes,
        "peak_memory_bytes": peak_memory(device),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's own where it is CUDA, else the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
