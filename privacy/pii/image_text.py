"""Personal data written in images: read by RapidOCR (PP-OCRv4, Apache 2.0), judged by the detectors of captions.

Source: Li et al. 2022, "PP-OCRv3"; the package `rapidocr-onnxruntime` brings the models.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from privacy.pii.findings import Box, MissingDetector, Pixels, TextDetector
from privacy.pii.onnx_models import MEND, load_model

_PACKAGE = "rapidocr_onnxruntime"
_MODELS = {
    "models/ch_PP-OCRv4_det_infer.onnx": "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
    "models/ch_PP-OCRv4_rec_infer.onnx": "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
    "models/ch_ppocr_mobile_v2.0_cls_infer.onnx": "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
}
_VERSION = "rapidocr-ppocrv4-2"
# The shorter side that an image is enlarged to before it is read. The package enlarges a copy to find lines in and cuts
# them out of the original: of letters of 10 px little is left, and the corners are rounded to whole pixels.
_SHORTER_SIDE = 448
_LEAST_SIDE, _MAX_ASPECT = 32, 4  # what is smaller or longer is padded: else it would be enlarged without bound
_LEAST_LINE = [3, 48, 96]  # colours, height, width that a line is padded to: by the package to 320, for thrice the time
_TORN = re.compile(r"\s*([@._-])\s*")  # a reader puts spaces where letters stand apart
_MISREAD = re.compile(r"(?<=\d)[:,;](?=\d)")  # and sees more in a dot between digits than there is


class _Line(NamedTuple):
    """A line of text as it was read, how sure the reader is, and its place."""

    text: str
    score: float
    edges: tuple[int, int, int, int]  # left, top, right, bottom


class _Reading(NamedTuple):
    """A text to look for entities in, and of which lines it is: their number, start and end in it."""

    text: str
    places: list[tuple[int, int, int]]


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
        scale = max(_SHORTER_SIDE / min(padded.shape[:2]), 1.0)
        if scale > 1:
            size = (round(padded.shape[1] * scale), round(padded.shape[0] * scale))
            padded = np.asarray(Image.fromarray(padded).resize(size, Image.Resampling.BICUBIC))
        read, _ = self._read_image(np.ascontiguousarray(padded[..., ::-1]))  # BGR
        lines: list[_Line] = []
        for corners, text, score in read or ():
            (left, top), (right, bottom) = np.min(corners, axis=0) / scale, (np.max(corners, axis=0) + 1) / scale
            edges = (
                max(int(left), 0),
                max(int(top), 0),
                min(-int(-right // 1), width),
                min(-int(-bottom // 1), height),
            )
            if edges[0] < edges[2] and edges[1] < edges[3]:
                lines.append(_Line(str(text), float(score), edges))
        return lines

    def _boxes(self, lines: Sequence[_Line]) -> list[Box]:
        """One box for each line and entity, with the best score."""
        scores: list[dict[str, float]] = [{"text": 1.0} if self._any_text else {} for _ in lines]
        readings = _readings(lines)
        texts = [reading.text for reading in readings]
        for detector in self._texts if texts else ():
            for reading, findings in zip(readings, detector.detect(texts), strict=True):
                for finding in findings:
                    for number, start, end in reading.places:
                        if finding.start < end and finding.end > start:
                            best = max(scores[number].get(finding.entity, 0.0), finding.score)
                            scores[number][finding.entity] = best
        return [
            Box(entity, *line.edges, self.name, self.version, score)
            for line, found in zip(lines, scores, strict=True)
            for entity, score in sorted(found.items())
        ]


def _readings(lines: Sequence[_Line]) -> list[_Reading]:
    """What the lines may say: all together, each alone, as it is read and as it may have been meant, and in rows.

    A value, and the word that announces it, may stand on two lines; a wide space may have cut one in two.
    """
    read = [number for number, line in enumerate(lines) if line.text.strip()]
    readings = [_joined(lines, read, "\n")] if read else []
    for number in read:
        text = lines[number].text
        meant = _TORN.sub(r"\1", text)
        for reading in dict.fromkeys((text, meant, _MISREAD.sub(".", meant))):
            readings.append(_Reading(reading, [(number, 0, len(reading))]))
    for row in _rows(lines, read):
        readings += (_joined(lines, row, between) for between in ("", " ") if len(row) > 1)
    return readings


def _joined(lines: Sequence[_Line], numbers: Sequence[int], between: str) -> _Reading:
    places: list[tuple[int, int, int]] = []
    start = 0
    for number in numbers:
        places.append((number, start, start + len(lines[number].text)))
        start = places[-1][2] + len(between)
    return _Reading(between.join(lines[number].text for number in numbers), places)


def _rows(lines: Sequence[_Line], numbers: Sequence[int]) -> list[list[int]]:
    """The lines that stand side by side, from the left, no further apart than they are high twice over."""
    rows: list[list[int]] = []
    for number in sorted(numbers, key=lambda number: lines[number].edges[0]):
        left, top, _, bottom = lines[number].edges
        for row in rows:
            _, its_top, its_right, its_bottom = lines[row[-1]].edges
            height = min(bottom - top, its_bottom - its_top)
            if min(bottom, its_bottom) - max(top, its_top) >= height / 2 and abs(left - its_right) <= 2 * height:
                row.append(number)
                break
        else:
            rows.append([number])
    return rows


def _open_reader() -> Any:
    """RapidOCR on one thread, which gives also what it hardly can read."""
    for file, sha256 in _MODELS.items():
        load_model("image_text", _PACKAGE, file, sha256)
    try:
        package: Any = importlib.import_module(_PACKAGE)
    except ImportError:
        raise MissingDetector(f"the detector 'image_text' cannot import {_PACKAGE}: {MEND}") from None
    reader = package.RapidOCR(
        intra_op_num_threads=1,
        inter_op_num_threads=1,
        text_score=0.0,
        det_limit_side_len=_SHORTER_SIDE,
        rec_img_shape=_LEAST_LINE,
    )
    # The package makes every pixel a number of 64 bits, and that one of 32, which takes 4 ms of an image. There are 256
    # values, the same for each colour.
    prepare: Any = reader.text_det.get_preprocess(_SHORTER_SIDE)
    shades = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    values = prepare.normalize(shades).astype(np.float32)[:, 0]
    prepare.normalize = values.__getitem__
    reader.text_det.get_preprocess = lambda longer_side: prepare  # pyright: ignore[reportUnknownLambdaType]
    return reader
