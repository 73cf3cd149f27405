import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.pii.patterns import DETECTORS, ENTITIES, Finding, detect, iban_valid, luhn_valid

FOUND = {
    "email": ["jane.roe+x@example.org", "J_R@sub.example.co", "o'neil@example.net", "a@xn--bcher-kva.xn--p1ai"],
    "phone": ["(212) 555-0143", "212-555-0143", "212.555.0143", "+1 212 555 0143", "+44 20 7946 0958", "+4930901820"],
    "card": ["4111111111111111", "4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005"],
    "iban": ["DE89370400440532013000", "GB82 WEST 1234 5698 7654 32", "NO93 8601 1117 947", "nl91abna0417164300"],
    "ssn": ["123-45-6789", "899 99 9999", "078-05-1120"],
    "ip": ["192.0.2.255", "0.0.0.0", "2001:db8::1", "::1", "2001:db8:1:2:3:4:5:6", "::ffff:192.0.2.1"],
}
NOT_FOUND = [
    "4111 1111 1111 1112",  # Luhn
    "4111 1111 1111",  # 12 digits
    "DE88370400440532013000",  # mod 97
    "DE8937040044053201300",  # one character short
    "000-12-3456", "666-12-3456", "900-12-3456", "123-00-4567", "123-45-0000",  # never issued by rule
    "256.1.1.1", "1.2.3", "10:20:30", "std::vector", "00:1a:2b:3c:4d:5e",
    "face::", "a handwritten 3", "jane at example dot org", "user@localhost", "1920x1080 px, 24/7, 50% of 3.14159",
    "20 January 2024, 100-200 items, 1 000 000 stars", "keycap: 10",
]  # fmt: skip
CASES = [(entity, value) for entity, values in FOUND.items() for value in values]


@pytest.mark.parametrize(("entity", "value"), CASES)
@pytest.mark.parametrize("frame", ["{}", "a cat, see {}.", "({})", "mine: {}; not yours", "<{}>\n"])
def test_each_form_is_found_exactly_where_it_stands(entity: str, value: str, frame: str) -> None:
    text = frame.format(value)
    start = text.index(value)
    found = [(finding.entity, finding.start, finding.end) for finding in detect(text)]
    assert found == [(entity, start, start + len(value))]


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_fails_its_check_is_left_alone(text: str) -> None:
    assert detect(text) == []


def test_a_short_number_is_a_telephone_number_only_where_a_word_says_so() -> None:
    assert [finding.entity for finding in detect("call 555-0143")] == ["phone"]
    assert detect("lot 555-0143") == []


def test_a_card_is_found_between_other_numbers_of_the_same_run() -> None:
    text = "no 12 4111 1111 1111 1111 123"
    assert [text[f.start : f.end] for f in detect(text)] == ["4111 1111 1111 1111"]


def test_two_addresses_joined_by_a_colon_leave_nothing_to_see() -> None:
    text = "host:2001:db8::1: up"
    assert [text[f.start : f.end] for f in detect(text)] == ["2001:db8::1"]


def test_other_scripts_digits_and_dashes_and_invisible_characters_hide_nothing() -> None:
    wide = "call ２１２‐555–0143 or jane\u200b@exa\u00admple.org"
    assert [(f.entity, wide[f.start : f.end]) for f in detect(wide)] == [
        ("phone", "２１２‐555–0143"),
        ("email", "jane\u200b@exa\u00admple.org"),
    ]
    assert [finding.entity for finding in detect("ssn ١٢٣-٤٥-٦٧٨٩")] == ["ssn"]


def test_of_two_that_overlap_the_longer_stands() -> None:
    assert [finding.entity for finding in detect("212-555-0143@example.org")] == ["email"]
    assert [finding.detector for finding in detect("::ffff:192.0.2.1")] == ["ipv6"]


def test_only_the_entities_asked_for_take_part() -> None:
    assert [finding.entity for finding in detect("212-555-0143@example.org", ["phone"])] == ["phone"]


def test_a_finding_says_where_and_by_whom_and_never_what() -> None:
    (finding,) = detect("jane@example.org")
    assert finding == Finding("email", 0, 16, "email", DETECTORS["email"].version)
    assert "jane" not in repr(finding)


@given(st.text(alphabet=string.printable + "é３–\u200b٣@", max_size=200))
def test_findings_are_in_order_apart_and_within_the_text(text: str) -> None:
    findings = detect(text)
    edges = [edge for finding in findings for edge in (finding.start, finding.end)]
    assert edges == sorted(edges)
    assert all(0 <= finding.start < finding.end <= len(text) for finding in findings)
    assert {finding.entity for finding in findings} <= set(ENTITIES)
    assert findings == detect(text)


@given(st.integers(10**12, 10**18))
def test_one_check_digit_of_ten_passes_luhn(body: int) -> None:
    assert sum(luhn_valid(f"{body}{digit}") for digit in range(10)) == 1


@given(st.integers(0, 17), st.integers(1, 9))
def test_every_single_wrong_digit_fails_the_iban_check(place: int, by: int) -> None:
    iban = "DE89370400440532013000"
    wrong = iban[: 4 + place] + str((int(iban[4 + place]) + by) % 10) + iban[5 + place :]
    assert iban_valid(iban) and not iban_valid(wrong)


@pytest.mark.parametrize(
    "unit", ["a", "a.a@", "1:", "+1 1", "1 ", "1.", "4 ", "DE89 ", "a@a.", "call 1", "(212) ", "é", ":"]
)
def test_the_scan_takes_time_in_proportion_to_the_text(unit: str) -> None:
    def seconds(length: int) -> float:
        text = (unit * length)[:length]
        began = time.perf_counter()
        detect(text)
        return time.perf_counter() - began

    seconds(1000)
    assert seconds(40_000) < 2.0  # a quadratic scan takes minutes
