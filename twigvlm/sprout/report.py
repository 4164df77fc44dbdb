"""How good the embedded model is, on its test split: `python -m twigvlm.sprout.report`.

Short answers by kind, whole descriptions, and what is left of both under pruning by the twig, by the
base's own attention and by chance, at the same budgets. Prints a table, writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import twigvlm

from .. import flags
from ..errors import InputError
from ..files import write_json
from ..foresight import Wish, check
from ..loading.describe import EMBEDDED_BASE, EMBEDDED_TWIG
from ..program import run_program
from ..prompt.template import decode
from ..record import provenance, table
from ..world.draw import draw
from ..world.questions import KINDS, Question, ask, describe
from ..world.scenes import Scene, sample_scene

BUDGETS = (192, 128, 64)
METHODS = ("twig", "layer-attention", "random")
SENTENCE = re.compile(r"(?:At|In) the ([a-z ]+) there is an? (?:small|large) ([a-z]+) ([a-z]+)\.")


@dataclass(frozen=True)
class Setting:
    """One row of the report: pruned how and to what average (R None keeps everything), drafts of what length."""

    pruning: str = "twig"
    R: float | None = None
    draft_length: int = 5

    @property
    def name(self) -> str:
        return "base" if self.R is None else f"{self.pruning} R={self.R}"


def quiz(scenes: int, split: str = "test") -> list[tuple[Scene, list[Question]]]:
    """One question of each kind about each scene (where it has one)."""
    out = []
    for seed in range(scenes):
        scene = sample_scene(split, seed)
        rng = random.Random(f"quiz {split} {seed}")
        asked = [q for q in (ask(scene, kind, rng) for kind in KINDS) if q]
        out.append((scene, asked))
    return out


def batch(vlm: twigvlm.TwigVLM, scene: Scene, texts: list[str]) -> dict[str, torch.Tensor]:
    """Several questions about one picture as rows of `generate`."""
    picture = draw(scene)
    rows = [vlm.prepare(picture, text) for text in texts]
    width = max(r["input_ids"].shape[1] for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : row["input_ids"].shape[1]] = row["input_ids"][0]
        mask[i, : row["input_ids"].shape[1]] = 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat([r["pixel_values"] for r in rows])}


def short_answers(
    vlm: twigvlm.TwigVLM, asked: list[tuple[Scene, list[Question]]], setting: Setting
) -> dict[str, list[bool]]:
    """Kind → whether each answer is exactly right."""
    right: dict[str, list[bool]] = defaultdict(list)
    for scene, questions in tqdm(asked, desc=setting.name, leave=False):
        inputs = batch(vlm, scene, [q.text for q in questions])
        out = vlm.generate(
            **inputs,
            retained_tokens=setting.R,
            pruning=setting.pruning,
            draft_length=0,
            max_new_tokens=8,
            seed=scene.seed,
        )
        for question, tokens in zip(questions, out.tokens, strict=True):
            right[question.kind].append(decode(vlm.tokenizer, tokens).strip() == question.answer)
    return right


def descriptions(vlm: twigvlm.TwigVLM, scenes: list[Scene], setting: Setting) -> dict[str, float]:
    """Shares of scenes with every object (place, colour, shape) right, of exact texts, and the drafts' acceptance."""
    objects = exact = drafted = accepted = 0.0
    for scene in tqdm(scenes, desc=f"describe, {setting.name}", leave=False):
        inputs = vlm.prepare(draw(scene), "Describe the image in detail.")
        out = vlm.generate(
            **inputs,
            retained_tokens=setting.R,
            pruning=setting.pruning,
            draft_length=setting.draft_length,
            max_new_tokens=160,
        )
        text = decode(vlm.tokenizer, out.tokens[0]).strip()
        truth = describe(scene)
        objects += sorted(SENTENCE.findall(text)) == sorted(SENTENCE.findall(truth))
        exact += text == truth
        drafted, accepted = drafted + out.stats.drafted, accepted + out.stats.accepted
    count = len(scenes)
    return {
        "objects": 100 * objects / count,
        "exact": 100 * exact / count,
        "acceptance": 100 * accepted / drafted if drafted else None,
    }


def report(vlm: twigvlm.TwigVLM, scenes: int, budgets: tuple[float, ...], methods: tuple[str, ...]) -> dict:
    """All figures; `rows` is the table (percent)."""
    asked = quiz(scenes)
    described = [scene for scene, _ in asked[: max(1, scenes // 2)]]
    rows, base = [], None
    for setting in [Setting(), *(Setting(m, R) for R in budgets for m in methods)]:
        right = short_answers(vlm, asked, setting)
        every = [r for answers in right.values() for r in answers]
        accuracy = 100 * sum(every) / len(every)
        base = accuracy if base is None else base
        row = {"setting": setting.name, "all": accuracy, "RelAcc": 100 * accuracy / base if base else None}
        row |= {kind: 100 * sum(right[kind]) / len(right[kind]) for kind in KINDS}
        if setting.R is None or setting.pruning == "twig":
            told = descriptions(vlm, described, setting)
            row |= {f"description, {k}": told[k] for k in ("objects", "exact")} | {"acceptance": told["acceptance"]}
        rows.append(
            {"pruning": setting.pruning, "R": setting.R, "questions": len(every), "descriptions": len(described)} | row
        )
    return {"rows": rows, "scenes": scenes}


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy against R, one line a method, the base as a level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    base = next(r for r in rows if r["R"] is None)
    axes.axhline(base["all"], color="0.3", linestyle="--", label="base, all 576 tokens")
    labels = {"twig": "twig", "layer-attention": "the base's layer 1", "random": "random"}
    for method, label in labels.items():
        points = sorted((r["R"], r["all"]) for r in rows if r["pruning"] == method and r["R"])
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="R, average visual tokens per layer", ylabel="right short answers (%)", title="sprout, test split")
    axes.set_xticks(sorted({r["R"] for r in rows if r["R"]}))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def check_sections(text: str) -> tuple[str, ...]:
    """The ablations' tables that are asked for."""
    from .ablate import SECTIONS

    asked = tuple(SECTIONS) if text == "all" else methods(text)
    if unknown := sorted(set(asked) - set(SECTIONS)):
        raise InputError(f"unknown ablations {unknown}; choose from {', '.join(SECTIONS)}")
    return asked


def print_ablations(args: argparse.Namespace, start: float) -> None:
    """Run the ablations and write ablations.json and .png."""
    from . import ablate  # it trains, and this module is read by what only measures

    check_flags(args)
    base, twig = args.base or EMBEDDED_BASE, args.twig or (None if args.base else EMBEDDED_TWIG)
    ablation = ablate.Ablation(args.work, base, twig, args.steps, args.scenes, args.device)
    result = provenance() | ablate.ablate(ablation, check_sections(args.ablate))
    result["seconds"] = round(time.monotonic() - start)
    write_json(result, args.out / "ablations.json")
    ablate.plot(result["rows"], args.out / "ablations.png")
    print(table(result["rows"]))
    print("\n".join(result["comments"]))
    print(f"R={result['R']}, {result['questions']} questions; {args.out}/ablations.json, .png")


def print_plus(args: argparse.Namespace, start: float) -> None:
    """Train and measure TwigVLM++'s stages; write plus.json and .png."""
    from . import plus

    check_flags(args)
    one = plus.Study(args.work, args.base, args.steps, args.device)
    result = plus.study(one, quiz(args.scenes), budgets(args.budgets), args.plus == "options")
    result = provenance() | {"seconds": round(time.monotonic() - start)} | result
    write_json(result, args.out / "plus.json")
    plus.plot(result["rows"], args.out / "plus.png")
    print(plus.shown(result))
    print(f"{result['questions']} questions, {result['descriptions']} descriptions; {args.out}/plus.json, .png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="base folder (default: the embedded one)")
    parser.add_argument("--twig", type=Path, help="twig folder (default: the embedded one)")
    parser.add_argument(
        "--scenes",
        type=int,
        default=100,
        help="test scenes; each is asked one question of every kind (default %(default)s)",
    )
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="values of R (default %(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="pruning methods (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/report"), metavar="DIR",
        help="folder for sprout_report.json and .png, or ablations.json and .png (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument(
        "--ablate",
        nargs="?",
        const="all",
        metavar="TABLE,…",
        help="the paper's ablations instead (initialisation, T, K, F, parts, signal); trains the twigs that they need",
    )
    parser.add_argument(
        "--plus", nargs="?", const="paper", choices=("paper", "options"),
        help="TwigVLM++'s stages instead: trains a plain twig, stage 1 and stage 2 with dynamic and static budgets; "
        "'options' adds what goes beyond the paper",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, help="folder of the twigs that are trained (default runs/ablate, runs/plus)"
    )
    parser.add_argument(
        "--steps", type=int, default=240, help="of each such twig (default %(default)s, as the published one)"
    )
    args = flags.parse(parser, argv)
    args.work = args.work or Path("runs/plus" if args.plus else "runs/ablate")
    what = print_plus if args.plus else print_ablations if args.ablate else print_report
    return run_program(lambda: what(args, time.monotonic()))


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for flags that cannot be, before a model is loaded. Makes --out."""
    for name, value in (("--scenes", args.scenes), ("--steps", args.steps)):
        if value < 1:
            raise InputError(f"{name} is {value}; 1 or more is needed")
    if args.ablate and args.plus:
        raise InputError("--ablate and --plus are two reports; ask for one of them")
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
        raise InputError(f"--budgets is {text!r}; numbers with commas between are needed") from None
    return tuple(int(R) if R.is_integer() else R for R in found)


def methods(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def print_report(args: argparse.Namespace, start: float) -> None:
    """Measure and write sprout_report.json and .png."""
    check_flags(args)
    vlm = twigvlm.load(args.base, args.twig, device=args.device)
    result = report(vlm, args.scenes, budgets(args.budgets), methods(args.methods))
    result = provenance() | {"seconds": None} | result
    result["seconds"] = round(time.monotonic() - start)
    write_json(result, args.out / "sprout_report.json")
    plot(result["rows"], args.out / "sprout_report.png")
    hidden = ("pruning", "R", "questions", "descriptions")
    print(table([{k: v for k, v in row.items() if k not in hidden} for row in result["rows"]]))
    print(
        f"{result['rows'][0]['questions']} questions, {result['rows'][0]['descriptions']} descriptions; {args.out}/sprout_report.json, .png"
    )


if __name__ == "__main__":
    sys.exit(main())
