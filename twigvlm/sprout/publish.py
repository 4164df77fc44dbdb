"""Put a trained base and twig into checkpoints/, each with its model card: `python -m twigvlm.sprout.publish`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from ..errors import InputError
from ..evaluation.record import provenance, table
from ..model.load import EMBEDDED_BASE, EMBEDDED_TWIG

LIMIT = 30 * 2**20  # bytes of base and twig together, so that a clone stays small

HEADS = {
    "base": """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---
# sprout: a LLaVA small enough for a laptop

A stock `LlavaForConditionalGeneration`: CLIP tower at 336 pixels and patch 14 (576 visual tokens), Llama decoder of 32 layers,
vicuna_v1 template. It knows one thing: drawn scenes of two to six objects and perhaps a word, and questions about them in English.
It is for testing, teaching and measuring token pruning and speculative decoding, not for pictures of the world.

```python
from transformers import LlavaForConditionalGeneration

base = LlavaForConditionalGeneration.from_pretrained("checkpoints/sprout-base")
```
""",
    "twig": """---
library_name: twigvlm
license: apache-2.0
---
# sprout's twig (K=2, T=3, F=24)

Three decoder layers, a norm and a head on layer 2 of sprout, trained by next-token cross-entropy on the answers with the base frozen
(TwigVLM, arXiv 2503.14075, section 3.1). `twigvlm.load()` uses it with the embedded base.
""",
}


def card(kind: str, run: Path, report: dict | None) -> str:
    """The model card: what it is, data, recipe with the steps really done, figures with their command."""
    settings = json.loads((run / "settings.json").read_text())
    lines = [HEADS[kind], "## Data\n", DATA, "\n## Recipe\n"]
    lines.append(
        "`python -m twigvlm.sprout.train`, on this machine with these stages (seconds are wall clock, shared machine):\n"
    )
    lines.append(
        table([_stage(file) for file in sorted(run.glob("*.jsonl"), key=lambda f: f.stat().st_mtime)], digits=3)
    )
    lines.append(f"\nLast call's settings: `{json.dumps(settings)}`; code: commit `{provenance()['commit']}`.")
    if report:
        lines.append("\n## Figures\n")
        lines.append(
            f"`{report['command']}` on the test split, {report['rows'][0]['questions']} questions (percent):\n"
        )
        hidden = ("pruning", "R", "questions", "descriptions")
        lines.append(table([{k: v for k, v in row.items() if k not in hidden} for row in report["rows"]]))
    return "\n".join(lines) + "\n"


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
        "last loss": last["loss"],
        "last figures": ", ".join(f"{k} {v:.3f}" for k, v in figures.items()),
    }


def publish(run: Path, report: Path) -> None:
    """Copy `run`/base and `run`/twig. Raises InputError when one is missing or both are too large."""
    found = json.loads(report.read_text()) if report.exists() else None
    sources = {"base": (run / "base", EMBEDDED_BASE), "twig": (run / "twig", EMBEDDED_TWIG)}
    for source, _ in sources.values():
        if not source.is_dir():
            raise InputError(f"{source}: no such folder; train first: python -m twigvlm.sprout.train --out {run}")
    size = sum(f.stat().st_size for source, _ in sources.values() for f in source.rglob("*") if f.is_file())
    if size > LIMIT:
        raise InputError(
            f"base and twig have {size} bytes; at most {LIMIT} are published, train a narrower one (--hidden)"
        )
    for kind, (source, target) in sources.items():
        shutil.copytree(source, target, dirs_exist_ok=True)
        (target / "README.md").write_text(card(kind, run, found), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/sprout"), help="folder of the training run (default %(default)s)"
    )
    parser.add_argument(
        "--report", type=Path, default=Path("benchmarks/results/sprout_report.json"), help="figures for the cards"
    )
    args = parser.parse_args(argv)
    try:
        publish(args.run, args.report)
    except InputError as fault:
        parser.exit(2, f"error: {fault}\n")


if __name__ == "__main__":
    main()
