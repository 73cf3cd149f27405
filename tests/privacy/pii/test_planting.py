"""What detectors are measured on is what it says it is, and nothing that they were made from."""

import random
import re
from pathlib import Path

import phonenumbers
import pytest
from stdnum import iban, luhn

from privacy.pii import planting_pools, values
from privacy.pii.filter import FilterResult
from privacy.pii.planting import ENTITIES, LANGUAGES, LOCALES, GoldCaption, captions
from privacy.pii.planting_metadata import planted_images, still_shows

PII = Path(values.__file__).parent


@pytest.fixture(scope="module")
def planted() -> list[GoldCaption]:
    return captions(0, 800)


def values_of(planted: list[GoldCaption], entity: str) -> list[tuple[str, str]]:
    """Each planted value of that entity, with its locale."""
    return [(c.text[gold.start : gold.end], c.locale) for c in planted for gold in c.gold if gold.entity == entity]


def test_a_caption_is_a_function_of_seed_and_number_and_of_nothing_global(planted: list[GoldCaption]) -> None:
    before = random.getstate()
    assert captions(0, 100) == planted[:100]
    assert captions(1, 100) != planted[:100]
    assert random.getstate() == before


def test_half_of_the_captions_hold_something_and_every_entity_comes_in_every_locale(planted: list[GoldCaption]) -> None:
    assert sum(bool(caption.gold) for caption in planted) == 400
    assert {(gold.entity, c.locale) for c in planted for gold in c.gold} == {
        (entity, locale) for entity in ENTITIES for locale in LOCALES
    }
    assert len({caption.text for caption in planted}) > 650


@pytest.mark.parametrize("language", LANGUAGES)
def test_gold_is_in_order_apart_and_never_empty(language: str) -> None:
    for caption in captions(2, 200, language):
        edges = [edge for gold in caption.gold for edge in (gold.start, gold.end)]
        assert edges == sorted(edges) and len(set(edges)) == len(edges)
        assert all(any(map(str.isalnum, caption.text[gold.start : gold.end])) for gold in caption.gold)
        assert "{" not in caption.text


def test_numbers_are_what_others_take_them_for(planted: list[GoldCaption]) -> None:
    assert all(luhn.is_valid(re.sub(r"\D", "", value)) for value, _ in values_of(planted, "card"))
    assert all(iban.is_valid(re.sub(r"\W", "", value), check_country=False) for value, _ in values_of(planted, "iban"))
    orders = [number for caption in planted for number in re.findall(r"(?<!\S)\d{16}(?!\S)", caption.text)
              if not caption.gold]  # fmt: skip
    assert orders and not any(map(luhn.is_valid, orders))
    for value, locale in values_of(planted, "phone"):
        number = phonenumbers.parse(re.sub(r"^00|^\(\+", "+", value.replace("(0)", "")), locale[-2:])
        assert phonenumbers.is_possible_number(number)


def test_no_detector_is_trained_on_names_streets_or_templates_that_it_is_measured_on() -> None:
    sources = " ".join(path.read_text("utf-8") for path in sorted(PII.glob("names*.py")))
    pools = (planting_pools.GIVEN, planting_pools.SURNAMES, planting_pools.STREETS)
    names = [name for pool in pools for several in pool.values() for name in several]
    words = set(re.findall(r"[\w'-]+", sources))
    assert [name for name in names if name in (sources if " " in name else words)] == []
    templates = [template for several in planting_pools.TEMPLATES.values() for template in several]
    templates += [*planting_pools.PLAIN, *planting_pools.LOOKALIKES]
    assert [template for template in templates if template in sources] == []


def test_values_in_metadata_are_seen_where_nothing_takes_them_out() -> None:
    for planted in planted_images(0, 12):
        untouched = FilterResult("kept", None, image=planted.item.image, svg=planted.item.svg)
        hidden = [place for place, value in planted.values.items() if not still_shows(value, untouched)]
        assert hidden == [], hidden
