"""What happened to a stage, and when: one JSON line an event in `timeline.jsonl`; and where its time went.

Rank 0's worker and the launch append to the same file, each line by a single write, so that lines never mix. A line has
"time" (seconds since 1970), "attempt", "event" and the event's own fields:

    worker   started · joined · loaded {step, tier, save} · steps {first, last, seconds} (steps first to last - 1, about
             every 2 s) · stall {step, seconds} (the loop stood still for a save when `step` steps were done; part of
             the steps' seconds) · drained {seconds} · bad_step {step, ...} · stopped {step, why} · finished
    launch   launched {nproc, launch} · detected {cause, rank, since_s} · resumed {detect_s, start_s, load_s, step_s} ·
             straggler {rank, own_s, others_s} · ended {exit_code, cause} · gave_up {cause}
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ATTEMPT = "SFUMATO_ATTEMPT"
FILE = "timeline.jsonl"

Event = Mapping[str, Any]


class Timeline:
    """Appends events to `folder`/timeline.jsonl; ranks other than 0 pass `enabled=False`, and tell nothing."""

    def __init__(self, folder: Path, *, attempt: int | None = None, enabled: bool = True) -> None:
        self.path = folder / FILE
        self.attempt = int(os.environ.get(ATTEMPT, "0")) if attempt is None else attempt
        self.enabled = enabled

    def event(self, event: str, **fields: Any) -> None:
        """Append one line. It is not synced: when the machine dies the last lines may go with it, and no others."""
        if not self.enabled:
            return
        record = {"time": round(time.time(), 3), "attempt": self.attempt, "event": event, **fields}
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(handle, (json.dumps(record) + "\n").encode())
        finally:
            os.close(handle)


def read_timeline(folder: Path) -> list[dict[str, Any]]:
    """All events of a stage, in the order they were written; a line torn by a crash is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    events: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            if isinstance(record["time"], int | float) and isinstance(record["event"], str):
                events.append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return events


@dataclass
class Spent:
    """Seconds of a stage's wall clock, over all launches; what lies between two launches is nobody's."""

    productive: float = 0.0  # steps that count
    saving: float = 0.0  # the loop stood still for a save, or waited at its end for the last one
    lost: float = 0.0  # steps, and parts of steps, that a later attempt did again
    detecting: float = 0.0  # from a failure's last sign of life to its discovery
    starting: float = 0.0  # the first attempt of a launch, until its ranks have joined
    restarting: float = 0.0  # the same of later ones, with what it took to end the attempt before, and back-off
    loading: float = 0.0  # the newest state, on every rank
    other: float = 0.0  # setting up after a load, logs, manifests

    @property
    def total(self) -> float:
        """The wall clock."""
        return sum(asdict(self).values())


def effective_time(folder: Path) -> dict[str, float]:
    """Where a stage's time went: seconds by kind, their sum as "wall_clock", and "ratio", productive / wall clock.

    Empty for a stage that tells no steps.
    """
    attempts = _attempts(read_timeline(folder))
    if not any(attempt.all("steps") for attempt in attempts):
        return {}
    spent = Spent()
    for index, attempt in enumerate(attempts):
        later = attempts[index + 1 :]
        redone_from = next((e["step"] for a in later if (e := a.first("loaded")) is not None), None)
        _account(spent, attempt, again=index > 0 and attempts[index - 1].launch == attempt.launch, cut=redone_from)
        if later and later[0].launch == attempt.launch:
            spent.restarting += max(later[0].begin - attempt.end, 0.0)
    total = spent.total
    return {**asdict(spent), "wall_clock": total, "ratio": spent.productive / total if total else 0.0}


@dataclass
class _Attempt:
    launch: str
    events: list[Event] = field(default_factory=list)

    @property
    def begin(self) -> float:
        return self.events[0]["time"]

    @property
    def end(self) -> float:
        """When the launch saw it end, or the last that was heard of it."""
        ended = self.first("ended")
        return max(event["time"] for event in self.events) if ended is None else ended["time"]

    def all(self, name: str) -> list[Event]:
        return [event for event in self.events if event["event"] == name]

    def first(self, name: str) -> Event | None:
        return next(iter(self.all(name)), None)


def _attempts(events: Sequence[Event]) -> list[_Attempt]:
    attempts: dict[int, _Attempt] = {}
    for event in events:
        number = event.get("attempt", 0)
        if event["event"] == "launched":
            attempts[number] = _Attempt(event.get("launch", ""))
        elif number not in attempts:  # started by hand: the worker alone tells
            attempts[number] = _Attempt("")
        attempts[number].events.append(event)
    return list(attempts.values())


def _account(spent: Spent, attempt: _Attempt, *, again: bool, cut: int | None) -> None:
    """Add up one attempt; steps from `cut` on were done again later."""
    joined, loaded, detected = attempt.first("joined"), attempt.first("loaded"), attempt.first("detected")
    discovered = attempt.end if detected is None else detected["time"]
    failed = discovered if detected is None else max(discovered - detected["since_s"], attempt.begin)
    at = attempt.begin
    for kind, event in (("restarting" if again else "starting", joined), ("loading", loaded)):
        until = failed if event is None else min(event["time"], failed)
        setattr(spent, kind, getattr(spent, kind) + max(until - at, 0.0))
        at = max(until, at)
    spent.detecting += max(discovered - failed, 0.0)
    spent.restarting += max(attempt.end - discovered, 0.0)
    if loaded is None:
        return
    left = max(failed - at, 0.0)
    stalls = {event["step"]: event["seconds"] for event in attempt.all("stall")}
    for event in attempt.all("steps"):
        first, last = event["first"], event["last"]
        seconds = min(event["seconds"], left)
        left -= seconds
        still = min(sum(s for step, s in stalls.items() if first < step <= last), seconds)
        kept = 1.0 if cut is None else min(max((cut - first) / max(last - first, 1), 0.0), 1.0)
        spent.saving += still
        spent.productive += (seconds - still) * kept
        spent.lost += (seconds - still) * (1 - kept)
    drained = min(sum(event["seconds"] for event in attempt.all("drained")), left)
    spent.saving += drained
    stopped = attempt.first("stopped")  # once it had saved; the steps since it last told of any were not lost
    if stopped is not None and (cut is None or cut >= stopped["step"]):
        spent.productive += left - drained
    elif cut is not None and detected is not None:
        spent.lost += left - drained
    else:
        spent.other += left - drained
