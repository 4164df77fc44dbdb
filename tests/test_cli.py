"""cli_demo.py as people call it."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from PIL import Image
from terminal import on_a_terminal

import cli_demo
from twigvlm.commands.demo import Interrupt
from twigvlm.pruning import METHODS

ROOT = Path(__file__).resolve().parents[1]
FIGURES = re.compile(
    r"\[(\d+) tokens, [\d.]+ tokens/s, first token after [\d.]+ s, "
    r"(?:drafts (\d+)/(\d+) accepted, [\d.]+ tokens a step, right by depth [\d/]+ %|no drafts), visual tokens kept (\d+) of (\d+)\]"
)
DESCRIBE = ("--question", "Describe the image in detail.")
GREEN = "\033[32m"


def call(*flags: str, stdin: str | None = None, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """The program in its own process, without a terminal."""
    return subprocess.run(
        [sys.executable, ROOT / "cli_demo.py", *flags],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env=os.environ | env,
        timeout=300,
    )


def told(*flags: str, stdin: str = "") -> list[dict]:
    """The objects that the program prints in this process, nothing else beside them."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        assert cli_demo.main(["--json", *flags]) == 0
    out.flush()
    return [json.loads(line) for line in out.buffer.getvalue().decode().splitlines()]


@pytest.fixture(scope="module")
def described() -> dict:
    """The reference answer: --json, complete figures."""
    [one] = told(*DESCRIBE)
    return one


def test_json_holds_text_and_all_figures(described):
    assert described["text"].startswith("There are ")
    assert (described["L"], described["V"], described["K"], described["T"], described["F"]) == (32, 576, 2, 3, 24)
    assert described["visual_kept"] == len(described["kept"]) == 41
    assert described["visual_measured"] == pytest.approx(64.19, abs=0.01)
    assert described["accepted"] == sum(s["accepted"] for s in described["steps"])
    assert described["new_tokens"] == sum(len(s["tokens"]) for s in described["steps"])


def test_without_flags_it_answers_and_says_how_to_use_llava(described):
    out = call("--stream")
    assert out.returncode == 0, out.stderr
    assert "llava-v1.5-7b" in out.stdout.splitlines()[0]
    assert described["text"] in out.stdout
    assert "\033" not in out.stdout, "colour is for terminals"
    tokens, accepted, proposed, kept, total = FIGURES.search(out.stdout).groups()
    assert (int(tokens), int(kept), int(total)) == (described["new_tokens"], 41, 576)
    assert (int(accepted), int(proposed)) == (described["accepted"], described["drafted"])


def test_drafted_words_are_green_on_a_terminal(described):
    shown = on_a_terminal(cli_demo.main, ["--stream", *DESCRIBE])
    assert GREEN in shown
    assert described["text"] in re.sub(r"\033\[\d*m", "", shown).replace("\r\n", "\n"), "and no word appears twice"
    drafted = sum(len(piece.split()) for piece in re.findall(r"\033\[32m(.*?)\033\[0m", shown, re.S))
    assert drafted <= described["accepted"]
    assert "\033[" not in on_a_terminal(cli_demo.main, ["--stream", *DESCRIBE], NO_COLOR="1")


def test_questions_by_pipe_are_answered_in_turn_with_their_history():
    first, second = told(stdin="How many objects are there?\nHow many objects are there?\n")
    assert second["prompt_tokens"] > first["prompt_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", pytest.param("C.UTF-8", marks=pytest.mark.nightly)])
def test_bytes_that_are_no_text_do_not_end_a_conversation(locale):
    """Nor does a mark for pictures that is typed later on."""
    command = [sys.executable, ROOT / "cli_demo.py", "--json", "--max-new-tokens", "2"]
    asked = b"How many \xff\xe9 objects?\nO\xc3\xb9 est <image>?\nHow many?\n"
    env = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = subprocess.run(command, input=asked, capture_output=True, cwd=ROOT, env=env, timeout=300)
    assert out.returncode == 0, out.stderr.decode()
    questions = [json.loads(line)["question"] for line in out.stdout.decode().splitlines()]
    assert questions == ["How many \ufffd\ufffd objects?", "Où est <image>?", "How many?"]


def test_a_question_that_is_no_text(capsys):
    assert cli_demo.main(["--json", "--question", "How \udcff many?", "--max-new-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == "How \ufffd many?"


def test_without_speculation_the_text_is_the_same(described):
    [out] = told("--no-speculation", *DESCRIBE)
    assert out["text"] == described["text"] and out["drafted"] == 0


def test_utf8_survives_an_ascii_stream():
    """Whatever the environment says of encodings."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(out):
        assert cli_demo.main(["--json", "--question", "Où est le 🙂 ?", "--max-new-tokens", "4"]) == 0
    out.flush()
    assert json.loads(out.buffer.getvalue().decode())["question"] == "Où est le 🙂 ?"


@pytest.mark.slow
def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} {ROOT / 'cli_demo.py'} --question 'Describe the image in detail.' | head -c 3"
    out = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0 and not out.stderr


def test_kept_patches_are_shown(tmp_path):
    target = tmp_path / "kept.png"
    assert cli_demo.main(["--question", "Is there a circle?", "--show-kept", str(target), "--max-new-tokens", "2"]) == 0
    with Image.open(target) as picture, Image.open(ROOT / "assets" / "image.png") as original:
        assert picture.size == original.size
        dimmed = sum(
            a != b for a, b in zip(picture.convert("L").getdata(), original.convert("L").getdata(), strict=True)
        )
    assert dimmed == pytest.approx((576 - 41) * 14 * 14, rel=0.02)


def truncated(folder: Path) -> str:
    file = folder / "cut.png"
    file.write_bytes((ROOT / "assets" / "image.png").read_bytes()[:2000])
    return str(file)


def text_file(folder: Path) -> str:
    file = folder / "words.png"
    file.write_text("no picture")
    return str(file)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image-file", "nowhere.png"], ["nowhere.png", "no such file"]),
        (["--image-file", text_file], ["words.png", "not a picture"]),
        (["--image-file", truncated], ["cut.png", "damaged"]),
        (["--image-file", str(ROOT)], ["folder"]),
        (["--image-file", "http://127.0.0.1:9/x.png"], ["127.0.0.1:9", "cannot be fetched"]),
        (["--question", "  "], ["question", "empty"]),
        (["-R", "35"], ["35", "36 to 432", "ceil"]),
        (["-R", "433"], ["433", "36 to 432"]),
        (["-R", "nan"], ["nan"]),
        (["--pruning", "magic"], ["magic", "twig", "random"]),
        (["--twig-K", "3"], ["K = 3", "K = 2"]),
        (["--twig-T", "40"], ["T = 40", "T = 3"]),
        (["--temperature", "-1"], ["-1", "temperature"]),
        (["--top-p", "1.5", "--temperature", "1"], ["top_p", "1.5"]),
        (["--max-new-tokens", "0"], ["max_new_tokens", "0"]),
        (["--dtype", "float16", "--device", "cpu"], ["float16", "cpu", "float32"]),
        (["--dtype", "int3"], ["int3", "bfloat16"]),
        (["--device", "tpu9"], ["tpu9"]),
        (["--attn-implementation", "magic"], ["magic", "sdpa"]),
        (["--base-model", "no/where/at/all"], ["no/where/at/all", "no such folder"]),
        (["--twig-block", "./nowhere"], ["nowhere", "no such folder"]),
        (["--show-kept", "kept.jpg"], ["kept.jpg", ".png"]),
        (["--show-kept", "nowhere/kept.png"], ["nowhere"]),
        (["--question", "word " * 3000], ["context", "2048"]),
    ],
    ids=lambda v: " ".join(str(x)[:24] for x in v) if isinstance(v, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f(tmp_path) if callable(f) else f for f in flags]
    if "--question" not in flags:
        flags += ["--question", "Is there a circle?"]
    before = set(tmp_path.iterdir())
    assert cli_demo.main(flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)
    assert all(word in lines[-1] for word in words), lines[-1]
    assert set(tmp_path.iterdir()) == before, "nothing half-written is left"


def test_usage_errors_exit_with_2():
    """Long before the libraries of models would be loaded, in the demo and in what starts a training or an evaluation."""
    look = """
import sys, cli_demo, twigvlm.evaluation.run, twigvlm.evaluation.suite, twigvlm.training.launch
for module in (cli_demo, twigvlm.evaluation.run, twigvlm.evaluation.suite, twigvlm.training.launch):
    try: module.main(["--no-such-flag"])
    except SystemExit as end: print(end.code, "torch" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert out.returncode == 0 and out.stderr.count("usage") == 4, out.stderr
    assert out.stdout == "2 False\n" * 4


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit):
        cli_demo.main(["--help"])
    out = capsys.readouterr().out
    for flag in [
        "--base-model",
        "--twig-block",
        "--twig-K",
        "--twig-T",
        "--stream",
        "--image-file",
        "--retained-tokens",
        "--pruning",
        "--question",
        "--max-new-tokens",
        "--temperature",
        "--top-p",
        "--seed",
        "--no-pruning",
        "--no-speculation",
        "--device",
        "--dtype",
        "--attn-implementation",
        "--json",
        "--show-kept",
    ]:
        assert re.search(rf"{flag}\b.*?\n?\s+\S+", out), flag
    assert all(name in out.replace("\n", " ") for name in METHODS)


def interrupted(*flags: str, keys: tuple[str, ...], after: str) -> str:
    """What a terminal shows when the first answer is stopped by Ctrl-C as soon as `after` is seen."""
    leader, follower = pty.openpty()
    command = [sys.executable, str(ROOT / "cli_demo.py"), *flags]
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, cwd=ROOT, env={**os.environ, "NO_COLOR": "1"},
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(follower)
    shown, end, waiting = b"", time.monotonic() + 120, list(keys)
    os.write(leader, waiting.pop(0).encode())
    while time.monotonic() < end:
        ready, _, _ = select.select([leader], [], [], 0.2)
        try:
            shown += os.read(leader, 4096) if ready else b""
        except OSError:
            break
        if after and after in shown.decode(errors="replace"):
            os.write(leader, b"\x03")
            after = ""
        if not after and waiting and FIGURES.search(shown.decode(errors="replace")):
            os.write(leader, waiting.pop(0).encode())
        if not ready and process.poll() is not None:
            break
    process.wait(timeout=10)
    os.close(leader)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


@pytest.mark.slow
def test_a_conversation_on_a_terminal():
    """Ctrl-C ends the answer and not the conversation; an empty line ends that."""
    keys = ("Describe the image in detail.\n", "Is there a circle?\n\n")
    shown = interrupted("--stream", "--no-speculation", keys=keys, after="There are ")
    first, _ = FIGURES.findall(shown)
    assert int(first[0]) < 60, "the whole description is longer"
    assert "stopped by Ctrl-C" in shown and shown.index("stopped") < shown.rindex("tokens/s")
    assert "Traceback" not in shown


def test_an_interrupted_answer_ends_after_the_token_in_work(monkeypatch):
    """The criterion that Ctrl-C meets; a second Ctrl-C is Python's own."""
    with Interrupt() as interrupt:
        assert not interrupt(None, None)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt(None, None) and interrupt.came
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
