"""The embedded model's own tokenizer: byte-fallback BPE in LlamaTokenizer's format."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer

from ...prompt.template import VICUNA_V1
from ...world.questions import KINDS, LETTER, SINGLE_WORD, YES_NO, ask
from ...world.scenes import WORDS, sample_scene

VOCABULARY = 896
IMAGE_TOKEN = "<image>"


def corpus(scenes: int = 1500) -> Iterator[str]:
    """Prompts and answers about training scenes, and the template itself."""
    for seed in range(scenes):
        rng = random.Random(seed)
        scene = sample_scene("train", seed)
        for kind in (*KINDS, "describe"):
            question = ask(scene, kind, rng)
            if question:
                yield f"USER: {question.text} ASSISTANT: {question.answer}"
        yield VICUNA_V1.system
        yield f"{rng.choice(WORDS)} {SINGLE_WORD} {YES_NO} {LETTER} Reference OCR token: {rng.choice(WORDS)}"


@cache
def build_tokenizer() -> LlamaTokenizer:
    """Trained in a second, once a process; the same tokens on every machine (the trainer counts, it does not sample)."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special + bytes_, min_frequency=2, show_progress=False
    )
    trained.train_from_iterator(corpus(), trainer)
    state = json.loads(trained.to_str())["model"]
    vocabulary = state["vocab"]
    vocabulary[IMAGE_TOKEN] = vocabulary.pop("\n")  # a line's end is written as its byte; no id may serve two tokens
    return LlamaTokenizer(
        vocab=vocabulary,
        merges=[tuple(m) for m in state["merges"]],
        legacy=True,  # a prefix space after every special token, as LLaVA-1.5 was trained
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        pad_token="<unk>",
        add_bos_token=True,
        padding_side="right",
        model_max_length=2048,
    )
