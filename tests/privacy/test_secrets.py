"""Where the secret may come from, who may read it, and what is derived from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.secrets import (
    PURPOSES,
    SecretError,
    create_key_file,
    derive,
    load_master_secret,
    read_key_file,
    signing_seed,
)

HEX = "ab" * 32


@pytest.fixture(autouse=True)
def no_secret_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFUMATO_SECRET", raising=False)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret.key"
    create_key_file(path)
    return path


def test_a_created_key_is_private_random_and_read_back(key_file: Path, tmp_path: Path) -> None:
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert len(load_master_secret(key_file)) == 32
    create_key_file(tmp_path / "other.key")
    assert load_master_secret(key_file) != load_master_secret(tmp_path / "other.key")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.key", "secret.key"]


def test_an_existing_key_is_never_overwritten(key_file: Path) -> None:
    before = key_file.read_bytes()
    with pytest.raises(SecretError, match="exists already"):
        create_key_file(key_file)
    assert key_file.read_bytes() == before
    assert list(key_file.parent.iterdir()) == [key_file]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610])
def test_a_key_that_others_may_read_is_refused_with_the_mend(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(SecretError, match=f"mode {mode:04o}.*chmod 600"):
        load_master_secret(key_file)


def test_a_key_only_its_owner_may_read_is_taken(key_file: Path) -> None:
    key_file.chmod(0o400)
    assert len(load_master_secret(key_file)) == 32


@pytest.mark.parametrize("text", ["", "ab" * 31, "ab" * 33, "xy" * 32, "\N{PILE OF POO}" * 64])
def test_a_malformed_key_is_refused_and_never_shown(key_file: Path, text: str) -> None:
    key_file.write_text(text)
    with pytest.raises(SecretError, match="64 hex digits") as error:
        load_master_secret(key_file)
    assert not text or text not in str(error.value)


def test_no_key_at_all_names_both_places(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match=r"secret\.key is missing.*SFUMATO_SECRET"):
        load_master_secret(tmp_path / "secret.key")
    with pytest.raises(SecretError, match=r"privacy\.key_file.*SFUMATO_SECRET"):
        load_master_secret(None)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match="no regular file"):
        load_master_secret(tmp_path)


def test_the_environment_stands_in_for_a_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_SECRET", HEX)
    assert load_master_secret(None) == bytes.fromhex(HEX)
    assert load_master_secret(tmp_path / "secret.key") == bytes.fromhex(HEX)


def test_two_places_must_agree(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_SECRET", HEX)
    with pytest.raises(SecretError, match="different secrets"):
        load_master_secret(key_file)
    monkeypatch.setenv("SFUMATO_SECRET", key_file.read_text())
    assert len(load_master_secret(key_file)) == 32


def test_a_malformed_secret_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_SECRET", "abc")
    with pytest.raises(SecretError, match="OTHER_SECRET holds 3 characters"):
        load_master_secret(None, env="OTHER_SECRET")


def test_keys_differ_by_purpose_ledger_and_master() -> None:
    masters, ledgers = (bytes(32), bytes([1] * 32)), ("one", "two")
    keys = {derive(master, purpose, ledger) for master in masters for purpose in PURPOSES for ledger in ledgers}
    assert len(keys) == len(masters) * len(PURPOSES) * len(ledgers)
    assert all(len(key) == 32 for key in keys)


def test_a_derived_key_is_hkdf_sha256_salted_with_the_ledger() -> None:
    master = os.urandom(32)
    expected = HKDF(hashes.SHA256(), 32, salt=b"ledger", info=b"sfumato/1/noise").derive(master)
    assert derive(master, "noise", "ledger") == expected


def test_an_unknown_purpose_and_a_missing_ledger_are_refused() -> None:
    with pytest.raises(ValueError, match="purpose is 'signing'"):
        derive(bytes(32), "signing", "ledger")
    with pytest.raises(ValueError, match="ledger_id is empty"):
        derive(bytes(32), "noise", "")


def test_the_signing_seed_is_of_its_own_purpose_and_one_for_all_ledgers() -> None:
    master = os.urandom(32)
    expected = HKDF(hashes.SHA256(), 32, salt=None, info=b"sfumato/1/ledger-signing").derive(master)
    assert signing_seed(master) == expected
    assert signing_seed(bytes(32)) != expected
    assert signing_seed(master) not in {derive(master, purpose, "ledger") for purpose in PURPOSES}


def test_a_changed_secret_changes_every_key_of_a_ledger() -> None:
    old, new = os.urandom(32), os.urandom(32)
    for purpose in PURPOSES:
        assert derive(old, purpose, "ledger") != derive(new, purpose, "ledger")


def test_a_key_file_is_read_alone_whatever_the_environment_holds(
    key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_master_secret(key_file)
    monkeypatch.setenv("SFUMATO_SECRET", HEX)
    assert read_key_file(key_file) == expected
    key_file.chmod(0o644)
    with pytest.raises(SecretError, match=r"mode 0644.*chmod 600"):
        read_key_file(key_file)
    with pytest.raises(SecretError, match="is missing"):
        read_key_file(key_file.with_name("nowhere"))
