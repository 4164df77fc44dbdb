"""What `measure` found of a base, as tables and as a picture over depth; figures as its JSON file has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..files import replacing
from ..record import table

DEPTH = {
    "without those from": "without l and the next",
    "lens": "norm and head read l",
    "looking": "pruned by what l attends to",
}


def between(share: dict) -> str:
    return f"{share['percent']:.1f} ({share['low']:.1f} to {share['high']:.1f})"


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
