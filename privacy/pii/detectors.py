"""The detectors that a policy can name, and how each is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from privacy.pii.adapters import GlinerDetector, PresidioDetector
from privacy.pii.faces import FaceDetector
from privacy.pii.findings import ImageDetector, TextDetector
from privacy.pii.image_text import ImageTextDetector
from privacy.pii.names import open_names
from privacy.pii.patterns import PatternDetector
from privacy.pii.policy import Policy

Settings = Mapping[str, Any]

TEXT_DETECTORS: Mapping[str, Callable[[Settings], TextDetector]] = MappingProxyType({
    "patterns": lambda settings: PatternDetector(**settings),
    "names": lambda settings: open_names(**settings),
    "presidio": lambda settings: PresidioDetector(**settings),
    "gliner": lambda settings: GlinerDetector(**settings),
})  # fmt: skip

# Those of images are given the open detectors of texts, which judge what is read.
IMAGE_DETECTORS: Mapping[str, Callable[[Settings, Sequence[TextDetector]], ImageDetector]] = MappingProxyType({
    "faces_fast": lambda settings, _: FaceDetector(fast=True, **settings),
    "faces": lambda settings, _: FaceDetector(**settings),
    "image_text": lambda settings, texts: ImageTextDetector(texts, **settings),
})  # fmt: skip


def open_detectors(policy: Policy) -> tuple[tuple[TextDetector, ...], tuple[ImageDetector, ...]]:
    """All detectors that `policy` names, those of texts and those of images, each model compared with its digest.

    Raises MissingDetector where one cannot be opened here.
    """
    texts = tuple(TEXT_DETECTORS[name](policy.settings(name)) for name in policy.text_detectors)
    return texts, tuple(IMAGE_DETECTORS[name](policy.settings(name), texts) for name in policy.image_detectors)
