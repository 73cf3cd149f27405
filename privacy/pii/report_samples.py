"""A handful of invented records, and what a policy makes of them: what a reader of the report may see of the filter."""

from __future__ import annotations

import importlib
import io
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from privacy.pii.filter import FilterResult, Item, Tools, filter_records
from privacy.pii.policy import Policy
from privacy.pii.pseudonyms import Pseudonyms

_SIZE = (320, 200)
# Nobody's: names made up; the domain .example (RFC 2606), 555-01xx numbers and 192.0.2.0/24 (RFC 5737) are reserved.
_SVG = b"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:sodipodi="http://sodipodi.sourceforge.net/DTD/sodipodi-0.dtd"
 xmlns:dc="http://purl.org/dc/elements/1.1/" width="32" height="20" sodipodi:docname="/home/jordan/flag.svg">
<metadata><dc:creator>Jordan Ashgrove</dc:creator></metadata><!-- drawn by Jordan --><path d="M2 2h20v12H2z"/></svg>"""


@dataclass(frozen=True)
class Sample:
    """An invented record before and after; `shows` says in words what its image is."""

    title: str
    shows: str
    before: Item
    after: FilterResult


def make_samples(policy: Policy, tools: Tools) -> list[Sample]:
    """The invented records, filtered as the stage filters: the same each time.

    Pseudonyms are made with a key of zeros, for the real one would tell which pseudonym a known value has. A face is
    among them only where the policy looks for faces and scikit-image is installed, whose sample photograph it is.
    """
    if tools.pseudonyms is not None:
        tools = replace(tools, pseudonyms=Pseudonyms(bytes(32)))
    records = [
        (
            "A caption that names somebody",
            "a red flag",
            Item(_png(_flag()), "Jordan Ashgrove of 14 Mill Lane, Ashford; jordan.ashgrove@mail.example, 212-555-0143"),
        ),
        (
            "Text in the image",
            "a plain ground with an e-mail address and a telephone number written on it",
            Item(_png(_written("Contact:", "m.okafor@mail.example", "+1 212 555 0187")), "a note on a door"),
        ),
        (
            "An author in the image's metadata and in its drawing",
            "a red flag",
            Item(_png(_flag(), Author="Jordan Ashgrove", Comment="/home/jordan/flag.png"), "a red flag", _SVG),
        ),
        ("Nothing personal", "a red flag", Item(_png(_flag()), "a red flag on a white ground")),
    ]
    faces = any("face" in detector.entities for detector in tools.images)
    if faces and (photograph := _photograph()) is not None:
        records.append(("A face", "a portrait photograph", Item(_png(photograph), "a portrait")))
    results = filter_records([item for _, _, item in records], policy, tools)
    return [Sample(title, shows, item, after) for (title, shows, item), after in zip(records, results, strict=True)]


def _flag() -> Image.Image:
    picture = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((60, 30, 68, 180), fill="#444444")
    draw.rectangle((68, 30, 240, 120), fill="#c02020")
    return picture


def _written(*lines: str) -> Image.Image:
    picture = Image.new("RGB", _SIZE, "#f4f0e0")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(24)
    for number, line in enumerate(lines):
        draw.text((24, 36 + 44 * number), line, fill="#101010", font=font)
    return picture


def _photograph() -> Image.Image | None:
    """The portrait that comes inside scikit-image (NASA, public domain), or None where that is not installed."""
    try:
        data: Any = importlib.import_module("skimage.data")
        picture = Image.fromarray(data.astronaut())
    except (ImportError, OSError):
        return None  # a sample less
    return picture.crop((64, 0, 384, 200))


def _png(picture: Image.Image, **texts: str) -> bytes:
    told = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        told.add_text(name, text)
    out = io.BytesIO()
    picture.save(out, "PNG", pnginfo=told)
    return out.getvalue()
