"""The runner: nothing is lost, nothing is asked twice, nothing wrong is merged, and a score is never a guess."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, telling
from tests.evaluation.conftest import (
    MANY,
    QUESTIONS,
    SCRIPTS,
    SUFFIX,
    children,
    folder_of,
    lines,
    merged,
    script,
    started,
    wait_for,
)
from twigvlm.config import GenerationSettings, ModelSettings
from twigvlm.errors import InputError
from twigvlm.evaluation import run, suite
from twigvlm.evaluation.asking import shards
from twigvlm.evaluation.asking.answers import Appender, Folder, answer_line, read_lines
from twigvlm.evaluation.asking.setting import EMBEDDED_DATA, REAL_DATA, Setting, default_data, fingerprint
from twigvlm.evaluation.tasks import OWN, TASKS
from twigvlm.evaluation.tasks.base import Question, Score
from twigvlm.files import write_json
from twigvlm.processes import Stop, cores, place
from twigvlm.vlm import TwigVLM

# ---------------------------------------------------------------------- a whole run


def test_a_run_writes_answers_in_llavas_format_and_says_everything(runner, tmp_path, model):
    out = tmp_path / "out"
    result = runner.done("--out", str(out))
    folder = out / "answers" / "gqa_testdev_balanced" / "base" / "twig-R2@twig"
    rows = [json.loads(row) for row in (folder / "merge.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [str(100 + i) for i in range(QUESTIONS)]
    assert all(list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"] for row in rows)
    assert rows[3]["prompt"] == "q 3?" + SUFFIX and rows[3]["model_id"] == "base"
    assert len({row["answer_id"] for row in rows}) == QUESTIONS
    assert (folder / "1_0.jsonl").exists()
    assert result == json.loads((folder / "result.json").read_text())
    for key in (
        "score", "parts", "doubts", "command", "configuration", "commit", "torch", "transformers", "python", "device",
        "seconds", "tokens_per_second", "decode_tokens_per_second", "time_to_first_token", "acceptance", "R",
        "visual_measured", "visual_twig_share", "peak_memory_bytes",
    ):  # fmt: skip
        assert key in result, key
    assert result["score"] == pytest.approx(
        100 * sum(row["text"].rstrip(".").lower() == "a" for row in rows) / QUESTIONS
    )
    assert result["visual_measured"] == 2.0 and result["visual_twig_share"] == pytest.approx(2 * 4 / 6)
    assert result["questions_timed"] == QUESTIONS and 0 < result["generation_seconds"] <= result["seconds"]
    assert result["letters"] == {"L": 6, "V": 4, "K": 2, "T": 2, "F": 4}


def test_answers_are_those_of_asking_one_by_one(runner, tmp_path, model, data):
    from twigvlm import load

    runner.done("--out", str(tmp_path / "out"))
    vlm = load(*model, device="cpu")
    for row in map(json.loads, merged(tmp_path / "out").splitlines()):
        image = data / "gqa" / "data" / "images" / f"{int(row['question_id']) % 4}.jpg"
        assert row["text"] == vlm.answer(image, row["prompt"], retained_tokens=2, max_new_tokens=6)


def test_half_a_character_in_a_question(runner, tmp_path, data):
    """JSON can write it; it is asked as U+FFFD, and written as it was read."""
    file = data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    rows[3]["text"] = f"q \ud83d <im{SUFFIX}"
    lines(file, rows)
    result = runner.done("--out", str(tmp_path / "out"))
    written = [json.loads(row) for row in merged(tmp_path / "out").splitlines()]
    assert result["questions_timed"] == QUESTIONS and written[3]["prompt"] == rows[3]["text"]


@pytest.mark.parametrize("part", ["base", "twig"])
def test_weights_that_are_no_numbers_end_the_run(runner, tmp_path, model, part):
    """No score is made of them, and nothing is taken for an answer."""
    folder = shutil.copytree(model[part == "twig"], tmp_path / part)
    state = load_file(folder / "model.safetensors")
    (name,) = (k for k in state if k.endswith("layers.1.mlp.down_proj.weight") and "vision" not in k)
    state[name][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    flag = "--base-model" if part == "base" else "--twig-block"
    words = (f"layer 1 of the {part}", "not finite")
    runner.refused("--out", str(tmp_path / "out"), flag, str(folder), words=words, code=1)


def test_a_base_without_a_tokenizer_asks_nothing(runner, tmp_path, model):
    folder = shutil.copytree(model[0], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    runner.refused("--out", str(tmp_path / "out"), "--base-model", str(folder), words=("no tokenizer",))


@pytest.mark.parametrize("flags", [("--batch-size", "1"), ("--batch-size", "7"), ("--workers", "2")])
def test_neither_batches_nor_workers_change_a_byte(runner, tmp_path, reference, flags):
    runner.done("--out", str(tmp_path / "b"), *flags)
    assert merged(tmp_path / "b") == reference


def test_shards_of_any_number_merge_to_the_same_bytes(runner, tmp_path, reference):
    for i in range(3):
        code, text, _ = runner("--out", str(tmp_path / "b"), "--num-shards", "3", "--shard", str(i))
        last = json.loads(text.splitlines()[-1])
        assert code == 0
        assert (last["score"] is None and last["missing"] > 0) if i < 2 else last["score"] is not None
    assert merged(tmp_path / "b") == reference
    counts = [len(read_lines(f)) for f in sorted(folder_of(tmp_path / "b").glob("3_*.jsonl"))]
    assert sum(counts) == QUESTIONS and max(counts) - min(counts) <= 8


def test_sampling_does_not_depend_on_shards_or_pauses(runner, tmp_path):
    flags = ("--temperature", "1.5", "--top-p", "0.9", "--seed", "3", "--limit", "6")
    runner.done("--out", str(tmp_path / "a"), *flags)
    for i in (1, 0):
        runner("--out", str(tmp_path / "b"), *flags, "--num-shards", "2", "--shard", str(i))
    runner.done("--out", str(tmp_path / "c"), *flags[:-4], "--seed", "4", "--limit", "6")
    assert merged(tmp_path / "a") == merged(tmp_path / "b")
    assert [json.loads(r)["text"] for r in merged(tmp_path / "a").splitlines()] != [
        json.loads(r)["text"] for r in merged(tmp_path / "c").splitlines()
    ]


def test_the_settings_of_the_table(runner, tmp_path):
    out = tmp_path / "out"
    base = runner.done("--out", str(out), "--baseline", "--limit", "6")
    drafts = runner.done("--out", str(out), "--no-pruning", "--limit", "6")
    pruned = runner.done("--out", str(out), "--no-speculation", "--limit", "6")
    both = runner.done("--out", str(out), "--limit", "6")
    assert [r["method"] for r in (base, drafts, pruned, both)] == ["base", "SSD only", "TTP only", "TTP+SSD"]
    assert [r["R"] for r in (base, drafts, pruned, both)] == [None, None, 2, 2]
    assert base["visual_measured"] == drafts["visual_measured"] == 4 and base["visual_twig_share"] == 0
    assert base["letters"]["K"] is None and base["acceptance"] is None
    assert drafts["acceptance"] is not None and pruned["acceptance"] is None
    texts = {s: [json.loads(r)["text"] for r in (p / "merge.jsonl").read_bytes().splitlines()] for s, p in (
        (p.name, p) for p in out.glob("answers/*/*/*"))}  # fmt: skip
    assert texts["base-first6"] == texts["ssd-first6@twig"]  # drafts are lossless
    assert texts["twig-R2-first6@twig"] == texts["twig-R2-plain-first6@twig"]


def test_a_limited_run_is_scored_on_what_was_asked(runner, tmp_path):
    result = runner.done("--out", str(tmp_path / "out"), "--limit", "5")
    assert result["questions"] == 5 and result["parts"]["exact"]["count"] == 5 and result["limit"] == 5


def test_a_result_holds_sums_and_not_every_question():
    every, few = {str(i): i for i in range(101)}, {"7": 50.0}
    score = Score(1.0, {"a": 1, "each": every, "evalQA": few, "kind": {"each": every, "b": [1, 2], "evalQA": few}})
    assert score.sums == {"a": 1, "kind": {"b": [1, 2]}}
    assert score.per_question == {"each": every, "evalQA": few}


def test_benchmarks_may_share_a_folder(runner, tmp_path):
    from twigvlm.evaluation.asking.job import Job

    names = [
        Job(task, Setting(), tmp_path, split, tmp_path).folder.path for task in TASKS.values() for split in task.splits
    ]
    assert len(set(names)) == len(names)
    runner.done("--out", str(tmp_path / "out"), "--limit", "2")
    runner.done("--out", str(tmp_path / "out"), task="vqav2")


def test_what_cannot_be_scored_here_becomes_an_upload_file(runner, tmp_path):
    result = runner.done("--out", str(tmp_path / "out"), task="vqav2")
    assert result["score"] is None and "not scored here" in result["note"]
    assert [row["question_id"] for row in json.loads(Path(result["upload"]).read_text())] == [0, 1, 2]


def test_the_model_decides_the_data(runner, tmp_path, data):
    assert default_data(True) == EMBEDDED_DATA and EMBEDDED_DATA.parts[-3:] == ("playground", "data", "sprout")
    assert default_data(False) == REAL_DATA and REAL_DATA.parts[-3:] == ("playground", "data", "eval")
    _, text, _ = runner("--out", str(tmp_path / "out"), "--limit", "2")
    (line,) = [row for row in text.splitlines() if str(data) in row and "on data" in row]
    assert runner.flags[1] in line


# ---------------------------------------------------------------------- going on


def test_sigterm_ends_after_the_batch_and_the_run_goes_on(runner, tmp_path, asked, monkeypatch, reference):
    asked.clear()
    from twigvlm.evaluation.asking.progress import Progress

    look = Progress.look
    monkeypatch.setattr(Progress, "look", lambda self: (look(self), os.kill(os.getpid(), signal.SIGTERM)))
    code, text, err = runner("--out", str(tmp_path / "b"), "--batch-size", "4")
    assert code == 143 and "score" not in text and "4 of 20" in err
    monkeypatch.setattr(Progress, "look", look)
    result = runner.done("--out", str(tmp_path / "b"), "--batch-size", "4")
    assert merged(tmp_path / "b") == reference
    assert Counter(asked) == Counter(str(100 + i) for i in range(QUESTIONS))  # nothing twice
    assert result["sessions"] == 2 and result["questions_timed"] == QUESTIONS


def test_a_fault_in_the_middle_keeps_what_was_answered(runner, tmp_path, monkeypatch, reference):
    generate, calls = TwigVLM.generate, []

    def failing(self, *args, **settings):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return generate(self, *args, **settings)

    monkeypatch.setattr(TwigVLM, "generate", failing)
    runner.refused("--out", str(tmp_path / "b"), "--batch-size", "3", code=1, words=("out of memory",))
    assert len(read_lines(folder_of(tmp_path / "b") / "1_0.jsonl")) == 6
    monkeypatch.setattr(TwigVLM, "generate", generate)
    runner.done("--out", str(tmp_path / "b"))
    assert merged(tmp_path / "b") == reference


def test_a_line_cut_by_a_power_loss_is_asked_again(runner, tmp_path, asked):
    out = tmp_path / "out"
    runner.done("--out", str(out))
    whole, file = merged(out), folder_of(out) / "1_0.jsonl"
    for spoil in (
        lambda data: data[:-7],
        lambda data: data[:-1],
        lambda data: data[:-40] + b"\0" * 40,
        lambda data: data[:-40] + b"\0" * 39 + b"\n",
    ):
        file.write_bytes(spoil(file.read_bytes()))
        asked.clear()
        runner.done("--out", str(out))
        assert asked == ["119"] and merged(out) == whole


def test_another_number_of_shards_goes_on_with_what_is_there(runner, tmp_path, reference, asked):
    out = tmp_path / "out"
    runner("--out", str(out), "--num-shards", "2", "--shard", "0")
    cut = folder_of(out) / "2_0.jsonl"
    cut.write_bytes(cut.read_bytes()[:-9])
    runner.done("--out", str(out))
    assert Counter(asked)["100"] == 1 and max(Counter(asked).values()) == 2  # twice only the line that was cut
    assert merged(out) == reference


def test_a_finished_run_is_scored_again_without_a_model(runner, tmp_path, monkeypatch):
    first = runner.done("--out", str(tmp_path / "out"))
    monkeypatch.setattr(run.Models, "get", lambda *_: pytest.fail("opened the model"))
    second = runner.done("--out", str(tmp_path / "out"))
    same = ("score", "parts", "seconds", "tokens_per_second", "acceptance", "device", "peak_memory_bytes")
    assert {k: first[k] for k in same} == {k: second[k] for k in same}


def test_every_line_is_on_the_disk_when_write_returns(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), fsync(fd)))
    with Appender(tmp_path / "1_0.jsonl") as file:
        for i in range(3):
            file.write([{"question_id": i}])
            assert synced[-1] == len(b'{"question_id": 0}\n') * (i + 1)


def test_one_writer_at_a_time(tmp_path):
    with Appender(tmp_path / "1_0.jsonl"), pytest.raises(InputError, match="another process"):
        Appender(tmp_path / "1_0.jsonl")


# ---------------------------------------------------------------------- what is refused


def edit(file: Path, change) -> None:
    file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))


def test_duplicate_foreign_and_changed_answers_are_refused_by_name(runner, tmp_path):
    out = tmp_path / "out"
    runner.done("--out", str(out))
    file = folder_of(out) / "1_0.jsonl"
    good = file.read_bytes()
    edit(file, lambda rows: [*rows, rows[4]])
    runner.refused("--out", str(out), words=("104", "twice", "1_0.jsonl"))
    file.write_bytes(good)
    edit(file, lambda rows: [*rows, rows[4].replace(b'"104"', b'"999"')])
    runner.refused("--out", str(out), words=("999", "not asked"))
    file.write_bytes(good.replace(b"q 4?", b"q four?"))
    runner.refused("--out", str(out), words=("104", "another prompt"))
    file.write_bytes(good.replace(b'{"question_id": "104"', b'{"question_id: "104"'))
    runner.refused("--out", str(out), words=("1_0.jsonl", "line 5", "damaged"))


def test_a_missing_answer_is_refused_by_name(runner, tmp_path, monkeypatch):
    out = tmp_path / "out"
    runner.done("--out", str(out))
    edit(folder_of(out) / "1_0.jsonl", lambda rows: rows[:7] + rows[8:])
    monkeypatch.setattr(run, "answer", lambda *_: None)
    runner.refused("--out", str(out), words=("107", "no answer"))


@pytest.mark.parametrize(
    ("change", "word"),
    [(("--attn-implementation", "eager"), "attention"), (("--max-new-tokens", "5"), "max_new_tokens"), (("--dtype", "bfloat16"), "dtype")],
)  # fmt: skip
def test_answers_made_under_another_configuration_are_refused_by_name(runner, tmp_path, change, word):
    runner.done("--out", str(tmp_path), "--limit", "2")
    runner.refused("--out", str(tmp_path), "--limit", "2", *change, words=(word, "--out"))


def test_other_weights_or_questions_under_the_same_name_are_refused(runner, tmp_path, model, data):
    runner.done("--out", str(tmp_path), "--limit", "2")
    config = Path(model[1]) / "twig_config.json"
    text = config.read_text()
    try:
        config.write_text(text + " ")
        runner.refused("--out", str(tmp_path), "--limit", "2", words=("twig files",))
    finally:
        config.write_text(text)
    file = data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    file.write_text(file.read_text().replace("q 1?", "q one?"))
    runner.refused("--out", str(tmp_path), "--limit", "2", words=("questions",))


def test_the_same_letters_given_or_read_are_the_same_configuration(runner, tmp_path):
    runner.done("--out", str(tmp_path), "--limit", "2")
    runner.done("--out", str(tmp_path), "--limit", "2", "--twig-K", "2", "--twig-T", "2", "--dtype", "float32")


def test_a_fingerprint_sees_a_byte_anywhere(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(3000))
    before = fingerprint(tmp_path)
    file.write_bytes(bytes(1500) + b"x" + bytes(1499))
    assert before != fingerprint(tmp_path) and fingerprint("hub/id") is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-R", "500"), ("500", "legal is")),
        (("-R", "0.5"), ("legal is",)),
        (("--limit", "0"), ("--limit",)),
        (("--batch-size", "0"), ("--batch-size",)),
        (("--workers", "-1"), ("--workers",)),
        (("--split", "nowhere"), ("nowhere", "testdev_balanced")),
        (("--pruning", "sorcery"), ("sorcery", "random")),
        (("--temperature", "-1"), ("--temperature",)),
        (("--top-p", "3", "--temperature", "1"), ("top_p",)),
        (("--max-new-tokens", "0"), ("max_new_tokens",)),
        (("--dtype", "float12"), ("float12",)),
        (("--device", "toaster"), ("toaster",)),
        (("--base-model", "/nowhere/at/all"), ("/nowhere/at/all",)),
        (("--data", "/nowhere/at/all"), ("/nowhere/at/all", "--data")),
        (("--shard", "0"), ("--num-shards",)),
        (("--num-shards", "2", "--shard", "2"), ("--shard is 2",)),
        (("--num-shards", "0"), ("--num-shards",)),
        (("--twig-K", "3"), ("K",)),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_impossible_wishes_are_one_line_and_leave_nothing_behind(runner, tmp_path, flags, words):
    runner.refused("--out", str(tmp_path / "out"), *flags, words=words)
    assert not list(tmp_path.glob("out/**/*.jsonl")) and not list(tmp_path.glob("out/**/settings.json"))
    assert not (tmp_path / "out").exists()


def test_a_base_without_twig_needs_a_word_about_it(runner, tmp_path):
    at = runner.flags.index("--twig-block")
    del runner.flags[at : at + 2]
    runner.refused("--out", str(tmp_path / "out"), words=("--twig-block", "--baseline"))
    runner.refused("--out", str(tmp_path / "out"), "--no-pruning", words=("--baseline",))
    assert runner.done("--out", str(tmp_path / "out"), "--limit", "2", "--baseline")["method"] == "base"
    result = runner.done("--out", str(tmp_path / "out"), "--limit", "2", "--pruning", "random")
    assert result["method"] == "random only" and result["visual_measured"] == 2


def test_where_nothing_can_be_written_nothing_is_loaded(runner, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file")
    monkeypatch.setattr(run.Models, "get", lambda *_: pytest.fail("opened the model"))
    runner.refused("--out", str(tmp_path / "out"), words=(str(tmp_path / "out"), "--out"))


def test_a_missing_picture_names_its_question(runner, tmp_path, data, monkeypatch):
    picture = data / "gqa" / "data" / "images" / "2.jpg"
    picture.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(run.Models, "get", lambda *_: pytest.fail("opened the model"))
        runner.refused("--out", str(tmp_path / "out"), words=("question 102", str(picture), "--skip-broken"))
    result = runner.done("--out", str(tmp_path / "out"), "--skip-broken")
    broken = json.loads(Path(result["per_question"]).read_text())["broken"]
    assert result["broken"] == 5 and list(broken) == ["102", "106", "110", "114", "118"]
    assert all(str(picture) in reason for reason in broken.values()) and '"118"' not in json.dumps(result)
    assert result["doubts"] == {"broken_images_answered_empty": 5} and result["questions"] == QUESTIONS
    rows = [json.loads(row) for row in merged(tmp_path / "out").splitlines()]
    assert [row["question_id"] for row in rows if row["metadata"].get("broken")] == list(broken)
    runner.refused("--out", str(tmp_path / "out"), words=("question 102",))  # skipped is not answered
    Image.new("RGB", (9, 9)).save(picture)
    whole = runner.done("--out", str(tmp_path / "out"))
    assert whole["broken"] == 0 and "broken" not in Path(whole["per_question"] or os.devnull).read_text()


def test_a_damaged_picture_names_its_question(runner, tmp_path, data):
    picture = data / "gqa" / "data" / "images" / "1.jpg"
    picture.write_bytes(picture.read_bytes()[:-90])
    for workers in ("0", "1"):
        runner.refused("--out", str(tmp_path / "out"), "--workers", workers, words=("question 101", "1.jpg"))
    assert runner.done("--out", str(tmp_path / "out"), "--skip-broken")["broken"] == 5


def test_a_missing_annotation_is_found_before_the_work(runner, tmp_path, data, monkeypatch):
    (data / "gqa" / "data" / "testdev_balanced_questions.json").unlink()
    monkeypatch.setattr(run.Models, "get", lambda *_: pytest.fail("opened the model"))
    runner.refused("--out", str(tmp_path / "out"), words=("testdev_balanced_questions.json", "playground/README.md"))


@pytest.mark.parametrize("flags", [["--sideways"], ["-R"], ["-R", "many"], ["--limi", "3"], ["-R", "192,128"]])
def test_usage_errors_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as end:
        run.main(["--task", "gqa", *flags])
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_R_has_a_clear_default(capsys):
    assert run.parse(["--task", "gqa"]).retained_tokens == 64
    with pytest.raises(SystemExit):
        run.parse(["--help"])
    assert "default 64" in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------------- lines


def test_an_answers_id_is_a_function_of_the_answer():
    question = Question("7", "why?", line={"round_id": 0})
    one = answer_line(question, "so", "m", "s")
    assert one == answer_line(question, "so", "m", "s") and one["round_id"] == 0
    assert one["answer_id"] != answer_line(question, "no", "m", "s")["answer_id"]
    shared = Question("7#2", "why not?", line={"question_id": 7})
    assert answer_line(shared, "", "m", "s")["metadata"] == {"id": "7#2"}


# ---------------------------------------------------------------------- parts


def child(tmp_path: Path, body: str) -> list[str]:
    """A command that runs `body` with the shard's number in `i`, in place of a shard."""
    file = tmp_path / "child.py"
    file.write_text(f"import os, signal, sys, time\ni = int(sys.argv[sys.argv.index('--shard') + 1])\n{body}\n")
    return [sys.executable, str(file)]


@pytest.mark.parametrize(
    ("end", "status", "tail", "reason"),
    [
        ("os.kill(os.getpid(), 9)", -9, "line 1", "was killed by SIGKILL"),
        ("sys.exit('error: so')", 1, "line 1\nerror: so", "ended with status 1"),
    ],
)
def test_a_child_that_fails_is_told_with_the_tail_of_its_log_and_the_others_go_on(
    tmp_path, capsys, end, status, tail, reason
):
    body = f"print('line', i, flush=True)\nif i == 1: {end}\ntime.sleep(.5)\nopen(r'{tmp_path}/' + str(i), 'w')"
    placement = place(3, None, {}, "cpu")
    with Stop() as stop:
        failed = shards.launch(child(tmp_path, body), placement, tmp_path / "logs", stop, lambda: None)
    assert [(end.part, end.status, end.tail, end.reason) for end in failed] == [(1, status, tail, reason)]
    assert (
        capsys.readouterr().err == f"shard 1 {reason}: {failed[0].cause}\n" and failed[0].cause == tail.splitlines()[-1]
    )
    assert (tmp_path / "0").exists() and (tmp_path / "2").exists()


def test_a_stop_is_passed_on_and_waited_for(tmp_path):
    body = (
        "ends = []\nsignal.signal(signal.SIGTERM, lambda *_: ends.append(1))\nprint('up', flush=True)\n"
        f"while not ends: time.sleep(.02)\nopen(r'{tmp_path}/' + str(i), 'w')\nsys.exit(143)"
    )
    placement = place(2, None, {}, "cpu")
    logs = tmp_path / "logs"

    def when_up() -> None:
        while sum("up" in f.read_text() for f in logs.glob("*.log")) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    with Stop() as stop:
        threading.Thread(target=when_up).start()
        failed = shards.launch(child(tmp_path, body), placement, logs, stop, lambda: None)
        assert failed == [] and stop.code == 143
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


def test_threads_are_divided_among_children(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(shards, "cores", lambda: 8)
    with Stop() as stop:
        shards.launch(
            child(tmp_path, "print(os.environ['OMP_NUM_THREADS'])"),
            place(2, None, {}, "cpu"), tmp_path, stop, lambda: None,
        )  # fmt: skip
    assert shards.log_file(tmp_path, 2, 1).read_text() == "4\n"


# ---------------------------------------------------------------------- progress


def test_the_bar_shows_a_running_score(runner, tmp_path, monkeypatch):
    from twigvlm.evaluation.asking import progress

    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "SLOW", 0.0)
    _, _, err = runner("--out", str(tmp_path / "out"), "--batch-size", "4")
    shown = re.findall(r"(\d+)/20 [^\r]*?score ([\d.]+) on (\d+)", err)
    assert len(shown) > 3 and all(int(on) <= int(done) and score == "0.0" for done, score, on in shown)


# ---------------------------------------------------------------------- all of them


def test_the_suite_runs_every_setting_and_ends_in_the_table(runner, tmp_path, capsys):
    flags = ["--tasks", "gqa,vqav2", "--out", str(tmp_path / "out"), "--limit", "4"]
    at = runner.flags.index("-R")
    rest = runner.flags[:at] + runner.flags[at + 2 :]
    assert suite.main(["-R", "2,1.5", *flags, *rest]) == 0
    text, _ = capsys.readouterr()
    rows = [re.sub(" +", " ", row) for row in text.splitlines() if row.startswith("| ")]
    assert [row.split(" | ")[0].lstrip("| ") for row in rows[1:]] == [
        "base, first 4 questions", *(f"{m}, twig, first 4 questions" for m in ("TTP+SSD", "TTP+SSD", "TTP only", "SSD only")),
    ]  # fmt: skip
    assert [row.split(" | ")[1] for row in rows[1:]] == ["all", "2", "1.5", "1.5", "all"]
    assert len(list((tmp_path / "out").glob("*/answers/*/*/*/result.json"))) == 10


@pytest.mark.parametrize("flags", [["-R", "192,x"], ["-R", ","], ["--tasks", "gqa,nothing"], ["--sideways"]])
def test_usage_errors_of_the_suite(flags, capsys):
    with pytest.raises(SystemExit) as end:
        suite.main(flags)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


# ---------------------------------------------------------------------- the scripts


def test_there_is_a_script_for_every_benchmark_and_all_are_a_few_lines():
    names = {file.stem for file in SCRIPTS.glob("*.sh")}
    assert names == {*TASKS, *OWN, "all", "common", "compare"}
    for name in (*TASKS, *OWN, "all"):
        text = (SCRIPTS / f"{name}.sh").read_text()
        assert len(text.splitlines()) < 10 and "set -euo pipefail" in text


@pytest.mark.parametrize("name", ["gqa", pytest.param("all", marks=pytest.mark.slow)])
def test_an_unknown_option_of_a_script(name, tmp_path):
    done = script(name, "--sideways", cwd=tmp_path)
    assert done.returncode == 2 and "usage:" in done.stderr and not done.stdout


@pytest.mark.parametrize("name", [*TASKS, *OWN, "all"])
def test_what_a_script_hands_over(name, tmp_path):
    python = str(telling(tmp_path))
    done = script(name, "-R", "9", "a b", cwd=tmp_path, PYTHON=python, MODEL="m", TWIG="t t", DATA="d", twig_T="3")
    root, *words = done.stdout.splitlines()
    flags = ["--base-model", "m", "--twig-block", "t t", "--data", "d", "--twig-T", "3"]
    flags += [] if name == "all" else ["--task", name]
    module = "suite" if name == "all" else "run"
    assert done.returncode == 0 and root.split(":")[0] == str(ROOT), done.stderr
    assert words == ["-m", f"twigvlm.evaluation.{module}", *flags, "-R", "9", "a b"]


@pytest.mark.slow
def test_every_benchmark_on_the_embedded_model(tmp_path, capsys):
    flags = ["--tasks", "all", "-R", "64", "--limit", "2", "--no-speculation", "--device", "cpu", "--workers", "0"]
    assert suite.main([*flags, "--max-new-tokens", "16", "--out", str(tmp_path / "out")]) == 0
    files = list((tmp_path / "out").glob("*/answers/*/*/twig-R64-plain-first2/result.json"))
    results = {result["task"]: result for result in map(json.loads, (file.read_text() for file in files))}
    assert set(results) == set(TASKS) and capsys.readouterr().out.splitlines()[0].endswith(
        f"data {EMBEDDED_DATA} (its default)"
    )
    for name, result in results.items():
        assert result["R"] == 64 and result["questions"] == 2 and result["shards"] == 1
        assert result["visual_measured"] in (None, pytest.approx(64, abs=0.5))
        assert (result["score"] is None) == TASKS[name].timed_alone, "only a paid judge scores it"
        assert result["batch_sizes"] == [1 if TASKS[name].timed_alone else 8]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", list(TASKS))
def test_every_script_with_two_shards_on_the_embedded_model(name, tmp_path):
    done = script(name, "--limit", "4", "--num-shards", "2", "--out", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["R"] == 64 and result["shards"] == 2 and result["questions"] == 4
    assert result["visual_measured"] in (None, pytest.approx(64, abs=0.5))
    assert "sprout" in done.stdout.splitlines()[0] and str(EMBEDDED_DATA) in done.stdout.splitlines()[0]
    assert (result["score"] is None) == (name == "mmvet")


@pytest.mark.slow
def test_the_command_that_users_type(model, data, tmp_path):
    """Environment variables, a list of devices, relative paths, two local shards."""
    done = script(
        "gqa", "-R", "2", "--max-new-tokens", "4", "--out", "out", cwd=tmp_path,
        MODEL=model[0], TWIG=model[1], DATA="data", twig_K="2", twig_T="2", CUDA_VISIBLE_DEVICES="0,1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["letters"]["K"] == 2 and result["questions"] == QUESTIONS
    assert result["shards"] == min(2, cores())


@pytest.mark.slow
def test_a_shard_killed_in_the_middle(model, many, runner, tmp_path):
    out = tmp_path / "out"
    run_ = started(model, many, out, "--num-shards", "2")
    wait_for(out, "2_1.jsonl", 5)
    (victim,) = [pid for pid, args in children(run_.pid).items() if "--shard 1" in args]
    os.kill(victim, signal.SIGKILL)
    text, err = run_.communicate(timeout=600)
    assert run_.returncode == 1 and '"score"' not in text
    assert "shard 1 of 2 was killed by SIGKILL" in err.splitlines()[-1] and "last lines of" in err
    folder = folder_of(out)
    assert not (folder / "merge.jsonl").exists() and not (folder / "result.json").exists()
    assert len(read_lines(folder / "2_0.jsonl")) == MANY // 2  # the other one came to its end
    kept = (folder / "2_1.jsonl").read_bytes()
    result = same_command(runner, out)
    assert result["questions_timed"] >= MANY - 1
    whole = kept[: kept.rfind(b"\n") + 1]
    assert (folder / "2_1.jsonl").read_bytes().startswith(whole)  # nothing was asked again
    runner.done("--out", str(tmp_path / "alone"), "--max-new-tokens", "8")
    assert merged(out) == merged(tmp_path / "alone")


def same_command(runner, out: Path) -> dict:
    """The result of what `started` starts, of two shards in this process."""
    for i in (0, 1):
        flags = ("--max-new-tokens", "8", "--batch-size", "1", "--num-shards", "2", "--shard", str(i))
        result = runner.done("--out", str(out), *flags)
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [pytest.param((), marks=pytest.mark.nightly), ("--num-shards", "2")], ids=["one", "two"]
)
def test_sigterm_to_the_script(model, many, runner, tmp_path, flags):
    out = tmp_path / "out"
    env = dict(os.environ) | {"MODEL": model[0], "TWIG": model[1], "DATA": str(many)}
    command = ["bash", str(SCRIPTS / "gqa.sh"), "-R", "2", "--max-new-tokens", "8", "--batch-size", "1"]
    run_ = subprocess.Popen(
        [*command, "--out", str(out), *flags], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(out, "*.jsonl", 5)
    run_.send_signal(signal.SIGTERM)
    text, err = run_.communicate(timeout=600)
    assert run_.returncode == 143 and '"score"' not in text and "Traceback" not in err, err
    assert "stopped:" in err
    for file in folder_of(out).glob("*.jsonl"):
        assert file.read_bytes().endswith(b"\n")
    assert same_command(runner, out)["questions"] == MANY


@pytest.mark.slow
def test_shards_end_when_their_launcher_is_killed(model, many, tmp_path):
    out = tmp_path / "out"
    run_ = started(model, many, out, "--num-shards", "2")
    wait_for(out, "*.jsonl", 5)
    shard = list(children(run_.pid))
    run_.kill()
    run_.communicate()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in shard):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert sum(len(read_lines(f)) for f in folder_of(out).glob("2_*.jsonl")) < MANY


def test_torchrun_style_processes_end_in_one_score(runner, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ends = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        ends.append(runner.done("--out", str(tmp_path / "out"), "--limit", "6"))
    first, last = ends
    assert first["score"] is None and first["missing"] == 3 and last["score"] is not None and last["shards"] == 2


def test_settings_of_the_embedded_model():
    setting = Setting()
    assert setting.model_name == "sprout" and setting.name == "twig-R64" and setting.twig_name == "sprout"
    assert Setting(baseline=True).name == "base" and Setting(baseline=True).writing.draft_length == 0
    assert Setting(writing=writing(retained_tokens=None)).name == "ssd"
    assert Setting(writing=writing(retained_tokens=192), limit=4).name == "twig-R192-first4"
    other = ModelSettings("org/llava-v1.5-7b", "/x/my-twig")
    assert Setting(other).name == "twig-R64@my-twig" and Setting(other).model_name == "llava-v1.5-7b"


def test_options_that_change_answers_have_folders_of_their_own():
    """Whatever `generate` takes: one that is new is in the name and the identity by being a field."""
    usual = Setting()
    for name, value in {"query": "text", "draft_length": 3, "draft_confidence": 0.5, "top_k": 7}.items():
        made = Setting(writing=replace(usual.writing, **{name: value}))
        assert made.name != usual.name and str(value) in made.name
        assert made.identity("gqa", "s", []) == {**usual.identity("gqa", "s", []), name: value}
    assert "wipe_layer" not in usual.identity("gqa", "s", [])
    assert Setting(ModelSettings(wipe_layer=9)).identity("gqa", "s", [])["wipe_layer"] == 9


def writing(**options) -> GenerationSettings:
    return replace(Setting().writing, **options)


def test_a_shard_that_begins_while_another_writes_its_first_answer(tmp_path, monkeypatch):
    """What the other notes first, its settings, is there when its answers are seen."""
    folder, identity = Folder(tmp_path / "answers"), {"R": 64.0}

    def other_begins(self):
        write_json(identity, self.path / "settings.json")
        (self.path / "2_1.jsonl").touch()
        return [self.path / "2_1.jsonl"]

    folder.path.mkdir()
    monkeypatch.setattr(Folder, "shard_files", other_begins)
    folder.prepare(identity)
