"""The recipe of the embedded model, one resumable command: `python -m twigvlm.sprout.train`.

LLaVA's order with the cheap things first: the tower on patch labels; a shallow decoder on scenes
spelt out in nine symbols (sums of words), then in many; the projector aligned to those words; pictures;
what pruning would leave of them; the same decoder grown to 32 layers; all of it joined at the full
number of visual tokens; and the twig on the finished base. Each stage writes `<out>/<stage>.jsonl` (metrics) and
`<out>/<stage>-saved/checkpoint-*` (every two minutes); a run that is killed goes on where it was. The same command runs on
a GPU, where `--scale` multiplies the number of steps that a faster machine affords.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from .. import flags
from ..config import TwigConfig
from ..families import trunk_of
from ..loading.base import load_base
from ..loading.device import pick_device
from ..model.trunk import Trunk
from ..model.twig import Twig, grow, save_twig
from ..program import run_program
from .recipe.align import Aligner, align_batch
from .recipe.base import CORE_PLACES, LAYERS, UPPER, base_config, build, deepen, save_base, shorten
from .recipe.decoder import PackedAnswers, decoder_batch, sparse_batch
from .recipe.stage import StageConfig, fit, save_weights
from .recipe.tokenizer import IMAGE_TOKEN, build_tokenizer
from .recipe.tower import SIDE, PatchReader, tower_batch

CONTINUED, TWIG_SCENES = 9, 3  # offsets of the scenes that a continued base sees, and a twig
WORTH_COMPILING = 200  # steps; a minute of compilation must pay
STAGES = ("tower", "cells", "symbols", "align", "image", "sparse", "deep", "joint", "twig")


@dataclass(frozen=True)
class Settings:
    """How a run is made; what it makes is the recipe's."""

    out: Path
    device: str = "cpu"
    workers: int = 1
    scale: float = 1.0
    hidden: int = 160
    compiled: bool = True
    save_seconds: float = 120.0
    steps: Mapping[str, int] = field(default_factory=dict)  # by loop name, instead of the recipe's
    start: Path | None = None  # a base to go on from


class Recipe:
    """One training run: holds what the stages share and hands the model from each to the next."""

    def __init__(self, settings: Settings):
        self.settings, self.out, self.device = settings, settings.out, settings.device
        self.tokenizer = build_tokenizer()
        self.image_token = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def config(self, layers: int):
        return base_config(len(self.tokenizer), self.image_token, layers, self.settings.hidden)

    def loop(self, name: str, steps: int, lr: float, **settings) -> StageConfig:
        run = self.settings
        steps = run.steps.get(name, max(1, round(steps * run.scale)))
        return StageConfig(name, steps, lr, workers=run.workers, save_seconds=run.save_seconds, **settings)

    def run(self, stages: tuple[str, ...]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        for stage in stages:
            if not self.result(stage).exists():
                model = getattr(self, stage)()
                save_weights({k: v.to("cpu", torch.float32) for k, v in model.state_dict().items()}, self.result(stage))

    def result(self, stage: str) -> Path:
        return self.out / f"{stage}-done.pt"

    def load(self, stage: str, layers: int) -> LlavaForConditionalGeneration:
        """The model that `stage` left."""
        model = build(self.config(layers))
        model.load_state_dict(torch.load(self.result(stage), map_location="cpu", weights_only=True))
        return model

    def tower(self) -> LlavaForConditionalGeneration:
        model = build(self.config(len(CORE_PLACES)))
        reader = PatchReader(model.model.vision_tower).to(self.device)
        reader.tower.config._attn_implementation = "eager"  # 1.7 times SDPA's speed for 144 keys on a CPU
        windows = self.loop("tower-windows", 5900, 1.5e-3, final_lr=0.1, weight_decay=0.01)
        fit(windows, reader, partial(tower_batch, images=32, window=SIDE // 2), reader.loss, self.out)
        whole = self.loop("tower-whole", 300, 3e-4, weight_decay=0.01)
        fit(whole, reader, partial(tower_batch, images=8, window=SIDE), reader.loss, self.out)
        return model

    def cells(self) -> LlavaForConditionalGeneration:
        model = build(self.config(len(CORE_PLACES)))  # needs no eyes yet
        return self.answers(model, self.loop("cells", 2400, 2e-3, final_lr=0.5), rows=4, kind="cells", keep_share=1 / 9)

    def symbols(self) -> LlavaForConditionalGeneration:
        model = self.load("cells", len(CORE_PLACES))
        return self.answers(
            model, self.loop("symbols", 900, 1e-3, final_lr=0.5), rows=4, kind="symbols", keep_share=1 / 9
        )

    def align(self) -> LlavaForConditionalGeneration:
        model, seeing = self.load("symbols", len(CORE_PLACES)), self.load("tower", len(CORE_PLACES))
        model.model.vision_tower = seeing.model.vision_tower
        aligner = Aligner(model.to(self.device))
        aligner.reader.tower.config._attn_implementation = "eager"
        loop = self.loop("align", 900, 1e-3)
        fit(
            loop,
            aligner,
            partial(align_batch, images=32, window=SIDE // 2, tokenizer=self.tokenizer),
            aligner.loss,
            self.out,
        )
        return model

    def image(self) -> LlavaForConditionalGeneration:
        config, offset = self.config(len(CORE_PLACES)), 0
        if self.settings.start is None:
            model = self.load("align", len(CORE_PLACES))
        else:
            base = LlavaForConditionalGeneration.from_pretrained(self.settings.start, dtype=torch.float32)
            model, offset = shorten(base, config), CONTINUED
        loop = self.loop("image", 4000, 8e-4, final_lr=0.05)
        return self.answers(model, loop, rows=4, kind="image", keep_share=0.25, whole_share=0.25, offset=offset)

    def sparse(self) -> LlavaForConditionalGeneration:
        """The layers above those that a twig copies learn to count and describe from the tokens that pruning leaves."""
        model = self.load("image", len(CORE_PLACES)).to(self.device).requires_grad_(False)
        decoder = model.model.language_model
        for part in (*decoder.layers[UPPER:], decoder.norm, model.lm_head):
            part.requires_grad_(True)
        loop = self.loop("sparse", 900, 4e-4, final_lr=0.05)
        batches = partial(sparse_batch, tokenizer=self.tokenizer, whole_share=0.4, offset=12)
        fit(loop, model, batches, PackedAnswers(model).loss, self.out)
        return model

    def deep(self) -> LlavaForConditionalGeneration:
        model = deepen(self.load("sparse", len(CORE_PLACES)), self.config(LAYERS))
        return self.answers(
            model, self.loop("deep", 400, 2e-4, final_lr=0.3), rows=8, kind="image", keep_share=0.25, offset=1
        )

    def joint(self) -> LlavaForConditionalGeneration:
        model = self.load("deep", LAYERS)
        loop = self.loop("joint", 400, 1e-4)
        return self.answers(model, loop, rows=4, kind="image", keep_share=1, offset=2, train_tower=True)

    def twig(self) -> torch.nn.Module:
        """Grow and train the twig on the base as it is published (rounded to fp16), which stays as it is."""
        save_base(self.load("joint", LAYERS), self.tokenizer, self.out / "base")
        device = torch.device(self.device)
        trunk = trunk_of(load_base(self.out / "base", device, torch.float32, "sdpa").model)
        loop = self.loop("twig", 800, 5e-4, final_lr=0.02)
        twig = grow(trunk, TwigConfig(trunk.L))
        train_twig(trunk, twig, loop, self.out, self.settings.compiled)
        save_twig(twig, trunk, self.out / "twig", base="sprout", dtype=torch.float16)
        return twig

    def answers(
        self,
        model,
        loop: StageConfig,
        rows: int,
        kind: str,
        keep_share: float,
        whole_share: float = 0.0,
        offset: int = 0,
        train_tower: bool = False,
    ) -> LlavaForConditionalGeneration:
        """Train decoder and projector (and the tower's live layers) on packed questions."""
        model.to(self.device)
        for name, parameter in model.named_parameters():
            dead = ".post_layernorm." in name or f".layers.{model.config.vision_config.num_hidden_layers - 1}." in name
            parameter.requires_grad_(train_tower and not dead if "vision_tower" in name else True)
        task = PackedAnswers(model, train_tower=train_tower)
        if self.settings.compiled:
            compile_layers(task.layers, loop)
        batches = partial(
            decoder_batch,
            rows=rows,
            kind=kind,
            keep_share=keep_share,
            whole_share=whole_share,
            tokenizer=self.tokenizer,
            offset=offset,
        )
        fit(loop, model, batches, task.loss, self.out)
        return model


def train_twig(trunk: Trunk, twig: Twig, loop: StageConfig, out: Path, compiled: bool) -> None:
    """Teach a grown twig the answers, in place; the base stays as it is (paper section 3.1)."""
    twig.requires_grad_(True)
    tokenizer = build_tokenizer()
    batches = partial(decoder_batch, rows=8, kind="image", keep_share=1, tokenizer=tokenizer, offset=TWIG_SCENES)
    task = PackedAnswers(trunk.model, twig)
    if compiled:
        compile_layers(task.frozen + task.layers, loop)
    fit(loop, twig, batches, task.loss, out)


def compile_layers(layers: list[torch.nn.Module], loop: StageConfig) -> None:
    """Fuse the layers' small operations, twice the speed on a CPU, where the loop is long enough to pay for it."""
    if loop.steps >= WORTH_COMPILING:
        torch._dynamo.config.recompile_limit = 256  # layers x shapes share one code object
        for layer in layers:
            layer.compile(dynamic=False)  # kernels for unknown lengths are twice as slow


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sprout"), help="folder of the run (default %(default)s)")
    parser.add_argument(
        "--start", type=Path, metavar="BASE", help="go on from this base folder: image, deep, joint, twig"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="which stages, in order (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw the scenes (default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every stage's steps (default %(default)s)")
    parser.add_argument(
        "--steps", default="", metavar="NAME=N,…", help="other numbers of steps than the recipe's, by loop name"
    )
    parser.add_argument("--hidden", type=int, default=160, help="decoder width, a multiple of 32 (default %(default)s)")
    parser.add_argument(
        "--save-seconds", type=float, default=120.0, help="time between checkpoints (default %(default)s)"
    )
    parser.add_argument("--no-compile", action="store_true", help="do not compile the layers (half the speed)")
    args = flags.parse(parser, argv)
    stages = tuple(args.stages.split(","))
    if args.start:
        if not (args.start / "config.json").exists():
            parser.error(f"--start {args.start}: no config.json; give the folder of a trained base")
        stages = stages[stages.index("image") :] if "image" in stages else stages
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages: unknown {sorted(unknown)}; choose from {', '.join(STAGES)}")
    try:
        steps = {name: int(n) for name, n in (item.split("=") for item in args.steps.split(",") if item)}
    except ValueError:
        parser.error(f"--steps is {args.steps!r}; NAME=N,NAME=N is needed")
    if args.save_seconds < 0:
        parser.error(f"--save-seconds is {args.save_seconds:g}; 0 (after every step) or more is needed")
    for name, value in (("--scale", args.scale), ("--hidden", args.hidden)):
        if not value > 0:
            parser.error(f"{name} is {value:g}; a number above 0 is needed")
    if args.hidden % 32:
        parser.error(f"--hidden is {args.hidden}; a multiple of 32 is needed")
    if args.workers < 0:
        parser.error(f"--workers is {args.workers}; 0 or more is needed")
    return run_program(lambda: train(args, stages, steps))


def train(args: argparse.Namespace, stages: tuple[str, ...], steps: dict[str, int]) -> int:
    """Run the stages; Ctrl-C ends them with exit status 130, and the same command goes on."""
    pick_device(args.device)
    torch.set_flush_denormal(True)
    recipe = Recipe(
        Settings(
            args.out,
            args.device,
            args.workers,
            args.scale,
            args.hidden,
            not args.no_compile,
            args.save_seconds,
            steps,
            args.start,
        )
    )
    (args.out).mkdir(parents=True, exist_ok=True)
    (args.out / "settings.json").write_text(json.dumps({k: str(v) for k, v in vars(args).items()}, indent=1))
    try:
        recipe.run(stages)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from the last checkpoint in {args.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
