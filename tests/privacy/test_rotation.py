"""The change of a ledger's key, by the writer and from the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privacy.__main__ import main
from privacy.events import canonical_json
from privacy.ledger import LedgerError, public_key_of, read_ledger
from privacy.secrets import create_key_file, load_master_secret, signing_seed
from tests.privacy.small_ledger import (
    CONFIG,
    EVENT,
    OTHER_SEED,
    SEED,
    STAGE,
    charge,
    open_ledger,
    read_records,
    write_charged,
    write_records,
)

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = public_key_of(SEED), public_key_of(OTHER_SEED)


@pytest.fixture(autouse=True)
def no_secret_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFUMATO_SECRET", raising=False)


@pytest.fixture
def rotated(tmp_path: Path) -> Path:
    """Open, plan, charge, done, charge, done, charge under the old key; rotate; charge, done under the new."""
    path = write_charged(tmp_path / "ledger.jsonl")
    with open_ledger(path) as ledger:
        ledger.rotate(OTHER_SEED)
        ledger.done(charge(ledger, 2), "keyed")
    return path


# --- by the writer ---


def test_from_the_change_on_the_new_key_signs_and_the_old_is_refused(rotated: Path) -> None:
    view = read_ledger(rotated, every_signature=True)
    assert view.public_keys == [OLD, NEW]
    assert view.public_key == NEW
    with pytest.raises(LedgerError, match=f"makes key {OLD[:12]}.., which it gave up"):
        open_ledger(rotated)
    with open_ledger(rotated, signing_seed=OTHER_SEED) as ledger:
        assert ledger.public_key == NEW
        charge(ledger, 3)
    assert read_ledger(rotated, every_signature=True).num_charges == 5


def test_a_key_kept_from_before_the_change_still_vouches(rotated: Path) -> None:
    for key in (OLD, NEW):
        assert read_ledger(rotated, public_key=key).public_key == NEW


def test_a_ledger_cut_before_the_change_lacks_the_key_that_was_kept(rotated: Path) -> None:
    rotated.write_bytes(b"".join(rotated.read_bytes().splitlines(keepends=True)[:7]))
    assert read_ledger(rotated).public_key == OLD
    with pytest.raises(LedgerError, match="cut before that key was taken"):
        read_ledger(rotated, public_key=NEW)


def test_no_step_and_attempt_comes_twice_over_a_change_so_no_noise_does(rotated: Path) -> None:
    with open_ledger(rotated, signing_seed=OTHER_SEED) as ledger:
        assert [charge(ledger, step).attempt for step in (0, 2, 3)] == [1, 2, 0]
    charges = [record for record in read_records(rotated) if record["type"] == "charge"]
    assert len({(record["stage"], record["step"], record["attempt"]) for record in charges}) == len(charges)


def test_a_stage_planned_before_the_change_is_told_from_one_planned_after(rotated: Path) -> None:
    with open_ledger(rotated, signing_seed=OTHER_SEED) as ledger:
        assert ledger.rotated_since_plan(STAGE)
        assert not ledger.rotated_since_plan("later")
        ledger.plan("later", steps=1, event=EVENT, config_sha256=CONFIG)
        assert not ledger.rotated_since_plan("later")


@pytest.mark.parametrize("seed", [SEED, OTHER_SEED], ids=["the one before", "the present one"])
def test_a_key_that_signed_once_is_never_taken_again(rotated: Path, seed: bytes) -> None:
    with open_ledger(rotated, signing_seed=OTHER_SEED) as ledger:
        with pytest.raises(LedgerError, match="never taken again"):
            ledger.rotate(seed)
        charge(ledger, 3)


def test_a_change_is_durable_on_return(rotated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with open_ledger(rotated, signing_seed=OTHER_SEED) as ledger:
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
        ledger.rotate(bytes(32))
        assert synced == [rotated.stat().st_size]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda record: record.update(new_signature="0" * 128), "its new_signature is not one by key"),
        (lambda record: record.update(new_signature=record["signature"]), "its new_signature is not one by key"),
        (lambda record: record.update(signature=record["new_signature"]), "its signature is not one by key"),
        (lambda record: record.update(new_signature=record["new_signature"].upper()), "its new_signature"),
        (lambda record: record.update(public_key=public_key_of(bytes(32))), "the record does not match its hash"),
        (lambda record: record.pop("new_signature"), "a rotate record has"),
    ],
    ids=["none", "the old key's for the new's", "the new key's for the old's", "spelled anew", "third key", "left out"],
)
def test_a_change_needs_the_word_of_both_keys(
    rotated: Path, edit: Callable[[dict[str, Any]], object], said: str
) -> None:
    records = read_records(rotated)
    edit(records[7])
    rotated.write_text("".join(canonical_json(record) + "\n" for record in records))
    with pytest.raises(LedgerError, match=f"line 8: {said}"):
        read_ledger(rotated)


def test_a_forger_cannot_hand_a_ledger_of_his_own_to_the_key_that_was_kept(rotated: Path) -> None:
    records = read_records(rotated)[:8]
    records[0]["public_key"] = public_key_of(bytes(32))
    write_records(rotated, records, bytes(32))
    with pytest.raises(LedgerError, match="line 8: its new_signature is not one by key"):
        read_ledger(rotated, public_key=NEW)


# --- from the command line ---


def key_file(path: Path) -> str:
    create_key_file(path)
    return str(path)


def seed_of(path: str | Path) -> bytes:
    return signing_seed(load_master_secret(Path(path)))


@pytest.fixture
def run(tmp_path: Path) -> tuple[str, str]:
    """A ledger of three charges, and the key file that signs it."""
    old = key_file(tmp_path / "secret.key")
    path = tmp_path / "ledger.jsonl"
    with open_ledger(path, signing_seed=seed_of(old), fencing_epoch=4) as ledger:
        ledger.plan(STAGE, steps=5, event=EVENT, config_sha256=CONFIG)
        ledger.done(charge(ledger, 0), "keyed")
        charge(ledger, 1)
        charge(ledger, 1)
        charge(ledger, 0, stage="unplanned")
    return str(path), old


def test_rotate_makes_the_new_key_file_and_hands_the_ledger_to_it(
    run: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, old = run
    new = tmp_path / "new.key"
    assert main(["rotate", path, "--key-file", old, "--new-key-file", str(new)]) == 0
    assert new.stat().st_mode & 0o777 == 0o600
    key = public_key_of(seed_of(new))
    assert read_ledger(Path(path), every_signature=True).public_key == key
    said = capsys.readouterr().out
    assert key in said
    for secret in (old, new):
        assert Path(secret).read_text().strip() not in said
    open_ledger(Path(path), signing_seed=seed_of(new), fencing_epoch=4).close()


def test_rotate_takes_a_new_key_file_that_is_there_and_the_old_secret_from_the_environment(
    run: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, old = run
    new = key_file(tmp_path / "new.key")
    key = public_key_of(seed_of(new))
    monkeypatch.setenv("SFUMATO_SECRET", Path(old).read_text())
    assert main(["rotate", path, "--new-key-file", new]) == 0
    assert read_ledger(Path(path)).public_key == key


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path, old, new: create_key_file(new) or new.chmod(0o644), "mode 0644.*chmod 600"),
        (lambda path, old, new: old.unlink(), r"secret\.key is missing"),
        (lambda path, old, new: (old.unlink(), create_key_file(old)), "is signed by key .*give the secret that signs"),
        (lambda path, old, new: new.hardlink_to(old), "never taken again"),
        (lambda path, old, new: path.unlink(), "cannot be read"),
        (lambda path, old, new: path.write_text(path.read_text().replace('"step":1', '"step":7')), "line 5: "),
    ],
    ids=["open to all", "no old key", "another's key", "the same key", "no ledger", "damaged"],
)
def test_rotate_refuses_and_changes_nothing(
    run: tuple[str, str],
    tmp_path: Path,
    spoil: Callable[[Path, Path, Path], object],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, old, new = Path(run[0]), Path(run[1]), tmp_path / "new.key"
    spoil(path, old, new)
    before = path.read_bytes() if path.exists() else None
    secrets = [file.read_text().strip() for file in (old, new) if file.exists()]
    assert main(["rotate", str(path), "--key-file", str(old), "--new-key-file", str(new)]) == 1
    assert (path.read_bytes() if path.exists() else None) == before
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("privacy: ")
    assert not any(secret in output.err for secret in secrets)
    assert re.search(said, output.err)


def test_rotate_waits_for_no_run_that_uses_the_ledger(
    run: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, old = run
    new = tmp_path / "new.key"
    with open_ledger(Path(path), signing_seed=seed_of(old), fencing_epoch=4):
        assert main(["rotate", path, "--key-file", old, "--new-key-file", str(new)]) == 1
    assert "in use by another process" in capsys.readouterr().err
    assert not new.exists()


def test_show_prints_one_line_a_stage_and_the_keys(run: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    path, old = run
    assert main(["show", path, "--every-signature", "--public-key", public_key_of(seed_of(old))]) == 0
    said = capsys.readouterr().out
    view = read_ledger(Path(path))
    assert view.public_key in said
    assert view.head in said
    assert f"stage       {STAGE}: 1 steps done of 5 planned; 3 charges, 1 of them replays, 2 not done\n" in said
    assert "stage       unplanned: 0 steps done; 1 charges, 0 of them replays, 1 not done\n" in said
    assert Path(old).read_text().strip() not in said


def test_show_tells_the_keys_that_were_given_up_and_a_torn_line(
    rotated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with rotated.open("ab") as file:
        file.write(b'{"attempt"')
    assert main(["show", str(rotated)]) == 0
    said = capsys.readouterr().out
    assert f"gave up     {OLD}" in said
    assert f"public key  {NEW}" in said
    assert "torn        10 bytes" in said


def test_show_refuses_a_ledger_that_is_damaged_or_anothers(rotated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(rotated), "--public-key", "f" * 64]) == 1
    assert "never by the expected key" in capsys.readouterr().err
    rotated.write_text(rotated.read_text().replace('"step":1', '"step":7'))
    assert main(["show", str(rotated)]) == 1
    assert "line 5: the record does not match its hash" in capsys.readouterr().err


def test_the_public_key_is_the_one_that_signs(run: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    path, old = run
    assert main(["public-key", "--key-file", old]) == 0
    assert capsys.readouterr().out.strip() == read_ledger(Path(path)).public_key
    assert main(["public-key"]) == 1
    assert "SFUMATO_SECRET" in capsys.readouterr().err


def test_the_command_runs_without_torch_and_explains_itself() -> None:
    program = """
import sys
from privacy.__main__ import main
try:
    main(["rotate", "--help"])
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "--new-key-file NEW" in output.stdout
    assert output.stdout.endswith("0 False\n")
    wrong = subprocess.run([sys.executable, "-m", "privacy"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "required: COMMAND" in wrong.stderr
