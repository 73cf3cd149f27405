"""Trials: a real job of two ranks under a fault, restarted as a supervisor would, and what must hold whatever happens.

    python -m tests.chaos.harness [--random N] [--seed S]     the whole matrix and N random faults, as a table

The invariants (design 5.7), checked after every attempt:

- the state that was loaded is the same save on all ranks, and every bit of it is what was saved;
- it is no older than the newest save that the job was told is durable, unless the disk lied about that very save;
- what was told durable, and is not pruned, is there and whole, unless the disk lied about it;
- no broken save is handed out: what is not whole is passed over, with a warning that names its file, or refused.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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


# --- the matrix ---

STEP_PLACES = ("step.computed@step=9", "snapshot.copying@step=8", "snapshot.copied@step=8")
WRITER_PLACES = (
    "shard.sealed@step=8",
    "attempt.opened@step=8",
    "shard.half_written@step=8",
    "shard.synced@step=8",
    "index.half_written@step=8",
    "index.synced@step=8",
    "index.renamed@step=8",
    "manifest.half_written@step=8",
    "manifest.synced@step=8",
    "manifest.renamed@step=8",
    "pointer.half_written:2",
    "pointer.synced:2",
    "pointer.renamed:2",
    "remove.manifest_gone@step=4",
)
RANK_0_PLACES = ("manifest", "pointer", "remove")
ACTIONS = ("kill", "stop", "term", "enospc", "eio", "delay")


def at_failpoints() -> Iterator[Fault]:
    for place in (*STEP_PLACES, *WRITER_PLACES):
        for rank in range(1 if place.startswith(RANK_0_PLACES) else WORLD_SIZE):
            where = f"{place}{',' if '@' in place else '@'}rank={rank}"
            for action in ACTIONS:
                if action in ("enospc", "eio") and place.startswith("step."):
                    continue
                yield Fault(f"{action} at {where}", f"{where}!{action}")
            yield Fault(f"kill at {where}, machine lost", f"{where}!kill", memory_lost=True)
    for place in WRITER_PLACES:
        for rank in range(1 if place.startswith(RANK_0_PLACES) else WORLD_SIZE):
            if not place.startswith("shard.sealed"):  # nothing is sealed in memory there
                where = f"{place}{',' if '@' in place else '@'}rank={rank}"
                yield Fault(f"kill at {where}, plain save", f"{where}!kill", plain=True)


def on_disk() -> Iterator[Fault]:
    yield Fault("enospc of mkdir *step-00000008.*", disk=DiskFault("enospc", "mkdir", "*step-00000008.*"))
    yield Fault("enospc of free_bytes, once", disk=DiskFault("enospc", "free_bytes"))
    for rank in range(WORLD_SIZE):
        shard, index = f"*step-00000008.*/rank-{rank:05d}.safetensors", f"*step-00000008.*/rank-{rank:05d}.json*"
        met = [(operation, shard) for operation in ("create", "write", "sync_file")]
        met += [(operation, index) for operation in ("write", "sync_file", "rename")]
        met += [("sync_folder", "*step-00000008.*")]
        if rank == 0:
            met += [(operation, "*MANIFEST*") for operation in ("write", "sync_file", "rename", "unlink")]
            met += [("write", "*latest*")]
        for kind in ("enospc", "eio", "slow"):
            for operation, file in met:
                harm = DiskFault(kind, operation, file, rank=rank)
                yield Fault(f"{kind} of {operation} {file}, rank {rank}", disk=harm)
        full = DiskFault("enospc", "write", "*step-00000012.*", rank=rank, times=None)
        yield Fault(f"disk full for good at step 12, rank {rank}", disk=full)
        # What a lying disk holds is found out at the next load: the machine is lost after it.
        ended = f"step.computed@rank={rank},step=11"
        lies = [(kind, "write", file) for kind in ("torn", "zero_hole", "bit_flip") for file in (shard, index)]
        lies += [("lost_rename", "rename", index.removesuffix("*"))]
        if rank == 0:
            lies += [(kind, "write", "*8.*/MANIFEST*") for kind in ("torn", "zero_hole", "bit_flip")]
            lies += [("lost_rename", "rename", "*8.*/MANIFEST*"), ("lost_rename", "rename", "*latest")]
        for kind, operation, file in lies:
            lie = DiskFault(kind, operation, file, rank=rank)  # pyright: ignore[reportArgumentType]
            yield Fault(f"{kind} of {file}, then machine lost", failpoint=ended, disk=lie, memory_lost=True)


def from_outside() -> Iterator[Fault]:
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        for rank in range(WORLD_SIZE):
            for to_writer in (False, True):
                whom = f"{'writer of ' if to_writer else ''}rank {rank}"
                yield Fault(f"{number.name} to {whom}", signal=Signal(number, rank, to_writer, 7))


def corrupted() -> Iterator[Fault]:
    ended = "step.computed@rank=1,step=11"
    for kind in corruption.FAULTS:
        for file in ("rank-00000.safetensors", "rank-00001.json", "MANIFEST.json"):
            if kind == "swapped_between_ranks" and file[0] == "M":
                continue
            harm = Corruption(kind, f"checkpoints/step-00000008.*/{file}")
            yield Fault(f"{kind} of {file} of step 8, machine lost", failpoint=ended, corruption=harm, memory_lost=True)
        harm = Corruption(kind, "memory/*/step-*/rank-*")
        if not kind.startswith("swapped_between_saves"):
            yield Fault(f"{kind} of a file in memory", failpoint=ended, corruption=harm)


def on_two_nodes() -> Iterator[Fault]:
    for rank in range(WORLD_SIZE):
        for action in ("kill", "stop", "eio", "delay"):
            where = f"peer.sending@step=8,rank={rank}!{action}"
            yield Fault(f"two nodes, {where}", where, num_nodes=2)
        yield Fault(f"two nodes, node {rank} lost", f"step.computed@rank={rank},step=11", num_nodes=2, node_lost=rank)
        for file in (f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"):
            harm = Corruption("bit_flip", f"memory/node-{rank}/step-*/{file}")
            name = f"two nodes, bit_flip of {file} in the memory of its node"
            yield Fault(name, f"step.computed@rank={rank},step=11", corruption=harm, num_nodes=2)


def drawn(number: int, seed: int) -> Iterator[Fault]:
    """Random faults: any operation of any process, any place at any visit, any signal at any time, any file."""
    generator = random.Random(seed)
    choice = generator.choice
    for index in range(number):
        rank, lost, plain = generator.randrange(WORLD_SIZE), generator.random() < 0.5, generator.random() < 0.25
        ended = Signal(signal.SIGKILL, rank, False, generator.randrange(3, 14))
        match choice(("failpoint", "disk", "disk", "lie", "signal", "corruption", "corruption")):
            case "failpoint":
                place = choice((*STEP_PLACES, *WRITER_PLACES)).partition("@")[0].partition(":")[0]
                where = f"{place}:{generator.randrange(1, 5)}@rank={rank}!{choice(ACTIONS)}"
                fault = Fault(where, where)
            case "disk":
                kind = choice(("kill", "kill", "stop", "term", "enospc", "eio", "slow"))
                process = None if plain else choice(("rank", "writer", "writer"))
                visit, times = (
                    generator.randrange(1, 70),
                    choice((1, 1, 1, 3, None)) if kind in ("enospc", "eio") else 1,
                )
                harm = DiskFault(kind, visit=visit, rank=rank, process=process, times=times)  # pyright: ignore[reportArgumentType]
                fault = Fault(
                    f"{kind} of disk operation {visit}{'' if times else ' and all later'}, {process} {rank}", disk=harm
                )
            case "lie":
                kind, visit = choice(("torn", "zero_hole", "bit_flip", "lost_rename")), generator.randrange(1, 40)
                fault = Fault(
                    f"{kind} at its chance {visit}, rank {rank}",
                    disk=DiskFault(kind, visit=visit, rank=rank),
                    signal=ended,
                )  # pyright: ignore[reportArgumentType]
                lost = True
            case "signal":
                number_ = choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM))
                sent = Signal(number_, rank, not plain and generator.random() < 0.5, generator.randrange(2, 14))
                fault = Fault(
                    f"{number_.name} to {'writer of ' if sent.to_writer else ''}rank {rank} after {sent.lines} lines",
                    signal=sent,
                )
            case _:
                kind, where = (
                    choice(list(corruption.FAULTS)),
                    choice(("checkpoints/step-*/*", "checkpoints/step-*/*", "memory/*/step-*/*")),
                )
                ended = replace(ended, lines=generator.randrange(7, 14))
                fault = Fault(
                    f"{kind} in {where}", signal=ended, corruption=Corruption(kind, where, generator.randrange(2**32))
                )
                lost = lost or where[0] == "c"
        extra = ", machine lost" if lost else ""
        yield replace(
            fault, name=f"#{index} {fault.name}{', plain' if plain else ''}{extra}", memory_lost=lost, plain=plain
        )


MATRIX: dict[str, Callable[[], Iterator[Fault]]] = {
    "failpoints": at_failpoints,
    "disk": on_disk,
    "signals": from_outside,
    "corruption": corrupted,
    "nodes": on_two_nodes,
}


def run_all(faults: Sequence[Fault], folder: Path) -> list[tuple[Fault, Outcome]]:
    """Each fault in a job of its own; what a trial that held left is removed."""
    results = list[tuple[Fault, Outcome]]()
    for number, fault in enumerate(faults):
        trial = Trial(folder / f"{number:03d}", fault)
        results.append((fault, trial.run()))
        if not results[-1][1].broken:
            remove_tree(trial.folder)
    return results


def table(results: Sequence[tuple[Fault, Outcome]]) -> str:
    width = max(len(fault.name) for fault, _ in results)
    return "\n".join(f"{fault.name:<{width}}  {str(outcome)[:150]}" for fault, outcome in results)


def summary(results: Sequence[tuple[Fault, Outcome]]) -> str:
    kinds = Counter(str(outcome).partition(":")[0] for _, outcome in results)
    return f"{len(results)} faults: " + ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=0, metavar="N", help="faults drawn beside the matrix")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=MATRIX, help="one part of the matrix")
    arguments = parser.parse_args()
    parts = [arguments.only] if arguments.only else ([] if arguments.random else list(MATRIX))
    faults = [fault for part in parts for fault in MATRIX[part]()] + list(drawn(arguments.random, arguments.seed))
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    results = list[tuple[Fault, Outcome]]()
    for fault in faults:
        results += run_all([fault], folder / f"{len(results):03d}")
        print(table(results[-1:]), flush=True)
    print(summary(results), folder)
    return 1 if any(outcome.broken for _, outcome in results) else 0


if __name__ == "__main__":
    sys.exit(main())
