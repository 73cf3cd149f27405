"""The ledger under a crash, a full disk, a second writer and a hand that edits it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from privacy.events import canonical_json, event_key
from privacy.ledger import Charge, Ledger, LedgerError, LedgerWarning, read_ledger

ROOT = Path(__file__).resolve().parents[2]
EVENT = {"mechanism": "poisson_sampled_gaussian", "sampling_rate": 0.1, "noise_multiplier": 1.5}
OTHER = {"mechanism": "gaussian", "noise_multiplier": 4.0}
CONFIG = "c" * 64
DATASET = "blake3:" + "d" * 64


def open_ledger(path: Path, **changes: Any) -> Ledger:
    settings: dict[str, Any] = {"delta": 1e-5, "unit": "record", "dataset_root": DATASET, "fencing_epoch": 1}
    return Ledger.open(path, **(settings | changes))


def charge(ledger: Ledger, step: int, stage: str = "finetune_dp") -> Charge:
    return ledger.charge(stage, step, EVENT, "git:abc")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def charged(path: Path) -> Path:
    """A ledger of three charges, two of them done: open, plan, charge, done, charge, done, charge."""
    with open_ledger(path) as ledger:
        ledger.plan("finetune_dp", steps=3, event=EVENT, config_sha256=CONFIG)
        for step in range(2):
            ledger.done(charge(ledger, step), "keyed")
        charge(ledger, 2)
    return path


def forge(path: Path, line: int, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit one record and chain everything after it anew, as somebody who knows the format would."""
    import hashlib

    records = [json.loads(text) for text in path.read_text().splitlines()]
    edit(records[line])
    prev = "0" * 64
    for record in records:
        del record["hash"]
        record["prev"] = prev
        prev = record["hash"] = hashlib.sha256(canonical_json(record).encode()).hexdigest()
    path.write_text("".join(canonical_json(record) + "\n" for record in records))


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


def test_a_killed_writer_loses_no_charge_it_was_told_of(path: Path) -> None:
    writer = (
        "import sys; from pathlib import Path; from privacy.ledger import Ledger\n"
        f"ledger = Ledger.open(Path({str(path)!r}), delta=1e-5, unit='record', dataset_root='d', fencing_epoch=1)\n"
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


def test_done_charges_are_told_from_wasted_ones(charged: Path) -> None:
    view = read_ledger(charged)
    assert view.stages["finetune_dp"].finished == {0, 1}
    assert list(view.unfinished.values()) == [("finetune_dp", 2, 0)]
    assert view.num_charges == 3


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


def test_a_recorded_head_is_found_with_the_counts_up_to_it(path: Path) -> None:
    with open_ledger(path) as ledger:
        charge(ledger, 0)
        head = ledger.head
        charge(ledger, 1)
    view = read_ledger(path, [head, "f" * 64])
    assert view.heads == {head: {event_key(EVENT): 1}}
    assert view.counts == {event_key(EVENT): 2}


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write any file")
def test_a_read_only_ledger_is_said_before_any_step(charged: Path) -> None:
    charged.chmod(0o444)
    with pytest.raises(LedgerError, match=r"cannot be written \(Permission denied\)"):
        open_ledger(charged)


@pytest.mark.parametrize("line", range(7))
def test_a_flipped_byte_is_found_in_whichever_line(charged: Path, line: int) -> None:
    lines = charged.read_bytes().splitlines(keepends=True)
    middle = len(lines[line]) // 2
    lines[line] = lines[line][:middle] + bytes([lines[line][middle] ^ 1]) + lines[line][middle + 1 :]
    charged.write_bytes(b"".join(lines))
    for read in (read_ledger, open_ledger):
        with pytest.raises(LedgerError, match=f"line {line + 1}: "):
            read(charged)


@pytest.mark.parametrize(
    ("order", "line"),
    [((0, 1, 3, 4, 5, 6), 3), ((0, 1, 4, 3, 2, 5, 6), 3), ((1, 2, 3), 1), ((0, 1, 2, 2, 3), 4), ((0, 0), 2)],
    ids=["a line removed", "two lines swapped", "the opening removed", "a line doubled", "two openings"],
)
def test_a_chain_out_of_order_is_refused_at_its_line(charged: Path, order: tuple[int, ...], line: int) -> None:
    lines = charged.read_bytes().splitlines(keepends=True)
    charged.write_bytes(b"".join(lines[index] for index in order))
    with pytest.raises(LedgerError, match=f"line {line}: "):
        read_ledger(charged)


def test_the_same_values_in_another_spelling_are_refused(charged: Path) -> None:
    charged.write_text(charged.read_text().replace('"step":2', '"step": 2'))
    with pytest.raises(LedgerError, match="canonical"):
        read_ledger(charged)


@pytest.mark.parametrize(
    ("line", "edit", "said"),
    [
        (0, lambda record: record.update(format=2), "line 1: ledger format is 2"),
        (0, lambda record: record.update(relation="replace_one"), "line 1: relation is 'replace_one'"),
        (0, lambda record: record.update(type="charge"), "line 1: a ledger begins"),
        (2, lambda record: record.update(type="refund"), "line 3: record type is 'refund'"),
        (2, lambda record: record.update(dataset_root="other"), "line 3: the charge is for data set other"),
        (2, lambda record: record.update(event={"mechanism": "laplace"}), "line 3: mechanism is 'laplace'"),
        (2, lambda record: record["event"].update(noise_multiplier=0), "line 3: noise_multiplier is 0"),
        (2, lambda record: record.update(attempt=1), "line 3: stage finetune_dp step 0 is charged as attempt 1"),
        (2, lambda record: record.update(step=True), "line 3: step of a charge record is True"),
        (2, lambda record: record.pop("code_version"), "line 3: a charge record has"),
        (2, lambda record: record.update(fencing_epoch=9), "line 5: fencing epoch 1 charges after epoch 9"),
        (3, lambda record: record.update(charge=1), "line 4: done names charge 1"),
        (5, lambda record: record.update(charge=2), "line 6: done names charge 2"),
    ],
)
def test_a_record_that_breaks_the_rules_is_refused_though_its_hash_is_right(
    charged: Path, line: int, edit: Callable[[dict[str, Any]], object], said: str
) -> None:
    forge(charged, line, edit)
    with pytest.raises(LedgerError, match=said):
        read_ledger(charged)


def test_a_chain_written_anew_no_longer_holds_the_head_that_was_kept(charged: Path) -> None:
    kept = read_ledger(charged).head
    forge(charged, 2, lambda record: record["event"].update(noise_multiplier=100.0))
    assert read_ledger(charged, [kept]).heads == {}


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


def test_a_charge_cannot_be_done_twice(path: Path) -> None:
    with open_ledger(path) as ledger:
        first = charge(ledger, 0)
        ledger.done(first, "keyed")
        with pytest.raises(LedgerError, match="done before"):
            ledger.done(first, "keyed")
        charge(ledger, 1)
    assert read_ledger(path).num_charges == 2


@pytest.mark.parametrize("content", [b"", b'{"seq":0'], ids=["empty", "torn at once"])
def test_a_file_without_a_record_is_no_ledger(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="holds no record"):
        read_ledger(path)
    with pytest.raises(LedgerError, match="cannot be read"):
        read_ledger(path.with_name("missing"))


@pytest.mark.slow
def test_a_million_charges_are_read_in_a_gibibyte(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # the disk is not what is measured here
        with open_ledger(path) as ledger:
            for step in range(1_000_000):
                charge(ledger, step)
    reader = (
        "import resource, time; from pathlib import Path; from privacy.ledger import read_ledger\n"
        f"charges = read_ledger(Path({str(path)!r})).num_charges\n"
        "print(charges, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    output = subprocess.run([sys.executable, "-c", reader], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    charges, seconds, kibibytes = (float(figure) for figure in output.split())
    assert charges == 1_000_000
    assert seconds < 60
    assert kibibytes < 1024**2
