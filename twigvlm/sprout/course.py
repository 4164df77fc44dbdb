"""The next base's recipe as far as it goes, one resumable command: `python -m twigvlm.sprout.course`.

Text and symbols first: a decoder of four layers learns to talk about scenes in words, then its depth
doubles to 8, 16 and 32 layers, each trained on. Then many symbols, the projector (the tower is the
published base's), and pictures, at last with all their tokens; `<out>/base` is the result. Every stage writes `<out>/<stage>.jsonl`
(metrics), `<stage>-saved/checkpoint-*` (every two minutes) and `<stage>-done.pt`; a run that is killed
goes on where it was, to the same bits on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from .. import flags
from ..errors import InputError
from ..loading.describe import EMBEDDED_BASE
from ..program import run_program
from ..training.muon import for_decoder
from .recipe.align import Aligner
from .recipe.base import base_config, build, save_base
from .recipe.language import Talk, double, start, tie
from .recipe.lessons import Lesson, lesson_batch, window_batch
from .recipe.stage import StageConfig, fit, save_weights
from .recipe.tokenizer import IMAGE_TOKEN, build_tokenizer
from .recipe.tower import SIDE

HIDDEN = 128
THETA = 500_000.0  # content must be found hundreds of patches away: most of a head's turning is slow


@dataclass(frozen=True)
class Stage:
    """So many steps at this depth; `lr` is Muon's peak, `final_lr` the share of it that is left at the end."""

    name: str
    layers: int
    steps: int
    lr: float
    lesson: Lesson
    final_lr: float = 0.1


STAGES = (
    # Descriptions and drills are learnt first (dense answers), short answers need what they taught.
    Stage("words-4", 4, 500, 0.02, Lesson(0, helped=400, described=0.5, drilled=0.5, worded=0.2), final_lr=0.2),
    Stage("short-4", 4, 600, 0.006, Lesson(7, drilled=0.3), final_lr=0.5),
    Stage("words-8", 8, 1000, 0.005, Lesson(1, drilled=0.3)),
    Stage("words-16", 16, 300, 0.006, Lesson(2, asked_weight=0.05)),
    Stage("words-32", 32, 300, 0.004, Lesson(3, asked_weight=0.05)),
    Stage("patches", 32, 300, 0.003, Lesson(4, "patches", shares=(1 / 9, 1 / 9, 1 / 4), asked_weight=0.05)),
    Stage("align", 32, 400, 1e-3, Lesson(0, "windows")),
    # One long conversation a picture instead of several short ones: its tokens are computed once.
    Stage("pictures", 32, 1200, 0.003, Lesson(5, "pictures", 8, 1, (1 / 4, 1 / 4, 1 / 9), 0.05, length=320)),
    Stage("whole", 32, 400, 0.001, Lesson(6, "pictures", 4, 1, (1.0, 0.0), 0.0, length=480)),
)


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

    def __post_init__(self) -> None:
        self.tokenizer = build_tokenizer()

    def done(self, stage: str) -> Path:
        return self.out / f"{stage}-done.pt"

    def before(self, number: int) -> LlavaForConditionalGeneration:
        """The model that stage `number` begins with."""
        stage, shape = STAGES[number], config(STAGES[number].layers, self.hidden, self.tokenizer)
        if number == 0:
            return start(shape)
        previous = STAGES[number - 1]
        if not self.done(previous.name).exists():
            raise InputError(
                f"{self.done(previous.name)}: stage {previous.name} has not finished; run it first: "
                f"--stages {previous.name},{stage.name}"
            )
        model = self.load(self.done(previous.name))
        model = double(model, shape) if stage.layers > previous.layers else model
        if stage.lesson.kind == "windows":
            published = LlavaForConditionalGeneration.from_pretrained(EMBEDDED_BASE, dtype=torch.float32)
            model.model.vision_tower = published.model.vision_tower
        return model

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
        for number, stage in enumerate(STAGES):
            if stage.name in wanted and not self.done(stage.name).exists():
                model = self.before(number).to(self.device)
                self.train(model, stage)
                weights = {k: v.to("cpu") for k, v in model.state_dict().items() if k != "lm_head.weight"}
                save_weights(weights, self.done(stage.name))
                if stage is STAGES[-1]:
                    self.export(model)

    def export(self, model: LlavaForConditionalGeneration) -> None:
        """Write `<out>/base` as a stock folder, embedding and head apart, as whoever trains on expects them."""
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        save_base(model, self.tokenizer, self.out / "base")

    def train(self, model: LlavaForConditionalGeneration, stage: Stage) -> None:
        """The decoder learns, from pictures on the projector too; `align` teaches the projector alone. The tower stays."""
        loop = StageConfig(
            stage.name, self.steps.get(stage.name, stage.steps), stage.lr, final_lr=stage.final_lr,
            workers=self.workers, save_seconds=self.save_seconds,
        )  # fmt: skip
        model.requires_grad_(False)
        if stage.lesson.kind == "windows":
            aligner = Aligner(model)
            aligner.reader.requires_grad_(False)
            aligner.projector.requires_grad_(True)
            fit(loop, aligner, partial(window_batch, images=16, window=SIDE // 2, tokenizer=self.tokenizer),
                aligner.loss, self.out)  # fmt: skip
            return
        model.model.language_model.requires_grad_(True)
        if stage.lesson.kind == "pictures":
            model.model.multi_modal_projector.requires_grad_(True)
        batches = partial(lesson_batch, lesson=stage.lesson, tokenizer=self.tokenizer)
        fit(loop, model, batches, Talk(model).loss, self.out, for_decoder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/next"), help="folder of the run (default %(default)s)")
    names = tuple(stage.name for stage in STAGES)
    parser.add_argument("--stages", default=",".join(names), help="which stages (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="decoder width (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that make batches (default %(default)s)")
    parser.add_argument("--save-seconds", type=float, default=120.0, help="between checkpoints (default %(default)s)")
    parser.add_argument(
        "--steps", default="", metavar="NAME=N,…", help="other numbers of steps than the recipe's, by stage"
    )
    args = flags.parse(parser, argv)
    stages = tuple(args.stages.split(","))
    if unknown := set(stages) - set(names):
        parser.error(f"--stages: unknown {sorted(unknown)}; choose from {', '.join(names)}")
    try:
        steps = {name: int(n) for name, n in (item.split("=") for item in args.steps.split(",") if item)}
    except ValueError:
        parser.error(f"--steps is {args.steps!r}; NAME=N,NAME=N is needed")
    torch.set_flush_denormal(True)
    course = Course(args.out, args.device, args.hidden, args.workers, args.save_seconds, steps)
    return run_program(lambda: course.run(stages))


if __name__ == "__main__":
    sys.exit(main())
