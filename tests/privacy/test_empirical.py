"""The statistics of the empirical check: against the paper's figures, by coverage, and at their ends."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from privacy.empirical import (
    EngineCheck,
    OneRunAudit,
    audit_one_run,
    epsilon_lower_bound,
    fair_coins,
    p_value,
    proportion_interval,
)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "printed"),
    [
        (1000, 100, 75, 1e-4, 0.673),  # Appendix D, the example below the listing
        (100_000, 1510, 1439, 1e-5, 2.675),  # Section 7
    ],
)
def test_the_bounds_that_the_paper_prints_are_ours(
    canaries: int, guesses: int, correct: int, delta: float, printed: float
) -> None:
    assert epsilon_lower_bound(canaries, guesses, correct, delta) == pytest.approx(printed, abs=1e-3)


def test_without_delta_the_p_value_is_the_binomial_tail() -> None:
    assert p_value(50, 20, 15, math.log(3), 0.0) == pytest.approx(binom.sf(14, 20, 0.75), rel=1e-12)
    # all of n guesses right: accuracy^n = 0.05
    accuracy = 0.05 ** (1 / 200)
    assert epsilon_lower_bound(200, 200, 200, 0.0) == pytest.approx(math.log(accuracy / (1 - accuracy)), abs=1e-5)


counts = st.tuples(st.integers(1, 400), st.integers(0, 400), st.integers(0, 400)).map(
    lambda n: (n[0], min(n[1], n[0]), min(n[2], n[1], n[0]))
)


@settings(max_examples=60, deadline=None)
@given(counts, st.floats(0, 6), st.sampled_from([0.0, 1e-6, 1e-3]))
def test_more_right_guesses_or_less_delta_never_prove_less(
    counted: tuple[int, int, int], epsilon: float, delta: float
) -> None:
    canaries, guesses, correct = counted
    value = p_value(canaries, guesses, correct, epsilon, delta)
    assert 0 <= value <= 1
    assert value >= p_value(canaries, guesses, correct, epsilon, 0.0) - 1e-12
    bound = epsilon_lower_bound(canaries, guesses, correct, delta)
    assert bound <= epsilon_lower_bound(canaries, guesses, correct, 0.0) + 1e-6
    if correct < guesses:
        assert bound <= epsilon_lower_bound(canaries, guesses, correct + 1, delta) + 1e-6
    if bound > 0:
        assert p_value(canaries, guesses, correct, bound, delta) < 0.05


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (1.0, 1e-3)])
def test_randomised_response_is_accused_in_no_more_than_one_run_of_twenty(epsilon: float, delta: float) -> None:
    """The tightest (epsilon, delta)-DP mechanism there is: with chance delta the coin is shown, else flipped or not."""
    random = np.random.default_rng(7)
    canaries, runs, accused = 200, 600, 0
    accuracy = 1 / (1 + math.exp(-epsilon))
    for _ in range(runs):
        coins = random.random(canaries) < 0.5
        shown = random.random(canaries) < delta
        right = random.random(canaries) < accuracy
        scores = np.where(coins == right, 1.0, -1.0) + random.random(canaries) / 2
        scores = np.where(shown, np.where(coins, 9.0, -9.0), scores)
        accused += audit_one_run(scores, coins, 100, delta).epsilon_lower_bound > epsilon
    # an exact mechanism at 5%; three standard deviations of the count
    assert accused / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    assert delta > 0 or accused / runs >= 0.005  # and the bound is not empty: it is nearly tight for pure DP


def test_the_gaussian_mechanism_is_bounded_below_its_epsilon_and_its_broken_twin_above() -> None:
    from dp_accounting import get_epsilon_gaussian

    random = np.random.default_rng(3)
    coins = fair_coins(b"k" * 32, 1000)
    claimed = get_epsilon_gaussian(2.0, 1e-5)
    noised = audit_one_run(coins + 2.0 * random.standard_normal(1000), coins, 200, 1e-5)
    assert 0.3 < noised.epsilon_lower_bound < claimed
    bare = audit_one_run(coins.astype(float), coins, 200, 1e-5)
    assert bare.correct == 200
    assert bare.epsilon_lower_bound > claimed


def test_guesses_go_to_the_ends_of_the_ranking_and_the_middle_abstains() -> None:
    scores = np.array([0.1, 5.0, -4.0, 0.2, 3.0, -7.0])
    included = np.array([False, True, True, True, False, False])
    audit = audit_one_run(scores, included, 4, 0.0)
    assert (audit.canaries, audit.guesses, audit.correct) == (6, 4, 2)  # right on 5.0 and -7.0


def test_coins_are_fair_and_a_function_of_the_key() -> None:
    coins = fair_coins(b"a" * 32, 100_001)
    assert len(coins) == 100_001
    assert coins.mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(100_001))
    assert np.array_equal(coins[:1000], fair_coins(b"a" * 32, 1000))
    assert not np.array_equal(coins[:1000], fair_coins(b"b" * 32, 1000))


def test_a_check_holds_only_between_a_quiet_engine_and_a_loud_control() -> None:
    def audit(bound: float) -> OneRunAudit:
        return OneRunAudit(1000, 200, 130, 1e-5, 0.95, bound)

    def check(engine: float, control: float) -> EngineCheck:
        return EngineCheck(audit(engine), audit(control), 2.0, 2.8, 0.25, 30)

    assert check(0.5, 4.0).holds
    assert not check(2.5, 4.0).holds
    assert "leaks" in check(2.5, 4.0).verdict
    assert not check(0.5, 1.5).holds
    assert "blunt" in check(0.5, 1.5).verdict


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_the_interval_of_a_proportion_covers_it(share: float) -> None:
    trials = 120
    covered = 0.0
    for successes in range(trials + 1):
        low, high = proportion_interval(successes, trials)
        assert low <= successes / trials <= high
        covered += binom.pmf(successes, trials, share) * (low <= share <= high)
    assert covered >= 0.95


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: p_value(10, 20, 5, 1.0, 0.0), "5 right of 20 guesses on 10 canaries"),
        (lambda: p_value(10, 5, 5, -1.0, 0.0), "epsilon is -1.0"),
        (lambda: epsilon_lower_bound(10, 5, 5, 0.0, confidence=1.0), "confidence is 1.0"),
        (lambda: audit_one_run(np.zeros(4), np.zeros(4, bool), 3, 0.0), "num_guesses is 3: choose an even number"),
        (lambda: audit_one_run(np.array([1.0, np.nan]), np.zeros(2, bool), 2, 0.0), "1 of 2 scores are not finite"),
        (lambda: proportion_interval(3, 2), "3 of 2"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
