"""The paper's ablations (section 4.3) on the embedded model: `python -m twigvlm.sprout.report --ablate`.

Every twig is trained on the embedded base, as users train theirs, for the same number of steps, and is kept in the
work folder with each figure that was measured, so that a stopped run goes on. Accuracy is short answers under pruning
against the unpruned base, with bootstrap intervals over scenes; speed is tokens per second of a description, prefill
included, against plain decoding of the same picture right before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import twigvlm

from ..config import TwigConfig
from ..families import trunk_of
from ..files import CHECKOUT, replacing
from ..loading.base import load_base
from ..loading.describe import EMBEDDED_BASE
from ..model.twig import CONFIG, Init, grow, save_twig
from ..world.questions import Question
from ..world.scenes import Scene
from .grown import kept, trained
from .measure import interval, relative
from .quiz import Setting, descriptions, percent, quiz, relative_speed, short_answers

BUDGET = 64
TIMED = 9  # descriptions whose speed is measured


@dataclass(frozen=True)
class Growth:
    """A twig to be made; `trained` False is the base's own layers, whose last one then gives the base's signal."""

    K: int = 2
    T: int = 3
    init: Init = "base"
    trained: bool = True

    @property
    def name(self) -> str:
        return f"K{self.K}-T{self.T}-{self.init}{'' if self.trained else '-untrained'}"


MAIN = Growth()


@dataclass(frozen=True)
class Variant:
    """One row; `paper` is what the paper's table says: (RelAcc, speed), percent, None where it gives none."""

    group: str
    name: str
    growth: Growth = MAIN
    F: int | None = None
    pruned: bool = True
    speculative: bool = True
    paper: tuple[float | None, float | None] = (None, None)


SECTIONS: dict[str, tuple[Variant, ...]] = {
    "initialisation": (
        Variant("initialisation", "random", Growth(init="random"), paper=(87.2, 120)),
        Variant("initialisation", "last T layers", Growth(init="last")),
        Variant("initialisation", "layers K..K+T-1", paper=(96.0, 154)),
    ),
    "T": (
        Variant("T", "T=1", Growth(T=1), paper=(93.9, 154)),
        Variant("T", "T=2", Growth(T=2), paper=(95.2, 153)),
        Variant("T", "T=3", paper=(96.0, 154)),
        Variant("T", "T=4", Growth(T=4), paper=(95.8, 145)),
    ),
    "K": (
        Variant("K", "K=0", Growth(K=0), paper=(93.6, 138)),
        Variant("K", "K=1", Growth(K=1), paper=(95.5, 137)),
        Variant("K", "K=2", paper=(96.0, 154)),
        Variant("K", "K=3", Growth(K=3), paper=(85.5, 145)),
    ),
    "F": (
        Variant("F", "none", F=32, paper=(93.1, 155)),
        Variant("F", "F=20", F=20, paper=(95.8, 151)),
        Variant("F", "F=24", paper=(96.0, 154)),
        Variant("F", "F=28", F=28, paper=(95.1, 154)),
    ),
    "parts": (
        Variant("parts", "pruning only", speculative=False, paper=(None, 104)),
        Variant("parts", "SSD only", pruned=False, paper=(None, 147)),
        Variant("parts", "both", paper=(96.0, 154)),
    ),
    "signal": (
        Variant("signal", "base layer K", Growth(T=1, trained=False), speculative=False, paper=(82.3, None)),
        Variant("signal", "base layer K+T", Growth(T=4, trained=False), speculative=False, paper=(86.2, None)),
        Variant("signal", "twig", speculative=False, paper=(96.0, None)),
    ),
}


@dataclass(frozen=True)
class Ablation:
    """What is measured with: the base and its main twig, training steps, test scenes."""

    work: Path
    base: Path
    twig: Path | None  # stands for the main twig; None trains that like the others
    steps: int
    scenes: int
    device: str | None = None

    def grown(self, growth: Growth) -> Path:
        """The folder of this twig, made at the first call."""
        folder = self.work / growth.name
        if growth == MAIN and self.twig is not None:
            return self.twig
        if growth.trained:
            flags = ["--K", str(growth.K), "--T", str(growth.T), "--init", growth.init]
            flags += [] if self.base == EMBEDDED_BASE else ["--base", str(self.base.resolve())]
            return trained(folder, flags, self.steps, self.device)
        if not (folder / CONFIG).exists():
            trunk = trunk_of(load_base(self.base, torch.device(self.device or "cpu"), torch.float32, "sdpa").model)
            twig = grow(trunk, TwigConfig(trunk.L, growth.K, growth.T), growth.init)
            save_twig(twig, trunk, folder, base="sprout", dtype=torch.float16)
        return folder

    def open(self, variant: Variant) -> twigvlm.TwigVLM:
        """Base and twig of a variant."""
        return twigvlm.load(self.base, self.grown(variant.growth), wipe_layer=variant.F, device=self.device)


def ablate(ablation: Ablation, sections: tuple[str, ...]) -> dict:
    """All rows of these sections, each measured once even if several tables hold it."""
    asked = quiz(ablation.scenes)
    plain = Variant("", "", pruned=False, speculative=False)
    base = measure(ablation, plain, asked)
    variants = [v for section in sections for v in SECTIONS[section]]
    rows = [row(v, measure(ablation, v, asked), base) for v in tqdm(variants, desc="ablations")]
    settings = {k: _short(v) if isinstance(v, Path) else v for k, v in asdict(ablation).items()}
    questions = sum(len(qs) for _, qs in asked)
    return {
        "R": BUDGET,
        "questions": questions,
        "descriptions": len(base["objects"]),
        "base": {
            "accuracy": percent([a for answers in base["short"] for a in answers]),
            "objects": percent(base["objects"]),
        },
        "settings": settings,
        "rows": rows,
        "comments": remarks(rows),
    }


def row(variant: Variant, found: dict, base: dict) -> dict:
    """What a variant's figures say beside the unpruned base's, percent."""
    rel, *ends = relative(found["short"], base["short"])
    objects = [[right] for right in found["objects"]]
    return {
        "ablation": variant.group,
        "variant": variant.name,
        "RelAcc": rel,
        "RelAcc, 95 %": ends,
        "speed": found["speed"],
        "descriptions": percent(found["objects"]),
        "descriptions, 95 %": list(interval(objects, range(len(objects)))),
        "acceptance": found["acceptance"],
        "paper RelAcc": variant.paper[0],
        "paper speed": variant.paper[1],
    }


def _short(path: Path) -> str:
    """Without the folders of whoever ran it."""
    here = CHECKOUT or Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def measure(ablation: Ablation, variant: Variant, asked: list[tuple[Scene, list[Question]]]) -> dict:
    """Short answers and descriptions, right or not, acceptance and relative speed (percent); measured once."""
    scenes = [scene for scene, _ in asked[: max(1, len(asked) // 2)]]

    def figures() -> dict:
        vlm = ablation.open(variant)
        setting = Setting("twig", BUDGET if variant.pruned else None, 5 if variant.speculative else 0)
        found = {"short": short_answers(vlm, asked, setting), **asdict(descriptions(vlm, scenes, setting))}
        return found | {"speed": relative_speed(vlm, scenes[:TIMED], setting)}

    parts = [part for part, used in (("pruned", variant.pruned), ("drafts", variant.speculative)) if used]
    name = "-".join([variant.growth.name, *parts, *([f"F{variant.F}"] if variant.F else [])])
    what = {k: v for k, v in asdict(variant).items() if k in ("growth", "F", "pruned", "speculative")}
    told = what | {
        "scenes": len(asked),
        "steps": ablation.steps,
        "base": str(ablation.base),
        "twig": str(ablation.twig),
    }
    return kept(ablation.work / "figures" / f"{name}.json", told, figures)


def remarks(rows: Sequence[dict]) -> list[str]:
    """Which variant is best here and which in the paper, in accuracy and speed; of accuracy also whose interval meets its own."""
    out = []
    for section in dict.fromkeys(r["ablation"] for r in rows):
        mine = [r for r in rows if r["ablation"] == section]
        for figure in ("RelAcc", "speed"):
            ours = [r for r in mine if r[figure] is not None]
            told = [r for r in ours if r[f"paper {figure}"] is not None]
            if len(told) < 2:
                continue
            here, most = max(ours, key=lambda r: r[figure]), max(r[f"paper {figure}"] for r in told)
            best = [r for r in told if r[f"paper {figure}"] == most]
            alike = [r["variant"] for r in ours if r is not here and figure == "RelAcc" and _meet(r, here)]
            near = f"; not told apart from {', '.join(alike)}" if alike else ""
            out.append(f"{section}, {figure}: best is {here['variant']}, {_beside(here, best, figure)}{near}.")
    return out


def _beside(here: dict, best: Sequence[dict], figure: str) -> str:
    """The best variant here beside the paper's, which may be several."""
    others = " and ".join(r["variant"] for r in best if r is not here)
    if here in best:
        return f"as in the paper, where {others} is as good" if others else "as in the paper"
    gap = here[figure] - max(r[figure] for r in best)
    lacks = "which the paper does not have; there " if here[f"paper {figure}"] is None else "in the paper "
    return f"{lacks}{others} ({gap:.1f} points above it here)"


def _meet(one: dict, other: dict) -> bool:
    (low, high), (least, most) = one["RelAcc, 95 %"], other["RelAcc, 95 %"]
    return low <= most and least <= high


def plot(rows: list[dict], path: Path) -> None:
    """One panel an ablation: RelAcc as bars, speed as points, the paper's figures hollow beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sections = list(dict.fromkeys(r["ablation"] for r in rows))
    figure, panels = plt.subplots(
        2, len(sections), figsize=(3.2 * len(sections), 5), layout="constrained", squeeze=False
    )
    for column, section in enumerate(sections):
        mine = [r for r in rows if r["ablation"] == section]
        names = [r["variant"] for r in mine]
        for axes, name in zip(panels[:, column], ("RelAcc", "speed"), strict=True):
            axes.bar(names, [r[name] or 0 for r in mine], color="tab:green", alpha=0.7, label="sprout")
            axes.plot(names, [r[f"paper {name}"] for r in mine], "kD", fillstyle="none", label="paper, LLaVA-1.5-7B")
            axes.tick_params(axis="x", labelrotation=30)
            axes.set_ylabel(f"{name} (%)")
            axes.grid(axis="y", alpha=0.3)
        panels[0, column].set_title(section)
        low = [v for r in mine for v in (r["RelAcc"], r["paper RelAcc"]) if v is not None]
        panels[0, column].set_ylim(bottom=max(0, min(low) - 10))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=2)
    with replacing(path) as part:
        figure.savefig(part, dpi=130)
    plt.close(figure)
