"""Saves run beside the loop: what is saved is the state at the snapshot, and nothing whole is given up too early."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.layout import CheckpointError, Piece, SaveId
from checkpointing.memory import Memory
from checkpointing.peers import partner
from checkpointing.recovery import recover
from checkpointing.sharded import Checkpoint, latest
from checkpointing.store import committed, open_place
from checkpointing.tiers import Checkpointer, Tiers
from tests.checkpointing.tier_ranks import Run, launch

NUMEL = 300_000
PIECES = [Piece("param", "weight", 0, NUMEL, (NUMEL,)), Piece("ema", "scale", 0, 1, ())]


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[Tiers]:
    memory = Path("/dev/shm") / f"sfumato-test-{tmp_path.parent.name}-{tmp_path.name}"
    yield Tiers(tmp_path / "disk", memory)
    shutil.rmtree(memory, ignore_errors=True)


def open_alone(tiers: Tiers, epoch: int = 1) -> Checkpointer:
    return Checkpointer(tiers, PIECES, rank=0, world_size=1, epoch=epoch, agree=lambda values: values, timeout_s=20)


def at(step: int) -> list[torch.Tensor]:
    return [torch.arange(NUMEL, dtype=torch.float32) + step, torch.full((1,), float(step))]


def take(checkpointer: Checkpointer, step: int, *, durable: bool = False) -> bool:
    return checkpointer.snapshot(step, at(step), {"step": step}, durable=durable)


def take_whole(checkpointer: Checkpointer, step: int, *, durable: bool = False) -> None:
    """A snapshot, begun as soon as the last one is whole."""
    until(lambda: take(checkpointer, step, durable=durable))


def until(condition: Callable[[], Any], limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def in_memory(tiers: Tiers) -> list[int]:
    """Steps of the snapshots that are sealed."""
    assert tiers.memory is not None
    return sorted(save.step for save in Memory(tiers.memory).held())


def assert_is(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (step, {"step": step})
    weight, scale = at(step)
    assert torch.equal(checkpoint.read("param", "weight"), weight)
    assert torch.equal(checkpoint.read("ema", "scale"), scale)


def found(tiers: Tiers) -> Checkpoint | None:
    return recover(tiers, PIECES, rank=0, world_size=1, gather=lambda item: [item])


# --- the copy ------------------------------------------------------------------------------------------------------


def test_what_changes_after_settle_is_not_saved(tiers: Tiers) -> None:
    tensors = at(1)
    with open_alone(tiers) as checkpointer:
        for step in range(1, 20):
            for tensor, value in zip(tensors, at(step), strict=True):
                tensor.copy_(value)
            checkpointer.snapshot(step, tensors, {"step": step}, durable=step % 5 == 0)
            checkpointer.settle()
            for tensor in tensors:
                tensor.fill_(-1)
        checkpointer.drain()
        assert checkpointer.newest_durable() == committed(open_place(tiers.disk))[0]
    for save in committed(open_place(tiers.disk)):
        assert_is(Checkpoint.open(open_place(tiers.disk), save), save.step)
    assert_is(found(tiers), max(in_memory(tiers)))


def test_buffers_are_touched_before_the_first_snapshot(tiers: Tiers) -> None:
    assert tiers.memory is not None
    with open_alone(tiers):
        files = list(tiers.memory.iterdir())
        assert len(files) == 2
        assert all(file.stat().st_blocks * 512 >= 4 * NUMEL for file in files)
        assert tiers.memory.stat().st_mode & 0o777 == 0o700
        assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)


def test_tensors_that_are_not_as_the_pieces_say_are_refused_by_a_failed_save(
    tiers: Tiers, caplog: pytest.LogCaptureFixture
) -> None:
    with open_alone(tiers) as checkpointer:
        checkpointer.snapshot(1, [torch.zeros(3), torch.zeros(1)], {}, durable=True)
        with pytest.raises(CheckpointError, match="300,000 elements, and the tensor for it 3"):
            checkpointer.drain()


# --- admission -----------------------------------------------------------------------------------------------------


def test_two_snapshots_are_whole_and_the_older_makes_room(tiers: Tiers) -> None:
    with open_alone(tiers) as checkpointer:
        for step in range(1, 6):
            take_whole(checkpointer, step)
        until(lambda: in_memory(tiers) == [4, 5])


def test_a_save_on_its_way_to_a_slow_disk_is_never_overwritten(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", "shard.half_written!delay=1.5")
    with open_alone(tiers) as checkpointer:
        take_whole(checkpointer, 1)
        take_whole(checkpointer, 2, durable=True)
        for step in range(3, 8):  # in the other slot, over and over, while the disk is slow
            take_whole(checkpointer, step)
        assert checkpointer.newest_durable() is None
        assert 2 in in_memory(tiers)
        take_whole(checkpointer, 8, durable=True)
        checkpointer.drain()
        report = checkpointer.report()
    place = open_place(tiers.disk)
    assert [save.step for save in committed(place)] == [8, 2]
    for save in committed(place):
        assert_is(Checkpoint.open(place, save), save.step)
    assert report["flushed_s"] > 1.5


def test_a_commit_heard_of_while_ranks_agree_on_the_one_before_is_not_forgotten(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", "shard.half_written!delay=0.5")  # of the first: both are on their way
    with open_alone(tiers) as checkpointer:

        def newest_is(step: int) -> bool:
            newest = checkpointer.newest_durable()
            return newest is not None and newest.step == step

        def late(values: list[float]) -> list[float]:
            until(lambda: newest_is(2))
            checkpointer.agree = lambda values: values
            return [*values[:3], 1.0]  # what was asked when the first was the newest

        take_whole(checkpointer, 1, durable=True)
        take_whole(checkpointer, 2, durable=True)
        checkpointer.agree = late
        checkpointer.drain()
        assert newest_is(2)


def test_a_durable_save_waits_for_a_slot_and_says_how_long(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", "shard.half_written!delay=2")
    with open_alone(replace(tiers, memory=None)) as checkpointer:
        assert not take(checkpointer, 1)  # without a memory tier there is nothing to do
        for step in (2, 3, 4):
            assert take(checkpointer, step, durable=True)
        checkpointer.drain()
        assert checkpointer.report()["wait_s"] > 1
    assert "earlier saves" in caplog.text
    assert_is(latest(tiers.disk), 4)


def test_where_memory_is_short_the_run_goes_on_without_that_tier(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def short(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Memory, "slots", short)
    with open_alone(tiers) as checkpointer:
        assert not take(checkpointer, 1)
        assert take(checkpointer, 2, durable=True)
        checkpointer.drain()
    assert "--shm-size" in caplog.text
    assert_is(latest(tiers.disk), 2)


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_dead_writer_is_seen_and_the_next_save_starts_another(tiers: Tiers, caplog: pytest.LogCaptureFixture) -> None:
    with open_alone(tiers) as checkpointer:
        take_whole(checkpointer, 1)
        kill_writer(checkpointer)
        until(lambda: "died with status -9" in caplog.text)
        take_whole(checkpointer, 2, durable=True)
        checkpointer.drain()
    assert_is(latest(tiers.disk), 2)


def kill_writer(checkpointer: Checkpointer) -> None:
    assert checkpointer.writer_pid is not None
    os.kill(checkpointer.writer_pid, signal.SIGKILL)


def test_a_save_that_failed_once_is_made_up_for_by_the_next(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", "shard.half_written!enospc")
    with open_alone(tiers) as checkpointer:
        take_whole(checkpointer, 1, durable=True)
        with pytest.raises(CheckpointError, match="No space left"):
            checkpointer.drain()
        assert in_memory(tiers) == [1]
        take_whole(checkpointer, 2, durable=True)
        checkpointer.drain()
    assert_is(latest(tiers.disk), 2)


def test_after_two_failed_saves_the_third_is_an_error(tiers: Tiers) -> None:
    with open_alone(tiers) as checkpointer:
        shutil.rmtree(tiers.disk)
        tiers.disk.write_bytes(b"")  # as when a disk is gone
        for step in (1, 2):
            take_whole(checkpointer, step, durable=True)
            with pytest.raises(CheckpointError):
                checkpointer.drain()
        with pytest.raises(CheckpointError, match="cannot be written"):
            take(checkpointer, 3, durable=True)


def test_an_unwritable_folder_is_refused_at_the_start(tiers: Tiers) -> None:
    tiers.disk.write_bytes(b"")
    with pytest.raises(CheckpointError, match="could not take over"):
        open_alone(tiers)


def test_a_run_that_was_taken_over_commits_nothing_more(tiers: Tiers, tmp_path: Path) -> None:
    with open_alone(tiers) as old, open_alone(replace(tiers, memory=tmp_path / "elsewhere"), epoch=2):
        take(old, 1, durable=True)
        with pytest.raises(CheckpointError, match="newer run"):
            old.drain()
    assert committed(open_place(tiers.disk)) == []


def test_without_a_drain_nothing_half_written_is_ever_read(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_FAILPOINT", "shard.half_written!delay=30")
    begin = time.monotonic()
    with open_alone(tiers) as checkpointer:
        take_whole(checkpointer, 1, durable=True)
    assert time.monotonic() - begin < 10
    assert committed(open_place(tiers.disk)) == []
    assert_is(found(tiers), 1)


def test_old_saves_are_pruned(tiers: Tiers) -> None:
    with open_alone(replace(tiers, keep=2, keep_every=3)) as checkpointer:
        for step in range(1, 8):
            take_whole(checkpointer, step, durable=True)
            checkpointer.drain()
        checkpointer.finish()
    assert [save.step for save in committed(open_place(tiers.disk))] == [7, 6, 3]
    assert tiers.memory is not None and not tiers.memory.exists()


# --- the remote store ----------------------------------------------------------------------------------------------


def test_an_unreachable_store_stops_nothing_and_is_caught_up_with(
    tiers: Tiers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount = tmp_path / "mount"
    mount.write_bytes(b"")  # no folder: nothing can be put below it
    tiers = replace(tiers, remote=f"file://{mount / 'run'}")
    with open_alone(tiers) as checkpointer:
        for step in (1, 2):
            take_whole(checkpointer, step, durable=True)
            checkpointer.drain()
        until(lambda: "is unreachable" in caplog.text)
        assert caplog.text.count("is unreachable") == 1
        mount.unlink()
        mount.mkdir()
        until(lambda: "caught up" in caplog.text)
        take_whole(checkpointer, 3, durable=True)
        checkpointer.finish()
    remote = open_place(str(tiers.remote))
    assert [save.step for save in committed(remote)] == [3, 2]
    assert_is(Checkpoint.open(remote, committed(remote)[0]), 3)


def test_finish_does_not_wait_for_a_store_that_is_gone(tiers: Tiers, tmp_path: Path) -> None:
    (tmp_path / "mount").write_bytes(b"")
    begin = time.monotonic()
    with open_alone(replace(tiers, remote=f"file://{tmp_path / 'mount' / 'run'}")) as checkpointer:
        take(checkpointer, 1, durable=True)
        checkpointer.finish()
    assert time.monotonic() - begin < 15
    assert_is(latest(tiers.disk), 1)


@pytest.mark.distributed
def test_two_ranks_upload_their_parts(tmp_path: Path) -> None:
    run = Run(tmp_path / "disk", tmp_path / "memory", 1, (0, 0), 9, 3, f"file://{tmp_path / 'remote'}", finish=True)
    for outcome in launch(run):
        assert outcome.code == 0, outcome.said
        assert outcome.report["uploaded_s"] > 0
    remote = open_place(str(run.remote))
    assert committed(remote)[0].step == 9
    assert latest(tmp_path / "remote") is not None


# --- several ranks -------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_ranks_admit_alike_and_the_slowest_decides(tmp_path: Path) -> None:
    run = Run(tmp_path / "disk", tmp_path / "memory", 1, (0, 0, 0), 12, 4, pause_s=0.02)
    outcomes = launch(run, {"SFUMATO_FAILPOINT": "snapshot.copying:3@rank=1!delay=0.5"})
    for outcome in outcomes:
        assert outcome.code == 0, outcome.said
        assert outcome.done == outcomes[0].done
        assert outcome.report["newest"] == 12
    assert outcomes[0].report["skipped"] > 0


@pytest.mark.distributed
def test_a_writer_that_dies_on_one_rank_costs_one_save(tmp_path: Path) -> None:
    run = Run(tmp_path / "disk", tmp_path / "memory", 1, (0, 0), 9, 3, pause_s=0.2)
    outcomes = launch(run, {"SFUMATO_FAILPOINT": "shard.half_written@rank=1,step=3", **once(tmp_path)})
    for outcome in outcomes:
        assert outcome.code == 0, outcome.said
        assert outcome.report["newest"] == 9
    assert "died with status -9" in outcomes[1].said
    assert [save.step for save in committed(open_place(run.folder))] == [9, 6]


@pytest.mark.distributed
def test_a_disk_that_fails_on_one_rank_ends_all(tmp_path: Path) -> None:
    run = Run(tmp_path / "disk", tmp_path / "memory", 1, (0, 0), 3, 3)
    outcomes = launch(run, {"SFUMATO_FAILPOINT": "shard.half_written@rank=1!eio"})
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert "Input/output error" in outcomes[1].error
    assert committed(open_place(run.folder)) == []


def once(folder: Path) -> dict[str, str]:
    return {"SFUMATO_FAILPOINT_ONCE": str(folder / "happened")}


def test_partners_are_on_another_node() -> None:
    for nodes in ([0, 0, 1, 1], [0, 1], [0, 0, 1], [2, 2, 5, 5, 7]):
        for rank in range(len(nodes)):
            assert nodes[partner(rank, nodes)] != nodes[rank]
    assert [partner(rank, [0, 0, 1, 1, 2, 2]) for rank in range(6)] == [2, 3, 4, 5, 0, 1]


def test_saves_are_numbered_in_order(tiers: Tiers) -> None:
    with open_alone(tiers, epoch=3) as checkpointer:
        for step in (10, 11, 12):
            take_whole(checkpointer, step, durable=True)
        checkpointer.drain()
        assert checkpointer.newest_durable() == SaveId(3, 3, 12)
