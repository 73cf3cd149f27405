"""Personal data with a form of its own: patterns, and the checks that tell it from other text.

Each scan is linear in the text: a look-behind pins a match to the beginning of its run, or its lengths are bounded.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from privacy.pii.findings import Finding
from privacy.pii.folding import fold
from privacy.pii.national_ids import (
    announced_national_ids,
    announced_ssns,
    national_ids,
    open_packages,
    ssns,
)
from privacy.pii.numbers import (
    CERTAIN,
    GUESSED,
    LIKELY,
    REGIONS,
    Found,
    before,
    cards,
    dialled,
    iban_valid,
    ibans,
    luhn_valid,
    phones,
)

__all__ = ["DETECTORS", "ENTITIES", "Detector", "Finding", "PatternDetector", "detect", "iban_valid", "luhn_valid"]


@dataclass(frozen=True, slots=True)
class Detector:
    """Finds spans of one entity in a text whose digits and dashes are ASCII. A change of `find` raises `version`.

    signs: a text that holds none of these, in lower case, has none; digits: nor has one with fewer digits.
    """

    entity: str
    version: str
    find: Callable[[str], Iterator[Found]]
    signs: tuple[str, ...] = ()
    digits: int = 0


class PatternDetector:
    """The TextDetector "patterns". Raises MissingDetector when opened, where a package is absent.

    apart: entities looked for by themselves; their findings may overlap the others'. regions: whose national telephone
    numbers are known without a country code (ISO 3166).
    """

    name = "patterns"
    entities: tuple[str, ...]

    def __init__(self, apart: Sequence[str] = (), regions: Sequence[str] = REGIONS) -> None:
        self.entities = ENTITIES
        self._groups = [group for group in ([e for e in ENTITIES if e not in apart], list(apart)) if group]
        self._detectors = {**DETECTORS}
        self._detectors["phone"] = replace(DETECTORS["phone"], find=functools.partial(phones, regions=tuple(regions)))
        versions = [f"{name}-{detector.version}" for name, detector in DETECTORS.items()]
        self.version = " ".join((*versions, open_packages(), f"regions-{','.join(regions)}"))
        dialled(tuple(regions))  # an unknown one fails now

    def detect(self, texts: Sequence[str]) -> list[list[Finding]]:
        """Findings of each text, in order; those of `apart` after the others."""
        return [
            [
                replace(finding, detector=self.name, version=self.version)
                for group in self._groups
                for finding in detect(text, group, self._detectors)
            ]
            for text in texts
        ]


def detect(
    text: str, entities: Collection[str] | None = None, detectors: Mapping[str, Detector] | None = None
) -> list[Finding]:
    """Findings of `entities` (default: all), in order and without overlap.

    Of two that overlap the longer stands, then the one whose detector comes first in DETECTORS, then the earlier.
    Digits and dashes of other scripts count as ASCII's, and invisible characters as nothing. Raises MissingDetector
    where the text holds a candidate that only an absent package can check; PatternDetector raises it when opened.
    """
    folded, places = fold(text)
    lowered = folded.lower()
    num_digits = sum(map(folded.count, "0123456789"))
    found: list[tuple[int, int, int, str, float]] = []
    for priority, (name, detector) in enumerate((detectors or DETECTORS).items()):
        if num_digits < detector.digits or not (entities is None or detector.entity in entities):
            continue
        if not detector.signs or any(map(lowered.__contains__, detector.signs)):
            found += [(start - end, priority, start, name, score) for start, end, score in detector.find(folded)]
    if not found:
        return []
    taken: list[Finding] = []
    covered = bytearray(len(text))
    for negative_length, _, start, name, score in sorted(found):
        first, last = places[start], places[start - negative_length - 1] + 1
        if not any(covered[first:last]):
            covered[first:last] = b"\x01" * (last - first)
            detector = DETECTORS[name]
            taken.append(Finding(detector.entity, first, last, name, detector.version, score))
    return sorted(taken, key=lambda finding: finding.start)


# --- e-mail ---

_EMAIL = re.compile(r"(?<![\w.%+'-])[\w.%+'-]+@(?:[\w-]{1,63}\.)+(?:xn--[a-z0-9-]+|[^\W\d_]{2,24})", re.IGNORECASE)
_AT = re.compile(r"[\[({<]\s?at\s?[\])}>]", re.IGNORECASE)
_HIDDEN_EMAIL = re.compile(
    r"(?<![\w.%+-])[\w.%+-]{1,64}(?:\s?[\[({<]\s?dot\s?[\])}>]\s?[\w.%+-]{1,64}){0,3}\s?[\[({<]\s?at\s?[\])}>]\s?"
    r"(?:[\w-]{1,63}\s?(?:[\[({<]\s?dot\s?[\])}>]|\.)\s?){1,8}[^\W\d_]{2,24}(?!\w)",
    re.IGNORECASE,
)


def _emails(text: str) -> Iterator[Found]:
    for match in _EMAIL.finditer(text):
        start = match.start() + len(match[0]) - len(match[0].lstrip("'."))  # a quotation mark, an ellipsis
        if text[start] != "@":
            yield start, match.end(), CERTAIN


def _hidden_emails(text: str) -> Iterator[Found]:
    """name [at] example [dot] org"""
    if _AT.search(text):
        yield from ((*match.span(), LIKELY) for match in _HIDDEN_EMAIL.finditer(text))


# --- addresses of machines ---

# no leading zeros (RFC 6943), and not single digits alone, which number sections and releases
_IPV4 = re.compile(r"(?<![\w.])(?!\d\.\d\.\d\.\d(?!\d))(?:0|[1-9]\d{0,2})(?:\.(?:0|[1-9]\d{0,2})){3}(?!\w|\.\d)")
_RELEASE = re.compile(r"(?<!\w)(?:v|ver|version|release|build|firmware)\W{0,3}$")
_IPV6_RUN = re.compile(r"[0-9A-Fa-f:.]+")
_MAC = re.compile(
    r"(?<![\w:.-])(?:[0-9A-F]{2}([:-])(?:[0-9A-F]{2}\1){4}[0-9A-F]{2}|(?=[\d.]{0,13}[A-F])[0-9A-F]{4}\.[0-9A-F]{4}\.[0-9A-F]{4})"
    r"(?![\w]|[:-]\w)"
    r"|(?<![^\W_])(?:mac|ethernet|wi-?fi|bssid)(?: address| addr)?\W{1,3}(?P<bare>[0-9A-F]{12})(?!\w)",
    re.IGNORECASE,
)


def _ipv4(text: str) -> Iterator[Found]:
    for match in _IPV4.finditer(text):
        if all(int(part) <= 255 for part in match[0].split(".")) and not _RELEASE.search(before(text, match.start())):
            yield *match.span(), CERTAIN


def _ipv6(text: str) -> Iterator[Found]:
    """The longest address at the beginning of a run of its characters, or after a colon ("host:2001:db8::1")."""
    for run in _IPV6_RUN.finditer(text):
        if run[0].count(":") < 2 or run[0].strip(":.") == "":
            continue
        colons = [run.start() + place for place, character in enumerate(run[0]) if character == ":"]
        starts = [run.start(), *(place + 1 for place in colons)]
        ends = [*colons, run.start() + len(run[0].rstrip("."))]
        done = run.start()
        for first, start in enumerate(starts):
            if start < done:
                continue
            # an address has at most 8 groups, or 7 and "::", and 45 characters
            near = [end for end in ends[first : first + 10] if end - start <= 45]
            end = next((end for end in reversed(near) if _is_ipv6(text[start:end])), None)
            if end is not None and not _fingerprint(text, start, end):
                yield start, end, CERTAIN
                done = end


_PAIRS = re.compile(r"(?:[0-9A-Fa-f]{2}:){7}[0-9A-Fa-f]{2}")


def _fingerprint(text: str, start: int, end: int) -> bool:
    """Whether these groups are a piece of a longer run of pairs."""
    return _PAIRS.fullmatch(text, start, end) is not None and ":" in (text[start - 1 : start], text[end : end + 1])


_IPV6 = re.compile(r"(?=[^0-9]*[0-9])(?:[0-9A-Fa-f]{0,4}:){2,8}(?:[0-9A-Fa-f]{0,4}|[0-9.]{7,15})")


def _is_ipv6(candidate: str) -> bool:
    # "face::" is an address by the letter, and prose: ask for a digit
    if not _IPV6.fullmatch(candidate):
        return False
    try:
        ipaddress.IPv6Address(candidate)
    except ValueError:
        return False
    return True


def _macs(text: str) -> Iterator[Found]:
    for match in _MAC.finditer(text):
        yield *match.span("bare" if match["bare"] else 0), CERTAIN


# --- places ---

# what stands for degrees, minutes and seconds, as typed and as folded
_DEGREES, _MINUTES, _SECONDS = "[°o\u030a]", "['’′\u0301]", "(?:[\"”″]|''|′′|’’)"
_SEXAGESIMAL = rf" ?{_DEGREES} ?\d{{1,2}}(?:\.\d{{1,6}})? ?{_MINUTES}(?: ?\d{{1,2}}(?:\.\d{{1,6}})? ?{_SECONDS})?"
_COORDINATES = re.compile(
    # 48.85837, 2.29448 and 48.86° N 2.29° E
    r"(?<![\w.])(?=[NS\d+lL-])(?:(?<!\d,)(?<!\d, )(?:[NS] ?)?[+-]?(?P<lat>\d{1,2}\.\d{1,12})"
    rf"(?P<lat_mark>(?: ?{_DEGREES})?(?: ?[NS])?)(?: ?[,;/] ?| )(?:[EW] ?)?[+-]?(?P<lon>\d{{1,3}}\.\d{{1,12}})"
    rf"(?P<lon_mark>(?: ?{_DEGREES})?(?: ?[EW])?)(?!\w|\.\d|, ?-?\d+\.\d)"
    # 48°51'30.1"N 2°17'40"E
    rf"|(?:[NS] ?)?\d{{1,2}}{_SEXAGESIMAL} ?[NS]?[,;/ ]{{0,3}}"
    rf"(?:[EW] ?)?\d{{1,3}}{_SEXAGESIMAL}(?: ?[EW](?!\w))?"
    # lat: 48.86, lon: 2.29
    r"|(?i:lat(?:itude)?\W{0,3}[+-]?\d{1,2}(?:\.\d{1,12})?\W{1,3}lon(?:g|gitude)?\W{0,3}[+-]?\d{1,3}"
    r"(?:\.\d{1,12})?))"
)
_PLACE_WORD = re.compile(r"(?:geo|gps|coord\w*|location|position)\W{0,4}(?:\w+\W)?$")


def _places(text: str) -> Iterator[Found]:
    """Pairs of degrees: with a sign, letters or a word, or with four decimals or more (11 metres)."""
    for match in _COORDINATES.finditer(text):
        if match["lat"] is None:
            yield *match.span(), CERTAIN
            continue
        marked = match["lat_mark"].strip() or match["lon_mark"].strip()
        decimals = min(len(match[name].partition(".")[2]) for name in ("lat", "lon"))
        announced = re.search(
            r"(?:geo|gps|coord\w*|location|position)\W{0,4}(?:\w+\W)?$", before(text, match.start()), re.I
        )
        if float(match["lat"]) <= 90 and float(match["lon"]) <= 180 and (marked or announced or decimals >= 4):
            yield *match.span(), CERTAIN if marked or announced else LIKELY


# --- names that people have on machines ---

_NOT_HOME = frozenset({"public", "shared", "default", "all", "guest"})
_HOME = re.compile(
    r"(?<![\w./\\~-])(?:file:/{1,3}|\\\\(?=\w))?(?:[A-Za-z]:)?(?:(?:[\\/][\w.$-]{1,64}){0,4}?)"
    r"[\\/]{1,2}(?:home|users|documents and settings)[\\/]{1,2}(?P<user>[^\s\\/:*?\"'<>|,;()\[\]]{1,64}"
    r"(?: [^\s\\/:*?\"'<>|,;()\[\]]{1,64}(?=\\))?)"
    r"(?:[\\/]{1,2}[^\s\\/:*?\"'<>|,;()\[\]]{0,255}(?: [^\s\\/:*?\"'<>|,;()\[\]]{1,64}(?=\\))?)*",
    re.IGNORECASE,
)
_MIXED_NAME = r" (?=[\w.-]{0,31}[\d_])(?=[\w.-]{0,31}[^\W\d_])"  # jane_roe, jane7
_USER_WORD = re.compile(
    r"(?<![^\W_])(?:(?P<named>user[ _-]?(?:name|id)|screen[ _-]?name|nick(?:name)?|benutzername|nutzername"
    rf"|nom d'utilisateur|nome utente|gebruikersnaam|användarnamn|brukernavn)(?: ?: ?|=| is |{_MIXED_NAME})"
    r"|(?:user|log-?[io]n|handle|account|insta(?:gram)?|ig|twitter|snap(?:chat)?|telegram|tiktok|discord|skype|github"
    r"|reddit|mastodon|benutzer|identifiant|pseudo|usuario|usuário|utente|gebruiker|użytkownik)"
    rf"(?: ?: ?|=|{_MIXED_NAME}))[@\"']?(?P<user>[^\W_](?:[\w.-]{{0,30}}\w)?)(?![\w@(])",
    re.IGNORECASE,
)
_USER_STEMS = (
    "user", "login", "logon", "log-", "screen", "nick", "handle", "account", "insta", "ig:", "ig ", "twitter", "snap",
    "telegram", "tiktok", "discord", "skype", "github", "reddit", "mastodon", "benutz", "nutzer", "utilisateur",
    "identifiant", "pseudo", "usu", "utente", "gebruik", "användar", "użytk", "brukern",
)  # fmt: skip
_HANDLE = re.compile(
    r"(?<![\w@./+:-])@(?=[\w.]{0,30}[^\W\d_])([A-Za-z_][\w.]{1,30}\w)(?:@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4})?(?![\w@({])"
)
# what follows an @ in code and in haste
_NOT_HANDLES = frozenset({
    "media", "import", "font", "keyframes", "supports", "page", "charset", "param", "return", "returns", "override",
    "property", "todo", "home", "work", "night", "school", "least", "all", "here", "everyone", "channel",
})  # fmt: skip


def _home_paths(text: str) -> Iterator[Found]:
    """Paths into somebody's home, as far as they reach: folders and files are named after people, too."""
    for match in _HOME.finditer(text):
        if match["user"].lower().rstrip(".") not in _NOT_HOME:
            yield match.start(), match.start() + len(match[0].rstrip(".")), CERTAIN


def _usernames(text: str) -> Iterator[Found]:
    for match in _USER_WORD.finditer(text):
        if match["named"] or not (match["user"].istitle() and match["user"].isalpha()):  # NOTICE TO USER: Carefully
            yield *match.span("user"), LIKELY


def _handles(text: str) -> Iterator[Found]:
    for match in _HANDLE.finditer(text):
        if match[1].lower() not in _NOT_HANDLES:
            yield *match.span(), LIKELY


_PROFILES = (
    r"facebook\.com|fb\.com|instagram\.com|twitter\.com|x\.com|tiktok\.com|github\.com|gitlab\.com|linkedin\.com|t\.me"
    r"|snapchat\.com|pinterest\.com|flickr\.com|deviantart\.com|behance\.net|vk\.com|patreon\.com|medium\.com|about\.me"
)
_URL = re.compile(
    rf"(?<![A-Za-z0-9+.-])(?:[A-Za-z][A-Za-z0-9+.-]{{1,20}}://[^\s<>\"'`]+"
    rf"|(?<![@/])(?:www\.|m\.)?(?:{_PROFILES})/[^\s<>\"'`]+)",
    re.IGNORECASE,
)
_PERSONAL_URL = re.compile(
    rf"[a-z0-9+.-]+://(?:[^/?#@]+@"
    rf"|[^?#]*?/(?:~|@|(?:u|user|users|member|members|people|profile|profiles|author|authors|in)/)[\w.%-]+"
    rf"|[^?#]*\?(?:[^#]*&)?(?:user|username|user_?id|uid|login|e?mail|account)=[^&#])"
    rf"|(?:[a-z]+://)?(?:www\.|m\.)?(?:{_PROFILES})/(?!(?:share|sharer|search|explore|hashtag|login|intent|watch|p|about|help)\b)[\w.@~%-]{{2}}",
    re.IGNORECASE,
)


def _urls(text: str) -> Iterator[Found]:
    """Addresses that name a user: before the host, as a folder, in the query, or at a site of profiles."""
    for match in _URL.finditer(text):
        url = match[0].rstrip(".,;:!?)]}")
        if _PERSONAL_URL.match(url[:2048]):
            yield match.start(), match.start() + len(url), CERTAIN


# --- licence plates ---

# Forms that are hard to mistake for something else; those of other countries need a word before them.
_PLATE = re.compile(
    r"(?<![\w-])(?:[A-Z]{2}\d{2} [A-HJ-PR-Z]{3}"  # Great Britain since 2001
    r"|[A-HJ-NP-TV-Z]{2}-\d{3}-[A-HJ-NP-TV-Z]{2}"  # France and, with other separators, Italy
    r"|(?:[BDFGHJKLNPRSTVXZ]{2}-\d{3}-[BDFGHJKLNPRSTVXZ]|[BDFGHJKLNPRSTVXZ]-\d{3}-[BDFGHJKLNPRSTVXZ]{2}"  # Netherlands
    r"|\d-[BDFGHJKLNPRSTVXZ]{3}-\d{2}|\d{2}-[BDFGHJKLNPRSTVXZ]{3}-\d)"
    r"|[A-Z]{3}\d[A-Z]\d{2}"  # Mercosur
    r"|[A-Z]{2}[ -]\d{1,2}[ -][A-Z]{1,2}[ -]\d{4})(?![\w-])"  # India
)
_PLATE_ANNOUNCED = re.compile(
    r"(?<![^\W_])(?i:(?:number |licen[cs]e |registration )?plates?|regist?ration|licen[cs]e (?:no|number)|reg|vrn"
    r"|(?:kfz-?|auto)?kennzeichen|immatricul\w+|matr[ií]cula|targa|kenteken|placas?|(?:nr )?rejestrac\w+"
    r"|registreringsnummer|reg\.?nr|nummerplaat|nummernschild|nummerplåt|госномер|ナンバー)(?!\w)"
    r"(?:\W{1,3}(?i:no|nr|num|number|nummer|is|reads?)(?!\w))?[^\d\n]{0,20}?(?<![^\W_])"
    r"(?P<plate>[A-ZÄÖÜ0-9]{1,8}(?:[ ·.-]{1,2}[A-ZÄÖÜ0-9]{1,7}){0,3})(?![\w-])"
)
_PLATE_STEMS = (
    "plate", "reg", "licen", "vrn", "kennzeich", "immatricul", "matr", "targa", "kentek", "placa", "rejestr", "nummer",
    "госномер", "ナンバー",
)  # fmt: skip
_MIXED = re.compile(r"(?=.*[A-ZÄÖÜ])(?:.*\d){2}")


def _plates(text: str) -> Iterator[Found]:
    for match in _PLATE.finditer(text):
        yield *match.span(), GUESSED


def _announced_plates(text: str) -> Iterator[Found]:
    for match in _PLATE_ANNOUNCED.finditer(text):
        if _MIXED.match(match["plate"]) and 4 <= sum(map(str.isalnum, match["plate"])) <= 10:
            yield *match.span("plate"), CERTAIN


# In order of priority.
DETECTORS: Mapping[str, Detector] = {
    "url": Detector("url", "1", _urls, signs=("/",)),
    "email": Detector("email", "2", _emails, signs=("@",)),
    "hidden_email": Detector("email", "1", _hidden_emails, signs=("at)", "at]", "at}", "at>", "at )", "at ]")),
    "home_path": Detector("home_path", "2", _home_paths, signs=("home", "users", "documents and")),
    "iban": Detector("iban", "2", ibans, digits=10),
    "card": Detector("card", "3", cards, digits=12),
    "ssn": Detector("ssn", "2", ssns, digits=9),
    "announced_ssn": Detector("ssn", "2", announced_ssns, signs=("ssn", "soc"), digits=9),
    "national_id": Detector("national_id", "1", national_ids, digits=6),
    "announced_national_id": Detector("national_id", "1", announced_national_ids, digits=4),
    "mac": Detector("mac", "1", _macs, signs=(":", "-", ".", "mac", "ethernet", "wi", "bssid"), digits=1),
    "ipv6": Detector("ip", "2", _ipv6, signs=(":",), digits=1),
    "ipv4": Detector("ip", "2", _ipv4, signs=(".",), digits=4),
    "gps": Detector("gps", "1", _places, signs=(".", "°", "'", "’", "′", "\u0301", "lat"), digits=2),
    "phone": Detector("phone", "2", phones, digits=7),
    "plate": Detector("plate", "1", _plates, digits=2),
    "announced_plate": Detector("plate", "1", _announced_plates, signs=_PLATE_STEMS, digits=2),
    "handle": Detector("username", "1", _handles, signs=("@",)),
    "username": Detector("username", "1", _usernames, signs=_USER_STEMS),
}
ENTITIES = tuple(dict.fromkeys(detector.entity for detector in DETECTORS.values()))
