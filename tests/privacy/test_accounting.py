"""Epsilon against golden values, closed forms and an independent accountant."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from privacy.accounting import calibrate_noise, epsilon, max_charges, to_dp_event
from privacy.events import event_key


def sampled(rate: float, noise: float) -> dict[str, Any]:
    return {"mechanism": "poisson_sampled_gaussian", "sampling_rate": rate, "noise_multiplier": noise}


def gaussian(noise: float) -> dict[str, Any]:
    return {"mechanism": "gaussian", "noise_multiplier": noise}


def exact_gaussian_epsilon(noise: float, delta: float) -> float:
    """The Gaussian mechanism's epsilon in closed form: Balle & Wang 2018, Theorem 8."""

    def excess(eps: float) -> float:
        return norm.cdf(0.5 / noise - eps * noise) - math.exp(eps) * norm.cdf(-0.5 / noise - eps * noise) - delta

    return float(brentq(excess, 0.0, 500.0))


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "pld", "rdp"),
    [
        (0.8, 0.01258, 5000, 1e-6, 9.951, 10.788),
        (1.0, 0.001, 10000, 1e-6, 0.555, 0.980),
        (1.0, 0.0683, 4394, 1e-5, 40.76, 45.17),
        (2.380, 4096 / 60000, 4394, 1e-5, 10.0, None),
        (2.515, 4096 / 60000, 4394, 1e-5, None, 10.0),
        (18.35, 4096 / 60000, 4394, 1e-5, None, 1.0),
    ],
)
def test_epsilon_is_the_golden_value(
    noise: float, rate: float, steps: int, delta: float, pld: float | None, rdp: float | None
) -> None:
    counts = [(sampled(rate, noise), steps)]
    if pld is not None:
        assert epsilon(counts, delta) == pytest.approx(pld, rel=0.01)
    if rdp is not None:
        assert epsilon(counts, delta, "rdp") == pytest.approx(rdp, rel=0.01)


def test_rdp_bounds_pld_from_above() -> None:
    counts = [(sampled(0.01, 1.0), 1000), (gaussian(5.0), 3)]
    assert epsilon(counts, 1e-5) < epsilon(counts, 1e-5, "rdp")


@pytest.mark.parametrize("noise", [0.01, 0.5, 5.0, 50.0])
def test_a_gaussian_costs_its_closed_form_and_never_less(noise: float) -> None:
    exact = exact_gaussian_epsilon(noise, 1e-5) if noise > 0.1 else None
    found = epsilon([(gaussian(noise), 1)], 1e-5)
    if exact is None:
        assert found > 5000
    else:
        assert exact <= found <= exact * 1.001 + 1e-4


@pytest.mark.parametrize(("noise", "count"), [(40.0, 1000), (100.0, 10_000), (1000.0, 1_000_000)])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_many_sampled_releases_never_cost_less_than_their_closed_form(noise: float, count: int, delta: float) -> None:
    # At a rate this near 1 the FFT composes, and the closed form without sampling is the truth to 1e-9.
    found = epsilon([(sampled(1 - 1e-12, noise), count)], delta)
    exact = exact_gaussian_epsilon(noise / math.sqrt(count), delta)
    assert exact * (1 - 1e-8) <= found <= exact * 1.01


def test_a_delta_below_the_rounding_of_the_fft_is_refused() -> None:
    # The bare library answers 5.52 here, where the closed form says 5.62.
    with pytest.raises(ValueError, match=r"delta is 1e-12, too small for 100000 charges.*at least 1\.1e-10"):
        epsilon([(sampled(0.5, 400.0), 100_000)], 1e-12)


def test_a_mapping_and_pairs_in_any_order_cost_the_same() -> None:
    first, second = (sampled(0.01, 1.0), 50), (sampled(0.02, 2.0), 70)
    expected = epsilon([first, second], 1e-5)
    assert epsilon([second, first], 1e-5) == expected
    assert epsilon({event_key(event): number for event, number in (second, first)}, 1e-5) == expected
    assert epsilon([(sampled(0.01, 1.0), 20), second, (sampled(0.01, 1), 30)], 1e-5) == expected


def test_nothing_charged_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0.0
    assert epsilon({event_key(gaussian(1.0)): 0}, 1e-5) == 0.0


def test_sampling_every_unit_is_no_sampling() -> None:
    assert epsilon([(sampled(1.0, 5.0), 4)], 1e-5) == epsilon([(gaussian(5.0), 4)], 1e-5)


@pytest.mark.parametrize(("target", "noise"), [(10.0, 2.380), (1.0, 17.01)])
def test_calibrated_noise_is_the_golden_value_and_keeps_the_target(target: float, noise: float) -> None:
    steps = 300 * 60000 // 4096
    found = calibrate_noise(target, 1e-5, 4096 / 60000, steps)
    assert found == pytest.approx(noise, rel=0.01)
    assert epsilon([(sampled(4096 / 60000, found), steps)], 1e-5) <= target
    assert epsilon([(sampled(4096 / 60000, found * 0.998), steps)], 1e-5) > target


def test_what_is_spent_already_asks_for_more_noise() -> None:
    spent = [(sampled(0.1, 2.0), 20)]
    later = calibrate_noise(3.0, 1e-5, 0.05, 20, spent)
    assert epsilon([*spent, (sampled(0.05, later), 20)], 1e-5) <= 3.0
    assert epsilon([*spent, (sampled(0.05, later * 0.998), 20)], 1e-5) > 3.0


def test_the_last_charge_that_fits_is_the_last() -> None:
    event, spent = sampled(0.1, 2.0), [(gaussian(10.0), 2)]
    most = max_charges(event, 4.0, 1e-5, spent)
    assert epsilon([*spent, (event, most)], 1e-5) <= 4.0 < epsilon([*spent, (event, most + 1)], 1e-5)
    assert max_charges(event, 4.0, 1e-5, [*spent, (event, most)]) == 0
    assert max_charges(event, 4.0, 1e-5, [*spent, (event, most - 1)]) == 1
    assert max_charges(event, 4.0, 1e-5, spent, limit=7) == 7


def test_the_calibrated_steps_and_no_great_number_more_fit() -> None:
    noise = calibrate_noise(2.0, 1e-5, 0.1, 200)
    assert 200 <= max_charges(sampled(0.1, noise), 2.0, 1e-5) <= 202


def test_a_target_already_spent_is_refused() -> None:
    spent = [(gaussian(1.0), 1)]
    for refused in (
        lambda: calibrate_noise(2.0, 1e-5, 0.1, 10, spent),
        lambda: max_charges(gaussian(1.0), 2.0, 1e-5, spent),
    ):
        with pytest.raises(ValueError, match=r"target_epsilon is 2.0, but 4\.\d+ is already spent"):
            refused()


def test_a_target_that_no_noise_can_keep_is_refused() -> None:
    spent = [(gaussian(1.0), 1)]
    with pytest.raises(ValueError, match="no noise multiplier up to"):
        calibrate_noise(epsilon(spent, 1e-5), 1e-5, 1.0, 1000, spent)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: epsilon([(gaussian(1.0), 1)], 0.0), "delta is 0.0"),
        (lambda: epsilon([(gaussian(1.0), 1)], 1.0), "delta is 1.0"),
        (lambda: epsilon([(gaussian(1.0), 1)], math.nan), "delta is nan"),
        (lambda: epsilon([(gaussian(1.0), -1)], 1e-5), "count of .* is -1"),
        (lambda: epsilon([(gaussian(1.0), 1)], 1e-5, "gdp"), "accountant is 'gdp'"),  # type: ignore[arg-type]
        (lambda: epsilon([(gaussian(0.0), 1)], 1e-5), "noise_multiplier is 0.0"),
        (lambda: epsilon([(gaussian(math.inf), 1)], 1e-5), "noise_multiplier is inf"),
        (lambda: epsilon([(sampled(1.5, 1.0), 1)], 1e-5), "sampling_rate is 1.5"),
        (lambda: to_dp_event({"mechanism": "laplace"}), "mechanism is 'laplace'"),
        (lambda: to_dp_event({"mechanism": "gaussian"}), "gaussian is given nothing: it takes noise_multiplier"),
        (lambda: to_dp_event(gaussian(1.0) | {"sampling_rate": 0.1}), "is given noise_multiplier, sampling_rate"),
        (lambda: to_dp_event({"mechanism": "gaussian", "noise_multiplier": "1"}), "noise_multiplier is '1'"),
        (lambda: calibrate_noise(0.0, 1e-5, 0.1, 10), "target_epsilon is 0.0"),
        (lambda: calibrate_noise(math.inf, 1e-5, 0.1, 10), "target_epsilon is inf"),
        (lambda: calibrate_noise(1.0, 1e-5, 0.0, 10), "sampling_rate is 0.0"),
        (lambda: calibrate_noise(1.0, 1e-5, 0.1, 0), "steps is 0"),
        (lambda: max_charges(gaussian(1.0), -1.0, 1e-5), "target_epsilon is -1.0"),
    ],
)
def test_what_is_out_of_range_is_named(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_two_noises_on_one_draw_cost_more_than_two_releases() -> None:
    """Two releases on one draw are one sampled Gaussian of noise / sqrt(2): docs/decisions/002."""
    charged = epsilon([(sampled(0.1, 1.5), 2 * 200)], 1e-5)
    true = epsilon([(sampled(0.1, 1.5 / math.sqrt(2)), 200)], 1e-5)
    assert true > 1.1 * charged
