import io
import itertools
import random

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance
from pydantic import ValidationError

from privacy.pii.duplicates import (
    HASH_BITS,
    DuplicatesConfig,
    Signatures,
    _join,  # type: ignore[reportPrivateUsage]
    caption_minima,
    find_duplicates,
    from_bytes,
    perceptual_hash,
    signatures,
    to_bytes,
)
from privacy.pii.findings import Pixels

CONFIG = DuplicatesConfig()
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "moon", "page", "text", "brick", "grass")


def decode(image: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def photo(name: str) -> Image.Image:
    picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    picture.thumbnail((256, 256))
    return picture


def blobs(seed: int, size: int = 48) -> Image.Image:
    """A smooth picture like no other."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def signed(records: dict[str, tuple[bytes, str | None]]) -> Signatures:
    images, captions = zip(*records.values(), strict=True)
    return signatures(list(records), images, captions, decode)


def differing_bits(one: Image.Image, other: Image.Image) -> int:
    pair = [perceptual_hash(np.asarray(picture.convert("RGB"))) for picture in (one, other)]
    return int(np.bitwise_count(pair[0] ^ pair[1]).sum())


def agreement(one: str, other: str) -> float:
    return float((caption_minima(one) == caption_minima(other)).mean())


@pytest.mark.parametrize("name", PHOTOS)
def test_a_photograph_changed_a_little_keeps_its_hash_within_the_limit(name: str) -> None:
    picture = photo(name)
    width, height = picture.size
    marked = picture.copy()
    marked.paste((255, 255, 255), (width * 3 // 4, height * 11 // 12, width, height))
    for changed in (
        decode_jpeg(picture, 50),
        picture.resize((width // 2, height // 2), Image.Resampling.BICUBIC),
        picture.resize((width * 2, height * 2), Image.Resampling.BICUBIC),
        ImageEnhance.Contrast(picture).enhance(0.7),
        marked,
    ):
        assert differing_bits(picture, changed) <= CONFIG.image_bits


def decode_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(encoded(picture, "JPEG", quality=quality)))


def test_other_photographs_and_other_faces_have_other_hashes() -> None:
    photos = [photo(name) for name in PHOTOS]
    faces = [Image.fromarray((face * 255).astype(np.uint8)) for face in skimage.data.lfw_subset()[:60]]
    for pictures in (photos, faces):
        assert min(differing_bits(one, other) for one, other in itertools.combinations(pictures, 2)) > CONFIG.image_bits


def test_the_hash_is_what_its_definition_says() -> None:
    ramp = np.repeat(np.arange(72, dtype=np.uint8)[None], 72, axis=0)  # brighter to the right, the same from above
    hashed = perceptual_hash(np.stack([ramp] * 3, axis=-1))
    assert np.unpackbits(hashed.view(np.uint8)).tolist() == [1] * 64 + [0] * 64
    assert perceptual_hash(np.full((1, 5, 3), 9, np.uint8)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("a photo of a cat on a mat", "A photo of a cat, on a mat!", True),
        ("a photo of a cat on a red mat in the morning sun", "a photo of a cat on a red mat in the morning", True),
        ("a handwritten 3", "a handwritten 5", False),
        ("a photo of a cat on a mat", "a photo of a dog on a mat", False),
        ("猫が赤いマットの上で眠っている写真", "猫が赤いマットの上で眠っている写真。", True),
        ("猫が赤いマットの上で眠っている写真", "犬が川で泳いでいる", False),
        ("", "  ...", True),
        ("", "a cat", False),
    ],
)
def test_captions_are_near_by_the_words_they_share(one: str, other: str, near: bool) -> None:
    assert (agreement(one, other) >= CONFIG.caption_similarity) == near


def test_the_minima_estimate_the_jaccard_similarity() -> None:
    chance = random.Random(0)
    errors = []
    for _ in range(200):
        words = [f"w{number}" for number in range(40)]
        one, other = set(words[: chance.randrange(20, 40)]), set(words[chance.randrange(0, 20) :])

        # words that stand in one order make the same pairs, so each set is its words and their pairs
        def shingles(chosen: set[str]) -> tuple[str, set[str]]:
            ordered = sorted(chosen)
            return " ".join(ordered), set(ordered) | {f"{a} {b}" for a, b in itertools.pairwise(ordered)}

        (text, a), (other_text, b) = shingles(one), shingles(other)
        errors.append(agreement(text, other_text) - len(a & b) / len(a | b))
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.075


def test_image_and_caption_together_make_a_duplicate() -> None:
    cat, dog = photo("chelsea"), photo("coffee")
    again = encoded(cat, "JPEG", quality=60)
    found = find_duplicates(
        [
            signed(
                {
                    "e": (encoded(cat), "A cat on a mat."),  # the same bytes and words as a
                    "b": (again, "a cat on a mat"),  # near it
                    "c": (encoded(cat), "sunset over the harbour, oil on canvas"),  # its image alone
                    "d": (encoded(dog), "a cat on a mat"),  # its caption alone
                    "a": (encoded(cat), "a cat on a mat"),
                }
            )
        ],
        CONFIG,
    )
    assert found.dropped == {"b": "a", "e": "a"}
    assert found.report == {
        "records": 5, "groups": 1, "dropped": 2, "dropped_exact": 1, "largest_group": 3,
        "same_image_other_caption": 1, "small": 0, "undecoded": 0,
    }  # fmt: skip


def test_neither_shards_nor_their_order_change_what_is_kept() -> None:
    records: dict[str, tuple[bytes, str | None]] = {}
    for number in range(40):
        picture = blobs(number % 23)
        image = encoded(picture) if number % 2 else encoded(picture, "JPEG", quality=80)
        records[f"k{number * 7 % 40:02d}"] = (image, f"picture number {number % 23} of a series")
    whole = find_duplicates([signed(records)], CONFIG)
    assert len(whole.dropped) == 17 and all(first < key for key, first in whole.dropped.items())
    for seed in range(5):
        names = list(records)
        random.Random(seed).shuffle(names)
        cut = 5 + seed * 7
        parts = [signed({name: records[name] for name in some}) for some in (names[:cut], names[cut:])]
        assert find_duplicates(parts, CONFIG) == whole


def test_small_and_undecodable_images_are_told_by_their_bytes() -> None:
    grey = encoded(Image.new("RGB", (8, 8), (9, 9, 9)))
    light = encoded(Image.new("RGB", (8, 8), (90, 90, 90)))
    found = find_duplicates(
        [signed({"a": (grey, "a 3"), "b": (light, "a 3"), "c": (grey, "a 3"), "d": (b"?", None), "e": (b"?", "")})],
        CONFIG,
    )
    assert found.dropped == {"c": "a", "e": "d"}
    assert (found.report["small"], found.report["undecoded"]) == (3, 2)


def sketched(hashes: list[int], captions: list[str]) -> Signatures:
    """Signatures with the hashes told."""
    made = signatures([f"k{n:05d}" for n in range(len(hashes))], [b"%d" % n for n in range(len(hashes))], captions, bad)
    made["side"] = 64
    made["perceptual"] = [[value & (2**64 - 1), value >> 64] for value in hashes]
    return made


def bad(_: bytes) -> Pixels:
    raise ValueError


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**128 - 1), st.sets(st.integers(0, HASH_BITS - 1), max_size=16), st.integers(0, 16))
def test_every_pair_within_the_limit_is_found_and_no_other(value: int, flipped: set[int], limit: int) -> None:
    other = value
    for bit in flipped:
        other ^= 1 << bit
    found = find_duplicates([sketched([value, other], ["a cat", "a cat"])], DuplicatesConfig(image_bits=limit))
    assert bool(found.dropped) == (len(flipped) <= limit)


@pytest.mark.parametrize("limit", range(1, 17))
def test_differing_bits_spread_as_badly_as_can_be_hide_no_pair(limit: int) -> None:
    # the first bits lie in a chunk each
    found = find_duplicates([sketched([0, 2**limit - 1], ["a cat"] * 2)], DuplicatesConfig(image_bits=limit))
    assert found.dropped == {"k00001": "k00000"}


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_joined_pairs_have_the_least_of_their_set_as_root(pairs: list[tuple[int, int]]) -> None:
    expected = list(range(20))
    for _ in range(20):
        for one, other in pairs:
            expected[one] = expected[other] = min(expected[one], expected[other])
    root = np.arange(20)
    _join(root, np.array(pairs, np.int64).reshape(-1, 2).T)
    assert root.tolist() == expected


def test_what_is_kept_is_what_comparing_all_with_all_keeps() -> None:
    chance = random.Random(3)
    hashes, captions = [], []
    for _ in range(300):
        if hashes and chance.random() < 0.6:
            near = chance.choice(hashes)
            for bit in chance.sample(range(HASH_BITS), chance.randrange(0, 14)):
                near ^= 1 << bit
            hashes.append(near)
        else:
            hashes.append(chance.getrandbits(128))
        captions.append(f"one of {chance.randrange(3)} captions of many words that are the same")
    made = sketched(hashes, captions)

    def near(one: int, other: int) -> bool:
        bits = (hashes[one] ^ hashes[other]).bit_count()
        agreed = (made["caption"][one] == made["caption"][other]).mean()
        return bits <= CONFIG.image_bits and bool(agreed >= CONFIG.caption_similarity)

    expected: dict[str, str] = {}
    kept: list[int] = []
    for number in range(300):
        first = next((earlier for earlier in kept if near(earlier, number)), None)
        if first is None:
            kept.append(number)
        else:
            expected[f"k{number:05d}"] = f"k{first:05d}"
    assert len(expected) > 50
    assert find_duplicates([made], CONFIG).dropped == expected


def test_no_pair_of_like_colours_is_spared_the_comparison() -> None:
    chance = np.random.default_rng(4)
    made = sketched([0] * 240, ["a cat"] * 240)
    for number in range(240):  # from plain to bold, in families around the limit
        if number % 6 == 0:
            bold = chance.choice([0, 6, 40, 90])
            first = chance.integers(100 - bold, 101 + bold, 192) + chance.integers(0, 40)
        off = chance.normal(size=192) * chance.choice([0.1, 0.5, 3]) + chance.normal() * chance.choice([0, 0.5, 4])
        made["colours"][number] = np.clip(first + off, 0, 255).astype(np.uint8)

    def alike(one: int, other: int) -> bool:
        a, b = (made["colours"][number].reshape(64, 3).astype(float) for number in (one, other))
        contrast = max(8.0, *(np.sqrt(np.square(side - side.mean(axis=0)).mean()) for side in (a, b)))
        return bool(np.sqrt(np.square(a - b).mean()) <= CONFIG.colour_difference * contrast)

    expected: dict[str, str] = {}
    kept: list[int] = []
    for number in range(240):
        first = next((earlier for earlier in kept if alike(earlier, number)), None)
        if first is None:
            kept.append(number)
        else:
            expected[f"k{number:05d}"] = f"k{first:05d}"
    assert 50 < len(expected) < 200
    assert find_duplicates([made], CONFIG).dropped == expected


def test_a_series_of_drawings_that_differ_in_a_detail_is_no_duplicate() -> None:
    def clock(hour: int) -> Image.Image:
        picture = Image.new("RGB", (256, 256), "white")
        pen = ImageDraw.Draw(picture)
        pen.ellipse((8, 8, 248, 248), outline=(20, 20, 200), width=14)
        angle = np.pi * hour / 6
        pen.line((128, 128, 128 + 70 * np.sin(angle), 128 - 70 * np.cos(angle)), fill=(20, 20, 200), width=14)
        return picture

    records = {f"k{hour:02d}": (encoded(clock(hour)), "a blue clock") for hour in range(12)}
    records["other"] = (encoded(clock(3).resize((128, 128), Image.Resampling.BICUBIC)), "a blue clock")
    found = find_duplicates([signed(records)], CONFIG)
    assert found.dropped == {"other": "k03"}


def test_it_says_how_far_it_is() -> None:
    made = sketched([0] * 3000 + [1] * 500, [f"the words of record {number % 50}" for number in range(3500)])
    told: list[tuple[int, int | None]] = []
    assert find_duplicates([made], CONFIG, lambda done, of: told.append((done, of))) == find_duplicates([made], CONFIG)
    assert told == sorted(told) and len({of for _, of in told}) == 1
    assert len(told) > 60 and told[-1][0] == told[-1][1]


def test_a_copy_of_a_copy_is_kept_where_it_is_near_no_kept_record() -> None:
    steps = [sum(1 << (bit * 3) for bit in range(6 * number)) for number in range(5)]  # each 6 bits from the next
    found = find_duplicates([sketched(steps, ["a cat"] * 5)], CONFIG)
    assert found.dropped == {"k00001": "k00000", "k00003": "k00002"}


def test_pictures_of_one_hash_and_other_colours_are_no_duplicates() -> None:
    def flag(*stripes: tuple[int, int, int]) -> bytes:
        return encoded(Image.fromarray(np.repeat(np.array([stripes], np.uint8), 20, axis=1).repeat(48, axis=0)))

    red, grey, blue = (200, 40, 40), (100, 100, 100), (40, 40, 200)
    records = {"a": (flag(red, grey, red), "a flag"), "b": (flag(blue, grey, blue), "a flag")}
    assert find_duplicates([signed(records)], CONFIG).dropped == {}
    records = {
        "a": (encoded(Image.new("RGB", (64, 64), red)), "a"),
        "b": (encoded(Image.new("RGB", (64, 64), blue)), "a"),
    }
    assert find_duplicates([signed(records)], CONFIG).dropped == {}


@pytest.mark.parametrize("name", PHOTOS)
def test_a_photograph_stored_again_is_a_duplicate(name: str) -> None:
    picture = photo(name)
    width, height = picture.size
    copies = [encoded(picture), encoded(picture, "JPEG", quality=50)]
    copies += [encoded(picture.resize((width * n // 2, height * n // 2), Image.Resampling.BICUBIC)) for n in (1, 4)]
    records = {f"k{number}": (copy, "the same words") for number, copy in enumerate(copies)}
    assert find_duplicates([signed(records)], CONFIG).dropped == {"k1": "k0", "k2": "k0", "k3": "k0"}


def test_a_crowd_of_one_placeholder_is_not_compared_all_with_all() -> None:
    captions = [f"w{n} x{n * 7} y{n * 13} of my own words" for n in range(20_000)]
    captions[19_999] = captions[77]
    found = find_duplicates([sketched([5] * 20_000, captions)], CONFIG)  # 2 * 10^8 pairs
    assert found.dropped == {"k19999": "k00077"}


def test_signatures_come_back_from_their_bytes_and_nothing_else_does() -> None:
    made = signed({"a": (encoded(blobs(1)), "a cat"), "folder/b": (encoded(blobs(2)), None)})
    data = to_bytes(made)
    assert data == to_bytes(signed({"a": (encoded(blobs(1)), "a cat"), "folder/b": (encoded(blobs(2)), None)}))
    assert (from_bytes(data, "x") == made).all()
    for wrong in (b"", data[:-1], data[:40], to_bytes(made[["key", "exact"]]), to_bytes(np.zeros(3))):
        with pytest.raises(ValueError, match=r"^part-0 holds no signatures"):
            from_bytes(wrong, "part-0")


def test_no_records_and_one_record_have_no_duplicates() -> None:
    assert find_duplicates([], CONFIG).report["records"] == 0
    assert find_duplicates([signed({"a": (encoded(blobs(1)), None)})], CONFIG).dropped == {}


def test_a_key_that_comes_twice_is_refused() -> None:
    part = signed({"a": (encoded(blobs(1)), None)})
    with pytest.raises(ValueError, match="'a' occurs twice"):
        find_duplicates([part, part], CONFIG)


def test_nothing_touches_the_global_random_state() -> None:
    before = (random.getstate(), np.random.get_state()[1].tobytes())  # type: ignore[union-attr]
    find_duplicates([signed({"a": (encoded(blobs(1)), "a"), "b": (encoded(blobs(2)), "b")})], CONFIG)
    assert before == (random.getstate(), np.random.get_state()[1].tobytes())  # type: ignore[union-attr]


def test_a_limit_beyond_reason_is_refused() -> None:
    with pytest.raises(ValidationError, match="image_bits"):
        DuplicatesConfig(image_bits=40)
