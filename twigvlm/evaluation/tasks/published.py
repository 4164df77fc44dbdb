"""Numbers of the TwigVLM paper (arXiv 2503.14075) for LLaVA-1.5-7B, to stand beside measured ones. Not measured here.

Accuracies by benchmark as the paper's table gives them; RelAcc is the mean over its six benchmarks of
score / base score, RelSpd the generation speed on MM-Vet against the base (RTX 4090, batch 1, greedy).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MODEL = "LLaVA-1.5-7B"
SOURCE = "arXiv 2503.14075"


@dataclass(frozen=True)
class Published:
    """One row; `R` None for what prunes nothing."""

    method: str
    R: float | None
    scores: Mapping[str, float] = field(default_factory=dict)
    rel_acc: float | None = None
    rel_speed: float | None = None


def _row(R: int, method: str, *numbers: float, speed: float | None = None) -> Published:
    *scores, rel_acc = numbers
    return Published(method, R, dict(zip(SIX, scores, strict=True)), rel_acc, speed)


SIX = ("gqa", "mmbench", "mme", "textvqa", "sqa", "vqav2")
BASE = Published(
    "base",
    None,
    dict(zip(SIX, (61.9, 64.7, 1862, 58.2, 69.5, 78.5), strict=True)) | {"pope": 85.9, "mmmu": 36.3, "mmvet": 31.1},
    100.0,
    100.0,
)
ROWS = (
    BASE,
    _row(192, "FastV", 56.5, 63.7, 1786, 57.3, 69.5, 74.6, 96.5),
    _row(192, "SparseVLM", 57.6, 62.5, 1721, 56.1, 69.1, 75.6, 95.7),
    _row(192, "PDrop", 57.3, 63.3, 1797, 56.5, 69.2, 75.1, 96.5),
    _row(192, "MustDrop", 58.2, 62.3, 1787, 56.5, 69.2, 76.0, 96.6),
    _row(192, "VisionZip", 59.3, 63.0, 1783, 57.3, 68.9, 76.8, 97.4),
    _row(192, "VisionZip*", 60.1, 63.4, 1834, 57.8, 68.2, 77.4, 98.3),
    _row(192, "TwigVLM", 61.2, 64.0, 1848, 58.0, 68.8, 78.1, 99.2),
    _row(192, "TwigVLM++", 61.2, 64.3, 1868, 58.0, 69.2, 78.2, 99.6),
    _row(128, "FastV", 53.0, 61.4, 1646, 56.0, 69.5, 69.2, 92.2),
    _row(128, "SparseVLM", 56.0, 60.0, 1696, 54.9, 67.1, 73.8, 93.2),
    _row(128, "MustDrop", 56.9, 61.1, 1745, 56.3, 68.5, 74.6, 95.1),
    _row(128, "VisionZip", 57.6, 62.0, 1762, 56.8, 68.9, 75.6, 96.1),
    _row(128, "VisionZip*", 58.9, 62.6, 1823, 57.0, 68.3, 76.6, 97.3),
    _row(128, "TwigVLM", 60.6, 63.5, 1818, 57.8, 69.5, 77.9, 98.7),
    _row(128, "TwigVLM++", 60.8, 63.7, 1856, 58.0, 69.5, 77.9, 99.2),
    _row(64, "FastV", 44.1, 45.9, 1218, 50.7, 70.0, 52.0, 77.0, speed=104.0),
    _row(64, "SparseVLM", 52.7, 56.2, 1505, 51.8, 62.2, 68.2, 86.4),
    _row(64, "MustDrop", 53.1, 60.0, 1612, 54.2, 63.4, 69.3, 89.6),
    _row(64, "VisionZip", 55.1, 60.1, 1690, 55.5, 69.0, 72.4, 93.3, speed=106.0),
    _row(64, "VisionZip*", 57.0, 61.5, 1756, 56.0, 68.8, 74.2, 95.2),
    _row(64, "TwigVLM", 58.8, 60.4, 1760, 55.8, 70.0, 75.6, 96.0, speed=153.6),
    _row(64, "TwigVLM++", 59.7, 63.2, 1801, 56.7, 69.5, 76.8, 97.7, speed=197.0),
    Published("TwigVLM, pruning only", 64, rel_speed=104.0),
    Published("TwigVLM, drafts only", None, rel_speed=147.0),
)
