import io

import pytest
from PIL import Image, PngImagePlugin
from pydantic import ValidationError

from privacy.pii.filter import Policy, filter_record
from privacy.pii.patterns import ENTITIES, detect
from train.planted import plant


def png(author: str | None = None) -> bytes:
    text = PngImagePlugin.PngInfo()
    if author:
        text.add_text("Author", author)
    out = io.BytesIO()
    Image.new("L", (4, 4), 100).save(out, "PNG", pnginfo=text)
    return out.getvalue()


def test_entities_are_filled_counted_and_the_image_stripped() -> None:
    result = filter_record(png("Jane"), "a cat, call 212-555-0143 or a@example.org or b@example.org", Policy())
    assert (result.outcome, result.reason) == ("kept", None)
    assert result.caption == "a cat, call [PHONE] or [EMAIL] or [EMAIL]"
    assert result.findings == {"phone": 1, "email": 2}
    assert result.metadata == {"png:tEXt": 1}
    assert result.image == png()


def test_an_entity_may_drop_the_record() -> None:
    result = filter_record(png(), "a cat, 4111 1111 1111 1111", Policy(captions={"card": "drop"}))
    assert (result.outcome, result.reason, result.findings) == ("dropped", "holds_card", {"card": 1})
    assert (result.image, result.caption) == (b"", None)


def test_what_is_kept_is_counted_and_cannot_hide_what_is_not() -> None:
    result = filter_record(png(), "a cat, 212-555-0143@example.org", Policy(captions={"email": "keep"}))
    assert result.caption == "a cat, [PHONE]@example.org"
    assert result.findings == {"email": 1, "phone": 1}


def test_what_still_shows_after_filling_drops_the_record() -> None:
    # "1 212 555 0143" overlaps the longer address and gives way; without its 1 it is a telephone number again
    result = filter_record(png(), "::ffff:192.0.2.1 212 555 0143", Policy())
    assert (result.outcome, result.reason, result.caption) == ("dropped", "still_shows_phone", None)


def test_a_record_without_a_caption_passes_without_one() -> None:
    result = filter_record(png(), None, Policy())
    assert (result.outcome, result.caption) == ("kept", None)


def test_a_malformed_image_is_quarantined() -> None:
    result = filter_record(png()[:-1], "a@example.org", Policy())
    assert (result.outcome, result.reason, result.findings) == ("quarantined", "malformed_png", {"email": 1})


def test_a_policy_for_an_unknown_entity_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(ValidationError, match="no detector finds 'emial'; did you mean 'email'"):
        Policy(captions={"emial": "fill"})
    with pytest.raises(ValidationError, match=r"captions\.email"):
        Policy(captions={"email": "blur"})  # type: ignore[dict-item]


def test_no_repr_shows_a_value() -> None:
    result = filter_record(png("Jane"), "a cat of Jane, a@example.org", Policy(captions={"email": "keep"}))
    assert result.caption is not None and "a@example.org" in result.caption
    assert "Jane" not in repr(result) and "example" not in repr(result)


@pytest.mark.parametrize("seed", range(3))
def test_every_planted_entity_is_found_as_itself_where_it_was_planted(seed: int) -> None:
    planted = [plant("a handwritten 3", seed, f"digit-{number:04d}") for number in range(750)]
    gold = [{(g.entity, g.start, g.end) for g in record.gold} for record in planted]
    found = [{(f.entity, f.start, f.end) for f in detect(record.caption)} for record in planted]
    assert found == gold  # recall 1.0 and precision 1.0
    assert {entity for record in gold for entity, _, _ in record} == set(ENTITIES)
    assert 0.4 < sum(map(bool, gold)) / len(gold) < 0.6


@pytest.mark.parametrize("seed", range(3))
def test_no_planted_value_survives_the_filter(seed: int) -> None:
    for number in range(200):
        record = plant("a handwritten 3", seed, f"digit-{number:04d}")
        result = filter_record(png(), record.caption, Policy())
        assert result.outcome == "kept" and result.caption is not None
        for g in record.gold:
            assert record.caption[g.start : g.end] not in result.caption
