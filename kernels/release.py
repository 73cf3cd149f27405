"""How a sum is released under noise: on a grid, so that what a float can and cannot hold tells nothing of the data.

With delta the grid's spacing, a power of two 2^44 to 2^45 times smaller than the noise:

    released = round_16_bits((rint(gradient / delta) + rint(noise / delta)) * delta)

Why, and what it costs: `privacy.noise` and docs/decisions/006. The Triton kernels of `kernels.noisy_adamw` do the same.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

GRID_BITS = 44  # the grid the sum is formed on lies this far below the noise
RELEASED_BITS = 16  # and the grid it is released on, this far
COARSENING = 2.0 ** (GRID_BITS - RELEASED_BITS)


def grid_spacing(std: float) -> float:
    """The largest power of two that is at most std * 2^-GRID_BITS.

    Raises ValueError where std is not positive, or so large or small that float64 could not hold the grid.
    """
    if not 2.0**-900 < std < 2.0**900:
        raise ValueError(f"the noise's standard deviation is {std}: it must be positive and finite")
    return math.ldexp(0.5, math.frexp(std)[1] - GRID_BITS)


def release_(values: NDArray[np.floating], noise: NDArray[np.float64], spacing: float) -> None:
    """values <- values + noise * spacing by way of the grid; `noise` is whole. Powers of two scale exactly."""
    total = values.astype(np.float64)
    total *= 1.0 / spacing
    np.rint(total, out=total)
    total += noise
    total *= 1.0 / COARSENING
    np.rint(total, out=total)
    total *= COARSENING * spacing
    values[:] = total
