"""What pruning costs and saves: CPU time of a prefill under every method, and the share of it that scoring and choosing take.

    python benchmarks/pruning_cost.py [--random 1024x24] [-R 64] [--repeats 5] [--out FILE.json]

One thread, one prompt, one token written; the methods take turns, unpruned among them, and a median is shown. CPU time
is measured, not the clock, since it is what others at work on the machine change least. "scoring" is reading attention
rows off a layer; "choosing" is that, the rule, merging and cutting, and of a method before the decoder the reducer with
its projection of what is left; the twig's own layers are in neither. Beside it stand the operations that `Plan.cost`
counts; of a method whose budget depends on the picture they are the most that it may need.

Thresholds are fitted to R on the prompt itself; CDPruner is asked with its stand-in for CLIP's text tower, and VisionZip*
with the base's own projector as a tuned one, which costs the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from twigvlm.config import TwigConfig  # isort: skip  (before torch: it says how threads wait)

import torch

from twigvlm.decoding import prefill
from twigvlm.errors import InputError
from twigvlm.evaluation.asking.calibration import entering, fit
from twigvlm.evaluation.speed import _random_prompts, open_model
from twigvlm.files import CHECKOUT, write_json
from twigvlm.loading.projector import write_projector
from twigvlm.model.twig import signature
from twigvlm.pruning import METHODS, Plan, Shape, plan_for
from twigvlm.pruning.calibrated import missing
from twigvlm.pruning.cost import Sizes
from twigvlm.record import provenance, table

UNPRUNED = "unpruned"
QUESTION = "What is written on the sign?"


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
def watched(scoring: Watch, choosing: Watch, plan: Plan):
    """While it lasts, both watches run in what they watch."""
    on = [
        (prefill.State, "_hear", (scoring, choosing)),
        (prefill.State, "_seen", (scoring,)),
        (prefill.State, "cut", (choosing,)),
    ]
    on += [(type(plan.tower), "__call__", (choosing,))] if plan.tower is not None else []
    with ExitStack() as stack:
        for home, name, watches in on:
            function = getattr(home, name)
            for watch in watches:
                function = watch.around(function)
            stack.enter_context(patch.object(home, name, function))
        yield


def ready(vlm, prompt: dict, name: str, R: float, folder: Path) -> str:
    """The method with what it cannot do without."""
    if name == "cdpruner":
        return "cdpruner:stand_in"
    if name == "visionzip*":
        facts = {"base": vlm.base_name, "base_signature": signature(vlm.trunk), "pruning": "visionzip", "R": R}
        write_projector(folder, vlm.trunk.model.model.multi_modal_projector.state_dict(), facts)
        return f"visionzip*:projector={folder}"
    method = METHODS[name]()
    if not missing(method):
        return name
    c = vlm.config
    shape = Shape(c.L, c.V, c.K or 0, c.F or c.L, vlm.base_name)
    pixels = prompt["pixel_values"].numpy()
    one = SimpleNamespace(ids=prompt["input_ids"].tolist(), pixels=pixels)
    found = fit(method, R, shape, lambda guess, _few: entering(vlm, guess, R, shape, one))
    return f"{name}:" + ",".join(f"{setting}={getattr(found, setting):g}" for setting in method.fitted)


def plan_of(vlm, method: str, R: float) -> Plan:
    if method == UNPRUNED:
        return Plan()
    return plan_for(method, R, vlm.config.V, TwigConfig(vlm.config.L, vlm.config.K, vlm.config.T, vlm.config.F))


def once(vlm, prompt: dict, method: str, R: float) -> tuple[float, float, float]:
    """CPU seconds of a prefill, and of scoring and choosing in it."""
    asked = {} if method == UNPRUNED else {"retained_tokens": R, "pruning": method, "seed": 0}
    scoring, choosing = Watch(), Watch()
    with watched(scoring, choosing, plan_of(vlm, method, R)):
        start = time.process_time()
        vlm.generate(**prompt, **asked, draft_length=0, max_new_tokens=1, eos_token_id=[])
        return time.process_time() - start, scoring.seconds, choosing.seconds


def measure(vlm, prompt: dict, methods: dict[str, str], R: float, repeats: int) -> tuple[list[dict], dict[str, str]]:
    """A row a method; `methods` are names and how each is asked. And the methods that cannot be had, with the reason."""
    methods = {UNPRUNED: UNPRUNED, **methods}
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in methods}
    refused = {}
    for turn in range(repeats + 1):
        for name in list(runs):
            try:
                found = once(vlm, prompt, methods[name], R)
            except InputError as reason:
                refused[name] = str(reason)
                del runs[name]
                continue
            if turn:  # the first is a warm-up
                runs[name].append(found)
    text = prompt["input_ids"].shape[1] - vlm.config.V
    headed = vlm.twig is not None and vlm.twig.pruning_head is not None
    sizes = Sizes.of(vlm.model.config, vlm.config.K, vlm.config.T, vlm.dtype.itemsize, headed)
    whole = statistics.median(seconds for seconds, *_ in runs[UNPRUNED])
    rows = []
    for name, found in runs.items():
        seconds, scoring, choosing = (statistics.median(part) for part in zip(*found, strict=True))
        cost = plan_of(vlm, methods[name], R).cost(sizes, text)
        rows.append({
            "method": name, "prefill, ms": 1e3 * seconds, "of unpruned": seconds / whole,
            "scoring, %": 100 * scoring / seconds, "choosing, %": 100 * choosing / seconds, "counted, GFLOP": cost.flops / 1e9, "cache, MB": cost.cache_bytes / 1e6,
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
    prompt = _random_prompts(vlm, 1)[0] if args.random else vlm.prepare(CHECKOUT / "assets" / "image.png", QUESTION)
    refused, methods = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.methods.split(","):
            try:
                methods[name] = ready(vlm, prompt, name, args.R, Path(folder)) if name in METHODS else name
            except InputError as reason:
                refused[name] = str(reason)
        rows, more = measure(vlm, prompt, methods, args.R, args.repeats)
    refused |= more
    print(table(rows, digits=2))
    for name, reason in refused.items():
        print(f"{name}: {reason}")
    if args.out is not None:
        asked = {name: words for name, words in methods.items() if words != name and name != "visionzip*"}
        facts = {"provenance": provenance(), "R": args.R, "asked": asked, "rows": rows, "refused": refused}
        write_json(facts, args.out)


if __name__ == "__main__":
    main()
