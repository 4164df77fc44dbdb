"""What is asked of a run: which model, how it prunes and drafts, on which questions.

Two runs whose settings differ never share a folder of answers: `identity` is what is compared.
Standard library only; the model itself is opened elsewhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import TOP_P_ALONE, InputError
from ...record import ROOT
from ..tasks.base import Question

DEFAULT_R = 64.0
DRAFT_LENGTH = 5  # the paper's delta
EMBEDDED_NAME = "sprout"
EMBEDDED_BASE, EMBEDDED_TWIG = ROOT / "checkpoints" / "sprout-base", ROOT / "checkpoints" / "sprout-twig-K2-T3"
EMBEDDED_DATA, REAL_DATA = ROOT / "playground" / "data" / "sprout", ROOT / "playground" / "data" / "eval"
WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "twig_config.json")
LATE = ("K", "T", "F", "dtype")
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of a weight file: enough to notice other weights, little enough for 14 GB


@dataclass(frozen=True)
class Setting:
    """A model and how it answers. `R` None prunes nothing; `baseline` loads no twig at all."""

    base: str | None = None  # hub id or folder; None: the embedded model
    twig: str | None = None
    K: int | None = None
    T: int | None = None
    R: float | None = DEFAULT_R
    pruning: str = "twig"
    speculation: bool = True
    baseline: bool = False
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0
    max_new_tokens: int = 128
    attention: str = "sdpa"
    dtype: str | None = None
    device: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.baseline:
            object.__setattr__(self, "R", None)
        elif self.twig_name is None and (self.speculation if self.R is None else self.pruning == "twig"):
            raise InputError(
                f"{self.base} comes without a twig; give --twig-block (TWIG=…), or --baseline for the base alone, "
                "or another --pruning"
            )
        if self.twig_name is None:
            object.__setattr__(self, "speculation", False)
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit is {self.limit}; 1 or more is needed")
        if self.temperature < 0:
            raise InputError(f"--temperature is {self.temperature:g}; 0 (greedy) or more is needed")
        if self.top_p is not None and not self.temperature:
            raise InputError(TOP_P_ALONE)
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens is {self.max_new_tokens}; 1 or more is needed")

    @property
    def embedded(self) -> bool:
        return self.base is None

    @property
    def twig_name(self) -> str | None:
        """The twig that is loaded, None for none."""
        return None if self.baseline else self.twig or (EMBEDDED_NAME if self.embedded else None)

    @property
    def model_name(self) -> str:
        """The base's name as folders and tables show it."""
        return EMBEDDED_NAME if self.base is None else last_part(self.base)

    @property
    def method(self) -> str:
        """The row of the table, without R."""
        if self.R is None:
            return "SSD only" if self.speculation else "base"
        name = "TTP" if self.pruning == "twig" else self.pruning
        return f"{name}+SSD" if self.speculation else f"{name} only"

    @property
    def name(self) -> str:
        """The folder of its answers."""
        if self.R is None:
            name = "ssd" if self.speculation else "base" if self.baseline else "plain"
        else:
            name = f"{self.pruning}-R{self.R:g}" + ("" if self.speculation else "-plain")
        if self.temperature:
            name += f"-t{self.temperature:g}" + (f"-p{self.top_p:g}" if self.top_p else "") + f"-seed{self.seed}"
        elif self.seed and self.pruning == "random" and self.R is not None:
            name += f"-seed{self.seed}"
        if self.limit is not None:
            name += f"-first{self.limit}"
        return name if self.baseline or self.twig is None else f"{name}@{last_part(self.twig)}"

    def generation(self) -> dict[str, Any]:
        """Arguments of `TwigVLM.generate`."""
        return {
            "retained_tokens": self.R,
            "pruning": self.pruning,
            "draft_length": DRAFT_LENGTH if self.speculation else 0,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "temperature": self.temperature or 1.0,
            "top_p": self.top_p,
        }

    def identity(self, task: str, split: str, questions: Sequence[Question]) -> dict[str, Any]:
        """All that changes answers; JSON values. The device and the size of batches are not among it.

        What only the loaded model knows (LATE) is there if it was asked for, and is added when it is known.
        """
        facts: dict[str, Any] = {"task": task, "split": split, "questions": digest(questions)}
        facts |= {"model": self.base or EMBEDDED_NAME, "model files": fingerprint(self.base or EMBEDDED_BASE)}
        facts |= {"R": self.R, "speculation": self.speculation, "max_new_tokens": self.max_new_tokens}
        facts |= {"temperature": self.temperature, "top_p": self.top_p, "attention": self.attention}
        if self.twig_name is not None:
            facts |= {"twig": self.twig_name, "twig files": fingerprint(self.twig or EMBEDDED_TWIG)}
        if self.R is not None:
            facts["pruning"] = self.pruning
        if self.temperature or self.pruning == "random":
            facts["seed"] = self.seed
        asked = {"K": self.K, "T": self.T, "dtype": self.dtype and self.dtype.removeprefix("torch.")}
        return facts | {key: value for key, value in asked.items() if value is not None}


def default_data(embedded: bool) -> Path:
    """The model chosen decides the data."""
    return EMBEDDED_DATA if embedded else REAL_DATA


def last_part(name: str) -> str:
    """A folder's or hub id's last part, safe as a file name."""
    path = Path(name)
    part = path.resolve().name if path.exists() else name.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^\w.+-]+", "-", part.removesuffix(".safetensors")) or "model"


def digest(questions: Sequence[Question]) -> str:
    """Of ids and prompts in their order."""
    text = hashlib.sha256()
    for question in questions:
        text.update(f"{question.id}\0{question.prompt}\0".encode("utf-8", "surrogatepass"))
    return text.hexdigest()[:16]


def fingerprint(model: str | Path) -> str | None:
    """Of a local model's files: sizes and samples of their bytes. None for hub ids."""
    path = Path(model)
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted({f for pattern in WEIGHT_FILES for f in path.glob(pattern)})
    text = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        text.update(f"{file.name} {size}\0".encode())
        with open(file, "rb") as data:
            for i in range(SAMPLES):
                data.seek(i * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                text.update(data.read(SAMPLE_BYTES))
    return text.hexdigest()[:16]
