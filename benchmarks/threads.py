"""How should torch's threads wait for one another? Tokens/s of a description under each setting, quiet and beside busy cores.

    python benchmarks/threads.py [--busy 0,1,2] [--answers 8]

Every figure is the median of a process of its own (two threads, after a warm-up), since the setting is read when torch
is loaded. twigvlm.threads leaves the default where every thread has a core, and sets 1000 turns where not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from pathlib import Path

from twigvlm import flags

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "torch's default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in (1000, 3000, 10_000, 30_000)},
}


def answers(count: int) -> None:
    """In a process of its own: print the tokens/s of each answer."""
    import torch  # noqa: F401  (first, so that the package leaves the setting alone)

    import twigvlm

    vlm = twigvlm.load(device="cpu")
    inputs = vlm.prepare(ROOT / "assets" / "image.png", "Describe the image in detail.")
    for _ in range(count + 1):
        print(vlm.generate(**inputs, retained_tokens=64).stats.tokens_per_second, flush=True)


def measure(setting: dict[str, str], count: int) -> float:
    known = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    env = {k: v for k, v in os.environ.items() if k not in known} | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--inside", "--answers", str(count)]
    out = subprocess.run(command, env=env | setting, capture_output=True, text=True, check=True)
    return statistics.median(map(float, out.stdout.split()[1:]))


@contextlib.contextmanager
def busy(cores: int):
    """So many other processes that do nothing else."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", default="0,1,2", help="cores that others keep busy (default %(default)s)")
    parser.add_argument("--answers", type=int, default=8, help="of each process (default %(default)s)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse(parser, None)
    if args.inside:
        return answers(args.answers)
    for cores in map(int, args.busy.split(",")):
        with busy(cores):
            for name, setting in SETTINGS.items():
                print(
                    f"{cores} busy, load {os.getloadavg()[0]:.1f}, {name}: {measure(setting, args.answers):.1f} tokens/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
