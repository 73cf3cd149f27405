import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from privacy.pii.metadata import ImageMetadataError, strip_metadata

SECRET = b"Jane Roe"


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    shades = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(shades).resize(size).convert(mode)


def exif(orientation: int | None = None) -> Image.Exif:
    block = Image.Exif()
    block[ExifTags.Base.Artist] = SECRET.decode()
    block.get_ifd(ExifTags.IFD.GPSInfo).update({1: "N", 2: (1.0, 2.0, 3.0)})
    if orientation is not None:
        block[ExifTags.Base.Orientation] = orientation
    return block


def png(image: Image.Image | None = None, orientation: int | None = None) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", SECRET.decode())
    text.add_text("Comment", SECRET.decode(), zip=True)
    text.add_itxt("Title", SECRET.decode())
    out = io.BytesIO()
    (image or picture()).save(out, "PNG", pnginfo=text, exif=exif(orientation), dpi=(72, 72), icc_profile=SECRET)
    return out.getvalue()


def jpeg(image: Image.Image | None = None, orientation: int | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    told = {"exif": exif(orientation), "comment": SECRET, "icc_profile": SECRET, "xmp": SECRET}
    (image or picture()).save(out, "JPEG", quality=90, **told, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_pngs_text_exif_and_profile_go_and_its_pixels_stay() -> None:
    stripped = strip_metadata(png())
    assert stripped.removed == {
        "png:tEXt": 1, "png:zTXt": 1, "png:iTXt": 1, "png:eXIf": 1, "png:iCCP": 1, "png:pHYs": 1,
    }  # fmt: skip
    assert SECRET not in stripped.image
    assert Image.open(io.BytesIO(stripped.image)).info == {}
    np.testing.assert_array_equal(pixels(stripped.image), pixels(png()))


def test_pieces_are_counted_by_what_they_hold() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", SECRET.decode())
    text.add_text("Raw profile type iptc", SECRET.decode(), zip=True)
    text.add_text("Raw profile type exif", SECRET.decode())
    out = io.BytesIO()
    picture().save(out, "PNG", pnginfo=text)
    assert strip_metadata(out.getvalue()).removed == {"png:XMP": 1, "png:IPTC": 1, "png:EXIF": 1}
    image = jpeg()
    iptc = b"Photoshop 3.0\0" + SECRET
    segment = b"\xff\xed" + struct.pack(">H", len(iptc) + 2) + iptc
    stripped = strip_metadata(image[:2] + segment + image[2:])
    assert stripped.removed["jpeg:IPTC"] == 1 and SECRET not in stripped.image


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


PACKED = zlib.compress(SECRET)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><dc:creator>' + SECRET + b"</dc:creator></x:xmpmeta>"
IPTC = b"8BIM\x04\x04\0\0\0\0\0\x0d\x1c\x02\x50\0\x08" + SECRET + b"\0"  # 2:80, the by-line
PLANTED = {
    "png:tEXt": chunk(b"tEXt", b"Author\0" + SECRET),
    "png:zTXt": chunk(b"zTXt", b"Author\0\0" + PACKED),
    "png:iTXt": chunk(b"iTXt", b"Author\0\1\0en\0\0" + PACKED),
    "png:XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "png:IPTC": chunk(b"tEXt", b"Raw profile type iptc\0" + IPTC.hex().encode()),
    "png:EXIF": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(exif().tobytes().hex().encode())),
    "png:eXIf": chunk(b"eXIf", exif().tobytes()[6:]),
    "png:iCCP": chunk(b"iCCP", SECRET + b"\0\0" + PACKED),
    "png:tIME": chunk(b"tIME", SECRET[:7]),
    "png:sPLT": chunk(b"sPLT", SECRET + b"\0\x08"),
    "png:prVt": chunk(b"prVt", SECRET),
    "jpeg:EXIF": segment(0xE1, b"Exif\0\0" + exif().tobytes()[6:]),
    "jpeg:XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
    "jpeg:IPTC": segment(0xED, b"Photoshop 3.0\0" + IPTC),
    "jpeg:ICC": segment(0xE2, b"ICC_PROFILE\0\1\1" + SECRET),
    "jpeg:MPF": segment(0xE2, b"MPF\0" + SECRET),
    "jpeg:COM": segment(0xFE, SECRET),
    "jpeg:APP15": segment(0xEF, SECRET),
}


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO file")
@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_value_of_any_kind_goes_and_is_counted(kind: str) -> None:
    out = io.BytesIO()
    picture().save(out, kind.partition(":")[0])
    plain = strip_metadata(out.getvalue()).image
    at = 33 if kind.startswith("png") else 2  # after IHDR, or SOI
    stripped = strip_metadata(plain[:at] + PLANTED[kind] + plain[at:])
    assert stripped.removed == {kind: 1} and stripped.image == plain


def test_a_palettes_transparency_stays() -> None:
    image = picture("P")
    out = io.BytesIO()
    image.save(out, "PNG", transparency=3)
    stripped = strip_metadata(out.getvalue())
    assert stripped.removed == {} and stripped.image == out.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpegs_segments_go_and_its_pixels_stay(mode: str, progressive: bool) -> None:
    image = jpeg(picture(mode), progressive=progressive, restart_marker_blocks=2)
    stripped = strip_metadata(image)
    assert {"jpeg:EXIF", "jpeg:XMP", "jpeg:ICC", "jpeg:COM"} <= set(stripped.removed)
    assert SECRET not in stripped.image
    np.testing.assert_array_equal(pixels(stripped.image), pixels(image))


@pytest.mark.parametrize("make", [png, jpeg])
def test_what_follows_the_images_end_goes(make: Callable[[], bytes]) -> None:
    stripped = strip_metadata(make() + b"PK" + SECRET)
    assert SECRET not in stripped.image
    assert sum(count for kind, count in stripped.removed.items() if kind.endswith("after_end")) == 1


@pytest.mark.parametrize("make", [png, jpeg])
def test_stripping_twice_strips_nothing_more(make: Callable[[], bytes]) -> None:
    once = strip_metadata(make()).image
    assert strip_metadata(once).removed == {}
    assert strip_metadata(once).image == once


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_applied_before_it_is_lost(orientation: int) -> None:
    smooth = Image.fromarray(np.add.outer(np.arange(16) * 8, np.arange(24) * 4).astype(np.uint8)).convert("RGB")
    for make, tolerance in ((png, 0), (jpeg, 6)):
        image = make(smooth, orientation)
        meant = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("RGB"), np.int16)
        stripped = strip_metadata(image)
        assert SECRET not in stripped.image
        assert np.abs(pixels(stripped.image) - meant).max() <= tolerance


def test_damaged_exif_is_stripped_all_the_same() -> None:
    image = png()
    at = image.index(b"eXIf")
    length = struct.unpack_from(">I", image, at - 4)[0]
    chunk = b"eXIf" + b"\xff" * length
    broken = image[:at] + chunk + struct.pack(">I", zlib.crc32(chunk)) + image[at + 8 + length :]
    assert strip_metadata(broken).image == strip_metadata(image).image


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "not_png_or_jpeg"),
        (b"GIF89a", "not_png_or_jpeg"),
        (png()[:-1], "malformed_png"),
        (png()[:60], "malformed_png"),
        (png().replace(b"IDAT", b"IDAX"), "malformed_png"),
        (jpeg()[:-2], "malformed_jpeg"),
        (jpeg()[:300], "malformed_jpeg"),
        (b"\xff\xd8\xff\xd9", "malformed_jpeg"),
        (b"\xff\xd8\xff\xe1\x00\x01", "malformed_jpeg"),
    ],
)
def test_a_malformed_container_has_a_reason(image: bytes, reason: str) -> None:
    with pytest.raises(ImageMetadataError) as refusal:
        strip_metadata(image)
    assert refusal.value.reason == reason


@settings(max_examples=200)
@given(st.data())
def test_damaged_images_are_stripped_or_refused_and_nothing_else(data: st.DataObject) -> None:
    image = bytearray(data.draw(st.sampled_from([png(orientation=6), jpeg(orientation=6)])))
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(image)))
    try:
        strip_metadata(bytes(image[:cut]))
    except ImageMetadataError as refusal:
        assert refusal.reason in {"not_png_or_jpeg", "malformed_png", "malformed_jpeg", "undecodable"}
