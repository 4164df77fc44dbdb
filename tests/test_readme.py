"""README and the pages that it hands its readers to stay true: their commands run, their files exist."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/start.md", "docs/methods.md", "docs/training.md", "docs/evaluation.md")
}


def blocks(language: str, name: str | None = None) -> list[str]:
    """Of one page, or of all."""
    texts = [PAGES[name]] if name else PAGES.values()
    return [block for text in texts for block in re.findall(rf"```{language}\n(.*?)```", text, re.S)]


def commands(block: str) -> list[str]:
    return [line for line in (line.split("#")[0].strip() for line in block.splitlines()) if line]


ALL = [command for block in blocks("bash") for command in commands(block)]


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=900,
    )


@pytest.fixture
def workplace(tmp_path):
    """A folder in which the README's relative names work and its outputs land."""
    for name in ("cli_demo.py", "assets", "checkpoints", "playground"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_run(block, workplace):
    """One block's commands one after the other, since a later one may need what an earlier one made."""
    for command in (c for c in commands(block) if c.startswith("python")):
        out = warm.run(shlex.split(command)[1:], workplace, os.environ | {"PYTHONPATH": str(ROOT)})
        assert out.returncode == 0, f"{command}\n{out.stderr}"
        assert out.stdout.strip(), command


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in ALL if "bash scripts/" in c])
def test_script_runs(command):
    out = run(["bash", "-c", command], ROOT)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip()


def test_every_command_is_one_of_these():
    assert all(c.startswith(("make", "python")) or "bash scripts/" in c for c in ALL)


@pytest.mark.parametrize("command", [c for c in ALL if c.startswith("make")])
def test_make_target_exists(command, workplace):
    assert run(["make", "--dry-run", "-C", str(ROOT), *shlex.split(command)[1:]], workplace).returncode == 0


@pytest.mark.slow
def test_python_examples_run(workplace):
    (workplace / "examples.py").write_text("\n".join(blocks("python")), encoding="utf-8")
    out = warm.run(["examples.py"], workplace, os.environ | {"PYTHONPATH": str(ROOT)})
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m (twigvlm[\w.]+)", "\n".join(PAGES.values())))))
def test_module_explains_itself(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(command).main(["--help"])
    assert "usage" in capsys.readouterr().out


def test_named_files_exist():
    drawn = next(block for block in blocks("text", "README.md") if block.startswith("cli_demo.py"))
    tree = re.findall(r"^(\S+)  ", drawn, re.M)
    assert "twigvlm/" in drawn and len(tree) > 5
    for name in (n for n in tree if "/" in n or "." in n):
        assert (ROOT / name).exists(), name


def test_no_command_overwrites_published_figures():
    """Whoever repeats a command of a page measures into a place of their own."""
    written = re.findall(r"--(?:out|plots|work)[ =](\S+)", "\n".join(PAGES.values()))
    assert not [place for place in written if place.startswith(("benchmarks", "checkpoints", "assets", "docs"))]


def test_the_readme_is_short():
    assert len(re.sub(r"```.*?```", "", PAGES["README.md"], flags=re.S).split()) < 1100  # without what is to be copied


@pytest.mark.parametrize(
    "answer",
    [r"pip install -e", r"whl/cpu", r"24 GB card", r"GPU-hours", r"authors link their weights", r"\(TTP, pruning\)", r"\(SSD, drafting\)",
     r"L = 32, V = 576, K = 2, T = 3, F = 24, R = 192", r"`R` is the average per layer", r"the base's L read", r"the V visual tokens",
     r"twig's T layers"],
)  # fmt: skip
def test_the_readme_answers_what_somebody_who_knows_llava_asks(answer):
    assert re.search(answer, PAGES["README.md"])
