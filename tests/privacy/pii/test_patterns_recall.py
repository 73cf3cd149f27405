"""What the patterns find in captions of forms that they were not written from: by entity and by locale.

Run with -s for the figures.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator

import phonenumbers
import pytest

from privacy.pii.numbers import REGIONS
from privacy.pii.patterns import detect
from privacy.pii.values import ANNOUNCEMENTS, LOCALES, MAKERS

FRAMES = (
    "{}", "a boy feeds two ducks, {}, oil on canvas", "print no. 7 ({})", "sunset over the bay in 1998. {}.",
    "<p>{}</p>",
    "3 red boats; {}; 2 more", "“{}” it says on the wall", "café – {} – naïve", "* {}\nseen from above",
)  # fmt: skip
# Other spellings of a value, and what they stand in: none of them is one that the makers write.
RESPELLED = {
    "email": (
        (str.upper, "{}"), (str, "mailto:{}"), (lambda v: v.replace("@", "+news@"), "<{}>"), (lambda v: f"é{v}", "{}"),
        (lambda v: v.replace("@", " [at] ").replace(".", " [dot] "), "by {}"),
    ),
    "card": (
        (lambda v: "  ".join(v.replace(" ", "").replace("-", "")[n : n + 4] for n in range(0, 16, 4)), "{}"),
        (lambda v: v.replace("-", "–").replace(" ", "\u00a0"), "{}"), (lambda v: v.replace("-", "."), "Visa: {}"),
    ),
    "iban": (
        (str.lower, "{}"), (lambda v: v.replace(" ", "-"), "{}"), (lambda v: v.replace(" ", "\u00a0"), "IBAN:{}"),
    ),
    "ssn": (
        (lambda v: v.replace("-", " "), "{}"), (lambda v: v.replace("-", ""), "SSN: {}"), (lambda v: v.replace("-",
        "‑"), "{}"),
    ),
    "ip": ((str, "ping [{}]:8080"), (str, "{}/24"), (str.upper, "[{}]")),
    "mac": ((lambda v: v.replace(":", "").replace("-", ""), "MAC address {}"),),
    "national_id": ((lambda v: v.replace("-", "‑").replace(" ", "\u00a0"), "{}"),),
    "phone": (
        (lambda v: v.replace(" ", "\u00a0"), "{}"), (lambda v: v.replace("-", "–"), "Tel. {}"),
        (lambda v: v.replace(" ", ""), "{}"),
    ),
}  # fmt: skip
# What has digits in captions and is nobody's.
INNOCENT = (
    "{d}.{m}.{y}", "{d}/{m}/{y} {h}:{mi}", "{y}-{m}-{d}T{h}:{mi}:{s}Z", "{y}–{y2}", "{n} x {n2} px",
    "1 {n3} {n3} stars",
    "${n},{n3}.00", "EUR {n3}.{n3},50", "v{d}.{m}.{h}", "release {d}.{m}.{h}.{mi}", "ISBN 978-3-{n3}-{n}{d}-4",
    "#{hex}",
    "IMG_{y}{m}{d}_{h}{mi}{s}", "DSC{n}{d}", "{h}:{mi}:{s}", "{d}-{m} win", "scale 1:{n}", "{d}.{n3}% of {n}",
    "f/2.8 1/{n3}s",
    "lot {n3}-{n}", "pp. {n3}-{n2}", "{n3} km, {n} m", "No. {n}{n3}", "[{d}.5, {m}.25, {h}.0, {mi}.75]",
    "rgb({n3}, {n3}, {n3})",
    "{n} {n} {n3}", "NGC {n}", "Boeing {n3}-{n3}", "size {d}-{m}-{h}", "sha {hex}{hex}", "{d}th of May {y}",
    "Route {n3}/{d}",
)  # fmt: skip
COUNT = 12


def innocent(chance: random.Random) -> str:
    parts = {
        "d": f"{chance.randrange(1, 29):02d}", "m": f"{chance.randrange(1, 13):02d}",
        "y": str(chance.randrange(1900, 2030)),
        "y2": str(chance.randrange(1900, 2030)), "h": f"{chance.randrange(24):02d}",
        "mi": f"{chance.randrange(60):02d}",
        "s": f"{chance.randrange(60):02d}", "n": str(chance.randrange(1000, 9999)),
        "n2": str(chance.randrange(600, 4000)),
        "n3": str(chance.randrange(100, 999)), "hex": f"{chance.randrange(16**6):06x}",
    }  # fmt: skip
    return chance.choice(INNOCENT).format(**parts)


def planted() -> Iterator[tuple[str, str, str, str]]:
    """entity, locale, caption, value"""
    chance = random.Random(20)
    for entity, make in MAKERS.items():
        for locale in LOCALES:
            announcement = ANNOUNCEMENTS.get(entity, {}).get(locale)
            for _ in range(COUNT):
                spell, frame = chance.choice(RESPELLED.get(entity, ((str, "{}"),)))
                value = spell(make(chance, locale))
                told = frame.format(f"{announcement} {value}" if announcement else value)
                caption = chance.choice(FRAMES).format(f"{told}, {innocent(chance)}" if chance.random() < 0.5 else told)
                yield entity, locale, caption, value
    formats = phonenumbers.PhoneNumberFormat
    for region in REGIONS:
        for kind in (phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE):
            example = phonenumbers.example_number_for_type(region, kind)
            assert example is not None
            for _ in range(COUNT):
                number = another(example, chance)
                form = chance.choice((formats.NATIONAL, formats.INTERNATIONAL, formats.E164))
                value = phonenumbers.format_number(number, form)
                yield "phone", region, chance.choice(FRAMES).format(value), value


def another(example: phonenumbers.PhoneNumber, chance: random.Random) -> phonenumbers.PhoneNumber:
    written = phonenumbers.format_number(example, phonenumbers.PhoneNumberFormat.E164)
    while True:
        number = phonenumbers.parse(written[:-5] + "".join(chance.choices("0123456789", k=5)))
        if phonenumbers.is_valid_number(number):
            return number


@pytest.fixture(scope="module")
def figures() -> dict[tuple[str, str], Counter[str]]:
    """(entity, locale) -> planted; found: no letter or digit of it is left to see; false: findings beside it."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for entity, locale, caption, value in planted():
        start = caption.index(value)
        count = counts[entity, locale]
        count["planted"] += 1
        found = [finding for finding in detect(caption) if finding.score >= 0.5]
        covered = {place for f in found if f.entity == entity for place in range(f.start, f.end)}
        shown = any(c.isalnum() and place not in covered for place, c in enumerate(value, start))
        count["found"] += not shown
        for f in found:
            if f.entity != entity or f.end <= start or f.start >= start + len(value):
                counts[f.entity, locale]["false"] += 1
    return counts


# recall, precision
REQUIRED = {entity: (0.97, 0.97) for entity in MAKERS} | dict.fromkeys(
    ("email", "card", "iban", "ssn", "ip"), (0.99, 0.98)
)


@pytest.mark.parametrize("entity", MAKERS)
def test_recall_and_precision(figures: dict[tuple[str, str], Counter[str]], entity: str) -> None:
    by_locale = {locale: count for (of, locale), count in figures.items() if of == entity}
    total = sum(by_locale.values(), Counter[str]())
    recall, precision = total["found"] / total["planted"], total["found"] / (total["found"] + total["false"])
    worst = min(by_locale, key=lambda locale: by_locale[locale]["found"] / by_locale[locale]["planted"])
    lowest = by_locale[worst]["found"] / by_locale[worst]["planted"]
    print(
        f"{entity}: recall {recall:.4f}, precision {precision:.4f} of {total['planted']}; {worst}: recall {lowest:.3f}"
    )
    assert recall >= REQUIRED[entity][0] and precision >= REQUIRED[entity][1] and lowest >= 0.8


def test_numbers_of_nobody_are_left_alone() -> None:
    chance = random.Random(5)
    false = Counter(finding.entity for _ in range(5000) for finding in detect(innocent(chance)))
    print(f"false alarms in 5000 numbers: {dict(false)}")
    assert false.total() <= 10  # a digest's first 12 places may be digits, and somebody's number
