"""LLaVA-1.5: CLIP, a two-layer projector, a Llama or Mistral decoder; each picture is V tokens, whatever its size was."""

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from ..errors import InputError
from ..loading.describe import visual_tokens
from ..model.tower import Tower
from ..prompt.processor import make_processor, make_prompts


class Llava:
    """What the trunk asks of a family, see `model.trunk.Family`."""

    processor = staticmethod(make_processor)  # (configuration, folder, original layout) → Hugging Face's processor
    prompts = staticmethod(make_prompts)  # (processor, configuration) → how the model is asked

    def __init__(self, model: LlavaForConditionalGeneration):
        self.model = model
        self.decoder = model.model.language_model
        self.image_token_id = model.config.image_token_id
        text = model.config.text_config
        # Within a decoder's sliding window it attends to all; beyond it nothing is written.
        self.context = min(text.max_position_embeddings, getattr(text, "sliding_window", None) or sys.maxsize)

    @property
    def head(self) -> nn.Linear:
        return self.model.lm_head

    @property
    def V(self) -> int:
        """Visual tokens per image."""
        return visual_tokens(self.model.config)

    def sizes(self, pixel_values: torch.Tensor | None) -> list[int]:
        """Visual tokens of each image. Raises InputError for images of another size than the tower's."""
        images = 0 if pixel_values is None else len(pixel_values)
        side = self.model.config.vision_config.image_size
        if images and pixel_values.shape[1:] != (3, side, side):
            raise InputError(
                f"pixel_values have shape {list(pixel_values.shape)}; [images, 3, {side}, {side}] is needed"
            )
        return [self.V] * images

    def see(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Images → projected visual tokens of each [size, D]. Layers of the tower that nobody reads do not run."""
        if not (isinstance(self._last, int) and hasattr(self._tower, "encoder")):
            out = self.model.get_image_features(pixel_values=pixel_values)
            return list(getattr(out, "pooler_output", out))
        tower = Tower(self._tower, self._read)
        states = tower.look(pixel_values)
        return list(self.project(states[:, tower.class_tokens :] if self._strategy == "default" else states))

    def tower(self) -> Tower:
        """The vision tower, for methods that look into it. Raises InputError where it is read in an unusual way."""
        if not isinstance(self._last, int):
            raise InputError(f"vision_feature_layer is {self._last}; methods that look into the tower need one layer")
        tower = Tower(self._tower, self._read)
        if tower.class_tokens and self._strategy != "default":
            raise InputError(
                f"vision_feature_select_strategy is {self._strategy!r}, so the class token counts as a visual token; "
                "methods that look into the tower need 'default'"
            )
        return tower

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """The tower's states [..., C] → [..., D]."""
        return self.model.model.multi_modal_projector(states)

    @property
    def _tower(self) -> nn.Module:
        return self.model.model.vision_tower

    @property
    def _last(self) -> int | list[int]:
        return self.model.config.vision_feature_layer

    @property
    def _strategy(self) -> str:
        return self.model.config.vision_feature_select_strategy

    @property
    def _read(self) -> int:
        """The layer whose output is used: hidden state n leaves layer n - 1, and there is one more of them."""
        return self._last - 1 if self._last >= 0 else self._last + len(self._tower.encoder.layers)

    def positions(self, place: torch.Tensor) -> torch.Tensor:
        """Rotary positions [A, B, S] of the tokens of a prompt."""
        return place.clamp(min=0)[None]
