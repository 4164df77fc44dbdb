"""What a server answers to many at once: python -m twigvlm.serving.benchmark.

Batches share each reading of the weights, so that tokens a second grow with those who ask, as long as arithmetic is not
the bound; who asks alone waits no longer for it. The server runs in this process behind a real socket, clients are
threads that ask one thing after the other, over HTTP and as a stream. "one by one" is the same server with batches of
one: what waiting in a row costs. stdout ends with one JSON line where it is no terminal, or with --json.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .settings import ServerSettings

MODEL = "model"
FEW = 3  # requests that warm up
SHARES = {"median": 50, "p90": 90}


@dataclass(frozen=True)
class Timing:
    """One request, as its client saw it."""

    first: float  # seconds to the first word
    total: float
    tokens: int


def parse(argv: list[str] | None) -> argparse.Namespace:
    from .. import flags

    writing = flags.writing(leave=("max_new_tokens", "temperature", "top_k", "top_p", "seed"))
    from ..program import called

    parser = flags.parser(called("twigvlm.serving.benchmark"), __doc__, flags.model(), writing)
    flags.add_switches(parser)
    add = parser.add_argument
    add("--random", metavar="SHAPE", help="random weights instead: llava-1.5-7b, llava-1.5-13b or WIDTHxLAYERS")
    add("--clients", type=int, nargs="+", default=[1, 4, 16], help="how many ask at once, in turn (default 1 4 16)")
    add("--requests", type=int, default=32, help="requests in all for each number of clients (default %(default)s)")
    add("--tokens", type=int, default=64, help="longest answer (default %(default)s); exactly so long with --random")
    add("--max-batch", type=int, default=16, help="requests that are answered together (default %(default)s)")
    add("--max-wait-ms", type=float, default=25.0, help="milliseconds to wait for others (default %(default)s)")
    add("--threads", type=int, help="CPU threads (default: all)")
    add("--out", type=Path, help="also write the JSON to this file")
    add("--json", action="store_true", help="end with the JSON line on a terminal too")
    return flags.parse(parser, argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for flags that cannot be, before a model is opened."""
    from .. import flags
    from ..errors import InputError
    from ..foresight import Wish, check

    for name in ("requests", "tokens", "max_batch", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; 1 or more is needed")
    if min(args.clients) < 1:
        raise InputError(f"--clients are {' '.join(map(str, args.clients))}; 1 or more each is needed")
    if args.random is not None and (args.base_model or args.twig_block):
        raise InputError("--random builds its own base and twig; leave --base-model and --twig-block away")
    if args.out is not None and args.out.is_dir():
        raise InputError(f"--out {args.out}: is a folder; name a file")
    wish = Wish(**vars(flags.model_settings(args)), shape=args.random)
    check(wish, flags.generation(args, wish.has_twig or args.random is not None))


def open_model(args: argparse.Namespace):
    """The model that flags name; one of random weights speaks the embedded model's words and never comes to an end."""
    from ..evaluation import speed
    from ..loading.describe import EMBEDDED_BASE
    from ..prompt.processor import make_processor

    vlm = speed.open_model(args)
    if args.random is not None:
        vlm.processor = make_processor(vlm.model.config, EMBEDDED_BASE, False)
        vlm.model.generation_config.eos_token_id = []
    return vlm


def bodies(count: int, tokens: int) -> list[bytes]:
    """Requests about as many drawn pictures."""
    from ..world.draw import draw
    from ..world.scenes import sample_scene

    made = []
    for seed in range(count):
        out = io.BytesIO()
        draw(sample_scene("test", seed)).save(out, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "Describe the image in detail."},
        ]
        body = {"model": MODEL, "messages": [{"role": "user", "content": parts}], "max_tokens": tokens}
        made.append(json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode())
    return made


@contextmanager
def server(vlm, options: dict, most: int, wait: float, queue: int) -> Iterator[tuple[str, int, Counter]]:
    """(host, port, rows of batches → how many there were) of a server in a thread."""
    from . import listen
    from .desk import Desk

    settings = ServerSettings(
        port=0, model_name=MODEL, max_batch=most, max_wait_ms=wait, max_queue=queue, timeout=3600.0
    )
    desk = Desk(vlm, options, settings)
    with listen.bind(settings) as sock:
        running = listen.make_server(desk)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            yield (*sock.getsockname()[:2], desk.engine.batches)
        finally:
            running.should_exit = True
            thread.join()
            desk.close()


def ask(host: str, port: int, body: bytes) -> Timing:
    """Raises RunError where the answer is none."""
    from ..errors import RunError

    start, first, tokens = time.perf_counter(), None, None
    connection = http.client.HTTPConnection(host, port, timeout=3600)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RunError(f"the server answered {answer.status}: {answer.read(500).decode(errors='replace')}")
        for line in answer:
            first = first or time.perf_counter()
            if line.startswith(b"data: {"):
                tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", tokens)
    finally:
        connection.close()
    if tokens is None:
        raise RunError("a stream ended without its usage")
    return Timing(first - start, time.perf_counter() - start, tokens)


def crowd(host: str, port: int, clients: int, asked: Sequence[bytes], progress) -> tuple[list[Timing], float]:
    """All requests by so many clients, and the seconds that it took."""
    left, found, faults = list(asked), [], []

    def client() -> None:
        while left and not faults:
            try:
                found.append(ask(host, port, left.pop()))
                progress.update()
            except IndexError:
                return
            except Exception as fault:
                faults.append(fault)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return found, time.perf_counter() - start


def summary(clients: int, way: str, timings: Sequence[Timing], seconds: float, batches: Counter) -> dict:
    import numpy as np

    row = {"clients": clients, "answered": way, "tokens/s": sum(t.tokens for t in timings) / seconds}
    row["requests/s"] = len(timings) / seconds
    for name, values in (("first token s", [t.first for t in timings]), ("answer s", [t.total for t in timings])):
        row |= {f"{name} {share}": float(np.percentile(values, at)) for share, at in SHARES.items()}
    return row | {"rows a batch": sum(n * k for n, k in batches.items()) / max(1, sum(batches.values()))}


def rows_of(vlm, options: dict, args: argparse.Namespace) -> list[dict]:
    from tqdm import tqdm

    asked = bodies(max(args.requests, *args.clients), args.tokens)
    ways = [(n, way) for n in args.clients for way in (("one by one", "together") if n > 1 else ("one by one",))]
    rows: list[dict] = []
    with tqdm(total=len(asked) * len(ways), desc="serving", leave=False) as progress:
        for clients, way in ways:
            most = args.max_batch if way == "together" else 1
            with server(vlm, options, most, args.max_wait_ms, len(asked)) as (host, port, batches):
                crowd(host, port, min(clients, FEW), asked[:FEW], tqdm(disable=True))
                batches.clear()
                timings, seconds = crowd(host, port, clients, asked, progress)
                rows.append(summary(clients, way, timings, seconds, batches))
            alone = next(row for row in rows if row["clients"] == clients)
            rows[-1]["x one by one"] = rows[-1]["tokens/s"] / alone["tokens/s"]
    return rows


def measure(args: argparse.Namespace) -> dict:
    """All figures of one run."""
    import torch

    from .. import flags
    from ..record import provenance
    from ..threads import Clock

    if args.threads:
        torch.set_num_threads(args.threads)
    vlm = open_model(args)
    options = flags.generation(args, vlm.twig is not None) | {"max_new_tokens": args.tokens}
    before = Clock.now()
    rows = rows_of(vlm, options, args)
    taken = Clock.now().cores_taken(before)
    facts = {
        "model": vlm.base_name, "settings": flags.resolved(args), "letters": vars(vlm.config), "R": options["retained_tokens"],
        "dtype": str(vlm.dtype).removeprefix("torch."), "requests": args.requests, "tokens": args.tokens,
        "cores_taken_by_others": None if taken is None else round(taken, 2),
    }  # fmt: skip
    return provenance() | facts | {"rows": rows}


def show(facts: dict) -> None:
    """The table for people."""
    from ..record import table

    letters = ", ".join(f"{name}={value}" for name, value in facts["letters"].items())
    R = "no pruning" if facts["R"] is None else f"R={facts['R']:g}"
    print(
        f"{facts['model']} ({letters}), {R}, {facts['dtype']}, {facts['requests']} requests of up to {facts['tokens']} tokens"
    )
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}\n")
    print(table(facts["rows"], digits=2))


def run(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    from ..evaluation.speed import tell
    from . import listen

    listen.need()
    check_flags(args)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tell(measure(args), args, show)


def main(argv: list[str] | None = None) -> int:
    from ..program import run_program

    return run_program(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
