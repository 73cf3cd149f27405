"""What becomes of a record: personal data in caption and image acted on as the policy says, metadata stripped.

A pure function of (record, open detectors, policy). Nothing it returns but a kept record holds a value of one.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeVar

from privacy.pii.findings import Box, ImageDetector, MissingDetector, Pixels, TextDetector
from privacy.pii.metadata import ImageMetadataError, strip_metadata
from privacy.pii.patterns import PatternDetector
from privacy.pii.pixels import flatten_transparency
from privacy.pii.policy import Policy, check_entities
from privacy.pii.pseudonyms import Pseudonyms
from privacy.pii.svg import Drawing, SvgError, read_svg
from privacy.pii.verdicts import Seen, Verdict, around, judge, overlapping, rewrite, sharing_pixels, within

Outcome = Literal["kept", "dropped", "quarantined"]
ApplyBoxes = Callable[[bytes, Sequence[Box], Literal["fill", "blur"], float], bytes]

_ENDS: Mapping[str, Outcome] = {"drop": "dropped", "quarantine": "quarantined"}  # the first is the stricter
_IMAGES_AT_ONCE = 8  # decoded images held in memory


@dataclass(frozen=True)
class Tools:
    """What a policy needs, opened; `check_tools` says whether all of it is here.

    decode: image bytes -> the upright image's pixels; its exceptions may carry a `reason`, a code.
    apply_boxes: (image bytes, boxes, "fill" or "blur", margin) -> image bytes without metadata.
    """

    texts: tuple[TextDetector, ...]
    images: tuple[ImageDetector, ...] = ()
    decode: Callable[[bytes], Pixels] | None = None
    apply_boxes: ApplyBoxes | None = None
    pseudonyms: Pseudonyms | None = None


class Item(NamedTuple):
    """A record before the filter: PNG or JPEG bytes, what is said of them, and the drawing they were made from."""

    image: bytes
    caption: str | None = None
    svg: bytes | None = None


@dataclass(frozen=True)
class FilterResult:
    """A record after the filter; image, caption and svg are empty unless it is kept, and its repr shows none of them.

    reason: a code, None for a kept record. findings: entity -> times in the caption; boxes: entity -> times in the
    image; found_by: "captions.email.patterns" -> times, before what detectors share is merged, also of "images" and
    "svg"; acted, of a kept record: "captions.email.fill" -> times; metadata: kind -> pieces stripped from the image and
    the drawing, "svg:left_out:REASON" -> 1 where the drawing was left out.
    """

    outcome: Outcome
    reason: str | None
    image: bytes = field(default=b"", repr=False)
    caption: str | None = field(default=None, repr=False)
    svg: bytes | None = field(default=None, repr=False)
    findings: Mapping[str, int] = field(default_factory=dict[str, int])
    boxes: Mapping[str, int] = field(default_factory=dict[str, int])
    found_by: Mapping[str, int] = field(default_factory=dict[str, int])
    acted: Mapping[str, int] = field(default_factory=dict[str, int])
    metadata: Mapping[str, int] = field(default_factory=dict[str, int])


def check_tools(policy: Policy, tools: Tools) -> None:
    """Refuse, before the first record, a policy that these tools cannot carry out (MissingDetector, ValueError)."""
    open_now = [detector.name for detector in (*tools.texts, *tools.images)]
    for name in policy.detectors:
        if name not in open_now:
            raise MissingDetector(f"policy.detectors names {name!r}, which is not open here: open it, or leave it out")
    for name in open_now:
        if name not in policy.detectors:
            raise ValueError(f"the detector {name!r} is open, and policy.detectors does not name it: add it there")
    if tools.images and (tools.decode is None or tools.apply_boxes is None):
        raise ValueError("policy.detectors looks at images, and tools has no decode or apply_boxes: give both")
    if policy.pseudonymises:
        if tools.pseudonyms is None:
            raise ValueError("policy.captions pseudonymises, and there is no key: name a key file")
        if policy.pseudonyms is not None:
            tools.pseudonyms.check(policy.pseudonyms.key_id, "policy.pseudonyms.key_id")
    check_entities(
        policy,
        tuple(entity for detector in tools.texts for entity in detector.entities),
        tuple(entity for detector in tools.images for entity in detector.entities),
    )


def filter_record(image: bytes, caption: str | None, policy: Policy, tools: Tools | None = None) -> FilterResult:
    """Apply `policy` to one record; without `tools`, by the patterns alone."""
    if tools is None:
        tools = _patterns_alone(policy.settings("patterns")["apart"] if "patterns" in policy.detectors else None)
        check_tools(policy, tools)
    return filter_records([Item(image, caption)], policy, tools)[0]


@functools.cache
def _patterns_alone(apart: tuple[str, ...] | None) -> Tools:
    return Tools(() if apart is None else (PatternDetector(apart),))  # opened once: that takes a while


def filter_records(batch: Sequence[Item], policy: Policy, tools: Tools) -> list[FilterResult]:
    """Apply `policy` to records, detecting in batches; each result is a function of its record alone.

    Guarantee: in a kept record no detector finds what the policy does not keep, but for our own words and paint: not in
    its caption, nor, where detectors look at images, in its pixels, nor in what can be read in its drawing; and image
    and drawing hold nothing but what is drawn. What still shows after acting drops the record: of a text all look
    again, of an image those that had found what was covered. One on which a detector fails is quarantined. What would
    end a record by its drawing leaves the drawing out instead. Run `check_tools` first.
    """
    records = [_Record(item) for item in batch]
    for record in records:
        record.strip()
    _filter_texts("captions", records, policy, tools)  # also where the image is refused: what is found counts
    if tools.images:
        alive = _open(records)
        for start in range(0, len(alive), _IMAGES_AT_ONCE):
            _filter_images(alive[start : start + _IMAGES_AT_ONCE], policy, tools)
    _filter_drawings(_open(records), policy, tools)
    return [record.result() for record in records]


_Item = TypeVar("_Item", str, Pixels)
_Item_contra = TypeVar("_Item_contra", contravariant=True)


class _Detector(Protocol[_Item_contra, Seen]):
    """A TextDetector or an ImageDetector."""

    @property
    def name(self) -> str: ...

    def detect(self, items: Sequence[_Item_contra], /) -> list[list[Seen]]: ...


class _Text:
    """A text on its way through. The first end stands.

    theirs: the text with spaces for what we wrote into it.
    """

    def __init__(self, text: str | None, theirs: str | None = None) -> None:
        self.text, self.theirs = text, theirs if theirs is not None else text or ""
        self.outcome: Outcome = "kept"
        self.reason: str | None = None
        self.findings, self.found_by, self.acted = Counter[str](), Counter[str](), Counter[str]()

    def end(self, outcome: Outcome, reason: str) -> None:
        if self.outcome == "kept":
            self.outcome, self.reason = outcome, reason

    def settle(self, place: str, prefix: str, verdicts: Sequence[Verdict[Seen]]) -> list[Verdict[Seen]]:
        """End the record where a verdict says so; else give the verdicts to act on."""
        for action, outcome in _ENDS.items():
            for verdict in verdicts:
                if verdict.action == action:
                    self.end(outcome, f"{prefix}{'holds' if verdict.certain else 'uncertain'}_{verdict.leader.entity}")
        acting = [verdict for verdict in verdicts if self.outcome == "kept" and verdict.action != "keep"]
        self.acted.update(f"{place}.{verdict.leader.entity}.{verdict.action}" for verdict in acting)
        return acting


_AnyText = TypeVar("_AnyText", bound=_Text)


class _Record(_Text):
    """A record on its way through: its text is the caption.

    filled: what we painted over; covered_for: who had found what was painted over or blurred.
    """

    def __init__(self, item: Item) -> None:
        super().__init__(item.caption)
        self.image, self.unread_svg = item.image, item.svg
        self.svg: bytes | None = None  # once it is filtered
        self.filled: list[Box] = []
        self.covered_for: set[str] = set()
        self.boxes, self.metadata = Counter[str](), Counter[str]()

    def strip(self) -> None:
        try:
            stripped = strip_metadata(self.image)
        except ImageMetadataError as error:
            self.end("quarantined", error.reason)
        else:
            self.image = stripped.image
            self.metadata.update(stripped.removed)

    def result(self) -> FilterResult:
        kept = self.outcome == "kept"
        image, caption, svg = (self.image, self.text, self.svg) if kept else (b"", None, None)
        counters = (self.findings, self.boxes, self.found_by, self.acted if kept else Counter[str](), self.metadata)
        return FilterResult(
            self.outcome, self.reason, image, caption, svg, *(dict(sorted(counter.items())) for counter in counters)
        )


def _filter_texts(place: str, texts: Sequence[_Text], policy: Policy, tools: Tools) -> None:
    _limit(texts, policy)
    changed: list[_Text] = []
    for text, found in _look(tools.texts, *_read(texts)):
        text.found_by.update(f"{place}.{finding.entity}.{finding.detector}" for finding in found)
        verdicts = judge(found, policy, policy.action, overlapping)
        text.findings.update(finding.entity for finding in found if policy.action(finding.entity) == "keep")
        text.findings.update(verdict.leader.entity for verdict in verdicts)
        if acting := text.settle(place, "", verdicts):
            text.text, text.theirs = rewrite(text.text or "", acting, tools.pseudonyms)
            changed.append(text)
    _look_again(changed, policy, tools)


def _limit(texts: Sequence[_Text], policy: Policy) -> None:
    for text in texts:
        if len(text.text or "") > policy.max_caption_length:
            text.end("quarantined", "caption_too_long")
            text.text = None


def _look_again(texts: Sequence[_Text], policy: Policy, tools: Tools) -> None:
    """End what still shows something."""
    for text, found in _look(tools.texts, *_read(texts)):
        # What lies within our own words shows nothing: a person named [PERSON].
        left = [finding for finding in found if any(map(str.isalnum, text.theirs[finding.start : finding.end]))]
        for verdict in judge(left, policy, policy.action, overlapping):
            if verdict.action != "keep":
                text.end("dropped", f"still_shows_{verdict.leader.entity}")


def _filter_drawings(records: Sequence[_Record], policy: Policy, tools: Tools) -> None:
    """Each record's drawing as it may stay: its lettering is acted on as captions are, then all of it read again."""
    drawings: list[tuple[_Record, Drawing, list[_Text]]] = []
    for record in records:
        if record.unread_svg is not None:
            if any(act.startswith("images.") for act in record.acted):  # what was painted over is drawn there, too
                record.metadata["svg:left_out:image_covered"] += 1
                continue
            try:
                drawing = read_svg(record.unread_svg)
            except SvgError as error:
                record.metadata[f"svg:left_out:{error.reason}"] += 1
            else:
                record.metadata.update(drawing.removed)
                drawings.append((record, drawing, [_Text(text) for text in drawing.texts]))
    _filter_texts("svg", [text for _, _, texts in drawings for text in texts], policy, tools)
    wholes = [
        _Text(drawing.readable([text.text or "" for text in texts]), drawing.readable([text.theirs for text in texts]))
        for _, drawing, texts in drawings
    ]
    _limit(wholes, policy)
    _look_again(wholes, policy, tools)
    for (record, drawing, texts), whole in zip(drawings, wholes, strict=True):
        for text in texts:
            record.found_by.update(text.found_by)
        reason = next((text.reason for text in (*texts, whole) if text.reason is not None), None)
        if reason is not None:
            record.metadata[f"svg:left_out:{reason}"] += 1
            continue
        record.svg = drawing.serialised([text.text or "" for text in texts])
        for text in texts:
            record.acted.update(text.acted)


def _filter_images(records: Sequence[_Record], policy: Policy, tools: Tools) -> None:
    changed: list[_Record] = []
    for record, found in _look(tools.images, *_decoded(records, tools)):
        record.found_by.update(f"images.{box.entity}.{box.detector}" for box in found)
        verdicts = judge(found, policy, policy.image_action, sharing_pixels)
        record.boxes.update(box.entity for box in found if policy.image_action(box.entity) == "keep")
        record.boxes.update(verdict.leader.entity for verdict in verdicts)
        if acting := record.settle("images", "image_", verdicts):
            record.covered_for = {box.detector for verdict in acting for box in verdict.group}
            _cover(record, acting, policy.box_margin, tools)
            changed.append(record)
    _look_again_at_images(changed, policy, tools)


def _look_again_at_images(records: Sequence[_Record], policy: Policy, tools: Tools) -> None:
    """End what still shows something to a detector that had found what was covered.

    The others have looked already. Covering takes away and uncovers nothing: what they passed over was there for them
    before, in the same pixels (but for a JPEG's new rounding), and what they had found to act on makes them one of
    those that look again, at the whole picture as it is stored.
    """
    shown = list(zip(*_decoded(_open(records), tools), strict=True))
    for detector in tools.images:
        again = [(record, image) for record, image in shown if detector.name in record.covered_for]
        for record, found in _look([detector], [record for record, _ in again], [image for _, image in again]):
            left = [box for box in found if not any(within(box, filled, policy.box_margin) for filled in record.filled)]
            for verdict in judge(left, policy, policy.image_action, sharing_pixels):
                if verdict.action != "keep":
                    record.end("dropped", f"image_still_shows_{verdict.leader.entity}")


def _open(records: Sequence[_Record]) -> list[_Record]:
    return [record for record in records if record.outcome == "kept"]


def _read(texts: Sequence[_AnyText]) -> tuple[list[_AnyText], list[str]]:
    read = [text for text in texts if text.text]
    return read, [text.text or "" for text in read]


def _decoded(records: Sequence[_Record], tools: Tools) -> tuple[list[_Record], list[Pixels]]:
    assert tools.decode is not None  # check_tools
    read: list[_Record] = []
    images: list[Pixels] = []
    for record in records:
        try:
            record.image = flatten_transparency(record.image)  # else what lies under it stays, unseen
            images.append(tools.decode(record.image))
        except Exception as error:
            record.end("quarantined", _reason(error, "undecodable"))
        else:
            read.append(record)
    return read, images


def _look(
    detectors: Sequence[_Detector[_Item, Seen]], records: Sequence[_AnyText], items: Sequence[_Item]
) -> Iterator[tuple[_AnyText, list[Seen]]]:
    """Each text, or record, with what all find in its item; one on which a detector fails ends, and is left out."""
    found: list[list[Seen] | None] = [[] for _ in items]
    for detector in detectors:
        for number, seen in enumerate(_detect(detector, items)):
            sofar = found[number]
            found[number] = None if seen is None or sofar is None else sofar + seen
    for record, seen in zip(records, found, strict=True):
        if seen is None:
            record.end("quarantined", "detector_failed")
        else:
            yield record, seen


def _detect(detector: _Detector[_Item, Seen], items: Sequence[_Item]) -> list[list[Seen] | None]:
    """What is found in each item; None for an item that the detector fails on, which halving the batch tells."""
    if not items:
        return []
    try:
        found = detector.detect(items)
    except Exception:  # its message may hold the text
        if len(items) == 1:
            return [None]
        half = len(items) // 2
        return _detect(detector, items[:half]) + _detect(detector, items[half:])
    assert len(found) == len(items), f"{detector.name} gave {len(found)} answers for {len(items)} items"
    return list(found)


def _reason(error: Exception, otherwise: str) -> str:
    """The code that an exception carries; never its message, which may hold a value."""
    reason = getattr(error, "reason", None)
    return reason if isinstance(reason, str) else otherwise


def _cover(record: _Record, verdicts: Sequence[Verdict[Box]], margin: float, tools: Tools) -> None:
    assert tools.apply_boxes is not None  # check_tools
    for action in ("blur", "fill"):
        boxes = [around(verdict) for verdict in verdicts if verdict.action == action]
        if not boxes:
            continue
        try:
            record.image = tools.apply_boxes(record.image, boxes, action, margin)
        except Exception as error:
            record.end("quarantined", _reason(error, "not_covered"))
            return
        if action == "fill":
            record.filled = boxes
