"""Epsilon against golden values, closed forms and between accountants."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from privacy.accounting import Accountant, delta_warning, describe, epsilon
from privacy.accounting.prv import EPSILON_ERROR
from privacy.events import event_key
from tests.privacy.mechanism_events import at, gaussian, sampled, truncated


def exact_gaussian_epsilon(noise: float, delta: float) -> float:
    """The Gaussian mechanism's epsilon in closed form: Balle & Wang 2018, Theorem 8."""

    def excess(eps: float) -> float:
        return norm.cdf(0.5 / noise - eps * noise) - math.exp(eps) * norm.cdf(-0.5 / noise - eps * noise) - delta

    return float(brentq(excess, 0.0, 500.0))


GOLDEN = {  # (noise, rate, steps, delta) -> by PLD, RDP and Opacus's PRV
    (0.8, 0.01258, 5000, 1e-6): (9.951, 10.788, 9.962),
    (1.0, 0.001, 10000, 1e-6): (0.555, 0.980, 0.565),
    (1.0, 0.0683, 4394, 1e-5): (40.76, 45.17, 40.77),
    (2.380, 4096 / 60000, 4394, 1e-5): (10.0, None, None),
    (17.01, 4096 / 60000, 4394, 1e-5): (1.0, None, None),
    (2.515, 4096 / 60000, 4394, 1e-5): (None, 10.0, None),
    (18.35, 4096 / 60000, 4394, 1e-5): (None, 1.0, None),
}


@pytest.mark.parametrize("run", GOLDEN)
def test_epsilon_is_the_golden_value_by_each_accountant(run: tuple[float, float, int, float]) -> None:
    noise, rate, steps, delta = run
    for accountant, golden in zip(("pld", "rdp", "prv"), GOLDEN[run], strict=True):
        if golden is not None:
            assert epsilon([(sampled(rate, noise), steps)], delta, accountant) == pytest.approx(golden, rel=0.01)


def test_the_gaussian_limit_says_less_than_was_spent_and_is_not_used() -> None:
    """What Opacus offers as GDP: mu = q sqrt(n (exp(1 / sigma^2) - 1)), Bu et al. 2020, a limit and no bound."""
    noise, rate, steps, delta = 0.8, 0.01258, 5000, 1e-6
    mu = rate * math.sqrt(steps * math.expm1(noise**-2))
    assert exact_gaussian_epsilon(1 / mu, delta) == pytest.approx(9.23, abs=0.01)
    assert exact_gaussian_epsilon(1 / mu, delta) < 0.95 * epsilon([(sampled(rate, noise), steps)], delta)


MIXED = [
    (sampled(0.02, 1.0), 300),
    (sampled(0.05, 2.0), 100),
    (truncated(0.02, 1.0, 5000, 150), 50),
    (gaussian(8.0), 2),
    *((at(sampled(0.4, 4.0), "ranges", part), 6) for part in range(5)),
]


def test_stages_of_other_noise_rate_and_mechanism_compose_alike_by_all_three() -> None:
    by_pld = epsilon(MIXED, 1e-5)
    assert by_pld < epsilon(MIXED, 1e-5, "rdp") < 1.5 * by_pld
    assert epsilon(MIXED, 1e-5, "prv") == pytest.approx(by_pld + EPSILON_ERROR, rel=1e-3)


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


@settings(max_examples=25, deadline=None)
@given(
    rate=st.floats(1e-3, 1.0),
    noise=st.floats(0.6, 8.0),
    count=st.integers(1, 500),
    grown=st.sampled_from(["rate", "count", "precision", "cap"]),
    factor=st.floats(1.05, 2.0),
)
def test_epsilon_grows_with_rate_count_and_precision_and_falls_with_the_cap(
    rate: float, noise: float, count: int, grown: str, factor: float
) -> None:
    before = [(truncated(rate, noise, 400, max(1, int(400 * rate))), count)]
    after = {
        "rate": [(truncated(min(rate * factor, 1.0), noise, 400, max(1, int(400 * rate))), count)],
        "count": [(before[0][0], count + max(1, int(count * (factor - 1))))],
        "precision": [(truncated(rate, noise / factor, 400, max(1, int(400 * rate))), count)],
        "cap": [(sampled(rate, noise), count)],
    }[grown]
    less, more = (epsilon(counts, 1e-5, "rdp") for counts in (before, after))
    if grown == "cap":
        less, more = more, less
    if grown != "rate":  # where nearly every draw is cut, a higher rate cuts the share of each unit
        assert less <= more * (1 + 1e-9)
    plain = [epsilon([(sampled(each, noise), count)], 1e-5, "rdp") for each in (rate, min(rate * factor, 1.0))]
    assert plain[0] <= plain[1] * (1 + 1e-9)


@pytest.mark.parametrize("accountant", ["pld", "prv"])
def test_the_tight_accountants_grow_likewise(accountant: Accountant) -> None:
    rungs = [
        truncated(0.05, 4.0, 1000, 90),
        truncated(0.05, 3.5, 1000, 90),
        truncated(0.06, 3.5, 1000, 75),
        truncated(0.06, 3.5, 1000, 65),
    ]
    found = [epsilon([(event, 30)], 1e-5, accountant) for event in rungs] + [
        epsilon([(rungs[-1], 40)], 1e-5, accountant)
    ]
    assert found == sorted(found)
    # PRV's error allowed is one cell's rounding apart from run to run.
    assert epsilon([(sampled(0.05, 4.0), 30)], 1e-5, accountant) <= found[0] + EPSILON_ERROR / 8


def test_disjoint_parts_cost_what_the_dearest_does_and_partitions_add_up() -> None:
    release, other = sampled(0.1, 1.5), gaussian(6.0)
    parts = [(at(release, "p", part), number) for part, number in enumerate((7, 3, 9))]
    assert epsilon(parts, 1e-5) == epsilon([(release, 9)], 1e-5)
    again = [*parts, (at(release, "q", 4), 2), (other, 1), (release, 1)]
    assert epsilon(again, 1e-5) == epsilon([(release, 9 + 2 + 1), (other, 1)], 1e-5)


def test_a_mapping_and_pairs_in_any_order_cost_the_same() -> None:
    first, second = (sampled(0.01, 1.0), 50), (sampled(0.02, 2.0), 70)
    expected = epsilon([first, second], 1e-5)
    assert epsilon([second, first], 1e-5) == expected
    assert epsilon({event_key(event): number for event, number in (second, first)}, 1e-5) == expected
    assert epsilon([(sampled(0.01, 1.0), 20), second, (sampled(0.01, 1), 30)], 1e-5) == expected


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
def test_nothing_charged_costs_nothing(accountant: Accountant) -> None:
    assert epsilon([], 1e-5, accountant) == 0.0
    assert epsilon({event_key(gaussian(1.0)): 0}, 1e-5, accountant) == 0.0


def test_sampling_every_unit_is_no_sampling() -> None:
    assert epsilon([(sampled(1.0, 5.0), 4)], 1e-5) == epsilon([(gaussian(5.0), 4)], 1e-5)


def test_two_noises_on_one_draw_cost_more_than_two_releases() -> None:
    """Two releases on one draw are one sampled Gaussian of noise / sqrt(2): docs/decisions/002."""
    charged = epsilon([(sampled(0.1, 1.5), 2 * 200)], 1e-5)
    true = epsilon([(sampled(0.1, 1.5 / math.sqrt(2)), 200)], 1e-5)
    assert true > 1.1 * charged


def test_a_shuffled_epoch_accounted_as_poisson_would_say_too_little() -> None:
    """What rivals do: the same noise, one epoch in 20 batches; each unit is read exactly once."""
    parts = [(at(gaussian(2.0), "epoch 0", part), 1) for part in range(20)]
    assert epsilon(parts, 1e-5) == epsilon([(gaussian(2.0), 1)], 1e-5)
    assert epsilon(parts, 1e-5) > 2 * epsilon([(sampled(1 / 20, 2.0), 20)], 1e-5)


def test_a_delta_that_gives_units_away_is_warned_of_with_the_reason() -> None:
    assert delta_warning(1e-4, 9_999) is None
    said = delta_warning(1e-4, 10_000)
    assert said is not None
    assert said.startswith("delta is 0.0001, not below 1/10000") and "publishing one unit whole" in said


def test_accountants_are_described_by_name_and_settings() -> None:
    assert describe().startswith("PLD (dp-accounting ")
    assert describe("rdp").startswith("RDP (dp-accounting ")
    assert describe("prv").startswith("PRV (our own")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: epsilon([(gaussian(1.0), 1)], 0.0), "delta is 0.0"),
        (lambda: epsilon([(gaussian(1.0), 1)], 1.0), "delta is 1.0"),
        (lambda: epsilon([(gaussian(1.0), 1)], math.nan), "delta is nan"),
        (lambda: epsilon([(gaussian(1.0), -1)], 1e-5), "count of .* is -1"),
        (lambda: epsilon([(gaussian(1.0), 1)], 1e-5, "gdp"), "accountant is 'gdp'"),  # type: ignore[arg-type]
        (lambda: epsilon([(gaussian(0.0), 1)], 1e-5), "noise_multiplier is 0.0"),
        (lambda: epsilon([(sampled(1.5, 1.0), 1)], 1e-5), "sampling_rate is 1.5"),
        (lambda: epsilon([({"mechanism": "laplace"}, 1)], 1e-5), "mechanism is 'laplace'"),
    ],
)
def test_what_is_out_of_range_is_named(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
