"""What a twig is and what a generation is: frozen dataclasses that refuse nonsense when made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .errors import InputError

DEFAULT_K, DEFAULT_T = 2, 3  # the released twigs', paper section 4.1
WIPE_SHARE = 0.75  # F / L of LLaVA-1.5-7B, paper section 3.2
FORMAT_VERSION = 1
AUTO = "auto"
HeadStart = Literal["released", "identity"]  # how a pruning head begins, and which gates it has: model.pruning_head


@dataclass(frozen=True)
class TwigConfig:
    """Where a twig grows on a base of L layers: T layers on top of layer K, image gone before layer F.

    F = L or more means that the image is never wiped. Raises InputError on an impossible combination.
    """

    L: int
    K: int = DEFAULT_K
    T: int = DEFAULT_T
    F: int = 0  # 0: round(0.75 L)
    pruning_head: str = ""  # a HeadStart; "": the twig has none

    def __post_init__(self) -> None:
        if self.F == 0:
            object.__setattr__(self, "F", max(self.K + 1, round(WIPE_SHARE * self.L)))
        if self.K < 0:
            raise InputError(f"K is {self.K}; it counts the base layers below the twig (K >= 0)")
        if self.T < 1:
            raise InputError(f"T is {self.T}; a twig has at least one layer (T >= 1)")
        if self.K + self.T > self.L:
            raise InputError(
                f"K + T is {self.K} + {self.T} = {self.K + self.T}, but the base has only L = {self.L} layers; "
                f"choose K + T <= {self.L}"
            )
        if self.F <= self.K:
            raise InputError(
                f"wipe layer F is {self.F}, but must lie above K = {self.K}; choose {self.K + 1} to {self.L} "
                f"({self.L} = never wipe)"
            )


def option(default: Any, text: str, *also: str, **more: Any) -> Any:
    """A field that is a flag: its help, other names of the flag, and `more` of `twigvlm.flags` and argparse."""
    value = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**value, metadata={"help": text, **({"aliases": list(also)} if also else {}), **more})


class TreeShape(NamedTuple):
    """Of a draft that branches: E children a node, W nodes of a level have children, D levels, N nodes are verified."""

    E: int
    W: int
    D: int
    N: int

    @property
    def most(self) -> int:
        """Nodes that are there to choose from."""
        return self.E + (self.D - 1) * self.E * min(self.W, self.E ** (self.D - 1))


def whole_or_auto(text: str) -> int | str:
    """A draft length as people write it."""
    return AUTO if text == AUTO else int(text)


@dataclass(frozen=True)
class ModelSettings:
    """Which model: the arguments of `twigvlm.load`."""

    base: str | Path | None = option(
        None,
        "hub id or folder of a LLaVA-1.5 model (default: the embedded one)",
        flag="base_model",
        parse=str,
        metavar="ID",
    )
    twig: str | Path | None = option(
        None, "hub id, folder or .safetensors of its twig (default: none, or the embedded one)",
        flag="twig_block", parse=str, metavar="ID",
    )  # fmt: skip
    K: int | None = option(
        None, "base layers below the twig (default: from the twig's files, else 2)", flag="twig_K", metavar="K"
    )
    T: int | None = option(None, "layers of the twig (default: from the twig's files)", flag="twig_T", metavar="T")
    wipe_layer: int | None = option(
        None, "layer before which the image is wiped when decoding, F (default: from the twig's files, else 0.75 L)",
        "--twig-F", metavar="F",
    )  # fmt: skip
    device: str | None = option(None, "cpu, cuda, cuda:N or mps (default: the best there is)")
    dtype: str | None = option(None, "float32, bfloat16 or float16 (default: what the device likes)")
    attn_implementation: str = option("sdpa", "sdpa, eager or flash_attention_2", metavar="NAME")

    @property
    def has_twig(self) -> bool:
        return self.twig is not None or self.base is None


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer comes about: the options of `TwigVLM.generate`, said here and nowhere else.

    The defaults are the paper's (greedy, drafts of 5, confidence 0.6). Raises InputError on values outside their
    range; whether a budget or a method can be is the method's business.
    """

    retained_tokens: float | None = option(
        None, "R, average of visual tokens per base layer", "-R", metavar="R", unless=64.0
    )  # None prunes nothing; with several images so many per image, shared between them by score
    pruning: str = option("twig", "how visual tokens are chosen", metavar="NAME")  # a name in twigvlm.pruning.METHODS
    query: str = option("last", "whose attention chooses: last (text token) or text (all of it, paper Eq. 3)")
    draft_length: int | Literal["auto"] = option(
        5, "drafted tokens per step at most; auto: as many as pay on this machine", parse=whole_or_auto, metavar="N"
    )  # delta; 0, or no twig, is plain decoding
    draft_confidence: float = option(0.6, "drafting stops after a token less probable than this", metavar="X")  # theta
    max_new_tokens: int = option(512, "longest answer", metavar="N")
    do_sample: bool = False
    temperature: float = option(1.0, "sample at this temperature; 0 is greedy", metavar="X", unless=0.0)
    top_k: int | None = option(None, "sample from the N likeliest tokens (default: all)", metavar="N")
    top_p: float | None = option(None, "sample from the likeliest tokens that make up P (default: all)", metavar="P")
    seed: int | Sequence[int] | None = option(  # of the first row, or one a row
        None, "of sampling and of random pruning; makes them repeatable", parse=int, metavar="N"
    )

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, legal: str) -> None:
            if not ok:
                raise InputError(f"{name} is {getattr(self, name)!r}; {legal}")

        length = 0 if self.draft_length == AUTO else self.draft_length
        check(_whole(length) and length >= 0, "draft_length", "0 (plain decoding) or more, or 'auto', is needed")
        check(0 <= self.draft_confidence <= 1, "draft_confidence", "0 to 1 is needed")
        check(_whole(self.max_new_tokens) and self.max_new_tokens >= 1, "max_new_tokens", "1 or more is needed")
        good = math.isfinite(self.temperature) and self.temperature > 0
        check(good, "temperature", "a number above 0 is needed (for greedy decoding do not sample)")
        seeds = self.seed if isinstance(self.seed, Sequence) else [self.seed]
        check(all(s is None or _whole(s) for s in seeds), "seed", "a whole number, one a row, or None is needed")
        check(self.top_k is None or (_whole(self.top_k) and self.top_k >= 1), "top_k", "1 or more is needed")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", "above 0 and at most 1 is needed")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def takes(settings: type) -> Callable:
    """Show the fields of a dataclass, which a function takes as `**options`, in its signature."""

    def shown(function: Callable) -> Callable:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        made = [inspect.Parameter(f.name, own[-1].kind, default=f.default, annotation=f.type) for f in fields(settings)]
        function.__signature__ = signature.replace(parameters=[*own, *made])
        return function

    return shown
