"""Thresholds of a method whose budget depends on picture and question, fitted to R on questions of a benchmark.

One prefill a question and a guess, no answers. What is found lies where `pruning.calibrated` looks for it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ...errors import InputError
from ...files import write_json
from .costs import spread
from .job import Job
from .setting import digest, pruning_of

RANGE = 1e-7, 1e3  # in which thresholds are sought
FEW = 8  # questions of the first guesses
COARSE, FINE = 14, 8  # guesses at most, on few questions and on all
APART = 1.25  # factor by which few questions may be wrong
NEAR = 0.002  # of R, or so many tokens

Measure = Callable[[Any, bool], Sequence[Sequence[float]]]  # method, few → tokens of an image in each layer, a row each


def ensure(count: int | None, jobs: Iterable[Job]) -> None:
    """Calibrate, on `count` questions of the first job that asks for it, every method and R that need it and are not yet."""
    check_count(count)
    for job in jobs if count is not None else ():
        if wanting(job) is not None:
            print(f"calibrating {job.setting.writing.pruning} to R = {job.setting.R:g}", flush=True)
            facts, file = calibrate(job, count)
            print(f"{said(facts)}\ncalibration: {file}", flush=True)


def check_count(count: int | None) -> None:
    if count is not None and count < 1:
        raise InputError(f"--calibrate is {count}; 1 or more questions are needed")


def wanting(job: Job):
    """The method of a job that cannot do without a calibration which is not there, else None."""
    from ...pruning import find_method
    from ...pruning.calibrated import missing, stored

    setting = job.setting
    if setting.R is None or not pruning_of(setting.writing.pruning, setting.writing.query).fitted:
        return None
    method = find_method(setting.writing.pruning, setting.writing.query)
    return method if missing(method) and stored(method, setting.R, setting.base_name) is None else None


def calibrate(job: Job, count: int) -> tuple[dict[str, Any], Any]:
    """Fit the job's method to its R on `count` of its questions; what is kept of it, and the file."""
    from ...model.twig import score_signature, signature
    from ...pruning import Shape, find_method
    from ...pruning.calibrated import file_of, missing, words
    from ...record import provenance
    from .ask import CPU_BATCH, Prepared, batches, open_model

    setting, R = job.setting, float(job.setting.R)
    method = find_method(setting.writing.pruning, setting.writing.query)
    if not missing(method):
        raise InputError(f"{setting.writing.pruning} has no threshold to calibrate; leave --calibrate out")
    questions = sample(job, count)
    vlm = open_model(setting)
    c = vlm.config
    shape = Shape(c.L, c.V, c.K or 0, c.F or c.L, vlm.base_name)
    ready = Prepared(batches([questions], CPU_BATCH), vlm)
    asked = [ready[i] for i in range(len(ready))]
    if broken := [b for one in asked for b in one.broken]:
        raise InputError(f"question {broken[0][0]}: {broken[0][1]}")

    def measure(guess, few: bool) -> list[list[float]]:
        return [row for one in asked[: 1 if few else None] for row in entering(vlm, guess, R, shape, one)]

    found = fit(method, R, shape, measure)
    rows = [statistics.fmean(row) for row in measure(found, False)]
    file = file_of(method, R, vlm.base_name)
    facts = {
        "method": method.name, "settings": words(method), "base": vlm.base_name,
        "base_signature": signature(vlm.trunk), "R": R, **vars(shape),
        "thresholds": {name: getattr(found, name) for name in method.fitted},
        "sample": {"task": job.task.name, "split": job.split, "questions": len(questions), "digest": digest(questions)},
        "measured": spread(rows), "made": provenance(),
    }  # fmt: skip
    if method.needs == "twig":
        facts["twig_signature"] = score_signature(vlm.twig)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(facts, file)
    return facts, file


def sample(job: Job, count: int) -> list:
    """Questions about pictures, evenly from all that the benchmark has."""
    there = [q for q in job.every if q.images]
    if not there:
        raise InputError(f"{job.task.title} asks about no picture; calibrate on another benchmark")
    count = min(count, len(there))
    return [there[i * len(there) // count] for i in range(count)]


def entering(vlm, method, R: float, shape, ready) -> list[list[float]]:
    """Of each prompt, visual tokens of an image that enter each layer."""
    import torch

    from ...decoding.prefill import embed, read

    plan = method.plan(R, shape)
    with torch.inference_mode():
        pixels = torch.from_numpy(ready.pixels)
        state = read(vlm.trunk, vlm.twig if plan.needs_twig else None, plan, embed(vlm.trunk, plan, ready.ids, pixels))
        state.settle()
    layers = [n for run, counts in state.entered for n in [counts.tolist()] * run]
    images = [row.count(vlm.image_token_id) / shape.V for row in ready.ids]
    return [[layer[b] / images[b] for layer in layers] for b in range(len(images))]


# ---------------------------------------------------------------------- fitting


def fit(method, R: float, shape, measure: Measure):
    """The method with thresholds that make the mean over rows what each aims at, one after the other.

    Raises InputError where no threshold does.
    """
    from ...pruning.calibrated import missing

    left = missing(method)
    for name in left:
        layer, aim = method.aim(name, R, shape)
        later = dict.fromkeys(left[left.index(name) + 1 :], 1.0)

        def off(value: float, few: bool, name=name, later=later, layer=layer, aim=aim, method=method) -> float:
            rows = measure(replace(method, **later, **{name: value}), few)
            return statistics.fmean(statistics.fmean(row) if layer is None else row[layer] for row in rows) - aim

        low, high = (off(end, True) for end in RANGE)
        if not min(low, high) <= 0 <= max(low, high):
            raise InputError(
                f"{method.name} leaves {aim + min(low, high):.1f} to {aim + max(low, high):.1f} tokens on this sample, whatever "
                f"{name} is, and {aim:.1f} are wanted; another R can be had"
            )
        method = replace(method, **{name: solve(off, low < high, max(NEAR * aim, NEAR))})
    return method


def solve(off: Callable[[float, bool], float], rising: bool, near: float) -> float:
    """Where `off` of a value is nearest to 0, which it passes but once or so: by halves, on few questions, then on all."""
    bounds = [math.log(end) for end in RANGE]
    sign = 1 if rising else -1
    for _ in range(COARSE):
        middle = sum(bounds) / 2
        wrong = off(math.exp(middle), True)
        bounds[sign * wrong > 0] = middle
        if abs(wrong) <= near:
            break
    bounds = [sum(bounds) / 2 - math.log(APART), sum(bounds) / 2 + math.log(APART)]
    ends = [off(math.exp(b), False) for b in bounds]
    for side, way in ((0, -1), (1, 1)):  # few questions were wrong by more
        while sign * way * ends[side] < 0 and abs(bounds[side]) < 30:
            bounds[side] += way * math.log(APART) * 2
            ends[side] = off(math.exp(bounds[side]), False)
    tried = list(zip(map(abs, ends), bounds, strict=True))
    for step in range(FINE):
        share = ends[0] / (ends[0] - ends[1]) if ends[0] != ends[1] and step % 3 < 2 else 0.5
        middle = bounds[0] + min(max(share, 0.05), 0.95) * (bounds[1] - bounds[0])
        wrong = off(math.exp(middle), False)
        tried.append((abs(wrong), middle))
        if abs(wrong) <= near:
            break
        side = int(sign * wrong > 0)
        bounds[side], ends[side] = middle, wrong
    return float(f"{math.exp(min(tried)[1]):.6g}")


def said(facts: dict[str, Any]) -> str:
    """A calibration in a line."""
    m, s = facts["measured"], facts["sample"]
    values = ", ".join(f"{name} = {value:g}" for name, value in facts["thresholds"].items())
    return (
        f"{facts['settings']} at R = {facts['R']:g}: {values}; {m['mean']:.1f} tokens a layer on {s['questions']} questions of "
        f"{s['task']} (sd {m['sd']:.1f}, 5 to 95 %: {m['5%']:.1f} to {m['95%']:.1f})"
    )
