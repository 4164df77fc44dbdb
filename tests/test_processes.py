"""Which of many processes this one is, by flags, torchrun or Slurm; and how it is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from twigvlm import processes
from twigvlm.errors import InputError
from twigvlm.processes import Stop, guarded, place, rank_of


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "6", "SLURM_ARRAY_TASK_MIN": "0"}, (5, 6, None)),
        ({"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "10"}, (2, 3, None)),
        ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}, (9, 16, 1)),
        (
            {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"},
            (7, 8, 0),
        ),
    ],
)
def test_a_process_of_many_knows_its_part(env, expected):
    placement = place(None, None, env)
    assert (placement.parts[0], placement.count, placement.local) == expected
    assert not placement.launch and not placement.alone
    flags = place(4, 2, env)
    assert (flags.parts, flags.count) == ((2,), 4)  # flags come first
    with pytest.raises(InputError, match="--num-shards is 99"):
        place(99, None, env)


def test_alone_one_process_does_everything():
    for env in ({}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}):
        placement = place(None, None, env, "cpu")
        assert placement.parts == (0,) and placement.alone and not placement.launch
    with pytest.raises(InputError, match="RANK is 'x'"):
        place(None, None, {"RANK": "x", "WORLD_SIZE": "2"})


def test_one_part_per_visible_device(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    placement = place(None, None, {"CUDA_VISIBLE_DEVICES": "4,6,7"})
    assert placement.count == 3 and placement.launch and placement.devices == ("4", "6", "7")
    assert place(None, None, {}).devices == ("0", "1")
    assert place(None, None, {"CUDA_VISIBLE_DEVICES": "5"}).launch is False
    assert place(None, None, {"CUDA_VISIBLE_DEVICES": "4,6"}, "cuda:1").count == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(processes, "cores", lambda: 2)
    assert place(None, None, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}).count == 2
    assert "no CUDA" in capsys.readouterr().out


def test_an_array_is_one_whole_or_many():
    env = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"}
    assert (rank_of(env).index, rank_of(env).count) == (7, 8)
    assert (rank_of(env, arrays=False).index, rank_of(env, arrays=False).count) == (3, 4)
    assert rank_of({name: env[name] for name in list(env)[:2]}, arrays=False) is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_the_work_at_a_clean_place(name):
    number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))

    def work(stop: Stop) -> int:
        assert not stop
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # once from the terminal, once from the launcher: still one wish
        return stop.code if stop else 0

    assert guarded(work) == 128 + number
    assert signal.getsignal(number) is before


def test_orphans_stop(monkeypatch):
    monkeypatch.setenv(processes.PARENT, str(os.getppid()))
    assert not Stop()
    monkeypatch.setenv(processes.PARENT, "1" if os.getppid() != 1 else "2")
    assert Stop()


def test_needs_no_torch():
    code = "import sys, twigvlm.processes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
