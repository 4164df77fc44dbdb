"""What there is to choose from: `python -m twigvlm.pruning.catalogue [--markdown]`. No weights are read.

Two tables, made from the methods themselves: what each is and needs, and what it leaves of LLaVA-1.5-7B's
576 visual tokens in each of its 32 layers at some budgets. The authors' own count of tokens stands in
brackets where it is not ours (R, the average that enters a layer).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from .. import flags
from ..errors import InputError
from ..program import called, run_program
from ..record import table
from .calibrated import missing
from .methods import METHODS
from .plan import Method, Plan, Shape
from .spec import BUDGETS, LLAVA, find_method, needs_of, shown, some_plan

COMMON = {"count"}  # every method has it
PLAIN, MARKDOWN = "simple", "github"  # as tabulate calls them


@dataclass(frozen=True)
class Reached:
    """A method under one budget: its plan, or why there is none. `R` is what enters a layer, `authors` their count."""

    plan: Plan | None = None
    layers: tuple[int, ...] = ()  # tokens of one image that enter each, at most
    R: float | None = None
    authors: float | None = None
    reason: str = ""


def reach(method: Method, R: float, shape: Shape) -> Reached:
    """What a method makes of a budget; an R that it cannot reach is told, not raised."""
    try:
        plan = method.plan(R, shape)
    except InputError as fault:
        return Reached(reason=str(fault))
    layers = tuple(plan.tokens_per_layer(shape.L, shape.V))
    return Reached(plan, layers, sum(layers) / len(layers), method.authors(layers))


def compact(layers: Sequence[int]) -> str:
    """Tokens by layer in short: `576×2 41×22 0×8`."""
    return " ".join(f"{tokens}×{len(list(run))}" for tokens, run in itertools.groupby(layers))


def counted(found: Reached) -> str:
    """The schedule with the authors' own count where that is another number, or the reason why not."""
    if found.plan is None:
        return f"not: {found.reason}"
    own = "" if abs(found.authors - found.R) < 0.05 else f" [{found.authors:.1f}]"
    return f"{compact(found.layers)}{own}"


def place_of(plan: Plan) -> str:
    """Where a plan acts."""
    cuts = [str(before) for before, _ in plan.stages]
    parts = ["before the decoder"] if plan.tower is not None else []
    if cuts:
        parts.append(f"before layer{'s' if len(cuts) > 1 else ''} {', '.join(cuts)}")
    if plan.evict is not None:
        parts.append(f"caches from layer {plan.evict} on after prefill")
    return ", ".join(parts) or "nowhere"


def describe(method: Method, shape: Shape = LLAVA) -> dict[str, str]:
    """A row of the first table."""
    return {
        "method": method.name,
        "paper": method.paper,
        "in one line": method.summary,
        "acts": place_of(some_plan(method, shape)),
        "needs": ", ".join(needs_of(method)),
        "trained": "yes" if method.trained else "no",
        "settings": ", ".join(shown(f) for f in fields(method) if f.name not in COMMON),
    }


def schedules(method: Method, budgets: Sequence[float], shape: Shape = LLAVA) -> dict[str, str]:
    """A row of the second one."""
    if missing(method):
        return {"method": method.name} | {f"R = {R:g}": "as many as it takes, R on average" for R in budgets}
    return {"method": method.name} | {f"R = {R:g}": counted(reach(method, R, shape)) for R in budgets}


def overview(markdown: bool = False) -> str:
    """The first table, and what all methods have in common."""
    rows = [describe(kind()) for kind in METHODS.values()]
    code = "`" if markdown else ""
    for row in rows:
        row["method"] = f"{code}{row['method']}{code}"
        row["settings"] = ", ".join(f"{code}{part}{code}" for part in filter(None, row["settings"].split(", ")))
    common = "Every method takes `count=authors` besides: R counted as its authors do, with their own settings where they published some."
    return f"{table(rows, form=MARKDOWN if markdown else PLAIN)}\n\n{common}"


def in_short(shape: Shape = LLAVA) -> str:
    """The methods' names by where they act, as Markdown."""
    groups: dict[str, list[str]] = {"Before the decoder": [], "within it": [], "both": []}
    for kind in METHODS.values():
        plan = some_plan(kind(), shape)
        within = bool(plan.stages) or plan.evict is not None
        group = "both" if plan.tower is not None and within else "within it" if within else "Before the decoder"
        groups[group].append(f"`{kind.name}`")
    return "; ".join(f"{group}: {', '.join(names)}" for group, names in groups.items()) + "."


def budgeted(markdown: bool = False, budgets: Sequence[float] = BUDGETS) -> str:
    """The second table."""
    code = "`" if markdown else ""
    rows = [schedules(kind(), budgets) for kind in METHODS.values()]
    rows = [{**row, "method": f"{code}{row['method']}{code}"} for row in rows]
    lead = (
        f"Visual tokens that enter each of LLaVA-1.5-7B's L = {LLAVA.L} layers (V = {LLAVA.V}, K = {LLAVA.K}, F = {LLAVA.F}; "
        "tokens × layers; in brackets the authors' own count where it is another number):"
    )
    return f"{lead}\n\n{table(rows, form=MARKDOWN if markdown else PLAIN)}"


def catalogue(markdown: bool = False, budgets: Sequence[float] = BUDGETS) -> str:
    """Both tables."""
    return f"{overview(markdown)}\n\n{budgeted(markdown, budgets)}"


def methods_of(text: str) -> list[str]:
    """`fastv,sparsevlm:version=1.0,faithful,twig` as specs: a word that names no method is a setting of the one before.

    Raises InputError for what is unknown.
    """
    specs: list[str] = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        if specs and ":" in specs[-1].rsplit("+", 1)[-1] and word.partition(":")[0].partition("+")[0] not in METHODS:
            specs[-1] += f",{word}"
        else:
            specs.append(word)
    for spec in specs:
        find_method(spec)
    if not specs:
        raise InputError(f"no method given; known: {', '.join(METHODS)}")
    return list(dict.fromkeys(specs))


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(called("twigvlm.pruning.catalogue"), __doc__)
    parser.add_argument(
        "--markdown", action="store_true", help="as the README (the first table) and docs/methods.md have it"
    )
    parser.add_argument(
        "-R", "--retained-tokens", type=flags.budgets_of, default=list(BUDGETS), metavar="R,R,…",
        help="budgets of the second table (default 192,128,64)",
    )  # fmt: skip
    args = flags.parse(parser, argv)
    return run_program(lambda: print(catalogue(args.markdown, args.retained_tokens)))


if __name__ == "__main__":
    sys.exit(main())
