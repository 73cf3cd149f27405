"""Noise, rate and steps for a target: they keep it, hardly more would, and few queries find them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from privacy.accounting import (
    EpsilonCurve,
    Spent,
    calibrate_noise,
    calibrate_sampling_rate,
    calibration,
    epsilon,
    max_steps,
    pld,
)
from privacy.sampling import CyclicPoissonSampler, ShuffledSampler
from tests.privacy.mechanism_events import gaussian, sampled

RATE, STEPS, DELTA = 4096 / 60000, 300 * 60000 // 4096, 1e-5


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Epsilon of every query of the PLD accountant, as they come."""
    made, ask = list[float](), pld.epsilon

    def counted(charges: dict[str, int], delta: float) -> float:
        made.append(ask(charges, delta))
        return made[-1]

    monkeypatch.setattr(pld, "epsilon", counted)
    monkeypatch.setattr(calibration, "epsilon", lambda counts, delta: counted(counts, delta) if counts else 0.0)
    return made


def releases(rate: float, number: int) -> Callable[[float], Spent]:
    return lambda noise: [(sampled(rate, noise), number)]


@pytest.mark.parametrize(("target", "noise"), [(10.0, 2.380), (1.0, 17.01)])
def test_calibrated_noise_is_the_golden_value_and_keeps_the_target(
    target: float, noise: float, queries: list[float]
) -> None:
    found = calibrate_noise(target, DELTA, releases(RATE, STEPS))
    assert len(queries) <= 7
    assert found == pytest.approx(noise, rel=0.01)
    assert epsilon([(sampled(RATE, found), STEPS)], DELTA) <= target
    assert epsilon([(sampled(RATE, found * 0.998), STEPS)], DELTA) > target


def test_a_calibrated_rate_keeps_the_target_and_hardly_more_would(queries: list[float]) -> None:
    found = calibrate_sampling_rate(3.0, DELTA, lambda rate: [(sampled(rate, 1.5), 200)])
    assert len(queries) <= 9
    assert epsilon([(sampled(found, 1.5), 200)], DELTA) <= 3.0
    assert epsilon([(sampled(found * 1.002, 1.5), 200)], DELTA) > 3.0


def test_where_every_rate_fits_all_units_are_sampled() -> None:
    assert calibrate_sampling_rate(5.0, DELTA, lambda rate: [(sampled(rate, 50.0), 10)]) == 1.0


def test_what_is_spent_already_asks_for_more_noise() -> None:
    spent = [(sampled(0.1, 2.0), 20)]
    later = calibrate_noise(3.0, DELTA, releases(0.05, 20), spent)
    assert epsilon([*spent, (sampled(0.05, later), 20)], DELTA) <= 3.0
    assert epsilon([*spent, (sampled(0.05, later * 0.998), 20)], DELTA) > 3.0


def test_several_mechanisms_to_come_are_calibrated_together() -> None:
    def planned(noise: float) -> Spent:
        return [(sampled(0.1, noise), 30), (sampled(0.3, 2 * noise), 5), (gaussian(10 * noise), 1)]

    found = calibrate_noise(4.0, DELTA, planned)
    assert epsilon(planned(found), DELTA) <= 4.0 < epsilon(planned(found * 0.998), DELTA)


def test_the_last_step_that_fits_is_the_last() -> None:
    event, spent = sampled(0.1, 2.0), [(gaussian(10.0), 2)]

    def planned(steps: int) -> Spent:
        return [(event, steps)]

    most = max_steps(planned, 4.0, DELTA, spent)
    assert epsilon([*spent, (event, most)], DELTA) <= 4.0 < epsilon([*spent, (event, most + 1)], DELTA)
    assert max_steps(planned, 4.0, DELTA, [*spent, (event, most)]) == 0
    assert max_steps(planned, 4.0, DELTA, [*spent, (event, most - 1)]) == 1
    assert max_steps(planned, 4.0, DELTA, spent, limit=7) == 7
    assert max_steps(planned, 4.0, DELTA, spent, limit=0) == 0


def test_the_calibrated_steps_and_no_great_number_more_fit(queries: list[float]) -> None:
    noise = calibrate_noise(2.0, DELTA, releases(0.1, 200))
    queries.clear()
    assert max_steps(lambda steps: [(sampled(0.1, noise), steps)], 2.0, DELTA, limit=200) == 200
    assert len(queries) == 1
    assert 200 <= max_steps(lambda steps: [(sampled(0.1, noise), steps)], 2.0, DELTA) <= 202


def test_steps_beyond_what_delta_can_count_do_not_fit() -> None:
    # At 1e-12 a tenth of delta is the rounding of 900 charges.
    assert max_steps(lambda steps: [(gaussian(1e6), steps)], 1.0, 1e-12) == 900


def test_a_stream_read_once_pays_for_one_part() -> None:
    sampler = CyclicPoissonSampler(bytes(32), "s", 1000, 1.0, 50)
    noise = calibrate_noise(2.0, DELTA, lambda noise: sampler.planned(0, 50, noise))
    assert noise == pytest.approx(calibrate_noise(2.0, DELTA, lambda noise: [(gaussian(noise), 1)]), rel=1e-3)
    # A second pass does not fit; what is left of the first does.
    spent = sampler.planned(0, 20, noise)
    assert max_steps(lambda steps: sampler.planned(20, steps, noise), 2.0, DELTA, spent, limit=100) == 30


def test_a_shuffled_run_resumed_within_an_epoch_can_still_end_it() -> None:
    sampler = ShuffledSampler(bytes(32), "s", 100, 10)
    noise = calibrate_noise(3.0, DELTA, lambda noise: sampler.planned(0, 40, noise))
    spent = sampler.planned(0, 17, noise)
    assert max_steps(lambda steps: sampler.planned(17, steps, noise), 3.0, DELTA, spent, limit=100) == 23


def test_a_curve_bounds_epsilon_from_above_and_is_exact_at_its_end(queries: list[float]) -> None:
    event, spent, limit = gaussian(40.0), [(gaussian(40.0), 5)], 1000
    curve = EpsilonCurve(lambda steps: [(event, steps)], DELTA, spent, limit=limit)
    assert not queries
    shown = [curve(steps) for steps in range(limit + 1)]
    assert len(queries) <= EpsilonCurve.POINTS
    assert shown == sorted(shown)
    for steps in (0, 1, 17, 333, 999, 1000):
        true = epsilon([*spent, (event, steps)], DELTA)
        assert true <= shown[steps] <= 1.05 * true
    assert shown[limit] == epsilon([*spent, (event, limit)], DELTA)


def test_a_short_curve_is_exact() -> None:
    curve = EpsilonCurve(lambda steps: [(gaussian(5.0), steps)], DELTA, limit=5)
    assert [curve(steps) for steps in range(6)] == [epsilon([(gaussian(5.0), steps)], DELTA) for steps in range(6)]


def test_a_target_already_spent_is_refused() -> None:
    spent = [(gaussian(1.0), 1)]
    for refused in (
        lambda: calibrate_noise(2.0, DELTA, releases(0.1, 10), spent),
        lambda: calibrate_sampling_rate(2.0, DELTA, lambda rate: [(sampled(rate, 1.0), 10)], spent),
        lambda: max_steps(lambda steps: [(gaussian(1.0), steps)], 2.0, DELTA, spent),
    ):
        with pytest.raises(ValueError, match=r"target_epsilon is 2.0, but 4\.\d+ is already spent"):
            refused()


def test_a_target_that_nothing_can_keep_is_refused() -> None:
    spent = [(gaussian(1.0), 1)]
    target = epsilon(spent, DELTA)
    with pytest.raises(ValueError, match="no noise multiplier up to"):
        calibrate_noise(target, DELTA, releases(1.0, 1000), spent)
    with pytest.raises(ValueError, match="no sampling rate down to"):
        calibrate_sampling_rate(1.0, DELTA, lambda rate: [(sampled(rate, 1.0), 1), (gaussian(1.0), 1)])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: calibrate_noise(0.0, DELTA, releases(0.1, 10)), "target_epsilon is 0.0"),
        (lambda: calibrate_noise(float("inf"), DELTA, releases(0.1, 10)), "target_epsilon is inf"),
        (lambda: calibrate_noise(1.0, 1.0, releases(0.1, 10)), "delta is 1.0"),
        (lambda: calibrate_noise(1.0, DELTA, releases(0.0, 10)), "sampling_rate is 0.0"),
        (lambda: calibrate_noise(1.0, DELTA, releases(0.1, 0)), "nothing is planned"),
        (lambda: calibrate_sampling_rate(1.0, DELTA, lambda rate: []), "nothing is planned"),
        (lambda: max_steps(lambda steps: [(gaussian(1.0), steps)], -1.0, DELTA), "target_epsilon is -1.0"),
        (lambda: EpsilonCurve(lambda steps: [], DELTA, limit=-1), "limit is -1"),
        (lambda: EpsilonCurve(lambda steps: [], DELTA, limit=3)(4), "steps is 4: the curve reaches from 0 to 3"),
    ],
)
def test_what_is_out_of_range_is_named(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
