import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.pii.patterns import detect
from privacy.pii.pseudonyms import Pseudonyms, WrongKey
from privacy.secrets import PURPOSES, derive, signing_seed

MASTER = bytes(range(32))
NAMES = Pseudonyms(MASTER)


def test_pseudonyms_are_a_function_of_key_entity_and_value() -> None:
    # Fixed for ever: a new run under an old key must go on naming people as before.
    assert NAMES.name("email", "jane@example.org") == "[EMAIL:tbhnqnjcjgbjhgjf]"
    assert NAMES.key_id == "e87a0e5c592cae48"
    assert NAMES.name("email", "jane@example.org") == Pseudonyms(MASTER).name("email", "jane@example.org")
    assert NAMES.name("person", "jane@example.org")[8:] != NAMES.name("email", "jane@example.org")[7:]
    assert Pseudonyms(bytes(32)).name("email", "jane@example.org") != NAMES.name("email", "jane@example.org")


@pytest.mark.parametrize(
    ("entity", "one", "other", "same"),
    [
        ("person", "Jane Roe", "JANE  roe", True),
        ("person", "Jane Roe", "Ｊane\u200b Roe", True),
        ("person", "Jane Roe", "Jane Rowe", False),
        ("person", "Jose\u0301", "Jos\u00e9", True),
        ("email", "jane.roe@example.org", "janeroe@example.org", False),
        ("phone", "(212) 555-0143", "212.555.0143", True),
        ("phone", "212-555-0143", "٢١٢-٥٥٥-٠١٤٣", True),
        ("card", "4111 1111 1111 1111", "4111111111111111", True),
        ("iban", "GB82 WEST 1234 5698 7654 32", "gb82west12345698765432", True),
        ("card", "4111 1111 1111 1111", "4111 1111 1111 1112", False),
    ],
)
def test_ways_of_writing_a_value_share_its_pseudonym(entity: str, one: str, other: str, same: bool) -> None:
    assert (NAMES.name(entity, one) == NAMES.name(entity, other)) == same


@given(st.text(max_size=30))
def test_a_pseudonym_looks_like_no_value(value: str) -> None:
    name = NAMES.name("person", value)
    assert re.fullmatch(r"\[PERSON:[b-df-hj-np-t]{16}\]", name)
    assert detect(name) == []


def test_pseudonyms_do_not_collide() -> None:
    values = [f"{letter}{number}" for letter in string.ascii_lowercase for number in range(1000)]
    assert len({NAMES.name("person", value) for value in values}) == len(values)


def test_the_key_is_no_other_key_of_the_secret_and_is_never_shown() -> None:
    others = [derive(MASTER, purpose, "ledger") for purpose in PURPOSES] + [signing_seed(MASTER), MASTER]
    shown = repr(NAMES) + NAMES.key_id
    assert NAMES._key not in others  # type: ignore[reportPrivateUsage]
    for key in (*others, NAMES._key):  # type: ignore[reportPrivateUsage]
        assert key.hex()[:8] not in shown


def test_another_key_is_refused_by_its_id() -> None:
    NAMES.check(NAMES.key_id, "policy.pseudonyms.key_id")
    other = Pseudonyms(bytes(32))
    with pytest.raises(WrongKey) as refusal:
        other.check(NAMES.key_id, "runs/x/filter/manifest.json")
    told = str(refusal.value)
    assert told.startswith("runs/x/filter/manifest.json") and NAMES.key_id in told and other.key_id in told
    assert "give the key file of the first run" in told


def test_a_secret_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 16 bytes: give the 32"):
        Pseudonyms(bytes(16))
