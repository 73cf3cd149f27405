"""What failures cost a run: N nodes simulated from failure to failure, closed forms beside it, and when to save.

Goodput, or effective training time, is the time that the steps which count would have taken alone, over the time that
passed. `simulate` finds it from measured costs: what a step, a snapshot, a save, a restart and a load take, and how
often which kind of failure strikes a node. Young's and Daly's formulas know one kind of failure and one kind of save.

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974.
J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006.
"""
# R runs, K kinds of failure, P parts of a recovery, B nodes under repair

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Loss = Literal["nothing", "process", "node", "domain", "job"]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

DAY_S = 86_400.0
# Llama 3 405B (arXiv:2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days of 16,384 GPUs, 8 a node.
NODE_MTBF_S = 54 * DAY_S * (16_384 / 8) / 419
# A job of any size is stopped about daily by something that no memory outlives: preemption, maintenance, a person.
JOB_MTBF_S = DAY_S
# A disk that others use too is written to a tenth of the time, unless that costs half a percent in work lost: half an
# interval a failure.
COMMITTING_SHARE, SPARING_COST = 0.1, 0.005

RECOVERY = ("saving", "detecting", "waiting", "restarting", "loading")
TIERS = ("memory", "peer", "disk")


@dataclass(frozen=True)
class Costs:
    """What a run pays, in seconds. A stall is what the step loop waits; a save counts only once it is committed."""

    step_s: float  # one step, all nodes at work
    save_stall_s: float  # on disk
    save_commit_s: float  # from the end of the step to the commit; a synchronous save has them equal
    restart_s: float  # from the last process's end to ranks that have joined
    load_disk_s: float
    snapshot_stall_s: float = 0.0  # in memory
    snapshot_seal_s: float = 0.0  # until it outlives a process
    peer_copy_s: float = 0.0  # until it outlives its node
    load_memory_s: float = 0.0
    load_peer_s: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A kind of failure: what it takes with it, how often it strikes one node, and how long until it is known.

    "process": a rank dies or hangs, memory stays. "node": one node, and its memory. "domain": adjacent nodes, such as
    all behind a switch. "job": every memory. "nothing": a stop that was announced; the run saves on disk before it.
    """

    loses: Loss
    node_mtbf_s: float  # of one node: a job of N nodes meets it N times as often
    detect_s: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """The nodes of a job and how they fail. The copy of node i's snapshot lies on node i + peer_stride, in a ring."""

    nodes: int
    failures: tuple[Failure, ...]
    spares: int = 0  # nodes that stand ready
    swap_s: float = 0.0  # to bring in a node for a lost one
    repair_s: float = 0.0  # until a lost node is back, as a spare
    min_nodes: int | None = None  # a restart goes on with so many at least, slower; None: with all or not at all
    domain_nodes: int = 1
    peer_stride: int = 1

    def __post_init__(self) -> None:
        if not 1 <= (self.min_nodes or self.nodes) <= self.nodes:
            raise ValueError(f"min_nodes is {self.min_nodes}: give 1 to {self.nodes}, the number of nodes")
        if not self.failures:
            raise ValueError("a cluster needs at least one kind of failure")
        if any(failure.loses == "domain" for failure in self.failures) and self.domain_nodes > self.nodes:
            raise ValueError(f"domain_nodes is {self.domain_nodes}, more than the {self.nodes} nodes")

    def rate(self, nodes: int | None = None) -> float:
        """Failures a second, of all kinds."""
        return sum((nodes or self.nodes) / failure.node_mtbf_s for failure in self.failures)

    def lost_nodes(self, loses: Loss) -> int:
        """How many nodes such a failure takes away."""
        return {"node": 1, "domain": self.domain_nodes}.get(loses, 0)

    def copy_survives(self, lost: int) -> bool:
        """Whether, after so many adjacent nodes are lost, each shard is still in its node's or its peer's memory."""
        stride = self.peer_stride % self.nodes
        return lost <= stride and lost <= self.nodes - stride


@dataclass(frozen=True)
class Schedule:
    """Steps between saves on disk, and between snapshots in memory (0: none). A save on disk is a snapshot too."""

    every: int
    memory_every: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.memory_every < 0:
            raise ValueError(
                f"a save every {self.every}, a snapshot every {self.memory_every} steps: give 1, 0 or more"
            )


@dataclass(frozen=True)
class Goodput:
    """Means over runs. The seconds sum to the time that passed; "productive" over that is the ratio."""

    ratio: float
    error: float  # standard error of the ratio
    seconds: dict[str, float]
    failures: dict[str, float]
    resumed_from: dict[str, float]


def simulate(
    costs: Costs, cluster: Cluster, schedule: Schedule, *, duration_s: float, runs: int = 100, seed: int = 0
) -> Goodput:
    """`runs` independent runs of `duration_s`, each a Poisson process of failures, which strike a recovery as well.

    Exact for every failure: which saves were committed when it struck, which of them it left, from which tier the run
    resumes, what it runs anew (`Fleet` states the few bounds). Steps that are not saved yet at the end count.
    """
    rng = np.random.default_rng(seed)
    fleet = Fleet(costs, cluster, schedule, runs, rng)
    share_K = np.array([1 / failure.node_mtbf_s for failure in cluster.failures])
    cuts_K = np.cumsum(share_K) / share_K.sum()
    counts_K = np.zeros(len(cluster.failures))
    while (left_R := duration_s - fleet.now).max() > 0:
        lifetime_R = rng.exponential(size=runs) / (fleet.active * share_K.sum())
        struck_R = lifetime_R < left_R
        fleet.run(np.minimum(lifetime_R, left_R))
        kind_R = np.minimum(np.searchsorted(cuts_K, rng.random(runs), side="right"), len(cuts_K) - 1)
        for kind, failure in enumerate(cluster.failures):
            hit_R = struck_R & (kind_R == kind)
            counts_K[kind] += hit_R.sum()
            fleet.fail(hit_R, failure)
    seconds = fleet.seconds()
    ratio_R = seconds["productive"] / duration_s
    failures: dict[str, float] = {}
    for failure, count in zip(cluster.failures, counts_K, strict=True):
        failures[failure.loses] = failures.get(failure.loses, 0.0) + float(count) / runs
    return Goodput(
        float(ratio_R.mean()),
        float(ratio_R.std(ddof=1) / math.sqrt(runs)) if runs > 1 else math.inf,
        {name: float(value.mean()) for name, value in seconds.items()},
        failures,
        {tier: count / runs for tier, count in fleet.resumed_from.items()},
    )


class Fleet:
    """Many independent runs in step: each call lives until every run's next failure, or makes it strike.

    Bounds, all on the dear side: from the third node lost before the next snapshot on, the chance that a copy goes with
    it is an upper one; a save waits for the one before to be committed; nodes that come back join at the next restart.
    """

    def __init__(self, costs: Costs, cluster: Cluster, schedule: Schedule, runs: int, rng: np.random.Generator) -> None:
        self.costs, self.cluster, self.schedule, self.rng = costs, cluster, schedule, rng
        self.now: Floats = np.zeros(runs)
        self.step: Ints = np.zeros(runs, np.int64)  # where the runs are
        # The newest step saved in each tier; -1: none. A peer's copy is one of a snapshot.
        self.memory, self.peer = np.full(runs, -1, np.int64), np.full(runs, -1, np.int64)
        self.disk: Ints = np.zeros(runs, np.int64)
        self.lost: Ints = np.zeros(runs, np.int64)  # nodes since the last snapshot that was copied
        self.active: Ints = np.full(runs, cluster.nodes, np.int64)
        self.back_RB: Floats = np.full((runs, max(8, cluster.domain_nodes)), -math.inf)  # when each broken node is back
        self.recovery_RP: Floats = np.zeros((runs, len(RECOVERY)))  # what is left to do before the next step
        self.spent_RP: Floats = np.zeros((runs, len(RECOVERY)))
        self.stepping: Floats = np.zeros(runs)
        self.slowed: Floats = np.zeros(runs)
        self.resumed_from = dict.fromkeys(TIERS, 0)
        self._saves = _Saves.of(costs, schedule)

    def run(self, seconds_R: Floats) -> None:
        """Let each run live so long: finish what is left of its recovery, then step and save."""
        before_RP = np.cumsum(self.recovery_RP, axis=1) - self.recovery_RP
        spent_RP = np.clip(seconds_R[:, None] - before_RP, 0, self.recovery_RP)
        self.spent_RP += spent_RP
        self.recovery_RP = self.recovery_RP - spent_RP
        up_R = np.maximum(seconds_R - spent_RP.sum(axis=1), 0)
        step_s = self.costs.step_s * self.cluster.nodes / self.active
        begun = self.step
        done = self._saves.reached(begun, up_R, step_s)
        stalled = np.minimum(self._saves.stalls(done) - self._saves.stalls(begun), up_R - (done - begun) * step_s)
        self.spent_RP[:, 0] += stalled
        self.stepping += up_R - stalled
        self.slowed += (done - begun) * (step_s - self.costs.step_s)

        def newest(delay_s: float, known: Ints, *intervals: int) -> Ints:
            saved = self._saves.reached(begun, up_R - delay_s, step_s)
            found = np.max([saved // interval * interval for interval in intervals if interval], axis=0)
            return np.where(found > begun, found, known)

        every, memory_every = self.schedule.every, self.schedule.memory_every
        self.disk = newest(self.costs.save_commit_s, self.disk, every)
        if memory_every:
            self.memory = newest(self.costs.snapshot_seal_s, self.memory, every, memory_every)
            copied = newest(self.costs.peer_copy_s, self.peer, every, memory_every)
            self.lost = np.where(copied > self.peer, 0, self.lost)
            self.peer = copied
        self.step = done
        self.now = self.now + seconds_R

    def fail(self, hit_R: Bools, failure: Failure) -> None:
        """Let `failure` strike these runs now: they resume from the newest save it left, in the nearest tier."""
        if not hit_R.any():
            return
        loses, lost = failure.loses, self.cluster.lost_nodes(failure.loses)
        if loses == "nothing":
            self.disk = np.where(hit_R, self.step, self.disk)
        if loses != "process":  # memory is gone, or what is left of it is in the peers
            kept_R = self._copies_survive(lost) if lost else np.zeros(len(self.now), bool)
            copy_R = np.where(kept_R, self.peer, -1)
            self.memory, self.peer = np.where(hit_R, copy_R, self.memory), np.where(hit_R, copy_R, self.peer)
            self.lost = np.where(hit_R, self.lost + lost, self.lost)
        near_R = hit_R & (self.memory >= self.disk) & (self.memory >= 0)
        self.step = np.where(hit_R, np.where(near_R, self.memory, self.disk), self.step)
        near: Literal["memory", "peer"] = "memory" if loses == "process" else "peer"
        self.resumed_from[near] += int(near_R.sum())
        self.resumed_from["disk"] += int((hit_R & ~near_R).sum())

        load_near_s = self.costs.load_memory_s if near == "memory" else self.costs.load_peer_s
        parts_RP = np.zeros_like(self.recovery_RP)
        parts_RP[:, 0] = self.costs.save_commit_s if loses == "nothing" else 0
        parts_RP[:, 1] = failure.detect_s
        parts_RP[:, 2] = self._replace(hit_R, lost, failure.detect_s)
        parts_RP[:, 3] = self.costs.restart_s
        parts_RP[:, 4] = np.where(near_R, load_near_s, self.costs.load_disk_s)
        self.recovery_RP = np.where(hit_R[:, None], parts_RP, self.recovery_RP)

    def seconds(self) -> dict[str, Floats]:
        """Where each run's time went; they sum to `now`."""
        productive = np.asarray(self.step * self.costs.step_s, np.float64)
        parts = dict(zip(RECOVERY, self.spent_RP.T, strict=True))
        lost = self.stepping - self.slowed - productive
        return {"productive": productive, "slowed": self.slowed, "lost": lost, **parts}

    def _copies_survive(self, lost: int) -> Bools:
        """Whether the peers' copies still make a whole snapshot."""
        if not self.cluster.copy_survives(lost):
            return np.zeros(len(self.now), bool)
        # A node lost before is without its own shard and without the copy it held: its neighbours must not be next.
        neighbours = 1 if 2 * self.cluster.peer_stride % self.cluster.nodes == 0 else 2
        exposed_R = np.minimum(1.0, neighbours * self.lost * lost / self.cluster.nodes)
        return self.rng.random(len(self.now)) >= exposed_R

    def _replace(self, hit_R: Bools, lost: int, detect_s: float) -> Floats:
        """Seconds until a struck run has its nodes; sets how many it goes on with."""
        known_R = self.now + detect_s
        if lost:
            self.back_RB = np.sort(self.back_RB, axis=1)  # whoever is back is first, and makes room
            if (self.back_RB[hit_R, lost - 1] > self.now[hit_R]).any():
                self.back_RB = np.hstack([np.full_like(self.back_RB, -math.inf), self.back_RB])
            self.back_RB[hit_R, :lost] = (known_R + self.cluster.repair_s)[hit_R, None]
        nodes, fewest = self.cluster.nodes, self.cluster.min_nodes or self.cluster.nodes
        have_R = nodes + self.cluster.spares - (self.back_RB > known_R[:, None]).sum(axis=1)
        short_R = np.maximum(fewest - have_R, 0)
        away_RB = np.sort(np.where(self.back_RB > known_R[:, None], self.back_RB, math.inf), axis=1)
        enough_R = np.take_along_axis(away_RB, np.maximum(short_R - 1, 0)[:, None], axis=1)[:, 0]
        wait_R = np.where(short_R > 0, enough_R - known_R, 0)
        self.active = np.where(hit_R, np.clip(have_R, fewest, nodes), self.active)
        return wait_R + (self.cluster.swap_s if lost else 0.0)


@dataclass(frozen=True)
class _Saves:
    """When the saves of a schedule come, and what the loop waits for them."""

    every: int
    memory_every: int
    both: int
    save_s: float
    snapshot_s: float

    @classmethod
    def of(cls, costs: Costs, schedule: Schedule) -> _Saves:
        every, memory_every = schedule.every, schedule.memory_every
        both = math.lcm(every, memory_every) if memory_every else 0
        snapshot_s = costs.snapshot_stall_s
        between = every * costs.step_s
        if memory_every:
            between += (every / memory_every - every / both) * snapshot_s
        # Back-pressure: a save begins when the one before is committed.
        return cls(every, memory_every, both, max(costs.save_stall_s, costs.save_commit_s - between), snapshot_s)

    def stalls(self, step: Ints) -> Floats:
        """Seconds of all saves at steps up to `step`."""
        saves = step // self.every
        snapshots = step // self.memory_every - step // self.both if self.memory_every else 0 * step
        return np.asarray(saves * self.save_s + snapshots * self.snapshot_s, np.float64)

    def reached(self, begun: Ints, up_R: Floats, step_s: Floats) -> Ints:
        """The newest step finished `up_R` seconds after setting out from `begun`; `begun` where that is negative."""
        # Bounds: no save at all; and one save, and two snapshots, more than their share of the steps.
        share_s = self.save_s / self.every
        if self.memory_every:
            share_s += (1 / self.memory_every - 1 / self.both) * self.snapshot_s
        extra_s = self.save_s + 2 * self.snapshot_s
        low = begun + np.maximum((up_R - extra_s) // (step_s + share_s), 0).astype(np.int64)
        high = begun + np.maximum(up_R // step_s, 0).astype(np.int64)
        paid = self.stalls(begun)
        while (low < high).any():
            middle = (low + high + 1) // 2
            fits = (middle - begun) * step_s + self.stalls(middle - 1) - paid <= up_R
            low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
        return low


def young_interval_s(save_s: float, mtbf_s: float) -> float:
    """Seconds of work between saves that cost least, to first order (Young 1974): sqrt(2 delta M)."""
    return math.sqrt(2 * save_s * mtbf_s)


def daly_interval_s(save_s: float, mtbf_s: float) -> float:
    """The same to higher order (Daly 2006, eq. 37); the time between failures where a save takes twice that or more."""
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    share = save_s / (2 * mtbf_s)
    return young_interval_s(save_s, mtbf_s) * (1 + math.sqrt(share) / 3 + share / 9) - save_s


def daly_ratio(interval_s: float, save_s: float, restart_s: float, mtbf_s: float) -> float:
    """Useful over elapsed time with one synchronous save every `interval_s` of work (Daly 2006).

    Exact for failures without memory, which may strike saves and restarts too.
    """
    return interval_s / (mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((interval_s + save_s) / mtbf_s))


def recommend_interval(
    step_s: float,
    save_s: float,
    *,
    commit_s: float = 0.0,
    nodes: int = 1,
    mtbf_s: float | None = None,
    multiple_of: int = 1,
) -> int:
    """Steps between saves on disk that cost a run least: what `checkpoint.every: auto` means.

    `step_s` and `save_s` are measured: a step, and what the loop loses to one save, all told. `mtbf_s` is the time
    between failures of the whole job that memory does not outlive; by default one a day, and one for each node as often
    as Llama 3's nodes failed. The answer is Daly's optimum in whole steps, but at least one save's way to the disk
    (`commit_s`), and ten of them where that costs half a percent at most; and a multiple of `multiple_of` where that is
    shorter, so that a save falls on a snapshot.
    """
    if step_s <= 0 or save_s < 0 or commit_s < 0 or nodes < 1 or (mtbf_s is not None and mtbf_s <= 0):
        raise ValueError(
            f"no interval follows from steps of {step_s} s, saves of {save_s} s, committed in {commit_s} s, {nodes} "
            f"nodes and {mtbf_s} s to a failure: measure a step that takes time, and a save that takes none or more"
        )
    if mtbf_s is None:
        mtbf_s = 1 / (1 / JOB_MTBF_S + nodes / NODE_MTBF_S)
    best = daly_interval_s(save_s, mtbf_s) / step_s
    least = max(commit_s, min(commit_s / COMMITTING_SHARE, 2 * SPARING_COST * mtbf_s)) / step_s
    unit = multiple_of if max(best, least) > multiple_of else 1
    return unit * max(1, round(best / unit), math.ceil(least / unit))
