"""How threads wait is settled once, before torch; and a loaded machine is noticed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from twigvlm import threads
from twigvlm.evaluation import speed
from twigvlm.threads import FEW, WAITING, Clock

SAY = "import os, json; print(json.dumps({n: os.environ.get(n) for n in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}))"


def said(code: str, **env: str) -> dict:
    """The two variables in a process, and in a child of it, after `code`."""
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    child = f"import subprocess, sys; print(subprocess.run([sys.executable, '-c', {SAY!r}], capture_output=True, text=True).stdout)"
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\n{SAY}\n{child}"], cwd=ROOT, env=clean | env, capture_output=True, text=True
    )
    own, inherited = (json.loads(line) for line in out.stdout.splitlines() if line.startswith("{"))
    assert own == inherited, "children inherit it"
    return own


# Ends what runs below it as soon as torch would be loaded: what is said by then is what torch hears.
GATE = """
import sys
from importlib.machinery import PathFinder
class Gate:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            spec = PathFinder.find_spec(name)
            spec.loader = self
            return spec
    def create_module(self, spec):
        sys.exit("torch")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Gate())
try:
    {}
except SystemExit as end:
    assert end.code == "torch"
"""


# More wanted cores than there are, and fewer; whatever the machine's load is.
CROWDED, QUIET = "import os; os.sched_getaffinity = lambda _: range(10**6)", "import os; os.cpu_count = lambda: 10**6"


def test_it_is_said_before_torch_is_loaded():
    found = said(f"{CROWDED}\nimport sys, twigvlm; assert 'torch' not in sys.modules")
    assert found["GOMP_SPINCOUNT"] == FEW or found["OMP_WAIT_POLICY"] == "passive"
    for code in (
        "import cli_demo; cli_demo.main(['--question', ' '])",
        "import runpy; sys.argv = ['x', '--help']; runpy.run_module('twigvlm.evaluation.speed', run_name='__main__')",
    ):
        assert said(f"{CROWDED}\n{GATE.format(code)}") == found


def test_threads_that_have_a_core_each_are_left_alone():
    nothing = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None}
    assert said(f"{QUIET}\nimport twigvlm") == nothing


def late(tree: ast.Module) -> list[int]:
    """Lines that load torch before the package, at the head of a script or of a function that loads both."""
    found = []
    for scope in (tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))):
        loads = [(name.split(".")[0], node.lineno) for node in scope.body for name in loaded(node)]
        first = dict(reversed(loads))
        own = first.get("twigvlm", float("inf") if scope is tree else 0)
        found += [first["torch"]] if "torch" in first and first["torch"] < own else []
    return found


def loaded(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


# Its child loads torch first on purpose: it measures other settings.
SCRIPTS = [file for file in sorted((*ROOT.glob("benchmarks/*.py"), *ROOT.glob("*.py"))) if file.name != "threads.py"]


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_scripts_load_the_package_before_torch(file):
    assert not late(ast.parse(file.read_text(encoding="utf-8")))


def test_the_notebook_loads_the_package_before_torch():
    cells = json.loads((ROOT / "examples" / "twigvlm.ipynb").read_text(encoding="utf-8"))["cells"]
    lines = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code")
    assert not late(ast.parse("\n".join("" if line.startswith(("!", "%")) else line for line in lines.split("\n"))))


def test_a_late_package_would_be_found():
    assert late(ast.parse("import torch\nimport twigvlm")) == [1]
    assert late(ast.parse("def f():\n    from torch import nn\n    import twigvlm")) == [2]
    assert not late(ast.parse("from twigvlm import flags\nimport torch\ndef f():\n    import torch"))


@pytest.mark.parametrize("name", WAITING)
def test_what_the_user_set_stays(name):
    asked = {name: "7"}
    threads.settle(asked)
    assert asked == {name: "7"}


def test_nothing_is_said_to_a_torch_that_would_not_hear_it():
    assert said(f"{CROWDED}\nimport torch, twigvlm") == {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None}


def test_the_library_decides_which_variable(tmp_path, monkeypatch):
    """libgomp knows a number of turns; others the standard's word."""
    monkeypatch.setattr(threads, "crowded", lambda: True)
    monkeypatch.setattr(threads.sys, "modules", {})
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("")
    monkeypatch.setattr(threads.sys, "path", [str(tmp_path)])
    monkeypatch.setattr(threads.importlib.util, "find_spec", lambda name: type("Spec", (), {"submodule_search_locations": [tmp_path / name]}))  # fmt: skip
    other: dict[str, str] = {}
    threads.settle(other)
    assert other == {"OMP_WAIT_POLICY": "passive"}
    (tmp_path / "torch" / "lib" / "libgomp-a34b3233.so.1").write_bytes(b"")
    gnu: dict[str, str] = {}
    threads.settle(gnu)
    assert gnu == {"GOMP_SPINCOUNT": FEW}


@pytest.mark.parametrize(
    ("running", "cores", "own", "crowded"),
    [
        ("1", 2, 2, False),
        ("2", 2, 2, True),
        ("2", 2, 1, False),
        ("5", 8, 4, False),
        ("6", 8, 4, True),
        ("x", 8, 1, True),
    ],
)
def test_who_wants_a_core_decides_whether_they_sleep_early(tmp_path, monkeypatch, running, cores, own, crowded):
    """The one that looks is no other; where the kernel does not tell, threads sleep early."""
    load = tmp_path / "loadavg"
    load.write_text(f"7.00 8.00 9.00 {running}/321 4711\n")
    monkeypatch.setattr(threads, "LOAD", load)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: range(own), raising=False)
    assert threads.crowded() is crowded
    load.unlink()
    assert threads.crowded()


def test_others_are_what_the_machine_did_and_this_process_did_not():
    assert Clock(130.0, 20.0, 10.0).cores_taken(Clock(100.0, 10.0, 0.0)) == pytest.approx(2.0)
    assert Clock(105.0, 20.0, 10.0).cores_taken(Clock(100.0, 10.0, 0.0)) == 0.0
    assert Clock(None, 20.0, 10.0).cores_taken(Clock(None, 10.0, 0.0)) is None


def test_the_machines_time_is_read_as_the_kernel_writes_it(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 4000 500 6 7 8 90 10\ncpu0 1 2 3\n")
    monkeypatch.setattr(threads, "STAT", stat)
    assert Clock.now().busy == pytest.approx((100 + 20 + 30 + 6 + 7 + 8) / os.sysconf("SC_CLK_TCK"))
    monkeypatch.setattr(threads, "STAT", tmp_path / "absent")
    assert Clock.now().busy is None


@pytest.mark.parametrize(
    ("taken", "own", "warned"), [(None, 2, False), (0.1, 2, False), (1.0, 2, True), (6.0, 2, False), (7.0, 2, True)]
)
def test_a_loaded_machine_is_said(taken, own, warned, monkeypatch):
    monkeypatch.setattr(speed.os, "cpu_count", lambda: 8 if (taken or 0) > 2 else 2)
    said = speed.loaded({"cores_taken_by_others": taken, "threads": own})
    assert bool(said) is warned
    assert not warned or (f"{taken:.1f} of" in said and "too low" in said)


def test_the_speed_command_warns(capsys, monkeypatch, tmp_path):
    flags = ["--random", "64x8", "--tokens", "4", "-R", "200", "--repeats", "1", "--prompts", "1", "--device", "cpu"]
    monkeypatch.setattr(Clock, "cores_taken", lambda *_: float(os.cpu_count()))
    assert speed.main([*flags, "--out", str(tmp_path / "speed.json")]) == 0
    out, err = capsys.readouterr()
    assert f"warning: other programs kept {os.cpu_count():.1f} of" in err and '"cores_taken_by_others"' in out
