"""A stored twig: our folder, or the release's file or files, with a pruning head or without."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from ..config import DEFAULT_K, FORMAT_VERSION, STARTS, TwigConfig, split_name
from ..errors import InputError
from ..model.pruning_head import NAME as PRUNING_HEAD
from ..model.trunk import Trunk
from ..model.twig import CONFIG, START, TUNED, WEIGHTS, Origin, Twig, recognised, signature, twig_skeleton
from .base import HEAD, MAX_PADDED_ROWS, Loaded
from .find import HUB_FILES, read_json, resolve
from .judge.fields import TEXT, Kind, check_fields, number, up_to, whole
from .weights import Filling, materialise, read_index, read_tensors, weight_files

INDEX = f"{WEIGHTS}.index.json"
LETTER = Kind("a layer's number", lambda v: whole(v) and v >= 0)
COUNT = up_to(2**22)
WEIGHTS_SEEN = Kind("a list of numbers", lambda v: isinstance(v, list) and all(map(number, v)))
DESCRIPTION = {
    "format_version": Kind("a whole number", whole), "L": COUNT, "K": LETTER, "T": COUNT, "F": LETTER, START: TEXT, "base": TEXT,
    "base_revision": TEXT, "base_signature": WEIGHTS_SEEN, "hidden_size": COUNT, "vocabulary": COUNT, TUNED: TEXT,
}  # fmt: skip
COPIES = re.compile(r"(^|\.)bkb_")  # what TwigVLM++'s training stores of the frozen base along with a twig


def load_twig(
    twig: str | Path,
    trunk: Trunk,
    K: int | None,
    T: int | None,
    F: int | None,
    loaded: Loaded | None = None,
    L: int | None = None,
) -> Twig:
    """Read a twig for this base: our folder, or the release's one file (or a folder that holds it).

    `F` overrides the stored wipe layer; of `loaded`, what the trunk was made of, the twig keeps its origin; `L` counts the
    base's layers where the trunk has some of them. Raises InputError when K or T disagree with the file, or the twig
    grew on another base; says on stderr where it grew on another revision of it with the same weights.
    """
    L = trunk.L if L is None else L
    folder, file = _twig_files(resolve(twig, "twig"))
    facts = read_twig_letters(twig, L, trunk.model.config.text_config.hidden_size, K, T)
    files = _weights(file)
    shapes = _shapes(files)
    K = facts.get("K", DEFAULT_K if K is None else K)
    config = TwigConfig(L, K, facts["T"], F if F is not None else facts.get("F", 0), facts.get(START, ""))
    vocabulary = _check_head(file, shapes, trunk)
    module = twig_skeleton(trunk, config, vocabulary)
    materialise(module, trunk.device, trunk.dtype)
    fill_twig(module, files, trunk.device)
    if facts.get("base_signature") is not None:
        _check_signature(folder / CONFIG, facts, trunk, loaded)
    if loaded is not None:
        name = split_name(loaded.name)[0] or loaded.name
        module.origin = Origin(name, loaded.revision, signature(trunk), loaded.folder, folder)
        _compare_revisions(folder / CONFIG, facts, module.origin)
    if tuned := facts.get(TUNED):
        print(
            f"{folder}: this twig learnt behind {tuned}; it is at its best with pruning {tuned}+twig", file=sys.stderr
        )
    return module.eval()


def fill_twig(twig: Twig, files: Sequence[Path], device: torch.device) -> None:
    """The twig's weights from `files`; what TwigVLM++'s training stores of the base along with them is named and left.

    A pruning head that the twig lacks is left as well, and one that the files lack stays as it is.
    """
    names, head = list(_shapes(files)), f"{PRUNING_HEAD}."
    if copies := [name for name in names if COPIES.search(name)]:
        print(f"{files[0]}: {len(copies)} tensors are copies of the base ({copies[0]}, …), not read", file=sys.stderr)
    unread = (lambda name: COPIES.search(name) or name.startswith(head)) if twig.pruning_head is None else COPIES.search
    filling = Filling(twig, lambda name: None if unread(name) else name, "twig")
    if not any(name.startswith(head) for name in names):
        filling.leave(head)
    filling.fill(files, device, files[0], cut_rows=(HEAD,))


class StoredTwig(NamedTuple):
    """Of a twig on this disk: the files with its weights, how its pruning head began ("" if there is none), and what its
    description says (nothing where there is none).
    """

    files: list[Path]
    pruning_head: str
    facts: dict


def stored_twig(twig: str | Path) -> StoredTwig:
    """Our folder, or the release's file or files."""
    folder, file = _twig_files(Path(twig))
    files = _weights(file)
    facts = read_description(folder)
    return StoredTwig(files, _start_of(folder / CONFIG, facts, files), facts)


def read_description(folder: Path) -> dict:
    """twig_config.json, each of its fields of the right kind; nothing where there is none. Raises InputError."""
    facts = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    check_fields(folder / CONFIG, facts, DESCRIPTION)
    return facts


def read_twig_letters(
    twig: str | Path, L: int, hidden_size: int, K: int | None, T: int | None, files: Sequence[str] = HUB_FILES
) -> dict:
    """What a twig's files say of it, without its weights: twig_config.json where there is one, T, and its pruning head.

    `files` are fetched if it is on the hub; T is not known where these leave out the weights of a twig without
    description. Raises InputError when K or T disagree with the files, or a base of L layers with the twig's.
    """
    folder, file = _twig_files(resolve(twig, "twig", files))
    facts = read_description(folder)
    if not file.exists():
        if Path(twig).expanduser().exists():
            raise InputError(f"{file}: no such file; a twig is a folder with {WEIGHTS}")
        stored = {"T": facts["T"]} if "T" in facts else {}  # the weights are not fetched yet
    elif file.name == INDEX and not Path(twig).expanduser().exists():
        stored = {"T": _count_layers(file, read_index(file))}  # nor these
    else:
        found = _weights(file)
        stored = {"T": _count_layers(file, _shapes(found)), START: _start_of(folder / CONFIG, facts, found)}
    if facts:
        _check_description(folder / CONFIG, facts, stored.get("T", facts.get("T")), L, hidden_size)
    facts |= stored
    check_letters(file, {"K": K, "T": T}, facts)
    return facts


def check_letters(file: Path, asked: dict[str, int | None], stored: dict) -> None:
    """Raises InputError where a letter that was asked for is another one in the twig's files."""
    for letter, value in asked.items():
        if value is not None and value != stored.get(letter, value):
            raise InputError(
                f"{file}: {letter} = {value} was asked for, but the twig was grown with {letter} = {stored[letter]}"
            )


def _twig_files(source: Path) -> tuple[Path, Path]:
    """(folder of the description, file of the weights, or of their index where there are several)."""
    file = source
    if source.is_dir():
        file = source / WEIGHTS
        file = source / INDEX if (source / INDEX).exists() and not file.exists() else file
    if file.suffix != ".safetensors" and file.name != INDEX:
        raise InputError(
            f"{file}: a twig is one .safetensors file; convert it, or give the folder that holds {WEIGHTS}"
        )
    return file.parent, file


def _weights(file: Path) -> list[Path]:
    """The shards that an index names, or the one file."""
    return weight_files(file.parent) if file.name == INDEX else [file]


def _shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    return {stored.name: stored.shape for file in files for stored in read_tensors(file, torch.device("cpu"))}


def _start_of(description: Path, facts: dict, files: Sequence[Path]) -> str:
    """How the pruning head began that these files hold, "" where they hold none: as the description or the file says, else
    "released".
    """
    said = facts.get(START)
    if said is not None and said not in STARTS:
        raise InputError(f"{description}: {START} is {said!r}; {' or '.join(STARTS)} is expected")
    holding = [file for file in files if any(name.startswith(f"{PRUNING_HEAD}.") for name in _shapes([file]))]
    if not holding:
        if said is not None:
            raise InputError(
                f"{files[0]}: missing key {PRUNING_HEAD}.q_gate.weight, but {description} says that the twig has a pruning head"
            )
        return ""
    with safe_open(holding[0], framework="pt") as opened:
        noted = (opened.metadata() or {}).get(START)
    if noted is not None and (noted not in STARTS or said not in (None, noted)):
        raise InputError(
            f"{holding[0]}: its pruning head is {noted!r}, but {said!r} is said in {description}"
            if noted in STARTS
            else f"{holding[0]}: its pruning head is {noted!r}; {' or '.join(STARTS)} is expected"
        )
    return said or noted or "released"


def _count_layers(file: Path, names: Iterable[str]) -> int:
    numbers = {int(m[1]) for m in (re.match(r"model\.layers\.(\d+)\.", k) for k in names) if m}
    if not numbers:
        raise InputError(
            f"{file}: no key model.layers.0.*; this is not a twig (lm_head, model.norm, model.layers.0..T-1)"
        )
    if numbers != set(range(len(numbers))):
        raise InputError(f"{file}: layers {sorted(numbers)} found, expected 0 to {max(numbers)} without a gap")
    return len(numbers)


def _check_description(file: Path, facts: dict, stored_T: int, L: int, hidden_size: int) -> None:
    version = facts.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{file}: format version is {version!r}, this program reads {FORMAT_VERSION}")
    if facts.get("T") != stored_T:
        raise InputError(f"{file}: T is {facts.get('T')}, but the weights beside it have {stored_T} layers")
    for letter in ("K", "F"):
        if not isinstance(facts.get(letter), int):
            raise InputError(f"{file}: {letter} is {facts.get(letter)!r}; a layer's number is expected")
    for key, found in (("L", L), ("hidden_size", hidden_size)):
        if facts.get(key) != found:
            raise InputError(
                f"{file}: this twig grew on {facts.get('base')!r} with {key} = {facts.get(key)}, but the base has {key} = {found}; "
                "give the twig of this base"
            )


def _check_head(file: Path, shapes: dict[str, tuple[int, ...]], trunk: Trunk) -> int:
    """Rows of the twig's head: at most the base's.

    A twig of the same base with a padded vocabulary has more, which no word belongs to: they are cut.
    """
    shape, base = shapes.get("lm_head.weight"), tuple(trunk.model.lm_head.weight.shape)
    if shape is None:
        raise InputError(f"{file}: missing key lm_head.weight, expected with shape {list(base)}")
    if len(shape) != 2 or shape[1] != base[1] or abs(shape[0] - base[0]) > MAX_PADDED_ROWS:
        raise InputError(
            f"{file}: key lm_head.weight has shape {list(shape)}, expected {list(base)}: a twig of another base?"
        )
    return min(shape[0], base[0])


def _check_signature(file: Path, facts: dict, trunk: Trunk, loaded: Loaded | None) -> None:
    if recognised(facts["base_signature"], trunk):
        return
    said, found = facts.get("base_revision"), loaded.revision if loaded is not None else None
    grown = f"{facts.get('base')!r}" + (f", revision {said}" if said else "")
    same = loaded is not None and facts.get("base") == split_name(loaded.name)[0]
    remedy = f"load that revision of it: revision={said}" if same and said != found else "give the twig of this base"
    raise InputError(f"{file}: this twig grew on other weights ({grown}) than this base's; {remedy}")


def _compare_revisions(file: Path, facts: dict, origin: Origin) -> None:
    """A word where the base has the weights that the twig knows, and another commit."""
    said, found = facts.get("base_revision"), origin.revision
    if said and found and facts.get("base") == origin.base and said != found:
        print(
            f"{file}: this twig grew on revision {said} of {origin.base}, loaded is {found}, whose weights look the same",
            file=sys.stderr,
        )
