"""Mechanism events: what one private release is, in the form that the ledger keeps and the accountant reads.

    {"mechanism": "poisson_sampled_gaussian", "sampling_rate": q, "noise_multiplier": sigma}
    {"mechanism": "truncated_poisson_sampled_gaussian", "sampling_rate": q, "noise_multiplier": sigma,
     "num_units": N, "max_batch_size": B}
    {"mechanism": "gaussian", "noise_multiplier": sigma}

sigma is the noise's standard deviation over the L2 sensitivity of what is released; q is the probability with which
each unit enters the batch, independently of all others. Truncated: of more than B units drawn, B are kept, chosen
uniformly; N is the number of units, in the larger of the two data sets that are told apart.

Any event may also carry a place, {"partition": name, "part": number}: the release read units of that part of that
partition and no others. A partition splits the units into disjoint parts by a rule that looks at no data; one name is
one partition, whichever stage or run writes it. A unit is then in at most one part, and pays for that one alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Event = Mapping[str, Any]

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)  # once: a ledger has millions

MECHANISMS = {
    "poisson_sampled_gaussian": ("sampling_rate", "noise_multiplier"),
    "truncated_poisson_sampled_gaussian": ("sampling_rate", "noise_multiplier", "num_units", "max_batch_size"),
    "gaussian": ("noise_multiplier",),
}
PLACE = ("partition", "part")


class Place(NamedTuple):
    """The part of a partition that a release read."""

    partition: str
    part: int


def canonical_json(value: object) -> str:
    """The one text a JSON value has: sorted keys, no spaces, ASCII; NaN and infinities are refused (ValueError)."""
    return _ENCODER.encode(value)


def check_event(event: Event) -> dict[str, Any]:
    """The event with real parameters as floats, after checking mechanism, parameters, ranges and place (ValueError)."""
    mechanism = event.get("mechanism")
    if mechanism not in MECHANISMS:
        raise ValueError(f"mechanism is {mechanism!r}: this version knows {', '.join(MECHANISMS)}")
    expected = MECHANISMS[mechanism]
    place = PLACE if "partition" in event or "part" in event else ()
    if set(event) != {"mechanism", *expected, *place}:
        given = ", ".join(sorted(set(event) - {"mechanism"})) or "nothing"
        raise ValueError(
            f"mechanism {mechanism} is given {given}: it takes {', '.join(expected)}, and partition and part or neither"
        )
    checked: dict[str, Any] = {"mechanism": mechanism}
    for name in (*expected, *place):
        checked[name] = CHECKS[name](event[name])
    return checked


def event_key(event: Event) -> str:
    """The checked event's canonical JSON: equal for equal mechanisms, and the key under which charges are counted."""
    return canonical_json(check_event(event))


def split_place(event: Event) -> tuple[dict[str, Any], Place | None]:
    """The checked event without its place, and its place, if it has one."""
    bare = check_event(event)
    if "partition" not in bare:
        return bare, None
    return bare, Place(bare.pop("partition"), bare.pop("part"))


def check_noise_multiplier(value: object) -> float:
    """The noise multiplier as a float; ValueError unless it is a number, positive and finite."""
    number = _number("noise_multiplier", value)
    if not 0 < number < math.inf:
        raise ValueError(f"noise_multiplier is {value}: give a finite number above 0 (no noise, no privacy)")
    return number


def check_sampling_rate(value: object) -> float:
    """The sampling rate as a float; ValueError unless it is a number in (0, 1]."""
    number = _number("sampling_rate", value)
    if not 0 < number <= 1:
        raise ValueError(f"sampling_rate is {value}: give the share of units in an expected batch, in (0, 1]")
    return number


def check_num_units(value: object) -> int:
    """The number of units; ValueError unless it is a whole number above 0."""
    return _whole("num_units", value, 1, "the number of units in the data set, at least 1")


def check_max_batch_size(value: object) -> int:
    """The cap on a batch; ValueError unless it is a whole number above 0."""
    return _whole("max_batch_size", value, 1, "the most units that a batch may hold, at least 1")


def _check_partition(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"partition is {value!r}: give the name of the partition")
    return value


def _check_part(value: object) -> int:
    return _whole("part", value, 0, "the number of the part, counted from 0")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}: give a number")
    return float(value)


def _whole(name: str, value: object, least: int, wanted: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}: give {wanted}")
    return value


CHECKS: dict[str, Callable[[object], Any]] = {
    "sampling_rate": check_sampling_rate,
    "noise_multiplier": check_noise_multiplier,
    "num_units": check_num_units,
    "max_batch_size": check_max_batch_size,
    "partition": _check_partition,
    "part": _check_part,
}
