"""CDPruner with a text tower: what CLIP is told, and what is missing."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import speaking, tiny_model, write_base
from PIL import Image
from pruning.slowly import Picture, cos, slow_cdpruner
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import twigvlm
from twigvlm.errors import InputError
from twigvlm.pruning.plan import Shape

LLAVA = Shape(32, 576, 2, 24)


# ---------------------------------------------------------------------- CLIP's text tower

WORDS = [
    "<|startoftext|>",
    "<|endoftext|>",
    *string.ascii_lowercase,
    "?",
    *(f"{c}</w>" for c in string.ascii_lowercase + "?"),
]
CONTEXT = 11  # of the tiny text tower, where CLIP has 77
QUESTION = "how many red things are here?"
PROMPTS = [  # what is asked about a picture, and what of it is the question
    ([], QUESTION),
    ([("what is this?", "a tree")], QUESTION),
    ([], f"{QUESTION}\nAnswer the question using a single word or phrase."),
    ([], f"{QUESTION}\nAnswer with the option's letter from the given choices directly."),
]


def write_clip(folder: Path, width: int = 16) -> CLIPModel:
    """A whole CLIP model of random weights, in Hugging Face's layout."""
    shape = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    text = {**shape, "hidden_size": 16, "vocab_size": len(WORDS), "max_position_embeddings": CONTEXT}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**shape, "hidden_size": width, "image_size": 56, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
        model.vision_model.post_layernorm.weight.data.uniform_(0.5, 2)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    """A model that has a tokenizer."""
    return twigvlm.load(write_base(tmp_path_factory.mktemp("base"), speaking(side=56).model))


@torch.inference_mode()
@pytest.mark.parametrize(("history", "question"), PROMPTS)
def test_cdpruner_reads_the_question_with_clip(asking, tmp_path, history, question):
    """CLIP's own model embeds patches and the bare question, cut into pieces and padded with zeros by hand."""
    clip, vlm = write_clip(tmp_path / "clip"), asking
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 255, (56, 56, 3), np.uint8))
    inputs = vlm.prepare(picture, question, history)
    ids = [0, *(WORDS.index(c) for c in spelt(QUESTION)), 1]
    pieces = [ids[i : i + CONTEXT] for i in range(0, len(ids), CONTEXT)]
    assert len(pieces) == 3 and len(pieces[-1]) < CONTEXT
    zeros = [[0] * (CONTEXT - len(piece)) for piece in pieces]
    texts = clip.get_text_features(
        input_ids=torch.tensor([a + b for a, b in zip(pieces, zeros, strict=True)]),
        attention_mask=torch.tensor([[1] * len(a) + b for a, b in zip(pieces, zeros, strict=True)]),
    )
    texts = getattr(texts, "pooler_output", texts).tolist()
    states = vlm.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    seen = clip.visual_projection(clip.vision_model.post_layernorm(states))[0].tolist()
    fit = [-sum(cos(patch, text) for text in texts) / len(texts) for patch in seen]
    projected = vlm.model.model.multi_modal_projector(states)[0].tolist()
    expected = slow_cdpruner(Picture(4, [[], *states[0].tolist()], [], [], [], projected, []), 6, fit)
    settings = {"retained_tokens": 6, "max_new_tokens": 1}
    out = vlm.generate(**inputs, **settings, pruning=f"cdpruner:text_tower={tmp_path / 'clip'}")
    assert out.kept[0].tolist() == [patch for _, patch in expected]
    substitute = vlm.generate(**inputs, **settings, pruning="cdpruner:stand_in")
    assert substitute.kept[0].tolist() != out.kept[0].tolist()


def spelt(text: str) -> list[str]:
    """Letters of a text as CLIP's tokenizer without merges has them: the last one of a word is marked."""
    words = text.replace("?", " ?").split()
    return [c if i < len(word) - 1 else f"{c}</w>" for word in words for i, c in enumerate(word)]


def test_cdpruner_says_what_it_needs(asking, tmp_path):
    inputs = asking.prepare(Image.new("RGB", (56, 56)), "what?")
    write_clip(tmp_path / "wide", width=32)
    write_clip(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    write_base(tmp_path / "llava", tiny_model())
    for given_, words in (
        ("", ("text_tower=", "clip-vit-large-patch14-336", "stand_in")),
        (f":text_tower={tmp_path / 'nothing'}", ("nothing", "no such folder")),
        (f":text_tower={tmp_path / 'llava'}", ("llava", "a whole CLIP model")),
        (f":text_tower={tmp_path / 'empty'}", ("empty", "no weights")),
        (f":text_tower={tmp_path / 'wide'}", ("width of 32", "has 16")),
    ):
        with pytest.raises(InputError) as error:
            asking.generate(**inputs, retained_tokens=6, pruning=f"cdpruner{given_}", max_new_tokens=1)
        assert all(word in str(error.value) for word in words), error.value
