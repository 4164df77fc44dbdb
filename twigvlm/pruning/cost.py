"""What a plan costs, counted by arithmetic: floating-point operations of a prefill, bytes of cache behind it.

A multiplication and an addition are two operations, matrix products alone are counted, attention over
the full square, as torch's FlopCounterMode does; the tests hold one against the other. Legend: S tokens
of a layer, D width, H feed-forward width, Q asked rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .reducer import ALL

if TYPE_CHECKING:
    from .plan import Plan


@dataclass(frozen=True)
class Sizes:
    """Of a base and its twig: everything that work and memory follow from."""

    L: int
    D: int
    H: int
    heads: int
    key_heads: int
    width: int  # of a head
    vocabulary: int
    V: int
    tower_layers: int  # that run when nobody looks in
    tower_D: int
    tower_H: int
    class_tokens: int
    patch: int  # numbers of one, 3 x 14 x 14
    K: int = 0
    T: int = 0  # 0: no twig
    element: int = 2  # bytes of a number in the cache
    pruning_head: bool = False  # of the twig

    @classmethod
    def of(cls, config: Any, K: int = 0, T: int = 0, element: int = 2, pruning_head: bool = False) -> Sizes:
        """From a LlavaConfig and the letters of a twig."""
        text, vision, last = config.text_config, config.vision_config, config.vision_feature_layer
        V = (vision.image_size // vision.patch_size) ** 2
        default = config.vision_feature_select_strategy == "default"
        return cls(
            L=text.num_hidden_layers, D=text.hidden_size, H=text.intermediate_size, heads=text.num_attention_heads,
            key_heads=text.num_key_value_heads, width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocabulary=text.vocab_size, V=V if default else V + 1,
            tower_layers=last if last >= 0 else vision.num_hidden_layers + last + 1,
            tower_D=vision.hidden_size, tower_H=vision.intermediate_size,
            class_tokens=int("clip" in vision.model_type), patch=3 * vision.patch_size**2, K=K, T=T, element=element,
            pruning_head=pruning_head,
        )  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of one prompt with one picture. `cache_bytes` are the base's, after prefill; the twig's stand beside them."""

    tower: int
    layers: int
    twig: int
    scoring: int
    head: int
    cache_bytes: int
    twig_bytes: int

    @property
    def flops(self) -> int:
        return self.tower + self.layers + self.twig + self.scoring + self.head


def cost(plan: Plan, sizes: Sizes, text: int) -> Cost:
    """Of a prompt with `text` text tokens (those after the picture count as asked ones where a rule asks for text)."""
    visual = plan.tokens_per_layer(sizes.L, sizes.V)
    entering = [n + text for n in visual]
    before = (plan.tower.most(sizes.V) if plan.tower is not None else sizes.V) + text  # a cut may stand before layer 0
    layers = sum(_layer(S, sizes) for S in entering)
    twig = sizes.T * _layer(entering[sizes.K - 1] if sizes.K else before, sizes) if plan.needs_twig else 0
    scoring = 0
    for probe in {rule.probe for _, rule in plan.stages if rule.probe is not None}:
        at = {"layer": probe.layer, "peek": (probe.layer or 0) - 1}.get(probe.source, sizes.K - 1)
        S = entering[at] if at >= 0 else before
        Q = 1 if probe.rows == "last" else text
        if probe.source == "head" or (probe.source == "twig" and sizes.pruning_head):
            S -= text  # it looks at the image alone, through two gates
            scoring += 2 * sizes.D * sizes.width * (Q * sizes.heads + S * sizes.key_heads)
        scoring += 2 * Q * S * sizes.heads * sizes.width
        if probe.source == "peek":
            scoring += 2 * S * sizes.D * sizes.width * (sizes.heads + 2 * sizes.key_heads)
    if plan.evict is not None:
        entering = [S if layer < plan.evict else entering[-1] for layer, S in enumerate(entering)]
    row = 2 * sizes.key_heads * sizes.width * sizes.element
    return Cost(
        tower=_tower(plan, sizes, before - text),
        layers=layers,
        twig=twig,
        scoring=scoring,
        head=2 * sizes.D * sizes.vocabulary,
        cache_bytes=sum(entering) * row,
        twig_bytes=sizes.T * before * row if sizes.T else 0,
    )


def _layer(S: int, sizes: Sizes) -> int:
    """A decoder layer over S tokens: projections, attention, gated feed-forward."""
    projections = 2 * S * sizes.D * sizes.width * (2 * sizes.heads + 2 * sizes.key_heads)
    attention = 4 * S * S * sizes.heads * sizes.width
    return projections + attention + 6 * S * sizes.D * sizes.H


def _tower(plan: Plan, sizes: Sizes, left: int) -> int:
    """Patch embedding, layers, projector of what is left."""
    C, reducer = sizes.tower_D, plan.tower
    read = sizes.tower_layers - 1
    run = sizes.tower_layers + (reducer.beyond if reducer is not None else 0)
    N = sizes.V + sizes.class_tokens
    total = 2 * sizes.V * C * sizes.patch
    for layer in range(run):
        after = reducer.within_tokens(layer, read, N) if reducer is not None else N
        total += 8 * N * C * C + 4 * N * N * C + 4 * after * C * sizes.tower_H
        if reducer is not None and (asked := reducer.listens(layer, read)):
            total += 2 * N * C * (N if asked == ALL else 1)
        N = reducer.between_tokens(layer, read, after) if reducer is not None else after
    projected = left if reducer is None or not reducer.projects_all else sizes.V
    return total + 2 * projected * (C * sizes.D + sizes.D * sizes.D)
