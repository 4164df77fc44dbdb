"""Token for token what the authors' released code gives, on the same weights and inputs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import torch
from conftest import GOLDEN

import twigvlm
from twigvlm.model.tap import Tap
from twigvlm.prompt.template import VICUNA_V1, encode
from twigvlm.pruning import kept_tokens

IMAGE_ID, V = -200, 576  # as the golden files write them
SPECULATIVE = "self_speculative"
LAYOUTS = ("base", "hf")  # the original's files and the Hugging Face ones
pytestmark = pytest.mark.usefixtures("golden")


def _read(name: str) -> list[dict]:
    file = GOLDEN / "A" / name
    if not file.exists():  # the golden fixture skips the tests; collecting them must work
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, list) else found["cases"]


CASES = [pytest.param(c, r, id=r["arrays"]) for c in _read("cases.json") for r in c["runs"]]
EDGES = [pytest.param(c, r, id=f"{c['name']}-{r['strategy']}") for c in _read("edge_cases.json") for r in c["runs"]]
PROMPTS = [pytest.param(c, id=c["id"]) for c in _read("cases.json") if "prompt" in c]


@cache
def load(layout: str, twig: str, K: int, F: int) -> twigvlm.TwigVLM:
    return twigvlm.load(GOLDEN / "A" / layout, GOLDEN / "A" / twig, K=K, wipe_layer=F)


@cache
def arrays(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / file) as opened:
        return dict(opened)


def pixels_of(case: dict) -> torch.Tensor | None:
    if case.get("processed_pixels"):
        return torch.from_numpy(arrays("images/processed_pixels.npz")[case["processed_pixels"]])[None]
    if not case.get("pixels"):
        return None
    return torch.from_numpy(np.load(GOLDEN / "images" / case["pixels"])).float().reshape(1, 3, 336, 336)


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


def generate(vlm: twigvlm.TwigVLM, case: dict, run: dict, facts: dict, pruning: bool):
    return vlm.generate(
        torch.tensor([ids_of(case, vlm.image_token_id)]),
        pixels_of(case),
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "run"), CASES)
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
        every = torch.cat(seen.logits)[:, : len(first)].numpy()
        np.testing.assert_allclose(every, golden[f"{name}/all_logits"], atol=1e-4)
    if pruning:
        begin = ids_of(case, vlm.image_token_id).index(vlm.image_token_id)
        scores = seen.scores[0][begin : begin + V].numpy()
        np.testing.assert_allclose(scores, golden[f"{name}/image_scores"], atol=1e-5)
        assert seen.positions[run["F"]] == run["position_ids_at_F"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "run"), EDGES)
def test_edge_case(case, run, layout):
    vlm = load(layout, case["twig"], case["K"], case["F"])
    assert case["T"] == vlm.config.T
    out = generate(vlm, case, run, case, case["pruning"])
    check_answer(out, run, case, case["pruning"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["rand_mid", "prompt_landscape"])
def test_image_features(name, layout):
    case = next(c for c in _read("cases.json") if c["id"] == name)
    features = load(layout, "twig", 2, 6).trunk.image_features(pixels_of(case))[0]
    np.testing.assert_allclose(features.numpy(), arrays("A/arrays.npz")[f"{name}/image_features"], atol=2e-5)


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
