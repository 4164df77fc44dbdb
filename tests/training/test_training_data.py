"""Instruction records to batches: the authors' ids and labels for all that is well formed, a named reason for the rest."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from conftest import GOLDEN, ROOT, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from terminal import on_a_terminal
from torch.utils.data import DataLoader
from transformers import LlamaTokenizer

from twigvlm.errors import InputError, RunError
from twigvlm.files import PART
from twigvlm.prompt import template as prompt
from twigvlm.prompt.processor import SquareImageProcessor
from twigvlm.prompt.template import VICUNA_V1, Round, TextEncoder
from twigvlm.training import inspect as inspect_module
from twigvlm.training import train
from twigvlm.training.data import records as records_module
from twigvlm.training.data import survey as survey_module
from twigvlm.training.data.examples import (
    DROPPED,
    IGNORE,
    IMAGE_BROKEN,
    IMAGE_LABEL,
    IMAGE_MISSING,
    NO_LABELS,
    TOO_LONG,
    Collator,
    Example,
    Records,
    Skipped,
    TwigDataset,
    encode,
    read,
)
from twigvlm.training.data.survey import SkipLog, check_named, counts, survey
from twigvlm.training.settings import Settings

V = 4  # visual tokens an image where the number does not matter


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def record(*texts: str, **more) -> dict:
    return {"id": "x", "conversations": turns(*texts), **more}


def encoded(found: dict, limit: int = 2048) -> Example | Skipped:
    return encode(found, tiny_tokenizer(), limit, V)


def write(folder: Path, found: list, name: str = "data.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(found), encoding="utf-8")
    return file


def processor(side: int = 28) -> SquareImageProcessor:
    return SquareImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


# ---------------------------------------------------------------------- the authors' ids and labels

REASONS = {  # of the golden samples that are not well formed, at any length
    "set1_13_img_empty_answer": "empty message",
    "set1_15_text_empty_answer_last": "empty message",
    "set1_16_text_empty_human": "empty message",
    "set1_32_ends_with_human": "ends with a question",
    "set1_33_text_single_human_only": "no answer",
    "set1_34_text_holds_eos": "control word in the text",
    "set1_35_text_holds_unk_and_bos": "control word in the text",
    "set1_36_img_holds_sep_assistant": "control word in the text",
    "set1_37_text_holds_sep_in_second_round": "control word in the text",
    "set1_44_bad_role": "unknown role",
    "set1_45_bad_order": "turns out of order",
    "set1_46_gpt_only": "no answer",
}
LONG = {f"set1_{n}" for n in range(21, 26)}
LONG_768 = {*LONG, "set1_06", "set1_07", "set1_17", "set1_19", "set1_29", "set1_42"}


def _training(name: str):
    return json.loads((GOLDEN / "training" / name).read_text(encoding="utf-8"))


SAMPLES = _training("conversations.json")
EXPECTED = _training("conversations_expected.json")


@cache
def golden_tokenizer() -> LlamaTokenizer:
    """As a processor leaves it: with `<image>` for a special token, which a text-only sample may hold as a word."""
    tokenizer = LlamaTokenizer.from_pretrained(GOLDEN / "A" / "base", legacy=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.mark.parametrize("limit", [2048, 768])
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["id"])
def test_golden(sample, limit):
    name, expected = sample["id"], EXPECTED["samples"][sample["id"]][str(limit)]
    found = encode(sample, golden_tokenizer(), limit)
    if name in REASONS:
        assert found.reason == f"{NO_LABELS}: {REASONS[name]}" and found.detail
        assert expected.get("warning") or expected.get("error"), "what the authors mask or crash on"
    elif name[:7] in (LONG if limit == 2048 else LONG_768):
        assert found.reason == TOO_LONG
        assert expected.get("model_len") == limit or "model_error" in expected, "what the authors cut, or crash on"
    elif name == "set1_47_broken_image_file":
        assert isinstance(found, Example) and "FileNotFoundError" in expected["error"]
    else:
        assert found.input_ids == expected["input_ids"]
        assert found.labels == expected["labels"]
        assert found.learnt == sum(label >= 0 for label in expected["labels"][1:])
        assert not expected["warning"]
        assert found.length == expected.get("model_len", len(found.input_ids) + 2 * 575)  # no length: two images crash


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["id"])
def test_a_prompt_has_the_ids_that_were_learnt(sample):
    """A conversation to be continued is encoded as the same conversation was for training."""
    found, talk = encode(sample, golden_tokenizer(), 10**6), read(sample)
    if isinstance(found, Skipped) or (not talk.marked and any("<image>" in text for _, text in talk.messages)):
        return
    said = [text for _, text in talk.messages]
    if not all(said):  # nobody asks on after an empty answer
        return
    text = VICUNA_V1.render(list(zip(said[::2], said[1::2], strict=True)))
    assert prompt.encode(golden_tokenizer(), text, IMAGE_LABEL, 1) == found.input_ids


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["id"])
def test_golden_batches(sample):
    """Where the images have become visual tokens."""
    expected = EXPECTED["samples"][sample["id"]]["2048"]
    found = encode(sample, golden_tokenizer(), 2048)
    if isinstance(found, Skipped) or "model_supervised_spans" not in expected:
        return
    batch = Collator(512, 576)([found])
    [labels] = batch["labels"].tolist()
    spans = {place for begin, end in expected["model_supervised_spans"] for place in range(begin, end)}
    assert {place for place, label in enumerate(labels) if label != IGNORE} == spans
    assert batch["input_ids"].shape == batch["labels"].shape == (1, expected["model_len"])
    assert (batch["input_ids"] == 512).sum() == 576 * len(found.images)


@pytest.mark.parametrize("name", ["loss_A_K1T2", "loss_A_K2T3"])
def test_golden_collated(name):
    facts = _training(f"{name}.json")
    chosen = [next(s for s in SAMPLES if s["id"] == wanted) for wanted in facts["samples"]]
    examples = [encode(s, golden_tokenizer(), 2048) for s in chosen]
    batch = Collator(512, 576)(examples)
    with np.load(GOLDEN / "training" / f"{name}.npz") as arrays:
        assert np.array_equal(batch["labels"].numpy(), arrays["merged_labels"])
        assert np.array_equal(batch["attention_mask"].numpy(), arrays["merged_attention_mask"])
        unexpanded = [row[row != 0].tolist() for row in arrays["input_ids"]]
    assert [e.input_ids for e in examples] == unexpanded
    assert batch["lengths"] == facts["merged_lengths"]


def test_golden_pixels():
    dataset = TwigDataset(
        Records(GOLDEN / "training" / "conversations.json"), GOLDEN / "images", golden_tokenizer(), processor(336), 2048
    )
    stored = np.load(GOLDEN / "images" / "processed_pixels.npz")
    seen = set()
    for i, sample in enumerate(SAMPLES):
        found = dataset[i]
        if isinstance(found, Skipped) or not found.images:
            continue
        name = sample["image"]
        seen.add(name)
        assert found.pixels.shape == (len(found.images), 3, 336, 336)
        mean = EXPECTED["samples"][sample["id"]]["2048"]["pixel_mean_abs"]
        assert abs(float(found.pixels[0].abs().mean()) - mean) < 2e-6
        stored_name = f"pixels/prompt_{name.split('_')[0]}"
        np.testing.assert_allclose(found.pixels[0].numpy(), stored[stored_name], atol=1e-6)
    assert len(seen) == 4
    assert dataset[47].reason == IMAGE_MISSING and "does_not_exist.png" in dataset[47].detail
    assert dataset[47].id == "set1_47_broken_image_file" and dataset[47].index == 47


def test_special_tokens_as_the_authors_read_them():
    text = TextEncoder(golden_tokenizer())
    for name in ("set1_34_text_holds_eos", "set1_35_text_holds_unk_and_bos"):
        expected = EXPECTED["samples"][name]["2048"]
        assert [text.bos, *text(expected["prompt"])] == expected["input_ids"]


# ---------------------------------------------------------------------- what may be said


def test_the_template():
    rounds = VICUNA_V1.rounds(
        [("human", "Hi"), ("gpt", "Yes?"), ("human", "No"), ("gpt", ""), ("human", "a"), ("gpt", "b")]
    )
    assert rounds == [
        Round(f"{VICUNA_V1.system} USER: Hi ASSISTANT: ", "Yes?"),
        Round("USER: No ASSISTANT:USER: a ASSISTANT: ", "b"),
    ]
    text = "".join(f"{r.asked}{r.answer}</s>" for r in VICUNA_V1.rounds([("human", "Hi"), ("gpt", "Yes?")]))
    assert text == VICUNA_V1.render([("Hi", "Yes?")])


def test_only_the_answers_are_learnt():
    found = encoded(record("<image>\nWhat is red?", "the er", "And a?", "a", image="a.png"))
    text, tokenizer = TextEncoder(tiny_tokenizer()), tiny_tokenizer()
    learnt = [label for label in found.labels if label != IGNORE]
    assert learnt == [*text("the er"), tokenizer.eos_token_id, *text("a"), tokenizer.eos_token_id]
    assert found.learnt == len(learnt)
    assert found.input_ids.count(IMAGE_LABEL) == 1
    assert all(label in (IGNORE, token) for token, label in zip(found.input_ids, found.labels, strict=True))


def test_images_wherever_they_stand():
    for question in ("<image>\nWhat?", "What?<image>", "<image>What?", " What?\n<image> "):
        assert encoded(record(question, "a", image="a.png")) == encoded(record("<image>\nWhat?", "a", image="a.png"))
    answer = encoded(record("Show me.", "Here: <image>", image="a.png"))
    place = answer.input_ids.index(IMAGE_LABEL)
    assert answer.labels[place] == IMAGE_LABEL
    batch = Collator(99, V)([answer])
    assert (batch["labels"][0][batch["input_ids"][0] == 99] == IGNORE).all(), "pictures are not learnt"


@pytest.mark.parametrize(
    ("texts", "images", "shown"),
    [
        (("<image>\n<image>\nWhat?", "a"), ["a", "b"], ["a", "b"]),
        (("<image> or <image>?", "a"), ["a", "b"], ["a", "b"]),
        (("<image>\nWhat?", "a", "And <image>?", "b"), ["a", "b"], ["a", "b"]),
        (("<image>\nWhat?", "a", "And <image><image>?", "b"), ["a", "b", "c"], ["a", "b", "c"]),
        (("<image><image>\nWhat?", "a", "And <image>?", "b"), ["a", "b"], ["a", "b"]),  # one for each turn
        (("<image>\nWhat?", "a", "And <image>?", "b"), "a", ["a", "a"]),  # the same one, asked for again
        (("<image><image>\nWhat?", "a"), "a", ["a"]),
        (("<image><image>\nWhat?", "a"), ["a"], ["a"]),
        (("What?", "<image>", "And?", "<image>"), ["a", "b"], ["a", "b"]),
        (("What?", "b"), ["a", "b"], []),
        (("What?", "b"), [], []),
        (("What?", "b"), None, []),
    ],
)
def test_several_images(texts, images, shown):
    found = encoded(record(*texts, image=images))
    assert list(found.images) == shown
    assert found.input_ids.count(IMAGE_LABEL) == len(shown)
    assert found.length == len(found.input_ids) + len(shown) * (V - 1)
    names = images if isinstance(images, list) else [images] if images else []
    assert found.unshown == (0 if shown else len(names))


def test_marks_without_images_and_images_without_marks():
    for images in (["a", "b"], ["a", "b", "c", "d"]):
        found = encoded(record("<image><image><image>\nWhat?", "a", image=images))
        assert found.reason == "image count" and "3 <image> marks" in found.detail
    for images in (None, "", []):
        assert encoded(record("<image>\nWhat?", "a", image=images)).reason == "image count"
    plain = encoded(record("What is <image>?", "a"))
    assert not plain.images and plain.length == len(plain.input_ids), "a word in a record without pictures"


@pytest.mark.parametrize(
    ("texts", "images", "shown"),
    [
        (("<image>\nWhat?", "a"), ["a"], ["a"]),
        (("<image> or <image>?", "a", "And <image>?", "b"), ["a", "b", "c"], ["a", "b", "c"]),
        (("What?", "<image>"), ["a"], ["a"]),
        (("<image>\nWhat?", "a"), "a", ["a"]),
        (("What?", "b"), [], []),
        (("What?", "b"), None, []),
    ],
)
def test_pictures_under_images(texts, images, shown):
    found = encoded(record(*texts, images=images))
    assert list(found.images) == shown and found.unshown == 0
    assert found.input_ids == encoded(record(*texts, image=shown)).input_ids


@pytest.mark.parametrize(
    ("texts", "images", "reason"),
    [
        (("What?", "b"), ["a"], "image count"),
        (("<image><image>\nWhat?", "a"), ["a"], "image count"),
        (("<image>\nWhat?", "a", "<image>", "b"), ["a"], "image count"),
        (("<image><image>\nWhat?", "a", "And <image>?", "b"), ["a", "b"], "image count"),
        (("<image>\nWhat?", "a"), [], "image count"),
        (("<image>\nWhat?", "a"), [{"path": "a"}], "malformed record"),
        (("<image>\nWhat?", "a"), 3, "malformed record"),
    ],
)
def test_each_picture_under_images_has_its_mark(texts, images, reason):
    found = encoded(record(*texts, images=images))
    assert found.reason == reason and found.detail


def test_pictures_under_both_names():
    assert encoded(record("<image>a", "b", image="a", images=["a"])).reason == "malformed record"
    assert encoded(record("<image>a", "b", image="a", images=[])).images == ("a",)
    assert encoded(record("<image>a", "b", image="", images=["a"])).images == ("a",)


@pytest.mark.parametrize("key", ["video", "videos", "audio", "audios"])
def test_what_nobody_can_look_at_is_a_reason(key):
    for value in ("a.mp4", ["a.mp4"], {"path": "a.mp4"}):
        found = encoded(record("<video>\nWhat?", "a", **{key: value}))
        assert found.reason == key and "a.mp4" in found.detail
    for nothing in (None, "", []):
        assert isinstance(encoded(record("What?", "a", **{key: nothing})), Example)


ALSO = ("image_path", "image_file", "image_url", "imageUrl")


@pytest.mark.parametrize(
    "key",
    [
        "img", "Image", "IMAGES", "image_path", "image_file", "image_url", "imageUrl", "image2", "pictures", "photo",
        "video_path", "Video", "Audio", "frames", "media",
    ],
)  # fmt: skip
def test_media_under_another_key_are_a_reason(key):
    for value in ("a.png", ["a.png"], {"path": "a.png"}):
        found = encoded(record("<image>\nWhat?", "a", **{key: value}))
        assert (
            found.reason == key
            and "a.png" in found.detail
            and (key.lower()[:2] in "viaumefr" or "images" in found.detail)
        )
        again = encoded(record("<image>What?", "a", image="b.png", **{key: value}))  # the same one, from elsewhere
        assert again.images == ("b.png",) if key in ALSO else again.reason == key
    for nothing in (None, "", []):
        assert isinstance(encoded(record("What?", "a", **{key: nothing})), Example)


@pytest.mark.parametrize("key", ["image", "images", "img", "video"])
def test_media_inside_a_turn_are_a_reason(key):
    talk = turns("<image>\nWhat?", "a")
    talk[0][key] = "a.png"
    for more in ({}, {"image": "a.png"}):
        assert encoded({"conversations": talk, **more}).reason == key


@pytest.mark.parametrize(
    "key", ["image_id", "image_size", "imagenet_class", "model", "source", "video_id", "image_source"]
)
def test_other_keys_are_nobodys_business(key):
    assert isinstance(encoded(record("<image>\nWhat?", "a", image="a.png", **{key: "x"})), Example)


@pytest.mark.parametrize(
    "question",
    [
        "<image>\nWhat?",
        "What?\n<image>",
        " <image>",
        "<video>\nWhat?",
        "Hear <audio>",
        "<Image>\nWhat?",
        "<image_1> What?",
    ],
)
def test_marks_of_what_no_key_names_are_a_reason(question):
    found = encoded(record(question, "a"))
    assert found.reason == "media not named" and '"image" or "images"' in found.detail and "turn 0" in found.detail
    if "<image" not in question.lower():
        assert encoded(record(question, "a", video=None, image="a.png")).reason == "media not named"
        assert (
            encoded(record(f"<image>\n{question.partition('>')[0]}>", "a", image="a.png")).reason == "media not named"
        )


@pytest.mark.parametrize(
    "answer",
    [
        "```html\n<video>\n</video>\n```",
        "<channel>\n  <image>\n <url>x</url>\n</image>",
        "New: <article>, <audio>\n<canvas>, <video>",
        "<video>",
    ],
)
def test_html_and_rss_are_no_marks(answer):
    assert isinstance(encoded(record("Write it", answer)), Example)
    if "<image>" not in answer:
        assert encoded(record("<image>\nWrite this page", answer, image="a.png")).images == ("a.png",)


@pytest.mark.parametrize(
    "question",
    ["<image>\n<url>x</url>\n</image>\nWhat is this?", "<VIDEO>\n</video> fails", "Why does\n<video>\nnot play?"],
)
def test_html_and_rss_that_is_asked_about_is_no_mark(question):
    assert isinstance(encoded(record(question, "a")), Example)


@pytest.mark.parametrize(
    ("key", "value"),
    [("media", "web"), ("frames", 8), ("photo", "sunset"), ("video", True), ("media", ["v1.5"]), ("file_name", "a.json"),
     ("image_id", "000012"), ("image_id", 12)],
)  # fmt: skip
def test_numbers_and_plain_words_name_no_media(key, value):
    for more in ({}, {"image": "a.png"}):
        assert isinstance(encoded(record("<image>\nWhat?" if more else "What?", "a", **{key: value}, **more)), Example)


@pytest.mark.parametrize("key", ["video", "videos", "audio", "Video", "img", "Image", "pictures", "image2"])
def test_a_field_that_is_for_media_counts_whatever_it_names(key):
    for value in ("valley/000123", ["000123"], {"id": "000123"}):
        assert encoded(record("What?", "a", **{key: value})).reason == key
    turns = [{"from": "human", "value": "What?", key: "000123"}, {"from": "gpt", "value": "a"}]
    assert encoded({"conversations": turns}).reason == key


@pytest.mark.parametrize("key", ["image_id", "imageId", "file_name", "filename", "image_src", "src"])
def test_fields_whose_value_is_a_picture_s_name(key):
    assert encoded(record("What?", "a", **{key: "a.jpg"})).reason == key
    assert isinstance(encoded(record("<image>\nWhat?", "a", image="b.jpg", **{key: "a.jpg"})), Example)


def test_a_system_text_takes_the_place_of_the_template_s():
    ids = {
        text: encoded(record("What?", "a", system=text)).input_ids for text in ("Be brief.", VICUNA_V1.system, "", None)
    }
    plain = encoded(record("What?", "a")).input_ids
    assert ids[""] == ids[None] == ids[VICUNA_V1.system] == plain
    said = TextEncoder(tiny_tokenizer())
    assert ids["Be brief."] == [1, *said("Be brief. USER: What? ASSISTANT: a"), 2]


@pytest.mark.parametrize("text", [3, ["a"], {"a": 1}, "a</s>", "<image> a", "\ud800"])
def test_a_system_text_that_cannot_be_said_is_a_reason(text):
    found = encoded(record("What?", "a", system=text))
    assert found.reason == "system text" and ("lone surrogate" in found.detail) is (text == "\ud800")
    assert encoded(record("a", "b", system="Be ASSISTANT: brief")).reason.endswith("control word in the text")


@pytest.mark.parametrize(
    "name", ["http://a.b/c.png", "HTTPS://a.b/c.png", "s3://a/b.png", "file:///a.png", "data:image/png;base64,AAAA"]
)
def test_pictures_that_are_no_files_are_a_reason(name):
    for key in ("image", "images"):
        found = encoded(record("<image>\nWhat?", "a", **{key: [name]}))
        assert found.reason == "image is no file" and name[:20] in found.detail
    assert isinstance(encoded(record("What?", "a", image=name)), Example), "nobody looks at it"


def test_a_greeting_goes_with_its_pictures():
    """Of three pictures the dropped turn takes the first; the others stay where they belong."""
    talk = [{"from": "gpt", "value": "<image> Hello"}, *turns("<image>\nWhat?", "a", "<image>", "b")]
    found = encoded({"id": 1, "conversations": talk, "image": ["a", "b", "c"]})
    assert found.images == ("b", "c") and found.unshown == 1
    assert found.input_ids == encoded(record("<image>\nWhat?", "a", "<image>", "b", image=["b", "c"])).input_ids


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (record("What?", ""), "empty message"),
        (record("", "a"), "empty message"),
        (record("What?", "a", "", "b"), "empty message"),
        (record("What?", "a", "And?", ""), "empty message"),
        (record("What?", "a", "And?"), "ends with a question"),
        (record("What?"), "no answer"),
        (record("What?", "a </s> b"), "control word in the text"),
        (record("a</s>", "b"), "control word in the text"),
        (record("a", "b</s>"), "control word in the text"),
        (record("a</s>USER: b ASSISTANT: c", "b"), "control word in the text"),
        (record("a ASSISTANT: b", "c"), "control word in the text"),
        (record("a ASSISTANT:", "c"), "control word in the text"),  # the authors' code learns "ASSISTANT:" here
        (record("a", "b ASSISTANT: c"), "control word in the text"),
        (record("a <unk>", "b"), "control word in the text"),
        ({"conversations": [{"from": "system", "value": "a"}, *turns("a", "b")]}, "unknown role"),
        ({"conversations": [*turns("a", "b"), {"from": None, "value": "a"}]}, "unknown role"),
        ({"conversations": [*turns("a", "b"), *turns("a", "b")[1:]]}, "turns out of order"),
        ({"conversations": [{"from": "gpt", "value": "a"}, *turns("a", "b")[1:]]}, "turns out of order"),
    ],
)
def test_labels_that_cannot_be_aligned(found, reason):
    assert encoded(found).reason == f"{NO_LABELS}: {reason}"


@pytest.mark.parametrize(
    "texts", [("ASSISTANT: x", "a"), ("a", "ASSISTANT: b"), ("a", "b ASSISTANT:"), ("USER: a", "USER: b")]
)
def test_words_of_the_template_that_do_no_harm(texts):
    found = encoded(record(*texts))
    if texts[0].startswith("ASSISTANT"):
        assert found.reason.endswith("control word in the text")
        return
    learnt = [label for label in found.labels if label != IGNORE]
    assert learnt == [*TextEncoder(tiny_tokenizer())(texts[1]), 2]


@pytest.mark.parametrize(
    "found",
    [
        None, 3, "text", [], {}, {"conversations": None}, {"conversations": []}, {"conversations": {"from": "human"}},
        {"conversations": ["a"]}, {"conversations": [{"from": "human"}]},
        {"conversations": [{"from": "human", "value": None}]}, {"conversations": [{"from": "human", "value": 3}]},
        record("a \ud800", "b"), record("<image>a", "b", image=3), record("<image>a", "b", image=["a", None]), record("<image>a", "b", image={}),
    ],
)  # fmt: skip
def test_malformed(found):
    assert encoded(found).reason == "malformed record"
    assert isinstance(read(found), Skipped)


def test_too_long():
    found = encoded(record("<image>\nWhat?", "a", image="a"))
    assert isinstance(encoded(record("<image>\nWhat?", "a", image="a"), found.length), Example)
    skipped = encoded(record("<image>\nWhat?", "a", image="a"), found.length - 1)
    assert skipped.reason == TOO_LONG and str(found.length) in skipped.detail


PARTS = [
    "",
    " ",
    "a",
    "the",
    "ASSISTANT:",
    " ASSISTANT: ",
    "USER:",
    "</s>",
    "<unk>",
    "<s>",
    "\n",
    "é",
    "<image>",
    ".",
    "  ",
]
MESSAGES = st.lists(st.sampled_from(PARTS), max_size=4).map("".join)


@given(st.lists(MESSAGES, min_size=1, max_size=5))
def test_labels_found_in_the_finished_text(messages):
    """The other way round, as the golden data describes it: cut the text at the end tokens, count tokens of each part.

    What is used here is labelled alike by both; what is not, holds the template's words or is empty.
    """
    found, text = encoded(record(*messages)), TextEncoder(tiny_tokenizer())
    prompt = f"{VICUNA_V1.system} "
    for i, message in enumerate(messages):
        name, after = (("USER", " "), ("ASSISTANT", "</s>"))[i % 2]
        prompt += f"{name}: {message}{after}" if message else f"{name}:"
    ids, total = [1, *text(prompt)], 1
    labels = list(ids)
    labels[0] = IGNORE
    for part in prompt.split("</s>"):
        halves = part.split(" ASSISTANT: ")
        if len(halves) != 2:
            break
        asked = len(text(f"{halves[0]} ASSISTANT: ")) - 1
        labels[total : total + asked] = [IGNORE] * asked
        total += len(text(part)) + 1
    aligned = total == sum(token != 0 for token in ids)
    if isinstance(found, Example):
        assert aligned and found.input_ids == ids and found.labels == labels
    elif aligned:
        assert found.reason == "media not named" or any(
            word in "|".join(messages) for word in ("</s>", "ASSISTANT:")
        ), found


# ---------------------------------------------------------------------- records in a file

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FILES = st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=4), min_size=1, max_size=5)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_or_a_device_is_no_file(tmp_path):
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for file in (pipe, "/dev/zero", "/dev/null"):
        with pytest.raises(InputError, match="is a pipe or a device; write what it gives into a file"):
            Records(file)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(records_module, "CHUNK", 7)


@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"ensure_ascii": False, "separators": (",", ":")}])
@pytest.mark.parametrize("lines", [False, True])
def test_records(layout, lines, tmp_path, small_chunks):
    file = tmp_path / "data.json"

    @settings(max_examples=40)
    @given(FILES)
    def check(found):
        text = "\n".join(json.dumps(f, **layout) for f in found) if lines else json.dumps(found, **layout)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        records = Records(file)
        assert [records[i] for i in range(len(records))] == found
        assert pickle.loads(pickle.dumps(records))[len(found) - 1] == found[-1]

    check()


def test_a_key_that_stands_twice_is_a_reason(tmp_path):
    talk = json.dumps(turns("<image>\nWhat?", "a"))
    twice = talk.replace('"value": "a"', '"value": "b", "value": "a"')
    lines = [f'{{"image": "a.png", "image": "b.png", "conversations": {talk}}}', f'{{"image": "a", "conversations": {twice}}}',
             f'{{"image": "a.png", "more": {{"a": 1, "a": 2}}, "conversations": {talk}}}']  # fmt: skip
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines))
    first, second, third = (read(found) for found in Records(file))
    assert first.reason == second.reason == "malformed record" and third.images == ("a.png",)
    assert 'the record has "image" twice' in first.detail and 'turn 1 has "value" twice' in second.detail


def test_broken_anywhere(tmp_path, small_chunks):
    """With a byte lost or added the file is refused wherever JSON would refuse it, and read where it still is JSON."""
    file = tmp_path / "data.json"
    text = json.dumps([{"a\\": 'b"', "[}": []}, {"é{": '\\"\n', "more": [1, {}]}], ensure_ascii=False).encode()

    def ours():
        try:
            records = Records(file)
            return [records[i] for i in range(len(records))]
        except InputError as fault:
            assert f"{file}" in str(fault) and ("byte" in str(fault) or "no samples" in str(fault))
            return None

    for place in range(len(text)):
        for changed in (
            text[:place] + text[place + 1 :],
            *(text[:place] + b + text[place:] for b in (b'"', b"\\", b"]", b"{", b",")),
        ):
            file.write_bytes(changed)
            try:
                expected = json.loads(changed)
            except ValueError:
                expected = None
            if not (isinstance(expected, list) and all(isinstance(e, (dict, list)) for e in expected)):
                expected = None
            assert ours() == expected, changed


def test_where_it_is_broken(tmp_path):
    good = json.dumps([record("a", "b")] * 3, indent=1)
    file = tmp_path / "data.json"
    for change, line in [(('"from": "gpt"', '"from" "gpt"'), 10), (("gpt", 'g"pt'), 10)]:
        file.write_text(good.replace(*change, 1))
        with pytest.raises(InputError, match=rf"data\.json, line {line}, byte \d+: broken JSON"):
            records = Records(file)
            [records[i] for i in range(len(records))]
    file.write_text(good[:-100])
    with pytest.raises(InputError, match="cut short"):
        Records(file)
    file.write_bytes(good.encode().replace(b'"x"', b'"\xff"', 1))
    with pytest.raises(InputError, match=r"line 3, byte \d+: broken JSON"):
        Records(file)[0]


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"[]", "no samples"), (b"[ ]\n", "no samples"), (b"hello", "line 1, byte 0"),
     (b"[1, 2]", "broken JSON"), (b"\xef\xbb\xbf[]", "no samples"), (b'["a"]', "broken JSON")],
)  # fmt: skip
def test_no_records(content, part, tmp_path):
    file = tmp_path / "data.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=part):
        Records(file)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (lambda text: text.encode("utf-16"), "is UTF-16"),
        (lambda text: b"\xfe\xff" + text.encode("utf-16-be"), "is UTF-16"),
        (lambda text: text.encode("utf-16-le"), "if it is UTF-16LE"),
        (lambda text: text.encode("utf-16-be"), "iconv -f UTF-16BE"),
        (lambda text: text.encode("utf-32"), "is UTF-32"),
        (lambda text: text.encode("utf-32-be"), "if it is UTF-32BE"),
        (lambda text: gzip.compress(text.encode()), "compressed by gzip.*gunzip"),
        (lambda text: bz2.compress(text.encode()), "compressed by bzip2"),
        (lambda text: lzma.compress(text.encode()), "compressed by xz"),
        (lambda text: b"PK\x03\x04" + text.encode(), "a ZIP archive"),
        (lambda text: b"PAR1" + text.encode(), "a Parquet table"),
    ],
)
def test_files_that_are_no_plain_json(content, part, tmp_path):
    file = tmp_path / "data.json"
    file.write_bytes(content(json.dumps([record("a", "b")])))
    with pytest.raises(InputError, match=rf"data\.json: .*{part}"):
        Records(file)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_json_lines(end, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + end.join(json.dumps(record(str(i), "b")) for i in range(3)).encode())
    assert [r["conversations"][0]["value"] for r in Records(file)] == ["0", "1", "2"]
    file.write_text("\n".join([json.dumps(record("a", "b")), '{"id": 1,, "conversations": []}']))
    with pytest.raises(InputError, match="line 2, byte"):
        list(Records(file))


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Records(tmp_path / "data.json")
    with pytest.raises(InputError, match="is a folder"):
        Records(tmp_path)


def test_a_file_that_changes(tmp_path):
    file = write(tmp_path, [record("a", "b")])
    records = Records(file)
    packed = pickle.dumps(records)
    assert records[-1] == record("a", "b")
    with pytest.raises(IndexError):
        records[1]
    write(tmp_path, [record("aa", "b")])
    with pytest.raises(InputError, match="has changed"):
        pickle.loads(packed)[0]


def _large(file: Path, n: int) -> None:
    """As llava_v1_5_mix665k.json is: 1.5 kB a record, some with pictures, quotes and other alphabets."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(500)] + [
        '"x"',
        "\\",
        "{é}",
        "猫]",
    ]

    def say(n: int) -> str:
        return " ".join(rng.choices(words, k=n))

    talks = [record(*(say(rng.randint(3, 40)) for _ in range(rng.choice([2, 4, 10])))) for _ in range(200)]
    with open(file, "w", encoding="utf-8") as out:
        out.write("[")
        for i in range(n):
            pictures = {"image": f"coco/train2017/{i:012d}.jpg"} if i % 10 else {}
            out.write(
                ("," if i else "") + json.dumps({**talks[i % 200], "id": str(i), **pictures}, ensure_ascii=i % 2 == 0)
            )
        out.write("]")


@pytest.mark.slow
def test_a_large_file_is_read_in_seconds_and_little_memory(tmp_path):
    file, n = tmp_path / "data.json", 200_000
    _large(file, n)
    code = (
        "import resource, sys, time\nfrom twigvlm.training.data.records import Records\n"
        "before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()\n"
        "r = Records(sys.argv[1])\nassert r[123_456]['id'] == '123456'\n"
        "print(len(r), time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, file], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    count, seconds, kilobytes = (float(x) for x in out.split())
    assert count == n
    assert seconds < 20, "a few seconds on a machine of its own"
    assert kilobytes < 100_000 < file.stat().st_size / 1000


def test_a_worker_gets_no_copy(tmp_path):
    file = tmp_path / "data.json"
    _large(file, 3000)
    dataset = TwigDataset(Records(file), tmp_path, tiny_tokenizer(), None, 2048)
    alone = TwigDataset(
        Records(write(tmp_path, [record("a", "b")], "one.json")), tmp_path, tiny_tokenizer(), None, 2048
    )
    per_record = (len(pickle.dumps(dataset)) - len(pickle.dumps(alone))) / 3000
    assert per_record < 20 < file.stat().st_size / 3000, "two numbers a record, whatever its size"


# ---------------------------------------------------------------------- pictures and batches


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "green"), ("c.png", "blue")):
        Image.new("RGB", (40, 20), colour).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    return folder


def dataset_of(folder: Path, pictures: Path | None, found: list, limit: int = 400) -> TwigDataset:
    return TwigDataset(Records(write(folder, found)), pictures, tiny_tokenizer(), processor(), limit, V)


MIXED = [
    record("<image>\nWhat?", "red", image="a.png"),
    record("Why?", "the end"),
    record("<image>\nWhat?", "red", image="broken.png"),
    record("<image><image>", "red", image=["b.png", "c.png"]),
    record("<image>\nWhat?", "red", image="lost.png"),
    record("What?", ""),
]


def test_a_batch(tmp_path, pictures):
    dataset = dataset_of(tmp_path, pictures, MIXED)
    items = dataset.__getitems__(range(len(dataset)))
    batch = Collator(99, V, pad_token_id=7)(items)
    examples = [dataset[i] for i in (0, 1, 3)]
    assert batch["indices"] == [0, 1, 3]
    assert batch["lengths"] == [e.length for e in examples]
    assert batch["input_ids"].shape == (3, max(batch["lengths"]))
    for row, example in enumerate(examples):
        n = example.length
        ids, labels, mask = (batch[k][row] for k in ("input_ids", "labels", "attention_mask"))
        assert [t for t in ids[:n].tolist() if t != 99] == [t for t in example.input_ids if t >= 0]
        assert (ids == 99).sum() == V * len(example.images)
        assert mask.tolist() == [1] * n + [0] * (len(mask) - n)
        assert (ids[n:] == 7).all() and (labels[n:] == IGNORE).all()
        assert (labels != IGNORE).sum() == example.learnt
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    colours = batch["pixel_values"][:, :, 14, 14].argmax(1).tolist()
    assert colours == [0, 1, 2], "red, green, blue: in the order of the rows and of their marks"
    assert {s.index: s.reason for s in batch["skipped"]} == {
        2: IMAGE_BROKEN, 4: IMAGE_MISSING, 5: f"{NO_LABELS}: empty message"
    }  # fmt: skip
    assert Collator(99, V)([dataset[1]])["pixel_values"] is None


def test_a_batch_that_loses_all_borrows_the_next(tmp_path, pictures):
    """Of the same kind, and the same one each time."""
    dataset = dataset_of(tmp_path, pictures, [*MIXED, record("Now?", "red")])
    dataset.usable = np.array([0, 1, 2, 3, 6])
    for _ in range(2):
        items = dataset.__getitems__([2])
        assert [i.index for i in items if isinstance(i, Example)] == [3]
        assert [i.index for i in items if isinstance(i, Skipped)] == [2]
    dataset.usable = np.array([1, 2])
    assert Collator(99, V)(dataset.__getitems__([2]))["indices"] == [1]
    dataset.usable = np.array([2])
    with pytest.raises(RunError, match="no usable sample"):
        dataset.__getitems__([2])


@pytest.mark.parametrize("context", ["fork", pytest.param(warm.SERVER, id="sent", marks=pytest.mark.slow)])
def test_workers(tmp_path, pictures, context):
    """Data that a worker inherits, and data that is sent to it (by `spawn`, too)."""
    dataset = dataset_of(tmp_path, pictures, MIXED)
    batches = [[0, 1], [3, 2]]
    loader = DataLoader(
        dataset, batch_sampler=batches, collate_fn=Collator(99, V), num_workers=1, multiprocessing_context=context
    )
    for places, batch in zip(batches, loader, strict=True):
        expected = Collator(99, V)(dataset.__getitems__(places))
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert batch["skipped"] == expected["skipped"]


def test_no_folder_for_pictures(tmp_path, pictures):
    with pytest.raises(InputError, match="no such folder"):
        dataset_of(tmp_path, tmp_path / "nowhere", MIXED)
    with pytest.raises(InputError, match="4 of 6 samples have images"):
        survey(dataset_of(tmp_path, None, MIXED), workers=0, progress=False)
    text = dataset_of(tmp_path, None, [record("Why?", "the end")])
    assert survey(text, workers=0, progress=False).usable.tolist() == [0]


# ---------------------------------------------------------------------- the survey and the list


def test_a_survey(tmp_path, pictures):
    dataset = dataset_of(tmp_path, pictures, [*MIXED, record("a" * 500, "b")])
    found = survey(dataset, workers=0, progress=False)
    assert found.usable.tolist() == [0, 1, 2, 3]  # whether a picture can be read is seen when it is
    for i in (0, 1, 3):
        assert (found.lengths[i], found.learnt[i], found.images[i]) == (
            dataset[i].length, dataset[i].learnt, len(dataset[i].images)
        )  # fmt: skip
    assert [(s.index, s.reason) for s in found.skipped] == [
        (4, IMAGE_MISSING), (5, f"{NO_LABELS}: empty message"), (6, TOO_LONG)
    ]  # fmt: skip
    assert counts(found.skipped) == {IMAGE_MISSING: 1, f"{NO_LABELS}: empty message": 1, TOO_LONG: 1}


def test_a_survey_tells_of_pictures_that_nothing_shows(tmp_path, pictures):
    dataset = dataset_of(
        tmp_path, pictures, [record("What?", "a", image="a.png"), record("<image>", "a", image="a.png")]
    )
    for _ in range(2):  # found, then read again
        assert survey(dataset, tmp_path / "cache", workers=0, progress=False).unshown == 1


def test_a_folder_of_pictures_that_no_record_names_is_told(tmp_path, pictures):
    for more in ({}, {"image": None}, {"image_id": 12}, {"file_name": "0012"}):
        blind = dataset_of(tmp_path, pictures, [record("What?", "a", **more), record("a", "")])
        with pytest.raises(InputError, match=r"none of its 2 records names a picture.*id, conversations") as fault:
            check_named(survey(blind, workers=0, progress=False), blind)
        assert all(key in str(fault.value) for key in more) and "leave --images out" in str(fault.value)
        text = dataset_of(tmp_path, None, [record("What?", "a", **more)])
        check_named(survey(text, workers=0, progress=False), text)
    for named in (
        MIXED,
        [record("a", "b"), record("a", "b", image="a.png")],
        [record("a", "b"), record("", image="a")],
    ):
        dataset = dataset_of(tmp_path, pictures, named)
        check_named(survey(dataset, workers=0, progress=False), dataset)


def test_pictures_that_nothing_shows_are_told_before_training(tmp_path, pictures, capsys, monkeypatch):
    dataset = dataset_of(tmp_path, pictures, [record("What?", "a", image="a.png")])
    found = survey(dataset, workers=0, progress=False)
    monkeypatch.setattr(train, "read_data", lambda settings, loaded, ranks, judge, *rest: judge(dataset, found))
    one = SimpleNamespace(settings=Settings(), out=tmp_path / "out", ranks=SimpleNamespace(first=True))
    train._read_data(one, SimpleNamespace(loaded=None), [])
    assert "1 samples name pictures that no <image> shows" in capsys.readouterr().err


def test_a_survey_by_several_processes(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(survey_module, "PART", 2)
    dataset = dataset_of(tmp_path, pictures, MIXED * 5)
    one, two = (survey(dataset, workers=w, progress=False) for w in (0, 2))
    assert one.skipped == two.skipped and one.fingerprint() == two.fingerprint()


def test_a_survey_is_kept(tmp_path, pictures, monkeypatch):
    calls = []
    texts = survey_module._texts
    monkeypatch.setattr(survey_module, "_texts", lambda *a: calls.append(1) or texts(*a))

    def go(found, limit=400, drop=()):
        dataset = dataset_of(tmp_path, pictures, found, limit)
        return survey(dataset, tmp_path / "cache", workers=0, drop=drop, progress=False)

    first = go(MIXED)
    again = go(MIXED)
    assert len(calls) == 1 and first.fingerprint() == again.fingerprint() and first.skipped == again.skipped
    go(MIXED, limit=399)
    go(MIXED[1:])
    go(MIXED, drop=[0])
    assert len(calls) == 4
    (pictures / "a.png").unlink()
    gone = go(MIXED)
    assert len(calls) == 4 and 0 not in gone.usable, "whether pictures are there is looked up each time"
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"nonsense")
    assert go(MIXED).fingerprint() == gone.fingerprint() and len(calls) == 5


def test_dropped_by_index(tmp_path, pictures):
    found = survey(dataset_of(tmp_path, pictures, MIXED), workers=0, drop=[1], progress=False)
    assert found.usable.tolist() == [0, 2, 3]
    assert [s.index for s in found.skipped if s.reason == DROPPED] == [1]
    for wrong in (6, -1):
        with pytest.raises(InputError, match=f"index {wrong} to drop.*6 records"):
            survey(dataset_of(tmp_path, pictures, MIXED), workers=0, drop=[wrong], progress=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_json_in_a_survey(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(survey_module, "PART", 1)
    file = write(tmp_path, [record("a", "b")] * 4)
    file.write_text(file.read_text().replace('"a"', "nonsense", 1))
    dataset = TwigDataset(Records(file), None, tiny_tokenizer(), None, 400, V)
    with pytest.raises(InputError, match=r"data\.json, line 1, byte \d+: broken JSON"):
        survey(dataset, workers=workers, progress=False)


def _die(_dataset, _part) -> list:
    os._exit(1)


def test_a_worker_that_dies(tmp_path):
    dataset = dataset_of(tmp_path, None, [record("a", "b")] * 4)
    with pytest.raises(RunError, match="worker process died"):
        list(survey_module.in_parts(_die, dataset, range(4), 2, None, 1))


def test_the_list_of_skipped_samples(tmp_path, pictures):
    dataset = dataset_of(tmp_path, pictures, MIXED)
    file = tmp_path / "run" / "skipped.jsonl"
    log = SkipLog(file, dataset, max_skipped=0.5)
    log.add(survey(dataset, workers=0, progress=False).skipped)
    log.add([dataset[2], dataset[2]])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(f["index"], f["reason"], f["id"]) for f in lines] == [
        (2, IMAGE_BROKEN, "x"), (4, IMAGE_MISSING, "x"), (5, f"{NO_LABELS}: empty message", "x")
    ]  # fmt: skip
    assert "broken.png" in lines[0]["detail"]
    with pytest.raises(InputError) as caught:
        SkipLog(file, dataset, max_skipped=0.3).add(survey(dataset, workers=0, progress=False).skipped)
    for part in ("3 of 6", "image broken: 1", "0.3", str(file)):
        assert part in str(caught.value), "the broken picture is known from the list"
    Image.new("RGB", (5, 5)).save(pictures / "broken.png")
    assert SkipLog(file, dataset, 0.4).skipped == [dataset[4]], "repaired pictures do not count any more"


def test_shares_of_skipped_samples(tmp_path):
    dataset = dataset_of(tmp_path, None, [record("a", "b")] * 200)
    file = tmp_path / "skipped.jsonl"
    SkipLog(file, dataset).add([Skipped("why", "not", i, i) for i in range(2)])  # exactly 1 %
    with pytest.raises(InputError, match="3 of 200"):
        SkipLog(file, dataset).add([Skipped("why", "not", i, i) for i in range(3)])
    assert len(file.read_text().splitlines()) == 3
    dataset.drop(range(100))
    log = SkipLog(file, dataset, 0.02)
    log.add([Skipped(DROPPED, "", i, i) for i in range(100)])
    log.add([Skipped("why", "not", i, i) for i in (150, 151)])
    with pytest.raises(InputError, match="3 of 100"):
        log.add([Skipped("why", "not", 152, 152)])
    for share in (-0.1, 1.1):
        with pytest.raises(InputError, match="share"):
            SkipLog(file, dataset, share)
    file.write_text("nonsense")
    with pytest.raises(InputError, match="move it away"):
        SkipLog(file, dataset)


# ---------------------------------------------------------------------- the program


def inspect(*arguments) -> subprocess.CompletedProcess:
    """The program in a process of its own."""
    return warm.run(["-m", "twigvlm.training.inspect", *arguments], ROOT)


@pytest.fixture
def inspected(capfd):
    """The program within this process: (exit code, output, error output)."""

    def run(*arguments) -> tuple[int, str, str]:
        code = inspect_module.main([*map(str, arguments), "--workers", "0"])
        return code, *capfd.readouterr()

    return run


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("limit", "tower"), [(2048, True), (768, False)])
def test_inspect(tmp_path, limit, tower, inspected):
    base = GOLDEN / "A" / "base"
    if not tower:  # a folder with config and tokenizer alone
        base = tmp_path / "base"
        base.mkdir()
        for file in (GOLDEN / "A" / "base").iterdir():
            if file.suffix != ".safetensors":
                (base / file.name).write_bytes(file.read_bytes())
    data, out = GOLDEN / "training" / "conversations.json", tmp_path / "out" / "samples.jsonl"
    arguments = ["--data", data, "--images", GOLDEN / "images", "--base", base, "--max-length", limit, "--out", out]
    code, text, notes = inspected(*arguments)
    assert code == 0, notes
    lines = lines_of(out)
    assert [f["id"] for f in lines] == [s["id"] for s in SAMPLES]
    assert [f["index"] for f in lines] == list(range(len(SAMPLES)))
    for facts in lines:
        expected = EXPECTED["samples"][facts["id"]][str(limit)]
        if "reason" in facts:
            faults = (
                expected.get("model_len") == limit,
                *(expected.get(k) for k in ("warning", "error", "model_error")),
            )
            assert any(faults), facts
            assert facts["detail"] and facts["input_ids"] == facts["labels"] == []
        else:
            assert (facts["input_ids"], facts["labels"]) == (expected["input_ids"], expected["labels"])
    facts = json.loads(text.splitlines()[-1])
    reasons = {r: sum(f.get("reason") == r for f in lines) for r in facts["reasons"]}
    assert facts["reasons"] == reasons and facts["skipped"] == sum(reasons.values())
    assert facts["samples"] == len(SAMPLES) and facts["usable"] == len(SAMPLES) - facts["skipped"]
    assert facts["reasons"][IMAGE_MISSING] == 1
    for reason, number in reasons.items():
        assert any(reason in line and str(number) in line for line in text.splitlines()[:-1])
    assert ("counted as with" in notes) == (not tower)


@pytest.mark.slow
def test_inspect_as_a_program(tmp_path, pictures):
    data, out = write(tmp_path, MIXED), tmp_path / "samples.jsonl"
    done = inspect("--data", data, "--images", pictures, "--out", out)
    assert done.returncode == 0 and "Inspecting: 100%" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["usable"] == 3 and len(lines_of(out)) == 6
    assert inspect("--data", tmp_path / "nothing.json").returncode == 2


def test_inspect_with_the_embedded_base(tmp_path, pictures, inspected):
    data, out = write(tmp_path, MIXED), tmp_path / "samples.jsonl"
    code, text, _ = inspected("--data", data, "--images", pictures, "--out", out, "--drop-indices", "1")
    facts = json.loads(text.splitlines()[-1])
    assert code == 0
    assert facts["reasons"] == {DROPPED: 1, IMAGE_BROKEN: 1, IMAGE_MISSING: 1, f"{NO_LABELS}: empty message": 1}
    assert facts["images"] == 3 and facts["with_images"] == 2
    assert [f.get("reason") for f in lines_of(out)][:3] == [None, DROPPED, IMAGE_BROKEN]
    assert not list(tmp_path.glob(f"{PART}*"))
    code, text, notes = inspected("--data", data)
    assert json.loads(text.splitlines()[-1])["usable"] == 5 and "without --images" in notes


def test_show(tmp_path, pictures, inspected):
    data = write(tmp_path, [*MIXED, record("Ring\x1b[31m", "b\x07ell", image="a.png")])
    _, shown, _ = inspected("--data", data, "--images", pictures, "--show", 0)
    assert "USER: <image a.png>" in shown and "ASSISTANT:[[ red</s>]]" in shown and "\033" not in shown
    _, shown, _ = inspected("--data", data, "--images", pictures, "--show", 5)
    assert "empty message" in shown and "What?" in shown
    assert "\\x1b[31m" in inspected("--data", data, "--show", 6)[1]
    code, _, error = inspected("--data", data, "--show", 7)
    assert code == 2 and "samples 0 to 6" in error


def test_show_in_colour(tmp_path):
    arguments = ["--data", str(write(tmp_path, MIXED)), "--show", "0", "--workers", "0"]
    text = on_a_terminal(inspect_module.main, arguments)
    assert "ASSISTANT:\033[32m red</s>\033[0m" in text and text.count("\033[32m") == 1 and "[[" not in text
    assert "\033" not in on_a_terminal(inspect_module.main, arguments, NO_COLOR="1")


@pytest.mark.parametrize(
    ("content", "arguments", "part"),
    [
        (None, [], "no such file"),
        ("[]", [], "holds no samples"),
        ('[{"id": 1, "conversations": [}]', [], "broken JSON"),
        ('[{"id": 1 "conversations": []}]', [], "line 1, byte 10: broken JSON"),
        (json.dumps(MIXED), ["--images", "nowhere"], "nowhere: no such folder"),
        (json.dumps(MIXED), ["--base", "./nowhere"], "nowhere"),
        (json.dumps(MIXED), ["--max-length", "0"], "--max-length is 0"),
        (json.dumps(MIXED), ["--drop-indices", "99"], "index 99"),
        (json.dumps(MIXED), ["--drop-indices", "a"], "whole numbers"),
        (json.dumps(MIXED), ["--out", "DATA"], "the data itself"),
    ],
)
def test_inspect_refuses(content, arguments, part, tmp_path, inspected):
    data = tmp_path / "data.json"
    if content is not None:
        data.write_text(content)
    code, text, error = inspected("--data", data, *(str(data) if a == "DATA" else a for a in arguments))
    assert code == 2 and not text
    assert part in error and error.strip().splitlines()[-1].startswith("error: ")


def test_a_picture_with_broken_metadata_is_seen_and_a_bomb_is_not(tmp_path, pictures, inspected):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x1a\0\x02\0\0\0\x04abc\0\0\0\0\0"
    Image.new("RGB", (9, 9)).save(pictures / "odd.jpg", exif=exif)
    Image.new("1", (60000, 3)).save(pictures / "bomb.png")
    names = ["odd.jpg", "bomb.png"]
    out = tmp_path / "samples.jsonl"
    data = write(tmp_path, [record("<image>", "a", image=name) for name in names])
    code, _, _ = inspected("--data", data, "--images", pictures, "--out", out)
    assert code == 0 and [f.get("reason") for f in lines_of(out)] == [None, IMAGE_BROKEN]
    assert "padded to a square" in lines_of(out)[1]["detail"]


def test_names_that_no_file_can_have(tmp_path, pictures, inspected):
    names = ["x" * 5000, "a\0b", "\ud800.png", "a.png/b", ".", "../images/a.png"]
    found = [{**record("<image>", "a", image=name), "id": name} for name in names]
    out = tmp_path / "samples.jsonl"
    code, _, _ = inspected("--data", write(tmp_path, found), "--images", pictures, "--out", out)
    lines = lines_of(out)
    assert code == 0 and [f["id"] for f in lines] == names
    assert [f.get("reason") for f in lines] == [IMAGE_MISSING] * 4 + [IMAGE_BROKEN, None]
    SkipLog(tmp_path / "skipped.jsonl", dataset_of(tmp_path, pictures, found), 1.0).add(
        survey(dataset_of(tmp_path, pictures, found), workers=0, progress=False).skipped
    )
    assert [f["id"] for f in lines_of(tmp_path / "skipped.jsonl")] == names[:4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk(tmp_path, inspected):
    (tmp_path / f"{PART}{os.getpid()}-out.jsonl").symlink_to("/dev/full")
    code, _, error = inspected("--data", write(tmp_path, MIXED), "--out", tmp_path / "out.jsonl")
    assert code == 1 and "No space left" in error and not (tmp_path / "out.jsonl").exists()
