"""The run's one secret: read from a file of mode 0600 or from the environment, and split by purpose."""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PURPOSES = ("sampling", "noise", "ledger-digest")


class SecretError(ValueError):
    """A secret is missing, malformed or readable by others. The message never holds the secret."""


def create_key_file(path: Path) -> None:
    """Write 32 fresh random bytes, as hex, to a new file of mode 0600; durable on return.

    An existing file is never touched (SecretError): a run that lost its key could not resume. A crash leaves the whole
    file or none.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(aside, path)  # a link, for a rename would replace an existing key
    except FileExistsError:
        raise SecretError(f"{path} exists already: a key file is never overwritten; use it or name another") from None
    finally:
        aside.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_master_secret(key_file: Path | None, env: str = "SFUMATO_SECRET") -> bytes:
    """The 32-byte master secret: from `key_file` where it exists, else from the environment variable `env`.

    Refused (SecretError): neither is there, both are and differ, others may read the file, not 64 hex digits.
    """
    from_env = os.environ.get(env)
    if key_file is not None and key_file.exists():
        from_file = read_key_file(key_file)
        if from_env is not None and _decode(from_env, f"the environment variable {env}") != from_file:
            raise SecretError(f"{key_file} and the environment variable {env} hold different secrets: keep one of them")
        return from_file
    if from_env is None:
        missing = (
            "no secret: name a key file (privacy.key_file)" if key_file is None else f"{key_file} is missing: create it"
        )
        raise SecretError(f"{missing}, or set the environment variable {env}")
    return _decode(from_env, f"the environment variable {env}")


def derive(master: bytes, purpose: str, ledger_id: str) -> bytes:
    """The 32-byte key for one purpose under one ledger, by HKDF-SHA256 (RFC 5869).

    The ledger's id is the salt: it is the ledger that counts attempts, so two ledgers under one secret would otherwise
    draw the same noise for different inputs, and the difference would show the data.

    Another master secret gives other keys, and no reuse: within one ledger each (stage, step, attempt) is charged once,
    under whichever secret, so no key meets it twice. What one key must hold together over several steps (an epoch's
    permutation, correlated noise) does not outlive a change: see `Ledger.rotated_since_plan`.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"purpose is {purpose!r}: choose one of {', '.join(PURPOSES)}")
    if not ledger_id:
        raise ValueError("ledger_id is empty: give the id of the open ledger")
    return _expand(master, purpose, ledger_id.encode())


def signing_seed(master: bytes) -> bytes:
    """The 32-byte Ed25519 private key that signs ledgers, by HKDF-SHA256 (RFC 5869).

    Not salted by a ledger: one secret has one public key, which can be told to auditors before a ledger begins.
    """
    return _expand(master, "ledger-signing", None)


def read_key_file(path: Path) -> bytes:
    """The 32-byte master secret in a key file; SecretError where `load_master_secret` would refuse the file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise SecretError(f"{path} is missing: give the key file's right place") from None
    except OSError as error:
        raise SecretError(f"{path} cannot be read: {error.strerror}; run as the user who owns it") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SecretError(f"{path} is no regular file: put the key in a file of mode 0600")
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            raise SecretError(f"{path} has mode {mode:04o}, so others may read it: chmod 600 {path}")
        return _decode(os.read(descriptor, 4096).decode("ascii", "replace"), str(path))
    finally:
        os.close(descriptor)


def _expand(master: bytes, purpose: str, salt: bytes | None) -> bytes:
    info = b"sfumato/1/" + purpose.encode()
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=info).derive(master)


def _decode(text: str, place: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text.strip()):
        raise SecretError(f"{place} holds {len(text.strip())} characters: a secret is 64 hex digits, 32 bytes")
    return bytes.fromhex(text.strip())
