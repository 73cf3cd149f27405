import random

import pytest

from privacy.pii.patterns import ENTITIES, detect
from privacy.pii.values import ANNOUNCEMENTS, LOCALES, MAKERS


def test_there_is_a_maker_for_every_entity_of_the_patterns() -> None:
    assert set(MAKERS) == set(ENTITIES)
    assert all(set(by_locale) <= set(LOCALES) for by_locale in ANNOUNCEMENTS.values())


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("entity", MAKERS)
def test_each_value_is_found_as_what_it_was_made_for(entity: str, locale: str) -> None:
    chance = random.Random(f"{entity}{locale}")
    for _ in range(20):
        value = MAKERS[entity](chance, locale)
        caption = f"a cat by the sea, {ANNOUNCEMENTS.get(entity, {}).get(locale, '')} {value}."
        start = caption.index(value)
        assert [(f.entity, f.start, f.end) for f in detect(caption)] == [(entity, start, start + len(value))]


def test_a_value_is_a_function_of_chance_and_locale() -> None:
    def values() -> list[str]:
        chance = random.Random(3)
        return [make(chance, locale) for make in MAKERS.values() for locale in LOCALES]

    before = random.getstate()
    assert values() == values() and random.getstate() == before
