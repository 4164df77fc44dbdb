"""What a base is, judged from its description before any weight is fetched or opened.

A checkpoint is read only where every field that changes its answers is understood: decoder, tower,
projector, the features that are taken, how pictures are laid out, quantisation, activations, ids.
All else is refused with what it is and what would work. Two layouts: Hugging Face's, and LLaVA's own
("original": a flat configuration with `mm_*` fields, the tower often elsewhere).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig
from transformers.activations import ACT2FN

from ..errors import InputError
from ..files import BROUGHT
from .find import HUB_DESCRIPTION, read_json, resolve
from .judge.fields import (
    DECODER,
    ID,
    NEEDED,
    TOP,
    TOWER,
    Kind,
    check_decoder,
    check_fields,
    check_rope,
    check_sight,
    shown,
    whole,
)
from .parts import part_of

EMBEDDED = BROUGHT / "checkpoints"
EMBEDDED_BASE, EMBEDDED_TWIG = EMBEDDED / "sprout-base", EMBEDDED / "sprout-twig-K2-T3"
EMBEDDED_PLUS = EMBEDDED / "sprout-plus"  # the twig again, with a pruning head that learnt by rewards

# The tower that original LLaVA-1.5 checkpoints name, for those that carry its weights themselves.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu",
    }
}  # fmt: skip

DECODERS = {"llama": LlamaConfig, "mistral": MistralConfig}
ORIGINAL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
INNER_CLASSES = {
    "llama": ("LlamaForCausalLM", "LlamaModel", "LlavaLlamaForCausalLM"),
    "mistral": ("MistralForCausalLM", "MistralModel", "LlavaMistralForCausalLM"),
}
ORIGINAL_CLASSES = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral"}
STOCK_CLASS = "LlavaForConditionalGeneration"
TOWER_CLASSES = ("CLIPVisionModel", "CLIPModel", "CLIPVisionTransformer", "CLIPVisionModelWithProjection")
TOWERS = ("clip_vision_model", "clip")
FEATURES = {"patch": "default", "cls_patch": "full"}  # LLaVA's name for them → Hugging Face's
ASPECTS = ("pad", "square")  # square: CLIP's own resizing and cutting


# ---------------------------------------------------------------------- finding it


def find_base(base: str | Path | None) -> tuple[str, Path, dict, bool]:
    """(the user's name for it, its folder, its config.json, whether it has LLaVA's original layout).

    Of a base on the hub only the description is fetched. Raises InputError for what is not
    understood, as far as it can be told without the tower's own description.
    """
    name = str(base) if base is not None else "sprout"
    folder = resolve(base, "base model", HUB_DESCRIPTION) if base is not None else EMBEDDED_BASE
    if base is not None and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give the folder that holds config.json and the weights")
    if not folder.is_dir():
        raise InputError(
            f"{folder}: the embedded model is not here; give base=, or install the project anew, or run from a clone of it"
        )
    _check_folder(folder)
    file = folder / "config.json"
    facts = read_json(file)
    check_fields(file, facts, TOP)
    original = "text_config" not in facts and ("mm_vision_tower" in facts or "mm_projector_type" in facts)
    kind = facts.get("model_type")
    if not original and kind != "llava":
        known = {"llava_next": ", LLaVA-1.6 (pictures in tiles)"}.get(kind, "")
        raise InputError(f"{file}: model type is {kind!r}{known}; {NEEDED}")
    _check_quantisation(file, facts)
    _check_pictures(file, facts, original)
    if original:
        _check_original(file, facts)
    else:
        _check_stock(file, facts)
    return name, folder, facts, original


# ---------------------------------------------------------------------- configurations


def read_config(base: str | Path | None) -> tuple[Path, LlavaConfig, bool]:
    """(folder, configuration, whether it has LLaVA's original layout) of a base, whose weights need not be there."""
    _, folder, facts, original = find_base(base)
    if not original:
        return folder, stock_config(folder, facts), False
    return folder, original_config(folder, facts, find_tower(folder, facts)[1]), True


def stock_config(folder: Path, facts: dict) -> LlavaConfig:
    """The configuration of a checkpoint in the Hugging Face layout, judged."""
    file = folder / "config.json"
    try:
        config = LlavaConfig.from_dict(facts)
    except Exception as fault:  # transformers raises what it likes, a KeyError for a missing field among others
        raise InputError(f"{file}: not a configuration of LLaVA ({_first_line(fault)}); {NEEDED}") from fault
    config.image_aspect_ratio = facts.get("image_aspect_ratio") or "pad"  # docs/differences.md
    config.mm_use_im_start_end = bool(facts.get("mm_use_im_start_end"))
    _check_config(file, config)
    check_id(file, "image_token_index", config.image_token_id, config.text_config.vocab_size)
    return config


def original_config(folder: Path, facts: dict, tower_facts: dict) -> LlavaConfig:
    """The Hugging Face configuration of an original checkpoint, judged. The image token stands behind the vocabulary."""
    file = folder / "config.json"
    text_keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id",
        "vocab_size", "attention_bias", "mlp_bias", "head_dim", "rope_theta", "rope_scaling", "rope_parameters",
    )  # fmt: skip
    text = {k: facts[k] for k in text_keys if facts.get(k) is not None}
    kind = _original_decoder(file, facts)
    if kind == "mistral" and "sliding_window" in facts:  # null is none, and nothing is Mistral's own
        text["sliding_window"] = facts["sliding_window"]
    if "num_key_value_heads" in facts:
        text.setdefault("num_key_value_heads", facts["num_attention_heads"])
    vision_keys = CLIPVisionConfig().to_dict().keys() - {"model_type", "transformers_version", "torch_dtype", "dtype"}
    tied = bool(facts.get("tie_word_embeddings"))
    try:
        config = LlavaConfig(
            text_config=DECODERS[kind](tie_word_embeddings=tied, **text),
            vision_config=CLIPVisionConfig(**{k: v for k, v in tower_facts.items() if k in vision_keys}),
            image_token_index=facts["vocab_size"],
            vision_feature_layer=facts["mm_vision_select_layer"],
            vision_feature_select_strategy=FEATURES[facts.get("mm_vision_select_feature") or "patch"],
            projector_hidden_act="gelu",
            tie_word_embeddings=tied,
        )
    except Exception as fault:
        raise InputError(f"{file}: not a configuration of LLaVA ({_first_line(fault)}); {NEEDED}") from fault
    config.image_aspect_ratio = facts.get("image_aspect_ratio") or "square"  # without the field LLaVA pads nothing
    config.mm_use_im_start_end = bool(facts.get("mm_use_im_start_end"))
    _check_config(file, config)
    width = facts.get("mm_hidden_size")
    if width is not None and width != config.vision_config.hidden_size:
        raise InputError(
            f"{file}: mm_hidden_size is {width}, but the tower {facts.get('mm_vision_tower')!r} has a width of "
            f"{config.vision_config.hidden_size}; give the tower that this model was trained with"
        )
    return config


def visual_tokens(config: LlavaConfig) -> int:
    """V: visual tokens of an image, the tower's class token among them where it is taken."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")


def find_tower(folder: Path, facts: dict) -> tuple[Path | None, dict]:
    """(folder, description) of the vision tower that `mm_vision_tower` names.

    Without a folder it is LLaVA-1.5's own tower on the hub, whose description is known: perhaps the
    checkpoint carries its weights.
    """
    name, file = facts["mm_vision_tower"], folder / "config.json"
    for place in (folder / name, Path(name).expanduser()):
        if (place / "config.json").exists():
            found = place
            break
    else:
        if name in KNOWN_TOWERS:
            return None, KNOWN_TOWERS[name]
        if name.startswith((".", "/", "~")):
            raise InputError(f"{file}: mm_vision_tower is {name!r}, but {folder / name} is no model folder")
        found = resolve(name, "vision tower", HUB_DESCRIPTION)
    described, own = found / "config.json", "the vision tower's "
    named = read_json(described)
    check_fields(described, named, TOP, own)
    _check_quantisation(described, named)
    kind = named.get("model_type", TOWERS[0])
    if kind not in TOWERS:
        raise InputError(
            f"{described}: the vision tower's model type is {kind!r}; a CLIP vision model is needed "
            "(openai/clip-vit-large-patch14-336, say)"
        )
    _check_classes(described, f"{own}architectures", named, TOWER_CLASSES)
    tower = named.get("vision_config") or named if kind == "clip" else named
    check_fields(described, tower, TOWER, own)
    return found, tower


# ---------------------------------------------------------------------- what is refused


def _check_folder(folder: Path) -> None:
    """Folders that hold a part of a model."""
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        on = read_json(adapter).get("base_model_name_or_path")
        raise InputError(
            f"{folder}: a LoRA adapter, which is trained on {on!r} and means nothing without it; "
            "merge it into that model (peft's merge_and_unload), save the result, and give its folder"
        )
    if part := part_of(folder):
        raise InputError(f"{folder}: {part}")


def _check_quantisation(file: Path, facts: dict) -> None:
    for part in (facts, facts.get("text_config"), facts.get("vision_config")):
        part = part if isinstance(part, dict) else {}
        for key in ("quantization_config", "compression_config", "quantization"):
            found = part.get(key)
            if not found:
                continue
            found = found if isinstance(found, dict) else {"quant_method": found}
            bits = 4 if found.get("load_in_4bit") else 8 if found.get("load_in_8bit") else found.get("bits")
            method = found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "unknown method")
            raise InputError(
                f"{file}: its weights are quantised ({method}{f', {bits} bits' if bits else ''}); only float32, float16 and "
                "bfloat16 weights are read: give the checkpoint that this one was made from, with --load-8bit or --load-4bit"
            )


def _check_pictures(file: Path, facts: dict, original: bool) -> None:
    """How pictures are cut up and marked, which both layouts may say."""
    aspect = facts.get("image_aspect_ratio")
    if aspect is not None and aspect not in ASPECTS:
        what = ", pictures in tiles as in LLaVA-1.6" if str(aspect).startswith("anyres") else ""
        raise InputError(f"{file}: image_aspect_ratio is {aspect!r}{what}; 'pad' or 'square' is understood, {NEEDED}")
    fields = {
        "mm_patch_merge_type": ("flat", "flat"),
        "mm_resampler_type": (None, "a model without one (null)"),
        "s2": (False, "one scale"),
    }
    for key, (legal, word) in fields.items():
        if facts.get(key) not in (None, legal):
            raise InputError(f"{file}: {key} is {facts[key]!r}; only {word} is understood, {NEEDED}")


def _check_stock(file: Path, facts: dict) -> None:
    """The parts of a configuration in the Hugging Face layout, by their names."""
    _check_classes(file, "architectures", facts, (STOCK_CLASS,))
    check_sight(file, facts)
    text, vision = facts.get("text_config"), facts.get("vision_config")
    for key, part in (("text_config", text), ("vision_config", vision)):
        if part is None:
            raise InputError(f"{file}: {key} is {part!r}; an object is expected there, fetch the file again")
    strategy = facts.get("vision_feature_select_strategy", "default")
    if strategy not in FEATURES.values():
        raise InputError(
            f"{file}: vision_feature_select_strategy is {strategy!r}; {' or '.join(FEATURES.values())} is understood"
        )
    check_fields(file, text, {"model_type": DECODER["model_type"]})
    check_fields(file, vision, TOWER, "the vision tower's ")
    decoder, tower = text.get("model_type", "llama"), vision.get("model_type", TOWERS[0])
    if decoder not in DECODERS:
        raise InputError(f"{file}: the decoder's model type is {decoder!r}; {NEEDED}")
    if tower != TOWERS[0]:
        raise InputError(f"{file}: the vision tower's model type is {tower!r}; {NEEDED}")
    check_decoder(file, text, decoder)
    check_rope(file, text)
    _check_classes(file, "the decoder's architectures", text, INNER_CLASSES[decoder])
    _check_classes(file, "the vision tower's architectures", vision, TOWER_CLASSES)
    _check_twice_told(file, facts)


def _check_classes(file: Path, what: str, facts: dict, known: Sequence[str]) -> None:
    foreign = [name for name in facts.get("architectures") or () if name not in known]
    if foreign:
        raise InputError(f"{file}: {what} are {shown(foreign)}; {known[0]} is understood, {NEEDED}")


def _check_twice_told(file: Path, facts: dict) -> None:
    """LLaVA's own names for what the Hugging Face layout says in its fields: the same, where they are there too."""
    feature, vision = facts.get("mm_vision_select_feature"), facts["vision_config"]
    told = (
        ("mm_vision_select_layer", facts.get("mm_vision_select_layer"), "vision_feature_layer", facts.get("vision_feature_layer", -2)),
        ("mm_vision_select_feature", FEATURES.get(feature, feature), "vision_feature_select_strategy",
         facts.get("vision_feature_select_strategy", "default")),
        ("mm_hidden_size", facts.get("mm_hidden_size"), "the vision tower's hidden_size", vision.get("hidden_size", 768)),
        ("image_token_id", facts.get("image_token_id"), "image_token_index", facts.get("image_token_index")),
    )  # fmt: skip
    for key, found, real, value in told:
        if None not in (found, value) and found != value:
            raise InputError(f"{file}: {key} is {facts[key]!r}, but {real} is {value!r}; remove what is not meant")


def _original_decoder(file: Path, facts: dict) -> str:
    """ "llama" or "mistral", as model type and class agree."""
    kind, classes = facts.get("model_type"), facts.get("architectures") or []
    found = {ORIGINAL_TYPES.get(kind)} if kind is not None else set()
    found |= {ORIGINAL_CLASSES.get(name) for name in classes}
    if found == {"llama", "mistral"} and kind == "llava":  # LLaVA's older name for all of its models
        found = {"mistral"}
    if len(found) != 1 or None in found:
        raise InputError(f"{file}: model type is {kind!r}, architectures are {classes}; {NEEDED}")
    return found.pop()


def _check_original(file: Path, facts: dict) -> None:
    """LLaVA's own fields."""
    check_decoder(file, facts, _original_decoder(file, facts))
    check_rope(file, facts)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        _check_there(file, key, facts.get(key), DECODER[key])
    kind = facts.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise InputError(f"{file}: mm_projector_type is {kind!r}; only LLaVA-1.5's mlp2x_gelu is supported")
    tower = facts.get("mm_vision_tower")
    if not isinstance(tower, str) or not tower:
        raise InputError(
            f"{file}: mm_vision_tower is {tower!r}; it names the CLIP model that sees for this one, a folder or hub id"
        )
    feature = facts.get("mm_vision_select_feature")
    if feature is not None and feature not in FEATURES:
        raise InputError(f"{file}: mm_vision_select_feature is {feature!r}; {' or '.join(FEATURES)} is understood")
    _check_there(file, "mm_vision_select_layer", facts.get("mm_vision_select_layer"), TOP["mm_vision_select_layer"])


def _check_config(file: Path, config: LlavaConfig) -> None:
    """What stock code would stumble over, or take for something else."""
    text, vision = config.text_config, config.vision_config
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "max_position_embeddings", "head_dim"):  # fmt: skip
        _check_there(file, key, getattr(text, key, None), DECODER[key])
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    ):
        _check_there(file, f"the vision tower's {key}", getattr(vision, key, None), TOWER[key])
    if text.head_dim % 2:
        raise InputError(f"{file}: head_dim is {text.head_dim}; rotary positions turn pairs, an even number is needed")
    if vision.hidden_size % vision.num_attention_heads:
        raise InputError(
            f"{file}: the vision tower's width of {vision.hidden_size} cannot be shared by {vision.num_attention_heads} "
            "attention heads; fetch the file again"
        )
    if text.num_attention_heads % text.num_key_value_heads:
        raise InputError(
            f"{file}: {text.num_attention_heads} attention heads cannot share num_key_value_heads = "
            f"{text.num_key_value_heads}; fetch the file again"
        )
    acts = (("hidden_act", text.hidden_act), ("the vision tower's hidden_act", vision.hidden_act))
    for key, name in (*acts, ("projector_hidden_act", config.projector_hidden_act)):
        if not _is_activation(name):
            raise InputError(
                f"{file}: {key} is {shown(name)}, no activation that is known and has no weights; {NEEDED}"
            )
    _check_features(file, config)
    _check_ids(file, config)


def _is_activation(name: str) -> bool:
    try:
        return not list(ACT2FN[name].parameters())
    except Exception:  # some cannot be made without a configuration of their own
        return False


def _check_features(file: Path, config: LlavaConfig) -> None:
    vision = config.vision_config
    layers, chosen = vision.num_hidden_layers, config.vision_feature_layer
    for layer in chosen if isinstance(chosen, (list, tuple)) and chosen else [chosen]:
        if not whole(layer) or not -layers - 1 <= layer <= layers:
            raise InputError(
                f"{file}: the vision feature layer is {chosen!r}, but the tower has {layers} layers; "
                f"{-layers - 1} to {layers} is possible (LLaVA-1.5: -2)"
            )
    if vision.num_channels != 3 or vision.image_size < vision.patch_size:
        raise InputError(
            f"{file}: the vision tower takes pictures of {vision.num_channels} channels and {vision.image_size} pixels in patches "
            f"of {vision.patch_size}; three channels and one patch at least are needed"
        )


def _check_ids(file: Path, config: LlavaConfig) -> None:
    """Begin and padding are rows of the embeddings; the image token is nothing else."""
    text, image = config.text_config, config.image_token_id
    for part in (config, text):
        for key in ("bos_token_id", "pad_token_id"):
            if (found := getattr(part, key, None)) is not None:
                check_id(file, key, found, text.vocab_size)
    ends = end_tokens(file, text.eos_token_id, text.vocab_size)
    if image in (text.bos_token_id, *ends):
        raise InputError(
            f"{file}: the image token's id {image} is an end or begin token's as well; fetch the file again"
        )


def end_tokens(file: Path, told: int | Sequence | None, vocabulary: int) -> list[int]:
    """What a field says that ends an answer. Raises InputError for an end token that no answer can contain."""
    ends = [end for end in (told if isinstance(told, (list, tuple)) else [told]) if end is not None]
    for end in ends:
        check_id(file, "eos_token_id", end, vocabulary)
    return ends


def check_id(file: Path, key: str, found: object, vocabulary: int) -> None:
    if not ID.fits(found) or found >= vocabulary:
        raise InputError(f"{file}: {key} is {shown(found)}; a token id from 0 to {vocabulary - 1} is needed")


def _check_there(file: Path, key: str, value: object, kind: Kind) -> None:
    if value is None or not kind.fits(value):
        raise InputError(f"{file}: {key} is {shown(value)}; {kind.words} is needed, fetch the file again")


def _first_line(fault: Exception) -> str:
    return " ".join(str(fault).split())[:200] or type(fault).__name__
