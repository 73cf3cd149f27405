"""Captions with personal data planted at known places, to measure detectors on: values, names and templates of its own.

A caption is a function of (seed, number, language): the first 300 of a trial are those of one of 3,000. Half of the
English ones hold one value or more, a quarter are plain, a quarter have names and numbers that are nobody's, for all
their looks; those in other languages all hold some. Values are written here anew, not by `values`, from which tests of
the patterns draw: but for licence plates and national ids. Nobody owns them where there are such: documentation domains
and networks (RFC 2606, 5737, 3849, 7042), telephone numbers kept for drama (NANPA, Ofcom, ACMA, ARCEP, BNetzA, PTS),
networks' test prefixes of cards. Elsewhere a value is made up and may be somebody's by chance.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from privacy.pii.planting_pools import (
    ADDRESSES,
    FILLERS,
    GIVEN,
    LOOKALIKES,
    PLAIN,
    STATES,
    STREETS,
    SURNAMES,
    TEMPLATES,
    TOWNS,
)
from privacy.pii.values import ANNOUNCEMENTS, MAKERS

LOCALES = tuple(GIVEN)
LANGUAGES = tuple(TEMPLATES)
_HOME = {"de": "de_DE", "fr": "fr_FR", "es": "es_ES", "it": "it_IT", "nl": "nl_NL", "pl": "pl_PL", "pt": "pt_BR",
         "sv": "sv_SE"}  # fmt: skip
_CHARACTERS = {"#": "0123456789", "*": "123456789", "~": "23456789", "@": "ABCDEFGHKLMNPRSTUW"}
_SLOT = re.compile(r"\{([a-z_]+?)(?:_\d)?\}")

Kind = Literal["holding", "plain", "lookalike"]
Maker = Callable[[random.Random, str], str]


@dataclass(frozen=True, slots=True)
class Gold:
    """text[start:end] is a planted `entity`."""

    entity: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GoldCaption:
    """A caption, what is planted in it, whose way of writing its values follow ("": none), the language of the rest.

    kind: whether it is holding a value; else whether it is plain, or a lookalike of one that does.
    """

    text: str = field(repr=False)
    gold: tuple[Gold, ...]
    locale: str
    language: str
    kind: Kind = "holding"


def captions(seed: int, number: int, language: str = "en") -> list[GoldCaption]:
    """`number` captions in one of LANGUAGES; English ones plant values of all LOCALES in turn, the others of their own.

    Of those that hold something the first slot is an entity of ENTITIES, in turn: each comes equally often.
    """
    return [_caption(seed, count, language) for count in range(number)]


_KINDS: tuple[Kind, ...] = ("holding", "plain", "holding", "lookalike")  # of English captions, in turn


def _caption(seed: int, count: int, language: str) -> GoldCaption:
    chance = random.Random(f"planted\0{seed}\0{language}\0{count}")
    kind, turn = (_KINDS[count % 4], count // 2) if language == "en" else ("holding", count)
    locale, template = _HOME.get(language, ""), chance.choice(PLAIN if kind == "plain" else LOOKALIKES)
    if kind == "holding":
        templates = _by_entity(language)
        entity = tuple(templates)[turn % len(templates)]
        locale = locale or LOCALES[turn // len(templates) % len(LOCALES)]
        beside, template = template, chance.choice(templates[entity])
        if chance.random() < 0.3:
            template = chance.choice(("{0}, {1}", "{0}. {1}", "{1} - {0}", "{0}\n{1}")).format(template, beside)
    style = chance.choices(("{}", "lower", "upper", "“{}”", "<b>{}</b>"), (84, 5, 3, 4, 4))[0]
    if "{}" in style:
        template = style.format(template)
    text, gold = _filled(chance, template, locale)
    cased = {"lower": text.lower(), "upper": text.upper()}.get(style, text)
    return GoldCaption(cased if len(cased) == len(text) else text, gold, locale, language, kind)


def _filled(chance: random.Random, template: str, locale: str) -> tuple[str, tuple[Gold, ...]]:
    text, gold, done = "", list[Gold](), 0
    for slot in _SLOT.finditer(template):
        text += template[done : slot.start()]
        done, name = slot.end(), slot[1]
        if name not in ENTITIES:
            text += _filler(chance, name)
            continue
        announcement = ANNOUNCEMENTS.get(name, {}).get(locale)
        text += f"{announcement} " if announcement else ""
        value = ENTITIES[name](chance, locale)
        gold.append(Gold(name, len(text), len(text) + len(value)))
        text += value
    return text + template[done:], tuple(gold)


def _by_entity(language: str) -> dict[str, list[str]]:
    """Templates by each entity that they plant."""
    return {
        entity: chosen
        for entity in ENTITIES
        if (chosen := [template for template in TEMPLATES[language] if entity in _SLOT.findall(template)])
    }


# --- what looks like data, and words between ---


def _digits(chance: random.Random, form: str) -> str:
    """Each "#" a digit, each "*" one but 0, each "~" from 2 to 9, each "@" a letter."""
    return re.sub("[#*~@]", lambda place: chance.choice(_CHARACTERS[place[0]]), form)


def _no_card(chance: random.Random) -> str:
    """Sixteen digits that no card has: the last one is not what the others ask for."""
    body = _digits(chance, "#" * 15)
    return f"{body}{(_luhn(body) + chance.randrange(1, 10)) % 10}"


def _filler(chance: random.Random, name: str) -> str:
    if name in FILLERS:
        return chance.choice(FILLERS[name])
    day, month, year = chance.randrange(1, 29), chance.randrange(1, 13), chance.randrange(1890, 2030)
    forms: Mapping[str, tuple[str, ...]] = {
        "year": (f"{year}",),
        "date": (
            f"{year}-{month:02d}-{day:02d}",
            f"{day:02d}.{month:02d}.{year}",
            f"{month}/{day}/{year}",
            f"May {day}",
        ),
        "time": (f"{chance.randrange(24):02d}:{chance.randrange(60):02d}", f"{month} pm"),
        "price": ("$*#.##", "€*,### ", "£*#", "*##,## EUR", "USD *,###,###"),
        "number": ("*###", "*##", "*####", "*######"),
        "size": ("*##x*## px", "*### x *### mm", '##"x##"', "*.# MB", "##/##/##"),
        "camera": ("f/2.8, 1/*## s, ISO *00", "*#mm, 1/*###s"),
        "model": ("Nikon D*##", "Canon EOS *#D", "ThinkPad X2*#", "RTX *0#0 Ti", "SM-G9*#F"),
        "order": (_no_card(chance), "###-#######-#######", "PO-*######"),
        "grains": ("* ### ###", "*,###,###", "** ###"),
        "isbn": ("978-*-###-#####-#", "978*#########"),
        "ean": ("40#############"[:13],),
        "version": ("v*.##.#", "version *.#.##.*", "*.#.#-rc*"),
        "percent": ("*#.#%", "*#%"),
        "hex": (f"#{chance.randrange(16**6):06x}",),
        "small": ("*#",),
        "tracking": ("1Z99#AA1##########", "RR#########XX"),
        "thing_word": ("boats", "gallery", "cats"),
    }
    return _digits(chance, chance.choice(forms[name])).strip()


# --- people ---


def _person(chance: random.Random, locale: str) -> str:
    """A name as captions give it: mostly in full, at times a first name alone, initials, or the surname first."""
    given, surname = chance.choice(GIVEN[locale]), chance.choice(SURNAMES[locale])
    second = chance.choice(GIVEN[locale])
    initial = chance.choice("ABCDEFGHJKLMNPRST")
    form = chance.choices(
        ("{given} {surname}", "{given}", "{given} {initial}. {surname}", "{given[0]}. {surname}", "{surname}, {given}",
         "{given} {second} {surname}", "{given[0]}.{initial}. {surname}"),
        (66, 9, 7, 6, 4, 5, 3),
    )[0]  # fmt: skip
    return form.format(given=given, surname=surname, second=second, initial=initial)


def _address(chance: random.Random, locale: str) -> str:
    """A house in a street, mostly with its town."""
    form = _digits(chance, chance.choice(ADDRESSES[locale]))
    state = chance.choice(STATES.get(locale, "-").split())
    return form.format(
        n=chance.randrange(1, 300), s=chance.choice(STREETS[locale]), t=chance.choice(TOWNS[locale]), S=state
    )


def _plain(text: str) -> str:
    """ASCII letters, as in an address of a machine."""
    decomposed = unicodedata.normalize("NFKD", text.replace("ł", "l").replace("ß", "ss").replace("ø", "o"))
    return re.sub("[^a-z]", "", decomposed.encode("ascii", "ignore").decode().lower())


def _account(chance: random.Random, locale: str) -> str:
    given, surname = _plain(chance.choice(GIVEN[locale])), _plain(chance.choice(SURNAMES[locale]))
    year = chance.randrange(1950, 2012)
    forms = (f"{given}.{surname}", f"{given[0]}{surname}", f"{given}_{surname[:3]}", f"{given}{year}",
             f"{surname}-{given[0]}", f"{given}{surname}{chance.randrange(10)}", f"{given[0]}.{surname}")  # fmt: skip
    return chance.choice(forms)


def _email(chance: random.Random, locale: str) -> str:
    account = chance.choice(
        (_account(chance, locale), f"{_account(chance, locale)}+{chance.choice(('art', 'x1', 'news'))}")
    )
    hosts = ("example.com", "example.net", "example.org", "mail.example.com", "studio.example", "uni.test.example",
             f"post.example.{locale[-2:].lower()}", "bücher.example")  # fmt: skip
    host = chance.choice(hosts)
    form = chance.choices(("{}@{}", "{} [at] {}", "{}(at){}"), (94, 3, 3))[0]
    return chance.choice((str, str, str, str.upper, str.title))(form.format(account, host))


# --- numbers ---

# After the country's code; a "(0)" is dialled within the country. Kept for drama but for ES, IT, NL, PL, BR, IN, JP.
_PHONES: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType({
    "en_US": ("1", ("~02 555 01##", "~13 555 01##", "~37 555 01##")),
    "en_GB": ("44", ("(0)20 7946 0###", "(0)7700 900###", "(0)113 496 0###", "(0)1632 960###", "(0)808 157 0###")),
    "en_AU": ("61", ("(0)2 5550 ####", "(0)3 7010 ####", "(0)7 5550 ####", "(0)491 570 1##", "(0)8 7010 ####")),
    "en_IN": ("91", ("98300 *####", "(0)22 2640 ####", "90080 *####")),
    "de_DE": ("49", ("(0)30 23125 ###", "(0)69 90009 ###", "(0)40 66969 ###", "(0)221 4710 ###", "(0)171 39200##",
                     "(0)89 99998 ###")),
    "fr_FR": ("33", ("(0)1 99 00 ## ##", "(0)2 61 91 ## ##", "(0)3 53 01 ## ##", "(0)4 65 71 ## ##",
                     "(0)6 39 98 ## ##")),
    "es_ES": ("34", ("93 446 ## ##", "655 10 ## ##", "91 417 ## ##", "722 300 ###")),
    "it_IT": ("39", ("02 7200 ####", "347 200 ####", "051 640 ####", "333 900 ####")),
    "nl_NL": ("31", ("(0)20 624 ####", "(0)6 2400 ####", "(0)10 413 ####", "(0)50 318 ####")),
    "pl_PL": ("48", ("22 620 ## ##", "601 200 ###", "12 422 ## ##", "795 100 ###")),
    "pt_BR": ("55", ("11 3060 ####", "21 99600 ####", "48 3220 ####", "31 98400 ####")),
    "sv_SE": ("46", ("(0)8 465 004 ##", "(0)31 390 06 ##", "(0)70 174 06 ##", "(0)40 628 04 ##", "(0)980 319 20#")),
    "ja_JP": ("81", ("(0)3 3200 ####", "(0)90 2600 ####", "(0)6 6340 ####", "(0)80 4100 ####")),
})  # fmt: skip
_TRUNK = "(0)"


def _phone(chance: random.Random, locale: str) -> str:
    """Within the country or from abroad, in the groups and with the signs that people put."""
    code, forms = _PHONES[locale]
    number = _digits(chance, chance.choice(forms))
    groups = number.replace(_TRUNK, "").split()
    home = ["0" + groups[0] if number.startswith(_TRUNK) else groups[0], *groups[1:]]
    trunk = _TRUNK if number.startswith(_TRUNK) else ""
    separator = chance.choice((" ", " ", "-", ".", "\u00a0", ""))
    rest = separator.join(groups)
    abroad = [f"+{code}{separator}{rest}", f"+{code}{''.join(groups)}", f"(+{code}) {rest}"]
    abroad += [f"00{code} {' '.join(groups)}", f"+{code} {trunk}{' '.join(groups)}"]
    within = [f"({home[0]}) {separator.join(home[1:])}", " ".join(home), "-".join(home), separator.join(home)]
    within += [f"{home[0]}/{''.join(home[1:])}"] if trunk else [f"1-{'-'.join(home)}"] if code == "1" else []
    return chance.choice(chance.choice((abroad, within, within)))


# Test prefixes and the groups on the card.
_CARDS = (("411111", (4, 4, 4, 4)), ("424242", (4, 4, 4, 4)), ("555555", (4, 4, 4, 4)), ("222300", (4, 4, 4, 4)),
          ("371449", (4, 6, 5)), ("601111", (4, 4, 4, 4)), ("353011", (4, 4, 4, 4)), ("305693", (4, 6, 4)),
          ("620000", (4, 4, 4, 4)))  # fmt: skip


def _card(chance: random.Random, locale: str) -> str:
    prefix, sizes = chance.choice(_CARDS)
    body = prefix + _digits(chance, "#" * (sum(sizes) - 7))
    return _in_groups(f"{body}{_luhn(body)}", sizes, chance.choice(("", " ", "-", "\u00a0", "  ", ".")))


def _luhn(body: str) -> int:
    """The check digit: from the right every second digit counts twice, its own digits added up (ISO/IEC 7812-1)."""
    total = sum(
        int(digit) if place % 2 else sum(map(int, str(2 * int(digit)))) for place, digit in enumerate(body[::-1])
    )
    return -total % 10


def _in_groups(text: str, sizes: Sequence[int], separator: str) -> str:
    """`text` in groups of these sizes, the last of them again and again."""
    groups: list[str] = []
    while text:
        size = sizes[min(len(groups), len(sizes) - 1)]
        groups.append(text[:size])
        text = text[size:]
    return separator.join(groups)


# Country and account. Source: SWIFT IBAN registry.
_ACCOUNTS = (
    "DE##################", "GB@@@@##############", "FR##########@@#########00", "ES####################",
    "IT@######################", "NL@@@@##########", "PL########################", "SE####################",
    "CH#################", "AT################", "NO###########", "DK##############", "PT#####################",
    "IE@@@@##############", "FI##############",
)  # fmt: skip


def _iban(chance: random.Random, locale: str) -> str:
    form = chance.choice([form for form in _ACCOUNTS if form.startswith(locale[-2:])] or _ACCOUNTS)
    country, account = form[:2], _digits(chance, form[2:])
    # ISO 13616: with the country and 00 behind, letters as 10 to 35, the whole leaves 98 less the check digits
    number = int("".join(str(int(character, 36)) for character in f"{account}{country}00"))
    iban = f"{country}{98 - number % 97:02d}{account}"
    return chance.choice(
        (iban, _in_groups(iban, (4,), " "), _in_groups(iban, (4,), "\u00a0"), iban.lower(), _in_groups(iban, (4,), "-"))
    )


def _ssn(chance: random.Random, locale: str) -> str:
    area = chance.randrange(780, 900)  # never issued
    parts = (f"{area}", f"{chance.randrange(1, 100):02d}", f"{chance.randrange(1, 10000):04d}")
    return chance.choice(("-", "-", "-", " ", "\u2011")).join(parts)


def _ip(chance: random.Random, locale: str) -> str:
    low = chance.randrange(1, 255)
    group = f"{chance.randrange(1, 65536):x}"
    return chance.choice((
        f"192.0.2.{low}", f"198.51.100.{low}", f"203.0.113.{low}", f"10.{low}.0.{chance.randrange(10, 255)}",
        f"192.168.1.{low}", f"2001:db8::{group}", f"2001:db8:{group}:1::{low}", f"fe80::{group}:{low}",
        f"2001:0db8:0000:0000:0000:0000:{group:0>4}:0001",
    ))  # fmt: skip


def _mac(chance: random.Random, locale: str) -> str:
    pairs = ["00", "00", "5E", "00", "53", f"{chance.randrange(256):02X}"]
    return chance.choice((str.upper, str.lower))(chance.choice((":", "-")).join(pairs))


def _url(chance: random.Random, locale: str) -> str:
    user = _account(chance, locale)
    return chance.choice((
        f"https://www.example.com/people/{user}", f"http://example.net/~{user}/", f"https://example.org/profile/{user}?tab=art",
        f"ftp://{user}:hunter2@files.example.org/pub", f"https://instagram.com/{user}", f"https://example.org/?user={user}",
        f"www.facebook.com/{user}", f"https://blog.example/@{user}/12",
    ))  # fmt: skip


def _gps(chance: random.Random, locale: str) -> str:
    latitude, longitude = chance.uniform(-70, 70), chance.uniform(-179, 179)
    north, east = "NS"[latitude < 0], "EW"[longitude < 0]
    whole = (f"{int(abs(latitude))}° {chance.randrange(60)}′ {chance.randrange(60)}″ {north}",
             f"{int(abs(longitude))}° {chance.randrange(60)}′ {chance.randrange(60)}″ {east}")  # fmt: skip
    return chance.choice((
        f"{latitude:.6f},{longitude:.6f}", f"{latitude:.4f}, {longitude:.4f}", " ".join(whole), ", ".join(whole),
        f"{north} {abs(latitude):.5f} {east} {abs(longitude):.5f}", f"lat {latitude:.3f} lon {longitude:.3f}",
    ))  # fmt: skip


def _home_path(chance: random.Random, locale: str) -> str:
    user = _account(chance, locale)
    return chance.choice((
        f"/home/{user}/art/duck_final.xcf", rf"C:\Users\{user}\Pictures\scan003.tif", f"/Users/{user}/Library/duck.ai",
        rf"D:\Documents and Settings\{user}\My Documents\duck.cdr",
        f"file:///home/{user}/Desktop/duck.svg", f"/home/{user}/",
    ))  # fmt: skip


def _username(chance: random.Random, locale: str) -> str:
    user = _account(chance, locale).replace("-", "_")
    return chance.choice((f"@{user}", f"@{user}", f"@{user}@social.example", f"@{user}_draws"))


# What is planted, in the order of the turns.
ENTITIES: Mapping[str, Maker] = MappingProxyType({
    "person": _person, "address": _address, "email": _email, "phone": _phone, "card": _card, "iban": _iban, "ssn": _ssn,
    "ip": _ip, "national_id": MAKERS["national_id"], "mac": _mac, "url": _url, "gps": _gps, "home_path": _home_path,
    "username": _username, "plate": MAKERS["plate"],
})  # fmt: skip
