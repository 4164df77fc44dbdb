"""From results to the rows of a comparison: what was measured, what the plan says, what others published."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ...pruning import Method, Shape, find_method
from ...pruning.catalogue import compact, reach
from ...pruning.cost import Cost
from ...pruning.spec import spec_of
from ..table import speed
from ..tasks.base import Task
from ..tasks.literature import SOURCES, UNPRUNED, Reported, reported
from .entries import Entry
from .spread import Blocks, interval, together

UNNAMED = {"count", "projector", "text_tower"}  # settings without which a published row is called
MEASURED, PUBLISHED = "measured", "published"


@dataclass
class Measured:
    """One row: the runs that it is made of (several where seeds differ), by benchmark."""

    entries: list[Entry]
    results: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    blocks: dict[str, list[Blocks | None]] = field(default_factory=dict)

    @property
    def first(self) -> Entry:
        return self.entries[0]

    def add(self, task: str, result: Mapping[str, Any], blocks: Blocks | None) -> None:
        self.results.setdefault(task, []).append(result)
        self.blocks.setdefault(task, []).append(blocks)

    def whole(self, task: str) -> bool:
        """All seeds have answered it."""
        return len(self.results.get(task, ())) == len(self.entries)

    def score(self, task: str) -> float | None:
        """Averaged over seeds."""
        scores = [r["score"] for r in self.results.get(task, ())]
        return statistics.mean(scores) if self.whole(task) and None not in scores else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the tokens that entered a layer, between prompts of a benchmark."""
        found = [r["visual_spread"]["sd"] for runs in self.results.values() for r in runs if r.get("visual_spread")]
        return statistics.mean(found) if found else None

    def mean(self, name: str, tasks: Iterable[str] | None = None) -> float | None:
        """Of a figure, over benchmarks and seeds that have it."""
        some = self.results if tasks is None else [t for t in tasks if t in self.results]
        values = [r[name] for task in some for r in self.results[task] if r.get(name) is not None]
        return statistics.mean(values) if values else None


def records(
    measured: Sequence[Measured],
    tasks: Sequence[Task],
    shape: Shape,
    model: str,
    query: str,
    costs: Mapping[Entry, Cost],
) -> list[dict[str, Any]]:
    """The rows as the JSON has them, unrounded; the first is the base. `model` is the one that published rows are of, or none.

    `costs`: of each entry what `Plan.cost` counts.
    """
    base = measured[0]
    scored = [task for task in tasks if base.score(task.name)]
    out = []
    for row in measured:
        out.append(_record(row, base, scored, tasks, shape, query) | _cost(costs.get(row.first)))
        out += [_published(one, scored) for one in reported(_named(row.first), row.first.R, model, row.first.drafts)]
    return out


def _named(entry: Entry) -> str:
    """As published rows are called: however R is counted, wherever files lie."""
    if entry.spec is None:
        return UNPRUNED
    method = find_method(entry.spec)
    return spec_of(replace(method, **{f.name: f.default for f in fields(method) if f.name in UNNAMED}))


def _record(
    row: Measured, base: Measured, scored: Sequence[Task], tasks: Sequence[Task], shape: Shape, query: str
) -> dict[str, Any]:
    entry = row.first
    timed = [t.name for t in tasks if t.timed_alone and t.name in row.results] or list(row.results)
    facts: dict[str, Any] = {"method": entry.label, "R": entry.R, "measured": row.mean("visual_measured")}
    facts |= (
        {"authors": None, "schedule": f"{shape.V}×{shape.L}"} if entry.spec is None else _planned(entry, shape, query)
    )
    facts["scores"] = {t.name: row.score(t.name) for t in tasks if not t.timed_alone or row.score(t.name) is not None}
    facts |= _accuracy(row, base, scored)
    facts |= {
        "timed": [t.title for t in tasks if t.timed_alone and t.name in timed],
        "prefill_ms": _times(1e3, row.mean("time_to_first_token_median", timed)),
        "decode_tokens_per_second": row.mean("decode_tokens_per_second", timed),
        "RelSpd": _relative_speed(row, base, timed),
        "accepted": _times(100, row.mean("acceptance")),
        "cache_bytes": row.mean("cache_bytes", timed),
        "batch": sorted({size for runs in row.results.values() for r in runs for size in r["batch_sizes"]}),
        "questions": sum(
            row.results[t.name][0]["questions"] for t in tasks if t.name in row.results and not t.timed_alone
        ),
        "seeds": [e.seed for e in row.entries] if len(row.entries) > 1 else None,
    }
    return facts | {"source": MEASURED}


def _planned(entry: Entry, shape: Shape, query: str) -> dict[str, Any]:
    method: Method = find_method(entry.spec, query)
    found = reach(method, entry.R, shape)
    if varies(method):  # what is planned is but a bound
        return {"authors": None, "schedule": "as many as it takes"}
    return {"authors": found.authors, "schedule": compact(found.layers)}


def varies(method: Method) -> bool:
    """How many tokens stay depends on picture and question."""
    return method.adaptive or bool(method.fitted)


def _accuracy(row: Measured, base: Measured, scored: Sequence[Task]) -> dict[str, Any]:
    """RelAcc with its interval, and of each seed where there are several; none where a benchmark is lacking."""
    lacking = [task.name for task in scored if row.score(task.name) is None]
    if lacking or not scored:
        return {"RelAcc": None, "interval": None, "by_seed": None, "lacking": lacking}
    theirs = {task.name: base.score(task.name) for task in scored}
    each = [
        100 * statistics.mean(row.results[name][i]["score"] / score for name, score in theirs.items())
        for i in range(len(row.entries))
    ]
    pairs = [(together(row.blocks[name]), together(base.blocks[name])) for name in theirs]
    found = None if row is base else interval(pairs)
    return {
        "RelAcc": statistics.mean(each), "interval": found, "by_seed": each if len(each) > 1 else None, "lacking": [],
    }  # fmt: skip


def _relative_speed(row: Measured, base: Measured, timed: Sequence[str]) -> float | None:
    """Tokens per second, prefill included, in percent of the base's; averaged."""
    ratios = [
        100 * ratio
        for task in timed
        for result in row.results[task]
        if task in base.results and (ratio := speed(result, base.results[task][0])) is not None
    ]
    return statistics.mean(ratios) if ratios else None


def _cost(cost: Cost | None) -> dict[str, Any]:
    if cost is None:
        return {"flops": None, "computed_cache_bytes": None}
    return {"flops": cost.flops, "computed_cache_bytes": cost.cache_bytes}


def _published(one: Reported, scored: Sequence[Task]) -> dict[str, Any]:
    """What others measured under the same name and budget, marked so. RelAcc over the benchmarks that both have."""
    base = SOURCES[one.source].base
    known = {t.name: one.scores[t.name] / base[t.name] for t in scored if t.name in one.scores and t.name in base}
    return {
        "method": one.method, "R": one.R, "measured": None, "authors": None, "schedule": "",
        "scores": dict(one.scores), "RelAcc": 100 * statistics.mean(known.values()) if known else None,
        "interval": None, "by_seed": None, "lacking": [], "source": f"{PUBLISHED}: {SOURCES[one.source].name}",
        "note": one.note,
    }  # fmt: skip


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value
