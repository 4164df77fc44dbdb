"""Figures as people read them: with intervals and commands, what `measure` found of a base, what the published pruning head gives."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from ..files import replacing
from ..record import table

PLACES = ("--out", "--plots", "--report", "--work")  # flags that say where something goes
DEPTH = {
    "without those from": "without the block from l",
    "lens": "norm and head read l",
    "looking": "pruned by what l attends to",
}


def between(share: dict) -> str:
    return f"{share['percent']:.1f} ({share['low']:.1f} to {share['high']:.1f})"


def command(facts: dict) -> str:
    """How it was measured, without where it went: who repeats it shall not overwrite what is published."""
    words = shlex.split(facts["command"])
    places = [i for i, word in enumerate(words) if word in PLACES]
    return shlex.join(word for i, word in enumerate(words) if i not in places and i - 1 not in places)


def of_row(row: dict, name: str) -> str | None:
    """A figure with its interval."""
    if row.get(name) is None:
        return None
    low, high = row["intervals"][name]
    return f"{row[name]:.1f} ({low:.1f} to {high:.1f})"


def answers(found: dict) -> str:
    """A line for each kind, turn and phrasing that was asked."""
    rows = [
        {"asked": name, "right %": between(share), "of": share["asked"]}
        for name, share in found.items()
        if isinstance(share, dict) and "percent" in share
    ]
    name = "turns over the same alone, %"
    if name in found:
        rows.append({"asked": name, "right %": "{:.1f} ({:.1f} to {:.1f})".format(*found[name]), "of": None})
    return table(rows)


def curves(found: dict) -> dict[str, dict[int, dict]]:
    """Of each measure over depth that was taken, layer → share."""
    out = {}
    for name in DEPTH:
        held = found.get(name)
        items = enumerate(held) if isinstance(held, list) else (held or {}).items()
        if points := {int(layer): share for layer, share in items if str(layer).isdigit()}:
            out[name] = points
    return out


def depth(found: dict) -> str:
    """A line a layer l."""
    taken = curves(found)

    def line(layer: int) -> Iterator[tuple[str, str | int | None]]:
        yield "l", layer
        for name, points in taken.items():
            yield DEPTH[name], between(points[layer]) if layer in points else None

    return table([dict(line(layer)) for layer in range(found["layers"])])


def base(results: Path) -> str:
    """What `measure` found of the base: in turns and phrasings, and over depth."""
    out = []
    for name, shown_as in (("asked", answers), ("depth", depth)):
        file = results / f"base_{name}.json"
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            told = f"`{command(found)}`\n({found['scenes']} scenes, {found['all']['asked']} short questions, {found['device']}, "
            out.append(f"{told}[JSON](benchmarks/results/{file.name})):\n\n{shown_as(found)}")
            if file.with_suffix(".png").exists():
                out.append(f"![Over depth](benchmarks/results/base_{name}.png)")
    return "\n\n".join(out)


def published(results: Path) -> str:
    """The published pruning head beside the plain twig, by its highest scores and by discounted picks, at every R."""
    plain, head, spread = (
        json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("sprout_report", "sprout_plus_report", "sprout_plus_discount_report")
    )
    told = {"right short answers %": "all", "RelAcc %": "RelAcc", "right descriptions %": "description, objects"}

    def line(twig: str, row: dict) -> dict:
        figures = {name: of_row(row, key) for name, key in told.items()}
        return {
            "twig": twig,
            "pruning": row["pruning"],
            "R": row["R"],
            **figures,
            "drafts accepted %": row["acceptance"],
        }

    rows = [line("plain", row) for row in plain["rows"] if row["R"] and row["pruning"].startswith("twig")]
    rows += [line("sprout-plus", row) for found in (head, spread) for row in found["rows"] if row["R"]]
    commands = " and ".join(f"`{command(found)}`" for found in (head, spread))
    files = ", ".join(
        f"[JSON](benchmarks/results/{n}.json)" for n in ("sprout_plus_report", "sprout_plus_discount_report")
    )
    first = head["rows"][0]
    return (
        f"{commands}\n({first['questions']} questions, {first['descriptions']} descriptions, {files}; the plain twig from the report):\n\n"
        f"{table(sorted(rows, key=lambda row: -row['R']))}"
    )


def plot(found: dict, path: Path) -> None:
    """A panel a measure, with 95 % intervals; dashed is the base as it is, dotted a choice by chance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    taken = curves(found)
    figure, panels = plt.subplots(1, len(taken), figsize=(4 * len(taken), 3.4), layout="constrained", squeeze=False)
    for axes, (name, points) in zip(panels[0], taken.items(), strict=True):
        layers = sorted(points)
        low, middle, high = ([points[layer][key] for layer in layers] for key in ("low", "percent", "high"))
        axes.plot(layers, middle, color="tab:green")
        axes.fill_between(layers, low, high, color="tab:green", alpha=0.2)
        axes.axhline(found["all"]["percent"], color="black", linestyle="--", linewidth=0.8)
        if name == "looking":
            axes.axhline(found["looking"]["random"]["percent"], color="black", linestyle=":", linewidth=0.8)
        axes.set(title=DEPTH[name], xlabel="layer l", ylim=(0, 102))
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("right short answers (%)")
    with replacing(path) as part:
        figure.savefig(part, dpi=130)
    plt.close(figure)
