"""After a kill anywhere, a lost node, damaged memory or another world size, all ranks go on from one whole save."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from checkpointing.layout import CheckpointError
from checkpointing.memory import Memory
from checkpointing.recovery import recover
from checkpointing.sharded import latest
from checkpointing.store import committed, open_place
from checkpointing.tiers import Tiers
from tests.checkpointing.tier_ranks import Outcome, Run, assert_is, launch, pieces

pytestmark = pytest.mark.distributed


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    memory = Path("/dev/shm") / f"sfumato-test-{tmp_path.parent.name}-{tmp_path.name}"
    yield Run(tmp_path / "disk", memory, epoch=1, nodes=(0, 0), steps=8, every=3)
    shutil.rmtree(memory, ignore_errors=True)


def again(run: Run, **changes: object) -> list[Outcome]:
    """Resume, look at every element, and end."""
    return launch(replace(run, **{"epoch": run.epoch + 1, "steps": 0, **changes}))  # pyright: ignore[reportArgumentType]


def whole(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.code == 0, outcome.said


def test_nothing_was_ever_saved(run: Run) -> None:
    outcomes = again(run)
    whole(outcomes)
    assert [outcome.resumed for outcome in outcomes] == [None, None]


def test_ranks_go_on_from_memory_and_then_from_the_disk(run: Run) -> None:
    outcomes = launch(run)
    whole(outcomes)
    newest = outcomes[0].done[-1]
    outcomes = again(run)
    whole(outcomes)
    assert [outcome.resumed for outcome in outcomes] == [f"{newest} memory"] * 2
    shutil.rmtree(run.memory)
    assert [outcome.resumed for outcome in again(run)] == ["6 disk"] * 2


def test_a_second_run_goes_on_in_the_first_ones_slots(run: Run) -> None:
    whole(launch(run))
    before = {path.stat().st_ino for path in run.memory.rglob("*.safetensors")}
    outcomes = again(run, steps=5)
    whole(outcomes)
    assert {path.stat().st_ino for path in run.memory.rglob("*.safetensors")} == before
    whole(again(run, epoch=3))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "place", ["snapshot.copying", "snapshot.copied", "shard.sealed", "shard.half_written", "manifest.half_written"]
)
def test_a_kill_loses_at_most_the_snapshot_under_way(run: Run, place: str, rank: int) -> None:
    if place.startswith("manifest"):
        rank = 0
    outcomes = launch(replace(run, steps=7), {"SFUMATO_FAILPOINT": f"{place}@rank={rank},step=6"})
    before = max(done for done in outcomes[rank].done if done < 6)
    outcomes = again(run)
    whole(outcomes)
    (resumed,) = {str(outcome.resumed) for outcome in outcomes}
    step, tier = resumed.split()
    assert tier == "memory"
    assert int(step) >= before


@pytest.mark.parametrize("nodes", [(0, 1), (0, 0, 1)])
def test_a_lost_nodes_shards_come_back_from_its_partner(run: Run, nodes: tuple[int, ...]) -> None:
    run = replace(run, nodes=nodes)
    outcomes = launch(run)
    whole(outcomes)
    newest = outcomes[0].done[-1]
    shutil.rmtree(run.memory / "node-1")
    outcomes = again(run, steps=3)
    whole(outcomes)
    assert [outcome.resumed for outcome in outcomes] == [f"{newest} peer"] * len(nodes)
    newest = outcomes[0].done[-1]
    shutil.rmtree(run.memory / "node-0")
    outcomes = again(run, epoch=3)
    whole(outcomes)
    assert [outcome.resumed for outcome in outcomes] == [f"{newest} peer"] * len(nodes)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_while_shards_travel_keeps_the_save_before(run: Run, rank: int) -> None:
    run = replace(run, nodes=(0, 1), pause_s=0.2)
    outcomes = launch(replace(run, steps=7), {"SFUMATO_FAILPOINT": f"peer.sending@rank={rank},step=5"})
    assert 4 in outcomes[0].done
    shutil.rmtree(run.memory / f"node-{rank}")
    outcomes = again(run)
    whole(outcomes)
    assert [outcome.resumed for outcome in outcomes] == ["4 peer"] * 2


def test_with_both_nodes_lost_the_disk_serves(run: Run) -> None:
    run = replace(run, nodes=(0, 1))
    whole(launch(run))
    shutil.rmtree(run.memory)
    assert [outcome.resumed for outcome in again(run)] == ["6 disk"] * 2


@pytest.mark.parametrize("nodes", [(0,), (0, 0, 0)])
def test_another_number_of_ranks_goes_on_from_memory(run: Run, nodes: tuple[int, ...]) -> None:
    outcomes = launch(run)
    whole(outcomes)
    newest = outcomes[0].done[-1]
    outcomes = again(run, nodes=nodes, steps=4)
    whole(outcomes)
    assert [outcome.resumed for outcome in outcomes] == [f"{newest} memory"] * len(nodes)
    left = Memory(run.memory / "node-0").held()
    assert {save.epoch for save in left} == {2}  # what the two ranks left is given back
    whole(again(run, epoch=3))


def test_another_number_of_ranks_on_two_nodes(run: Run) -> None:
    outcomes = launch(replace(run, nodes=(0, 1)))
    whole(outcomes)
    newest = outcomes[0].done[-1]
    outcomes = again(run, nodes=(0, 1, 1), steps=2)
    whole(outcomes)
    assert [outcome.resumed for outcome in outcomes] == [f"{newest} memory"] * 3  # each of two nodes has a copy of all
    newest = outcomes[0].done[-1]
    shutil.rmtree(run.memory / "node-0")
    outcomes = again(run, nodes=(0, 0, 1), epoch=3)
    whole(outcomes)
    assert [outcome.resumed for outcome in outcomes] == [f"{newest} peer"] * 3


def test_a_damaged_snapshot_is_passed_over_and_said(run: Run) -> None:
    outcomes = launch(run)
    whole(outcomes)
    before = outcomes[0].done[-2]
    shard = max(run.memory.rglob("rank-00001.safetensors"), key=lambda path: path.parent.name.split("-")[-1])
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size - 5)
        byte = file.read(1)[0]
        file.seek(shard.stat().st_size - 5)
        file.write(bytes([byte ^ 1]))
    outcomes = again(run)
    whole(outcomes)
    assert {outcome.resumed for outcome in outcomes} == {f"{before} memory"}
    assert "rank-00001.safetensors, bytes" in outcomes[0].said


def test_where_checkpoints_were_committed_and_none_is_whole_nothing_begins_again(run: Run) -> None:
    whole(launch(run))
    shutil.rmtree(run.memory)
    for shard in run.folder.rglob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    outcomes = again(run)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert all("no checkpoint in" in outcome.error for outcome in outcomes)


def test_the_remote_store_serves_where_the_disk_has_lost_its_saves(run: Run, tmp_path: Path) -> None:
    run = replace(run, remote=f"file://{tmp_path / 'remote'}", finish=True)
    whole(launch(run))
    assert not run.memory.exists() or not any(run.memory.iterdir())
    remote = open_place(str(run.remote))
    assert [save.step for save in committed(remote)] == [6]
    for shard in run.folder.rglob("*.safetensors"):
        shard.unlink()
    assert [outcome.resumed for outcome in again(run)] == ["6 remote"] * 2
    shutil.rmtree(run.folder)
    assert [outcome.resumed for outcome in again(run)] == ["6 remote"] * 2


def test_a_save_of_two_ranks_is_read_by_tools(run: Run) -> None:
    whole(launch(run))
    checkpoint = latest(run.folder)
    assert checkpoint is not None
    assert_is(checkpoint, 6, pieces(0, 1))


def test_alone_without_a_group(tmp_path: Path) -> None:
    tiers = Tiers(tmp_path / "disk", tmp_path / "memory")
    arguments = {"rank": 0, "world_size": 1, "gather": lambda item: [item]}
    assert recover(tiers, None, **arguments) is None
    (tmp_path / "disk" / "step-00000001.attempt-000001-3fa9c1d2").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="format 1"):
        recover(tiers, None, **arguments)
