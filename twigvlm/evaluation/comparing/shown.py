"""A comparison for people: its table in markdown, the short one, two plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import replacing
from ...record import table
from ..tasks import TASKS
from .rows import MEASURED

Record = Mapping[str, Any]
MARKERS = "osD^v<>PX*"
AXES = (
    ("R", "R, visual tokens that enter a layer (asked)", "relacc_R.png"),
    ("RelSpd", "tokens per second, prefill included, % of unpruned", "relacc_speed.png"),
    ("flops", "operations of a prefill, computed", "relacc_flops.png"),
)
LEGEND = (
    "measured: visual tokens that entered a layer on average (R_in); authors': the count that the method's authors would give; "
    "schedule: tokens × layers, at most; RelAcc: mean over benchmarks of score / unpruned score, %, with the 95 % interval of a paired "
    "bootstrap over pictures; prefill, decode, RelSpd (tokens per second, prefill included, % of unpruned) and cache (keys and values, "
    "allocated): {}; computed: the cache behind a prefill of 64 text tokens, GFLOP: the operations of that prefill, scores included; "
    "batch: questions answered together."
)


def legend(found: Mapping[str, Any]) -> str:
    """What the columns are; times are those of whole answers where such were timed."""
    titles = next((row["timed"] for row in found["rows"] if row.get("timed")), [])
    return LEGEND.format(f"of {' and '.join(titles)}'s answers, asked one by one" if titles else "of whole batches")


def markdown(found: Mapping[str, Any]) -> str:
    """The whole table and what could not be asked. Raises InputError without tabulate."""
    titles = {name: task.title for name, task in TASKS.items()} | found.get("columns", {})
    rows = [_cells(row, titles) for row in found["rows"]]
    parts = [table(rows), legend(found)]
    if found["refused"]:
        parts.append("Not in the table:\n\n" + "\n".join(f"- {_why(one)}" for one in found["refused"]))
    return "\n\n".join(parts)


def _why(one: Record) -> str:
    at = "" if one["R"] is None else f", R = {one['R']:g}"
    return f"`{one['method']}`{at}: {'failed: ' if one['failed'] else ''}{one['reason']}"


def _cells(row: Record, titles: Mapping[str, str]) -> dict[str, str]:
    mine = row["source"] == MEASURED
    name = row["method"] + ("" if mine else f" ({row['source']}{'; ' + row['note'] if row.get('note') else ''})")
    cells = {
        "method": name,
        "R": "all" if row["R"] is None else f"{row['R']:g}",
        "measured": _measured(row),
    }
    cells["authors'"] = _number(row["authors"], 1)
    for task, score in row["scores"].items():
        if task in TASKS:
            cells[titles[task]] = _number(score, TASKS[task].decimals)
    return cells | {
        "RelAcc": _number(row["RelAcc"], 1),
        "95 %": _between(row["interval"]),
        "prefill ms": _number(row.get("prefill_ms"), 0),
        "decode tokens/s": _number(row.get("decode_tokens_per_second"), 1),
        "RelSpd": _number(row.get("RelSpd"), 0),
        "cache MB": _number(row.get("cache_bytes"), 2, 1e-6),
        "computed": _number(row.get("computed_cache_bytes"), 2, 1e-6),
        "GFLOP": _number(row.get("flops"), 1, 1e-9),
        "batch": ", ".join(str(size) for size in row.get("batch", ())),
        "schedule": row["schedule"],
    }  # fmt: skip


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:.{digits}f}"


def _measured(row: Record) -> str:
    """With its spread where it depends on the picture."""
    spread = row.get("spread") or 0
    return _number(row["measured"], 1) + (f" ± {spread:.1f}" if spread >= 0.05 else "")


def _between(found: Sequence[float] | None) -> str:
    return "" if found is None else f"{found[0]:.1f} to {found[1]:.1f}"


# ---------------------------------------------------------------------- the short one


def short(found: Mapping[str, Any], methods: Sequence[str]) -> str:
    """RelAcc with its interval at every budget, one row a method, and what the smallest costs, by arithmetic."""
    rows = [row for row in found["rows"] if row["source"] == MEASURED]
    budgets = sorted({row["R"] for row in rows if row["R"] is not None}, reverse=True)
    out = []
    for name in methods:
        mine = {row["R"]: row for row in rows if row["method"] == name}
        if not mine:
            continue
        whole = mine.get(None)
        cells = {"method": name}
        for R in budgets:
            row = mine.get(R, whole)
            cells[f"RelAcc at R = {R:g}"] = (
                "" if row is None else f"{_number(row['RelAcc'], 1)} ({_between(row['interval'])})".replace(" ()", "")
            )
        last = mine.get(budgets[-1] if budgets else None, whole)
        cells[f"measured R at {budgets[-1]:g}" if budgets else "measured R"] = _number(last and last["measured"], 1)
        cells["GFLOP"] = _number(last and last["flops"], 1, 1e-9)
        cells["cache MB"] = _number(last and last["computed_cache_bytes"], 1, 1e-6)
        out.append(cells)
    return table(out) if out else ""


# ---------------------------------------------------------------------- plots


def plot(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """RelAcc against R, against speed and against the operations of a prefill; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in found["rows"] if row["source"] == MEASURED and row["RelAcc"] is not None]
    names = list(dict.fromkeys(row["method"] for row in rows))
    files = []
    for key, label, file in AXES:
        figure, axes = plt.subplots(figsize=(7.5, 6.5), layout="constrained")
        for i, name in enumerate(names):
            mine = [row for row in rows if row["method"] == name]
            style = _style(plt, name, i)
            mine = sorted(mine, key=lambda row: row["R"] or 0)  # a line goes from budget to budget
            points = [(row[key], row["RelAcc"]) for row in mine if row[key] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), **style)
            elif key == "R":
                axes.axhline(mine[0]["RelAcc"], linestyle=":", color=style["color"], label=name)
        axes.set(xlabel=label, ylabel="RelAcc, % of unpruned", title=found["title"])
        if axes.get_legend_handles_labels()[0]:
            figure.legend(fontsize=7, loc="outside lower center", ncols=5)
        with replacing(folder / file) as part:
            figure.savefig(part, dpi=120)
        plt.close(figure)
        files.append(folder / file)
    return files


def _style(plt, name: str, number: int) -> dict[str, Any]:
    """Colours and markers that tell thirty methods apart; the twig's are strong."""
    own = name.split(" ")[0] == "twig"
    turn, colour = divmod(number, 20)
    return {
        "color": "black" if own else plt.get_cmap("tab20")(colour), "marker": MARKERS[(number + turn) % len(MARKERS)],
        "linewidth": 1.8 if own else 0.8, "markersize": 6 if own else 4, "label": name,
        "linestyle": "--" if "drafts" in name else "-",
    }  # fmt: skip
