"""From a description to a model: weights in every published layout, a twig, a device and a dtype for them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from ..errors import InputError
from .describe import find_base, find_tower, original_config, stock_config
from .device import check_attention, fits, set_attention
from .find import commit_of, fetch_weights, resolve
from .judge.language import judge_language
from .parts import check_depth, check_whole, part_of
from .quantise import prepare
from .weights import Filling, find_index, materialise, read_index, read_tensors, weight_files

CPU = torch.device("cpu")
MAX_PADDED_ROWS = 64  # Hugging Face conversions round LLaVA's vocabulary up by as much
HEAD, EMBEDDINGS = "lm_head.weight", "language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Loaded:
    """A base, its folder on this disk, the name that the user gave, and how its files are laid out."""

    model: LlavaForConditionalGeneration
    folder: Path
    name: str
    original: bool

    @property
    def revision(self) -> str | None:
        """The commit on the hub that it was fetched from."""
        return commit_of(self.folder)


def load_base(
    base: str | Path | None,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    keep: Callable[[int], Sequence[int]] | None = None,
    bits: int | None = None,
) -> Loaded:
    """Read a LLaVA model. Raises InputError for anything but a complete, consistent checkpoint.

    What its description says is judged, and its tokenizer, before any weight is fetched, and the names and shapes of
    all weights before any is read. `keep` names, for a decoder of L layers, those that are wanted,
    in their order: the others are neither made nor read from the disk. `bits` rounds the decoder
    layers' weights to 8 or 4 bits while they are read (`loading.quantise`).
    """
    name, folder, facts, original = find_base(base)
    tower, tower_facts = find_tower(folder, facts) if original else (None, {})
    config = original_config(folder, facts, tower_facts) if original else stock_config(folder, facts)
    ends = judge_language(folder, facts, config, original)
    select, count = _choose_layers(config.text_config.num_hidden_layers, keep)
    config.text_config.num_hidden_layers = count
    check_attention(attention)
    if index := find_index(folder):
        _judge(index, config, select, original)
    folder = fetch_weights(base, folder, "base model")
    files = _weight_files(folder, _needs(select))
    names = [stored.name for file in files for stored in read_tensors(file, CPU)]
    _check_names(folder, config, names, select)
    elsewhere = None
    if original and not _with_tower(names):
        elsewhere = _tower_files(folder, facts["mm_vision_tower"], tower, config.vision_config.num_hidden_layers)
    model = _outlined(folder / "config.json", config, original)
    filling = Filling(model, canonical, "base", select)
    towers = Filling(model.model.vision_tower, _tower_name, "vision tower")
    if elsewhere is not None:
        filling.leave("vision_tower.")
        towers.plan(*elsewhere)
    tied = config.tie_word_embeddings or config.text_config.tie_word_embeddings
    filling.plan(files, folder, padded_rows=(EMBEDDINGS,) * original, optional=(HEAD,) * tied)
    with fits(device, folder):
        furnish(model, device, dtype, bits)
        filling.read(device)
        towers.read(device)
    if HEAD in filling.open:  # the same numbers as the embeddings', stored once
        model.lm_head.weight.copy_(model.model.language_model.embed_tokens.weight[: model.lm_head.out_features])
    set_attention(model, attention)
    model.generation_config = ends
    return Loaded(model.eval(), folder, name, original)


def _judge(index: Path, config: LlavaConfig, select: Callable[[str], str | None], original: bool) -> None:
    """What an index tells of all names before anything is fetched."""
    names = list(read_index(index))
    _check_names(index, config, names, select)
    if not _with_tower(names):  # how deep that one really is, is not known yet
        config = copy.deepcopy(config)
        config.vision_config.num_hidden_layers = 1
    Filling(_outlined(index.parent / "config.json", config, original), canonical, "base", select).judge(index, names)


def _check_names(where: Path, config: LlavaConfig, names: Sequence[str], select: Callable[[str], str | None]) -> None:
    check_whole(where, names)
    known = [select(name) or "" for name in map(canonical, names) if name is not None]
    check_depth(where, known, "language_model.layers", config.text_config.num_hidden_layers)
    if _with_tower(names):
        check_depth(where, known, "vision_tower.encoder.layers", config.vision_config.num_hidden_layers)


def _with_tower(names: Sequence[str]) -> bool:
    return any("vision_tower" in name for name in names)


def _outlined(file: Path, config: LlavaConfig, original: bool) -> LlavaForConditionalGeneration:
    """A model of a configuration file on the meta device."""
    try:
        model = skeleton(config)
        if original:
            # The image token gets an embedding row behind the vocabulary; the head stays as it was trained.
            _lengthen_embeddings(model)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as fault:
        why = " ".join(repr(fault).split())[:200]
        raise InputError(f"{file}: no model can be made of this ({why}); fetch it again") from fault
    return model


def _lengthen_embeddings(model: LlavaForConditionalGeneration) -> None:
    """One row more than the vocabulary has."""
    old = model.model.language_model.embed_tokens.weight
    table = nn.Embedding(old.shape[0] + 1, old.shape[1], device=old.device).requires_grad_(False)
    model.model.language_model.embed_tokens = table


def _weight_files(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    try:
        return weight_files(folder, wanted)
    except InputError as fault:
        if part := part_of(folder):
            raise InputError(f"{folder}: {part}") from fault
        raise


def _tower_files(base: Path, name: str, folder: Path | None, layers: int) -> tuple[list[Path], Path]:
    """(files, folder) of the vision tower's own checkpoint, where the model's does not carry it."""
    if folder is None:
        folder = resolve(name, "vision tower")
    elif not (base / name).exists():
        folder = fetch_weights(name, folder, "vision tower")
    files = weight_files(folder)
    names = [_tower_name(stored.name) or "" for file in files for stored in read_tensors(file, CPU)]
    check_depth(folder, names, "encoder.layers", layers)
    return files, folder


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


def _tower_name(name: str) -> str | None:
    """Names inside a CLIP checkpoint; the text half of a whole CLIP model is not wanted."""
    if name.startswith(("text_model.", "text_projection.", "visual_projection.")) or name == "logit_scale":
        return None
    return name.removeprefix("vision_model.")


def skeleton(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """A model of this configuration on the meta device: names and shapes, and no numbers."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def furnish(
    model: LlavaForConditionalGeneration, device: torch.device, dtype: torch.dtype, bits: int | None = None
) -> None:
    """Memory for the weights of a skeleton, which are still to come."""
    if bits is not None:
        prepare(model.model.language_model.layers, bits, device, dtype)
    materialise(model, device, dtype)
