"""Numbers that are no numbers: weights are looked at when they are read, answers where the loop reads tokens anyway, and
only then traced to their layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TypeVar

import torch
from torch import nn

from ..errors import RunError
from .trunk import Trunk
from .twig import Twig

Key = TypeVar("Key")


class NotFinite(RunError):
    """Logits that are no numbers were about to become a token."""


class ScoresNotFinite(NotFinite):
    """Visual tokens were chosen by scores that are no numbers."""

    def __init__(self, twig: bool):
        super().__init__(f"the {'twig' if twig else 'base'}'s scores of visual tokens are not finite")


def sound(weight: torch.Tensor) -> torch.Tensor:
    """[] bool on the same device: whether all of it is finite. Nothing of its size is made, as `isfinite` would."""
    if not weight.numel():
        return torch.ones((), dtype=torch.bool, device=weight.device)
    least, most = weight.aminmax()  # NaN is both
    return least.isfinite() & most.isfinite()


def spoilt(marks: Mapping[Key, torch.Tensor]) -> Key | None:
    """The first whose mark (`sound`) is false: one read of the device."""
    if not marks:
        return None
    first = next(iter(marks.values()))
    good = torch.stack([mark.to(first.device) for mark in marks.values()]).tolist()
    return next((key for key, fine in zip(marks, good, strict=True) if not fine), None)


def place_of(name: str, what: str) -> str:
    """Where in a model a tensor of this name is; `what` it belongs to unless its name says more."""
    if "projector" in name:
        return "the projector"
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    what = "vision tower" if "vision_tower" in name else what
    return f"layer {layer[1]} of the {what}" if layer else f"the {what}"


def finite(logits: torch.Tensor) -> torch.Tensor:
    """[..., vocabulary] → [...] bool on the same device: one kernel, no wait."""
    return logits.sum(-1).isfinite()


def trace(
    trunk: Trunk,
    twig: Twig | None,
    rows: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | None,
    fault: NotFinite | None = None,
) -> RunError:
    """Read the rows (prompts and what was written) once more, layer by layer: an error that names the first culprit.

    `fault` is what was noticed. Where no layer shows it (some attention lets such scores vanish; a drafted word is not
    among the rows) the weights are looked at.
    """
    if pixel_values is not None and not pixel_values.isfinite().all():
        return RunError("pixel_values hold numbers that are not finite; make them again from the picture")
    for place, module, good in _stations(trunk, twig, rows, pixel_values):
        if not good:
            inside = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
            return _comes_from(place, trunk.dtype, _first_spoilt(trunk, twig, inside))
    if bad := _first_spoilt(trunk, twig):
        return _comes_from(place_of(bad, "twig" if bad.startswith("twig.") else "base"), trunk.dtype, bad)
    if isinstance(fault, ScoresNotFinite):
        return RunError(f"{fault}; its weights are, {trunk.dtype} overflows: use bfloat16 or float32")
    return RunError(
        "the logits of a token are not finite, but reading the prompt once more gives none such: "
        "a logits processor forbids every token, or the device computes wrongly"
    )


def _first_spoilt(trunk: Trunk, twig: Twig | None, inside: Set[int] | None = None) -> str | None:
    """The name of the first weight (of those `inside`, by their id) that is not finite."""
    found = {}
    for prefix, module in (("", trunk.model), ("twig", twig)):
        if module is not None:
            found |= {**dict(module.named_parameters(prefix)), **dict(module.named_buffers(prefix))}
    plain = (torch.Tensor, nn.Parameter)  # not torchao's own, which cannot be asked
    found = {name: tensor for name, tensor in found.items() if inside is None or id(tensor) in inside}
    return spoilt({name: sound(tensor) for name, tensor in found.items() if type(tensor) in plain})


def _comes_from(place: str, dtype: torch.dtype, weight: str | None) -> RunError:
    remedy = (
        f"its weights hold such numbers ({weight}): fetch them again"
        if weight
        else f"its weights are finite, {dtype} overflows: use bfloat16 or float32"
    )
    return RunError(f"numbers that are not finite come from {place}; {remedy}")


def _stations(trunk: Trunk, twig: Twig | None, rows, pixel_values) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, whether all that left it is finite) on the way of a prompt."""
    if pixel_values is not None:
        yield from _seen(trunk, pixel_values)
    lengths = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for out, row in zip(ids, rows, strict=True):
        out[: len(row)] = torch.tensor(row)
    stream = trunk.embed(ids, lengths, pixel_values)
    real = stream.real()
    yield "the embeddings", trunk.decoder.embed_tokens, _good(stream.hidden[real])
    below = stream
    for i, layer in enumerate(trunk.layers):
        stream = trunk.run([layer], stream)
        yield f"layer {i} of the base", layer, _good(stream.hidden[real])
        if twig is not None and i + 1 == twig.config.K:
            below = stream
    yield "the base's norm", trunk.decoder.norm, _good(trunk.decoder.norm(stream.hidden[real]))
    yield "the base's head", trunk.family.head, _good(trunk.logits(stream.hidden[real][-1:]))
    if twig is None:
        return
    for i, layer in enumerate(twig.layers):
        below = trunk.run([layer], below)
        yield f"layer {i} of the twig", layer, _good(below.hidden[real])
    yield "the twig's norm or head", twig, _good(twig.logits(below.hidden[real][-1:]))


def _seen(trunk: Trunk, pixel_values: torch.Tensor) -> Iterator[tuple[str, nn.Module, bool]]:
    parts = trunk.model.model
    out = parts.vision_tower(pixel_values.to(trunk.device, trunk.dtype), output_hidden_states=True)
    modules = [parts.vision_tower, *parts.vision_tower.encoder.layers]
    for i, (hidden, module) in enumerate(zip(out.hidden_states, modules, strict=False)):
        name = f"layer {i - 1} of the vision tower" if i else "the vision tower's embeddings"
        yield name, module, _good(hidden)
    yield "the projector", parts.multi_modal_projector, _good(torch.cat(trunk.image_features(pixel_values)))


def _good(values: torch.Tensor) -> bool:
    return bool(values.isfinite().all())
