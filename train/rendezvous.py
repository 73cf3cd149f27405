"""Who runs an attempt together, and where its ranks meet: agreed on by the launches, outside of what they start.

Each attempt meets at a TCP store of its own that the launch of node 0 serves, so that neither torchrun's agent nor a
rank takes it down with itself, and nothing that an earlier attempt left behind is ever read. On several nodes the
launches agree over one more store, at MASTER_ADDR:MASTER_PORT, which lives as long as the launch of node 0 does: node 0
decides who belongs to the next attempt and with how many ranks, and the first launch that sees its part of an attempt
fail tells all others, which then end theirs at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Protocol

from torch.distributed import DistError, PrefixStore, TCPStore

_TICK_S = 1.0  # between two signs of life of a launch
_PATIENCE_S = 10.0  # without one, before its node counts as lost
_POLL_S = 0.1
_NOTHING = "-"  # a value that was set, and says nothing yet


class NodeLost(ConnectionError):
    """The launch of another node, without which nothing can go on, is gone."""


@dataclass(frozen=True)
class Team:
    """Those who run one attempt: `nnodes` nodes with `nproc` ranks each, of which this is number `node_rank`.

    Their ranks meet at `address`:`port`; port None: a single process, which meets nobody.
    """

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    address: str = "localhost"
    port: int | None = None
    epoch: int | None = None  # the run's fencing epoch for this attempt
    generation: int = 0

    @property
    def ranks(self) -> range:
        """The ranks on this node."""
        return range(self.node_rank * self.nproc, (self.node_rank + 1) * self.nproc)


class Rendezvous(Protocol):
    """How this node's launch finds the team of each attempt at one stage."""

    leads: bool  # decides for all nodes when to start again, and when to give up

    def assemble(self, nproc: int, min_ranks: int | None, stopped: Callable[[], bool]) -> Team | None:
        """The next attempt's team, once it is complete; None where this node was told to stop, or all were to end."""
        ...

    def trouble(self, team: Team) -> tuple[Any, str] | None:
        """What failed in this attempt, as another node reported it: its cause and a sentence."""
        ...

    def report(self, team: Team, cause: str, what: str) -> None:
        """Tell the others that this node's part of the attempt failed."""
        ...

    def conclude(self, verdict: dict[str, str]) -> None:
        """Node 0 tells the others how the stage ended."""
        ...

    def verdict(self) -> dict[str, str] | None:
        """How node 0 said that the stage ended."""
        ...


class OneNode:
    """The team is this node alone; `together` where there is more than one process, which then need a store."""

    leads = True

    def __init__(self, epoch: Callable[[], int | None] = lambda: None, *, together: bool = False) -> None:
        self._epoch, self._together = epoch, together
        self._store: TCPStore | None = None
        self._generation = 0

    def assemble(self, nproc: int, min_ranks: int | None, stopped: Callable[[], bool]) -> Team | None:
        self._generation += 1
        self._store = serve("localhost") if self._together else None
        port = None if self._store is None else self._store.port
        return Team(nproc, port=port, epoch=self._epoch(), generation=self._generation)

    def trouble(self, team: Team) -> tuple[Any, str] | None:
        return None

    def report(self, team: Team, cause: str, what: str) -> None: ...

    def conclude(self, verdict: dict[str, str]) -> None: ...

    def verdict(self) -> dict[str, str] | None:
        return None


class Meeting:
    """The launches' own store, for the length of a launch on several nodes; node 0 serves it."""

    def __init__(self, address: str, port: int, *, nnodes: int, node_rank: int, wait_s: float) -> None:
        self.address, self.nnodes, self.node_rank = address, nnodes, node_rank
        try:
            self.store = TCPStore(
                address,
                port,
                is_master=node_rank == 0,
                wait_for_workers=False,
                timeout=timedelta(seconds=wait_s),
            )
        except (DistError, RuntimeError) as error:
            raise NodeLost(
                f"the launch of node 0 does not answer at {address}:{port} ({_first_line(error)}): start it too, with "
                "the same MASTER_ADDR and MASTER_PORT"
            ) from error
        self.store.set_timeout(timedelta(seconds=_PATIENCE_S))

    def close(self, patience_s: float = 5.0) -> None:
        """Say goodbye; node 0 waits a little for the others, who may still read what it said last."""
        try:
            self.store.set(f"bye/{self.node_rank}", "1")
            deadline = time.monotonic() + patience_s
            others = [f"bye/{node}" for node in range(1, self.nnodes)]
            while self.node_rank == 0 and not self.store.check(others) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        except (DistError, RuntimeError):
            pass  # node 0 is gone, and nobody is left to tell


class ManyNodes:
    """The team of a stage on several nodes; `epoch` is called on node 0 only.

    Node 0 waits `first_wait_s` for all nodes before the first attempt and `wait_s` before a later one; after that it
    goes on with those that came, if they have `min_ranks` ranks, and else waits until `first_wait_s` are over. A node
    that comes later joins at the next restart.
    """

    def __init__(
        self,
        meeting: Meeting,
        stage: str,
        epoch: Callable[[], int | None],
        say: Callable[[str], None],
        *,
        first_wait_s: float,
        wait_s: float = 30.0,
    ) -> None:
        self.meeting, self.leads = meeting, meeting.node_rank == 0
        self._keys = PrefixStore(f"stage/{stage}", meeting.store)
        self._epoch, self._say = epoch, say
        self._first_wait_s, self._wait_s = first_wait_s, wait_s
        self._store: TCPStore | None = None
        self._generation = 0
        self._wanted = 0  # ranks at the first attempt
        self._members: list[int] = []
        self._ticked = 0.0
        self._heard: dict[int, tuple[int, float]] = {}  # node: its count of signs of life, and when it last rose

    def assemble(self, nproc: int, min_ranks: int | None, stopped: Callable[[], bool]) -> Team | None:
        try:
            return self._lead(nproc, min_ranks, stopped) if self.leads else self._follow(nproc, stopped)
        except (DistError, RuntimeError) as error:
            raise self._lost(error) from error

    def trouble(self, team: Team) -> tuple[Any, str] | None:
        now = time.monotonic()
        if now - self._ticked < _TICK_S:
            return None
        self._ticked = now
        try:
            self._keys.add(f"alive/{self.meeting.node_rank}", 1)
            if self.leads and (lost := self._silent(now)) is not None:
                self.report(team, "crash", f"node {lost} gave no sign of life for {_PATIENCE_S:g} s")
            said = self._read(f"trouble/{team.generation}")
        except (DistError, RuntimeError):
            return "crash", "the launch of node 0 is gone"
        return None if said is None else tuple(json.loads(said))

    def report(self, team: Team, cause: str, what: str) -> None:
        said = json.dumps([cause, f"node {self.meeting.node_rank}: {what}"])
        try:  # the first report stands
            self._keys.compare_set(f"trouble/{team.generation}", _NOTHING, said)
        except (DistError, RuntimeError):
            return  # nobody is left to tell

    def conclude(self, verdict: dict[str, str]) -> None:
        self._keys.set("verdict", json.dumps(verdict))

    def verdict(self) -> dict[str, str] | None:
        try:
            said = self._read("verdict")
        except (DistError, RuntimeError) as error:
            raise self._lost(error) from error
        return None if said is None else json.loads(said)

    def _lead(self, nproc: int, min_ranks: int | None, stopped: Callable[[], bool]) -> Team | None:
        begun, said = time.monotonic(), False
        self._wanted = self._wanted or nproc * self.meeting.nnodes
        patience_s = self._first_wait_s if self._generation == 0 else self._wait_s
        while True:
            offers = {0: nproc}
            for node in range(1, self.meeting.nnodes):
                offer = self._read(f"join/{node}")
                if offer is not None:
                    offers[node] = int(offer)
            waited_s = time.monotonic() - begun
            share = min(offers.values())
            complete = len(offers) == self.meeting.nnodes
            enough = share * len(offers) >= (self._wanted if min_ranks is None else min_ranks)
            if enough and (complete or waited_s >= patience_s):
                return self._publish(sorted(offers), share)
            if waited_s >= max(self._first_wait_s, patience_s):
                raise NodeLost(
                    f"{len(offers)} of {self.meeting.nnodes} nodes came within {waited_s:.0f} s, with {share} ranks "
                    "each: start the others' launches too, or set parallel.min_ranks to go on with fewer ranks"
                )
            if not said and waited_s > 2:
                self._say(f"waiting for {self.meeting.nnodes - len(offers)} of {self.meeting.nnodes} nodes")
                said = True
            if stopped():
                return None
            time.sleep(_POLL_S)

    def _publish(self, nodes: list[int], nproc: int) -> Team:
        self._generation += 1
        self._store = serve(self.meeting.address)
        self._members, self._heard = nodes, {}
        team = Team(
            nproc, len(nodes), 0, self.meeting.address, self._store.port, self._epoch(), generation=self._generation
        )
        for node in nodes[1:]:
            self._keys.delete_key(f"join/{node}")
        self._keys.set(f"trouble/{self._generation}", _NOTHING)
        self._keys.set(f"team/{self._generation}", json.dumps({"nodes": nodes, "team": asdict(team)}))
        self._keys.set("generation", str(self._generation))
        return team

    def _follow(self, nproc: int, stopped: Callable[[], bool]) -> Team | None:
        node = self.meeting.node_rank
        seen = int(self._read("generation") or 0)
        self._keys.set(f"join/{node}", str(nproc))
        while not stopped():
            if self._read("verdict") is not None:
                return None
            generation = int(self._read("generation") or 0)
            if generation > seen:
                seen = generation
                plan: dict[str, Any] = json.loads(self._read(f"team/{generation}") or "{}")
                if node in plan["nodes"]:
                    return Team(**(plan["team"] | {"node_rank": plan["nodes"].index(node)}))
            time.sleep(_POLL_S)
        self._keys.delete_key(f"join/{node}")
        return None

    def _silent(self, now: float) -> int | None:
        for node in self._members[1:]:
            count = self._keys.add(f"alive/{node}", 0)
            before, since = self._heard.get(node, (-1, now))
            if count != before:
                self._heard[node] = (count, now)
            elif now - since > _PATIENCE_S:
                return node
        return None

    def _read(self, key: str) -> str | None:
        said = self._keys.get(key).decode() if self._keys.check([key]) else _NOTHING
        return None if said == _NOTHING else said

    def _lost(self, error: Exception) -> NodeLost:
        return NodeLost(f"the launch of node 0 is gone ({_first_line(error)}): start it again")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def serve(address: str) -> TCPStore:
    """A new TCP store on a free port of this machine, which lives as long as the returned object."""
    return TCPStore(address, 0, is_master=True, wait_for_workers=False)
