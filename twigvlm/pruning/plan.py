"""A pruning method as data: where it acts, with which rules, under which budget.

Legend: L layers of the base, V visual tokens of an image, K and F where the twig grows and where it wipes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Literal

from ..errors import InputError
from .budget import within
from .cost import Cost, Sizes, cost
from .reducer import Reducer
from .rule import TWIG, Rule


@dataclass(frozen=True)
class Plan:
    """Stages in the order of their layers, perhaps behind a reducer in the tower. The empty plan prunes nothing.

    `positions`: kept tokens keep their places in the prompt ("keep") or are numbered anew ("compact").
    `evict`: after prefill, caches of layers from this one on lose the visual tokens that no later
    layer has. `behind_cache`: what is written then takes the positions behind what these caches still hold,
    though the keys of the question stand later: a released fault.
    """

    stages: tuple[tuple[int, Rule], ...] = ()
    tower: Reducer | None = None
    positions: Literal["keep", "compact"] = "keep"
    evict: int | None = None
    behind_cache: bool = False

    def __post_init__(self) -> None:
        layers = [before for before, _ in self.stages]
        if layers != sorted(set(layers)):
            raise InputError(f"stages stand before layers {layers}; each needs a layer of its own, in rising order")

    def __bool__(self) -> bool:
        return bool(self.stages or self.tower)

    @property
    def needs_twig(self) -> bool:
        return any(rule.probe is not None and rule.probe.source in TWIG for _, rule in self.stages)

    @property
    def needs_head(self) -> bool:
        """It asks the twig's pruning head and nothing else would do."""
        return any(rule.probe is not None and rule.probe.source == "head" for _, rule in self.stages)

    @property
    def random(self) -> bool:
        """Something is drawn, so rows need seeds."""
        return any(part.draws for part in (self.tower, *(rule for _, rule in self.stages)) if part is not None)

    def tokens_per_layer(self, layers: int, visual: int) -> list[int]:
        """Visual tokens of one image that enter each base layer, at most."""
        now = self.tower.most(visual) if self.tower else visual
        counts, cuts = [], {before: rule.most(now) for before, rule in self.stages}
        for layer in range(layers):
            now = min(now, cuts.get(layer, now))
            counts.append(now)
        return counts

    def cost(self, sizes: Sizes, text: int = 64) -> Cost:
        """Operations of the prefill of one picture and `text` text tokens, and the cache behind it."""
        return cost(self, sizes, text)


@dataclass(frozen=True)
class Shape:
    """What a method's budget depends on: the base, its visual tokens per image, and where the twig grows."""

    L: int
    V: int
    K: int
    F: int
    base: str = ""  # its name, for methods that are calibrated on it


@dataclass(frozen=True)
class Method(ABC):
    """Owns its budget: from R, the visual tokens that enter a layer on average (R_in), to a plan.

    Its fields are its settings, which people write behind its name: `sparsevlm:version=1.0`.
    `count="authors"` reads R as the authors do, and gives their own settings where they published some.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[str] = ""  # beyond a base: "twig", "class token", "text tower"
    trained: ClassVar[bool] = False
    selects: ClassVar[bool] = True  # it only chooses: where all tokens may stay, nothing changes
    adaptive: ClassVar[bool] = False  # how many stay depends on picture and question; R is met on average
    count: Literal["entering", "authors"] = "entering"

    @property
    def fitted(self) -> tuple[str, ...]:
        """Settings that a calibration finds where nobody gives them, in the order in which it does: see `pruning.calibrated`."""
        return ()

    def aim(self, setting: str, R: float, shape: Shape) -> tuple[int | None, float]:
        """What a fitted setting is to reach on average: so many tokens that enter a layer (None: all layers, R)."""
        return None, R

    @abstractmethod
    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        """Smallest and largest R."""

    @abstractmethod
    def plan(self, R: float, shape: Shape) -> Plan:
        """Raises InputError for an R outside the legal range."""

    def authors(self, entering: Sequence[float]) -> float:
        """The authors' own count of tokens, from those that enter each layer, 0 to L-1."""
        return sum(entering) / len(entering)


@dataclass(frozen=True)
class TowerMethod(Method):
    """Leaves R tokens of each image before the decoder, so in every layer; positions as in the shorter prompt.

    `keep`: tokens of an image, for when a decoder method goes on from there (`visionzip:keep=288+twig`).
    """

    keep: int | None = None

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        return Fraction(1), Fraction(shape.V)

    def plan(self, R: float, shape: Shape) -> Plan:
        if self.keep is not None:
            raise InputError(
                f"{self.name}:keep={self.keep} is for a method that goes on from there ({self.name}:keep={self.keep}+twig); "
                f"alone, {self.name} keeps R"
            )
        exact = within(R, self.legal(shape), f"{self.name} keeps R of an image's V={shape.V} tokens in every layer")
        return Plan(tower=self.reducer(round(exact), shape))

    @abstractmethod
    def reducer(self, n: int, shape: Shape) -> Reducer:
        """That leaves `n` tokens of each image."""


@dataclass(frozen=True)
class Composed(Method):
    """One method before the decoder, another one within: the second spends R on what the first has left.

    Without `keep` the first leaves 2 R, as TOPS and TReVS do.
    """

    paper: ClassVar[str] = "composed"
    summary: ClassVar[str] = "one method before the decoder, one within it"
    first: TowerMethod | None = None
    then: Method | None = None

    @property
    def name(self) -> str:
        return f"{self.first.name}+{self.then.name}"

    def left(self, R: float, shape: Shape) -> int:
        """Tokens of an image that enter the decoder."""
        keep = round(2 * R) if self.first.keep is None else self.first.keep
        if self.first.keep is not None and not 1 <= keep <= shape.V:
            raise InputError(f"{self.first.name}:keep is {keep}; 1 to V={shape.V} tokens of an image can stay")
        return max(1, min(keep, shape.V))

    def legal(self, shape: Shape) -> tuple[Fraction, Fraction]:
        keep = shape.V if self.first.keep is None else self.first.keep
        low, high = self.then.legal(replace(shape, V=keep))
        return (low if self.first.keep is not None else Fraction(1)), high

    def plan(self, R: float, shape: Shape) -> Plan:
        exact = within(R, (Fraction(0), Fraction(shape.V)), "an image has no more tokens")
        n = self.left(float(exact), shape)
        later = self.then.plan(R, replace(shape, V=n))
        if later.tower is not None:
            raise InputError(f"{self.then.name} acts before the decoder itself; it cannot go on from {self.first.name}")
        return replace(later, tower=self.first.reducer(n, shape))
