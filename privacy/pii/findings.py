"""What a detector of personal data is, and what it says: where, never what.

No value reaches a repr, a log, an exception or a manifest. A change of what a detector finds raises its version.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # RGB, (height, width, 3)


class MissingDetector(ValueError):
    """A detector that a policy names cannot run here: its package or model is absent, or not the one that is pinned."""


@dataclass(frozen=True, slots=True)
class Finding:
    """text[start:end] is an `entity`, says `detector` in its `version`, as sure as `score` (0 to 1)."""

    entity: str
    start: int
    end: int
    detector: str
    version: str
    score: float = 1.0


@dataclass(frozen=True, slots=True)
class Box:
    """Pixels [top, bottom) x [left, right) of the upright image show an `entity`."""

    entity: str
    left: int
    top: int
    right: int
    bottom: int
    detector: str
    version: str
    score: float = 1.0

    def enlarged(self, margin: float) -> Box:
        """With `margin` of its longer side on each side: pixels that this touches belong to it."""
        by = math.ceil(margin * max(self.right - self.left, self.bottom - self.top))
        return replace(self, left=self.left - by, top=self.top - by, right=self.right + by, bottom=self.bottom + by)


class TextDetector(Protocol):
    """Finds entities in texts. Raises MissingDetector when opened, never later."""

    name: str
    version: str
    entities: tuple[str, ...]

    def detect(self, texts: Sequence[str]) -> list[list[Finding]]: ...


class ImageDetector(Protocol):
    """Finds entities in images. Raises MissingDetector when opened, never later."""

    name: str
    version: str
    entities: tuple[str, ...]

    def detect(self, images: Sequence[Pixels]) -> list[list[Box]]: ...
