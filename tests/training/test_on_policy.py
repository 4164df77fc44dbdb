"""Training on the base's own answers: they are what generation writes, and a training learns just these."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, ROOT, tiny_model, tiny_tokenizer, write_base
from PIL import Image
from warm import Program

import twigvlm
from training.conftest import TRAIN, flags_into, python, quietly, ranks, twig_of
from twigvlm.processes import PARENT
from twigvlm.prompt.template import text_encoder
from twigvlm.training import launch
from twigvlm.training.data import loading
from twigvlm.training.data.examples import IGNORE, IMAGE_LABEL, Example, encode, respoken, turns
from twigvlm.training.on_policy import __main__ as on_policy
from twigvlm.training.on_policy import ask, spoken
from twigvlm.training.on_policy.ask import Writing, answer
from twigvlm.training.settings import Settings
from twigvlm.training.subject import TwigSubject

pytest.importorskip("accelerate")
V = 4


@pytest.fixture(scope="session")
def world(world, tmp_path_factory) -> Path:
    """The same with a base whose answers end now and then."""
    folder = tmp_path_factory.mktemp("talkative")
    model = copy.deepcopy(tiny_model(vocabulary=len(tiny_tokenizer()), context=1024))
    model.lm_head.weight[EOS] *= 2.5
    write_base(folder / "base", model)
    for name in ("images", "data.json"):
        (folder / name).symlink_to(world / name)
    return folder


@pytest.fixture(scope="session")
def vlm(world):
    return twigvlm.load(world / "base", device="cpu", dtype="float32")


@pytest.fixture
def dataset(world, vlm):
    from twigvlm.training.data.examples import Records, TwigDataset

    processor = vlm.processor
    return TwigDataset(
        Records(world / "data.json"), world / "images", processor.tokenizer, processor.image_processor, 300, V
    )


def by_hand(vlm, example: Example, writing: Writing, end: int) -> tuple[list[list[int]], bool]:
    """Turn after turn, each answer by `generate` alone, behind what it wrote before."""
    ids: list[int] = []
    said: list[list[int]] = []
    shown: list[int] = []
    for turn in turns(example):
        for token in turn.asked:
            ids += [vlm.image_token_id] * V if token == IMAGE_LABEL else [token]
        shown += turn.pictures
        room = min(writing.tokens, writing.length - len(ids))
        if room < 1:
            return said, True
        pixels = example.pixels[shown] if shown else None
        tokens = vlm.generate(torch.tensor([ids]), pixels, max_new_tokens=room, eos_token_id=end).tokens[0]
        cut = len(tokens) >= room or vlm.image_token_id in tokens
        said.append([t for t in tokens if t != vlm.image_token_id] + [end] * (not cut))
        if cut:
            return said, True
        ids += said[-1]
    return said, False


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("sure", [False, True])
def test_answers_are_what_generate_writes(vlm, dataset, tokens, sure, monkeypatch):
    """With the data's answers as drafts or its own (which are right to the end), alone or in company."""
    end, writing = dataset.text.eos, Writing(tokens, 300)
    examples = [dataset[i] for i in range(8)]
    wanted = [by_hand(vlm, example, writing, end) for example in examples]
    if sure:
        examples = [
            _again(respoken(example, said, V), example) for example, (said, _) in zip(examples, wanted, strict=True)
        ]
        monkeypatch.setattr(ask, "_write", None)  # nothing is left to write
        whole = [(said, cut) for said, cut in wanted]
        found = [(talk.said, talk.cut) for talk in answer(vlm, examples, writing, end)]
        assert [said for said, _ in found] == [said for said, _ in whole]
        return
    found = answer(vlm, examples, writing, end)
    assert [(talk.said, talk.cut) for talk in found] == wanted
    assert {cut for _, cut in wanted} == {tokens < 40} or tokens == 3
    assert tokens < 40 or {len(said) for said, _ in wanted} == {1, 2, 3}


def _again(example: Example, source: Example) -> Example:
    return replace(example, pixels=source.pixels)


def test_an_answer_that_is_almost_the_datas_is_taken_over_as_far_as_it_goes(vlm, dataset, monkeypatch):
    end, writing = dataset.text.eos, Writing(40, 300)
    example = next(e for e in map(dataset.__getitem__, range(24)) if len(turns(e)) == 3)
    said, _ = by_hand(vlm, example, writing, end)
    drafted = [list(s) for s in said]
    n, at = next((n, len(s) // 2) for n, s in enumerate(said) if len(s) > 3)
    drafted[n][at] = 7 if drafted[n][at] != 7 else 8
    begun, real = [], ask._write
    monkeypatch.setattr(
        ask, "_write", lambda vlm, both, *rest: (begun.extend(w for _, w in both), real(vlm, both, *rest))
    )
    (talk,) = answer(vlm, [_again(respoken(example, drafted, V), example)], writing, end)
    assert talk.said == said
    assert begun == [said[n][: at + 1]]


def test_a_conversation_stays_within_its_length(vlm, dataset):
    for length in range(60, 100, 7):
        for talk in answer(vlm, [dataset[i] for i in range(6)], Writing(512, length), dataset.text.eos):
            if talk.said:
                found = respoken(talk.example, talk.said, V)
                assert found.length <= length and found.learnt == sum(map(len, talk.said))


def test_a_picture_that_is_said_cuts_an_answer():
    talk = ask.Talk(Example([1, 5, 6, 2], [IGNORE, IGNORE, 6, 2], (), 4), Writing(9, 99), V, 63)
    talk.add([7, 63, 8, 2], True)
    assert talk.said == [[7]] and talk.done and talk.cut


def test_drawn_answers_do_not_depend_on_company(vlm, dataset):
    end, writing = dataset.text.eos, Writing(12, 300, 1.0, 5)
    examples = [dataset[i] for i in range(6)]
    together = [talk.said for talk in answer(vlm, examples, writing, end)]
    alone = [answer(vlm, [example], writing, end)[0].said for example in examples]
    assert together == alone
    assert together != [talk.said for talk in answer(vlm, examples, Writing(12, 300, 1.0, 6), end)]
    assert together != [talk.said for talk in answer(vlm, examples, Writing(12, 300), end)]


def test_pictures_of_turns_that_are_not_asked_and_of_answers_leave(vlm):
    text = text_encoder(vlm.tokenizer)
    record = {
        "images": ["a", "b", "c"],
        "conversations": [
            {"from": "human", "value": "<image>\nthe red?"}, {"from": "gpt", "value": "a <image> there"},
            {"from": "human", "value": "<image>\nthe end?"}, {"from": "gpt", "value": "red"},
        ],
    }  # fmt: skip
    example = encode(record, text, 500, V)
    first, second = turns(example)
    assert (first.pictures, second.pictures) == ([0], [2]) and IMAGE_LABEL not in first.drafted
    assert first.asked + first.answer + second.asked + second.answer == example.input_ids
    both = respoken(example, [[5, text.eos], [6, text.eos]], V)
    assert both.images == ("a", "c") and both.input_ids.count(IMAGE_LABEL) == 2
    assert [t for t in both.labels if t != IGNORE] == [5, text.eos, 6, text.eos]
    one = respoken(example, [[5, 6, 7]], V)
    assert one.images == ("a",) and one.input_ids[-3:] == [5, 6, 7] == one.labels[-3:]


# ---------------------------------------------------------------------- the file


FLAGS = ("--on-policy", "14", "--on-policy-tokens", "20", "--held-out", "4", "--agreement", "labels")


@pytest.fixture
def write(world, tmp_path, capfd):
    """The program in this process: write(name, flags...) gives (exit code, what it said)."""

    def go(name: str, *flags: str, data: str | Path = "") -> tuple[int, str]:
        argv = [
            "--base",
            str(world / "base"),
            "--data",
            str(data or world / "data.json"),
            "--images",
            str(world / "images"),
        ]
        argv += ["--out", str(tmp_path / name), "--device", "cpu", "--workers", "0"]
        code = on_policy.main([*argv, *(["--on-policy-batch", "3"] * ("0" not in flags)), *flags])
        said = capfd.readouterr()
        return code, said.out + said.err

    return go


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_training_learns_what_generate_writes(world, vlm, write, run, tmp_path, monkeypatch):
    code, said = write("out", *FLAGS)
    assert code == 0 and "own answers to 14 of 14" in said, said
    head, *answers = lines(tmp_path / "out/on_policy.jsonl")
    assert len(answers) == 14 and head["tokens"] == 20
    seen: dict[int, tuple] = {}
    real = TwigSubject.lesson

    def lesson(self, prepared, times):
        inner = real(self, prepared, times)

        def spy(batch):
            for b, i in enumerate(batch["indices"] if torch.is_grad_enabled() else ()):
                seen[i] = batch["input_ids"][b].tolist(), batch["labels"][b].tolist()
            return inner(batch)

        return spy

    monkeypatch.setattr(TwigSubject, "lesson", lesson)
    code, said = run("out", *FLAGS, "--K", "2", "--T", "2", "--max-steps", "5")
    assert code == 0 and "14 of them with the base's own answers" in said, said
    assert len(seen) == 20
    own = {line["index"]: line for line in answers}
    texts = {
        i: [t["value"] for t in r["conversations"] if t["from"] == "gpt"]
        for i, r in enumerate(json.loads((world / "data.json").read_text()))
    }
    processor = vlm.processor
    for i, (ids, labels) in seen.items():
        learnt = [t for t in labels if t != IGNORE]
        if i not in own:
            assert vlm.tokenizer.decode(learnt, skip_special_tokens=True).split() == " ".join(texts[i]).split()
            continue
        assert learnt == [t for one in own[i]["answers"] for t in one]
        # Each answer is what generate writes behind all that stands before it.
        picture = world / f"images/{i}.png"
        pixels = (
            processor.image_processor([Image.open(picture)], return_tensors="pt")["pixel_values"] if i % 4 else None
        )
        place = 0
        for one in own[i]["answers"]:
            place = next(n for n in range(place, len(labels)) if labels[n] != IGNORE)
            told = vlm.generate(torch.tensor([ids[:place]]), pixels, max_new_tokens=20).tokens[0]
            assert labels[place : place + len(one)] == one == told + [2] * (len(told) < 20)
            place += len(one)


def test_more_are_added_and_others_are_refused(world, write, tmp_path):
    assert write("out", *FLAGS[:1], "5", *FLAGS[2:])[0] == 0
    first = lines(tmp_path / "out/on_policy.jsonl")
    assert write("out", *FLAGS)[0] == 0
    more = lines(tmp_path / "out/on_policy.jsonl")
    assert len(more) == 15 and all(line in more for line in first)
    before = (tmp_path / "out/on_policy.jsonl").read_bytes()
    other = tmp_path / "other.json"
    other.write_text((world / "data.json").read_text() + "\n")
    for flags, data, match in (
        (("--on-policy-temperature", "0.5"), "", "temperature 0.0, not 0.5"),
        ((), other, "holds answers of other data"),
        (("--max-length", "300"), "", "max_length"),
    ):
        code, said = write("out", *FLAGS, *flags, data=data)
        assert code == 2 and match in said and "choose another --out, or delete" in said, said
    assert (tmp_path / "out/on_policy.jsonl").read_bytes() == before


def test_what_cannot_be_is_refused(run, write, tmp_path):
    for flags, match in (
        (("--on-policy", "-1"), "on_policy is -1; 0 (none) or more"),
        (("--on-policy", "21", "--held-out", "4"), "on_policy is 21, but"),
        (("--on-policy", "3", "--on-policy-tokens", "0"), "on_policy_tokens is 0"),
        (("--on-policy", "3", "--on-policy-temperature", "nan"), "on_policy_temperature is nan"),
        (("--on-policy-temperature", "1"), "it is for --on-policy"),
        (("--on-policy", "3"), "3 of 3 samples have no answer of the base yet"),
    ):
        code, said = run("refused", "--max-steps", "1", *flags)
        assert code == 2 and match in said and "Traceback" not in said, said
    code, said = write("refused", "--on-policy", "0")
    assert code == 2 and "on_policy is 0" in said
    code, said = write("refused", "--on-policy", "25")
    assert code == 2 and "has 24 samples to train on; choose 24 or less" in said


def test_a_damaged_file(write, run, tmp_path):
    assert write("out", *FLAGS)[0] == 0
    file = tmp_path / "out/on_policy.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])  # the power went away
    code, said = run("out", *FLAGS, "--max-steps", "1")
    assert code == 2 and "1 of 14 samples have no answer" in said
    assert write("out", *FLAGS)[0] == 0 and sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())
    rows = whole.splitlines(keepends=True)
    file.write_bytes(b"".join([*rows[:3], b"{]\n", *rows[4:]]))
    code, said = write("out", *FLAGS)
    assert code == 2 and "line 4 is damaged" in said
    file.write_bytes(b"")
    assert write("out", *FLAGS)[0] == 0 and len(lines(file)) == 15


def test_a_broken_picture_is_left_to_the_training(world, write, tmp_path):
    data = tmp_path / "data.json"
    records = json.loads((world / "data.json").read_text())[:5]
    records[1]["image"] = "../data.json"
    data.write_text(json.dumps(records))
    code, said = write("out", "--on-policy", "5", data=data)
    assert code == 0, said
    found = {line["index"]: line for line in lines(tmp_path / "out/on_policy.jsonl")[1:]}
    assert (
        found[1]["answers"] == []
        and found[1]["skipped"] == "image broken"
        and all(found[i]["answers"] for i in (0, 2, 3, 4))
    )


def test_several_processes_share_and_one_file_is_left(world, write, tmp_path, monkeypatch):
    assert write("one", *FLAGS)[0] == 0
    for rank in "10":
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        assert write("two", *FLAGS)[0] == 0
        assert len(spoken.files(tmp_path / "two")) == 1
    one, two = (lines(tmp_path / name / "on_policy.jsonl") for name in ("one", "two"))
    assert one[0] == two[0] and sorted(one[1:], key=lambda x: x["index"]) == two[1:]


@pytest.mark.slow
def test_a_killed_writing_and_a_broken_training_go_on_bit_for_bit(write, run, tmp_path, monkeypatch):
    assert write("whole", *FLAGS)[0] == 0
    real, count = on_policy.answer, [0]

    def killed(*args):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(on_policy, "answer", killed)
        assert write("broken", *FLAGS)[0] == 130
    assert len(lines(tmp_path / "broken/on_policy.jsonl")) == 7
    count[0] = 0
    with monkeypatch.context() as patch:
        patch.setattr(on_policy, "answer", lambda *a: (count.__setitem__(0, count[0] + len(a[1])), real(*a))[1])
        assert write("broken", *FLAGS)[0] == 0
    assert count[0] == 8, "what was answered is not asked again"
    assert (tmp_path / "broken/on_policy.jsonl").read_bytes() == (tmp_path / "whole/on_policy.jsonl").read_bytes()
    steps = (*FLAGS, "--K", "2", "--T", "2", "--max-steps", "4", "--save-steps", "1")
    assert run("whole", *steps)[0] == 0
    from twigvlm.training.twig import TwigLesson

    inner, calls = TwigLesson.__call__, [0]

    def lesson(self, batch):
        calls[0] += 1
        if calls[0] == 11:
            raise KeyboardInterrupt
        return inner(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TwigLesson, "__call__", lesson)
        assert run("broken", *steps)[0] == 130
    code, said = run("broken", *steps)
    assert code == 0 and "continuing from" in said
    one, two = twig_of(tmp_path / "whole"), twig_of(tmp_path / "broken")
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert run("broken", *steps[:1], "5", *steps[2:])[0] == 2, "other answers, another run"


@pytest.mark.parametrize("stage", ["1", "2"])
def test_other_stages_learn_them_as_well(write, run, tmp_path, stage):
    words = ("--K", "2", "--T", "2", "--max-steps", "2")
    init = ()
    if stage == "2":
        assert run("first", "--stage", "1", *words, "--held-out", "4", "--agreement", "labels")[0] == 0
        init = ("--init", str(tmp_path / "first"), "--groups", "2")
    flags = (*FLAGS, "--stage", stage, *words, *init)
    assert write("out", *flags)[0] == 0  # drafted by the twig that training starts from, where there is one
    code, said = run("out", *flags)
    assert code == 0 and "14 of them with" in said, said
    assert json.loads((tmp_path / "out/run.json").read_text())["identity"]["on_policy"] == 14


def test_held_out_samples_stay_as_they_are_and_lengths_are_the_new_ones(world, vlm, write, tmp_path):
    assert write("out", *FLAGS)[0] == 0
    settings = Settings(base=str(world / "base"), data=str(world / "data.json"), images=str(world / "images"), on_policy=14,
                        on_policy_tokens=20, held_out=4, out=str(tmp_path / "out"))  # fmt: skip
    data = loading.read_data(settings, vlm._loaded, progress=False)
    before = data.found.learnt.copy()
    from twigvlm.model.twig import signature

    found = spoken.with_answers(data, settings, signature(vlm.trunk), "x", tmp_path / "out")
    places = set(found.dataset.spoken)
    assert len(places) == 14 and not places & set(found.held_out.tolist())
    for i in range(24):
        if i in places:
            assert (
                found.found.learnt[i] == sum(map(len, found.dataset.spoken[i]))
                and found.found.lengths[i] == found.dataset[i].length
            )
        else:
            assert found.found.learnt[i] == before[i]
    assert found.fingerprint() != data.fingerprint() and "on_policy" in found.fingerprint()


# ---------------------------------------------------------------------- started and killed


class Forked:
    """As `subprocess.Popen` is used for what answers; its libraries are loaded."""

    def __init__(self, command, env, stderr):
        env = {name: value for name, value in env.items() if name != PARENT}  # is another one's
        self._program, self._stderr = Program(command[1:], ROOT, env), stderr

    def wait(self) -> int:
        out, err = self._program.communicate()
        print(out, end="", flush=True)
        if self._stderr is None:
            print(err, end="", file=sys.stderr, flush=True)
        else:
            self._stderr.write(err.encode())
        return self._program.returncode


@pytest.mark.slow
def test_the_launcher_has_the_base_answer_first(world, tmp_path, monkeypatch, capfd):
    """By one process, by two, and by two that refuse it."""
    more = ["--on-policy", "10", "--on-policy-tokens", "8", "--max-steps", "2"]
    assert quietly(flags_into(world, tmp_path / "out", *more), launch.main) == 0
    said = capfd.readouterr().out
    assert "own answers to 10 of 10" in said and "10 of them with" in said, said
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=Forked))
    words = flags_into(world, tmp_path / "two", *more)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_torchrun", lambda *_: 0)
        assert quietly(words, launch.main) == 0 and len(spoken.files(tmp_path / "two")) == 1
    code, said = ranks(python(TRAIN, *words))
    assert code == 0 and "10 of them with" in said, said
    one, two = (sorted(lines(tmp_path / n / "on_policy.jsonl")[1:], key=lambda x: x["index"]) for n in ("out", "two"))
    assert one == two
    assert quietly(flags_into(world, tmp_path / "bad", "--on-policy", "99"), launch.main) == 2
    said = "".join(capfd.readouterr())
    assert said.count("error:") == 1 and "choose 24 or less" in said and "Traceback" not in said
