"""RMSNorm and LayerNorm kernels against their twins: values, every gradient, and what each may depend on."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch, reference
from kernels.norms import layer_norm, norm_bytes, rms_norm
from models.layers import LayerNorm, RMSNorm

EPS = 1e-6
CPU = torch.device("cpu")


@pytest.fixture
def triton() -> Iterator[None]:
    dispatch.choose("triton", CPU)
    yield
    dispatch.choose("auto", CPU)


def made(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def inputs(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """x, weight and, for "layer_bias", bias. An x that is off its mean: a norm that forgets to centre it shows."""
    vectors = [1 + 0.3 * made(shape[0], shape[-1], seed=1)]
    if kind == "layer_bias":
        vectors.append(made(shape[0], shape[-1], seed=2))
    return [x.to(dtype).to(device) for x in (made(*shape) + 0.5, *vectors)]


def norm(kind: str, tensors: list[Tensor], twin: bool = False) -> Tensor:
    x, weight, *bias = tensors
    where: Any = reference if twin else None
    if kind == "rms":
        return (where.rms_norm if twin else rms_norm)(x, weight, EPS)
    return (where.layer_norm if twin else layer_norm)(x, weight, bias[0] if bias else None, EPS)


def output_and_gradients(kind: str, tensors: list[Tensor], grad_y: Tensor, twin: bool = False) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = norm(kind, leaves, twin)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


def error(got: Tensor, exact: Tensor) -> float:
    """Relative to the largest element, or to 1 where that is less: a row of one has only rounding for a gradient."""
    return float((got.double() - exact).abs().max() / exact.abs().max().clamp(min=1))


def compare(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    tensors = inputs(shape, kind, dtype, device)
    grad_y = made(*shape, seed=3).to(dtype).to(device)
    got = output_and_gradients(kind, tensors, grad_y)
    exact = output_and_gradients(kind, [x.double() for x in tensors], grad_y.double(), twin=True)
    plain = output_and_gradients(kind, tensors, grad_y, twin=True)
    for name, ours, twins, true in zip(("y", "x", "weight", "bias"), got, plain, exact, strict=False):
        assert ours.dtype == dtype and ours.shape == true.shape
        limit = 1e-6 if dtype == torch.float32 else 2 * error(twins, true)
        assert error(ours, true) <= limit, (name, error(ours, true), limit)


KINDS = ("rms", "layer", "layer_bias")
QUICK = [(1, 1, 1), (2, 1, 72), (2, 33, 64), (2, 63, 100), (1, 17, 384), (1, 5, 1152), (2, 3, 4, 72), (4, 96)]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("shape", QUICK, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_are_their_twins_in_value_and_every_gradient(kind: str, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float16):
        compare(kind, shape, dtype)


@pytest.mark.usefixtures("triton")
def test_a_long_record_s_sums_are_of_all_its_chunks() -> None:
    compare("layer_bias", (1, 545, 384), torch.float32)  # 18 of 32 tokens, and `sum_chunks` takes 16 at a time


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("width", "tokens"),
    # no width of 2 or 3: there a row whose elements nearly agree has a gradient that no precision holds
    [(72, n) for n in (1, 63, 111, 256, 1000)]
    + [(width, 35) for width in (1, 5, 31, 64, 80, 96, 128, 768, 1024, 1151, 1152, 2047, 4096, 8191, 8192)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_are_their_twins_at_every_width(kind: str, width: int, tokens: int) -> None:
    for dtype in (torch.float32, torch.float16):
        compare(kind, (2, tokens, width), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*QUICK, (8, 1000, 768), (4, 256, 1152), (2, 65, 8192)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_are_their_twins_on_a_gpu(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(kind, shape, dtype, "cuda")


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    leaves = [x.requires_grad_() for x in inputs((1, 2, 3), kind, torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: norm(kind, list(tensors)), leaves)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", KINDS)
def test_every_element_of_every_result_is_written(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = torch.Tensor.fill_
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k), torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k), torch.nan))
    tensors = inputs((2, 35, 72), kind, torch.float32)
    for result in output_and_gradients(kind, tensors, made(2, 35, 72, dtype=torch.float32)):
        assert result.isfinite().all()


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", KINDS)
def test_slices_and_strides_of_any_kind_give_the_same_bits(kind: str) -> None:
    shape = (2, 9, 4, 24)
    tensors = inputs(shape, kind, torch.float32)
    grad_y = made(*shape, dtype=torch.float32)
    expected = output_and_gradients(kind, tensors, grad_y)
    x, weight, *bias = tensors
    wide = torch.full((2, 9, 4, 51), torch.nan)
    wide[..., 1:25] = x  # rows that begin off every alignment
    vectors = [torch.stack([v, v], dim=-1)[..., 0] for v in (weight, *bias)]  # whose last dimension has a stride
    heads_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    backwards = x.flip(-1).contiguous().flip(-1)
    for strided in (wide[..., 1:25], heads_first, backwards, x.mT.contiguous().mT):
        got = output_and_gradients(kind, [strided, *vectors], grad_y.transpose(1, 2).contiguous().transpose(1, 2))
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", KINDS)
def test_an_expanded_weight_and_an_expanded_gradient_are_read_where_they_lie(kind: str) -> None:
    x, *vectors = inputs((3, 5, 40), kind, torch.float32)
    leaves = [x.requires_grad_(), *(v[0].clone().requires_grad_() for v in vectors)]
    norm(kind, [leaves[0], *(v.expand(3, -1) for v in leaves[1:])]).sum().backward()
    twins = [x.detach().double().requires_grad_() for x in leaves]
    norm(kind, [twins[0], *(v.expand(3, -1) for v in twins[1:])], twin=True).sum().backward()
    for ours, theirs in zip(leaves, twins, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).abs().max() <= 1e-6 * max(1, float(theirs.grad.abs().max()))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_weights_leave_half_precision_rows_in_their_dtype(kind: str) -> None:
    x, *vectors = inputs((2, 5, 72), kind, torch.float32)
    grad_y = made(2, 5, 72)
    y, grad_x, grad_weight, *_ = output_and_gradients(kind, [x.half(), *vectors], grad_y)
    assert y.dtype == grad_x.dtype == torch.float16 and grad_weight.dtype == torch.float32
    exact = output_and_gradients(kind, [x.half().double(), *(v.double() for v in vectors)], grad_y, twin=True)
    assert error(y, exact[0]) < 2**-11, "rounded once"
    assert error(grad_weight, exact[2]) < 2**-10, "of a gradient that came in half precision"


def assert_repeats_agree(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, repeats: int) -> None:
    tensors, grad_y = inputs(shape, kind, dtype, device), made(*shape, dtype=dtype, device=device)
    first = output_and_gradients(kind, tensors, grad_y)
    for _ in range(repeats):
        for once, again in zip(first, output_and_gradients(kind, tensors, grad_y), strict=True):
            assert torch.equal(once, again)


@pytest.mark.usefixtures("triton")
def test_repeats_agree_to_the_last_bit(repeats: int) -> None:
    assert_repeats_agree("layer_bias", (1, 3, 8), torch.float32, "cpu", repeats)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_repeats_agree_to_the_last_bit_on_a_gpu(kind: str) -> None:
    assert_repeats_agree(kind, (8, 1000, 1152), torch.bfloat16, "cuda", 100)


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, for the record that is spoilt
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", KINDS)
def test_a_record_depends_on_no_neighbour_place_or_padding(kind: str) -> None:
    tensors, grad_y = inputs((3, 70, 72), kind, torch.float32), made(3, 70, 72, dtype=torch.float32)
    whole = output_and_gradients(kind, tensors, grad_y)
    for record in range(3):
        alone = output_and_gradients(kind, [x[record, None] for x in tensors], grad_y[record, None])
        for of_all, own in zip(whole, alone, strict=True):
            assert torch.equal(of_all[record], own[0])
    padded = [torch.cat([tensors[0], torch.full((3, 200, 72), 7.0)], 1), *tensors[1:]]
    longer = output_and_gradients(kind, padded, torch.cat([grad_y, torch.zeros(3, 200, 72)], 1))
    for short, long in zip(whole, longer, strict=True):
        assert torch.equal(short, long[:, :70] if long.dim() == 3 else long)
    spoilt = [x.clone() for x in tensors]
    spoilt[0][1] = torch.inf
    for of_all, beside in zip(whole, output_and_gradients(kind, spoilt, grad_y), strict=True):
        assert torch.equal(of_all[[0, 2]], beside[[0, 2]])


@pytest.mark.usefixtures("triton")
def test_no_records_and_no_tokens_have_gradients_of_zero() -> None:
    for shape in ((0, 3, 8), (2, 0, 8)):
        tensors = inputs(shape, "layer_bias", torch.float32)
        for result in output_and_gradients("layer_bias", tensors, made(*shape)):
            assert (result == 0).all()


@pytest.mark.usefixtures("triton")
def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    x, weight, bias = inputs((2, 5, 8), "layer_bias", torch.float32)
    y = layer_norm(x, weight, bias.requires_grad_(), EPS)
    y.sum().backward()
    assert bias.grad is not None and (bias.grad == 5).all()
    y = rms_norm(x.requires_grad_(), weight, EPS)
    y.sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", KINDS)
def test_the_ops_keep_the_promises_of_torch_library(kind: str) -> None:
    x, weight, *bias = (t.requires_grad_() for t in inputs((2, 5, 24), kind, torch.float32))
    arguments = (x, weight, bias[0] if bias else None, EPS, kind != "rms")
    torch.library.opcheck(torch.ops.sfumato.norm.default, arguments)
    plain = [t.detach() for t in (x, weight)]
    for num_sums in (0, 1, 2):
        backward = (made(2, 5, 24, dtype=torch.float32), *plain, EPS, kind != "rms", num_sums)
        torch.library.opcheck(torch.ops.sfumato.norm_backward.default, backward)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", KINDS)
def test_compile_traces_forward_and_backward_whole(kind: str) -> None:
    tensors, grad_y = inputs((2, 5, 24), kind, torch.float32), made(2, 5, 24, dtype=torch.float32)
    expected = output_and_gradients(kind, tensors, grad_y)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    leaves = [x.requires_grad_() for x in tensors]
    y = compiled(kind, leaves)
    for ours, theirs in zip((y, *torch.autograd.grad(y, leaves, grad_y)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_on_the_cpu_the_layers_of_the_models_compute_the_same_bits() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = made(2, 7, 48, dtype=dtype)
        for layer in (RMSNorm(48), LayerNorm(48), LayerNorm(48, bias=False)):
            for parameter in layer.parameters():
                parameter.data = 1 + made(48, dtype=torch.float32)
            layer.to(dtype)
            weight = layer.scale(2)
            if isinstance(layer, RMSNorm):
                ours = rms_norm(x, weight, layer.eps)
            else:
                ours = layer_norm(x, weight, None if layer.shift is None else layer.shift(2), layer.eps)
            assert torch.equal(ours, layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_cpu_the_plain_way_is_the_twin(kind: str) -> None:
    tensors, grad_y = inputs((2, 5, 3, 24), kind, torch.float64), made(2, 5, 3, 24)
    got, exact = (output_and_gradients(kind, tensors, grad_y, twin) for twin in (False, True))
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bytes_are_those_of_rows_in_and_out() -> None:
    assert norm_bytes(8, 1152, 2) == 2 * 8 * 1152 * 2
    assert norm_bytes(8, 1152, 2, backward=True) == 3 * 8 * 1152 * 2


@pytest.mark.parametrize(
    ("x", "weight", "eps", "message"),
    [
        (made(8), made(1, 8), EPS, r"x_BND has shape \(8,\): give \(B, ..., D\) with D from 1 to 8192"),
        (made(2, 3, 8193), made(2, 8193), EPS, r"x_BND has shape \(2, 3, 8193\)"),
        (made(2, 3, 0), made(2, 0), EPS, r"x_BND has shape \(2, 3, 0\)"),
        (made(2, 3, 8).long(), made(2, 8), EPS, "x_BND is torch.int64: give one of torch.float16"),
        (made(2, 3, 8), made(8), EPS, r"weight_BD has shape \(8,\): .* give \(2, 8\)"),
        (made(2, 3, 8), made(2, 8).long(), EPS, "weight_BD is torch.int64"),
        (made(2, 3, 8), made(2, 8).to("meta"), EPS, "weight_BD is on meta, but x_BND on cpu"),
        (made(2, 3, 8), made(2, 8), 0.0, "eps is 0.0: give at least 1e-37"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(x: Tensor, weight: Tensor, eps: float, message: str) -> None:
    for norm_of in (rms_norm, layer_norm):
        with pytest.raises(ValueError, match=message):
            norm_of(x, weight, eps=eps)
    with pytest.raises(ValueError, match=r"bias_BD has shape \(3, 8\)"):
        layer_norm(made(2, 3, 8), made(2, 8), made(3, 8), EPS)
