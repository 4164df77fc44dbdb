"""A base's tokenizer, template and end tokens: judged before its weights are fetched, and its own where it has its own."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
from conftest import IMAGE, batch, prompts, tiny_model, tiny_tokenizer, write_base
from PIL import Image
from test_describe import (  # noqa: F401 (fixture)
    CHATML,
    HF_LLAVA,
    Hub,
    mistral,
    no_weights,
    speaking_folder,
    words_of,
)
from test_loading import base, change, edit, original, refused  # noqa: F401 (fixtures)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaTokenizer

import twigvlm
from twigvlm.config import TwigConfig
from twigvlm.model.twig import grow, save_twig
from twigvlm.prompt.processor import VICUNA_CHAT
from twigvlm.prompt.template import CheckpointPrompts, VicunaPrompts

PIRATE = "You are a pirate. " + HF_LLAVA
CLOSED = HF_LLAVA.replace("p['text'] + ' '", "p['text'] + '</s>'")
WORDS = len(tiny_tokenizer())
ROWS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def spoken(tmp_path) -> Path:
    return speaking_folder(tmp_path / "spoken", None)


def asked(folder: Path) -> tuple:
    """How its model is asked, and the words of a question."""
    vlm = twigvlm.load(folder)
    return vlm.prompts, words_of(vlm, vlm.prepare(Image.new("RGB", (9, 9)), "is it red?")["input_ids"][0].tolist())


# ---------------------------------------------------------------------- chat templates


@pytest.mark.parametrize("template", [PIRATE, CLOSED, "{{ bos_token }}" + HF_LLAVA, HF_LLAVA + " "], ids=range(4))
@pytest.mark.parametrize("body", ["llama", "mistral"])
def test_a_template_is_vicunas_only_where_it_says_nothing_else(tmp_path, template, body):
    folder = tmp_path / "m"
    if body == "mistral":
        (mistral(folder, None, vocabulary=WORDS) / "chat_template.jinja").write_text(template)
    else:
        speaking_folder(folder, template)
    prompts_, words = asked(folder)
    alike = body == "llama" and template.strip() == HF_LLAVA
    assert isinstance(prompts_, VicunaPrompts if alike else CheckpointPrompts)
    assert ("curious" in words) == alike and "USER" in words


def test_vicunas_template_is_one_of_llama(tmp_path):
    assert isinstance(asked(speaking_folder(tmp_path / "v", VICUNA_CHAT + "{# in other words #}"))[0], VicunaPrompts)
    assert isinstance(asked(speaking_folder(tmp_path / "h", HF_LLAVA))[0], VicunaPrompts)
    folder = mistral(tmp_path / "m", None, vocabulary=WORDS)
    (folder / "chat_template.jinja").write_text(HF_LLAVA)
    assert isinstance(asked(folder)[0], CheckpointPrompts)


def write_named(folder: Path, place: str, templates: dict[str, str]) -> Path:
    if place == "additional_chat_templates":
        (folder / place).mkdir()
        for name, text in templates.items():
            (folder / place / f"{name}.jinja").write_text(text)
    elif place == "tokenizer_config.json":
        edit(folder / place, chat_template=[{"name": k, "template": v} for k, v in templates.items()])
    else:
        (folder / place).write_text(json.dumps({"chat_template": templates}))
    return folder


@pytest.mark.parametrize(
    "place", ["chat_template.json", "processor_config.json", "tokenizer_config.json", "additional_chat_templates"]
)
def test_templates_by_name(spoken, place, no_weights):  # noqa: F811
    write_named(spoken, place, {"rag": CHATML, "tool_use": HF_LLAVA})
    refused([str(spoken), "rag, tool_use", "default"], spoken)


@pytest.mark.parametrize(
    "place", ["chat_template.json", "processor_config.json", "tokenizer_config.json", "additional_chat_templates"]
)
@pytest.mark.parametrize("names", [("vqa",), ("default", "tool_use")], ids=str)
def test_the_only_template_by_name_and_the_default(spoken, place, names):
    if place == "additional_chat_templates" and "default" in names:
        pytest.skip("the default has a file of its own")
    write_named(spoken, place, dict(zip(names, (CHATML, PIRATE), strict=False)))
    found, words = asked(spoken)
    assert isinstance(found, CheckpointPrompts) and "user" in words and "USER" not in words


@pytest.mark.parametrize("template", [["a"], 3, {"default": 3}, {"a": ["b"]}, True, "{% for m in %}"], ids=str)
def test_what_is_no_template(spoken, template, no_weights):  # noqa: F811
    (spoken / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    refused([str(spoken), "chat template"], spoken)


LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start|>' + m['role'] + ' ' + m['content'] | trim + '<|eot|>' %}"
    "{{ content }}{% endfor %}{{ '<|start|>assistant ' }}"
)
DEAF = "{% for m in messages %}{% for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %}{% endfor %} say"
RAISING = "{{ raise_exception('a system message is needed') }}"


@pytest.mark.parametrize("template", [LLAMA3, "{% for m in messages %}{{ m['content'] }}{% endfor %}"], ids=range(2))
def test_a_template_of_texts_is_given_texts(tmp_path, template):
    """With and without a picture: joined to a text, a list of parts would be printed as Python prints it."""
    vlm = twigvlm.load(speaking_folder(tmp_path / "m", template))
    for picture, history in ((None, []), (None, [("is it blue?", "no")]), (Image.new("RGB", (9, 9)), [])):
        prompt = vlm.prepare(picture, "is it red?", history)["input_ids"][0].tolist()
        words = words_of(vlm, prompt)
        assert "red" in words and "type" not in words and "[{" not in "".join(words)
        assert (prompt.count(vlm.image_token_id) > 0) == (picture is not None)


@pytest.mark.parametrize(
    ("template", "about"),
    [
        (DEAF, "about a picture"),
        (HF_LLAVA.replace("p['text'] + ' '", "p['text'] * 2"), "about a picture"),
        ("{% for m in messages %}{{ m['content'] | tojson if '<image>' not in m['content'] }}{% endfor %}", "picture"),
        (CHATML.replace("in m['content'] %}", "in m['content'] if m['content'] | length > 1 %}")
         .replace("m['content'] is string", "false"), "without a picture"),
    ],
    ids=["deaf", "twice", "shown", "without-a-picture"],
)  # fmt: skip
def test_a_template_that_does_not_say_the_question(spoken, template, about, no_weights):  # noqa: F811
    (spoken / "chat_template.jinja").write_text(template)
    refused([str(spoken), "chat template", about, "fetch"], spoken)


def test_a_template_that_raises_is_told_when_asked(spoken):
    (spoken / "chat_template.jinja").write_text(RAISING)
    with pytest.raises(twigvlm.errors.InputError, match="a system message is needed"):
        twigvlm.load(spoken).prepare(None, "is it red?")


# ---------------------------------------------------------------------- tokenizers


def other_words(folder: Path, *ids: int) -> Path:
    """A tokenizer of other words; beside the special ones they have these ids."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in ids}}
    found = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("layout", ["spoken", "original"])
def test_a_tokenizer_of_another_vocabulary(layout, request, no_weights):  # noqa: F811
    folder = request.getfixturevalue(layout)
    tiny_tokenizer().save_pretrained(folder)  # of more words than the original one has
    if layout == "spoken":
        other_words(folder, *range(3, 2000))
    refused([str(folder), "1999" if layout == "spoken" else str(WORDS - 2), "vocabulary", "fetch"], folder)


def test_a_special_token_beyond_the_vocabulary(spoken, no_weights):  # noqa: F811
    other_words(spoken, 3)
    file = spoken / "tokenizer.json"
    facts = json.loads(file.read_text())
    facts["model"]["vocab"]["</s>"] = 1500
    file.write_text(json.dumps(facts))
    refused([str(spoken), "1500", str(WORDS)], spoken)


def test_padding_that_no_text_gives_may_lie_beyond(original):  # noqa: F811
    """As fine-tuned LLaVAs have it, whose [PAD] has no row of its own."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(32, 64)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    own = LlamaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], legacy=True, pad_token="[PAD]")
    own.save_pretrained(original)
    edit(original / "config.json", vocab_size=len(words))
    change(original / "model.safetensors", **{key: lambda t: t[: len(words)] for key in ROWS})
    assert twigvlm.load(original).tokenizer.pad_token_id == len(words)


@pytest.mark.parametrize("spoil", ["no configuration", "no end", "broken"])
def test_tokenizers_of_no_use(spoken, spoil, no_weights):  # noqa: F811
    if spoil == "no configuration":
        (spoken / "tokenizer_config.json").unlink()
    elif spoil == "no end":
        edit(spoken / "tokenizer_config.json", eos_token=None)
    else:
        (spoken / "tokenizer.json").write_text("{")
    refused([str(spoken), "tokenizer", "fetch"], spoken)


def test_the_image_token_is_the_tokenizers(spoken, no_weights):  # noqa: F811
    edit(spoken / "config.json", image_token_index=WORDS - 3)
    refused([str(spoken), str(WORDS - 1), "image_token_index", str(WORDS - 3)], spoken)


def test_no_weights_are_fetched_for_another_models_tokenizer(spoken, monkeypatch):
    hub = Hub(other_words(spoken, 999), monkeypatch)
    refused(["999"], "someone/llava")
    assert len(hub.asked) == 1 and not any("safetensors" in pattern for pattern in hub.asked[0][1])


# ---------------------------------------------------------------------- ends


def ends(folder: Path, inner: object, outer: object = ..., beside: object = ...) -> list[int]:
    """Ends of a base whose config.json has `inner` in its decoder, `outer` outside, and generation_config.json `beside`."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    facts = json.loads((folder / "config.json").read_text())
    facts["text_config"]["eos_token_id"] = inner
    facts |= {} if outer is ... else {"eos_token_id": outer}
    (folder / "config.json").write_text(json.dumps(facts))
    if beside is not ...:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": beside}))
    return twigvlm.load(folder)._eos(None)


@pytest.mark.parametrize(
    ("inner", "outer", "beside", "wanted"),
    [
        (2, ..., ..., [2]),
        (2, 7, ..., [7]),  # as stock code has it
        (2, [7, 8], ..., [7, 8]),
        (2, 7, 9, [9]),
        (2, 7, [9, None], [9]),
        (2, None, [], [2]),
        ([2, 5], ..., None, [2, 5]),
        (None, ..., ..., [2]),  # the tokenizer's, from here on
        ([], None, [None], [2]),
    ],
    ids=str,
)
def test_an_answer_ends_somewhere(spoken, inner, outer, beside, wanted):
    assert ends(spoken, inner, outer, beside) == wanted


def test_a_base_without_an_end(base, no_weights):  # noqa: F811
    for inner, beside in ((None, ...), ([], []), (None, [None])):
        with pytest.raises(twigvlm.errors.InputError, match=r"config\.json: no eos_token_id.*add it"):
            ends(base, inner, ..., beside)


@pytest.mark.parametrize("facts", [{"bos_token_id": "x"}, {"pad_token_id": 64}, {"eos_token_id": 63}], ids=str)
def test_ids_of_the_generation_config(base, facts, no_weights):  # noqa: F811
    (base / "generation_config.json").write_text(json.dumps(facts))
    refused([str(base), str(*facts.values())], base)


# ---------------------------------------------------------------------- padded rows


@pytest.mark.parametrize(("base_rows", "twig_rows"), [(32000, 32064), (32064, 32000)])
@pytest.mark.parametrize("settings", [{}, {"tree": (2, 2, 3, 6)}, {"retained_tokens": 2.5}], ids=str)
def test_a_twig_of_other_padding_answers_as_the_base(tmp_path, base_rows, twig_rows, settings):
    """Hugging Face's conversions have 64 rows more than the originals; a twig of the one is used on the other."""
    for rows in (32000, 32064):
        model = deepcopy(tiny_model(vocabulary=32000, fade=0.3))
        model.resize_token_embeddings(rows)
        write_base(tmp_path / str(rows), model, tokenizer=False)
    home = twigvlm.load(tmp_path / str(twig_rows))
    save_twig(grow(home.trunk, TwigConfig(6, K=2, T=2)), home.trunk, tmp_path / "twig", "x")
    vlm = twigvlm.load(tmp_path / str(base_rows), tmp_path / "twig")
    assert vlm.twig.lm_head.out_features == 32000
    rows, pictures = prompts(vlm, [(3, IMAGE, 4), (6,)])
    arguments = {**batch(rows, pictures), "max_new_tokens": 10, "eos_token_id": []}
    drafted = vlm.generate(**arguments, **settings)
    plain = {key: value for key, value in settings.items() if key != "tree"}
    assert drafted.tokens == vlm.generate(**arguments, **plain, draft_length=0).tokens
    assert any(step.accepted for row in drafted.steps for step in row)
