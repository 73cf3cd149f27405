"""The commit protocol: order on the disk, order among saves, who may commit, what is removed and what never is."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing import __main__ as command
from checkpointing import disk, layout, store
from checkpointing.layout import FORMAT, SaveId
from checkpointing.places import MANIFEST, LocalPlace, Place, RemotePlace, Unreachable, open_place
from checkpointing.sharded import Checkpoint, Chunk, latest, save_now
from checkpointing.store import CheckpointError
from tests.checkpointing.simulated_ranks import STATE, assert_holds, example_state, load, save_all

_REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(params=["local", "memory://", "file://"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place of each kind."""
    if request.param == "memory://":
        return open_place(f"memory://{uuid.uuid4().hex}/checkpoints")
    return open_place(tmp_path / "place" if request.param == "local" else f"file://{tmp_path}/place")


def save_step(where: Place | Path, step: int, sequence: int | None = None, epoch: int = 1) -> SaveId:
    place = open_place(where)
    save = SaveId(epoch, len(place.saves()) + 1 if sequence is None else sequence, step)
    save_now(place, save, [Chunk("param", "w", 0, (3,), torch.full((3,), float(step)))], {"step": step})
    return save


def leave_uncommitted(place: Place, save: SaveId) -> SaveId:
    """What a save that was killed before its commit leaves behind."""
    place.open(save, 0)
    place.write(save, "rank-00000.safetensors", [b"half of a sh"])
    return save


def break_payload(place: Place, save: SaveId) -> None:
    content = place.read(save, "rank-00000.safetensors")
    place.put(save, "rank-00000.safetensors", content[:-1] + bytes([content[-1] ^ 1]))


def commits(place: Place) -> list[int]:
    return [save.step for save in store.committed(place)]


# --- the name ------------------------------------------------------------------------------------------------------


def test_a_save_is_known_by_its_folders_name() -> None:
    save = SaveId(epoch=3, sequence=12, step=100)
    assert save.name == "step-00000100.attempt-000003-000012"
    for same in (save, SaveId(10**7, 10**8, 10**9)):
        assert SaveId.parse(same.name) == same
    for other in (
        "step-1",
        f"{save}.bak",
        "step-00000100.attempt-000007-3fa9c1d2",
        "step-000000100.attempt-000003-000012",
    ):
        assert SaveId.parse(other) is None


def test_saves_are_ordered_by_epoch_and_then_by_sequence_whatever_their_step() -> None:
    saves = [SaveId(1, 1, 100), SaveId(1, 2, 200), SaveId(2, 1, 50), SaveId(2, 2, 60)]
    assert sorted(saves[::-1]) == saves


# --- committing ----------------------------------------------------------------------------------------------------


def test_everything_is_on_the_disk_before_the_name_that_commits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sync and rename is watched and carried out: power loss cannot be had here, its order of writes can."""
    events: list[str] = []
    sync_file, sync_folder, rename = disk.sync_file, disk.sync_folder, disk.rename

    def watched_file(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"sync {path.relative_to(tmp_path)}")
        sync_file(descriptor)

    def watched_folder(folder: Path) -> None:
        events.append(f"sync {os.path.relpath(folder, tmp_path)}")
        sync_folder(folder)

    def watched_rename(old: Path, new: Path) -> None:
        events.append(f"rename {new.relative_to(tmp_path)}")
        rename(old, new)

    monkeypatch.setattr(disk, "sync_file", watched_file)
    monkeypatch.setattr(disk, "sync_folder", watched_folder)
    monkeypatch.setattr(disk, "rename", watched_rename)
    name = f"run/checkpoints/{save_step(tmp_path / 'run' / 'checkpoints', 7).name}"
    assert events == [
        "sync ..",  # the names of folders that are there already, too
        "sync .",
        "sync run",
        "sync run",
        "sync run/checkpoints",
        f"sync {name}/rank-00000.safetensors",
        f"sync {name}",
        f"sync {name}/rank-00000.json.aside",
        f"rename {name}/rank-00000.json",
        f"sync {name}",
        f"sync {name}",
        f"sync {name}/MANIFEST.json.aside",
        f"rename {name}/MANIFEST.json",
        f"sync {name}",
        "sync run/checkpoints/latest.aside",
        "rename run/checkpoints/latest",
        "sync run/checkpoints",
    ]


def test_what_is_committed_anywhere_is_whole_and_the_same_everywhere(place: Place) -> None:
    tensors = example_state()
    save = save_all(place, SaveId(1, 1, 5), tensors, (0.3,))
    manifest = store.verify(place, save)
    assert (manifest.step, manifest.world_size, manifest.state) == (5, 2, STATE)
    checkpoint = Checkpoint.open(place, save)
    assert checkpoint.where == ("disk" if isinstance(place, LocalPlace) else "remote")
    assert_holds(checkpoint, tensors)
    assert place.read(None, "latest").decode() == f"{save}\n"
    assert manifest.size_bytes == sum(place.size(save, f"rank-0000{rank}.safetensors") or 0 for rank in range(2))


def test_the_commit_waits_for_the_last_rank(place: Place) -> None:
    save = SaveId(1, 1, 5)
    saving = threading.Thread(target=save_all, args=(place, save, example_state()))
    place.open(save, 0)
    with pytest.raises(CheckpointError, match=r"no sealed shard of rank 0 within 0 s"):
        store.commit(place, save, 1, {}, timeout_s=0)
    assert not place.has(save, MANIFEST)
    threading.Timer(0.2, saving.start).start()
    store.wait_for_commit(place, save, timeout_s=5)
    store.verify(place, save)


def test_a_rank_that_failed_ends_the_wait_of_all(place: Place) -> None:
    save = leave_uncommitted(place, SaveId(1, 1, 5))
    store.report_failure(place, save, 1, "disk 7 is on fire")
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=r"^rank 1: disk 7 is on fire$"):
        store.commit(place, save, 2, {}, timeout_s=60)
    store.give_up(place, save, 0, 2, "rank 1: disk 7 is on fire")
    with pytest.raises(CheckpointError, match=r"^rank 1: disk 7 is on fire$"):
        store.wait_for_commit(place, save, timeout_s=60)
    assert time.monotonic() - begun < 5
    assert place.files(save) == ["rank-00000.failed"]


def test_a_shard_that_is_not_as_long_as_its_index_says_is_not_committed(place: Place) -> None:
    whole, cut = save_step(place, 1), SaveId(1, 2, 1)
    with pytest.raises(CheckpointError, match="is committed already"):
        place.write(whole, "rank-00000.safetensors", [b"cut"])
    place.open(cut, 0)
    layout_of_none = layout.ShardLayout.of([])
    place.put(cut, "rank-00000.json", layout.seal_index(layout_of_none, cut, 0, 1, memoryview(layout_of_none.header)))
    for content in (None, b"cut"):
        if content is not None:
            place.write(cut, "rank-00000.safetensors", [content])
        with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors has .*, and its index tells of 64"):
            store.commit(place, cut, 1, {}, timeout_s=0)
    assert store.committed(place) == [whole]


def test_an_index_of_another_save_is_not_committed(place: Place) -> None:
    first, second = save_step(place, 1), SaveId(1, 9, 1)
    place.open(second, 0)
    for file in place.files(first):
        if file != MANIFEST:
            place.put(second, file, place.read(first, file))
    with pytest.raises(
        CheckpointError,
        match=r"is of rank 0 of 1 of step-00000001.attempt-000001-000001: shards of two saves are mixed",
    ):
        store.commit(place, second, 1, {}, timeout_s=0)
    assert not place.has(second, MANIFEST)


def test_a_durable_write_replaces_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    store.write_durably(path, b"one")
    store.write_durably(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- who may commit ------------------------------------------------------------------------------------------------


def test_a_run_that_another_has_fenced_out_commits_nothing_more(place: Place) -> None:
    store.fence(place, 3)
    old = save_step(place, 100, epoch=3)
    store.fence(place, 4)
    zombie = SaveId(3, 2, 110)
    with pytest.raises(CheckpointError, match=r"a newer run has taken .* over"):
        save_now(place, zombie, [], {}, still_mine=lambda: store.holds_fence(place, 3))
    assert store.committed(place) == [old]
    save_now(place, SaveId(4, 1, 105), [], {}, still_mine=lambda: store.holds_fence(place, 4))
    assert commits(place) == [105, 100]
    with pytest.raises(CheckpointError, match="taken over by the run with epoch 4, and this run's is 3"):
        store.fence(place, 3)


def test_the_question_is_asked_after_the_shards_are_in_and_before_the_manifest(place: Place) -> None:
    save = SaveId(3, 1, 1)

    def taken_over_meanwhile() -> bool:
        assert place.has(save, "rank-00000.json")
        assert not place.has(save, MANIFEST)
        store.fence(place, 4)
        return store.holds_fence(place, 3)

    with pytest.raises(CheckpointError, match="a newer run"):
        save_now(place, save, [], {}, still_mine=taken_over_meanwhile)
    assert store.committed(place) == []


def test_a_rank_that_is_stopped_and_wakes_up_fenced_out_commits_nothing(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    store.fence(place, 3)
    old = save_step(place, 1, epoch=3)

    def save_as_epoch_3() -> None:
        os.environ["SFUMATO_FAILPOINT"] = "index.renamed!stop"
        try:
            save_now(place, SaveId(3, 2, 2), [], {}, still_mine=lambda: store.holds_fence(place, 3))
        except CheckpointError:
            os._exit(1)
        os._exit(0)

    zombie = multiprocessing.get_context("fork").Process(target=save_as_epoch_3)
    zombie.start()
    assert zombie.pid is not None
    while " T " not in Path(f"/proc/{zombie.pid}/stat").read_text():
        time.sleep(0.01)
    store.fence(place, 4)
    new = save_step(place, 2, epoch=4)
    os.kill(zombie.pid, signal.SIGCONT)
    zombie.join()
    assert zombie.exitcode == 1
    assert place.saves() == [new, old]


def test_a_fence_may_be_raised_again_and_only_the_newest_stays(place: Place) -> None:
    for epoch in (1, 2, 2, 7):
        store.fence(place, epoch)
    assert place.files(None) == ["fence-000007.json"]
    assert json.loads(place.read(None, "fence-000007.json")) == {"epoch": 7}


def test_a_lost_fence_does_not_let_an_older_run_save_under_newer_ones(place: Place) -> None:
    store.fence(place, 5)
    save_step(place, 1, epoch=5)
    place.delete("fence-000005.json")
    with pytest.raises(CheckpointError, match=r"run with epoch 5, and this run's is 2: .*restore the whole run folder"):
        store.fence(place, 2)


def test_of_two_runs_that_start_at_once_the_newer_one_holds_the_place(tmp_path: Path) -> None:
    for _ in range(20):
        place = LocalPlace(tmp_path / uuid.uuid4().hex)
        place.open(SaveId(1, 1, 1), 0)
        refused: list[int] = []

        def start(epoch: int, place: Place = place, refused: list[int] = refused) -> None:
            try:
                store.fence(place, epoch)
            except CheckpointError:
                refused.append(epoch)

        runs = [threading.Thread(target=start, args=(epoch,)) for epoch in (3, 4)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        assert store.holds_fence(place, 4)
        assert not store.holds_fence(place, 3)
        assert refused in ([], [3])


def test_a_fence_clears_away_what_older_epochs_left_and_nothing_else(place: Place) -> None:
    kept = [save_step(place, 1, epoch=1), leave_uncommitted(place, SaveId(2, 1, 2))]
    leave_uncommitted(place, SaveId(1, 9, 9))
    store.fence(place, 2)
    assert place.saves() == kept[::-1]


# --- reading -------------------------------------------------------------------------------------------------------


def test_an_empty_or_absent_place_has_no_checkpoint(place: Place, tmp_path: Path) -> None:
    assert store.newest_whole(place) is None
    store.fence(place, 1)
    assert store.newest_whole(place) is None
    assert latest(tmp_path / "absent") is None


def test_a_folder_without_a_manifest_is_never_read(place: Place) -> None:
    leave_uncommitted(place, SaveId(1, 1, 9))
    assert store.newest_whole(place) is None
    with pytest.raises(CheckpointError, match=f"has no {MANIFEST}: it was never committed"):
        store.read_manifest(place, SaveId(1, 1, 9))


def test_the_newest_is_the_last_saved_even_after_a_return_to_an_earlier_step(place: Place) -> None:
    """After a walk back to step 100 the run's own line goes on from there: a later step saved earlier is another's."""
    for step, epoch in ((100, 1), (200, 1), (150, 2)):
        save_step(place, step, epoch=epoch)
    newest = store.newest_whole(place)
    assert newest is not None
    assert newest.step == 150
    assert commits(place) == [150, 200, 100]


def test_walking_back_says_what_it_skipped(place: Place) -> None:
    save_step(place, 1)
    for step in (2, 3):
        break_payload(place, save_step(place, step))
    with pytest.warns(UserWarning, match="skipped a broken checkpoint") as said:
        newest = store.newest_whole(place)
    assert newest is not None
    assert newest.step == 1
    assert ["step-00000003" in str(said[0].message), "step-00000002" in str(said[1].message)] == [True, True]


def test_a_wrong_pointer_misleads_nobody(tmp_path: Path) -> None:
    first, second = save_step(tmp_path, 1), save_step(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == f"{second}\n"
    (tmp_path / "latest").write_text(f"{first}\n")
    assert load(tmp_path).save == second


def test_a_renamed_folder_is_skipped(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    (tmp_path / save_step(tmp_path, 2).name).rename(tmp_path / SaveId(9, 9, 900).name)
    with pytest.warns(UserWarning, match="holds the checkpoint step-00000002.*: it was renamed or mixed up"):
        assert load(tmp_path).step == 1


def test_a_newer_format_is_refused_by_name(place: Place) -> None:
    save = SaveId(1, 1, 3)
    place.open(save, 0)
    place.put(save, MANIFEST, layout.seal({"format": FORMAT + 1, "anything": "else"}))
    with pytest.raises(
        CheckpointError, match=rf"{MANIFEST} has format {FORMAT + 1}, and this code reads format {FORMAT}"
    ):
        store.newest_whole(place)


def test_folders_of_format_1_are_refused_by_name_rather_than_begun_anew_over(tmp_path: Path) -> None:
    old = "step-00000040.attempt-000002-3fa9c1d2"
    (tmp_path / old).mkdir()
    with pytest.raises(CheckpointError, match=f"{old} has format 1, and this code reads format {FORMAT}"):
        latest(tmp_path)
    save_step(tmp_path, 50)
    assert load(tmp_path).step == 50


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'{"digest": 1}', b"\xff\xfe", b"[" * 10**5])
def test_a_manifest_that_is_none_is_damaged(place: Place, content: bytes) -> None:
    save = save_step(place, 1)
    place.put(save, MANIFEST, content)
    assert MANIFEST in (store.reason_broken(place, save) or "")


@pytest.mark.parametrize(
    "lie",
    [
        {"shards": []},
        {"shards": [], "world_size": 0},
        {"shards": [{}]},
        {"state": None, "world_size": 7},
        {"step": "1"},
    ],
)
def test_a_manifest_that_lies_under_a_right_digest_is_refused(place: Place, lie: dict[str, Any]) -> None:
    save = save_step(place, 1)
    body = json.loads(place.read(save, MANIFEST))
    del body["digest"]
    place.put(save, MANIFEST, layout.seal({**body, **lie}))
    assert store.reason_broken(place, save) is not None


def test_a_store_that_does_not_answer_is_no_broken_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    place = RemotePlace(f"memory://{uuid.uuid4().hex}")
    for step in (1, 2, 3):
        save_step(place, step)

    def refuse(*_: Any, **__: Any) -> bytes:
        raise ConnectionResetError("no route to host")

    reading: list[Callable[[], object]] = [
        lambda: store.newest_whole(place),
        lambda: store.reason_broken(place, SaveId(1, 3, 3)),
        lambda: store.prune(place, 1),
        lambda: Checkpoint.open(place, SaveId(1, 3, 3)),
    ]
    monkeypatch.setattr(type(place._store), "cat_file", refuse)  # pyright: ignore[reportPrivateUsage]
    for act in reading:
        with pytest.raises(Unreachable, match=r"memory://.* cannot be reached: ConnectionResetError: no route to host"):
            act()
    monkeypatch.undo()
    assert commits(place) == [3, 2, 1]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file cannot be listed: Not a directory"):
        latest(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=f"{tmp_path}.* cannot be written: Permission denied"):
        save_step(tmp_path / "checkpoints", 1)


def test_a_place_where_no_folder_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoints cannot be .*: Not a directory"):
        save_step(tmp_path / "file" / "checkpoints", 1)


# --- keeping -------------------------------------------------------------------------------------------------------


def test_what_no_save_made_is_left_alone(tmp_path: Path) -> None:
    for name in ("step-1", "notes", f"{SaveId(1, 1, 1)}.bak"):
        (tmp_path / name).mkdir()
    (tmp_path / SaveId(1, 1, 1).name).write_text("a file")
    save_step(tmp_path, 2, sequence=2)
    store.fence(LocalPlace(tmp_path), 3)
    store.prune(tmp_path, keep=1)
    assert len(list(tmp_path.iterdir())) == 7


def test_a_lost_manifest_of_the_only_save_is_no_new_beginning(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    save = save_step(place, 100)
    (place.folder(save) / store.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is missing, though latest names its save as committed"):
        store.newest_whole(place)


def test_prune_keeps_the_newest(place: Place) -> None:
    saves = [save_step(place, step) for step in range(5)]
    assert sorted(store.prune(place, keep=2)) == saves[:3]
    assert store.committed(place) == saves[:2:-1]


def test_prune_keeps_every_kth_step_for_ever(place: Place) -> None:
    for step in (0, 50, 100, 150, 200, 250):
        save_step(place, step)
    twice = save_step(place, 100)
    save_step(place, 300)
    store.prune(place, keep=1, keep_every=100)
    assert commits(place) == [300, 100, 200, 0]
    assert twice in store.committed(place)  # of two saves of one step, the later one


def test_prune_never_removes_the_newest_whole_one(place: Place) -> None:
    saves = [save_step(place, step) for step in range(5)]
    for save in saves[2:]:
        break_payload(place, save)
    assert sorted(store.prune(place, keep=2)) == [saves[0], saves[2]]
    with pytest.warns(UserWarning, match="skipped a broken checkpoint"):
        newest = store.newest_whole(place)
    assert newest is not None
    assert newest.save == saves[1]


def test_prune_does_not_read_what_was_just_committed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = [save_step(place, step) for step in (100, 200, 300)]
    monkeypatch.setattr(store, "verify", lambda *_: pytest.fail("it was read"))
    assert store.prune(place, keep=2, whole=saves[-1]) == [saves[0]]


def test_prune_removes_nothing_where_none_is_whole(place: Place) -> None:
    for step in range(3):
        break_payload(place, save_step(place, step))
    assert store.prune(place, keep=1) == []
    assert commits(place) == [2, 1, 0]


def test_prune_clears_away_what_failed_and_never_what_is_under_way(place: Place) -> None:
    store.fence(place, 2)
    leave_uncommitted(place, SaveId(2, 1, 1))
    leave_uncommitted(place, SaveId(1, 7, 9))
    newest = save_step(place, 2, sequence=2, epoch=2)
    under_way = [leave_uncommitted(place, SaveId(2, 3, 3)), leave_uncommitted(place, SaveId(3, 1, 3))]
    store.prune(place, keep=1)
    assert place.saves() == [under_way[1], under_way[0], newest]


@pytest.mark.parametrize(("keep", "keep_every"), [(0, None), (1, 0)])
def test_prune_to_nothing_is_refused(tmp_path: Path, keep: int, keep_every: int | None) -> None:
    with pytest.raises(ValueError, match="is 0"):
        store.prune(tmp_path, keep, keep_every)


def test_a_removal_killed_midway_leaves_debris_and_not_a_broken_checkpoint(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    first, second = (save_step(place, step) for step in (1, 2))
    prune = f"from pathlib import Path; from checkpointing import store; store.prune(Path({str(tmp_path)!r}), 1)"
    environment = {**os.environ, "SFUMATO_FAILPOINT": "remove.manifest_gone"}
    done = subprocess.run([sys.executable, "-c", prune], cwd=_REPOSITORY, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (store.committed(place), store.uncommitted(place)) == ([second], [first])
    store.prune(place, 1)
    assert place.saves() == [second]


# --- the command ---------------------------------------------------------------------------------------------------


def run(place: Place, *arguments: str) -> int:
    name, *rest = arguments
    return command.main([name, str(place), *rest])


def test_the_command_verifies_lists_and_shows(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    save_step(place, 1)
    newest = save_step(place, 2)
    assert run(place, "verify") == 0
    assert capsys.readouterr().out.count("whole") == 2
    assert run(place, "list") == 0
    assert newest.name in capsys.readouterr().out.splitlines()[1]
    assert command.main(["show", place.path(newest)]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("{") : shown.index("}") + 1]) == {"step": 2}
    assert shown.splitlines()[-1].split() == ["param", "3", "3", "w"]


def test_the_command_says_what_is_broken_and_exits_1(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    save_step(place, 1)
    broken = save_step(place, 2)
    break_payload(place, broken)
    assert run(place, "verify") == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("BROKEN")
    assert "rank-00000.safetensors, bytes" in first
    assert second.startswith("whole")
    place.put(broken, MANIFEST, b"{}")
    assert run(place, "list") == 1
    assert run(place, "show") == 1
    assert MANIFEST in capsys.readouterr().err


def test_the_command_reshards_and_prunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path / "in", step)
    out = f"file://{tmp_path}/out"
    assert command.main(["reshard", str(tmp_path / "in"), "4", out]) == 0
    assert capsys.readouterr().out == f"{out}/{SaveId(1, 3, 3)}\n"
    assert load(tmp_path / "out").needed([layout.Piece("param", "w", 0, 3, (3,))]) == [1, 2, 3]
    assert command.main(["prune", str(tmp_path / "in"), "--keep", "1"]) == 0
    assert capsys.readouterr().out.count("removed") == 2
    assert commits(LocalPlace(tmp_path / "in")) == [3]
    assert command.main(["prune", str(tmp_path / "in"), "--keep", "0"]) == 1
    assert command.main(["reshard", str(tmp_path / "in"), "0", str(tmp_path / "none")]) == 1


def test_the_command_exits_2_where_there_is_nothing_to_read(place: Place, tmp_path: Path) -> None:
    assert run(place, "verify") == 2
    save = leave_uncommitted(place, SaveId(1, 1, 1))
    assert command.main(["verify", place.path(save)]) == 2
    assert command.main(["list", str(tmp_path / "absent")]) == 2


def test_the_command_and_the_writers_part_run_without_torch() -> None:
    check = (
        "import sys, pathlib, checkpointing.__main__ as command, checkpointing.sharded, tempfile\n"
        "from checkpointing.layout import Piece, SaveId, ShardLayout\n"
        "from checkpointing.places import LocalPlace\n"
        "from checkpointing.sharded import write_shard\n"
        "from checkpointing.store import commit\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    place, save = LocalPlace(pathlib.Path(folder) / 'in'), SaveId(1, 1, 1)\n"
        "    layout = ShardLayout.of([Piece('param', 'w', 0, 3, (3,))])\n"
        "    place.open(save, layout.size_bytes)\n"
        "    write_shard(place, save, 0, 1, layout, memoryview(layout.header + bytes(12)))\n"
        "    commit(place, save, 1, {}, timeout_s=1)\n"
        "    assert command.main(['verify', folder + '/in']) == 0\n"
        "    assert command.main(['reshard', folder + '/in', '2', folder + '/out']) == 0\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=_REPOSITORY, check=False).returncode == 0
