"""Image bytes to pixels: limits are checked on the header, before anything is decoded."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 16_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # decoders we let near foreign bytes

# Pillow warns of large images when it reads their header; our own limit, checked right after, refuses smaller ones.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# What Pillow raises on damaged bytes, besides OSError.
_DAMAGE = (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, TypeError, KeyError, MemoryError)

_LYING = (5, 6, 7, 8)  # orientations whose rows are stored as columns


class ImageError(ValueError):
    """An image that is refused; `reason` is a code fit for a manifest and says nothing of the content."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode wholly, with the orientation its metadata asks for.

    Raises ImageError: "unknown_image_type", "too_many_pixels", "unsupported_depth" (nothing was decoded) or
    "undecodable".
    """
    with _refusals():
        image = _read_header(data, max_pixels)
        image.load()
    return _upright(image)


def upright_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width as `open_image` would have them, from the header: nothing is decoded.

    Only the orientation that a PNG tells behind its pixels, where hardly any does, is not seen. Raises ImageError.
    """
    with _refusals():
        image = _read_header(data, max_pixels)
    try:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # a PNG's own would decode it
    except _DAMAGE:  # as `_upright`
        orientation = 1
    return (image.width, image.height) if orientation in _LYING else (image.height, image.width)


def stored_extension(data: bytes) -> str | None:
    """ "png" or "jpg" by the bytes' signature; None where a shard would not hold them."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "jpg" if data.startswith(b"\xff\xd8\xff") else None


def encode_png(image: Image.Image, channels: int | None = None, image_size: int | None = None) -> bytes:
    """PNG without metadata; with `channels` (1 or 3) converted, with `image_size` centre-cropped and resized."""
    if channels is not None:
        image = _flatten(image, channels)
    elif image.mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16"):
        image = image.convert("RGB")
    if image_size is not None:
        image = _fit(image, image_size, image_size)
    plain = image.copy()
    # The palette's transparent entry is part of the picture; all else in `info` is metadata.
    plain.info = {key: value for key, value in image.info.items() if key == "transparency"}
    out = io.BytesIO()
    plain.save(out, "PNG")
    return out.getvalue()


def pixels(data: bytes, channels: int, height: int, width: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """uint8 [C, height, width]: transparency over white, centre crop, bicubic resize where needed."""
    image = _fit(_flatten(open_image(data, max_pixels), channels), height, width)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


@contextmanager
def _refusals() -> Iterator[None]:
    """What Pillow raises, as ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:  # also a known type whose header is broken
        raise ImageError("unknown_image_type") from None
    except Image.DecompressionBombError:
        raise ImageError("too_many_pixels") from None
    except _DAMAGE:
        raise ImageError("undecodable") from None


def _read_header(data: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise ImageError("too_many_pixels")
    if image.mode in ("I", "F"):  # 32 bits a value, of a range that no header tells: 0 to 1, to 255, to 2^31?
        raise ImageError("unsupported_depth")
    return image


def _fit(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def _flatten(image: Image.Image, channels: int) -> Image.Image:
    mode = {1: "L", 3: "RGB"}[channels]
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip it to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGE:  # damaged metadata says nothing of the orientation; the pixels are whole
        return image
