"""Our PRV accountant against closed forms and against PLD, with which it shares no code."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from privacy.accounting import epsilon
from privacy.accounting.prv import EPSILON_ERROR, Loss
from privacy.accounting.truncation import SampledGaussian
from tests.privacy.mechanism_events import gaussian, sampled

MIXTURE = [SampledGaussian(0.7, 0.05, 0.8), SampledGaussian(0.3, 0.4, 0.5)]


@pytest.mark.parametrize(("noise", "count"), [(0.5, 1), (5.0, 1), (40.0, 1000), (100.0, 10_000), (1000.0, 1_000_000)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_gaussians_cost_their_closed_form_and_the_error_allowed(noise: float, count: int, delta: float) -> None:
    mu = math.sqrt(count) / noise

    def excess(eps: float) -> float:
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta

    exact = float(brentq(excess, 0.0, 500.0))
    assert (
        exact <= epsilon([(gaussian(noise), count)], delta, "prv") <= exact + 2.5 * EPSILON_ERROR
    )  # a million: larger cells


@pytest.mark.parametrize(
    ("rate", "noise", "count", "delta"),
    [(0.005, 0.7, 300, 1e-7), (0.02, 1.0, 300, 1e-4), (0.2, 0.9, 1, 1e-5), (0.2, 0.9, 20, 1e-5), (0.9, 4.0, 50, 1e-7)],
)
def test_it_agrees_with_pld(rate: float, noise: float, count: int, delta: float) -> None:
    counts = [(sampled(rate, noise), count)]
    by_pld = epsilon(counts, delta)
    by_prv = epsilon(counts, delta, "prv")
    assert by_pld * 0.999 <= by_prv <= by_pld + 1.1 * EPSILON_ERROR


@pytest.mark.parametrize("removed", [True, False])
def test_the_losses_law_is_that_of_drawn_outputs(removed: bool) -> None:
    generator = np.random.default_rng(0)
    loss = Loss(MIXTURE, removed)
    drawn = list[np.ndarray]()
    for weight, rate, noise in MIXTURE:
        number = int(weight * 400_000)
        x = noise * generator.standard_normal(number)
        if removed:
            x += generator.random(number) < rate
        ratio = np.log(1 - rate + rate * np.exp((2 * x - 1) / (2 * noise**2)))
        drawn.append(ratio if removed else -ratio)
    losses = np.sort(np.concatenate(drawn))
    at = np.quantile(losses, np.linspace(0.01, 0.99, 25))
    empirical = np.searchsorted(losses, at, side="right") / len(losses)
    assert np.abs(loss.cdf(at) - empirical).max() < 4 / math.sqrt(len(losses))
    assert loss.mean(1e9) == pytest.approx(losses.mean(), abs=5 * losses.std() / math.sqrt(len(losses)))


@pytest.mark.parametrize("removed", [True, False])
def test_the_losses_moments_are_exact_where_they_are_known(removed: bool) -> None:
    # A Gaussian's loss is N(m, 2 m) with m = 1 / (2 sigma^2), in both directions.
    loss = Loss([SampledGaussian(1.0, 1.0, 0.6)], removed)
    m = 1 / (2 * 0.36)
    assert loss.mean(1e9) == pytest.approx(m, rel=1e-12)
    orders = np.geomspace(0.05, 64, 40)
    assert loss.log_moments(1) == pytest.approx(m * orders + m * orders**2, rel=1e-10)
    assert loss.log_moments(-1) == pytest.approx(-m * orders + m * orders**2, rel=1e-10, abs=1e-10)


def test_noise_too_small_to_matter_is_infinity_and_no_work() -> None:
    assert epsilon([(sampled(0.1, 0.001), 10)], 1e-5, "prv") == math.inf


def test_a_delta_below_its_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match="delta is 1e-12, too small for 100000 charges"):
        epsilon([(sampled(0.5, 400.0), 100_000)], 1e-12, "prv")
