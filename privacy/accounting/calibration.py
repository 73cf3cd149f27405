"""The other way round: which noise, sampling rate or number of steps a target epsilon allows, by PLD."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

from privacy.accounting.bounds import check_delta, epsilon
from privacy.accounting.tally import Spent, Tally

TOLERANCE = 1e-3  # relative, of noise and sampling rate
MOST_NOISE = 2.0**20
LEAST_RATE = 2.0**-40

Cost = Callable[[float], float]


def calibrate_noise(target_epsilon: float, delta: float, planned: Callable[[float], Spent], spent: Spent = ()) -> float:
    """The noise multiplier at which what is planned, after `spent`, costs at most the target.

    planned: from a noise multiplier to all charges to come, for example `sampler.planned(0, steps, noise)`.
    Guarantee: epsilon(spent + planned(noise), delta) <= target_epsilon, by PLD; the noise is at most TOLERANCE above
    the least for which that holds.
    """
    search = _Search(target_epsilon, delta, lambda precision: planned(1 / precision), spent)
    search.check_planned(1.0)
    # RDP asks for a few percent more noise than PLD and answers a hundred times faster: it says where to begin.
    start = _largest(search.rdp, max(target_epsilon, 0.1), 1.0, 1 / MOST_NOISE, math.inf, _RELATIVE)
    precision = _largest(search.pld, target_epsilon, start or 1 / MOST_NOISE, 1 / MOST_NOISE, math.inf, _RELATIVE)
    if precision is None:
        raise ValueError(
            f"target_epsilon is {target_epsilon}: no noise multiplier up to {MOST_NOISE:g} reaches it with the steps "
            f"planned, at delta {delta}: raise the target, take fewer steps or smaller batches"
        )
    return 1 / precision


def calibrate_sampling_rate(
    target_epsilon: float, delta: float, planned: Callable[[float], Spent], spent: Spent = ()
) -> float:
    """The sampling rate at which what is planned, after `spent`, costs at most the target; 1 where every rate does.

    planned: from a sampling rate to all charges to come.
    Guarantee: epsilon(spent + planned(rate), delta) <= target_epsilon, by PLD; the rate is at most TOLERANCE below the
    largest for which that holds.
    """
    search = _Search(target_epsilon, delta, planned, spent)
    search.check_planned(1.0)
    start = _largest(search.rdp, target_epsilon, 0.01, LEAST_RATE, 1.0, _RELATIVE)
    rate = _largest(search.pld, target_epsilon, start or LEAST_RATE, LEAST_RATE, 1.0, _RELATIVE)
    if rate is None:
        raise ValueError(
            f"target_epsilon is {target_epsilon}: no sampling rate down to {LEAST_RATE:.1e} reaches it with the steps "
            f"planned, at delta {delta}: raise the target, add noise or take fewer steps"
        )
    return rate


def max_steps(
    planned: Callable[[int], Spent], target_epsilon: float, delta: float, spent: Spent = (), limit: int = 10_000_000
) -> int:
    """The largest n <= limit for which what is planned for n steps, after `spent`, costs at most the target.

    planned: from a number of steps to their charges; more steps charge no less.
    A step within this number needs no query of the accountant, which takes seconds.
    """
    search = _Search(target_epsilon, delta, lambda steps: planned(int(steps)), spent)
    if limit < 1:
        return 0
    # PLD says less than RDP, but hardly by half: where all may fit, one query mostly tells.
    if search.rdp(limit) <= 2 * target_epsilon and search.pld(limit) <= target_epsilon:
        return limit
    start = _largest(search.rdp, target_epsilon, 1, 1, limit, _WHOLE)
    return int(_largest(search.pld, target_epsilon, start or 1, 1, limit, _WHOLE) or 0)


class EpsilonCurve:
    """Epsilon after n steps, for a training loop to ask at every line of its log: at most POINTS queries in all.

    Guarantee: an upper bound, if more steps charge no less: epsilon at the next point of a grid, on which it is exact.
    The points lie as the squares of 0 to 63, for epsilon grows about as the root of n. Each is computed when asked for.
    """

    POINTS = 64

    def __init__(self, planned: Callable[[int], Spent], delta: float, spent: Spent = (), *, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit is {limit}: give the most steps that the curve will be asked for")
        check_delta(delta)
        self._planned, self._delta, self._spent = planned, delta, Tally(spent)
        last = self.POINTS - 1
        self._grid = sorted({-(-limit * i * i // (last * last)) for i in range(self.POINTS)})
        self._known = dict[int, float]()

    def __call__(self, steps: int) -> float:
        """An upper bound on epsilon after `steps` steps beyond what was spent before."""
        if not 0 <= steps <= self._grid[-1]:
            raise ValueError(f"steps is {steps}: the curve reaches from 0 to {self._grid[-1]}, its limit")
        point = self._grid[bisect_left(self._grid, steps)]
        if point not in self._known:
            charges = self._spent.plus(self._planned(point)).charges()
            self._known[point] = epsilon(charges, self._delta)
        return self._known[point]


class _Search:
    """What a choice costs beside what is spent, by PLD, and alone, by RDP."""

    def __init__(self, target_epsilon: float, delta: float, planned: Callable[[float], Spent], spent: Spent) -> None:
        from privacy.accounting import pld, rdp

        check_delta(delta)
        if not 0 < target_epsilon < math.inf:
            raise ValueError(f"target_epsilon is {target_epsilon}: give a finite number above 0")
        self._pld, self._rdp = pld, rdp
        self._delta, self._planned, self._spent = delta, planned, Tally(spent)
        already = epsilon(self._spent.charges(), delta)
        if already > target_epsilon:
            raise ValueError(
                f"target_epsilon is {target_epsilon}, but {already:.4g} is already spent at delta {delta}: "
                "raise the target or use other data"
            )

    def check_planned(self, choice: float) -> None:
        """ValueError where nothing is planned: any choice would keep the target."""
        if not Tally(self._planned(choice)).charges():
            raise ValueError("nothing is planned to be charged: give a number of private steps to come, at least 1")

    def pld(self, choice: float) -> float:
        charges = self._spent.plus(self._planned(choice)).charges()
        if self._pld.rounding_in_delta(charges) > self._delta / 10:
            return math.inf  # `epsilon` refuses so many
        return self._pld.epsilon(charges, self._delta) if charges else 0.0

    def rdp(self, choice: float) -> float:
        charges = Tally(self._planned(choice)).charges()
        return self._rdp.epsilon(charges, self._delta) if charges else 0.0


class _Scale(NamedTuple):
    """How near to a known point another is still worth asking for: a factor, or the next whole number."""

    factor: float
    whole: bool

    def above(self, x: float) -> float:
        return x + 1 if self.whole else x * self.factor

    def below(self, x: float) -> float:
        return x - 1 if self.whole else x / self.factor

    def snap(self, x: float) -> float:
        return round(x) if self.whole else x


_RELATIVE = _Scale(1 + TOLERANCE / 2, whole=False)
_WHOLE = _Scale(1, whole=True)


def _largest(cost: Cost, target: float, start: float, least: float, most: float, scale: _Scale) -> float | None:
    """The largest x in [least, most] whose cost, which grows with x, is at most the target; None where none's is."""
    low = high = min(max(start, least), most)
    at_low = at_high = cost(low)
    factor = 1.05
    if at_low <= target:
        while at_high <= target:
            if high == most:
                return most
            low, at_low = high, at_high
            high = min(max(scale.snap(high * factor), scale.above(high)), most)
            at_high, factor = cost(high), factor * factor
    else:
        while at_low > target:
            if low == least:
                return None
            high, at_high = low, at_low
            low = max(min(scale.snap(low / factor), scale.below(low)), least)
            at_low, factor = cost(low), factor * factor
    asked = 0
    while scale.above(low) <= scale.below(high):
        middle = math.sqrt(low * high)
        asked += 1
        # Between two points epsilon is nearly a power of x; every third time the middle, in case it is not.
        if asked % 3 and 0 < at_low < at_high < math.inf:
            middle = low * (high / low) ** (math.log(target / at_low) / math.log(at_high / at_low))
        x = min(max(scale.snap(middle), scale.above(low)), scale.below(high))
        at_x = cost(x)
        if at_x <= target:
            low, at_low = x, at_x
        else:
            high, at_high = x, at_x
    return low
