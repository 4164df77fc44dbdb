"""Every way to start a training, with two processes on the CPU: the same weights as one process, and the same after a kill.

An undisturbed training of each kind is made once (`reference`), and the others are held against it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, telling

import twigvlm
from training.conftest import (
    PATIENCE,
    TRAIN,
    apart,
    finish,
    flags_into,
    port,
    python,
    quietly,
    ranks,
    start,
    start_ranks,
    torchrun,
    twig_of,
)
from twigvlm.model.twig import describe, stored_state, write_twig
from twigvlm.training import launch
from twigvlm.training.run import checkpoints, report
from twigvlm.training.twig import Start, prepare_twig

pytest.importorskip("accelerate")
deepspeed = pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
nightly = pytest.mark.nightly
LAUNCH, SCRIPT = "twigvlm.training.launch", ["bash", "scripts/v1_5/train_twig.sh"]


def check(code: int, said: str, out: Path, single: Path, base: Path) -> None:
    """The losses of every step and the weights are those of one process, and the twig loads."""
    assert code == 0, said
    assert "Traceback" not in said, said
    assert "batch 4 = 2 devices x 1 samples x 2 accumulation" in said
    losses = [[t["loss"] for t in report.history(folder)] for folder in (out, single)]
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert apart(out, single) < 1e-5
    assert twigvlm.load(base, out, device="cpu").config.T == 3


@pytest.mark.parametrize("zero", ["none", "2", "3", pytest.param("3_offload", marks=nightly)])
def test_two_processes_learn_as_one(reference, world, zero):
    out, said = reference(zero)
    check(0, said, out, reference("single")[0], world / "base")
    assert ("DDP" if zero == "none" else f"zero{zero}.json") in said


@pytest.mark.parametrize("zero", [pytest.param("none", marks=nightly), "3"])
def test_held_out_samples_are_shared(flags, tmp_path, zero):
    """Three batches of held-out samples for two processes: one repeats one, which is not counted."""
    more = ["--held-out", "3", "--agreement", "labels", "--agreement-steps", "1", "--max-steps", "3"]
    assert quietly(flags("one", *more, "--zero", "none")) == 0
    code, said = ranks(python(TRAIN, *flags("two", *more, "--zero", zero)))
    assert code == 0, said
    one, two = ([t["agreement"] for t in report.history(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 3 and one == pytest.approx(two, abs=1e-4)


def test_deepspeeds_launcher_with_a_hostfile(flags, reference, world, tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    env = {"HOSTFILE": str(tmp_path / "hosts"), "MASTER_PORT": port()}
    code, said = finish(start(python(LAUNCH, *flags("two")), **env))
    check(code, said, tmp_path / "two", reference("single")[0], world / "base")
    assert "zero2.json" in said


@nightly
def test_deepspeeds_own_command(flags, reference, world, tmp_path):
    words = ["--num_gpus", "2", "--master_port", port(), "--module", TRAIN, *flags("two", "--zero", "3")]
    code, said = finish(start(python("deepspeed.launcher.runner", *words), DS_ACCELERATOR="cpu"))
    check(code, said, tmp_path / "two", reference("single")[0], world / "base")


def scripted(folder: Path, *flags: str, **env: str) -> list[str]:
    """What the script starts, which a shell in place of Python tells."""
    code, said = finish(start([*SCRIPT, *flags], PYTHON=str(telling(folder)), **env))
    assert code == 0, said
    return [sys.executable, *said.splitlines()[1:]]


def test_slurm(flags, reference, world, tmp_path):
    """Two tasks as `srun` starts them; the job's number chooses the port."""
    job = str(int(port()) - 20000 + 20000 * (int(port()) < 20000))
    env = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "localhost"}
    command = scripted(tmp_path, *flags("two", "--zero", "none"))
    tasks = [start(command, **env, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    ends = [finish(task) for task in tasks]
    assert [code for code, _ in ends] == [0, 0], ends
    check(*ends[0], tmp_path / "two", reference("single")[0], world / "base")


@nightly
def test_the_script_with_two_processes(flags, reference, world, tmp_path):
    env = {"NPROC_PER_NODE": "2", "twig_K": "2", "twig_T": "3", "PYTHON": sys.executable}
    code, said = finish(start([*SCRIPT, *flags("two")], **env))
    check(code, said, tmp_path / "two", reference("single")[0], world / "base")


def test_two_machines_with_torchrun(flags, reference, world, tmp_path):
    """Two agents on one machine, each with one process, as on two nodes."""
    where = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    nodes = [start(python(LAUNCH, *flags("two", "--zero", "none")), NODE_RANK=str(i), **where) for i in range(2)]
    ends = [finish(node) for node in nodes]
    assert [code for code, _ in ends] == [0, 0], ends
    # The agent that keeps torchrun's own store may leave before the other has heard so, who then says it with a traceback.
    said = [line for _, text in ends for line in text.splitlines(keepends=True) if "elastic/agent/server" not in line]
    check(ends[0][0], "".join(said), tmp_path / "two", reference("single")[0], world / "base")


# ---------------------------------------------------------------------- killed, stopped, spoilt


def wait_for(process: subprocess.Popen, out: Path, step: int) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if any(int(p.name.split("-")[1]) >= step for p in checkpoints.checkpoints(out)):
            return
        time.sleep(0.02)
    pytest.fail(f"no checkpoint of step {step}: {finish(process)[1][-3000:]}")


def trainers(pid: int) -> list[int]:
    """The processes that torchrun has started in this one, without their own, which load data."""
    found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [p for p in found if TRAIN in Path(f"/proc/{p}/cmdline").read_text().replace("\0", " ")]


def die(process: subprocess.Popen, victim: str) -> None:
    """Kill one process of a training, or all of them, with their launcher."""
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(trainers(process.pid)[-1], signal.SIGKILL)
    code, said = finish(process)
    assert code != 0, said


def again(go: Callable[[], tuple[int, str]], out: Path, whole: Path) -> None:
    """The same command goes on and ends with the weights of a run that was never disturbed."""
    assert not (out / "model.safetensors").exists(), "disturbed too late to prove anything"
    code, said = go()
    assert code == 0 and "continuing from" in said, said
    assert apart(whole, out) == 0.0


@nightly  # `test_killed_and_stopped` kills one and all
@pytest.mark.parametrize("victim", ["rank", "all"])
@pytest.mark.parametrize("zero", ["none", "2", "3"])
def test_sigkill_of_a_rank_and_of_all(flags, reference, tmp_path, zero, victim):
    words, out = [TRAIN, *flags("killed", "--zero", zero, "--save-steps", "1")], tmp_path / "killed"
    process = start(torchrun(*words))
    wait_for(process, out, 3)
    die(process, victim)
    again(lambda: finish(start(torchrun(*words))), out, reference(zero)[0])


SPOILT = """
import os, sys, torch
from twigvlm.training import train, twig
from twigvlm.training.plus import subject
count = [0]
def spoil(kind):
    real = kind.__call__
    def lesson(self, batch):
        loss, figures = real(self, batch)
        count[0] += 1
        bad = count[0] == 8 and os.environ["RANK"] == "1"
        return (loss * float("nan") if bad else loss), figures
    kind.__call__ = lesson
spoil(twig.TwigLesson)
spoil(subject.PolicyLesson)
sys.exit(train.main())
"""


@pytest.mark.parametrize("zero", ["3", *(pytest.param(z, marks=nightly) for z in ("none", "2"))])
def test_a_loss_that_is_no_number_stops_all(flags, reference, tmp_path, zero):
    """One rank meets it in the middle of step 4; all save the state before and say what to lower. The next start goes on
    from there and ends as if nothing had been.
    """
    (tmp_path / "spoilt.py").write_text(SPOILT)
    words, out = flags("out", "--zero", zero), tmp_path / "out"
    code, said = ranks([sys.executable, str(tmp_path / "spoilt.py"), *words])
    assert code != 0 and "not finite at step 4" in said and "--lr" in said, said
    assert checkpoints.last_whole(out)[0].name == "checkpoint-3"
    assert all(torch.isfinite(t).all() for t in twig_of(out / "checkpoint-3").values())
    again(lambda: ranks(python(TRAIN, *words)), out, reference(zero)[0])


@nightly
@pytest.mark.parametrize("zero", ["2", "3"])
@pytest.mark.parametrize("stage", ["1", "2"])
def test_so_it_does_in_later_stages(world, flags, tmp_path, stage, zero):
    """The state before is whole, be it that of a twig with its head or of the head alone."""
    (tmp_path / "spoilt.py").write_text(SPOILT)
    found = prepare_twig(world / "base", Start(2, 3, pruning_head="released"), torch.device("cpu"), torch.float32)
    write_twig(tmp_path / "init", stored_state(found.twig), describe(found.twig, "tiny", found.signature))
    more = ("--groups", "2", "--max-steps", "12") if stage == "2" else ()
    words, out = (
        flags("out", "--zero", zero, "--stage", stage, "--init", str(tmp_path / "init"), *more),
        tmp_path / "out",
    )
    code, said = ranks([sys.executable, str(tmp_path / "spoilt.py"), *words])
    assert code != 0 and "not finite at step 4" in said and "--lr" in said, said
    assert checkpoints.last_whole(out)[0].name == "checkpoint-3"
    assert all(torch.isfinite(t).all() for t in twig_of(out / "checkpoint-3").values())


@pytest.mark.parametrize("zero", ["none", pytest.param("2", marks=nightly)])
def test_killed_and_stopped(flags, reference, tmp_path, zero):
    """SIGKILL of a process ends the other, SIGKILL of the launcher both: else they would train on, and the same command
    would find its folder in use. SIGTERM saves and exits with 0.
    """
    words, out = flags("out", "--zero", zero, "--save-steps", "1"), tmp_path / "out"
    pair = start_ranks(python(TRAIN, *words))
    wait_for(pair[0], out, 2)
    pair[1].kill()
    code, said = finish(pair[0])
    assert code == 1 and said.count("error: ") == 1 and "Traceback" not in said, said
    process = start(python(LAUNCH, *words), NPROC_PER_NODE="2")
    wait_for(process, out, 4)
    process.kill()
    finish(process)
    process = start(python(LAUNCH, *words), NPROC_PER_NODE="2")
    wait_for(process, out, 6)
    process.terminate()
    code, said = finish(process)
    assert code == 0 and "continuing from" in said and "stopped by SIGTERM" in said, said
    again(lambda: ranks(python(TRAIN, *words)), out, reference(zero)[0])


@nightly
def test_sigkill_of_the_script_and_the_same_command_again(flags, reference, tmp_path):
    """One process: the script is the training, so that a kill of it leaves nothing running."""
    command = [*SCRIPT, *flags("killed", "--save-steps", "1")]
    process = start(command, PYTHON=sys.executable)
    wait_for(process, tmp_path / "killed", 4)
    process.kill()
    finish(process)
    again(lambda: finish(start(command, PYTHON=sys.executable)), tmp_path / "killed", reference("single")[0])


def unfinished(folder: Path, out: Path, step: int = 12) -> None:
    """The copy of a training that was killed after its checkpoint of this step."""
    later = [place.name for place in checkpoints.checkpoints(folder) if int(place.name.split("-")[1]) > step]
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(*later))
    assert checkpoints.last_whole(out)[0].name == f"checkpoint-{step}"
    (out / "model.safetensors").unlink()
    stored = json.loads((out / "run.json").read_text())
    del stored["finished"]
    (out / "run.json").write_text(json.dumps(stored))


def test_other_processes_cannot_take_over_shared_states(flags, reference, tmp_path, capfd):
    unfinished(reference("2")[0], tmp_path / "out")
    assert quietly(flags("out", "--zero", "none")) == 2
    said = capfd.readouterr().err
    assert "ZeRO stage 2" in said and "Traceback" not in said


def test_states_of_an_earlier_version_are_refused_on_one_line(flags, reference, tmp_path, capfd):
    unfinished(reference("none")[0], tmp_path / "out")
    seal = checkpoints.last_whole(tmp_path / "out")[0] / checkpoints.SEAL
    told = json.loads(seal.read_text())
    del told["format"]
    seal.write_text(json.dumps(told))
    assert quietly(flags("out", "--zero", "none")) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "earlier version" in last and "--init" in last and "--out" in last


def test_an_error_is_said_once_and_by_its_exit_code(flags, tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    code, said = ranks(python(TRAIN, *flags("out", "--data", str(tmp_path / "empty.json"))))
    assert code == 2, said
    assert said.count("error: ") == 1 and "holds no samples" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [("sys.exit(2)", 2, ""), ("os.kill(os.getpid(), 9)", 1, "process 1 was killed by signal 9")],
)
def test_the_launcher_ends_as_its_processes_do(flags, tmp_path, end, code, words):
    """torchrun starts them; in place of trainings two that say something and of which one ends like this."""
    (tmp_path / "short.py").write_text(f"import os, sys\nprint('hello')\nif os.environ['RANK'] == '1': {end}\n")
    (tmp_path / "main.py").write_text(
        "import sys\nfrom twigvlm.training import launch\nlaunch.TRAIN = 'short'\nsys.exit(launch.main())\n"
    )
    command = [sys.executable, str(tmp_path / "main.py"), *flags("out")]
    got, said = finish(start(command, NPROC_PER_NODE="2", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"))
    assert (got, said.count("hello"), said.count("error: ")) == (code, 2, bool(words)), said
    assert words in said and "Traceback" not in said


def test_a_batch_that_cannot_be_shared_starts_nothing(flags, monkeypatch, capfd):
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setattr(launch, "_torchrun", lambda *_: pytest.fail("started"))
    assert quietly(flags("out", "--batch-size", "5"), launch.main) == 2
    said = capfd.readouterr().err
    assert "cannot be shared by 2 devices" in said and "Traceback" not in said


# ---------------------------------------------------------------------- precision, the embedded base, the disk


def test_bf16_with_fp32_states(flags, world, tmp_path):
    """Under autocast and under ZeRO-2: the loss falls, and small steps are not lost."""
    assert quietly(flags("plain", "--precision", "bf16", "--zero", "none")) == 0
    code, said = ranks(python(TRAIN, *flags("zero", "--precision", "bf16", "--zero", "2")))
    assert code == 0, said
    for name in ("plain", "zero"):
        told = report.history(tmp_path / name)
        assert told[-1]["loss"] < told[0]["loss"]
        assert twigvlm.load(world / "base", tmp_path / name, device="cpu").config.K == 2
    state = torch.load(next((tmp_path / "zero").glob("checkpoint-*/*/*optim_states.pt")), weights_only=False)
    flat = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    assert all(t.dtype == torch.float32 for t in flat)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    """What a user types, cut to a few steps: draws, asks the base, trains."""
    out = tmp_path_factory.mktemp("embedded") / "out"
    words = ["--max-steps", "4", "--batch-size", "8", "--out", str(out), "--held-out", "2", "--agreement-steps", "4"]
    env = {"twig_K": "2", "twig_T": "3", "PYTHON": sys.executable, "OMP_NUM_THREADS": "2"}
    code, said = finish(start([*SCRIPT, *words], **env))
    assert code == 0, said
    return out


def test_the_embedded_base_by_default(embedded):
    told = report.history(embedded)
    assert told[-1]["agreement_with"] == "base" and told[-1]["loss"] < told[0]["loss"]
    assert twigvlm.load(None, embedded, device="cpu").config.F == 24


def test_a_step_costs_little_more_than_its_parts(embedded):
    """Measured parts against whole steps; loading does not stall it."""
    clock = json.loads((embedded / "run.json").read_text())["finished"]["clock"]
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
def test_a_disk_that_is_full(flags, reference, tmp_path):
    """Room for one checkpoint and a half; then there is more, and the same command goes on."""
    single = reference("single")[0]
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


def test_random_weights_compiled_or_not(world, tmp_path):
    """A shape without weights trains as a base does, and compiled layers learn the same."""
    told = []
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        words = ["--random", "64x8", "--data", str(world / "data.json"), "--images", str(world / "images"), "--K", "1"]
        words += ["--T", "1", "--out", str(tmp_path / name), "--batch-size", "4", "--max-steps", "3", "--held-out", "0"]
        assert quietly([*words, *more, "--device", "cpu", "--precision", "fp32", "--zero", "none"]) == 0
        told.append([line["loss"] for line in report.history(tmp_path / name)])
    assert told[0] == pytest.approx(told[1], abs=1e-4) and told[0][-1] < told[0][0]


# ---------------------------------------------------------------------- TwigVLM++'s stages


def staged(world, out: Path, stage: str, *more: str) -> list[str]:
    return flags_into(world, out, "--stage", stage, "--T", "2", "--lr", "1e-3", "--max-steps", "4", *more)


@pytest.fixture(scope="module")
def stage_1(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stages") / "single"
    code, said = finish(start(python(TRAIN, *staged(world, out, "1", "--zero", "none"))))
    assert code == 0, said
    return out


@pytest.mark.parametrize("zero", ["2", *(pytest.param(z, marks=nightly) for z in ("3", "none"))])
def test_stage_1_with_two_processes(world, stage_1, tmp_path, zero):
    """One of them may have text alone where the other has images. Started again in the middle it ends with the same bits."""
    out, words = tmp_path / "two", ["--zero", zero, "--save-steps", "2"]
    code, said = ranks(python(TRAIN, *staged(world, out, "1", *words)))
    assert code == 0 and "Traceback" not in said, said
    losses = [[t["loss"] for t in report.history(folder)] for folder in (out, stage_1)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and apart(out, stage_1) < 1e-5
    assert twigvlm.load(world / "base", out, device="cpu").twig.config.pruning_head == "released"
    unfinished(out, tmp_path / "killed", 2)
    killed = python(TRAIN, *staged(world, tmp_path / "killed", "1", *words))
    again(lambda: ranks(killed), tmp_path / "killed", out)


@pytest.mark.parametrize("zero", ["3", *(pytest.param(z, marks=nightly) for z in ("2", "none"))])
def test_stage_2_with_two_processes(world, stage_1, tmp_path, zero):
    """Each draws sets of its own; the head alone changes, and what starts again in the middle ends with the same bits."""
    more = ["--init", str(stage_1), "--groups", "4", "--zero", zero, "--save-steps", "2"]
    whole, killed = (python(TRAIN, *staged(world, tmp_path / name, "2", *more)) for name in ("whole", "killed"))
    code, said = ranks(whole)
    assert code == 0 and "Traceback" not in said, said
    before, after = twig_of(stage_1), twig_of(tmp_path / "whole")
    assert {k for k in before if not torch.equal(before[k], after[k])} == {k for k in before if "_gate." in k}
    unfinished(tmp_path / "whole", tmp_path / "killed", 2)
    again(lambda: ranks(killed), tmp_path / "killed", tmp_path / "whole")


def test_the_scripts_stages(world, tmp_path):
    """STAGE=1, then STAGE=2 from what it left, in bf16 under autocast."""
    words = ["--max-steps", "2", "--precision", "bf16", "--zero", "none"]
    for stage, more in (("1", ()), ("2", ("--init", str(tmp_path / "1"), "--groups", "2"))):
        flags = flags_into(world, tmp_path / stage, *words, *more)
        code, said = finish(start(scripted(tmp_path, *flags, STAGE=stage, twig_T="2")))
        assert code == 0 and f"stage {stage}" in said, said
    assert twigvlm.load(world / "base", tmp_path / "2", device="cpu").twig.pruning_head is not None


def test_stage_2_under_zero_in_bf16_keeps_the_twig_to_the_bit(world, stage_1, tmp_path):
    """DeepSpeed casts what learns, and the rest is none of its business."""
    words = staged(
        world, tmp_path / "half", "2", "--init", str(stage_1), "--groups", "2", "--precision", "bf16", "--zero", "2"
    )
    code, said = ranks(python(TRAIN, *words))
    assert code == 0, said
    before, after = twig_of(stage_1), twig_of(tmp_path / "half")
    assert all(torch.equal(before[k], after[k]) for k in before if "_gate." not in k)
