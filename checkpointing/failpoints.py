"""Named places at which a test may make something happen to this process, for real.

    SFUMATO_FAILPOINT=shard.half_written               die at the first visit
    SFUMATO_FAILPOINT=shard.half_written:3             at the third
    SFUMATO_FAILPOINT=step.computed@rank=1,step=7      where the place's own words match
    SFUMATO_FAILPOINT=shard.synced!stop                something else than death, from the table below
    SFUMATO_FAILPOINT=step.computed:5!term;shard.synced!delay=0.5    several
    SFUMATO_FAILPOINT_ONCE=/path/to/marker             a run restarted with the same environment is spared

    kill     SIGKILL (the default): nothing is flushed, no `finally` runs, exactly as when a machine is lost
    stop     SIGSTOP: the process lives and does nothing until it is told to go on
    term     SIGTERM to itself: the notice of a preemption
    enospc   OSError, the disk is full; only where the place lies among file operations
    eio      OSError, the disk is broken
    delay    sleeps one second, or as many as are given: delay=0.5

Each happens once a process, at the visit named; with a marker, once in all processes that share it. The second of
several specifications has the marker with "-1" after its name, the third "-2", and so on.

Places in this folder are listed by `grep -rn 'failpoint(' checkpointing`; those of a step are in train/step.py.
With the environment variable absent, a failpoint costs one look-up.
"""

import errno
import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path


def failpoint(name: str, **where: int) -> None:
    """Do here what `SFUMATO_FAILPOINT` asks for if it names this place and its conditions hold.

    `rank` need not be given: it is then the environment's RANK, as launchers set it (0 without one).
    """
    text = os.environ.get("SFUMATO_FAILPOINT")
    if text is None:
        return
    for specification in _parse(text):
        if specification.name == name:
            specification.visit({"rank": int(os.environ.get("RANK", "0")), **where})


def _signal(number: int) -> Callable[[str | None], None]:
    return lambda _: os.kill(os.getpid(), number)


def _raise(number: int) -> Callable[[str | None], None]:
    def fail(_: str | None) -> None:
        raise OSError(number, f"{os.strerror(number)} (by SFUMATO_FAILPOINT)")

    return fail


def _delay(seconds: str | None) -> None:
    time.sleep(float(seconds or 1))


_ACTIONS: dict[str, Callable[[str | None], None]] = {
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "term": _signal(signal.SIGTERM),
    "enospc": _raise(errno.ENOSPC),
    "eio": _raise(errno.EIO),
    "delay": _delay,
}
_GRAMMAR = re.compile(
    r"(?P<name>[\w.]+)(:(?P<visit>[1-9]\d*))?(@(?P<where>\w+=\d+(,\w+=\d+)*))?"
    rf"(!(?P<action>{'|'.join(_ACTIONS)})((?<=delay)=(?P<seconds>\d+(\.\d+)?))?)?"
)


@dataclass(frozen=True)
class _Specification:
    name: str
    wanted: dict[str, int]
    last: int  # the visit at which it happens
    action: str
    seconds: str | None
    number: int  # among those given
    visits: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def visit(self, where: Mapping[str, int]) -> None:
        if unknown := sorted(set(self.wanted) - set(where)):
            raise ValueError(
                f"SFUMATO_FAILPOINT asks for {unknown[0]}, but {self.name} knows only {', '.join(sorted(where))}"
            )
        here = all(where[key] == value for key, value in self.wanted.items())
        if here and next(self.visits) == self.last and self._first_of_all_runs():
            _ACTIONS[self.action](self.seconds)

    def _first_of_all_runs(self) -> bool:
        """True once per marker file, whichever process asks first; always, where no marker is named."""
        marker = os.environ.get("SFUMATO_FAILPOINT_ONCE")
        if marker is None:
            return True
        try:
            Path(marker + (f"-{self.number}" if self.number else "")).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@lru_cache(maxsize=1)  # keeps the counts of visits too: one environment a process
def _parse(text: str) -> tuple[_Specification, ...]:
    specifications: list[_Specification] = []
    for number, part in enumerate(text.split(";")):
        match = _GRAMMAR.fullmatch(part)
        if match is None:
            raise ValueError(
                f"SFUMATO_FAILPOINT holds {part!r}: write name, name:visit or name@rank=1,step=7, then perhaps "
                f"one of {', '.join('!' + action for action in _ACTIONS)} (!delay=0.5), and ; between several"
            )
        wanted = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", match["where"] or "")}
        visit, action = int(match["visit"] or 1), match["action"] or "kill"
        specifications.append(_Specification(match["name"], wanted, visit, action, match["seconds"], number))
    return tuple(specifications)
