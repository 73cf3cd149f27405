"""The ledger's writer under a crash, a full disk, a second writer and bad calls."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from privacy.events import event_key
from privacy.ledger import LedgerError, LedgerWarning, public_key_of, read_ledger
from tests.privacy.small_ledger import (
    CONFIG,
    EVENT,
    OTHER,
    OTHER_SEED,
    SEED,
    STAGE,
    charge,
    open_ledger,
    read_records,
    write_charged,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def charged(path: Path) -> Path:
    return write_charged(path)


# --- what it keeps ---


def test_charges_are_counted_by_event_across_openings(path: Path) -> None:
    with open_ledger(path) as ledger:
        charge(ledger, 0)
        charge(ledger, 1)
    with open_ledger(path, fencing_epoch=2) as ledger:
        ledger.charge("other_stage", 0, OTHER, "git:abc")
        assert ledger.counts() == {event_key(EVENT): 2, event_key(OTHER): 1}
    assert read_ledger(path).counts == {event_key(EVENT): 2, event_key(OTHER): 1}


def test_a_step_charged_again_is_another_attempt_even_after_a_restart(path: Path) -> None:
    with open_ledger(path) as ledger:
        assert [charge(ledger, 5).attempt, charge(ledger, 5).attempt, charge(ledger, 6).attempt] == [0, 1, 0]
    with open_ledger(path) as ledger:
        assert charge(ledger, 5).attempt == 2
        assert charge(ledger, 5, stage="another").attempt == 0


def test_a_charge_is_synced_before_it_is_returned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    sync = os.fsync

    def watched(descriptor: int) -> None:
        sync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    with open_ledger(path) as ledger:
        monkeypatch.setattr(os, "fsync", watched)
        charge(ledger, 0)
        assert synced == [path.stat().st_size]
        ledger.charge_ahead(STAGE, [(step, EVENT) for step in range(1, 20)], "git:abc")
        assert synced[1:] == [path.stat().st_size]


def test_a_killed_writer_loses_no_charge_it_was_told_of(path: Path) -> None:
    writer = (
        "import sys; from pathlib import Path; from privacy.ledger import Ledger\n"
        f"ledger = Ledger.open(Path({str(path)!r}), delta=1e-5, unit='record', dataset_root='d', "
        "signing_seed=b's' * 32, fencing_epoch=1)\n"
        "for step in range(10**6):\n"
        f"    print(ledger.charge('finetune_dp', step, {EVENT!r}, 'git:abc').hash, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", writer], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [process.stdout.readline().strip() for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    told += process.stdout.read().split()
    process.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LedgerWarning)  # the kill may have torn the last line
        ledger = open_ledger(path, dataset_root="d")
    ledger.close()
    view = read_ledger(path, told)
    assert set(view.heads) == set(told)
    assert len(told) <= view.num_charges <= len(told) + 1


def test_a_finished_step_is_synced_with_the_next_charge_or_when_asked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    with open_ledger(path) as ledger:
        first = charge(ledger, 0)
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
        ledger.done(first, "keyed")
        assert synced == []
        assert read_ledger(path).head == ledger.head  # written all the same: it outlives the process
        ledger.sync()
        assert synced == [path.stat().st_size]


def test_charges_ahead_are_the_charges_that_would_come_one_by_one(path: Path, tmp_path: Path) -> None:
    steps = [(0, EVENT), (1, OTHER), (0, EVENT)]
    with open_ledger(path) as ledger, open_ledger(tmp_path / "singly.jsonl") as singly:
        ahead = ledger.charge_ahead(STAGE, steps, "git:abc")
        one_by_one = [singly.charge(STAGE, step, event, "git:abc") for step, event in steps]
        assert [(c.seq, c.step, c.attempt, c.event) for c in ahead] == [
            (c.seq, c.step, c.attempt, c.event) for c in one_by_one
        ]
        assert [c.attempt for c in ahead] == [0, 0, 1]
        assert ledger.head == ahead[-1].hash
        for made in ahead:
            ledger.done(made, "keyed")
        assert ledger.charge_ahead(STAGE, [], "git:abc") == []
    view = read_ledger(path, every_signature=True)
    assert view.counts == {event_key(EVENT): 2, event_key(OTHER): 1}
    assert not view.unfinished


def test_no_clock_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_ledger(path) as ledger:
        ledger.done(charge(ledger, 0), "keyed")
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, lambda: -1)  # a clock that went back before the epoch
    with open_ledger(path) as ledger:
        assert charge(ledger, 0).attempt == 1
    assert not any("time" in name or "date" in name.removeprefix("dataset") for r in read_records(path) for name in r)


def test_a_plan_is_kept_from_the_first_time_and_another_config_is_refused(path: Path) -> None:
    with open_ledger(path) as ledger:
        assert ledger.planned("finetune_dp") is None
        ledger.plan("finetune_dp", steps=3, event=EVENT, config_sha256=CONFIG, target_epsilon=10.0)
    with open_ledger(path) as ledger:
        plan = ledger.plan("finetune_dp", steps=3, event=OTHER, config_sha256=CONFIG, target_epsilon=10.0)
        assert plan["event"] == EVENT
        assert plan["target_epsilon"] == 10.0
        assert plan == ledger.planned("finetune_dp")
        with pytest.raises(LedgerError, match="put the configuration back"):
            ledger.plan("finetune_dp", steps=3, event=EVENT, config_sha256="e" * 64)
        assert ledger.head == read_ledger(path).head


def test_every_new_ledger_has_an_id_of_its_own(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "one.jsonl") as one, open_ledger(tmp_path / "two.jsonl") as two:
        assert one.ledger_id != two.ledger_id


# --- crashes and full disks ---


@pytest.mark.parametrize("keep", [1, 40, -1], ids=["one byte", "forty bytes", "all but the newline"])
def test_a_torn_last_line_is_dropped_and_said(charged: Path, keep: int) -> None:
    whole = charged.read_bytes()
    with open_ledger(charged) as ledger:
        charge(ledger, 2)
    torn = charged.read_bytes()[len(whole) :][:keep]
    charged.write_bytes(whole + torn)
    assert read_ledger(charged).torn_bytes == len(torn)
    with pytest.warns(LedgerWarning, match=f"torn last line of {len(torn)} bytes"), open_ledger(charged) as ledger:
        assert ledger.recovered == len(torn)
        assert charged.read_bytes() == whole
        assert charge(ledger, 2).attempt == 1
    assert read_ledger(charged).num_charges == 4


def test_a_ledger_torn_at_its_first_line_begins_anew(path: Path) -> None:
    path.write_bytes(b'{"dataset_cap":nu')
    with pytest.warns(LedgerWarning), open_ledger(path) as ledger:
        assert charge(ledger, 0).seq == 1


DYING_WRITER = """
import os, signal, sys
from pathlib import Path
from privacy.ledger import Ledger

path, where, lines, beyond = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
event = {"mechanism": "gaussian", "noise_multiplier": 4.0}
ledger = Ledger.open(
    path, delta=1e-5, unit="record", dataset_root="blake3:" + "d" * 64, signing_seed=b"s" * 32, fencing_epoch=1
)
first = ledger.charge_ahead("finetune_dp", [(step, event) for step in range(2)], "git:abc")
ledger.done(first[0], "keyed")
write, sync = os.write, os.fsync


def die(descriptor, data=b""):
    if where == "in the write":
        write(descriptor, data[: sum(len(line) for line in data.splitlines(keepends=True)[:lines]) + beyond])
    if where == "after the sync":
        sync(descriptor)
    os.kill(os.getpid(), signal.SIGKILL)


if where == "in the write":
    os.write = die
else:
    os.fsync = die
ledger.charge_ahead("finetune_dp", [(step, event) for step in range(2, 6)], "git:abc")
"""


@pytest.mark.parametrize(
    ("where", "lines", "beyond"),
    [
        ("in the write", 0, 0),
        ("in the write", 0, 1),
        ("in the write", 1, -1),
        ("in the write", 1, 0),
        ("in the write", 2, 300),
        ("in the write", 4, -1),
        ("in the write", 4, 0),
        ("before the sync", 4, 0),
        ("after the sync", 4, 0),
    ],
)
def test_a_writer_killed_amid_charges_ahead_leaves_every_whole_line_counted(
    path: Path, where: str, lines: int, beyond: int
) -> None:
    command = [sys.executable, "-c", DYING_WRITER, str(path), where, str(lines), str(beyond)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    whole = lines - (beyond < 0)
    view = read_ledger(path, every_signature=True)
    assert view.num_charges == 2 + whole  # what was acknowledged, and what of the rest is whole
    assert view.stages[STAGE].finished == {0}
    assert bool(view.torn_bytes) == bool(beyond)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if beyond else "error", LedgerWarning)
        with open_ledger(path) as ledger:
            again = ledger.charge_ahead(STAGE, [(step, OTHER) for step in range(6)], "git:abc")
    assert [made.attempt for made in again] == [1] * (2 + whole) + [0] * (4 - whole)
    records = [record for record in read_records(path) if record["type"] == "charge"]
    assert len({(record["stage"], record["step"], record["attempt"]) for record in records}) == len(records)
    assert read_ledger(path).num_charges == len(records) == 2 + whole + 6


def test_a_write_that_comes_short_is_gone_on_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with open_ledger(path) as ledger:
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
        ledger.charge_ahead(STAGE, [(step, EVENT) for step in range(5)], "git:abc")
    assert read_ledger(path, every_signature=True).num_charges == 5


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """A real limit on file size: writes past it come back short, then fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_the_step_and_every_later_one(charged: Path, file_size_limit: Callable[[int], None]) -> None:
    size = charged.stat().st_size
    ledger = open_ledger(charged)
    file_size_limit(size + 100)  # in the midst of the next line
    with pytest.raises(LedgerError, match="could not be made durable"):
        charge(ledger, 3)
    file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    with pytest.raises(LedgerError, match="takes no more records"):
        charge(ledger, 3)
    ledger.close()
    assert charged.stat().st_size == size + 100
    with pytest.warns(LedgerWarning, match="100 bytes"), open_ledger(charged) as ledger:
        assert ledger.num_charges == 3


def test_a_disk_that_fills_amid_charges_ahead_counts_those_that_fitted(
    charged: Path, file_size_limit: Callable[[int], None]
) -> None:
    size = charged.stat().st_size
    with open_ledger(charged) as ledger:
        file_size_limit(size + 1500)  # two lines and part of the third
        with pytest.raises(LedgerError, match="could not be made durable"):
            ledger.charge_ahead(STAGE, [(step, EVENT) for step in range(3, 7)], "git:abc")
        for act in (lambda: charge(ledger, 3), ledger.sync, lambda: ledger.rotate(OTHER_SEED)):
            with pytest.raises(LedgerError, match="takes no more records"):
                act()
    file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    with pytest.warns(LedgerWarning), open_ledger(charged) as ledger:
        assert ledger.num_charges == 3 + 2


def test_a_disk_full_from_the_first_opens_no_ledger(path: Path, file_size_limit: Callable[[int], None]) -> None:
    file_size_limit(0)
    with pytest.raises(LedgerError, match="could not be made durable"):
        open_ledger(path)
    file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    with open_ledger(path) as ledger:
        assert charge(ledger, 0).seq == 1


def test_a_failed_sync_stops_every_later_step_and_the_charge_still_counts(
    charged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    ledger = open_ledger(charged)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(LedgerError, match="Input/output error"):
            charge(ledger, 3)
    with pytest.raises(LedgerError, match="takes no more records"):
        charge(ledger, 3)
    ledger.close()
    assert read_ledger(charged).num_charges == 4


def test_a_closed_ledger_charges_nothing(charged: Path) -> None:
    ledger = open_ledger(charged)
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        charge(ledger, 3)


# --- others' hands ---


def test_a_second_writer_is_refused_while_the_first_lives(charged: Path) -> None:
    with open_ledger(charged), pytest.raises(LedgerError, match="in use by another process"):
        open_ledger(charged)
    open_ledger(charged).close()


@pytest.mark.parametrize(
    ("meddle", "said"),
    [
        (lambda path: path.unlink(), "was removed"),
        (lambda path: (path.rename(path.with_name("aside")), path.write_bytes(b"")), "was replaced"),
        (lambda path: os.truncate(path, 100), "has 100 bytes"),
    ],
    ids=["removed", "replaced", "cut"],
)
def test_a_file_changed_under_the_writer_stops_it(charged: Path, meddle: Callable[[Path], object], said: str) -> None:
    with open_ledger(charged) as ledger:
        meddle(charged)
        for message in (said, "takes no more records"):
            with pytest.raises(LedgerError, match=message):
                charge(ledger, 3)


def test_a_file_that_cannot_be_written_is_said_before_any_step(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"cannot be written \(No such file or directory\)"):
        open_ledger(tmp_path / "nowhere" / "ledger.jsonl")
    with pytest.raises(LedgerError, match=r"cannot be written \(Is a directory\)"):
        open_ledger(tmp_path)


def test_a_read_only_ledger_is_said_before_any_step(charged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    charged.chmod(0o444)
    charged.parent.chmod(0o755)
    monkeypatch.chdir(charged.parent)  # the folders above may be closed to the user it becomes
    us = os.geteuid()
    if us == 0:
        os.seteuid(65534)  # root may write any file, so be nobody
    try:
        with pytest.raises(LedgerError, match=r"cannot be written \(Permission denied\)"):
            open_ledger(Path(charged.name))
    finally:
        os.seteuid(us)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_root": "blake3:other"}, "dataset_root"),
        ({"delta": 1e-6}, "delta"),
        ({"unit": "user"}, "unit"),
        ({"dataset_cap": 12.0}, "dataset_cap"),
    ],
)
def test_a_budget_of_other_data_or_another_promise_is_refused(path: Path, changes: dict[str, Any], said: str) -> None:
    open_ledger(path, dataset_cap=8.0).close()
    with pytest.raises(LedgerError, match=said):
        open_ledger(path, **changes)
    with open_ledger(path) as ledger:
        assert ledger.dataset_cap == 8.0


def test_a_run_with_another_secret_is_refused_with_the_mend(charged: Path) -> None:
    before = charged.read_bytes()
    with pytest.raises(LedgerError, match=f"is signed by key {public_key_of(SEED)[:12]}.*give the secret that signs"):
        open_ledger(charged, signing_seed=OTHER_SEED)
    assert charged.read_bytes() == before


def test_a_process_that_was_replaced_is_refused(path: Path) -> None:
    with open_ledger(path, fencing_epoch=4) as ledger:
        charge(ledger, 0)
    with pytest.raises(LedgerError, match="replaced by a later one"):
        open_ledger(path, fencing_epoch=3)


# --- bad calls ---


def test_an_event_that_cannot_be_accounted_is_never_written(charged: Path) -> None:
    before = charged.read_bytes()
    with open_ledger(charged) as ledger:
        for event in ({"mechanism": "laplace"}, OTHER | {"noise_multiplier": 0.0}, OTHER | {"sampling_rate": 0.5}):
            with pytest.raises(ValueError, match=r"mechanism|noise_multiplier"):
                ledger.charge("finetune_dp", 3, event, "git:abc")
        assert charged.read_bytes() == before
        assert charge(ledger, 3).attempt == 0


@pytest.mark.parametrize("bad", [(4, {"mechanism": "laplace"}), (-1, EVENT), ("4", EVENT)])
def test_charges_ahead_are_written_all_or_not_at_all(charged: Path, bad: tuple[Any, Any]) -> None:
    before = charged.read_bytes()
    with open_ledger(charged) as ledger, pytest.raises(ValueError, match=r"mechanism|step"):
        ledger.charge_ahead(STAGE, [(3, EVENT), bad], "git:abc")
    assert charged.read_bytes() == before


def test_a_charge_cannot_be_done_twice(path: Path) -> None:
    with open_ledger(path) as ledger:
        first = charge(ledger, 0)
        ledger.done(first, "keyed")
        with pytest.raises(LedgerError, match="done twice, with one digest"):
            ledger.done(first, "keyed")
        with pytest.raises(LedgerError, match=r"attempt 0\) is done twice.*the same noise met two inputs"):
            ledger.done(first, "another")
        charge(ledger, 1)
    assert read_ledger(path).num_charges == 2
