"""Work on records in a child process that may die: whatever a record does to it, this process goes on.

A batch goes to the child and its results come back. Where the child dies or hangs over it, or raises, the batch is done
again one record at a time. A record that fails twice by itself is given up, with a reason and without its content; a
child that was killed from outside costs nothing but time.

It guards against crashes and hangs of decoders and detectors. It is no wall against code that takes the child over: the
child may do what this process may, but to run on alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

TRIES = 2  # of a record by itself
START_S = 600.0  # that a child may take until it is ready: models are read

_PR_SET_PDEATHSIG = 1
_CODE = re.compile(r"[a-z0-9_]{1,60}")

Item = TypeVar("Item")
Result = TypeVar("Result")
Make = Callable[[], Callable[[Sequence[Item]], Sequence[Result]]]


@dataclass(frozen=True)
class Died:
    """A record that was given up. reason, a code: crashed, timed_out, out_of_memory, failed_<exception's type>, or the
    exception's own `reason`; never its message, which may hold a value.
    """

    reason: str


class Sandbox(Generic[Item, Result]):
    """A function over batches, run in a child process that is started when it is first needed.

    make: called in the child, once a child; gives the function, which answers a batch with as many results. What it
    raises ends `run`: there is no record in it yet. Items and results are pickled, and so is `make`.
    timeout_s: that a batch, and a record by itself, may take. memory_bytes: that the function may take beside what
    `make` took; None for what there is. Where memory runs out all the same, the kernel ends the child first.

    Guarantee: the child ends when the thread that called `run` does, however that ends (SIGKILL too), and what it
    prints goes nowhere. Use it from the main thread, which lives as long as the process.
    """

    def __init__(self, make: Make[Item, Result], timeout_s: float, memory_bytes: int | None = None) -> None:
        self._settings = pickle.dumps((sys.path, memory_bytes)), pickle.dumps(make)
        self._timeout_s = timeout_s
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return None if self._child is None else self._child[0].pid

    def run(self, items: Sequence[Item]) -> list[Result | Died]:
        """The result of each item in order, or why there is none.

        Raises ValueError with the message of what `make` raised, where that is for a person to mend; RuntimeError where
        it raised anything else, or no child gets ready.
        """
        if not items:
            return []
        answers = self._attempt(items)
        if isinstance(answers, Died):
            return [self._alone(item, tried=int(len(items) == 1)) for item in items]
        return answers

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            process, connection = self._child
            self._child = None
            process.kill()
            process.wait()
            connection.close()

    def _alone(self, item: Item, tried: int) -> Result | Died:
        died = Died("crashed")
        for _ in range(TRIES - tried):
            answers = self._attempt([item])
            if not isinstance(answers, Died):
                return answers[0]
            died = answers
        return died

    def _attempt(self, items: Sequence[Item]) -> list[Result | Died] | Died:
        """The answers to a batch, or how it ended."""
        self._ready()
        kind, content = self._ask(pickle.dumps(list(items)), self._timeout_s)
        if kind != "results":
            return Died(content)
        assert len(content) == len(items), f"{len(content)} results for {len(items)} items"
        return content

    def _ready(self) -> None:
        """See to a child that has its function."""
        for _ in range(TRIES):
            if self._child is not None:
                return
            self._child = _start()
            for settings in self._settings:
                kind, content = self._ask(settings, START_S)
                if kind == "refused":
                    self.close()
                    raise ValueError(content)
                if kind == "broken":
                    self.close()
                    raise RuntimeError(content)
        if self._child is None:
            raise RuntimeError(
                f"the process that detectors run in dies before its first record (it {content}): it has too little "
                "memory, or a package that it loads is broken"
            )

    def _ask(self, message: bytes, timeout_s: float) -> tuple[str, Any]:
        """Send and wait: what the child says, or ("died", how). A child that does not answer in time is killed."""
        if self._child is None:
            return "died", "crashed"
        process, connection = self._child
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout_s, end)  # also where it takes nothing from the pipe, being stopped
        timer.start()
        try:
            connection.send_bytes(message)
            answer: tuple[str, Any] = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            answer = "died", "timed_out" if late.is_set() else "crashed"
        finally:
            timer.cancel()
        if answer[0] == "died" or late.is_set():
            self.close()
        return answer


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            # By its path and without its folder in sys.path: the child is told where else to look.
            [sys.executable, "-P", str(Path(__file__).resolve()), str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # a library's last words may hold a record's
        )
    return process, Connection(ours.detach())


# --- in the child --------------------------------------------------------------------------------------------------


def _serve(connection: Connection, parent: int) -> None:
    """Answer batches until the other end is closed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    with contextlib.suppress(OSError):  # a container may refuse it
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    sys.path[:], memory_bytes = pickle.loads(connection.recv_bytes())
    _answer(connection, "settings", None)
    try:
        function = pickle.loads(connection.recv_bytes())()
    except (ValueError, OSError, ImportError) as error:
        _answer(connection, "refused", str(error))
        return
    except Exception as error:
        _answer(connection, "broken", f"{type(error).__name__}: {error}")
        return
    if memory_bytes is not None:
        most = _data_bytes() + memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    _answer(connection, "ready", None)
    while True:
        items = pickle.loads(connection.recv_bytes())
        try:
            answer = "results", list(function(items))
        except Exception as error:
            answer = "failed", _reason(error)
        _answer(connection, *answer)


def _answer(connection: Connection, kind: str, content: object) -> None:
    connection.send_bytes(pickle.dumps((kind, content)))


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out_of_memory"
    reason = getattr(error, "reason", None)
    named = isinstance(reason, str) and _CODE.fullmatch(reason)
    return str(reason) if named else f"failed_{type(error).__name__}"


def _data_bytes() -> int:
    """What counts for RLIMIT_DATA now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData")))


if __name__ == "__main__":
    try:
        _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
    except (EOFError, ConnectionError):
        os._exit(0)  # the parent closed
