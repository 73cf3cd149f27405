"""The commit protocol: order on the disk, order among saves, what is removed and what never is."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpointing import __main__ as command
from checkpointing import store
from checkpointing.sharded import Chunk, latest, save
from checkpointing.store import CheckpointError

_REPOSITORY = Path(__file__).parents[2]


def save_step(root: Path, step: int) -> Path:
    return save(root, step, [Chunk("param", "w", 0, (3,), torch.full((3,), float(step)))], {"step": step})


def break_payload(folder: Path) -> None:
    path = folder / "rank-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_everything_is_on_the_disk_before_the_name_that_commits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync and rename are watched and carried out: power loss cannot be had here, its order of writes can."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"sync {path.relative_to(tmp_path)}")
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        events.append(f"rename {target.relative_to(tmp_path)}")
        return replace(self, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not tell a descriptor's name")
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    folder = save_step(tmp_path / "run" / "checkpoints", 7)
    name = folder.relative_to(tmp_path)
    assert events == [
        "sync .",
        "sync run",
        "sync run/checkpoints",
        f"sync {name}/rank-00000.safetensors",
        f"sync {name}",
        f"sync {name}/MANIFEST.json.aside",
        f"rename {name}/MANIFEST.json",
        f"sync {name}",
        "sync run/checkpoints/latest.aside",
        "rename run/checkpoints/latest",
        "sync run/checkpoints",
    ]


def test_an_empty_or_absent_root_has_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None


def test_a_folder_without_a_manifest_is_never_read(tmp_path: Path) -> None:
    newest = save_step(tmp_path, 9)
    (newest / store.MANIFEST).unlink()
    assert latest(tmp_path) is None


def test_the_newest_is_the_last_saved_even_after_a_return_to_an_earlier_step(tmp_path: Path) -> None:
    """After a walk back to step 100 the run's own line goes on from there: a later step saved earlier is another's."""
    for step in (100, 200, 150):
        save_step(tmp_path, step)
    assert store.newest_whole(tmp_path) is not None
    assert [store.read_manifest(folder).step for folder in store.committed_folders(tmp_path)] == [150, 200, 100]


def test_one_step_saved_twice_is_two_folders_and_the_second_counts(tmp_path: Path) -> None:
    first, second = save_step(tmp_path, 5), save_step(tmp_path, 5)
    assert first != second
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.folder == second


def test_a_wrong_pointer_misleads_nobody(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    newest = save_step(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == f"{newest.name}\n"
    (tmp_path / "latest").write_text("step-00000001.attempt-000001-00000000\n")
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.folder == newest


def test_a_renamed_folder_is_skipped(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2).rename(tmp_path / "step-00000900.attempt-000009-00000000")
    with pytest.warns(UserWarning, match="holds the checkpoint of step 2"):
        checkpoint = latest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1


def test_a_later_format_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000003.attempt-000001-00000000"
    folder.mkdir()
    store.commit(folder, {"format": 2, "step": 3, "files": {}, "tensors": [], "state": {}})
    with pytest.raises(CheckpointError, match="has format 2, and this code reads format 1"):
        store.read_manifest(folder)


def test_what_no_save_made_is_left_alone(tmp_path: Path) -> None:
    for name in ("step-1", "notes", "step-00000001.attempt-000001-00000000.bak"):
        (tmp_path / name).mkdir()
    save_step(tmp_path, 2)
    store.prune(tmp_path, keep=1)
    assert len(list(tmp_path.iterdir())) == 5


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    folders = [save_step(tmp_path, step) for step in range(5)]
    assert sorted(store.prune(tmp_path, keep=2)) == folders[:3]
    assert store.committed_folders(tmp_path) == folders[:2:-1]


def test_prune_never_removes_the_newest_whole_one(tmp_path: Path) -> None:
    folders = [save_step(tmp_path, step) for step in range(5)]
    for folder in folders[2:]:
        break_payload(folder)
    assert store.prune(tmp_path, keep=2) == [folders[0]]
    with pytest.warns(UserWarning, match="skipped a broken checkpoint"):
        checkpoint = latest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1


def test_prune_to_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        store.prune(tmp_path, keep=0)


def test_a_removal_killed_midway_leaves_debris_and_not_a_broken_checkpoint(tmp_path: Path) -> None:
    folders = [save_step(tmp_path, step) for step in (1, 2)]
    prune = f"from pathlib import Path; from checkpointing import store; store.prune(Path({str(tmp_path)!r}), 1)"
    environment = {**os.environ, "SFUMATO_FAILPOINT": "remove.manifest_gone"}
    done = subprocess.run([sys.executable, "-c", prune], cwd=_REPOSITORY, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert store.committed_folders(tmp_path) == [folders[1]]
    assert store.uncommitted_folders(tmp_path) == [folders[0]]
    save_step(tmp_path, 3)
    assert store.uncommitted_folders(tmp_path) == []


def test_a_durable_write_replaces_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    store.write_durably(path, b"one")
    store.write_durably(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_verifies_lists_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_step(tmp_path, 1)
    newest = save_step(tmp_path, 2)
    assert command.main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("whole") == 2
    assert command.main(["list", str(tmp_path)]) == 0
    assert newest.name in capsys.readouterr().out.splitlines()[1]
    assert command.main(["show", str(newest)]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("{") : shown.index("}") + 1]) == {"step": 2}
    assert shown.splitlines()[-1].split() == ["param", "3", "3", "w"]


def test_the_command_says_what_is_broken_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_step(tmp_path, 1)
    break_payload(save_step(tmp_path, 2))
    assert command.main(["verify", str(tmp_path)]) == 1
    broken, whole = capsys.readouterr().out.splitlines()
    assert broken.startswith("BROKEN")
    assert "rank-00000.safetensors is damaged" in broken
    assert whole.startswith("whole")


def test_the_command_exits_2_where_there_is_nothing_to_read(tmp_path: Path) -> None:
    assert command.main(["verify", str(tmp_path)]) == 2
    assert command.main(["list", str(tmp_path / "absent")]) == 2


def test_the_command_runs_without_torch() -> None:
    check = "import sys, checkpointing.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=_REPOSITORY, check=False).returncode == 0
