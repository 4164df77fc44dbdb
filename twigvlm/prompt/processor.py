"""The Hugging Face processor of a model, put together so that it does what LLaVA does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from transformers import LlavaConfig, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..errors import InputError
from ..loading.describe import visual_tokens
from ..loading.judge.language import FRAME, PROBE, read_template, read_tokenizer
from .images import open_image, pad_to_square
from .template import IMAGE, VICUNA_V1, CheckpointPrompts, VicunaPrompts

# VICUNA_V1 in the language of Hugging Face's chat templates.
VICUNA_CHAT = (
    """{%- macro said(content) -%}{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content if part['type'] == 'image' -%}{{ '"""
    + IMAGE
    + """\\n' }}{%- endfor -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}{{ said(messages[0]['content']) + ' ' }}
{%- else -%}{{ \"SYSTEM \" }}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' + said(message['content']) + ' ' }}
{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' + said(message['content']) + 'END' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}""".replace("SYSTEM", VICUNA_V1.system)
    .replace("USER", VICUNA_V1.user)
    .replace("ASSISTANT", VICUNA_V1.assistant)
    .replace("END", VICUNA_V1.end)
)


class PictureProcessor(CLIPImageProcessorPil):
    """CLIP's preprocessing of any mode of picture, upright: the shorter side fitted, the middle taken."""

    def preprocess(self, images, *args, **kwargs):
        """One PIL image or a list → `pixel_values` [images, 3, h, w]."""
        pictures = [self.shape(open_image(i)) for i in _flat(images)]
        if not args and not kwargs.keys() & {"size", "resample", "do_resize"}:
            # As the stock processor does it, but for its copies, which cost seconds and gigabytes where pictures are large.
            side = self.size["shortest_edge"]
            pictures = [p.resize((side, side), self.resample) if p.width == p.height else p for p in pictures]
        return super().preprocess(pictures, *args, **kwargs)

    def shape(self, image: Image.Image) -> Image.Image:
        return image


class SquareImageProcessor(PictureProcessor):
    """The same behind LLaVA's padding to a square with the mean colour."""

    def shape(self, image: Image.Image) -> Image.Image:
        return pad_to_square(image, tuple(int(255 * m) for m in self.image_mean))


class FramedProcessor(LlavaProcessor):
    """With what some checkpoints have around each picture."""

    def replace_image_token(self, *args, **kwargs) -> str:
        return super().replace_image_token(*args, **kwargs).join(FRAME)


def pads(config: LlavaConfig) -> bool:
    """Pictures are padded to a square; otherwise their middle is cut out."""
    return getattr(config, "image_aspect_ratio", "pad") == "pad"


def _flat(images) -> Iterator:
    """Chat messages give their pictures as a list for each conversation."""
    for image in images if isinstance(images, (list, tuple)) else [images]:
        yield from _flat(image) if isinstance(image, (list, tuple)) else [image]


def make_processor(config: LlavaConfig, folder: Path, original: bool) -> LlavaProcessor:
    """Tokenizer and image processor from a model's folder; `original` is LLaVA's own layout of it.

    Raises InputError when it has no tokenizer.
    """
    tokenizer = read_tokenizer(folder, config, original)
    template = read_template(folder, tokenizer)
    if template is None and config.text_config.model_type == "llama":
        template = VICUNA_CHAT
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    size = config.vision_config.image_size
    pictures = (SquareImageProcessor if pads(config) else PictureProcessor)(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return (FramedProcessor if hasattr(tokenizer, "image_frame") else LlavaProcessor)(
        pictures,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=template,
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )


def make_prompts(processor: LlavaProcessor, config: LlavaConfig) -> VicunaPrompts | CheckpointPrompts:
    """How this model is asked: vicuna_v1 for LLaVA-1.5, else the chat template of the checkpoint.

    A Llama's template that says USER and ASSISTANT and nothing else is Hugging Face's for LLaVA-1.5, which leaves the
    system sentence out with which the model was trained. Raises InputError where another model brings no template.
    """
    facts, kind = (processor.tokenizer, config.image_token_id, visual_tokens(config)), config.text_config.model_type
    if processor.chat_template is None:
        raise InputError(
            f"a {kind} decoder without a chat template; vicuna_v1 is Llama's: put the "
            "model's chat_template.jinja into its folder, or give ids to generate"
        )
    if processor.chat_template == VICUNA_CHAT or (kind == "llama" and _says_vicuna(processor)):
        return VicunaPrompts(*facts)
    return CheckpointPrompts(_Render(processor), *facts)


def _says_vicuna(processor: LlavaProcessor) -> bool:
    """Whether its template is vicuna_v1, with the system sentence or without, up to white space."""
    turns = [(f"{IMAGE}\n?", None)]
    try:
        said = _Render(processor)(PROBE).split()
    except Exception:  # a template is a program; one that takes no parts is not Hugging Face's for LLaVA-1.5
        return False
    return said in (VICUNA_V1.render(turns).split(), VICUNA_V1.render(turns, system="").split())


class _Render:
    """Text of chat messages. A class, since it must travel to worker processes."""

    def __init__(self, processor: LlavaProcessor):
        self.processor = processor

    def __call__(self, messages: list[dict]) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
