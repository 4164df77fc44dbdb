"""Results as one table: `python -m twigvlm.evaluation.table RUNS… [--baseline DIR] [--published]`.

RUNS are folders that hold result.json files, at any depth, or such files. One row per method and R.
RelAcc is the mean over benchmarks of score / baseline score; RelSpd is tokens per second, prefill
included, against the baseline's: on MM-Vet, as the paper has it, or averaged over benchmarks where
MM-Vet was not run.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import flags
from ..errors import InputError
from ..files import replacing
from ..program import called, run_program
from ..record import table
from .asking.answers import RESULT
from .tasks import OWN, TASKS
from .tasks.published import MODEL, ROWS, SOURCE

FORMATS = ("markdown", "csv", "latex", "json")
KNOWN = TASKS | OWN
NEEDED = ("task", "split", "model", "setting", "method", "R", "score", "questions")

Column = tuple[str, str]  # task, split


@dataclass
class Row:
    """One model under one setting: its results by benchmark."""

    model: str
    setting: str
    results: dict[Column, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def any(self) -> Mapping[str, Any]:
        return next(iter(self.results.values()))

    @property
    def method(self) -> str:
        return self.any["method"]

    @property
    def R(self) -> float | None:
        return self.any["R"]

    @property
    def limit(self) -> int | None:
        return self.any.get("limit")

    def scores(self) -> dict[Column, float]:
        return {column: r["score"] for column, r in self.results.items() if r["score"] is not None}

    def mean(self, name: str) -> float | None:
        """Over the benchmarks that have it."""
        values = [r[name] for r in self.results.values() if r.get(name) is not None]
        return statistics.mean(values) if values else None


# ---------------------------------------------------------------------- reading


def find_results(places: Iterable[Path]) -> list[dict[str, Any]]:
    """The result.json files below these folders. Raises InputError where there is none, or a damaged one."""
    found = []
    for place in places:
        files = [place] if place.is_file() else sorted(place.rglob(RESULT))
        if not files:
            raise InputError(f"{place}: no {RESULT} there or below; give folders of finished runs")
        found += [_read(file) for file in files]
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise InputError(f"{file}: cannot be read ({fault}); run its benchmark again") from fault
    if not isinstance(facts, dict) or (absent := [name for name in NEEDED if name not in facts]):
        what = f"lacks {', '.join(absent)}" if isinstance(facts, dict) else "holds no object"
        raise InputError(f"{file}: {what}; it is no result of python -m twigvlm.evaluation.run")
    return facts | {"result": str(file)}


def collect(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows in the order of a table. Raises InputError for two different results in one place of it."""
    rows: dict[tuple[str, str], Row] = {}
    for result in results:
        key = (result["model"], result["setting"])
        row = rows.setdefault(key, Row(*key))
        column = (result["task"], result["split"])
        before = row.results.setdefault(column, result)
        if before["result"] != result["result"] and _content(before) != _content(result):
            raise InputError(
                f"two results for {column[0]}, {key[0]}, {key[1]}: {before['result']} and {result['result']}; name one"
            )
    return sorted(rows.values(), key=_place)


def _content(result: Mapping[str, Any]) -> tuple:
    return result["score"], _identity(result)


def _identity(result: Mapping[str, Any]) -> Any:
    return result.get("configuration", {}).get("identity")


def _place(row: Row) -> tuple:
    kinds = ("base", "TTP+SSD", "TTP only", "SSD only")
    kind = kinds.index(row.method) if row.method in kinds else len(kinds)
    return row.model, row.limit or 0, kind, row.method, -(row.R or 0), row.setting


# ---------------------------------------------------------------------- the table


class Table:
    """Rows, their baselines, and what follows from both."""

    def __init__(self, rows: Sequence[Row], baseline: Sequence[Row] | None = None, published: bool = False):
        if not rows:
            raise InputError("no results; give folders of finished runs")
        self.rows, self.published, self.notes = list(rows), published, []
        self._given = self._only(baseline) if baseline else None

    @staticmethod
    def _only(rows: Sequence[Row]) -> Row:
        if len(rows) > 1:
            names = ", ".join(f"{row.model} {row.setting}" for row in rows)
            raise InputError(f"--baseline holds {len(rows)} settings ({names}); give the folder of one")
        return rows[0]

    @cached_property
    def columns(self) -> list[Column]:
        found = {column for row in self.rows for column in row.results}
        scored = {c for c in found if any(row.results.get(c, {}).get("score") is not None for row in self.rows)}
        if self.published:
            known = {task for task, _ in scored}
            scored |= {(task, "") for row in ROWS for task in row.scores if task not in known}
        return sorted(scored, key=lambda c: (KNOWN[c[0]].column if c[0] in KNOWN else math.inf, c))

    def title(self, column: Column) -> str:
        task, split = column
        name = heading(task, [row.results[column] for row in self.rows if column in row.results], count=False)
        return f"{name} ({split})" if sum(task == other for other, _ in self.columns) > 1 else name

    def baseline(self, row: Row) -> Row | None:
        """The one given, else the same model's base on as many questions."""
        if self._given is not None:
            return self._given
        same = [r for r in self.rows if r.method == "base" and r.model == row.model and r.limit == row.limit]
        return next((r for r in same if r.setting.startswith("base")), same[0] if same else None)

    def rel_acc(self, row: Row) -> float | None:
        """Percent; None without a baseline or where the row lacks one of its benchmarks."""
        base = self.baseline(row)
        if base is None:
            return None
        theirs, ours = base.scores(), row.scores()
        if absent := sorted({task for task, _ in theirs.keys() - ours.keys()}):
            self._note(f"no RelAcc for {row.setting}: without {', '.join(absent)} it would be another mean")
            return None
        if zero := sorted({task for (task, _), score in theirs.items() if not score}):
            self._note(f"RelAcc leaves out {', '.join(zero)}: the baseline scores 0 there")
        common = [column for column in theirs if theirs[column]]
        for column in common:
            self._same_questions(row.results[column], base.results[column])
        return 100 * statistics.mean(ours[c] / theirs[c] for c in common) if common else None

    def rel_speed(self, row: Row) -> float | None:
        base = self.baseline(row)
        if base is None:
            return None
        pairs = [(c[0], speed(row.results[c], base.results[c])) for c in row.results if c in base.results]
        ratios = {task: 100 * ratio for task, ratio in pairs if ratio is not None}
        (speaks,) = (task for task in TASKS.values() if task.timed_alone)
        if speaks.name in ratios:
            return ratios[speaks.name]
        if ratios:
            self._note(f"RelSpd is averaged over benchmarks: {speaks.title}, where the paper measures it, was not run")
        return statistics.mean(ratios.values()) if ratios else None

    def _same_questions(self, one: Mapping[str, Any], two: Mapping[str, Any]) -> None:
        ours, theirs = ((_identity(r) or {}).get("questions") for r in (one, two))
        if ours != theirs:
            raise InputError(f"{one['result']} and its baseline {two['result']} were not asked the same questions")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def records(self) -> list[dict[str, Any]]:
        """The table's cells, unrounded; `source` tells measured rows from published ones."""
        many = len({row.model for row in self.rows}) > 1 or self.published
        out = []
        for row in self.rows:
            head = {"model": row.model} if many else {}
            first = f", first {row.limit} questions" if row.limit else ""
            twig = f", {row.setting.split('@', 1)[1]}" if "@" in row.setting else ""
            head |= {"method": row.method + twig + first, "R": row.R, "measured": row.mean("visual_measured")}
            scores = row.scores()
            cells = {self.title(c): scores.get(c) for c in self.columns}
            tail = {
                "RelAcc": self.rel_acc(row),
                "RelSpd": self.rel_speed(row),
                "accepted": _percent(row.mean("acceptance")),
            }
            out.append(head | cells | tail | {"source": "measured"})
        for row in ROWS if self.published else ():
            head = {"model": f"{MODEL} (published)", "method": row.method, "R": row.R, "measured": None}
            cells = {self.title(c): row.scores.get(c[0]) for c in self.columns}
            tail = {"RelAcc": row.rel_acc, "RelSpd": row.rel_speed, "accepted": None}
            out.append(head | cells | tail | {"source": f"published, {SOURCE}"})
        return out

    def render(self, form: str = "markdown") -> str:
        records = self.records()
        if form == "json":
            return json.dumps({"rows": records, "notes": self.notes}, indent=1)
        if form == "csv":
            return _csv(records)
        shown = [_shown(record, self._whole()) for record in records]
        text = table(shown, form="latex_booktabs", words=("model", "method")) if form == "latex" else table(shown)
        return "\n".join([text, *(f"{'% ' if form == 'latex' else ''}{note}" for note in self._legend())])

    def _whole(self) -> set[str]:
        return {self.title(c) for c in self.columns if c[0] in KNOWN and not KNOWN[c[0]].decimals}

    def _legend(self) -> list[str]:
        notes = ["RelAcc, RelSpd: % of the baseline; measured: visual tokens per layer; accepted: % of drafted tokens."]
        if self.published:
            notes.append(f"Rows marked published are the paper's ({SOURCE}) and were not measured here.")
        return ["", *notes, *self.notes]


def heading(task: str, results: Sequence[Mapping[str, Any]], count: bool = True) -> str:
    """A column's title: with the score's name where it is not the benchmark's own, and with what of the benchmark was asked."""
    if task not in KNOWN:
        return task
    usual = KNOWN[task].metric
    metrics = {result.get("metric", usual) for result in results}
    told = sorted(metric.removesuffix(", %") for metric in metrics) if metrics - {usual} else []
    if count:
        told += sorted({f"first {r['questions']} of {r['questions_in_all']}" for r in results if r.get("partial")})
    return f"{KNOWN[task].title} ({'; '.join(told)})" if told else KNOWN[task].title


def speed(result: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
    """Ratio of tokens per second, averaged per sample where both were asked one by one."""
    for name in ("tokens_per_second_per_sample", "tokens_per_second"):
        if result.get(name) and base.get(name):
            return result[name] / base[name]
    return None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _shown(record: Mapping[str, Any], whole: set[str]) -> dict[str, str]:
    out = {}
    for name, value in record.items():
        if name == "source":
            continue
        if value is None:
            out[name] = "all" if name == "R" else ""
        elif isinstance(value, str):
            out[name] = value
        else:
            out[name] = f"{value:g}" if name == "R" else f"{value:.0f}" if name in whole else f"{value:.1f}"
    return out


def _csv(records: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().rstrip("\n")


# ---------------------------------------------------------------------- plots


def plot(results: Table, folder: Path) -> list[Path]:
    """accuracy_<benchmark>.png against R, and relacc_speed.png; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise InputError(f"{folder}: plots cannot be written here ({fault.strerror})") from fault
    records, files = results.records(), []
    for column in results.columns:
        title = results.title(column)
        figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
        for i, ((name, marked), points) in enumerate(_curves(records, title).items()):
            style = {"color": f"C{i % 10}", "label": name} | ({"alpha": 0.6} if marked else {})
            if points[0][0] is None:
                axes.axhline(points[0][1], linestyle=(3 * i, (3, 3)), **style)  # levels that coincide stay visible
            else:
                axes.plot(*zip(*sorted(points), strict=True), "--o" if marked else "-o", **style)
        axes.set(xlabel="R, visual tokens per layer", ylabel=title, title=title)
        files.append(_save(plt, figure, axes, folder / f"accuracy_{'_'.join(filter(None, column))}.png"))
    figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
    both = [r for r in records if r["RelAcc"] is not None and r["RelSpd"] is not None]
    for name in dict.fromkeys(map(_name, both)):
        mine = [r for r in both if _name(r) == name]
        style = "x--" if mine[0]["source"] != "measured" else "o-"
        axes.plot([r["RelSpd"] for r in mine], [r["RelAcc"] for r in mine], style, linewidth=0.8, label=name)
        for r in mine:
            if r["R"] is not None:
                at = (r["RelSpd"], r["RelAcc"])
                axes.annotate(f"R={r['R']:g}", at, (0, 5), textcoords="offset points", fontsize=7, ha="center")
    axes.set(xlabel="speed, % of the baseline", ylabel="RelAcc, %", title="Accuracy against speed")
    return [*files, _save(plt, figure, axes, folder / "relacc_speed.png")]


def _curves(
    records: Sequence[Mapping[str, Any]], title: str
) -> dict[tuple[str, bool], list[tuple[float | None, float]]]:
    curves: dict[tuple[str, bool], list] = {}
    for record in records:
        if record[title] is not None:
            key = (_name(record), record["source"] != "measured")
            curves.setdefault(key, []).append((record["R"], record[title]))
    return curves


def _name(record: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (record.get("model"), record["method"])))


def _save(plt, figure, axes, file: Path) -> Path:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(fontsize=7, loc="outside lower center", ncols=2)  # where it hides nothing
    with replacing(file) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
    return file


# ---------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=called("twigvlm.evaluation.table"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders that hold results, or result.json")
    parser.add_argument(
        "--baseline", type=Path, metavar="DIR", help="results of the baseline (default: the base among RUNS)"
    )
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="default %(default)s")
    parser.add_argument("--published", action="store_true", help="with the paper's rows, marked as such")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw accuracy against R and against speed")
    args = flags.parse(parser, argv)
    return run_program(lambda: _print_table(args))


def _print_table(args: argparse.Namespace) -> None:
    baseline = collect(find_results([args.baseline])) if args.baseline else None
    found = Table(collect(find_results(args.runs)), baseline, args.published)
    for file in plot(found, args.plots) if args.plots else ():
        print(f"plot: {file}", file=sys.stderr)
    print(found.render(args.format))


if __name__ == "__main__":
    sys.exit(main())
