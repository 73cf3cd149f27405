import importlib
import random
import re
import string
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.pii.findings import Finding, MissingDetector, TextDetector
from privacy.pii.national_ids import NATIONAL_IDS, checker
from privacy.pii.patterns import DETECTORS, ENTITIES, PatternDetector, detect, iban_valid, luhn_valid

FOUND = {
    "email": [
        "jane.roe+x@example.org", "J_R@sub.example.co", "o'neil@example.net", "a@xn--bcher-kva.xn--p1ai",
        "jane [at] example [dot] org", "jane(at)example.org",
    ],
    "phone": [
        "(212) 555-0143", "212-555-0143", "212.555.0143", "+1 212 555 0143", "+44 20 7946 0958", "+4930901820",
        "+44 (0)20 7946 0958", "020 7946 0958", "06 39 98 12 34", "0171/3920012", "612 345 678", "(11) 91234-5678",
        "8 (912) 345-67-89", "98765 43210", "0044 20 7946 0958", "07700900123",
    ],
    "card": ["4111111111111111", "4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005"],
    "iban": ["DE89370400440532013000", "GB82 WEST 1234 5698 7654 32", "NO93 8601 1117 947", "nl91abna0417164300"],
    "ssn": ["123-45-6789", "899 99 9999", "078-05-1120"],
    "national_id": [
        "111.444.777-35", "12345678Z", "X1234567L", "RSSMRA85T10A562S", "756.9217.0769.85", "131052-308T",
        "AB 12 34 56 C", "900-70-1234", "1 85 05 78 006 084 91",
    ],
    "ip": ["192.0.2.255", "10.0.0.1", "2001:db8::1", "::1", "2001:db8:1:2:3:4:5:6", "::ffff:192.0.2.1"],
    "mac": ["00:1a:2b:3c:4d:5e", "00-1A-2B-3C-4D-5E", "001a.2b3c.4d5e"],
    "url": [
        "https://jane:secret@example.org/x", "ftp://jane@example.org", "http://example.org/~jane/cat.html",
        "https://example.org/users/jane", "https://example.org/@jane", "instagram.com/jane.roe",
        "https://example.org/?user=jane",
    ],
    "gps": ["48.85837, 2.29448", "40.7128° N, 74.0060° W", "48°51'30\"N 2°17'40\"E", "lat: 48.86, lon: 2.29",
    "-33.8568,151.2153"],
    "home_path": [
        "/home/jane/cat.png", "/Users/jane", r"C:\Users\Jane Roe\Desktop\cat.svg", "file:///home/jane/cat.svg",
        r"C:\Documents and Settings\jane", r"D:\Users\jane\My Pictures\cat.png", "/mnt/c/Users/jane",
    ],
    "username": ["@jane_roe", "@jane@example.social"],
    "plate": ["AB12 CDE", "AB-123-CD", "ABC1D23", "KA 01 AB 1234"],
}  # fmt: skip
ANNOUNCED = {
    "phone": [
        "call {555-0143}", "Tel.: {9123 4567}", "phone 2: {555 0143}", "téléphone {199001234}",
        "電話 {1234-5678}",
    ],
    "card": ["card no. {9792030394440796}", "Visa: {4222222222222}"],
    "ssn": ["SSN {123456789}", "social security number is {123.45.6789}"],
    "national_id": [
        "PESEL {44051401359}", "BSN {111222333}", "Steuer-ID {36574261809}", "cpf {11144477735}",
        "İSTANBUL TC KİMLİK {10000000146}",
        "เลขประจำตัวประชาชน {1234567890121}",
        "National Insurance {ab123456c}",
    ],
    "mac": ["MAC address {001A2B3C4D5E}"],
    "gps": ["geo:{48.86,2.29}"],
    "username": ["username: {jane_roe}", "login {jroe42}", "IG: {jane.roe}", "my nickname is {kittycat}"],
    "plate": ["license plate {7ABC123}", "Kennzeichen: {B-MW 1234}", "matrícula {1234 BCD}", "plate reads {XYZ 987}"],
}  # fmt: skip
NOT_FOUND = [
    "4111 1111 1111 1112",  # Luhn
    "4111 1111 1111",  # 12 digits
    "9111111111111111",  # no network's
    "business card: 4222222222222", "Visitenkarte 4222222222222",  # of no network's length
    "DE88370400440532013000",  # mod 97
    "DE8937040044053201300",  # one character short
    "000-12-3456", "666-12-3456", "900-12-3456", "123-00-4567", "123-45-0000",  # never issued by rule
    "111.444.777-36", "12345678A", "RSSMRA85T10A562T",  # check digits
    "111222333", "44051401359", "7ABC123", "1998 BMW",  # not announced
    "256.1.1.1", "1.2.3", "2.3.4.2", "version 10.2.33.4", "10:20:30", "std::vector", "00:1a:2b:3c:4d",
    "9A:D7:92:E2:07:FA:53:1A:2E:F5:B8:02:5B:44:7E:D4",  # a fingerprint
    "face::", "a handwritten 3", "jane at example dot org", "user@localhost", "1920x1080 px, 24/7, 50% of 3.14159",
    "20 January 2024, 100-200 items, 1 000 000 stars", "keycap: 10", "01/12/1982 11:33", "2024-01-20 12:30",
    "MA 02110-1301",
    "https://example.org/home/about", "/usr/share/doc", "/Users/Shared/x", "https://example.org/cats/1",
    "a plate of 12 figs",
    "@media print", "cat @home", "3.1, 4.1", "0.1234, 0.5678, 0.9101", "AT&T, C-3PO, MP3, H2O, B-52, F-16",
    "twitter is down", "github 2023", "NOTICE TO USER: Carefully", "1700000000", "4006381333931", "978-3-16-148410-0",
    "000000123", "IMG_20240120_123456", "n01440764_10026", "digit-0001", "1f468-200d-1f469",
]  # fmt: skip
CASES = [(entity, value) for entity, values in FOUND.items() for value in values]


@pytest.mark.parametrize(("entity", "value"), CASES)
@pytest.mark.parametrize("frame", ["{}", "a cat, see {}.", "({})", "mine: {}; not yours", "<{}>\n"])
def test_each_form_is_found_exactly_where_it_stands(entity: str, value: str, frame: str) -> None:
    text = frame.format(value)
    start = text.index(value)
    found = [(finding.entity, finding.start, finding.end) for finding in detect(text)]
    assert found == [(entity, start, start + len(value))]


@pytest.mark.parametrize(("entity", "text"), [(entity, text) for entity, texts in ANNOUNCED.items() for text in texts])
def test_some_forms_are_found_only_after_a_word(entity: str, text: str) -> None:
    start, end = text.index("{"), text.index("}") - 1
    text = text.replace("{", "").replace("}", "")
    assert [(f.entity, f.start, f.end) for f in detect(f"{text} by the sea")] == [(entity, start, end)]
    assert detect(f"{text[start:end]} by the sea") == []


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_fails_its_check_is_left_alone(text: str) -> None:
    assert detect(text) == []


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
    assert finding == Finding("email", 0, 16, "email", DETECTORS["email"].version, 1.0)
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


@pytest.mark.parametrize("name", [name for name in NATIONAL_IDS if name != "gb.nino"])
def test_the_examples_of_each_national_id_are_found_after_each_of_its_words(name: str) -> None:
    module = importlib.import_module(f"stdnum.{name}")
    examples = re.findall(r">>> validate\('([^']+)'\)[^\n]*\n'", module.__doc__ or "")
    for word in NATIONAL_IDS[name].words:
        captions = [f"a photo of me, {word.upper()}: {example}, by the sea" for example in examples]
        found = [{(f.entity, caption[f.end :]) for f in detect(caption)} for caption in captions]
        assert any(("national_id", ", by the sea") in findings for findings in found)
        assert word == word.lower()


@pytest.mark.parametrize("shape", sorted({shape for number in NATIONAL_IDS.values() for shape in number.alone}))
def test_without_a_word_a_national_id_is_found_where_a_check_of_its_shape_passes(shape: str) -> None:
    chance = random.Random(shape)
    pools = {"9": string.digits, "A": string.ascii_uppercase, "X": string.digits}
    for _ in range(300):
        number = "".join(chance.choice(pools.get(character, character)) for character in shape)
        passes = any(
            checker(name)(number)
            for name, known in NATIONAL_IDS.items()
            if any(same_shape(number, other) for other in known.alone)
        )
        assert [f.entity for f in detect(number, ["national_id"])] == ["national_id"] * passes


def same_shape(number: str, shape: str) -> bool:
    kinds = {"9": str.isdigit, "A": str.isalpha, "X": str.isalnum}
    return len(number) == len(shape) and all(kinds.get(s, s.__eq__)(n) for n, s in zip(number, shape, strict=True))


def test_a_number_that_its_module_cannot_judge_is_found() -> None:
    assert [f.entity for f in detect("129032821911182680")] == ["national_id"]  # stdnum 2.2: KeyError


def test_the_detector_gives_its_own_name_and_a_version_that_tells_what_it_stands_on() -> None:
    detector: TextDetector = PatternDetector()
    ((finding,), none) = detector.detect(["by jane@example.org", "a cat"])
    assert finding == Finding("email", 3, 19, "patterns", detector.version) and none == []
    assert "phonenumbers-" in detector.version and PatternDetector(regions=("GB",)).version != detector.version


def test_entities_apart_do_not_hide_others_and_are_not_hidden() -> None:
    text = "https://jane:x@example.org/"
    (joint,) = PatternDetector().detect([text])
    (apart,) = PatternDetector(apart=("url",)).detect([text])
    assert [f.entity for f in joint] == ["url"]
    assert sorted(f.entity for f in apart) == ["email", "url"]


def test_regions_say_whose_national_numbers_are_known() -> None:
    only_ours = PatternDetector(regions=("GB",))
    found = only_ours.detect(["020 7946 0958", "06 39 98 12 34", "212-555-0143", "+33 6 39 98 12 34"])
    assert [[f.entity for f in findings] for findings in found] == [["phone"], [], [], ["phone"]]
    with pytest.raises(ValueError, match="regions names 'UK'"):
        PatternDetector(regions=("UK",))


@pytest.mark.parametrize(("package", "name"), [("phonenumbers", "phonenumbers"), ("stdnum.iban", "python-stdnum")])
def test_without_a_package_it_does_not_open(monkeypatch: pytest.MonkeyPatch, package: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDetector, match=f"needs {name}.*pip install {name}"):
        PatternDetector()


def test_the_global_random_state_is_left_alone() -> None:
    before = random.getstate()
    detect("call 212-555-0143")
    assert random.getstate() == before


HOSTILE = [
    "a", "1", "@", ":", "::", "(", "/", "\\", "°", "é", "\u0301", "a@", "a.a@", "a@a.", "[at]", "a [at] b [dot] ", "1:",
    "12345:", "00:", "+1 1", "1 ", "4 ", "123 ", "4111111111111111 ", "1.", "1-", "1.1, ", "DE89 ", "call 1", "(212) ",
    "012 345 6789 ", "123-45-6789 ", "999999-9999 ", "dni 1", "plate A1 ", "+", "(+1", "user:",
    "A1", "A-", "://", "a://", "https://x/?a&",
    "@ab ", "user a_", "lat 1 ", "/home/a", "C:\\users\\", "x@y.zz ",
]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
def test_the_scan_takes_time_in_proportion_to_the_text(unit: str) -> None:
    def seconds(length: int) -> float:
        text = (unit * length)[:length]
        began = time.process_time()
        detect(text)
        return time.process_time() - began

    seconds(1000)
    # 4 times the text; a quadratic scan takes 16 times as long
    assert min(seconds(48_000) / max(seconds(12_000), 1e-3) for _ in range(3)) < 9


@pytest.mark.parametrize("unit", ["1", "@", ":", "a ", "a@"])
def test_ten_megabytes_of_one_thing_take_ten_times_as_long_as_one(unit: str) -> None:
    def seconds(length: int) -> float:
        text = (unit * length)[:length]
        began = time.process_time()
        detect(text)
        return time.process_time() - began

    assert seconds(10_000_000) / max(seconds(1_000_000), 1e-2) < 30
