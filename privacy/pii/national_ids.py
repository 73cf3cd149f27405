"""The numbers that states give to people, by country, each with its check.

Bare digits count only after a word that announces them, or in a form that hardly anything else has.
"""

from __future__ import annotations

import functools
import itertools
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from privacy.pii.folding import fold
from privacy.pii.numbers import CERTAIN, GUESSED, LIKELY, Found, package

_SSN = re.compile(r"(?<!\d)(?<!\d-)(?!000|666|9)\d{3}([ -])(?!00)\d\d\1(?!0000)\d{4}(?!\d|-\d)")
_SSN_ANNOUNCED = re.compile(
    r"(?<![^\W_])(?:ssn|social security|soc\.? sec)(?!\w)[^\d\n]{0,24}"
    r"((?!000|666|9)\d{3}[ .-]{0,3}(?!00)\d\d[ .-]{0,3}(?!0000)\d{4})(?!\d)",
    re.IGNORECASE,
)


def ssns(text: str) -> Iterator[Found]:
    """Social security numbers of the United States. Source: SSA, POMS RM 10201.035: 000, 666, 9xx, 00, 0000 are not."""
    for match in _SSN.finditer(text):
        yield *match.span(), LIKELY if match[1] == "-" else GUESSED


def announced_ssns(text: str) -> Iterator[Found]:
    """The same however they are spaced, after a word that says so."""
    for match in _SSN_ANNOUNCED.finditer(text):
        yield *match.span(1), CERTAIN


@dataclass(frozen=True, slots=True)
class NationalId:
    """A number that python-stdnum's module of that name checks.

    alone: shapes that tell it without a word: 9 is a digit, A a letter, X either, the rest itself.
    words: what announces it; then `alone` and `also` count however they are spaced.
    """

    alone: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


# What identifies a person, tax numbers of people included; those of companies are left out.
NATIONAL_IDS = {
    "ar.cuit": NationalId(("99-99999999-9",), words=("cuit", "cuil")),
    "ar.dni": NationalId((), ("99999999", "9999999"), ("dni",)),
    "at.vnr": NationalId(("9999 999999",), words=("svnr", "versicherungsnummer", "sozialversicherung")),
    "au.tfn": NationalId((), ("999999999", "99999999"), ("tfn", "tax file number")),
    "be.nn": NationalId(("99.99.99-999.99",), words=("rijksregister", "registre national", "insz", "niss", "nrn")),
    "bg.egn": NationalId((), ("9999999999",), ("egn", "егн")),
    "br.cpf": NationalId(("999.999.999-99",), words=("cpf",)),
    "ca.sin": NationalId((), ("999999999",), ("sin", "social insurance", "nas", "assurance sociale")),
    "ch.ssn": NationalId(("999.9999.9999.99",), words=("ahv", "avs", "avs-nr")),
    "cl.rut": NationalId(("99.999.999-X", "9.999.999-X", "99999999-X"), words=("rut", "run")),
    "cn.ric": NationalId(("99999999999999999X",), words=("身份证", "id card")),
    "cu.ni": NationalId((), ("99999999999",), ("carné de identidad", "carne de identidad")),
    "cz.rc": NationalId(("999999/9999", "999999/999"), words=("rodné číslo", "rodne cislo", "rč")),
    "de.idnr": NationalId(("99 999 999 999",), words=("steuer-id", "idnr", "identifikationsnummer", "steuernummer")),
    "dk.cpr": NationalId(("999999-9999",), words=("cpr", "cpr-nummer", "personnummer")),
    "do.cedula": NationalId(("999-9999999-9",), words=("cédula", "cedula")),
    "ec.ci": NationalId((), ("9999999999",), ("cédula", "cedula")),
    "ee.ik": NationalId((), ("99999999999",), ("isikukood",)),
    "es.dni": NationalId(("99999999A", "99999999-A", "99.999.999-A"), words=("dni", "nif")),
    "es.nie": NationalId(("A9999999A", "A-9999999-A"), words=("nie",)),
    "fi.hetu": NationalId(("999999-999X", "999999+999X", "999999A999X"), words=("hetu", "henkilötunnus")),
    "fr.nif": NationalId((), ("9999999999999",), ("nif", "numéro fiscal", "spi")),
    "fr.nir": NationalId(
        ("9 99 99 9X 999 999 99", "99999X999999999"), words=("nir", "sécurité sociale", "securite sociale", "insee")
    ),
    "gb.nhs": NationalId((), ("9999999999",), ("nhs", "nhs number")),
    "gb.nino": NationalId(("AA 99 99 99 A", "AA999999A"), words=("nino", "national insurance", "ni number")),
    "gb.utr": NationalId((), ("9999999999",), ("utr", "taxpayer reference")),
    "gr.amka": NationalId((), ("99999999999",), ("amka", "αμκα")),
    "hr.oib": NationalId((), ("99999999999",), ("oib",)),
    "id.nik": NationalId((), ("9999999999999999",), ("nik", "ktp")),
    "ie.pps": NationalId(("9999999A", "9999999AA"), words=("pps", "ppsn")),
    "il.idnr": NationalId((), ("999999999", "99999999"), ("teudat zehut", "תעודת זהות", "ת.ז")),
    "in_.aadhaar": NationalId(("9999 9999 9999", "9999-9999-9999"), words=("aadhaar", "aadhar", "uid", "आधार")),
    "in_.pan": NationalId((), ("AAAAA9999A",), ("pan", "permanent account number")),
    "is_.kennitala": NationalId(("999999-9999",), words=("kennitala", "kt")),
    "it.codicefiscale": NationalId(("AAAAAA99A99A999A",), words=("codice fiscale", "cod. fisc", "cf", "c.f")),
    "jp.in_": NationalId((), ("999999999999",), ("my number", "マイナンバー", "個人番号")),
    "ke.pin": NationalId((), ("A999999999A",), ("kra", "kra pin")),
    "kr.rrn": NationalId(("999999-9999999",), words=("주민등록번호", "rrn")),
    "lt.asmens": NationalId((), ("99999999999",), ("asmens kodas", "asmens kod")),
    "mx.curp": NationalId(("AAAA999999AAAAAAX9",), words=("curp",)),
    "mx.rfc": NationalId((), ("AAAA999999XXX",), ("rfc",)),
    "my.nric": NationalId(("999999-99-9999",), words=("nric", "mykad")),
    "nl.bsn": NationalId((), ("999999999",), ("bsn", "burgerservicenummer", "sofinummer")),
    "no.fodselsnummer": NationalId(("999999 99999",), words=("fødselsnummer", "fodselsnummer", "personnummer", "fnr")),
    "nz.ird": NationalId((), ("999999999", "99999999"), ("ird",)),
    "pe.cui": NationalId((), ("99999999X", "99999999"), ("dni", "cui")),
    "pk.cnic": NationalId(("99999-9999999-9",), words=("cnic", "nadra")),
    "pl.pesel": NationalId((), ("99999999999",), ("pesel",)),
    "pt.cc": NationalId(("99999999 9 AA9", "999999999AA9"), words=("cartão de cidadão", "cartao de cidadao")),
    "pt.nif": NationalId((), ("999999999",), ("nif", "contribuinte")),
    "ro.cnp": NationalId((), ("9999999999999",), ("cnp", "cod numeric personal")),
    "ru.inn": NationalId((), ("999999999999",), ("инн", "inn")),
    "se.personnummer": NationalId(
        ("999999-9999", "99999999-9999", "999999+9999"), words=("personnummer", "personnr", "pnr", "samordningsnummer")
    ),
    "si.emso": NationalId((), ("9999999999999",), ("emšo", "emso", "jmbg")),
    "sk.rc": NationalId(("999999/9999", "999999/999"), words=("rodné číslo", "rodne cislo")),
    "th.pin": NationalId(("9-9999-99999-99-9",), words=("thai id", "เลขประจำตัวประชาชน")),
    "tr.tckimlik": NationalId((), ("99999999999",), ("tckn", "tc kimlik", "t.c. kimlik", "kimlik no")),
    "ua.rntrc": NationalId((), ("9999999999",), ("рнокпп", "іпн", "ипн", "rntrc")),
    "us.itin": NationalId(("999-99-9999",), words=("itin", "taxpayer identification")),
    "ve.rif": NationalId(("A-99999999-9",), words=("rif",)),
    "za.idnr": NationalId((), ("9999999999999",), ("sa id", "rsa id", "id number", "id no")),
}

_SHAPE = str.maketrans(string.digits + string.ascii_uppercase, "9" * 10 + "A" * 26)
_CHARACTERS = {"9": r"\d", "A": "[A-Za-z]", "X": "[A-Za-z0-9]"}


def national_ids(text: str) -> Iterator[Found]:
    """NATIONAL_IDS whose check passes, in a shape of their own."""
    alone, members = _alone()
    for match in alone.finditer(text):
        if any(checker(name)(match[0]) for name in members[match[0].translate(_SHAPE)]):
            yield *match.span(), LIKELY


def announced_national_ids(text: str) -> Iterator[Found]:
    """NATIONAL_IDS whose check passes, within 24 characters after a word that says so."""
    words, announced = _announced()
    lowered = text.replace("İ", "i").lower()  # no other character has a longer lower case
    for word in words.finditer(lowered):
        for name, value in announced[word[0]]:
            match = value.match(text, word.end())
            if match and checker(name)(re.sub(r"[ .]", "", match[1])):
                yield *match.span(1), CERTAIN


@functools.cache
def _alone() -> tuple[re.Pattern[str], dict[str, list[str]]]:
    """One expression for all shapes, and what a shape may be, its X told."""
    shapes: dict[str, list[str]] = {}
    for name, number in NATIONAL_IDS.items():
        for shape in number.alone:
            for told in {shape.replace("X", "9"), shape.replace("X", "A")}:
                shapes.setdefault(told, []).append(name)
    forms = "|".join("".join({"9": r"\d", "A": "[A-Z]"}.get(c, re.escape(c)) for c in shape) for shape in shapes)
    return re.compile(rf"(?<!\w)(?=[A-Z\d][A-Z\d. /+-]{{6}})(?<!\w[./+-])(?:{forms})(?!\w|[./+-]\w)"), shapes


@functools.cache
def _announced() -> tuple[re.Pattern[str], dict[str, list[tuple[str, re.Pattern[str]]]]]:
    by_word: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, number in NATIONAL_IDS.items():
        compact = dict.fromkeys(re.sub(r"[^0-9AX]", "", shape) for shape in (*number.alone, *number.also))
        forms = "|".join("[ ./+-]{0,2}".join(_CHARACTERS.get(c, c) for c in shape) for shape in compact)
        value = re.compile(rf"[^\n]{{0,24}}?(?<![^\W_])({forms})(?!\w)")
        for word in number.words:
            by_word.setdefault(fold(word)[0], []).append((name, value))
    # by their first letters, so that the scan looks at few of them at a place
    initials: dict[str, list[str]] = {}
    for word in sorted(by_word, key=lambda word: -len(word)):
        initials.setdefault(word[0], []).append(re.escape(word[1:]))
    words = "|".join(f"{re.escape(initial)}(?:{'|'.join(rests)})" for initial, rests in initials.items())
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)"), by_word


@functools.cache
def checker(name: str) -> Callable[[str], bool]:
    """Whether a number passes the check of that name; so does one that its module cannot judge."""
    valid: Callable[[str], bool] = _nino_valid if name == "gb.nino" else package(f"stdnum.{name}").is_valid

    def check(number: str) -> bool:
        try:
            return valid(number)
        except Exception:  # stdnum 2.2 raises KeyError for some Chinese places; an error here may hold the number
            return True

    return check


# Source: HMRC, NIM39110: letters and prefixes that are never given.
_NINO = re.compile(r"(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z](?: ?\d){6} ?[A-D]")


def _nino_valid(number: str) -> bool:
    return _NINO.fullmatch(number.upper()) is not None


def open_packages() -> str:
    """Load the packages that numbers are checked by, and give their versions. Raises MissingDetector."""
    for name in itertools.chain(NATIONAL_IDS, ("iban", "numdb")):
        if name != "gb.nino":
            package(f"stdnum.{name}")
    return f"phonenumbers-{package('phonenumbers').__version__} stdnum-{package('stdnum').__version__}"
