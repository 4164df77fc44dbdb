"""What pruning costs and saves: CPU time of a prefill under every method, and the share of it that goes into choosing.

    python benchmarks/pruning_cost.py [--random 1024x24] [-R 64] [--repeats 5] [--out FILE.json]

One thread, one prompt, one token written; the methods take turns, unpruned among them, and a median is shown. CPU time
is measured, not the clock, since it is what others at work on the machine change least. "choosing" is reading scores
off a layer, the rule, cutting, and of a method before the decoder the reducer with its projection of what is left; the
twig's own layers are not in it. Beside it stand the operations that `Plan.cost` counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from twigvlm.config import TwigConfig
from twigvlm.decoding import prefill
from twigvlm.errors import InputError
from twigvlm.evaluation.speed import _random_prompts, open_model
from twigvlm.files import write_json
from twigvlm.pruning import METHODS, Plan, plan_for
from twigvlm.pruning.cost import Sizes
from twigvlm.record import provenance, table

UNPRUNED = "unpruned"


class Watch:
    """CPU seconds inside some functions, calls within calls counted once."""

    def __init__(self):
        self.seconds, self.depth = 0.0, 0

    def around(self, function):
        def timed(*args, **kwargs):
            self.depth += 1
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.process_time() - start

        return timed

    @contextmanager
    def on(self, plan: Plan):
        watched = [(prefill.State, "_hear"), (prefill.State, "cut")]
        watched += [(type(plan.tower), "__call__")] if plan.tower is not None else []
        parts = [patch.object(home, name, self.around(getattr(home, name))) for home, name in watched]
        for part in parts:
            part.start()
        try:
            yield
        finally:
            for part in parts:
                part.stop()


def plan_of(vlm, method: str, R: float) -> Plan:
    if method == UNPRUNED:
        return Plan()
    return plan_for(method, R, vlm.config.V, TwigConfig(vlm.config.L, vlm.config.K, vlm.config.T, vlm.config.F))


def once(vlm, prompt: dict, method: str, R: float) -> tuple[float, float]:
    """CPU seconds of a prefill, and of choosing in it."""
    asked = {} if method == UNPRUNED else {"retained_tokens": R, "pruning": method, "seed": 0}
    watch = Watch()
    with watch.on(plan_of(vlm, method, R)):
        start = time.process_time()
        vlm.generate(**prompt, **asked, draft_length=0, max_new_tokens=1, eos_token_id=[])
        return time.process_time() - start, watch.seconds


def measure(vlm, prompt: dict, methods: list[str], R: float, repeats: int) -> tuple[list[dict], dict[str, str]]:
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in [UNPRUNED, *methods]}
    refused = {}
    for turn in range(repeats + 1):
        for name in list(runs):
            try:
                found = once(vlm, prompt, name, R)
            except InputError as reason:
                refused[name] = str(reason)
                del runs[name]
                continue
            if turn:  # the first is a warm-up
                runs[name].append(found)
    text = prompt["input_ids"].shape[1] - vlm.config.V
    sizes = Sizes.of(vlm.model.config, vlm.config.K, vlm.config.T, element=vlm.dtype.itemsize)
    whole = statistics.median(seconds for seconds, _ in runs[UNPRUNED])
    rows = []
    for name, found in runs.items():
        seconds, choosing = (statistics.median(part) for part in zip(*found, strict=True))
        cost = plan_of(vlm, name, R).cost(sizes, text)
        rows.append({
            "method": name, "prefill, ms": 1e3 * seconds, "of unpruned": seconds / whole,
            "choosing, %": 100 * choosing / seconds, "counted, GFLOP": cost.flops / 1e9, "cache, MB": cost.cache_bytes / 1e6,
        })  # fmt: skip
    return rows, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", metavar="SHAPE", help="random weights, as twigvlm.evaluation.speed makes them")
    parser.add_argument("-R", type=float, default=64, help="budget (default %(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: all")
    parser.add_argument("--repeats", type=int, default=5, help="of each method (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = {"device": "cpu", "dtype": None, "attn_implementation": "sdpa", "base": None, "twig": None}
    model = argparse.Namespace(random=args.random, twig_K=None, twig_T=None, **names)
    if args.random is None:
        import twigvlm

        vlm = twigvlm.load(device="cpu")
    else:
        vlm = open_model(model)
    rows, refused = measure(vlm, _random_prompts(vlm, 1)[0], args.methods.split(","), args.R, args.repeats)
    print(table(rows, digits=2))
    for name, reason in refused.items():
        print(f"{name}: {reason}")
    if args.out is not None:
        write_json({"provenance": provenance(), "R": args.R, "rows": rows, "refused": refused}, args.out)


if __name__ == "__main__":
    main()
