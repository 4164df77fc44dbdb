"""Bases of a given shape with random weights, made where they are used: to measure, not to answer."""

from __future__ import annotations

import re

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from ..config import SHAPES
from ..errors import InputError
from .base import furnish, skeleton
from .describe import KNOWN_TOWERS
from .device import set_attention

STD = 0.02


def random_config(shape: str) -> LlavaConfig:
    """The configuration of a named model, or of "WIDTHxLAYERS" (width a multiple of 64)."""
    if shape in SHAPES:
        width, forward, layers, heads = SHAPES[shape]
    else:
        match = re.fullmatch(r"(\d+)x(\d+)", shape)
        if not match or int(match[1]) % 64 or not int(match[1]) or not int(match[2]):
            raise InputError(
                f"random shape is {shape!r}; {', '.join(SHAPES)} or WIDTHxLAYERS (width a multiple of 64) is needed"
            )
        width, layers = int(match[1]), int(match[2])
        forward, heads = round(width * 2.6875 / 64) * 64, width // 64
    text = LlamaConfig(
        vocab_size=32064, hidden_size=width, intermediate_size=forward, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    tower = dict(KNOWN_TOWERS["openai/clip-vit-large-patch14-336"])
    if width < tower["hidden_size"]:  # a small decoder behind a small tower
        tower |= {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": width // 64,
            "num_hidden_layers": 4,
        }
    vision = CLIPVisionConfig(**tower)
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=32000, vision_feature_layer=-2)


def random_base(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    seed: int = 0,
    layers: int | None = None,
    bits: int | None = None,
) -> LlavaForConditionalGeneration:
    """Weights drawn straight on the device, in the wanted dtype; `layers` limits the decoder's layers, `bits` rounds them."""
    config = random_config(shape)
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    model = skeleton(config)
    furnish(model, device, dtype, bits)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            if hasattr(parameter, "receive"):  # loading.quantise
                drawn = torch.empty(parameter.shape, device=device)
                parameter.receive(drawn.normal_(0, STD, generator=generator))
            elif parameter.dim() > 1:
                parameter.normal_(0, STD, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    set_attention(model, attention)
    return model.eval()
