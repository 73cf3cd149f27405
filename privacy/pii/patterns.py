"""Personal data with a form of its own: patterns, and the checks that tell it from other numbers.

A Finding says where, never what: no value reaches a log, a repr, an exception or a manifest.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Finding:
    """text[start:end] is an `entity`, says `detector` in its `version`."""

    entity: str
    start: int
    end: int
    detector: str
    version: int


@dataclass(frozen=True, slots=True)
class Detector:
    """Finds spans of one entity in a text whose digits and dashes are ASCII. A change of `find` raises `version`."""

    entity: str
    version: int
    find: Callable[[str], Iterator[Span]]


def detect(text: str, entities: Collection[str] | None = None) -> list[Finding]:
    """Findings of `entities` (default: all), in order and without overlap.

    Of two that overlap the longer stands, then the one whose detector comes first in DETECTORS, then the earlier.
    Digits and dashes of other scripts count as ASCII's, and invisible characters as nothing.
    """
    folded, places = _fold(text)
    found: list[tuple[int, int, int, str]] = []
    for priority, (name, detector) in enumerate(DETECTORS.items()):
        if entities is None or detector.entity in entities:
            found += [(start - end, priority, start, name) for start, end in detector.find(folded)]
    taken: list[Finding] = []
    covered = bytearray(len(text))
    for negative_length, _, start, name in sorted(found):
        first, last = places[start], places[start - negative_length - 1] + 1
        if not any(covered[first:last]):
            covered[first:last] = b"\x01" * (last - first)
            taken.append(Finding(DETECTORS[name].entity, first, last, name, DETECTORS[name].version))
    return sorted(taken, key=lambda finding: finding.start)


def _fold(text: str) -> tuple[str, range | list[int]]:
    """The text as detectors see it, and for each of its characters the place it has in `text`."""
    if text.isascii():
        return text, range(len(text))
    folded: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        category = unicodedata.category(character)
        if category in ("Cf", "Mn"):  # zero-width joiners, soft hyphens, combining marks
            continue
        if category == "Nd":
            plain = str(unicodedata.decimal(character))
        elif category == "Pd" or character == "\N{MINUS SIGN}":
            plain = "-"
        elif category == "Zs":
            plain = " "
        else:
            plain = unicodedata.normalize("NFKC", character)
        folded.append(plain)
        places += [place] * len(plain)
    return "".join(folded), places


# The look-behind pins a match to the beginning of its run, which keeps the scan linear in the text.
_EMAIL = re.compile(r"(?<![\w.%+'-])[\w.%+'-]+@(?:[\w-]{1,63}\.)+(?:xn--[a-z0-9-]+|[^\W\d_]{2,24})", re.IGNORECASE)

# North American numbers with separators; numbers with a country code; numbers a word like "call" announces.
_PHONES = (
    re.compile(r"(?<![\w+])(?:\+?1[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}(?!\w)"),
    re.compile(r"(?<![\w+])(?:\+|00)[1-9](?:[ .()-]{0,2}\d){6,14}(?!\w)"),
    re.compile(
        r"\b(?:phone|call|tel|telephone|fax|mobile|cell)\b[^\d\n+(]{0,12}([(+]?\d[\d .()-]{5,18}\d)(?!\w)",
        re.IGNORECASE,
    ),
)

_DIGIT_RUN = re.compile(r"\d+(?:[ .-]\d+)*")
_SSNS = (
    re.compile(r"(?<!\d)(?!000|666|9)\d{3}([ -])(?!00)\d\d\1(?!0000)\d{4}(?!\d)"),
    re.compile(
        r"\b(?:ssn|social security)\b[^\d\n]{0,16}((?!000|666|9)\d{3}(?!00)\d\d(?!0000)\d{4})(?!\d)", re.IGNORECASE
    ),
)
_IBAN_START = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d\d")
_IPV4 = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\d|\.\d)")
_IPV6_RUN = re.compile(r"[0-9A-Fa-f:.]+")

# Characters of an IBAN by country. Source: SWIFT, IBAN Registry.
_IBAN_LENGTHS = {
    "NO": 15, "BE": 16, "DK": 18, "FI": 18, "FK": 18, "FO": 18, "GL": 18, "NL": 18, "SD": 18, "MK": 19, "SI": 19,
    "AT": 20, "BA": 20, "EE": 20, "KZ": 20, "LT": 20, "LU": 20, "MN": 20, "XK": 20, "CH": 21, "HR": 21, "LI": 21,
    "LV": 21, "BG": 22, "BH": 22, "CR": 22, "DE": 22, "GB": 22, "GE": 22, "IE": 22, "ME": 22, "RS": 22, "VA": 22,
    "AE": 23, "GI": 23, "IL": 23, "IQ": 23, "OM": 23, "SO": 23, "TL": 23, "AD": 24, "CZ": 24, "ES": 24, "MD": 24,
    "PK": 24, "RO": 24, "SA": 24, "SE": 24, "SK": 24, "TN": 24, "VG": 24, "LY": 25, "PT": 25, "ST": 25, "IS": 26,
    "TR": 26, "BI": 27, "DJ": 27, "FR": 27, "GR": 27, "IT": 27, "MC": 27, "MR": 27, "SM": 27, "AL": 28, "AZ": 28,
    "BY": 28, "CY": 28, "DO": 28, "GT": 28, "HN": 28, "HU": 28, "LB": 28, "NI": 28, "PL": 28, "SV": 28, "BR": 29,
    "EG": 29, "PS": 29, "QA": 29, "UA": 29, "JO": 30, "KW": 30, "MU": 30, "YE": 30, "MT": 31, "SC": 31, "LC": 32,
    "RU": 33,
}  # fmt: skip


def luhn_valid(digits: str) -> bool:
    """Whether the last digit is the check digit of the rest (ISO/IEC 7812-1, Annex B)."""
    doubled = (int(digit) * 2 for digit in digits[-2::-2])
    return (sum(map(int, digits[::-2])) + sum(value - 9 * (value > 9) for value in doubled)) % 10 == 0


def iban_valid(iban: str) -> bool:
    """Whether an IBAN without spaces has its country's length and its check digits (ISO 13616)."""
    iban = iban.upper()
    if len(iban) != _IBAN_LENGTHS.get(iban[:2]) or not iban.isascii() or not iban.isalnum():
        return False
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1


def _emails(text: str) -> Iterator[Span]:
    yield from (match.span() for match in _EMAIL.finditer(text))


def _phones(text: str) -> Iterator[Span]:
    for pattern in _PHONES:
        for match in pattern.finditer(text):
            span = match.span(pattern.groups)
            if 7 <= sum(character.isdigit() for character in text[slice(*span)]) <= 15:  # E.164: at most 15
                yield span


def _cards(text: str) -> Iterator[Span]:
    """13 to 19 digits that pass Luhn, in any number of groups; numbers may stand before and after in the same run."""
    for run in _DIGIT_RUN.finditer(text):
        groups = [(run.start() + group.start(), group[0]) for group in re.finditer(r"\d+", run[0])]
        for first, (start, _) in enumerate(groups):
            digits = ""
            for place, group in groups[first : first + 19]:
                digits += group
                if len(digits) > 19:
                    break
                if len(digits) >= 13 and digits[0] in "23456" and luhn_valid(digits):
                    yield start, place + len(group)


def _ssns(text: str) -> Iterator[Span]:
    for pattern, group in zip(_SSNS, (0, 1), strict=True):
        yield from (match.span(group) for match in pattern.finditer(text))


def _ibans(text: str) -> Iterator[Span]:
    for match in _IBAN_START.finditer(text):
        length = _IBAN_LENGTHS.get(match[0][:2].upper())
        if length is None:
            continue
        rest = re.compile(rf"[A-Za-z]{{2}}\d\d(?:[ -]?[A-Za-z0-9]){{{length - 4}}}(?![A-Za-z0-9])")
        candidate = rest.match(text, match.start())
        if candidate and iban_valid(re.sub(r"[ -]", "", candidate[0])):
            yield candidate.span()


def _ipv4(text: str) -> Iterator[Span]:
    for match in _IPV4.finditer(text):
        if all(int(part) <= 255 for part in match[0].split(".")):
            yield match.span()


def _ipv6(text: str) -> Iterator[Span]:
    """The longest address at the beginning of a run of its characters, or after a colon ("host:2001:db8::1")."""
    for run in _IPV6_RUN.finditer(text):
        if run[0].count(":") < 2:
            continue
        colons = [run.start() + place for place, character in enumerate(run[0]) if character == ":"]
        starts = [run.start(), *(place + 1 for place in colons)]
        ends = [*colons, run.start() + len(run[0].rstrip("."))]
        done = run.start()
        for first, start in enumerate(starts):
            # an address has at most 8 groups, or 7 and "::"
            end = next((end for end in reversed(ends[first : first + 10]) if _is_ipv6(text[start:end])), None)
            if end is not None and start >= done:
                yield start, end
                done = end


def _is_ipv6(candidate: str) -> bool:
    # "face::" is an address by the letter, and prose: ask for a digit
    if candidate.count(":") < 2 or not any(character.isdigit() for character in candidate):
        return False
    try:
        ipaddress.IPv6Address(candidate)
    except ValueError:
        return False
    return True


# In order of priority.
DETECTORS = {
    "email": Detector("email", 1, _emails),
    "iban": Detector("iban", 1, _ibans),
    "card": Detector("card", 1, _cards),
    "ssn": Detector("ssn", 1, _ssns),
    "ipv6": Detector("ip", 1, _ipv6),
    "ipv4": Detector("ip", 1, _ipv4),
    "phone": Detector("phone", 1, _phones),
}
ENTITIES = tuple(dict.fromkeys(detector.entity for detector in DETECTORS.values()))
