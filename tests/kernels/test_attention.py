"""Attention by Triton's kernels, in its interpreter, against the twin in float64; on the CPU, that it is SDPA."""

# B records, H query heads, G key heads, N queries, M keys, K head width
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels import attention_triton, dispatch, reference, tiles
from kernels.attention import (
    attention,
    attention_backward_flops,
    attention_bytes,
    attention_flops,
    attention_with_lse,
)
from kernels.attention_mask import AttentionMask, attention_mask, causal, documents, text_and_images
from kernels.attention_triton import WIDTHS

CPU = torch.device("cpu")
LENGTHS = (1, 63, 111, 256, 1000)
HEADS = {"one": (1, 1), "many": (2, 2), "grouped": (4, 2), "one key head": (3, 1)}  # H, G
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton() -> Iterator[None]:
    dispatch.choose("triton", DEVICE)
    yield
    dispatch.choose("auto", DEVICE)


@contextmanager
def plain_dispatch() -> Iterator[None]:
    before = dispatch.chosen()
    dispatch.choose("reference", DEVICE)
    yield
    dispatch.choose(before, DEVICE)


@contextmanager
def tiles_of(dtype: str, capability: int) -> Iterator[None]:
    """Other tiles than the interpreter's, which are those of 16 bits on Hopper: with descriptors and the short path."""
    chosen = {
        (f"attention.{kernel}", attention_triton.shape_class(width, "bf16", masked, None)): attention_triton.tile(
            kernel, width, dtype, capability, masked, None
        )
        for kernel in ("forward", "backward_keys", "backward_queries")
        for width in WIDTHS
        for masked in (False, True)
    }
    with tiles.trial(chosen) as given:
        yield
    assert given.keys() <= chosen.keys()


def inputs(
    B: int, H: int, G: int, N: int, M: int, K: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output.

    q and k are of deviation 1/2: at 1 the rounding of fp32 scores alone moves gradients by 2e-6, the twin's too.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, N, K), (B, G, M, K), (B, G, M, K), (B, H, N, K))
    q, k, v, dout = (torch.randn(shape, generator=generator) for shape in shapes)
    return tuple(x.to(DEVICE, dtype) for x in (q / 2, k / 2, v, dout))


def run(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: AttentionMask | None = None, scale: float | None = None
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention_with_lse(*leaves, mask, scale=scale)
    return out.detach(), lse, *torch.autograd.grad(out, leaves, dout)


def run_twin(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: AttentionMask | None = None, scale: float | None = None
) -> tuple[Tensor, ...]:
    """The same by the twin, in the precision of the arguments."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention(*leaves, None if mask is None else mask.visible_BNM(), scale)
    return out.detach(), lse, *torch.autograd.grad(out, leaves, dout)


def error(found: Tensor, expected: Tensor, largest: float | None = None) -> float:
    """Largest difference against the largest value; infinities must be in the same places."""
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(found), finite)
    assert torch.equal(found[~finite].double(), expected[~finite])
    if not finite.any():
        return 0.0
    largest = float(expected[finite].abs().max()) if largest is None else largest
    return float((found.double() - expected)[finite].abs().max()) / (largest or 1.0)


def assert_agrees(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: AttentionMask | None = None, scale: float | None = None
) -> None:
    """fp32: within 1e-6 of the twin in float64; 16 bits: at most twice as far as the twin in 16 bits.

    A query that sees a single key has dq = 0, the difference of two equal sums, so that where there may be such queries
    dq and dk are measured against the largest gradient of the three.
    """
    found = run(q, k, v, dout, mask, scale)
    exact = run_twin(*(x.double() for x in (q, k, v, dout)), mask, scale)
    rounded = run_twin(q, k, v, dout, mask, scale)
    cancels = mask is not None or k.shape[2] == 1
    for index, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        largest = float(max(x.abs().max() for x in exact[2:])) if cancels and index >= 2 else None
        off, twins = (error(x[index], exact[index], largest) for x in (found, rounded))
        exactly = q.dtype == torch.float32 or name == "lse"
        # in 16 bits one unit in the last place is what rounding the result itself may cost
        allowed = 1e-6 if exactly else max(2 * twins, torch.finfo(q.dtype).eps)
        assert off <= allowed, (name, off, allowed)


def masks(N: int, M: int) -> dict[str, AttentionMask]:
    """One of each kind, of two records that differ."""
    generator = torch.Generator().manual_seed(N)
    lo = torch.randint(0, M + 1, (2, N), generator=generator).sort().values.int()
    hi = (lo + torch.randint(0, M // 2 + 1, (2, N), generator=generator).int()).clamp(max=M)
    seg = torch.randint(-1, 3, (2, N), generator=generator).int()
    noise = torch.randint(-1, 3, (2, M), generator=generator).int()
    found = {
        "bounds": attention_mask(lo, hi, num_keys=M),
        "noise": attention_mask(lo, hi, seg, noise),
        "nothing": attention_mask(lo, lo, num_keys=M),
        "everything": attention_mask(torch.zeros_like(lo), torch.full_like(hi, M), num_keys=M),
    }
    if N == M:
        lengths = torch.tensor([[1, 0, N // 2, 1, 0], [N // 3, 1, 1, N // 4, 0]])
        found["causal"] = causal(2, N)
        found["documents"] = documents(lengths, N, causal=False)
        image = torch.full((2, N), -1, dtype=torch.int32)
        image[:, N // 4 : N // 2] = 0
        image[1, N // 2 : N] = 1
        noised = image == 0
        found["unified"] = text_and_images(torch.zeros(2, N, dtype=torch.int32), image, noised)
    return found


# --- against the twin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("K", "N", "M", "heads"),
    [(32, 63, 63, "many"), (64, 1, 1, "one"), (64, 300, 300, "grouped"), (72, 111, 111, "one key head"),
     (72, 256, 256, "many"), (80, 200, 17, "grouped"), (96, 17, 300, "one"), (128, 130, 130, "many")],
)  # fmt: skip
def test_output_and_gradients_are_the_twins(triton: None, dtype: torch.dtype, K: int, N: int, M: int, heads: str):
    assert_agrees(*inputs(1, *HEADS[heads], N, M, K, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("N", LENGTHS)
@pytest.mark.parametrize("K", WIDTHS)
def test_output_and_gradients_are_the_twins_everywhere(triton: None, dtype: torch.dtype, K: int, N: int, heads: str):
    assert_agrees(*inputs(1, *HEADS[heads], N, N, K, dtype))


@pytest.mark.parametrize(("dtype", "capability"), [("fp32", 90), ("fp16", 80)])
def test_the_other_tiles_are_right_too(triton: None, dtype: str, capability: int):
    with tiles_of(dtype, capability):
        assert_agrees(*inputs(1, 2, 1, 40, 40, 72))
        assert_agrees(*inputs(1, 1, 1, 40, 40, 64), causal(1, 40))


@pytest.mark.parametrize("kind", masks(140, 140))
def test_masks_are_the_twins(triton: None, kind: str):
    mask = masks(140, 140)[kind]
    assert_agrees(*inputs(2, 1, 1, 140, 140, 72), mask)
    assert_agrees(*inputs(2, 1, 1, 140, 140, 64, torch.float16), mask)


@pytest.mark.parametrize("kind", masks(40, 300))
def test_masks_of_more_keys_than_queries_are_the_twins(triton: None, kind: str):
    assert_agrees(*inputs(2, 2, 1, 40, 300, 64), masks(40, 300)[kind])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", masks(512, 512))
@pytest.mark.parametrize(("K", "N"), [(64, 256), (72, 256), (72, 1000), (96, 256), (128, 256)])
def test_masks_are_the_twins_everywhere(triton: None, dtype: torch.dtype, K: int, N: int, kind: str):
    assert_agrees(*inputs(2, 2, 1, N, N, K, dtype), masks(N, N)[kind])


def test_scale_is_obeyed(triton: None):
    assert_agrees(*inputs(1, 2, 2, 40, 40, 64), scale=0.3)
    assert_agrees(*inputs(1, 2, 2, 40, 40, 64), causal(1, 40), scale=0.3)


def test_large_scores_neither_overflow_nor_vanish(triton: None):
    q, k, v, dout = inputs(1, 1, 1, 80, 80, 64)
    for mask in (None, causal(1, 80)):
        out, lse, *gradients = run(100 * q, 100 * k, v, dout, mask)
        exact = run_twin(100 * q.double(), 100 * k.double(), v.double(), dout.double(), mask)
        assert error(out, exact[0]) < 1e-3  # fp32 scores of 10^4 are known to 10^-3
        assert error(lse, exact[1]) < 1e-6
        assert all(torch.isfinite(x).all() for x in gradients)


# --- rows that see nothing -------------------------------------------------------------------------------------------


def test_a_query_that_sees_nothing_gets_zeros_and_gives_nothing(triton: None):
    N = 160
    mask = documents(torch.tensor([[1, 30, 0, 1, 100]]), N, causal=True)  # the last 28 are padding
    out, lse, dq, dk, dv = run(*inputs(1, 2, 1, N, N, 72, torch.float16), mask)
    assert not out[:, :, 132:].any() and not dq[:, :, 132:].any()
    assert not dk[:, :, 132:].any() and not dv[:, :, 132:].any()
    assert (lse[:, :, 132:] == -math.inf).all() and torch.isfinite(lse[:, :, :132]).all()


def test_no_keys_and_no_queries_are_answered(triton: None):
    for N, M in ((5, 0), (0, 5), (0, 0)):
        out, lse, *gradients = run(*inputs(2, 2, 1, N, M, 64))
        assert out.shape == (2, 2, N, 64) and not out.any() and (lse == -math.inf).all()
        assert all(not x.any() for x in gradients)


def test_diffusion_attention_is_not_causal(triton: None):
    q, k, v, _ = inputs(1, 2, 2, 130, 130, 72, torch.float16)
    before = attention(q, k, v)
    v = v.clone()
    v[:, :, -1] += 8
    assert (attention(q, k, v)[:, :, 0] != before[:, :, 0]).any()


# --- every element is written, whatever the layout -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "kind"), [(60, "none"), (150, "none"), (260, "none"), (140, "unified"), (140, "nothing")]
)
def test_every_element_is_written(triton: None, monkeypatch: pytest.MonkeyPatch, N: int, kind: str):
    mask, empty = None if kind == "none" else masks(N, N)[kind], torch.empty
    tensors = inputs(2, 1, 1, N, N, 72, torch.float16)
    expected = run(*tensors, mask)
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(math.nan))
    for a, b in zip(run(*tensors, mask), expected, strict=True):
        assert torch.equal(a, b)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values otherwise laid out."""
    B, H, N, K = x.shape
    of_qkv = x.new_zeros(B, N, 3, H, K)
    of_qkv[:, :, 1] = x.transpose(1, 2)
    every_second = x.new_zeros(B, H, 2 * N, K)
    every_second[:, :, ::2] = x
    misaligned = x.new_zeros(x.numel() + 1)[1:].view_as(x)
    misaligned.copy_(x)
    odd_rows = x.new_zeros(B, H, N, K + 1)
    odd_rows[..., :K] = x
    return {
        "of a fused projection": of_qkv[:, :, 1].transpose(1, 2),
        "every second row": every_second[:, :, ::2],
        "misaligned": misaligned,
        "rows of odd stride": odd_rows[..., :K],
        "columns first": x.mT.contiguous().mT,
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 8)))
def test_any_layout_will_do(triton: None, layout: str):
    tensors = inputs(2, 1, 1, 70, 70, 72)
    assert_agrees(*(layouts(x)[layout] for x in tensors))
    expected = run(*tensors, causal(2, 70))
    for a, b in zip(run(*(layouts(x)[layout] for x in tensors), causal(2, 70)), expected, strict=True):
        assert torch.equal(a, b)


def test_an_expanded_gradient_will_do(triton: None):
    q, k, v, _ = inputs(1, 2, 2, 40, 40, 64)
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(attention(q, k, v).sum(), q)
    (expected,) = torch.autograd.grad(attention(q, k, v), q, torch.ones_like(q))
    assert torch.equal(gradient, expected)


@pytest.mark.slow
def test_offsets_do_not_overflow_32_bits(triton: None):
    rows, stride = 260, 2**23 + 8  # the last row begins past 2^31 elements; only the pages touched take memory
    far = torch.empty(rows * stride, dtype=torch.float16).as_strided((1, 1, rows, 64), (stride, stride, stride, 1))
    tensors = inputs(1, 1, 1, rows, rows, 64, torch.float16)
    far.copy_(tensors[1])
    q, _, v, dout = tensors
    for a, b in zip(run(q, far, v, dout), run(*tensors), strict=True):
        assert torch.equal(a, b)


def test_the_output_is_laid_out_for_the_projection_after_it(triton: None):
    q, k, v, _ = inputs(2, 3, 3, 20, 20, 64)
    assert attention(q, k, v).transpose(1, 2).is_contiguous()


# --- to the bit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("repeats", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_repeats_are_equal(triton: None, masked: bool, repeats: int):
    mask = causal(1, 20) if masked else None
    tensors = inputs(1, 1, 1, 20, 20, 32, torch.float16)
    first = run(*tensors, mask)
    for _ in range(repeats):
        assert all(torch.equal(a, b) for a, b in zip(run(*tensors, mask), first, strict=True))


@pytest.mark.parametrize(("N", "masked"), [(40, False), (40, True), (260, False)])
def test_a_record_knows_neither_its_place_nor_its_neighbours(triton: None, N: int, masked: bool):
    tensors = inputs(2, 1, 1, N, N, 32, torch.float16)
    both, one = (causal(2, N), causal(1, N)) if masked else (None, None)
    together = run(*tensors, both)
    alone = run(*(x[1:] for x in tensors), one)
    turned = run(*(x.flip(0) for x in tensors), both)
    for a, b, c in zip(alone, turned, together, strict=True):
        assert torch.equal(a[0], c[1])
        assert torch.equal(b.flip(0), c)


@pytest.mark.parametrize("noised", [False, True])
def test_a_record_does_not_know_its_padding(triton: None, noised: bool):
    tokens, dtype = 200, torch.float16

    def mask_of(total: int) -> AttentionMask:
        document = torch.full((1, total), -1, dtype=torch.int32)
        document[:, :tokens] = 0
        image = torch.full((1, total), -1, dtype=torch.int32)
        image[:, 30:150] = 0
        return text_and_images(document, image, (image == 0) & noised)

    tensors = inputs(1, 1, 1, tokens, tokens, 32, dtype)
    expected = run(*tensors, mask_of(tokens))
    for total in (201, 270):
        # whatever stands in the padding
        padded = [F.pad(x, (0, 0, 0, total - tokens), value=3.0) for x in tensors]
        for a, b in zip(run(*padded, mask_of(total)), expected, strict=True):
            assert torch.equal(a[:, :, :tokens], b)


# --- what surrounds the kernels --------------------------------------------------------------------------------------


def test_the_op_keeps_the_rules_of_torch_library(triton: None):
    q, k, v, dout = inputs(1, 2, 1, 40, 40, 64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    vectors = list(_vectors_of(masks(40, 40)["unified"]))
    vectors = [x[:1].contiguous() for x in vectors]
    for mask in ([], vectors):
        torch.library.opcheck(torch.ops.sfumato.attention, (*leaves, mask, 0.125))
        out, lse = torch.ops.sfumato.attention(q.detach(), k.detach(), v.detach(), mask, 0.125)
        torch.library.opcheck(
            torch.ops.sfumato.attention_backward,
            (dout, q.detach(), k.detach(), v.detach(), out, lse, mask, 0.125),
        )


def _vectors_of(mask: AttentionMask) -> list[Tensor]:
    from kernels.attention import _vectors

    return _vectors(mask)


def test_compiles_without_a_graph_break(triton: None):
    q, k, v, dout = inputs(2, 2, 1, 40, 40, 64)

    def block(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        return attention(attention(q, k, v), k, v, attention_mask(lo, hi)).sin()

    mask = causal(2, 40)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(block(*leaves, mask.lo_BN, mask.hi_BN), leaves, dout)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves, mask.lo_BN, mask.hi_BN), leaves, dout)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_flops_count_what_the_mask_lists(triton: None):
    N, K, H = 300, 32, 2
    q, k, v, dout = inputs(2, H, 1, N, N, K, torch.float16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = documents(torch.tensor([[128, 172], [130, 170]]), N, causal=False)
    for given, pairs in ((None, 2 * N * N), (mask, mask.visited_pairs())):
        with FlopCounterMode(display=False) as counter:
            out = attention(*leaves, given)
        assert counter.get_total_flops() == attention_flops(q.shape, k.shape, pairs) == 4 * K * H * pairs
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(out, leaves, dout)
        assert counter.get_total_flops() == attention_backward_flops(q.shape, k.shape, pairs) == 10 * K * H * pairs
    assert mask.visited_pairs() < 2 * N * N


def test_flops_of_the_cpus_own_attention_are_counted():
    q, k, v, dout = inputs(2, 3, 3, 40, 50, 64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with plain_dispatch(), FlopCounterMode(display=False) as counter:
        torch.autograd.grad(attention(*leaves), leaves, dout)
    assert counter.get_total_flops() == 14 * 64 * 2 * 3 * 40 * 50


def test_bytes_are_each_tensor_once():
    q, k = (2, 4, 10, 64), (2, 2, 20, 64)
    elements_q, elements_k, statistics = 2 * 4 * 10 * 64, 2 * 2 * 20 * 64, 2 * 4 * 10 * 4
    assert attention_bytes(q, k, 2) == 2 * (2 * elements_q + 2 * elements_k) + statistics
    assert attention_bytes(q, k, 2, backward=True) == 2 * (4 * elements_q + 4 * elements_k) + statistics


def test_autocast_is_obeyed(triton: None):
    q, k, v, _ = inputs(1, 1, 1, 20, 20, 64)
    with torch.autocast(DEVICE.type, torch.float16):
        found = attention(q, k, v.half())
    assert torch.equal(found, attention(q.half(), k.half(), v.half()))


# --- without the kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS)
def test_without_kernels_it_is_sdpa(heads: str):
    H, G = HEADS[heads]
    q, k, v, _ = inputs(2, H, G, 30, 40, 24)
    with plain_dispatch():
        assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v, enable_gqa=H != G))


@pytest.mark.parametrize("kind", masks(140, 140))
def test_without_kernels_masks_are_the_twins(kind: str):
    mask, tensors = masks(140, 140)[kind], inputs(2, 4, 2, 140, 140, 32)
    with plain_dispatch():
        found = run(*tensors, mask)
    expected = run_twin(*(x.double() for x in tensors), mask)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        assert error(a, b) < 2e-6, name


def test_gradients_without_kernels_are_those_of_the_values():
    q, k, v, _ = inputs(1, 2, 1, 6, 7, 8, torch.float64)
    lo = torch.tensor([[0, 0, 2, 3, 5, 0]], dtype=torch.int32)
    hi = torch.tensor([[7, 3, 4, 3, 7, 0]], dtype=torch.int32)
    mask = attention_mask(lo, hi, num_keys=7)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with plain_dispatch():
        assert torch.autograd.gradcheck(lambda *x: attention(*x, mask), leaves)


# --- bad input -------------------------------------------------------------------------------------------------------


def bad_calls() -> dict[str, tuple[str, tuple]]:
    q, k, v, _ = inputs(2, 4, 2, 8, 9, 64)
    wide = torch.zeros(2, 4, 8, 56)
    return {
        "three dimensions": ("q_BHNK has shape", (q[0], k, v)),
        "a width without kernels": ("head width 56", (wide, wide, wide)),
        "float64": ("k_BGMK is torch.float64", (q, k.double(), v)),
        "two dtypes": ("v_BGMK is torch.float16", (q, k, v.half())),
        "heads that do not divide": ("k_BGMK has shape", (q[:, :3], k, v)),
        "no key heads": ("k_BGMK has shape", (q, k[:, :0], v[:, :0])),
        "other records": ("k_BGMK has shape", (q, k[:1], v[:1])),
        "v unlike k": ("v_BGMK has shape", (q, k, v[:, :, :3])),
        "a mask of other records": ("mask is of 1 records", (q, k, v, masks_of(1, 8, 9))),
        "a mask of other queries": ("mask is of 2 records, 7", (q, k, v, masks_of(2, 7, 9))),
        "a mask of other keys": ("mask is of 2 records, 8 queries and 8", (q, k, v, masks_of(2, 8, 8))),
    }


def masks_of(B: int, N: int, M: int) -> AttentionMask:
    lo = torch.zeros(B, N, dtype=torch.int32)
    return attention_mask(lo, lo + M, num_keys=M)


@pytest.mark.parametrize("case", bad_calls())
def test_what_is_not_supported_is_named(triton: None, case: str):
    message, arguments = bad_calls()[case]
    with pytest.raises(ValueError, match=message):
        attention(*arguments)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_no_positive_number_is_refused(triton: None, scale: float):
    q, k, v, _ = inputs(1, 1, 1, 4, 4, 64)
    with pytest.raises(ValueError, match="scale is"):
        attention(q, k, v, scale=scale)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("N", [1, 63, 256, 1000, 2048])
@pytest.mark.parametrize("K", WIDTHS)
def test_on_a_gpu_output_and_gradients_are_the_twins(triton: None, dtype: torch.dtype, K: int, N: int):
    assert_agrees(*inputs(2, 4, 2, N, N, K, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", masks(512, 512))
@pytest.mark.parametrize("K", [64, 72, 128])
def test_on_a_gpu_masks_are_the_twins(triton: None, dtype: torch.dtype, K: int, kind: str):
    mask = _moved(masks(1000, 1000)[kind], DEVICE)
    assert_agrees(*inputs(2, 4, 2, 1000, 1000, K, dtype), mask)


def _moved(mask: AttentionMask, device: torch.device) -> AttentionMask:
    lo, hi, seg, noise = (
        None if x is None else x.to(device) for x in (mask.lo_BN, mask.hi_BN, mask.seg_BN, mask.noise_BM)
    )
    assert lo is not None and hi is not None
    return attention_mask(lo, hi, seg, noise, num_keys=mask.num_keys)


@pytest.mark.gpu
def test_on_a_gpu_repeats_places_and_padding_make_no_difference(triton: None):
    for N in (200, 2048):
        tensors = inputs(3, 4, 2, N, N, 72, torch.bfloat16)
        first = run(*tensors)
        for _ in range(100):
            assert all(torch.equal(a, b) for a, b in zip(run(*tensors), first, strict=True))
        alone = run(*(x[1:2].clone() for x in tensors))
        assert all(torch.equal(a[0], b[1]) for a, b in zip(alone, first, strict=True))
