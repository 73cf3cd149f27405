"""Named places at which a test may kill this process for real.

    SFUMATO_FAILPOINT=shard.half_written               die at the first visit
    SFUMATO_FAILPOINT=shard.half_written:3             at the third
    SFUMATO_FAILPOINT=step.computed@rank=1,step=7      where the place's own words match
    SFUMATO_FAILPOINT_ONCE=/path/to/marker             a run restarted with the same environment lives on

Places in this folder: attempt.opened, shard.half_written, shard.synced, remove.manifest_gone, and half_written, synced
and renamed of manifest and of pointer.

Death is SIGKILL: nothing is flushed, no `finally` runs, exactly as when a machine is lost.
With the environment variable absent, a failpoint costs one look-up.
"""

import os
import re
import signal
from pathlib import Path

_SPECIFICATION = re.compile(r"(?P<name>[\w.]+)(:(?P<visit>[1-9]\d*))?(@(?P<where>\w+=\d+(,\w+=\d+)*))?")

_visits = 0


def failpoint(name: str, **where: int) -> None:
    """Die here by SIGKILL if `SFUMATO_FAILPOINT` names this place and its conditions hold.

    `rank` need not be given: it is then the environment's RANK, as launchers set it (0 without one).
    """
    specification = os.environ.get("SFUMATO_FAILPOINT")
    if specification is None:
        return
    match = _SPECIFICATION.fullmatch(specification)
    if match is None:
        raise ValueError(f"SFUMATO_FAILPOINT is {specification!r}: write name, name:visit or name@rank=1,step=7")
    if match["name"] != name:
        return
    wanted = dict(condition.split("=") for condition in (match["where"] or "").split(",") if condition)
    where = {"rank": int(os.environ.get("RANK", "0")), **where}
    if unknown := sorted(set(wanted) - set(where)):
        raise ValueError(f"SFUMATO_FAILPOINT asks for {unknown[0]}, but {name} knows only {', '.join(sorted(where))}")
    if all(where[key] == int(value) for key, value in wanted.items()):
        _visit(int(match["visit"] or 1))


def _visit(fatal_visit: int) -> None:
    global _visits  # noqa: PLW0603  (one specification a process, so one counter)
    _visits += 1
    if _visits == fatal_visit and _first_of_all_runs():
        os.kill(os.getpid(), signal.SIGKILL)


def _first_of_all_runs() -> bool:
    """True once per marker file, whichever process asks first; always, where no marker is named."""
    marker = os.environ.get("SFUMATO_FAILPOINT_ONCE")
    if marker is None:
        return True
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
