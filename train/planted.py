"""Invented personal data, planted in the demo's private half so that the filter has work whose answer is known.

Every value is of a kind nobody owns: documentation domains and addresses, telephone numbers kept for fiction, payment
networks' test prefixes, bank accounts made up and given their check digits. Deterministic in (seed, key).
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import ExifTags, Image, PngImagePlugin

_NAMES = ("ada", "bela", "chika", "dmitri", "elif", "farid", "greta", "hana", "ines", "joon", "kofi", "lena", "mira")
_SURNAMES = ("abara", "berg", "castro", "dahl", "eder", "fonseca", "grau", "holm", "ivanov", "jansen", "kaya", "lund")
_CARD_PREFIXES = (("400000", 16), ("411111", 16), ("555555", 16), ("378282", 15), ("601111", 16))
_BANKS = {"DE": ("", 18), "GB": ("NWBK", 14), "NL": ("ABNA", 10), "FR": ("", 23), "NO": ("", 11)}  # letters, digits
_NETWORKS = ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")  # RFC 5737, RFC 3849


@dataclass(frozen=True)
class Gold:
    """caption[start:end] is a planted `entity`."""

    entity: str
    start: int
    end: int


@dataclass(frozen=True)
class Planted:
    """A caption with what was planted in it, and the name and address for the image's metadata, if any."""

    caption: str = field(repr=False)
    gold: tuple[Gold, ...]
    author: str | None = field(repr=False)


def plant(caption: str, seed: int, key: str) -> Planted:
    """Half of the captions gain one entity or two; one image in five gains an author."""
    chance = random.Random(f"{seed}:{key}")
    entities = chance.sample(sorted(_MAKERS), chance.choice((1, 2))) if chance.random() < 0.5 else []
    gold: list[Gold] = []
    for entity in entities:
        phrase, make = _MAKERS[entity]
        value = make(chance)
        caption += f", {phrase} "
        gold.append(Gold(entity, len(caption), len(caption) + len(value)))
        caption += value
    author = f"{_full_name(chance)} <{_email(chance)}>" if chance.random() < 0.2 else None
    return Planted(caption, tuple(gold), author)


def author_metadata(author: str) -> tuple[PngImagePlugin.PngInfo, Image.Exif]:
    """A PNG's text chunk and EXIF block that name an author and a place in the open sea."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", author)
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = author
    exif.get_ifd(ExifTags.IFD.GPSInfo).update({1: "N", 2: (0.0, 0.0, 0.0), 3: "E", 4: (0.0, 0.0, 0.0)})
    return text, exif


def _full_name(chance: random.Random) -> str:
    return f"{chance.choice(_NAMES).title()} {chance.choice(_SURNAMES).title()}"


def _email(chance: random.Random) -> str:
    name = chance.choice((".", "_", "-", "")).join((chance.choice(_NAMES), chance.choice(_SURNAMES)))
    return f"{name}{chance.choice(('', chance.randrange(100)))}@example.{chance.choice(('com', 'org', 'net'))}"


def _phone(chance: random.Random) -> str:
    area, line = chance.randrange(201, 990), f"555-01{chance.randrange(100):02d}"
    return chance.choice((f"({area}) {line}", f"{area}-{line}", f"+1 {area} {line.replace('-', ' ')}", line))


def _card(chance: random.Random) -> str:
    prefix, length = chance.choice(_CARD_PREFIXES)
    body = prefix + _digits(chance, length - 1 - len(prefix))
    total = sum(sum(divmod(int(digit) * (2 if place % 2 == 0 else 1), 10)) for place, digit in enumerate(body[::-1]))
    number = f"{body}{-total % 10}"
    return chance.choice(("", " ", "-")).join(number[start : start + 4] for start in range(0, length, 4))


def _iban(chance: random.Random) -> str:
    country = chance.choice(sorted(_BANKS))
    letters, digits = _BANKS[country]
    account = letters + _digits(chance, digits)
    check = 98 - int("".join(str(int(character, 36)) for character in f"{account}{country}00")) % 97
    iban = f"{country}{check:02d}{account}"
    return chance.choice(("", " ")).join(iban[start : start + 4] for start in range(0, len(iban), 4))


def _ssn(chance: random.Random) -> str:
    # area numbers above 772 had never been issued when their order was given up in 2011
    return f"{chance.randrange(773, 900)}-{chance.randrange(1, 100):02d}-{chance.randrange(1, 10000):04d}"


def _ip(chance: random.Random) -> str:
    network = ipaddress.ip_network(chance.choice(_NETWORKS))
    return str(network[chance.randrange(1, network.num_addresses)])


def _digits(chance: random.Random, count: int) -> str:
    return "".join(chance.choices("0123456789", k=count))


_MAKERS: dict[str, tuple[str, Callable[[random.Random], str]]] = {
    "email": ("write to", _email),
    "phone": ("call", _phone),
    "card": ("paid with card", _card),
    "iban": ("refund to", _iban),
    "ssn": ("social security number", _ssn),
    "ip": ("uploaded from", _ip),
}
