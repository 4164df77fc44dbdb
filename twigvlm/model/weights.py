"""Tensors from files into modules: strict, one tensor at a time, straight to the wanted dtype and device."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import InputError

SINGLE = ("model.safetensors", "pytorch_model.bin")
IGNORED = (".rotary_emb.inv_freq", ".embeddings.position_ids")  # buffers that old versions stored


def weight_files(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[Path]:
    """The shards of a checkpoint folder: .safetensors before .bin, an index before a single file.

    Of several shards only those that hold a `wanted` tensor (by its stored name) are named and must be there.
    """
    for name in SINGLE:
        index = folder / f"{name}.index.json"
        if index.exists():
            try:
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                shards = sorted({shard for name, shard in places.items() if wanted(name)})
            except (ValueError, KeyError, AttributeError) as fault:
                raise InputError(f"{index}: not a weight index ({fault}); fetch the file again") from fault
            missing = [s for s in shards if not (folder / s).exists()]
            if missing:
                raise InputError(
                    f"{folder}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}; fetch them"
                )
            return [folder / s for s in shards]
        if (folder / name).exists():
            return [folder / name]
    raise InputError(f"{folder}: no weights; expected {' or '.join(SINGLE)} or their .index.json")


def read_tensors(file: Path, device: torch.device) -> Iterator[tuple[str, Callable[[], torch.Tensor], tuple[int, ...]]]:
    """(name, reader, shape) of every tensor; nothing is read before the reader is called."""
    try:
        if file.suffix == ".bin":
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            for name, tensor in state.items():
                yield name, lambda tensor=tensor: tensor, tuple(tensor.shape)
            return
        with safe_open(file, framework="pt", device=str(device)) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                shape = tuple(opened.get_slice(name).get_shape())
                yield name, lambda name=name: opened.get_tensor(name), shape
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as fault:
        raise InputError(f"{file}: damaged or not a weight file ({fault}); fetch it again") from fault


def materialise(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module built on the meta device real, uninitialised parameters and its real buffers."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
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
    """

    def __init__(
        self,
        module: nn.Module,
        rename: Callable[[str], str | None],
        select: Callable[[str], str | None] = lambda name: name,
    ):
        self.rename, self.select = rename, select
        self.open = {rename(name): parameter for name, parameter in module.named_parameters()}
        self.filled: dict[str, Path] = {}

    def read(self, file: Path, device: torch.device, only: str = "", padded_rows: tuple[str, ...] = ()) -> None:
        """Fill from one file what its names match; `only` restricts to a canonical prefix.

        Tensors named in `padded_rows` may have fewer rows than the parameter; the rest becomes zero.
        Raises InputError for unexpected names and wrong shapes.
        """
        for stored, reader, shape in read_tensors(file, device):
            name = self.rename(stored)
            name = None if name is None else self.select(name)
            if name is None or stored.endswith(IGNORED) or not name.startswith(only):
                continue
            parameter = self.open.get(name)
            if parameter is None:
                if name in self.filled:
                    raise InputError(
                        f"{file}: key {stored} appears again; it was already read from {self.filled[name].name}"
                    )
                raise InputError(f"{file}: unexpected key {stored}; the configuration has no such tensor")
            expected = tuple(parameter.shape)
            short = name in padded_rows and shape[1:] == expected[1:] and shape[0] <= expected[0]
            if shape != expected and not short:
                raise InputError(f"{file}: key {stored} has shape {list(shape)}, expected {list(expected)}")
            with torch.no_grad():
                parameter[: shape[0]].copy_(reader()) if shape else parameter.copy_(reader())
                if shape != expected:
                    parameter[shape[0] :].zero_()
            self.filled[name] = file
            del self.open[name]

    def finish(self, where: Path) -> None:
        """Raises InputError naming what no file filled."""
        if self.open:
            first = sorted(self.open)[0]
            shape = list(self.open[first].shape)
            raise InputError(
                f"{where}: missing key {first}, expected with shape {shape}"
                + (f" (and {len(self.open) - 1} more)" if len(self.open) > 1 else "")
            )
