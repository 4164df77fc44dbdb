"""TwigVLM++ on the embedded model (arXiv 2503.14075v3, table 5): `python -m twigvlm.sprout.report --plus`.

Every twig is trained by the users' own command in a folder of its own, for the same number of steps; stage 2 goes on for
a quarter of them (the paper's for a tenth). A stopped study goes on where it was, and a figure that was measured is not
measured again. Accuracy is short answers under pruning against the unpruned base, with bootstrap intervals over scenes;
acceptance, tokens a verification and speed are those of descriptions with drafts, the speed against plain decoding of
the same picture right before it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

import twigvlm

from ..errors import InputError
from ..files import replacing
from ..record import table
from ..training.run.checkpoints import RUN
from ..world.questions import Question
from ..world.scenes import Scene
from .grown import finished, kept, trained
from .measure import interval, relative
from .quiz import Setting, descriptions, percent, relative_speed, short_answers

DRAFTS = ("acceptance", "tau", "speed")
PANELS = {
    "RelAcc": "RelAcc (%)",
    "descriptions": "right descriptions (%)",
    "acceptance": "drafts accepted (%)",
    "tau": "tau, tokens a verification",
    "speed": "speed (% of plain decoding)",
}
TIMED = 9  # descriptions whose speed is measured
STAGE_2 = ("--stage", "2")
STAGE_2_SHARE = 0.25


@dataclass(frozen=True)
class Recipe:
    """A twig of the study: what its training is told besides, and the twig that it starts from."""

    name: str
    flags: tuple[str, ...] = ()
    start: str | None = None
    options: bool = False  # beyond the paper's table
    pruning: str = "twig"  # how it is asked at an R
    of: str | None = None  # the recipe whose twig it is, where it has none of its own

    def steps(self, whole: int) -> int:
        """Of its own training, where a twig has `whole`."""
        return max(1, round(whole * STAGE_2_SHARE)) if self.flags[:2] == STAGE_2 else whole

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() or c in "-=." else "-" for c in self.name)


ZIP = "visionzip:keep=288"
ON_TWIG, BEHIND = "stage 2 on the twig", (*STAGE_2, "--head-init", "identity")  # what each option is measured with
DISCOUNT, ALONE = "twig-discount", f"{ON_TWIG}, static R=64, leave-one-out"
LEAVING_ONE = ("--budget", "64", "--baseline", "leave-one-out")
RECIPES = (
    Recipe("twig"),
    Recipe("stage 1", ("--stage", "1")),
    Recipe("stage 2, static R=192", (*STAGE_2, "--budget", "192"), "stage 1"),
    Recipe("stage 2, static R=128", (*STAGE_2, "--budget", "128"), "stage 1"),
    Recipe("stage 2, static R=64", (*STAGE_2, "--budget", "64"), "stage 1"),
    Recipe("stage 2, dynamic", STAGE_2, "stage 1"),
    Recipe("stage 1, identity", ("--stage", "1", "--head-init", "identity"), options=True),
    Recipe("stage 1, hybrid loss", ("--stage", "1", "--prediction-loss", "hybrid"), options=True),
    Recipe("stage 1, pruned teacher", ("--stage", "1", "--teacher", "pruned"), options=True),
    Recipe("stage 2, identity", STAGE_2, "stage 1, identity", options=True),
    Recipe("stage 2, static R=64, leave-one-out", (*STAGE_2, *LEAVING_ONE), "stage 1", options=True),
    Recipe(ON_TWIG, BEHIND, "twig", options=True),
    *(
        Recipe(f"{ON_TWIG}, static R=64{name}", (*BEHIND, "--budget", "64", *flags), "twig", options=True)
        for name, flags in {
            "": (),
            ", leave-one-out": ("--baseline", "leave-one-out"),
            ", fidelity": ("--reward", "fidelity"),
            ", first turn": ("--reward-turns", "first"),
            ", random turn": ("--reward-turns", "random"),
            ", temperature 0.5": ("--policy-temperature", "0.5"),
            ", spread floor": ("--advantage-floor", "0.02"),
            ", by token": ("--by-token",),
            ", antithetic": ("--antithetic",),
        }.items()
    ),
    Recipe("twig asked with discount", options=True, pruning=DISCOUNT, of="twig"),
    Recipe(f"{ALONE}, asked with discount", options=True, pruning=DISCOUNT, of=ALONE),
    Recipe(
        f"{ALONE}, discounted picks",
        (*BEHIND, *LEAVING_ONE, "--picks", "discounted"),
        "twig",
        options=True,
        pruning=DISCOUNT,
    ),
    Recipe("twig, on-policy", ("--on-policy", "960"), options=True),
    Recipe(f"twig, {ZIP}", ("--tower-pruning", ZIP), options=True, pruning=f"{ZIP}+twig"),
    Recipe(f"twig asked behind {ZIP}", options=True, pruning=f"{ZIP}+twig", of="twig"),
)


@dataclass(frozen=True)
class Study:
    """What is trained on the embedded base, and measured; `work` keeps twigs and figures."""

    work: Path
    steps: int
    device: str | None = None

    def train(self, recipe: Recipe) -> Path:
        """The folder of a twig, trained at the first call. Raises RunError where its training fails."""
        if recipe.of:
            return self.train(by_name(recipe.of))
        folder = self.work / recipe.folder
        start = (
            ["--init", str(self.train(by_name(recipe.start)).resolve())]
            if recipe.start and not finished(folder)
            else []
        )
        return trained(folder, [*recipe.flags, *start], recipe.steps(self.steps), self.device)


def by_name(name: str) -> Recipe:
    return next(recipe for recipe in RECIPES if recipe.name == name)


def seconds(study: Study, recipe: Recipe) -> float | None:
    """Of training: its own and that of what it starts from. None for so few steps that they were not timed."""
    if recipe.of:
        return seconds(study, by_name(recipe.of))
    facts = json.loads((study.work / recipe.folder / RUN).read_text(encoding="utf-8"))["finished"]
    before = seconds(study, by_name(recipe.start)) if recipe.start else 0.0
    step = facts["clock"].get("step_seconds")
    return None if step is None or before is None else round(before + step * facts["last"]["step"], 1)


# ---------------------------------------------------------------------- measuring


def choose(options: bool, only: Sequence[str] | None = None) -> list[Recipe]:
    """The paper's twigs, with `options` also what goes beyond it; or those that `only` names. Raises InputError."""
    if not only:
        return [recipe for recipe in RECIPES if options or not recipe.options]
    if unknown := set(only) - {recipe.name for recipe in RECIPES}:
        known = "; ".join(recipe.name for recipe in RECIPES)
        raise InputError(f"--only: unknown {sorted(unknown)}; the twigs are: {known}")
    return [recipe for recipe in RECIPES if recipe.name in only]


def study(
    one: Study, asked: Sequence[tuple[Scene, list[Question]]], budgets: Sequence[float], recipes: Sequence[Recipe]
) -> dict:
    """All figures; of every twig a row unpruned and one a budget."""
    scenes = [scene for scene, _ in asked[: max(1, len(asked) // 2)]]
    told = {"scenes": len(asked), "steps": one.steps}

    def figures(recipe: Recipe, R: float | None) -> dict:
        def measure() -> dict:
            vlm = twigvlm.load(None, one.train(recipe), device=one.device)
            setting = Setting(recipe.pruning, R)
            whole = R is None and recipe is not RECIPES[0]  # whatever the twig, it is the base that answers
            short = figures(RECIPES[0], None)["short"] if whole else short_answers(vlm, asked, setting)
            found = {"short": short, **asdict(descriptions(vlm, scenes, setting))}
            return found | {"speed": relative_speed(vlm, scenes[:TIMED], setting)}

        name = f"{recipe.folder}-{'whole' if R is None else f'R{R:g}'}.json"
        asked_how = {} if recipe.pruning == "twig" else {"pruning": recipe.pruning}
        return kept(one.work / "figures" / name, told | {"flags": list(recipe.flags)} | asked_how, measure)

    rows, base = [], figures(RECIPES[0], None)
    for recipe in tqdm(recipes, desc="twigs"):
        for R in (None, *budgets):
            found = figures(recipe, R)
            rows.append(row(recipe.name, R, found, base, scenes) | {"training s": seconds(one, recipe)})
    questions = sum(len(questions) for _, questions in asked)
    return {"settings": {k: str(v) for k, v in asdict(one).items()}, "questions": questions, "descriptions": len(scenes),
            "rows": rows}  # fmt: skip


def row(name: str, R: float | None, found: dict, base: dict, scenes: Sequence[Scene]) -> dict:
    rel, low, high = relative(found["short"], base["short"])
    right = found["objects"]
    ends = interval([[one] for one in right], [scene.seed for scene in scenes])
    return {
        "twig": name, "R": R, "RelAcc": rel, "RelAcc, 95 %": [low, high],
        "descriptions": percent(right), "descriptions, 95 %": list(ends),
        "acceptance": found["acceptance"], "tau": found["tau"], "speed": found["speed"],
    }  # fmt: skip


def side_by_side(rows: Sequence[dict]) -> str:
    """A line a twig, as in the paper's table 5: accuracy at every R, and what drafts give at the smallest one."""
    budgets = sorted({row["R"] for row in rows if row["R"] is not None}, reverse=True)
    asked = {(row["twig"], row["R"]): row for row in rows}

    def line(name: str) -> dict:
        at = {R: asked.get((name, R), {}) for R in budgets}
        found = {"twig": name} | {
            f"{head} R={R:g}": row.get(what)
            for what, head in (("RelAcc", "RelAcc"), ("descriptions", "right descriptions"))
            for R, row in at.items()
        }
        return found | {f"{what} R={R:g}": at[R].get(what) for what in DRAFTS for R in budgets[-1:]}

    return table([line(name) for name in dict.fromkeys(row["twig"] for row in rows)])


def shown(result: dict) -> str:
    """All that was measured, as people read it."""

    def cell(value):
        return " to ".join(f"{v:.1f}" for v in value) if isinstance(value, list) else value

    rows = [{k: "all" if k == "R" and v is None else cell(v) for k, v in row.items()} for row in result["rows"]]
    return table(rows)


def plot(rows: Sequence[dict], path: Path) -> None:
    """RelAcc and right descriptions with their intervals, acceptance, tau and speed against R, a line a twig."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    *panels, corner = panels.flat
    for axes, (what, label) in zip(panels, PANELS.items(), strict=True):
        for name in dict.fromkeys(row["twig"] for row in rows):
            mine = [row for row in rows if row["twig"] == name and None not in (row["R"], row[what])]
            axes.errorbar(
                [row["R"] for row in mine],
                [row[what] for row in mine],
                _ends(mine, what),
                marker="o",
                capsize=2,
                label=name,
            )
        axes.set(xlabel="R, average visual tokens per layer", ylabel=label)
        axes.grid(alpha=0.3)
    corner.axis("off")
    corner.legend(*panels[0].get_legend_handles_labels(), fontsize="small", loc="center")
    with replacing(path) as part:
        figure.savefig(part, dpi=130)
    plt.close(figure)


def _ends(rows: Sequence[dict], what: str) -> list[list[float]] | None:
    """How far the 95 % interval reaches below and above each figure; None for figures without one."""
    between = f"{what}, 95 %"
    if not all(between in row for row in rows):
        return None
    return [[abs(row[what] - row[between][i]) for row in rows] for i in (0, 1)]
