"""What a list of mechanism events costs: (epsilon, delta) for adding or removing one unit.

The accountant is dp-accounting's privacy loss distribution (PLD); Renyi DP (RDP) stands beside it as a looser,
independently derived check. Every epsilon returned is an upper bound:

- The privacy loss is discretized pessimistically ("connect the dots", Doroshenko et al. 2022) on a grid of
  LOSS_INTERVAL = 1e-4, coarser in proportion where RDP puts epsilon above FINE_EPSILON. Against a ten times finer grid
  it costs 0.05% of epsilon where q / sigma is 1e-3 (1e4 steps), 2% at 2e-4 and 5% at 1e-4 (1e5 and 1e6 steps); at 1e-5
  it says three times too much. Never too little.
- The tails that are cut (1e-15 a composition) are counted as infinite loss.
- The FFT that composes n events rounds: its error in delta was measured at about 2e-17 n against the Gaussian's closed
  form, and below a delta of about 1e-11 it makes the bare library's epsilon too small. So n * 2^-53 is taken off delta
  first, and a delta of which this is more than a tenth is refused.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, reduce
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from privacy.events import Event, check_event, check_sampling_rate, event_key

if TYPE_CHECKING:
    from dp_accounting import DpEvent
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Accountant = Literal["pld", "rdp"]
Spent = Mapping[str, int] | Sequence[tuple[Event, int]]

LOSS_INTERVAL = 1e-4
FINE_EPSILON = 25.0
ROUNDING_PER_EVENT = 2.0**-53
NOISE_TOLERANCE = 1e-3  # relative; calibrated noise is at most this much above the least that fits
MOST_NOISE = 2.0**20


def describe(accountant: Accountant = "pld") -> str:
    """The accountant's name, version and settings, as an auditor quotes them."""
    library = f"dp-accounting {version('dp-accounting')}"
    if accountant == "rdp":
        return f"RDP ({library}, default orders)"
    return f"PLD ({library}, loss interval {LOSS_INTERVAL:g}, pessimistic)"


def to_dp_event(event: Event) -> DpEvent:
    """The event as dp-accounting's own; an unknown mechanism or a parameter out of range is a ValueError."""
    import dp_accounting

    checked = check_event(event)
    gaussian = dp_accounting.GaussianDpEvent(checked["noise_multiplier"])
    if checked["mechanism"] == "gaussian":
        return gaussian
    return dp_accounting.PoissonSampledDpEvent(checked["sampling_rate"], gaussian)


def epsilon(counts: Spent, delta: float, accountant: Accountant = "pld") -> float:
    """The least epsilon the accountant can promise at `delta` for all events together; 0 where there are none.

    counts: a mapping from an event's canonical JSON to its number, or (event, number) pairs.
    Guarantee: an upper bound on the true epsilon of adding or removing one unit, whatever the order of the events and
    however each was chosen from the outputs before it, with parameters fixed beforehand.
    """
    spent = _merge(counts)
    _check_delta(delta)
    if not spent:
        return 0.0
    if accountant == "pld":
        return _pld_epsilon(spent, delta)
    if accountant == "rdp":
        return _rdp_epsilon(spent, delta)
    raise ValueError(f"accountant is {accountant!r}: choose pld or rdp")


def calibrate_noise(target_epsilon: float, delta: float, sampling_rate: float, steps: int, spent: Spent = ()) -> float:
    """The noise multiplier at which `steps` Poisson-sampled Gaussian releases, after `spent`, cost at most the target.

    Guarantee: epsilon(spent + steps at the noise returned, delta) <= target_epsilon, by PLD; the noise is at most
    NOISE_TOLERANCE above the least for which that holds.
    """
    before = _merge(spent)
    _check_target(target_epsilon, delta, before)
    check_sampling_rate(sampling_rate)
    if steps < 1:
        raise ValueError(f"steps is {steps}: give the number of private steps to come, at least 1")

    def fits(noise: float) -> bool:
        return _fits(_add(before, _poisson(sampling_rate, noise), steps), target_epsilon, delta)

    def fits_alone_by_rdp(noise: float) -> bool:
        return _rdp_epsilon(_add({}, _poisson(sampling_rate, noise), steps), delta) <= max(target_epsilon, 0.1)

    # RDP asks for a few percent more noise than PLD and answers a hundred times faster: it says where to begin.
    start = _least_noise(fits_alone_by_rdp, 1.0, growth=2.0, tolerance=1e-2)
    noise = _least_noise(fits, min(start, MOST_NOISE), growth=1.05, tolerance=NOISE_TOLERANCE)
    if noise > MOST_NOISE:
        raise ValueError(
            f"target_epsilon is {target_epsilon}: no noise multiplier up to {MOST_NOISE:g} reaches it in {steps} steps "
            f"at sampling_rate {sampling_rate} and delta {delta}: raise the target or take fewer steps"
        )
    return noise


def max_charges(event: Event, target_epsilon: float, delta: float, spent: Spent = (), limit: int = 10_000_000) -> int:
    """How many more charges of `event` fit under the target after `spent`; `limit` where that many or more do.

    A step that is no charge beyond this number needs no query of the accountant, which takes seconds.
    """
    before = _merge(spent)
    _check_target(target_epsilon, delta, before)
    # Beyond this number `epsilon` refuses delta as too small for its own rounding.
    countable = int(delta / 10 / ROUNDING_PER_EVENT) - sum(before.values())
    limit = max(0, min(limit, countable))
    by_rdp = _most(lambda more: _rdp_epsilon(_add({}, event, more), delta) <= target_epsilon, limit, start=1)
    return _most(lambda more: _fits(_add(before, event, more), target_epsilon, delta), limit, start=by_rdp)


def _least_noise(fits: Callable[[float], bool], start: float, growth: float, tolerance: float) -> float:
    """The least noise that fits, at most `tolerance` above it; inf where none up to MOST_NOISE does."""
    low = high = start
    factor = growth
    while not fits(high):
        low, high, factor = high, high * factor, factor * factor
        if low > MOST_NOISE:
            return math.inf
    factor = growth
    while low == high or fits(low):  # ends: epsilon grows without bound as the noise falls
        low, high, factor = low / factor, low, factor * factor
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _most(fits: Callable[[int], bool], limit: int, start: int) -> int:
    """The largest n in [0, limit] that fits, tried from `start` on; 0 fits, and beyond one that does not, none does."""
    low, high, step = 0, min(max(start, 1), limit), max(start // 20, 1)
    while high > low and fits(high):
        low, high, step = high, min(high + step, limit), 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _poisson(sampling_rate: float, noise_multiplier: float) -> dict[str, Any]:
    return {
        "mechanism": "poisson_sampled_gaussian",
        "sampling_rate": sampling_rate,
        "noise_multiplier": noise_multiplier,
    }


def _merge(counts: Spent) -> dict[str, int]:
    """Event key -> number, in the keys' order: one order of composition, whatever order the caller has."""
    merged: dict[str, int] = {}
    for event, number in _pairs(counts):
        key = event_key(event)
        if number < 0:
            raise ValueError(f"count of {key} is {number}: a number of charges is 0 or more")
        if number:
            merged[key] = merged.get(key, 0) + number
    return dict(sorted(merged.items()))


def _pairs(counts: Spent) -> Iterable[tuple[Event, int]]:
    if isinstance(counts, Mapping):
        return [(json.loads(key), number) for key, number in counts.items()]
    return counts


def _add(counts: Mapping[str, int], event: Event, number: int) -> dict[str, int]:
    key = event_key(event)
    return dict(sorted({**counts, key: counts.get(key, 0) + number}.items()))


def _fits(counts: Mapping[str, int], target_epsilon: float, delta: float) -> bool:
    return _pld_epsilon(counts, delta) <= target_epsilon


def _pld_epsilon(counts: Mapping[str, int], delta: float) -> float:
    rounding = sum(counts.values()) * ROUNDING_PER_EVENT
    if rounding > delta / 10:
        raise ValueError(
            f"delta is {delta}, too small for {sum(counts.values())} charges: the accountant rounds by up to "
            f"{rounding:.1e}, so give a delta of at least {10 * rounding:.1e}"
        )
    by_rdp = _rdp_epsilon(counts, delta)
    if by_rdp == math.inf:
        return math.inf
    interval = LOSS_INTERVAL * 2 ** max(0, math.ceil(math.log2(max(by_rdp, 1e-9) / FINE_EPSILON)))
    losses = reduce(
        lambda left, right: left.compose(right), (_losses(key, number, interval) for key, number in counts.items())
    )
    return float(losses.get_epsilon_for_delta(delta - rounding))


def _losses(key: str, number: int, interval: float) -> PrivacyLossDistribution:
    """The privacy loss distribution of `number` such events; Gaussians compose in closed form, the rest by FFT."""
    event = json.loads(key)
    sampling_rate = event.get("sampling_rate", 1.0)
    if sampling_rate == 1.0:
        return _loss(event["noise_multiplier"] / math.sqrt(number), 1.0, interval)
    return _loss(event["noise_multiplier"], sampling_rate, interval).self_compose(number)


@lru_cache(maxsize=8)
def _loss(noise_multiplier: float, sampling_rate: float, interval: float) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier, sampling_prob=sampling_rate, value_discretization_interval=interval
    )


def _rdp_epsilon(counts: Mapping[str, int], delta: float) -> float:
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()
    # It warns of each order whose series does not converge; leaving an order out only loosens the bound.
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        for key, number in counts.items():
            accountant.compose(to_dp_event(json.loads(key)), number)
        return float(accountant.get_epsilon(delta))
    finally:
        absl.setLevel(level)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}: give a probability in (0, 1), well below one over the number of units")


def _check_target(target_epsilon: float, delta: float, spent: Mapping[str, int]) -> None:
    _check_delta(delta)
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon is {target_epsilon}: give a finite number above 0")
    already = epsilon(spent, delta)
    if already > target_epsilon:
        raise ValueError(
            f"target_epsilon is {target_epsilon}, but {already:.4g} is already spent at delta {delta}: "
            "raise the target or use other data"
        )
