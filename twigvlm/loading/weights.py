"""Tensors from files into modules: strict, one tensor at a time, straight to the wanted dtype and device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import InputError, RunError
from ..files import check_regular, exists
from ..model.finite import place_of, sound, spoilt
from .find import read_json
from .judge.fields import shown

SINGLE = ("model.safetensors", "pytorch_model.bin")
NESTS = ("state_dict", "model_state_dict", "module", "model")  # where training frameworks put the tensors
WRAPPER = "module."  # what data-parallel training puts before every name
FLOATS = {"F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}
QUANTISED = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".absmax",
    ".quant_map",
    ".SCB",
    "_scale",
    "_scale_inv",
    "_packed",
    "_zero_point",
)
SHARD = re.compile(r"[^/\\\0]+\.(safetensors|bin)")  # a plain name
IGNORED = (".rotary_emb.inv_freq", ".embeddings.position_ids")  # buffers that old versions stored


def weight_files(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[Path]:
    """The shards of a checkpoint folder: .safetensors before .bin, an index before a single file.

    Of several shards only those that hold a `wanted` tensor (by its stored name) are named and must be there.
    """
    for name in SINGLE:
        index = folder / f"{name}.index.json"
        if exists(index):
            shards = sorted({shard for name, shard in read_index(index).items() if wanted(name)})
            missing = [s for s in shards if not exists(folder / s)]
            if missing:
                raise InputError(
                    f"{folder}: {len(missing)} of {len(shards)} shards are missing, first {shown(missing[0])}; fetch them"
                )
            return [folder / s for s in shards]
        if (folder / name).exists():
            return [folder / name]
    raise InputError(f"{folder}: no weights; expected {' or '.join(SINGLE)} or their .index.json")


def find_index(folder: Path) -> Path | None:
    """The index that `weight_files` goes by."""
    for name in SINGLE:
        index = folder / f"{name}.index.json"
        if index.exists() or (folder / name).exists():
            return index if index.exists() else None
    return None


def read_index(index: Path) -> dict[str, str]:
    """Tensor → shard, of the index of several. No shard lies outside the index's folder. Raises InputError."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise InputError(f"{index}: not a weight index (its weight_map is {shown(places)}); fetch the file again")
    for name, shard in places.items():
        if not (isinstance(shard, str) and SHARD.fullmatch(shard)):
            raise InputError(
                f"{index}: the shard of {shown(name)} is {shown(shard)}; the name of a .safetensors or .bin file beside "
                "the index is needed, fetch it again"
            )
    return places


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; nothing is read before `read` is called."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors says it for its files, as torch says it for others
    read: Callable[[], torch.Tensor]


def read_tensors(file: Path, device: torch.device) -> Iterator[Stored]:
    """Every tensor of a weight file. Raises InputError for a damaged file, or one that holds something else."""
    check_regular(file)
    if file.suffix == ".bin":
        for name, tensor in _read_bin(file).items():
            yield Stored(name, tuple(tensor.shape), str(tensor.dtype), lambda tensor=tensor: tensor)
        return
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                yield Stored(name, tuple(part.get_shape()), part.get_dtype(), lambda name=name: opened.get_tensor(name))
    except (SafetensorError, EOFError, RuntimeError, OSError) as fault:
        raise InputError(f"{file}: damaged or not a weight file ({_brief(fault)}); fetch it again") from fault


def _read_bin(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by torch, which may nest them as a trainer's checkpoint does."""
    try:
        with open(file, "rb") as opened:
            zipped = opened.read(4) == b"PK\x03\x04"  # torch's older format cannot be mapped into memory
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as fault:  # unpickling a damaged file can raise anything
        raise InputError(f"{file}: damaged or not a weight file ({_brief(fault)}); fetch it again") from fault
    found = _unwrapped(found)
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds a {type(found).__name__}; a table of tensors by their names is needed")
    for name, value in found.items():
        if not (isinstance(name, str) and torch.is_tensor(value)):
            raise InputError(
                f"{file}: key {name} holds a {type(value).__name__}; a table of tensors by their names is needed"
            )
        if value.layout is not torch.strided or value.is_meta:
            what = "of the meta device, without numbers" if value.is_meta else f"stored as {value.layout}"
            raise InputError(
                f"{file}: key {name} is a tensor {what}; dense ones are read: save the checkpoint again with such"
            )
    return found


def _unwrapped(found: Any) -> Any:
    """The table inside those of a trainer, and its names without what wrappers of data-parallel training put before all."""
    for _ in NESTS:
        if isinstance(found, dict):
            found = next((found[key] for key in NESTS if isinstance(found.get(key), dict)), found)
    if isinstance(found, dict) and found and all(isinstance(n, str) and n.startswith(WRAPPER) for n in found):
        found = {name.removeprefix(WRAPPER): value for name, value in found.items()}
    return found


def _brief(fault: Exception) -> str:
    return " ".join(str(fault).split())[:200] or type(fault).__name__


def materialise(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module built on the meta device real, uninitialised parameters and its real buffers."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if hasattr(parameter, "receive"):  # of a packed layer: there is never a whole one
                continue
            empty = torch.empty(parameter.shape, device=device, dtype=dtype)
            setattr(owner, name, nn.Parameter(empty, requires_grad=False))
        if any(b.is_meta for b in owner.buffers(recurse=False)):
            # Rotary frequencies and position numbers: computed by the constructor, stored nowhere.
            real = dict(type(owner)(owner.config).named_buffers(recurse=False))
            for name, buffer in list(owner.named_buffers(recurse=False)):
                owner.register_buffer(
                    name, real[name].to(device), persistent=name not in owner._non_persistent_buffers_set
                )
                assert buffer.shape == real[name].shape


class Filling:
    """The parameters of a module, ticked off as files fill them.

    `rename` maps a name, in a file or in the module, to its canonical form (None: not wanted), so
    that every published naming of the same tensor meets. `select` maps a canonical name of a file to
    the module's, where the module holds a part of what the file has (None: not wanted, not read).
    `what` the module is, for errors. To plan, shapes are enough: the module may be on the meta device.
    """

    def __init__(
        self,
        module: nn.Module,
        rename: Callable[[str], str | None],
        what: str,
        select: Callable[[str], str | None] = lambda name: name,
    ):
        self.module, self.rename, self.what, self.select = module, rename, what, select
        self.open = {name: tuple(parameter.shape) for name, parameter in self._parameters().items()}
        self.filled: dict[str, Path] = {}
        self._plans: list[tuple[Path, dict[str, str]]] = []

    def leave(self, prefix: str) -> None:
        """What has such a canonical name is filled from elsewhere."""
        self.open = {name: shape for name, shape in self.open.items() if not name.startswith(prefix)}

    def fill(self, files: Sequence[Path], device: torch.device, where: Path, cut_rows: Sequence[str] = ()) -> None:
        """`plan` and `read`."""
        self.plan(files, where, cut_rows=cut_rows)
        self.read(device)

    def judge(self, index: Path, names: Iterable[str]) -> None:
        """Raise InputError for names, as an index tells them, that `plan` will refuse."""
        for name in names:
            self._place(index, name)

    def plan(
        self,
        files: Sequence[Path],
        where: Path,
        padded_rows: Sequence[str] = (),
        cut_rows: Sequence[str] = (),
        optional: Sequence[str] = (),
    ) -> None:
        """What is to be read from these files: names, shapes and types of all are checked, and nothing is read.

        Tensors named in `padded_rows` may have fewer rows than the parameter, the rest becomes zero;
        of those in `cut_rows` the first rows are taken; those in `optional` may be missing, and stay
        in `open`. Raises InputError for unexpected names, wrong shapes, quantised weights, and,
        naming `where`, for what no file fills.
        """
        self._plans = [(file, self._plan(file, padded_rows, cut_rows)) for file in files]
        missing = [name for name in self.open if name not in optional]
        if missing:
            first = min(missing)
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise InputError(f"{where}: missing key {first}, expected with shape {list(self.open[first])}{more}")

    def read(self, device: torch.device) -> None:
        """Fill as planned, each number looked at: no kernel of attention can be relied on to let what is none through.

        Raises RunError for a tensor that is not finite. The device is waited for once, at the end.
        """
        parameters = self._parameters()
        marks = {}
        for file, plan in self._plans:
            for stored in read_tensors(file, device):
                if stored.name in plan:
                    marks[file, stored.name] = _copy(stored, parameters[plan[stored.name]])
        if bad := spoilt(marks):
            file, name = bad
            again = [stored.read() for stored in read_tensors(file, torch.device("cpu")) if stored.name == name]
            check_finite(file, {name: again[0]}, self.what)
            raise RunError(
                f"{file}: key {name} is finite as stored, and too large for a smaller type: use bfloat16 or float32"
            )

    def _parameters(self) -> dict[str | None, nn.Parameter]:
        # Those that are tied on the meta device are two once they have memory.
        return {self.rename(name): p for name, p in self.module.named_parameters(remove_duplicate=False)}

    def _plan(self, file: Path, padded_rows: Sequence[str], cut_rows: Sequence[str]) -> dict[str, str]:
        """Stored name → the name of the parameter that it fills, ticked off."""
        plan = {}
        for stored in read_tensors(file, torch.device("cpu")):
            name = self._place(file, stored.name, stored.dtype)
            if name is None:
                continue
            expected, shape = self.open[name], stored.shape
            rows = shape[:1] < expected[:1] if name in padded_rows else shape[:1] > expected[:1] and name in cut_rows
            if shape != expected and not (rows and shape[1:] == expected[1:]):
                raise InputError(f"{file}: key {stored.name} has shape {list(shape)}, expected {list(expected)}")
            plan[stored.name] = name
            self.filled[name] = file
            del self.open[name]
        return plan

    def _place(self, file: Path, stored: str, dtype: str | None = None) -> str | None:
        """The name of the parameter that a stored tensor fills; None where it is not wanted."""
        name = self.rename(stored)
        name = None if name is None else self.select(name)
        if name is None or stored.endswith(IGNORED):
            return None
        if stored.endswith(QUANTISED) or (name in self.open and dtype is not None and dtype not in FLOATS):
            raise InputError(
                f"{file}: key {stored}{f' ({dtype})' if dtype else ''} belongs to quantised weights; only float32, float16 and "
                "bfloat16 weights are read: give the checkpoint that this one was made from, with --load-8bit or --load-4bit"
            )
        if name in self.filled:
            raise InputError(f"{file}: key {stored} appears again; it is in {self.filled[name].name} already")
        if name not in self.open:
            raise InputError(f"{file}: unexpected key {stored}; the configuration has no such tensor")
        return name


def _copy(stored: Stored, parameter: nn.Parameter) -> torch.Tensor:
    """Fill a parameter; whether it is finite, on the device."""
    with torch.no_grad():
        if hasattr(parameter, "receive"):  # loading.quantise
            weight = stored.read()
            parameter.receive(weight)
            return sound(weight)
        if not stored.shape:
            parameter.copy_(stored.read())
            return sound(parameter)
        rows = min(stored.shape[0], parameter.shape[0])
        parameter[:rows].copy_(stored.read()[:rows])
        parameter[rows:].zero_()
        return sound(parameter)


def check_finite(file: Path, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raises RunError naming the first tensor of `what` that is not finite. The device is waited for once."""
    if name := spoilt({name: sound(tensor) for name, tensor in tensors.items()}):
        raise RunError(
            f"{file}: the numbers of {place_of(name, what)} are not finite (key {name}); fetch the file again"
        )
