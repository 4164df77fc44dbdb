"""Parts of models, and models in formats of other programs, told by the names of files and of tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError

WEIGHTS = ("model*.safetensors*", "pytorch_model*")
LORA = (
    "holds a LoRA adapter only ({}), which means nothing without the model that it is trained on; "
    "merge it into that model (peft's merge_and_unload), save the result, and give its folder"
)
PROJECTOR = (
    "holds a projector only ({}: LLaVA's first stage of training); "
    "the decoder's weights are missing: give the folder of a finished model"
)
OTHERS = (
    "holds weights in another program's format ({}: {}); give the checkpoint in the Hugging Face layout or LLaVA's own"
)
FILES = {  # in a folder without weights of a model
    "adapter_model.*": LORA,
    "non_lora_trainables.bin": LORA,
    "mm_projector.*": PROJECTOR,
    "*.gguf": OTHERS.format("{}", "llama.cpp's"),
    "consolidated*": OTHERS.format("{}", "Meta's or Mistral's"),
}
ADAPTED = re.compile(r"(^base_model\.model\.|\.lora_[AB]\.)")


def part_of(folder: Path) -> str | None:
    """What a folder holds in place of a model's weights."""
    if any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        return None
    found = ((words, sorted(folder.glob(pattern))) for pattern, words in FILES.items())
    return next((words.format(files[0].name) for words, files in found if files), None)


def check_whole(where: Path, names: Sequence[str]) -> None:
    """Raises InputError where all that a model's files hold is a part of one."""
    if adapted := [name for name in names if ADAPTED.search(name)]:
        raise InputError(f"{where}: {LORA.format(f'key {adapted[0]}')}")
    if names and all("projector" in name for name in names):
        raise InputError(f"{where}: {PROJECTOR.format(f'key {min(names)}')}")


def check_depth(where: Path, names: Sequence[str], layers: str, wanted: int) -> None:
    """Raises InputError where the weights, by their canonical names, have fewer `layers` than a description says.

    It comes before a model is made: a million layers take minutes.
    """
    held = {match[1] for name in names if (match := re.match(rf"{re.escape(layers)}\.(\d+)\.", name))}
    if len(held) < wanted:
        raise InputError(
            f"{where}: missing layers: {len(held)} of the {wanted} that config.json says have weights ({layers}.*); "
            "fetch both from one place"
        )
