"""The draws: keyed, sorted, and with the laws that the accountant is told of."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from privacy.events import check_event
from privacy.sampling import (
    CyclicPoissonSampler,
    PoissonSampler,
    Sampler,
    ShuffledSampler,
    TruncatedPoissonSampler,
    UserRecords,
    _survival,  # pyright: ignore[reportPrivateUsage]
    make_sampler,
    part_bounds,
)

KEY = bytes(range(32))
SAMPLERS: dict[str, Callable[[bytes, str], Sampler]] = {
    "poisson": lambda key, stage: PoissonSampler(key, stage, 1000, 0.05),
    "truncated_poisson": lambda key, stage: TruncatedPoissonSampler(key, stage, 1000, 0.05, 45),
    "cyclic_poisson": lambda key, stage: CyclicPoissonSampler(key, stage, 1000, 0.2, 4),
    "shuffled": lambda key, stage: ShuffledSampler(key, stage, 1000, 48),
}


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_draw_is_a_function_of_key_stage_and_step_and_not_of_what_was_drawn_before(method: str) -> None:
    make = SAMPLERS[method]
    sampler = make(KEY, "finetune_dp")
    steps = [*range(50), *range(49, -1, -7), 3]
    for step in steps:
        assert np.array_equal(sampler.draw(step, 0), make(KEY, "finetune_dp").draw(step, 0))
    draw = sampler.draw(7, 0)
    for other in (make(bytes(32), "finetune_dp").draw(7, 0), make(KEY, "another").draw(7, 0), sampler.draw(11, 0)):
        assert not np.array_equal(draw, other)


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_replay_draws_afresh_unless_its_event_needs_no_independence(method: str) -> None:
    sampler = SAMPLERS[method](KEY, "s")
    amplified = "sampling_rate" in sampler.event(7, 1.0)
    assert amplified == (method != "shuffled")
    assert np.array_equal(sampler.draw(7, 0), sampler.draw(7, 1)) != amplified


@pytest.mark.parametrize(
    ("method", "pinned"),
    [
        ("poisson", [22, 26, 35, 41, 71]),
        ("truncated_poisson", [22, 26, 35, 41, 71]),
        ("cyclic_poisson", [5, 6, 8, 10, 17]),
        ("shuffled", [9, 20, 30, 60, 80]),
    ],
)
def test_draws_are_pinned_so_that_no_machine_or_version_draws_otherwise(method: str, pinned: list[int]) -> None:
    draw = SAMPLERS[method](KEY, "finetune_dp").draw(4, 1)
    assert draw.dtype == np.int64
    assert len(draw) == {"truncated_poisson": 45, "shuffled": 48}.get(method, 54)
    assert draw[:5].tolist() == pinned
    records = UserRecords(KEY, "s", np.arange(100) % 10, 3).draw(np.array([2, 5]), 4, 1)
    assert records.tolist() == [[42, 82, 32], [25, 95, 55]]


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(["poisson", "truncated_poisson", "cyclic_poisson", "shuffled"]),
    num_units=st.integers(1, 5000),
    share=st.floats(0, 1),
    option=st.integers(1, 50),
    step=st.integers(0, 2**40),
    attempt=st.integers(0, 1000),
)
def test_a_draw_is_ascending_and_within_the_units(
    method: Any, num_units: int, share: float, option: int, step: int, attempt: int
) -> None:
    batch = max(1, int(share * num_units))
    cap, cycle = None, None
    if method == "truncated_poisson":
        cap = option
    if method == "cyclic_poisson":
        cycle = min(option, num_units // batch)
    sampler = make_sampler(method, KEY, "s", num_units, batch, max_batch_size=cap, cycle=cycle)
    draw = sampler.draw(step, attempt)
    assert np.all(np.diff(draw) > 0)
    assert draw.size == 0 or (draw[0] >= 0 and draw[-1] < num_units)
    assert cap is None or draw.size <= cap


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(list(SAMPLERS)),
    first=st.integers(0, 100),
    number=st.integers(0, 100),
    noise=st.floats(0.1, 9),
)
def test_what_is_planned_is_what_the_steps_are_charged(method: str, first: int, number: int, noise: float) -> None:
    sampler = SAMPLERS[method](KEY, "s")
    charged = Counter[str]()
    for step in range(first, first + number):
        charged[str(check_event(sampler.event(step, noise)))] += 1
    planned = Counter[str]()
    for event, count in sampler.planned(first, number, noise):
        planned[str(check_event(event))] += count
    assert planned == charged


def test_the_poisson_draw_of_earlier_versions_is_kept() -> None:
    draw = PoissonSampler(KEY, "finetune_dp", 1000, 0.01).draw(3, 1)
    assert draw.tolist() == [132, 379, 492, 495, 529, 759, 836, 866, 888, 968]


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


def test_a_draw_within_the_cap_is_the_poisson_draw_and_one_beyond_it_a_part_of_it() -> None:
    poisson = PoissonSampler(KEY, "s", 500, 0.1)
    truncated = TruncatedPoissonSampler(KEY, "s", 500, 0.1, 50)
    beyond = 0
    for step in range(200):
        drawn, kept = poisson.draw(step, 0), truncated.draw(step, 0)
        if len(drawn) <= 50:
            assert np.array_equal(drawn, kept)
        else:
            beyond += 1
            assert len(kept) == 50 and np.isin(kept, drawn).all()
    assert 50 < beyond < 150


def test_truncation_keeps_every_unit_alike_and_independently_of_other_steps() -> None:
    num_units, rate, cap, steps = 40, 0.3, 11, 20_000
    sampler = TruncatedPoissonSampler(KEY, "s", num_units, rate, cap)
    included = np.zeros((steps, num_units))
    for step in range(steps):
        included[step, sampler.draw(step, 0)] = 1
    sizes = np.arange(num_units + 1)
    expected = float(np.dot(np.minimum(sizes, cap), binom.pmf(sizes, num_units, rate))) / num_units
    z = (included.mean(axis=0) - expected) / math.sqrt(expected * (1 - expected) / steps)
    assert np.abs(z).max() < 4.5
    assert abs(z.sum()) / math.sqrt(num_units) < 4.5
    # Pairs: exchangeable, so each is together as often as the sizes make it.
    together = included.T @ included / steps
    pair = float(np.dot(*(np.minimum(sizes, cap) * (np.minimum(sizes, cap) - 1), binom.pmf(sizes, num_units, rate))))
    pair /= num_units * (num_units - 1)
    pairs = together[np.triu_indices(num_units, 1)]
    assert np.abs(pairs - pair).max() < 5.5 * math.sqrt(pair / steps)
    # Steps: a draw says nothing of the next.
    centred = included - included.mean(axis=0)
    correlation = (centred[1:] * centred[:-1]).mean() / (expected * (1 - expected))
    assert abs(correlation) < 5 / math.sqrt(included.size)


@settings(max_examples=60, deadline=None)
@given(num_units=st.integers(1, 10_000), num_parts=st.integers(1, 200))
def test_parts_are_disjoint_cover_the_units_and_are_alike_in_size(num_units: int, num_parts: int) -> None:
    bounds = [part_bounds(num_units, num_parts, part) for part in range(num_parts)]
    assert bounds[0][0] == 0 and bounds[-1][1] == num_units
    assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
    sizes = [end - begin for begin, end in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_a_cyclic_draw_is_poisson_within_its_range_and_empty_outside() -> None:
    num_units, cycle, rate, rounds = 103, 4, 0.4, 3000
    sampler = CyclicPoissonSampler(KEY, "s", num_units, rate, cycle)
    included = np.zeros((cycle, num_units))
    sizes = [list[int]() for _ in range(cycle)]
    for step in range(cycle * rounds):
        draw = sampler.draw(step, 0)
        included[step % cycle, draw] += 1
        sizes[step % cycle].append(len(draw))
    for part in range(cycle):
        begin, end = part_bounds(num_units, cycle, part)
        assert included[part, :begin].sum() == included[part, end:].sum() == 0
        z = (included[part, begin:end] / rounds - rate) / math.sqrt(rate * (1 - rate) / rounds)
        assert np.abs(z).max() < 4.5
        assert np.var(sizes[part]) == pytest.approx((end - begin) * rate * (1 - rate), rel=5 * math.sqrt(2 / rounds))


def test_a_cycle_at_rate_one_reads_the_index_once_in_order() -> None:
    sampler = make_sampler("cyclic_poisson", KEY, "s", 1001, 77, cycle=13)
    stream = np.concatenate([sampler.draw(step, 0) for step in range(13)])
    assert stream.tolist() == list(range(1001))
    assert np.array_equal(sampler.draw(13, 0), sampler.draw(0, 5))


@settings(max_examples=40, deadline=None)
@given(num_units=st.integers(1, 500), batch_size=st.integers(1, 500), epoch=st.integers(0, 1000))
def test_a_shuffled_epoch_reads_each_unit_exactly_once_in_batches_alike(
    num_units: int, batch_size: int, epoch: int
) -> None:
    sampler = ShuffledSampler(KEY, "s", num_units, min(batch_size, num_units))
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    batches = [sampler.draw(step, 0) for step in steps]
    assert sorted(np.concatenate(batches).tolist()) == list(range(num_units))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert len({str(sampler.event(step, 1.0)) for step in steps}) == len(steps)


def test_a_permutation_puts_every_unit_everywhere_alike() -> None:
    sampler = ShuffledSampler(KEY, "s", 10, 1)
    places = np.zeros((10, 10))
    for epoch in range(5000):
        for part in range(10):
            places[part, sampler.draw(10 * epoch + part, 0)] += 1
    z = (places - 500) / math.sqrt(500 * 0.9)
    assert np.abs(z).max() < 4.5


def test_events_name_their_parts_and_shuffled_ones_are_not_amplified() -> None:
    cyclic, shuffled = (SAMPLERS[name](KEY, "s") for name in ("cyclic_poisson", "shuffled"))
    assert [cyclic.event(step, 2.0)["part"] for step in range(6)] == [0, 1, 2, 3, 0, 1]
    assert len({cyclic.event(step, 2.0)["partition"] for step in range(6)}) == 1
    assert {shuffled.event(step, 2.0)["mechanism"] for step in range(50)} == {"gaussian"}
    assert shuffled.event(20, 2.0)["partition"] != shuffled.event(21, 2.0)["partition"]
    # Borders or stages that differ make another partition: parts of two could overlap.
    names = {
        CyclicPoissonSampler(KEY, stage, num_units, 0.2, cycle).event(0, 1.0)["partition"]
        for stage, num_units, cycle in (("s", 1000, 4), ("s", 1000, 5), ("s", 1001, 4), ("t", 1000, 4))
    }
    assert len(names) == 4


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    max_records=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_users_records_are_read_up_to_the_cap(sizes: list[int], max_records: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    unit_of = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    users = np.flatnonzero(generator.random(len(sizes)) < 0.5)
    slots = UserRecords(KEY, "s", unit_of, max_records).draw(users, 3, 0)
    assert slots.shape == (len(users), max_records) and slots.dtype == np.int64
    for user, row in zip(users.tolist(), slots, strict=True):
        records = row[: min(sizes[user], max_records)]
        assert len(set(records.tolist())) == len(records) and np.all(unit_of[records] == user)
        assert np.all(row[len(records) :] == -1)


def test_each_record_of_a_user_is_read_alike() -> None:
    reader = UserRecords(KEY, "s", np.array([0, 1, 1, 1, 2, 1, 1]), 2)
    steps = 4000
    read = np.zeros(7)
    for step in range(steps):
        slots = reader.draw(np.array([1, 2]), step, 0)
        read[slots[slots >= 0]] += 1
    assert read[0] == 0 and read[4] == steps
    z = (read[[1, 2, 3, 5, 6]] / steps - 0.4) / math.sqrt(0.4 * 0.6 / steps)
    assert np.abs(z).max() < 4.5


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: PoissonSampler(bytes(16), "s", 10, 0.1), "sampling key has 16 bytes"),
        (lambda: PoissonSampler(KEY, "s", -1, 0.1), "num_units is -1"),
        (lambda: PoissonSampler(KEY, "s", 10, 0.0), "sampling_rate is 0.0"),
        (lambda: PoissonSampler(KEY, "s", 10, 1.1), "sampling_rate is 1.1"),
        (lambda: PoissonSampler(KEY, "s", 10, math.nan), "sampling_rate is nan"),
        (lambda: TruncatedPoissonSampler(KEY, "s", 10, 0.1, 0), "max_batch_size is 0"),
        (lambda: CyclicPoissonSampler(KEY, "s", 10, 0.1, 0), "cycle is 0"),
        (lambda: CyclicPoissonSampler(KEY, "s", 10, 0.1, 11), "cycle is 11"),
        (lambda: ShuffledSampler(KEY, "s", 10, 11), "batch_size is 11"),
        (lambda: UserRecords(KEY, "s", np.array([0]), 0), "max_records is 0"),
        (lambda: make_sampler("poisson", KEY, "s", 10, 11), "expected_batch_size is 11: .* to the 10 units"),
        (lambda: make_sampler("poisson", KEY, "s", 10, 0), "expected_batch_size is 0"),
        (lambda: make_sampler("poisson", KEY, "s", 10, 5, cycle=2), "cycle is 2, but sampling is poisson"),
        (
            lambda: make_sampler("shuffled", KEY, "s", 10, 5, max_batch_size=9),
            "max_batch_size is 9, but sampling is sh",
        ),
        (lambda: make_sampler("truncated_poisson", KEY, "s", 10, 5), "max_batch_size is missing"),
        (lambda: make_sampler("cyclic_poisson", KEY, "s", 10, 5), "cycle is missing"),
        (
            lambda: make_sampler("cyclic_poisson", KEY, "s", 10, 5, cycle=3),
            "cycle is 3: .* for 10 units give at most 2",
        ),
        (lambda: make_sampler("balls", KEY, "s", 10, 5), "sampling is 'balls'"),  # type: ignore[arg-type]
        (lambda: PoissonSampler(KEY, "s", 10, 0.1).draw(-1, 0), "step is -1 and attempt 0"),
        (lambda: ShuffledSampler(KEY, "s", 10, 2).draw(0, -1), "step is 0 and attempt -1"),
    ],
)
def test_what_is_out_of_range_is_named(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
