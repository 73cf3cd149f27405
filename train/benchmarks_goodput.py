"""What failures cost a job on many nodes: the simulation held against closed forms, Llama 3's run, and our own costs.

What a node does is measured here, at a run of the benchmark: copying, saving and loading through the real checkpoints,
and starting ranks. What cannot be measured on one machine is assumed, and each assumption is a named figure below.
"""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpointing.layout import SaveId, checksum_of
from checkpointing.places import LocalPlace
from checkpointing.sharded import Checkpoint, Chunk, save_now
from train import ROOT
from train.benchmarks import seconds
from train.config import Supervision
from train.goodput import (
    DAY_S,
    Cluster,
    Costs,
    Failure,
    Goodput,
    Loss,
    Schedule,
    daly_ratio,
    recommend_interval,
    simulate,
)
from train.measurements import Row

log = logging.getLogger(__name__)

# --- Llama 3 405B, as published (arXiv:2407.21783, section 3.3) ---
LLAMA3_S = 54 * DAY_S
LLAMA3_NODES = 2048  # 16,384 GPUs, 8 a node
# Table 5's 419 unexpected interruptions by what a run loses to them. GPU 148, its memory 72, SRAM 19, system processor
# 17 and thermal interface 6, NIC 7, silent data corruption 6, SSD 3, power supply 3, chassis 2, IO board 2, CPU 2,
# system memory 2, unplanned host maintenance 32: the node. Network switch or cable 35: the nodes behind it. Software
# bug 54, dependency 2: the process. NCCL watchdog timeout 7: a process too, after it has hung.
LLAMA3_CAUSES: dict[str, tuple[Loss, int]] = {
    "node": ("node", 321),
    "switch": ("domain", 35),
    "crash": ("process", 56),
    "hang": ("process", 7),
}
LLAMA3_PLANNED = 47  # of 466 in all
LLAMA3_STEP_S = 6 * 405e9 * 16e6 / (16_384 * 400e12)  # 16M tokens a step at 400 TFLOP/s a GPU
LLAMA3_STATE_BYTES = 12 * 405e9  # weights and two moments in fp32
LLAMA3_STORAGE = 2e12  # bytes a second, sustained
# Not published, so assumed: how long until an interruption is known, and from there to ranks that have joined.
LLAMA3_DETECT_S, LLAMA3_RESTART_S = 60.0, 300.0

# --- Assumed of a cluster of machines like this one ---
NODES, MANY_NODES = 1000, 16_384
STATE_BYTES = LLAMA3_STATE_BYTES / LLAMA3_NODES  # a node, 2.4 GB
STEP_S = LLAMA3_STEP_S
PEER_BANDWIDTH = 1e9  # bytes a second between two nodes, beside training
STORAGE_BANDWIDTH = 100e9  # of the disk that all nodes share; each gets no more than a node does here
# Until a dead process is seen, and until a node without a sign of life is given up (train/rendezvous.py); a hang takes
# the limit of a step.
DETECT_S = {"crash": 1.0, "node": 10.0, "switch": 10.0, "hang": Supervision().step_s}
SWAP_S, REPAIR_S = 60.0, DAY_S  # to bring in a node that stands ready; until a lost one is back
DOMAIN_NODES = 16  # behind one switch
MEMORY_EVERY = 10

RUNS = 100
SAMPLE_BYTES = 1 << 28


def goodput(picture: Path | None = None) -> list[Row]:
    """Agreement with Daly, Llama 3's run again, and a thousand nodes like this one; `picture`: a PNG file to draw."""
    here = measure()
    log.info("simulating")
    measured = [Row(name=f"goodput.here.{name}", value=value, unit=unit) for name, value, unit in here.figures()]
    rows = [*_agreement(), *_llama3(here), *measured, *_thousand_nodes(here)]
    if picture is not None:
        draw(here, picture)
    return rows


@dataclass(frozen=True)
class Here:
    """What this machine does: bytes a second, and seconds from nothing to two ranks that have joined."""

    copy: float
    seal: float
    save: float
    load: float
    restart_s: float

    def figures(self) -> Iterable[tuple[str, float, str]]:
        """Name, value and unit of each."""
        for name in ("copy", "seal", "save", "load"):
            yield name, getattr(self, name) / 1e9, "GB/s"
        yield "restart", self.restart_s, "s"

    def costs(self, nodes: int) -> Costs:
        """Of a node's share of the state, as if the loop waited for all of a copy, which in truth runs beside it."""
        copy_s, seal_s = STATE_BYTES / self.copy, STATE_BYTES / self.seal
        verified_s, shared = copy_s + seal_s, STORAGE_BANDWIDTH / nodes
        return Costs(
            step_s=STEP_S,
            snapshot_stall_s=copy_s,
            snapshot_seal_s=verified_s,
            peer_copy_s=verified_s + STATE_BYTES / PEER_BANDWIDTH,
            save_stall_s=copy_s,
            save_commit_s=copy_s + STATE_BYTES / min(self.save, shared),
            restart_s=self.restart_s,
            load_memory_s=verified_s,
            load_peer_s=verified_s + STATE_BYTES / PEER_BANDWIDTH,
            load_disk_s=STATE_BYTES / min(self.load, shared),
        )


def measure() -> Here:
    """Medians over three rounds, buffers warm; ranks are started twice, and the second start counts."""
    data = torch.randn(SAMPLE_BYTES // 4)
    buffer = torch.empty_like(data)
    raw = data.numpy().tobytes()
    chunk = Chunk("param", "weight", 0, (len(data),), data)

    def rate(times: Iterable[float]) -> float:
        return SAMPLE_BYTES / statistics.median(times)

    with tempfile.TemporaryDirectory() as name:
        log.info("copying, sealing, saving and loading %d MiB", SAMPLE_BYTES >> 20)
        place = LocalPlace(Path(name))
        copied = rate([seconds(lambda: buffer.copy_(data)) for _ in range(4)][1:])
        sealed = rate([seconds(lambda: checksum_of(raw)) for _ in range(3)])
        saved = rate([seconds(lambda n=n: save_now(place, SaveId(1, n, n), [chunk], {})) for n in range(1, 4)])
        loaded = rate(
            [
                seconds(lambda: Checkpoint.open(place, SaveId(1, 3, 3)).read_into("param", "weight", 0, buffer))
                for _ in range(3)
            ]
        )
    log.info("starting two ranks")
    join = "import train.stages; from train.parallel import join_world; join_world()"
    ranks = [sys.executable, "-m", "train.torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "0"]
    command = [*ranks, "-m", "timeit", "-n", "1", "-r", "1", join]
    starts = [seconds(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, check=True)) for _ in range(2)]
    return Here(copied, sealed, saved, loaded, starts[-1])


def _agreement() -> list[Row]:
    """The largest error of the simulated waste against Daly's closed form, from too many saves to too few."""
    mtbf_s, save_s, restart_s = 20_000.0, 10.0, 50.0
    costs = Costs(step_s=1, save_stall_s=save_s, save_commit_s=save_s, restart_s=restart_s, load_disk_s=0)
    cluster = Cluster(16, (Failure("process", 16 * mtbf_s),))
    errors: list[float] = []
    for every in (100, 300, 600, 1200, 3000):
        found = simulate(costs, cluster, Schedule(every), duration_s=1000 * mtbf_s, runs=400)
        errors.append(abs((1 - found.ratio) / (1 - daly_ratio(every, save_s, restart_s, mtbf_s)) - 1))
    worst = max(errors)
    return [Row(name="goodput.waste_against_daly", value=worst, unit="relative", target=0.01, ok=worst <= 0.01)]


def like_llama3(nodes: int, detect_s: Mapping[str, float], planned: int = 0) -> Cluster:
    """Nodes that fail as Llama 3's did, each kind as often, with spares for any that breaks."""

    def kind(loses: Loss, count: int, detect_s: float) -> Failure:
        return Failure(loses, LLAMA3_S * LLAMA3_NODES / count, detect_s)

    failures = [kind(loses, count, detect_s[cause]) for cause, (loses, count) in LLAMA3_CAUSES.items()]
    failures += [kind("nothing", planned, 0.0)] if planned else []
    domain_nodes = min(DOMAIN_NODES, nodes)
    spares = domain_nodes + nodes // 20
    return Cluster(nodes, tuple(failures), spares, SWAP_S, REPAIR_S, domain_nodes=domain_nodes)


def auto(costs: Costs, nodes: int, memory_every: int = 0) -> Schedule:
    """What `checkpoint.every: auto` takes."""
    every = recommend_interval(
        costs.step_s, costs.save_stall_s, commit_s=costs.save_commit_s, nodes=nodes, multiple_of=memory_every or 1
    )
    return Schedule(every, memory_every)


def _ratio(name: str, found: Goodput, target: float | None = None) -> Row:
    met = None if target is None else found.ratio >= target
    return Row(name=f"goodput.{name}", value=found.ratio, unit="of the time", target=target, ok=met)


def _llama3(here: Here) -> list[Row]:
    """The published run, what its 90% leaves for a restart, and the same with snapshots in memory and at peers."""
    moved_s = LLAMA3_STATE_BYTES / LLAMA3_STORAGE
    costs = Costs(LLAMA3_STEP_S, moved_s, moved_s, LLAMA3_RESTART_S, moved_s)  # the loop waits for a save
    cluster = like_llama3(LLAMA3_NODES, dict.fromkeys(LLAMA3_CAUSES, LLAMA3_DETECT_S), LLAMA3_PLANNED)
    cluster = replace(cluster, swap_s=0.0)  # part of the restart
    # Every save is worth its time: Daly's optimum, whatever share of the time the storage is written to.
    schedule = Schedule(recommend_interval(costs.step_s, costs.save_stall_s, nodes=LLAMA3_NODES))

    def run(costs: Costs, schedule: Schedule, runs: int = RUNS) -> Goodput:
        return simulate(costs, cluster, schedule, duration_s=LLAMA3_S, runs=runs)

    found = run(costs, schedule)
    unexpected = sum(count for loses, count in found.failures.items() if loses != "nothing")
    within, beyond = 0.0, 3600.0
    while beyond - within > 15:
        middle = (within + beyond) / 2
        if run(replace(costs, restart_s=middle), schedule, 20).ratio > 0.9:
            within = middle
        else:
            beyond = middle
    tiers = replace(here.costs(LLAMA3_NODES), restart_s=LLAMA3_RESTART_S)
    near = abs(unexpected / 419 - 1) <= 0.02
    return [
        Row(name="goodput.llama3.interruptions", value=unexpected, unit="in 54 days", target=419, ok=near),
        _ratio("llama3.effective_time", found, target=0.9),
        Row(name="goodput.llama3.save_every", value=schedule.every, unit="steps"),
        Row(name="goodput.llama3.restart_that_leaves_90_percent", value=within, unit="s"),
        _ratio("llama3.with_our_tiers", run(tiers, auto(tiers, LLAMA3_NODES, MEMORY_EVERY))),
    ]


@dataclass(frozen=True)
class Case:
    """A job whose goodput is asked for."""

    costs: Costs
    cluster: Cluster
    schedule: Schedule

    def goodput(self, runs: int = RUNS, failures: int = 1000) -> Goodput:
        """Over 54 days, or about so many failures where that is shorter."""
        duration_s = min(LLAMA3_S, failures / self.cluster.rate())
        return simulate(self.costs, self.cluster, self.schedule, duration_s=duration_s, runs=runs)


def cases(here: Here, nodes: int) -> dict[str, Case]:
    """Nodes like this one, as they are, and with one thing changed at a time."""
    costs, cluster = here.costs(nodes), like_llama3(nodes, DETECT_S)
    ours = Case(costs, cluster, auto(costs, nodes, MEMORY_EVERY))
    late = like_llama3(nodes, {**dict.fromkeys(DETECT_S, 600.0), "crash": DETECT_S["crash"]})
    return {
        "as_it_is": ours,
        "copies_hidden": replace(ours, costs=replace(costs, snapshot_stall_s=0.0, save_stall_s=0.0)),
        "saves_on_disk_alone": replace(ours, schedule=auto(costs, nodes)),
        "peers_behind_another_switch": replace(ours, cluster=replace(cluster, peer_stride=DOMAIN_NODES)),
        "restart_in_5_minutes": replace(ours, costs=replace(costs, restart_s=300.0)),
        "silence_known_after_10_minutes": replace(ours, cluster=late),
        "no_spares_shrinks": replace(ours, cluster=replace(cluster, spares=0, min_nodes=max(1, nodes - nodes // 20))),
        "no_spares_waits": replace(ours, cluster=replace(cluster, spares=0)),
    }


def _thousand_nodes(here: Here) -> list[Row]:
    """What a thousand nodes and many more would get, where the rest goes, and whether `auto` saves as it should."""
    asked = cases(here, NODES)
    found = {name: case.goodput() for name, case in asked.items()}
    rows = [_ratio(f"{NODES}_nodes.{name}", each) for name, each in found.items()]
    ours = found["as_it_is"]
    total_s = sum(ours.seconds.values())
    for name, spent_s in ours.seconds.items():
        rows.append(Row(name=f"goodput.{NODES}_nodes.as_it_is.{name}", value=spent_s / total_s, unit="of the time"))
    resumed = ours.resumed_from
    share = 1 - resumed["disk"] / sum(resumed.values())
    rows.append(Row(name=f"goodput.{NODES}_nodes.as_it_is.resumed_without_disk", value=share, unit="of the failures"))
    for name in ("as_it_is", "saves_on_disk_alone"):
        every = asked[name].schedule.every
        rows.append(Row(name=f"goodput.{NODES}_nodes.{name}.auto_saves_every", value=every, unit="steps"))
    for name, case in cases(here, MANY_NODES).items():
        if not name.startswith("no_spares"):
            rows.append(_ratio(f"{MANY_NODES}_nodes.{name}", case.goodput()))
    worst = min(_auto_over_best(cases(here, nodes)["saves_on_disk_alone"]) for nodes in (10, 100, 1000, 10_000))
    return [*rows, Row(name="goodput.auto_over_best_interval", value=worst, unit="1", target=0.99, ok=worst >= 0.99)]


def _auto_over_best(case: Case) -> float:
    """Goodput with the interval of `auto` over that with the best of others, shorter and longer."""
    others = {max(1, round(case.schedule.every * factor)) for factor in (0.25, 0.5, 0.7, 1.4, 2, 4, 8)}
    return case.goodput().ratio / max(replace(case, schedule=Schedule(every)).goodput().ratio for every in others)


def draw(
    here: Here,
    path: Path,
    counts: Sequence[int] = tuple(1 << power for power in range(3, 15)),
    intervals_of: Sequence[int] = (100, 1000, 10_000),
) -> None:
    """Effective training time against the number of nodes, and against the interval between saves, as a picture."""
    from matplotlib.figure import Figure

    def ratio(case: Case) -> float:
        return case.goodput(runs=10, failures=300).ratio

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_nodes, by_interval = figure.subplots(1, 2, sharey=True)
    lines: dict[str, list[float]] = {}
    for nodes in counts:
        log.info("drawing %d nodes", nodes)
        for name, case in cases(here, nodes).items():
            if not name.startswith("no_spares"):
                lines.setdefault(name, []).append(ratio(case))
    for name, ratios in lines.items():
        style = "-" if name in ("as_it_is", "saves_on_disk_alone") else "--"
        by_nodes.plot(counts, ratios, style, label=name.replace("_", " "))
    by_nodes.set(xscale="log", xlabel="nodes", ylabel="effective training time", ylim=(0.5, 1.005))
    for number, nodes in enumerate(intervals_of):
        log.info("drawing intervals of %d nodes", nodes)
        alone = cases(here, nodes)["saves_on_disk_alone"]
        steps = [round(2 ** (power / 2)) for power in range(2, 23)]
        ratios = [ratio(replace(alone, schedule=Schedule(every))) for every in steps]
        colour = f"C{number}"
        by_interval.plot([every * STEP_S / 60 for every in steps], ratios, color=colour, label=f"{nodes:,} nodes")
        by_interval.plot(alone.schedule.every * STEP_S / 60, ratio(alone), "o", color=colour)
    by_interval.set(xscale="log", xlabel="minutes between saves, on disk alone (dot: checkpoint.every: auto)")
    for axes in (by_nodes, by_interval):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="lower left")
    figure.savefig(path, dpi=120)
