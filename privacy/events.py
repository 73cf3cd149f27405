"""Mechanism events: what one private release is, in the form that the ledger keeps and the accountant reads.

    {"mechanism": "poisson_sampled_gaussian", "sampling_rate": q, "noise_multiplier": sigma}
    {"mechanism": "gaussian", "noise_multiplier": sigma}

sigma is the noise's standard deviation over the L2 sensitivity of what is released; q is the probability with which
each unit enters the batch, independently of all others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

Event = Mapping[str, Any]

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)  # once: a ledger has millions

MECHANISMS = {
    "poisson_sampled_gaussian": ("sampling_rate", "noise_multiplier"),
    "gaussian": ("noise_multiplier",),
}


def canonical_json(value: object) -> str:
    """The one text a JSON value has: sorted keys, no spaces, ASCII; NaN and infinities are refused (ValueError)."""
    return _ENCODER.encode(value)


def check_event(event: Event) -> dict[str, Any]:
    """The event with its parameters as floats, after checking mechanism, parameters and ranges (ValueError)."""
    mechanism = event.get("mechanism")
    if mechanism not in MECHANISMS:
        raise ValueError(f"mechanism is {mechanism!r}: this version knows {', '.join(MECHANISMS)}")
    expected = MECHANISMS[mechanism]
    if set(event) != {"mechanism", *expected}:
        given = ", ".join(sorted(set(event) - {"mechanism"})) or "nothing"
        raise ValueError(f"mechanism {mechanism} is given {given}: it takes {', '.join(expected)}")
    for name in expected:
        value = event[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {value!r}: give a number")
    check_noise_multiplier(event["noise_multiplier"])
    if "sampling_rate" in expected:
        check_sampling_rate(event["sampling_rate"])
    return {"mechanism": mechanism, **{name: float(event[name]) for name in expected}}


def event_key(event: Event) -> str:
    """The checked event's canonical JSON: equal for equal mechanisms, and the key under which charges are counted."""
    return canonical_json(check_event(event))


def check_noise_multiplier(value: float) -> None:
    """ValueError unless the noise multiplier is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"noise_multiplier is {value}: give a finite number above 0 (no noise, no privacy)")


def check_sampling_rate(value: float) -> None:
    """ValueError unless the sampling rate is in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"sampling_rate is {value}: give the share of units in an expected batch, in (0, 1]")
