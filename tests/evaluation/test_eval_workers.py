"""A failure in a process that loads pictures ends the evaluation, its shards and their launcher."""

from __future__ import annotations

import os

import pytest
import warm
from test_workers import DEATHS, HOW, fail, gone, told

from tests.conftest import ROOT, often
from twigvlm.evaluation.asking.ask import Prepared

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("how", often(HOW, "KeyError", "SystemExit", "killed"))
def test_evaluation(runner, tmp_path, monkeypatch, how):
    real = Prepared._ids

    def ids(self, question):
        if question.id == "104":
            fail(how)
        return real(self, question)

    monkeypatch.setattr(Prepared, "_ids", ids)
    flags = ("--out", str(tmp_path / "out"), "--workers", "1", "--batch-size", "2")
    last = runner.refused(*flags, code=1, words=(told(how),))
    assert how in DEATHS or how in ("SystemExit", "KeyboardInterrupt", "GeneratorExit") or "question 104" in last
    assert gone()


SITE = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
if "--shard" in sys.argv:
    from test_workers import fail
    from twigvlm.evaluation.asking.ask import Prepared
    real = Prepared._ids
    def ids(self, question):
        if question.id == "104":
            fail({how!r})
        return real(self, question)
    Prepared._ids = ids
"""


@pytest.mark.nightly  # each says it as one process does, and what the launcher makes of their ends is a test of its own
@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_evaluation_in_shards(model, data, tmp_path, how):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "main.py").write_text(
        SITE.format(how=how, tests=str(ROOT / "tests"), root=str(ROOT))
        + "from twigvlm.evaluation import run\nrun.MODULE = 'main'\nsys.exit(run.main())\n"
    )
    words = ["--task", "gqa", "--base-model", model[0], "--twig-block", model[1], "--data", str(data), "-R", "2"]
    words += [
        "--device",
        "cpu",
        "--num-shards",
        "2",
        "--workers",
        "1",
        "--max-new-tokens",
        "4",
        "--out",
        str(tmp_path / "out"),
    ]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
    done = warm.run(["-m", "main", *words], ROOT, env, timeout=300)
    assert done.returncode == 1 and '"score"' not in done.stdout, done.stderr
    assert told(how) in done.stderr and "shard 0 of 2 ended with status 1" in done.stderr.splitlines()[-1]
