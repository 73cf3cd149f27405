"""Photographs with a face or a string planted at a known place, to measure detectors on; one half is for tuning them.

Nothing is fetched: faces and most photographs are scikit-image's (100 faces of 25 px of LFW, Huang et al. 2007), two
photographs scikit-learn's, the letters Pillow's and Matplotlib's. The halves share no face, photograph or font. A
picture is a function of (half, size, number): the first 100 of a size are the same in a trial of 100 as of 1,000.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from privacy.pii.findings import Box, Pixels
from privacy.pii.values import MAKERS

Half = Literal["tune", "measure"]

SIDE = 256  # of every picture, in pixels
FACE_SIZES = (20, 24, 32, 48, 64, 96, 128, 192, 256)
TEXT_SIZES = (10, 12, 14, 16, 20, 24, 32)

_SCENES: dict[Half, tuple[str, ...]] = {
    "tune": ("coffee", "chelsea", "brick", "gravel", "page", "retina", "colorwheel", "immunohistochemistry"),
    "measure": (
        "rocket", "grass", "horse", "text", "clock", "moon", "logo", "hubble_deep_field", "stereo_motorcycle",
        "china.jpg", "flower.jpg",
    ),
}  # fmt: skip
_FONTS: dict[Half, tuple[str, ...]] = {
    "tune": ("", "DejaVuSans", "DejaVuSansMono", "DejaVuSerif-Bold", "STIXGeneralBol"),  # "": Pillow's own
    "measure": (
        "DejaVuSerif", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif-Italic",
        "STIXGeneral", "STIXGeneralItalic",
    ),
}  # fmt: skip
_WRITTEN = (("email", "en_US"), ("phone", "en_US"), ("card", "en_US"), ("ip", "en_US"), ("iban", "de_DE"))
_INKS = ("black", "white", "yellow", "navy", "darkred", "cyan")
_LEAST_CONTRAST = 4.5  # of ink to what it stands on, as WCAG 2.2 asks of text that is to be read


_WRITING = ("page", "text")  # photographs of writing, on which a string would be crossed by another


class Picture(NamedTuple):
    """Pixels that show an `entity` within `edges` (left, top, right, bottom), drawn `size` pixels high."""

    pixels: Pixels
    entity: str
    size: int
    edges: tuple[int, int, int, int]

    def found(self, boxes: Sequence[Box]) -> bool:
        """A face: by a box around its middle, of its size within a factor of 2.5.

        A string: by boxes of whatever entity which together hide 9 of 10 of its pixels' columns, over half its height.
        """
        left, top, right, bottom = self.edges
        if self.entity == "face":
            x, y = (left + right) / 2, (top + bottom) / 2
            return any(
                box.left < x < box.right and box.top < y < box.bottom
                and 0.4 * self.size < max(box.right - box.left, box.bottom - box.top) < 2.5 * self.size
                for box in boxes
            )  # fmt: skip
        hidden = np.zeros((bottom, right), np.bool_)
        for box in boxes:
            hidden[box.top : box.bottom, box.left : box.right] = True
        return bool((hidden[top:, left:].mean(axis=0) >= 0.5).mean() >= 0.9)


def faces(size: int, number: int, half: Half = "measure") -> Iterator[Picture]:
    """Pictures of one face whose height, from forehead to chin, is about `size` pixels.

    Turned by up to 20 degrees, grey or in a tone of skin, lit from a side; as a square piece, or fading into the scene.
    """
    heads = _faces(half)
    for turn in range(number):
        chance = _chance("face", half, size, turn)
        scene = _scene(chance, half)
        left, top = (chance.randrange(SIDE - size + 1) for _ in range(2))
        _paste(chance, scene, heads[turn % len(heads)], size, left, top)
        yield Picture(_stored(chance, scene), "face", size, (left, top, left + size, top + size))


def strings(
    size: int,
    number: int,
    half: Half = "measure",
    value: Callable[[random.Random], tuple[str, str]] | None = None,
) -> Iterator[Picture]:
    """Pictures with one string written on a photograph, in a font of `size` pixels, turned by up to 3 degrees.

    value: gives (entity, text); by default an e-mail address, phone, card, IP address or IBAN.
    The ink is one that can be read where it stands, outlined in a third of the pictures.
    """
    for turn in range(number):
        chance = _chance("string", half, size, turn)
        scene = _scene(chance, half, but=_WRITING)
        font = _font(chance.choice(_FONTS[half]), size)
        while True:
            entity, text = (value or _value)(chance)
            layer, edges = _written(chance, text, font)
            if layer is not None:
                break
        letters, outline = layer
        left, top, right, bottom = edges
        under = scene[top:bottom, left:right].reshape(-1, 3)
        ink, contrast = _ink(chance, under)
        picture = Image.fromarray(scene)
        if contrast < _LEAST_CONTRAST or chance.random() < 1 / 3:
            picture.paste("white" if _luminance(_rgb(ink)) < 0.2 else "black", mask=outline)
        picture.paste(ink, mask=letters)
        yield Picture(_stored(chance, np.asarray(picture)), entity, size, edges)


def faceless(number: int, half: Half = "measure") -> Iterator[Pixels]:
    """Pieces of photographs without a face or a string of personal data."""
    for turn in range(number):
        chance = _chance("faceless", half, SIDE, turn)
        yield _stored(chance, _scene(chance, half))


def faceless_crops(half: Half = "measure") -> list[Pixels]:
    """LFW's pieces of what is around faces, 25 px: the hardest to tell from faces."""
    return _lfw()[100 + (half == "measure") :: 2]


def _chance(*what: object) -> random.Random:
    return random.Random(hashlib.sha256("\0".join(map(str, what)).encode()).digest())


def _skimage() -> Any:
    try:
        return importlib.import_module("skimage.data")
    except ImportError:
        raise ValueError("planted pictures need scikit-image's data: pip install 'sfumato[dev]'") from None


@functools.cache
def _lfw() -> list[Pixels]:
    grey = (np.clip(_skimage().lfw_subset(), 0, 1) * 255).astype(np.uint8)
    return [np.ascontiguousarray(image[..., None].repeat(3, axis=2)) for image in grey]


def _faces(half: Half) -> list[Pixels]:
    return _lfw()[half == "measure" : 100 : 2]


@functools.cache
def _photograph(name: str) -> Image.Image:
    if name.endswith(".jpg"):
        read: Any = importlib.import_module("sklearn.datasets").load_sample_image(name)
    else:
        read = getattr(_skimage(), name)()
    left: Any = read[0] if name.startswith("stereo") else read
    pixels: NDArray[Any] = np.asarray(left)
    eight_bits = pixels.astype(np.uint8) * 255 if pixels.dtype == np.bool_ else pixels.astype(np.uint8)
    return Image.fromarray(eight_bits).convert("RGB")


def _scene(chance: random.Random, half: Half, but: Sequence[str] = ()) -> Pixels:
    """A square piece of a photograph, from 128 px to all of its shorter side."""
    photograph = _photograph(chance.choice([name for name in _SCENES[half] if name not in but]))
    side = chance.randrange(128, min(photograph.size) + 1)
    left, top = (chance.randrange(edge - side + 1) for edge in photograph.size)
    piece = photograph.crop((left, top, left + side, top + side))
    return np.asarray(piece.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).copy()


def _paste(chance: random.Random, scene: Pixels, face: Pixels, size: int, left: int, top: int) -> None:
    """Paint a face over [top, top + size) x [left, left + size), and around it what it continues in, where there is."""
    around = chance.choice((0, 12))  # of LFW's pixels: LFW cuts off hair and neck, and its own border stands for them
    piece = np.pad(face, ((around, around), (around, around), (0, 0)), mode="edge")
    side = round(size * len(piece) / len(face))
    off = (side - size) // 2
    far = np.linspace(-1, 1, side)
    far = np.hypot(far[None, :], far[:, None])[..., None]
    mask = ((1 - far) / 0.35 if around else 2 - far).clip(0, 1)  # fading, or all of a square
    angle = chance.uniform(-20, 20)
    piece = _turned(_lit(chance, piece, side), angle)
    alpha = _turned((mask * 255).astype(np.uint8).repeat(3, axis=2), angle) / 255
    rows = slice(max(top - off, 0), top - off + side)
    columns = slice(max(left - off, 0), left - off + side)
    region = scene[rows, columns]
    height, width = region.shape[:2]
    seen = (
        slice(rows.start - top + off, rows.start - top + off + height),
        slice(columns.start - left + off, columns.start - left + off + width),
    )
    region[...] = (alpha[seen] * piece[seen] + (1 - alpha[seen]) * region).round().astype(np.uint8)


def _lit(chance: random.Random, piece: Pixels, side: int) -> Pixels:
    """Enlarged to `side`, in a light from one side, grey or in a tone of skin."""
    light = np.asarray(Image.fromarray(piece).resize((side, side), Image.Resampling.BICUBIC)) / 255.0
    across = np.linspace(-1, 1, side)[None, :, None] * chance.uniform(-0.25, 0.25)
    light = light ** chance.uniform(0.75, 1.33) * chance.uniform(0.7, 1.2) * (1 + across)
    if chance.random() < 0.5:
        light = light ** (1.0, chance.uniform(1.15, 1.5), chance.uniform(1.3, 2.0))  # skin: most red, least blue
    return (light.clip(0, 1) * 255).astype(np.uint8)


def _turned(pixels: Pixels, angle: float) -> NDArray[np.float64]:
    """About the middle; what turns in from outside is 0."""
    return np.asarray(Image.fromarray(pixels).rotate(angle, Image.Resampling.BICUBIC), np.float64)


def _value(chance: random.Random) -> tuple[str, str]:
    entity, locale = chance.choice(_WRITTEN)
    return entity, MAKERS[entity](chance, locale)


@functools.cache
def _font(name: str, size: int) -> Any:
    if not name:
        return ImageFont.load_default(size)
    folder = Path(importlib.import_module("matplotlib").get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


def _written(
    chance: random.Random, text: str, font: Any
) -> tuple[tuple[Image.Image, Image.Image] | None, tuple[int, int, int, int]]:
    """Masks of the letters and of their outline, and where the letters are; None where they do not fit."""
    angle = chance.choice((0.0, chance.uniform(-3, 3)))
    width, height = int(font.getlength(text)) + 1, sum(font.getmetrics())
    if width > SIDE - 8:
        return None, (0, 0, 0, 0)
    at = (chance.randrange(4, SIDE - 3 - width), chance.randrange(8, SIDE - 8 - height))
    masks: list[Image.Image] = []
    for stroke in (0, 1):
        mask = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(mask).text(at, text, 255, font, stroke_width=stroke)
        middle = (at[0] + width / 2, at[1] + height / 2)
        masks.append(mask.rotate(angle, Image.Resampling.BICUBIC, center=middle))
    rows, columns = np.nonzero(np.asarray(masks[0]) > 64)
    edges = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    return (masks[0], masks[1]), edges


def _ink(chance: random.Random, under: Pixels) -> tuple[str, float]:
    """An ink that can be read on these pixels, or the one that can best."""
    ground = _luminance(under)
    low, high = float(np.quantile(ground, 0.1)), float(np.quantile(ground, 0.9))
    contrasts: dict[str, float] = {}
    for ink in _INKS:
        light = float(_luminance(_rgb(ink)))
        contrasts[ink] = min((max(light, other) + 0.05) / (min(light, other) + 0.05) for other in (low, high))
    legible = [ink for ink in _INKS if contrasts[ink] >= _LEAST_CONTRAST]
    ink = chance.choice(legible) if legible else max(_INKS, key=contrasts.__getitem__)
    return ink, contrasts[ink]


def _rgb(ink: str) -> Pixels:
    return np.asarray(Image.new("RGB", (1, 1), ink))[0, 0]


def _luminance(rgb: Pixels) -> NDArray[np.float64]:
    """Relative luminance of sRGB, 0 to 1, as WCAG 2.2 defines it."""
    linear = rgb / 255.0
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    return linear @ np.array((0.2126, 0.7152, 0.0722))


def _stored(chance: random.Random, pixels: Pixels) -> Pixels:
    """Half of the pictures go through JPEG."""
    if chance.random() < 0.5:
        return pixels
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=chance.randrange(80, 96))
    return np.asarray(Image.open(out).convert("RGB"))
