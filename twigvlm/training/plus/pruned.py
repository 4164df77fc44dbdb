"""The base above layer K on kept sets that are given: the road of inference (decoding.prefill), from states that left layer K-1.

Legend: B rows, S tokens, G sets of each row, P places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...config import TwigConfig
from ...decoding.prefill import Prompts, State
from ...model.stream import Stream
from ...model.trunk import Trunk
from ...pruning import Given, Plan, Wipe


def plan_of(kept: torch.Tensor, most: int, config: TwigConfig) -> Plan:
    """The twig's plan with its choice made: `kept` [B, P] bool over the places, no row more than `most`; no image from F on."""
    wipe = ((config.F, Wipe()),) if config.F < config.L else ()
    return Plan(((config.K, Given(kept, most)), *wipe))


def pruned_top(base: Trunk, states: Stream, kept: torch.Tensor, most: int, config: TwigConfig) -> Stream:
    """What leaves the last layer when of the visual tokens those under `kept` [B, S] alone go on from layer K."""
    state = _state(base, states, kept, most, config)
    return state.climb(state.awaiting, state.high)


@dataclass
class Beginning:
    """The text before the first image above layer K, once for all sets: causal, so no kept set changes it."""

    base: Trunk
    config: TwigConfig
    states: Stream
    first: torch.Tensor  # B, where the first image begins

    def __post_init__(self) -> None:
        before = self.states.place < self.first[:, None]
        part = self._part(before)
        nothing = torch.zeros_like(part.place, dtype=torch.bool)
        self.read = None
        if part.width:
            self.read = _state(self.base, part, nothing, 0, self.config)
            self.read.settle()
        self.rest = self._part(~before)

    def _part(self, mask: torch.Tensor) -> Stream:
        mask = mask & self.states.real()
        return self.states.keep(mask, int(mask.sum(1).max()))

    def top(self, kept: torch.Tensor, most: int) -> Stream:
        """What leaves the last layer of everything behind the beginning, for kept sets [G, B, S]: G x B rows.

        Every group of layers is forgotten once it is left, so that only one group's keys are held besides the beginning's.
        """
        G, B, S = kept.shape
        rows = torch.arange(B, device=kept.device).repeat(G)
        state = _state(self.base, self.states.select(rows), kept.reshape(G * B, S), most, self.config)
        stream = self.rest.select(rows)
        for i, segment in enumerate(state.high):
            if self.read is not None:
                segment.cache.begin_behind(self.read.high[i].cache, rows)
            stream = state.climb(stream, [segment])
            segment.cache.forget()
        return stream


def _state(base: Trunk, states: Stream, kept: torch.Tensor, most: int, config: TwigConfig) -> State:
    image = base.image_token_id  # ids are asked for their number and for which are images, for nothing else
    counts = states.count().tolist()
    marks = torch.where(states.visual >= 0, image, -1).tolist()
    ids = [row[:n] for row, n in zip(marks, counts, strict=True)]
    return State(base, None, plan_of(kept, most, config), Prompts(states, ids), above=config.K)
