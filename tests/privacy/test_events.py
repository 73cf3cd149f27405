"""Events: one text for one mechanism, and a clear refusal of everything else."""

from __future__ import annotations

import math
from typing import Any

import pytest

from privacy.events import Place, check_event, event_key, split_place

GAUSSIAN: dict[str, Any] = {"mechanism": "gaussian", "noise_multiplier": 2.0}
POISSON: dict[str, Any] = {"mechanism": "poisson_sampled_gaussian", "sampling_rate": 0.1, "noise_multiplier": 2.0}
TRUNCATED = POISSON | {"mechanism": "truncated_poisson_sampled_gaussian", "num_units": 100, "max_batch_size": 20}
PLACED = GAUSSIAN | {"partition": "stream", "part": 3}


@pytest.mark.parametrize("event", [GAUSSIAN, POISSON, TRUNCATED, PLACED, TRUNCATED | {"partition": "p", "part": 0}])
def test_an_event_is_its_own_checked_form(event: dict[str, Any]) -> None:
    assert check_event(event) == event
    assert event_key(dict(reversed(event.items()))) == event_key(event)


def test_whole_and_real_numbers_of_one_value_are_one_event() -> None:
    assert event_key(GAUSSIAN | {"noise_multiplier": 2}) == event_key(GAUSSIAN)
    assert event_key(GAUSSIAN) == '{"mechanism":"gaussian","noise_multiplier":2.0}'


def test_an_events_place_comes_apart_from_it() -> None:
    assert split_place(PLACED) == (GAUSSIAN, Place("stream", 3))
    assert split_place(GAUSSIAN) == (GAUSSIAN, None)
    assert PLACED["part"] == 3


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({}, "mechanism is None"),
        ({"mechanism": "laplace"}, "mechanism is 'laplace': this version knows poisson_sampled_gaussian"),
        ({"mechanism": "gaussian"}, "gaussian is given nothing: it takes noise_multiplier"),
        (GAUSSIAN | {"sampling_rate": 0.1}, "is given noise_multiplier, sampling_rate: it takes noise_multiplier"),
        (GAUSSIAN | {"noise_multiplier": "1"}, "noise_multiplier is '1'"),
        (GAUSSIAN | {"noise_multiplier": True}, "noise_multiplier is True"),
        (GAUSSIAN | {"noise_multiplier": math.inf}, "noise_multiplier is inf"),
        (GAUSSIAN | {"noise_multiplier": math.nan}, "noise_multiplier is nan"),
        (POISSON | {"sampling_rate": 1.5}, "sampling_rate is 1.5"),
        (TRUNCATED | {"max_batch_size": 0}, "max_batch_size is 0"),
        (TRUNCATED | {"max_batch_size": 2.5}, "max_batch_size is 2.5"),
        (TRUNCATED | {"num_units": True}, "num_units is True"),
        (GAUSSIAN | {"part": 1}, "is given noise_multiplier, part: it takes .* partition and part or neither"),
        (GAUSSIAN | {"partition": "p"}, "is given noise_multiplier, partition"),
        (PLACED | {"part": -1}, "part is -1"),
        (PLACED | {"part": 1.0}, "part is 1.0"),
        (PLACED | {"partition": ""}, "partition is ''"),
        (PLACED | {"partition": 7}, "partition is 7"),
    ],
)
def test_what_is_no_event_is_refused_by_name(event: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_event(event)
