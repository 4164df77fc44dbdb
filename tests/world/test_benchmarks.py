"""The embedded data in every benchmark's format, the tasks that read it, and the check of data folders.

Truth is read twice: from the benchmark's own annotation files, and from the scenes that the pictures show.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from twigvlm.errors import InputError, RunError
from twigvlm.evaluation import check
from twigvlm.evaluation.tasks import TASKS
from twigvlm.evaluation.tasks.mmbench import option_of, options_of, read_table, write_spreadsheet
from twigvlm.evaluation.tasks.mmmu import open_is_right, read_items, read_letter
from twigvlm.world import chinese
from twigvlm.world import drawn as benchmarks
from twigvlm.world.benchmarks import mme, scienceqa, textvqa
from twigvlm.world.benchmarks import pool as supply
from twigvlm.world.benchmarks import seed as seed_bench
from twigvlm.world.draw import IMAGE_SIZE
from twigvlm.world.questions import LETTERS, SINGLE_WORD
from twigvlm.world.scenes import COLOURS, SHAPES

ROOT = Path(__file__).resolve().parents[2]
EIGHT = ("gqa", "mme", "mmbench", "sqa", "textvqa", "vqav2", "pope", "mmvet")  # of the paper
SPLITS = [(name, split) for name, task in TASKS.items() for split in task.splits]
WRITTEN = [pair for pair in SPLITS if not pair[1].startswith("mmbench_") or pair[1] in (
    "mmbench_dev_20230712", "mmbench_dev_cn_20231003")]  # fmt: skip


@pytest.fixture(scope="module")
def sprout(tmp_path_factory) -> Path:
    return benchmarks.ensure(tmp_path_factory.mktemp("data") / "sprout")


@pytest.fixture
def copy(sprout, tmp_path):
    """A folder with some benchmarks of one's own, to be broken."""

    def make(*names: str) -> Path:
        for name in names:
            shutil.copytree(sprout / benchmarks.FOLDERS[name], tmp_path / benchmarks.FOLDERS[name])
        return tmp_path

    return make


def run(*arguments, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that a reader of the data may open."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if ".pictures" not in p.parts}


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def seed_of(image: str) -> int:
    """The scene that a picture shows, from its name."""
    name = Path(image).stem
    if name.startswith("COCO"):
        return int(name.rsplit("_", 1)[1]) - 1
    return int(name, 16) if len(name) == 16 else int(name.lstrip("n"))


# ---------------------------------------------------------------------- what is right


def right_answers(root: Path, name: str, split: str) -> list[str]:
    """The best possible answer to each question, in order, from the annotation files."""
    questions = TASKS[name].questions(root, split)
    ids = [str(q.line.get("question_id", q.id)) for q in questions]
    if name == "gqa":
        truth = load(root / "gqa/data/testdev_balanced_questions.json")
        return [truth[key]["answer"].capitalize() + "." for key in ids]
    if name == "mme":
        truth = mme_truth(root)
        return [truth[key, q.prompt.split("\n")[0]] for key, q in zip(ids, questions, strict=True)]
    if name.startswith("mmbench"):
        return [row["answer"] for row in read_table(root / f"mmbench/{split}.tsv", images=False)]
    if name == "sqa":
        problems = load(root / "scienceqa/problems.json")
        return [LETTERS[problems[key]["answer"]] for key in ids]
    if name == "textvqa":
        data = load(root / "textvqa/TextVQA_0.5.1_val.json")["data"]
        truth = {(row["image_id"], row["question"]): most(row["answers"]) for row in data}
        return [truth[key, q.prompt.split("\n")[0]] for key, q in zip(ids, questions, strict=True)]
    if name == "vqav2":
        rows = load(root / "vqav2/v2_mscoco_val2014_annotations.json")["annotations"]
        truth = {str(row["question_id"]): most([a["answer"] for a in row["answers"]]) for row in rows}
        return [truth.get(key, "yes") for key in ids]
    if name == "pope":
        lines = records(root / "pope/llava_pope_test.jsonl")
        labels = {
            s: iter(records(root / f"pope/coco/coco_pope_{s}.json")) for s in ("adversarial", "popular", "random")
        }
        return [next(labels[line["category"]])["label"].capitalize() for line in lines]
    if name == "seed":
        truth = {row["question_id"]: row["answer"] for row in load(root / "seed_bench/SEED-Bench.json")["questions"]}
        return [truth[key] for key in ids]
    if name == "mmmu":
        return [item.answer for item in read_items(root / "mmmu/validation.jsonl")]
    truth = load(root / "mm-vet/mm-vet.json")
    return [truth[f"v1_{key}"]["answer"] for key in ids]


def mme_truth(root: Path) -> dict[tuple[str, str], str]:
    truth = {}
    for line in records(root / "MME/llava_mme.jsonl"):
        image = root / "MME/MME_Benchmark_release_version" / line["image"]
        text = Path(str(image).replace("/images/", "/questions_answers_YN/")).with_suffix(".txt")
        for row in text.read_text().splitlines():
            question, answer = row.split("\t")
            truth[line["question_id"], question.removesuffix(" Please answer yes or no.")] = answer
    return truth


def most(answers: list[str]) -> str:
    return Counter(answers).most_common(1)[0][0]


def wrong(name: str, answer: str) -> str:
    if answer.lower() in ("yes", "no", "yes.", "no."):
        return "No" if answer.lower().startswith("yes") else "Yes"
    return LETTERS[(LETTERS.index(answer) + 1) % 4] if answer in LETTERS else "nothing of the kind"


def write_answers(path: Path, root: Path, name: str, split: str, texts: list[str]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for question, text in zip(TASKS[name].questions(root, split), texts, strict=True):
            line = {"question_id": question.id, "prompt": question.prompt, "text": text, "metadata": {}}
            file.write(json.dumps({**line, **question.line}) + "\n")
    return path


def score(root: Path, name: str, split: str, answers: Path, strict: bool = True):
    files = TASKS[name].files(root, split)
    return TASKS[name].score(files["questions"], files.get("annotations"), answers, strict)


# ---------------------------------------------------------------------- the embedded data


@pytest.mark.parametrize(("name", "split"), WRITTEN)
def test_every_task_reads_its_own_format(sprout, name, split):
    task = TASKS[name]
    questions = task.questions(sprout, split)
    assert 24 <= len(questions) <= 250
    assert len({q.id for q in questions}) == len(questions)
    endings = {task.suffix.strip(), getattr(task, "open_suffix", task.suffix).strip()}
    assert all(q.prompt.endswith(tuple(endings)) and "<image>" not in q.prompt for q in questions)
    assert all(len(q.images) == 1 for q in questions if name != "sqa")
    for picture in {picture for q in questions for picture in q.images}:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            assert image.size == (IMAGE_SIZE, IMAGE_SIZE) and image.mode == "RGB"
            image.load()


@pytest.mark.parametrize(("name", "split"), WRITTEN)
def test_right_answers_earn_everything_and_wrong_ones_nothing(sprout, tmp_path, name, split):
    texts = right_answers(sprout, name, split)
    best = score(sprout, name, split, write_answers(tmp_path / "right.jsonl", sprout, name, split, texts))
    assert not best.doubts
    if name == "mmvet" or split == "test-dev":
        assert best.score is None and "not scored here" in best.note
        return
    worst = write_answers(tmp_path / "wrong.jsonl", sprout, name, split, [wrong(name, text) for text in texts])
    assert score(sprout, name, split, worst).score == 0
    if name == "mme":
        points = {**best.parts["Perception"]["tasks"], **best.parts["Cognition"]["tasks"]}
        assert len(points) == 6 and set(points.values()) == {200.0} and best.score == 1200
    else:
        assert best.score == pytest.approx(100, abs=1e-9)


def test_the_same_bytes_in_another_process(sprout, tmp_path):
    again = tmp_path / "again"
    done = run("-m", "twigvlm.world.drawn", "--out", str(again), PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    assert contents(again) == contents(sprout)
    assert len(done.stdout.splitlines()) == len(benchmarks.WRITERS)


def test_it_is_small_and_pictures_are_kept_once(sprout):
    inodes = {path.stat().st_ino: path.stat().st_size for path in sprout.rglob("*") if path.is_file()}
    assert sum(inodes.values()) < 8e6
    assert len(list(sprout.rglob("*.jpg"))) > 2 * len(list((sprout / ".pictures").glob("*.jpeg")))


def test_all_questions_can_be_asked_in_ten_minutes(sprout):
    """At four short questions and a third of a description a second, which two cores reach."""
    counts = {
        name: len(TASKS[name].questions(sprout, "val" if name == "vqav2" else TASKS[name].splits[0])) for name in EIGHT
    }
    seconds = sum(3 * n if name == "mmvet" else n / 4 for name, n in counts.items())
    assert seconds < 450, counts


def test_yes_and_no_are_balanced(sprout):
    for name, split in (("gqa", "testdev_balanced"), ("mme", "test"), ("pope", "test"), ("vqav2", "val")):
        said = Counter(text.lower().strip(".") for text in right_answers(sprout, name, split))
        assert said["yes"] == said["no"] >= 40, name
    for setting in ("random", "popular", "adversarial"):
        labels = Counter(row["label"] for row in records(sprout / f"pope/coco/coco_pope_{setting}.json"))
        assert labels == {"yes": 30, "no": 30}
    said = Counter(right_answers(sprout, "textvqa", "val"))
    assert said["yes"] == said["no"] == textvqa.BLANK_SCENES


def test_what_pope_and_mme_say_is_in_the_pictures(sprout):
    """A second reading of the scene: is the named object there?"""
    asked = re.compile(r"(?:Is there|Can you see) an? (?:(\w+) (\w+)|(\w+))(?: in the (?:image|picture))?\?")
    lines = [(row["image"], row["text"], row["label"]) for s in ("random", "popular", "adversarial")
             for row in records(sprout / f"pope/coco/coco_pope_{s}.json")]  # fmt: skip
    lines += [
        (key, question, answer) for (key, question), answer in mme_truth(sprout).items() if key[:2] in ("ex", "co")
    ]
    checked = 0
    for image, text, label in lines:
        match = asked.fullmatch(text)
        if match is None:
            continue
        first, second, alone = match.groups()
        objects = supply.scene(seed_of(image)).objects
        if alone:
            there = any(o.shape == alone for o in objects)
        elif second == "object":
            there = any(o.colour == first for o in objects)
        else:
            assert first in COLOURS and second in SHAPES
            there = any((o.colour, o.shape) == (first, second) for o in objects)
        assert there == (label.lower() == "yes"), (image, text)
        checked += 1
    assert checked >= 180 + 2 * mme.MME_PICTURES


def test_popes_settings_differ_as_they_should(sprout):
    absent = {}
    for setting in ("random", "popular", "adversarial"):
        rows = [r for r in records(sprout / f"pope/coco/coco_pope_{setting}.json") if r["label"] == "no"]
        absent[setting] = [(seed_of(r["image"]), " ".join(r["text"].split()[3:5])) for r in rows]
    counts = Counter(o.name for seed in supply.SCENES for o in supply.scene(seed).objects)

    def mean(rows) -> float:
        return sum(counts[name] for _, name in rows) / len(rows)

    def likeness(rows) -> float:
        shared = 0
        for seed, name in rows:
            colour, shape = name.split()
            objects = supply.scene(seed).objects
            shared += any(o.colour == colour for o in objects) + any(o.shape == shape for o in objects)
        return shared / len(rows)

    assert mean(absent["popular"]) > 2 * mean(absent["random"])
    assert likeness(absent["adversarial"]) > 1.5 * likeness(absent["random"])


def test_mme_asks_a_yes_and_a_no_about_each_picture(sprout):
    release = sprout / "MME/MME_Benchmark_release_version"
    texts = list(release.rglob("*.txt"))
    assert len(texts) == 6 * mme.MME_PICTURES
    for text in texts:
        assert [row.split("\t")[1] for row in text.read_text().splitlines()] == ["Yes", "No"]
    assert (release / "scene/images").is_dir() and (release / "scene/questions_answers_YN").is_dir()
    lines = records(sprout / "MME/llava_mme.jsonl")
    assert all(one["image"] == two["image"] for one, two in zip(lines[::2], lines[1::2], strict=True))


def test_gqa_has_types_programs_and_scenes(sprout):
    questions = load(sprout / "gqa/data/testdev_balanced_questions.json")
    scenes = load(sprout / "gqa/data/testdev_balanced_sceneGraphs.json")
    kinds = Counter(q["types"]["structural"] for q in questions.values())
    assert set(kinds) == {"query", "verify", "choose", "compare"} and min(kinds.values()) >= 16
    assert {q["types"]["semantic"] for q in questions.values()} == {"obj", "attr", "rel", "cat"}
    for q in questions.values():
        assert q["isBalanced"] and (q["groups"]["global"] is None) == (q["types"]["structural"] != "query")
        assert all(set(step) == {"operation", "dependencies", "argument"} for step in q["semantic"])
        graph = scenes[q["imageId"]]
        names = {(o["attributes"][0], o["name"]) for o in graph["objects"].values()}
        assert names == {(o.colour, o.shape) for o in supply.scene(int(q["imageId"][1:])).objects}
        assert all(o["x"] + o["w"] <= graph["width"] for o in graph["objects"].values())


def test_ten_people_answer(sprout):
    rows = load(sprout / "textvqa/TextVQA_0.5.1_val.json")["data"]
    assert all(len(row["answers"]) == 10 for row in rows)
    assert any(len(set(row["answers"])) > 1 for row in rows)
    rows = load(sprout / "vqav2/v2_mscoco_val2014_annotations.json")["annotations"]
    assert all([a["answer_id"] for a in row["answers"]] == list(range(1, 11)) for row in rows)
    assert {row["answer_type"] for row in rows} == {"yes/no", "number", "other"}
    asked = load(sprout / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    assert [row["question_id"] for row in asked] == [row["question_id"] for row in rows]


def test_ocr_tokens_stand_in_the_prompt_and_say_what_is_printed(sprout):
    lines = records(sprout / "textvqa/llava_textvqa_val_v051_ocr.jsonl")
    found = {
        row["image_id"]: row["ocr_tokens"] for row in load(sprout / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json")["data"]
    }
    with_tokens = [line for line in lines if "Reference OCR token: " in line["text"]]
    assert 0.25 < len(with_tokens) / len(lines) < 0.75
    for line in lines:
        rows = line["text"].split("\n")
        tokens = found[line["question_id"]]
        assert rows[-1] == SINGLE_WORD
        assert rows[1:-1] == ([f"Reference OCR token: {tokens[0]}"] if tokens else [])
        assert not tokens or tokens == [supply.scene(seed_of(line["image"])).word]


def test_scienceqa_comes_with_and_without_pictures(sprout):
    asked = load(sprout / "scienceqa/llava_test_CQM-A.json")
    problems, splits = load(sprout / "scienceqa/problems.json"), load(sprout / "scienceqa/pid_splits.json")
    assert splits["test"] == [record["id"] for record in asked] == list(problems)
    blind = [record for record in asked if "image" not in record]
    assert len(blind) == scienceqa.SCIENCE_BLIND and len(asked) == 200
    assert all(problems[r["id"]]["image"] is None and "<image>" not in r["conversations"][0]["value"] for r in blind)
    letters = Counter(problem["answer"] for problem in problems.values())
    assert min(letters.values()) > len(problems) / 8


def test_mmbench_turns_its_options(sprout, tmp_path):
    path = sprout / "mmbench/mmbench_dev_20230712.tsv"
    rows = list(read_table(path))
    groups: dict[int, list[dict]] = {}
    for row in rows:
        groups.setdefault(int(row["index"]) % 1_000_000, []).append(row)
        assert Image.open(io.BytesIO(base64.b64decode(row["image"], validate=True))).format == "JPEG"
    assert len(groups) == 48
    for group in groups.values():
        assert [int(row["index"]) // 1_000_000 for row in group] == [0, 1, 2, 3]
        assert len({row[row["answer"]] for row in group}) == 1, "the right option keeps its text"
        assert {row["answer"] for row in group} == set(LETTERS)
        assert len({(row["image"], row["question"]) for row in group}) == 1
    always_a = write_answers(tmp_path / "a.jsonl", sprout, "mmbench", path.stem, ["A"] * len(rows))
    found = score(sprout, "mmbench", path.stem, always_a)
    assert found.score == 0 and 10 < found.parts["plain"] < 45


def test_the_chinese_file_is_chinese(sprout):
    for row in read_table(sprout / "mmbench/mmbench_dev_cn_20231003.tsv", images=False):
        assert re.search("[\u4e00-\u9fff]", row["question"]) and not re.search("[a-z]", row["question"])
        assert all(re.fullmatch("[\u4e00-\u9fff]+|[A-Z]+|[0-6]", text) for text in options_of(row).values())
    prompt = TASKS["mmbench_cn"].questions(sprout, "mmbench_dev_cn_20231003")[0].prompt
    assert prompt.endswith("\n请直接回答选项字母。")
    assert chinese.question("Which shape does the red object have?") == "红色物体是什么形状？"
    assert chinese.question("Count the crosses.") == "图中有多少个十字形？"


# ---------------------------------------------------------------------- writing


def test_nothing_is_written_twice(sprout, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in sprout.rglob("*.json*")}
    monkeypatch.setattr(benchmarks, "_generate", lambda *_: pytest.fail("the data are there"))
    assert benchmarks.ensure(sprout) == sprout
    assert before == {path: path.stat().st_mtime_ns for path in sprout.rglob("*.json*")}


def test_a_killed_generation_leaves_nothing_half_finished(sprout, tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from twigvlm.world import drawn as b; write = b.WRITERS['gqa']\n"
        "b.Folder.json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"  # after the pictures, before the annotations
        f"b.ensure(Path({str(tmp_path)!r}), 'gqa')"
    )
    assert run("-c", code).returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".part-*")) and not (tmp_path / "gqa").exists()
    benchmarks.ensure(tmp_path, "gqa")
    assert contents(tmp_path / "gqa") == contents(sprout / "gqa")
    assert not list(tmp_path.glob(".part-*"))


def test_shards_may_generate_at_once(sprout, tmp_path):
    command = [sys.executable, "-m", "twigvlm.world.drawn", "--out", str(tmp_path), "--task", "pope"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shards = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [shard.wait(timeout=120) for shard in shards] == [0, 0, 0]
    assert contents(tmp_path / "pope") == contents(sprout / "pope")
    assert not list(tmp_path.glob(".part-*"))


def test_without_locks_the_first_one_wins(sprout, tmp_path, monkeypatch):
    """Where a file system's locks keep nobody out, the renames do."""
    monkeypatch.setattr(benchmarks, "alone", lambda file: contextlib.nullcontext())
    write = benchmarks.WRITERS["pope"]

    def slow(out):
        monkeypatch.setitem(benchmarks.WRITERS, "pope", write)
        benchmarks.ensure(tmp_path, "pope")  # another process meanwhile
        write(out)

    monkeypatch.setitem(benchmarks.WRITERS, "pope", slow)
    benchmarks.ensure(tmp_path, "pope")
    assert contents(tmp_path / "pope") == contents(sprout / "pope")


def test_other_code_writes_again_and_leaves_answers_alone(sprout, copy, monkeypatch):
    root = copy("pope")
    (root / "pope/answers").mkdir()
    (root / "pope/answers/mine.jsonl").write_text("{}\n")
    (root / "pope/llava_pope_test.jsonl").write_text("old")
    shutil.rmtree(root / "pope/coco")  # the older version had none
    stamp = {
        **load(root / "pope/sprout.json"),
        "version": "older",
        "files": ["gone", "llava_pope_test.jsonl", "val2014"],
    }
    (root / "pope/sprout.json").write_text(json.dumps(stamp))
    (root / "pope/gone").write_text("of the older version")

    monkeypatch.setattr(benchmarks.os, "rename", stumble := Stumble(os.rename, at=2))
    with pytest.raises(RunError):
        benchmarks.ensure(root, "pope")  # the disk fails in the middle
    assert stumble.calls == 2
    monkeypatch.undo()
    benchmarks.ensure(root, "pope")
    assert (root / "pope/answers/mine.jsonl").read_text() == "{}\n"
    assert not (root / "pope/gone").exists()
    shutil.rmtree(root / "pope/answers")
    assert contents(root / "pope") == contents(sprout / "pope")


class Stumble:
    """A function that fails at one of its calls."""

    def __init__(self, function, at: int):
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == self.at:
            raise OSError("no space left")
        return self.function(*arguments)


def test_real_data_are_never_overwritten(tmp_path):
    mine = tmp_path / "pope/llava_pope_test.jsonl"
    mine.parent.mkdir()
    mine.write_text("real\n")
    with pytest.raises(InputError, match=r"llava_pope_test\.jsonl"):
        benchmarks.ensure(tmp_path, "pope")
    assert mine.read_text() == "real\n" and [p.name for p in mine.parent.iterdir()] == [mine.name]


def test_faults_of_the_command(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("-m", "twigvlm.world.drawn", "--out", str(tmp_path / "file"), "--task", "pope")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert run("-m", "twigvlm.world.drawn", "--task", "imagenet").returncode == 2
    with pytest.raises(InputError, match="imagenet"):
        benchmarks.ensure(tmp_path, "imagenet")


def test_tasks_and_data_need_no_torch():
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import twigvlm.evaluation.tasks, "
    assert run("-c", code + "twigvlm.world.drawn, twigvlm.evaluation.check").stderr == ""


# ---------------------------------------------------------------------- answers read, files for servers


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(B)", "B"), ("B. red", "B"), ("The answer is B", "B"), ("A or B", None),
        ("b", None), ("red", "A"), ("It is RED.", "A"), ("red or blue", None), ("", None), ("Z", None), ("D", None),
        ("AB", None), ("Cannot determine the answer, B", None),
    ],
)  # fmt: skip
def test_mmbench_reads_an_option(answer, letter):
    assert option_of(answer, {"A": "red", "B": "blue", "C": "green"}) == letter


def table(path: Path, rows: list[dict]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


ROW = {"index": 3, "question": 'Who said "hi"?', "hint": "nan", "A": "me", "B": "you\nall", "C": "", "D": "left over",
       "answer": "B", "category": "c", "image": base64.b64encode(b"picture" * 9).decode(), "source": "s",
       "l2-category": "l", "comment": "", "split": "dev"}  # fmt: skip


def test_mmbench_builds_llavas_prompt(tmp_path):
    (tmp_path / "mmbench").mkdir()
    hinted = {**ROW, "index": 1_000_003, "hint": "Look.", "image": "3", "C": "she", "D": "None"}
    table(tmp_path / "mmbench/mmbench_dev_20230712.tsv", [ROW, hinted])
    plain, turned = TASKS["mmbench"].questions(tmp_path, "mmbench_dev_20230712")
    ending = "\nAnswer with the option's letter from the given choices directly."
    assert plain.prompt == 'Who said "hi"?\nA. me\nB. you\nall' + ending
    assert turned.prompt == 'Look.\nWho said "hi"?\nA. me\nB. you\nall\nC. she' + ending
    assert plain.images == turned.images == (b"picture" * 9,), "a short cell refers to the row that has the picture"
    assert plain.line["question_id"] == 3 and plain.line["option_char"] == ["A", "B"]


def test_mmbench_counts_whole_circles(tmp_path):
    turned = {**ROW, "index": 1_000_003, "A": "you", "B": "me", "answer": "A"}
    alone = {**ROW, "index": 7, "answer": "A"}
    path = table(tmp_path / "mmbench_dev_20230712.tsv", [ROW, turned, alone])
    answers = tmp_path / "answers.jsonl"

    def scored(*texts, strict=False):
        lines = [{"question_id": key, "text": text} for key, text in zip((3, 1_000_003, 7), texts, strict=False)]
        answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return TASKS["mmbench"].score(path, tmp_path, answers, strict)

    assert scored("B", "A", "A").score == 100
    half = scored("B", "B", "neither")
    assert (half.score, half.parts["plain"], half.parts["unmatched"]) == (0, 50, 1)
    assert "1 of 2 questions lack rotations" in half.note
    assert scored("B", "A").doubts == {"missing": 1} and scored("B", "A").score == 50
    with pytest.raises(InputError, match="7"):
        scored("B", "A", strict=True)


def test_mmbench_test_tables_are_not_scored(tmp_path):
    path = table(tmp_path / "mmbench_test_20230712.tsv", [{**ROW, "answer": ""}])
    (tmp_path / "answers.jsonl").write_text('{"question_id": 3, "text": "B"}\n')
    found = TASKS["mmbench"].score(path, None, tmp_path / "answers.jsonl")
    assert found.score is None and "not scored here" in found.note


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("index", "number", 1),
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("\t3\t", "\t3\t\t") if "\t3\t" in text else text + "4\tshort\r\n",
        lambda text: text.replace("cGlj", "c%lj", 1),
        lambda text: text + text.split("\r\n", 1)[1],
        lambda text: text.split("\r\n", 1)[0],
    ],
)
def test_damaged_tables_are_named(tmp_path, damage):
    (tmp_path / "mmbench").mkdir()
    path = table(tmp_path / "mmbench/mmbench_dev_20230712.tsv", [ROW])
    path.write_bytes(damage(path.read_bytes().decode()).encode())
    with pytest.raises(InputError, match=r"mmbench_dev_20230712\.tsv"):
        TASKS["mmbench"].questions(tmp_path, "mmbench_dev_20230712")


def cells(path: Path) -> list[list[str]]:
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    with zipfile.ZipFile(path) as book:
        assert book.testzip() is None and "[Content_Types].xml" in book.namelist()
        sheet = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
        texts = ["".join(text.itertext()) for text in ElementTree.fromstring(book.read("xl/sharedStrings.xml"))]
    columns = "ABCDEFGHI"
    rows = []
    for row in sheet.iter(f"{space}row"):
        found = {cell.get("r")[0]: "".join(cell.itertext()) for cell in row}
        found |= {cell.get("r")[0]: texts[int("".join(cell.itertext()))] for cell in row if cell.get("t") == "s"}
        rows.append([found.get(column, "") for column in columns])
    return rows


def test_the_servers_table_is_written_as_xlsx(sprout, tmp_path):
    split = "mmbench_dev_20230712"
    texts = right_answers(sprout, "mmbench", split)
    texts[1] = "<B> & \x00 \U0001f600\n "
    answers = write_answers(tmp_path / "run.jsonl", sprout, "mmbench", split, texts)
    written = TASKS["mmbench"].export(sprout, split, answers, tmp_path / "upload")
    assert written == tmp_path / "upload/run.xlsx"
    rows = cells(written)
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert len(rows) == 193 and rows[1][6] == rows[1][7] and rows[2][6] == "<B> &  \U0001f600\n "
    first = written.read_bytes()
    assert TASKS["mmbench"].export(sprout, split, answers, tmp_path / "other.xlsx").read_bytes() == first
    with pytest.raises(InputError, match="32767"):
        write_spreadsheet(tmp_path / "long.xlsx", [["x" * 40_000]])
    assert not (tmp_path / "long.xlsx").exists() and not list(tmp_path.glob(".part*"))


def test_pandas_reads_the_xlsx(sprout, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("openpyxl")
    write_spreadsheet(tmp_path / "t.xlsx", [["index", "prediction"], [3, " A\n"], [4, None]])
    frame = pandas.read_excel(tmp_path / "t.xlsx")
    assert frame["index"].tolist() == [3, 4] and frame["prediction"][0] == " A\n" and frame["prediction"].isna()[1]


def test_seed_counts_images_and_videos_apart(sprout, tmp_path):
    texts = right_answers(sprout, "seed", "all")
    images = sum(not q.id.startswith("v") for q in TASKS["seed"].questions(sprout, "all"))
    texts[0] += " "  # the letter and nothing else
    texts[images:] = ["E"] * (len(texts) - images)
    answers = write_answers(tmp_path / "answers.jsonl", sprout, "seed", "all", texts)
    found = score(sprout, "seed", "all", answers)
    assert found.parts["image"] == pytest.approx(100 * (images - 1) / images) and found.parts["video"] == 0
    assert found.score == pytest.approx(100 * (images - 1) / len(texts))
    assert set(found.parts["question types"]) <= set(seed_bench._TYPES)
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="100000"):
        score(sprout, "seed", "all", answers)
    found = score(sprout, "seed", "all", answers, strict=False)
    assert found.doubts == {"missing": 1} and found.parts["image"] == pytest.approx(100 * (images - 1) / images)
    rows = records(TASKS["seed"].export(sprout, "all", answers, tmp_path / "up.jsonl"))
    assert len(rows) == len(texts) - 1 and set(rows[0]) == {"question_id", "prediction"}


def test_mmvet_writes_what_the_judge_takes(sprout, tmp_path):
    texts = right_answers(sprout, "mmvet", "mm-vet")
    answers = write_answers(tmp_path / "answers.jsonl", sprout, "mmvet", "mm-vet", texts)
    found = score(sprout, "mmvet", "mm-vet", answers)
    assert found.score is None and "not scored here" in found.note and found.parts["answered"] == 30
    written = load(TASKS["mmvet"].export(sprout, "mm-vet", answers, tmp_path / "up.json"))
    assert list(written) == [f"v1_{n}" for n in range(30)] and list(written.values()) == texts


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(B)", "B"), ("B. blue", None), ("(A) or (B)", "B"), ("B then A", "A"),
        ("I think that it must be a blue ball", "B"), ("blue ball", None), ("b", None),
        ("it is either the blue ball or the red ball", "A"), ("so it is red ball", None), ("so it is the red ball", "A"), ("'C'", "C"), ("", None),
    ],
)  # fmt: skip
def test_mmmu_reads_a_letter(answer, letter):
    assert read_letter(answer, {"A": "red ball", "B": "blue ball", "C": "x"}) == letter


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("36 watts", ["36"], True), ("36.004", ["36"], True), ("36.01", ["36"], False), ("1,234", ["1234"], True),
        ("The answer is Paris.", ["paris"], True), ("not paris but so rome", ["paris"], False), ("x = 4", ["4"], True),
        ("x = 4\nso 5", ["4"], False), ("ab", ["a"], False), ("a b", ["a"], True), ("1.5e3", ["1500"], True),
        ("London", ["paris", "london"], True),
    ],
)  # fmt: skip
def test_mmmu_compares_open_answers(answer, truth, right):
    assert open_is_right(answer, truth) == right


def test_mmmu_reads_the_hubs_fields_and_guesses_as_the_official_parser(tmp_path):
    lines = [
        {"id": f"validation_{subject}_1", "question": "<image 1> Which?", "options": "['red', \"blue's\"]", "answer": "B",
         "question_type": "multiple-choice", "images": ["a.png", "b.png"]} for subject in ("Sociology", "Accounting")
    ]  # fmt: skip
    lines.append(
        {**lines[0], "id": "validation_Math_1", "options": "[]", "answer": "['2', 'two']", "question_type": "open"}
    )
    (tmp_path / "mmmu").mkdir()
    path = tmp_path / "mmmu/validation.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, _, third = TASKS["mmmu"].questions(tmp_path, "validation")
    letter = "Answer with the option's letter from the given choices directly."
    assert first.prompt == f"<image 1> Which?\n(A) red\n(B) blue's\n\n{letter}"
    assert third.prompt == f"<image 1> Which?\n{SINGLE_WORD}"
    assert first.images == (tmp_path / "mmmu/images/a.png",), "only the first picture, as for the published numbers"
    texts = {"validation_Sociology_1": "?", "validation_Accounting_1": "?", "validation_Math_1": "two"}
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"question_id": key, "text": text}) + "\n" for key, text in texts.items()))
    found = TASKS["mmmu"].score(path, None, answers)
    # random.Random(42).choice(["A", "B"]) twice: A (Accounting comes first), then A.
    assert found.parts["guessed"] == 2 and found.score == pytest.approx(100 / 3)
    assert found.parts["Overall"] == {"num": 3, "acc": 0.333} and found.parts["Math"]["acc"] == 1
    truth = tmp_path / "answer_dict_val.json"
    truth.write_text(json.dumps({key: {"question_type": "x", "ground_truth": "A"} for key in texts}))
    assert TASKS["mmmu"].score(path, tmp_path, answers).score == pytest.approx(200 / 3)
    exported = load(TASKS["mmmu"].export(tmp_path, "validation", answers, tmp_path / "up.json"))
    assert exported == {"validation_Accounting_1": "A", "validation_Math_1": "two", "validation_Sociology_1": "A"}


# ---------------------------------------------------------------------- the check


def command(root: Path, *flags: str) -> tuple[int, dict]:
    """Exit code and printed JSON, in this process."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        code = check.main(["--data", str(root), "--json", *flags])
    return code, json.loads(out.getvalue())["tasks"]


def test_whole_data_are_complete(sprout, capsys):
    code, tasks = command(sprout, "--deep")
    assert code == 0 and {name: found["status"] for name, found in tasks.items()} == dict.fromkeys(TASKS, "complete")
    assert not any(split["doubts"] for found in tasks.values() for split in found["splits"].values())
    assert check.main(["--data", str(sprout), "--task", "gqa"]) == 0
    assert capsys.readouterr().out == "gqa        complete  testdev_balanced: 200 questions, 47 pictures\n"


def test_absent_benchmarks_are_fine(copy):
    code, tasks = command(copy("pope"))
    assert code == 0 and tasks["pope"]["status"] == "complete" and tasks["gqa"]["status"] == "absent"


@pytest.mark.parametrize(
    ("name", "fetched"),
    [
        ("gqa", ["data"]),
        ("mme", ["MME_Benchmark_release_version"]),
        ("seed", ["SEED-Bench.json"]),
        ("vqav2", ["test2015"]),
    ],
)
def test_question_files_alone_are_present(copy, name, fetched):
    """What LLaVA's eval.zip brings, before anything else is fetched."""
    root = copy(name)
    folder = root / benchmarks.FOLDERS[name]
    for path in [folder / each for each in fetched] + list(folder.glob("v*2014*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, tasks = command(root)
    first = TASKS[name].splits[0]
    assert tasks[name]["status"] == tasks[name]["splits"][first]["status"] == "present" and code == 0
    assert str(folder / fetched[0]) in tasks[name]["problems"][0]


def test_missing_pictures_are_counted_and_named(copy):
    root = copy("pope", "mme")
    gone = sorted((root / "pope/val2014").iterdir())[:2]
    gone[0].unlink()
    gone[1].write_bytes(b"")
    code, tasks = command(root)
    found = tasks["pope"]["splits"]["test"]
    assert code == 1 and (found["missing"], found["pictures"]) == (2, 10) and tasks["mme"]["status"] == "complete"
    assert "2 of 10 pictures" in found["problems"][0] and str(gone[0]) in found["problems"][0]


def test_a_damaged_picture_is_found_by_looking_deep(copy):
    root = copy("pope", "mmbench")
    picture = next((root / "pope/val2014").iterdir())
    picture.write_bytes(picture.read_bytes()[:2000])
    path = root / "mmbench/mmbench_dev_20230712.tsv"
    image = next(read_table(path))["image"]
    path.write_text(path.read_text().replace(image, image[:400] + "AAAA"))
    assert command(root)[0] == 0
    code, tasks = command(root, "--deep")
    assert code == 1 and "1 of 10" in tasks["pope"]["splits"]["test"]["problems"][0]
    assert tasks["mmbench"]["splits"]["mmbench_dev_20230712"]["damaged"] == 1


@pytest.mark.parametrize(
    ("name", "file", "damage"),
    [
        ("gqa", "data/testdev_balanced_questions.json", None),
        ("gqa", "data/testdev_balanced_questions.json", lambda text: text[:-300]),
        ("gqa", "llava_gqa_testdev_balanced.jsonl", None),
        ("gqa", "llava_gqa_testdev_balanced.jsonl", lambda text: text[:-30]),
        (
            "gqa",
            "data/testdev_balanced_questions.json",
            lambda text: text.replace('"isBalanced": true', '"balanced": 1'),
        ),
        ("mme", "MME_Benchmark_release_version/count", None),
        ("sqa", "pid_splits.json", None),
        ("sqa", "problems.json", lambda text: text.replace('"1": {', '"x": {', 1)),
        ("textvqa", "TextVQA_0.5.1_val.json", lambda text: text.replace("unanswerable", '", "', 1)),
        ("textvqa", "train_images", None),
        ("pope", "coco/coco_pope_random.json", lambda text: ""),
        ("vqav2", "v2_mscoco_val2014_annotations.json", None),
        ("seed", "SEED-Bench.json", lambda text: text.replace("question_type_id", "kind")),
        ("seed", "llava-seed-bench.jsonl", lambda text: "[1]\n"),
        ("mmmu", "validation.jsonl", lambda text: text.replace("open", "multiple-choice", 1)),
        ("mmvet", "mm-vet.json", None),
        ("mmbench", "mmbench_dev_20230712.tsv", lambda text: text[:5000]),
    ],
)
def test_broken_files_are_named(copy, name, file, damage):
    root = copy(name)
    path = root / benchmarks.FOLDERS[name] / file
    if damage is not None:
        path.write_text(damage(path.read_text()))
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    code, tasks = command(root)
    problems = " ".join(p for split in tasks[name]["splits"].values() for p in split["problems"])
    assert code == 1 and tasks[name]["status"] == "broken"
    assert file.split("/")[0] in problems, problems


def test_the_check_is_a_command(copy, tmp_path):
    root = copy("pope")
    next((root / "pope/val2014").iterdir()).unlink()
    done = run("-m", "twigvlm.evaluation.check", "--data", str(root), "--task", "pope", "--task", "gqa")
    assert done.returncode == 1 and done.stderr == ""
    assert "pope       broken" in done.stdout and "gqa        absent" in done.stdout
    done = run("-m", "twigvlm.evaluation.check", "--data", str(tmp_path / "nowhere"))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
