"""The embedded base's recipe, one resumable command: `python -m twigvlm.sprout.train`.

The tower learns to name what each patch shows. A decoder of four layers learns to talk about scenes in words, then
its depth doubles to 8, 16 and 32 layers, each trained on; then many symbols, the projector between tower and decoder,
and pictures, at last with all their tokens or with what pruning leaves; `<out>/base` is the result. On it a twig is
trained as users train theirs ("twig": `twigvlm.training.launch`, into `<out>/twig`). Every stage writes `<out>/<stage>.jsonl`
(metrics), `<stage>-saved/checkpoint-*` (every two minutes) and `<stage>-done.pt`; a run that is killed
goes on where it was, with one thread of a CPU to the same bits. The tower's stages need nothing of the decoder's: `--stages` lets
both run at the same time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from .. import flags
from ..errors import InputError, RunError
from ..files import CHECKOUT
from ..program import called, run_program
from ..training.muon import for_decoder
from ..training.run.device import flushed_denormals
from ..world.conversations import CONVERSATIONS, DRAWN, IMAGES, ensure_drawn
from .grown import finished
from .recipe.align import Aligner
from .recipe.base import base_config, build, save_base
from .recipe.language import Talk, double, start, tie
from .recipe.lessons import Lesson, lesson_batch, window_batch
from .recipe.stage import StageConfig, fit, save_weights
from .recipe.tokenizer import IMAGE_TOKEN, build_tokenizer
from .recipe.tower import SIDE, PatchReader, tower_batch

HIDDEN = 160
THETA = 500_000.0  # content must be found hundreds of patches away: most of a head's turning is slow


@dataclass(frozen=True)
class Stage:
    """So many steps at this depth; `lr` is the peak, `final_lr` the share of it that is left at the end.

    It begins with what stage `after` left, with fresh weights where there is none.
    """

    name: str
    layers: int
    steps: int
    lr: float
    lesson: Lesson
    after: str = ""
    final_lr: float = 0.1


ROWS = 64  # conversations a batch; with more layers twice as many, which a GPU does at nearly the same pace

STAGES = (
    Stage("tower", 4, 3000, 1.5e-3, Lesson(0, "labels", ROWS)),
    Stage("tower-whole", 4, 600, 5e-4, Lesson(0, "labels", 32, window=SIDE), "tower", 0.02),
    # Descriptions and drills are learnt first (dense answers), short answers need what they taught.
    Stage(
        "words-4", 4, 1500, 0.02, Lesson(0, "cells", ROWS, helped=500, described=0.5, drilled=0.5, worded=0.2), "", 0.2
    ),
    Stage("short-4", 4, 2000, 0.006, Lesson(7, "cells", ROWS, drilled=0.3), "words-4", 0.3),
    Stage("words-8", 8, 600, 0.005, Lesson(1, "cells", ROWS, drilled=0.3), "short-4", 0.3),
    Stage("words-16", 16, 600, 0.005, Lesson(2, "cells", 2 * ROWS, asked_weight=0.05), "words-8", 0.3),
    Stage("words-32", 32, 700, 0.004, Lesson(3, "cells", 2 * ROWS, asked_weight=0.05), "words-16", 0.3),
    Stage(
        "patches", 32, 1000, 0.003, Lesson(4, "patches", 2 * ROWS, 1, (1 / 9, 1 / 9, 1 / 4, 0.0), 0.05), "words-32", 0.2
    ),
    Stage("align", 32, 1200, 1e-3, Lesson(0, "windows", 32), "patches", 0.02),
    # One long conversation a picture instead of several short ones: its tokens are computed once.
    Stage(
        "pictures",
        32,
        2100,
        0.003,
        Lesson(5, "pictures", ROWS, 1, (1 / 4, 1 / 4, 1 / 9, 0.0), 0.05, length=320),
        "align",
        0.2,
    ),
    Stage("whole", 32, 1400, 0.001, Lesson(6, "pictures", ROWS // 2, 1, (1.0, 0.0), 0.0, length=480), "pictures", 0.02),
)
TWIG_FLAGS = ("--batch-size", "16", "--lr", "5e-4", "--epochs", "5")
HEADS = "labels.pt"  # what reads the tower's features while it learns
TOWER = "tower-whole"  # whose tower `align` puts in front of the decoder
BASE, TWIG = "base", "twig"  # folders of what comes out; the twig is trained last
NAMES = (*(stage.name for stage in STAGES), TWIG)


def config(layers: int, hidden: int, tokenizer) -> LlavaConfig:
    """The base's shape at this depth and width."""
    shape = base_config(len(tokenizer), tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), layers, hidden)
    shape.text_config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    return shape


def shape_of(state: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Layers and width of the decoder whose weights these are."""
    layers = {name.split(".layers.")[1].split(".")[0] for name in state if "language_model.layers." in name}
    return len(layers), state["model.language_model.embed_tokens.weight"].shape[1]


@dataclass
class Course:
    """One run: `steps` replaces the recipe's numbers, by stage."""

    out: Path
    device: str = "cpu"
    hidden: int = HIDDEN
    workers: int = 1
    save_seconds: float = 120.0
    steps: dict[str, int] = field(default_factory=dict)
    compiled: bool = False  # the decoder's layers

    def __post_init__(self) -> None:
        self.tokenizer = build_tokenizer()

    def done(self, stage: str) -> Path:
        return self.out / f"{stage}-done.pt"

    def before(self, stage: Stage) -> LlavaForConditionalGeneration:
        """The model that `stage` begins with."""
        shape = config(stage.layers, self.hidden, self.tokenizer)
        if not stage.after:
            return start(shape)
        model = self._left_by(stage.after, stage)
        model = double(model, shape) if stage.layers > shape_of(model.state_dict())[0] else model
        if stage.lesson.kind == "windows":
            model.model.vision_tower = self._left_by(TOWER, stage).model.vision_tower
        return model

    def _left_by(self, name: str, wanted: Stage) -> LlavaForConditionalGeneration:
        if not self.done(name).exists():
            raise InputError(
                f"{self.done(name)}: stage {name} has not finished; run it first: --stages {name},{wanted.name}"
            )
        return self.load(self.done(name))

    def load(self, file: Path) -> LlavaForConditionalGeneration:
        """The model in a finished stage's file; of a checkpoint, what learns in its stage."""
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("weights", state)  # of a checkpoint in earlier versions' form
        model = build(config(*shape_of(state), self.tokenizer))
        tie(model)
        model.load_state_dict(state, strict=False)
        return model

    def run(self, wanted: tuple[str, ...]) -> None:
        """These stages in their order, those that are done left out."""
        self.out.mkdir(parents=True, exist_ok=True)
        for stage in STAGES:
            if stage.name in wanted and not self.done(stage.name).exists():
                model = self.before(stage).to(self.device)
                self.train(model, stage)
                weights = {k: v.to("cpu") for k, v in model.state_dict().items() if k != "lm_head.weight"}
                save_weights(weights, self.done(stage.name))
                if stage is STAGES[-1]:
                    self.export(model)
        if TWIG in wanted:
            self.twig()

    def twig(self) -> None:
        """Train the twig by the users' own program, on the drawn conversations. Raises RunError where that fails."""
        if not (self.out / BASE / "config.json").exists():
            raise InputError(f"{self.out / BASE}: no base there; run the stages before first")
        ensure_drawn()
        data, out = DRAWN / "train", self.out.resolve()  # it runs elsewhere
        command = [sys.executable, "-m", "twigvlm.training.launch", "--base", out / BASE]
        command += ["--data", data / CONVERSATIONS, "--images", data / IMAGES, "--out", out / TWIG, *TWIG_FLAGS]
        command += ["--device", self.device.split(":")[0], "--workers", str(self.workers)]
        if not finished(self.out / TWIG):
            code = subprocess.run([str(word) for word in command], cwd=CHECKOUT, check=False).returncode
            if code or not finished(self.out / TWIG):
                raise RunError(f"the twig's training ended with exit code {code}, see above; the same command goes on")

    def export(self, model: LlavaForConditionalGeneration) -> None:
        """Write `<out>/base` as a stock folder, embedding and head apart, as whoever trains on expects them."""
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        save_base(model, self.tokenizer, self.out / BASE)

    def train(self, model: LlavaForConditionalGeneration, stage: Stage) -> None:
        """The tower alone, the projector alone (`align`), or the decoder, and on pictures the projector too."""
        loop = StageConfig(
            stage.name, self.steps.get(stage.name, stage.steps), stage.lr, final_lr=stage.final_lr,
            workers=self.workers, save_seconds=self.save_seconds,
        )  # fmt: skip
        model.requires_grad_(False)
        learn = {"labels": self._see, "windows": self._align}.get(stage.lesson.kind, self._talk)
        learn(model, stage.lesson, loop)

    def _see(self, model: LlavaForConditionalGeneration, lesson: Lesson, loop: StageConfig) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the heads
            reader = PatchReader(model.model.vision_tower.requires_grad_(True)).to(self.device)
        reader.heads.load_state_dict(self._heads(reader))
        batches = partial(tower_batch, images=lesson.scenes, window=lesson.window)
        fit(replace(loop, weight_decay=0.01), reader, batches, reader.loss, self.out)
        save_weights({k: v.to("cpu") for k, v in reader.heads.state_dict().items()}, self.out / HEADS)

    def _heads(self, reader: PatchReader) -> dict[str, torch.Tensor]:
        """Those of the labels that a tower's stage left, which no model holds; else fresh ones."""
        file = self.out / HEADS
        return torch.load(file, weights_only=True) if file.exists() else reader.heads.state_dict()

    def _align(self, model: LlavaForConditionalGeneration, lesson: Lesson, loop: StageConfig) -> None:
        aligner = Aligner(model)
        aligner.reader.requires_grad_(False)
        aligner.projector.requires_grad_(True)
        batches = partial(window_batch, images=lesson.scenes, window=lesson.window, tokenizer=self.tokenizer)
        fit(loop, aligner, batches, aligner.loss, self.out)

    def _talk(self, model: LlavaForConditionalGeneration, lesson: Lesson, loop: StageConfig) -> None:
        model.model.language_model.requires_grad_(True)
        model.model.multi_modal_projector.requires_grad_(lesson.kind == "pictures")
        task = Talk(model)
        if self.compiled:
            for layer in task.layers:
                layer.compile()
        fit(
            loop,
            model,
            partial(lesson_batch, lesson=lesson, tokenizer=self.tokenizer),
            task.loss,
            self.out,
            for_decoder,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=called("twigvlm.sprout.train"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sprout"), help="folder of the run (default %(default)s)")
    parser.add_argument("--stages", default=",".join(NAMES), help="which stages (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="decoder width (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that make batches (default %(default)s)")
    parser.add_argument("--save-seconds", type=float, default=120.0, help="between checkpoints (default %(default)s)")
    parser.add_argument(
        "--steps", default="", metavar="NAME=N,…", help="other numbers of steps than the recipe's, by stage"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="do not fuse the layers' operations, as is done on a GPU"
    )
    args = flags.parse(parser, argv)
    stages = tuple(args.stages.split(","))
    if unknown := set(stages) - set(NAMES):
        parser.error(f"--stages: unknown {sorted(unknown)}; choose from {', '.join(NAMES)}")
    try:
        steps = {name: int(n) for name, n in (item.split("=") for item in args.steps.split(",") if item)}
    except ValueError:
        parser.error(f"--steps is {args.steps!r}; NAME=N,NAME=N is needed")
    if unknown := set(steps) - {stage.name for stage in STAGES}:
        parser.error(f"--steps: unknown {sorted(unknown)}; choose from {', '.join(NAMES[:-1])}")
    if args.hidden < 32 or args.hidden % 32:
        parser.error(f"--hidden is {args.hidden}; a multiple of 32 is needed")
    if args.workers < 0:
        parser.error(f"--workers is {args.workers}; 0 or more is needed")
    if args.save_seconds < 0:
        parser.error(f"--save-seconds is {args.save_seconds:g}; 0 (after every step) or more is needed")
    compiled = args.device.startswith("cuda") and not args.no_compile
    course = Course(args.out, args.device, args.hidden, args.workers, args.save_seconds, steps, compiled)

    def body() -> int:
        try:
            flags.save(args, args.out)
            with flushed_denormals():
                course.run(stages)
        except KeyboardInterrupt:
            print(f"\nstopped; the same command goes on from the last checkpoint in {args.out}", file=sys.stderr)
            return 130
        return 0

    return run_program(body)


if __name__ == "__main__":
    sys.exit(main())
