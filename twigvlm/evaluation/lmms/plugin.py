"""TwigVLM as a model of lmms-eval (`--model twigvlm`), found by its entry point; docs/lmms-eval.md says how to use it.

Imports nothing of lmms-eval when imported: the class `LmmsTwigVLM` comes into being when lmms-eval
asks for it. Knows no benchmark; questions, pictures and scores are lmms-eval's.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ...errors import InputError
from ...prompt.batch import together
from ...prompt.template import IMAGE, Talk, decode
from ...vlm import Stats, TwigVLM, load
from ..asking.ask import question_seed
from .options import Manner, Options

BLANK_LINE = "\n\n"
RANK_STRIDE = 2**40  # between the sampling seeds of two processes


def __getattr__(name: str):
    """`LmmsTwigVLM`, made at the first look: only then lmms-eval, whose class it extends, must be installed."""
    if name != "LmmsTwigVLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    made = type(name, (Adapter, lmms), {"__module__": __name__, "__doc__": Adapter.__doc__, "pair": _passing_pair()})
    globals()[name] = made
    return made


def _passing_pair() -> type:
    """A tuple that comes through lmms-eval's evaluator.

    In 0.7.3 that turns a plain tuple, as its interface asks for, into text, on which multiple_choice
    then fails; what is a GenerationResult is unpacked to its `text` instead.
    """
    from lmms_eval.api.instance import GenerationResult

    class Pair(tuple, GenerationResult):
        text = property(tuple)
        token_counts = None

        def __init__(self, values):
            """The tuple is made already; the dataclass would set `text`."""

    return Pair


class StopStrings:
    """A stopping criterion: an answer ends when it holds one of `words`.

    It sees a whole row, prompt and answer; the prompt may hold such a word and is left out.
    """

    def __init__(self, tokenizer, words: Sequence[str], prompts: Sequence[list[int]]):
        self.tokenizer, self.words, self.prompts = tokenizer, words, prompts

    def __call__(self, input_ids: torch.Tensor, scores, row: int) -> bool:
        text = decode(self.tokenizer, input_ids[0, len(self.prompts[row]) :].tolist())
        return any(word in text for word in self.words)


def cut(text: str, words: Sequence[str]) -> str:
    """What stands before the first of `words`, without spaces around it."""
    ends = [place for word in words if (place := text.find(word)) >= 0]
    return text[: min(ends, default=len(text))].strip()


# ---------------------------------------------------------------------- the model


class Adapter:
    """All that lmms-eval asks of a model, but for its base class.

    Keyword arguments are the model_args (see docs/lmms-eval.md). Every process loads its own model,
    on the CUDA device of its local rank. Raises InputError before any task is read.
    """

    is_simple = True
    pair: type = tuple  # what a likelihood is given back in

    def __init__(self, **model_args: Any):
        self.task_dict: dict[str, Any] = {}  # filled by the evaluator: task → split → documents
        super().__init__()
        self._rank, self._world_size = (int(os.environ.get(n) or d) for n, d in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.options = Options.read(model_args)
        self._warned: set[str] = set()
        self._rehearse()

    @classmethod
    def create_from_arg_string(cls, arg_string: str | Mapping, additional_config: Mapping | None = None) -> Adapter:
        """model_args "name=value,…" and what lmms-eval's own flags say; model_args win (--batch_size has a default)."""
        from lmms_eval.utils import simple_parse_args_string

        if isinstance(arg_string, str):
            try:
                arg_string = simple_parse_args_string(arg_string)
            except ValueError:
                raise InputError(
                    f"model_args {arg_string!r}: name=value pairs with commas between are needed"
                ) from None
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**flags, **arg_string})

    # ------------------------------------------------------------------ what the evaluator reads

    @cached_property
    def vlm(self) -> TwigVLM:
        loading = dict(self.options.loading)
        wanted = loading.get("device")
        if self._world_size > 1 and wanted in (None, "cuda") and torch.cuda.is_available():
            loading["device"] = f"cuda:{int(os.environ.get('LOCAL_RANK') or 0)}"
        return load(**loading)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int:
        return self.options.batch_size

    @property
    def tokenizer(self):
        return self.vlm.tokenizer

    @property
    def chat_template(self) -> str:
        raise InputError("the conversation template of the model is always applied; leave --apply_chat_template out")

    def clean(self) -> None:
        """Give the memory back, to a local judge say; the model loads again when it is asked again."""
        self.__dict__.pop("vlm", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ the requests

    def generate_until(self, requests: Sequence) -> list[str]:
        """Answers in the order of the requests, whose args are (context, generation_kwargs, doc_to_visual, doc_id, task, split)."""
        answers: list[str] = [""] * len(requests)
        figures: list[Stats] = []
        done = 0
        with self._progress(len(requests)) as bar:
            for manner, places in self._batches(requests):
                texts, stats = self._write([requests[i] for i in places], manner, done)
                for place, text in zip(places, texts, strict=True):
                    answers[place] = text
                figures.append(stats)
                done += len(places)
                bar.update(len(places))
        self._report(figures)
        return answers

    def loglikelihood(self, requests: Sequence) -> list[tuple[float, bool]]:
        """(loss of the continuation after the context, is it the greedy one) in the order of the requests.

        The loss is the mean of -log p over its tokens, teacher-forced with the base under the pruning
        asked for. A loss, though the name says otherwise: it is what lmms-eval's own models return and
        what its multiple_choice takes the smallest of. Args are (context, continuation or doc_to_target,
        doc_to_visual, doc_id, task, split), or (context, continuation) alone.
        """
        results: list[tuple[float, bool]] = []
        with self._progress(len(requests)) as bar:
            for start in range(0, len(requests), self.batch_size):
                chunk = requests[start : start + self.batch_size]
                results += self._losses(chunk)
                bar.update(len(chunk))
        return results

    def generate_until_multi_round(self, requests: Sequence) -> list[str]:
        raise NotImplementedError(
            "twigvlm does not answer multi-round tasks (generate_until_multi_round); it supports generate_until, "
            "with any number of images, and loglikelihood (multiple_choice)"
        )

    # ------------------------------------------------------------------ parts

    def _rehearse(self) -> None:
        """Load, and try every setting on one token: what is wrong shows now and not after the data is read."""
        vlm = self.vlm
        self._device = vlm.device
        if self.options.speculation and vlm.twig is None:
            raise InputError("model_args: speculation=true needs a twig, and none is loaded; give twig=")
        start = vlm.tokenizer.bos_token_id or 0
        vlm.generate(torch.tensor([[start]]), max_new_tokens=1, seed=self.options.seed, **self.options.writing)

    def _progress(self, total: int) -> tqdm:
        return tqdm(total=total, disable=self._rank != 0 or not total, desc="twigvlm", unit="request")

    def _batches(self, requests: Sequence) -> Iterator[tuple[Manner, list[int]]]:
        """Places of requests that are written in the same manner, up to batch_size together, in order."""
        groups: dict[Manner, list[int]] = {}
        for place, request in enumerate(requests):
            manner = Manner.read(request.args[1] or {})
            if not self.options.blank_line_stops:
                manner = replace(manner, until=tuple(word for word in manner.until if word != BLANK_LINE))
            groups.setdefault(manner, []).append(place)
        for manner, places in groups.items():
            for name in manner.unknown:
                self._warn(f"generation_kwargs: {name} is not known to twigvlm and has no effect")
            for start in range(0, len(places), self.batch_size):
                yield manner, places[start : start + self.batch_size]

    def _write(self, requests: Sequence, manner: Manner, done: int) -> tuple[list[str], Stats]:
        """The answers to one batch; `done` requests were answered before, so that each has a seed of its own."""
        prompts = [self._prompt(request) for request in requests]
        rows = [p["input_ids"][0].tolist() for p in prompts]
        stop = StopStrings(self.tokenizer, manner.until, rows) if manner.until else None
        settings = {**self.options.writing, **manner.settings(), "seed": self._seed(requests, manner, done)}
        with _blamed_on(requests):
            out = self.vlm.generate(**together(prompts), stopping_criteria=stop, **settings)
        decoded = [decode(self.tokenizer, tokens) for tokens in out.tokens]
        return [cut(text, manner.until) for text in decoded], out.stats

    def _seed(self, requests: Sequence, manner: Manner, done: int) -> int | list[int]:
        if not manner.do_sample:
            return self._seeds(requests)
        first = manner.seed if manner.seed is not None else self.options.seed
        if first is None:
            first = torch.initial_seed()  # lmms-eval's --seed
        return first + self._rank * RANK_STRIDE + done

    def _seeds(self, requests: Sequence) -> list[int]:
        """What random pruning draws from: the document, so that neither batches nor processes nor choices matter."""
        return [question_seed(self.options.seed or 0, "/".join(map(str, r.args[3:]))) for r in requests]

    def _losses(self, requests: Sequence) -> list[tuple[float, bool]]:
        prompts, targets = [], []
        for request in requests:
            wanted = request.args[1]
            if callable(wanted):
                wanted = wanted(self._document(request.args[2:]))
            prompts.append(self._prompt(request))
            targets.append(self._continuation(str(wanted)))
        asked = {
            name: self.options.writing[name] for name in ("retained_tokens", "pruning") if name in self.options.writing
        }
        with _blamed_on(requests):
            found = self.vlm.score(**together(prompts), targets=targets, seed=self._seeds(requests), **asked)
        return [
            self.pair((float(-f.log_probabilities.mean()) if t else 0.0, bool(f.greedy.all())))
            for f, t in zip(found, targets, strict=True)
        ]

    def _continuation(self, text: str) -> list[int]:
        """Token ids of an answer as they follow the template's last word."""
        if not text.strip():
            return []
        return self.vlm.prompts.continuation(text)

    def _prompt(self, request) -> dict[str, torch.Tensor]:
        """Arguments of generate [1, S]: the template around the context, the pictures of its document."""
        context, source = request.args[0], request.args[2:]
        with _blamed_on([request]):
            images = self._images(source)
            marks = context.count(IMAGE)
            if marks not in (0, len(images)):
                self._warn(f"a context has {marks} {IMAGE} marks for {len(images)} images; these go to its beginning")
                context = context.replace(IMAGE, "")
            if not context.strip():
                context = f"{IMAGE}\n" * len(images)
            if context:
                return self.vlm.prepare(images, context)
        # Nothing to ask, nothing to see: what an unconditional likelihood is measured on.
        return {"input_ids": torch.tensor([self.vlm.prompts.ids(Talk([("", None)]))])}

    def _images(self, source: Sequence) -> list:
        """The pictures of a request's document: PIL images, files or URLs."""
        if not source or source[0] is None:
            return []
        images: list = []
        for visual in source[0](self._document(source)) or []:
            images += visual if isinstance(visual, (list, tuple)) else [visual]
        images = [image for image in images if image is not None]
        if strange := [image for image in images if not isinstance(image, (str, Path, Image.Image))]:
            raise InputError(f"the task gives a {type(strange[0]).__name__} to look at; twigvlm sees images only")
        return images

    def _document(self, source: Sequence) -> Any:
        """What a request is about; `source` is its args from doc_to_visual on: (doc_to_visual, doc_id, task, split)."""
        _, doc_id, task, split = source
        return self.task_dict[task][split][doc_id]

    def _warn(self, text: str) -> None:
        """Once, by the first process."""
        if self._rank == 0 and text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=2)

    def _report(self, figures: Sequence[Stats]) -> None:
        """Speed and budget as measured, into lmms-eval's log and its results under "throughput"."""
        try:
            from lmms_eval.models.model_utils.gen_metrics import log_metrics
        except ImportError:  # lmms-eval before 0.7 has no such place
            return
        if figures:
            measured = summary(figures, self.vlm.config.V)
            log_metrics(measured.pop("seconds"), measured.pop("tokens"), measured.pop("tokens_per_second"), measured)


def summary(figures: Sequence[Stats], V: int) -> dict[str, float]:
    """Figures of several batches as those of one; what nothing was measured of is absent."""
    tokens, prefill = sum(s.new_tokens for s in figures), sum(s.prefill_seconds for s in figures)
    seconds = prefill + sum(s.decode_seconds for s in figures)
    drafted, images = sum(s.drafted for s in figures), sum(s.visual_tokens for s in figures) / V
    out = {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds, "prefill_seconds": prefill}
    if drafted:
        out["acceptance"] = sum(s.accepted for s in figures) / drafted
    if images:
        out["visual_tokens_measured"] = sum(s.visual_measured * s.visual_tokens for s in figures) / V / images
        out["visual_twig_share"] = max(s.visual_twig_share for s in figures)
        if figures[0].visual_asked is not None:
            out["visual_tokens_asked"] = figures[0].visual_asked
    return out


@contextmanager
def _blamed_on(requests: Sequence) -> Iterator[None]:
    """Errors of input name the documents."""
    try:
        yield
    except InputError as fault:
        about = [f"document {r.args[-3]} of task {r.args[-2]}" for r in requests if len(r.args) > 2]
        raise InputError(f"{', '.join(about)}: {fault}" if about else str(fault)) from fault
