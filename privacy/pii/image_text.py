"""Personal data written in images: read by RapidOCR (PP-OCRv4, Apache 2.0), judged by the detectors of captions.

Source: Li et al. 2022, "PP-OCRv3"; the package `rapidocr-onnxruntime` brings the models.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from privacy.pii.findings import Box, Finding, MissingDetector, Pixels, TextDetector
from privacy.pii.onnx_models import MEND, load_model

_PACKAGE = "rapidocr_onnxruntime"
_MODELS = {
    "models/ch_PP-OCRv4_det_infer.onnx": "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
    "models/ch_PP-OCRv4_rec_infer.onnx": "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
    "models/ch_ppocr_mobile_v2.0_cls_infer.onnx": "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
}
_VERSION = "rapidocr-ppocrv4-1"
# The shorter side that text is looked for at. Of strings drawn into photographs of 256 px, at 10, 14 and 20 px, 57 of
# 72 are found at 320 px, 66 at 448, 67 at 512 for up to 1.7 times 448's time. On plain ground 80 of 80 at 448.
_SHORTER_SIDE = 448
_LEAST_SIDE, _MAX_ASPECT = 32, 4  # what is smaller or longer is padded: the package would enlarge it without bound
_TORN = re.compile(r"\s*([@._-])\s*")  # a reader puts spaces where letters stand apart


class _Line(NamedTuple):
    """A line of text as it was read, how sure the reader is, and its place."""

    text: str
    score: float
    edges: tuple[int, int, int, int]  # left, top, right, bottom


class ImageTextDetector:
    """The ImageDetector "image_text": lines of text that hold what `texts` find, each box a whole line.

    A box carries the entity and the score of the finding; one that goes over lines gives a box for each.
    any_text: every line is a box of the entity "text" too, read or not. Raises MissingDetector when opened, where the
    package or a model is absent. Each image is looked at by itself. What is read goes nowhere but to `texts`.
    """

    name = "image_text"

    def __init__(self, texts: Sequence[TextDetector], any_text: bool = False) -> None:
        self._texts, self._any_text = tuple(texts), any_text
        found = dict.fromkeys(entity for detector in texts for entity in detector.entities)
        self.entities = (*found, "text") if any_text else tuple(found)
        self._read_image = _open_reader()
        digests = "+".join(digest[:12] for digest in _MODELS.values())
        readers = " ".join(f"{detector.name}({detector.version})" for detector in texts)
        self.version = f"{_VERSION} {_SHORTER_SIDE}px {digests} {readers}".strip()

    def detect(self, images: Sequence[Pixels]) -> list[list[Box]]:
        """For each image its boxes, line by line from the top."""
        return [self._boxes(self._read(image)) for image in images]

    def _read(self, image: Pixels) -> list[_Line]:
        height, width = image.shape[:2]
        least = max(_LEAST_SIDE, -(-max(height, width) // _MAX_ASPECT))
        more = ((0, max(least - height, 0)), (0, max(least - width, 0)), (0, 0))
        padded = np.pad(image, more, mode="edge") if any(after for _, after in more) else image
        read, _ = self._read_image(np.ascontiguousarray(padded[..., ::-1]))  # BGR
        lines: list[_Line] = []
        for corners, text, score in read or ():
            (left, top), (right, bottom) = np.floor(np.min(corners, axis=0)), np.ceil(np.max(corners, axis=0)) + 1
            edges = (max(int(left), 0), max(int(top), 0), min(int(right), width), min(int(bottom), height))
            if edges[0] < edges[2] and edges[1] < edges[3]:
                lines.append(_Line(str(text), float(score), edges))
        return lines

    def _boxes(self, lines: Sequence[_Line]) -> list[Box]:
        """One box for each line and entity, with the best score."""
        scores: list[dict[str, float]] = [{} for _ in lines]
        joined, starts = "", list[int]()
        for line in lines:
            starts.append(len(joined))
            joined += line.text + "\n"
        for finding in self._found(joined):  # a value, and the word that announces it, may stand on two lines
            for number, (line, start) in enumerate(zip(lines, starts, strict=True)):
                if finding.start < start + len(line.text) and finding.end > start:
                    _raise(scores[number], finding)
        for number, line in enumerate(lines):
            for text in {line.text, _TORN.sub(r"\1", line.text)}:
                for finding in self._found(text):
                    _raise(scores[number], finding)
            if self._any_text:
                scores[number]["text"] = 1.0
        return [
            Box(entity, *line.edges, self.name, self.version, score)
            for line, found in zip(lines, scores, strict=True)
            for entity, score in sorted(found.items())
        ]

    def _found(self, text: str) -> list[Finding]:
        if not text.strip():
            return []
        return [finding for detector in self._texts for finding in detector.detect([text])[0]]


def _raise(scores: dict[str, float], finding: Finding) -> None:
    scores[finding.entity] = max(scores.get(finding.entity, 0.0), finding.score)


def _open_reader() -> Any:
    """RapidOCR on one thread, which gives also what it hardly can read."""
    for file, sha256 in _MODELS.items():
        load_model("image_text", _PACKAGE, file, sha256)
    try:
        package: Any = importlib.import_module(_PACKAGE)
    except ImportError:
        raise MissingDetector(f"the detector 'image_text' cannot import {_PACKAGE}: {MEND}") from None
    return package.RapidOCR(
        intra_op_num_threads=1, inter_op_num_threads=1, text_score=0.0, det_limit_side_len=_SHORTER_SIDE
    )
