"""Every figure is worked out by hand or by a closed form, and none by the simulation itself."""

from dataclasses import replace

import numpy as np
import pytest

from train.goodput import (
    DAY_S,
    Cluster,
    Costs,
    Failure,
    Fleet,
    Loss,
    Schedule,
    daly_interval_s,
    daly_ratio,
    recommend_interval,
    simulate,
    young_interval_s,
)

# Steps of 10 s, a snapshot every 5 and a save every 20. From 0, step s ends after s times 10 s, a second for each
# snapshot before and 2 for each save: step 20 at 203, step 25 at 255, step 30 at 306, step 40 at 408.
COSTS = Costs(
    step_s=10,
    snapshot_stall_s=1,
    snapshot_seal_s=4,
    peer_copy_s=30,
    save_stall_s=2,
    save_commit_s=60,
    restart_s=100,
    load_memory_s=1,
    load_peer_s=7,
    load_disk_s=50,
)
SCHEDULE = Schedule(every=20, memory_every=5)
PROCESS, NODE, DOMAIN, JOB, NOTICE = (
    Failure(loses, 1000 * DAY_S, detect_s=15) for loses in ("process", "node", "domain", "job", "nothing")
)
ALL = np.array([True])


def fleet(cluster: Cluster | None = None, costs: Costs = COSTS) -> Fleet:
    return Fleet(costs, cluster or Cluster(64, (NODE,), swap_s=5), SCHEDULE, 1, np.random.default_rng(0))


def parts(one: Fleet) -> dict[str, float]:
    return {name: float(value[0]) for name, value in one.seconds().items()}


# (killed after, what is lost) -> (resumes at step, from, seconds of recovery)
STRUCK: dict[tuple[float, Loss], tuple[int, str, float]] = {
    (312, "process"): (30, "memory", 15 + 100 + 1),  # the snapshot of step 30 is sealed at 310
    (309, "process"): (25, "memory", 15 + 100 + 1),
    (312, "node"): (25, "peer", 15 + 5 + 100 + 7),  # that of 25 is with its peer since 285, of 30 at 336
    (284, "node"): (20, "peer", 15 + 5 + 100 + 7),
    (312, "domain"): (20, "disk", 15 + 5 + 100 + 50),  # the save of step 20 was committed at 263
    (262, "domain"): (0, "disk", 15 + 5 + 100 + 50),
    (312, "job"): (20, "disk", 15 + 100 + 50),
    (312, "nothing"): (30, "disk", 60 + 15 + 100 + 50),  # saves what it has
}


@pytest.mark.parametrize(("after_s", "loses"), STRUCK)
def test_each_failure_costs_what_its_tier_says(after_s: float, loses: Loss) -> None:
    resumes, tier, recovery_s = STRUCK[after_s, loses]
    one = fleet(Cluster(64, (NODE,), spares=4, swap_s=5, domain_nodes=4))
    one.run(np.array([float(after_s)]))
    one.fail(ALL, Failure(loses, DAY_S, detect_s=15))
    assert (int(one.step[0]), one.resumed_from[tier]) == (resumes, 1)
    assert one.recovery_RP.sum() == recovery_s
    assert parts(one)["productive"] == resumes * 10
    assert sum(parts(one).values()) == pytest.approx(after_s)


def test_steps_run_anew_are_lost_and_so_is_the_one_under_way() -> None:
    one = fleet()
    one.run(np.array([312.0]))
    one.fail(ALL, NODE)
    # 30 steps and 6 s; snapshots of 5, 10, 15, 25 and 30 took a second each, and the save of 20 two.
    assert parts(one) == pytest.approx(
        {"productive": 250, "lost": 55, "saving": 7, "slowed": 0}
        | dict.fromkeys(("detecting", "waiting", "restarting", "loading"), 0)
    )
    one.run(np.array([15 + 5 + 100 + 7 + 51.0]))  # recovery, then five steps, not counting the stall after the last
    assert int(one.step[0]) == 30
    assert parts(one)["restarting"] == 100 and parts(one)["loading"] == 7


def test_a_failure_strikes_a_recovery_too_and_it_begins_anew() -> None:
    one = fleet()
    one.run(np.array([312.0]))
    one.fail(ALL, PROCESS)
    one.run(np.array([40.0]))  # 15 of detection, 25 of the restart
    one.fail(ALL, PROCESS)
    assert one.recovery_RP.sum() == 15 + 100 + 1 and int(one.step[0]) == 30
    assert (parts(one)["detecting"], parts(one)["restarting"]) == (15, 25)


def test_a_second_node_lost_before_the_next_snapshot_takes_the_copy_where_it_is_a_neighbour() -> None:
    runs = 20_000
    for nodes, share in ((64, 2 / 64), (2, 1 / 2)):
        many = Fleet(COSTS, Cluster(nodes, (NODE,)), SCHEDULE, runs, np.random.default_rng(0))
        for seconds in (312.0, 10.0):
            many.run(np.full(runs, seconds))
            many.fail(np.ones(runs, bool), NODE)
        assert many.resumed_from["disk"] / runs == pytest.approx(share, rel=0.1)


def test_the_next_copied_snapshot_makes_the_copies_whole_again() -> None:
    runs = 1000
    many = Fleet(COSTS, Cluster(2, (NODE,)), SCHEDULE, runs, np.random.default_rng(0))
    for _ in range(3):
        many.run(np.full(runs, 312.0 + 107))
        many.fail(np.ones(runs, bool), NODE)
    assert many.resumed_from == {"memory": 0, "peer": 3 * runs, "disk": 0}


@pytest.mark.parametrize(
    ("nodes", "stride", "lost", "survives"),
    [(64, 1, 1, True), (64, 1, 2, False), (64, 4, 4, True), (64, 62, 4, False), (1, 1, 1, False), (2, 1, 1, True)],
)
def test_a_domains_loss_leaves_the_copies_where_peers_lie_outside(
    nodes: int, stride: int, lost: int, survives: bool
) -> None:
    assert Cluster(nodes, (NODE,), peer_stride=stride).copy_survives(lost) is survives
    # by brute force: no node among the lost has its copy among them
    gone = set(range(lost))
    assert survives == all((node + stride) % nodes not in gone for node in gone)


def test_without_spares_a_run_waits_for_the_repair_or_goes_on_slower() -> None:
    waits = fleet(Cluster(4, (NODE,), repair_s=900))
    waits.run(np.array([312.0]))
    waits.fail(ALL, NODE)
    assert waits.recovery_RP[0, 2] == 900
    shrinks = fleet(Cluster(4, (NODE,), repair_s=9000, min_nodes=2))
    for seconds, active in ((312.0, 3), (400.0, 2), (400.0, 2)):
        shrinks.run(np.array([seconds]))
        shrinks.fail(ALL, NODE)
        assert int(shrinks.active[0]) == active
    # the third loss leaves one: the first node lost is back 9000 s after it was missed
    assert shrinks.recovery_RP[0, 2] == 312 + 15 + 9000 - (312 + 400 + 400 + 15)
    before = int(shrinks.step[0])
    shrinks.run(np.array([float(shrinks.recovery_RP.sum()) + 101]))
    assert int(shrinks.step[0]) == before + 5  # of 20 s each on half of the nodes, and not the stall at its end
    assert parts(shrinks)["slowed"] >= 50


def test_a_spare_takes_a_lost_nodes_place_until_none_is_left() -> None:
    one = fleet(Cluster(4, (NODE,), spares=2, swap_s=5, repair_s=100_000))
    waits = []
    for _ in range(3):
        one.run(np.array([300.0]))
        one.fail(ALL, NODE)
        waits.append(float(one.recovery_RP[0, 2]))
    assert waits == [5, 5, 100_000 - 600 + 5]


def test_more_nodes_may_be_broken_than_there_was_room_for() -> None:
    one = fleet(Cluster(64, (DOMAIN,), spares=64, repair_s=1e9, domain_nodes=6))
    for _ in range(5):
        one.run(np.array([300.0]))
        one.fail(ALL, DOMAIN)
    assert int((one.back_RB > one.now[:, None]).sum()) == 30


def test_a_save_that_is_slower_than_its_interval_makes_the_loop_wait() -> None:
    one = fleet(costs=replace(COSTS, save_commit_s=253))  # 200 s of steps and three snapshots lie between two saves
    one.run(np.array([2530.0]))
    assert parts(one)["saving"] == 2530 - int(one.step[0]) * 10
    assert int(one.step[0]) == 200


@pytest.mark.parametrize("interval_s", [100, 632, 3000])
def test_it_agrees_with_dalys_closed_form_within_a_percent_of_the_waste(interval_s: int) -> None:
    mtbf_s, save_s, restart_s = 20_000.0, 10.0, 50.0
    costs = Costs(step_s=1, save_stall_s=save_s, save_commit_s=save_s, restart_s=restart_s, load_disk_s=0)
    cluster = Cluster(16, (Failure("process", 16 * mtbf_s),))
    found = simulate(costs, cluster, Schedule(interval_s), duration_s=500 * mtbf_s, runs=400, seed=1)
    exact = daly_ratio(interval_s, save_s, restart_s, mtbf_s)
    assert (1 - found.ratio) / (1 - exact) == pytest.approx(1, abs=0.01)
    assert abs(found.ratio - exact) < 4 * found.error + 1e-4


def test_youngs_and_dalys_intervals_are_the_least_waste() -> None:
    save_s, mtbf_s = 10.0, 20_000.0
    ratios = {interval: daly_ratio(interval, save_s, 50, mtbf_s) for interval in range(100, 3000)}
    best = max(ratios, key=ratios.__getitem__)
    assert daly_interval_s(save_s, mtbf_s) == pytest.approx(best, rel=0.005)
    assert 1 - daly_ratio(young_interval_s(save_s, mtbf_s), save_s, 50, mtbf_s) == pytest.approx(
        1 - ratios[best], rel=0.01
    )
    assert daly_interval_s(50.0, 20.0) == 20.0  # where saves take longer than runs live, once a life


def test_with_every_kind_and_tier_the_waste_is_the_sum_of_its_parts() -> None:
    nodes = 64
    mtbf_s: dict[Loss, float] = {"process": 40_000, "node": 60_000, "domain": 200_000, "job": 150_000}
    costs = replace(COSTS, step_s=1.0, snapshot_stall_s=0.01, save_stall_s=0.1)
    failures = tuple(Failure(loses, each * nodes, detect_s=15) for loses, each in mtbf_s.items())
    cluster = Cluster(nodes, failures, spares=64, swap_s=5, domain_nodes=4)
    found = simulate(costs, cluster, Schedule(200, 20), duration_s=200 * DAY_S, runs=100, seed=2)
    # First order: what is run anew is the way to the commit and half an interval; no failure strikes a recovery.
    recovery_s = {
        "process": 15 + 100 + 1 + 4 + 10,
        "node": 15 + 5 + 100 + 7 + 30 + 10,
        "domain": 15 + 5 + 100 + 50 + 60 + 100,
        "job": 15 + 100 + 50 + 60 + 100,
    }
    lost = sum(recovery_s[loses] / mtbf_s[loses] for loses in mtbf_s)
    stalls = (0.1 + 9 * 0.01) / 200
    assert 1 / found.ratio - 1 == pytest.approx(lost + stalls, rel=0.03)
    days = 200 * DAY_S
    assert found.failures == pytest.approx({loses: days / each for loses, each in mtbf_s.items()}, rel=0.03)
    assert sum(found.seconds.values()) == pytest.approx(days)


def test_the_same_seed_gives_the_same_answer() -> None:
    cluster = Cluster(64, (Failure("node", DAY_S),), spares=1, repair_s=3600)
    first, again, other = (
        simulate(COSTS, cluster, SCHEDULE, duration_s=5 * DAY_S, runs=4, seed=seed) for seed in (7, 7, 8)
    )
    assert first == again != other


def test_the_recommended_interval_is_the_best_of_those_simulated() -> None:
    costs = Costs(step_s=2, save_stall_s=6, save_commit_s=6, restart_s=60, load_disk_s=20)
    cluster = Cluster(8, (Failure("job", 8 * 40_000),))
    recommended = recommend_interval(costs.step_s, costs.save_stall_s, mtbf_s=40_000)

    def ratio(every: int) -> float:
        return simulate(costs, cluster, Schedule(every), duration_s=100 * 40_000, runs=400, seed=3).ratio

    best = max(ratio(round(recommended * factor)) for factor in (0.25, 0.5, 0.8, 1.25, 2, 4))
    assert ratio(recommended) > best - 2e-4


def test_the_interval_grows_with_the_saves_cost_and_shrinks_with_the_nodes() -> None:
    assert recommend_interval(1.0, 1.0) < recommend_interval(1.0, 4.0)
    assert recommend_interval(1.0, 1.0, nodes=1024) < recommend_interval(1.0, 1.0)
    assert recommend_interval(0.1, 1.0) == pytest.approx(10 * recommend_interval(1.0, 1.0), rel=0.01)


def test_saves_on_disk_fall_on_snapshots_and_leave_the_disk_time() -> None:
    assert recommend_interval(1.0, 1.0, multiple_of=10) % 10 == 0
    assert recommend_interval(100.0, 1.0, multiple_of=10) == round(daly_interval_s(1.0, DAY_S) / 100)  # the shorter one
    assert recommend_interval(1.0, 0.0, commit_s=60) == 600
    assert recommend_interval(1.0, 0.0, commit_s=60, mtbf_s=20_000) == 200  # where half a percent is lost to that
    assert recommend_interval(1.0, 0.0, commit_s=60, mtbf_s=2_000) == 60  # a save waits for the one before
    assert recommend_interval(1.0, 0.0, commit_s=60, multiple_of=7) == 602
    assert recommend_interval(1.0, 0.0) == 1


@pytest.mark.parametrize(
    "measured", [{"step_s": 0.0}, {"save_s": -1.0}, {"commit_s": -1.0}, {"nodes": 0}, {"mtbf_s": 0.0}]
)
def test_measurements_that_cannot_be_are_refused(measured: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="no interval follows from"):
        recommend_interval(**({"step_s": 1.0, "save_s": 1.0} | measured))  # type: ignore[arg-type]


def test_a_cluster_or_schedule_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="min_nodes is 9: give 1 to 8"):
        Cluster(8, (NODE,), min_nodes=9)
    with pytest.raises(ValueError, match="at least one kind"):
        Cluster(8, ())
    with pytest.raises(ValueError, match="domain_nodes is 16, more than the 8 nodes"):
        Cluster(8, (DOMAIN,), domain_nodes=16)
    with pytest.raises(ValueError, match="give 1, 0 or more"):
        Schedule(0)
