"""When saves are due, and what is left of them."""

from pathlib import Path

import pytest

from checkpointing.places import open_place
from checkpointing.store import committed
from tests.train.test_loop import pretrain
from train.run_folder import RunFolder


def steps_saved(run: RunFolder) -> list[int]:
    place = open_place(run.path / "pretrain" / "checkpoints")
    return sorted(save.step for save in committed(place))


def test_the_newest_saves_are_kept_and_some_for_ever(run: RunFolder) -> None:
    pretrain(run, "train.steps=12", "checkpoint={every: 2, keep: 2, keep_every: 4, memory_every: 0}")
    assert steps_saved(run) == [4, 8, 10, 12]


def test_auto_finds_an_interval_from_what_a_step_and_a_save_take(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    pretrain(run, "train.steps=200", "checkpoint={every: auto, keep: 100}")
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("checkpoint.every: auto is")]
    assert len(said) == 1, "decided once"
    every = int(said[0].split()[3])
    saved = steps_saved(run)
    decided = min(step for step in range(40, 201, 20) if step not in saved or step % every == 0)
    assert saved[-1] == 200
    assert [step for step in saved if decided < step < 200] == [
        step for step in range(decided + 1, 200) if step % every == 0
    ]


def test_nothing_stays_in_memory_after_a_finished_stage(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setenv("SFUMATO_MEMORY", str(memory))
    pretrain(run, "checkpoint={every: 2, memory_every: 1}")
    assert not [path for path in memory.rglob("*") if path.is_file()]


def test_saves_go_to_a_remote_store_as_well(run: RunFolder, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    pretrain(run, f"checkpoint={{every: 2, remote: 'file://{remote}'}}")
    (place,) = (open_place(f"file://{folder}") for folder in remote.glob("*/pretrain"))
    assert 4 in [save.step for save in committed(place)]
