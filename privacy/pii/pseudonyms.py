"""Pseudonyms: a name for a value that only the key's holder can tie to it, the same in every caption and shard.

They keep who is who: two captions of one person stay linked, which is what they are for and what they cost.
"""

from __future__ import annotations

import hmac
import unicodedata

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_LETTERS = "bcdfghjklmnpqrst"  # one a nibble; without digits and vowels no detector takes a pseudonym for a value
_BYTES = 8  # 64 bits: among a hundred million values the chance of any two sharing a name is 3 in 10,000
# Values that are numbers, however their digits are grouped; other values differ by their punctuation too.
_NUMBERS = frozenset({"phone", "card", "iban", "ssn", "national_id", "mac", "plate"})


class WrongKey(ValueError):
    """The key at hand is not the one whose pseudonyms are in use; the message holds key ids alone."""


class Pseudonyms:
    """Pseudonyms by HMAC-SHA256 (RFC 2104) under a key of their own, drawn from the run's master secret.

    key_id: 16 hex digits that tell keys apart and say nothing of them: fit for a policy and a manifest.
    """

    def __init__(self, master: bytes) -> None:
        if len(master) != 32:
            raise ValueError(f"the master secret has {len(master)} bytes: give the 32 of a key file")
        self._key = _expand(master, b"sfumato/1/pseudonyms")
        self.key_id = _expand(master, b"sfumato/1/pseudonyms-key-id")[:8].hex()

    def __repr__(self) -> str:
        return f"Pseudonyms(key_id={self.key_id})"

    def check(self, key_id: str, where: str) -> None:
        """Raise WrongKey unless this is the key `key_id`, which `where` (a policy, a manifest) asks for."""
        if self.key_id != key_id:
            raise WrongKey(
                f"{where} has pseudonyms of key {key_id}, and the key at hand is {self.key_id}: give the key file of "
                "the first run, or begin in a new run folder"
            )

    def name(self, entity: str, value: str) -> str:
        """The pseudonym of `value`: [PERSON:bdfghjkl...], 16 letters that are a function of (key, entity, value).

        Case, width, invisible characters and spacing make no difference, nor does the grouping of numbers.
        """
        message = f"{entity}\0{_plain(entity, value)}".encode("utf-8", "surrogatepass")
        digest = hmac.digest(self._key, message, "sha256")[:_BYTES]
        return f"[{entity.upper()}:{''.join(_LETTERS[byte >> 4] + _LETTERS[byte & 15] for byte in digest)}]"


def _plain(entity: str, value: str) -> str:
    value = unicodedata.normalize("NFKC", value).casefold()
    value = "".join(character for character in value if unicodedata.category(character) != "Cf")
    if entity in _NUMBERS:
        return "".join(str(unicodedata.decimal(character, character)) for character in value if character.isalnum())
    return " ".join(value.split())


def _expand(master: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) without a salt: pseudonyms must outlive any one run and ledger."""
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(master)
