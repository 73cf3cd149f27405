"""SVG down to its drawing: the elements and attributes that draw are listed and stay; anything else goes, known or not.

RDF, comments, processing instructions, editors' settings and paths, scripts, links, embedded rasters and whatever lies
outside the file go; identifiers and classes, which authors choose, become numbers. What a person can still read in the
drawing is given to the text detectors, its title, description and lettering to be acted on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

MAX_BYTES = 4_000_000  # of a file that is parsed
_MAX_DEPTH = 256  # of elements: renderers recurse

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_XML = "http://www.w3.org/XML/1998/namespace"
_RDF = (
    "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "http://purl.org/dc/elements/1.1/",
    "http://creativecommons.org/ns#",
    "http://web.resource.org/cc/",
)
_OURS = ("id", "class", "xlink:href")  # attributes of which we wrote the values
_FILE_NAMES = ("docbase", "docname", "export-filename", "absref")
_EDITORS = re.compile(r"inkscape|sodipodi|adobe|corel|sketch|figma|serif", re.IGNORECASE)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Sources: SVG 1.1 (second edition), appendices L and M; Filter Effects 1.0.
_SHAPES = _words("path rect circle ellipse line polyline polygon text use")
_LETTERED = _words("title desc text tspan textPath")
_ELEMENTS = _SHAPES | _LETTERED | _words(
    "svg g a defs symbol switch style marker linearGradient radialGradient stop pattern clipPath mask filter feBlend "
    "feColorMatrix feComponentTransfer feComposite feConvolveMatrix feDiffuseLighting feDisplacementMap feDistantLight "
    "feDropShadow feFlood feFuncA feFuncB feFuncG feFuncR feGaussianBlur feMerge feMergeNode feMorphology feOffset "
    "fePointLight feSpecularLighting feSpotLight feTile feTurbulence"
)  # fmt: skip
_REMOVED_ELEMENTS = {
    "metadata": "rdf", "script": "script", "foreignObject": "foreignObject", "image": "raster", "feImage": "raster",
}  # fmt: skip
_PATHS = _words("d points")
_NUMBERS = _words(
    "x y width height cx cy r rx ry x1 y1 x2 y2 dx dy rotate textLength viewBox fx fy fr offset refX refY markerWidth "
    "markerHeight orient pathLength startOffset transform gradientTransform patternTransform stdDeviation values order "
    "kernelMatrix divisor bias targetX targetY k1 k2 k3 k4 scale radius baseFrequency numOctaves seed surfaceScale "
    "diffuseConstant specularConstant specularExponent limitingConeAngle azimuth elevation z pointsAtX pointsAtY "
    "pointsAtZ tableValues slope intercept amplitude exponent kernelUnitLength"
)
_STYLES = _words(
    "alignment-baseline baseline-shift clip clip-path clip-rule color color-interpolation color-interpolation-filters "
    "color-rendering direction display dominant-baseline fill fill-opacity fill-rule filter "
    "flood-color flood-opacity font font-family font-size font-size-adjust font-stretch font-style font-variant "
    "font-weight glyph-orientation-horizontal glyph-orientation-vertical image-rendering isolation kerning "
    "letter-spacing lighting-color line-height marker marker-end marker-mid marker-start mask mix-blend-mode opacity "
    "overflow paint-order pointer-events shape-rendering stop-color stop-opacity stroke stroke-dasharray "
    "stroke-dashoffset stroke-linecap stroke-linejoin stroke-miterlimit stroke-opacity stroke-width text-align "
    "text-anchor text-decoration text-rendering unicode-bidi vector-effect visibility word-spacing writing-mode"
)
_KEYWORDS = _words(
    "version baseProfile preserveAspectRatio clipPathUnits maskUnits maskContentUnits gradientUnits patternUnits "
    "patternContentUnits filterUnits primitiveUnits markerUnits spreadMethod lengthAdjust method spacing type in in2 "
    "result mode operator edgeMode xChannelSelector yChannelSelector stitchTiles preserveAlpha systemLanguage"
)

# Possessive, so that no input takes more than one pass.
_IS_PATH = re.compile(r"[MmZzLlHhVvCcSsQqTtAaEe\d+\-.,\s]*+", re.ASCII)
_IS_NUMBERS = re.compile(
    r"(?:matrix|translate|scale|rotate|skew[XY]|px|pt|pc|mm|cm|in|em|ex|auto(?:-start-reverse)?|[\d\s.,+\-()%eE])*+",
    re.ASCII,
)
_IS_STYLE = re.compile(r"[^\\<>{}@;:/&]*+")  # no scheme, no path, no escape, no rule
_URL = re.compile(r"url\(\s*['\"]?#([^'\"()\s]+)['\"]?\s*\)", re.IGNORECASE)
# What no detector has to read: a number of plain size, a dash pattern, a colour.
_NUMBER = r"[+-]?\d{0,6}(?:\.\d*)?(?:[eE][+-]?\d\d?)?(?:%|px|pt|pc|mm|cm|in|em|ex)?"
_IS_EXACT = re.compile(
    rf"[\w-]*:\s*(?:{_NUMBER}|#[0-9a-fA-F]{{3,8}}|none)|stroke-dasharray:{_NUMBER}(?:[\s,]++{_NUMBER})*+",
    re.ASCII,
)
_CALL = re.compile(r"([\w-]*+)\(")
_CALLS = _words("rgb rgba hsl hsla rect url")
_LOCAL_PATH = re.compile(r"\s*(file:|/|~|[A-Za-z]:[\\/]|\\\\|\.\.?[\\/])", re.IGNORECASE)
_CSS_RULE = re.compile(r"([\w\s.,#*>-]++)\{([^{}@\\<]*+)\}\s*+")
_CSS_NAME = re.compile(r"([.#])([\w-]+)")


class SvgError(ValueError):
    """An SVG that has to be left out; `reason` is a code and says nothing of the content."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Element(NamedTuple):
    """A start tag; `geometry` are attributes that hold numbers and commands alone."""

    name: str
    attributes: dict[str, str]
    geometry: dict[str, str]


@dataclass(frozen=True)
class Drawing:
    """What is left of an SVG, its lettering to be judged; its repr shows nothing of it.

    texts: the pieces of text in its title, description and lettering, in order. removed: kind -> pieces that went.
    events: an element's start, a style sheet's rules, a text's place in `texts`, or an element's end (None).
    """

    texts: tuple[str, ...] = field(repr=False)
    removed: Mapping[str, int]
    events: tuple[_Element | str | int | None, ...] = field(repr=False)

    def readable(self, texts: Sequence[str]) -> str:
        """All that can be read in the drawing with `texts` for its own: what differs once, without numbers and colours.

        Lettering comes piece by piece, in one line and in one word, for so it may be set. Where texts have the same
        lengths, so have the results, place by place.
        """
        told = dict[str, None]()
        for event in self.events:
            if isinstance(event, _Element):
                for key, value in event.attributes.items():
                    pieces = value.split(";") if key == "style" else [f"{key}:{value}"] if key not in _OURS else []
                    told |= dict.fromkeys(pieces)
            elif isinstance(event, str):
                told |= dict.fromkeys(re.split("[;{}]", event))
        lettering = (*texts, " ".join(texts), "".join(texts)) if len(texts) > 1 else texts
        return "\n".join((*(piece for piece in told if not _IS_EXACT.fullmatch(piece)), *lettering))

    def serialised(self, texts: Sequence[str]) -> bytes:
        """The drawing with `texts` for its own, as UTF-8: a function of both alone."""
        return "".join(self._tokens(texts)).encode()

    def _tokens(self, texts: Sequence[str]) -> Iterator[str]:
        open_elements: list[str] = []
        for event, following in zip(self.events, (*self.events[1:], None), strict=True):
            if isinstance(event, _Element):
                pairs = (*event.attributes.items(), *event.geometry.items())
                attributes = "".join(f" {key}={quoteattr(value)}" for key, value in pairs)
                if not open_elements:
                    attributes = f' xmlns="{_SVG}" xmlns:xlink="{_XLINK}"{attributes}'
                yield f"<{event.name}{attributes}{'/' if following is None else ''}>"
                open_elements.append(event.name if following is not None else "")
            elif isinstance(event, str):
                yield escape(event)
            elif isinstance(event, int):
                yield escape(texts[event], {"\r": "&#13;"})
            elif name := open_elements.pop():
                yield f"</{name}>"


def read_svg(svg: bytes) -> Drawing:
    """Strip an SVG to its drawing.

    Raises SvgError: "too_large", "malformed", "not_svg", "too_deep", "style" (a style sheet beyond plain rules),
    "nothing_drawn", "too_many_attributes" where declared defaults multiply them, and "entities" where any is declared,
    before one is expanded. Nothing outside the file is read.
    """
    if len(svg) > MAX_BYTES:
        raise SvgError("too_large")
    reader = _Reader(max_attributes=len(svg) // 4)  # a="", written out
    try:
        reader.parser.Parse(svg, True)
    except (expat.ExpatError, LookupError, ValueError) as error:  # a broken file, or an encoding that is none
        raise error if isinstance(error, SvgError) else SvgError("malformed") from None
    return reader.drawing()


class _Reader:
    """Expat's events to those of the drawing."""

    def __init__(self, max_attributes: int) -> None:
        self._attributes_left = max_attributes
        self.parser = parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text = True
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler = self._characters
        parser.EntityDeclHandler = self._entity
        parser.CommentHandler = partial(self._remove, "comment")
        parser.ProcessingInstructionHandler = partial(self._remove, "instruction")
        parser.StartDoctypeDeclHandler = partial(self._remove, "doctype")
        self._removed = Counter[str]()
        self._events: list[_Element | str | int | None] = []
        self._texts: list[str] = []
        self._open: list[str] = []  # elements that are kept
        self._skipped = 0  # depth within an element that is not
        self._sheet: list[str] = []  # of the style element that is read
        self._identifiers: dict[str, str] = {}  # those that something refers to, to ours
        self._classes: dict[str, str] = {}

    def drawing(self) -> Drawing:
        """What was read, without the identifiers and classes that nothing refers to."""
        elements = [event for event in self._events if isinstance(event, _Element)]
        if not any(element.name in _SHAPES for element in elements):
            raise SvgError("nothing_drawn")
        for element in elements:
            for key, names in (("id", self._identifiers), ("class", self._classes)):
                theirs = element.attributes.pop(key, "").split()
                if ours := " ".join(names[name] for name in theirs if name in names):
                    element.attributes[key] = ours
                if ours.split() != theirs:
                    self._remove(key)
        return Drawing(tuple(self._texts), dict(sorted(self._removed.items())), tuple(self._events))

    def _remove(self, kind: str, *_: object) -> None:
        self._removed[f"svg:{kind}"] += 1

    def _entity(self, *_: object) -> None:
        raise SvgError("entities")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._attributes_left -= len(attributes)
        if self._attributes_left < 0:
            raise SvgError("too_many_attributes")
        if self._skipped:
            self._skipped += 1
            return
        space, _, local = name.rpartition(" ")
        if not self._open and (local != "svg" or space not in (_SVG, "")):
            raise SvgError("not_svg")
        if len(self._open) == _MAX_DEPTH:
            raise SvgError("too_deep")
        if kind := _removed_as(space, local):
            self._remove(kind)
            self._skipped = 1
            return
        element = _Element("g" if local == "a" else local, {}, {})  # of a link what it surrounds stays
        for key, value in attributes.items():
            self._attribute(element, key, value)
        self._open.append(element.name)
        self._events.append(element)

    def _end(self, _: str) -> None:
        if self._skipped:
            self._skipped -= 1
            return
        if self._open.pop() == "style":
            self._events.append(self._rules("".join(self._sheet)))
            self._sheet = []
        self._events.append(None)

    def _characters(self, text: str) -> None:
        within = self._open[-1] if self._open and not self._skipped else ""
        if within == "style":
            self._sheet.append(text)
        elif within in _LETTERED and isinstance(self._events[-1], int):  # what parted them is gone
            self._texts[-1] += text
        elif within in _LETTERED:
            self._events.append(len(self._texts))
            self._texts.append(text)
        elif within and not text.isspace():
            self._remove("other")

    def _attribute(self, element: _Element, name: str, value: str) -> None:
        """Keep an attribute as it may stay, or count it."""
        space, _, key = name.rpartition(" ")
        kept = element.attributes
        if space or key == "href":
            self._attribute_of(space, key, value, kept)
        elif (key in _PATHS and _IS_PATH.fullmatch(value)) or (key in _NUMBERS and _IS_NUMBERS.fullmatch(value)):
            element.geometry[key] = value
        elif key in ("id", "class"):
            kept[key] = value  # until all that refers to it is known
        elif key == "style":
            if style := self._declarations(value):
                kept[key] = style
        elif key in _STYLES or key in _KEYWORDS:
            if (plain := self._plain(value)) is not None:
                kept[key] = plain
        elif key.startswith("on"):
            self._remove("handler")
        else:
            self._remove("path" if _LOCAL_PATH.match(value) else "other")

    def _attribute_of(self, space: str, key: str, value: str, kept: dict[str, str]) -> None:
        """The same for references and for the attributes of a namespace."""
        if key == "href" and value.startswith("#") and space in (_XLINK, ""):
            kept["xlink:href"] = "#" + _ours(self._identifiers, "i", value[1:])
        elif (space, key) == (_XML, "space") and value in ("preserve", "default"):
            kept["xml:space"] = value
        elif _LOCAL_PATH.match(value) or key in _FILE_NAMES:
            self._remove("path")
        else:
            self._remove("reference" if key == "href" else _space_kind(space))

    def _declarations(self, style: str) -> str:
        kept: list[str] = []
        for declaration in style.split(";"):
            key, colon, value = (part.strip() for part in declaration.partition(":"))
            if key in _STYLES:
                if (plain := self._plain(value)) is not None:
                    kept.append(f"{key}:{plain}")
            elif colon:
                self._remove("editor" if key.startswith("-") else "other")
        return ";".join(kept)

    def _plain(self, value: str) -> str | None:
        """A property's value, which refers to nothing but what is in the drawing; None where it may not stay."""
        plain = _URL.sub(lambda found: f"url(#{_ours(self._identifiers, 'i', found[1])})", value)
        calls = [call.lower() for call in _CALL.findall(plain)]
        if _IS_STYLE.fullmatch(plain) and _CALLS.issuperset(calls) and calls.count("url") == len(_URL.findall(plain)):
            return plain
        self._remove("path" if _LOCAL_PATH.match(value) or "file:" in value else "reference")
        return None

    def _rules(self, sheet: str) -> str:
        """A style sheet of plain rules with our names in it."""
        sheet, rules, place = self._without_comments(sheet).strip(), list[str](), 0
        while place < len(sheet):
            if not (rule := _CSS_RULE.match(sheet, place)):
                raise SvgError("style")
            selector = _CSS_NAME.sub(self._selected, rule[1])
            rules.append(f"{' '.join(selector.split())}{{{self._declarations(rule[2])}}}")
            place = rule.end()
        return "\n".join(rules)

    def _without_comments(self, sheet: str) -> str:
        parts, place = list[str](), 0
        while (start := sheet.find("/*", place)) >= 0:
            end = sheet.find("*/", start + 2)
            if end < 0:
                raise SvgError("style")
            parts.append(sheet[place:start])
            place = end + 2
            self._remove("comment")
        return "".join((*parts, sheet[place:]))

    def _selected(self, found: re.Match[str]) -> str:
        names, initial = (self._identifiers, "i") if found[1] == "#" else (self._classes, "c")
        return found[1] + _ours(names, initial, found[2])


def _ours(names: dict[str, str], initial: str, name: str) -> str:
    """Our name for what an author's refers to: its number, in the order of the references."""
    return names.setdefault(name, f"{initial}{len(names)}")


def _removed_as(space: str, local: str) -> str | None:
    """What an element that may not stay is counted as; None where it may."""
    if space in (_SVG, ""):
        return None if local in _ELEMENTS else _REMOVED_ELEMENTS.get(local, "other")
    return _space_kind(space)


def _space_kind(space: str) -> str:
    if space in _RDF:
        return "rdf"
    return "editor" if _EDITORS.search(space) else "foreign"
