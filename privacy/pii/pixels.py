"""Image bytes to pixels and back: nothing is decoded before its header is checked, nothing encoded but pixels."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from privacy.pii.findings import Box, Pixels
from privacy.pii.metadata import MAX_PIXELS, ImageMetadataError, follows_end, strip_metadata

_FILL = 0  # black: hair around it was taken for a face once in six tries, around a mid grey five times
# zlib's; with 6, as is usual, a photograph takes twice the time and is a hundredth smaller, a flat drawing a quarter.
_PNG_LEVEL = 3
_BLUR_CELLS = 4  # what is left of a blurred box: 4 x 4 colours, too few to tell who it was

# What Pillow raises on damaged bytes, besides OSError.
_DAMAGE = (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, TypeError, KeyError, MemoryError)


class ImageError(ValueError):
    """An image that is refused; `reason` is a code and says nothing of the content."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(image: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The whole image as it is meant to be seen: upright, RGB, what is transparent over white.

    Guarantee: no more than `max_pixels` are ever decoded, and the bytes hold no second picture that nobody looked at.
    Raises ImageError: "not_png_or_jpeg", "malformed_png", "malformed_jpeg" (cut short, or not what it says it is),
    "data_after_end" (another file may follow: strip_metadata takes it off), "too_many_pixels" (nothing was decoded),
    "several_frames", "undecodable".
    """
    return _rgb(_open(image, max_pixels))


def apply_boxes(
    image: bytes, boxes: Sequence[Box], action: Literal["fill", "blur"], margin: float, max_pixels: int = MAX_PIXELS
) -> bytes:
    """The image with every box, enlarged by `margin` of its longer side on each side, painted black or blurred.

    Guarantee: of what a box covers a filled one keeps nothing, and a blurred one 4 x 4 colours. The format stays (a PNG
    keeps the other pixels exactly, a JPEG is encoded at quality 95), the orientation is applied, transparency is over
    white, and nothing but pixels is stored. Raises what `decode` raises.
    """
    source = _open(image, max_pixels)
    pixels = _rgb(source).copy()
    for box in boxes:
        top, bottom, left, right = _enlarged(box, margin, pixels.shape)
        region = pixels[top:bottom, left:right]
        if region.size:
            region[...] = _FILL if action == "fill" else _blurred(region)
    return _encoded(pixels, source.format)


def flatten_transparency(image: bytes, max_pixels: int = MAX_PIXELS) -> bytes:
    """What is transparent over white, for good: a picture may lie under it that neither eye nor detector sees.

    The same bytes where nothing is transparent. Raises what `decode` raises.
    """
    if image[25:26] not in (b"\4", b"\6") and b"tRNS" not in image:  # a PNG's colour type; a JPEG has no transparency
        return image
    source = _open(image, max_pixels)
    if source.format != "PNG" or not source.has_transparency_data:
        return image
    if source.convert("RGBA").getchannel("A").getextrema() == (255, 255):
        return image
    return _encoded(_rgb(source), "PNG")


def _encoded(pixels: Pixels, kind: str | None) -> bytes:
    """PNG or JPEG bytes without metadata; where the pixels are grey, of one channel."""
    grey = bool((pixels[..., :1] == pixels).all())
    picture = Image.fromarray(pixels[..., 0] if grey else pixels)
    out = io.BytesIO()
    if kind == "PNG":
        picture.save(out, "PNG", compress_level=_PNG_LEVEL)
    else:
        picture.save(out, "JPEG", quality=95, subsampling=0)
    return strip_metadata(out.getvalue()).image


def _open(image: bytes, max_pixels: int) -> Image.Image:
    try:
        if follows_end(image):
            raise ImageError("data_after_end")
        picture = Image.open(io.BytesIO(image), formats=("PNG", "JPEG"))
        if picture.width * picture.height > max_pixels:
            raise ImageError("too_many_pixels")
        if getattr(picture, "n_frames", 1) != 1:  # APNG, MPO: decoders show the first alone
            raise ImageError("several_frames")
        picture.load()
    except ImageError:
        raise
    except ImageMetadataError as error:
        raise ImageError(error.reason) from None
    except Image.DecompressionBombError:
        raise ImageError("too_many_pixels") from None
    except _DAMAGE:
        raise ImageError("undecodable") from None
    return picture


def _rgb(picture: Image.Image) -> Pixels:
    try:
        upright = ImageOps.exif_transpose(picture)
    except _DAMAGE:  # damaged metadata says nothing of the orientation
        upright = picture
    if upright.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255
        return np.repeat((np.asarray(upright).astype(np.int64) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(upright.convert("RGB"))


def _enlarged(box: Box, margin: float, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """top, bottom, left, right within the image; what a margin touches of a pixel it covers."""
    box = box.enlarged(margin)
    height, width = shape[:2]
    top, bottom = (int(np.clip(edge, 0, height)) for edge in (box.top, box.bottom))
    left, right = (int(np.clip(edge, 0, width)) for edge in (box.left, box.right))
    return top, bottom, left, right


def _blurred(region: Pixels) -> Pixels:
    """The region from the means of its cells alone."""
    height, width = region.shape[:2]
    cells = Image.fromarray(region).resize((_BLUR_CELLS, _BLUR_CELLS), Image.Resampling.BOX)
    return np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC))
