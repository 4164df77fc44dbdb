"""What a comparison asks: the base, and every method at every budget; which of them cannot be, and why."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ... import flags
from ...errors import InputError
from ...foresight import Wish
from ...pruning import Shape, find_method
from ...pruning.catalogue import reach
from ...pruning.spec import needs_of
from ..asking.setting import pruning_of
from ..tasks.literature import UNPRUNED


@dataclass(frozen=True)
class Entry:
    """One setting that is asked; a row of the table is made of one, or of several that differ by seed."""

    spec: str | None = None  # a method as `--pruning` takes it, None for what prunes nothing
    R: float | None = None
    drafts: bool = False
    seed: int = 0

    @property
    def row(self) -> tuple[str, float | None]:
        return self.label, self.R

    @property
    def label(self) -> str:
        return f"{self.spec or UNPRUNED}{' + drafts' if self.drafts else ''}"

    @property
    def title(self) -> str:
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.label}{'' if self.R is None else f' R={self.R:g}'}{seed}"

    def variant(self, args: Namespace) -> Namespace:
        """The flags of `evaluation.run` that ask for it."""
        usual = {
            "retained_tokens": 64.0 if self.R is None else self.R,
            "pruning": self.spec or "twig",
            "seed": self.seed,
        }
        switches = {"no_pruning": self.R is None, "no_speculation": not self.drafts}
        return Namespace(**vars(args) | usual | switches | {"baseline": self.spec is None and not self.drafts})


@dataclass(frozen=True)
class Refused:
    """A method that is not asked at a budget (or, R None, at all), with the reason; `failed`: it was tried and went wrong."""

    label: str
    R: float | None
    reason: str
    failed: bool = False


def entries_of(args: Namespace, wish: Wish) -> tuple[list[Entry], list[Refused]]:
    """In the order of the table; the base comes first, so that a model is opened twice at most."""
    V, letters = wish.letters()
    shape = Shape(letters.L, V, letters.K, letters.F, wish.name)
    asked, refused = [Entry()], []
    asked += [Entry(drafts=True)] if wish.has_twig else []
    for R in args.retained_tokens:
        for spec in args.methods:
            method = find_method(spec, args.query)
            reason = reach(method, R, shape).reason
            if "twig" in needs_of(method) and not wish.has_twig:
                reason = "needs a twig, and none is given (--twig-block)"
            if reason:
                refused.append(Refused(spec, R, reason))
                continue
            seeds = range(args.seed, args.seed + (args.seeds if pruning_of(spec, args.query).draws else 1))
            asked += [Entry(spec, R, seed=seed) for seed in seeds]
            if spec == "twig":
                asked.append(Entry(spec, R, drafts=True, seed=args.seed))
    return asked, refused


def rows_of(entries: Iterable[Entry]) -> dict[tuple[str, float | None], list[Entry]]:
    rows: dict[tuple[str, float | None], list[Entry]] = {}
    for entry in entries:
        rows.setdefault(entry.row, []).append(entry)
    return rows


def wish_of(args: Namespace) -> Wish:
    return Wish(**vars(flags.model_settings(args)))


def check(args: Namespace, wish: Wish) -> None:
    """Raise InputError for numbers that cannot be."""
    wrong: Sequence[tuple[str, int | None]] = (
        ("--seeds", args.seeds), ("--limit", args.limit), ("--speed-limit", args.speed_limit),
    )  # fmt: skip
    for name, value in wrong:
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; 1 or more is needed")
    V = wish.V
    for R in args.retained_tokens:
        if not 0 < R <= V:
            raise InputError(f"-R is {R:g}; more than 0 and at most {V}, the visual tokens of a picture, are needed")
