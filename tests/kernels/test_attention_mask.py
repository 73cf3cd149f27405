"""The mask's block lists against the whole mask, its constructors against their meaning, and what they refuse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.attention_mask import (
    BLOCK,
    AttentionMask,
    attention_mask,
    causal,
    documents,
    text_and_images,
)

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 255, 256, 300, 384, 515]))


def dense_blocks(mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """Which blocks are full and which partial, (B, I, J), looked up pair by pair; queries without bounds aside."""
    visible_BNM, bounded_BN = mask.visible_BNM(), mask.lo_BN < mask.hi_BN
    num_records, num_queries, num_keys = visible_BNM.shape
    shape = (num_records, -(-num_queries // BLOCK), -(-num_keys // BLOCK))
    full_BIJ, partial_BIJ = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for b in range(shape[0]):
        for i in range(shape[1]):
            for j in range(shape[2]):
                rows = slice(i * BLOCK, (i + 1) * BLOCK)
                block = visible_BNM[b, rows, j * BLOCK : (j + 1) * BLOCK][bounded_BN[b, rows]]
                full_BIJ[b, i, j] = len(block) and block.all() and block.shape[1] == BLOCK
                partial_BIJ[b, i, j] = block.any() and not full_BIJ[b, i, j]
    return full_BIJ, partial_BIJ


def assert_lists(num_BI: Tensor, listed_BIJ: Tensor, blocks_BIJ: Tensor) -> None:
    assert num_BI.dtype == listed_BIJ.dtype == torch.int32
    assert num_BI.is_contiguous() and listed_BIJ.is_contiguous()
    assert listed_BIJ.shape == blocks_BIJ.shape
    assert ((listed_BIJ >= 0) & (listed_BIJ < max(1, blocks_BIJ.shape[2]))).all(), "every entry is some block's number"
    for b in range(blocks_BIJ.shape[0]):
        for i in range(blocks_BIJ.shape[1]):
            expected = blocks_BIJ[b, i].nonzero().flatten().tolist()
            assert listed_BIJ[b, i, : int(num_BI[b, i])].tolist() == expected


def assert_exact(mask: AttentionMask) -> None:
    full_BIJ, partial_BIJ = dense_blocks(mask)
    assert_lists(mask.num_full_BI, mask.full_BIJ, full_BIJ)
    assert_lists(mask.num_partial_BI, mask.partial_BIJ, partial_BIJ)
    assert_lists(mask.num_full_BJ, mask.full_BJI, full_BIJ.mT)
    assert_lists(mask.num_partial_BJ, mask.partial_BJI, partial_BIJ.mT)


@st.composite
def vectors(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
    """lo, hi, seg, noise and M: any at all, or in runs, which is what makes blocks full."""
    num_records, num_queries, num_keys = draw(st.integers(1, 2)), draw(SIZES), draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def runs(num_tokens: int, low: int, high: int) -> Tensor:
        length = draw(st.sampled_from([1, 7, 100, 128, 260]))
        values = torch.randint(low, high, (num_records, -(-num_tokens // length)), generator=generator)
        return values.repeat_interleave(length, 1)[:, :num_tokens].to(torch.int32)

    lo_BN = runs(num_queries, 0, num_keys + 1) * draw(st.integers(0, 1))
    hi_BN = runs(num_queries, 0, num_keys + 1) if draw(st.booleans()) else torch.full_like(lo_BN, num_keys)
    if draw(st.booleans()):
        return lo_BN, hi_BN, None, None, num_keys
    return lo_BN, hi_BN, runs(num_queries, -1, 3), runs(num_keys, -3, 3), num_keys


@settings(deadline=None, max_examples=120)
@given(vectors())
def test_the_lists_hold_exactly_the_blocks_that_the_whole_mask_has(case) -> None:
    lo_BN, hi_BN, seg_BN, noise_BM, num_keys = case
    mask = attention_mask(lo_BN, hi_BN, seg_BN, noise_BM, num_keys=num_keys, debug=True)
    assert_exact(mask)


@settings(deadline=None, max_examples=60)
@given(vectors())
def test_visited_pairs_counts_the_pairs_of_the_blocks_that_hold_any(case) -> None:
    lo_BN, hi_BN, seg_BN, noise_BM, num_keys = case
    mask = attention_mask(lo_BN, hi_BN, seg_BN, noise_BM, num_keys=num_keys)
    full_BIJ, partial_BIJ = dense_blocks(mask)
    expected = 0
    for _, i, j in (full_BIJ | partial_BIJ).nonzero().tolist():
        expected += min(BLOCK, mask.num_queries - i * BLOCK) * min(BLOCK, mask.num_keys - j * BLOCK)
    assert mask.visited_pairs() == expected


def test_a_key_is_visible_by_the_rule_of_the_four_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    lo, hi = (torch.randint(0, 24, (2, 9), generator=generator, dtype=torch.int32) for _ in range(2))
    seg = torch.randint(-1, 3, (2, 9), generator=generator, dtype=torch.int32)
    noise = torch.randint(-2, 3, (2, 23), generator=generator, dtype=torch.int32)
    visible = attention_mask(lo, hi, seg, noise).visible_BNM()
    for b in range(2):
        for i in range(9):
            for j in range(23):
                noise_j = noise[b, j]
                expected = lo[b, i] <= j < hi[b, i] and (noise_j < 0 or noise_j == seg[b, i])
                assert visible[b, i, j] == expected


@pytest.mark.parametrize("num_tokens", [1, 100, 128, 129, 640, 700])
def test_a_causal_mask_has_partial_blocks_on_the_diagonal_only(num_tokens: int) -> None:
    mask = causal(2, num_tokens)
    assert torch.equal(mask.visible_BNM(), torch.ones(num_tokens, num_tokens).tril().bool().expand(2, -1, -1))
    blocks_I = torch.arange(-(-num_tokens // BLOCK))
    assert (mask.num_partial_BI == 1).all() and (mask.num_partial_BJ == 1).all()
    assert torch.equal(mask.partial_BIJ[0, :, 0].long(), blocks_I)
    assert torch.equal(mask.num_full_BI[0].long(), blocks_I)
    assert_exact(mask)


def test_documents_apart_are_never_visited() -> None:
    lengths = torch.tensor([[300, 0, 1, 211, 128], [640, 0, 0, 0, 0]])
    mask = documents(lengths, 700, causal=False)
    document_BN = torch.full((2, 700), -1)
    for b in range(2):
        start = 0
        for number, length in enumerate(lengths[b].tolist()):
            document_BN[b, start : start + length] = number
            start += length
    same_BNM = (document_BN[:, :, None] == document_BN[:, None]) & (document_BN >= 0)[..., None]
    assert torch.equal(mask.visible_BNM(), same_BNM)
    assert_exact(mask)
    # 640 tokens in documents of 300, 1, 211 and 128: no block of the first with one of the last
    assert mask.full_BIJ[0, 0, : mask.num_full_BI[0, 0]].tolist() == [0, 1]
    assert mask.partial_BIJ[0, 0, : mask.num_partial_BI[0, 0]].tolist() == [2]
    assert mask.full_BIJ[0, 4, : mask.num_full_BI[0, 4]].tolist() == [4]
    assert mask.num_partial_BI[0, 4] == 0, "the last document fills its block"
    assert mask.num_full_BI[:, 5].sum() == mask.num_partial_BI[:, 5].sum() == 0, "padding visits nothing"
    assert mask.num_full_BJ[:, 5].sum() == mask.num_partial_BJ[:, 5].sum() == 0, "and is never visited"


def test_causal_documents_end_at_the_diagonal() -> None:
    lengths = torch.tensor([[200, 150], [30, 320]], dtype=torch.int32)
    mask, whole = documents(lengths, 350, causal=True), documents(lengths, 350, causal=False)
    assert torch.equal(mask.visible_BNM(), whole.visible_BNM().tril())
    assert_exact(mask)


def test_documents_longer_than_the_row_are_cut_off_at_its_end() -> None:
    mask = documents(torch.tensor([[3, 5]]), 6, causal=False)
    assert mask.hi_BN.tolist() == [[3, 3, 3, 6, 6, 6]]


def test_text_is_causal_images_are_whole_and_noise_is_seen_by_itself_only() -> None:
    #          text  image 0  text  noised 1   text | another document: text, image 0 noised | padding
    document = [*[0] * 2, *[0] * 2, 0, *[0] * 3, *[0] * 2, *[1] * 2, *[1] * 2, *[-1] * 3]
    image = [*[-1] * 2, *[0] * 2, -1, *[1] * 3, *[-1] * 2, *[-1] * 2, *[2] * 2, *[-1] * 3]
    noised = [number in (1, 2) for number in image]
    mask = text_and_images(
        torch.tensor([document], dtype=torch.int32), torch.tensor([image], dtype=torch.int32), torch.tensor([noised])
    )
    visible = mask.visible_BNM()[0]
    for i, (own_document, own_image) in enumerate(zip(document, image, strict=True)):
        for j in range(len(document)):
            before = j <= i or (own_image >= 0 and image[j] == own_image)
            clean = not noised[j] or image[j] == own_image
            expected = own_document >= 0 and document[j] == own_document and before and clean
            assert visible[i, j] == expected, (i, j)
    assert_exact(mask)


def test_large_noised_images_leave_out_blocks_after_them() -> None:
    # 128 text, 256 noised image, 128 text, 256 clean image, 128 text
    image = torch.tensor([-1, 0, 0, -1, 1, 1, -1], dtype=torch.int32).repeat_interleave(128)[None]
    mask = text_and_images(torch.zeros_like(image), image, image == 0)
    assert_exact(mask)
    full = [mask.full_BIJ[0, i, : mask.num_full_BI[0, i]].tolist() for i in range(7)]
    partial = [mask.partial_BIJ[0, i, : mask.num_partial_BI[0, i]].tolist() for i in range(7)]
    assert full == [[], [0, 1, 2], [0, 1, 2], [0], [0, 3, 4, 5], [0, 3, 4, 5], [0, 3, 4, 5]]
    assert partial == [[0], [], [], [3], [], [], [6]]


def test_queries_that_see_nothing_leave_a_full_block_full() -> None:
    hi = torch.full((1, 2 * BLOCK), 2 * BLOCK, dtype=torch.int32)
    hi[0, 100:140] = 0
    mask = attention_mask(torch.zeros_like(hi), hi)
    assert mask.num_full_BI.tolist() == [[2, 2]] and mask.num_partial_BI.tolist() == [[0, 0]]
    assert_exact(mask)


def test_one_hidden_key_makes_a_block_partial_and_one_visible_pair_makes_it_listed() -> None:
    hi = torch.full((1, 2 * BLOCK), 2 * BLOCK, dtype=torch.int32)
    hi[0, 5] -= 1
    mask = attention_mask(torch.zeros_like(hi), hi)
    assert mask.num_full_BI.tolist() == [[1, 2]] and mask.partial_BIJ[0, 0, 0] == 1
    hi.zero_()
    hi[0, -1] = 2 * BLOCK
    mask = attention_mask(hi - 1, hi)
    assert mask.num_partial_BI.tolist() == [[0, 1]] and mask.partial_BIJ[0, 1, 0] == 1
    assert_exact(mask)


def test_no_record_at_all_makes_an_empty_mask() -> None:
    mask = causal(0, 130)
    assert mask.full_BIJ.shape == (0, 2, 2)
    assert mask.visited_pairs() == 0


def test_bounds_outside_the_keys_act_as_the_nearest_inside() -> None:
    lo, hi = torch.tensor([[-5, 0]], dtype=torch.int32), torch.tensor([[2, 900]], dtype=torch.int32)
    mask = attention_mask(lo, hi, num_keys=3)
    assert mask.visible_BNM().tolist() == [[[True, True, False], [True, True, True]]]
    assert_exact(mask)


def test_a_sliced_vector_gives_contiguous_tensors() -> None:
    wide = torch.arange(40, dtype=torch.int32).view(2, 20)
    mask = attention_mask(torch.zeros_like(wide)[:, ::2], wide[:, ::2], wide[:, 1::2], wide[:, ::2], debug=False)
    for name in ("lo_BN", "hi_BN", "seg_BN", "noise_BM"):
        assert getattr(mask, name).is_contiguous()
    assert_exact(mask)


def test_the_mask_is_traced_whole_with_the_shapes_left_open() -> None:
    def build(lo: Tensor, hi: Tensor, seg: Tensor, noise: Tensor) -> AttentionMask:
        return attention_mask(lo, hi, seg, noise)

    compiled = torch.compile(build, backend="aot_eager", fullgraph=True, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (70, 200):
        lo, hi = (torch.randint(0, num_tokens, (2, num_tokens), generator=generator).int() for _ in range(2))
        seg, noise = (torch.randint(-1, 2, (2, num_tokens), generator=generator).int() for _ in range(2))
        got, expected = compiled(lo, hi, seg, noise), build(lo, hi, seg, noise)
        for name in ("num_full_BI", "partial_BIJ", "num_partial_BJ", "partial_BJI"):
            assert torch.equal(getattr(got, name), getattr(expected, name))


@pytest.mark.gpu
def test_the_mask_is_built_without_waiting_for_the_device() -> None:
    image = torch.tensor([-1, 0, 1, -1], dtype=torch.int32, device="cuda").repeat_interleave(70)[None]
    lengths = torch.tensor([[100, 180]], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = [
            causal(1, 280, "cuda"),
            documents(lengths, 280, causal=True),
            text_and_images(torch.zeros_like(image), image, image == 0),
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mask in masks:
        vectors = [None if x is None else x.cpu() for x in (mask.lo_BN, mask.hi_BN, mask.seg_BN, mask.noise_BM)]
        expected = attention_mask(*vectors)  # type: ignore[arg-type]
        for name in ("num_full_BI", "full_BIJ", "num_partial_BJ", "partial_BJI"):
            assert torch.equal(getattr(mask, name).cpu(), getattr(expected, name))


def test_the_twin_gives_zeros_and_no_gradient_where_nothing_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    visible = torch.ones(1, 5, 5).bool()
    visible[0, 2] = False
    out, lse = reference.attention(q, k, v, visible)
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -math.inf).all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, :, 2] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_the_twin_is_scaled_dot_product_attention(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    mask = causal(2, 7) if masked else None
    visible = None if mask is None else mask.visible_BNM()
    out, lse = reference.attention(q, k, v, visible)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=masked, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    scores = q @ k.repeat_interleave(2, 1).mT / 2
    weights = (scores - lse[..., None]).exp()
    assert torch.allclose((weights if visible is None else weights * visible[:, None]).sum(-1), torch.ones(()).double())


INT = torch.int32


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=INT)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((zeros(4), zeros(4)), {}, r"lo_BN has shape \(4,\): give \(B, N\)"),
        ((zeros(1, 0), zeros(1, 0)), {}, r"lo_BN has shape \(1, 0\)"),
        ((zeros(1, 4), zeros(1, 5)), {}, r"hi_BN has shape \(1, 5\): .* give \(1, 4\)"),
        ((zeros(1, 4).long(), zeros(1, 4)), {}, r"lo_BN is torch.int64: give torch.int32"),
        ((zeros(1, 4), zeros(1, 4).float()), {}, r"hi_BN is torch.float32: give torch.int32"),
        ((zeros(1, 4), zeros(1, 4), zeros(1, 4)), {}, "noise_BM is None, but seg_BN is given"),
        ((zeros(1, 4), zeros(1, 4), None, zeros(1, 4)), {}, "seg_BN is None, but noise_BM is given"),
        ((zeros(1, 4), zeros(1, 4), zeros(1, 3), zeros(1, 4)), {}, r"seg_BN has shape \(1, 3\)"),
        ((zeros(1, 4), zeros(1, 4), zeros(1, 4), zeros(2, 4)), {}, r"noise_BM has shape \(2, 4\): .* give \(1, 4\)"),
        ((zeros(1, 4), zeros(1, 4), zeros(1, 4), zeros(4)), {}, r"noise_BM has shape \(4,\)"),
        ((zeros(1, 4), zeros(1, 4), zeros(1, 4), zeros(1, 4)), {"num_keys": 5}, r"noise_BM has shape \(1, 4\)"),
        ((zeros(1, 4), zeros(1, 4)), {"num_keys": 0}, "num_keys is 0: give at least one key"),
        ((zeros(1, 4), zeros(1, 4).to("meta")), {}, "hi_BN is on meta, but lo_BN on cpu"),
        ((zeros(1, 4) - 1, zeros(1, 4)), {"debug": True}, r"lo_BN\[0, 0\] is -1: give 0 to 4"),
        ((zeros(1, 4), zeros(1, 4) + 5), {"debug": True}, r"hi_BN\[0, 0\] is 5: give 0 to 4"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_by_name(arguments, keywords, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_mask(*arguments, **keywords)


def test_the_constructors_refuse_what_they_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"lengths_BL is torch.float32 of shape \(2,\)"):
        documents(torch.ones(2), 4, causal=False)
    with pytest.raises(ValueError, match=r"image_BN is torch.int64 of shape \(1, 4\): give int32"):
        text_and_images(zeros(1, 4), zeros(1, 4).long(), zeros(1, 4).bool())
    with pytest.raises(ValueError, match=r"noised_BN is torch.int32: give bool"):
        text_and_images(zeros(1, 4), zeros(1, 4), zeros(1, 4))
    with pytest.raises(ValueError, match=r"noised_BN has shape \(1, 3\): with document_BN give \(1, 4\)"):
        text_and_images(zeros(1, 4), zeros(1, 4), zeros(1, 3).bool())
