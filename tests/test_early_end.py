"""Programs that are stopped before they have begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, often

MODULES = ("sprout.train", "training.train", "evaluation.speed", "sprout.report")


@pytest.mark.parametrize("module", often(MODULES, "sprout.train"))
def test_ctrl_c_while_libraries_load_ends_without_a_traceback(module, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", f"twigvlm.{module}", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    said = []
    for line in process.stderr:
        said.append(line)
        if "torch._C" in line:  # torch is on its way
            os.kill(process.pid, signal.SIGINT)
            break
    start = time.monotonic()
    said += process.communicate(timeout=60)[1].splitlines()
    assert process.returncode in (130, -signal.SIGINT) and time.monotonic() - start < 10
    assert not any("Traceback" in line or "KeyboardInterrupt" in line for line in said)
