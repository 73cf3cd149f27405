"""Charges counted by event, and the most of them that any one unit can have paid."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from privacy.events import Event, canonical_json, split_place

Spent = Mapping[str, int] | Sequence[tuple[Event, int]]


class Tally:
    """How often each bare event was charged, apart for each part of each partition.

    counts: a mapping from an event's canonical JSON to its number, or (event, number) pairs.
    """

    def __init__(self, counts: Spent = ()) -> None:
        self._everywhere = Counter[str]()
        self._parts = dict[tuple[str, str], Counter[int]]()  # (partition, event) -> part -> number
        self._add(counts)

    def plus(self, counts: Spent) -> Tally:
        """A tally of both."""
        both = Tally()
        both._everywhere = self._everywhere.copy()
        both._parts = {key: parts.copy() for key, parts in self._parts.items()}
        both._add(counts)
        return both

    def charges(self) -> dict[str, int]:
        """Event -> number for the unit that pays most, as canonical JSON in one order, whatever the caller's was.

        Parallel composition: a unit is in one part of a partition, so of each event it pays for that part's number.
        The maximum over the parts, taken for each event on its own, is no less for any unit, and is exact where the
        parts are alike. What is outside a partition, or in another, adds up.
        """
        most = self._everywhere.copy()
        for (_, event), parts in self._parts.items():
            most[event] += max(parts.values())
        return {event: number for event, number in sorted(most.items()) if number}

    def _add(self, counts: Spent) -> None:
        for event, number in _pairs(counts):
            bare, place = split_place(event)
            key = canonical_json(bare)
            if number < 0:
                raise ValueError(f"count of {key} is {number}: a number of charges is 0 or more")
            if place is None:
                self._everywhere[key] += number
            else:
                self._parts.setdefault((place.partition, key), Counter())[place.part] += number


def _pairs(counts: Spent) -> Iterable[tuple[Event, int]]:
    if isinstance(counts, Mapping):
        return ((json.loads(key), number) for key, number in counts.items())
    return counts
