"""Which rows of a conversation stand for "the last prompt token", where the kept set of an answer is chosen.

Legend: B rows, S tokens, Q asked rows.
"""

from __future__ import annotations

from typing import Literal

import torch

from ...model.stream import fit, front
from ..data.examples import IGNORE

Turns = Literal["first", "all"]


def asked_rows(labels: torch.Tensor, visual: torch.Tensor, turns: Turns = "first") -> torch.Tensor:
    """[B, Q] (-1 pads): the token before each answer that begins behind an image, or before the first one alone.

    labels [B, S] (IGNORE: not learnt), visual [B, S] (-1: text). An answer begins where what is learnt does.
    """
    learnt, seen = labels != IGNORE, (visual >= 0).long().cumsum(1) > 0
    begins = learnt[:, 1:] & ~learnt[:, :-1] & seen[:, :-1]
    if turns == "first":
        begins = begins & (begins.long().cumsum(1) == 1)
    return front(begins, max(1, fit(begins, int(begins.sum(1).max()))[0]))


def drawn_row(rows: torch.Tensor) -> torch.Tensor:
    """[B, 1]: one of the asked rows [B, Q] of each sample, each as likely; -1 where there is none. From torch's global generator."""
    count = (rows >= 0).sum(1, keepdim=True)
    nth = (torch.rand(count.shape, device=rows.device) * count).long()
    return rows.gather(1, torch.minimum(nth, (count - 1).clamp(min=0)))


def unseen(asked: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: all from the first image on that stands behind the asked row [B] (-1: before all).

    With it an answer asks the head anew, so a set that was chosen before has no part in what is said from there on.
    """
    later = torch.arange(visual.shape[1], device=visual.device) > asked[:, None]
    return ((visual >= 0) & later).long().cumsum(1) > 0


def visual_columns(visual: torch.Tensor) -> torch.Tensor:
    """[B, V'] (-1 pads): where each row's visual tokens stand, of visual [B, S] (-1: text)."""
    image = visual >= 0
    return front(image, int(image.sum(1).max()))
