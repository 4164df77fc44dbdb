"""The Hugging Face processor of a model, put together so that it does what LLaVA does."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizer, LlavaConfig, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..errors import InputError
from .images import open_image, pad_to_square
from .load import Loaded
from .prompt import IMAGE


class SquareImageProcessor(CLIPImageProcessorPil):
    """CLIP's preprocessing behind LLaVA's: any mode to upright RGB, padded to a square with the mean colour."""

    def preprocess(self, images, *args, **kwargs):
        """One PIL image or a list → `pixel_values` [images, 3, h, w]."""
        fill = tuple(int(255 * m) for m in self.image_mean)
        many = images if isinstance(images, (list, tuple)) else [images]
        return super().preprocess([pad_to_square(open_image(i), fill) for i in many], *args, **kwargs)


def build_processor(loaded: Loaded) -> LlavaProcessor:
    """Tokenizer and image processor from the model's folder. Raises InputError when it has no tokenizer."""
    return make_processor(loaded.trunk.model.config, loaded.folder, loaded.original)


def make_processor(config: LlavaConfig, folder: Path, original: bool) -> LlavaProcessor:
    """The same without the model: `original` is LLaVA's own layout of the folder."""
    try:
        # The plain class gives the original ids: AutoTokenizer drops LLaVA's prefix space there.
        kind = LlamaTokenizer if original else AutoTokenizer
        tokenizer = kind.from_pretrained(folder, legacy=True)
    except (OSError, ValueError, TypeError) as fault:
        raise InputError(
            f"{folder}: no usable tokenizer ({str(fault).splitlines()[0]}); fetch tokenizer.model"
        ) from fault
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    size = config.vision_config.image_size
    pictures = SquareImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )
