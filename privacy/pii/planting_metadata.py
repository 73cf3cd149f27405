"""Images with values planted in their metadata, wherever cameras and editors put some, to see whether any gets through.

A picture is a function of (seed, number).
"""

from __future__ import annotations

import contextlib
import io
import random
import struct
import unicodedata
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from xml.sax.saxutils import escape

from PIL import ExifTags, Image, PngImagePlugin

from privacy.pii.filter import FilterResult, Item
from privacy.pii.planting import ENTITIES, LOCALES

_PLANTED = ("person", "email", "phone", "address", "home_path")
_XMP = (
    "<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>"
    "<rdf:Description xmlns:dc='http://purl.org/dc/elements/1.1/' dc:creator='{}'/></rdf:RDF></x:xmpmeta>"
)


class PlantedImage(NamedTuple):
    """A record without a caption, and what stands in which part of it."""

    item: Item
    values: Mapping[str, str]


def planted_images(seed: int, number: int) -> Iterator[PlantedImage]:
    """JPEG and PNG in turn, every third with an SVG beside, each with a value in every part that can hold one."""
    for count in range(number):
        chance = random.Random(f"metadata\0{seed}\0{count}")
        make = (_jpeg, _png)[count % 2]
        image, values = make(chance)
        svg: bytes | None = None
        if count % 3 == 0:
            svg, of_svg = _svg(chance)
            values |= of_svg
        yield PlantedImage(Item(image, None, svg), values)


def still_shows(value: str, result: FilterResult) -> bool:
    """Whether a value stands in what the filter kept, in a usual encoding, compressed or not."""
    for kept in (result.image, result.svg or b""):
        readable = [kept]
        at = kept.find(b"\x78")
        while at >= 0:  # where a zlib stream may begin
            with contextlib.suppress(zlib.error):
                readable.append(zlib.decompressobj().decompress(kept[at:], 1 << 20))
            at = kept.find(b"\x78", at + 1)
        for encoding in ("utf-8", "latin-1", "utf-16-le", "utf-16-be"):
            sought = value.encode(encoding, "replace")
            if any(sought in text for text in readable):
                return True
    return False


def _value(chance: random.Random) -> str:
    return ENTITIES[chance.choice(_PLANTED)](chance, chance.choice(LOCALES)).replace("\n", ", ")


def _ascii(chance: random.Random) -> str:
    """A value as EXIF holds text."""
    return unicodedata.normalize("NFKD", _value(chance)).encode("ascii", "ignore").decode()


def _picture(chance: random.Random) -> Image.Image:
    return Image.frombytes("RGB", (16, 16), chance.randbytes(16 * 16 * 3))


def _exif(chance: random.Random, values: dict[str, str], container: str) -> Image.Exif:
    exif = Image.Exif()
    base = ExifTags.Base
    for tag in (base.Artist, base.Copyright, base.ImageDescription, base.XPAuthor):
        value = values[f"{container}.EXIF.{tag.name}"] = _ascii(chance)
        exif[tag] = (value + "\0").encode("utf-16-le") if tag == base.XPAuthor else value
    for section, tag in ((ExifTags.IFD.Exif, base.CameraOwnerName), (ExifTags.IFD.GPSInfo, ExifTags.GPS.GPSMapDatum)):
        exif.get_ifd(section)[tag] = values[f"{container}.EXIF.{tag.name}"] = _ascii(chance)
    return exif


def _jpeg(chance: random.Random) -> tuple[bytes, dict[str, str]]:
    values = {f"jpeg.{place}": _value(chance) for place in ("XMP", "COM", "IPTC", "APP11", "after_end")}
    out = io.BytesIO()
    _picture(chance).save(
        out, "JPEG", exif=_exif(chance, values, "jpeg"), xmp=_XMP.format(escape(values["jpeg.XMP"])).encode(),
        comment=values["jpeg.COM"].encode(),
    )  # fmt: skip
    by_line = values["jpeg.IPTC"].encode()
    record = b"\x1c\x02\x50" + struct.pack(">H", len(by_line)) + by_line  # IPTC-IIM 2:80, By-line
    resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(record)) + record + b"\0" * (len(record) % 2)
    segments = _segment(0xED, b"Photoshop 3.0\0" + resource) + _segment(0xEB, values["jpeg.APP11"].encode())
    jpeg = out.getvalue()
    return jpeg[:2] + segments + jpeg[2:] + values["jpeg.after_end"].encode(), values


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _png(chance: random.Random) -> tuple[bytes, dict[str, str]]:
    values = {f"png.{place}": _value(chance) for place in ("tEXt", "zTXt", "iTXt", "XMP", "own_chunk", "after_end")}
    info = PngImagePlugin.PngInfo()
    info.add(b"tEXt", b"Author\0" + values["png.tEXt"].encode("latin-1", "replace"))
    info.add_text("Comment", values["png.zTXt"].encode().decode("latin-1"), zip=True)
    info.add_itxt("Description", values["png.iTXt"], "en", "Description", zip=True)
    info.add_itxt("XML:com.adobe.xmp", _XMP.format(escape(values["png.XMP"])))
    info.add(b"prVt", values["png.own_chunk"].encode())
    out = io.BytesIO()
    _picture(chance).save(out, "PNG", pnginfo=info, exif=_exif(chance, values, "png"))
    return out.getvalue() + values["png.after_end"].encode(), values


def _svg(chance: random.Random) -> tuple[bytes, dict[str, str]]:
    values = {f"svg.{place}": _value(chance) for place in ("RDF", "comment", "docname", "script", "id")}
    rdf, comment, docname, script, identifier = map(escape, values.values())
    text = f"""<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"
 xmlns:sodipodi="http://sodipodi.sourceforge.net/DTD/sodipodi-0.dtd" sodipodi:docname="{docname}">
<!-- {comment.replace("-", "‐")} --><metadata>{_XMP.format(rdf)}</metadata><script>var by = "{script}";</script>
<rect id="{identifier}" width="5" height="5"/></svg>"""
    values["svg.comment"] = comment.replace("-", "‐")
    return text.encode(), values
