"""A training stage's saves: when they are due, in which tiers they lie, and what a stage goes on from."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpointing.layout import SaveId
from checkpointing.peers import PeerLink
from checkpointing.recovery import recover
from checkpointing.sharded import Checkpoint
from checkpointing.tiers import Checkpointer, Tiers
from train.config import TrainStage
from train.goodput import recommend_interval
from train.health import BadStep
from train.optim import ExponentialMovingAverage
from train.parallel import Backend
from train.run_folder import RunFolder
from train.state import pieces, ranges, tensors
from train.timeline import Timeline

CHECKPOINTS = "checkpoints"
_TRIAL = 20  # steps between saves until `checkpoint.every: auto` knows better
MEMORY = "SFUMATO_MEMORY"  # the folder, on a file system in memory, that snapshots go to


class Saves:
    """Snapshots in memory every few steps, saves on a disk less often, and copies of these in a remote store."""

    def __init__(
        self, stage: TrainStage, run: RunFolder, backend: Backend, average: ExponentialMovingAverage, epoch: int,
        timeline: Timeline,
    ) -> None:  # fmt: skip
        self.stage, self.backend, self.average, self.timeline = stage, backend, average, timeline
        self.settings = stage.checkpoint
        world = backend.world
        ranks_a_node = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        self.place = {"rank": world.rank, "world_size": world.size, "node": world.rank // ranks_a_node}
        self.num_nodes = -(-world.size // ranks_a_node)
        self.epoch = epoch
        self.tiers = Tiers(
            disk=run.path / stage.name / CHECKPOINTS,
            memory=_memory_folder(run, stage) if self.settings.memory_every else None,
            remote=f"{self.settings.remote.rstrip('/')}/{run.run_id}/{stage.name}" if self.settings.remote else None,
            keep=self.settings.keep,
            keep_every=self.settings.keep_every,
        )
        self.peer = PeerLink.join(**self.place)
        self.checkpointer: Checkpointer | None = None
        self.resumed: SaveId | None = None  # what the stage goes on from
        self.every = None if self.settings.every == "auto" else self.settings.every
        self.clock = dict[int, float]()  # when each step ended, until `every` is known
        self.tried: int | None = None  # the step of the first save on the disk,
        self.committed: int | None = None  # and the step at which it was there

    def recover(self) -> Checkpoint | None:
        """The newest save that is whole in any tier, the same on every rank; None where none was ever taken."""
        held = ranges(self.backend, self.average)
        found = recover(self.tiers, held, **self.place, gather=self.backend.world.gather, peer=self.peer)
        self.resumed = None if found is None else found.save
        return found

    @contextmanager
    def open(self) -> Iterator[None]:
        """Ready to take saves within the context. Its end is no save: a failure goes on from what was saved before."""
        with Checkpointer(
            self.tiers,
            pieces(self.backend, self.average),
            **self.place,
            epoch=self.epoch,
            num_nodes=self.num_nodes,
            agree=self.backend.world.min,
            peer=self.peer,
            timeout_s=self.stage.supervision.save_s,
        ) as self.checkpointer:
            self.backend.before_update = self._settle
            try:
                yield
            except BadStep:  # raised on all ranks alike, which leaves time for what was saved before it
                self.checkpointer.drain()
                raise

    def due(self, step: int) -> bool:
        """Whether the state after so many steps is to be saved on the disk; every rank asks, once a step."""
        if self.every is None:
            self._watch(step)
            if step % _TRIAL == 0:
                self.every = self.backend.world.broadcast(self._recommended())
        return step % (self.every or _TRIAL) == 0

    def due_in_memory(self, step: int) -> bool:
        """Whether it is to be kept in memory at least."""
        return self.settings.memory_every > 0 and step % self.settings.memory_every == 0

    def take(self, step: int, state: dict[str, Any], *, durable: bool) -> None:
        """Begin a save of the state after so many steps; the copy goes on while the next step computes."""
        assert self.checkpointer is not None
        begun = time.monotonic()
        if durable and self.tried is None:
            self.tried = step
        self.checkpointer.snapshot(step, tensors(self.backend, self.average), state, durable=durable)
        self.timeline.event("stall", step=step, seconds=round(time.monotonic() - begun, 4))

    def finish(self) -> Path:
        """Wait until everything is on the disk, and leave nothing in memory; returns the newest save's folder."""
        assert self.checkpointer is not None
        begun = time.monotonic()
        self.checkpointer.finish()
        self.timeline.event("drained", seconds=round(time.monotonic() - begun, 3))
        newest = self.checkpointer.newest_durable() or self.resumed  # where all steps had been taken before
        assert newest is not None, "the last step is always saved on the disk"
        return self.tiers.disk / newest.name

    def _watch(self, step: int) -> None:
        """Take the time of a step, and of the first save's commit."""
        self.clock[step] = time.monotonic()
        assert self.checkpointer is not None
        if self.committed is None and self.checkpointer.newest_durable() is not None:
            self.committed = step

    def _recommended(self) -> int | None:
        """Steps between saves that cost this run least; None until rank 0 has seen steps and one save come and go."""
        steps = [
            step for step in self.clock if self.tried is not None and step <= self.tried and step - 1 in self.clock
        ]
        if self.tried is None or self.committed is None or len(steps) < _TRIAL // 2:
            return None
        step_s = statistics.median(self.clock[step] - self.clock[step - 1] for step in steps)
        commit_s = self.clock[self.committed] - self.clock[self.tried]
        save_s = max(0.0, commit_s - (self.committed - self.tried) * step_s)  # what the loop lost meanwhile
        every = recommend_interval(
            step_s, save_s, commit_s=commit_s, nodes=self.num_nodes, multiple_of=self.settings.memory_every or 1
        )
        if self.backend.world.rank == 0:
            print(
                f"checkpoint.every: auto is {every} steps: a step takes {step_s:.3g} s, a save {commit_s:.3g} s, "
                f"of which the loop loses {save_s:.3g} s",
                flush=True,
            )
        return every

    def report(self) -> dict[str, Any]:
        """Seconds and bytes that saving took, for the stage's manifest."""
        assert self.checkpointer is not None
        return self.checkpointer.report()

    def _settle(self) -> None:
        assert self.checkpointer is not None
        self.checkpointer.settle()


def _memory_folder(run: RunFolder, stage: TrainStage) -> Path:
    """This machine's memory of this stage of this very run folder: a copy of the folder is another run's.

    Several launches on one machine, each a node of its own, are told apart by the number that each was given, which
    stays when the nodes that are left are counted anew.
    """
    root = Path(os.environ.get(MEMORY, f"/dev/shm/sfumato-{os.getuid()}"))
    where = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:8]
    node = os.environ.get("SLURM_NODEID") or os.environ.get("NODE_RANK") or "0"
    return root / f"{run.run_id}-{where}" / stage.name / f"node-{node}"
