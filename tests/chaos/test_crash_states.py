"""The file operations of a real job, and every state in which a power loss may leave its disk: all of them resume."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from checkpointing import store
from checkpointing.sharded import Checkpoint, Chunk, save_now
from checkpointing.store import CheckpointError, LocalPlace, SaveId
from tests.chaos import trainer
from tests.chaos.faulty_disk import DiskFault, read_journal
from tests.chaos.harness import Fault, Trial, remove_tree
from tests.chaos.power_loss import Crash, Operation, states
from tests.chaos.trainer import STEPS, expected, pieces_of, state_at, wrong_pieces

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def record(folder: Path, fault: Fault) -> list[Operation]:
    """The operations in `folder` of a job that meets this fault and ends."""
    journal = folder.with_suffix(".journal")
    outcome = Trial(folder, fault, journal).run()
    assert outcome.finished and not outcome.broken, outcome
    return read_journal(journal)


@pytest.fixture(scope="module", params=["plain", "tiers"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Operation]:
    """What two ranks, and their writers, did to the disk in a whole run."""
    folder = tmp_path_factory.mktemp("recorded") / "job"
    return record(folder, Fault("none", plain=request.param == "plain"))


def obligations(operations: Sequence[Operation]) -> set[SaveId]:
    """Saves of which the job was told that they are durable, but for those it began to remove."""
    told = {
        save for operation in operations if operation.kind == "mark"
        and (save := SaveId.parse(operation.path.removeprefix("durable ")))
    }  # fmt: skip
    removed = {
        SaveId.parse(Path(operation.path).parent.name)
        for operation in operations
        if operation.kind == "unlink" and operation.path.endswith(store.MANIFEST)
    }
    return {save for save in told if save not in removed}


def what_is_wrong(crash: Crash, operations: Sequence[Operation], folder: Path) -> str | None:
    """Why this state, laid out in `folder`, breaks a promise; None where it holds all."""
    place, durable = LocalPlace(folder / "checkpoints"), obligations(operations[: crash.after])
    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always")
        try:
            found = store.newest_whole(place)
        except CheckpointError as error:
            return f"nothing can be resumed: {error}"
    if durable and (found is None or found.save < max(durable)):
        said = [str(warning.message) for warning in skipped]
        return f"{max(durable)} was told durable, and {found and found.save} is found ({said})"
    if found is not None and (wrong := wrong_pieces(Checkpoint.open(place, found.save), pieces_of(0, 1))):
        return f"{found.save} passes for whole with wrong {wrong}"
    for save in durable:
        if reason := store.reason_broken(place, save):
            return f"{save} was told durable: {reason}"
    return None


def what_is_wrong_after_going_on(folder: Path) -> str | None:
    """Why the next run cannot take this state over and save in it; None where it can."""
    place, step = LocalPlace(folder / "checkpoints"), STEPS + 1
    (folder / "checkpoints").mkdir(exist_ok=True)
    pieces = pieces_of(0, 1)
    chunks = [Chunk(piece.kind, piece.name, 0, piece.shape, expected(piece, step)) for piece in pieces]
    save = SaveId(50, 1, step)
    store.fence(place, save.epoch)
    save_now(place, save, chunks, state_at(step))
    store.prune(place, trainer.KEEP)
    found = store.newest_whole(place)
    if found is None or found.save != save or wrong_pieces(Checkpoint.open(place, save), pieces):
        return f"{save} was saved in it, and {found and found.save} is found"
    if store.uncommitted(place):
        return f"{store.uncommitted(place)} stay behind"
    return None


def check(operations: Sequence[Operation], folder: Path, *, mixtures: int, share: float = 1.0) -> int:
    """All states (or a seeded share of them) hold every promise; returns how many there were."""
    generator, checked = random.Random(0), 0
    torch.set_num_threads(1)
    for crash in states(operations, mixtures=mixtures):
        if generator.random() > share:
            continue
        crash.lay_out(folder)
        last = operations[crash.after - 1] if crash.after else "nothing"
        wrong = what_is_wrong(crash, operations, folder)
        if wrong is None and checked % 5 == 0:
            wrong = what_is_wrong_after_going_on(folder)
        assert wrong is None, f"power lost after operation {crash.after}, {last}, with {crash.how}: {wrong}"
        remove_tree(folder)
        checked += 1
    return checked


def test_after_a_power_loss_at_any_operation_the_last_durable_save_is_whole(
    recorded: list[Operation], tmp_path: Path
) -> None:
    assert check(recorded, tmp_path / "disk", mixtures=1, share=0.2) > 20


@pytest.mark.slow
def test_after_a_power_loss_at_any_operation_in_every_state_the_last_durable_save_is_whole(
    recorded: list[Operation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = check(recorded, tmp_path / "disk", mixtures=24)
    with capsys.disabled():
        print(f"\n{len(recorded)} file operations, {checked:,} states after a power loss: every one resumes")


@pytest.mark.slow
@pytest.mark.parametrize("visit", range(1, 40))
def test_a_job_killed_at_an_operation_and_run_to_its_end_has_lost_nothing_to_a_power_loss_then(
    visit: int, tmp_path: Path
) -> None:
    """What the killed process had not synced, its successor found in place and may have taken for durable."""
    kill = DiskFault("kill", visit=visit, rank=0)
    operations = record(tmp_path / "job", Fault("killed", disk=kill, plain=True))
    end = [crash for crash in states(operations) if crash.after == len(operations)]
    for crash in end:
        crash.lay_out(tmp_path / "disk")
        wrong = what_is_wrong(crash, operations, tmp_path / "disk")
        assert wrong is None, f"killed at operation {visit}, power lost at the end with {crash.how}: {wrong}"
        remove_tree(tmp_path / "disk")


@pytest.mark.slow
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "tiers"])
def test_a_rank_that_was_told_of_a_save_can_rely_on_it_however_late_rank_0s_fsync_comes(
    plain: bool, tmp_path: Path
) -> None:
    late = DiskFault("slow", "sync_folder", "*step-*", rank=0, times=None, seconds=0.3)
    check(record(tmp_path / "job", Fault("late", disk=late, plain=plain)), tmp_path / "disk", mixtures=2)
