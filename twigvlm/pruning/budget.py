"""From the asked average R to the number r of visual tokens kept, and back (paper section 3.2, Eq. 4)."""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Real

from ..errors import InputError

FINEST = 10**6  # denominator of an R
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


def _show(bound: Fraction, rounding) -> str:
    return f"{float(bound):g}" if bound.denominator in (1, 2, 4, 5, 10) else f"{rounding(bound * 100) / 100:g}"
