"""The shape of the embedded base: a stock LLaVA whose numbers L, V, K, T, F equal LLaVA-1.5-7B's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ...files import write_text
from ...world.draw import IMAGE_SIZE, PATCH

LAYERS = 32
MATCHING = 0.4  # of a plain initialisation's scale: a token attends to its like e times more than to others


def base_config(vocab_size: int, image_token_id: int, layers: int = LAYERS, hidden: int = 160) -> LlavaConfig:
    """`layers` decoder layers of width `hidden` (a multiple of 32) behind a five-layer CLIP tower."""
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=round(hidden * 2.7 / 16) * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=192,
        hidden_act="quick_gelu",
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token_id,
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def build(config: LlavaConfig, seed: int = 0) -> LlavaForConditionalGeneration:
    """Fresh fp32 weights; the residual outputs are scaled down with depth so that 32 layers train."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float()
        scale = (2 * config.text_config.num_hidden_layers) ** -0.5
        width = config.text_config.hidden_size
        with torch.no_grad():
            for layer in model.model.language_model.layers:
                for part in (layer.self_attn, layer.mlp):
                    for linear in part.children():
                        if isinstance(linear, torch.nn.Linear):
                            linear.weight.normal_(0, width**-0.5)
                # Queries that start as their keys, but softly, match like with like from the first
                # step (mimetic initialisation, Trockman and Kolter 2023).
                layer.self_attn.q_proj.weight.mul_(MATCHING)
                layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
                layer.self_attn.o_proj.weight.mul_(scale)
                layer.mlp.down_proj.weight.mul_(scale)
            model.model.language_model.embed_tokens.weight.normal_(0, 0.5)
            model.lm_head.weight.normal_(0, width**-0.5)
    return model


def save_base(model: LlavaForConditionalGeneration, tokenizer: LlamaTokenizer, folder: Path) -> None:
    """Write a Hugging Face folder in fp16 (half the bytes; its ten bits of mantissa suffice here)."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.text_config._attn_implementation = model.config.vision_config._attn_implementation = "sdpa"
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    model.to("cpu", torch.float16).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    # The tokenizer's own file does not keep this: a prefix space after every special token.
    file = folder / "tokenizer_config.json"
    write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"legacy": True}, indent=2) + "\n", file)
