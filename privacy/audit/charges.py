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


class Mechanism(NamedTuple):
    """An event without its place, and whether it had one."""

    event: dict[str, Any]
    parted: bool


@dataclass
class StageCharges:
    """What one stage was charged. `done_up_to` is the first step without a finished attempt: all below it are done."""

    num_charges: int = 0
    code_versions: set[str] = field(default_factory=set[str])
    done_up_to: int = 0
    wasted: int = 0  # charged and never done
    # Event without its part -> part (None where it has no place) -> charges: a stream has as many parts as steps.
    _events: dict[tuple[Any, ...], Counter[int | None]] = field(
        default_factory=dict[tuple[Any, ...], Counter[int | None]]
    )
    _ahead: set[int] = field(default_factory=set[int])  # done, with a gap before them

    @property
    def paid(self) -> list[tuple[dict[str, Any], int]]:
        """Events and charges of the parts that were charged most: what these cost, all of them do (`accounting`)."""
        paid: list[tuple[dict[str, Any], int]] = []
        for items, parts in self._events.items():
            part, number = max(parts.items(), key=lambda charged: charged[1])
            paid.append((dict(items) if part is None else {**dict(items), "part": part}, number))
        return paid

    @property
    def mechanisms(self) -> list[Mechanism]:
        """The different events apart from their places: of a stream, each of whose steps reads another part, one."""
        whole = {tuple(item for item in items if item[0] != "partition"): dict(items) for items in self._events}
        return [Mechanism(dict(items), "partition" in event) for items, event in whole.items()]

    def charge(self, event: dict[str, Any], code_version: str) -> None:
        """The stage was charged once."""
        part = event.pop("part", None)
        self._events.setdefault(tuple(event.items()), Counter())[part] += 1  # canonical JSON has but one order
        self.code_versions.add(code_version)
        self.num_charges += 1
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
