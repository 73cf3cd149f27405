"""RMSNorm and LayerNorm over the last dimension, with a weight for each record.

In public training the weight is an expanded view of one vector; in private training `kernels.per_record.copies` makes
it, and takes from its gradient, which is each record's own, what clipping needs.
"""

# B records, N tokens, D model width, C chunks of a record's tokens, S per-record gradients (weight, bias)
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import use_triton
from kernels.tiles import Tile, tuned

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDEST = 8192
SMALLEST_EPS = 1e-37  # an fp32 zero would make a row of zeros NaN


def rms_norm(x_BND: Tensor, weight_BD: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, of x's shape and dtype; x is (B, ..., D), with any dimensions between.

    Guarantee: a record's output and gradients depend on that record alone, to the last bit, and not on padding behind
    it; sums are taken in a fixed order. The kernel keeps statistics and products in fp32 (fp64 where x is), and rounds
    once. Raises ValueError for shapes, dtypes, devices and widths that do not fit.
    Source: Zhang & Sennrich 2019, Eq. 4, with eps under the root.
    """
    _check(x_BND, eps, weight_BD=weight_BD)
    if use_triton(x_BND):
        return _rows_norm(x_BND, weight_BD, None, eps, center=False)
    y_BND = F.rms_norm(x_BND, x_BND.shape[-1:], eps=eps) * _over_tokens(weight_BD, x_BND)
    return y_BND.to(x_BND.dtype)


def layer_norm(x_BND: Tensor, weight_BD: Tensor, bias_BD: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, of x's shape and dtype; otherwise as `rms_norm`.

    Source: Ba et al. 2016, Eq. 4, with eps under the root.
    """
    _check(x_BND, eps, weight_BD=weight_BD, bias_BD=bias_BD)
    if use_triton(x_BND):
        return _rows_norm(x_BND, weight_BD, bias_BD, eps, center=True)
    y_BND = F.layer_norm(x_BND, x_BND.shape[-1:], eps=eps) * _over_tokens(weight_BD, x_BND)
    return (y_BND if bias_BD is None else y_BND + _over_tokens(bias_BD, x_BND)).to(x_BND.dtype)


def norm_bytes(num_rows: int, width: int, itemsize: int, *, backward: bool = False) -> int:
    """Bytes that a norm must move: x in and y out; in the backward x and dy in and dx out. Weights are not counted."""
    return (3 if backward else 2) * num_rows * width * itemsize


def _rows_norm(x_BND: Tensor, weight_BD: Tensor, bias_BD: Tensor | None, eps: float, *, center: bool) -> Tensor:
    # dimensions between that do not merge into one of a single stride are copied: heads have `kernels.qk_norm_rope`
    tokens_BND = x_BND[:, None] if x_BND.dim() == 2 else x_BND.flatten(1, -2)
    return _norm(tokens_BND, weight_BD, bias_BD, eps, center).view(x_BND.shape)


@torch.library.custom_op("sfumato::norm", mutates_args=())
def _norm(x_BND: Tensor, weight_BD: Tensor, bias_BD: Tensor | None, eps: float, center: bool) -> Tensor:
    from kernels import norms_triton

    y_BND = torch.empty_like(x_BND, memory_format=torch.contiguous_format)
    if y_BND.numel() == 0:
        return y_BND
    x_BND, weight_BD = _together(x_BND), _together(weight_BD)
    given_BD = weight_BD if bias_BD is None else _together(bias_BD)
    num_records, num_tokens, width = x_BND.shape
    tile = tuned("norm.forward", _shape_class(x_BND), norms_triton.tile(width, backward=False))
    with torch.cuda.device_of(x_BND):
        norms_triton.forward[(num_records * _num_chunks(num_tokens, tile),)](
            x_BND, weight_BD, given_BD, y_BND, num_tokens, *x_BND.stride()[:2], weight_BD.stride(0), given_BD.stride(0),
            **norms_triton.row_constants(width, eps, center, x_BND.dtype == torch.float64), **_launch(tile),
            BIAS=bias_BD is not None,
        )  # fmt: skip
    return y_BND


@_norm.register_fake
def _(x_BND: Tensor, weight_BD: Tensor, bias_BD: Tensor | None, eps: float, center: bool) -> Tensor:
    return torch.empty_like(x_BND, memory_format=torch.contiguous_format)


@torch.library.custom_op("sfumato::norm_backward", mutates_args=())
def _norm_backward(
    grad_y_BND: Tensor, x_BND: Tensor, weight_BD: Tensor, eps: float, center: bool, num_sums: int
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and the first `num_sums` of each record's gradients of weight and bias, fp32 (B, S, D)."""
    from kernels import norms_triton

    num_records, num_tokens, width = x_BND.shape
    grad_x_BND = torch.empty_like(x_BND, memory_format=torch.contiguous_format)
    sums_BSD = x_BND.new_empty(num_records, num_sums, width, dtype=_sum_dtype(x_BND))
    if grad_x_BND.numel() == 0:
        return grad_x_BND, sums_BSD.zero_()
    grad_y_BND, x_BND, weight_BD = _together(grad_y_BND), _together(x_BND), _together(weight_BD)
    tile = tuned("norm.backward", _shape_class(x_BND), norms_triton.tile(width, backward=True))
    num_chunks = _num_chunks(num_tokens, tile)
    sums_BCSD = x_BND.new_empty(num_records, num_chunks, num_sums, width, dtype=sums_BSD.dtype)
    with torch.cuda.device_of(x_BND):
        norms_triton.backward[(num_records * num_chunks,)](
            grad_y_BND, x_BND, weight_BD, grad_x_BND, sums_BCSD, num_tokens,
            *grad_y_BND.stride()[:2], *x_BND.stride()[:2], weight_BD.stride(0),
            **norms_triton.row_constants(width, eps, center, x_BND.dtype == torch.float64), **_launch(tile),
            SUMS=num_sums,
        )  # fmt: skip
        if num_sums:
            columns = num_sums * width
            tile = norms_triton.SUM_TILE
            norms_triton.sum_chunks[(num_records * -(-columns // tile.constants["COLUMNS"]),)](
                sums_BCSD, sums_BSD, num_chunks, columns,
                **tile.constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
    return grad_x_BND, sums_BSD


@_norm_backward.register_fake
def _(
    grad_y_BND: Tensor, x_BND: Tensor, weight_BD: Tensor, eps: float, center: bool, num_sums: int
) -> tuple[Tensor, Tensor]:
    sums_BSD = x_BND.new_empty(x_BND.shape[0], num_sums, x_BND.shape[2], dtype=_sum_dtype(x_BND))
    return torch.empty_like(x_BND, memory_format=torch.contiguous_format), sums_BSD


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_BND, weight_BD, bias_BD, ctx.eps, ctx.center = inputs
    ctx.bias_dtype = None if bias_BD is None else bias_BD.dtype
    ctx.save_for_backward(x_BND, weight_BD)


def _differentiate(ctx: Any, grad_y_BND: Tensor) -> tuple[Tensor | None, ...]:
    x_BND, weight_BD = ctx.saved_tensors
    _, wants_weight, wants_bias, _, _ = ctx.needs_input_grad
    num_sums = 2 if wants_bias else int(wants_weight)
    grad_x_BND, sums_BSD = _norm_backward(grad_y_BND, x_BND, weight_BD, ctx.eps, ctx.center, num_sums)
    grad_weight_BD = sums_BSD[:, 0].to(weight_BD.dtype) if wants_weight else None
    grad_bias_BD = sums_BSD[:, 1].to(ctx.bias_dtype) if wants_bias else None
    return grad_x_BND, grad_weight_BD, grad_bias_BD, None, None


_norm.register_autograd(_differentiate, setup_context=_keep)


def _check(x_BND: Tensor, eps: float, **vectors: Tensor | None) -> None:
    if x_BND.dim() < 2 or not 1 <= x_BND.shape[-1] <= WIDEST:
        raise ValueError(f"x_BND has shape {tuple(x_BND.shape)}: give (B, ..., D) with D from 1 to {WIDEST}")
    if x_BND.dtype not in DTYPES:
        raise ValueError(f"x_BND is {x_BND.dtype}: give one of {', '.join(map(str, DTYPES))}")
    if not eps >= SMALLEST_EPS:
        raise ValueError(f"eps is {eps}: give at least {SMALLEST_EPS}")
    expected = (len(x_BND), x_BND.shape[-1])
    for name, value in vectors.items():
        if value is None:
            continue
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: with x_BND of {tuple(x_BND.shape)} give {expected}"
            )
        if value.dtype not in DTYPES:
            raise ValueError(f"{name} is {value.dtype}: give one of {', '.join(map(str, DTYPES))}")
        if value.device != x_BND.device:
            raise ValueError(f"{name} is on {value.device}, but x_BND on {x_BND.device}: give them one device")


def _over_tokens(vector_BD: Tensor, x: Tensor) -> Tensor:
    return vector_BD.view(len(x), *[1] * (x.dim() - 2), -1)


def _together(x: Tensor) -> Tensor:
    """Kernels take any stride but of the last dimension, which is copied together where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _num_chunks(num_tokens: int, tile: Tile) -> int:
    return -(-num_tokens // tile.constants["TOKENS"])


def _launch(tile: Tile) -> dict[str, int]:
    return {**tile.constants, "STAGES": tile.num_stages, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _shape_class(x_BND: Tensor) -> str:
    return f"D={x_BND.shape[2]} {str(x_BND.dtype).removeprefix('torch.')}"
