"""What a generation was like: words, drafts, visual tokens, times, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..pruning import find_method
from ..record import tokens_per_step
from .drafting import hit_rates
from .loop import Decoder, Step


@dataclass(frozen=True)
class ModelConfig:
    """The paper's letters for this model; K, T and F are None without a twig."""

    L: int
    V: int
    K: int | None
    T: int | None
    F: int | None


@dataclass(frozen=True)
class Stats:
    """Figures of one `generate`, over all rows of the batch.

    Times are wall clock, the device synchronised; "prefill" ends with the first token (the first
    drafts are verified in the same forward), "decode" is all after it.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decode_tokens_per_second: float | None  # None when nothing came after the first step
    tokens_per_second: float  # prefill included, as the paper counts
    steps: int
    drafted: int
    accepted: int
    acceptance: float | None  # accepted / drafted; None without drafts
    draft_shape: str  # none, chain or tree E,W,D,N, and why where it is not the one asked for
    tokens_per_step: float  # tau: what a verification yields, its own token included; 1 without drafts
    hit_rates: list[
        float
    ]  # by depth: how often a drafted token (or one of several) was right where those before it were
    visual_tokens: int  # in the prompts
    visual_kept: int  # by the first cut: between K and F, with the twig
    visual_asked: float | None  # R
    visual_measured: float  # average per base layer and image
    visual_by_layer: list[float]  # of an image, entering each base layer
    visual_authors: float | None  # the same as the method's authors count it; None where nothing is pruned
    visual_rows: list[float | None]  # of an image, average per base layer, of each row; None without one
    visual_twig_share: float  # the twig's own visual tokens, T * V / L, on top
    cache_bytes: int  # allocated for keys and values, the most at once; grows in steps with what is written
    cache_bytes_used: int  # filled, the most at once


def measure(
    decoder: Decoder,
    config: ModelConfig,
    rows: Sequence[Sequence[Step]],
    kept: Sequence[torch.Tensor] | None,
    prompt_tokens: int,
    seconds: tuple[float, float],
    drafts: str,
) -> Stats:
    """The figures of a generation that is done; `seconds` of prefill and of decoding, `kept` by row, `drafts` their name."""
    prefill, decode = seconds
    steps = [s for row in rows for s in row]
    new = sum(len(s.tokens) for s in steps)
    late = new - sum(len(row[0].tokens) for row in rows)
    drafted, accepted = sum(len(s.drafted) for s in steps), sum(s.accepted for s in steps)
    state = decoder.state
    visual = sum(state.totals)
    images = visual / config.V
    by_layer = [n for layers, counts in state.entered for n in [int(counts.sum()) / max(images, 1)] * layers]
    twig_tokens = config.T * config.V / config.L if decoder.twig is not None and images else 0.0
    return Stats(
        prompt_tokens=prompt_tokens,
        new_tokens=new,
        prefill_seconds=prefill,
        decode_seconds=decode,
        decode_tokens_per_second=late / decode if late and decode > 0 else None,
        tokens_per_second=new / (prefill + decode),
        steps=len(steps),
        drafted=drafted,
        accepted=accepted,
        acceptance=accepted / drafted if drafted else None,
        draft_shape=drafts,
        tokens_per_step=tokens_per_step(accepted, len(steps)),
        hit_rates=hit_rates(steps),
        visual_tokens=visual,
        visual_kept=sum(map(len, kept)) if kept is not None else visual,
        visual_asked=decoder.settings.retained_tokens,
        visual_measured=sum(by_layer) / config.L if images else 0.0,
        visual_by_layer=by_layer,
        visual_authors=find_method(decoder.settings.pruning).authors(by_layer) if decoder.plan and images else None,
        visual_rows=state.per_image(),
        visual_twig_share=twig_tokens,
        cache_bytes=state.bytes,
        cache_bytes_used=state.bytes_used,
    )
