"""Shared and fetched again: the same weights, pinned to the base that they grew on, under a card that the hub reads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import tiny
from huggingface_hub import EvalResult, ModelCard
from local_hub import base_and_twig, local_hub  # noqa: F401 (fixtures)

import twigvlm
from twigvlm.commands import push
from twigvlm.config import GenerationSettings, ModelSettings, pinned, split_name
from twigvlm.errors import InputError, RunError
from twigvlm.hub.card import About, check, license_of, result, with_head
from twigvlm.model.twig import CONFIG, WEIGHTS

BASE, TWIG = "user/base", "user/twig"
ITS = ("--base-model", BASE)


def files_of(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def same(a, b) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.fixture
def shared(hub, folders):
    """A base on the hub in two commits, and the folder of its twig; the commits."""
    base, twig = folders
    hub.create(BASE)
    first = hub.commit(BASE, "main", files_of(base), "a base")
    second = hub.commit(BASE, "main", {"notes.txt": b"new words"}, "notes")
    return hub, twig, first, second


def test_what_is_pushed_is_loaded_bit_for_bit(shared, capsys):
    hub, folder, _, second = shared
    vlm = twigvlm.load(BASE, folder, device="cpu")
    done = vlm.twig.push(TWIG, private=True, commit_message="first leaves")
    assert hub.private[TWIG] and hub.messages[-1] == "first leaves"
    assert set(hub.commits[TWIG][done.oid]) == {WEIGHTS, CONFIG, "README.md"}
    facts = json.loads(hub.commits[TWIG][done.oid][CONFIG])
    assert (facts["base"], facts["base_revision"]) == (BASE, second)
    again = twigvlm.load(BASE, TWIG, revision=second, twig_revision=done.oid, device="cpu")
    assert same(vlm.twig, again.twig) and again.twig.config == vlm.twig.config
    assert "revision" not in capsys.readouterr().err
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "max_new_tokens": 6, "eos_token_id": []}
    assert vlm.generate(**inputs).tokens == again.generate(**inputs).tokens


def test_another_revision_with_the_same_weights_is_a_word(shared, capsys):
    _hub, folder, first, second = shared
    twigvlm.load(BASE, folder, device="cpu").twig.push(TWIG)
    capsys.readouterr()
    old = twigvlm.load(BASE, TWIG, revision=first, device="cpu")
    said = capsys.readouterr().err
    assert old.twig.origin.revision == first
    (line,) = (line for line in said.splitlines() if "revision" in line)
    assert first in line and second in line


def test_another_revision_with_other_weights_is_refused(shared):
    hub, folder, first, _ = shared
    twigvlm.load(BASE, folder, revision=first, device="cpu").twig.push(TWIG)
    other = hub.commits[BASE][first][WEIGHTS][:-4096] + bytes(range(16)) * 256
    hub.commit(BASE, "main", {WEIGHTS: _other_weights(other)}, "other weights")
    with pytest.raises(InputError, match=f"revision={first}"):
        twigvlm.load(BASE, TWIG, device="cpu")
    assert twigvlm.load(f"{BASE}@{first}", TWIG, device="cpu").twig is not None


def _other_weights(data: bytes) -> bytes:
    from safetensors.torch import load, save

    return save({k: (v + 0.5 if v.is_floating_point() else v) for k, v in load(data).items()}, {"format": "pt"})


def test_branches_requests_and_tokens(shared):
    hub, folder, *_ = shared
    twig = twigvlm.load(BASE, folder, device="cpu").twig
    done = twig.push(TWIG, revision="trial")
    assert hub.branches[TWIG]["trial"] == done.oid and WEIGHTS not in hub.commits[TWIG][hub.branches[TWIG]["main"]]
    asked = twig.push(TWIG, create_pr=True)
    assert asked.pr_url and hub.branches[TWIG]["refs/pr/1"] == asked.oid
    assert same(twig, twigvlm.load(BASE, f"{TWIG}@trial", device="cpu").twig)
    assert same(twig, twigvlm.load(BASE, TWIG, twig_revision="refs/pr/1", device="cpu").twig)
    with pytest.raises(InputError, match="hf auth login"):
        twig.push(TWIG, token="hf_wrong")
    with pytest.raises(InputError, match="no revision 'gone'"):
        twigvlm.load(BASE, TWIG, twig_revision="gone", device="cpu")
    with pytest.raises(InputError, match="owner/name"):
        twig.push("a/b/c")
    with pytest.raises(InputError, match="pull request"):
        twig.push(TWIG, revision="trial", create_pr=True)
    with pytest.raises(InputError, match="YOU/alone"):
        twig.push("alone")


def test_a_hub_that_is_not_there(shared, monkeypatch):
    from huggingface_hub import constants

    _hub, folder, *_ = shared
    twig = twigvlm.load(BASE, folder, device="cpu").twig
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="cannot be reached"):
        twig.push(TWIG)


def test_a_twig_that_knows_no_base_says_how_to_get_one():
    with pytest.raises(InputError, match=r"twigvlm\.load"):
        tiny().twig.push(TWIG)


def test_the_program_uploads_the_bytes_of_a_folder(shared, tmp_path, capsys):
    hub, folder, first, _ = shared
    facts = json.loads((folder / CONFIG).read_text())
    scored = {"task": "gqa", "title": "GQA", "split": "testdev", "metric": "accuracy, %", "score": 61.25, "R": 64.0, "method": "TTP+SSD"}  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(scored))
    flags = ["--base-model", f"{BASE}@{first}", "--results", str(tmp_path / "result.json"), "--dataset", "user/data"]
    assert push.main([str(folder), TWIG, *flags, "--dry-run"]) == 0
    assert TWIG not in hub.commits and "user/data" in capsys.readouterr().out
    assert push.main([str(folder), TWIG, *flags]) == 0
    commit = json.loads(capsys.readouterr().out.splitlines()[-1])["revision"]
    files = hub.commits[TWIG][commit]
    assert files[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert json.loads(files[CONFIG]) == facts | {"base": BASE, "base_revision": first}
    head = ModelCard(files["README.md"].decode()).data
    assert (head.base_model, head.base_model_relation, head.library_name) == (BASE, "adapter", "twigvlm")
    assert head.datasets == ["user/data"] and head.pipeline_tag == "image-text-to-text"
    (one,) = head.eval_results
    assert one.metric_value == 61.25 and "R = 64" in one.dataset_name
    assert same(twigvlm.load(BASE, folder, device="cpu").twig, twigvlm.load(BASE, TWIG, device="cpu").twig)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere", TWIG], ["nowhere", "no such folder"]),
        (["TWIG", "twig"], ["'twig'", "owner/name"]),
        (["TWIG", "a b/c"], ["'a b/c'", "owner/name"]),
        (["BASE", TWIG], [CONFIG, "no such file"]),
        (["TWIG", TWIG, *ITS, "--license", "My Own!"], ["'My Own!'", "apache-2.0"]),
        (["TWIG", TWIG, *ITS, "--dataset", "a b"], ["'a b'", "owner/name"]),
        (["TWIG", TWIG, "--base-model", "here"], ["'here'", "owner/name"]),
        (["TWIG", TWIG, *ITS, "--results", "none.json"], ["none.json"]),
    ],
)
def test_what_cannot_be_pushed_is_one_line(flags, words, folders, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    named = {"TWIG": str(folders[1]), "BASE": str(folders[0])}
    assert push.main([named.get(f, f) for f in flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def damaged(folder, **facts):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


@pytest.mark.parametrize(
    ("spoil", "result", "words"),
    [
        (lambda f: (f / "README.md").write_bytes(b"# caf\xe9"), {}, ["README.md", "UTF-8"]),
        (lambda f: damaged(f, base=None), {}, ["None", "--base-model"]),
        (lambda f: damaged(f, base=3), {}, ["3", "--base-model"]),
        (lambda f: damaged(f, base="/home/somebody/llava"), {}, ["no id on the hub", "--base-model"]),
        (None, {"R": "64"}, ["R is missing or of another kind"]),
        (None, {"task": {}, "title": []}, ["task, title are missing or of another kind"]),
        (None, {"score": float("nan")}, ["score"]),
        (None, {"score": True}, ["score"]),
    ],
)
def test_files_that_are_not_what_they_should_be(spoil, result, words, folders, capsys, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(folders[1], folder)
    damaged(folder, base=BASE)
    flags = ["--dry-run"]
    if spoil is not None:
        spoil(folder)
    else:
        scored = {"task": "gqa", "title": "GQA", "split": "testdev", "metric": "accuracy, %", "score": 61.25}
        (tmp_path / "result.json").write_text(json.dumps(scored | result))
        flags += ["--results", str(tmp_path / "result.json")]
    assert push.main([str(folder), TWIG, *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_a_base_that_only_this_machine_has_is_not_told_to_all(folders):
    twig = twigvlm.load(*folders, device="cpu").twig
    with pytest.raises(InputError, match="no id on the hub"):
        twig.push(TWIG)


# ---------------------------------------------------------------------- cards


def test_a_card_is_what_the_hub_reads_and_writes():
    good = EvalResult("image-text-to-text", "gqa", "GQA", "accuracy", 60.5, metric_name="accuracy, %")
    card = with_head("# Words\n", About("twig", BASE, results=[good], datasets=["user/data"]))
    read = ModelCard(card)
    assert read.data.to_dict() == ModelCard(str(read)).data.to_dict() and read.text.strip() == "# Words"
    assert read.data.license == "other" and BASE in read.data.license_link
    assert read.data.eval_results == [good]
    kept = with_head("---\nlicense: mit\nlanguage: en\n---\n# Words\n", About("twig", BASE))
    assert ModelCard(kept).data.license == "mit" and ModelCard(kept).data.language == "en"
    assert ModelCard(with_head(kept, About("twig", BASE, license="apache-2.0"))).data.license == "apache-2.0"
    with pytest.raises(InputError, match=r"README\.md"):
        with_head("---\n[no: yaml\n---\n", About("twig", BASE))
    with pytest.raises(InputError, match=r"README\.md"):
        check("# no head")
    with pytest.raises(InputError, match="score"):
        result({"task": "gqa"})


def test_a_licence_is_the_bases_own(tmp_path):
    assert license_of(tmp_path, BASE)["license"] == "other"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: here\n---\n")
    assert license_of(tmp_path, BASE) == {"license": "other", "license_name": "own", "license_link": "here"}
    assert license_of(tmp_path, BASE, "llama2") == {"license": "llama2"}
    (tmp_path / "README.md").write_text("---\nlicense: [a, b\n---\n")
    assert license_of(tmp_path, None) == {"license": "other", "license_name": "license-of-the-base"}


# ---------------------------------------------------------------------- revisions


def test_a_revision_is_a_part_of_a_name(tmp_path):
    assert split_name("user/base@v1.0") == ("user/base", "v1.0") and split_name("user/base") == ("user/base", None)
    assert split_name(tmp_path) == (None, None) and split_name("./a/b@c") == (None, None)
    assert pinned("a/b", "c/d", "v1", None) == ("a/b@v1", "c/d")
    assert pinned("a/b", "c/d", "v1", "v2") == ("a/b@v1", "c/d@v2")
    assert pinned(None, "c/d", "v2", None) == (None, "c/d@v2"), "the twig alone is on the hub"
    settings = ModelSettings("a/b", "c/d", revision="v1", twig_revision="v2")
    assert (settings.base, settings.twig, settings.revision) == ("a/b@v1", "c/d@v2", None)
    assert GenerationSettings() == GenerationSettings()
    for wrong in ((None, None, "v1", None), (str(tmp_path), None, "v1", None), ("a/b", None, None, "v1"), ("a/b", None, "", None), ("a/b", None, "v 1", None), ("a/b@v1", None, "v2", None)):  # fmt: skip
        with pytest.raises(InputError, match="revision"):
            pinned(*wrong)
