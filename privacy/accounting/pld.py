"""Epsilon by dp-accounting's privacy loss distributions (PLD).

Every epsilon returned is an upper bound:

- The privacy loss is discretized pessimistically ("connect the dots", Doroshenko et al. 2022) on a grid of
  LOSS_INTERVAL = 1e-4, coarser in proportion where RDP puts epsilon above FINE_EPSILON. Against a ten times finer grid
  it costs 0.05% of epsilon where q / sigma is 1e-3 (1e4 steps), 2% at 2e-4 and 5% at 1e-4 (1e5 and 1e6 steps); at 1e-5
  it says three times too much. Never too little.
- The tails that are cut (1e-15 a composition) are counted as infinite loss.
- The FFT that composes n events rounds: its error in delta was measured at about 2e-17 n against the Gaussian's closed
  form, and below a delta of about 1e-11 it makes the bare library's epsilon too small. So n * 2^-53 is taken off delta
  first, and a delta of which this is more than a tenth is refused.
- Truncated Poisson (docs/decisions/007): where the cap is reached the library weighs a unit as replacing another, on
  both sides, which is a little more than it costs.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache, reduce

from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from privacy.accounting import rdp

LOSS_INTERVAL = 1e-4
FINE_EPSILON = 25.0
ROUNDING_PER_EVENT = 2.0**-53


def epsilon(charges: Mapping[str, int], delta: float) -> float:
    """Epsilon at `delta` of at least one charge, event -> number."""
    rounding = rounding_in_delta(charges)
    if rounding > delta / 10:
        raise ValueError(
            f"delta is {delta}, too small for {sum(charges.values())} charges: the accountant rounds by up to "
            f"{rounding:.1e}, so give a delta of at least {10 * rounding:.1e}"
        )
    by_rdp = rdp.epsilon(charges, delta)
    if by_rdp == math.inf:
        return math.inf
    interval = LOSS_INTERVAL * 2 ** max(0, math.ceil(math.log2(max(by_rdp, 1e-9) / FINE_EPSILON)))
    losses = reduce(
        lambda left, right: left.compose(right), (_losses(event, number, interval) for event, number in charges.items())
    )
    return float(losses.get_epsilon_for_delta(delta - rounding))


def rounding_in_delta(charges: Mapping[str, int]) -> float:
    """By how much composing the charges may round delta."""
    return sum(charges.values()) * ROUNDING_PER_EVENT


def _losses(key: str, number: int, interval: float) -> PrivacyLossDistribution:
    """The privacy loss distribution of `number` such events; Gaussians compose in closed form, the rest by FFT."""
    event = json.loads(key)
    if event.get("sampling_rate", 1.0) == 1.0 and "max_batch_size" not in event:
        return _gaussian(event["noise_multiplier"] / math.sqrt(number), 1.0, interval)
    return _loss(key, interval).self_compose(number)


@lru_cache(maxsize=8)
def _loss(key: str, interval: float) -> PrivacyLossDistribution:
    event = json.loads(key)
    if event["mechanism"] == "truncated_poisson_sampled_gaussian":
        return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=event["num_units"],
            sampling_probability=event["sampling_rate"],
            truncated_batch_size=event["max_batch_size"],
            noise_multiplier=event["noise_multiplier"],
            value_discretization_interval=interval,
        )
    return _gaussian(event["noise_multiplier"], event["sampling_rate"], interval)


def _gaussian(noise_multiplier: float, sampling_rate: float, interval: float) -> PrivacyLossDistribution:
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier, sampling_prob=sampling_rate, value_discretization_interval=interval
    )
