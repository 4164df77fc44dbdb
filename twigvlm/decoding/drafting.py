"""Which drafts a generation has: what its settings ask for, as far as its chooser can give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..config import AUTO, GenerationSettings
from ..errors import InputError
from ..model.trunk import Trunk
from ..model.twig import Twig
from .choose import Chooser
from .loop import Decoder, Draft, Step
from .pace import Pace, measure, measure_wide
from .tree import branches, grow, grow_as_it_pays
from .worth import Worth


@dataclass(frozen=True)
class Drafts:
    """What a Decoder is told of them."""

    settings: GenerationSettings
    name: str  # none, chain or tree with its shape; and why, where another was asked for
    pace: Pace | None = None
    grow: Callable[[Decoder], Draft] | None = None


class Drafting:
    """How a model drafts. What its steps cost is measured once for a size of batches and a kind of drafts."""

    def __init__(self, trunk: Trunk, twig: Twig | None):
        self.trunk, self.twig = trunk, twig
        self.paces: dict[tuple[int, type[Pace]], Pace] = {}

    def choose(self, settings: GenerationSettings, chooser: Chooser, rows: int) -> Drafts:
        """Raises InputError for a tree with more children than the twig knows words."""
        if self.twig is None or settings.draft_length == 0:
            return Drafts(replace(settings, draft_length=0, tree=None), "none")
        shape = settings.shape
        if settings.tree is None:
            return self._chain(settings, rows)
        if not branches(chooser):
            why = f": {type(chooser).__name__} chooses no second-best tokens (it has no `branch`)"
            return self._chain(replace(settings, draft_length=shape.D if shape else AUTO, tree=None), rows, why)
        if shape is None:
            return Drafts(settings, "tree auto", self._pace(rows, Worth), grow_as_it_pays)
        words = self.twig.lm_head.out_features
        if words < shape.E:
            raise InputError(f"tree is {shape}: E is {shape.E}, but the twig knows {words} words; choose E <= {words}")
        if shape.E == 1:
            return self._chain(replace(settings, draft_length=shape.D, tree=None), rows)
        return Drafts(settings, f"tree {shape}", grow=partial(grow, shape=shape))

    def _chain(self, settings: GenerationSettings, rows: int, why: str = "") -> Drafts:
        pace = self._pace(rows, Pace) if settings.draft_length == AUTO else None
        return Drafts(settings, f"chain{why}", pace)

    def _pace(self, rows: int, kind: type[Pace]) -> Pace:
        size = 1 << (rows - 1).bit_length()
        if (size, kind) not in self.paces:
            parts = (self.trunk, self.twig, size)
            self.paces[size, kind] = Pace(measure(*parts)) if kind is Pace else Worth(measure_wide(*parts), rows=size)
        return self.paces[size, kind]


def hit_rates(steps: Sequence[Step]) -> list[float]:
    """By depth: of the drafts that were right so far and went on, the share that was right there too."""
    deepest = max((s.offered for s in steps), default=0)
    asked = [sum(s.offered > d for s in steps) for d in range(deepest)]
    return [sum(s.accepted > d for s in steps) / n for d, n in enumerate(asked)]
