"""Token for token what the authors' released code gives, on the same weights and inputs."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICE, GOLDEN, choose_golden
from golden import reduce

import twigvlm
from twigvlm.model.tap import Tap
from twigvlm.prompt.template import VICUNA_V1, encode
from twigvlm.pruning import kept_tokens

IMAGE_ID, V = -200, 576  # as the golden files write them
SPECULATIVE = "self_speculative"
LAYOUTS = ("base", "hf")  # the original's files and the Hugging Face ones
WRITTEN = ["base", pytest.param("hf", marks=pytest.mark.nightly)]  # answers of the same weights, as a test below shows


def _read(name: str, golden: Path = GOLDEN) -> list[dict]:
    found = json.loads((golden / "A" / name).read_text(encoding="utf-8"))
    return found if isinstance(found, list) else found["cases"]


def _thinned(found: list) -> list:
    """Every fourth case is asked each time, the others with the slow tests."""
    slow = [[pytest.mark.slow] * (i % 4 > 0) for i in range(len(found))]
    return [pytest.param(*p.values, id=p.id, marks=marks) for p, marks in zip(found, slow, strict=True)]


CASES = [pytest.param(c, r, id=r["arrays"]) for c in _read("cases.json") for r in c["runs"]]
EDGES = [pytest.param(c, r, id=f"{c['name']}-{r['strategy']}") for c in _read("edge_cases.json") for r in c["runs"]]
PROMPTS = [pytest.param(c, id=c["id"]) for c in _read("cases.json") if "prompt" in c]


@cache
def load(layout: str, twig: str, K: int, F: int, golden: Path = GOLDEN) -> twigvlm.TwigVLM:
    return twigvlm.load(
        golden / "A" / layout, golden / "A" / twig, K=K, wipe_layer=F, device=DEVICE, dtype=torch.float32
    )


@cache
def arrays(file: str, golden: Path = GOLDEN) -> dict[str, np.ndarray]:
    with np.load(golden / file) as opened:
        return dict(opened)


def pixels_of(case: dict, golden: Path = GOLDEN) -> torch.Tensor | None:
    if case.get("processed_pixels"):
        return torch.from_numpy(arrays("images/processed_pixels.npz", golden)[case["processed_pixels"]])[None]
    if not case.get("pixels"):
        return None
    return torch.from_numpy(np.load(golden / "images" / case["pixels"])).float().reshape(1, 3, 336, 336)


def ids_of(case: dict, image_token_id: int) -> list[int]:
    return [i for t in case["input_ids"] for i in ([image_token_id] * V if t == IMAGE_ID else [t])]


@dataclass
class Record:
    """What passes along the road while an answer is written."""

    logits: list[torch.Tensor] = field(default_factory=list)  # of the base, one per verification
    scores: list[torch.Tensor] = field(default_factory=list)
    positions: dict[int, list[int]] = field(default_factory=dict)  # entering a layer for the first time
    cache_lengths: list[list[int]] = field(default_factory=list)  # of the base's slots, one per verification


@pytest.fixture
def record(monkeypatch):
    """Call it with a trunk to listen to it."""

    def listen(trunk) -> Record:
        seen, caches = Record(), {}
        run, logits, weights = trunk.run, trunk.logits, Tap.weights

        def spy_run(layers, stream, attention=None, taps=()):
            if len(layers):
                caches.update(dict.fromkeys(attention.cache.layers, attention.cache))
                seen.positions.setdefault(layers[0].self_attn.layer_idx, stream.positions[0, 0].tolist())
            return run(layers, stream, attention, taps)

        def spy_logits(hidden):
            seen.cache_lengths.append([int(caches[slot].used[0]) + caches[slot].ahead for slot in range(trunk.L)])
            seen.logits.append(logits(hidden)[0])
            return seen.logits[-1][None]

        def spy_weights(tap):
            seen.scores.append(weights(tap)[0].mean(0).sum(0))
            return weights(tap)

        monkeypatch.setattr(trunk, "run", spy_run)
        monkeypatch.setattr(trunk, "logits", spy_logits)
        monkeypatch.setattr(Tap, "weights", spy_weights)
        return seen

    return listen


def generate(vlm: twigvlm.TwigVLM, case: dict, run: dict, facts: dict, pruning: bool, golden: Path = GOLDEN):
    return vlm.generate(
        torch.tensor([ids_of(case, vlm.image_token_id)]),
        pixels_of(case, golden),
        retained_tokens=facts["R"] if pruning else None,
        draft_length=5 if run["strategy"] == SPECULATIVE else 0,
        max_new_tokens=facts["max_new_tokens"],
        eos_token_id=facts["eos_token_id"],
    )


def check_answer(out, run: dict, facts: dict, pruning: bool) -> None:
    """Tokens, kept image tokens, and every draft with its fate."""
    assert out.tokens == [run["output_ids"]]
    if pruning:
        assert kept_tokens(facts["R"], 8, V, facts["K"], facts["F"]) == run["attention_rank"]
        assert out.kept[0].tolist() == run["kept_visual_indices"]
    else:
        assert out.kept is None
    if run["strategy"] != SPECULATIVE:
        assert not any(step.drafted for step in out.steps[0])
        return
    steps = out.steps[0]
    assert [s.drafted for s in steps] == [s["drafts"] for s in run["steps"]]
    assert [s.accepted for s in steps] == [s["accepted"] for s in run["steps"]]
    ours, theirs = ([p for s in steps for p in s.probabilities], [p for s in run["steps"] for p in s["probs"]])
    assert ours == pytest.approx(theirs, abs=1e-4)
    room = len(run["output_ids"])
    for step, expected in zip(steps, run["steps"], strict=True):
        assert step.tokens == expected["emitted"][:room]  # ours end before the end token and at the limit
        room -= len(step.tokens)


@pytest.mark.parametrize("layout", WRITTEN)
@pytest.mark.parametrize(("case", "run"), _thinned(CASES))
def test_case(case, run, layout, record):
    vlm = load(layout, "twig", run["K"], run["F"])
    seen = record(vlm.trunk)
    pruning = run["pruning"]
    out = generate(vlm, case, run, run, pruning)
    check_answer(out, run, run, pruning)

    golden, name = arrays("A/arrays.npz"), run["arrays"]
    first = torch.from_numpy(golden[f"{name}/first_logits"])
    torch.testing.assert_close(seen.logits[0][0, : len(first)], first, atol=1e-4, rtol=0)
    assert seen.cache_lengths[:2] == run["cache_lengths_first_two_calls"]
    if f"{name}/all_logits" in golden:
        expected = golden[f"{name}/all_logits"]  # of every step, or of the first ones
        every = torch.cat(seen.logits)[: len(expected), : len(first)].numpy()
        np.testing.assert_allclose(every, expected, atol=1e-4)
    if pruning:
        begin = ids_of(case, vlm.image_token_id).index(vlm.image_token_id)
        scores = seen.scores[0][begin : begin + V].numpy()
        np.testing.assert_allclose(scores, golden[f"{name}/image_scores"], atol=1e-5)
        assert seen.positions[run["F"]] == run["position_ids_at_F"]


@pytest.mark.parametrize("layout", WRITTEN)
@pytest.mark.parametrize(("case", "run"), _thinned(EDGES))
def test_edge_case(case, run, layout):
    vlm = load(layout, case["twig"], case["K"], case["F"])
    assert case["T"] == vlm.config.T
    out = generate(vlm, case, run, case, case["pruning"])
    check_answer(out, run, case, case["pruning"])


def test_both_layouts_have_the_same_weights():
    """To the bit; the Hugging Face files have rows for more words than the original's."""
    original, other = (load(layout, "twig", 2, 6).model.state_dict() for layout in LAYOUTS)
    assert original.keys() == other.keys()
    for name, weight in original.items():
        words = len(weight) if "embed_tokens" in name or "lm_head" in name else None
        assert torch.equal(weight, other[name][:words]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["rand_mid", "prompt_landscape"])
def test_image_features(name, layout):
    case = next(c for c in _read("cases.json") if c["id"] == name)
    features = load(layout, "twig", 2, 6).trunk.image_features(pixels_of(case))[0]
    expected = arrays("A/arrays.npz")[f"{name}/image_features"]  # all channels, or the first ones
    np.testing.assert_allclose(features[:, : expected.shape[1]].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("case", PROMPTS)
def test_prompt_and_pixels(case):
    """From a question and a picture file to the ids and pixels that the released code makes of them."""
    vlm = load("base", "twig", 2, 6)
    inputs = vlm.prepare(GOLDEN / "images" / case["image"], case["question"])
    expected = ids_of(case, vlm.image_token_id)
    assert inputs["input_ids"].tolist() == [expected]
    assert VICUNA_V1.render([(f"<image>\n{case['question']}", None)]) == case["prompt"]
    assert encode(vlm.tokenizer, case["prompt"], vlm.image_token_id, V) == expected
    np.testing.assert_allclose(inputs["pixel_values"].numpy(), pixels_of(case).numpy(), atol=1e-6)


def test_numbers_of_the_configuration():
    for layout in LAYOUTS:
        vlm = load(layout, "twig", 2, 6)
        assert (vlm.config.L, vlm.config.V, vlm.config.K, vlm.config.T, vlm.config.F) == (8, V, 2, 3, 6)
        assert vlm.image_token_id == 512


def test_the_prefix_space_behind_an_end_token():
    """docs/differences.md: LLaVA's own tokenizer writes none there, the released code's (and ours) does."""
    from transformers import LlamaTokenizer

    text = "USER: Hi ASSISTANT: Yes</s>USER: Why? ASSISTANT:"
    own = LlamaTokenizer.from_pretrained(GOLDEN / "A" / "base", legacy=False)
    theirs = own.tokenize(text)
    vlm = load("base", "twig", 2, 6)
    ours = vlm.tokenizer.convert_ids_to_tokens(encode(vlm.tokenizer, text, vlm.image_token_id, V, bos=False))
    end = theirs.index("</s>")
    assert ours[: end + 1] == theirs[: end + 1] and ours[end + 1 :] == ["▁", *theirs[end + 1 :]]


# ---------------------------------------------------------------------- the set that tests/golden carries


@pytest.fixture(scope="module")
def carried(tmp_path_factory) -> Path:
    """The carried set, also where the tests above read the whole one."""
    return reduce.unpack(tmp_path_factory.mktemp("carried"))


def content_of(file: str | io.BytesIO | Path, name: str):
    """What a golden file says; of an npz file that is its arrays, since numpy's releases may wrap them differently."""
    if not name.endswith(("npz", "npy")):
        return file.read_bytes() if isinstance(file, Path) else file.getvalue()
    found = np.load(file)
    found = {k: found[k] for k in found.files} if name.endswith("npz") else {"": found}
    return {k: (v.dtype, v.shape, v.tobytes()) for k, v in found.items()}


def test_the_carried_set_is_small():
    files = [f for f in reduce.ARCHIVE.parent.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert {f.name for f in files} == {"README.md", "reduce.py", reduce.ARCHIVE.name}
    assert sum(f.stat().st_size for f in files) < reduce.LIMIT
    assert reduce.PRUNING.stat().st_size < reduce.PRUNING_LIMIT
    assert reduce.TREES.stat().st_size < reduce.TREES_LIMIT
    assert reduce.STAGES.stat().st_size < reduce.STAGES_LIMIT


def test_the_carried_set_is_the_reduced_whole_one(carried):
    """File by file, nothing more and nothing less; where there is no whole set, reducing changes nothing any more."""
    names = {f"images/{name}" for name in reduce.random_pixels()}
    for name in names:
        assert content_of(carried / name, name) == content_of(GOLDEN / name, name), name
    patterns = (*reduce.TAKEN, *reduce.METHODS, *reduce.DRAFTS, *reduce.LEARNING)
    for name, content in reduce.members(GOLDEN, patterns):
        assert content_of(carried / name, name) == content_of(io.BytesIO(content), name), name
        names.add(name)
    assert names == {f.relative_to(carried).as_posix() for f in carried.rglob("*") if f.is_file()}


def test_packing(carried, tmp_path):
    """What is packed comes out again; pictures that unpacking would draw otherwise are refused."""
    taken = ("images/*.png", "scorers/**/*", "training/*.npz")
    reduce.pack(carried, tmp_path / "one.tar.xz", taken)
    reduce.pack(carried, tmp_path / "two.tar.xz", taken)
    assert (tmp_path / "one.tar.xz").read_bytes() == (tmp_path / "two.tar.xz").read_bytes()
    again = reduce.unpack(tmp_path / "again", [tmp_path / "one.tar.xz"])
    for name, _ in reduce.members(carried, taken):
        assert content_of(again / name, name) == content_of(carried / name, name), name
    np.save(again / "images" / "random_pixels_1.npy", np.zeros((3, 336, 336), np.float16))
    with pytest.raises(SystemExit, match=r"random_pixels_1\.npy"):
        reduce.pack(again, tmp_path / "three.tar.xz", taken)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [c.values[0]["id"] for c in PROMPTS[:1]] + ["rand_mid"])
def test_the_carried_set_decodes(case, layout, carried):
    """As the released code does, under the budget and with drafts."""
    case = next(c for c in _read("cases.json", carried) if c["id"] == case)
    run = next(r for r in case["runs"] if r["pruning"] and r["strategy"] == SPECULATIVE)
    vlm = load(layout, "twig", run["K"], run["F"], carried)
    check_answer(generate(vlm, case, run, run, True, carried), run, run, True)


@pytest.mark.parametrize("twig", ["twig_K1T1", "twig_K3T2", "twig_K5T2"])
def test_the_carried_set_decodes_with_other_twigs(twig, carried):
    case = next(c for c in _read("edge_cases.json", carried) if c["twig"] == twig)
    run = next(r for r in case["runs"] if r["strategy"] == SPECULATIVE)
    out = generate(load("base", twig, case["K"], case["F"], carried), case, run, case, case["pruning"], carried)
    check_answer(out, run, case, case["pruning"])


def test_which_set_is_read(monkeypatch, tmp_path, carried):
    monkeypatch.setenv("TWIGVLM_GOLDEN", str(carried))
    assert choose_golden() == carried
    monkeypatch.setenv("TWIGVLM_GOLDEN", "reduced")
    unpacked = choose_golden()
    assert unpacked != carried and (unpacked / "A" / "cases.json").is_file()
    assert choose_golden() == unpacked, "processes started from here read the same folder"
    monkeypatch.setenv("TWIGVLM_GOLDEN", str(tmp_path))
    with pytest.raises(pytest.UsageError, match=r"no A/cases\.json"):
        choose_golden()
