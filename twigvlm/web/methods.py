"""The catalogue as the page shows it, and what it may ask of it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..config import DEFAULT_K, DEFAULT_T, TwigConfig
from ..errors import InputError
from ..pruning import METHODS, Method, Shape, find_method, plan_for
from ..pruning.catalogue import COMMON, compact, place_of, reach
from ..pruning.spec import needs_of, shown, some_plan

UNPRUNED = "unpruned"
LONGEST_SPEC = 200  # letters
OWN = {"base"}  # words of a free setting that name no file


def shape_of(vlm: Any) -> Shape:
    """What budgets depend on; the paper's default twig's letters where there is none."""
    letters = vlm.twig.config if vlm.twig else TwigConfig(vlm.config.L, DEFAULT_K, DEFAULT_T)
    return Shape(vlm.config.L, vlm.config.V, letters.K, letters.F, vlm.base_name)


def method_of(spec: str) -> Method:
    """Raises InputError for what is unknown, and for settings that name files: who sees the page may not choose those."""
    if len(spec) > LONGEST_SPEC:
        raise InputError(f"the method has {len(spec)} letters; at most {LONGEST_SPEC} are read, leave settings away")
    found = find_method(spec)
    for part in filter(None, (found, getattr(found, "first", None), getattr(found, "then", None))):
        hints = get_type_hints(type(part))
        for one in fields(part):
            value = getattr(part, one.name)
            if isinstance(value, str) and _free(hints[one.name]) and value not in OWN:
                raise InputError(
                    f"{part.name}:{one.name} names a file or a hub id, which a page may not ask for; leave it away, or run "
                    "cli_demo.py with it"
                )
    return found


def _free(hint: Any) -> bool:
    """Whether any text can stand there."""
    return hint is str or (get_origin(hint) is not Literal and str in get_args(hint))


def overview(vlm: Any) -> list[dict]:
    """Every method of the catalogue, and whether this model can be asked by it."""
    shape, rows = shape_of(vlm), []
    for kind in METHODS.values():
        method = kind()
        needs = needs_of(method)
        rows.append(
            {
                "name": kind.name,
                "paper": kind.paper,
                "summary": kind.summary,
                "acts": place_of(some_plan(method, shape)),
                "needs": needs,
                "settings": [shown(f) for f in fields(method) if f.name not in COMMON],
                "possible": vlm.twig is not None or "twig" not in needs,
            }
        )
    return rows


def schedule(vlm: Any, spec: str, R: float | None) -> dict:
    """Visual tokens that enter each layer, or the reason why R cannot be had. Raises InputError for an unknown method."""
    shape = shape_of(vlm)
    if spec == UNPRUNED or R is None:
        return {"layers": [shape.V] * shape.L, "R": shape.V, "text": f"{shape.V}×{shape.L}", "reason": None}
    method = method_of(spec)
    reason = None
    if vlm.twig is None and "twig" in needs_of(method):
        reason = f"{spec} needs a twig, and none is loaded; choose another method"
    found = reach(method, R, shape)
    reason = reason or found.reason or None
    if reason is None and found.plan.needs_head and not vlm.twig.config.pruning_head:
        reason = f"{spec} asks a pruning head, and this twig has none; take its attention"
    return {
        "layers": None if reason else list(found.layers),
        "R": None if reason else found.R,
        "text": "" if reason else compact(found.layers),
        "reason": reason,
    }


def check(vlm: Any, spec: str, R: float | None) -> None:
    """Raises InputError for a method or a budget that cannot be."""
    if spec == UNPRUNED:
        return
    method_of(spec)
    letters = vlm.twig.config if vlm.twig else TwigConfig(vlm.config.L, DEFAULT_K, DEFAULT_T)
    plan = plan_for(spec, R, vlm.config.V, letters, base=vlm.base_name)
    if vlm.twig is None and plan.needs_twig:
        raise InputError(f"{spec} needs a twig, and none is loaded; choose another method")
