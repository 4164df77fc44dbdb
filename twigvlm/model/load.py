"""From a name to a model: hub id, Hugging Face folder, original LLaVA folder, or the embedded model."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..config import DEFAULT_K, FORMAT_VERSION, TwigConfig
from ..errors import InputError, RunError
from .trunk import Trunk
from .twig import CONFIG, WEIGHTS, Twig, signature, twig_skeleton
from .weights import Filling, materialise, read_tensors, weight_files

EMBEDDED = Path(__file__).resolve().parents[2] / "checkpoints"
EMBEDDED_BASE, EMBEDDED_TWIG = EMBEDDED / "sprout-base", EMBEDDED / "sprout-twig-K2-T3"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BACKENDS = ("sdpa", "eager", "flash_attention_2")
HUB_DESCRIPTION = ("*.json", "tokenizer.model", "*.txt")
HUB_FILES = (*HUB_DESCRIPTION, "*.safetensors", "*.bin")
MAX_PADDED_ROWS = 64  # Hugging Face conversions round LLaVA's vocabulary up by as much

# The tower that original LLaVA-1.5 checkpoints name, for those that carry its weights themselves.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu",
    }
}  # fmt: skip


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

    `keep` names, for a decoder of L layers, those that are wanted, in their order: the others are
    neither made nor read from the disk.
    """
    name, folder, facts, original = find_base(base)
    if original:
        model = _load_original(folder, facts, device, dtype, keep)
    else:
        config = LlavaConfig.from_dict(facts)
        select, config.text_config.num_hidden_layers = _choose_layers(config.text_config.num_hidden_layers, keep)
        model = skeleton(config, device, dtype)
        filling = Filling(model, canonical, select)
        for file in weight_files(folder, _needs(select)):
            filling.read(file, device)
        filling.finish(folder)
    set_attention(model, attention)
    return Loaded(Trunk(model.eval()), folder, name, original)


def read_config(base: str | Path | None) -> tuple[Path, LlavaConfig, bool]:
    """(folder, configuration, whether it has LLaVA's original layout) of a base, whose weights need not be there."""
    _, folder, facts, original = find_base(base, HUB_DESCRIPTION)
    if not original:
        return folder, LlavaConfig.from_dict(facts), False
    _, tower = _find_tower(folder, facts, carried=True)
    return folder, original_config(facts, tower, facts["vocab_size"]), True


def find_base(base: str | Path | None, files: Sequence[str] = HUB_FILES) -> tuple[str, Path, dict, bool]:
    """(the user's name for it, its folder, its config.json, whether it has LLaVA's original layout).

    `files` are fetched if the base is on the hub.
    """
    name = str(base) if base is not None else "sprout"
    folder = resolve(base, "base model", files) if base is not None else EMBEDDED_BASE
    if base is not None and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give the folder that holds config.json and the weights")
    if not folder.is_dir():
        raise InputError(f"{folder}: the embedded model is not here; give base=, or run from a clone of the project")
    facts = read_json(folder / "config.json")
    original = "text_config" not in facts and ("mm_vision_tower" in facts or "mm_projector_type" in facts)
    if not original and (facts.get("model_type") != "llava" or "vision_config" not in facts):
        raise InputError(
            f"{folder / 'config.json'}: model type is {facts.get('model_type')!r}; a LLaVA-1.5 model is needed "
            "(llava-hf/llava-1.5-7b-hf or liuhaotian/llava-v1.5-7b, say)"
        )
    return name, folder, facts, original


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
    shapes = {name: shape for name, _, shape in read_tensors(file, torch.device("cpu"))}
    K = facts.get("K", DEFAULT_K if K is None else K)
    config = TwigConfig(trunk.L, K, facts["T"], F if F is not None else facts.get("F", 0))
    vocabulary = _check_head(file, shapes, trunk)
    module = twig_skeleton(trunk, config, vocabulary)
    materialise(module, trunk.device, trunk.dtype)
    filling = Filling(module, lambda key: key)
    filling.read(file, trunk.device)
    filling.finish(file)
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
        stored = {"T": _count_layers(file, {name: s for name, _, s in read_tensors(file, torch.device("cpu"))})}
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


def resolve(name: str | Path, what: str, files: Sequence[str] = HUB_FILES) -> Path:
    """A folder or file on this disk for a path or hub id (of which `files` are fetched into the hub's cache)."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    text = str(name)
    if path.is_absolute() or text.startswith(".") or not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise InputError(f"{what} {text}: no such folder, and not a hub id of the form owner/name; check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=list(files)))
    except RepositoryNotFoundError as fault:
        raise InputError(f"{what} {text}: neither a folder here nor a repository on the hub; check the name") from fault
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise RunError(
            f"{what} {text}: no such folder here, and the hub cannot be reached ({reason}); "
            "check the network, or give a folder"
        ) from fault


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


def read_json(file: Path) -> dict:
    if not file.exists():
        raise InputError(f"{file}: no such file; is {file.parent} a model folder?")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as fault:
        raise InputError(f"{file}: not readable JSON ({fault}); fetch it again") from fault
    if not isinstance(facts, dict):
        raise InputError(f"{file}: a JSON object is expected, found {type(facts).__name__}; fetch it again")
    return facts


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


def _load_original(
    folder: Path,
    facts: dict,
    device: torch.device,
    dtype: torch.dtype,
    keep: Callable[[int], Sequence[int]] | None = None,
) -> LlavaForConditionalGeneration:
    """LLaVA's own layout: flat configuration, `mm_*` fields, the tower often elsewhere."""
    select, count = _choose_layers(facts["num_hidden_layers"], keep)
    files = weight_files(folder, _needs(select))
    carried = any("vision_tower" in name for f in files for name, _, _ in read_tensors(f, torch.device("cpu")))
    tower, tower_facts = _find_tower(folder, facts, carried)
    kind = facts.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise InputError(
            f"{folder / 'config.json'}: mm_projector_type is {kind!r}; only LLaVA-1.5's mlp2x_gelu is supported"
        )
    vocabulary = facts["vocab_size"]
    config = original_config(facts, tower_facts, vocabulary)
    config.text_config.num_hidden_layers = count
    model = skeleton(config, device, dtype)
    # The image token gets an embedding row behind the vocabulary; the head stays as it was trained.
    table = nn.Embedding(vocabulary + 1, facts["hidden_size"], device=device, dtype=dtype).requires_grad_(False)
    model.model.language_model.embed_tokens = table
    filling = Filling(model, canonical, select)
    for file in files:
        filling.read(file, device, padded_rows=("language_model.embed_tokens.weight",))
    if not carried:
        towers = Filling(model.model.vision_tower, _tower_name)
        for file in weight_files(tower):
            towers.read(file, device)
        towers.finish(tower)
        for name in list(filling.open):
            if name.startswith("vision_tower."):
                del filling.open[name]
    filling.finish(folder)
    return model


def original_config(facts: dict, tower_facts: dict, vocabulary: int) -> LlavaConfig:
    """The Hugging Face configuration of an original checkpoint."""
    text_keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    text = {k: facts[k] for k in text_keys if facts.get(k) is not None}
    if facts.get("rope_theta"):
        text["rope_theta"] = facts["rope_theta"]
    if facts.get("rope_scaling"):
        text["rope_scaling"] = facts["rope_scaling"]
    vision_keys = CLIPVisionConfig().to_dict().keys() - {"model_type", "transformers_version", "torch_dtype", "dtype"}
    return LlavaConfig(
        text_config=LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=False, **text),
        vision_config=CLIPVisionConfig(**{k: v for k, v in tower_facts.items() if k in vision_keys}),
        image_token_index=vocabulary,
        vision_feature_layer=facts.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}[
            facts.get("mm_vision_select_feature", "patch")
        ],
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def _find_tower(folder: Path, facts: dict, carried: bool) -> tuple[Path | None, dict]:
    """(folder or None, configuration) of the vision tower that `mm_vision_tower` names."""
    name = facts.get("mm_vision_tower")
    if not name:
        raise InputError(
            f"{folder / 'config.json'}: no mm_vision_tower; it names the CLIP model that sees for this one"
        )
    for place in (folder / name, Path(name).expanduser()):
        if (place / "config.json").exists():
            found = place
            break
    else:
        if carried and name in KNOWN_TOWERS:
            return None, KNOWN_TOWERS[name]
        if name.startswith((".", "/", "~")):
            raise InputError(
                f"{folder / 'config.json'}: mm_vision_tower is {name!r}, but {folder / name} is no model folder"
            )
        found = resolve(name, "vision tower")
    tower = read_json(found / "config.json")
    return found, tower.get("vision_config", tower)


def _tower_name(name: str) -> str | None:
    """Names inside a CLIP checkpoint; the text half of a whole CLIP model is not wanted."""
    if name.startswith(("text_model.", "text_projection.", "visual_projection.")) or name == "logit_scale":
        return None
    return name.removeprefix("vision_model.")


def skeleton(config: LlavaConfig, device: torch.device, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    materialise(model, device, dtype)
    return model


def check_attention(attention: str) -> None:
    """Raises InputError for a backend that is not known or not installed."""
    if attention not in BACKENDS:
        raise InputError(f"attn_implementation is {attention!r}; one of {', '.join(BACKENDS)} is needed")
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise InputError(
            "attn_implementation flash_attention_2 needs the package flash-attn, which is not installed: "
            'pip install -e ".[flash]" --no-build-isolation (a CUDA device is needed), or use sdpa'
        )


def set_attention(model: LlavaForConditionalGeneration, attention: str) -> None:
    check_attention(attention)
    tower = "sdpa" if attention == "flash_attention_2" else attention
    model.model.vision_tower.config._attn_implementation = tower
    text = "flash_or_sdpa" if attention == "flash_attention_2" else attention
    model.model.language_model.config._attn_implementation = text


def _flash_or_sdpa(module, query, key, value, attention_mask, **settings):
    """Flash attention where causality says it all; rows of unequal length carry a mask, which it cannot take."""
    forward = flash_attention_forward if attention_mask is None else sdpa_attention_forward
    return forward(module, query, key, value, attention_mask, **settings)


AttentionInterface.register("flash_or_sdpa", _flash_or_sdpa)


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
    """Rows of the twig's head: the base's vocabulary, or what it was before padding."""
    shape, base = shapes.get("lm_head.weight"), tuple(trunk.model.lm_head.weight.shape)
    if shape is None:
        raise InputError(f"{file}: missing key lm_head.weight, expected with shape {list(base)}")
    if len(shape) != 2 or shape[1] != base[1] or not base[0] - MAX_PADDED_ROWS <= shape[0] <= base[0]:
        raise InputError(
            f"{file}: key lm_head.weight has shape {list(shape)}, expected {list(base)}: a twig of another base?"
        )
    return shape[0]


def _check_signature(file: Path, facts: dict, trunk: Trunk) -> None:
    stored = torch.tensor(facts["base_signature"])
    found = torch.tensor(signature(trunk))
    if stored.shape != found.shape or not torch.allclose(stored, found, rtol=0.02, atol=1e-4):
        raise InputError(
            f"{file}: this twig grew on other weights ({facts.get('base')!r}) than this base's; give the twig of this base"
        )
