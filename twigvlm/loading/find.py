"""From a name to a folder on this disk: paths and hub ids."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..config import split_name
from ..errors import InputError, RunError
from ..files import check_regular, exists

HUB_DESCRIPTION = ("*.json", "tokenizer.model", "*.txt", "*.jinja", "README.md")
HUB_FILES = (*HUB_DESCRIPTION, "*.safetensors", "*.bin")


def resolve(name: str | Path, what: str, files: Sequence[str] = HUB_FILES) -> Path:
    """A folder or file on this disk for a path or hub id (of which `files` are fetched into the hub's cache).

    A hub id may have a revision behind it: owner/name@REVISION.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    known, revision = split_name(name)
    if known is None:
        raise InputError(f"{what} {name}: no such folder, and not a hub id of the form owner/name; check the path")
    return _fetch(known, what, files, revision)


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds; None for any other folder."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def fetch_weights(name: str | Path | None, folder: Path, what: str) -> Path:
    """The folder with its weights in it: those of a hub id, whose description is in `folder`, are fetched now.

    Where an index says in which format they are stored, the other format stays on the hub.
    """
    if name is None or Path(name).expanduser().exists():
        return folder
    patterns = ["*.safetensors", "*.bin"]
    for pattern, index in zip(patterns, ("model.safetensors.index.json", "pytorch_model.bin.index.json"), strict=True):
        if (folder / index).exists():
            patterns = [pattern]
            break
    known, revision = split_name(name)
    return _fetch(known, what, patterns, commit_of(folder) or revision)  # what was judged is what is fetched


def _fetch(name: str, what: str, files: Sequence[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), revision=revision))
    except RepositoryNotFoundError as fault:
        raise InputError(
            f"{what} {name}: neither a folder here nor a repository on the hub that you may read; check the name, or "
            "`hf auth login` where it is private"
        ) from fault
    except RevisionNotFoundError as fault:
        raise InputError(
            f"{what} {name}: the hub has no revision {revision!r} of it; give one of its commits, branches or tags"
        ) from fault
    except HFValidationError as fault:
        raise InputError(f"{what} {name}: no such folder, and no possible hub id; check the path") from fault
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise RunError(
            f"{what} {name}: no such folder here, and the hub cannot be reached ({reason}); "
            "check the network, or give a folder"
        ) from fault


def read_json(file: Path) -> dict:
    """The object in a JSON file, with a byte order mark or without. Raises InputError for all else."""
    if not exists(file):
        raise InputError(f"{file}: no such file; is {file.parent} a model folder?")
    check_regular(file)
    try:
        facts = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as fault:
        raise InputError(f"{file}: not readable JSON ({fault}); fetch it again") from fault
    if not isinstance(facts, dict):
        raise InputError(f"{file}: a JSON object is expected, found {type(facts).__name__}; fetch it again")
    return facts
