"""The fields of a config.json, before anything is made of them: of the right JSON type, within reason, and none that a
Llama or Mistral decoder, a CLIP tower or LLaVA-1.5 does not have and that would change the answers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...config import SHOWN
from ...errors import InputError

NEEDED = (
    "a LLaVA-1.5 model is needed: CLIP tower, two-layer projector, Llama or Mistral decoder "
    "(llava-hf/llava-1.5-7b-hf or liuhaotian/llava-v1.5-7b, say)"
)


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class Kind(NamedTuple):
    """What a field may hold, in words and as a rule. Any may be null, which is not there: what must be is asked for later."""

    words: str
    fits: Callable[[Any], bool]


def up_to(largest: int) -> Kind:
    return Kind(f"a positive whole number up to {largest}", lambda v: whole(v) and 1 <= v <= largest)


def several(kind: Kind, inner: Callable[[Any], bool] | None = None) -> Kind:
    """One of this kind, or a list of them."""
    inner = inner or kind.fits
    return Kind(
        f"{kind.words}, or a list of such,", lambda v: all(map(inner, v)) if isinstance(v, list) else kind.fits(v)
    )


LONGEST = 2**53  # of a context, which no memory is taken for

TEXT = Kind("a text", lambda v: isinstance(v, str))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
OBJECT = Kind("an object", lambda v: isinstance(v, dict))
NAMES = Kind("a list of names", lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v))
DTYPE = Kind(
    "float16, bfloat16 or float32",
    lambda v: isinstance(v, str) and v in ("float16", "bfloat16", "float32", "float64", "auto"),
)
LAYER = Kind("a layer's number (LLaVA-1.5: -2)", whole)
ID = Kind("a token id", lambda v: whole(v) and 0 <= v < 2**31)
IDS = several(ID, lambda v: v is None or ID.fits(v))
POSITIVE = Kind("a positive number", lambda v: number(v) and v > 0)
EPSILON = Kind("a number from 0 to 1", lambda v: number(v) and 0 <= v < 1)

TOP = {
    "model_type": TEXT, "architectures": NAMES, "dtype": DTYPE, "torch_dtype": DTYPE, "text_config": OBJECT, "vision_config": OBJECT, "vision_feature_layer": several(LAYER),
    "vision_feature_select_strategy": TEXT, "projector_hidden_act": TEXT, "multimodal_projector_bias": FLAG,
    "tie_word_embeddings": FLAG, "image_token_index": ID, "image_token_id": ID, "image_seq_length": Kind("a whole number", whole),
    "eos_token_id": IDS, "bos_token_id": ID, "pad_token_id": ID, "image_aspect_ratio": TEXT, "mm_use_im_start_end": FLAG,
    "mm_patch_merge_type": TEXT, "mm_resampler_type": TEXT, "s2": FLAG, "mm_projector_type": TEXT, "mm_vision_tower": TEXT,
    "mm_vision_select_feature": TEXT, "mm_vision_select_layer": LAYER, "mm_hidden_size": up_to(2**16),
}  # fmt: skip
DECODER = {
    "model_type": TEXT, "architectures": NAMES, "dtype": DTYPE, "torch_dtype": DTYPE, "hidden_size": up_to(2**16), "intermediate_size": up_to(2**20),
    "num_hidden_layers": up_to(2**10), "num_attention_heads": up_to(2**12), "num_key_value_heads": up_to(2**12),
    "head_dim": up_to(2**12), "vocab_size": up_to(2**22), "max_position_embeddings": up_to(LONGEST), "sliding_window": up_to(2**40),
    "rms_norm_eps": EPSILON, "hidden_act": TEXT, "attention_bias": FLAG, "mlp_bias": FLAG, "tie_word_embeddings": FLAG,
    "eos_token_id": IDS, "bos_token_id": ID, "pad_token_id": ID, "rope_theta": POSITIVE, "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
}  # fmt: skip
TOWER = {
    "model_type": TEXT, "architectures": NAMES, "dtype": DTYPE, "torch_dtype": DTYPE, "hidden_size": up_to(2**16), "intermediate_size": up_to(2**20),
    "num_hidden_layers": up_to(2**10), "num_attention_heads": up_to(2**12), "image_size": up_to(2**12), "patch_size": up_to(2**12),
    "num_channels": Kind("a whole number", whole), "layer_norm_eps": EPSILON, "hidden_act": TEXT,
}  # fmt: skip

# Fields of other decoders with the values that change nothing; of a list each has to be one of them.
FOREIGN_DECODER = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb"), (1,)),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), (0, 1)),
    **dict.fromkeys(
        ("attention_multiplier", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "scale_depth",
         "dim_model_base", "clip_qkv", "q_lora_rank", "kv_lora_rank", "rope_local_base_freq", "attention_chunk_size",
         "hidden_activation", "mrope_section"), (),
    ),
    **dict.fromkeys(
        ("use_qk_norm", "qk_norm", "qk_layernorm", "use_sliding_window", "alibi", "parallel_attn", "use_parallel_residual",
         "attn_temperature_tuning", "rope_interleave", "no_rope_layer_interval", "attn_output_gate"), (False,),
    ),
    "no_rope_layers": (1,),
    "layer_types": ("full_attention",),
    "position_embedding_type": ("rotary", "rope", "absolute"),  # the last is transformers' old default, unread
}  # fmt: skip
MISTRALS = dict.fromkeys(("attention_bias", "mlp_bias"), (False,))  # what a Llama has, and a Mistral has not
# And of other models that see, in the Hugging Face layout.
FOREIGN_SIGHT = {
    "image_grid_pinpoints": ("LLaVA-1.6, pictures in tiles", ()),
    "use_image_newline_parameter": ("LLaVA-1.6, pictures in tiles", (False,)),
    "vision_aspect_ratio": ("LLaVA-OneVision, pictures in tiles", ("pad", "square")),
    "vision_feature_layers": ("ViP-LLaVA, several layers of the tower side by side", ()),
    "projector_layernorm_eps": ("ViP-LLaVA, a norm in the projector", ()),
    "video_token_index": ("Video-LLaVA", ()),
    "mm_projector_type": ("another projector", ("mlp2x_gelu",)),
}


def check_fields(file: Path, facts: Mapping, kinds: Mapping[str, Kind], where: str = "") -> None:
    """Raises InputError for a field whose value is not of its kind; null passes. `where` says whose fields they are."""
    for key, kind in kinds.items():
        value = facts.get(key)
        if value is not None and not kind.fits(value):
            raise InputError(f"{file}: {where}{key} is {shown(value)}; {kind.words} is needed, fetch the file again")


def check_decoder(file: Path, facts: Mapping, kind: str) -> None:
    """What the decoder's own fields say, `kind` being "llama" or "mistral". Raises InputError."""
    check_fields(file, facts, DECODER)
    foreign = FOREIGN_DECODER | (MISTRALS if kind == "mistral" else {})
    if kind == "mistral" and facts.get("sliding_window", True):
        foreign |= {"layer_types": ("sliding_attention",)}
    for key, neutral in foreign.items():
        if not _changes_nothing(facts.get(key), neutral):
            raise InputError(
                f"{file}: {key} is {shown(facts[key])}, which a {kind.capitalize()} decoder does not have; {NEEDED}"
            )


def check_sight(file: Path, facts: Mapping) -> None:
    """Fields of the Hugging Face layout by which another model gives itself away."""
    for key, (what, neutral) in FOREIGN_SIGHT.items():
        if not _changes_nothing(facts.get(key), neutral):
            raise InputError(f"{file}: {key} is {shown(facts[key])} ({what}); {NEEDED}")


def _changes_nothing(value: Any, neutral: tuple) -> bool:
    return value is None or all(one in neutral for one in (value if isinstance(value, list) else [value]))


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


# ---------------------------------------------------------------------- rotary positions

FACTOR = {"factor": POSITIVE}
STRETCHED = FACTOR | {"original_max_position_embeddings": up_to(LONGEST)}
NOT_NEGATIVE = Kind("a number from 0", lambda v: number(v) and v >= 0)
ROPES = {  # whose angles do not depend on how long the sequence is; what each is told, the first of it always
    "default": {},
    "linear": FACTOR,
    "llama3": STRETCHED | {"low_freq_factor": POSITIVE, "high_freq_factor": POSITIVE},
    "yarn": STRETCHED
    | {"attention_factor": POSITIVE, "beta_fast": POSITIVE, "beta_slow": POSITIVE, "mscale": NOT_NEGATIVE}
    | {"mscale_all_dim": NOT_NEGATIVE, "truncate": FLAG, "finetuned": FLAG},
}
EVERY_ROPE = {"rope_theta": POSITIVE, "rope_type": TEXT, "type": TEXT, "partial_rotary_factor": POSITIVE}


def check_rope(file: Path, facts: Mapping) -> None:
    """Rotary positions as a decoder's fields tell them, in the names of all versions of transformers. Raises InputError."""
    for key in ("rope_theta", "rope_type"):
        if any((facts.get(rope) or {}).get(key, "") is None for rope in ("rope_parameters", "rope_scaling")):
            raise InputError(f"{file}: the rope's {key} is None; say it or remove it")
    new, old = (
        {k: v for k, v in (facts.get(key) or {}).items() if v is not None}
        for key in ("rope_parameters", "rope_scaling")
    )
    for key in new.keys() & old.keys():
        _agree(file, f"rope_parameters.{key}", new[key], f"rope_scaling.{key}", old[key])
    rope = old | new
    if bad := next((key for key, value in rope.items() if isinstance(value, dict)), None):
        raise InputError(f"{file}: the rotary positions are told by kind of layer ({bad}); {NEEDED}")
    check_fields(file, rope, EVERY_ROPE, "the rope's ")
    if "type" in rope and "rope_type" in rope:
        _agree(file, "the rope's type", rope["type"], "rope_type", rope["rope_type"])
    if facts.get("rope_theta") is not None and "rope_theta" in rope:
        _agree(file, "rope_theta", facts["rope_theta"], "the rope's own", rope["rope_theta"])
    for part in (facts.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if part is not None and not (number(part) and part == 1):
            raise InputError(
                f"{file}: partial_rotary_factor is {shown(part)}, not 1; only whole heads can be turned, {NEEDED}"
            )
    _check_scaling(file, rope)


def _check_scaling(file: Path, rope: Mapping) -> None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPES:
        raise InputError(f"{file}: rope scaling is {kind!r}; one of {', '.join(ROPES)} is understood")
    known = ROPES[kind]
    for key in rope.keys() - known.keys() - EVERY_ROPE.keys():
        told = f"a rope of type {kind!r}" if "rope_type" in rope or "type" in rope else "a rope without a type"
        raise InputError(
            f"{file}: {told} has {key} = {shown(rope[key])}, which it does not take; say its type ({', '.join(ROPES)}) "
            "or remove it"
        )
    check_fields(file, rope, known, "the rope's ")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in rope and high in rope and rope[low] >= rope[high]:
            raise InputError(
                f"{file}: the rope's {low} = {rope[low]} must be below {high} = {rope[high]}; fetch it again"
            )
    if known and "factor" not in rope:
        raise InputError(f"{file}: a rope of type {kind!r} needs a factor; fetch the file again")


def _agree(file: Path, one: str, a: Any, other: str, b: Any) -> None:
    if a != b:
        raise InputError(
            f"{file}: {one} is {shown(a)}, but {other} {shown(b)}; only one of them can be meant, remove the other"
        )
