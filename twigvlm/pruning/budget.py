"""From the asked average R to the number r of visual tokens kept, and back (paper section 3.2, Eq. 4)."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real

from ..errors import InputError

FINEST = 10**6  # denominator of an R
PAPER_L, PAPER_V = 32, 576  # decoder layers and visual tokens of the model that methods give their numbers for
FORMULA = "r = ceil((L*R - K*V) / (F - K)) must lie in 0..V"


def legal_range(L: int, V: int, K: int, F: int) -> tuple[Fraction, Fraction]:
    """Smallest and largest R: no visual token kept between layers K and F, and all V of them."""
    return Fraction(K * V, L), Fraction(K * V + (F - K) * V, L)


def kept_tokens(R: float, L: int, V: int, K: int, F: int) -> int:
    """r = ceil((L*R - K*V) / (F - K)), visual tokens kept of one image's V in layers K..F-1.

    R is the average number of visual tokens per base layer. Raises InputError outside the legal
    range. With F > L the formula stays the paper's; the image is then never wiped.
    """
    exact = within(R, legal_range(L, V, K, F), f"{FORMULA} (L={L}, V={V}, K={K}, F={F})")
    return math.ceil((L * exact - K * V) / (F - K))


def average_tokens(r: int, L: int, V: int, K: int, F: int) -> float:
    """Visual tokens per base layer, averaged, when r of V are kept between K and F and none above."""
    return (K * V + (min(F, L) - K) * r) / L


def within(R: float, legal: tuple[Fraction, Fraction], why: str) -> Fraction:
    """R exactly as it was meant. Raises InputError, with the range and `why`, for an R that is not in it."""
    if isinstance(R, bool) or not isinstance(R, Real) or not math.isfinite(R):
        raise InputError(f"retained tokens R is {R!r}; a number is needed")
    # The number that was meant: 31.6 and 20/3 are stored as a little more, which ceil would see.
    exact = Fraction(float(R)).limit_denominator(FINEST)
    low, high = legal
    if not low <= exact <= high:
        raise InputError(
            f"retained tokens R is {R:g}; legal is {_show(low, math.ceil)} to {_show(high, math.floor)}, because {why}"
        )
    return exact


def at_depth(layers: Sequence[int], L: int, name: str) -> tuple[int, ...]:
    """`layers` of 32 at the same depths of a decoder of L layers, each of its own and none before 1.

    Raises InputError where L has no room for them.
    """
    found: list[int] = []
    for layer in layers:
        found.append(max(round(Fraction(layer, PAPER_L) * L), found[-1] + 1 if found else 1))
    if found[-1] >= L:
        raise InputError(
            f"{name} cuts before {len(layers)} layers ({', '.join(map(str, layers))} of {PAPER_L}), and a decoder of "
            f"L = {L} layers has room for fewer; more layers are needed"
        )
    return tuple(found)


def shared_out(total: Fraction, layers: Sequence[int], ratio: Sequence[Fraction], V: int) -> list[Fraction]:
    """Tokens in each of several runs of layers, in the `ratio` asked, that make up `total` tokens times layers.

    Where the first would be more than V, what is left fills the others up evenly. `ratio` falls.
    """
    top = [Fraction(share) / ratio[0] * V for share in ratio]  # the first one at V
    whole = sum((n * share for n, share in zip(layers, top, strict=True)), Fraction(0))
    if total <= whole:
        return [share * total / whole for share in top]
    filled = (total - whole) / (sum(layers) * V - whole) if sum(layers) * V > whole else Fraction(0)
    return [share + (V - share) * filled for share in top]


@functools.lru_cache(1024)
def counts(total: Fraction, layers: tuple[int, ...], ratio: tuple[Fraction, ...], V: int) -> tuple[int, ...]:
    """`shared_out` in whole tokens: nearest to the ratio among those that make up `total` exactly, where any do."""
    ideal = shared_out(total, layers, ratio, V)
    reach, best = layers[-1], None
    for early in itertools.product(*(range(math.floor(n) - reach, math.ceil(n) + reach + 1) for n in ideal[:-1])):
        spent = sum(n * count for n, count in zip(layers, early, strict=False))
        last = round((total - spent) / layers[-1])
        found = (*early, last)
        if not all(V >= a >= b >= 0 for a, b in itertools.pairwise((V, *found))):
            continue
        wrong = max(abs(total - spent - layers[-1] * last) - Fraction(1, 2), Fraction(0))
        far = sum((abs(a - b) for a, b in zip(found, ideal, strict=True)), Fraction(0))
        if best is None or (wrong, far) < best[0]:
            best = (wrong, far), found
    return best[1]


def _show(bound: Fraction, rounding) -> str:
    return f"{float(bound):g}" if bound.denominator in (1, 2, 4, 5, 10) else f"{rounding(bound * 100) / 100:g}"
