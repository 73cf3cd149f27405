"""The charges of a ledger stage by stage, and how far each stage had come at a recorded head.

A second reading: `privacy.ledger` has verified the file and summed it, and keeps no more of its order than that takes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from privacy.events import PLACE, canonical_json


class Mechanism(NamedTuple):
    """An event without its place, and whether it had one."""

    event: dict[str, Any]
    parted: bool


@dataclass
class StageCharges:
    """What one stage was charged. `done_up_to` is the first step without a finished attempt: all below it are done."""

    code_versions: set[str] = field(default_factory=set[str])
    done_up_to: int = 0
    wasted: int = 0  # charged and never done
    _events: Counter[tuple[Any, ...]] = field(default_factory=Counter[tuple[Any, ...]])
    _ahead: set[int] = field(default_factory=set[int])  # done, with a gap before them

    @property
    def counts(self) -> Counter[str]:
        """Event's canonical JSON -> charges; made anew at each call."""
        return Counter({canonical_json(dict(items)): number for items, number in self._events.items()})

    @property
    def mechanisms(self) -> list[Mechanism]:
        """The different events apart from their places: of a stream, each of whose steps reads another part, one."""
        bare = {tuple(item for item in items if item[0] not in PLACE): items for items in self._events}
        return [Mechanism(dict(items), "partition" in dict(whole)) for items, whole in bare.items()]

    def charge(self, event: dict[str, Any], code_version: str) -> None:
        """The stage was charged once."""
        self._events[tuple(event.items())] += 1  # read from canonical JSON, so in one order; faster than JSON again
        self.code_versions.add(code_version)
        self.wasted += 1

    def done(self, step: int) -> None:
        """A step's attempt was finished."""
        self.wasted -= 1
        if step >= self.done_up_to:
            self._ahead.add(step)
        while self.done_up_to in self._ahead:
            self._ahead.remove(self.done_up_to)
            self.done_up_to += 1


@dataclass
class Charges:
    """stages: stage -> its charges. done_at: recorded head -> stage -> `done_up_to` there, for the heads found."""

    stages: dict[str, StageCharges] = field(default_factory=dict[str, StageCharges])
    done_at: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])


def read_charges(path: Path, num_records: int, heads: Collection[str]) -> Charges:
    """Read the first `num_records` lines of a ledger that was verified that far."""
    charges, pending = Charges(), dict[int, tuple[StageCharges, int]]()
    with path.open("rb") as file:
        for record in map(json.loads, islice(file, num_records)):
            if record["type"] == "charge":
                stage = charges.stages.get(record["stage"])
                if stage is None:
                    stage = charges.stages[record["stage"]] = StageCharges()
                stage.charge(record["event"], record["code_version"])
                pending[record["seq"]] = stage, record["step"]
            elif record["type"] == "done":
                stage, step = pending.pop(record["charge"])
                stage.done(step)
            if record["hash"] in heads:
                charges.done_at[record["hash"]] = {name: stage.done_up_to for name, stage in charges.stages.items()}
    return charges
