"""Thresholds of methods whose budget depends on picture and question: fitted to R on a sample, kept as JSON, found again.

`python -m twigvlm.evaluation.calibrate` makes them; a method asks `settled`. Settings given by hand go before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import home
from ..model.trunk import Trunk
from ..model.twig import Twig, alike, score_signature, signature
from .plan import Method, Shape

FOLDER = home() / "calibrations"


def missing(method: Method) -> tuple[str, ...]:
    """Settings that a calibration finds and that nobody has given."""
    return tuple(name for name in method.fitted if getattr(method, name) is None)


def settled(method: Method, R: float, shape: Shape) -> Method:
    """The method with the thresholds that were fitted to R on this base. Raises InputError where there are none."""
    if not missing(method):
        return method
    found = stored(method, float(R), shape.base)
    if found is None:
        base = f" --base-model {shape.base}" if shape.base not in ("", "sprout") else ""
        names = ",".join(f"{name}=…" for name in method.fitted)
        raise InputError(
            f"{method.name} keeps as many tokens as picture and question ask for, and no thresholds are known for R = {float(R):g}"
            f"{f' on {shape.base}' if shape.base else ''}; python -m twigvlm.evaluation.calibrate --pruning {words(method)} "
            f"-R {float(R):g}{base} finds them (--calibrate N does so before a run), or give {names}"
        )
    file, facts = found
    for letter in "LVKF" if method.needs == "twig" else "LV":
        if facts.get(letter, getattr(shape, letter)) != getattr(shape, letter):
            raise InputError(
                f"{file} was made for {letter} = {facts[letter]}, and here it is {getattr(shape, letter)}; "
                f"give {method.name} its thresholds by hand"
            )
    return replace(method, **facts["thresholds"])


def stored(method: Method, R: float, base: str) -> tuple[Path, dict[str, Any]] | None:
    """The file of a calibration and what it says; None where there is none. Raises InputError for one that cannot be read.

    One that was made on another base, whose name has the same last part, is none.
    """
    file = file_of(method, R, base)
    facts = _read(file, file.stat().st_mtime_ns) if file.is_file() else None
    return (file, facts) if facts is not None and facts.get("base", base) == base else None


def check(method: Method, R: float, trunk: Trunk, base: str, twig: Twig | None = None) -> None:
    """Raises InputError where the thresholds that the method would take were fitted on other weights than the trunk's.

    Or, where the method asks the twig, with another twig than this one: each scores in its own way.
    """
    found = stored(method, float(R), base) if missing(method) else None
    if found is None:
        return
    own = {"base_signature": (signature(trunk), f"on other weights than these of {base}")}
    if method.needs == "twig" and twig is not None:
        own["twig_signature"] = score_signature(twig), "with another twig than this one, whose scores are others"
    for name, (mine, what) in own.items():
        if name in found[1] and not alike(found[1][name], mine):
            raise InputError(
                f"{found[0]} was made {what}; delete it and calibrate anew "
                f"(python -m twigvlm.evaluation.calibrate --pruning {words(method)} -R {float(R):g})"
            )


def file_of(method: Method, R: float, base: str) -> Path:
    """Where a calibration lies: a folder a base, a file a method with its settings and R."""
    name = f"{words(method).replace(':', '~')}-R{R:g}.json"
    return FOLDER / (re.sub(r"[^\w.+-]+", "-", base.rstrip("/").rsplit("/", 1)[-1]) or "any") / name


def words(method: Method) -> str:
    """The method as it is written, with those settings that are not as usual."""
    said = [(n, getattr(method, n), v) for n, v in usual(method).items() if n not in method.fitted]
    changed = [n if now is True else f"{n}={now}" for n, now, before in said if now != before]
    return f"{method.name}:{','.join(changed)}" if changed else method.name


def usual(method: Method) -> Mapping[str, Any]:
    return vars(type(method)())


@lru_cache(maxsize=64)
def _read(file: Path, _changed: int) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        values = [facts["L"], facts["V"], *facts["thresholds"].values()]
        values += [*facts.get("base_signature", []), *facts.get("twig_signature", [])]
        if not all(isinstance(v, (int, float)) for v in values):
            raise ValueError("numbers are expected")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise InputError(
            f"{file}: no calibration ({' '.join(str(fault).split())}); delete it and calibrate anew"
        ) from None
    return facts
