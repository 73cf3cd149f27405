"""How well a policy's detectors do, on what `planting` and `planting_images` plant: shares, each with its interval.

Figures are named by dotted words, most general first: recall.email, recall.email.de_DE, leak.drop_on_uncertain,
faces.recall.20px. Nothing here returns or prints a value.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

from privacy.pii.filter import FilterResult, Item, Tools, filter_records
from privacy.pii.findings import Box, Finding, ImageDetector, Pixels
from privacy.pii.planting import LANGUAGES, Gold, GoldCaption, captions
from privacy.pii.planting_images import FACE_SIZES, TEXT_SIZES, faceless, faceless_crops, faces, strings
from privacy.pii.planting_metadata import planted_images, still_shows
from privacy.pii.policy import Policy

_BATCH = 64
_Z = 1.959964  # of a normal distribution's middle 95%
_DOT = next(planted_images(0, 1)).item.image  # captions are filtered with an image

Progress = Callable[[str], None]  # is told what is under way, every few seconds


def _silent(_: str) -> None: ...


@dataclass(frozen=True)
class Share:
    """`hits` of `of`."""

    hits: int
    of: int

    @property
    def rate(self) -> float:
        return self.hits / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """95% of the rate that these are a sample of. Source: Wilson 1927; Brown, Cai, DasGupta 2001, eq. 4."""
        middle = (self.hits + _Z**2 / 2) / (self.of + _Z**2)
        half = _Z / (self.of + _Z**2) * sqrt(self.hits * (self.of - self.hits) / self.of + _Z**2 / 4)
        # by the formula exactly 0 and 1 there, but for rounding
        return max(middle - half, 0.0) if self.hits else 0.0, min(middle + half, 1.0) if self.hits < self.of else 1.0


Figures = dict[str, Share]


class Counts:
    """Shares on their way: how often each was asked and how often so."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def add(self, hit: bool, *names: str) -> None:
        for name in names:
            self._counts[name][0] += hit
            self._counts[name][1] += 1

    def figures(self) -> Figures:
        return {name: Share(*counts) for name, counts in self._counts.items()}


# --- captions ---


def measure_captions(
    policy: Policy, tools: Tools, number: int, seed: int, progress: Progress = lambda _: None
) -> Figures:
    """What is found in planted captions, and what a filter with `policy` leaves of it.

    recall.ENTITY[.LOCALE], recall.all.LOCALE: values of which every letter and digit lies in findings of their entity.
    precision.ENTITY[.LOCALE]: findings that share a character with a planted value of their entity.
    leak[.of.ENTITY]: captions that hold a value (of the entity) of which a letter or digit is left by the filter that
    acts on what is certain alone; leak.drop_on_uncertain: by one that also drops captions with something uncertain.
    lost.holding, lost.plain, lost.lookalike: captions of that kind that this one drops; changed.plain and
    changed.lookalike: those of which it changes a letter, or drops.
    other_languages.*: the same of captions in eight other languages, an eighth as many each.

    Findings count from `certain` on. Values of entities that the policy keeps, or that no open detector finds, are
    planted and count for nothing.
    """
    judged = {entity for detector in tools.texts for entity in detector.entities if policy.action(entity) != "keep"}
    figures = _captions(captions(seed, number), policy, tools, judged, progress)
    foreign = [
        caption for language in LANGUAGES if language != "en" for caption in captions(seed, number // 8, language)
    ]
    if foreign:
        found = _captions(foreign, policy, tools, judged, progress)
        figures |= {f"other_languages.{name}": share for name, share in found.items()}
    return figures


def _captions(
    planted: Sequence[GoldCaption], policy: Policy, tools: Tools, judged: set[str], progress: Progress
) -> Figures:
    counts = Counts()
    found = _detect_certain([caption.text for caption in planted], policy, tools, progress)
    for caption, findings in zip(planted, found, strict=True):
        _count(counts, caption, findings, judged)
    for uncertain in ("keep", "drop"):
        strict = uncertain == "drop"
        results = _filtered([caption.text for caption in planted], policy, tools, uncertain, progress)
        for caption, result in zip(planted, results, strict=True):
            values = [gold for gold in caption.gold if gold.entity in judged]
            if values:
                left = _left(caption.text, result)
                shown = {gold.entity for gold in values if _shows(caption.text, gold, left)}
                counts.add(bool(shown), "leak.drop_on_uncertain" if strict else "leak")
                if strict:
                    counts.add(result.outcome != "kept", "lost.holding")
                else:
                    for entity in {gold.entity for gold in values}:
                        counts.add(entity in shown, f"leak.of.{entity}")
            elif strict and caption.kind != "holding":
                counts.add(result.outcome != "kept", f"lost.{caption.kind}")
                counts.add(result.caption != caption.text, f"changed.{caption.kind}")
    return counts.figures()


def _count(counts: Counts, caption: GoldCaption, findings: Sequence[Finding], judged: Iterable[str]) -> None:
    """Add to recall and precision of `judged` what was found in a caption."""
    for entity in judged:
        own = [finding for finding in findings if finding.entity == entity]
        values = [gold for gold in caption.gold if gold.entity == entity]
        for finding in own:
            true = any(finding.start < gold.end and gold.start < finding.end for gold in values)
            locale = (f"precision.{entity}.{caption.locale}",) if caption.locale else ()
            counts.add(true, f"precision.{entity}", *locale)
        for gold in values:
            shown = _shows(caption.text, gold, _outside(caption.text, own))
            names = (f"recall.{entity}", f"recall.{entity}.{caption.locale}", f"recall.all.{caption.locale}")
            counts.add(not shown, *names)


def measure_findings(
    planted: Sequence[GoldCaption], policy: Policy, tools: Tools, progress: Progress = _silent
) -> Figures:
    """recall and precision as of `measure_captions`; leak: captions with a value of which a letter or digit is in no
    finding, of whatever entity. No filter runs: the detectors may be another's.
    """
    judged = {entity for detector in tools.texts for entity in detector.entities}
    counts = Counts()
    found = _detect_certain([caption.text for caption in planted], policy, tools, progress)
    for caption, findings in zip(planted, found, strict=True):
        _count(counts, caption, findings, judged)
        if values := [gold for gold in caption.gold if gold.entity in judged]:
            left = _outside(caption.text, findings)
            counts.add(any(_shows(caption.text, gold, left) for gold in values), "leak")
    return counts.figures()


def measure_false_alarms(texts: Sequence[str], policy: Policy, tools: Tools, progress: Progress = _silent) -> Figures:
    """ENTITY: texts in which something of that entity is found; any: texts in which anything is."""
    counts = Counts()
    for findings in _detect_certain(texts, policy, tools, progress):
        found = {finding.entity for finding in findings}
        counts.add(bool(found), "any")
        for entity in {entity for detector in tools.texts for entity in detector.entities}:
            counts.add(entity in found, entity)
    return counts.figures()


def _detect_certain(texts: Sequence[str], policy: Policy, tools: Tools, progress: Progress) -> list[list[Finding]]:
    """What the open detectors of texts find in each, from the policy's `certain` on."""
    found: list[list[Finding]] = [[] for _ in texts]
    for detector in tools.texts:
        for start in range(0, len(texts), _BATCH):
            progress(f"captions through {detector.name}")
            for number, findings in enumerate(detector.detect(texts[start : start + _BATCH]), start):
                found[number] += [one for one in findings if one.score >= policy.threshold(one.entity).certain]
    return found


def _outside(text: str, findings: Iterable[Finding]) -> list[bool]:
    """Which characters of the text lie in no finding."""
    hidden = {place for finding in findings for place in range(finding.start, finding.end)}
    return [place not in hidden for place in range(len(text))]


def _filtered(
    texts: Sequence[str], policy: Policy, tools: Tools, uncertain: str, progress: Progress
) -> Iterator[FilterResult]:
    """Captions through the filter, whose every replacement is a fill: else what is left could not be told."""
    acting = {entity: action for entity, action in policy.captions.items() if action not in ("redact", "pseudonymise")}
    used = policy.model_copy(update={"captions": acting, "uncertain": uncertain})
    texts_alone = Tools(tools.texts)
    for start in range(0, len(texts), _BATCH):
        progress("captions through the filter")
        items = [Item(_DOT, text) for text in texts[start : start + _BATCH]]
        yield from filter_records(items, used, texts_alone)


_FILL = re.compile(r"\[[A-Z]+(?:_[A-Z]+)*\]")


def _left(text: str, result: FilterResult) -> list[bool]:
    """Which characters of the text the filter left standing."""
    if result.caption is None:
        return [False] * len(text)
    own = set(_FILL.findall(text))  # "[AT]" of an address may stand there from the beginning
    pattern, done = "", 0
    for mark in _FILL.finditer(result.caption):
        if mark[0] not in own:
            pattern += f"({re.escape(result.caption[done : mark.start()])}).+?"
            done = mark.end()
    match = re.fullmatch(f"{pattern}({re.escape(result.caption[done:])})", text, re.DOTALL)
    assert match is not None, "a filtered caption is its caption with pieces replaced"
    left = [False] * len(text)
    for group in range(1, len(match.groups()) + 1):
        left[match.start(group) : match.end(group)] = [True] * len(match[group])
    return left


def _shows(text: str, gold: Gold, left: Sequence[bool]) -> bool:
    return any(left[place] and text[place].isalnum() for place in range(gold.start, gold.end))


# --- images ---


def measure_images(policy: Policy, tools: Tools, number: int, progress: Progress = _silent) -> Figures:
    """What is found in planted pictures of 256 px, `number` of each size.

    faces.recall[.SIZEpx]: planted faces found; faces.false: photographs without a face in which one is found;
    faces.false.crops: LFW's pieces around faces. strings.recall[.SIZEpx]: planted strings hidden by boxes, as `Picture`
    says; strings.false: photographs without a string in which one is found.
    """
    of_faces = [detector for detector in tools.images if "face" in detector.entities]
    of_texts = [detector for detector in tools.images if "face" not in detector.entities]

    def boxes(detectors: Sequence[ImageDetector], pixels: Pixels) -> list[Box]:
        found = itertools.chain.from_iterable(detector.detect([pixels])[0] for detector in detectors)
        return [box for box in found if box.score >= policy.threshold(box.entity).certain]

    counts = Counts()
    for kind, detectors, sizes, make in (
        ("faces", of_faces, FACE_SIZES, faces), ("strings", of_texts, TEXT_SIZES, strings)
    ):  # fmt: skip
        if not detectors:
            continue
        for size in sizes:
            for picture in make(size, number):
                progress(f"{kind} of {size} px")
                counts.add(picture.found(boxes(detectors, picture.pixels)), f"{kind}.recall", f"{kind}.recall.{size}px")
        for pixels in faceless(4 * number):
            progress(f"pictures without {kind}")
            counts.add(bool(boxes(detectors, pixels)), f"{kind}.false")
    if of_faces:
        for pixels in faceless_crops()[:number]:
            counts.add(bool(boxes(of_faces, pixels)), "faces.false.crops")
    return counts.figures()


def measure_metadata(policy: Policy, number: int, seed: int) -> Figures:
    """metadata.survives[.PLACE]: values planted in an image's metadata that its bytes still hold after the filter.

    metadata.lost: images of these that the filter does not keep.
    """
    counts = Counts()
    without_detectors = policy.model_copy(update={"detectors": (), "images": {}, "captions": {}, "thresholds": {}})
    for planted in planted_images(seed, number):
        (result,) = filter_records([planted.item], without_detectors, Tools(()))
        for place, value in planted.values.items():
            counts.add(still_shows(value, result), "metadata.survives", f"metadata.survives.{place}")
        counts.add(result.outcome != "kept", "metadata.lost")
    return counts.figures()
