"""Annotations are matched before the first question; notes and results say what was asked; own questions are asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from twigvlm.errors import InputError
from twigvlm.evaluation import run, score, suite
from twigvlm.evaluation.asking.job import Job
from twigvlm.evaluation.asking.setting import Setting
from twigvlm.evaluation.tasks import TASKS, find
from twigvlm.evaluation.tasks.base import Question
from twigvlm.evaluation.tasks.reading import read_records
from twigvlm.evaluation.tasks.vqa import exact_match, vqa_accuracy
from twigvlm.world import drawn as benchmarks


@pytest.fixture
def unasked(monkeypatch):
    """No question may reach a model."""
    monkeypatch.setattr(run.Models, "get", lambda *_: pytest.fail("opened the model"))
    monkeypatch.setattr(run, "foresee", lambda *_: None)


def copied(sprout: Path, name: str, tmp_path: Path) -> Path:
    shutil.copytree(sprout / benchmarks.FOLDERS[name], tmp_path / "data" / benchmarks.FOLDERS[name])
    return tmp_path / "data"


def rewrite(file: Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def newer_labels(home: Path) -> None:
    """As POPE's repository has them today: the same questions about other pictures."""
    for file in (home / "pope/coco").glob("coco_pope_*.json"):
        rows = [json.dumps(row | {"image": "COCO_val2014_000000548882.jpg"}) for row in read_records(file)]
        file.write_text("\n".join(rows) + "\n")


def fewer_labels(home: Path) -> None:
    file = home / "pope/coco/coco_pope_popular.json"
    file.write_text("\n".join(file.read_text().splitlines()[:-5]) + "\n")


def no_random_labels(home: Path) -> None:
    (home / "pope/coco/coco_pope_random.json").unlink()


def stripped_gqa(home: Path) -> None:
    rewrite(
        home / "gqa/data/testdev_balanced_questions.json",
        lambda table: [row.pop("types") for row in table.values()],
    )


def other_gqa(home: Path) -> None:
    def change(table: dict) -> None:
        for name in list(table)[:3]:
            del table[name]

    rewrite(home / "gqa/data/testdev_balanced_questions.json", change)


def stripped_vqav2(home: Path) -> None:
    rewrite(
        home / "vqav2/v2_mscoco_val2014_annotations.json",
        lambda table: [row.pop("answer_type") for row in table["annotations"]],
    )


def other_vqav2(home: Path) -> None:
    rewrite(home / "vqav2/v2_mscoco_val2014_annotations.json", lambda table: table["annotations"].pop())


def other_textvqa(home: Path) -> None:
    rewrite(home / "textvqa/TextVQA_0.5.1_val.json", lambda table: table["data"].pop(0))


def other_mme(home: Path) -> None:
    next((home / "MME").rglob("*.txt")).write_text("Is this something else? Please answer yes or no.\tYes\n")


def other_sqa(home: Path) -> None:
    rewrite(home / "scienceqa/pid_splits.json", lambda table: table["test"].pop(0))


def other_seed(home: Path) -> None:
    rewrite(home / "seed_bench/SEED-Bench.json", lambda table: table["questions"].pop(0))


def other_mmbench(home: Path) -> None:
    file = home / "mmbench/mmbench_dev_20230712.tsv"
    head, *rows = file.read_text(encoding="utf-8").splitlines()
    at = head.split("\t").index("answer")
    cells = rows[0].split("\t")
    cells[at] = "Z"
    file.write_text("\n".join([head, "\t".join(cells), *rows[1:]]) + "\n", encoding="utf-8")


def other_mmmu(home: Path) -> None:
    file = home / "mmmu/validation.jsonl"
    rows = read_records(file)
    rows[0]["answer"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("pope", newer_labels, ["coco_pope_adversarial.json", "60 of 60 labels are of other questions", "e3e3926"]),
        ("pope", fewer_labels, ["coco_pope_popular.json has 55 labels", "asks 60 questions"]),
        ("pope", no_random_labels, ["coco_pope_random.json"]),
        ("gqa", stripped_gqa, ["testdev_balanced_questions.json", "'types' is missing"]),
        ("gqa", other_gqa, ["holds no answer to 3 of the 200 questions", "testdev_balanced_questions.json"]),
        ("vqav2", stripped_vqav2, ["v2_mscoco_val2014_annotations.json", "'answer_type' is missing"]),
        ("vqav2", other_vqav2, ["holds no answer to 1 of the 180 questions"]),
        ("textvqa", other_textvqa, ["holds no answer to", "TextVQA_0.5.1_val.json"]),
        ("mme", other_mme, ["holds no answer to 2 of the 168 questions"]),
        ("sqa", other_sqa, ["holds no answer to 1 of the 200 questions", "problems.json"]),
        ("seed", other_seed, ["holds no answer to 1 of the 72 questions", "SEED-Bench.json"]),
        ("mmbench", other_mmbench, ["'Z'", "mmbench_dev_20230712.tsv"]),
        ("mmmu", other_mmmu, ["has no answer to", "validation.jsonl"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_scored_is_not_asked(sprout, tmp_path, capsys, unasked, name, spoil, words):
    data = copied(sprout, name, tmp_path)
    spoil(data)
    split = ["--split", "val"] if name == "vqav2" else []
    flags = ["--task", name, "--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu", *split]
    assert run.main(flags) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all(word in message for word in [*words, "nothing is asked", "playground/README.md", "--answer-only"]), (
        message
    )
    assert "/tmp/tmp" not in message and "--strict" not in message, "names no file of ours and no flag that is not here"
    assert not (tmp_path / "out").exists()


def test_the_suite_matches_every_benchmark_before_the_first(sprout, tmp_path, capsys, unasked):
    data = copied(sprout, "gqa", tmp_path)
    copied(sprout, "pope", tmp_path)
    newer_labels(data)
    flags = ["--tasks", "gqa,pope", "--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert suite.main(flags) == 2
    assert "POPE could not be scored" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("limit", [None, 4])
def test_whole_files_match(sprout, tmp_path, name, limit):
    for split in TASKS[name].splits:
        if all(path.exists() for path in TASKS[name].files(sprout, split).values()):
            Job(TASKS[name], Setting(limit=limit), sprout, split, tmp_path).match()


# ---------------------------------------------------------------------- what notes say


def finished(task, data: Path, split: str, out: Path, limit: int | None = None) -> dict:
    """The result of a run whose answers are all "yes"."""
    job = Job(task, Setting(limit=limit), data, split, out)
    lines = [job._empty_answer(q) | {"text": "yes"} for q in job.questions]
    job.folder.path.mkdir(parents=True)
    (job.folder.path / "1_0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return job.finish("command", None)


def test_a_limited_score_is_marked_as_partial(sprout, tmp_path, capsys):
    for name in ("gqa", "vqav2", "mmbench", "pope"):
        split = "val" if name == "vqav2" else TASKS[name].splits[0]
        result = finished(TASKS[name], sprout, split, tmp_path / name, limit=4)
        assert result["partial"] and result["questions"] == 4 < result["questions_in_all"]
        assert f"the first 4 of {result['questions_in_all']} questions" in result["note"]
        run.show(result)
        *_, said, where = capsys.readouterr().out.splitlines()
        assert (
            said.endswith(f"on the first 4 of {result['questions_in_all']} questions")
            and f"{result['score']:.2f}" in said
        )
        assert where == f"result: {result['result']}"
        whole = finished(TASKS[name], sprout, split, tmp_path / f"{name} whole")
        assert not whole["partial"] and "partial" not in whole["note"]
        run.show(whole)
        assert "on the first" not in capsys.readouterr().out


def test_pope_says_which_settings_were_asked(sprout, tmp_path):
    whole = finished(find("pope"), sprout, "test", tmp_path / "whole")
    assert sorted(whole["parts"]["settings"]) == ["adversarial", "popular", "random"]
    assert whole["metric"] == find("pope").metric and "asked:" not in whole["note"]
    few = finished(find("pope"), sprout, "test", tmp_path / "few", limit=8)
    (only,) = few["parts"]["settings"]
    absent = sorted({"adversarial", "popular", "random"} - {only})
    assert few["metric"] == f"F1 of {only}, %"
    assert f"asked: {only}" in few["note"] and all(name in few["note"].split("not asked: ")[1] for name in absent)


def test_scores_of_single_questions_stand_beside_the_result(sprout, tmp_path):
    """Whatever their number: a result's size does not depend on the benchmark's."""
    for name, part in (("vqav2", "evalQA"), ("textvqa", "items"), ("pope", "parsed"), ("sqa", "pred_idx")):
        split = "val" if name == "vqav2" else TASKS[name].splits[0]
        result = finished(TASKS[name], sprout, split, tmp_path / name, limit=20)
        assert part not in json.dumps(result["parts"])
        each = json.loads(Path(result["per_question"]).read_text())
        assert len(each[part]) == 20 and Path(result["per_question"]).parent == Path(result["result"]).parent
    assert finished(TASKS["mme"], sprout, "test", tmp_path / "mme")["per_question"] is None


class Terminal:
    def __init__(self, out):
        self.out = out

    def __getattr__(self, name):
        return getattr(self.out, name)

    def isatty(self) -> bool:
        return True


def test_the_json_line_is_for_programs(sprout, tmp_path, capsys, monkeypatch):
    data = copied(sprout, "gqa", tmp_path)
    out = tmp_path / "out"
    job = Job(find("gqa"), Setting(limit=2), data, "testdev_balanced", out)
    finished(find("gqa"), data, "testdev_balanced", out, limit=2)
    (job.folder.path / "settings.json").write_text(json.dumps(job.identity))
    flags = ["--task", "gqa", "--limit", "2", "--data", str(data), "--out", str(out), "--device", "cpu"]
    capsys.readouterr()
    assert run.main(flags) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["task"] == "gqa"
    with monkeypatch.context() as patch:
        patch.setattr(run.sys, "stdout", Terminal(run.sys.stdout))
        assert run.main(flags) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[-1].startswith("result: ") and "GQA" in said[-2] and "{" not in "".join(said)
        assert run.main([*flags, "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["task"] == "gqa"


# ---------------------------------------------------------------------- one's own questions


@pytest.fixture
def own(tmp_path) -> tuple[Path, Path]:
    """(question file, folder of pictures): one question without truth, one with one answer, one with ten people's."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20), "red").save(pictures / name)
    people = ["red"] * 3 + ["dark red"] * 7
    rows = [
        {"question_id": 1, "image": "a.png", "text": "Describe the image in detail."},
        {"question_id": "two", "image": "b.png", "text": "Is it red?", "answer": "Yes."},
        {
            "question_id": 3,
            "image": ["a.png", "b.png"],
            "text": "Which colour?",
            "answers": [{"answer": a} for a in people],
        },
        {"question_id": 4, "text": "Is there a picture?", "answer": "no"},
    ]
    file = tmp_path / "my-questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, pictures


def test_own_questions_are_asked_as_they_stand(own):
    file, pictures = own
    task = find("vqa").given(file, pictures)
    questions = task.questions(Path(), task.splits[0])
    assert questions[1] == Question("two", "Is it red?", (pictures / "b.png",), {"question_id": "two"})
    assert questions[2].images == (pictures / "a.png", pictures / "b.png") and questions[3].images == ()
    rewritten = [row | {"images": row.pop("image", None)} for row in read_records(file)]
    rewritten[0] |= {"image": None, "images": ["a.png"]}
    file.write_text("".join(json.dumps(row) + "\n" for row in rewritten))
    assert [q.images for q in task.questions(Path(), task.splits[0])] == [q.images for q in questions]


def test_own_questions_are_scored_where_there_are_answers(own, tmp_path):
    file, pictures = own
    job = Job(find("vqa").given(file, pictures), Setting(), file.parent, "my-questions", tmp_path / "out")
    said = {"1": "A red thing.", "two": "yes", "3": "Red", "4": "yes"}
    job.folder.path.mkdir(parents=True)
    lines = [job._empty_answer(q) | {"text": said[q.id]} for q in job.questions]
    (job.folder.path / "1_0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = job.finish("command", None)
    assert result["parts"] == {
        "vqa_accuracy": pytest.approx(100 * (1 + 0.9 + 0) / 3), "exact_match": pytest.approx(200 / 3), "count": 3,
    }  # fmt: skip
    assert result["score"] == result["parts"]["vqa_accuracy"] and "3 of 4 questions" in result["note"]
    assert "my-questions" in result["result"]
    items = json.loads(Path(result["per_question"]).read_text())["items"]
    assert [item["vqa_accuracy"] for item in items] == [1.0, pytest.approx(0.9), 0.0]


def test_own_answers_are_scored_without_a_model(own, tmp_path, capsys):
    file, _ = own
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"question_id": n, "text": "yes"}) + "\n" for n in (1, "two", 3, 4)))
    words = ["--task", "vqa", "--questions", str(file), "--answers", str(answers), "--json"]
    assert score.main(words) == 0
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(100 / 3)
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"annotations": [{"question_id": 1, "answers": [{"answer": "yes"}] * 10}]}))
    assert score.main([*words, "--annotations", str(truth)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["score"] == 100 and "1 of 4" in facts["note"]
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"question_id": 1, "text": "What?"}) + "\n")
    assert score.main(["--task", "vqa", "--questions", str(bare), "--answers", str(answers), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["score"] is None and "not scored" in facts["note"]


@pytest.mark.parametrize(
    ("answer", "given", "accuracy", "exact"),
    [
        ("Yes", ["yes"], 1.0, True),
        ("yes.", ["Yes"], 1.0, True),
        ("a dog", ["dog"], 1.0, False),
        ("two", ["2"], 1.0, False),
        ("cat", ["dog"], 0.0, False),
        ("dog", ["dog", "cat"], 0.5, True),
        ("dog", ["dog"] * 3 + ["cat"] * 7, 0.9, True),
        ("dog", ["dog"] * 4 + ["cat"] * 6, 1.0, True),
        ("", ["dog"], 0.0, False),
        ("dog", ["dog"] * 3 + [""] * 7, 0.9, True),
        ("a", ["dog"] * 9 + [""], 0.0, False),
        ("", ["dog"] * 9 + [""], 0.0, False),
        (" ", ["a"], 0.0, False),
    ],
)
def test_the_two_figures_of_own_questions(answer, given, accuracy, exact):
    assert vqa_accuracy(answer, given) == pytest.approx(accuracy)
    assert exact_match(answer, given) is exact


@pytest.mark.parametrize("people", [["red"] * 9 + [""], [{"answer": "red"}] * 9 + [{"answer": ""}]])
def test_who_said_nothing_is_one_of_ten(tmp_path, people):
    huge = 10**400
    rows = [
        {"question_id": 1, "text": "Which colour?", "answers": people},
        {"question_id": 2, "text": "How many?", "answer": huge},
        {"question_id": 3, "text": "What?", "answer": ""},
    ]
    said = {1: "red", 2: str(huge), 3: "x"}
    for name, lines in (("asked", rows), ("said", [{"question_id": n, "text": text} for n, text in said.items()])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = find("vqa")
    found = task.score_records(task.read_questions(tmp_path / "asked"), None, task.read_answers(tmp_path / "said"))
    assert [item["vqa_accuracy"] for item in found.parts["items"]] == [1.0, 1.0]
    assert "2 of 3" in found.note


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[0].pop("text"), ["'text' is missing"]),
        (lambda rows: rows[0].update(text=" "), ["question 1", "empty"]),
        (lambda rows: rows[0].update(image=7), ["question 1", "image is 7"]),
        *(
            (lambda rows, key=key: rows[0].update({"image": None, key: "a.png"}), ["question 1", f'"{key}" is'])
            for key in ("img", "Image", "image_path", "image_url", "pictures", "video", "Video", "video_path", "audio")
        ),
        (lambda rows: rows[0].update(images=["b.png"]), ["question 1", "both image and images"]),
        (lambda rows: rows[0].update(image="http://a.b/c.png"), ["question 1", "http://a.b/c.png is an address"]),
        (lambda rows: rows[0].update(image=None, images=["data:image/png;base64,AA"]), ["question 1", "is an address"]),
        (lambda rows: rows[0].update(image="."), ["question 1", "no file"]),
        (lambda rows: rows[0].update(image="x" * 4000), ["question 1", "not there"]),
        (lambda rows: rows[0].update(image="a\0b"), ["question 1", "not there"]),
        (lambda rows: rows[0].update(text="<image> or <image>?"), ["question 1", "2 <image> marks for 1 images"]),
        (lambda rows: rows[3].update(text="<image>?"), ["question 4", "1 <image> marks for 0 images"]),
        (lambda rows: rows[1].update(answers=["", " "]), ["question two", "all of its 2 answers are empty"]),
        *(
            (
                lambda rows, key=key: rows.__setitem__(
                    slice(None), [{"question_id": 1, "text": "What?", key: value} for value in ("0012", 7)]
                ),
                ["none of its questions names a picture", f"question_id, text, {key}", '"image" or "images"'],
            )
            for key in ("image_id", "imageId", "file_name", "image_src")
        ),
        (lambda rows: rows[1].update(answer=float("nan")), ["question two", "an answer is nan"]),
        (lambda rows: rows[1].update(answers=[{"text": "yes"}]), ["question two", "an answer is {'text'"]),
        (lambda rows: rows[1].update(answers=[["yes"]]), ["question two", "an answer is ['yes']"]),
        (lambda rows: rows[1].update(question_id=True), ["'question_id' is a JSON boolean"]),
        (lambda rows: rows[1].update(question_id=""), ["'question_id' is empty"]),
        (lambda rows: rows[1].update(question_id=1), ["1", "twice"]),
        (lambda rows: rows[1].update(answer={"a": 1}), ["question two", "a text is needed"]),
        (lambda rows: rows[0].update(image="gone.png"), ["question 1", "gone.png"]),
    ],
)
def test_damaged_own_questions_are_named(own, tmp_path, capsys, unasked, change, words):
    file, pictures = own
    rows = read_records(file)
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--task",
        "vqa",
        "--question-file",
        str(file),
        "--image-folder",
        str(pictures),
        "--out",
        str(tmp_path / "o"),
    ]
    assert run.main([*flags, "--device", "cpu"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "vqa"], ["--question-file"]),
        (["--task", "vqa", "--question-file", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["--task", "vqa", "--question-file", "/dev/zero"], ["/dev/zero", "is a pipe or a device"]),
        (["--task", "vqa", "--question-file", __file__, "--image-folder", "nowhere"], ["nowhere", "no such folder"]),
        (["--task", "vqa", "--question-file", __file__, "--data", str(ROOT)], ["--data"]),
        (["--task", "gqa", "--question-file", __file__], ["--question-file", "--task vqa"]),
        (["--task", "gqa", "--image-folder", str(ROOT)], ["--image-folder", "--task vqa"]),
    ],
)
def test_flags_of_own_questions(flags, words, capsys, unasked):
    assert run.main(flags) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in message for word in words), message


def test_a_field_that_stands_twice_is_told(own):
    file, pictures = own
    file.write_text('{"question_id": 1, "image": "a.png", "text": "What?", "image": "b.png"}\n')
    with pytest.raises(InputError, match=r"my-questions\.jsonl:1: names the field 'image' twice"):
        find("vqa").given(file, pictures).questions(Path(), "my-questions")


def test_pictures_of_own_questions_need_their_folder(own):
    file, _ = own
    with pytest.raises(InputError, match="--image-folder"):
        find("vqa").given(file, None).questions(Path(), "my-questions")


def test_own_questions_are_no_benchmark_of_the_suite(capsys):
    with pytest.raises(SystemExit) as end:
        suite.main(["--tasks", "vqa"])
    assert end.value.code == 2 and "--task vqa" in capsys.readouterr().err


@pytest.mark.slow
def test_own_questions_on_the_embedded_model(own, capsys):
    file, pictures = own
    flags = ["--question-file", str(file), "--image-folder", str(pictures), "--device", "cpu", "--workers", "0"]
    assert run.main(["--task", "vqa", *flags, "--max-new-tokens", "16"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["questions"] == 4 and facts["parts"]["count"] == 3
    rows = read_records(file.parent / "answers/vqa_my-questions/sprout/twig-R64/merge.jsonl")
    assert [row["question_id"] for row in rows] == [1, "two", 3, 4]
