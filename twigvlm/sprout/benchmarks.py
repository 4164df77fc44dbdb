"""Every benchmark's own files, written from the test split of the embedded world.

`python -m twigvlm.sprout.benchmarks [--out DIR] [--task T]`; the runner calls `ensure` on first use.
The layout is that of LLaVA's eval.zip, so that tasks read these files as they read the real ones; the wording
is what the embedded model was trained on. The same bytes come out every time.

A task's folder appears whole or not at all; `sprout.json` in it says by which code it was written, and other code
writes it again, leaving what else lies there (answers) alone. Pictures are kept once, in `.pictures`, and linked.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError
from ..locks import alone
from ..program import run_program
from . import chinese
from .draw import IMAGE_SIZE, _box, draw
from .questions import DESCRIBE, LETTER, LETTERS, SINGLE_WORD, YES_NO, describe
from .supply import SPLIT, Asked, balanced, gather, in_order, pair_of, scene, with_word
from .world import COLOURS, PLACES, SHAPES, WORDS, SceneObject

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "playground" / "data" / "sprout"
STAMP = "sprout.json"
PICTURES, LOCK, PART = ".pictures", ".lock", ".part-"
SOURCES = ("world.py", "draw.py", "questions.py", "supply.py", "chinese.py", "benchmarks.py")
FORMATS = {"jpeg": {"quality": 85, "optimize": True}, "png": {"compress_level": 6}}
SCENES = range(48)  # of most benchmarks
FEW = range(24)  # of those whose pictures are lossless
PEOPLE = 10  # answers a question in TextVQA and VQAv2

# ---------------------------------------------------------------------- folders


@dataclass(frozen=True)
class Folder:
    """Where a benchmark's files are written."""

    path: Path
    pictures: Path

    def text(self, name: str, text: str) -> None:
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text.encode())

    def json(self, name: str, value: Any) -> None:
        self.text(name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def lines(self, name: str, rows: Iterable[dict]) -> None:
        self.text(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def picture(self, name: str, seed: int) -> None:
        """The picture of a scene; one copy on the disk, however many benchmarks show it."""
        form = "png" if name.endswith(".png") else "jpeg"
        kept, data = self.pictures / f"{seed}.{form}", encoded(seed, form)
        if not kept.exists() or kept.read_bytes() != data:
            _write_whole(kept, data)
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            return
        try:
            os.link(kept, place)
        except OSError:  # no hard links here
            place.write_bytes(data)


@cache
def encoded(seed: int, form: str) -> bytes:
    """A scene as a file of `form`, a key of FORMATS."""
    data = io.BytesIO()
    draw(scene(seed)).save(data, form, **FORMATS[form])
    return data.getvalue()


def ensure(root: Path, task: str | None = None) -> Path:
    """Write what is missing below `root` (all benchmarks, or the one of `task`) and return `root`.

    Several processes may call it at once. InputError for an unknown task and for a folder that holds other
    files of the same names; RunError when the disk refuses.
    """
    if task is not None and task not in FOLDERS:
        raise InputError(f"sprout has no benchmark {task!r}; one of {', '.join(FOLDERS)} is needed")
    root = Path(root)
    folders = dict.fromkeys(FOLDERS.values() if task is None else [FOLDERS[task]])
    if all(_is_current(root / folder) for folder in folders):
        return root
    try:
        with _alone(root):
            for folder in folders:
                if not _is_current(root / folder):
                    _generate(root, folder)
    except OSError as error:
        raise RunError(f"{root} cannot be written: {error}; name another folder for the embedded data") from None
    return root


def version() -> str:
    """Of the code that writes: other code, other version."""
    text = hashlib.sha256()
    for name in SOURCES:
        text.update(Path(__file__).with_name(name).read_bytes())
    return text.hexdigest()[:16]


def _is_current(folder: Path) -> bool:
    return _stamp(folder).get("version") == version()


def _stamp(folder: Path) -> dict:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _generate(root: Path, folder: str) -> None:
    """Write a folder beside its place, then move it there."""
    build = Path(tempfile.mkdtemp(prefix=f"{PART}{folder}-", dir=root))
    build.chmod(0o777 & ~_umask())
    try:
        files = Folder(build, root / PICTURES)
        files.pictures.mkdir(exist_ok=True)
        WRITERS[folder](files)
        names = sorted(entry.name for entry in build.iterdir())
        target = root / folder
        if not target.exists():
            _write_stamp(build, names)
            with contextlib.suppress(OSError):
                os.rename(build, target)
                return
            if _is_current(target):  # another process was first
                return
        _replace(build, target, names)
    finally:
        shutil.rmtree(build, ignore_errors=True)


def _replace(build: Path, target: Path, names: list[str]) -> None:
    """Exchange what was written here before, entry by entry; the stamp comes last."""
    stamp = _stamp(target)
    foreign = [name for name in names if name not in stamp.get("files", ()) and (target / name).exists()]
    if foreign:
        raise InputError(
            f"{target} holds {', '.join(foreign)}, which the embedded data did not write; name another folder"
        )
    _write_stamp(target, sorted({*stamp.get("files", ()), *names}), written="")
    for name in stamp.get("files", ()):
        _remove(target / name)
    for name in names:
        if name != STAMP:
            os.rename(build / name, target / name)
    _write_stamp(target, names)


def _write_stamp(folder: Path, names: list[str], written: str | None = None) -> None:
    facts = {
        "what": "embedded data of TwigVLM; may be deleted, it is written again",
        "version": version() if written is None else written,
        "files": [name for name in names if name != STAMP],
    }
    _write_whole(folder / STAMP, (json.dumps(facts, indent=1) + "\n").encode())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_whole(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    os.replace(part, path)


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One writer at a time; what killed ones left behind is swept away."""
    root.mkdir(parents=True, exist_ok=True)
    with alone(root / LOCK) as locked:  # where there are no locks, the renames alone keep concurrent writers apart
        if locked:
            for rest in [*root.glob(f"{PART}*"), *(root / PICTURES).glob("*.part")]:
                _remove(rest)
        yield


# ---------------------------------------------------------------------- GQA

_STRUCTURE = {  # kind → GQA's structural and semantic type
    "exist": ("verify", "obj"),
    "relation": ("verify", "rel"),
    "compare": ("compare", "attr"),
    "colour": ("query", "attr"),
    "shape": ("query", "cat"),
    "where": ("query", "rel"),
}


def _gqa(out: Folder) -> None:
    asked = balanced("gqa", "exist", SCENES, 40) + balanced("gqa", "relation", SCENES, 32)
    asked += gather("gqa", "relation", SCENES, 16, lambda q: q.answer not in ("Yes", "No"))
    asked += balanced("gqa", "compare", SCENES, 32)
    for kind, count in (("colour", 32), ("shape", 28), ("where", 20)):
        asked += gather("gqa", kind, SCENES, count)
    questions, lines = {}, []
    for number, q in enumerate(in_order(asked)):
        key, image = f"20{number:06d}", f"n{q.seed}"
        questions[key] = _gqa_question(key, image, q)
        text = f"{q.text}\n{SINGLE_WORD}"
        lines.append({"question_id": key, "image": f"{image}.jpg", "text": text, "category": "default"})
        out.picture(f"data/images/{image}.jpg", q.seed)
    out.lines("llava_gqa_testdev_balanced.jsonl", lines)
    out.json("data/testdev_balanced_questions.json", questions)
    out.json("data/testdev_balanced_sceneGraphs.json", {f"n{q.seed}": _scene_graph(q.seed) for q in in_order(asked)})


def _gqa_question(key: str, image: str, q: Asked) -> dict:
    structural, semantic = _STRUCTURE[q.kind]
    if structural == "verify" and q.answer not in ("Yes", "No"):
        structural = "choose"
    answer = q.answer.lower()
    return {
        "semantic": _program(q),
        "entailed": [key],
        "equivalent": [key],
        "question": q.text,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": q.kind if structural == "query" else None, "local": f"{q.kind}-{image}"},
        "answer": answer,
        "semanticStr": "->".join(f"{step['operation']}: {step['argument']}" for step in _program(q)),
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": q.kind, "semantic": semantic, "structural": structural},
        "fullAnswer": f"{q.answer[0].upper()}{q.answer[1:]}.",
    }


def _program(q: Asked) -> list[dict]:
    """GQA's functional program, as far as its length and operations count: select, relate, and what is asked."""

    def step(operation: str, argument: str, *dependencies: int) -> dict:
        return {"operation": operation, "dependencies": list(dependencies), "argument": argument}

    things = [o for o in scene(q.seed).objects if o.shape in q.text or o.name in q.text] or scene(q.seed).objects[:1]
    select = step("select", f"{things[0].shape} ({things[0].place})")
    if q.kind == "exist":
        return [select, step("exist", "?", 0)]
    if q.kind == "relation":
        return [select, step("relate", "object,relation,s", 0), step("verify rel", "relation", 1)]
    if q.kind == "compare":
        return [select, step("select", "object"), step("same attr", "attribute", 0, 1)]
    argument = {"colour": "color", "shape": "shape", "where": "hposition"}[q.kind]
    return [select, step("query", argument, 0)]


def _scene_graph(seed: int) -> dict:
    objects = scene(seed).objects
    return {
        "width": IMAGE_SIZE,
        "height": IMAGE_SIZE,
        "objects": {str(o.place): _graph_object(o, objects) for o in objects},
    }


def _graph_object(obj: SceneObject, objects: Iterable[SceneObject]) -> dict:
    left, top, diameter = _box(obj)
    relations = []
    for other in objects:
        if obj.column != other.column:
            side = "left" if obj.column < other.column else "right"
            relations.append({"name": f"to the {side} of", "object": str(other.place)})
    box = {"x": left, "y": top, "w": diameter, "h": diameter}
    return {"name": obj.shape, **box, "attributes": [obj.colour, obj.size], "relations": relations}


# ---------------------------------------------------------------------- MME

_MME = {  # subtask → kind of question and its wording
    "existence": ("exist", re.compile(r"(?!.* object\b).*")),
    "count": ("compare", re.compile(r"Are there more .*")),
    "position": ("relation", re.compile(r"(?!.* or ).*")),
    "color": ("exist", re.compile(r".* object\b.*")),
    "scene": ("compare", re.compile(r"Is .* larger than .*")),
    "commonsense_reasoning": ("compare", re.compile(r"Do .* have the same shape\?")),
}
_OWN_FOLDERS = ("scene",)  # subtasks that keep pictures and questions apart, as five real ones do
MME_PICTURES = 14  # a subtask


def _mme(out: Folder) -> None:
    release, lines = "MME_Benchmark_release_version", []
    for subtask, (kind, wording) in _MME.items():
        found = 0
        for seed in range(10 * MME_PICTURES):
            if found == MME_PICTURES:
                break
            pair = pair_of(f"mme {subtask}", kind, seed, lambda q, wording=wording: bool(wording.fullmatch(q.text)))
            if pair is None:
                continue
            found += 1
            images, texts = ("images/", "questions_answers_YN/") if subtask in _OWN_FOLDERS else ("", "")
            image = f"{subtask}/{images}{seed:012d}.jpg"
            out.picture(f"{release}/{image}", seed)
            rows = "".join(f"{q.text} {YES_NO}\t{q.answer}\n" for q in pair)
            out.text(f"{release}/{subtask}/{texts}{seed:012d}.txt", rows)
            for q in pair:
                text = f"{q.text}\n{SINGLE_WORD}"
                lines.append({"question_id": image, "image": image, "text": text, "category": subtask})
        assert found == MME_PICTURES, f"{subtask}: {found} pictures have both answers"
    out.lines("llava_mme.jsonl", lines)


# ---------------------------------------------------------------------- MMBench

_TOPICS = {"colour": 12, "shape": 12, "where": 12, "count": 8, "read": 4}  # questions of the English file
_CATEGORIES = {
    "colour": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "shape": ("physical_property_reasoning", "attribute_reasoning"),
    "where": ("object_localization", "finegrained_perception (instance-level)"),
    "count": ("structuralized_imagetext_understanding", "logic_reasoning"),
    "read": ("ocr", "finegrained_perception (instance-level)"),
}
_COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
    "comment", "split",
)  # fmt: skip
ROTATION = 1_000_000


def _choices(label: str, seeds: Iterable[int], topics: dict[str, int]) -> list[Asked]:
    """Multiple-choice questions, so many of each topic."""
    seeds = list(seeds)
    found = []
    for topic, count in topics.items():
        found += gather(f"{label} {topic}", "choice", seeds, count, lambda q, topic=topic: q.topic == topic)
    return in_order(found)


def _mmbench(out: Folder) -> None:
    asked = _choices("mmbench", SCENES, _TOPICS)
    out.text("mmbench_dev_20230712.tsv", _mmbench_table(asked, str, str))
    half = asked[::2]
    out.text("mmbench_dev_cn_20231003.tsv", _mmbench_table(half, chinese.question, chinese.option))


def _mmbench_table(asked: list[Asked], question: Callable, option: Callable) -> str:
    """All first passes, then all first rotations, and so on."""
    table = io.StringIO()
    writer = csv.writer(table, delimiter="\t", lineterminator="\n")
    writer.writerow(_COLUMNS)
    pictures = {q.seed: base64.b64encode(encoded(q.seed, "jpeg")).decode() for q in asked}
    for turn in range(len(LETTERS)):
        for number, q in enumerate(asked):
            options = [option(text) for text in q.options[turn:] + q.options[:turn]]
            answer = LETTERS[(LETTERS.index(q.answer) - turn) % len(LETTERS)]
            category, ability = _CATEGORIES[q.topic]
            index = number + turn * ROTATION
            row = [index, question(q.text), "", *options, answer, category, pictures[q.seed], "sprout", ability, ""]
            writer.writerow([*row, "dev"])
    return table.getvalue()


# ---------------------------------------------------------------------- ScienceQA

_VOCABULARY = {"a colour": COLOURS, "a shape": SHAPES, "a place": PLACES, "an animal": WORDS}
SCIENCE_BLIND = 40  # questions without a picture


def _scienceqa(out: Folder) -> None:
    asked = _choices("scienceqa", FEW, {"colour": 48, "shape": 44, "where": 40, "count": 20, "read": 8})
    problems, records = {}, []
    for number, q in enumerate([*asked, *_without_picture(SCIENCE_BLIND)], 1):
        key = str(number)
        problems[key] = _problem(q)
        lines = [q.text, *(f"{letter}. {text}" for letter, text in zip(LETTERS, q.options, strict=True))]
        mark = "<image>\n" if q.seed >= 0 else ""
        record = {"id": key, "conversations": _turns(mark + "\n".join(lines), f"The answer is {q.answer}.")}
        if q.seed >= 0:
            record["image"] = f"{key}/image.png"
            out.picture(f"images/test/{key}/image.png", q.seed)
        records.append(record)
    every = list(problems)
    splits = {"train": [], "val": [], "test": every, "trainval": [], "minitrain": [], "minival": []}
    out.json("llava_test_CQM-A.json", records)
    out.json("problems.json", problems)
    out.json("pid_splits.json", {**splits, "minitest": every[::10]})


def _turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _without_picture(count: int) -> Iterator[Asked]:
    rng = random.Random("scienceqa without picture")
    for number in range(count):
        name, words = list(_VOCABULARY.items())[number % len(_VOCABULARY)]
        others = [word for other, values in _VOCABULARY.items() if other != name for word in values]
        right = rng.choice(words)
        options = rng.sample(others, len(LETTERS) - 1)
        options.insert(rng.randrange(len(LETTERS)), right)
        answer = LETTERS[options.index(right)]
        yield Asked(-1, "choice", f"Which of these is {name}?", answer, tuple(options))


def _problem(q: Asked) -> dict:
    return {
        "question": q.text,
        "choices": list(q.options),
        "answer": LETTERS.index(q.answer),
        "hint": "",
        "image": "image.png" if q.seed >= 0 else None,
        "task": "closed choice",
        "grade": "grade1",
        "subject": "natural science" if q.seed >= 0 else "language science",
        "topic": q.topic if q.seed >= 0 else "vocabulary",
        "category": "sprout",
        "skill": "sprout",
        "lecture": "",
        "solution": "",
        "split": "test",
    }


# ---------------------------------------------------------------------- TextVQA

TEXT_SCENES = 50  # with a word; half of them come with OCR tokens
BLANK_SCENES = 25  # without one


def _textvqa(out: Folder) -> None:
    words, blank = with_word(TEXT_SCENES), with_word(BLANK_SCENES, word=False)
    asked = gather("textvqa", "read", words, 2 * TEXT_SCENES, lambda q: q.answer not in ("Yes", "No"))
    asked += gather("textvqa", "read", words[::2], BLANK_SCENES, lambda q: q.answer == "Yes")
    asked += gather("textvqa", "read", blank, BLANK_SCENES, lambda q: q.answer == "No")
    tokens = {seed: [scene(seed).word] if seed in words[1::2] else [] for seed in words + blank}
    lines, data = [], []
    for number, q in enumerate(in_order(asked)):
        key = f"{q.seed:016x}"
        reference = [f"Reference OCR token: {', '.join(tokens[q.seed])}"] if tokens[q.seed] else []
        text = "\n".join([q.text, *reference, SINGLE_WORD])
        lines.append({"question_id": key, "image": f"{key}.jpg", "text": text, "category": "default"})
        data.append(_textvqa_item(number, key, q))
        out.picture(f"train_images/{key}.jpg", q.seed)
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    out.lines("llava_textvqa_val_v051_ocr.jsonl", lines)
    out.json("TextVQA_0.5.1_val.json", {**head, "data": data})
    rows = [{"image_id": f"{seed:016x}", "ocr_tokens": found, "ocr_info": []} for seed, found in tokens.items()]
    out.json("TextVQA_Rosetta_OCR_v0.2_val.json", {**head, "data": rows})


def _textvqa_item(number: int, key: str, q: Asked) -> dict:
    return {
        "question": q.text,
        "image_id": key,
        "image_classes": sorted({o.shape for o in scene(q.seed).objects}),
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_width": IMAGE_SIZE,
        "image_height": IMAGE_SIZE,
        "answers": people(q.right.lower(), f"textvqa {number}"),
        "question_tokens": re.findall(r"\w+", q.text.lower()),
        "question_id": number,
        "set_name": "val",
    }


def people(answer: str, label: str) -> list[str]:
    """Ten answers: most people are right, and enough of them that the right answer earns everything."""
    rng = random.Random(label)
    wrong = rng.choice((0, 0, 1, 2))
    answers = [answer] * (PEOPLE - wrong) + ["unanswerable"] * wrong
    rng.shuffle(answers)
    return answers


# ---------------------------------------------------------------------- VQAv2

UNANSWERED = range(60, 72)  # scenes of the test questions, whose answers nobody has


def _vqav2(out: Folder) -> None:
    val = balanced("vqav2", "exist", SCENES, 50) + balanced("vqav2", "compare", SCENES, 30)
    for kind, count in (("colour", 30), ("count", 30), ("shape", 20), ("where", 20)):
        val += gather("vqav2", kind, SCENES, count)
    test = balanced("vqav2 test", "exist", UNANSWERED, 24) + gather("vqav2 test", "colour", UNANSWERED, 24)
    info = {"info": {"description": "the embedded world of TwigVLM"}, "license": {"name": "Apache-2.0"}}
    info |= {"data_type": "mscoco"}
    rows = _numbered(val)
    questions = [{"image_id": image, "question": q.text, "question_id": key} for key, image, q in rows]
    head = {**info, "task_type": "Open-Ended", "data_subtype": "val2014"}
    out.json("v2_OpenEnded_mscoco_val2014_questions.json", {**head, "questions": questions})
    annotations = [_vqav2_annotation(key, image, q) for key, image, q in rows]
    out.json("v2_mscoco_val2014_annotations.json", {**info, "data_subtype": "val2014", "annotations": annotations})
    out.lines("llava_vqav2_mscoco_val2014.jsonl", _vqav2_lines(rows, "val2014"))
    rows = _numbered(test)
    out.lines("llava_vqav2_mscoco_test2015.jsonl", _vqav2_lines(rows, "test2015"))
    out.lines("llava_vqav2_mscoco_test-dev2015.jsonl", _vqav2_lines(rows[::2], "test2015"))
    for split, asked in (("val2014", val), ("test2015", test)):
        for q in asked:
            out.picture(f"{split}/COCO_{split}_{q.seed + 1:012d}.jpg", q.seed)


def _numbered(asked: list[Asked]) -> list[tuple[int, int, Asked]]:
    """(question id, image id, question); the id is the image's times 1,000 and a number, as in VQAv2."""
    out, taken = [], Counter()
    for q in in_order(asked):
        image = q.seed + 1
        out.append((image * 1000 + taken[image], image, q))
        taken[image] += 1
    return out


def _vqav2_lines(rows: Iterable[tuple[int, int, Asked]], split: str) -> Iterator[dict]:
    for key, image, q in rows:
        name = f"COCO_{split}_{image:012d}.jpg"
        yield {"question_id": key, "image": name, "text": f"{q.text}\n{SINGLE_WORD}", "category": "default"}


def _vqav2_annotation(key: int, image: int, q: Asked) -> dict:
    answer = q.right.lower()
    sure = random.Random(f"sure {key}")
    answers = [
        {"answer": given, "answer_confidence": sure.choice(("yes", "yes", "maybe")), "answer_id": number}
        for number, given in enumerate(people(answer, f"vqav2 {key}"), 1)
    ]
    kind = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
    return {
        "question_type": " ".join(q.text.lower().rstrip("?.").split()[:2]),
        "multiple_choice_answer": answer,
        "answers": answers,
        "image_id": image,
        "answer_type": kind,
        "question_id": key,
    }


# ---------------------------------------------------------------------- POPE

POPE_SCENES, POPE_EACH = 10, 3  # pictures a setting; present and absent objects a picture


def _pope(out: Folder) -> None:
    seeds = [seed for seed in SCENES if len(scene(seed).objects) >= POPE_EACH][:POPE_SCENES]
    common = Counter(o.name for seed in SCENES for o in scene(seed).objects)
    frequent = sorted(common, key=lambda name: (-common[name], name))
    lines = []
    for setting in ("adversarial", "popular", "random"):
        labels = []
        for seed in seeds:
            image = f"COCO_val2014_{seed + 1:012d}.jpg"
            out.picture(f"val2014/{image}", seed)
            for name, label in _pope_objects(seed, setting, frequent):
                text = f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"
                labels.append({"question_id": len(labels) + 1, "image": image, "text": text, "label": label})
                line = {"question_id": len(lines) + 1, "image": image, "text": f"{text}\n{SINGLE_WORD}"}
                lines.append({**line, "category": setting})
        out.lines(f"coco/coco_pope_{setting}.json", labels)
    out.lines("llava_pope_test.jsonl", lines)


def _pope_objects(seed: int, setting: str, frequent: list[str]) -> Iterator[tuple[str, str]]:
    """Present and absent objects in turn; what is absent is picked as the setting says."""
    objects = scene(seed).objects
    present = [o.name for o in objects]
    near = {f"{a.colour} {b.shape}" for a in objects for b in objects}  # parts of it are in the picture
    similar = {f"{c} {s}" for c in COLOURS for s in SHAPES if any(c == o.colour or s == o.shape for o in objects)}
    rng = random.Random(f"pope {setting} {seed}")
    every = rng.sample([f"{c} {s}" for c in COLOURS for s in SHAPES], len(COLOURS) * len(SHAPES))
    order = {"random": every, "popular": frequent, "adversarial": [*sorted(near), *sorted(similar - near)]}[setting]
    absent = [name for name in order if name not in present][:POPE_EACH]
    for yes, no in zip(rng.sample(present, POPE_EACH), absent, strict=True):
        yield yes, "yes"
        yield no, "no"


# ---------------------------------------------------------------------- MM-Vet, SEED-Bench, MMMU

LONG = range(30)  # scenes that are described
_TYPES = {"Scene Understanding": 1, "Instance Identity": 2, "Instance Attributes": 3, "Instance Location": 4,
          "Instances Counting": 5, "Spatial Relation": 6, "Instance Interaction": 7, "Visual Reasoning": 8,
          "Text Understanding": 9, "Action Recognition": 10, "Action Prediction": 11,
          "Procedure Understanding": 12}  # fmt: skip
_SEED_TYPE = {"colour": 3, "shape": 2, "where": 4, "count": 5, "read": 9}
_SUBJECT = {"colour": "Design", "shape": "Art", "where": "Geography", "count": "Math", "read": "Literature"}


def _mmvet(out: Folder) -> None:
    lines, truth = [], {}
    for number, seed in enumerate(LONG):
        image, text = f"v1_{number}.jpg", DESCRIBE[number % len(DESCRIBE)]
        lines.append({"question_id": number, "image": image, "text": text, "category": "default"})
        truth[f"v1_{number}"] = {
            "imagename": image,
            "question": text,
            "answer": describe(scene(seed)),
            "imagesource": f"sprout, {SPLIT} split, scene {seed}",
            "capability": ["rec", "gen", "spat", *(["ocr"] if scene(seed).word else [])],
        }
        out.picture(f"images/{image}", seed)
    out.lines("llava-mm-vet.jsonl", lines)
    out.json("mm-vet.json", truth)


def _seed_bench(out: Folder) -> None:
    """Pictures, and "videos" that stand still: each is one frame."""
    images = _choices("seed", SCENES, {"colour": 16, "shape": 14, "where": 12, "count": 10, "read": 4})
    videos = _choices("seed video", UNANSWERED, {"colour": 6, "shape": 5, "where": 5})
    lines, questions = [], []
    names = {number: name for name, number in _TYPES.items()}
    for number, (q, video) in enumerate([*((q, False) for q in images), *((q, True) for q in videos)]):
        key = f"v{number}" if video else str(100_000 + number)
        kind = 10 + number % 3 if video else _SEED_TYPE[q.topic]
        place = f"SEED-Bench-video-image/{key}.jpg" if video else f"SEED-Bench-image/{q.seed}_0"
        options = [f"{letter}. {text}" for letter, text in zip(LETTERS, q.options, strict=True)]
        text = "\n".join([q.text, *options, LETTER])
        line_id = key if video else int(key)
        lines.append({"image": place, "text": text, "category": names[kind], "question_id": line_id})
        choices = {f"choice_{letter.lower()}": text for letter, text in zip(LETTERS, q.options, strict=True)}
        data = {"data_id": f"{key}.mp4" if video else f"{q.seed}_0", "data_type": "video" if video else "image"}
        rest = {"question": q.text, "question_id": key, "question_type_id": kind}
        questions.append({"answer": q.answer, **choices, **data, **rest})
        out.picture(place, q.seed)
    out.lines("llava-seed-bench.jsonl", lines)
    out.lines("llava-seed-bench-image.jsonl", lines[: len(images)])
    out.json("SEED-Bench.json", {"questions": questions, "question_type": _TYPES})


def _mmmu(out: Folder) -> None:
    asked = _choices("mmmu", FEW, {"colour": 12, "shape": 10, "where": 10, "count": 6, "read": 2})
    asked += in_order(gather("mmmu open", "count", FEW, 10) + gather("mmmu open", "colour", FEW, 10))
    lines, taken = [], Counter()
    for q in asked:
        subject = _SUBJECT[q.topic]
        taken[subject] += 1
        key = f"validation_{subject}_{taken[subject]}"
        image = f"{key}_1.png"
        rest = {"options": list(q.options), "answer": q.answer, "images": [image]}
        kind = "multiple-choice" if q.options else "open"
        lines.append({"id": key, "question": f"<image 1> {q.text}", "question_type": kind, **rest})
        out.picture(f"images/{image}", q.seed)
    out.lines("validation.jsonl", lines)


# ---------------------------------------------------------------------- the whole

WRITERS: dict[str, Callable[[Folder], None]] = {
    "gqa": _gqa,
    "MME": _mme,
    "mmbench": _mmbench,
    "scienceqa": _scienceqa,
    "textvqa": _textvqa,
    "vqav2": _vqav2,
    "pope": _pope,
    "mm-vet": _mmvet,
    "seed_bench": _seed_bench,
    "mmmu": _mmmu,
}
FOLDERS = {
    "gqa": "gqa",
    "mme": "MME",
    "mmbench": "mmbench",
    "mmbench_cn": "mmbench",
    "sqa": "scienceqa",
    "textvqa": "textvqa",
    "vqav2": "vqav2",
    "pope": "pope",
    "mmvet": "mm-vet",
    "seed": "seed_bench",
    "mmmu": "mmmu",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m twigvlm.sprout.benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=DEFAULT, help="where one folder a benchmark is written (%(default)s)"
    )
    parser.add_argument("--task", choices=sorted(FOLDERS), help="only this one (default: all)")
    arguments = parser.parse_args(argv)
    return run_program(lambda: _write(arguments))


def _write(arguments: argparse.Namespace) -> None:
    root = ensure(arguments.out, arguments.task)
    for folder in dict.fromkeys(FOLDERS.values() if arguments.task is None else [FOLDERS[arguments.task]]):
        files = [path for path in (root / folder).rglob("*") if path.is_file()]
        print(f"{root / folder}: {len(files)} files")


if __name__ == "__main__":
    sys.exit(main())
