"""How long a draft pays on this machine: `draft_length="auto"`.

A round that drafts n tokens costs n draft steps and a verification of n + 1 tokens, and writes
1 + a + a^2 + … + a^n tokens if the base accepts each with probability a. Costs are measured once a
process and batch size, a is what was accepted so far; the length with the most tokens a second is
drafted, and nothing where none pays. The answer does not depend on it (beyond the last bits of sums).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..model.cache import CacheGroup
from ..model.stream import Stream
from ..model.trunk import Trunk
from ..model.twig import Twig

if TYPE_CHECKING:
    from .loop import Step

LONGEST = 8  # tokens of a draft
MEASURED = (1, 2, 4, 6, LONGEST + 1)  # tokens of a verification; those between are interpolated
WIDE = (17, 33, 65)  # of drafts that branch
BESIDE = 3  # tokens beside the first in a measured draft step
DEAR = 0.25  # of a step for one more token: what stands ninth or later in a draft is hardly ever as likely
ENOUGH = 0.5  # seconds in which a part is measured again: long times vary less
CONTEXT = 64  # tokens in the caches meanwhile: what is measured are the weights
PRIOR, WEIGHT = 0.8, 4.0  # acceptance before anything was drafted, and how many drafted tokens that counts
MEMORY = 200.0  # drafted tokens that are remembered
PATIENCE = 3  # tokens of an answer before a twig that nothing else needs reads the prompt: most answers are shorter
RETRY = 64  # rounds without drafts before one is tried again
LEAST_GAIN = 1.02  # a draft must promise as much: the costs are not known better


@dataclass(frozen=True)
class Costs:
    """Seconds for a batch of one size: to draft a token, and to verify 1, 2, … LONGEST + 1 tokens (or more)."""

    draft: float
    verify: tuple[float, ...]
    beside: float = 0.0  # for every further token that is drafted in the same step

    def rate(self, length: int, acceptance: float) -> float:
        """Tokens a second of rounds that draft `length` tokens."""
        written = sum(acceptance**i for i in range(length + 1))
        return written / (length * self.draft + self.verify[length])


@dataclass
class Pace:
    """Chooses the length of every draft; one for a model and a batch size, kept between generations."""

    costs: Costs
    accepted: float = PRIOR * WEIGHT
    tried: float = WEIGHT
    idle: int = field(default=0)  # rounds since the last draft

    @property
    def acceptance(self) -> float:
        return self.accepted / self.tried

    def length(self) -> int:
        """Tokens to draft now."""
        rates = [self.costs.rate(n, self.acceptance) for n in range(LONGEST + 1)]
        best = max(range(LONGEST + 1), key=rates.__getitem__)
        best = best if rates[best] >= LEAST_GAIN * rates[0] else 0
        self.idle = 0 if best else self.idle + 1
        return best or int(self.idle % RETRY == 0)

    def note(self, steps: Sequence[Step]) -> None:
        """What a round of all rows has shown."""
        for step in steps:
            self.learn(len(step.drafted), step.accepted)

    def learn(self, drafted: int, accepted: int) -> None:
        """A draft of so many tokens, of which the base took so many: the first refused one is the last that says anything."""
        fade = max(0.0, 1 - drafted / MEMORY)
        self.accepted = fade * self.accepted + accepted
        self.tried = fade * self.tried + accepted + (accepted < drafted)


@torch.inference_mode()
def measure(trunk: Trunk, twig: Twig, rows: int, repeats: int = 3) -> Costs:
    """Time the parts of a round with `rows` rows: medians after one warm-up."""
    clock = Parts(trunk, twig, rows, CONTEXT)
    verify = {n: median(clock.verifying(n), trunk.device, repeats, 1) for n in MEASURED}
    between = [_between(verify, n) for n in range(1, LONGEST + 2)]
    return Costs(median(clock.drafting(), trunk.device, repeats, 1), tuple(between))


@torch.inference_mode()
def measure_wide(trunk: Trunk, twig: Twig, rows: int, repeats: int = 9) -> Costs:
    """The same for drafts that branch, up to the first block whose tokens cost more than they could bring.

    The shortest times of all: it is their small differences that count here, and others at work only add to them. For
    the same reason no block is taken to cost less than a smaller one.
    """
    clock = Parts(trunk, twig, rows, CONTEXT)

    def least(work: Callable[[], None]) -> float:
        return min(times(work, trunk.device, repeats, 1, ENOUGH))

    verify: dict[int, float] = {}
    for n in (*MEASURED, *WIDE):
        before = max(verify, default=n)
        verify[n] = max(least(clock.verifying(n)), verify.get(before, 0.0))
        if n > LONGEST + 1 and (verify[n] - verify[before]) / (n - before) > DEAR * verify[1]:
            break
    draft = least(clock.drafting())
    beside = max(least(clock.drafting(BESIDE + 1)) - draft, 0.0) / BESIDE
    return Costs(draft, tuple(_between(verify, n) for n in range(1, max(verify) + 1)), beside)


class Parts:
    """The parts of a round as functions without arguments, behind `context` cached tokens."""

    def __init__(self, trunk: Trunk, twig: Twig | None, rows: int, context: int):
        self.trunk, self.twig, self.rows, self.context = trunk, twig, rows, context
        K = twig.config.K if twig is not None else 0
        self.layers = {
            "low": trunk.layers[:K],
            "high": trunk.layers[K:],
            "twig": twig.layers if twig is not None else [],
        }
        self.caches = {
            name: CacheGroup([layer.self_attn.layer_idx for layer in layers], rows, trunk.device)
            for name, layers in self.layers.items()
        }
        prompt = self._text(context, 0)
        for name in self.layers:
            self._run(name, prompt)
            self.caches[name].commit(context)

    def drafting(self, tokens: int = 1) -> Callable[[], None]:
        """One token (or so many at once) through the layers below the twig, the twig and its head."""
        token = self._text(tokens, self.context)

        def draft() -> None:
            self.twig.logits(self._run("twig", self._run("low", token)).hidden).argmax(-1).tolist()
            self.caches["low"].commit(0)
            self.caches["twig"].commit(0)

        return draft

    def verifying(self, tokens: int) -> Callable[[], None]:
        """So many tokens through the layers above and the base's head."""
        block = self._text(tokens, self.context)

        def verify() -> None:
            self.trunk.logits(self._run("high", block).hidden).argmax(-1).tolist()
            self.caches["high"].commit(0)

        return verify

    def _run(self, name: str, stream: Stream) -> Stream:
        return self.trunk.run(self.layers[name], stream, self.trunk.attend(stream, self.caches[name]))

    def _text(self, count: int, first: int) -> Stream:
        place = torch.arange(first, first + count, device=self.trunk.device).expand(self.rows, -1)
        return self.trunk.tokens(torch.full_like(place, 5), place, full=True)


def median(work: Callable[[], None], device: torch.device, repeats: int, warm: int) -> float:
    """Seconds."""
    return statistics.median(times(work, device, repeats, warm))


def times(
    work: Callable[[], None], device: torch.device, repeats: int, warm: int, enough: float = math.inf
) -> list[float]:
    """Seconds of each run after the first ones; no further run where those took `enough` seconds."""
    found: list[float] = []
    while len(found) < warm + repeats and (len(found) <= warm or sum(found[warm:]) < enough):
        start = now(device)
        work()
        found.append(now(device) - start)
    return found[warm:]


def now(device: torch.device) -> float:
    """The clock, after what the device has to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _between(found: dict[int, float], n: int) -> float:
    low = max(k for k in found if k <= n)
    high = min(k for k in found if k >= n)
    share = (n - low) / (high - low) if high > low else 0.0
    return found[low] + share * (found[high] - found[low])
