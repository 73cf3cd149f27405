import io
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from privacy.pii.findings import Box
from privacy.pii.metadata import strip_metadata
from privacy.pii.pixels import ImageError, apply_boxes, decode, flatten_transparency

SECRET = b"Jane Roe"
REASONS = {
    "not_png_or_jpeg", "malformed_png", "malformed_jpeg", "data_after_end", "too_many_pixels", "several_frames",
    "undecodable",
}  # fmt: skip


def shades(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def png(**options: object) -> bytes:
    return encoded(Image.fromarray(shades()), **options)


def jpeg(**options: object) -> bytes:
    return encoded(Image.fromarray(shades()), "JPEG", quality=95, subsampling=0, **options)


def box(left: int, top: int, right: int, bottom: int) -> Box:
    return Box("face", left, top, right, bottom, "faces", "1")


def refusal(image: bytes) -> str:
    with pytest.raises(ImageError) as refused:
        decode(image)
    return refused.value.reason


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, and whose data is a few bytes."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 9))]
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in (*chunks, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(parts)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = encoded(Image.fromarray(shades()).convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    pixels = decode(image)
    assert pixels.shape == (40, 60, 3) and pixels.dtype == np.uint8
    if mode in ("RGB", "RGBA"):
        np.testing.assert_array_equal(pixels, shades())


def test_16_bit_grey_keeps_its_high_byte() -> None:
    grey = (shades()[..., 0].astype(np.uint16) << 8) + 7
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey)))[..., 0], shades()[..., 0])


def test_what_is_transparent_is_white() -> None:
    rgba = np.dstack((shades(), np.full((40, 60), 255, np.uint8)))
    rgba[:10, :, 3] = 0
    pixels = decode(encoded(Image.fromarray(rgba)))
    assert (pixels[:10] == 255).all()
    np.testing.assert_array_equal(pixels[10:], shades()[10:])


@pytest.mark.parametrize("make", [png, jpeg])
def test_pixels_are_upright(make) -> None:
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    np.testing.assert_array_equal(decode(make(exif=turned)), np.rot90(decode(make()), -1))


@pytest.mark.parametrize("make", [png, jpeg])
def test_a_box_covers_its_pixels_and_its_margin_and_no_others(make) -> None:
    before = decode(make())
    after = decode(apply_boxes(make(), [box(20, 10, 40, 20)], "fill", 0.1))  # 2 pixels on each side
    covered = np.zeros((40, 60), bool)
    covered[8:22, 18:42] = True
    far = np.ones((40, 60), bool)
    far[0:24, 16:48] = False  # the 8 x 8 blocks that the box touches
    if make is png:
        np.testing.assert_array_equal(after[~covered], before[~covered])
        assert (after[covered] == 0).all()
    else:
        assert np.abs(after[far].astype(int) - before[far]).mean() < 3
        assert np.abs(after[11:19, 21:39].astype(int)).max() < 32  # it rings


@pytest.mark.parametrize("action", ["fill", "blur"])
def test_what_is_covered_has_no_say_in_what_is_left(action) -> None:
    """A filled box hides its content wholly; a blurred one shows no more than the means of its cells."""
    one, other = shades(), shades()
    mixed = other[8:24, 20:36].reshape(4, 4, 4, 4, 3)  # 4 x 4 cells of 4 x 4 pixels
    other[8:24, 20:36] = mixed[:, ::-1, :, ::-1].reshape(16, 16, 3)
    if action == "fill":
        other[8:24, 20:36] = 0
    covered = [apply_boxes(encoded(Image.fromarray(s)), [box(20, 8, 36, 24)], action, 0.0) for s in (one, other)]
    assert covered[0] == covered[1]


def test_boxes_may_reach_over_the_edge_or_lie_outside() -> None:
    after = decode(apply_boxes(png(), [box(-5, -5, 4, 3), box(58, 38, 90, 90), box(100, 100, 110, 110)], "fill", 0.0))
    assert (after[:3, :4] == 0).all() and (after[38:, 58:] == 0).all()
    np.testing.assert_array_equal(after[3:38, 4:58], shades()[3:38, 4:58])


@pytest.mark.parametrize("margin", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("action", ["fill", "blur"])
def test_a_box_of_a_pixel_is_covered(action, margin: float) -> None:
    assert decode(apply_boxes(png(), [box(0, 0, 1, 1)], action, margin)).shape == (40, 60, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_nothing_but_pixels_is_stored(kind: str) -> None:
    told = Image.Exif()
    told[ExifTags.Base.Artist], told[ExifTags.Base.Orientation] = SECRET.decode(), 6
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", SECRET.decode())
    more = {"pnginfo": text} if kind == "PNG" else {"comment": SECRET}
    image = apply_boxes(encoded(Image.fromarray(shades()), kind, exif=told, **more), [box(0, 0, 9, 9)], "fill", 0.0)
    assert SECRET not in image and strip_metadata(image).removed == {}
    assert Image.open(io.BytesIO(image)).format == kind
    assert decode(image).shape == (60, 40, 3)  # turned


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_lies_under_transparency_can_be_taken_away(mode: str) -> None:
    alpha = np.full((40, 60), 255, np.uint8)
    alpha[:10], alpha[10:20] = 0, 3
    picture = Image.fromarray(np.dstack((shades(), alpha)))
    if mode == "P":
        palette = picture.convert("RGB").convert("P")
        image = encoded(palette, transparency=int(np.asarray(palette)[0, 0]))
    else:
        image = encoded(picture.convert(mode))
    flat = flatten_transparency(image)
    assert not Image.open(io.BytesIO(flat)).has_transparency_data
    np.testing.assert_array_equal(decode(flat), decode(image))
    assert flatten_transparency(flat) is flat


def test_an_image_without_transparency_keeps_its_bytes() -> None:
    opaque = encoded(Image.fromarray(shades()).convert("RGBA"))
    for image in (png(), jpeg(), opaque):
        assert flatten_transparency(image) is image


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_stays_grey(kind: str) -> None:
    image = apply_boxes(encoded(Image.fromarray(shades()).convert("L"), kind), [box(0, 0, 9, 9)], "blur", 0.1)
    assert Image.open(io.BytesIO(image)).mode == "L"


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "not_png_or_jpeg"),
        (b"GIF89a", "not_png_or_jpeg"),
        (encoded(Image.fromarray(shades()), "GIF"), "not_png_or_jpeg"),
        (encoded(Image.fromarray(shades()), "WEBP"), "not_png_or_jpeg"),
        (png()[:-20], "malformed_png"),
        (jpeg()[:-2], "malformed_jpeg"),
        (png() + b"PK\3\4" + SECRET, "data_after_end"),
        (jpeg() + png(), "data_after_end"),
        (png(save_all=True, append_images=[Image.new("RGB", (60, 40))]), "several_frames"),
        (claiming(60_000, 3_850), "too_many_pixels"),
        (claiming(4_001, 4_000), "too_many_pixels"),
        (claiming(40, 40), "undecodable"),
    ],
)  # fmt: skip
def test_a_refused_image_has_a_reason(image: bytes, reason: str) -> None:
    assert refusal(image) == reason
    with pytest.raises(ImageError, match=f"^{reason}$"):
        apply_boxes(image, [box(0, 0, 9, 9)], "fill", 0.1)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_not_decoded_to_be_turned() -> None:
    with pytest.raises(ValueError, match="too_many_pixels"):
        strip_metadata(_with_orientation(claiming(60_000, 2_000)))


def _with_orientation(image: bytes) -> bytes:
    told = Image.Exif()
    told[ExifTags.Base.Orientation] = 6
    content = b"eXIf" + told.tobytes()[6:]
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    return image[:33] + chunk + image[33:]  # after IHDR


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_images_are_decoded_or_refused_and_nothing_else(data: st.DataObject) -> None:
    image = bytearray(data.draw(st.sampled_from([png(), jpeg(), jpeg(progressive=True)])))
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(image)))
    try:
        decode(bytes(image[: cut or None]))
    except ImageError as refused:
        assert refused.reason in REASONS


def test_no_global_random_state_is_touched() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    apply_boxes(jpeg(), [box(0, 0, 9, 9)], "blur", 0.1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
