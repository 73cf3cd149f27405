"""The mechanism events, made short for tests."""

from __future__ import annotations

from typing import Any


def gaussian(noise: float) -> dict[str, Any]:
    return {"mechanism": "gaussian", "noise_multiplier": noise}


def sampled(rate: float, noise: float) -> dict[str, Any]:
    return {"mechanism": "poisson_sampled_gaussian", "sampling_rate": rate, "noise_multiplier": noise}


def truncated(rate: float, noise: float, num_units: int, cap: int) -> dict[str, Any]:
    return sampled(rate, noise) | {
        "mechanism": "truncated_poisson_sampled_gaussian",
        "num_units": num_units,
        "max_batch_size": cap,
    }


def at(event: dict[str, Any], partition: str, part: int) -> dict[str, Any]:
    return event | {"partition": partition, "part": part}
