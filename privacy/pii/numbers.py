"""Telephone numbers, payment cards and bank accounts.

A bare run of digits is none of them by itself: it has a form of its own, passes a check that few numbers pass, or a
word before it says what it is.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from privacy.pii.findings import MissingDetector

Found = tuple[int, int, float]  # start, end, score

CERTAIN, LIKELY, GUESSED = 1.0, 0.8, 0.6  # checked or announced; a form of its own; a form that other numbers have too

# Whose national numbers are known without a country code.
REGIONS = (
    "US", "CA", "GB", "IE", "AU", "NZ", "ZA", "IN", "DE", "AT", "CH", "FR", "BE", "NL", "ES", "PT", "IT", "PL", "CZ",
    "HU", "RO", "GR", "TR", "SE", "NO", "DK", "FI", "BR", "MX", "AR", "JP", "KR", "CN", "RU", "UA",
)  # fmt: skip


def package(name: str) -> Any:
    """A module of phonenumbers or python-stdnum, without which there is no weaker way."""
    try:
        return importlib.import_module(name)
    except ImportError:
        distribution = {"stdnum": "python-stdnum"}.get(name.partition(".")[0], name)
        raise MissingDetector(
            f"the detector 'patterns' needs {distribution}, which is not installed here: pip install {distribution}"
        ) from None


def before(text: str, start: int) -> str:
    """What may announce a value: up to 40 characters of its line, in lower case."""
    return text[max(0, start - 40) : start].rpartition("\n")[2].lower()


# --- telephone numbers ---

_RUN = re.compile(r"(?<!\w)(?:\(?\+\(?|\()?\d(?:[ ./()-]{0,3}\d)*")
_GROUP = re.compile(r"\d+")
_NANP = re.compile(r"(?:\+?1[ .-]{0,2})?(?:\([2-9]\d\d\)[ -]?|[2-9]\d\d[ ./-]{1,2})[2-9]\d\d[ .-]{1,2}\d{4}")
_DATE = re.compile(
    r"(?:\d\d?([./ -])\d\d?\1(?:19|20)\d\d|(?:19|20)\d\d([./-])\d\d?\2\d\d?)(?!\d)|\d\d?([./-])\d\d?\3\d\d(?![ ./-]?\d)"
)
_NOT_PHONE = re.compile(r"\d{5}-\d{4}|\d\d(?:\.\d\d){3}")  # a ZIP code, a release
# Sizes of the groups in which numbers without a trunk prefix are written. Source: phonenumbers' formats of REGIONS.
_GROUPINGS = frozenset({
    "3-3-3", "3-2-2-2", "2-3-2-2", "2-3-4", "3-3-4", "3-4-4", "2-4-4", "2-5-4", "5-5", "5-6", "3-2-3", "2-2-2-2", "3-7",
    "3-3-2-2", "1-3-3-2-2", "1-3-3-4", "2-8",
})  # fmt: skip
# In these the trunk prefix is left out of some numbers, or of all.
_TRUNK_OPTIONAL = frozenset({"BR", "IN", "CN", "RU", "HU"})
_BEFORE_PARENTHESIS = ("0", "1", "7", "8")  # 8 (495) 123-45-67
_PHONE_WORD = re.compile(
    r"(?:phone|fone|tel[eé]fon|t[eé]l[eé]ph|telefoon|whatsapp|wa\.me|rufnummer|handy|mobil|m[oó]vil|móbil|portable"
    r"|cell?ul|kom[oó]rk|zadzwoń|телефон|тел\b|звон|τηλ|numara|(?:my|our|his|her|the) number|电话|電話|手机|携帯|전화"
    r"|फ़ोन|फोन|(?<!\w)(?:tel|t[eé]l|tlf|tfno|ph|call(?:ed|ing)?|ring|dial|text|sms|fax|cell|mob|contact|hotline|bel"
    r"|llam\w*|appel\w*|joindre|chiam\w*|ligue|ligar|anruf\w*|ruf\w*|ring[ae]?|puh)(?!\w))"
    r"[^\d\n]{0,24}(?:\d\W{1,2})?$"
)


def phones(text: str, regions: Sequence[str] = REGIONS) -> Iterator[Found]:
    """Numbers with a plus, of any country; national ones of `regions` by form; any that a word announces."""
    regions = tuple(regions)
    for run in _RUN.finditer(text):
        groups = [group.span() for group in _GROUP.finditer(text, run.start(), run.end())]
        if run.end() - run.start() < 7 or _num_digits(groups) < 7:
            continue
        first = 0
        while first < len(groups):
            size, score = _phone_at(text, groups, first, regions)
            if size:
                start, end = groups[first][0], groups[first + size - 1][1]
                yield _opening(text, start, end), end, score
            first += max(size, 1)


def _phone_at(text: str, groups: list[tuple[int, int]], first: int, regions: tuple[str, ...]) -> tuple[int, float]:
    """How many of the groups from `first` on are a number (0: none), and how sure that is."""
    start = groups[first][0]
    if _DATE.match(text, start):
        return 0, 0.0
    plus = text[max(0, start - 2) : start].rstrip("(").endswith("+")
    sizes = _sizes(text, groups[first : first + 7], plus)
    for size in reversed(sizes):
        parts = [text[left:right] for left, right in groups[first : first + size]]
        end = groups[first + size - 1][1]
        score = (
            _international("".join(parts))
            if plus
            else _national(text[_opening(text, start, end) : end], parts, regions)
        )
        if score:
            return size, score
    if sizes and first == 0 and _PHONE_WORD.search(before(text, start)):
        return next(
            ((size, CERTAIN) for size in reversed(sizes) if _num_digits(groups[first : first + size]) <= 15), (0, 0.0)
        )
    return 0, 0.0


def _sizes(text: str, groups: list[tuple[int, int]], plus: bool) -> list[int]:
    """How many of the groups may be a number: 7 digits, to the 15 that E.164 allows and a "00" or "011" before them."""
    sizes: list[int] = []
    start, end, digits = groups[0][0], groups[0][0], ""
    for size, (left, right) in enumerate(groups, 1):
        gap = text[end:left]
        if len(digits) + right - left > 18 or "+" in gap:
            break
        if "(" in gap and not plus and digits not in _BEFORE_PARENTHESIS:
            break
        digits, end = digits + text[left:right], right
        opened = _opening(text, start, end)
        if len(digits) >= 7 and text.count("(", opened, end) == text.count(")", opened, end):
            sizes.append(size)
    return sizes


def _num_digits(groups: list[tuple[int, int]]) -> int:
    return sum(right - left for left, right in groups)


def _opening(text: str, start: int, end: int) -> int:
    """Where a number begins that begins its digits at `start`: at its plus, and at a parenthesis that closes in it."""
    for _ in range(2):
        closes = text.count(")", start, end) > text.count("(", start, end)
        if start and (text[start - 1] == "+" or (text[start - 1] == "(" and closes)):
            start -= 1
    return start


def _international(digits: str) -> float:
    """The plus is announcement enough: the length has to be its country's, the number need not be given out."""
    phonenumbers = package("phonenumbers")
    try:
        number = phonenumbers.parse(f"+{digits}")
    except phonenumbers.NumberParseException:
        return 0.0
    return CERTAIN if phonenumbers.is_possible_number(number) else 0.0


def _national(written: str, parts: list[str], regions: tuple[str, ...]) -> float:
    digits = "".join(parts)
    if _NANP.fullmatch(written) and dialled(regions).north_american:
        return LIKELY
    for prefix in ("00", "011"):  # what Europe, and what North America dials before a country code
        if digits.startswith(prefix) and len(parts[0]) != 1:
            abroad = digits.removeprefix(prefix)
            if 8 <= len(abroad) <= 15 and abroad[0] != "0" and _assigned(abroad):
                return LIKELY
    if _NOT_PHONE.fullmatch(written):
        return 0.0
    if len(parts) == 1:
        formed, score = 10 <= len(digits) <= (12 if digits[0] == "0" else 11), GUESSED
    elif digits[0] == "0":
        formed = len(digits) >= 9 or (len(digits) == 8 and ("(" in written or len(parts) == 4))
        formed, score = formed and parts[0] != "0", LIKELY
    else:
        formed, score = "(" in written or "-".join(str(len(part)) for part in parts) in _GROUPINGS, GUESSED
    return score if formed and len(digits) <= 13 and dialled(regions).national.fullmatch(digits) else 0.0


def _assigned(digits: str) -> bool:
    phonenumbers = package("phonenumbers")
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(f"+{digits}"))
    except phonenumbers.NumberParseException:
        return False


@dataclass(frozen=True, slots=True)
class Dialled:
    north_american: bool
    national: re.Pattern[str]


@functools.cache
def dialled(regions: tuple[str, ...]) -> Dialled:
    """What people dial within `regions`: one expression of phonenumbers' metadata, for a call for each is slow."""
    metadata_of = package("phonenumbers").PhoneMetadata.metadata_for_region
    north_american, forms = False, list[str]()
    for region in regions:
        metadata = metadata_of(region)
        if metadata is None:
            raise ValueError(f"regions names {region!r}, which phonenumbers does not know: use ISO 3166 codes, like GB")
        kinds = (metadata.fixed_line, metadata.mobile, metadata.toll_free, metadata.shared_cost)
        kinds += (metadata.premium_rate, metadata.voip, metadata.personal_number, metadata.uan)
        patterns = "|".join(kind.national_number_pattern for kind in kinds if kind and kind.national_number_pattern)
        trunk = metadata.national_prefix or ""
        optional = metadata.country_code == 1 or region in _TRUNK_OPTIONAL
        forms.append(f"(?:{trunk}){'?' if optional else ''}(?:{patterns})")
        if region == "AR":  # mobiles within the country: a 15 after the area's code, which the metadata leaves to code
            forms.append(r"0\d{2,4}15\d{6,8}")
        north_american |= metadata.country_code == 1
    return Dialled(north_american, re.compile("|".join(forms) or "(?!)"))


# --- payment cards ---

_DIGITS = re.compile(r"\d+(?:[ .-]{1,2}\d+)*")
_CARD_WORD = re.compile(
    r"(?:(?<!business[ -])(?<!\bid[ -])(?<!identity[ -])(?<!post)card|(?<!visiten)karte|visa|master|amex|credit|debit"
    r"|carte|tarjeta|carta|cart[aã]o|kaart|kort|カード)[^\d\n]{0,24}$"
)
# First digits and lengths by network. Source: ISO/IEC 7812-1 and the networks' published ranges.
_ISSUED = re.compile(
    r"4\d{15}(?:\d{3})?"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|3(?:0[0-5]|[689]\d)\d{11}"  # Diners Club
    r"|(?:6011|64[4-9]\d|65\d\d|35(?:2[89]|[3-8]\d)|220[0-4])\d{12,15}"  # Discover, JCB, Mir
    r"|(?:5[0678]|6[0-9]|8[12])\d{14,17}"  # Maestro, UnionPay, RuPay, Verve
)


def luhn_valid(digits: str) -> bool:
    """Whether the last digit is the check digit of the rest (ISO/IEC 7812-1, Annex B)."""
    doubled = (int(digit) * 2 for digit in digits[-2::-2])
    return (sum(map(int, digits[::-2])) + sum(value - 9 * (value > 9) for value in doubled)) % 10 == 0


def cards(text: str) -> Iterator[Found]:
    """Numbers of a network's range that pass Luhn, in any groups; others may stand before and after in the same run.

    After a word like "card", 12 to 19 digits of any range.
    """
    for run in _DIGITS.finditer(text):
        if run.end() - run.start() < 12:
            continue
        announced = _CARD_WORD.search(before(text, run.start())) is not None
        groups = [group.span() for group in _GROUP.finditer(text, run.start(), run.end())]
        for first, (start, _) in enumerate(groups):
            if not announced and text[start] not in "234568":
                continue
            digits = ""
            for left, right in groups[first : first + 19]:
                if len(digits) + right - left > 19:
                    break
                digits += text[left:right]
                if len(digits) >= 12 and (announced or _ISSUED.fullmatch(digits)) and luhn_valid(digits):
                    yield start, right, CERTAIN


# --- bank accounts ---

_IBAN_START = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z]{2}[ -]?\d[ -]?\d(?=[ -]{0,2}[A-Za-z0-9])|(?<=iban)[A-Za-z]{2}\d\d", re.I
)


def iban_valid(iban: str) -> bool:
    """Whether an IBAN without spaces has its country's form and its check digits (ISO 13616)."""
    return package("stdnum.iban").is_valid(iban, check_country=False)


def ibans(text: str) -> Iterator[Found]:
    """International bank account numbers."""
    for match in _IBAN_START.finditer(text):
        form = _iban_form(match[0][:2].upper())
        candidate = form and form.match(text, match.start())
        if candidate and iban_valid(re.sub(r"[ -]", "", candidate[0])):
            yield *candidate.span(), CERTAIN


@functools.cache
def _iban_form(country: str) -> re.Pattern[str] | None:
    # the registry's "4!a6!n8!n": lengths with the kind of character that stands there
    known: list[tuple[str, dict[str, str]]] = package("stdnum.numdb").get("iban").info(country)
    fields: list[str] = re.findall(r"(\d+)!", known[0][1].get("bban", "")) if known else []
    if not fields:
        return None
    return re.compile(rf"[A-Za-z]{{2}}(?:[ -]{{0,2}}[A-Za-z0-9]){{{2 + sum(map(int, fields))}}}(?![A-Za-z0-9])")
