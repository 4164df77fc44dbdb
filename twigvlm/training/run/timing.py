"""Where a training step's time goes: seconds by part, and of whole steps."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("trunk", "twig", "optimizer")  # what a step must do
ASIDE = ("saving", "measuring")  # what stands between steps and belongs to none


class StepTimes:
    """Adds up wall seconds by part, and the seconds from step to step less what stands aside.

    On a GPU a part ends when its kernels have, which costs time itself: only steps that begin while
    `exact` are counted there.
    """

    def __init__(self, device: torch.device | None = None):
        self.cuda = device is not None and device.type == "cuda"
        self.exact = self.counting = True
        self.steps, self.total = 0, 0.0
        self.seconds: dict[str, float] = defaultdict(float)
        self._current: dict[str, float] = defaultdict(float)
        self._began: float | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            if self.counting:
                self.add(name, self.now() - start)

    def add(self, name: str, seconds: float) -> None:
        self._current[name] += seconds

    def step(self) -> None:
        """A step has ended here. The first one warms up and is not counted."""
        now = self.now()
        if self._began is not None and (self.exact or not self.cuda):
            self.steps += 1
            self.total += now - self._began - sum(self._current[name] for name in ASIDE)
            for name, seconds in self._current.items():
                self.seconds[name] += seconds
        self._current.clear()
        self._began = now

    def now(self) -> float:
        if self.cuda and self.exact:
            torch.cuda.synchronize()
        return time.perf_counter()

    def summary(self) -> dict[str, float]:
        """Mean seconds of a step and of its parts, the ratio to their sum, and the share spent waiting for data."""
        if not self.steps:
            return {}
        parts = {f"{name}_seconds": self.seconds[name] / self.steps for name in PARTS}
        step, waiting = self.total / self.steps, self.seconds["waiting"] / self.steps
        return {
            "step_seconds": step,
            **parts,
            "step_over_parts": step / max(sum(parts.values()), 1e-9),
            "waiting_share": waiting / max(step, 1e-9),
        }
