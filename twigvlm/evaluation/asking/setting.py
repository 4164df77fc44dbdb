"""What is asked of a run: which model, how it prunes and drafts, on which questions.

Two runs whose settings differ never share a folder of answers: `identity` is what is compared.
Standard library only; the model itself is opened elsewhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...config import GenerationSettings, ModelSettings
from ...errors import InputError
from ...files import BROUGHT, CHECKOUT, home
from ..tasks.base import Question

DEFAULT_R = 64.0
DEFAULT_PRUNING = GenerationSettings.pruning
LONGEST = 80  # letters of a method's settings in a file's name
EMBEDDED_NAME = "sprout"
EMBEDDED_BASE, EMBEDDED_TWIG = BROUGHT / "checkpoints" / "sprout-base", BROUGHT / "checkpoints" / "sprout-twig-K2-T3"
EMBEDDED_DATA = home() / "sprout"
REAL_DATA = (
    (CHECKOUT or Path()) / "playground" / "data" / "eval"
)  # fetched by hand: in the working folder, as LLaVA has it
WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "twig_config.json")
OF_THE_MODEL = ("wipe_layer", "load_8bit", "load_4bit", "draft_8bit")  # a rounded twig may choose other tokens to keep
LATE = ("K", "T", "F", "dtype")
OLDER = ("retained_tokens", "pruning", "max_new_tokens", "do_sample", "temperature", "top_p", "seed")
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of a weight file: enough to notice other weights, little enough for 14 GB


@dataclass(frozen=True)
class Pruning:
    """What the setting must know of a method: the one way to write it, whether it asks a twig, draws, is calibrated."""

    spec: str
    needs_twig: bool
    draws: bool
    fitted: bool = False


@lru_cache(maxsize=256)
def pruning_of(spec: str, query: str = "last") -> Pruning:
    """Raises InputError for an unknown method or setting. Only what is not the default needs torch."""
    if spec == DEFAULT_PRUNING:
        return Pruning(spec, True, False)
    from ...pruning.calibrated import missing
    from ...pruning.spec import find_method, needs_of, some_plan, spec_of

    method = find_method(spec, query)
    return Pruning(spec_of(method, query), "twig" in needs_of(method), some_plan(method).random, bool(missing(method)))


def thresholds_of(spec: str, query: str, R: float, base: str) -> dict[str, float] | None:
    """What a calibration has found for a method, None where there is none."""
    from ...pruning.calibrated import stored
    from ...pruning.spec import find_method

    found = stored(find_method(spec, query), R, base)
    return found[1]["thresholds"] if found is not None else None


def file_name(spec: str) -> str:
    """A method's name and settings as a part of a file's name, legal on every system and its own for each of them.

    `sparsevlm:version=1.0,faithful` → `sparsevlm~version=1.0,faithful`; where more than the colon must go, or the
    name is long, a digest of all of it tells two apart.
    """
    plain = spec.replace(":", "~")
    name = re.sub(r"[^\w.+,=~-]", "-", plain)[:LONGEST]
    return name if name == plain else f"{name}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Setting:
    """A model and how it answers; `baseline` loads no twig at all, prunes and drafts nothing."""

    model: ModelSettings = ModelSettings()
    writing: GenerationSettings = GenerationSettings(retained_tokens=DEFAULT_R, max_new_tokens=128, seed=0)
    baseline: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.baseline:
            object.__setattr__(self, "writing", replace(self.writing, retained_tokens=None))
        object.__setattr__(self, "writing", replace(self.writing, pruning=self._pruning.spec))
        needed = self.speculation if self.R is None else self._pruning.needs_twig
        if self.twig_name is None and not self.baseline and needed:
            what = "" if self.R is None else f", and pruning {self.writing.pruning!r} needs one"
            raise InputError(
                f"{self.model.base} comes without a twig{what}; give --twig-block (TWIG=…), or --baseline for the base alone, "
                "or another --pruning"
            )
        if self.twig_name is None:
            object.__setattr__(self, "writing", replace(self.writing, draft_length=0))
            if self.model.draft_8bit:
                raise InputError("--draft-8bit rounds the twig's weights, and no twig is asked for; leave it away")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit is {self.limit}; 1 or more is needed")

    @property
    def R(self) -> float | None:
        return self.writing.retained_tokens

    @property
    def _pruning(self) -> Pruning:
        return pruning_of(self.writing.pruning, self.writing.query)

    @property
    def speculation(self) -> bool:
        return self.writing.draft_length != 0

    @property
    def embedded(self) -> bool:
        return self.model.base is None

    @property
    def twig_name(self) -> str | None:
        """The twig that is loaded, None for none."""
        return None if self.baseline else self.model.twig or (EMBEDDED_NAME if self.embedded else None)

    @property
    def base_name(self) -> str:
        """As a loaded model has it."""
        return EMBEDDED_NAME if self.embedded else str(self.model.base)

    @property
    def model_name(self) -> str:
        """The base's name as folders and tables show it."""
        return EMBEDDED_NAME if self.embedded else last_part(self.model.base)

    @property
    def method(self) -> str:
        """The row of the table, without R."""
        if self.R is None:
            return "SSD only" if self.speculation else "base"
        name = "TTP" if self.writing.pruning == "twig" else self.writing.pruning
        return f"{name}+SSD" if self.speculation else f"{name} only"

    @property
    def name(self) -> str:
        """The folder of its answers."""
        w = self.writing
        if self.R is None:
            name = "ssd" if self.speculation else "base" if self.baseline else "plain"
        else:
            name = f"{file_name(w.pruning)}-R{self.R:g}" + ("" if self.speculation else "-plain")
        for key, value in self.unusual().items():
            name += f"-{key.replace('_', '-')}" + ("" if value is True else f"-{value}")
        if w.do_sample:
            name += f"-t{w.temperature:g}" + (f"-p{w.top_p:g}" if w.top_p else "") + f"-seed{w.seed}"
        elif w.seed and self.R is not None and self._pruning.draws:
            name += f"-seed{w.seed}"
        if self.limit is not None:
            name += f"-first{self.limit}"
        return name if self.baseline or self.model.twig is None else f"{name}@{last_part(self.model.twig)}"

    def unusual(self) -> dict[str, Any]:
        """What changes answers, is not said by an older part of the name or the identity, and is not as it usually is."""
        usual = {f.name: f.default for kind in (GenerationSettings, ModelSettings) for f in fields(kind)}
        asked = {**vars(self.writing), **{name: getattr(self.model, name) for name in OF_THE_MODEL}}
        if not self.speculation:
            asked = {k: v for k, v in asked.items() if k != "tree" and not k.startswith("draft_")}
        if self.R is None:
            asked.pop("query")
        return {k: v for k, v in asked.items() if k not in OLDER and v != usual[k]}

    def identity(self, task: str, split: str, questions: Sequence[Question]) -> dict[str, Any]:
        """All that changes answers; JSON values. The device and the size of batches are not among it.

        What only the loaded model knows (LATE) is there if it was asked for, and is added when it is known.
        """
        m, w = self.model, self.writing
        facts: dict[str, Any] = {"task": task, "split": split, "questions": digest(questions)}
        facts |= {"model": m.base or EMBEDDED_NAME, "model files": fingerprint(m.base or EMBEDDED_BASE)}
        facts |= {"R": self.R, "speculation": self.speculation, "max_new_tokens": w.max_new_tokens}
        facts |= {"temperature": w.temperature if w.do_sample else 0.0, "top_p": w.top_p}
        facts["attention"] = m.attn_implementation
        if self.twig_name is not None:
            facts |= {"twig": self.twig_name, "twig files": fingerprint(m.twig or EMBEDDED_TWIG)}
        if self.R is not None:
            facts["pruning"] = w.pruning
            if self._pruning.fitted:
                facts["thresholds"] = thresholds_of(w.pruning, w.query, self.R, self.base_name)
        if w.do_sample or self._pruning.draws:
            facts["seed"] = w.seed
        asked = {"K": m.K, "T": m.T, "dtype": m.dtype and m.dtype.removeprefix("torch.")}
        return facts | self.unusual() | {key: value for key, value in asked.items() if value is not None}


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
