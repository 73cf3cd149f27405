"""The processes of one stage: started so that none outlives the launch, found wherever they went, ended together.

A stage is a tree: the launcher (torchrun or deepspeed), its ranks, and what those start. torchrun gives each rank a
session of its own and deepspeed's runner forgets its children when it is killed, so neither a process group nor a
parent's id finds them all. Each carries a token in its environment instead, and is found by it in /proc.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

TOKEN = "SFUMATO_STAGE_TOKEN"
SUPERVISOR = "SFUMATO_SUPERVISOR_PID"

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class ProcessTree:
    """A command and everything it starts."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: IO[bytes]) -> None:
        self.token = uuid.uuid4().hex
        supervisor = os.getpid()

        def die_with_supervisor() -> None:
            # SIGTERM, for torchrun passes it on to its ranks, which save and exit.
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != supervisor:  # it died before the call
                os._exit(1)

        self.leader = subprocess.Popen(
            command,
            env={**env, TOKEN: self.token, SUPERVISOR: str(supervisor)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the launch alone, which then stops the stage in order
            preexec_fn=die_with_supervisor,  # noqa: PLW1509 - one system call on a loaded library, no lock to meet
        )

    def members(self) -> list[int]:
        """Ids of the living processes of the tree, wherever they were reparented."""
        mark = f"{TOKEN}={self.token}".encode()
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue  # gone, or another user's
            if mark in environment.split(b"\0"):
                found.append(int(entry.name))
        return found

    def alive(self) -> bool:
        """Whether any process of the tree is left."""
        return self.leader.poll() is None or bool(self.members())

    def terminate(self) -> None:
        """SIGTERM to the leader and its group: a stage saves and exits on it. torchrun passes it on to its ranks."""
        try:
            os.killpg(self.leader.pid, signal.SIGTERM)
        except ProcessLookupError:
            return

    def kill(self) -> None:
        """SIGKILL to every member, until none is left; does nothing where all have ended."""
        while members := self.members():
            for pid in members:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.leader.poll()
            time.sleep(0.01)
        self.leader.wait()


def follow_supervisor(grace_s: float = 30) -> None:
    """Called by a stage's process at its start: when the launch that started it dies, even by SIGKILL, end too.

    SIGTERM first, so that a training stage saves, and SIGKILL after `grace_s`. Without a launch (a stage started by
    hand) it does nothing.
    """
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor is None:
        return
    try:
        handle = os.pidfd_open(int(supervisor))
    except ProcessLookupError:
        raise SystemExit(f"the launch that started this process (id {supervisor}) is gone") from None

    def follow() -> None:
        poll = select.poll()
        poll.register(handle, select.POLLIN)  # readable once the process has ended
        poll.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, name="follow-supervisor", daemon=True).start()
