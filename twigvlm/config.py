"""What a twig is and what a generation is: frozen dataclasses that refuse nonsense when made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import InputError

DEFAULT_K, DEFAULT_T = 2, 3  # the released twigs', paper section 4.1
WIPE_SHARE = 0.75  # F / L of LLaVA-1.5-7B, paper section 3.2
FORMAT_VERSION = 1
AUTO = "auto"


@dataclass(frozen=True)
class TwigConfig:
    """Where a twig grows on a base of L layers: T layers on top of layer K, image gone before layer F.

    F = L or more means that the image is never wiped. Raises InputError on an impossible combination.
    """

    L: int
    K: int = DEFAULT_K
    T: int = DEFAULT_T
    F: int = 0  # 0: round(0.75 L)

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


@dataclass(frozen=True)
class GenerationSettings:
    """How to write an answer; the defaults are the paper's (greedy, drafts of 5, confidence 0.6).

    `top_k` and `top_p` None switch the filter off. Raises InputError on values outside their range.
    """

    draft_length: int | Literal["auto"] = 5  # delta: drafted tokens per step at most; "auto": as many as pay here
    draft_confidence: float = 0.6  # theta: drafting stops after a token less probable than this
    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | Sequence[int] | None = None  # of the first row, or one a row

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
