"""Truncated Poisson: its accounting against the mechanism itself, every draw enumerated."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from privacy.accounting import epsilon
from privacy.accounting.pld import _loss  # pyright: ignore[reportPrivateUsage]
from privacy.accounting.truncation import cases
from privacy.events import event_key
from tests.privacy.mechanism_events import sampled, truncated

Floats = NDArray[np.float64]

X: Floats = np.linspace(-40, 40, 40_001)
EPSILONS = (0.0, 0.25, 1.0, 2.0, 4.0)


def excess(p: Floats, q: Floats, eps: float) -> float:
    """The hockey-stick divergence of two densities on X."""
    return float(np.maximum(p - math.exp(eps) * q, 0).sum() * (X[1] - X[0]))


def density(values: list[float], rate: float, noise: float, cap: int) -> Floats:
    """The released sum's density: every draw, and every choice of `cap` of its units, with its probability."""
    sums = Counter[float]()
    for size in range(len(values) + 1):
        chance = rate**size * (1 - rate) ** (len(values) - size)
        for drawn in itertools.combinations(values, size):
            kept = list(itertools.combinations(drawn, min(size, cap)))
            for choice in kept:
                sums[sum(choice)] += chance / len(kept)
    return np.asarray(sum(chance * norm.pdf(X, total, noise) for total, chance in sums.items()))


@pytest.mark.parametrize(
    ("others", "unit"),
    [
        ([-1.0] * 6, 1.0),  # replacing moves the sum by 2
        ([-1.0] * 6, -1.0),
        ([-1.0] * 3 + [1.0] * 3, 1.0),
        ([0.0] * 6, 1.0),
        ([-1.0, -0.5, 0.0, 0.3, 0.9, 1.0], -1.0),
    ],
)
@pytest.mark.parametrize(("rate", "noise", "cap"), [(0.5, 1.0, 2), (0.3, 0.7, 3), (0.2, 1.5, 1), (0.9, 1.0, 6)])
def test_no_data_set_loses_more_than_either_bound(
    others: list[float], unit: float, rate: float, noise: float, cap: int
) -> None:
    event = truncated(rate, noise, len(others) + 1, cap)
    library = _loss(event_key(event), 1e-4)
    without, having = density(others, rate, noise, cap), density([*others, unit], rate, noise, cap)
    for eps in EPSILONS:
        true = max(excess(having, without, eps), excess(without, having, eps))
        assert true <= mixture_excess(event, eps) + 1e-9
        assert true <= library.get_delta_for_epsilon(eps) + 1e-9


def mixture_excess(event: dict[str, object], eps: float) -> float:
    """The divergence of the event's cases, the case seen: the larger of both directions."""
    found = [0.0, 0.0]
    for weight, rate, noise in cases(event):
        absent = norm.pdf(X, 0, noise)
        present = (1 - rate) * absent + rate * norm.pdf(X, 1, noise)
        found[0] += weight * excess(present, absent, eps)
        found[1] += weight * excess(absent, present, eps)
    return max(found)


@pytest.mark.parametrize(("rate", "cap"), [(0.5, 2), (0.2, 3), (0.9, 6), (1.0, 4)])
def test_the_cases_have_the_probabilities_of_the_draws(rate: float, cap: int) -> None:
    num_units = 7
    full = kept = 0.0
    for drawn in itertools.product((0, 1), repeat=num_units):  # the unit is the first
        chance = math.prod(rate if each else 1 - rate for each in drawn)
        if sum(drawn[1:]) >= cap:
            full += chance
            kept += chance * drawn[0] * cap / sum(drawn)
    found = cases(truncated(rate, 2.0, num_units, cap))
    assert sum(case.weight for case in found) == pytest.approx(1)
    assert found[-1].weight == pytest.approx(full)
    assert found[-1].sampling_rate == pytest.approx(kept / full)
    assert found[-1].noise_multiplier == 1.0


@pytest.mark.parametrize(("rate", "noise", "num_units", "cap"), [(0.05, 1.0, 400, 24), (0.3, 2.0, 50, 12)])
def test_the_library_has_the_same_cases_with_replacement_on_both_sides(
    rate: float, noise: float, num_units: int, cap: int
) -> None:
    event = truncated(rate, noise, num_units, cap)
    (plain, full) = cases(event)
    library = _loss(event_key(event), 1e-4)
    for eps in EPSILONS:
        ours = 0.0
        for weight, q, s in (plain, full):
            absent, present, opposite = (norm.pdf(X, place, s) for place in (0, 1, -1))
            upper = (1 - q) * absent + q * present
            lower = (1 - q) * absent + q * opposite if s == full.noise_multiplier else absent
            ours += weight * excess(upper, lower, eps)
        assert library.get_delta_for_epsilon(eps) == pytest.approx(ours, rel=2e-3, abs=1e-9)


def test_a_cap_five_deviations_above_the_batch_costs_nothing_and_one_near_it_much() -> None:
    rate, num_units, steps = 256 / 5000, 5000, 50
    plain = epsilon([(sampled(rate, 1.5), steps)], 1e-5)
    roomy, tight = (epsilon([(truncated(rate, 1.5, num_units, cap), steps)], 1e-5) for cap in (340, 270))
    assert plain <= roomy < 1.001 * plain
    assert tight > 1.5 * plain


def test_a_cap_that_is_never_reached_leaves_the_poisson_event() -> None:
    assert cases(truncated(0.1, 2.0, 50, 50)) == cases(sampled(0.1, 2.0))
    assert cases(truncated(1.0, 2.0, 50, 50)) == cases(sampled(1.0, 2.0))
    assert json.loads(event_key(truncated(0.1, 2.0, 50, 50)))["max_batch_size"] == 50


@pytest.mark.parametrize(("cap", "steps"), [(24, 40), (30, 40)])
def test_the_three_accountants_agree_on_truncation(cap: int, steps: int) -> None:
    counts = [(truncated(0.05, 1.5, 400, cap), steps)]
    by_prv, by_pld = epsilon(counts, 1e-5, "prv"), epsilon(counts, 1e-5)
    assert 0.85 * by_pld < by_prv < by_pld + 0.011  # ours takes the unit as replacing on one side only
    assert by_prv < epsilon(counts, 1e-5, "rdp")
