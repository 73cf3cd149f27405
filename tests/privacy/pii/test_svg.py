import codecs
import contextlib
import io
import re
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from privacy.pii import pixels
from privacy.pii.filter import FilterResult, Item, Tools, filter_records
from privacy.pii.findings import Box, Finding, Pixels
from privacy.pii.patterns import PatternDetector
from privacy.pii.policy import Policy
from privacy.pii.svg import MAX_BYTES, SvgError, read_svg

SECRET = "Jane Roe"
SPACES = (
    'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/" '
    'xmlns:inkscape="http://www.inkscape.org/namespaces/inkscape" xmlns:x="http://example.org/x" '
    'xmlns:sodipodi="http://sodipodi.sourceforge.net/DTD/sodipodi-0.dtd"'
)
DOT = '<circle r="1"/>'


DEFAULTS = "".join(f'<!ATTLIST g a{n} CDATA "{SECRET}">' for n in range(100))


def png() -> bytes:
    out = io.BytesIO()
    Image.new("L", (2, 2)).save(out, "PNG")
    return out.getvalue()


def svg(inside: str = DOT, attributes: str = "", before: str = "") -> bytes:
    return f"{before}<svg {SPACES} {attributes}>{inside}</svg>".encode()


def stripped(source: bytes) -> str:
    drawing = read_svg(source)
    return drawing.serialised(drawing.texts).decode()


def inner(source: bytes) -> str:
    """What the stripped root holds."""
    return re.sub(r"^<svg[^>]*>|</svg>$", "", stripped(source))


def filtered(source: bytes, **policy: object) -> FilterResult:
    (result,) = filter_records(
        [Item(png(), "a dot", source)], Policy.model_validate(policy), Tools((PatternDetector(),))
    )
    assert (result.outcome, result.caption) == ("kept", "a dot")
    return result


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (f"<metadata><rdf:RDF><dc:creator>{SECRET}</dc:creator></rdf:RDF></metadata>", "rdf"),
        (f"<rdf:RDF><dc:creator>{SECRET}</dc:creator></rdf:RDF>", "rdf"),
        (f"<!-- drawn by {SECRET} -->", "comment"),
        (f"<?editor by {SECRET}?>", "instruction"),
        (f'<sodipodi:namedview id="{SECRET}"/>', "editor"),
        (f'<g inkscape:label="{SECRET}"/>', "editor"),
        (f'<g sodipodi:docname="{SECRET}.svg"/>', "path"),
        (f'<g inkscape:export-filename="{SECRET}.png"/>', "path"),
        (f'<g sodipodi:absref="/home/{SECRET}/x.png"/>', "path"),
        (f'<use xlink:href="file:///home/{SECRET}/x.svg#a"/>', "path"),
        (f'<use href="C:\\Users\\{SECRET}\\x.svg"/>', "path"),
        (f'<use xlink:href="../{SECRET}.svg#a"/>', "path"),
        (f'<g fill="url(file:///home/{SECRET}/x.svg#a)"/>', "path"),
        (f'<g style="fill:url(http://example.org/{SECRET}#a)"/>', "reference"),
        (f'<use xlink:href="http://example.org/{SECRET}"/>', "reference"),
        (f'<a xlink:href="mailto:{SECRET}"></a>', "reference"),
        (f'<g style="fill:\\{SECRET}"/>', "reference"),
        (f'<g fill="url({SECRET}.svg#a)"/>', "reference"),
        (f'<g fill="URL({SECRET}.svg#a)"/>', "reference"),
        (f"<g style=\"mask:image-set('{SECRET}.png' 1x)\"/>", "reference"),
        (f"<script>{SECRET}</script>", "script"),
        (f'<g onclick="{SECRET}"/>', "handler"),
        (f"<foreignObject><p>{SECRET}</p></foreignObject>", "foreignObject"),
        (f'<image xlink:href="data:image/png;base64,{SECRET}"/>', "raster"),
        (f'<image xlink:href="/home/{SECRET}/x.png"/>', "raster"),
        (f'<filter><feImage xlink:href="{SECRET}"/></filter>', "raster"),
        (f"<x:secret>{SECRET}</x:secret>", "foreign"),
        (f'<g x:secret="{SECRET}"/>', "foreign"),
        (f'<g id="{SECRET}"/>', "id"),
        (f'<g class="{SECRET}"/>', "class"),
        (f'<g aria-label="{SECRET}"/>', "other"),
        (f'<g data-home="/home/{SECRET}"/>', "path"),
        (f'<g style="unknown:{SECRET}"/>', "other"),
        (f'<g style="-inkscape-font-specification:{SECRET}"/>', "editor"),
        (f'<path d="M 0 0 {SECRET}"/>', "other"),
        (f'<g transform="{SECRET}"/>', "other"),
        (f"<g>{SECRET}</g>", "other"),
        (f"<flowRoot>{SECRET}</flowRoot>", "other"),
        (f"<font><font-face>{SECRET}</font-face></font>", "other"),
    ],
)  # fmt: skip
def test_what_does_not_draw_goes_and_is_counted(piece: str, kind: str) -> None:
    drawing = read_svg(svg(piece + DOT))
    assert drawing.removed == {f"svg:{kind}": 1}
    left = drawing.serialised(drawing.texts).decode()
    assert SECRET not in left and left.endswith(f"{DOT}</svg>")
    assert SECRET not in drawing.readable(drawing.texts) and SECRET not in repr(drawing)


def test_a_doctype_goes() -> None:
    public = '"-//W3C//DTD SVG 1.1//EN" "http://example.org/never-read.dtd"'
    drawing = read_svg(svg("<g/>" + DOT, before=f'<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC {public} [{DEFAULTS}]>'))
    assert drawing.removed == {"svg:doctype": 1, "svg:other": 100}
    assert drawing.serialised(()).endswith(b"><g/>" + DOT.encode() + b"</svg>")


@pytest.mark.parametrize(
    "declared",
    [
        '<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">',
        '<!ENTITY c SYSTEM "secret.txt">',
        '<!ENTITY % c SYSTEM "secret.txt">%c;',
        '<!ENTITY c "harmless">',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_file_that_declares_entities_is_refused_before_one_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: str, encoding: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text(SECRET)
    source = svg("<text>&c;</text>", before=f"<!DOCTYPE svg [{declared}]>").decode()
    with pytest.raises(SvgError) as refusal:
        read_svg(source.encode(encoding))
    assert refusal.value.reason == "entities"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "malformed"),
        (svg()[:-3], "malformed"),
        (svg(before="\0"), "malformed"),
        (svg("<no:prefix/>"), "malformed"),
        (svg(before='<?xml version="1.0" encoding="no-such"?>'), "malformed"),
        (b"\x1f\x8b\x08", "malformed"),
        (b"<html><svg/></html>", "not_svg"),
        (svg("<g/>" * 1000 + DOT, before=f"<!DOCTYPE svg [{DEFAULTS}]>"), "too_many_attributes"),
        (svg("<g>" * 300 + DOT + "</g>" * 300), "too_deep"),
        (svg(" " * MAX_BYTES + DOT), "too_large"),
        (svg("<metadata/>"), "nothing_drawn"),
        (svg(f"<style>@import url(http://example.org/{SECRET});</style>{DOT}"), "style"),
        (svg("<style>@font-face{src:url(x)}</style>" + DOT), "style"),
        (svg("<style>.a{fill:red</style>" + DOT), "style"),
        (svg("<style>/* .a{fill:red}</style>" + DOT), "style"),
    ],
)
def test_what_cannot_be_read_has_a_reason(source: bytes, reason: str) -> None:
    with pytest.raises(SvgError) as refusal:
        read_svg(source)
    assert refusal.value.reason == reason and SECRET not in str(refusal.value)


def test_references_within_the_drawing_hold_under_our_names() -> None:
    source = svg(
        '<style>.jane{fill:url(#roe)} #b { stroke : red } /* by Jane */</style><linearGradient id="janes"/>'
        '<linearGradient xlink:href="#janes" id="roe" />'
        '<path id="b" class="jane doe" d="M0,0 1e-3-2z" style="fill:url( \'#roe\' );stroke:none" />'
        '<use xlink:href="#b" transform="matrix(1 0 0 1 2 3) rotate(-4.5)"/><use xlink:href="#lost"/>'
    )
    assert inner(source) == (
        "<style>.c0{fill:url(#i0)}\n#i1{stroke:red}</style>"
        '<linearGradient id="i2"/><linearGradient xlink:href="#i2" id="i0"/>'
        '<path style="fill:url(#i0);stroke:none" id="i1" class="c0" d="M0,0 1e-3-2z"/>'
        '<use xlink:href="#i1" transform="matrix(1 0 0 1 2 3) rotate(-4.5)"/><use xlink:href="#i3"/>'
    )


def test_a_link_leaves_what_it_surrounds() -> None:
    assert inner(svg(f'<a xlink:href="http://example.org">{DOT}</a>')) == f"<g>{DOT}</g>"


def test_stripping_twice_strips_nothing_more_and_markup_stays_text() -> None:
    lettering = '<text xml:space="preserve" style="font-family:A &amp; B">a &lt;b&gt;<tspan> c&#13;</tspan></text>'
    source = svg(f'<g id="b"/><use xlink:href="#a"/><path id="a" d="M 0 0"/>{lettering}')
    once = stripped(source)
    again = read_svg(once.encode())
    assert again.removed == {} and again.serialised(again.texts).decode() == once
    assert again.texts == ("a <b>", " c\r")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "iso-8859-1"])
def test_any_usual_encoding_becomes_utf_8(encoding: str) -> None:
    declared = "utf-8" if encoding == "utf-8-sig" else encoding
    source = svg("<text>Grün</text>", before=f'<?xml version="1.0" encoding="{declared}"?>').decode()
    assert inner(source.encode(encoding)) == "<text>Grün</text>"
    assert not stripped(source.encode(encoding)).startswith(codecs.BOM_UTF8.decode())


def test_lettering_is_acted_on_as_captions_are() -> None:
    source = svg(
        "<title>by jane@example.org</title><desc>call 212-555-0143</desc>"
        "<text>a dot <tspan>jane&#64;example<!-- -->.org</tspan></text>" + DOT
    )
    result = filtered(source, captions={"phone": "redact"})
    assert result.svg is not None
    assert inner(result.svg) == (
        f"<title>by [EMAIL]</title><desc>call </desc><text>a dot <tspan>[EMAIL]</tspan></text>{DOT}"
    )
    assert result.acted == {"svg.email.fill": 2, "svg.phone.redact": 1}
    assert result.found_by == {"svg.email.patterns": 2, "svg.phone.patterns": 1}
    assert result.findings == {} and result.metadata["svg:comment"] == 1


@pytest.mark.parametrize(
    ("inside", "policy", "reason"),
    [
        ("<text>jane@<tspan>example.org</tspan></text>", {}, "still_shows_email"),
        ("<text>jane@</text><text>example.org</text>", {}, "still_shows_email"),
        ("<text>4111 1111</text><text>1111 1111</text>", {}, "still_shows_card"),
        ("<text font-family=\"jane@example.org\">x</text>", {"captions": {"email": "keep"}}, None),
        ("<text font-family=\"212-555-0143\">x</text>", {}, "still_shows_phone"),
        ("<text style=\"font-family:'4111 1111 1111 1111'\">x</text>", {}, "still_shows_card"),
        ("<text stroke-width=\"4111111111111111\">x</text>", {}, "still_shows_card"),
        ("<text lang=\"x\" systemLanguage=\"212-555-0143\">x</text>", {}, "still_shows_phone"),
        ("<style>.a{font-family:212-555-0143}</style><path/>", {}, "still_shows_phone"),
        ("<title>jane@example.org</title><path/>", {"captions": {"email": "drop"}}, "holds_email"),
        ("<title>jane@example.org</title><path/>", {"captions": {"email": "quarantine"}}, "holds_email"),
        ("<title>long long</title><path/>", {"max_caption_length": 8}, "caption_too_long"),
        ("<g type='long long'/><path/>", {"max_caption_length": 8}, "caption_too_long"),
        ("<metadata/>", {}, "nothing_drawn"),
    ],
)  # fmt: skip
def test_a_drawing_that_shows_something_is_left_out_and_its_record_stays(
    inside: str, policy: dict[str, object], reason: str | None
) -> None:
    result = filtered(svg(inside), **policy)
    assert [kind for kind in result.metadata if "left_out" in kind] == ([f"svg:left_out:{reason}"] if reason else [])
    assert (result.svg is None) == (reason is not None)
    assert not any(key.startswith("svg.") for key in result.acted)


def test_numbers_and_colours_of_a_drawing_are_no_telephones() -> None:
    inside = '<path d="M 212 555 0143 4111,1111 1111 1111" style="stroke-dasharray:2.5,21.2;fill:#21255501"/>'
    result = filtered(svg(inside + '<g opacity=".4111111111111111" stroke="#00112233"/>'))
    assert result.svg is not None and result.found_by == {}


def test_our_own_words_in_a_drawing_are_no_persons() -> None:
    class Names:
        name, version, entities = "names", "1", ("person",)

        def detect(self, texts: Sequence[str]) -> list[list[Finding]]:
            words = [re.finditer("Jane|PERSON", text) for text in texts]
            return [[Finding("person", word.start(), word.end(), "names", "1") for word in found] for found in words]

    source = svg("<text>of Jane</text><text>of PERSON</text>"), svg("<text>of Jane</text><g type='PERSON'/>")
    results = filter_records(
        [Item(png(), None, one) for one in source], Policy(detectors=("names",)), Tools((Names(),))
    )
    first, second = (result.svg for result in results)
    assert first is not None and inner(first) == "<text>of [PERSON]</text><text>of [PERSON]</text>"
    assert second is None and results[1].metadata == {"svg:left_out:still_shows_person": 1}


def test_a_detector_that_fails_on_a_drawing_leaves_it_out() -> None:
    class Failing(PatternDetector):
        def detect(self, texts):  # type: ignore[no-untyped-def]
            if any("bad" in text for text in texts):
                raise RuntimeError(SECRET)
            return super().detect(texts)

    batch = [Item(png(), "a dot", svg(f"<text>{text}</text>")) for text in ("good", "bad", "fine")]
    results = filter_records(batch, Policy(), Tools((Failing(),)))
    assert [result.outcome for result in results] == ["kept"] * 3
    assert [result.svg is None for result in results] == [False, True, False]
    assert results[1].metadata["svg:left_out:detector_failed"] == 1


def test_a_drawing_of_what_was_painted_over_in_its_image_is_left_out() -> None:
    class Corner:
        name, version, entities = "faces", "1", ("face",)

        def detect(self, images: Sequence[Pixels]) -> list[list[Box]]:
            return [[Box("face", 0, 0, 1, 1, self.name, self.version)] if image.max() == 0 else [] for image in images]

    tools = Tools((PatternDetector(),), (Corner(),), pixels.decode, pixels.apply_boxes)
    for action, reasons in (("fill", ["svg:left_out:image_covered"]), ("keep", [])):
        policy = Policy.model_validate({"detectors": ["patterns", "faces"], "images": {"face": action}})
        (result,) = filter_records([Item(png(), "a dot", svg())], policy, tools)
        assert (result.outcome, result.svg is None) == ("kept", bool(reasons))
        assert [kind for kind in result.metadata if "left_out" in kind] == reasons


@pytest.mark.parametrize(
    "hostile",
    [
        f"<style>{' ' * 400_000}x</style>",
        f"<style>{'/*' * 200_000}</style>",
        f"<style>{'.a{fill:red}' * 20_000}</style>",
        f"""<g style="stroke-dasharray:{"," * 400_000}x"/>""",
        f"""<g transform="{"em" * 200_000}x"/>""",
        f"""<g fill="{"url( " * 80_000}"/>""",
        f"""<path d="{"1 " * 200_000}x"/>""",
        "<g>" * 100_000,
        "<text>" + "<tspan>a</tspan>" * 8_000 + "</text>",
    ],
)
def test_no_file_takes_more_than_a_few_passes(hostile: str) -> None:
    started = time.process_time()
    with contextlib.suppress(SvgError):
        drawing = read_svg(svg(hostile + DOT))
        drawing.readable(drawing.texts)
        drawing.serialised(drawing.texts)
    assert time.process_time() - started < 2


def test_a_record_that_is_not_kept_has_no_drawing() -> None:
    policy = Policy(captions={"email": "drop"})
    (result,) = filter_records([Item(png(), "a@example.org", svg())], policy, Tools((PatternDetector(),)))
    assert (result.outcome, result.svg) == ("dropped", None)
    assert not any(kind.startswith("svg:") for kind in result.metadata)


SEEDS = [
    svg('<g id="a" class="b"><text>a <tspan>b</tspan></text></g><use xlink:href="#a"/><style>.b{fill:red}</style>'),
    svg('<g style="fill:url(#a);stroke-width:2px"><!-- c --><metadata>x</metadata><path d="M0 0L1 1"/></g>'),
]  # fmt: skip


@settings(max_examples=200)
@given(st.data())
def test_damaged_files_are_stripped_or_refused_and_nothing_else(data: st.DataObject) -> None:
    source = bytearray(data.draw(st.sampled_from(SEEDS)))
    start = source.index(b">") - 20
    for _ in range(data.draw(st.integers(1, 4))):
        source[data.draw(st.integers(start, len(source) - 1))] = data.draw(st.sampled_from(b"<>/&\"'#;:{} ab\xff"))
    try:
        once = stripped(bytes(source))
    except SvgError:
        return
    ElementTree.fromstring(once)
    assert stripped(once.encode()) == once and read_svg(once.encode()).removed == {}
