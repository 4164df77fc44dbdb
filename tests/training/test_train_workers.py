"""A failure in a process that loads training data ends every process of the run."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest
import warm
from conftest import ROOT
from test_workers import DEATHS, HOW, fail, gone, told

from twigvlm.errors import RunError
from twigvlm.training.data import examples as training_data
from twigvlm.training.data import survey

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FEW = ("KeyError", "unpicklable", "killed")  # one that is told, one that cannot be sent, one that dies
HOWS, DEAD = (
    [how if how in few else pytest.param(how, marks=pytest.mark.nightly) for how in HOW] for few in (FEW, FEW[2:])
)


def _failing(dataset, indices):
    if 2 in indices:
        fail(dataset.how)
    return list(indices)


@pytest.mark.parametrize("how", HOW)
def test_a_survey(how):
    dataset = SimpleNamespace(how=how, records=SimpleNamespace(path="data.json"))
    with pytest.raises(RunError) as caught:
        list(survey.in_parts(_failing, dataset, range(6), 2, None, 1))
    assert ("worker process died" if how in DEATHS else told(how)) in str(caught.value)


# ---------------------------------------------------------------------- training


@pytest.fixture
def spoilt(monkeypatch):
    """Make the fourth sample that a process prepares fail."""

    def spoil(how: str) -> None:
        real, seen = training_data.TwigDataset._pixels, []

        def pixels(self, i):
            seen.append(i)
            if len(seen) == 4:
                fail(how)
            return real(self, i)

        monkeypatch.setattr(training_data.TwigDataset, "_pixels", pixels)

    return spoil


@pytest.mark.parametrize("how", ["SystemExit", "MemoryError", *HOWS])
def test_training(run, spoilt, how):
    spoilt(how)
    start = time.monotonic()
    code, said = run("out", "--workers", "1", "--held-out", "0")
    last = said.strip().splitlines()[-1]
    assert code == 1 and last.startswith("error: ") and told(how) in last and "Traceback" not in said, said
    assert "per-device-batch" not in last and (how in DEATHS or "sample" in last)
    assert time.monotonic() - start < 60 and gone()


def test_a_memory_that_is_full_names_the_sample(run, spoilt):
    spoilt("MemoryError")
    code, said = run("out", "--workers", "0", "--held-out", "0")
    assert code == 1 and "MemoryError" in said and "data.json, sample " in said and "per-device-batch" not in said


SPOILT = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
from test_workers import fail
from twigvlm.training import train
from twigvlm.training.data import examples as data
real, seen = data.TwigDataset._pixels, []
def pixels(self, i):
    seen.append(i)
    if len(seen) == 4 and os.environ.get("RANK") == "1":
        fail({how!r})
    return real(self, i)
data.TwigDataset._pixels = pixels
sys.exit(train.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", DEAD)
def test_training_with_two_ranks(world, tmp_path, how):
    """The second one's worker fails; both end, and torchrun with them."""
    script = tmp_path / "spoilt.py"
    script.write_text(SPOILT.format(how=how, tests=str(ROOT / "tests"), root=str(ROOT)))
    words = [
        "--base",
        world / "base",
        "--data",
        world / "data.json",
        "--images",
        world / "images",
        "--out",
        tmp_path / "out",
    ]
    words += [
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--zero",
        "none",
        "--batch-size",
        "4",
        "--per-device-batch",
        "1",
        "--epochs",
        "9",
        "--workers",
        "1",
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))} | {"OMP_NUM_THREADS": "1"}
    done = warm.run([*launch, *words, "--held-out", "0"], tmp_path, env, timeout=300)
    assert done.returncode == 1 and told(how) in done.stderr, done.stderr
    names = [line for line in done.stderr.splitlines() if line.startswith("error: ") and told(how) in line]
    assert len(names) == 1 and "Exception ignored" not in done.stderr, done.stderr
