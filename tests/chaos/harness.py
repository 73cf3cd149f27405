"""Trials: a real job of two ranks under a fault, restarted as a supervisor would, and what must hold whatever happens.

    python -m tests.chaos.harness [--random N] [--seed S]     the whole matrix and N random faults, as a table

The invariants (design 5.7), checked after every attempt:

- the state that was loaded is the same save on all ranks, and every bit of it is what was saved;
- it is no older than the newest save that the job was told is durable, unless the disk lied about that very save;
- what was told durable, and is not pruned, is there and whole, unless the disk lied about it;
- no broken save is handed out: what is not whole is passed over, with a warning that names its file, or refused.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from checkpointing import store
from checkpointing.sharded import Checkpoint
from checkpointing.store import CheckpointError, LocalPlace, SaveId
from tests.chaos import corruption, faulty_disk, trainer
from tests.chaos.faulty_disk import DiskFault
from tests.chaos.trainer import STEPS, pieces_of, wrong_pieces

WORLD_SIZE, ATTEMPTS = 2, 4
HANG_S = 9.0  # without a new line in any account: more than the job's own time-outs

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([trainer.__name__])


@dataclass(frozen=True)
class Signal:
    """Sent from outside once rank 0's account has so many lines."""

    number: signal.Signals
    rank: int
    to_writer: bool
    lines: int


@dataclass(frozen=True)
class Corruption:
    """Done to one file that fits, drawn by `seed`, after the first attempt: of a committed save, or in memory."""

    kind: str
    file: str
    seed: int = 0


@dataclass(frozen=True)
class Fault:
    """What befalls one trial."""

    name: str
    failpoint: str | None = None
    disk: DiskFault | None = None
    signal: Signal | None = None
    corruption: Corruption | None = None
    memory_lost: bool = False  # the machine, and not only the job, starts again
    plain: bool = False  # saves without tiers
    num_nodes: int = 1
    node_lost: int | None = None  # whose memory is gone with it

    @property
    def silent(self) -> bool:
        """Whether the disk lies, so that what is told durable may not be."""
        return self.disk is not None and self.disk.kind in faulty_disk.SILENT


@dataclass
class Outcome:
    attempts: int = 0
    struck: bool = False
    finished: bool = False
    loaded: list[str] = field(default_factory=list)
    refused: str = ""
    broken: list[str] = field(default_factory=list)  # what did not hold

    def __str__(self) -> str:
        if self.broken:
            return "BROKEN: " + "; ".join(self.broken)
        if self.refused and not self.finished:
            return f"refused: {self.refused}"
        if not self.struck:
            return "never struck"
        went = " then ".join(self.loaded) or "from the start"
        return "went on" if self.attempts == 1 else f"resumed: {went}"


class Trial:
    """One job in its own folder, from its start under a fault to its end."""

    def __init__(self, folder: Path, fault: Fault, journal: Path | None = None) -> None:
        self.folder, self.fault, self.outcome = folder, fault, Outcome()
        self.journal = None if journal is None else (journal, folder)
        self.place = LocalPlace(folder / "checkpoints")
        self.durable = set[SaveId]()  # told so
        self.harmed = set[SaveId]()  # by the corruption

    def run(self) -> Outcome:
        self.folder.mkdir(parents=True)
        for epoch in range(1, ATTEMPTS + 1):
            self._attempt(epoch)
            self.check(epoch)
            if self.outcome.finished or self.outcome.broken:
                break
            if self.fault.memory_lost:
                remove_tree(self.folder / "memory")
            if epoch == 1 and self.fault.node_lost is not None:
                remove_tree(self.folder / "memory" / f"node-{self.fault.node_lost}")
            if epoch == 1 and self.fault.corruption is not None:
                self._corrupt(self.fault.corruption)
        self.outcome.struck = self._struck()
        if self.outcome.finished:
            self.check_end()
        elif not self.outcome.refused and not self.outcome.broken:
            self.outcome.broken.append(f"neither finished nor refused in {ATTEMPTS} attempts")
        return self.outcome

    # --- running ---

    def _environment(self, rank: int) -> dict[str, str]:
        disk = () if self.fault.disk is None else (replace(self.fault.disk, marker=str(self.folder / "struck-disk")),)
        placed = {"RANK": rank, "WORLD_SIZE": WORLD_SIZE, "NNODES": self.fault.num_nodes}
        environment = {
            **{key: str(value) for key, value in placed.items()},
            **faulty_disk.environment(disk, self.journal),
        }
        if self.fault.failpoint is not None:
            environment["SFUMATO_FAILPOINT"] = self.fault.failpoint
            environment["SFUMATO_FAILPOINT_ONCE"] = str(self.folder / "struck")
        return environment

    def _struck(self) -> bool:
        fault = self.fault
        parts = {"struck": fault.failpoint, "struck-disk": fault.disk, "struck-signal": fault.signal}
        parts["struck-file"] = fault.corruption
        return all((self.folder / marker).exists() for marker, part in parts.items() if part is not None)

    def _attempt(self, epoch: int) -> None:
        self.outcome.attempts = epoch
        ranks = [
            processes.Process(target=trainer.run, args=(self.folder, epoch, self._environment(rank), self.fault.plain))
            for rank in range(WORLD_SIZE)
        ]
        for process in ranks:
            process.start()
        try:
            self._watch(ranks, epoch)
        finally:
            end(ranks)

    def _watch(self, ranks: Sequence[BaseProcess], epoch: int) -> None:
        """Until all have ended, one has died, or nothing moves any more."""
        size, moved = -1, time.monotonic()
        while any(process.is_alive() for process in ranks):
            time.sleep(0.02)
            now = sum(path.stat().st_size for path in self.folder.glob(f"account-{epoch}-*.jsonl"))
            if now != size:
                size, moved = now, time.monotonic()
            if time.monotonic() - moved > HANG_S:
                return
            if any(process.exitcode not in (None, 0) for process in ranks):
                if not all(process.exitcode is not None for process in ranks):
                    time.sleep(0.3)  # the others may have something to say before they are ended
                return
            self._send(ranks, epoch)

    def _send(self, ranks: Sequence[BaseProcess], epoch: int) -> None:
        sent, marker = self.fault.signal, self.folder / "struck-signal"
        if sent is None or marker.exists() or len(list(self._account(epoch, 0))) < sent.lines:
            return
        pid = ranks[sent.rank].pid
        assert pid is not None
        if sent.to_writer:
            pid = next(iter(writers_of(pid)), None)
        if pid is not None:
            marker.touch()
            os.kill(pid, sent.number)

    def _account(self, epoch: int, rank: int) -> Iterator[dict[str, Any]]:
        path = self.folder / f"account-{epoch}-{rank}.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return (json.loads(line) for line in lines if line.endswith(b"\n"))

    def _corrupt(self, harm: Corruption) -> None:
        generator = random.Random(harm.seed)
        committed = {save.name for save in store.committed(self.place)}
        found = [path for path in sorted(self.folder.glob(harm.file)) if path.is_file() and path.stat().st_size]
        found = [path for path in found if path.parent.name in committed or "memory" in harm.file]
        if found:
            path = generator.choice(found)
            harmed = corruption.corrupt(harm.kind, path, generator)
            self.harmed |= {save for one in harmed if (save := SaveId.parse(one.parent.name))}
            if harmed:
                (self.folder / "struck-file").touch()

    # --- what must hold ---

    def check(self, epoch: int) -> None:
        broken, told = self.outcome.broken, [list(self._account(epoch, rank)) for rank in range(WORLD_SIZE)]
        before = set(self.durable)
        loaded = [line for lines in told for line in lines if "loaded" in line]
        names = {line["loaded"] for line in loaded}
        if len(names) > 1:
            broken.append(f"ranks loaded different saves: {sorted(names)}")
        broken += [f"rank loaded {line['loaded']} with wrong {line['wrong']}" for line in loaded if line["wrong"]]
        if loaded:
            save = SaveId.parse(loaded[0]["loaded"])
            assert save is not None
            self.outcome.loaded.append(f"{loaded[0]['where']}, step {save.step}")
            lost = {older for older in before if older.step > save.step} - self.harmed
            if lost and not self.fault.silent:
                broken.append(f"loaded step {save.step}, though step {max(s.step for s in lost)} was told durable")
        elif before - self.harmed and not self.fault.silent and any("step" in line for lines in told for line in lines):
            broken.append(f"began again from nothing, though {max(before)} was told durable")
        self.durable |= {
            save
            for lines in told
            for line in lines
            if "durable" in line and (save := SaveId.parse(line["durable"])) is not None
        }
        refusals = [line["refused"] for lines in told for line in lines if "refused" in line]
        self.outcome.refused = refusals[-1] if refusals else ""
        self.outcome.finished = all(any("finished" in line for line in lines) for lines in told)
        kept = newest(self.durable | set(store.committed(self.place)), trainer.KEEP) & self.durable - self.harmed
        broken += broken_saves(self.place, set[SaveId]() if self.fault.silent else kept)

    def check_end(self) -> None:
        """The last save is there and right, unless the disk lied about it; then it is not taken for right."""
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            try:
                found = store.newest_whole(self.place)
            except CheckpointError as error:
                found, self.outcome.refused = None, str(error)
        if self.harmed and self.outcome.attempts == 1:
            return  # harmed once all was done
        if not self.fault.silent and (found is None or found.step != STEPS):
            self.outcome.broken.append(f"at the end the newest whole save is {found and found.save}")


def broken_saves(place: LocalPlace, must_be_whole: set[SaveId]) -> list[str]:
    """What is wrong with the committed saves: which must be whole and are not, and which hand out wrong bits."""
    found = list[str]()
    for save in store.committed(place):
        reason = store.reason_broken(place, save)
        if reason is None:
            if wrong := wrong_pieces(Checkpoint.open(place, save), pieces_of(0, 1)):
                found.append(f"{save} passes for whole with wrong {wrong}")
        elif save in must_be_whole:
            found.append(f"{save} was told durable: {reason}")
    gone = must_be_whole - set(store.committed(place))
    return found + [f"{save} was told durable and is gone" for save in sorted(gone)]


def newest(saves: set[SaveId], keep: int) -> set[SaveId]:
    return set(sorted(saves, reverse=True)[:keep])


# --- processes ---


def writers_of(pid: int) -> list[int]:
    """The rank's writer processes."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [
            int(child) for child in children if b"checkpointing.writer" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
    except OSError:
        return []


def end(ranks: Sequence[BaseProcess]) -> None:
    """End the ranks and their writers, stopped ones too, as a supervisor that finds its job's processes does."""
    writers = [writer for process in ranks if process.pid for writer in writers_of(process.pid)]
    for process in ranks:
        process.kill()
        process.join()
    for writer in writers:
        try:
            os.kill(writer, signal.SIGKILL)
        except ProcessLookupError:
            continue


def remove_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
