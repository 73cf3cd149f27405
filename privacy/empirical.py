"""What an attack that was carried out shows of epsilon: the statistics of the empirical check, without the attack.

An accountant bounds epsilon from above, by proof; an attack bounds it from below, by success. Where the lower bound
passes the upper one, the proof does not speak of the code that ran. Here are auditing in one run (Steinke, Nasr and
Jagielski 2023, "Privacy Auditing with One (1) Training Run", arXiv:2305.08846) and the interval of a proportion.
"""

# m canaries

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import ceil, exp

import numpy as np
from numpy.typing import NDArray

MOST_EPSILON = 100.0  # a bound this high says no more than a higher one


def fair_coins(key: bytes, count: int) -> NDArray[np.bool_]:
    """`count` fair coins, a function of `key` alone: which canaries are in the data set, bool (m,)."""
    stream = hashlib.shake_256(b"sfumato/1/canaries/" + key).digest(ceil(count / 8))
    return np.unpackbits(np.frombuffer(stream, dtype=np.uint8), count=count).astype(np.bool_)


def p_value(num_canaries: int, num_guesses: int, num_correct: int, epsilon: float, delta: float) -> float:
    """The most that P[at least `num_correct` guesses are right] can be under (epsilon, delta)-DP.

    Each of `num_canaries` records was in by a fair coin of its own; the guesses are any function of what was released,
    and their number does not depend on it. With W ~ Binomial(guesses, 1 / (1 + e^-epsilon)) and f(v) = P[W >= v]:
    f(v) + 2 m delta max_i (f(v - i) - f(v)) / i.
    Source: Steinke et al. 2023, Theorem 5.2 and Appendix D.
    """
    from scipy.stats import binom

    if not 0 <= num_correct <= num_guesses <= num_canaries:
        raise ValueError(
            f"{num_correct} right of {num_guesses} guesses on {num_canaries} canaries: each number is at most the next"
        )
    if epsilon < 0 or not 0 <= delta < 1:
        raise ValueError(f"epsilon is {epsilon} and delta {delta}: epsilon is at least 0, delta in [0, 1)")
    missed = np.arange(1, num_correct + 1)
    accuracy = 1 / (1 + exp(-epsilon))
    least = float(binom.sf(num_correct - 1, num_guesses, accuracy))
    slopes = (binom.sf(num_correct - missed - 1, num_guesses, accuracy) - least) / missed
    return min(1.0, least + 2 * num_canaries * delta * float(np.max(slopes, initial=0.0)))


def epsilon_lower_bound(
    num_canaries: int, num_guesses: int, num_correct: int, delta: float, confidence: float = 0.95
) -> float:
    """The epsilon that so many right guesses refute at `delta`; 0 where they refute none.

    Guarantee: for a mechanism that is (epsilon, delta)-DP, the bound is at most epsilon with probability `confidence`
    or more. It is the lower end of a bisection, where the p-value is under 1 - confidence; what refutes one epsilon
    refutes every smaller one, whether or not the p-value grows in between.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: choose one between 0 and 1, such as 0.95")

    def refutes(epsilon: float) -> bool:
        return p_value(num_canaries, num_guesses, num_correct, epsilon, delta) < 1 - confidence

    if not refutes(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refutes(high):
        low, high = high, 2 * high
        if high > MOST_EPSILON:
            return low
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refutes(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class OneRunAudit:
    """What the guesses of one run came to."""

    canaries: int
    guesses: int
    correct: int
    delta: float
    confidence: float
    epsilon_lower_bound: float


def audit_one_run(
    scores: NDArray[np.float64], included: NDArray[np.bool_], num_guesses: int, delta: float, confidence: float = 0.95
) -> OneRunAudit:
    """Guess "in" for the half of `num_guesses` with the highest scores and "out" for that with the lowest; count.

    scores: (m,), higher where the canary was likelier in; a function of what was released and not of `included`.
    included: bool (m,), the coins. num_guesses: even, and fixed before the scores were seen.
    """
    half = num_guesses // 2
    if num_guesses < 2 or num_guesses % 2 or num_guesses > len(scores):
        raise ValueError(f"num_guesses is {num_guesses}: choose an even number from 2 to the {len(scores)} canaries")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite: nothing to rank")
    order = np.argsort(scores, kind="stable")
    correct = int((~included[order[:half]]).sum() + included[order[-half:]].sum())
    bound = epsilon_lower_bound(len(scores), num_guesses, correct, delta, confidence)
    return OneRunAudit(len(scores), num_guesses, correct, delta, confidence, bound)


@dataclass(frozen=True)
class EngineCheck:
    """The audit of an engine beside what its ledger says, and the same audit of that engine with its noise left out.

    The control says whether the audit could have seen a broken engine at all.
    """

    engine: OneRunAudit
    control: OneRunAudit
    epsilon: float  # what the throwaway run's own ledger says
    noise_multiplier: float
    sampling_rate: float
    steps: int

    @property
    def holds(self) -> bool:
        """The engine shows no more than its ledger says, and the broken one shows more."""
        return self.engine.epsilon_lower_bound <= self.epsilon < self.control.epsilon_lower_bound

    @property
    def verdict(self) -> str:
        """One sentence for whoever reads nothing else."""
        shown, claimed = self.engine.epsilon_lower_bound, self.epsilon
        if shown > claimed:
            return f"the engine leaks: an attack shows epsilon {shown:.3f}, and its ledger says {claimed:.3f}"
        blunt = self.control.epsilon_lower_bound
        if blunt <= claimed:
            return f"the check is blunt: it shows epsilon {blunt:.3f} without noise, and {claimed:.3f} is claimed"
        return (
            f"an attack shows epsilon {shown:.3f} of the {claimed:.3f} in the ledger, "
            f"and {blunt:.3f} where the noise is left out"
        )


def proportion_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a proportion that covers it with at least `confidence` (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} of {trials}: give at least one trial and no more successes than trials")
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high
