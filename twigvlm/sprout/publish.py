"""Put a trained base and twig into checkpoints/, each with its model card, and the measured figures into README and docs.

`python -m twigvlm.sprout.publish` does all of it; `--readme-only` after a new measurement of the same weights. The only
program that writes into checkpoints/ and benchmarks/results/ unasked: what others measure goes under runs/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from .. import flags
from ..errors import InputError
from ..evaluation.comparing.shown import markdown, short
from ..files import CHECKOUT, copy, write_text
from ..hub.card import TAGS, TASK, About, with_head
from ..loading.describe import EMBEDDED_BASE, EMBEDDED_PLUS, EMBEDDED_TWIG
from ..loading.find import read_json
from ..model.twig import CONFIG, WEIGHTS, write_twig
from ..model.twig import START as GATES
from ..program import called, run_program
from ..pruning.catalogue import catalogue, in_short
from ..record import provenance, table
from ..world.questions import KINDS
from . import ablate, shown
from .report import HIDDEN

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

ROOT = CHECKOUT or Path()
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- figures -->", "<!-- end of figures -->"  # marks in README and docs/results.md
TOLD = (
    "unpruned",
    "fastv",
    "sparsevlm",
    "visionzip",
    "visionzip*",
    "sieve",
    "twig",
    "twig-discount",
    "random",
)  # in the README
LIMIT = 30_000_000  # bytes of the base and all twigs together, so that a clone stays small

FILES = {  # what is published of a folder; a training leaves more
    "base": (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    "twig": (WEIGHTS, CONFIG),
    "plus": (WEIGHTS, CONFIG),
}
TARGETS = {"base": EMBEDDED_BASE, "twig": EMBEDDED_TWIG, "plus": EMBEDDED_PLUS}

HEADS = {
    "base": """# sprout: a LLaVA small enough for a laptop

A stock `LlavaForConditionalGeneration`: CLIP tower at 336 pixels and patch 14 (576 visual tokens), Llama decoder of 32 layers,
vicuna_v1 template. It knows one thing: drawn scenes of two to six objects and perhaps a word, and questions about them in English.
It is for testing, teaching and measuring token pruning and speculative decoding, not for pictures of the world.

```python
from transformers import LlavaForConditionalGeneration

base = LlavaForConditionalGeneration.from_pretrained("checkpoints/sprout-base")
```
""",
    "twig": """# sprout's twig (K=2, T=3, F=24)

Three decoder layers, a norm and a head on layer 2 of sprout, trained by next-token cross-entropy on the answers with the base frozen
(TwigVLM, arXiv 2503.14075, section 3.1), stored in half precision. `twigvlm.load()` uses it with the embedded base.
""",
    "plus": """# sprout's twig with a pruning head (K=2, T=3, F=24)

sprout's twig once more, and a head that chooses visual tokens in its place (TwigVLM++, arXiv 2503.14075v3, section 3.2). The head began as
the twig's own attention and learnt by rewards alone, without the paper's stage 1; everything else is the plain twig, to the bit before it was
stored in half precision. `twigvlm.load(twig="sprout-plus")`, or `--twig-block sprout-plus`.
""",
}


def with_facts(kind: str, text: str, report: dict) -> str:
    """A card below the head that the hub reads: licence, library, and the report's figures of what it is about."""
    about = About(
        f"sprout-{kind}", license="apache-2.0", library="transformers" if kind == "base" else "twigvlm",
        tags=TAGS[:1] if kind == "base" else TAGS, results=list(_results(kind, report)),
    )  # fmt: skip
    return with_head(text, about)


def _results(kind: str, report: dict) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    data = {
        "task_type": TASK,
        "dataset_type": "sprout",
        "dataset_name": "sprout's drawn scenes",
        "dataset_split": "test",
    }
    for row in report["rows"]:
        if kind == "base" and not row["R"]:
            yield EvalResult(
                **data, metric_type="accuracy", metric_name="right short answers, %", metric_value=round(row["all"], 2)
            )
        elif kind != "base" and str(row["setting"]).startswith("twig"):
            for name, key in (("accuracy of the unpruned base", "RelAcc"), ("drafts accepted", "acceptance")):
                yield EvalResult(
                    **data,
                    metric_type="accuracy",
                    metric_name=f"{name}, {row['setting']}, %",
                    metric_value=round(row[key], 2),
                )


def card(kind: str, run: Path, report: dict) -> str:
    """The model card: what it is, data, recipe with the steps really done, figures with their command."""
    lines = [HEADS[kind], "## Data\n", DATA, "\n## Recipe\n", RECIPE]
    lines.append(table(sorted((_stage(file) for file in run.glob("*.jsonl")), key=lambda s: s.pop("ended")), digits=3))
    lines.append(f"\nPublished from commit `{provenance()['commit']}`.")
    notes = run / "notes.md"
    if notes.exists():
        lines.append(f"\n{notes.read_text(encoding='utf-8').strip()}")
    lines += _figures(report)
    return with_facts(kind, "\n".join(lines) + "\n", report)


def _figures(report: dict) -> list[str]:
    return [
        "\n## Figures\n",
        f"`{shown.command(report)}` on the test split, {report['rows'][0]['questions']} questions (percent):\n",
        table([{k: v for k, v in row.items() if k not in HIDDEN} for row in report["rows"]]),
    ]


RECIPE = """The stages of `python -m twigvlm.sprout.train` (seconds are wall clock), and the twig by the users' own program.
"""
DATA = (
    "Drawn by `twigvlm.sprout` from seeds; nothing is downloaded. Train, validation and test splits share neither seeds nor "
    "(colour, shape, place) combinations."
)


def _stage(log: Path) -> dict:
    """What one loop's metrics file says."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    last = lines[-1]
    figures = {k: v for k, v in last.items() if k not in ("step", "loss", "grad_norm", "lr", "waited_s", "time")}
    return {
        "stage": log.stem,
        "steps": last["step"],
        "seconds": last["time"] - lines[0]["time"],
        "ended": last["time"],
        "last loss": last["loss"],
        "last figures": ", ".join(f"{k} {v:.3f}" for k, v in figures.items()),
    }


def publish(run: Path, report: Path) -> None:
    """Copy `run`/base, `run`/twig and the report. Raises InputError when one is missing or both are too large."""
    sources = {"base": run / "base", "twig": run / "twig"}
    for source in sources.values():
        if not source.is_dir():
            raise InputError(f"{source}: no such folder; train first: python -m twigvlm.sprout.train --out {run}")
    found = _figures_of(report, f"--base {run}/base --twig {run}/twig")
    with tempfile.TemporaryDirectory() as place:
        halved(sources["twig"], Path(place))
        _check_size({"base": sources["base"], "twig": Path(place)})
    for file in FILES["base"]:
        copy(sources["base"] / file, EMBEDDED_BASE / file)
    halved(sources["twig"], EMBEDDED_TWIG)
    for kind in sources:
        write_text(card(kind, run, found), TARGETS[kind] / "README.md")
    for file in (report, report.with_suffix(".png")):
        if file.exists() and file.parent.resolve() != RESULTS.resolve():
            copy(file, RESULTS / f"sprout_report{file.suffix}")


def publish_plus(run: Path, report: Path) -> None:
    """The twig of `run`, a training of TwigVLM++'s stage 2, in half precision. Raises InputError as `publish` does."""
    if not read_json(run / CONFIG).get(GATES):
        raise InputError(f"{run}: its twig has no pruning head; train one with STAGE=2 bash scripts/v1_5/train_twig.sh")
    found = _figures_of(report, f"--twig {run} --methods twig")
    with tempfile.TemporaryDirectory() as place:
        halved(run, Path(place))
        _check_size({"plus": Path(place)})
    halved(run, EMBEDDED_PLUS)
    write_text(plus_card(run, found), EMBEDDED_PLUS / "README.md")


def halved(run: Path, folder: Path) -> None:
    """The twig of `run` into `folder` in half precision, as the base is published."""
    state = {name: tensor.half() for name, tensor in load_file(run / WEIGHTS).items()}
    write_twig(folder, state, read_json(run / CONFIG))


def plus_card(run: Path, report: dict) -> str:
    told = (run / "README.md").read_text(encoding="utf-8").splitlines()  # the card that the training wrote
    facts = [line.replace(f" --out {run}", "") for line in told if line.startswith("|")]
    return with_facts("plus", "\n".join([HEADS["plus"], "## Recipe\n", *facts, *_figures(report)]) + "\n", report)


def _figures_of(report: Path, of: str) -> dict:
    if not report.is_file():
        measure = f"python -m twigvlm.sprout.report {of} --out {report.parent}"
        raise InputError(f"{report}: no such file; the cards need figures of what is published: {measure}")
    return json.loads(report.read_text())


def _check_size(new: dict[str, Path]) -> None:
    """All that is published, with these folders for what is there now."""
    folders = TARGETS | new
    files = [folder / file for kind, folder in folders.items() for file in FILES[kind]]
    size = sum(file.stat().st_size for file in files if file.exists())
    if size > LIMIT:
        raise InputError(
            f"base and twigs have {size} bytes; at most {LIMIT} are published, train a narrower one (--hidden)"
        )


def refresh(results: Path, root: Path = ROOT) -> None:
    """Rewrite what stands between the marks of README and docs from the result files, each with its command."""
    _between_marks(root / "README.md", [_quality_in_short(results)])
    details = root / "docs" / "results.md"
    _between_marks(details, _from_docs(_quality(results), _benchmarks(results), _speed(results)))
    _between_marks(details, _from_docs(shown.base(results)), "base")
    _between_marks(details, _from_docs(shown.published(results)), "published")
    _between_marks(details, _from_docs(_stages(results)), "stages")
    _between_marks(details, _from_docs(_ablations(results)), "ablations")
    refresh_methods(results, root)


def refresh_methods(results: Path, root: Path = ROOT) -> None:
    """The catalogue of pruning methods, from the methods, and their comparison, from its file."""
    readme, details, methods = root / "README.md", root / "docs" / "results.md", root / "docs" / "methods.md"
    found = _comparison(results)
    _between_marks(readme, [_compared_in_short(found)] if found else [], "comparison")
    _between_marks(details, _from_docs(_compared(found)) if found else [], "comparison")
    _between_marks(readme, [in_short()], "catalogue")
    _between_marks(methods, [catalogue(markdown=True)], "catalogue")


def _from_docs(*parts: str) -> list[str]:
    return [part.replace("](benchmarks/", "](../benchmarks/") for part in parts]


def _between_marks(page: Path, parts: list[str], name: str = "figures") -> None:
    text = page.read_text(encoding="utf-8")
    begin, stop = START.replace("figures", name), END.replace("figures", name)
    start, end = text.index(begin) + len(begin), text.index(stop)
    write_text(text[:start] + "\n" + "\n\n".join(filter(None, parts)) + "\n" + text[end:], page)


def _comparison(results: Path) -> dict | None:
    """The figures of `evaluation.compare`, where it was run."""
    file = results / "comparison" / "comparison.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _asked(found: dict) -> str:
    """How many questions a comparison stands on."""
    return f"{found['rows'][0]['questions']} questions in all, {found['device']}"


def _compared_in_short(found: dict) -> str:
    return (
        f"`{shown.command(found)}`\n({_asked(found)}; [all methods](docs/results.md#pruning-methods-compared)):\n\n"
        f"{short(found, TOLD)}\n\n"
        "RelAcc: % of the unpruned base, averaged over benchmarks (95 % interval); GFLOP, cache: of a prefill at the smallest R, computed."
    )


def _compared(found: dict) -> str:
    plots = "\n".join(
        f"![RelAcc against {what}](benchmarks/results/comparison/relacc_{name}.png)"
        for what, name in (("R", "R"), ("speed", "speed"), ("operations", "flops"))
    )
    return f"`{shown.command(found)}`\n({_asked(found)}; [JSON](benchmarks/results/comparison/comparison.json)):\n\n{markdown(found)}\n\n{plots}"


def _report(results: Path) -> dict:
    return json.loads((results / "sprout_report.json").read_text())


def _quality_in_short(results: Path) -> str:
    """Right short answers of the base and of what the report asked at its smallest R."""
    report = _report(results)
    base, *pruned = report["rows"]
    least = min(row["R"] for row in pruned)
    shares = [f"{row['setting'].split(' R=')[0]} {shown.of_row(row, 'all')}" for row in pruned if row["R"] == least]
    return (
        f"Right short answers of the embedded model, % ({base['questions']} questions, 95 % intervals): all tokens {shown.of_row(base, 'all')}; at R = "
        f"{least:g} {', '.join(shares)}\n([JSON](benchmarks/results/sprout_report.json); [kinds, descriptions, speed, ablations, "
        "memory](docs/results.md))."
    )


def _quality(results: Path) -> str:
    report = _report(results)
    base, *_ = report["rows"]
    rows = [
        {
            "setting": row["setting"],
            "right short answers %": shown.of_row(row, "all"),
            "RelAcc %": shown.of_row(row, "RelAcc") if row["R"] else "100",
            "descriptions with every object right %": shown.of_row(row, "description, objects"),
            "drafts accepted %": row.get("acceptance"),
        }
        for row in report["rows"]
    ]
    kinds = ", ".join(f"{kind} {shown.of_row(base, kind)}" for kind in KINDS)
    return (
        f"Quality of the embedded model on its test split: `{shown.command(report)}`\n({base['questions']} questions, "
        f"{base['descriptions']} descriptions, [JSON](benchmarks/results/sprout_report.json)):\n\n{table(rows)}\n\n"
        f"![Accuracy against R](benchmarks/results/sprout_report.png)\n\nThe base by kind of question (%): {kinds}."
    )


def _speed(results: Path) -> str:
    speed = json.loads((results / "speed_sprout_cpu.json").read_text())
    rows = [{k: v for k, v in row.items() if k not in ("tokens", "hits by depth")} for row in speed["rows"]]
    return (
        f"Speed at batch 1, {speed['threads']} CPU thread(s), descriptions of 64 tokens and more, medians: "
        f"`{shown.command(speed)}`\n([JSON](benchmarks/results/speed_sprout_cpu.json); {speed['device']}, torch "
        f"{speed['torch']}):\n\n{table(rows, digits=2)}"
    )


def _stages(results: Path) -> str:
    """TwigVLM++'s twigs beside a plain one, of each study that compared some."""
    from . import plus

    parts = []
    for file in sorted(results.glob("plus*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        parts.append(
            f"`{shown.command(found)}`\n({found['questions']} questions, {found['descriptions']} descriptions, "
            f"[JSON](benchmarks/results/{file.name})):\n\n{plus.side_by_side(found['rows'])}\n\n"
            f"All that was measured, at every R:\n\n{plus.shown(found)}\n\n"
            f"![Accuracy, drafts and speed against R](benchmarks/results/{file.stem}.png)"
        )
    return "\n\n".join(parts)


def _ablations(results: Path) -> str:
    """The paper's ablations, and where sprout's best is the paper's."""
    from . import plus

    found = json.loads((results / "ablations.json").read_text(encoding="utf-8"))
    remarks = "\n".join(f"- {remark}" for remark in ablate.remarks(found["rows"]))
    return (
        f"`{shown.command(found)}`\n({found['questions']} questions, {found['descriptions']} descriptions, R = {found['R']}, "
        f"{found['settings']['steps']} steps a twig, [JSON](benchmarks/results/ablations.json)):\n\n{plus.shown(found)}\n\n{remarks}\n\n"
        "![The paper's ablations on sprout](benchmarks/results/ablations.png)"
    )


def _benchmarks(results: Path) -> str:
    """The table of the evaluation suite, where it was run."""
    file = results / "sprout_benchmarks.md"
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=called("twigvlm.sprout.publish"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/sprout"), help="folder of the training run (default %(default)s)"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="figures of this base and twig (default RUN/sprout_report.json)"
    )
    parser.add_argument(
        "--plus",
        type=Path,
        metavar="FOLDER",
        help="nothing but the twig of a training of TwigVLM++'s stage 2, with --report",
    )
    parser.add_argument("--readme-only", action="store_true", help="leave checkpoints/ as they are")
    parser.add_argument(
        "--methods-only", action="store_true", help="nothing but the catalogue of pruning methods and their comparison"
    )
    args = flags.parse(parser, argv)

    def body() -> None:
        if CHECKOUT is None:
            raise InputError(
                "what is published are files of a clone, and this package is installed; run it from a clone"
            )
        if args.methods_only:
            return refresh_methods(RESULTS)
        if args.plus:
            return publish_plus(args.plus, args.report or args.plus / "sprout_report.json")
        if not args.readme_only:
            publish(args.run, args.report or args.run / "sprout_report.json")
        refresh(RESULTS)

    return run_program(body)


if __name__ == "__main__":
    sys.exit(main())
