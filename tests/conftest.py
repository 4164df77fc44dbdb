"""Shared by all tests: tiny random models made in memory, prompts for them, and stock answers to compare with."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch
from golden.reduce import unpack
from hypothesis import HealthCheck, settings
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from twigvlm.config import TwigConfig
from twigvlm.errors import InputError
from twigvlm.families import trunk_of
from twigvlm.loading.base import Loaded
from twigvlm.loading.device import set_attention
from twigvlm.model.twig import grow
from twigvlm.pruning import Shape, find_method
from twigvlm.vlm import TwigVLM

torch.set_num_threads(1)
gc.set_threshold(50_000)  # looking for cycles among a million objects of libraries took a tenth of the time
settings.register_profile(
    "steady",  # the same examples in every run: a red test is a change of the code
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("steady")

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device(os.environ.get("TWIGVLM_TEST_DEVICE", "cpu"))  # of the tiny models: TWIGVLM_TEST_DEVICE=cuda
if DEVICE.type == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # programs that take the best device there is are tested on the CPU too
EOS = 2
BYTES_END = 3 + 256  # in `tiny_tokenizer`: special tokens and bytes come first
LONGEST = ("test_train_launch", "test_readme", "test_sprout", "test_eval_runner", "test_server", "test_on_policy")
IMAGE = "image"  # stands for one picture in the layout of a prompt
WHOLE = ROOT.parent / "shared" / "golden"  # the golden set of which tests/golden carries a part


def choose_golden() -> Path:
    """The golden set that TWIGVLM_GOLDEN names, a folder or `reduced`; else the whole one if it is there, else the carried one.

    The carried one is unpacked once; processes that this one starts (xdist's workers) find it by the variable.
    """
    chosen = os.environ.get("TWIGVLM_GOLDEN") or (str(WHOLE) if _is_golden(WHOLE) else "reduced")
    if chosen == "reduced":
        chosen, owner = tempfile.mkdtemp(prefix="twigvlm-golden-"), os.getpid()
        atexit.register(lambda: os.getpid() == owner and shutil.rmtree(chosen, ignore_errors=True))
        os.environ["TWIGVLM_GOLDEN"] = str(unpack(Path(chosen)))
    if not _is_golden(Path(chosen)):
        raise pytest.UsageError(f"TWIGVLM_GOLDEN={chosen}: no golden set (no A/cases.json); a folder, or `reduced`")
    return Path(chosen).resolve()


def _is_golden(folder: Path) -> bool:
    return (folder / "A" / "cases.json").is_file()


GOLDEN = choose_golden()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files whose slow tests take longest come first, so that no process is left alone with one."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays


@pytest.fixture(scope="session")
def golden() -> Path:
    """Inputs and outputs of the authors' released code on tiny random models."""
    return GOLDEN


@pytest.fixture(autouse=True)
def same_arithmetic():
    """A test that leaves the smallest numbers flushed to zero breaks another one, hours later."""
    yield
    assert sys.float_info.min / 2, "denormal numbers are flushed to zero from here on"


def often(values: Iterable, *chosen) -> list:
    """What a test is run for: `chosen` every time, the other values with the slow tests."""
    return [v if v in chosen else pytest.param(v, marks=pytest.mark.slow) for v in values]


# ---------------------------------------------------------------------- tiny models


@cache
def tiny_model(
    layers: int = 6,
    hidden: int = 32,
    heads: int = 2,
    kv_heads: int = 2,
    side: int = 28,  # pixels: (side / 14)^2 visual tokens
    vocabulary: int = 64,
    context: int = 256,
    sharpness: float = 4.0,  # of the head: how sure the model is of its words
    fade: float = 1.0,  # factor on what layers from the third on add: small = a twig guesses well
    rare: int = 0,  # ids below this one are hardly ever written
    attention: str = "sdpa",
    seed: int = 0,
    sight: int = 2,  # layers of the tower, of which the last is not read
) -> LlavaForConditionalGeneration:
    """A random LLaVA whose words depend on the picture; the last id is the image token. Shared: do not change it."""
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=sight,
        num_attention_heads=2,
        image_size=side,
        patch_size=14,
        projection_dim=16,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=vocabulary - 1,
        image_seq_length=(side // 14) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float().eval().requires_grad_(False)
        _enliven(model, fade)
    model.lm_head.weight.mul_(sharpness)
    model.lm_head.weight[:rare].mul_(0.1)
    set_attention(model, attention)
    return model.to(DEVICE)


def _enliven(model: LlavaForConditionalGeneration, fade: float) -> None:
    """Weights of such a size that every layer, the picture and all that was read have a say in the next word."""
    decoder, projector = model.model.language_model, model.model.multi_modal_projector
    width = model.config.text_config.hidden_size
    for layer in decoder.layers:
        for linear in (*layer.self_attn.children(), *layer.mlp.children()):
            if isinstance(linear, torch.nn.Linear):
                linear.weight.normal_(0, width**-0.5)
        layer.self_attn.o_proj.weight.mul_((2 * len(decoder.layers)) ** -0.5)
        layer.mlp.down_proj.weight.mul_((2 * len(decoder.layers)) ** -0.5)
    decoder.embed_tokens.weight.normal_(0, 0.5)
    model.lm_head.weight.normal_(0, width**-0.5)
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.normal_(0, linear.in_features**-0.5)
    for layer in decoder.layers[2:]:
        layer.self_attn.o_proj.weight.mul_(fade)
        layer.mlp.down_proj.weight.mul_(fade)
    decoder.layers[0].self_attn.o_proj.weight.mul_(4)


@cache
def tiny(
    K: int = 2, T: int = 2, F: int = 0, noise: float = 0.2, twig: bool = True, pruning_head: str = "", **shape
) -> TwigVLM:
    """A tiny base with a twig grown on it; `noise` spoils the twig's weights (0: early exit, 3: nonsense)."""
    model = tiny_model(**shape)
    trunk, loaded = trunk_of(model), Loaded(model, Path("nowhere"), "tiny", False)
    config = TwigConfig(trunk.L, K, T, F, pruning_head)
    if not twig:
        return TwigVLM(loaded, None, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        grown = grow(trunk, config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for weight in grown.parameters():
        if weight.dim() == 2:
            weight.add_(torch.randn(weight.shape, generator=generator).to(DEVICE) * noise * weight.std())
    return TwigVLM(loaded, grown)


# ---------------------------------------------------------------------- prompts and answers


def prompts(
    vlm: TwigVLM, layouts: Sequence[Sequence[int | str]], seed: int = 0
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Token ids and pictures [images, 3, h, w] of each row; a layout is text lengths and IMAGE in their order."""
    generator = torch.Generator().manual_seed(seed)
    side = vlm.model.config.vision_config.image_size
    rows, pictures = [], []
    for layout in layouts:
        row: list[int] = []
        for part in layout:
            if part == IMAGE:
                row += [vlm.image_token_id] * vlm.config.V
            else:
                row += torch.randint(3, vlm.image_token_id, (part,), generator=generator).tolist()
        rows.append(row)
        pictures.append(torch.randn(layout.count(IMAGE), 3, side, side, generator=generator).to(DEVICE))
    return rows, pictures


def batch(rows: Sequence[Sequence[int]], pictures: Sequence[torch.Tensor] = (), left: bool = False) -> dict:
    """Arguments of `generate`: the rows padded on one side, with their mask and all their pictures."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(0, len(row))
        ids[b, place], mask[b, place] = torch.tensor(row), 1
    pixels = torch.cat(list(pictures)) if pictures else torch.empty(0)
    ids, mask = ids.to(DEVICE), mask.to(DEVICE)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels if len(pixels) else None}


def one(vlm: TwigVLM, *layout: int | str, seed: int = 0) -> dict:
    """Arguments of `generate` for a single prompt."""
    return batch(*prompts(vlm, [layout], seed))


# Methods that need thresholds of a calibration or something beyond a base, with settings that do on tiny models.
SPECS: dict[str, str] = {
    "cdpruner": "cdpruner:stand_in",
    "mustdrop": "mustdrop:threshold=0.05",
    "occamtoken": "occamtoken:first=0.95,second=1.2",
    "twig-adaptive": "twig-adaptive:mass=0.6",
    "visionzip*": "visionzip*:projector=base",
}


def spec_of(method: str) -> str:
    """What to write behind `pruning` for a method of METHODS, on tiny models."""
    return SPECS.get(method, method)


def legal_range_of(vlm: TwigVLM, method: str) -> tuple[Fraction, Fraction] | None:
    """Smallest and largest R of a method on this model; None where it says that it cannot be."""
    config = vlm.config
    try:
        return find_method(spec_of(method)).legal(Shape(config.L, config.V, config.K, config.F))
    except InputError:
        return None


def stock(
    vlm: TwigVLM, row: Sequence[int], pictures: torch.Tensor | None = None, eos: int = EOS, **settings
) -> list[int]:
    """Greedy answer of the unmodified `generate` to one prompt, without the end token."""
    ids = torch.tensor([row], device=DEVICE)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    if pictures is not None and len(pictures):
        settings["pixel_values"] = pictures
    out = vlm.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=eos, **settings)
    new = out[0, len(row) :].tolist()
    return new[: new.index(eos)] if eos in new else new


def drafts(out, row: int = 0) -> list[tuple[int, int]]:
    """(drafted, accepted) of every step of a row."""
    return [(len(step.drafted), step.accepted) for step in out.steps[row]]


# ---------------------------------------------------------------------- a tokenizer and folders


@cache
def tiny_tokenizer() -> LlamaTokenizer:
    """Letters, a few words, and bytes for all else; `<image>` is the last id."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzSUERINTAOL.,:!?'"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("r", "e"), ("re", "d"), ("▁", "red"), ("e", "r")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *("".join(m) for m in merges)]
    return LlamaTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=merges,
        legacy=True,
        extra_special_tokens={"image_token": "<image>"},
        pad_token="<unk>",
    )


class Numbers:
    """A tokenizer whose words are numbers."""

    def decode(self, tokens, skip_special_tokens=True) -> str:
        return "".join(f"{t}." for t in tokens)


def speaking(**shape) -> TwigVLM:
    """A tiny model that speaks `tiny_tokenizer`'s language, in letters rather than bytes."""
    return tiny(vocabulary=len(tiny_tokenizer()), context=1024, rare=BYTES_END, **shape)


def write_base(folder: Path, model: LlavaForConditionalGeneration, tokenizer: bool = True) -> Path:
    """The model in the Hugging Face layout, with `tiny_tokenizer` where it has words for it."""
    model.save_pretrained(folder)
    if tokenizer and model.config.text_config.vocab_size >= len(tiny_tokenizer()):
        tiny_tokenizer().save_pretrained(folder)
    return folder


def telling(folder: Path) -> Path:
    """An interpreter for scripts that only says PYTHONPATH and what it is told to run, a word a line."""
    python = folder / "python"
    python.write_text('#!/bin/sh\ncase "$1" in -c) exit 0;; esac\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    return python
