"""Parallel composition: a unit pays for its own part of a partition, against every unit there could be."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.accounting.tally import Tally
from privacy.events import event_key, split_place
from tests.privacy.mechanism_events import at, gaussian, sampled, truncated

BARE = [gaussian(2.0), sampled(0.1, 2.0), truncated(0.1, 2.0, 100, 20)]
PLACES = [None, *itertools.product(("a", "b"), range(3))]


def placed(event: dict[str, Any], place: tuple[str, int] | None) -> dict[str, Any]:
    return event if place is None else at(event, *place)


CHARGES = st.lists(
    st.tuples(st.sampled_from(BARE), st.sampled_from(PLACES), st.integers(0, 9)).map(
        lambda drawn: (placed(drawn[0], drawn[1]), drawn[2])
    ),
    max_size=20,
)


def paid_by(unit: dict[str, int], charges: list[tuple[dict[str, Any], int]]) -> Counter[str]:
    """What a unit pays that is in part `unit[name]` of each partition."""
    paid = Counter[str]()
    for event, number in charges:
        bare, place = split_place(event)
        if place is None or unit[place.partition] == place.part:
            paid[event_key(bare)] += number
    return paid


@given(CHARGES)
def test_no_unit_pays_more_of_any_event_and_some_unit_pays_each(charges: list[tuple[dict[str, Any], int]]) -> None:
    counted = Tally(charges).charges()
    units = [paid_by({"a": a, "b": b}, charges) for a, b in itertools.product(range(4), repeat=2)]
    for event in BARE:
        key = event_key(event)
        assert counted.get(key, 0) == max(unit[key] for unit in units)


@given(CHARGES, CHARGES)
def test_tallies_add_up_in_any_order_and_leave_their_terms_alone(
    first: list[tuple[dict[str, Any], int]], second: list[tuple[dict[str, Any], int]]
) -> None:
    tally = Tally(first)
    before = tally.charges()
    together = Tally([*second, *reversed(first)]).charges()
    assert tally.plus(second).charges() == together
    assert list(together) == sorted(together)
    assert tally.charges() == before


def test_a_ledgers_mapping_reads_as_its_pairs() -> None:
    pairs = [(at(sampled(0.1, 2.0), "p", part), part + 1) for part in range(5)]
    mapping = {event_key(event): number for event, number in pairs}
    assert Tally(mapping).charges() == Tally(pairs).charges() == {event_key(sampled(0.1, 2.0)): 5}
    assert json.loads(next(iter(mapping)))["part"] == 0


def test_truncated_and_plain_poisson_of_one_part_are_both_paid() -> None:
    pairs = [(at(event, "p", 0), 2) for event in BARE]
    assert Tally(pairs).charges() == {event_key(event): 2 for event in BARE}


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="is -2: a number of charges is 0 or more"):
        Tally([(gaussian(1.0), -2)])
