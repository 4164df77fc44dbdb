"""VisionZip* (VisionZip‡ in later tables; CVPR 2025): VisionZip with a projector tuned while its reduction is active.

`training.projector` tunes one, for each budget (whether the authors shared one is unknown). Without
`projector` the embedded base takes its own of the asked R; "base" is the base's, untuned, and then this is VisionZip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...errors import InputError
from ...loading.describe import EMBEDDED_BASE
from ...loading.projector import CONFIG, load_projector
from ..plan import Shape
from ..reducer import Reducer, Tokens, View
from .visionzip import VisionZip, Zip

UNTUNED = "base"


@dataclass(frozen=True)
class TunedZip(Zip):
    """Projects by a module of its own; `where` is its folder."""

    where: str | None = None
    projector: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, view: View) -> Tokens:
        if self.where != UNTUNED:
            view.project = self.projector
        return super().__call__(view)

    def bind(self, vlm: Any) -> Reducer:
        if self.where == UNTUNED:
            return self
        where = self.where or EMBEDDED_BASE.parent / f"sprout-visionzip-R{self.n}"
        if self.where is None and not (vlm.base_name == "sprout" and (where / CONFIG).is_file()):
            raise InputError(
                f"visionzip* needs a projector tuned for R = {self.n}; train one (twigvlm train --learn projector "
                f"-R {self.n}) and give visionzip*:projector=FOLDER"
            )
        return replace(self, projector=load_projector(where, vlm.trunk).to(vlm.device, vlm.dtype))


@dataclass(frozen=True)
class VisionZipTuned(VisionZip):
    name: ClassVar[str] = "visionzip*"
    summary: ClassVar[str] = "visionzip, and a projector tuned for it"
    needs: ClassVar[str] = "class token, tuned projector"
    trained: ClassVar[bool] = True
    projector: str | None = None

    def reducer(self, n: int, shape: Shape) -> Reducer:
        plain = super().reducer(n, shape)
        return TunedZip(plain.n, plain.contextual, plain.merge, self.projector)
