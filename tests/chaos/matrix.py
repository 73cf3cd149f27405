"""Which faults strike where: the whole matrix, random ones without end, and the table of what became of them.

python -m tests.chaos.matrix [--only PART] [--random N] [--seed S]
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tests.chaos import corruption
from tests.chaos.faulty_disk import DiskFault
from tests.chaos.harness import WORLD_SIZE, Corruption, Fault, Outcome, Signal, Trial, remove_tree

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


# --- random faults ---


def drawn(seed: int) -> Iterator[Fault]:
    """Without end: any place at any visit, any operation of any process, any signal at any time, any file."""
    generator = random.Random(seed)
    kinds = (_at_a_place, _on_the_disk, _on_the_disk, _a_lying_disk, _a_signal, _a_corruption, _a_corruption)
    while True:
        rank, plain = generator.randrange(WORLD_SIZE), generator.random() < 0.25
        fault = generator.choice(kinds)(generator, rank, plain)
        lost = fault.memory_lost or (fault.corruption is None and generator.random() < 0.5)
        how = (", plain saves" if plain else "") + (", machine lost" if lost else "")
        yield replace(fault, name=fault.name + how, memory_lost=lost, plain=plain)


def _at_a_place(generator: random.Random, rank: int, plain: bool) -> Fault:
    places = [place for place in (*STEP_PLACES, *WRITER_PLACES) if rank == 0 or not place.startswith(RANK_0_PLACES)]
    if plain:
        places = [place for place in places if not place.startswith(("snapshot", "shard.sealed"))]
    place = generator.choice(places).partition("@")[0].partition(":")[0]
    visit = generator.randrange(1, 2 if place.startswith("remove") else 4)
    where = f"{place}:{visit}@rank={rank}!{generator.choice([a for a in ACTIONS if _can(a, place)])}"
    return Fault(where, where)


def _can(action: str, place: str) -> bool:
    return action not in ("enospc", "eio") or not place.startswith("step.")


def _on_the_disk(generator: random.Random, rank: int, plain: bool) -> Fault:
    kind = generator.choice(("kill", "kill", "stop", "term", "enospc", "eio", "slow"))
    times = generator.choice((1, 1, 1, 3, None)) if kind in ("enospc", "eio") else 1
    visit = generator.randrange(1, 90 if rank == 0 else 45)
    harm = DiskFault(kind, visit=visit, rank=rank, process="rank" if plain else "writer", times=times)
    return Fault(f"{kind} of disk operation {visit}{'' if times else ' and all later'} of rank {rank}", disk=harm)


def _a_lying_disk(generator: random.Random, rank: int, plain: bool) -> Fault:
    kind = generator.choice(("torn", "zero_hole", "bit_flip", "lost_rename"))
    visit = generator.randrange(1, 3 if kind == "lost_rename" and rank else 8)
    lie = DiskFault(kind, visit=visit, rank=rank, operation="rename" if kind == "lost_rename" else "write")
    ended = f"step.computed@rank={rank},step=11"
    return Fault(f"{kind} at chance {visit} of rank {rank}", failpoint=ended, disk=lie, memory_lost=True)


def _a_signal(generator: random.Random, rank: int, plain: bool) -> Fault:
    number = generator.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM))
    sent = Signal(number, rank, not plain and generator.random() < 0.5, generator.randrange(2, 13))
    whom = f"{'the writer of ' if sent.to_writer else ''}rank {rank}"
    return Fault(f"{number.name} to {whom} after {sent.lines} lines", signal=sent)


def _a_corruption(generator: random.Random, rank: int, plain: bool) -> Fault:
    where = generator.choice(("checkpoints/step-*/*", *(() if plain else ("memory/*/step-*/*",))))
    kind = generator.choice(list(corruption.FAULTS))
    harm = Corruption(kind, where, generator.randrange(2**32))
    on_disk = where.startswith("checkpoints")
    ended = f"step.computed@rank={rank},step=11"
    return Fault(f"{kind} in {where}, seed {harm.seed}", failpoint=ended, corruption=harm, memory_lost=on_disk)


# --- running them ---


MATRIX: dict[str, Callable[[], Iterator[Fault]]] = {
    "failpoints": at_failpoints,
    "disk": on_disk,
    "signals": from_outside,
    "corruption": corrupted,
    "nodes": on_two_nodes,
}


Result = tuple[Fault, Outcome]


def strike(faults: Iterable[Fault], folder: Path, until: int | None = None) -> Iterator[Result]:
    """Each fault in a job of its own, until so many have struck; what a trial that held left is removed."""
    struck = 0
    for number, fault in enumerate(faults):
        trial = Trial(folder / f"{number:03d}", fault)
        outcome = trial.run()
        if not outcome.broken:
            remove_tree(trial.folder)
        yield fault, outcome
        struck += outcome.struck
        if struck == until:
            return


def row(result: Result) -> str:
    fault, outcome = result
    return f"{fault.name:<88}  {str(outcome)[:160]}"


def summary(results: Iterable[Result]) -> str:
    kinds = Counter(str(outcome).partition(":")[0] for _, outcome in results)
    return f"{kinds.total()} faults: " + ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MATRIX, help="one part of the matrix")
    parser.add_argument("--random", type=int, metavar="N", help="random faults, until N have struck, for the matrix")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.random:
        faults = drawn(arguments.seed)
    else:
        faults = chain.from_iterable(MATRIX[part]() for part in ([arguments.only] if arguments.only else MATRIX))
    results = list[Result]()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    for result in strike(faults, folder, arguments.random):
        results.append(result)
        print(row(result), flush=True)
    print(summary(results))
    if broken := [fault.name for fault, outcome in results if outcome.broken]:
        print(f"{len(broken)} BROKEN; what they left is in {folder}")
        return 1
    remove_tree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
