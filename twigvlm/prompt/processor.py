"""The Hugging Face processor of a model, put together so that it does what LLaVA does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from transformers import AutoTokenizer, LlamaTokenizer, LlavaConfig, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..errors import InputError
from ..loading.describe import visual_tokens
from ..loading.find import read_json
from .images import open_image, pad_to_square
from .template import IMAGE, VICUNA_V1, CheckpointPrompts, TextEncoder, VicunaPrompts

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")
FRAME = ("<im_start>", "<im_end>")  # what some checkpoints have around each picture
PROBE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]

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
    tokenizer = _tokenizer(folder, original)
    if getattr(config, "mm_use_im_start_end", False):
        tokenizer.image_frame = tuple([_frame_id(tokenizer, folder, word)] for word in FRAME)
    template = _chat_template(folder, tokenizer)
    if template is None and config.text_config.model_type == "llama":
        template = VICUNA_CHAT
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    size = config.vision_config.image_size
    pictures = (SquareImageProcessor if pads(config) else PictureProcessor)(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return LlavaProcessor(
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

    A template of the checkpoint that says USER and ASSISTANT is vicuna_v1 in other words (Hugging
    Face's leaves the system sentence out, with which the model was trained). Raises InputError where
    another model brings no template.
    """
    facts = processor.tokenizer, config.image_token_id, visual_tokens(config)
    if processor.chat_template is None:
        raise InputError(
            f"a {config.text_config.model_type} decoder without a chat template; vicuna_v1 is Llama's: put the "
            "model's chat_template.jinja into its folder, or give ids to generate"
        )
    if processor.chat_template != VICUNA_CHAT:
        try:
            text = _Render(processor)(PROBE)
        except Exception:  # a template is a program; one that takes no parts is not Hugging Face's for LLaVA-1.5
            text = ""
        if not all(f"{name}:" in text for name in (VICUNA_V1.user, VICUNA_V1.assistant)):
            return CheckpointPrompts(_Render(processor), *facts)
    return VicunaPrompts(*facts)


class _Render:
    """Text of chat messages. A class, since it must travel to worker processes."""

    def __init__(self, processor: LlavaProcessor):
        self.processor = processor

    def __call__(self, messages: list[dict]) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _tokenizer(folder: Path, original: bool):
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise InputError(f"{folder}: no tokenizer; fetch tokenizer.model (or tokenizer.json) of this model into it")
    try:
        # The plain class gives the original ids: AutoTokenizer drops LLaVA's prefix space there.
        kind = LlamaTokenizer if original else AutoTokenizer
        tokenizer = kind.from_pretrained(folder, legacy=True, local_files_only=True)
    except Exception as fault:  # damaged files can raise anything
        reason = " ".join(str(fault).split())[:200]
        raise InputError(f"{folder}: no usable tokenizer ({reason}); fetch tokenizer.model") from fault
    if not TextEncoder(tokenizer)("a"):
        raise InputError(f"{folder}: its tokenizer knows no words; fetch tokenizer.model again")
    return tokenizer


def _frame_id(tokenizer, folder: Path, word: str) -> int:
    found = tokenizer.get_vocab().get(word)
    if found is None:
        raise InputError(
            f"{folder}: config.json says mm_use_im_start_end, but the tokenizer has no {word}; fetch added_tokens.json"
        )
    return found


def _chat_template(folder: Path, tokenizer) -> str | None:
    """What the checkpoint brings, in any of the files that it may stand in."""
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).exists() and (found := read_json(folder / name).get("chat_template")):
            break
    else:
        found = tokenizer.chat_template
    if isinstance(found, list):  # named ones, as some tokenizers have them
        found = {entry.get("name"): entry.get("template") for entry in found}
    return found.get("default") if isinstance(found, dict) else found
