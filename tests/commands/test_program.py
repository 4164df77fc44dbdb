"""The one program, as people type it, in a clone; what is installed is tests/commands/test_wheel.py's."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from twigvlm import __main__ as program
from twigvlm import __version__, files, record
from twigvlm.__main__ import COMMANDS, main


def test_alone_it_lists_all_commands(capsys):
    for argv in ([], ["--help"], ["-h"], ["help"]):
        assert main(argv) == 0
        shown = capsys.readouterr().out
        assert all(f"\n  {name} " in shown for name in COMMANDS) and shown.startswith("usage: twigvlm COMMAND")
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"twigvlm {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["evla"], ["'evla'", "did you mean eval", "--help"]),
        (["trian", "--K", "2"], ["'trian'", "did you mean train"]),
        (["xyzzy"], ["'xyzzy'", "demo", "export"]),
        (["--json", "demo"], ["--json", "before a command"]),
        ([""], ["''"]),
        (["help", "demmo"], ["'demmo'", "demo"]),
    ],
)
def test_what_is_no_command_is_one_line(argv, words, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert not out and line.startswith("error: ") and all(word in line for word in words), line


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if (ROOT / command.module.replace(".", "/")).with_suffix(".py").exists()])  # fmt: skip
def test_every_command_explains_itself_by_its_name(name, capsys, monkeypatch):
    """Also where its usage is asked of the module, which goes on to work."""
    before = list(sys.argv)
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: twigvlm {name} ")
    assert sys.argv == before
    monkeypatch.setattr(sys, "argv", ["x"])
    module = COMMANDS[name].module
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(module).main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m twigvlm")


def test_a_command_whose_packages_are_missing_says_how_to_get_them(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    for name in ("web", "serve"):
        assert main([name, "--port", "1"]) == 2
        assert f'uvicorn, not installed: pip install "twigvlm[{name}]"' in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "prometheus_client" else real(name))
    assert main(["serve", "--port", "1"]) == 2
    assert "prometheus_client, not installed" in capsys.readouterr().err


def test_a_result_says_by_which_command_it_was_made(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["twigvlm eval", "--task", "gqa"])
    assert record.provenance()["command"] == "twigvlm eval --task gqa"
    monkeypatch.setattr(sys, "argv", ["twigvlm report", "--only", "stage 1"])
    assert record.provenance()["command"] == "twigvlm report --only 'stage 1'", "to be repeated as it stands"


@pytest.mark.slow
def test_the_overview_loads_no_torch_and_the_module_is_the_program(tmp_path):
    code = "import sys; from twigvlm.__main__ import main; main(['--help']); print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'numpy', 'huggingface_hub')])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    done = subprocess.run([sys.executable, "-m", "twigvlm", "scroe"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean score" in done.stderr


# ---------------------------------------------------------------------- where data go


def test_where_programs_keep_what_they_make(monkeypatch, tmp_path):
    assert files.home({}) == ROOT / "playground" / "data", "in a clone"
    assert files.home({"TWIGVLM_HOME": str(tmp_path)}) == tmp_path
    assert files.home({"TWIGVLM_HOME": "~/x"}) == Path.home() / "x"
    monkeypatch.setattr(files, "CHECKOUT", None)
    assert files.home({}) == Path.home() / ".cache" / "twigvlm"
    assert files.home({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "twigvlm"
    assert files.home({"XDG_CACHE_HOME": "not/absolute"}) == Path.home() / ".cache" / "twigvlm", "as its standard says"
    assert files.home({"TWIGVLM_HOME": "here"}) == Path.cwd() / "here"


def test_nobody_else_derives_a_place_from_the_package():
    found = [
        str(file.relative_to(ROOT))
        for file in (ROOT / "twigvlm").rglob("*.py")
        if "__file__" in file.read_text("utf-8") and file.name not in ("files.py",)
    ]
    assert found == ["twigvlm/world/drawn.py"], "which asks its own source whether it changed"
    assert program.find("demo").module == "twigvlm.commands.demo"
