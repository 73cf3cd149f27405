"""What becomes of a record: personal data in caption and image acted on as the policy says, metadata stripped.

A pure function of (record, open detectors, policy). Nothing it returns but a kept record holds a value of one.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from privacy.pii.findings import Box, Finding, ImageDetector, MissingDetector, Pixels, TextDetector
from privacy.pii.metadata import ImageMetadataError, strip_metadata
from privacy.pii.patterns import PatternDetector
from privacy.pii.pixels import flatten_transparency
from privacy.pii.policy import Policy, check_entities
from privacy.pii.pseudonyms import Pseudonyms

Outcome = Literal["kept", "dropped", "quarantined"]
ApplyBoxes = Callable[[bytes, Sequence[Box], Literal["fill", "blur"], float], bytes]

_ENDS: Mapping[str, Outcome] = {"drop": "dropped", "quarantine": "quarantined"}  # the first is the stricter
_SAME_BOX = 0.5  # two boxes of an entity are one where they share this much of the smaller
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


@dataclass(frozen=True)
class FilterResult:
    """A record after the filter; image and caption are empty unless it is kept, and its repr shows neither.

    reason: a code, None for a kept record. findings: entity -> times in the caption; boxes: entity -> times in the
    image; found_by: "captions.email.patterns" -> times, before what detectors share is merged; acted, of a kept record:
    "captions.email.fill" -> times; metadata: kind -> pieces stripped from the image.
    """

    outcome: Outcome
    reason: str | None
    image: bytes = field(default=b"", repr=False)
    caption: str | None = field(default=None, repr=False)
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
    return filter_records([(image, caption)], policy, tools)[0]


@functools.cache
def _patterns_alone(apart: tuple[str, ...] | None) -> Tools:
    return Tools(() if apart is None else (PatternDetector(apart),))  # opened once: that takes a while


def filter_records(batch: Sequence[tuple[bytes, str | None]], policy: Policy, tools: Tools) -> list[FilterResult]:
    """Apply `policy` to (image, caption) records, detecting in batches; each result is a function of its record alone.

    Guarantee: in a kept record no detector finds what the policy does not keep, but for our own words and paint: not in
    its caption, nor, where detectors look at images, in its pixels; and the image holds nothing but what its pixels
    need. What still shows after acting drops the record. One on which a detector fails is quarantined. Run
    `check_tools` first.
    """
    records = [_Record(image, caption) for image, caption in batch]
    for record in records:
        record.strip()
    _filter_captions(records, policy, tools)  # also where the image is refused: what is found counts
    if tools.images:
        alive = _open(records)
        for start in range(0, len(alive), _IMAGES_AT_ONCE):
            _filter_images(alive[start : start + _IMAGES_AT_ONCE], policy, tools)
    return [record.result() for record in records]


_Seen = TypeVar("_Seen", Finding, Box)
_Item = TypeVar("_Item", str, Pixels)
_Item_contra = TypeVar("_Item_contra", contravariant=True)


class _Detector(Protocol[_Item_contra, _Seen]):
    """A TextDetector or an ImageDetector."""

    name: str

    def detect(self, items: Sequence[_Item_contra], /) -> list[list[_Seen]]: ...


@dataclass(frozen=True)
class _Verdict(Generic[_Seen]):
    """Findings that overlap, as one: the one that leads gives entity and action."""

    leader: _Seen
    action: str
    certain: bool
    group: list[_Seen]


class _Record:
    """A record on its way through. The first end stands.

    theirs: the caption with spaces for what we wrote into it; filled: what we painted over.
    """

    def __init__(self, image: bytes, caption: str | None) -> None:
        self.image, self.caption = image, caption
        self.outcome: Outcome = "kept"
        self.reason: str | None = None
        self.theirs = ""
        self.filled: list[Box] = []
        self.metadata: Mapping[str, int] = {}
        self.findings, self.boxes = Counter[str](), Counter[str]()
        self.found_by, self.acted = Counter[str](), Counter[str]()

    def end(self, outcome: Outcome, reason: str) -> None:
        if self.outcome == "kept":
            self.outcome, self.reason = outcome, reason

    def strip(self) -> None:
        try:
            stripped = strip_metadata(self.image)
        except ImageMetadataError as error:
            self.end("quarantined", error.reason)
        else:
            self.image, self.metadata = stripped.image, stripped.removed

    def settle(self, place: str, prefix: str, verdicts: Sequence[_Verdict[_Seen]]) -> list[_Verdict[_Seen]]:
        """End the record where a verdict says so; else give the verdicts to act on."""
        for action, outcome in _ENDS.items():
            for verdict in verdicts:
                if verdict.action == action:
                    self.end(outcome, f"{prefix}{'holds' if verdict.certain else 'uncertain'}_{verdict.leader.entity}")
        acting = [verdict for verdict in verdicts if self.outcome == "kept" and verdict.action != "keep"]
        self.acted.update(f"{place}.{verdict.leader.entity}.{verdict.action}" for verdict in acting)
        return acting

    def result(self) -> FilterResult:
        kept = self.outcome == "kept"
        image, caption, acted = (self.image, self.caption, self.acted) if kept else (b"", None, Counter[str]())
        counts = (dict(sorted(counter.items())) for counter in (self.findings, self.boxes, self.found_by, acted))
        return FilterResult(self.outcome, self.reason, image, caption, *counts, metadata=self.metadata)


def _filter_captions(records: Sequence[_Record], policy: Policy, tools: Tools) -> None:
    for record in records:
        if len(record.caption or "") > policy.max_caption_length:
            record.end("quarantined", "caption_too_long")
            record.caption = None
    changed: list[_Record] = []
    for record, found in _look(tools.texts, *_captions(records)):
        record.found_by.update(f"captions.{finding.entity}.{finding.detector}" for finding in found)
        verdicts = _judge(found, policy, policy.action, _overlapping)
        record.findings.update(finding.entity for finding in found if policy.action(finding.entity) == "keep")
        record.findings.update(verdict.leader.entity for verdict in verdicts)
        if acting := record.settle("captions", "", verdicts):
            record.caption, record.theirs = _rewrite(record.caption or "", acting, tools.pseudonyms)
            changed.append(record)
    for record, found in _look(tools.texts, *_captions(changed)):
        # What lies within our own words shows nothing: a person named [PERSON].
        left = [finding for finding in found if any(map(str.isalnum, record.theirs[finding.start : finding.end]))]
        for verdict in _judge(left, policy, policy.action, _overlapping):
            if verdict.action != "keep":
                record.end("dropped", f"still_shows_{verdict.leader.entity}")


def _filter_images(records: Sequence[_Record], policy: Policy, tools: Tools) -> None:
    changed: list[_Record] = []
    for record, found in _look(tools.images, *_decoded(records, tools)):
        record.found_by.update(f"images.{box.entity}.{box.detector}" for box in found)
        verdicts = _judge(found, policy, policy.image_action, _sharing_pixels)
        record.boxes.update(box.entity for box in found if policy.image_action(box.entity) == "keep")
        record.boxes.update(verdict.leader.entity for verdict in verdicts)
        if acting := record.settle("images", "image_", verdicts):
            _cover(record, acting, policy.box_margin, tools)
            changed.append(record)
    for record, found in _look(tools.images, *_decoded(_open(changed), tools)):
        left = [box for box in found if not any(_within(box, filled, policy.box_margin) for filled in record.filled)]
        for verdict in _judge(left, policy, policy.image_action, _sharing_pixels):
            if verdict.action != "keep":
                record.end("dropped", f"image_still_shows_{verdict.leader.entity}")


def _open(records: Sequence[_Record]) -> list[_Record]:
    return [record for record in records if record.outcome == "kept"]


def _captions(records: Sequence[_Record]) -> tuple[list[_Record], list[str]]:
    read = [record for record in records if record.caption]
    return read, [record.caption or "" for record in read]


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
    detectors: Sequence[_Detector[_Item, _Seen]], records: Sequence[_Record], items: Sequence[_Item]
) -> Iterator[tuple[_Record, list[_Seen]]]:
    """Each record with what all detectors find in its item; one on which a detector fails ends, and is left out."""
    found: list[list[_Seen] | None] = [[] for _ in items]
    for detector in detectors:
        for number, seen in enumerate(_detect(detector, items)):
            sofar = found[number]
            found[number] = None if seen is None or sofar is None else sofar + seen
    for record, seen in zip(records, found, strict=True):
        if seen is None:
            record.end("quarantined", "detector_failed")
        else:
            yield record, seen


def _detect(detector: _Detector[_Item, _Seen], items: Sequence[_Item]) -> list[list[_Seen] | None]:
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


def _judge(
    found: Sequence[_Seen],
    policy: Policy,
    action: Callable[[str], str],
    grouped: Callable[[Sequence[_Seen]], list[list[_Seen]]],
) -> list[_Verdict[_Seen]]:
    """What becomes of findings, group by group, without those that are kept or not `possible`.

    A group is uncertain where none of it is certain. Of the certain ones the strictest action stands, then the longest.
    """
    verdicts: list[_Verdict[_Seen]] = []
    strictness = {"drop": 2, "quarantine": 1}
    for group in grouped(
        [one for one in found if action(one.entity) != "keep" and one.score >= policy.threshold(one.entity).possible]
    ):
        certain = [
            one for one in group if policy.uncertain == "act" or one.score >= policy.threshold(one.entity).certain
        ]
        if certain:
            leader = max(certain, key=lambda one: (strictness.get(action(one.entity), 0), _size(one), one.score))
            verdicts.append(_Verdict(leader, action(leader.entity), True, group))
        else:
            verdicts.append(_Verdict(max(group, key=lambda one: one.score), policy.uncertain, False, group))
    return verdicts


def _size(one: Finding | Box) -> int:
    if isinstance(one, Finding):
        return one.end - one.start
    return (one.right - one.left) * (one.bottom - one.top)


def _overlapping(found: Sequence[Finding]) -> list[list[Finding]]:
    """Findings in order, those that share characters, by themselves or through others, together."""
    groups: list[list[Finding]] = []
    end = 0
    for finding in sorted(found, key=lambda finding: (finding.start, finding.end)):
        if groups and finding.start < end:
            groups[-1].append(finding)
        else:
            groups.append([finding])
        end = max(end, finding.end)
    return groups


def _sharing_pixels(found: Sequence[Box]) -> list[list[Box]]:
    """Boxes of one entity that share much of their pixels together: one thing, found twice."""
    groups: list[list[Box]] = []
    for box in found:
        same = [group for group in groups if any(_shared(box, other) >= _SAME_BOX for other in group)]
        groups = [group for group in groups if group not in same] + [[*(b for group in same for b in group), box]]
    return groups


def _shared(one: Box, other: Box) -> float:
    """The part of the smaller box that lies in the larger; 0 where they are of two entities."""
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    if one.entity != other.entity or width <= 0 or height <= 0:
        return 0.0
    return width * height / min(_size(one), _size(other))


def _rewrite(text: str, verdicts: Sequence[_Verdict[Finding]], pseudonyms: Pseudonyms | None) -> tuple[str, str]:
    """The text with every group of findings replaced, and the same with spaces for the replacements."""
    rewritten: list[str] = []
    theirs: list[str] = []
    done = 0
    for verdict in verdicts:
        leader = verdict.leader
        start, end = verdict.group[0].start, max(finding.end for finding in verdict.group)
        if verdict.action == "pseudonymise":
            assert pseudonyms is not None  # check_tools
            ours = pseudonyms.name(leader.entity, text[leader.start : leader.end])
        elif verdict.action == "redact":
            ours = ""
            if text[end : end + 1] == " " and text[max(start - 1, 0) : start] in ("", " "):
                end += 1  # else two spaces would stand side by side
        else:
            ours = f"[{leader.entity.upper()}]"
        rewritten += (text[done:start], ours)
        theirs += (text[done:start], " " * len(ours))
        done = end
    return "".join((*rewritten, text[done:])), "".join((*theirs, text[done:]))


def _cover(record: _Record, verdicts: Sequence[_Verdict[Box]], margin: float, tools: Tools) -> None:
    assert tools.apply_boxes is not None  # check_tools
    for action in ("blur", "fill"):
        boxes = [_around(verdict) for verdict in verdicts if verdict.action == action]
        if not boxes:
            continue
        try:
            record.image = tools.apply_boxes(record.image, boxes, action, margin)
        except Exception as error:
            record.end("quarantined", _reason(error, "not_covered"))
            return
        if action == "fill":
            record.filled = boxes


def _around(verdict: _Verdict[Box]) -> Box:
    """The smallest box around a group, in its leader's name."""
    group, leader = verdict.group, verdict.leader
    edges = (
        min(b.left for b in group),
        min(b.top for b in group),
        max(b.right for b in group),
        max(b.bottom for b in group),
    )
    return Box(leader.entity, *edges, leader.detector, leader.version, leader.score)


def _within(box: Box, filled: Box, margin: float) -> bool:
    """Whether a box, or the middle half of a face's, shows nothing but paint: hair around paint is found as a face."""
    part = 0.25 if box.entity == "face" else 0.0
    across, down = part * (box.right - box.left), part * (box.bottom - box.top)
    by = margin * max(filled.right - filled.left, filled.bottom - filled.top)
    return (
        box.left + across >= filled.left - by
        and box.top + down >= filled.top - by
        and box.right - across <= filled.right + by
        and box.bottom - down <= filled.bottom + by
    )
