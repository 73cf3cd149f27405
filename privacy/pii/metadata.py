"""Image metadata out, pixels untouched: PNG chunks and JPEG segments that no pixel depends on are left out.

What may stay is listed; anything else goes, known or not, and so does whatever follows the image's end. Nothing is
re-encoded, unless the metadata turns the picture: then it is turned first (a JPEG at quality 95).
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 16_000_000  # of an image that is decoded

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_JPEG_START, _JPEG_END, _JPEG_SCAN = 0xD8, 0xD9, 0xDA
_JPEG_ADOBE = 0xEE  # APP14 says how the colours are coded
_JPEG_KEPT = (*range(0xC0, 0xD0), 0xDA, 0xDB, 0xDC, 0xDD)  # frames, Huffman and arithmetic tables, DQT, DNL, DRI
_JPEG_RESTART = range(0xD0, 0xD8)
_JPEG_COMMENT = 0xFE
_JPEG_NAMES = {_JPEG_COMMENT: "COM"} | {0xE0 + number: f"APP{number}" for number in range(16)}
_AFTER_END = "after_end"

# What is in a piece, by how it begins. Sources: Exif 3.0, XMP part 3, IPTC Photo Metadata, ICC.1, CIPA DC-007.
_JPEG_CONTENTS = {
    b"Exif\0": "EXIF",
    b"http://ns.adobe.com/xap/1.0/\0": "XMP",
    b"http://ns.adobe.com/xmp/extension/\0": "XMP",
    b"Photoshop 3.0\0": "IPTC",
    b"ICC_PROFILE\0": "ICC",
    b"MPF\0": "MPF",
    b"JFIF\0": "JFIF",
}
_PNG_CONTENTS = {
    b"XML:com.adobe.xmp\0": "XMP",
    b"Raw profile type xmp\0": "XMP",
    b"Raw profile type exif\0": "EXIF",
    b"Raw profile type APP1\0": "EXIF",
    b"Raw profile type iptc\0": "IPTC",
}

# Pillow warns of large images when it reads their header; our own limit, checked right after, refuses smaller ones.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# What Pillow raises on damaged bytes, besides OSError.
_DAMAGE = (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, TypeError, KeyError)


class ImageMetadataError(ValueError):
    """An image's container cannot be read; `reason` is a code and says nothing of the content."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Stripped:
    """The image without metadata, and how many pieces of each kind went ({"png:tEXt": 1, "jpeg:EXIF": 1})."""

    image: bytes = field(repr=False)
    removed: Mapping[str, int]


def strip_metadata(image: bytes) -> Stripped:
    """Raises ImageMetadataError: "not_png_or_jpeg", "malformed_png", "malformed_jpeg".

    Where the picture has to be turned also "undecodable" and "too_many_pixels" (nothing was decoded).
    """
    stripped = _strip(image)
    if not stripped.removed:
        return stripped
    upright = _turned(image)
    return stripped if upright is None else Stripped(_strip(upright).image, stripped.removed)


def follows_end(image: bytes) -> bool:
    """Whether bytes follow the picture: another file, perhaps. Raises as `strip_metadata`, but decodes nothing."""
    return any(name.endswith(_AFTER_END) for name in _strip(image).removed)


def _strip(image: bytes) -> Stripped:
    if image.startswith(_PNG_SIGNATURE):
        kept, pieces = _PNG_SIGNATURE, _png_pieces(image)
    elif image.startswith(b"\xff\xd8"):
        kept, pieces = b"", _jpeg_pieces(image)
    else:
        raise ImageMetadataError("not_png_or_jpeg")
    parts, removed = [kept], Counter[str]()
    for piece, name in pieces:
        if name is None:
            parts.append(piece)
        else:
            removed[name] += 1
    return Stripped(b"".join(parts), dict(removed))


def _png_pieces(image: bytes) -> Iterator[tuple[bytes, str | None]]:
    """Each chunk, with the name it is removed under, or None. Source: PNG Specification, third edition, section 5."""
    place, first = len(_PNG_SIGNATURE), True
    data_seen = False
    while True:
        if place + 12 > len(image):
            raise ImageMetadataError("malformed_png")
        length, kind = struct.unpack_from(">I4s", image, place)
        end = place + 12 + length
        if end > len(image) or not kind.isalpha() or first != (kind == b"IHDR"):
            raise ImageMetadataError("malformed_png")
        if zlib.crc32(image[place + 4 : end - 4]) != int.from_bytes(image[end - 4 : end]):
            raise ImageMetadataError("malformed_png")
        if kind not in _PNG_KEPT and kind[:1].isupper():  # a critical chunk nobody knows
            raise ImageMetadataError("malformed_png")
        yield image[place:end], None if kind in _PNG_KEPT else _png_name(kind, image[place + 8 : end - 4])
        place, first, data_seen = end, False, data_seen or kind == b"IDAT"
        if kind == b"IEND":
            break
    if not data_seen:
        raise ImageMetadataError("malformed_png")
    if place < len(image):
        yield image[place:], f"png:{_AFTER_END}"


def _jpeg_pieces(image: bytes) -> Iterator[tuple[bytes, str | None]]:
    """Each segment (a scan with its data), with the name it is removed under, or None. Source: ITU-T T.81, Annex B."""
    yield image[:2], None
    place, scanned = 2, False
    while True:
        if image[place : place + 1] != b"\xff":
            raise ImageMetadataError("malformed_jpeg")
        while image[place + 1 : place + 2] == b"\xff":  # fill bytes
            place += 1
        if place + 2 > len(image):
            raise ImageMetadataError("malformed_jpeg")
        marker = image[place + 1]
        if marker == _JPEG_END:
            break
        end = place + 2 + int.from_bytes(image[place + 2 : place + 4])
        if end > len(image) or end < place + 4 or marker in (0x00, 0x01, _JPEG_START, *_JPEG_RESTART):
            raise ImageMetadataError("malformed_jpeg")
        segment = image[place:end]
        if marker == _JPEG_SCAN:
            end, scanned = _scan_end(image, end), True
            yield image[place:end], None
        elif marker == _JPEG_ADOBE and segment[4:9] == b"Adobe":
            yield b"\xff\xee\x00\x0e" + segment[4:16], None  # its 12 defined bytes
        elif marker in _JPEG_KEPT:
            yield segment, None
        else:
            yield segment, _jpeg_name(marker, segment[4:])
        place = end
    if not scanned:
        raise ImageMetadataError("malformed_jpeg")
    yield image[place : place + 2], None
    if place + 2 < len(image):
        yield image[place + 2 :], f"jpeg:{_AFTER_END}"


def _png_name(kind: bytes, content: bytes) -> str:
    """What a chunk is counted as: by its keyword where that says it, else by its kind."""
    name = kind.decode("ascii")
    return f"png:{_content(content, _PNG_CONTENTS) or name if kind in _PNG_TEXTS else name}"


def _jpeg_name(marker: int, content: bytes) -> str:
    name = _content(content, _JPEG_CONTENTS) if marker != _JPEG_COMMENT else None
    return f"jpeg:{name or _JPEG_NAMES.get(marker, f'{marker:02X}')}"


def _content(content: bytes, beginnings: Mapping[bytes, str]) -> str | None:
    return next((name for beginning, name in beginnings.items() if content.startswith(beginning)), None)


def _scan_end(image: bytes, place: int) -> int:
    """Where a scan's entropy-coded data ends: at the next marker that is neither a stuffed zero nor a restart."""
    while (place := image.find(b"\xff", place)) >= 0 and place + 1 < len(image):
        following = image[place + 1]
        if following not in (0x00, 0xFF, *_JPEG_RESTART):
            return place
        place += 1 if following == 0xFF else 2
    raise ImageMetadataError("malformed_jpeg")


def _turned(image: bytes) -> bytes | None:
    """The picture as its metadata says to show it, re-encoded; None where that is how it is stored."""
    try:
        picture = Image.open(io.BytesIO(image), formats=("PNG", "JPEG"))
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except (*_DAMAGE, Image.DecompressionBombError):
        return None  # damaged metadata says nothing of the orientation
    if orientation not in range(2, 9):
        return None
    if picture.width * picture.height > MAX_PIXELS:
        raise ImageMetadataError("too_many_pixels")
    try:
        turned = ImageOps.exif_transpose(picture)
        out = io.BytesIO()
        turned.save(out, picture.format, **({"quality": 95, "subsampling": 0} if picture.format == "JPEG" else {}))
    except _DAMAGE:
        raise ImageMetadataError("undecodable") from None
    return out.getvalue()
