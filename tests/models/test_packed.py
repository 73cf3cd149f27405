"""Documents as rows of tokens, and the mask of what each token sees against one made pair by pair."""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.attention import attention
from kernels.attention_mask import text_and_images
from models.packed import PADDING, Document, Image, Layout, Packed, Text, image_to_text, text_to_image
from models.tokenizer import ByteTokenizer
from tests.models.documents import CHANNELS, LAYOUT, PATCH, picture, random_rows, rows, text, visible

PAD, BEGIN_TEXT, END_TEXT, BEGIN_IMAGE, END_IMAGE = range(256, 261)


@settings(max_examples=60, deadline=None)
@given(random_rows(), st.integers(0, 5))
def test_the_mask_is_the_one_made_pair_by_pair_gradients_included(rows: list[list[Document]], padding: int) -> None:
    num_tokens = max(1, *(sum(map(LAYOUT.length, documents)) for documents in rows)) + padding
    batch = LAYOUT.pack(rows, num_tokens)
    mask = text_and_images(batch.document_BN, batch.image_BN, batch.noised_BN)
    oracle_BNN = torch.stack([visible(documents, num_tokens) for documents in rows])
    assert torch.equal(mask.visible_BNM(), oracle_BNN)
    generator = torch.Generator().manual_seed(0)
    shape = (len(rows), 2, num_tokens, 4)
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, expected = attention(q, k, v, mask), reference.attention(q, k, v, oracle_BNN)[0]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad))


def test_a_document_becomes_the_tokens_that_it_says() -> None:
    document: Document = [Image(picture(1, 2)), text("hi", learn=True), Image(picture(2, 1), noised=True), text("!")]
    batch = LAYOUT.pack([[document]], num_tokens=17)
    assert batch.tokens_BN.tolist() == [[
        BEGIN_IMAGE, PAD, PAD, END_IMAGE, BEGIN_TEXT, *b"hi", END_TEXT,
        BEGIN_IMAGE, PAD, PAD, END_IMAGE, BEGIN_TEXT, *b"!", END_TEXT, PAD, PAD,
    ]]  # fmt: skip
    assert batch.targets_BN[0, 4:7].tolist() == [*b"hi", END_TEXT]
    assert batch.weights_BN.tolist() == [[0.0] * 4 + [1.0] * 3 + [0.0] * 10], "what is learnt is the text and its end"
    assert batch.image_BN.tolist() == [[0] * 4 + [PADDING] * 4 + [1] * 4 + [PADDING] * 5]
    assert batch.document_BN.tolist() == [[0] * 15 + [PADDING] * 2]
    assert batch.noised_BI.tolist() == [[False, True]]
    assert batch.noised_BN.tolist() == [[False] * 8 + [True] * 4 + [False] * 5]
    assert batch.learnt_patches_BN.nonzero()[:, 1].tolist() == [9, 10]
    places, rows_, columns = batch.positions_BN3[0, :15].unbind(1)
    assert places.tolist() == [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 7, 8, 9], "a noised image takes no place"
    assert rows_.tolist() == [0] * 10 + [1] + [0] * 4
    assert columns.tolist() == [0, 0, 1] + [0] * 12
    assert torch.equal(batch.patches_BNF[0, 9:11], LAYOUT.patchify(picture(2, 1)))


def test_patches_come_back_where_they_were() -> None:
    pixels = picture(3, 2)
    patches = LAYOUT.patchify(pixels)
    assert torch.equal(patches[1], pixels[:, :PATCH, PATCH:].flatten()), "patch 1 is right of the first, channel first"
    assert torch.equal(LAYOUT.unpatchify(patches[None], *pixels.shape[1:])[0], pixels)


@settings(max_examples=20, deadline=None)
@given(random_rows())
def test_a_row_is_laid_out_the_same_whatever_is_beside_it(rows: list[list[Document]]) -> None:
    together = LAYOUT.pack(rows)
    for number, documents in enumerate(rows):
        alone = LAYOUT.pack([documents], together.tokens_BN.shape[1])
        for each in fields(Packed):
            expected = getattr(together, each.name)[number]
            assert torch.equal(getattr(alone, each.name)[0], expected[: len(getattr(alone, each.name)[0])]), each.name
    again = together.rows(torch.tensor([len(rows) - 1, 0]))
    assert torch.equal(again.tokens_BN[1], together.tokens_BN[0])


def test_by_image_gives_each_token_its_images_value_and_text_none() -> None:
    batch = LAYOUT.pack([[[text("a"), Image(picture(1, 1)), Image(picture(1, 1), noised=True)]]])
    values = torch.tensor([[2.0, 3.0]])
    assert batch.by_image(values).tolist() == [[0, 0, 0, 2, 2, 2, 3, 3, 3]]


def with_caption(caption: str | None, pixels: torch.Tensor | None) -> Document:
    return text_to_image(None if caption is None else [*caption.encode()], pixels)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (list, "a document is empty: give it at least one text or image"),
        (lambda: [Image(torch.zeros(CHANNELS, 0, 4))], "an image is 0 x 4: it has no area"),
        (lambda: [Image(picture(1, 9))], "an image is 2 x 18: one side may be 8 times the other, no more"),
        (lambda: [Image(torch.zeros(CHANNELS, 4, 5))], "an image is 4 x 5: crop it to multiples of the patch, 2"),
        (lambda: [Image(torch.zeros(3, 4, 4))], r"an image has shape \(3, 4, 4\): give \(2, height, width\)"),
        (lambda: with_caption(None, picture(1, 1)), "a record has no caption, which the document needs"),
        (lambda: with_caption("a", None), "a record has no image, which the document needs"),
        (lambda: image_to_text(None, [1]), "a record has no image"),
        (lambda: [Text([65, 261])], "a text has tokens outside 0 to 260: use this layout's tokenizer"),
        (lambda: [Text([-1, 65])], "a text has tokens outside 0 to 260: use this layout's tokenizer"),
        (lambda: [text("far too long")], "row 0 has 14 tokens, but num_tokens is 13: pack fewer documents"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(document: Callable[[], Document], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYOUT.pack([[document()]], num_tokens=13)


def test_documents_of_both_tasks_are_built_from_a_records_two_halves() -> None:
    told, drawn = image_to_text(picture(1, 1), [65]), text_to_image((), picture(1, 1))
    batch = LAYOUT.pack([[told], [drawn]])
    assert batch.weights_BN.sum(1).tolist() == [2.0, 0.0]
    assert batch.learnt_patches_BN.sum(1).tolist() == [0, 1]


def test_a_batch_may_lack_a_modality_or_everything() -> None:
    words = LAYOUT.pack([[[Text(())]]])
    assert words.tokens_BN.tolist() == [[BEGIN_TEXT, END_TEXT]]
    assert (words.noised_BI.shape, words.patches_BNF.shape) == ((1, 1), (1, 2, CHANNELS * PATCH**2))
    empty = LAYOUT.pack([[]], num_tokens=4)
    assert not empty.present_BN.any()
    assert LAYOUT.pack([]).tokens_BN.shape == (0, 1)


def test_moving_to_a_device_moves_everything() -> None:
    batch = LAYOUT.pack(rows())
    moved = batch.to("meta")
    assert {getattr(moved, each.name).device.type for each in fields(moved)} == {"meta"}
    assert replace(batch).tokens_BN is batch.tokens_BN
    assert batch.between(0, 3).noised_BI.shape == batch.noised_BI.shape
    assert Layout(ByteTokenizer(), 3, 4).patch_features == 48
