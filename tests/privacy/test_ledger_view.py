"""The ledger's reader: what it sums, which hands it finds, with the key and without, and what a million takes."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.events import canonical_json, event_key
from privacy.ledger import LedgerError, public_key_of, read_ledger
from tests.privacy.small_ledger import (
    DATASET,
    EVENT,
    OTHER,
    OTHER_SEED,
    SEED,
    STAGE,
    charge,
    forge,
    open_ledger,
    read_records,
    write_charged,
    write_records,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def charged(path: Path) -> Path:
    return write_charged(path)


# --- what it sums ---


def test_done_charges_are_told_from_wasted_ones(charged: Path) -> None:
    view = read_ledger(charged)
    assert view.stages[STAGE].finished == {0, 1}
    assert list(view.unfinished.values()) == [(STAGE, 2, 0)]
    assert view.num_charges == 3


def test_a_recorded_head_is_found_with_the_counts_up_to_it(path: Path) -> None:
    with open_ledger(path) as ledger:
        charge(ledger, 0)
        head = ledger.head
        charge(ledger, 1)
    view = read_ledger(path, [head, "f" * 64])
    assert view.heads == {head: {event_key(EVENT): 1}}
    assert view.counts == {event_key(EVENT): 2}


def test_the_history_tells_what_was_charged_when(path: Path) -> None:
    with open_ledger(path) as ledger:
        charge(ledger, 0)
        ledger.charge("other", 0, OTHER, "git:abc")
        charge(ledger, 1)
    assert list(read_ledger(path).history) == [
        (1, {STAGE: 1}, {event_key(EVENT): 1}),
        (2, {STAGE: 1, "other": 1}, {event_key(EVENT): 1, event_key(OTHER): 1}),
        (3, {STAGE: 2, "other": 1}, {event_key(EVENT): 2, event_key(OTHER): 1}),
    ]


@pytest.mark.parametrize("num_charges", [0, 255, 256, 257, 1500])
def test_a_long_history_has_few_marks_evenly_spread_to_the_end(path: Path, num_charges: int) -> None:
    with open_ledger(path) as ledger:
        ledger.charge_ahead(STAGE, [(step, EVENT if step % 2 else OTHER) for step in range(num_charges)], "git:abc")
    view = read_ledger(path)
    history = list(view.history)
    if num_charges == 0:
        assert history == []
        return
    assert num_charges / 256 <= len(history) <= 256
    assert len({after.num_charges - mark.num_charges for mark, after in pairwise(history[:-1])}) == 1
    assert history[-1] == (num_charges, {STAGE: num_charges}, view.counts)
    for mark in history:
        assert mark.counts.total() == mark.stages.total() == mark.num_charges
        assert mark.counts[event_key(EVENT)] == mark.num_charges // 2


@pytest.mark.parametrize("content", [b"", b'{"seq":0'], ids=["empty", "torn at once"])
def test_a_file_without_a_record_is_no_ledger(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="holds no record"):
        read_ledger(path)
    with pytest.raises(LedgerError, match="cannot be read"):
        read_ledger(path.with_name("missing"))


# --- a hand without the key ---


@pytest.mark.parametrize("line", range(7))
def test_a_changed_byte_is_found_and_its_line_named_wherever_it_is(charged: Path, line: int) -> None:
    lines = charged.read_bytes().splitlines(keepends=True)
    for place in range(0, len(lines[line]) - 1, 3):
        changed = bytearray(lines[line])
        changed[place] ^= 1
        charged.write_bytes(b"".join([*lines[:line], bytes(changed), *lines[line + 1 :]]))
        with pytest.raises(LedgerError, match=f"line {line + 1}: "):
            read_ledger(charged)


@pytest.mark.parametrize(
    ("order", "line"),
    [
        ((0, 1, 3, 4, 5, 6), 3),
        ((0, 1, 4, 3, 2, 5, 6), 3),
        ((1, 2, 3), 1),
        ((0, 1, 2, 2, 3), 4),
        ((0, 1, 2, 3, 4, 5, 6, 6), 8),
        ((0, 0), 2),
    ],
    ids=[
        "a line removed",
        "two lines swapped",
        "the opening removed",
        "a line doubled",
        "the last doubled",
        "reopened",
    ],
)
def test_a_chain_out_of_order_is_refused_at_its_line(charged: Path, order: tuple[int, ...], line: int) -> None:
    lines = charged.read_bytes().splitlines(keepends=True)
    charged.write_bytes(b"".join(lines[index] for index in order))
    with pytest.raises(LedgerError, match=f"line {line}: "):
        read_ledger(charged)


@pytest.mark.parametrize(
    ("there", "instead", "said"),
    [
        ('"step":2', '"step": 2', "not in canonical form"),
        ('"step":2', '"step":1,"step":2', "not in canonical form"),
        ('{"config', '{"":0,"config', "does not match its hash"),
        ('{"config', "[" * 100_000 + '{"config', "no ledger record"),
        ('"step":2', '"step":NaN', "no ledger record"),
        ('"step":2', f'"step":{"9" * 5000}', "no ledger record"),
        ('"keyed"', '"k\u00e9yed"', "no ledger record"),
        ('{"config', '"hash"{"config', "no ledger record"),
    ],
    ids=["a space", "a name twice", "another name", "deep", "not a number", "endless digits", "not ASCII", "no object"],
)
def test_what_is_no_record_in_canonical_form_is_refused(charged: Path, there: str, instead: str, said: str) -> None:
    charged.write_text(charged.read_text().replace(there, instead, 1))
    with pytest.raises(LedgerError, match=said):
        read_ledger(charged)


def test_a_line_appended_without_the_key_is_found_by_its_signature(charged: Path) -> None:
    records = read_records(charged)
    records.append(records[-1] | {"step": 3})
    write_records(charged, records, seed=None)
    for read in (read_ledger, open_ledger):
        with pytest.raises(LedgerError, match="line 8: its signature is not one by key"):
            read(charged)


def test_a_file_hashed_anew_without_the_key_is_found_by_its_signatures(charged: Path) -> None:
    forge(charged, 2, lambda record: record["event"].update(noise_multiplier=100.0), seed=None)
    with pytest.raises(LedgerError, match="line 3: its signature is not one by key"):
        read_ledger(charged)


def test_a_file_signed_with_another_key_is_found_by_who_knows_the_right_one(charged: Path) -> None:
    right = read_ledger(charged).public_key
    forge(charged, 2, lambda record: record["event"].update(noise_multiplier=100.0), OTHER_SEED)
    with pytest.raises(LedgerError, match="line 1: its signature is not one by key"):
        read_ledger(charged)
    forge(charged, 0, lambda record: record.update(public_key=public_key_of(OTHER_SEED)), OTHER_SEED)
    assert read_ledger(charged).public_keys == [public_key_of(OTHER_SEED)]
    with pytest.raises(LedgerError, match="never by the expected key"):
        read_ledger(charged, public_key=right)
    with pytest.raises(LedgerError, match="is signed by key"):
        open_ledger(charged)


def test_a_signature_in_the_midst_answers_for_nothing_else_and_is_still_found(charged: Path) -> None:
    records = read_records(charged)
    for signature in ("0" * 128, "", records[2]["signature"].upper(), records[4]["signature"]):
        meddled = copy.deepcopy(records)
        meddled[2]["signature"] = signature
        charged.write_text("".join(canonical_json(record) + "\n" for record in meddled))
        with pytest.raises(LedgerError, match="line 3: its signature"):
            read_ledger(charged)


def test_a_ledger_cut_at_its_end_lacks_the_head_that_was_kept(charged: Path) -> None:
    kept = read_ledger(charged).head
    assert read_ledger(charged, [kept]).heads.keys() == {kept}
    lines = charged.read_bytes().splitlines(keepends=True)
    charged.write_bytes(b"".join(lines[:-1]))
    view = read_ledger(charged, [kept])
    assert view.heads == {}
    assert view.num_charges == 2


def test_a_key_that_was_kept_is_found(charged: Path) -> None:
    assert read_ledger(charged, public_key=public_key_of(SEED), every_signature=True).public_key == public_key_of(SEED)


# --- a hand with the key ---


@pytest.mark.parametrize(
    ("line", "edit", "said"),
    [
        (0, lambda record: record.update(format=3), "ledger format 3, and this version reads 2"),
        (0, lambda record: record.update(relation="replace_one"), "line 1: relation is 'replace_one'"),
        (0, lambda record: record.update(type="charge"), "line 1: a ledger begins"),
        (0, lambda record: record.update(public_key=public_key_of(SEED).upper()), "line 1: .* 32 bytes in lower-case"),
        (1, lambda record: record.update(steps="3"), "line 2: steps of a plan record is '3'"),
        (1, lambda record: record.pop("config_sha256"), "line 2: a plan record has"),
        (2, lambda record: record.update(type="refund"), "line 3: record type is 'refund'"),
        (2, lambda record: record.update(dataset_root="other"), "line 3: the charge is for data set other"),
        (2, lambda record: record.update(event={"mechanism": "laplace"}), "line 3: mechanism is 'laplace'"),
        (2, lambda record: record["event"].update(noise_multiplier=0), "line 3: noise_multiplier is 0"),
        (2, lambda record: record["event"].update(noise_multiplier=2), "line 3: the event .* is not in the form"),
        (2, lambda record: record.update(attempt=1), "line 3: stage finetune_dp step 0 is charged as attempt 1"),
        (2, lambda record: record.update(step=True), "line 3: step of a charge record is True"),
        (2, lambda record: record.pop("code_version"), "line 3: a charge record has"),
        (2, lambda record: record.update(note="free"), "line 3: a charge record has"),
        (2, lambda record: record.update(fencing_epoch=9), "line 5: fencing epoch 1 charges after epoch 9"),
        (3, lambda record: record.update(charge=1), "line 4: done names charge 1, which is no charge"),
        (3, lambda record: record.update(charge=4), "line 4: done names charge 4, which is no charge before it"),
    ],
)
def test_a_record_that_breaks_the_rules_is_refused_though_it_is_chained_and_signed(
    charged: Path, line: int, edit: Callable[[dict[str, Any]], object], said: str
) -> None:
    forge(charged, line, edit)
    with pytest.raises(LedgerError, match=said):
        read_ledger(charged)


def test_a_ledger_of_the_format_before_is_refused_and_told_from_a_damaged_one(charged: Path) -> None:
    records = read_records(charged)
    del records[0]["public_key"]
    records[0]["format"] = 1
    write_records(charged, records, SEED)
    with pytest.raises(LedgerError, match="ledger format 1, and this version reads 2: go on with the version"):
        read_ledger(charged)


def test_the_same_step_and_attempt_charged_twice_is_named(charged: Path) -> None:
    records = read_records(charged)
    write_records(charged, [*records, copy.deepcopy(records[2])], SEED)
    with pytest.raises(LedgerError, match=r"line 8: .* step 0 is charged as attempt 0, and 1 is due.*the same noise"):
        read_ledger(charged)


@pytest.mark.parametrize(
    ("digest", "said"),
    [
        ("another", r"digests keyed and another: the same noise met two inputs"),
        ("keyed", "is done twice, with one digest"),
    ],
)
def test_one_charge_done_twice_is_named(charged: Path, digest: str, said: str) -> None:
    records = read_records(charged)
    write_records(charged, [*records, records[3] | {"digest": digest}], SEED)
    with pytest.raises(LedgerError, match=rf"line 8: charge 2 \(stage {STAGE}, step 0, attempt 0\) .*{said}"):
        read_ledger(charged)


def test_a_chain_written_anew_with_the_key_no_longer_holds_the_head_that_was_kept(charged: Path) -> None:
    kept = read_ledger(charged).head
    forge(charged, 4, lambda record: record.update(event=OTHER))
    assert read_ledger(charged, [kept], every_signature=True).heads == {}


# --- a million charges ---


def write_a_million(path: Path, varied: bool) -> None:
    """A million charges, each done. Only the last line is rightly signed, for no other signature is verified."""
    open_ledger(path).close()
    (opening,) = path.read_text().splitlines()
    head, signatures = read_records(path)[0]["hash"], bytes(32)
    signatures = hashlib.sha256(signatures + read_records(path)[0]["signature"].encode()).digest()
    stage, code, digest = "0a1b2c3d4e5f/finetune_dp", "git:" + "a" * 40, "hmac-sha256:" + "e" * 64
    charge = f'{{"attempt":0,"code_version":"{code}","dataset_root":"{DATASET}","event":%s,"fencing_epoch":1,'
    event, mark, last = canonical_json(EVENT), '"signature":"%s",', '"stage":"%s","step":%d,"type":"charge"}'
    unsigned = "0" * 128
    with path.open("w") as file:
        file.write(opening + "\n")
        for step in range(1_000_000):
            seq = 2 * step + 1
            spent = canonical_json({**EVENT, "partition": stage, "part": step}) if varied else event
            for before, number, after in (
                (charge % spent, seq, last % (stage, step)),
                (f'{{"charge":{seq},"digest":"{digest}",', seq + 1, '"type":"done"}'),
            ):
                middle = f'"prev":"{head}","seq":{number},'
                head = hashlib.sha256((before + middle + after).encode()).hexdigest()
                signature = unsigned
                if number == 2_000_000:
                    key = Ed25519PrivateKey.from_private_bytes(SEED)
                    signature = key.sign(bytes.fromhex(head) + signatures).hex()
                signatures = hashlib.sha256(signatures + signature.encode()).digest()
                file.write(f'{before}"hash":"{head}",{middle}{mark % signature}{after}\n')


@pytest.mark.slow
@pytest.mark.parametrize(("varied", "limit_s"), [(False, 45), (True, 60)], ids=["one event", "a million events"])
def test_a_million_charges_are_read_in_a_gibibyte(path: Path, varied: bool, limit_s: int) -> None:
    write_a_million(path, varied)
    reader = (
        "import time; from pathlib import Path; from privacy.ledger import read_ledger\n"
        f"view = read_ledger(Path({str(path)!r}))\n"
        "print(view.num_charges, len(view.unfinished), len(view.counts))\n"
        # not ru_maxrss, which begins with what the process was forked from
        "peak = next(line for line in Path('/proc/self/status').open() if line.startswith('VmHWM:'))\n"
        "print(time.process_time(), peak.split()[1])"
    )
    output = subprocess.run([sys.executable, "-c", reader], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    charges, unfinished, events, seconds, kibibytes = (float(figure) for figure in output.split())
    assert (charges, unfinished, events) == (1_000_000, 0, 1_000_000 if varied else 1)
    print(f"{seconds:.1f} s of processor time, {kibibytes / 1024:.0f} MiB")
    assert seconds < limit_s
    assert kibibytes < 1024**2
