"""Documents of text and images as sequences of tokens, and several documents to a row: what the unified model reads.

    layout = Layout(ByteTokenizer(), channels=3, patch_size=4)
    caption_of_image = [Image(pixels), Text(tokens, learn=True)]
    image_of_caption = [Text(tokens), Image(pixels, noised=True)]
    batch = layout.pack([[caption_of_image, image_of_caption], [image_of_caption]], num_tokens=256)

A text becomes begin_text, its tokens, end_text; an image begin_image, its patches row by row, end_image. A noised image
is one that is to be learnt: only its own tokens see it, and it takes no place, so that what follows is the same with it
and without. Where later text or images are to see the image too, a clean copy of it comes next, at the same place.

In a private stage a row is one unit, with all of its documents and of no other unit's.
"""

# B rows, N tokens, F features of a patch, I images of a row, C channels, H x W pixels or latents, P patch side
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from models.tokenizer import Tokenizer

MAX_ASPECT_RATIO = 8  # of the longer side to the shorter
PADDING = -1  # the document of padding, and the image of what is of none

Given = TypeVar("Given")


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens without their delimiters; where `learn`, each of them and the end is to be predicted from what precedes.

    An empty text is the caption of what has none (guidance). The end of one that is not `whole`, but cut short, is not
    learnt: it is no place to end at.
    """

    tokens: Sequence[int]
    learn: bool = False
    whole: bool = True


@dataclass(frozen=True, eq=False)
class Image:
    """Pixels or latents, (C, H, W), both sides multiples of the patch; `noised` where it is to be learnt."""

    pixels_CHW: Tensor
    noised: bool = False


Document = Sequence[Text | Image]


@dataclass(frozen=True, eq=False)
class Packed:
    """A batch of rows. Made by `Layout.pack`; a row depends on its own documents and on the batch's N and I only."""

    tokens_BN: Tensor  # int64; the pad token where there is none
    patches_BNF: Tensor  # fp32: as they are; the model is given them noised (`UnifiedObjective.noised`)
    is_patch_BN: Tensor  # bool
    document_BN: Tensor  # int32: a run of equal numbers each, PADDING behind the last
    image_BN: Tensor  # int32: the image a token is of, its delimiters too, 0 to I - 1; PADDING for text
    noised_BI: Tensor  # bool
    positions_BN3: Tensor  # int32: place in the document, row and column in the image
    targets_BN: Tensor  # int64: the token that follows
    weights_BN: Tensor  # fp32: what predicting it counts, 0 where it is not to be learnt

    @property
    def present_BN(self) -> Tensor:  # noqa: N802
        """Bool: which tokens are no padding."""
        return self.document_BN >= 0

    @property
    def noised_BN(self) -> Tensor:  # noqa: N802
        """Bool: which tokens are of a noised image."""
        return self.by_image(self.noised_BI)

    @property
    def learnt_patches_BN(self) -> Tensor:  # noqa: N802
        """Bool: the patches that the flow loss counts."""
        return self.is_patch_BN & self.noised_BN

    def by_image(self, values_BI: Tensor) -> Tensor:
        """Each token's value of its image, (B, N); zero for text and padding."""
        own_BN = values_BI.gather(1, self.image_BN.clamp(min=0).long())
        return own_BN.masked_fill(self.image_BN < 0, 0)

    def to(self, device: torch.device | str) -> Packed:
        """The batch on `device`."""
        return replace(self, **{each.name: getattr(self, each.name).to(device) for each in fields(self)})

    def rows(self, rows_R: Tensor) -> Packed:
        """These rows, int64 (R,), in this order; a row may come again (noise multiplicity)."""
        return replace(self, **{each.name: getattr(self, each.name)[rows_R] for each in fields(self)})

    def between(self, start: int, stop: int) -> Packed:
        """The rows' tokens from `start` up to `stop`."""
        by_token = [each.name for each in fields(self) if each.name != "noised_BI"]
        return replace(self, **{name: getattr(self, name)[:, start:stop] for name in by_token})


@dataclass(frozen=True)
class Layout:
    """How documents become tokens."""

    tokenizer: Tokenizer
    channels: int
    patch_size: int

    @property
    def patch_features(self) -> int:
        return self.channels * self.patch_size**2

    def length(self, document: Document) -> int:
        """Tokens that the document takes. Raises ValueError where `pack` would."""
        if not document:
            raise ValueError("a document is empty: give it at least one text or image")
        return sum(
            2 + (len(part.tokens) if isinstance(part, Text) else math.prod(self._grid(part.pixels_CHW)))
            for part in document
        )

    def pack(self, rows: Sequence[Sequence[Document]], num_tokens: int | None = None) -> Packed:
        """The rows' documents, one after another, and padding up to `num_tokens` (else the longest row's length).

        A row without documents is all padding. Raises ValueError for a document that is empty, an image without area,
        of extreme aspect, of other channels or of sides that patches do not divide, a token that is not of the
        vocabulary, and a row that is too long.
        """
        lengths = [sum(map(self.length, documents)) for documents in rows]
        longest = max(lengths, default=0)
        num_tokens = max(1, longest) if num_tokens is None else num_tokens
        if longest > num_tokens:
            raise ValueError(
                f"row {lengths.index(longest)} has {longest} tokens, but num_tokens is {num_tokens}: pack fewer "
                "documents into it, shorten captions or scale images down"
            )
        counts = [sum(isinstance(part, Image) for document in documents for part in document) for documents in rows]
        batch = self._padding(len(rows), num_tokens, max([1, *counts]))
        for row, documents in enumerate(rows):
            start = image = 0
            for number, document in enumerate(documents):
                place = 0
                for part in document:
                    stop = start + self.length([part])
                    batch.document_BN[row, start:stop] = number
                    if isinstance(part, Text):
                        self._put_text(batch, row, start, place, part)
                        place += stop - start
                    else:
                        self._put_image(batch, row, start, place, image, part)
                        place += 0 if part.noised else 3
                        image += 1
                    start = stop
        return batch

    def patchify(self, pixels_CHW: Tensor) -> Tensor:
        """(H/P * W/P, F), row by row, the features of a patch in the order (channel, row, column)."""
        height, width = self._grid(pixels_CHW)
        x_ChPwP = pixels_CHW.reshape(self.channels, height, self.patch_size, width, self.patch_size)
        return x_ChPwP.permute(1, 3, 0, 2, 4).reshape(height * width, self.patch_features)

    def unpatchify(self, patches_BNF: Tensor, height: int, width: int) -> Tensor:
        """The images (B, C, height, width) of their patches (B, N, F)."""
        side = self.patch_size
        x_BhwCPP = patches_BNF.reshape(-1, height // side, width // side, self.channels, side, side)
        return x_BhwCPP.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.channels, height, width)

    def _grid(self, pixels_CHW: Tensor) -> tuple[int, int]:
        """Patches in a column and in a row."""
        shape = tuple(pixels_CHW.shape)
        if len(shape) != 3 or shape[0] != self.channels:
            raise ValueError(f"an image has shape {shape}: give ({self.channels}, height, width)")
        _, height, width = shape
        if not height * width:
            raise ValueError(f"an image is {height} x {width}: it has no area")
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"an image is {height} x {width}: one side may be {MAX_ASPECT_RATIO} times the other, no more"
            )
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"an image is {height} x {width}: crop it to multiples of the patch, {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    def _padding(self, num_rows: int, num_tokens: int, num_images: int) -> Packed:
        shape = (num_rows, num_tokens)
        pad = self.tokenizer.special("pad")
        return Packed(
            tokens_BN=torch.full(shape, pad),
            patches_BNF=torch.zeros(*shape, self.patch_features),
            is_patch_BN=torch.zeros(shape, dtype=torch.bool),
            document_BN=torch.full(shape, PADDING, dtype=torch.int32),
            image_BN=torch.full(shape, PADDING, dtype=torch.int32),
            noised_BI=torch.zeros(num_rows, num_images, dtype=torch.bool),
            positions_BN3=torch.zeros(*shape, 3, dtype=torch.int32),
            targets_BN=torch.full(shape, pad),
            weights_BN=torch.zeros(shape),
        )

    def _put_text(self, batch: Packed, row: int, start: int, place: int, text: Text) -> None:
        tokens = torch.tensor([self.tokenizer.special("begin_text"), *text.tokens, self.tokenizer.special("end_text")])
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.tokenizer.vocab_size:
            raise ValueError(
                f"a text has tokens outside 0 to {self.tokenizer.vocab_size - 1}: use this layout's tokenizer"
            )
        stop = start + len(tokens)
        batch.tokens_BN[row, start:stop] = tokens
        batch.positions_BN3[row, start:stop, 0] = torch.arange(place, place + len(tokens))
        batch.targets_BN[row, start : stop - 1] = tokens[1:]
        batch.weights_BN[row, start : stop - (1 if text.whole else 2)] = float(text.learn)

    def _put_image(self, batch: Packed, row: int, start: int, place: int, number: int, image: Image) -> None:
        height, width = self._grid(image.pixels_CHW)
        first, end = start + 1, start + 1 + height * width  # of the patches
        batch.tokens_BN[row, start] = self.tokenizer.special("begin_image")
        batch.tokens_BN[row, end] = self.tokenizer.special("end_image")
        batch.patches_BNF[row, first:end] = self.patchify(image.pixels_CHW)
        batch.is_patch_BN[row, first:end] = True
        batch.image_BN[row, start : end + 1] = number
        batch.noised_BI[row, number] = image.noised
        batch.positions_BN3[row, start : end + 1, 0] = place + 1
        batch.positions_BN3[row, start, 0], batch.positions_BN3[row, end, 0] = place, place + 2
        rows_columns = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2)
        batch.positions_BN3[row, first:end, 1:] = rows_columns


def image_to_text(pixels_CHW: Tensor | None, caption: Sequence[int] | None, *, whole: bool = True) -> Document:
    """The document that teaches to tell an image in words; its caption is `whole`, or cut short.

    Raises ValueError where the record lacks one of the two.
    """
    return [Image(_given(pixels_CHW, "image")), Text(_given(caption, "caption"), learn=True, whole=whole)]


def text_to_image(caption: Sequence[int] | None, pixels_CHW: Tensor | None, num_draws: int = 1) -> Document:
    """The document that teaches to draw what a caption says; an empty caption teaches to draw anything (guidance).

    With several draws of noise the image comes as often: nothing else sees a noised one, so that they share the caption
    and nothing besides.
    """
    return [Text(_given(caption, "caption")), *[Image(_given(pixels_CHW, "image"), noised=True)] * num_draws]


def _given(value: Given | None, modality: str) -> Given:
    if value is None:
        raise ValueError(f"a record has no {modality}, which the document needs: leave the record out")
    return value
