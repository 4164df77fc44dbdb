"""CDPruner (NeurIPS 2025): patches that are unlike each other, weighted by what they have to do with the question.

The greedy most probable set of a determinantal point process whose kernel is r_i cos(z_i, z_j) r_j: z are the projected
patches, r the relevance, scaled to about 0..1 over each picture. Relevance is MINUS the mean cosine of the patch in
CLIP's shared space and the question's pieces of 77 tokens. The sign is the released code's and contradicts the
paper; for LLaVA's CLIP the author confirms it. The question goes without its answer instruction. What CLIP's text
tower needs is in no LLaVA checkpoint: `text_tower` names the same CLIP model, a folder or a hub id.
`stand_in` is ours, for models without one: relevance is the cosine of a projected patch and the mean of the input
embeddings of all text behind the last picture (sign +). Of the text behind the last picture the question is what
stands before the template's last words, and behind the last `USER:`. Once the kernel has no more volume (R above the
rank of the features, where the released code yields NaN), relevance alone decides (ours). Raster order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...errors import InputError
from ...prompt.template import VICUNA_V1, Talk, decode
from ..plan import Shape, TowerMethod
from ..reducer import Leaving, Reducer, Tokens, View
from ..select import cosine, spanning

INSTRUCTION = re.compile(r"\n(Answer the question using|Answer with the option's letter)[^\n]*")
EXAMPLE = "openai/clip-vit-large-patch14-336"  # LLaVA-1.5's tower
LEAST = 1e-6  # relevance of the least relevant patch


def kernel(features: torch.Tensor, fit: torch.Tensor) -> torch.Tensor:
    """[B, V, V] of projected patches [B, V, D] and how they fit the question [B, V]."""
    low, high = fit.amin(1, keepdim=True), fit.amax(1, keepdim=True)
    relevance = (fit - low + LEAST) / (high - low).clamp(min=LEAST)
    return relevance[:, :, None] * cosine(features) * relevance[:, None]


def clip_fit(seen: torch.Tensor, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, V] from patches [B, V, P] and the pieces [M, P] of each question: less like the text is better, as released."""
    return -torch.stack([cosine(patches, pieces).mean(1) for patches, pieces in zip(seen, texts, strict=True)])


def mean_fit(features: torch.Tensor, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, V] from projected patches [B, V, D] and the embedded text [T, D] of each picture's prompt."""
    means = [text.float().sum(0, keepdim=True) / max(len(text), 1) for text in texts]
    return torch.stack([cosine(patches, mean)[:, 0] for patches, mean in zip(features, means, strict=True)])


class Questions:
    """From the ids behind the last picture to the question, as words of the model's own tokenizer."""

    def __init__(self, tokenizer, prompts):
        self.tokenizer = tokenizer
        first, second = (prompts.ids(Talk([(word, None)])) for word in ("a", "b?"))
        same = 0
        while same < min(len(first), len(second)) and first[-1 - same] == second[-1 - same]:
            same += 1
        self.ending = first[len(first) - same :]  # what the template says behind a question

    def __call__(self, ids: Sequence[int]) -> str:
        ids, end = list(ids), self.ending
        if end and ids[-len(end) :] == end:
            ids = ids[: -len(end)]
        said = decode(self.tokenizer, ids).rpartition(f"{VICUNA_V1.user}:")[2]
        return INSTRUCTION.sub("", said).strip()


@dataclass(frozen=True)
class Judge:
    """CLIP's opinion of a picture's patches; `tower` is a `loading.clip.TextTower`."""

    tower: Any
    question: Callable[[Sequence[int]], str]

    def __call__(self, view: View) -> torch.Tensor:
        asked = [self.question(ids) for ids in view.questions]
        read = {text: self.tower.read(text) for text in dict.fromkeys(asked)}
        return clip_fit(self.tower.see(view.patches), [read[text] for text in asked])


@dataclass(frozen=True)
class Conditional(Leaving):
    """`judge` is there once a model is known, but for the `stand_in`."""

    text_tower: str | None = None
    stand_in: bool = False
    judge: Judge | None = None
    projects_all: ClassVar[bool] = True

    def bind(self, vlm: Any) -> Reducer:
        if self.stand_in:
            return self
        if self.text_tower is None:
            raise InputError(
                "cdpruner reads the question with CLIP's text tower, which is not in a LLaVA checkpoint; give the CLIP model of "
                f"its vision tower, a folder or hub id, as cdpruner:text_tower=... ({EXAMPLE} for LLaVA-1.5), or take our "
                "substitute, cdpruner:stand_in"
            )
        tower = vlm.text_tower(self.text_tower)
        width = vlm.model.config.vision_config.hidden_size
        if tower.width != width:
            raise InputError(
                f"cdpruner:text_tower={self.text_tower}: its patches have a width of {tower.width}, and this model's tower "
                f"has {width}; the CLIP model that the tower comes from is needed"
            )
        return replace(self, judge=Judge(tower, Questions(vlm.tokenizer, vlm.prompts)))

    def __call__(self, view: View) -> Tokens:
        fit = self.judge(view) if self.judge is not None else mean_fit(view.projected, view.text)
        return view.select(spanning(kernel(view.projected, fit), self.n).sort(1).values)


@dataclass(frozen=True)
class CDPruner(TowerMethod):
    """`text_tower`: the CLIP model of the tower, a folder or hub id; `stand_in`: without one, see above."""

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "CDPruner, NeurIPS 2025"
    summary: ClassVar[str] = "diversity, weighted by what patches have to do with the question"
    needs: ClassVar[str] = "text tower"
    text_tower: str | None = None
    stand_in: bool = False

    def reducer(self, n: int, shape: Shape) -> Reducer:
        if self.stand_in and self.text_tower is not None:
            raise InputError("cdpruner takes text_tower=... or stand_in, not both")
        return Conditional(n, self.text_tower, self.stand_in)
