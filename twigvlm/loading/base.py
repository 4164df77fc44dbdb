"""From a description to a model: weights in every published layout, a twig, a device and a dtype for them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from ..config import DEFAULT_K, FORMAT_VERSION, TwigConfig
from ..errors import InputError
from ..model.trunk import Trunk
from ..model.twig import CONFIG, WEIGHTS, Twig, signature, twig_skeleton
from .describe import (
    HUB_FILES,
    check_ends,
    fetch_weights,
    find_base,
    find_tower,
    original_config,
    projector_only,
    read_json,
    resolve,
    stock_config,
)
from .weights import Filling, materialise, read_tensors, weight_files

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BACKENDS = ("sdpa", "eager", "flash_attention_2")
MAX_PADDED_ROWS = 64  # Hugging Face conversions round LLaVA's vocabulary up by as much
HEAD, EMBEDDINGS = "lm_head.weight", "language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Loaded:
    """A base, its folder on this disk, the name that the user gave, and how its files are laid out."""

    trunk: Trunk
    folder: Path
    name: str
    original: bool


def load_base(
    base: str | Path | None,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    keep: Callable[[int], Sequence[int]] | None = None,
) -> Loaded:
    """Read a LLaVA model. Raises InputError for anything but a complete, consistent checkpoint.

    What its description says is judged before any weight is fetched, and the names and shapes of
    all weights before any is read. `keep` names, for a decoder of L layers, those that are wanted,
    in their order: the others are neither made nor read from the disk.
    """
    name, folder, facts, original = find_base(base)
    tower, tower_facts = find_tower(folder, facts) if original else (None, {})
    config = original_config(folder, facts, tower_facts) if original else stock_config(folder, facts)
    ends = _generation_config(folder, config)
    select, count = _choose_layers(config.text_config.num_hidden_layers, keep)
    config.text_config.num_hidden_layers = count
    check_attention(attention)
    folder = fetch_weights(base, folder, "base model")
    files = _weight_files(folder, _needs(select))
    try:
        model = skeleton(config, device, dtype)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as fault:
        raise InputError(
            f"{folder / 'config.json'}: no model can be made of this ({fault!r}); fetch it again"
        ) from fault
    filling = Filling(model, canonical, select)
    if original:
        # The image token gets an embedding row behind the vocabulary; the head stays as it was trained.
        filling.open[EMBEDDINGS] = _lengthen_embeddings(model)
        if not any("vision_tower" in stored.name for f in files for stored in read_tensors(f, torch.device("cpu"))):
            filling.leave("vision_tower.")
            _fill_tower(model, folder, facts["mm_vision_tower"], tower, device)
    tied = config.tie_word_embeddings or config.text_config.tie_word_embeddings
    filling.fill(files, device, folder, padded_rows=(EMBEDDINGS,) * original, optional=(HEAD,) * tied)
    if HEAD in filling.open:  # the same numbers as the embeddings', stored once
        model.lm_head.weight.copy_(model.model.language_model.embed_tokens.weight[: model.lm_head.out_features])
    set_attention(model, attention)
    model.generation_config = ends
    return Loaded(Trunk(model.eval()), folder, name, original)


def _lengthen_embeddings(model: LlavaForConditionalGeneration) -> nn.Parameter:
    """One row more than the vocabulary has."""
    old = model.model.language_model.embed_tokens.weight
    rows, width = old.shape[0] + 1, old.shape[1]
    table = nn.Embedding(rows, width, device=old.device, dtype=old.dtype).requires_grad_(False)
    model.model.language_model.embed_tokens = table
    return table.weight


def _weight_files(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    try:
        return weight_files(folder, wanted)
    except InputError as fault:
        projector = folder / "mm_projector.bin"
        if projector.exists():
            raise InputError(f"{folder}: {projector_only(projector)}") from fault
        raise


def _fill_tower(
    model: LlavaForConditionalGeneration, base: Path, name: str, folder: Path | None, device: torch.device
) -> None:
    """The vision tower from its own checkpoint, where the model's does not carry it."""
    if folder is None:
        folder = resolve(name, "vision tower")
    elif not (base / name).exists():
        folder = fetch_weights(name, folder, "vision tower")
    towers = Filling(model.model.vision_tower, _tower_name)
    towers.fill(weight_files(folder), device, folder)


def _generation_config(folder: Path, config: LlavaConfig) -> GenerationConfig:
    """What ends an answer: the folder's generation_config.json, else what config.json says."""
    file, text = folder / "generation_config.json", config.text_config
    if not file.exists():
        return GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
        )
    facts = read_json(file)
    ends = facts.get("eos_token_id", text.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    check_ends(file, [end for end in ends if end is not None], text.vocab_size)
    try:
        return GenerationConfig.from_dict(facts | {"eos_token_id": ends if ends != [None] else text.eos_token_id})
    except Exception as fault:  # transformers raises what it likes
        raise InputError(f"{file}: not a generation configuration ({fault}); fetch it again") from fault


def _choose_layers(L: int, keep: Callable[[int], Sequence[int]] | None) -> tuple[Callable[[str], str | None], int]:
    """The map from a decoder's stored names to those of one that has only the layers of `keep`, and their number."""
    if keep is None:
        return lambda name: name, L
    places = {layer: place for place, layer in enumerate(keep(L))}

    def select(name: str) -> str | None:
        match = re.match(r"language_model\.layers\.(\d+)(\..*)", name)
        if not match:
            return name
        place = places.get(int(match[1]))
        return None if place is None else f"language_model.layers.{place}{match[2]}"

    return select, len(places)


def _needs(select: Callable[[str], str | None]) -> Callable[[str], bool]:
    return lambda stored: (name := canonical(stored)) is not None and select(name) is not None


def load_twig(twig: str | Path, trunk: Trunk, K: int | None, T: int | None, F: int | None) -> Twig:
    """Read a twig for this base: our folder, or the release's one file (or a folder that holds it).

    `F` overrides the stored wipe layer. Raises InputError when K or T disagree with the file, or the
    twig grew on another base.
    """
    folder, file = _twig_files(resolve(twig, "twig"))
    facts = read_twig_letters(twig, trunk.L, trunk.model.config.text_config.hidden_size, K, T)
    shapes = {stored.name: stored.shape for stored in read_tensors(file, torch.device("cpu"))}
    K = facts.get("K", DEFAULT_K if K is None else K)
    config = TwigConfig(trunk.L, K, facts["T"], F if F is not None else facts.get("F", 0))
    vocabulary = _check_head(file, shapes, trunk)
    module = twig_skeleton(trunk, config, vocabulary)
    materialise(module, trunk.device, trunk.dtype)
    filling = Filling(module, lambda key: key)
    filling.fill([file], trunk.device, file, cut_rows=(HEAD,))
    if "base_signature" in facts:
        _check_signature(folder / CONFIG, facts, trunk)
    return module.eval()


def read_twig_letters(
    twig: str | Path, L: int, hidden_size: int, K: int | None, T: int | None, files: Sequence[str] = HUB_FILES
) -> dict:
    """What a twig's files say of it, without its weights: twig_config.json where there is one, and T.

    `files` are fetched if it is on the hub; T is not known where these leave out the weights of a twig without
    description. Raises InputError when K or T disagree with the files, or a base of L layers with the twig's.
    """
    folder, file = _twig_files(resolve(twig, "twig", files))
    facts = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if not file.exists():
        if Path(twig).expanduser().exists():
            raise InputError(f"{file}: no such file; a twig is a folder with {WEIGHTS}")
        stored = {"T": facts["T"]} if "T" in facts else {}  # the weights are not fetched yet
    else:
        stored = {"T": _count_layers(file, {s.name: s.shape for s in read_tensors(file, torch.device("cpu"))})}
    if facts:
        _check_description(folder / CONFIG, facts, stored.get("T", facts.get("T")), L, hidden_size)
    facts |= stored
    check_letters(file, {"K": K, "T": T}, facts)
    return facts


def check_letters(file: Path, asked: dict[str, int | None], stored: dict) -> None:
    """Raises InputError where a letter that was asked for is another one in the twig's files."""
    for letter, value in asked.items():
        if value is not None and value != stored.get(letter, value):
            raise InputError(
                f"{file}: {letter} = {value} was asked for, but the twig was grown with {letter} = {stored[letter]}"
            )


def _twig_files(source: Path) -> tuple[Path, Path]:
    """(folder of the description, file of the weights)."""
    file = source / WEIGHTS if source.is_dir() else source
    if file.suffix != ".safetensors":
        raise InputError(
            f"{file}: a twig is one .safetensors file; convert it, or give the folder that holds {WEIGHTS}"
        )
    return file.parent, file


def canonical(name: str) -> str | None:
    """One name for a tensor of a LLaVA model under every published naming of it.

    Hugging Face's before and after 4.52 and with or without the tower's inner `vision_model`, and
    the original's (`model.layers`, `model.mm_projector`).
    """
    name = re.sub(r"^model\.vision_tower\.vision_tower\.", "vision_tower.", name)
    name = re.sub(r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1.", name)
    name = re.sub(r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2.", name)
    name = re.sub(r"^model\.(layers|norm|embed_tokens)\.", r"language_model.\1.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^model\.", "", name)
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


def pick_device(device: str | torch.device | None) -> torch.device:
    """The one asked for, else CUDA, MPS, CPU in this order."""
    if device is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    try:
        chosen = torch.device(device)
    except RuntimeError as fault:
        raise InputError(f"device is {device!r}; cpu, cuda, cuda:N or mps is needed") from fault
    usable = {"cpu": True, "meta": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(chosen.type, False):
        raise InputError(f"device {device} is not available here; use {pick_device(None)}")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise InputError(f"device {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return chosen


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """bf16 on CUDA where it has it, else fp16; fp16 on MPS; fp32 on the CPU."""
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
    if dtype is None:
        if device.type == "cuda":
            return torch.bfloat16 if bf16 else torch.float16
        return torch.float16 if device.type == "mps" else torch.float32
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise InputError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)} is needed")
    if chosen is torch.float16 and device.type == "cpu":
        raise InputError("dtype float16 is not supported on cpu; use float32 or bfloat16")
    if chosen is torch.bfloat16 and not bf16:
        raise InputError(f"dtype bfloat16 is not supported on {device}; use float16 or float32")
    return chosen


def _tower_name(name: str) -> str | None:
    """Names inside a CLIP checkpoint; the text half of a whole CLIP model is not wanted."""
    if name.startswith(("text_model.", "text_projection.", "visual_projection.")) or name == "logit_scale":
        return None
    return name.removeprefix("vision_model.")


def skeleton(config: LlavaConfig, device: torch.device, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """A model of this configuration whose weights are still to come."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    materialise(model, device, dtype)
    return model


def check_attention(attention: str) -> None:
    """Raises InputError for a backend that is unknown or not installed."""
    if attention not in BACKENDS:
        raise InputError(f"attn_implementation is {attention!r}; one of {', '.join(BACKENDS)} is needed")
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise InputError(
            "attn_implementation flash_attention_2 needs the package flash-attn, which is not installed: "
            'pip install -e ".[flash]" --no-build-isolation (a CUDA device is needed), or use sdpa'
        )


def set_attention(model: LlavaForConditionalGeneration, attention: str) -> None:
    """The backend of every layer. Raises InputError as `check_attention` does."""
    check_attention(attention)
    tower = "sdpa" if attention == "flash_attention_2" else attention
    model.model.vision_tower.config._attn_implementation = tower
    text = "flash_or_sdpa" if attention == "flash_attention_2" else attention
    model.model.language_model.config._attn_implementation = text


def _count_layers(file: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    numbers = {int(m[1]) for m in (re.match(r"model\.layers\.(\d+)\.", k) for k in shapes) if m}
    if not numbers:
        raise InputError(
            f"{file}: no key model.layers.0.*; this is not a twig (lm_head, model.norm, model.layers.0..T-1)"
        )
    if numbers != set(range(len(numbers))):
        raise InputError(f"{file}: layers {sorted(numbers)} found, expected 0 to {max(numbers)} without a gap")
    return len(numbers)


def _check_description(file: Path, facts: dict, stored_T: int, L: int, hidden_size: int) -> None:
    version = facts.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{file}: format version is {version!r}, this program reads {FORMAT_VERSION}")
    if facts.get("T") != stored_T:
        raise InputError(f"{file}: T is {facts.get('T')}, but the weights beside it have {stored_T} layers")
    for letter in ("K", "F"):
        if not isinstance(facts.get(letter), int):
            raise InputError(f"{file}: {letter} is {facts.get(letter)!r}; a layer's number is expected")
    for key, found in (("L", L), ("hidden_size", hidden_size)):
        if facts.get(key) != found:
            raise InputError(
                f"{file}: this twig grew on {facts.get('base')!r} with {key} = {facts.get(key)}, but the base has {key} = {found}; "
                "give the twig of this base"
            )


def _check_head(file: Path, shapes: dict[str, tuple[int, ...]], trunk: Trunk) -> int:
    """Rows of the twig's head: at most the base's.

    A twig of the same base with a padded vocabulary has more, which no word belongs to: they are cut.
    """
    shape, base = shapes.get("lm_head.weight"), tuple(trunk.model.lm_head.weight.shape)
    if shape is None:
        raise InputError(f"{file}: missing key lm_head.weight, expected with shape {list(base)}")
    if len(shape) != 2 or shape[1] != base[1] or abs(shape[0] - base[0]) > MAX_PADDED_ROWS:
        raise InputError(
            f"{file}: key lm_head.weight has shape {list(shape)}, expected {list(base)}: a twig of another base?"
        )
    return min(shape[0], base[0])


def _check_signature(file: Path, facts: dict, trunk: Trunk) -> None:
    stored = torch.tensor(facts["base_signature"])
    found = torch.tensor(signature(trunk))
    if stored.shape != found.shape or not torch.allclose(stored, found, rtol=0.02, atol=1e-4):
        raise InputError(
            f"{file}: this twig grew on other weights ({facts.get('base')!r}) than this base's; give the twig of this base"
        )
