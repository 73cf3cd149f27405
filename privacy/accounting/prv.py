"""Epsilon by privacy random variables (PRV): our own, from the paper, with nothing of dp-accounting's.

The loss Y of each event is put on a grid of cells by its distribution function, moved so that its mean is the exact
one, and composed by one FFT. With k events the error of the sum is then at most EPSILON_ERROR with probability
1 - DELTA_ERROR * delta, at a cell of EPSILON_ERROR / sqrt(k / 2 * log(12 / (DELTA_ERROR * delta))); both errors are
added, so that what is returned is an upper bound. Beyond MOST_CELLS the cells, and with them the error, grow.

Source: Gopi, Lee, Wutschitz 2021, "Numerical Composition of Differential Privacy", Theorem 5.5 and Remark 5.6.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import special

from privacy.accounting.truncation import SampledGaussian, cases

EPSILON_ERROR = 0.01
DELTA_ERROR = 1e-3  # of delta
MOST_CELLS = 1 << 22
LEAST_NOISE = 0.02  # below it one event costs thousands, and this accountant says infinity
ROUNDING_PER_EVENT = 2.0**-53  # in delta, of the distribution function and the FFT

Floats = NDArray[np.float64]

_ORDERS: Floats = np.geomspace(0.05, 64, 40)  # of the moments that bound the tails
_REACH = 12.0  # standard deviations; 1e-32 lies beyond


@dataclass(frozen=True)
class Loss:
    """Y of one event: log P/Q under P for a unit removed (P has it), log Q/P under Q for a unit added."""

    cases: list[SampledGaussian]
    removed: bool

    def cdf(self, y: Floats) -> Floats:
        """P(Y <= y)."""
        total = np.zeros_like(y)
        for weight, rate, noise in self.cases:
            x = _inverse(y if self.removed else -y, rate, noise)
            if self.removed:
                total += weight * ((1 - rate) * _normal_cdf(x / noise) + rate * _normal_cdf((x - 1) / noise))
            else:
                total += weight * _normal_cdf(-x / noise)
        return total

    def mean(self, bound: float) -> float:
        """E[Y | |Y| <= bound]."""
        logs, values = self._quadrature
        inside = np.abs(values) <= bound
        weights = np.exp(logs[inside])
        return float(np.dot(weights, values[inside]) / weights.sum())

    def log_moments(self, sign: int) -> Floats:
        """log E[exp(sign * a * Y)] for each a of _ORDERS."""
        logs, values = self._quadrature
        found = np.empty_like(_ORDERS)
        for place, order in enumerate(_ORDERS):
            terms = logs + sign * order * values
            greatest = terms.max()
            found[place] = greatest + math.log(np.exp(terms - greatest).sum())
        return found

    @cached_property
    def _quadrature(self) -> tuple[Floats, Floats]:
        """Log weights and losses at the trapezoidal rule's nodes: exact to rounding, as the integrands are analytic."""
        logs, values = list[Floats](), list[Floats]()
        for weight, rate, noise in self.cases:
            step = min(0.02, noise / 4)  # the loss is analytic within pi * noise of the real axis
            reach = _REACH + (_ORDERS[-1] + 1) / noise  # a moment's integrand peaks up to its order away
            u = np.arange(-reach, reach, step)
            loss = _log_ratio(u * noise, rate, noise)
            without = math.log(weight * step / math.sqrt(2 * math.pi)) - u**2 / 2
            logs.append(without + loss if self.removed else without)
            values.append(loss if self.removed else -loss)
        return np.concatenate(logs), np.concatenate(values)


def epsilon(charges: Mapping[str, int], delta: float) -> float:
    """Epsilon at `delta` of at least one charge, event -> number; the larger of removing and of adding a unit."""
    mixtures = [(cases(json.loads(event)), number) for event, number in charges.items()]
    if any(case.noise_multiplier < LEAST_NOISE for mixture, _ in mixtures for case in mixture):
        return math.inf
    return max(
        _one_way([(Loss(mixture, removed), number) for mixture, number in mixtures], delta) for removed in (True, False)
    )


def _one_way(events: list[tuple[Loss, int]], delta: float) -> float:
    number = sum(count for _, count in events)
    target = delta * (1 - DELTA_ERROR) - number * ROUNDING_PER_EVENT
    if target < delta / 2:
        raise ValueError(f"delta is {delta}, too small for {number} charges: give at least {number * 1e-15:.1e}")
    bound = _bound(events, number, delta * DELTA_ERROR)
    spread = math.sqrt(number / 2 * math.log(12 / (delta * DELTA_ERROR)))
    # A cell moves each event's mean by at most half of itself: `number` cells of room.
    wanted = 2 * bound * spread / EPSILON_ERROR + number
    cells = _fast_size(min(wanted, max(MOST_CELLS, 4 * number)))
    cell = 2 * bound / (cells - number)
    composed, shift = _compose(events, cells, cell)
    losses: Floats = (np.arange(cells, dtype=np.float64) - cells // 2) * cell + shift
    return _epsilon(losses, composed, target) + cell * spread


def _bound(events: list[tuple[Loss, int]], number: int, delta_error: float) -> float:
    """What the sum passes, either way, with probability delta_error / 4 at most, and an event with / 8 / number."""
    found = 0.0
    for sign in (1, -1):
        moments = [(loss.log_moments(sign), count) for loss, count in events]
        together = sum((count * each for each, count in moments), np.zeros_like(_ORDERS))
        found = max(found, float(np.min((together + math.log(4 / delta_error)) / _ORDERS)))
        for each, _ in moments:
            found = max(found, float(np.min((each + math.log(8 * number / delta_error)) / _ORDERS)))
    return found + EPSILON_ERROR


def _compose(events: list[tuple[Loss, int]], cells: int, cell: float) -> tuple[Floats, float]:
    """Probabilities of the sum on the grid, whose middle is at index cells // 2, and by how much the grid is moved."""
    edges: Floats = (np.arange(cells + 1, dtype=np.float64) - cells // 2 - 0.5) * cell
    spectrum, shift = np.ones(cells // 2 + 1, dtype=np.complex128), 0.0
    for loss, count in events:
        mass = np.diff(loss.cdf(edges))
        mass /= mass.sum()
        middle = float(np.dot(mass, edges[:-1] + cell / 2))
        shift += count * (loss.mean(-edges[0]) - middle)
        spectrum *= np.fft.rfft(np.fft.ifftshift(mass)) ** count
    return np.fft.fftshift(np.fft.irfft(spectrum, cells)), shift


def _epsilon(losses: Floats, mass: Floats, delta: float) -> float:
    """The least epsilon >= 0 with E[max(0, 1 - exp(epsilon - Y))] <= delta, by bisection."""
    mass, losses = mass[losses > 0], losses[losses > 0]
    low, high = 0.0, float(losses[-1])

    def excess(epsilon: float) -> float:
        start = int(np.searchsorted(losses, epsilon))
        return float(np.dot(mass[start:], -np.expm1(epsilon - losses[start:])))

    if excess(low) <= delta:
        return 0.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) <= delta else (middle, high)
    return high


def _fast_size(wanted: float) -> int:
    """An even number not below `wanted`, nor much above it, that the FFT divides well: 8 to 16 times a power of two."""
    unit = 2 ** max(1, math.ceil(math.log2(wanted)) - 4)
    return math.ceil(wanted / unit) * unit


def _normal_cdf(x: Floats) -> Floats:
    return np.asarray(special.ndtr(x), dtype=np.float64)


def _log_ratio(x: Floats, rate: float, noise: float) -> Floats:
    """log of ((1 - q) N(0, s^2) + q N(1, s^2)) / N(0, s^2) at x."""
    gaussian = (2 * x - 1) / (2 * noise**2)
    if rate == 1:
        return gaussian
    return np.logaddexp(math.log1p(-rate), math.log(rate) + gaussian)


def _inverse(y: Floats, rate: float, noise: float) -> Floats:
    """x at which the log ratio is y; -inf where it is above y everywhere."""
    with np.errstate(divide="ignore"):
        # exp(y) - (1 - q), without cancellation near y = 0; 1 - q no longer counts beside exp(40)
        log_rest = np.where(y < 40, np.log(np.maximum(np.expm1(np.minimum(y, 40)) + rate, 0)), y)
    return noise**2 * (log_rest - math.log(rate)) + 0.5
