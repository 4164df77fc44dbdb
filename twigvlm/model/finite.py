"""Numbers that are no numbers: noticed where the loop reads tokens anyway, and only then traced to their layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..errors import RunError
from .trunk import Trunk
from .twig import Twig


class NotFinite(RunError):
    """Logits that are no numbers were about to become a token."""


def finite(logits: torch.Tensor) -> torch.Tensor:
    """[..., vocabulary] → [...] bool on the same device: one kernel, no wait."""
    return logits.sum(-1).isfinite()


def trace(
    trunk: Trunk, twig: Twig | None, rows: Sequence[Sequence[int]], pixel_values: torch.Tensor | None
) -> RunError:
    """Read the rows (prompts and what was written) once more, layer by layer: an error that names the first culprit."""
    if pixel_values is not None and not pixel_values.isfinite().all():
        return RunError("pixel_values hold numbers that are not finite; make them again from the picture")
    owner = dict(trunk.model.named_parameters()) | (dict(twig.named_parameters(prefix="twig")) if twig else {})
    names = {id(parameter): name for name, parameter in owner.items()}
    for name, module, good in _stations(trunk, twig, rows, pixel_values):
        if not good:
            spoilt = next((names.get(id(p)) for p in module.parameters() if not p.isfinite().all()), None)
            remedy = (
                f"its weights hold such numbers ({spoilt}): fetch them again"
                if spoilt
                else f"its weights are finite, {trunk.dtype} overflows: use bfloat16 or float32"
            )
            return RunError(f"numbers that are not finite come from {name}; {remedy}")
    return RunError(
        "the logits of a token are not finite, but reading the prompt once more gives none such: "
        "a logits processor forbids every token, or the device computes wrongly"
    )


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
