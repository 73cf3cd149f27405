"""Epsilon by one of three accountants, and the warning that a delta deserves."""

from __future__ import annotations

from importlib.metadata import version
from typing import Literal

from privacy.accounting.tally import Spent, Tally

Accountant = Literal["pld", "rdp", "prv"]


def describe(accountant: Accountant = "pld") -> str:
    """The accountant's name, version and settings, as an auditor quotes them."""
    library = f"dp-accounting {version('dp-accounting')}"
    if accountant == "rdp":
        return f"RDP ({library}, default orders)"
    if accountant == "prv":
        from privacy.accounting import prv

        return f"PRV (our own, after Gopi et al. 2021: epsilon error {prv.EPSILON_ERROR:g} added)"
    from privacy.accounting import pld

    return f"PLD ({library}, loss interval {pld.LOSS_INTERVAL:g}, pessimistic)"


def epsilon(counts: Spent, delta: float, accountant: Accountant = "pld") -> float:
    """The least epsilon the accountant can promise at `delta` for all events together; 0 where there are none.

    counts: a mapping from an event's canonical JSON to its number, or (event, number) pairs.
    Guarantee: an upper bound on the true epsilon of one unit, whatever the order of the events and however each was
    chosen from the outputs before it, with parameters fixed beforehand. Neighbours differ by adding or removing one
    unit; where events have a place in a partition, by emptying one slot (privacy.sampling).
    """
    check_delta(delta)
    spent = Tally(counts).charges()
    if accountant not in ("pld", "rdp", "prv"):
        raise ValueError(f"accountant is {accountant!r}: choose pld, rdp or prv")
    if not spent:
        return 0.0
    if accountant == "rdp":
        from privacy.accounting import rdp

        return rdp.epsilon(spent, delta)
    if accountant == "prv":
        from privacy.accounting import prv

        return prv.epsilon(spent, delta)
    from privacy.accounting import pld

    return pld.epsilon(spent, delta)


def check_delta(delta: float) -> None:
    """ValueError unless delta is in (0, 1)."""
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}: give a probability in (0, 1), well below one over the number of units")


def delta_warning(delta: float, num_units: int) -> str | None:
    """Why `delta` promises too little for a data set of `num_units`, as a sentence; None where it does not."""
    if delta * num_units < 1:
        return None
    return (
        f"delta is {delta:g}, not below 1/{num_units}, one over the number of units: publishing one unit whole, chosen "
        f"at random, would keep the promise at any epsilon; give a delta well below {1 / num_units:.1e}"
    )
