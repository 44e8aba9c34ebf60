"""How sure a share is: the score interval, for what is evaluated and what is gated."""

from __future__ import annotations

import math


def wilson_interval(num_right: int, num_rows: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927), 95 % at the default `z`; (0, 1) where nothing was seen.

    Unlike the plain normal interval it is honest at 0 and 100 % and for few rows.
    """
    assert 0 <= num_right <= num_rows, (num_right, num_rows)
    if num_rows == 0:
        return (0.0, 1.0)
    share, weight = num_right / num_rows, z * z / num_rows
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / num_rows + weight / (4 * num_rows)) / (1 + weight)
    # At the ends the formula gives 0 and 1 exactly; rounding may not.
    low = 0.0 if num_right == 0 else max(0.0, centre - half)
    high = 1.0 if num_right == num_rows else min(1.0, centre + half)
    return (low, high)
