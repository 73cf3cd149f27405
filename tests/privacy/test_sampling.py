"""The Poisson draw: keyed, sorted, and with the law that the accountant is told of."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.sampling import PoissonSampler, _survival  # pyright: ignore[reportPrivateUsage]

KEY = bytes(range(32))


def test_a_draw_is_a_function_of_key_stage_step_and_attempt() -> None:
    draw = PoissonSampler(KEY, "finetune_dp", 10_000, 0.05).draw(7, 0)
    assert np.array_equal(draw, PoissonSampler(KEY, "finetune_dp", 10_000, 0.05).draw(7, 0))
    others = [
        PoissonSampler(bytes(32), "finetune_dp", 10_000, 0.05).draw(7, 0),
        PoissonSampler(KEY, "another", 10_000, 0.05).draw(7, 0),
        PoissonSampler(KEY, "finetune_dp", 10_000, 0.05).draw(8, 0),
        PoissonSampler(KEY, "finetune_dp", 10_000, 0.05).draw(7, 1),
    ]
    assert not any(np.array_equal(draw, other) for other in others)


def test_the_draw_is_pinned_so_that_no_machine_or_version_draws_otherwise() -> None:
    draw = PoissonSampler(KEY, "finetune_dp", 1000, 0.01).draw(3, 1)
    assert draw.dtype == np.int64
    assert draw.tolist() == [132, 379, 492, 495, 529, 759, 836, 866, 888, 968]


@settings(max_examples=60, deadline=None)
@given(
    num_units=st.integers(0, 5000),
    sampling_rate=st.floats(1e-9, 1.0),
    step=st.integers(0, 2**40),
    attempt=st.integers(0, 1000),
)
def test_a_draw_is_ascending_and_within_the_units(
    num_units: int, sampling_rate: float, step: int, attempt: int
) -> None:
    draw = PoissonSampler(KEY, "s", num_units, sampling_rate).draw(step, attempt)
    assert np.all(np.diff(draw) > 0)
    assert draw.size == 0 or (draw[0] >= 0 and draw[-1] < num_units)


def test_every_unit_is_drawn_at_rate_one_and_none_from_an_empty_set() -> None:
    assert PoissonSampler(KEY, "s", 1234, 1.0).draw(0, 0).tolist() == list(range(1234))
    assert PoissonSampler(KEY, "s", 0, 0.5).draw(0, 0).size == 0


def test_a_larger_data_set_draws_the_same_among_the_units_both_have() -> None:
    small, large = (PoissonSampler(KEY, "s", n, 0.03).draw(5, 0) for n in (1000, 5000))
    assert np.array_equal(small, large[large < 1000])


@pytest.mark.parametrize("sampling_rate", [0.004, 0.0683, 0.5, 0.93])
def test_each_unit_is_included_at_the_rate_and_independently(sampling_rate: float) -> None:
    num_units, steps = 2000, 2000
    sampler = PoissonSampler(KEY, "s", num_units, sampling_rate)
    included = np.zeros((steps, num_units), dtype=bool)
    for step in range(steps):
        included[step, sampler.draw(step, 0)] = True
    spread = sampling_rate * (1 - sampling_rate)
    # By unit: no index is favoured, the ends of the range and of the table included.
    z = (included.mean(axis=0) - sampling_rate) / math.sqrt(spread / steps)
    assert (z**2).sum() == pytest.approx(num_units, abs=5 * math.sqrt(2 * num_units))
    assert np.abs(z).max() < 6
    # By draw: batch sizes are binomial, so inclusions are neither clustered nor spread out.
    sizes = included.sum(axis=1)
    assert sizes.mean() == pytest.approx(num_units * sampling_rate, abs=5 * math.sqrt(num_units * spread / steps))
    assert sizes.var() == pytest.approx(num_units * spread, rel=5 * math.sqrt(2 / steps))
    # By neighbours: a unit says nothing of the next.
    pairs = (included[:, 1:] & included[:, :-1]).mean()
    deviation = math.sqrt(sampling_rate**2 * (1 - sampling_rate**2) * 3 / included.size)
    assert pairs == pytest.approx(sampling_rate**2, abs=5 * deviation)


def test_the_hazard_of_the_table_is_the_rate_at_every_gap() -> None:
    for sampling_rate in (1e-6, 1e-3, 0.0683, 0.5):
        survival = [2**64, *(int(value) for value in _survival(sampling_rate)[::-1])]
        for before, after in itertools.pairwise(survival):
            assert abs((before - after) - sampling_rate * before) / before < 2.0**-52


def test_a_long_gap_starts_anew_beyond_the_table() -> None:
    draw = PoissonSampler(KEY, "s", 10**9, 1e-7).draw(0, 0)
    assert draw.size == pytest.approx(100, abs=50)
    assert np.diff(draw).max() > 1 << 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((bytes(16), "s", 10, 0.1), "sampling key has 16 bytes"),
        ((KEY, "s", -1, 0.1), "num_units is -1"),
        ((KEY, "s", 10, 0.0), "sampling_rate is 0.0"),
        ((KEY, "s", 10, 1.1), "sampling_rate is 1.1"),
        ((KEY, "s", 10, math.nan), "sampling_rate is nan"),
    ],
)
def test_what_is_out_of_range_is_named(arguments: tuple[bytes, str, int, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PoissonSampler(*arguments)


def test_a_step_or_attempt_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="step is -1 and attempt 0"):
        PoissonSampler(KEY, "s", 10, 0.1).draw(-1, 0)
