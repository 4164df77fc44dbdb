"""What tells a base that uses its depth from one that does not: `python -m twigvlm.sprout.measure`.

Short answers by kind, the answers left when any four layers are skipped, the logit lens over depth,
the looking curve (accuracy when pruned by what layer D attends to, paper Figure 2), answers and
descriptions in later turns, and questions in the wordings that its training knows. All of it on whole rows with the right
answer before each token, where a row counts as right if greedy decoding would write exactly its answer; so the turns
before hold right answers, too. Every percentage comes with its bootstrap interval over scenes. Works on symbols (an
early stage) and on pictures alike: see `Asked`.
"""

from __future__ import annotations

import argparse
import pickle
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from .. import flags
from ..errors import InputError
from ..files import write_json
from ..loading.describe import EMBEDDED_BASE
from ..model.trunk import rotate_half
from ..program import called, run_program
from ..record import provenance
from ..world.draw import draw
from ..world.phrasing import forms
from ..world.questions import DESCRIBE, KINDS, Question, ask, describe
from ..world.scenes import Scene, sample_scene
from .recipe.language import Talk
from .recipe.lessons import cells
from .recipe.symbols import CELL_CENTRES
from .recipe.talk import Row, add_turn, collate, empty_row, single
from .recipe.tokenizer import build_tokenizer
from .recipe.tower import SIDE, pixels
from .shown import curves, plot

BLOCK = 4  # layers skipped at once
RESAMPLES = 1000


@dataclass(frozen=True)
class Asked:
    """Rows to be answered, and what the model sees of each one's scene: `views[scene]` (symbols or pixels), `keep`.

    `views` [scenes, …] is under the name that the task's batches use ("symbols" or "pixels").
    """

    scenes: list[int]  # of each row
    kinds: list[str]
    rows: list[Row]
    name: str
    views: torch.Tensor
    keep: torch.Tensor

    def batches(self, device: torch.device, size: int = 32) -> Iterator[tuple[list[Row], dict]]:
        """The rows in order, `size` at a time, as the task's batches on this device."""
        for first in range(0, len(self.rows), size):
            rows, scenes = self.rows[first : first + size], self.scenes[first : first + size]
            batch = collate(rows) | {self.name: self.views[scenes], "keep": self.keep}
            yield rows, {name: tensor.to(device) for name, tensor in batch.items()}


def quiz(scenes: Sequence[Scene], tokenizer, kinds: Sequence[str] = KINDS) -> list[tuple[int, Question, Row]]:
    """One question of each kind about each scene, asked alone, half of them behind the system sentence."""
    out = []
    for number, scene in enumerate(scenes):
        rng = random.Random(f"measure {scene.seed}")
        for kind in kinds:
            question = ask(scene, kind, rng)
            if question:
                out.append((number, question, single(question, tokenizer, system=rng.random() < 0.5)))
    return out


def talks(scenes: Sequence[Scene], tokenizer, turns: int = 4, long: int = 1) -> list[tuple[int, Row]]:
    """Conversations of `turns` turns in any order, `long` of them descriptions."""
    out = []
    for number, scene in enumerate(scenes):
        rng = random.Random(f"turns {scene.seed}")
        row = empty_row(tokenizer, rng.random() < 0.5)
        kinds = ["describe"] * long
        while len(kinds) < turns:
            kinds.append(rng.choice(KINDS))
        rng.shuffle(kinds)
        for kind in kinds:
            question = ask(scene, kind, rng) or ask(scene, "colour", rng)
            add_turn(row, question, tokenizer, 10_000, 0.0)
        out.append((number, row))
    return out


def afterwards(scenes: Sequence[Scene], tokenizer) -> list[tuple[int, Row]]:
    """A short question of any kind, then "Describe the image in detail."."""
    out = []
    for number, scene in enumerate(scenes):
        rng = random.Random(f"afterwards {scene.seed}")
        row = empty_row(tokenizer, rng.random() < 0.5)
        short = ask(scene, rng.choice(KINDS), rng) or ask(scene, "colour", rng)
        for question in (short, Question("describe", DESCRIBE[0], describe(scene))):
            add_turn(row, question, tokenizer, 10_000, 0.0)
        out.append((number, row))
    return out


def phrased(scenes: Sequence[Scene], tokenizer) -> dict[str, list[tuple[int, Row]]]:
    """Name of a phrasing, with or without the system sentence → questions in it; each question is put in one of them."""
    out = defaultdict(list)
    for number, scene in enumerate(scenes):
        rng = random.Random(f"phrased {scene.seed}")
        for place, kind in enumerate(k for k in KINDS if k != "choice"):
            question = ask(scene, kind, rng)
            if question:
                ways = list(forms(question, rng).items())
                system, chosen = divmod((number + 3 * place) % (2 * len(ways)), len(ways))
                name, question = ways[chosen]
                row = single(question, tokenizer, system=bool(system))
                out[f"{name}, {'with' if system else 'without'} system sentence"].append((number, row))
    return dict(sorted(out.items()))


def _right(logits: torch.Tensor, batch: dict, rows: Sequence[Row]) -> list[list[bool]]:
    """For each row and turn: each token of the answer is the best guess behind what precedes it."""
    best, ids = logits.argmax(-1).cpu(), batch["ids"].cpu()
    return [
        [bool((best[i, begin - 1 : end - 1] == ids[i, begin:end]).all()) for _, begin, end in row.turns]
        for i, row in enumerate(rows)
    ]


@torch.no_grad()
def answers(task: Talk, asked: Asked, layers: Sequence | None = None) -> list[list[bool]]:
    """Right or not, by row and turn, through `layers` of the decoder (default: all)."""
    return [r for rows, batch in asked.batches(task.device) for r in _right(task.logits(batch, layers), batch, rows)]


def without_blocks(task: Talk, asked: Asked, first: int = 4, size: int = BLOCK) -> dict[int, Share]:
    """First layer of a skipped block → what is right without it."""
    out = {}
    for start in range(first, len(task.layers) - size + 1):
        left = [*task.layers[:start], *task.layers[start + size :]]
        out[start] = share(answers(task, asked, left), asked.scenes)
    return out


@torch.no_grad()
def lens(task: Talk, asked: Asked) -> list[Share]:
    """What is right if norm and head read what left layer l, for l = 0 to the last."""
    right: list[list[list[bool]]] = [[] for _ in task.layers]
    for rows, batch in asked.batches(task.device):
        hidden, positions = task.embed(batch)
        for depth, layer in enumerate(task.layers):
            hidden = task.run(hidden, positions, [layer])
            right[depth] += _right(task.guesses(hidden, batch), batch, rows)
    return [share(r, asked.scenes) for r in right]


@torch.no_grad()
def looking_curve(
    task: Talk, asked: Asked, keep: int, K: int, F: int, layers: Sequence[int] | None = None
) -> dict[str, Share]:
    """What is right with `keep` visual tokens from layer K on and none from F: chosen by each layer, and by chance.

    What base layer D attends to is taken from an unpruned pass: head mean at the last token of the question.
    """
    right = defaultdict(list)
    wanted = range(len(task.layers)) if layers is None else layers
    for number, (rows, batch) in enumerate(asked.batches(task.device)):
        hidden, positions = task.embed(batch)
        entering = [hidden]
        for layer in task.layers:
            entering.append(task.run(entering[-1], positions, [layer]))
        count = hidden.shape[1] - batch["ids"].shape[1]
        last = torch.tensor([row.turns[0][1] - 1 for row in rows], device=task.device) + count
        signals = {str(d): attention(task, task.layers[d], entering[d], positions, last) for d in wanted}
        chance = torch.rand(hidden.shape[:2], generator=torch.Generator().manual_seed(number))
        signals["random"] = chance.to(task.device)
        visual = batch["heads"][:, None] + torch.arange(count, device=task.device)
        for name, scores in signals.items():
            best = scores.gather(1, visual).topk(keep).indices.sort().values
            kept = visual.gather(1, best)
            right[name] += _right(through_pruned(task, batch, entering[K], positions, kept, K, F), batch, rows)
    return {name: share(r, asked.scenes) for name, r in right.items()}


def attention(task: Talk, layer, hidden: torch.Tensor, positions: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """What the tokens at `last` [B] attend to in a layer that `hidden` [B, S, D] enters: head mean [B, S]."""
    part, normed = layer.self_attn, layer.input_layernorm(hidden)
    cos, sin = (t[:, :, None] for t in task.decoder.rotary_emb(hidden, positions))
    query, key = (p(normed).unflatten(-1, (-1, part.head_dim)) for p in (part.q_proj, part.k_proj))
    query, key = (t * cos + rotate_half(t) * sin for t in (query, key))
    query = query[torch.arange(len(last), device=last.device), last]
    scores = torch.einsum("bhd,bshd->bhs", query, key) * part.scaling
    future = torch.arange(hidden.shape[1], device=last.device) > last[:, None]
    return scores.masked_fill(future[:, None], -torch.inf).softmax(-1).mean(1)


def take(hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[B, S, D] at `places` [B, S'] → [B, S', D]."""
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def through_pruned(
    task: Talk, batch: dict, hidden: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor, K: int, F: int
) -> torch.Tensor:
    """Logits [B, S, vocabulary] of what enters layer K if only the visual tokens `kept` [B, r] (places in `hidden`) go
    through layers K..F-1, and none above (paper section 3.2).
    """
    count = hidden.shape[1] - batch["ids"].shape[1]
    places = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
    heads = batch["heads"][:, None]
    text = places[(places < heads) | (places >= heads + count)].view(len(hidden), -1)
    stay = torch.cat([text, kept], 1).sort().values
    hidden, positions = take(hidden, stay), positions.gather(1, stay)
    hidden = task.run(hidden, positions, task.layers[K:F])
    seen = (stay[:, :, None] == kept[:, None]).any(-1)
    words = (~seen).nonzero()[:, 1].view(len(hidden), -1)
    hidden, positions = take(hidden, words), positions.gather(1, words)
    return task.guesses(task.run(hidden, positions, task.layers[F:]), batch)


def percent(right: Sequence[Sequence[bool]]) -> float:
    """Of all turns."""
    every = [r for turns in right for r in turns]
    return 100 * sum(every) / len(every)


def interval(right: Sequence[Sequence[bool]], scenes: Sequence[int], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the percentage over scenes: questions about one scene are drawn together."""
    groups: dict[int, list[bool]] = defaultdict(list)
    for turns, scene in zip(right, scenes, strict=True):
        groups[scene] += turns
    sums = torch.tensor([[sum(g), len(g)] for g in groups.values()], dtype=torch.float64)
    draws = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=torch.Generator().manual_seed(0))
    right_of, asked_of = sums[draws].sum(1).unbind(-1)
    low, high = torch.quantile(100 * right_of / asked_of, torch.tensor([(1 - level) / 2, (1 + level) / 2]).double())
    return low.item(), high.item()


def relative(ours: Sequence[Sequence[bool]], base: Sequence[Sequence[bool]]) -> tuple[float, float, float]:
    """RelAcc, percent, and its 95 % interval: scenes are drawn together, of both."""
    pairs = torch.tensor([[sum(a), sum(b)] for a, b in zip(ours, base, strict=True)], dtype=torch.float64)
    draws = torch.randint(len(pairs), (RESAMPLES, len(pairs)), generator=torch.Generator().manual_seed(0))
    sums = pairs[draws].sum(1)
    ratios = 100 * sums[:, 0] / sums[:, 1].clamp(min=1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975]).double()).tolist()
    return 100 * pairs[:, 0].sum().item() / max(1.0, pairs[:, 1].sum().item()), low, high


@dataclass(frozen=True)
class Share:
    """Percent right of `asked` turns, with the ends of its interval."""

    percent: float
    low: float
    high: float
    asked: int

    def __str__(self) -> str:
        return f"{self.percent:.1f} ({self.low:.1f} to {self.high:.1f} of {self.asked})"


def share(right: Sequence[Sequence[bool]], scenes: Sequence[int]) -> Share:
    """What was right of these rows' turns, at least one."""
    return Share(percent(right), *interval(right, scenes), sum(map(len, right)))


def by_kind(right: Sequence[Sequence[bool]], asked: Asked) -> dict[str, Share]:
    """What was right of single-turn rows, by kind of question."""
    out = {}
    for kind in dict.fromkeys(asked.kinds):
        some = [(r, s) for r, s, k in zip(right, asked.scenes, asked.kinds, strict=True) if k == kind]
        out[kind] = share(*zip(*some, strict=True))
    return out


def scenes_of(split: str, count: int) -> list[Scene]:
    return [sample_scene(split, seed) for seed in range(count)]


def views(scenes: Sequence[Scene], tokenizer, pictures: bool) -> tuple[str, torch.Tensor, torch.Tensor]:
    """What a model sees of these scenes, as `Asked` holds it: nine symbols, or all patches of a picture."""
    if pictures:
        return "pixels", pixels([draw(s) for s in scenes]), torch.arange(SIDE * SIDE)
    return "symbols", torch.stack([cells(s, tokenizer) for s in scenes]), torch.tensor(CELL_CENTRES)


def measure(task: Talk, tokenizer, scenes: Sequence[Scene], what: Sequence[str], pictures: bool) -> dict:
    """The figures named in `what` (a subset of WHAT), on these scenes."""
    seen = views(scenes, tokenizer, pictures)
    numbers, questions, rows = zip(*quiz(scenes, tokenizer), strict=True)
    asked = Asked(list(numbers), [q.kind for q in questions], list(rows), *seen)
    right = answers(task, asked)
    layers = len(task.layers)
    out = {"layers": layers, "all": share(right, asked.scenes), **by_kind(right, asked)}
    if "skip" in what:
        size = max(1, layers * BLOCK // 32)
        out["layers skipped at once"], out["without those from"] = size, without_blocks(task, asked, size, size)
    if "lens" in what:
        out["lens"] = lens(task, asked)
    if "looking" in what:
        # Of 576 patches 41 stay at R = 64; of nine symbols three.
        keep, K, F = (41 if pictures else 3), max(1, layers // 16), round(0.75 * layers)
        out["looking"] = looking_curve(task, asked, keep, K, F)

    def told(rows: Sequence[tuple[int, Row]]) -> tuple[list[list[bool]], list[int]]:
        numbers, rows = map(list, zip(*rows, strict=True))
        return answers(task, Asked(numbers, [], rows, *seen)), numbers

    if "turns" in what:
        out |= _turns(talks(scenes, tokenizer), told, tokenizer)
        right, numbers = told(afterwards(scenes, tokenizer))
        out["described in the second turn"] = share([turns[1:] for turns in right], numbers)
    if "phrasing" in what:
        out |= {name: share(*told(rows)) for name, rows in phrased(scenes, tokenizer).items()}
    if "describe" in what:
        out["descriptions, exact"] = share(*told([(n, row) for n, _, row in quiz(scenes, tokenizer, ("describe",))]))
    return out


def _turns(rows: Sequence[tuple[int, Row]], told: Callable, tokenizer) -> dict:
    """What was right of conversations, by turn and by length of the answer, and that over the same questions asked alone."""
    right, numbers = told(rows)
    alone = [[single(question, tokenizer) for question, _, _ in row.turns] for _, row in rows]
    flat = iter(told([(n, one) for n, ones in zip(numbers, alone, strict=True) for one in ones])[0])
    by_itself = [[next(flat)[0] for _ in ones] for ones in alone]
    out = {f"turn {i + 1}": share([[turns[i]] for turns in right], numbers) for i in range(len(right[0]))}
    for name, long in (("short answers in any turn", False), ("descriptions in any turn", True)):
        some = [
            [r for r, (question, _, _) in zip(turns, row.turns, strict=True) if (question.kind == "describe") == long]
            for (_, row), turns in zip(rows, right, strict=True)
        ]
        out[name] = share(some, numbers)
    out["the same questions alone"] = share(by_itself, numbers)
    out["turns over the same alone, %"] = relative(right, by_itself)
    return out


WHAT = ("skip", "lens", "looking", "turns", "phrasing", "describe")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=called("twigvlm.sprout.measure"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", type=Path, help="folder of a finished base, measured on pictures (default: the embedded one)"
    )
    parser.add_argument("--checkpoint", type=Path, help="file of a stage of the course, measured on nine symbols")
    parser.add_argument("--pictures", action="store_true", help="show the checkpoint pictures instead of symbols")
    parser.add_argument("--split", default="validation", help="of the scenes (default %(default)s)")
    parser.add_argument("--scenes", type=int, default=60, help="how many (default %(default)s)")
    parser.add_argument("--what", default=",".join(WHAT), help="besides short answers (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument(
        "--out", type=Path, help="JSON file for the figures, with a picture of those over depth beside it"
    )
    args = flags.parse(parser, argv)

    def body() -> None:
        what = tuple(w for w in args.what.split(",") if w)
        if unknown := set(what) - set(WHAT):
            raise InputError(f"--what: unknown {sorted(unknown)}; choose from {', '.join(WHAT)}")
        model, begin = _open(args).to(args.device), time.monotonic()
        scenes = scenes_of(args.split, args.scenes)
        found = measure(Talk(model), build_tokenizer(), scenes, what, not args.checkpoint or args.pictures)
        for name, value in found.items():
            print(f"{name}: {_shown(value)}")
        if args.out:
            seconds = round(time.monotonic() - begin)
            facts = provenance() | {"seconds": seconds, "split": args.split, "scenes": args.scenes}
            write_json(facts | _plain(found), args.out)
            if curves(_plain(found)):
                plot(_plain(found), args.out.with_suffix(".png"))

    return run_program(body)


def _open(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    from .train import Course  # it trains, and this module is read by what only measures

    if args.base and args.checkpoint:
        raise InputError("give either --base FOLDER or --checkpoint FILE")
    if not args.checkpoint:
        base = args.base or EMBEDDED_BASE
        if not (base / "config.json").is_file():
            raise InputError(f"--base {base}: no config.json there; give the folder of a trained base")
        return LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    try:
        state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        sees = any("vision_tower" in name for name in state.get("weights", state))
        model = Course(args.checkpoint.parent).load(args.checkpoint)
    except (OSError, KeyError, RuntimeError, pickle.UnpicklingError, AttributeError) as fault:
        raise InputError(
            f"--checkpoint {args.checkpoint}: no weights of the course ({fault}); give a file that it wrote"
        ) from fault
    if args.pictures and not sees:
        raise InputError(
            f"--pictures: {args.checkpoint} holds no tower; give the file of a finished stage from align on (…-done.pt)"
        )
    return model


def _plain(value):
    """Shares within anything as dictionaries, for JSON."""
    if isinstance(value, Share):
        return asdict(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_shown(v) for v in value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
