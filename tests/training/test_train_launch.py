"""Every way to start a training, with two processes on the CPU: the same weights as one process, and the same after a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_training import world  # noqa: F401 (a fixture)

import twigvlm
from twigvlm.training.run import checkpoints, report

pytestmark = pytest.mark.slow
pytest.importorskip("accelerate")
deepspeed = pytest.importorskip("deepspeed")

PATIENCE = 900  # seconds; loaded machines are slow
TRAIN = "twigvlm.training.train"


def environment(**more: str) -> dict[str, str]:
    hidden = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "SLURM_PROCID",
        "MASTER_PORT",
        "MASTER_ADDR",
        "HOSTFILE",
        "DS_ACCELERATOR",
    )
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return {**env, **more}


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def flags(world, tmp_path):  # noqa: F811
    """Of a training into tmp_path/name: 12 steps of 4 samples, half of them a micro-batch of each process."""

    def make(name: str, *more: str) -> list[str]:
        base = ["--base", str(world / "base"), "--data", str(world / "data.json"), "--images", str(world / "images")]
        base += [
            "--out",
            str(tmp_path / name),
            "--device",
            "cpu",
            "--precision",
            "fp32",
            "--lr",
            "1e-3",
            "--workers",
            "1",
        ]
        return [*base, "--batch-size", "4", "--per-device-batch", "1", "--epochs", "2", "--held-out", "0", *more]

    return make


def start(command: list[str], **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        pytest.fail(f"still running after {PATIENCE} s:\n{said[-3000:]}")
    return process.returncode, said


def python(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def torchrun(*words: str) -> list[str]:
    return python("torch.distributed.run", "--nproc-per-node", "2", "--master-port", port(), "-m", *words)


def twig_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def apart(one: Path, other: Path) -> float:
    a, b = twig_of(one), twig_of(other)
    assert a.keys() == b.keys()
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


@pytest.fixture
def single(flags, tmp_path) -> Path:
    """One process with accumulation 4."""
    code, said = finish(start(python(TRAIN, *flags("single", "--zero", "none"))))
    assert code == 0, said
    assert "batch 4 = 1 device x 1 samples x 4 accumulation" in said
    return tmp_path / "single"


def check(code: int, said: str, out: Path, single: Path, base: Path) -> None:
    """The losses of every step and the weights are those of one process, and the twig loads."""
    assert code == 0, said
    assert "Traceback" not in said, said
    assert "batch 4 = 2 devices x 1 samples x 2 accumulation" in said
    losses = [[t["loss"] for t in report.history(folder)] for folder in (out, single)]
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert apart(out, single) < 1e-5
    assert twigvlm.load(base, out, device="cpu").config.T == 3


@pytest.mark.parametrize("zero", ["none", "2", "3", "3_offload"])
def test_torchrun(flags, single, world, tmp_path, zero):  # noqa: F811
    code, said = finish(start(torchrun(TRAIN, *flags("two", "--zero", zero))))
    check(code, said, tmp_path / "two", single, world / "base")
    assert ("DDP" if zero == "none" else f"zero{zero}.json") in said


@pytest.mark.parametrize("zero", ["none", "3"])
def test_held_out_samples_are_shared(flags, tmp_path, zero):
    """Three batches of held-out samples for two processes: one repeats one, which is not counted."""
    more = ["--held-out", "3", "--agreement", "labels", "--agreement-steps", "1", "--max-steps", "3"]
    assert finish(start(python(TRAIN, *flags("one", *more, "--zero", "none"))))[0] == 0
    code, said = finish(start(torchrun(TRAIN, *flags("two", *more, "--zero", zero))))
    assert code == 0, said
    one, two = ([t["agreement"] for t in report.history(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 3 and one == pytest.approx(two, abs=1e-4)


def test_deepspeeds_launcher_with_a_hostfile(flags, single, world, tmp_path):  # noqa: F811
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    env = {"HOSTFILE": str(tmp_path / "hosts"), "MASTER_PORT": port()}
    code, said = finish(start(python("twigvlm.training.launch", *flags("two")), **env))
    check(code, said, tmp_path / "two", single, world / "base")
    assert "zero2.json" in said


def test_deepspeeds_own_command(flags, single, world, tmp_path):  # noqa: F811
    words = ["--num_gpus", "2", "--master_port", port(), "--module", TRAIN, *flags("two", "--zero", "3")]
    code, said = finish(start(python("deepspeed.launcher.runner", *words), DS_ACCELERATOR="cpu"))
    check(code, said, tmp_path / "two", single, world / "base")


def test_slurm(flags, single, world, tmp_path):  # noqa: F811
    """Two tasks as `srun` starts them; the job's number chooses the port."""
    job = str(int(port()) - 20000 + 20000 * (int(port()) < 20000))
    tasks = [
        start(
            ["bash", "scripts/v1_5/train_twig.sh", *flags("two")],
            SLURM_PROCID=str(i), SLURM_LOCALID=str(i), SLURM_NTASKS="2", SLURM_STEP_ID="0", SLURM_JOB_ID=job,
            SLURM_JOB_NODELIST="localhost", PYTHON=sys.executable,
        )
        for i in range(2)
    ]  # fmt: skip
    ends = [finish(task) for task in tasks]
    assert [code for code, _ in ends] == [0, 0], ends
    check(*ends[0], tmp_path / "two", single, world / "base")


def test_the_script_with_two_processes(flags, single, world, tmp_path):  # noqa: F811
    code, said = finish(
        start(
            ["bash", "scripts/v1_5/train_twig.sh", *flags("two")],
            NPROC_PER_NODE="2",
            twig_K="2",
            twig_T="3",
            PYTHON=sys.executable,
        )
    )
    check(code, said, tmp_path / "two", single, world / "base")


def test_two_machines_with_torchrun(flags, single, world, tmp_path):  # noqa: F811
    """Two agents on one machine, each with one process, as on two nodes."""
    where = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    nodes = [
        start(python("twigvlm.training.launch", *flags("two", "--zero", "none")), NODE_RANK=str(i), **where)
        for i in range(2)
    ]
    ends = [finish(node) for node in nodes]
    assert [code for code, _ in ends] == [0, 0], ends
    # The agent that keeps torchrun's own store may leave before the other has heard so, who then says it with a traceback.
    said = [line for _, text in ends for line in text.splitlines(keepends=True) if "elastic/agent/server" not in line]
    check(ends[0][0], "".join(said), tmp_path / "two", single, world / "base")


def wait_for(process: subprocess.Popen, out: Path, step: int) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if any(int(p.name.split("-")[1]) >= step for p in checkpoints.checkpoints(out)):
            return
        time.sleep(0.02)
    pytest.fail(f"no checkpoint of step {step}: {finish(process)[1][-3000:]}")


def children(pid: int) -> list[int]:
    """All processes below this one."""
    found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(g for p in found for g in children(p))]


def trainers(pid: int) -> list[int]:
    return [p for p in children(pid) if TRAIN in Path(f"/proc/{p}/cmdline").read_text().replace("\0", " ") and "LOCAL_RANK=" in
            Path(f"/proc/{p}/environ").read_text()]  # fmt: skip


@pytest.mark.parametrize("zero", ["none", "2", "3"])
@pytest.mark.parametrize("victim", ["rank", "all"])
def test_sigkill_of_a_rank_and_of_all(flags, tmp_path, zero, victim):
    more = ["--zero", zero, "--save-steps", "1", "--epochs", "3"]
    code, said = finish(start(torchrun(TRAIN, *flags("whole", *more))))
    assert code == 0, said
    process = start(torchrun(TRAIN, *flags("killed", *more)))
    wait_for(process, tmp_path / "killed", 3)
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(trainers(process.pid)[-1], signal.SIGKILL)
    code, said = finish(process)
    assert code != 0, said
    assert not (tmp_path / "killed/model.safetensors").exists()
    code, said = finish(start(torchrun(TRAIN, *flags("killed", *more))))
    assert code == 0 and "continuing from" in said, said
    assert apart(tmp_path / "whole", tmp_path / "killed") == 0.0


@pytest.mark.parametrize("zero", ["none", "2"])
def test_sigterm_to_the_launcher_saves_and_exits_with_0(flags, tmp_path, zero):
    more = ["--zero", zero, "--epochs", "3"]
    code, said = finish(start(python("twigvlm.training.launch", *flags("whole", *more)), NPROC_PER_NODE="2"))
    assert code == 0, said
    process = start(
        python("twigvlm.training.launch", *flags("stopped", "--save-steps", "1", *more)), NPROC_PER_NODE="2"
    )
    wait_for(process, tmp_path / "stopped", 2)
    process.terminate()
    code, said = finish(process)
    assert code == 0 and "stopped by SIGTERM" in said, said
    code, said = finish(
        start(python("twigvlm.training.launch", *flags("stopped", "--save-steps", "1", *more)), NPROC_PER_NODE="2")
    )
    assert code == 0 and "continuing from" in said, said
    assert apart(tmp_path / "whole", tmp_path / "stopped") == 0.0


def test_sigkill_of_the_script_and_the_same_command_again(flags, single, tmp_path):
    """One process: the script is the training, so that a kill of it leaves nothing running."""
    command = ["bash", "scripts/v1_5/train_twig.sh", *flags("killed", "--save-steps", "1")]
    process = start(command, PYTHON=sys.executable)
    wait_for(process, tmp_path / "killed", 4)
    process.kill()
    finish(process)
    code, said = finish(start(command, PYTHON=sys.executable))
    assert code == 0 and "continuing from" in said, said
    assert apart(single, tmp_path / "killed") == 0.0


def test_sigkill_of_the_launcher_takes_its_processes_along(flags, tmp_path):
    """Else they would train on, and the same command would find its folder in use."""
    command = python(
        "twigvlm.training.launch", *flags("killed", "--zero", "none", "--save-steps", "1", "--epochs", "3")
    )
    process = start(command, NPROC_PER_NODE="2")
    wait_for(process, tmp_path / "killed", 2)
    process.kill()
    finish(process)
    code, said = finish(start(command, NPROC_PER_NODE="2"))
    assert code == 0 and "continuing from" in said, said


def test_other_processes_cannot_take_over_shared_states(flags, tmp_path):
    process = start(torchrun(TRAIN, *flags("out", "--zero", "2", "--save-steps", "1")))
    wait_for(process, tmp_path / "out", 1)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    code, said = finish(start(python(TRAIN, *flags("out", "--zero", "none"))))
    assert code == 2 and "ZeRO stage 2" in said and "Traceback" not in said


def test_an_error_is_said_once_and_by_its_exit_code(flags, tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    code, said = finish(
        start(
            python("twigvlm.training.launch", *flags("out", "--data", str(tmp_path / "empty.json"))), NPROC_PER_NODE="2"
        )
    )
    assert code == 2, said
    assert said.count("error: ") == 1 and "holds no samples" in said and "Traceback" not in said
    code, said = finish(
        start(python("twigvlm.training.launch", *flags("out", "--batch-size", "5")), NPROC_PER_NODE="2")
    )
    assert code == 2 and "cannot be shared by 2 devices" in said and "Traceback" not in said


def test_bf16_with_fp32_states(flags, world, tmp_path):  # noqa: F811
    """Under autocast and under ZeRO-2: the loss falls, and small steps are not lost."""
    code, said = finish(start(python(TRAIN, *flags("plain", "--precision", "bf16", "--zero", "none"))))
    assert code == 0, said
    code, said = finish(start(torchrun(TRAIN, *flags("zero", "--precision", "bf16", "--zero", "2"))))
    assert code == 0, said
    for name in ("plain", "zero"):
        told = report.history(tmp_path / name)
        assert told[-1]["loss"] < told[0]["loss"]
        assert twigvlm.load(world / "base", tmp_path / name, device="cpu").config.K == 2
    state = torch.load(next((tmp_path / "zero").glob("checkpoint-*/*/*optim_states.pt")), weights_only=False)
    flat = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    assert all(t.dtype == torch.float32 for t in flat)


def test_the_embedded_base_by_default(tmp_path):
    """What a user types, cut to a few steps: draws, asks the base, trains, and the twig speaks for the embedded base."""
    code, said = finish(
        start(["bash", "scripts/v1_5/train_twig.sh", "--max-steps", "3", "--out", str(tmp_path / "out"), "--held-out", "4"],
              twig_K="2", twig_T="3", PYTHON=sys.executable, OMP_NUM_THREADS="2")
    )  # fmt: skip
    assert code == 0, said
    told = report.history(tmp_path / "out")
    assert told[-1]["agreement_with"] == "base" and told[-1]["loss"] < told[0]["loss"]
    finished = json.loads((tmp_path / "out/run.json").read_text())["finished"]
    assert finished["clock"]["waiting_share"] < 0.05
    assert twigvlm.load(None, tmp_path / "out", device="cpu").config.F == 24


def test_a_step_costs_little_more_than_its_parts(tmp_path):
    """On the embedded base, measured parts against whole steps; loading does not stall it."""
    code, said = finish(
        start(
            python(
                TRAIN, "--max-steps", "5", "--out", str(tmp_path / "out"), "--held-out", "1", "--agreement", "labels"
            ),
            OMP_NUM_THREADS="2",
        )
    )
    assert code == 0, said
    clock = json.loads((tmp_path / "out/run.json").read_text())["finished"]["clock"]
    assert clock["step_over_parts"] <= 1.15 and clock["waiting_share"] < 0.05, clock


def may_mount() -> bool:
    """Whether this user may put a small disk somewhere, in a name space of its own."""
    try:
        return (
            subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True).returncode
            == 0
        )
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_mount(), reason="needs unshare -rm and mount")
def test_a_disk_that_is_full(flags, single, tmp_path):
    """Room for one checkpoint and a half; then there is more, and the same command goes on."""
    size = sum(file.stat().st_size for file in (single / "checkpoint-12").iterdir())
    (tmp_path / "disk").mkdir()
    (tmp_path / "script").write_text(
        f"mount -t tmpfs -o size={size * 3 // 2} none {tmp_path}/disk\n"
        f'"$@"; echo "first: $?"; ls {tmp_path}/disk/two\n'
        f'mount -o remount,size=1g {tmp_path}/disk\n"$@"; echo "then: $?"\n'
        f"cp {tmp_path}/disk/two/model.safetensors {tmp_path}\n"
    )
    training = python(TRAIN, *flags("disk/two", "--zero", "none", "--save-steps", "4"))
    _, said = finish(start(["unshare", "-rm", "bash", str(tmp_path / "script"), *training]))
    first, then = said.split("first: 1\n")
    assert "Traceback" not in said and "checkpoint of step 8" in first and "last whole checkpoint" in first, said
    assert "checkpoint-4" in then and "then: 0" in then, said
    assert apart(tmp_path, single) == 0


def test_random_weights_compiled_or_not(world, tmp_path):  # noqa: F811
    """A shape without weights trains as a base does, and compiled layers learn the same."""
    told = []
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        words = ["--random", "64x8", "--data", str(world / "data.json"), "--images", str(world / "images")]
        words += ["--out", str(tmp_path / name), "--batch-size", "4", "--max-steps", "4", "--held-out", "0", *more]
        code, said = finish(start(python(TRAIN, *words, "--device", "cpu", "--precision", "fp32", "--zero", "none")))
        assert code == 0, said
        told.append([line["loss"] for line in report.history(tmp_path / name)])
    assert told[0] == pytest.approx(told[1], abs=1e-4) and told[0][-1] < told[0][0]


@pytest.mark.parametrize("zero", ["none", "2", "3"])
def test_a_loss_that_is_no_number_stops_all(flags, tmp_path, zero):
    """One rank meets it in the middle of step 4; all save the state before and say what to lower."""
    script = tmp_path / "spoilt.py"
    script.write_text(
        "import os, sys, torch\n"
        "from twigvlm.training import train, twig\n"
        "real, count = twig.TwigLesson.__call__, [0]\n"
        "def lesson(self, batch):\n"
        "    loss, figures = real(self, batch)\n"
        "    count[0] += 1\n"
        "    bad = count[0] == 8 and os.environ['RANK'] == '1'\n"
        "    return (loss * float('nan') if bad else loss), figures\n"
        "twig.TwigLesson.__call__ = lesson\n"
        "sys.exit(train.main())\n"
    )
    command = python("torch.distributed.run", "--nproc-per-node", "2", "--master-port", port(), str(script))
    code, said = finish(start([*command, *flags("out", "--zero", zero)]))
    assert code != 0 and "not finite at step 4" in said and "--lr" in said, said
    assert checkpoints.last_whole(tmp_path / "out")[0].name == "checkpoint-3"
    assert all(torch.isfinite(t).all() for t in twig_of(tmp_path / "out/checkpoint-3").values())
    code, said = finish(start(torchrun(TRAIN, *flags("out", "--zero", zero))))
    assert code == 0 and "continuing from" in said, said
    assert finish(start(torchrun(TRAIN, *flags("whole", "--zero", zero))))[0] == 0
    assert apart(tmp_path / "whole", tmp_path / "out") == 0.0
