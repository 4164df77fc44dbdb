"""The notebook runs from its first cell to its last, and holds what came out when it did."""

from __future__ import annotations

import json
import os
import re

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "examples" / "twigvlm.ipynb"


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def codes(given: list[dict]) -> list[dict]:
    return [cell for cell in given if cell["cell_type"] == "code"]


def said(given: list[dict]) -> str:
    """All that the cells wrote, words alone."""
    texts = []
    for output in (output for cell in codes(given) for output in cell["outputs"]):
        texts += [output.get("text", ""), output.get("data", {}).get("text/markdown", "")]
    return "".join("".join(text) for text in texts)


def pictures(given: list[dict]) -> int:
    return sum("image/png" in output.get("data", {}) for cell in codes(given) for output in cell["outputs"])


def test_it_holds_a_whole_run():
    found = cells()
    assert [cell["execution_count"] for cell in codes(found)] == list(range(1, len(codes(found)) + 1))
    outputs = [output for cell in codes(found) for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert "stderr" not in {output.get("name") for output in outputs}
    assert pictures(found) == 3 and "\033[32m" in said(found) and "| twig | 64 |" in said(found)
    assert "the same without drafts: True" in said(found)


def test_it_tells_nothing_of_a_machine():
    text = re.sub(r'"image/png": "[^"]*"', "", NOTEBOOK.read_text("utf-8"))
    assert not re.findall(r"(?:/home|/root|/tmp|/usr|/work|/opt|/Users|[A-Z]:\\\\)[/\\\\]\S*", text)
    assert NOTEBOOK.stat().st_size < 2**18


@pytest.mark.slow
def test_it_runs(monkeypatch, tmp_path):
    """In a kernel of this Python, in its own folder; greedy answers are those that it holds."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_PATH", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):  # no kernel of another Python
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    assert pictures(notebook.cells) == 3
    for line in ("| unpruned | all | 576.0 | 576 |", "the same without drafts: True"):
        assert line in said(notebook.cells) and line in said(cells())
    assert (
        said(notebook.cells).split("Is there a star? ")[1].split("\n")[0]
        == said(cells()).split("Is there a star? ")[1].split("\n")[0]
    )
