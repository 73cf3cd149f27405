"""Gaussian noise on gradient shards: once per element, on whoever owns it, the same bits at any sharding.

Sums are released on a grid, so that what a float can and cannot hold tells nothing of the data (docs/decisions/006).
With delta the grid's spacing, a power of two 2^44 to 2^45 times smaller than the noise:

    released = round_16_bits((rint(gradient / delta) + rint(noise / delta)) * delta)

The noise takes whole multiples of delta only, whatever the gradient, and is added to a whole multiple of delta: the set
of reachable sums does not depend on the data, which is what the attacks of Mironov 2012 and of Jin, McMurtry,
Rubinstein and Ohrimenko 2022 (arXiv:2112.05307) read. Float64 addition rounds the exact sum, so it and all after it
are post-processing: dropping what lies more than 16 bits below the noise, where a float64 sampler's own grain would
begin to show, and storing in the shard's type. It holds for a gradient of any size. Rounding the gradient adds at most
sqrt(elements) * delta to the sensitivity: `rounding_sensitivity`.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.noise import KEYSTREAMS, visit_gaussian
from kernels.noisy_adamw import Noise
from kernels.release import GRID_BITS, RELEASED_BITS, grid_spacing, release_

__all__ = [
    "GRID_BITS",
    "RELEASED_BITS",
    "BandedNoise",
    "GaussianNoise",
    "banded_coefficients",
    "grid_spacing",
    "rounding_sensitivity",
]


def rounding_sensitivity(num_elements: int, std: float, bands: int = 1) -> float:
    """Upper bound on what the grid adds to the L2 sensitivity of a sum of `num_elements` entries, in its units.

    Entries of neighbouring sums round apart by at most one spacing. Under `BandedNoise` each of the bands - 1 later
    steps rounds a correction as well, a float64 sum of `bands` terms below 2^51 spacings: hence the second term, a
    worst case. Without bands, 2^36 elements under noise of less than 128 clip norms stay within the 1e-6 clip norms
    that clipping keeps free.
    """
    of_history = math.sqrt(bands - 1) * (1 + bands**1.5)
    return math.sqrt(num_elements) * (1 + of_history) * grid_spacing(std)


class GaussianNoise:
    """Noise that is a function of (secret, stage, step, attempt, name, element index).

    Guarantee: two draws share bits only if all of these agree, so a replayed step (a new attempt) never meets the noise
    of the step it replays. The caller must have a durable charge for (stage, step, attempt) before it draws.
    """

    def __init__(self, secret: bytes, stage: str, generator: str) -> None:
        if generator not in KEYSTREAMS:
            raise ValueError(f"noise generator is {generator!r}: choose one of {', '.join(KEYSTREAMS)}")
        self._secret, self._stage, self.generator = secret, stage, generator

    def add_(self, shard: Tensor, *, name: str, offset: int, step: int, attempt: int, std: float) -> None:
        """Add N(0, std^2), in place, to a flat shard that holds elements [offset, offset + numel) of tensor `name`.

        What is left is a multiple of about std * 2^-16, rounded once more to the shard's type. A shard that is not
        finite is refused before anything is drawn: a sum of clipped terms is finite by construction, so the fault lies
        in whatever summed it, and noise would not hide it.
        """
        values = _values_of(shard, name, step, std)
        spacing = grid_spacing(std)

        def add(start: int, normals: NDArray[np.float64]) -> None:
            noise = normals
            noise *= std / spacing
            np.rint(noise, out=noise)
            release_(values[start : start + len(noise)], noise, spacing)

        self.visit(add, name=name, offset=offset, length=shard.numel(), step=step, attempt=attempt)
        _put_back(shard, values)

    def visit(
        self,
        visit: Callable[[int, NDArray[np.float64]], None],
        *,
        name: str,
        offset: int,
        length: int,
        step: int,
        attempt: int,
    ) -> None:
        """Hand this draw's standard normals to `visit`, as `kernels.noise.visit_gaussian` does."""
        visit_gaussian(self._key(name, step, attempt), offset, length, visit, self.generator)

    def for_kernels(self, shards: Sequence[tuple[str, int]], *, step: int, attempt: int, std: float) -> Noise | None:
        """What `add_` would add to shards of these names and offsets, for `kernels.noisy_adamw`; None under Philox."""
        if self.generator != "chacha20":
            return None
        keys = [self._key(name, step, attempt) for name, _ in shards]
        return Noise(std, keys, [offset for _, offset in shards])

    def _key(self, name: str, step: int, attempt: int) -> bytes:
        label = "\x1f".join(("noise", self._stage, str(step), str(attempt), name))
        return hmac.new(self._secret, label.encode(), hashlib.sha256).digest()


def banded_coefficients(bands: int) -> list[float]:
    """c_k = binom(2k, k) / 4^k for k < bands: the square root of the prefix-sum matrix, cut to a band.

    Source: Kalinin and Lampert 2024 (arXiv:2405.13763), for constant learning rate and no weight decay.
    """
    if bands < 1:
        raise ValueError(f"bands is {bands}: it must be at least 1, which is independent noise")
    coefficients = [1.0]
    for k in range(1, bands):
        coefficients.append(coefficients[-1] * (2 * k - 1) / (2 * k))
    return coefficients


@dataclass
class _History:
    """A shard's last bands - 1 noises, in whole multiples of the grid's spacing: step t's is in row t % (bands - 1)."""

    std: float
    next_step: int
    noises: NDArray[np.float64]  # (bands - 1, elements); zero where the segment had not begun


class BandedNoise:
    """Noise correlated over steps, for data that are seen once, or never twice within `bands` steps (DP-BandMF).

    With C the lower-triangular Toeplitz matrix of `bands` coefficients over their norm and Z independent N(0, std^2),
    step t gets row t of C^-1 Z: what one step adds, later steps largely take back, and prefix sums, of which the
    weights are made, carry less noise than under independent draws (`bands = 1`).

    Guarantee: all releases of one object, together, are a function of C x + Z, where row t of x is step t's sum. A unit
    in one step moves C x by its clip norm times a column of C, whose norm is at most 1: one Gaussian mechanism of that
    std and clip norm, though later sums may depend on earlier releases (Denisov et al. 2022, arXiv:2202.08312). Units
    that return after `bands` or more steps meet disjoint rows of C: each return composes as one more such mechanism,
    and is amplified as one where batches are Poisson draws from `bands` parts in turn. A sooner return is not covered:
    the sampler must rule it out.

    A new object begins a new segment with no history. C is then block-diagonal, its columns are cut off and only get
    shorter: a restart costs utility, not privacy.

    The recursion, in whole multiples of the grid's spacing, with c_0 = 1 and the coefficients' norm moved into std:

        noise_t = rint(z_t * norm * std / delta) - rint(sum_{k=1}^{bands-1} c_k noise_{t-k})

    and what is released is rint(x_t / delta) + noise_t, as with independent noise. Given the releases, each data set
    fixes all noise_t; two neighbours' differ at the unit's step alone, so that their z differ by C (x - x') and by what
    the second rint and its float64 sum make of that, which `rounding_sensitivity` bounds. The history is float64 on the
    grid for this reason: rounded to fp32 it would move z by 2^20 spacings, not by one.

    Costs (bands - 1) float64 copies of every shard, in host memory. They are noise that hides data: never store them.

    Source: Choquette-Choo et al. 2023 (arXiv:2306.08153), with the coefficients of Kalinin and Lampert 2024.
    """

    def __init__(self, noise: GaussianNoise, bands: int) -> None:
        self.bands, self._noise = bands, noise
        self._coefficients = banded_coefficients(bands)
        self._norm = math.hypot(*self._coefficients)
        self._histories: dict[tuple[str, int], _History] = {}

    def add_(self, shard: Tensor, *, name: str, offset: int, step: int, attempt: int, std: float) -> None:
        """Like `GaussianNoise.add_`, with the noise of step `step`; a shard's steps must follow each other."""
        values = _values_of(shard, name, step, std)
        history = self._histories.get((name, offset))
        if history is None:
            history = _History(std, step, np.zeros((self.bands - 1, shard.numel())))
            self._histories[name, offset] = history
        _check_succession(history, shard, name, step, std)
        spacing = grid_spacing(std)
        rows = [(step - k) % (self.bands - 1) for k in range(1, self.bands)]

        def add(start: int, normals: NDArray[np.float64]) -> None:
            noise, past = normals, history.noises[:, start : start + len(normals)]
            noise *= self._norm * std / spacing
            np.rint(noise, out=noise)
            correction = np.zeros_like(noise)
            for coefficient, row in zip(self._coefficients[1:], rows, strict=True):
                correction += past[row] * coefficient
            noise -= np.rint(correction)
            if rows:
                past[rows[-1]] = noise  # in the oldest one's place, which was read for the last time
            release_(values[start : start + len(noise)], noise, spacing)

        self._noise.visit(add, name=name, offset=offset, length=shard.numel(), step=step, attempt=attempt)
        history.next_step = step + 1
        _put_back(shard, values)


def _values_of(shard: Tensor, name: str, step: int, std: float) -> NDArray[np.floating]:
    """The shard's values in host memory, its own where it lies there, once they and the noise are fit for release.

    NumPy does the arithmetic: torch's threads inside the sampler's would wait for each other.
    """
    if not 2.0**-900 < std < 2.0**900:
        raise ValueError(f"noise on {name} at step {step} has standard deviation {std}: it must be positive and finite")
    values: NDArray[np.floating] = shard.detach().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(
            f"the sum of {name} at step {step} is not finite, which clipped terms cannot make it: it was not released; "
            "look for an overflow after clipping"
        )
    return values


def _put_back(shard: Tensor, values: NDArray[np.floating]) -> None:
    if shard.device.type != "cpu":
        shard.copy_(torch.from_numpy(values))  # pyright: ignore[reportUnknownMemberType]


def _check_succession(history: _History, shard: Tensor, name: str, step: int, std: float) -> None:
    if step != history.next_step:
        raise ValueError(
            f"banded noise on {name} is at step {history.next_step}, not {step}: steps must follow each other; to go "
            "back or to skip, begin a new segment with a new BandedNoise"
        )
    length = history.noises.shape[1]
    if (shard.numel(), std) != (length, history.std):
        raise ValueError(
            f"banded noise on {name} was on {length} elements with standard deviation {history.std} and is now on "
            f"{shard.numel()} with {std}: begin a new segment with a new BandedNoise"
        )
