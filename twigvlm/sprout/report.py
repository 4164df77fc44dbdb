"""How good the embedded model is, on its test split: `python -m twigvlm.sprout.report`.

Short answers by kind, whole descriptions, and what is left of both under pruning by the twig, by the
base's own attention and by chance, at the same budgets. Prints a table, writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import twigvlm

from .. import flags
from ..errors import InputError
from ..files import replacing, write_json
from ..foresight import Wish, check
from ..loading.describe import EMBEDDED_BASE
from ..program import called, run_program
from ..record import provenance, table
from ..world.questions import KINDS
from . import ablate, plus
from .measure import interval, relative
from .quiz import Setting, descriptions, percent, quiz, short_answers

BUDGETS = (192, 128, 64)
METHODS = ("twig", "twig-discount", "layer-attention", "random")
# methods that are asked for descriptions as well, as the unpruned base is
DESCRIBED = ("twig", "twig-discount", "twig-adaptive")
HIDDEN = ("pruning", "R", "questions", "descriptions", "intervals")  # of a row, in tables


def report(vlm: twigvlm.TwigVLM, scenes: int, budgets: tuple[float, ...], methods: tuple[str, ...]) -> dict:
    """All figures; `rows` is the table (percent), with 95 % intervals under "intervals" (bootstrap over scenes)."""
    asked = quiz(scenes)
    kinds = [[question.kind for question in questions] for _, questions in asked]
    rows, base = [], None
    for setting in [Setting(), *(Setting(m, R) for R in budgets for m in methods)]:
        right = short_answers(vlm, asked, setting)
        base = right if base is None else base
        rel, *between = relative(right, base)
        figures = {"all": right, **{kind: _of_kind(right, kinds, kind) for kind in KINDS}}
        intervals = {"RelAcc": between}
        row = {"setting": setting.name, "all": None, "RelAcc": rel}
        described = setting.R is None or setting.pruning in DESCRIBED
        if described:
            told = descriptions(vlm, [scene for scene, _ in asked], setting)
            figures["description, objects"] = [[yes] for yes in told.objects]
            figures["description, exact"] = [[yes] for yes in told.exact]
        for name, found in figures.items():
            every = [answer for answers in found for answer in answers]
            row[name] = percent(every) if every else None
            if every:
                found = [answers for answers in found if answers]
                intervals[name] = interval(found, range(len(found)))
        if described:
            row["acceptance"] = told.acceptance
        questions = sum(map(len, right))
        head = {"pruning": setting.pruning, "R": setting.R, "questions": questions, "descriptions": len(asked)}
        rows.append(head | row | {"intervals": intervals})
    return {"rows": rows, "scenes": scenes}


def _of_kind(right: list[list[bool]], kinds: list[list[str]], kind: str) -> list[list[bool]]:
    """Of each scene, the answers to its questions of this kind."""
    return [
        [answer for answer, its in zip(answers, asked, strict=True) if its == kind]
        for answers, asked in zip(right, kinds, strict=True)
    ]


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy against R, one line a method, the base as a level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    base = next(r for r in rows if r["R"] is None)
    axes.axhline(base["all"], color="0.3", linestyle="--", label="base, all 576 tokens")
    labels = {
        "twig": "twig",
        "twig-discount": "twig, discounted",
        "layer-attention": "the base's layer 1",
        "random": "random",
    }
    for method, label in labels.items():
        points = sorted((r["R"], r["all"]) for r in rows if r["pruning"] == method and r["R"])
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="R, average visual tokens per layer", ylabel="right short answers (%)", title="sprout, test split")
    axes.set_xticks(sorted({r["R"] for r in rows if r["R"]}))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as part:
        figure.savefig(part, dpi=150)
    plt.close(figure)


def check_sections(text: str) -> tuple[str, ...]:
    """The ablations' tables that are asked for."""
    asked = tuple(ablate.SECTIONS) if text == "all" else methods(text)
    if unknown := sorted(set(asked) - set(ablate.SECTIONS)):
        raise InputError(f"unknown ablations {unknown}; choose from {', '.join(ablate.SECTIONS)}")
    return asked


def print_ablations(args: argparse.Namespace, start: float) -> None:
    """Run the ablations and write ablations.json and .png."""
    check_flags(args)
    flags.save(args, args.out)
    ablation = ablate.Ablation(args.work, args.base or EMBEDDED_BASE, args.twig, args.steps, args.scenes, args.device)
    result = provenance() | ablate.ablate(ablation, check_sections(args.ablate))
    result["seconds"] = round(time.monotonic() - start)
    write_json(result, args.out / "ablations.json")
    ablate.plot(result["rows"], args.out / "ablations.png")
    print(plus.shown(result))
    print("\n".join(result["comments"]))
    print(f"R={result['R']}, {result['questions']} questions; {args.out}/ablations.json, .png")


def print_plus(args: argparse.Namespace, start: float) -> None:
    """Train and measure TwigVLM++'s stages; write plus.json and .png."""
    check_flags(args)
    recipes = plus.choose(args.plus == "options", args.only)
    flags.save(args, args.out)
    one = plus.Study(args.work, args.steps, args.device)
    result = plus.study(one, quiz(args.scenes), budgets(args.budgets), recipes)
    result = provenance() | {"seconds": round(time.monotonic() - start)} | result
    write_json(result, args.out / "plus.json")
    plus.plot(result["rows"], args.out / "plus.png")
    print(plus.side_by_side(result["rows"]), plus.shown(result), sep="\n\n")
    print(f"{result['questions']} questions, {result['descriptions']} descriptions; {args.out}/plus.json, .png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=called("twigvlm.sprout.report"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, help="base folder (default: the embedded one)")
    parser.add_argument("--twig", type=Path, help="twig folder (default: the embedded one)")
    parser.add_argument(
        "--scenes",
        type=int,
        default=62,
        help="test scenes; each is asked one question of every kind (default %(default)s)",
    )
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="values of R (default %(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="pruning methods (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for sprout_report.json and .png (default runs/report), ablations.json and .png (runs/report/ablations) "
        "or plus.json and .png (runs/report/plus)",
    )  # fmt: skip
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument(
        "--ablate",
        nargs="?",
        const="all",
        metavar="TABLE,…",
        help="the paper's ablations instead (initialisation, T, K, F, parts, signal); trains every twig that they need",
    )
    parser.add_argument(
        "--plus", nargs="?", const="paper", choices=("paper", "options"),
        help="TwigVLM++'s stages instead: trains a plain twig, stage 1 and stage 2 with dynamic and static budgets; "
        "'options' adds what goes beyond the paper",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", metavar="TWIG",
        help="of --plus this one alone, 'stage 2, dynamic' say; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, help="folder of the twigs that are trained (default runs/ablate, runs/plus)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=240,
        help="of each such twig, a quarter of it in stage 2 (default %(default)s; the published one had 1,000)",
    )
    args = flags.parse(parser, argv)
    args.work = args.work or Path("runs/plus" if args.plus else "runs/ablate")
    args.out = args.out or Path("runs/report", "plus" if args.plus else "ablations" if args.ablate else "")
    what = print_plus if args.plus else print_ablations if args.ablate else print_report
    return run_program(lambda: what(args, time.monotonic()))


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for flags that cannot be, before a model is loaded. Makes --out."""
    for name, value in (("--scenes", args.scenes), ("--steps", args.steps)):
        if value < 1:
            raise InputError(f"{name} is {value}; 1 or more is needed")
    if args.ablate and args.plus:
        raise InputError("--ablate and --plus are two reports; ask for one of them")
    if args.plus and (args.base or args.twig):
        raise InputError("--plus trains its own twigs on the embedded base; leave --base and --twig out")
    if args.only and not args.plus:
        raise InputError("--only chooses among the twigs of --plus; give that as well")
    if args.ablate:
        check_sections(args.ablate)
    wish = Wish(args.base, args.twig, device=args.device)
    if not wish.has_twig and not (args.ablate or args.plus) and "twig" in methods(args.methods):
        raise InputError(
            f"--base {args.base} comes without a twig; give --twig, the folder of its twig, or other --methods"
        )
    rows = [Setting(m, R) for R in budgets(args.budgets) for m in methods(args.methods)]
    check(wish, *({"pruning": row.pruning, "retained_tokens": row.R} for row in rows))
    args.out.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out, os.W_OK):
        raise InputError(f"--out {args.out}: may not be written; choose another folder")


def budgets(text: str) -> tuple[float, ...]:
    """The numbers of a list; whole ones as whole numbers, as they are shown."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise InputError(f"--budgets is {text!r}; numbers with commas between are needed")
    return tuple(int(R) if R.is_integer() else R for R in found)


def methods(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def print_report(args: argparse.Namespace, start: float) -> None:
    """Measure and write sprout_report.json and .png."""
    check_flags(args)
    flags.save(args, args.out)
    vlm = twigvlm.load(args.base, args.twig, device=args.device)
    result = report(vlm, args.scenes, budgets(args.budgets), methods(args.methods))
    result = provenance() | {"seconds": None} | result
    result["seconds"] = round(time.monotonic() - start)
    write_json(result, args.out / "sprout_report.json")
    plot(result["rows"], args.out / "sprout_report.png")
    print(table([{k: v for k, v in row.items() if k not in HIDDEN} for row in result["rows"]]))
    print(
        f"{result['rows'][0]['questions']} questions, {result['rows'][0]['descriptions']} descriptions; {args.out}/sprout_report.json, .png"
    )


if __name__ == "__main__":
    sys.exit(main())
