"""Shared by the tests of training: a world of tiny random weights, trainings in this process and in others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_model, tiny_tokenizer, write_base
from PIL import Image
from safetensors.torch import load_file
from warm import Program

from twigvlm.training import train

WORDS = ("red", "the dog", "a ring there", "the end at last", "there are three")
PATIENCE = 900  # seconds; loaded machines are slow
TRAIN = "twigvlm.training.train"
HIDDEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "MASTER_PORT", "MASTER_ADDR", "HOSTFILE",
          "DS_ACCELERATOR")  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A tiny base (6 layers, 4 visual tokens), 24 conversations of all kinds, their pictures."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_model(vocabulary=len(tiny_tokenizer()), context=1024)
    write_base(folder / "base", model)
    (folder / "images").mkdir()
    records = []
    for i in range(24):
        turns = []
        for turn in range(1 + i % 3):
            turns += [("human", f"is it {WORDS[(i + turn) % 5]}?"), ("gpt", WORDS[(i + 2 * turn) % 5])]
        record = {"id": f"sample {i}"}
        if i % 4:
            record["image"] = f"{i}.png"
            turns[0] = ("human", f"<image>\n{turns[0][1]}")
            Image.new("RGB", (20 + i, 40), (10 * i, 90, 250 - 9 * i)).save(folder / "images" / f"{i}.png")
        record["conversations"] = [{"from": who, "value": text} for who, text in turns]
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def quietly(argv: list[str], main: Callable[[list[str]], int] = train.main) -> int:
    """A training in this process, or its launcher, which leaves signals as they were; its exit code."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return main(argv)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@pytest.fixture
def run(world, tmp_path, capfd):
    """Train in this process: run(name, flags...) gives (exit code, what it printed)."""

    def go(name: str, *flags: str, data: str | Path = "", base: str | Path = "") -> tuple[int, str]:
        argv = ["--base", str(base or world / "base"), "--data", str(data or world / "data.json")]
        argv += ["--images", str(world / "images"), "--out", str(tmp_path / name), "--device", "cpu"]
        argv += [
            "--precision",
            "fp32",
            "--batch-size",
            "4",
            "--per-device-batch",
            "2",
            "--lr",
            "1e-2",
            "--workers",
            "0",
        ]
        code = quietly([*argv, "--no-tensorboard", *flags])
        said = capfd.readouterr()
        return code, said.out + said.err

    return go


# ---------------------------------------------------------------------- in other processes


def environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in HIDDEN}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return {**env, **more}


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def flags_into(world: Path, out: Path, *more: str) -> list[str]:
    """Of a training into `out`: 12 steps of 4 samples."""
    where = ["--base", str(world / "base"), "--data", str(world / "data.json"), "--images", str(world / "images")]
    how = ["--out", str(out), "--device", "cpu", "--precision", "fp32", "--lr", "1e-3", "--workers", "1"]
    return [*where, *how, "--batch-size", "4", "--per-device-batch", "1", "--epochs", "2", "--held-out", "0", *more]


@pytest.fixture
def flags(world, tmp_path):
    """Of a training into tmp_path/name."""
    return lambda name, *more: flags_into(world, tmp_path / name, *more)


def start(command: list[str], **env: str) -> subprocess.Popen | Program:
    """A program in a session of its own; one of Python finds its libraries loaded."""
    if command[0] == sys.executable:
        return Program(command[1:], ROOT, environment(**env), merged=True)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen | Program) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        pytest.fail(f"still running after {PATIENCE} s:\n{said[-3000:]}")
    return process.returncode, said


def start_ranks(command: list[str]) -> list[Program]:
    """Two processes as torchrun starts them."""
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    return [start(command, **where, RANK=str(i), LOCAL_RANK=str(i)) for i in range(2)]


def ranks(command: list[str]) -> tuple[int, str]:
    """Of two such processes the exit code of the first that failed, and what they said one after the other."""
    ends = [finish(one) for one in start_ranks(command)]
    return next((code for code, _ in ends if code), 0), "".join(said for _, said in ends)


def python(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def torchrun(*words: str) -> list[str]:
    return python("torch.distributed.run", "--nproc-per-node", "2", "--master-port", port(), "-m", *words)


@pytest.fixture(scope="session")
def reference(world, tmp_path_factory) -> Callable[[str], tuple[Path, str]]:
    """The folder of an undisturbed training and what it said, made once: "single", one process with accumulation 4,
    or a ZeRO mode with two processes.
    """
    made: dict[str, tuple[Path, str]] = {}

    def get(mode: str) -> tuple[Path, str]:
        if mode not in made:
            out = tmp_path_factory.mktemp("reference") / mode
            zero = "none" if mode == "single" else mode
            command = python(TRAIN, *flags_into(world, out, "--zero", zero))
            code, said = finish(start(command)) if mode == "single" else ranks(command)
            assert code == 0, said
            made[mode] = out, said
        return made[mode]

    return get


def twig_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def apart(one: Path, other: Path) -> float:
    a, b = twig_of(one), twig_of(other)
    assert a.keys() == b.keys()
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)
