"""Sentences with persons and addresses in known places, and without: what the tagger of names learns from.

A sentence is a function of (corpus, chance). Templates are split as the pools are: those held out are trained on never.
"""

from __future__ import annotations

import random
import re
import string
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from privacy.pii.names_plain import CAPTIONS, LISTS, NUMBERS, THINGS
from privacy.pii.names_pools import Pools, open_pools
from privacy.pii.names_templates import ADDRESSES, PERSONS, PLAIN, WORDS
from privacy.pii.values import LOCALES, MAKERS

HELD_OUT = 7  # one template in so many

_KINDS: Mapping[str, float] = MappingProxyType({"person": 40, "address": 20, "plain": 40})
_REGIONS: Mapping[str, float] = MappingProxyType({
    "english": 9, "german": 2, "dutch": 1, "french": 2, "italian": 1.5, "nordic": 2.5, "spanish": 3, "portuguese": 1.5,
    "polish": 2.5, "romanian": 1.5, "russian": 2.5, "greek": 0.7, "indian": 2.5, "arabic": 2, "indonesian": 1,
    "african": 2, "japanese": 1, "chinese": 2, "korean": 1.5, "native": 1, "ideographic": 0.6,
})  # fmt: skip
_OTHERS = (  # what may stand where a name is expected
    "noun", "city", "country", "org", "brand", "person_word", "job", "word", "phrase", "common", "nationality",
        "symbol", "headline", "np", "thing",
)  # fmt: skip

# f, m, l: given, middle and family name; F, M, L: their initials
_FORMS: Mapping[str, float] = MappingProxyType({
    "{f} {l}": 56, "{f} {M}. {l}": 6, "{f} {m} {l}": 6, "{F}. {l}": 4, "{F}.{M}. {l}": 1, "{F} {l}": 1, "{l}, {f}": 3,
    "{l} {f}": 2, "{f}-{m} {l}": 2, '{f} "{m}" {l}': 2, "{f} {L}.": 1, "{f}": 10, "{l}": 6,
})  # fmt: skip
_RECORDS = 0.12  # of sentences are fields side by side
# slot -> how often a field of a record holds it: what is nobody's, and all
_NOBODYS: Mapping[str, float] = MappingProxyType({
    "phone": 5, "email": 3, "national_id": 5, "iban": 2, "ssn": 1, "card": 1, "plate": 1, "url": 1, "date": 4,
    "year": 1, "n": 3, "code": 4, "org": 3, "job": 2, "np": 3, "noun": 1, "thing": 2, "headline": 1,
})  # fmt: skip
_FIELDS = MappingProxyType({**_NOBODYS, "person": 12, "first": 2, "address": 8, "street": 3})
_ADDRESS_LAST = 0.75  # of records: what follows an address is mostly more of it
_JOINTS = (", ", ", ", ", ", ", ", " - ", " | ", "; ", " / ", "\n", "\t", " ", ",", ": ")
_LEADS = (
    "contact", "from", "to", "by", "owner", "sender", "for", "name", "delivered to", "ship to", "property of", "with",
    "registered to", "return to", "found by", "ask", "sold to", "sent by", "attn.", "c/o", "written on it",
    "belongs to",
)  # fmt: skip
_IN_CAPTIONS = 0.5  # of sentences with a name where none is meant
_NUMBERED = 0.8  # of streets alone: without a number, most of what might be one is a person
_FAMILY_FIRST = ("chinese", "korean", "japanese", "indonesian", "romanian")
# region -> how often its family names have more parts, and how; l, k: family names
_PARTS: Mapping[str, tuple[float, tuple[str, ...]]] = MappingProxyType({
    "spanish": (0.5, ("{l} {k}", "{l} {k}", "{l} y {k}", "de {l}", "de la {l}", "del {l}", "{l} de {k}")),
    "portuguese": (0.5, ("{l} {k}", "da {l}", "dos {l}", "de {l}", "{l} da {k}", "{l} e {k}")),
    "dutch": (0.15, ("van {l}", "de {l}", "van der {l}", "van den {l}", "ten {l}", "{l}-{k}")),
    "german": (0.15, ("von {l}", "zu {l}", "von der {l}", "{l}-{k}")),
    "french": (0.15, ("de {l}", "du {l}", "le {l}", "{l}-{k}")),
    "arabic": (0.25, ("al-{l}", "Al {l}", "El {l}", "bin {l}", "ben {l}", "ibn {l}", "Abu {l}")),
})  # fmt: skip
_ANYWHERE = (0.08, ("{l}-{k}", "{l} {k}", "{l} {k}"))


@dataclass(frozen=True)
class _Streets:
    """How a region writes a house number, after the street by one of `joints` or before it, and its postal codes."""

    joints: tuple[str, ...] = (" ",)
    number_first: bool = False
    codes: tuple[str, ...] = ("#####", "####")  # of digits and letters (@)
    doors: tuple[str, ...] = ("a", "b", "c", "A", "B", "/2", "/14", "-3", " bis", "D", "/31", "/7")
    often: float = 0.15  # has a house number a door


_STREETS: Mapping[str, _Streets] = MappingProxyType({
    "english": _Streets(
        (" ", " ", " ", ", "), True,
        ("#####", "#####", "#####-####", "@@# #@@", "@# #@@", "@@## #@@", "@#@ #@#", "####", "######"),
    ),
    "german": _Streets(),
    "dutch": _Streets(codes=("#### @@", "####@@")),
    "nordic": _Streets(codes=("####", "### ##", "#####")),
    "french": _Streets((" ", ", "), True),
    "spanish": _Streets(
        (", ", " ", " nº ", ", nº ", " # "), doors=("A", " bis", ", 3º A", ", 1º izq.", ", 5º dcha.", "-45")
    ),
    "portuguese": _Streets((", ", " ", ", nº "), codes=("####-###", "#####-###")),
    "italian": _Streets((", ", " ")),
    "polish": _Streets(codes=("##-###", "### ##")),
    "romanian": _Streets(),
    "russian": _Streets((", ", ", d. ", " "), codes=("######",), doors=("a", "/2", ", kv. 12", ", kv. 7")),
    "native": _Streets((", ", ", д. ", " "), codes=("######", "#####"), doors=("а", "/2", ", кв. 12", ", кв. 7")),
    "japanese": _Streets(number_first=True, codes=("###-####",), doors=("-2-11", "-14-3", "-7"), often=0.9),
    "ideographic": _Streets(("",), codes=("######", "###-####"), doors=("号", "號", "番地", "-2"), often=0.9),
    "chinese": _Streets(number_first=True, codes=("######",)),
})  # fmt: skip


@dataclass
class Sentence:
    """A text, and the (entity, start, end) of what is in it."""

    text: str = ""
    spans: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])

    def add(self, text: str, entity: str | None = None) -> None:
        """Go on with `text`, which is an `entity`."""
        if entity and text:
            self.spans.append((entity, len(self.text), len(self.text) + len(text)))
        self.text += text


class Corpus:
    """Sentences of one side of the split: templates and pools to train with, or those held out."""

    def __init__(self, held_out: bool) -> None:
        self.pools: Pools = open_pools(held_out)
        self.templates = {
            kind: [_parted(line) for line in block.strip().split("\n") if (_place(line) % HELD_OUT == 0) == held_out]
            for kind, block in (
                ("person", PERSONS),
                ("address", ADDRESSES),
                ("plain", PLAIN + CAPTIONS + NUMBERS + THINGS),
                ("captions", CAPTIONS),
            )
        }

    def sentence(self, chance: random.Random, kind: str | None = None, as_meant: bool = False) -> Sentence:
        """A sentence of a kind: "person", "address" or "plain"; by default any.

        as_meant: of a template as it stands; otherwise some have names out of place, or what is none in theirs.
        """
        kind = kind or _weighted(chance, _KINDS)
        region = _weighted(chance, _REGIONS)
        sentence = Sentence()
        case = _case(chance)
        style = 1.0 if as_meant else chance.random()
        if style < 0.1 and kind != "plain":
            self._scatter(chance, region, kind, sentence)
        elif style < 0.35:
            self._write(chance, region, self._exchanged(chance, kind), sentence)
        else:
            recorded = chance.random() < _RECORDS
            template = self._record(chance, kind) if recorded else chance.choice(self.templates[kind])
            self._write(chance, region, template, sentence)
        if chance.random() < 0.08:
            sentence.add(chance.choice((". ", " ", ", ", "\n", "; ", " - ")))
            self._write(chance, region, chance.choice(self.templates["plain"]), sentence)
        cased = case(sentence.text)
        if len(cased) == len(sentence.text):  # what capitals lengthen (ß) stays as it is
            sentence.text = cased
        return sentence

    def _exchanged(self, chance: random.Random, kind: str) -> Sequence[str]:
        """A template with a name where none is meant, or, of those that are `plain`, none where one is meant.

        So that what surrounds a name never settles what it is.
        """
        if kind == "plain":
            template = list(chance.choice(self.templates[chance.choice(("person", "person", "address"))]))
            names = ("person", "first", "last", "address", "street")
            exchanged = [place for place in range(1, len(template), 2) if template[place] in names]
        else:
            captions = chance.random() < _IN_CAPTIONS
            template = list(chance.choice(self.templates["captions" if captions else "plain"]))
            there = [place for place in range(1, len(template), 2) if template[place] in _OTHERS]
            exchanged = there and [there[0] if chance.random() < 0.5 else chance.choice(there)]
        given = {"plain": _OTHERS, "person": ("person", "first", "last"), "address": ("address", "street")}[kind]
        for place in exchanged:
            template[place] = chance.choice(given)
        return template

    def _record(self, chance: random.Random, kind: str) -> Sequence[str]:
        """A template of a label or of a list's line: nothing but the fields themselves says where each of them ends."""
        weights = _NOBODYS if kind == "plain" else _FIELDS
        slots = [_weighted(chance, weights) for _ in range(chance.randint(1, 4))]
        named = {"person": ("person", "person", "person", "first", "last"), "address": ("address", "street")}
        slots.insert(
            0 if chance.random() < 0.6 else chance.randrange(len(slots) + 1), chance.choice(named.get(kind, slots))
        )
        if chance.random() < _ADDRESS_LAST:
            slots.sort(key=lambda slot: slot in ("address", "street"))
        lead = ""
        if chance.random() < 0.5:
            lead = chance.choice(_LEADS) + chance.choice((": ", " ", " "))
        template = [lead]
        if chance.random() < 0.4:
            template = ["", "np", chance.choice((", ", ": ", " - ", ". ", " ", "\n")) + lead]
        joint = chance.choice(_JOINTS)
        for slot in slots:
            other = chance.choice(_JOINTS) if chance.random() < 0.15 else joint
            template += [slot, other]
        template[-1] = chance.choice(("", "", "", "."))
        return template

    def noun_phrase(self, chance: random.Random) -> str:
        """What an ordinary caption shows: an article or its like, or none, and a noun with adjectives or without."""
        noun = self.pools.everyday(chance, "noun")
        if chance.random() < 0.25:
            noun = f"{self.pools.everyday(chance, 'noun')} {noun}"
        if chance.random() < 0.35:
            noun = f"{self.pools.everyday(chance, 'adj')} {noun}"
        start = chance.choice(LISTS["determiners"]) if chance.random() < 0.8 else ""
        many = start.endswith((" of", "few", "many", "two", "three", "four", "five", "some", "several")) or not start
        noun = _many(noun) if many and chance.random() < 0.8 else noun
        if start == "a" and noun[0] in "aeiou":
            start = "an"
        return f"{start} {noun}".lstrip()

    def _scatter(self, chance: random.Random, region: str, kind: str, sentence: Sentence) -> None:
        """A name among words that say nothing of it."""
        words = chance.choice(("word", "word", "phrase", "common"))
        name = chance.choice(("person", "person", "first") if kind == "person" else ("address", "address", "street"))
        for number, slot in enumerate([*[words] * chance.randint(0, 4), name, *[words] * chance.randint(0, 4)]):
            sentence.add(chance.choice((" ", " ", " ", ", ", ": ", " - ")) if number else "")
            self._put(chance, region, slot, sentence)

    def _write(self, chance: random.Random, region: str, template: Sequence[str], sentence: Sentence) -> None:
        for position, part in enumerate(template):
            if position % 2:
                self._put(chance, region, part, sentence)
            else:
                sentence.add(part)

    def _put(self, chance: random.Random, region: str, slot: str, sentence: Sentence) -> None:
        if slot == "person":
            self._person(chance, region, sentence)
        elif slot in ("first", "last"):
            pool = self.pools.regions[region]
            sentence.add(pool.given(chance) if slot == "first" else pool.family(chance), "person")
        elif slot == "address":
            sentence.add(self.address(chance, region), "address")
        elif slot == "street":
            sentence.add(self.street(chance, region, numbered=chance.random() < _NUMBERED), "address")
        elif slot in MAKERS:
            sentence.add(MAKERS[slot](chance, chance.choice(LOCALES)))
        elif slot in ("noun", "adj", "adverb", "verb"):
            word = self.pools.word(chance, slot)
            sentence.add(f"{word}s" if slot == "noun" and word[-1] != "s" and chance.random() < 0.1 else word)
        else:
            sentence.add(_FILLERS[slot](self, chance, region))

    # --- persons ---

    def _person(self, chance: random.Random, region: str, sentence: Sentence) -> None:
        """A person as one is named in that region; a title before the name is no part of it, what follows it is."""
        pool = self.pools.regions[region]
        given, middle, family, other = (name(chance) for name in (pool.given, pool.given, pool.family, pool.family))
        if region == "ideographic":
            sentence.add(family + given, "person")
            return
        often, parts = _PARTS.get(region, _ANYWHERE)
        if chance.random() < often:
            family = chance.choice(parts).format(l=family, k=other)
        titled = chance.random() < 0.1
        form = _weighted(chance, _FORMS)
        if region in _FAMILY_FIRST and chance.random() < 0.4:
            form = "{l} {f}"
        elif titled and chance.random() < 0.5:
            form = "{l}"
        name = form.format(f=given, m=middle, l=family, F=given[0], M=middle[0], L=family[0])
        if chance.random() < 0.02:
            name = name.replace(" ", "_")
        if chance.random() < 0.03 and not titled:
            name += chance.choice((" ", ", ")) + chance.choice(WORDS["suffixes"])
        sentence.add(f"{chance.choice(WORDS['titles'])} " if titled else "")
        sentence.add(name, "person")

    # --- addresses ---

    def street(self, chance: random.Random, region: str, numbered: bool = True) -> str:
        """A street by the region's customs, with a house number or without."""
        if region not in _STREETS or chance.random() < 0.1:
            region = "english"
        customs = _STREETS[region]
        if region == "english":
            street = self._english_street(chance, region)
        else:
            street = chance.choice(WORDS[f"{region}_ways"]).format(self._street_name(chance, region))
        if not numbered:
            return street
        number = str(chance.randint(1, chance.choice((9, 399, 399, 399, 399, 29999 if region == "english" else 99))))
        if chance.random() < customs.often:
            number += chance.choice(customs.doors)
        joint = chance.choice(customs.joints)
        return f"{number}{joint}{street}" if customs.number_first else f"{street}{joint}{number}"

    def _english_street(self, chance: random.Random, region: str) -> str:
        name = chance.choice(WORDS["streets"]) if chance.random() < 0.45 else self._street_name(chance, region)
        style = chance.random()
        if style < 0.12:
            nth = chance.randint(1, 150)
            name = f"{nth}{'th' if 10 < nth % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(nth % 10, 'th')}"
        elif style < 0.24:
            name = f"{name} {chance.choice(WORDS['streets'])}"
        way = chance.choice(WORDS["ways"][:21] if chance.random() < 0.75 else WORDS["ways"])  # the frequent ones first
        street = f"{name} {way}"
        if chance.random() < 0.15:
            street = chance.choice(
                ("N {}", "S {}", "E. {}", "North {}", "South {}", "West {}", "{} NW", "{} East")
            ).format(street)
        return street

    def _street_name(self, chance: random.Random, region: str) -> str:
        pool = self.pools.regions[region]
        own = [pool.streets] * 3 if len(pool.streets) > 20 else []
        return chance.choice(chance.choice([pool.last, pool.last, pool.first, *own]))

    def address(self, chance: random.Random, region: str) -> str:
        """An address, from a street with its number to all of it; or a box, or a postal code with its place."""
        place, code = self._town(chance, region), self._postal_code(chance, region)
        if chance.random() < 0.15 and len(place.upper()) == len(place):
            place = place.upper()
        style = chance.random()
        if style < 0.06:
            return self._box(chance, place, code)
        if style < 0.11:
            return chance.choice(
                (f"{code} {place}", f"{place} {code}", f"{place}, {chance.choice(WORDS['states'])} {code}")
            )
        street = self.street(chance, region)
        if style > 0.98:
            return (
                f"{chance.choice(('the corner of', 'corner of', 'corner'))} {street} and {self.street(chance, region)}"
            )
        if chance.random() < 0.06:  # a door's number before a street's own
            street = f"{chance.randint(1, 99999):0{chance.randint(1, 5)}} {street}"
        if chance.random() < 0.18:
            flat = chance.choice(WORDS["flats"]).format(
                f"{chance.randint(1, 990)}{chance.choice(('', '', '', 'A', 'B', 'C'))}"
            )
            street = chance.choice((f"{flat}, {street}", f"{street}, {flat}", f"{street} {flat}", f"{street} {flat}"))
        if style < 0.45:
            return street
        joint = chance.choice((", ", ", ", ", ", "\n", " ", " - ", ",\n", "; "))
        return f"{street}{joint}{place if style < 0.55 else self._end(chance, region, place, code)}"

    def _box(self, chance: random.Random, place: str, code: str) -> str:
        one, other = chance.randint(1, 9999), chance.randint(1, 9999)
        if chance.random() < 0.6:
            return f"{chance.choice(WORDS['boxes'])} {one}, {place} {code}"
        joint, post, region = (
            chance.choice((", ", "\n")),
            chance.choice(("APO", "FPO", "DPO")),
            chance.choice(("AE", "AP", "AA")),
        )
        return f"{chance.choice(WORDS['military_boxes']).format(one, other)}{joint}{post} {region} {code[:5]}"

    def _end(self, chance: random.Random, region: str, place: str, code: str) -> str:
        state = chance.choice(WORDS["states"] if chance.random() < 0.6 else WORDS["state_names"])
        end = chance.choice(
            (f"{place}, {state} {code}", f"{place} {state} {code}", f"{place} {code}", f"{place}, {code}",
                f"{place}, {state}",
             f"{place}\n{state}\n{code}", f"{place}-{code}")
            if region in ("english", "african", "indian") or chance.random() < 0.1
            else (f"{code} {place}", f"{code} {place}", f"{place} {code}", f"{code}, {place}", f"{place}, {code}",
                f"{code}\n{place}")
        )  # fmt: skip
        if chance.random() < 0.2:
            end += chance.choice((", ", " ", "\n")) + chance.choice(self.pools.countries)
            end += f" {code}" if chance.random() < 0.2 and code not in end else ""
        if chance.random() < 0.1:
            end = end.replace(", ", "\n").replace(" ", chance.choice((" ", "  ", "\n ")), 1)
        return end

    def _town(self, chance: random.Random, region: str) -> str:
        """A place that there is, or one named after somebody."""
        pool = self.pools.regions[region]
        if len(pool.cities) > 4 and chance.random() < 0.7:
            return chance.choice(pool.cities)
        name = chance.choice(self.pools.regions["english"].last) + chance.choice(WORDS["after_places"])
        return f"{chance.choice(WORDS['before_places'])} {name}" if chance.random() < 0.5 else name

    def _postal_code(self, chance: random.Random, region: str) -> str:
        form = chance.choice(_STREETS.get(region, _STREETS["english"]).codes)
        return re.sub(
            "[#@]", lambda sign: chance.choice(string.digits if sign[0] == "#" else string.ascii_uppercase), form
        )

    # --- what is nobody's ---

    def city(self, chance: random.Random, region: str) -> str:
        """A place, which alone is no address."""
        return self._town(chance, region if chance.random() < 0.5 else "english")

    def organisation(self, chance: random.Random) -> str:
        """An organisation, without a person's name in it for the most part."""
        noun, adj = self.pools.word(chance, "noun").title(), self.pools.word(chance, "adj").title()
        letters = "".join(chance.choices(string.ascii_uppercase, k=3))
        town = self._town(chance, "english")
        head = chance.choice(
            (noun, chance.choice(WORDS["brands"]), self.invented(chance).title(), town, f"{adj} {noun}", letters)
        )
        return f"{head} {chance.choice(WORDS['companies'])}" if chance.random() < 0.75 else head

    def headline(self, chance: random.Random) -> str:
        """A title of a work, each word with a capital."""
        noun, other, adj, verb, word = (
            self.pools.word(chance, kind) for kind in ("noun", "noun", "adj", "verb", "any")
        )
        title = chance.choice((
            f"the {adj} {noun}", f"{noun} of the {other}", f"a {noun} for the {other}", f"{verb} me {word}",
                f"{adj} {noun}",
            f"{noun} and {other}", f"{verb} the {noun}", f"{word} {noun}", f"how to {verb} a {noun}",
                f"the {noun}", noun,
            f"{adj} {other} {noun}", f"{word} to {word}", f"the {noun}'s {other}", self.pools.phrase(chance, 5),
        ))  # fmt: skip
        return _titled(title)

    def namesake(self, chance: random.Random, region: str) -> str:
        """A name that things bear."""
        pool = self.pools.regions[region if chance.random() < 0.5 else "english"]
        return pool.family(chance) if chance.random() < 0.75 else pool.given(chance)

    def invented(self, chance: random.Random) -> str:
        """A word that there is not, as brands are."""
        return "".join(chance.choices(WORDS["syllables"], k=chance.randint(2, 3))) + chance.choice(
            ("", "", "n", "x", "r", "s")
        )


_CODE = string.ascii_uppercase + string.digits * 2


def _listed(kind: str) -> Callable[[Corpus, random.Random, str], str]:
    return lambda _, chance, __: chance.choice(WORDS[kind])


_FILLERS: Mapping[str, Callable[[Corpus, random.Random, str], str]] = MappingProxyType({
    "ving": lambda corpus, chance, _: _ving(corpus.pools.word(chance, "verb")),
    "word": lambda corpus, chance, _: _inflected(
        chance, corpus.pools.word(chance, chance.choice(("noun", "noun", "adj", "verb", "adverb", "any", "any")))
    ),
    "common": lambda corpus, chance, _: corpus.pools.word(chance, "any"),
    "prose": lambda corpus, chance, _: corpus.pools.phrase(chance, 99),
    "phrase": lambda corpus, chance, _: corpus.pools.phrase(chance, chance.randint(1, 8)),
    "headline": lambda corpus, chance, _: corpus.headline(chance),
    "city": lambda corpus, chance, region: corpus.city(chance, region),
    "country": lambda corpus, chance, _: chance.choice(corpus.pools.countries),
    "symbol": lambda corpus, chance, _: chance.choice(corpus.pools.symbols),
    "org": lambda corpus, chance, _: corpus.organisation(chance),
    "brand": lambda corpus, chance, _: chance.choice((*WORDS["brands"], corpus.invented(chance).title())),
    "handle": lambda corpus, chance, _: f"{corpus.invented(chance)}{chance.randint(1, 99)}",
    "latin": lambda corpus, chance, _: corpus.invented(chance).title() + chance.choice(("us", "a", "um", "is", "ea")),
    "latin_small": lambda corpus, chance, _: corpus.invented(chance) + chance.choice(("us", "a", "um", "is", "ensis")),
    "person_word": _listed("people"), "nationality": _listed("nationalities"), "job": _listed("jobs"),
    "title": _listed("titles"),
    "np": lambda corpus, chance, _: corpus.noun_phrase(chance),
    "pp": lambda corpus, chance, _: f"{chance.choice(LISTS['prepositions'])} {corpus.noun_phrase(chance)}",
    "verbs": lambda corpus, chance, _: _many(corpus.pools.everyday(chance, "verb")),
    "done": lambda corpus, chance, _: chance.choice(LISTS["participles"]),
    "thing": lambda _, chance, __: chance.choice(LISTS["things"]),
    "namesake": lambda corpus, chance, region: corpus.namesake(chance, region),
    "made": lambda _, chance, __: chance.choice(LISTS["made"]),
    "species": lambda _, chance, __: chance.choice(LISTS["species"]),
    "building": lambda _, chance, __: chance.choice(LISTS["building"]),
    "unit": lambda _, chance, __: chance.choice(LISTS["units"]),
    "label": lambda _, chance, __: _capital(chance, chance.choice(LISTS["labels"])),
    "shout": lambda _, chance, __: chance.choice(LISTS["shouts"]),
    "noun_time": _listed("times"), "person_tail": _listed("tails"),
    "letter": lambda _, chance, __: chance.choice(string.ascii_uppercase),
    "n": lambda _, chance, __: str(chance.randint(1, 100 if chance.random() < 0.7 else 5000)),
    "year": lambda _, chance, __: str(chance.randint(1800, 2030)),
    "code": lambda _, chance, __: "".join(chance.choices(_CODE, k=chance.randint(3, 9))),
    "date": lambda _, chance, __: _date(chance),
})  # fmt: skip


def _place(line: str) -> int:
    return zlib.crc32(line.encode())


def _parted(line: str) -> Sequence[str]:
    """Literal, slot, literal, ..."""
    return re.split(r"\{(\w+)\}", line.replace("\\n", "\n").replace("\\t", "\t"))


def _weighted(chance: random.Random, weights: Mapping[str, float]) -> str:
    return chance.choices(list(weights), list(weights.values()))[0]


def _inflected(chance: random.Random, word: str) -> str:
    return word if chance.random() < 0.6 else word.rstrip("e") + chance.choice(("s", "ed", "er", "es", "ing", "'s"))


def _ving(verb: str) -> str:
    if verb.endswith("e") and not verb.endswith("ee"):
        return verb[:-1] + "ing"
    doubled = len(verb) < 6 and re.search("[^aeiou][aeiou][bdgmnpt]$", verb)
    return f"{verb}{verb[-1] if doubled else ''}ing"


def _many(word: str) -> str:
    """A noun's plural, or a verb's third person."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    return f"{word[:-1]}ies" if re.search("[^aeiou]y$", word) else f"{word}s"


def _capital(chance: random.Random, word: str) -> str:
    return word[0].upper() + word[1:] if chance.random() < 0.4 else word


def _date(chance: random.Random) -> str:
    day, month, year = chance.randint(1, 28), chance.choice(WORDS["months"]), chance.randint(1930, 2030)
    number = day % 12 + 1
    return chance.choice((
        f"{day} {month} {year}", f"{month} {day}, {year}", f"{day:02}.{number:02}.{year}",
        f"{year}-{number:02}-{day:02}",
        f"{number}/{day}/{year % 100:02}", f"{month} {year}", month,
    ))  # fmt: skip


def _case(chance: random.Random) -> Callable[[str], str]:
    """As it is written mostly; or in small letters, in capitals, or with a capital to all words or to some."""
    style = chance.random()
    if style < 0.5:
        return str
    if style < 0.6:
        return lambda text: text[:1].upper() + text[1:]
    if style < 0.76:
        return str.lower
    if style < 0.84:
        return str.upper
    share = 1.0 if style < 0.92 else chance.random()
    return lambda text: _titled(text, lambda: chance.random() < share)


def _titled(text: str, capital: Callable[[], bool] = lambda: True) -> str:
    return re.sub(r"(?<!['’])[^\W\d_]+", lambda word: word[0][0].upper() + word[0][1:] if capital() else word[0], text)
