"""How fast: `python -m twigvlm.evaluation.speed`.

The physics. At batch 1 every decoded token reads all the decoder's weights once, so memory
bandwidth / weight bytes bounds plain decoding. Speculation reads them once per verified block,
pruning shortens prefill and the cache. On a small model the bound is not bandwidth but the fixed
cost of a layer call; both are printed. What other programs take of the CPU meanwhile is noted, and said where it is much.
stdout ends with one JSON line where it is no terminal, or with --json. Every method runs on the same trunk in the same process,
interleaved, after a warm-up; figures are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import twigvlm

from .. import flags
from ..config import AUTO, DEFAULT_K, DEFAULT_T, GenerationSettings, TwigConfig
from ..decoding.pace import Parts, now, times
from ..errors import InputError
from ..families import trunk_of
from ..files import check_folder, write_json
from ..foresight import Wish, check
from ..loading.base import Loaded
from ..loading.device import pick_device, pick_dtype
from ..loading.quantise import quantise
from ..loading.random import random_base
from ..model.packed import held_bytes
from ..model.trunk import Trunk
from ..model.twig import grow
from ..program import called, print_json, run_program
from ..record import provenance, table
from ..threads import Clock
from ..vlm import TwigVLM
from .asking.ask import peak_memory
from .coin import CoinChooser

DESCRIPTION_TOKENS = 160
DRAFT_LENGTH = GenerationSettings.draft_length  # any that is not 0: a tree says its own
MIN_TOKENS = 64  # of a description, as it would be written without a limit
ENOUGH = 10.0  # seconds for a part of a step: on a large model a few runs are as good
SLOW = 20.0  # seconds of an answer beside which the first one's own costs are nothing: it counts
LOADED = 0.25  # cores that may be wanted beyond those there are
QUESTION, SHORT = "Describe the image in detail.", "How many objects are there?"


@dataclass(frozen=True)
class Timing:
    """One run of one method on one prompt."""

    prefill: float  # seconds to the first token
    total: float
    tokens: int
    late: int  # tokens after the first step
    acceptance: float | None = None
    per_step: float | None = None  # tokens a verification
    hit_rates: tuple[float, ...] = ()


class Bench:
    """The prompts and the methods that are timed on them; `options` are those of `generate`.

    `trees` are drafts that branch, timed beside the chain.
    """

    def __init__(
        self,
        vlm: TwigVLM,
        options: dict,
        prompts: list[dict],
        endless: bool,
        coin: float | None,
        trees: Sequence[str] = (),
    ):
        self.vlm, self.prompts, self.endless, self.coin, self.trees = vlm, prompts, endless, coin, trees
        self.options = options | {"tree": None}
        self.R, self.length, self.tokens = (options[n] for n in ("retained_tokens", "draft_length", "max_new_tokens"))
        self.turn = 0  # of prompts x repeats: each has its own luck, the same for all methods

    def methods(self) -> dict[str, Callable[[dict], Timing]]:
        """Name → how to time it."""
        ssd = "SSD auto" if self.length == AUTO else "SSD"
        wide = {
            f"SSD tree {tree}{name}": lambda p, R=R, tree=tree: self.ours(p, R, DRAFT_LENGTH, tree)
            for tree in self.trees
            for name, R in (("", None), (" + TTP", self.R))
        }
        return {
            "stock generate": self.stock,
            "plain": lambda p: self.ours(p, None, 0),
            "plain + TTP": lambda p: self.ours(p, self.R, 0),
            ssd: lambda p: self.ours(p, None, self.length),
            f"{ssd} + TTP": lambda p: self.ours(p, self.R, self.length),
            **wide,
        }

    def stock(self, prompt: dict) -> Timing:
        """The unmodified base under Hugging Face's own loop."""
        model, vlm = self.vlm.model, self.vlm
        inputs = {k: v.to(vlm.device) for k, v in prompt.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(vlm.dtype)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        end = {"eos_token_id": -1} if self.endless else {}
        settings = {"do_sample": False, "pad_token_id": 0, **end}
        clock = _FirstToken(vlm._now)
        start = vlm._now()
        out = model.generate(**inputs, max_new_tokens=self.tokens, streamer=clock, **settings)
        total = vlm._now() - start
        tokens = out.shape[1] - inputs["input_ids"].shape[1]
        ends = model.generation_config.eos_token_id  # a number or a list
        if not self.endless and int(out[0, -1]) in (ends if isinstance(ends, list) else [ends]):
            tokens -= 1
        return Timing(clock.first - start, total, tokens, tokens - 1)

    def ours(self, prompt: dict, R: float | None, draft_length: int | str, tree: str | None = None) -> Timing:
        """One of our own settings."""
        chooser = None
        if self.coin is not None and draft_length:
            chooser = lambda settings, _processors: CoinChooser(settings, self.coin, self.turn)  # noqa: E731
        end = {"eos_token_id": []} if self.endless else {}
        out = self.vlm.generate(
            **prompt,
            **self.options | {"retained_tokens": R, "draft_length": draft_length, "tree": tree},
            chooser=chooser,
            **end,
        )
        s = out.stats
        late = s.new_tokens - len(out.steps[0][0].tokens)
        drafts = (s.acceptance, s.tokens_per_step, tuple(s.hit_rates)) if draft_length else ()
        return Timing(s.prefill_seconds, s.prefill_seconds + s.decode_seconds, s.new_tokens, late, *drafts)

    def run(self, repeats: int) -> list[dict]:
        """Medians per method over prompts x repeats, methods interleaved so that drift hits all alike."""
        methods = self.methods() if self.vlm.twig else dict(list(self.methods().items())[:2])
        timings: dict[str, list[Timing]] = {name: [] for name in methods}
        rounds = [prompt for _ in range(repeats) for prompt in self.prompts]
        warm = {name: method(self.prompts[0]) for name, method in methods.items()}
        if min(one.total for one in warm.values()) > SLOW:
            timings, rounds = {name: [one] for name, one in warm.items()}, rounds[1:]
        for prompt in tqdm(rounds, desc="speed", leave=False):
            self.turn += 1
            for name, method in methods.items():
                timings[name].append(method(prompt))
        rows = [_summary(name, timings[name]) for name in methods]
        for row in rows:
            for other in list(methods)[:3]:
                row[f"x {other}"] = _times_as_fast(timings[row["method"]], timings[other])
            wide = row["method"].startswith("SSD tree")
            chain = list(methods)[4 if "TTP" in row["method"] else 3] if wide else ""
            row["x chain"] = _times_as_fast(timings[row["method"]], timings[chain]) if wide else None
            prefills = zip(timings[row["method"]], timings["stock generate"], strict=True)
            row["prefill x stock"] = statistics.median(a.prefill / b.prefill for a, b in prefills)
            if self.coin is not None and "SSD" in row["method"]:
                row["method"] += f" (simulated: acceptance {self.coin:g} by coin)"
        return rows


class _FirstToken:
    """A streamer that only looks at the clock."""

    def __init__(self, now: Callable[[], float]):
        self.now, self.calls, self.first = now, 0, 0.0

    def put(self, _value) -> None:
        self.calls += 1
        if self.calls == 2:  # the prompt comes first
            self.first = self.now()

    def end(self) -> None:
        pass


def _times_as_fast(ours: Sequence[Timing], theirs: Sequence[Timing]) -> float:
    """Median over pairs of runs, tokens a second, prefill included."""
    return statistics.median((a.tokens / a.total) / (b.tokens / b.total) for a, b in zip(ours, theirs, strict=True))


def _summary(name: str, timings: list[Timing]) -> dict:
    median = statistics.median
    late = [t for t in timings if t.late > 0 and t.total > t.prefill]
    accepted = [t.acceptance for t in timings if t.acceptance is not None]
    steps = [t.per_step for t in timings if t.per_step is not None]
    return {
        "method": name,
        "tokens": median(t.tokens for t in timings),
        "prefill ms": 1e3 * median(t.prefill for t in timings),
        "tokens/s": median(t.tokens / t.total for t in timings),
        "decode tokens/s": median(t.late / (t.total - t.prefill) for t in late) if late else None,
        "accepted %": 100 * statistics.mean(accepted) if accepted else None,
        "tokens/step": statistics.mean(steps) if steps else None,
        "hits by depth": _by_depth([t.hit_rates for t in timings]),
    }


def _by_depth(rates: Sequence[Sequence[float]]) -> list[float]:
    """Means over the runs that came so deep."""
    deepest = max(map(len, rates), default=0)
    return [round(statistics.mean(r[d] for r in rates if len(r) > d), 3) for d in range(deepest)]


def _questions(vlm: TwigVLM, count: int, short: bool) -> list[dict]:
    """Test scenes whose full description has MIN_TOKENS tokens or more; asked for it, or for a number."""
    from ..world.draw import draw
    from ..world.questions import describe
    from ..world.scenes import sample_scene

    prompts, seed = [], 0
    while len(prompts) < count:
        scene = sample_scene("test", seed)
        if len(vlm.tokenizer(describe(scene)).input_ids) > MIN_TOKENS:
            prompts.append(vlm.prepare(draw(scene), SHORT if short else QUESTION))
        seed += 1
    return prompts


def _random_prompts(vlm: TwigVLM, count: int) -> list[dict]:
    """LLaVA-like prompts (35 tokens, the image, 20 tokens) of random ids and pixels."""
    generator = torch.Generator().manual_seed(0)
    size, vocabulary = vlm.model.config.vision_config.image_size, vlm.model.lm_head.out_features
    prompts = []
    for _ in range(count):
        ids = torch.randint(3, vocabulary - 1, (1, 55), generator=generator)
        image = torch.full((1, vlm.config.V), vlm.image_token_id)
        pixels = torch.randn(1, 3, size, size, generator=generator)
        prompts.append({"input_ids": torch.cat([ids[:, :35], image, ids[:, 35:]], 1), "pixel_values": pixels})
    return prompts


# ---------------------------------------------------------------------- the machine and the parts


def bandwidth(device: torch.device, repeats: int = 7) -> float:
    """Bytes per second that a plain read of a large tensor reaches (median)."""
    size = 2**28 if device.type == "cpu" else 2**31
    data = torch.ones(size // 4, device=device)
    times = []
    for _ in range(repeats):
        start = now(device)
        data.sum()
        times.append(now(device) - start)
    return size / statistics.median(times)


def weight_bytes(trunk: Trunk) -> int:
    """What one plain step reads: decoder layers, norm and head."""
    parts = (trunk.layers, trunk.decoder.norm, trunk.model.lm_head)
    return sum(held_bytes(part) for part in parts)


def step_costs(
    vlm: TwigVLM, context: int, blocks: tuple[int, ...] = (1, 2, 4, 6, 8), repeats: int = 15
) -> dict[str, float]:
    """Milliseconds of a draft step (K + T layers, one token) and of verifying blocks, behind `context` tokens."""
    with torch.inference_mode():
        parts = Parts(vlm.trunk, vlm.twig, 1, context)
        work = {f"verify {n} token{'s' if n > 1 else ''}": parts.verifying(n) for n in blocks}
        if vlm.twig:
            work = {"draft 1 token": parts.drafting()} | work
        found = {name: times(part, vlm.device, repeats, 3, ENOUGH) for name, part in work.items()}
        return {name: 1e3 * statistics.median(seconds) for name, seconds in found.items()}


def open_model(args: argparse.Namespace) -> TwigVLM:
    """The model that the flags name."""
    if args.random is None:
        return twigvlm.load(**vars(flags.model_settings(args)))
    device, bits = pick_device(args.device), flags.model_settings(args).bits
    model = random_base(args.random, device, pick_dtype(args.dtype, device), args.attn_implementation, bits=bits)
    trunk = trunk_of(model)
    twig = grow(trunk, TwigConfig(trunk.L, DEFAULT_K if args.twig_K is None else args.twig_K, args.twig_T or DEFAULT_T))
    if args.draft_8bit:
        quantise(twig.layers, 8)
    return TwigVLM(Loaded(model, Path(), f"random {args.random}", True), twig)


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for flags that cannot be, before a model is opened."""
    for name, least in (("prompts", 1), ("repeats", 1), ("tokens", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}; {least} or more is needed")
    if args.assume_acceptance is not None and not 0 <= args.assume_acceptance <= 1:
        raise InputError(f"--assume-acceptance is {args.assume_acceptance:g}; 0 to 1 is needed")
    if args.random is not None and (args.base_model or args.twig_block):
        raise InputError("--random builds its own base and twig; leave --base-model and --twig-block away")
    if args.random is not None and args.short:
        raise InputError("--short asks about drawn pictures, which random weights know nothing of; leave it away")
    if args.out is not None and args.out.is_dir():
        raise InputError(f"--out {args.out}: is a folder; name a file")
    if args.out is not None:
        check_folder(args.out.parent, "--out")
    wish = Wish(**vars(flags.model_settings(args)), shape=args.random)
    trees_of(args)
    check(wish, options_of(args, wish.has_twig))


def trees_of(args: argparse.Namespace) -> list[str]:
    """Drafts that branch, as they are to be timed. Raises InputError for what is none."""
    asked = [*([args.tree] if args.tree else []), *(args.trees or [])]
    return list(dict.fromkeys(str(GenerationSettings(tree=tree).tree) for tree in asked))


def options_of(args: argparse.Namespace, has_twig: bool = True) -> dict:
    """Of `generate`."""
    tokens = args.tokens or (MIN_TOKENS if args.random is not None else DESCRIPTION_TOKENS)
    return flags.generation(args, has_twig) | {"max_new_tokens": tokens, "tree": None}


def measure(args: argparse.Namespace) -> dict:
    """All figures of one run."""
    check_flags(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    start = Clock.now()
    vlm = open_model(args)
    before = Clock.now()
    facts = {"load_seconds": round(before.wall - start.wall, 1)}
    endless = args.random is not None
    prompts = _random_prompts(vlm, args.prompts) if endless else _questions(vlm, args.prompts, args.short)
    bench = Bench(vlm, options_of(args), prompts, endless, args.assume_acceptance, trees_of(args))
    rows = bench.run(args.repeats)
    taken = Clock.now().cores_taken(before)
    speed, needed = bandwidth(vlm.device), weight_bytes(vlm.trunk)
    plain = next(r for r in rows if r["method"] == "plain")
    facts |= {
        "model": vlm.base_name, "settings": flags.resolved(args), "letters": vars(vlm.config), "R": args.retained_tokens, "dtype": str(vlm.dtype).removeprefix("torch."),
        "attention": args.attn_implementation, "prompts": args.prompts, "repeats": args.repeats, "draft_length": bench.length, "short": args.short,
        "simulated_acceptance": args.assume_acceptance, "cores_taken_by_others": None if taken is None else round(taken, 2),
    }  # fmt: skip
    limit = speed / needed
    facts["bandwidth"] = {
        "measured_GB_per_s": speed / 1e9,
        "weights_GB": needed / 1e9,
        "limit_tokens_per_s": limit,
        "plain_share_of_limit": plain["decode tokens/s"] / limit if plain["decode tokens/s"] else None,
    }
    facts |= {"rows": rows, "step_ms": step_costs(vlm, vlm.config.V + 55)}
    return provenance() | facts | {"peak_memory_GB": peak_memory(vlm.device) / 1e9}


def parse(argv: list[str] | None) -> argparse.Namespace:
    writing = flags.writing(leave=("max_new_tokens", "temperature", "top_k", "top_p"))
    parser = flags.parser(called("twigvlm.evaluation.speed"), __doc__, flags.model(), writing)
    parser.add_argument(
        "--random", metavar="SHAPE", help="random weights instead: llava-1.5-7b, llava-1.5-13b or WIDTHxLAYERS"
    )
    parser.add_argument("--tokens", type=int, help="longest answer (default: a whole description; 64 with --random)")
    parser.add_argument("--prompts", type=int, default=3, help="different pictures (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs per picture (default %(default)s)")
    parser.add_argument(
        "--assume-acceptance", type=float, metavar="P", help="a seeded coin accepts drafts; figures are simulated"
    )
    parser.add_argument(
        "--trees",
        nargs="+",
        metavar="E,W,D,N",
        help="time these drafts that branch as well, beside the chain (or auto)",
    )
    parser.add_argument("--short", action="store_true", help="ask for a number instead of a description")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--json", action="store_true", help="end with the JSON line on a terminal too")
    return flags.parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: _print_speed(parse(argv)))


def _print_speed(args: argparse.Namespace) -> None:
    tell(measure(args), args, show)


def tell(facts: dict, args: argparse.Namespace, show: Callable[[dict], None]) -> None:
    """Figures of a benchmark as its flags --out and --json want them, and a word where others disturbed it."""
    if args.out:
        write_json(facts, args.out)
    try:
        show(facts)
        if args.out:
            print(f"result: {args.out}")
    finally:  # the figures are worth having without their table
        print_json(facts, args.json)
    if warning := loaded(facts):
        print(warning, file=sys.stderr, flush=True)


def loaded(facts: dict) -> str:
    """What to say where others took of the CPU what was needed here; "" on a machine that is quiet enough."""
    taken, have = facts["cores_taken_by_others"], os.cpu_count() or 1
    if taken is None or taken + facts["threads"] < have + LOADED:
        return ""
    return (
        f"warning: other programs kept {taken:.1f} of {have} cores busy while {facts['threads']} threads were measured "
        "here; these figures are too low, measure again on a quiet machine"
    )


def show(facts: dict) -> None:
    """The table for people."""
    letters = ", ".join(f"{k}={v}" for k, v in facts["letters"].items())
    print(f"{facts['model']} ({letters}), R={facts['R']:g}, {facts['dtype']}, {facts['attention']}")
    print(
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, transformers {facts['transformers']}\n"
    )
    print(table([{k: v for k, v in row.items() if k != "hits by depth"} for row in facts["rows"]], digits=2))
    for row in facts["rows"]:
        if row.get("hits by depth"):
            hits = " ".join(f"{100 * rate:.0f}" for rate in row["hits by depth"])
            print(f"{row['method']}: right at each depth, of those right before, {hits} %")
    b = facts["bandwidth"]
    share = f"{100 * b['plain_share_of_limit']:.0f} %" if b["plain_share_of_limit"] else "-"
    print(
        f"\nmemory {b['measured_GB_per_s']:.1f} GB/s, weights {b['weights_GB']:.3f} GB: at most {b['limit_tokens_per_s']:.1f} "
        f"tokens/s at batch 1 without drafts; plain decoding reaches {share} of it"
    )
    print(f"loaded in {facts['load_seconds']:.0f} s, {facts['peak_memory_GB']:.2f} GB at most")
    print("step costs in ms: " + ", ".join(f"{k} {v:.1f}" for k, v in facts["step_ms"].items()))


if __name__ == "__main__":
    sys.exit(main())
