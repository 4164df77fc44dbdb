"""Text of any kind goes in and comes out whole; numbers that are none never become text."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from conftest import IMAGE, batch, one, prompts, speaking, tiny, tiny_tokenizer, write_base
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import twigvlm
from twigvlm.decoding import DraftStreamer, Step
from twigvlm.errors import InputError, RunError
from twigvlm.files import whole
from twigvlm.prompt.template import converse, decode

RED = Image.new("RGB", (9, 9), "red")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return twigvlm.load(write_base(tmp_path_factory.mktemp("text") / "base", speaking(twig=False).model))


def ids(vlm, *args) -> list[int]:
    return vlm.prepare(*args)["input_ids"][0].tolist()


def text_of(vlm, *args) -> str:
    """A prompt as the model reads it, every picture one mark."""
    plain = [t for t in ids(vlm, *args) if t != vlm.image_token_id]
    return vlm.tokenizer.decode(plain)


# ---------------------------------------------------------------------- what is asked


@pytest.mark.parametrize("odd", ["\ud83d", "a\udc80b", "\udfff\ud800", "\ud800", "\ud801"])
def test_half_a_character_is_replaced(vlm, odd):
    assert ids(vlm, RED, f"is {odd} red?") == ids(vlm, RED, f"is {whole(odd)} red?")
    assert ids(vlm, RED, "is it?", [(odd, odd)]) == ids(vlm, RED, "is it?", [(whole(odd), whole(odd))])
    assert "\ufffd" in text_of(vlm, None, odd)
    assert isinstance(vlm.answer(RED, odd, [(odd, odd)], max_new_tokens=2), str)


def test_whole_characters_stay():
    assert whole("\ud83d\ude42") == "🙂" and whole("é日本🌱 a") == "é日本🌱 a"


def test_a_typed_mark_in_a_later_turn_is_a_word(vlm):
    later = ids(vlm, RED, "and <image>?", [("is it red?", "no <image>")])
    assert later.count(vlm.image_token_id) == vlm.config.V
    assert text_of(vlm, RED, "and <image>?", [("is it red?", "no")]).endswith("USER: and <image>? ASSISTANT:")
    assert ids(vlm, RED, "is <image> red?").count(vlm.image_token_id) == vlm.config.V
    assert ids(vlm, None, "and <image>?", [("is it?", "no")]).count(vlm.image_token_id) == 0
    marked = ids(vlm, RED, "and?", [("is <image> red?", "no")])
    assert marked.index(vlm.image_token_id) > ids(vlm, RED, "x").index(vlm.image_token_id), "where the mark stands"


def test_chat_messages_are_a_history(vlm):
    pairs = [("is it red?", "no"), ("why?", "")]
    said = [{"role": r, "content": c} for q, a in pairs for r, c in (("user", q), ("assistant", a))]
    assert ids(vlm, RED, "and <image>?", said) == ids(vlm, RED, "and <image>?", pairs)
    parts = deepcopy(said)
    parts[0]["content"] = [{"type": "image"}, {"type": "text", "text": "is it red?"}]
    parts[1]["content"] = [{"type": "text", "text": "n"}, {"type": "text", "text": "o"}]
    assert ids(vlm, RED, "and?", parts) == ids(vlm, RED, "and?", pairs)
    parts[0]["content"].reverse()
    behind = ids(vlm, RED, "and?", parts)
    assert behind.index(vlm.image_token_id) > ids(vlm, RED, "and?", pairs).index(vlm.image_token_id)
    parts[0]["content"] = "is <image> red?"
    parts[2]["content"] = [{"type": "image"}, {"type": "text", "text": "why?"}]
    assert ids(vlm, RED, "and?", parts).count(vlm.image_token_id) == vlm.config.V, (
        "a part is a picture, the mark a word"
    )
    told = [{"role": "system", "content": "be red."}, *said]
    assert text_of(vlm, RED, "and?", told).removeprefix("<s>").strip().startswith("be red. USER:")
    assert isinstance(vlm.answer(RED, "and?", told, max_new_tokens=2), str)


def message(role, content) -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([message("user", "a")], "last message is the user's"),
        ([message("assistant", "a")], "message 0: role is 'assistant', 'user'"),
        ([message("user", "a"), message("user", "b")], "message 1: role is 'user', 'assistant'"),
        ([message("user", "a"), message("tool", "b")], "message 1: role is 'tool'"),
        ([message("user", "a"), message("system", "b")], "message 1: role is 'system'"),
        ([message("user", 3), message("assistant", "b")], "message 0: content is a int"),
        ([message("user", [{"type": "video"}]), message("assistant", "b")], "message 0: a part of type 'video'"),
        ([message("user", ["x"]), message("assistant", "b")], "message 0: a part of type 'str'"),
        ([message("user", "a"), message("assistant", [{"type": "image"}])], "message 1: a picture"),
        ([message("user", [{"type": "image"}] * 2), message("assistant", "b")], "2 <image> marks for 1 images"),
        ([("a",)], "entry 0: a .question, answer. pair"),
        ([("a", None)], "entry 0"),
        ([("a", "b"), message("user", "a")], "entry 1"),
    ],
)  # fmt: skip
def test_histories_that_are_none(vlm, history, words):
    with pytest.raises(InputError, match=words):
        vlm.prepare(RED, "and?", history)


def test_a_system_message_alone_is_a_history():
    assert converse([message("system", "s")], "q", 0).turns == [("q", None)]


# ---------------------------------------------------------------------- what is answered

BYTES = st.lists(st.sampled_from([0xE6, 0x97, 0xA5, 0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82, 0x61]), max_size=9)


def byte_tokens(data: bytes) -> list[int]:
    return tiny_tokenizer().convert_tokens_to_ids([f"<0x{b:02X}>" for b in data])


@given(BYTES, BYTES)
def test_bytes_decode_as_utf8_does(first, second):
    """What is valid stays, whatever is broken beside it; the tokenizer alone loses the whole run."""
    word = tiny_tokenizer().convert_tokens_to_ids(["▁the"])
    tokens = byte_tokens(bytes(first)) + word + byte_tokens(bytes(second))
    wanted = bytes(first).decode("utf-8", "replace") + " the" + bytes(second).decode("utf-8", "replace")
    assert decode(tiny_tokenizer(), tokens).lstrip() == wanted.lstrip()


def test_an_answer_cut_inside_a_character_loses_only_that():
    cut = byte_tokens("日本".encode()[:-1])
    assert decode(tiny_tokenizer(), cut) == "日\ufffd"
    for width in (1, 2, 3, 5):
        pieces: list[str] = []
        streamer = DraftStreamer(tiny_tokenizer(), lambda text, drafted: pieces.append(text), skip_prompt=False)  # noqa: B023
        for start in range(0, len(cut), width):
            part = cut[start : start + width]
            streamer.put_step(Step(part, 0, part))
        streamer.end()
        assert "".join(pieces) == "日\ufffd"


def test_ids_without_a_word_are_passed_over():
    """A padded head has more rows than the tokenizer has words."""
    assert decode(tiny_tokenizer(), [*byte_tokens(b"a\xe6"), 10**4, *byte_tokens(b"b")]).replace(" ", "") == "a\ufffdb"


# ---------------------------------------------------------------------- numbers that are none


def spoilt(name: str, value: float, **shape):
    """A tiny model with one weight that is no number."""
    vlm = tiny(**shape)
    copy = deepcopy(vlm)
    for part in (copy.model, copy.twig):
        found = dict(part.named_parameters()) if part is not None else {}
        if name in found:
            with torch.no_grad():
                found[name].view(-1)[0] = value
    return copy


PLACES = {
    "model.language_model.layers.4.mlp.down_proj.weight": "layer 4 of the base",
    "model.language_model.layers.0.self_attn.q_proj.weight": "layer 0 of the base",
    "model.language_model.norm.weight": "the base's norm",
    "lm_head.weight": "the base's head",
    "model.vision_tower.encoder.layers.0.mlp.fc1.weight": "layer 0 of the vision tower",
    "model.multi_modal_projector.linear_2.bias": "the projector",
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "settings", [{"draft_length": 0}, {"do_sample": True, "seed": 1}, {"retained_tokens": 2.5}], ids=str
)
def test_the_layer_is_named(name, value, settings):
    # SDPA lets scores that are no numbers vanish on some processors; weights of files are looked at when they are read.
    vlm = spoilt(name, value, **({"attention": "eager"} if "q_proj" in name else {}))
    with pytest.raises(RunError) as caught:
        vlm.generate(**one(vlm, 3, IMAGE, 4), max_new_tokens=4, **settings)
    assert PLACES[name] in str(caught.value) and f"({name})" in str(caught.value), caught.value


def test_of_several_rows_and_of_a_twig():
    vlm = spoilt("model.language_model.layers.4.mlp.down_proj.weight", float("nan"))
    with pytest.raises(RunError, match="layer 4 of the base"):
        vlm.generate(**batch(*prompts(vlm, [(3, IMAGE, 4), (2,)])), max_new_tokens=4)
    vlm = spoilt("model.layers.1.mlp.down_proj.weight", float("nan"))
    with pytest.raises(RunError, match="layer 1 of the twig"):
        vlm.generate(**one(vlm, 3, IMAGE, 4), max_new_tokens=4)


def test_likelihoods():
    vlm = spoilt("model.language_model.layers.4.mlp.down_proj.weight", float("nan"))
    with pytest.raises(RunError, match="layer 4 of the base"):
        vlm.score(**one(vlm, 3, IMAGE, 4), targets=[[4, 5, 6]])


def test_an_overflow_is_told_from_damage():
    vlm = spoilt("none", 0.0)
    with torch.no_grad():
        for layer in vlm.trunk.layers[3:4]:
            layer.mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(RunError, match=r"layer 3 of the base; its weights are finite, torch\.float32 overflows"):
        vlm.generate(**one(vlm, 3, IMAGE, 4), max_new_tokens=3)


def test_pictures_and_processors():
    vlm = tiny()
    arguments = one(vlm, 3, IMAGE, 4)
    arguments["pixel_values"] = arguments["pixel_values"].clone()
    arguments["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(RunError, match="pixel_values"):
        vlm.generate(**arguments, max_new_tokens=3)
    nothing = lambda ids, scores: torch.full_like(scores, -torch.inf)  # noqa: E731
    with pytest.raises(RunError, match="logits processor"):
        vlm.generate(**one(vlm, 3, IMAGE, 4), max_new_tokens=3, logits_processor=[nothing])


def test_a_folder_whose_tokenizer_knows_nothing(tmp_path, vlm):
    """Without one, and with one that is damaged: an error, in both layouts."""
    from test_loading import write_original, write_tower

    write_tower(tmp_path / "tower")
    for folder in (
        write_base(tmp_path / "base", vlm.model, tokenizer=False),
        write_original(tmp_path / "o", "../tower", False),
    ):
        loaded = twigvlm.load(folder)
        with pytest.raises(InputError, match=r"no tokenizer; fetch tokenizer\.model"):
            loaded.answer(None, "is it?")
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(InputError, match="no usable tokenizer"):
            loaded.answer(None, "is it?")
