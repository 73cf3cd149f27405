"""Invented values of the entities that `patterns` finds, as people of a locale write them.

Of kinds that nobody owns where there are such: documentation domains and addresses, telephone numbers kept for drama,
networks' test prefixes of cards. National ids and bank accounts are random, with their check digits: by chance one may
be somebody's. A value is a function of (the state of `chance`, locale).
"""

from __future__ import annotations

import importlib
import ipaddress
import random
import string
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

_NAMES = ("ada", "bela", "chika", "dmitri", "elif", "farid", "greta", "hana", "ines", "joon", "kofi", "lena", "mira")
_SURNAMES = ("abara", "berg", "castro", "dahl", "eder", "fonseca", "grau", "holm", "ivanov", "jansen", "kaya", "lund")
_NETWORKS = ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")  # RFC 5737, RFC 3849
_CARDS = (("400000", "4444"), ("411111", "4444"), ("555555", "4444"), ("378282", "465"), ("601111", "4444"))

# "#": any digit. Kept for drama by Ofcom (GB), NANPA (US), ACMA (AU), ARCEP (FR), BNetzA (DE), PTS (SE); elsewhere
# there is no such block, and these are of ranges in use.
_PHONES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "en_US": ("({area}) 555-01##", "{area}-555-01##", "{area}.555.01##", "+1 {area} 555 01##", "1-{area}-555-01##"),
    "en_GB": ("020 7946 0###", "07700 900###", "+44 7700 900###", "+44 20 7946 0###", "(0161) 496 0###"),
    "en_AU": ("(02) 5550 ####", "0491 570 ###", "+61 491 570 ###", "02 7010 ####"),
    "en_IN": ("98765 4####", "+91 98765 4####", "022 2345 ####", "09876 54####"),
    "de_DE": ("030 23125###", "(030) 23125-###", "0171 39200##", "+49 30 23125 ###", "0171/39200##"),
    "fr_FR": ("01 99 00 ## ##", "06 39 98 ## ##", "06.39.98.##.##", "+33 6 39 98 ## ##", "+33 1 99 00 ## ##"),
    "es_ES": ("612 34 5# ##", "+34 612 345 ###", "912 345 ###", "612 345 ###"),
    "it_IT": ("06 6982 ####", "312 345 ####", "+39 312 345 ####", "02 1234 5###"),
    "nl_NL": ("06-1234####", "020-123 ####", "+31 6 1234####", "+31 20 123 ####", "06 12 34 ## ##"),
    "pl_PL": ("512 345 ###", "22 345 ## ##", "+48 512 345 ###", "+48 22 345 ## ##"),
    "pt_BR": ("(11) 91234-####", "(21) 2345-####", "+55 11 91234-####", "011 91234-####"),
    "sv_SE": ("070-174 06 ##", "031-390 06 ##", "+46 70 174 06 ##", "08-465 004 ##"),
    "ja_JP": ("03-1234-####", "090-1234-####", "+81 90-1234-####", "080 1234 ####"),
})  # fmt: skip
LOCALES = tuple(_PHONES)

# Country, and its account with "#" for a digit.
_BANKS: Mapping[str, tuple[str, str]] = MappingProxyType({
    "en_US": ("VG", f"VPVG{'#' * 16}"), "en_GB": ("GB", f"NWBK{'#' * 14}"), "en_AU": ("LT", "#" * 16),
    "en_IN": ("AE", "#" * 19), "de_DE": ("DE", "#" * 18), "fr_FR": ("FR", "#" * 23), "es_ES": ("ES", "#" * 20),
    "it_IT": ("IT", f"X{'#' * 22}"), "nl_NL": ("NL", f"ABNA{'#' * 10}"), "pl_PL": ("PL", "#" * 24),
    "pt_BR": ("BR", f"{'#' * 23}P1"), "sv_SE": ("SE", "#" * 20), "ja_JP": ("CH", "#" * 17),
})  # fmt: skip

# What tells a value where its form does not: a value of these is planted after it.
ANNOUNCEMENTS: Mapping[str, Mapping[str, str]] = MappingProxyType({
    "national_id": {
        "en_GB": "NHS number", "en_AU": "TFN", "de_DE": "Steuer-ID", "fr_FR": "numéro de sécurité sociale",
        "nl_NL": "BSN", "pl_PL": "PESEL", "ja_JP": "マイナンバー",
    },
    "plate": {
        "en_US": "license plate", "en_AU": "number plate", "de_DE": "Kennzeichen", "es_ES": "matrícula",
        "it_IT": "targa", "pl_PL": "nr rejestracyjny", "sv_SE": "registreringsnummer", "ja_JP": "number plate",
    },
})  # fmt: skip


def _digits(chance: random.Random, form: str) -> str:
    return "".join(chance.choice(string.digits) if character == "#" else character for character in form)


def _letters(chance: random.Random, count: int, letters: str = "BCDFGHJKLMNPRSTVWXYZ") -> str:
    return "".join(chance.choices(letters, k=count))


def _checked(chance: random.Random, module: str, form: str, endings: Iterable[str]) -> str:
    """`form` with random digits and the first ending that python-stdnum's module takes."""
    valid = importlib.import_module(f"stdnum.{module}").is_valid
    tails = tuple(endings)
    while True:
        body = _digits(chance, form)
        for tail in tails:
            if valid(body + tail):
                return body + tail


def _grouped(value: str, separator: str, *sizes: int) -> str:
    parts: list[str] = []
    for size in sizes:
        parts.append(value[:size])
        value = value[size:]
    return separator.join((*parts, value) if value else parts)


def _user(chance: random.Random) -> str:
    name = chance.choice((".", "_", "")).join((chance.choice(_NAMES), chance.choice(_SURNAMES)))
    return f"{name}{chance.choice(('', chance.randrange(100)))}"


def _email(chance: random.Random, locale: str) -> str:
    ending = chance.choice(("com", "org", "net", locale[-2:].lower()))
    return f"{_user(chance)}@{chance.choice(('', 'mail.'))}example.{ending}"


def _phone(chance: random.Random, locale: str) -> str:
    area = f"{chance.randrange(2, 10)}{chance.randrange(100):02d}"
    return _digits(chance, chance.choice(_PHONES[locale]).format(area=area))


def _card(chance: random.Random, locale: str) -> str:
    prefix, groups = chance.choice(_CARDS)
    sizes = tuple(map(int, groups))
    number = _checked(chance, "luhn", prefix + "#" * (sum(sizes) - 7), string.digits)
    return _grouped(number, chance.choice(("", " ", "-")), *sizes)


def _iban(chance: random.Random, locale: str) -> str:
    country, form = _BANKS[locale]
    account = _digits(chance, form)
    check = 98 - int("".join(str(int(character, 36)) for character in f"{account}{country}00")) % 97
    iban = f"{country}{check:02d}{account}"
    return chance.choice((iban, " ".join(iban[start : start + 4] for start in range(0, len(iban), 4))))


def _ssn(chance: random.Random, locale: str) -> str:
    # area numbers above 772 had never been issued when their order was given up in 2011
    return f"{chance.randrange(773, 900)}-{chance.randrange(1, 100):02d}-{chance.randrange(1, 10000):04d}"


def _ip(chance: random.Random, locale: str) -> str:
    network = ipaddress.ip_network(chance.choice(_NETWORKS))
    return str(network[chance.randrange(1, network.num_addresses)])


def _mac(chance: random.Random, locale: str) -> str:
    pairs = f"00005E0053{chance.randrange(256):02X}"  # RFC 7042: for documentation
    separator = chance.choice((":", "-"))
    return chance.choice((str.upper, str.lower))(separator.join(pairs[n : n + 2] for n in range(0, 12, 2)))


def _url(chance: random.Random, locale: str) -> str:
    user = _user(chance)
    return chance.choice((
        f"https://{user}:secret@example.org/photos",
        f"https://example.com/~{user}/cat.html",
        f"https://www.example.org/users/{user}",
        f"https://example.net/@{user}",
    ))  # fmt: skip


def _gps(chance: random.Random, locale: str) -> str:
    latitude, longitude = chance.uniform(-60, 60), chance.uniform(-180, 180)
    north, east = "NS"[latitude < 0], "EW"[longitude < 0]

    def sexagesimal(degrees: float) -> str:
        seconds = round(abs(degrees) * 3600)
        return f"{seconds // 3600}°{seconds // 60 % 60:02d}'{seconds % 60:02d}\""

    return chance.choice((
        f"{latitude:.5f}, {longitude:.5f}",
        f"{abs(latitude):.4f}° {north}, {abs(longitude):.4f}° {east}",
        f"{sexagesimal(latitude)}{north} {sexagesimal(longitude)}{east}",
    ))  # fmt: skip


def _home_path(chance: random.Random, locale: str) -> str:
    user = _user(chance)
    return chance.choice((
        f"/home/{user}/pictures/cat.png", f"/Users/{user}/Desktop", rf"C:\Users\{user}\Documents\cat.svg",
        f"/home/{user}", f"file:///home/{user}/drawing.svg",
    ))  # fmt: skip


def _username(chance: random.Random, locale: str) -> str:
    return f"@{_user(chance)}"


def _born(chance: random.Random) -> str:
    return f"{chance.randrange(50, 100)}{chance.randrange(1, 13):02d}{chance.randrange(1, 29):02d}"


def _itin(chance: random.Random) -> str:
    return f"9{_digits(chance, '##')}-{chance.randrange(70, 89)}-{_digits(chance, '####')}"


def _nir(chance: random.Random) -> str:
    form = f"{chance.choice('12')}{_born(chance)[:4]}75######"
    nir = _checked(chance, "fr.nir", form, (f"{tail:02d}" for tail in range(1, 98)))
    return chance.choice((nir, _grouped(nir, " ", 1, 2, 2, 2, 3, 3)))


def _codice_fiscale(chance: random.Random) -> str:
    born, place = _born(chance), f"{chance.choice('ABCDEFGH')}###"
    form = f"{_letters(chance, 6)}{born[:2]}{chance.choice('ABCDEHLMPRST')}{born[4:]}{place}"
    return _checked(chance, "it.codicefiscale", form, string.ascii_uppercase)


def _cpf(chance: random.Random) -> str:
    cpf = _checked(chance, "br.cpf", "#########", (f"{tail:02d}" for tail in range(100)))
    return f"{cpf[:3]}.{cpf[3:6]}.{cpf[6:9]}-{cpf[9:]}"


_IDENTITIES: Mapping[str, Callable[[random.Random], str]] = MappingProxyType({
    "en_US": _itin,
    # 999: given to nobody, for tests
    "en_GB": lambda chance: _grouped(_checked(chance, "gb.nhs", "999######", string.digits), " ", 3, 3),
    "en_AU": lambda chance: _grouped(_checked(chance, "au.tfn", "########", string.digits), " ", 3, 3),
    "en_IN": lambda chance: _grouped(_checked(chance, "in_.aadhaar", "5##########", string.digits), " ", 4, 4),
    "de_DE": lambda chance: _grouped(_checked(chance, "de.idnr", "8#########", string.digits), " ", 2, 3, 3),
    "fr_FR": _nir,
    "es_ES": lambda chance: _checked(chance, "es.dni", "########", "TRWAGMYFPDXBNJZSQVHLCKE"),
    "it_IT": _codice_fiscale,
    "nl_NL": lambda chance: _checked(chance, "nl.bsn", "########", string.digits),
    "pl_PL": lambda chance: _checked(chance, "pl.pesel", f"{_born(chance)}####", string.digits),
    "pt_BR": _cpf,
    "sv_SE": lambda chance: _checked(chance, "se.personnummer", f"{_born(chance)}-###", string.digits),
    "ja_JP": lambda chance: _checked(chance, "jp.in_", "###########", string.digits),
})  # fmt: skip


def _identity(chance: random.Random, locale: str) -> str:
    return _IDENTITIES[locale](chance)


def _plate(chance: random.Random, locale: str) -> str:
    forms = {
        "en_US": f"#{_letters(chance, 3)}###", "en_GB": f"{_letters(chance, 2)}## {_letters(chance, 3)}",
        "en_AU": f"{_letters(chance, 3)} ###", "en_IN": f"MH 1# {_letters(chance, 2)} ####",
        "de_DE": f"B-{_letters(chance, 2)} ####", "fr_FR": f"{_letters(chance, 2)}-###-{_letters(chance, 2)}",
        "es_ES": f"#### {_letters(chance, 3)}", "it_IT": f"{_letters(chance, 2)} ### {_letters(chance, 2)}",
        "nl_NL": f"{_letters(chance, 2, 'BDFGHJKLNPRSTVXZ')}-###-{_letters(chance, 1, 'BDFGHJKLNPRSTVXZ')}",
        "pl_PL": f"W{_letters(chance, 2)} #####", "pt_BR": f"{_letters(chance, 3)}#{_letters(chance, 1)}##",
        "sv_SE": f"{_letters(chance, 3)} ##{chance.choice('ABCD#')}", "ja_JP": f"{_letters(chance, 2)} ###",
    }  # fmt: skip
    return _digits(chance, forms[locale])


MAKERS: Mapping[str, Callable[[random.Random, str], str]] = MappingProxyType({
    "email": _email, "phone": _phone, "card": _card, "iban": _iban, "ssn": _ssn, "national_id": _identity, "ip": _ip,
    "mac": _mac, "url": _url, "gps": _gps, "home_path": _home_path, "username": _username, "plate": _plate,
})  # fmt: skip
