"""Triton kernels of `kernels.norms`: a row is read once, normalised in registers and written once.

No width need be a power of two: a row is a head, the largest power of two below its width, and a tail, as little as
holds the rest (1152 = 1024 + 128). Statistics and sums are fp32, or fp64 where x is. The backward takes the statistics
anew from the rows that it must read anyway, so that a forward leaves nothing behind but its output.

A program owns a chunk of TOKENS of one record, ROWS at a time. Backward: it sums the chunk's gradients of weight and
bias; `sum_chunks` then adds a record's chunks up in their order. Chunks begin at fixed tokens, so that a record's sums
depend neither on its batch nor on padding at its end.
"""

# B records, N tokens, D model width, C chunks a record, S per-record gradients (weight, bias);
# R rows at a time, H columns of the head, T of the tail
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from itertools import product
from typing import Any

import triton
import triton.language as tl

from kernels.aot import Build
from kernels.tiles import Tile

SUM_TILE = Tile({"COLUMNS": 128, "CHUNKS": 16}, num_warps=4, num_stages=3)  # few bytes: nothing to tune


@triton.jit
def _load(at, head_1H, tail_1T, head_mask, tail_mask, PRECISION: tl.constexpr):
    head = tl.load(at + head_1H, head_mask, 0.0).to(PRECISION)
    return head, tl.load(at + tail_1T, tail_mask, 0.0).to(PRECISION)


@triton.jit
def _store(at, head_1H, tail_1T, head_mask, tail_mask, head, tail):
    tl.store(at + head_1H, head.to(at.dtype.element_ty), head_mask)
    tl.store(at + tail_1T, tail.to(at.dtype.element_ty), tail_mask)


@triton.jit
def _normed(x_RH, x_RT, inside_1T, WIDTH: tl.constexpr, EPS: tl.constexpr, CENTER: tl.constexpr):
    """The rows before their weight, and the factor that brought them to unit scale; rows of zeros stay so."""
    if CENTER:
        mean_R1 = (tl.sum(x_RH, 1, keep_dims=True) + tl.sum(x_RT, 1, keep_dims=True)) / WIDTH
        x_RH -= mean_R1
        x_RT = tl.where(inside_1T, x_RT - mean_R1, 0.0)
    squares_R1 = tl.sum(x_RH * x_RH, 1, keep_dims=True) + tl.sum(x_RT * x_RT, 1, keep_dims=True)
    rstd_R1 = tl.rsqrt(squares_R1 / WIDTH + EPS)
    return x_RH * rstd_R1, x_RT * rstd_R1, rstd_R1


@triton.jit
def forward(
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_tokens, x_stride_b, x_stride_n, weight_stride_b, bias_stride_b,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, EPS: tl.constexpr, CENTER: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(num_tokens, TOKENS)
    record = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * TOKENS
    head_1H = tl.arange(0, HEAD)[None, :]
    tail_1T = HEAD + tl.arange(0, TAIL)[None, :]
    inside_1T = tail_1T < WIDTH
    weight_1H, weight_1T = _load(
        weight_ptr + record * weight_stride_b, head_1H, tail_1T, head_1H < WIDTH, inside_1T, PRECISION
    )
    if BIAS:
        bias_1H, bias_1T = _load(
            bias_ptr + record * bias_stride_b, head_1H, tail_1T, head_1H < WIDTH, inside_1T, PRECISION
        )
    for start in tl.range(first, tl.minimum(first + TOKENS, num_tokens), ROWS, num_stages=STAGES):
        token_R1 = start + tl.arange(0, ROWS)[:, None]
        valid_R1 = token_R1 < num_tokens
        x_R1 = x_ptr + record * x_stride_b + token_R1.to(tl.int64) * x_stride_n
        y_R1 = y_ptr + (record * num_tokens + token_R1) * WIDTH
        inside_RT = valid_R1 & inside_1T
        x_RH, x_RT = _load(x_R1, head_1H, tail_1T, valid_R1, inside_RT, PRECISION)
        y_RH, y_RT, _ = _normed(x_RH, x_RT, inside_1T, WIDTH, EPS, CENTER)
        y_RH, y_RT = y_RH * weight_1H, y_RT * weight_1T
        if BIAS:
            y_RH, y_RT = y_RH + bias_1H, y_RT + bias_1T
        _store(y_R1, head_1H, tail_1T, valid_R1, inside_RT, y_RH, y_RT)


@triton.jit
def backward(
    grad_y_ptr, x_ptr, weight_ptr, grad_x_ptr, sums_BCSD_ptr, num_tokens,
    grad_y_stride_b, grad_y_stride_n, x_stride_b, x_stride_n, weight_stride_b,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, EPS: tl.constexpr, CENTER: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g - mean(g) - u mean(g u)), where u is the normed row and g = dy weight; without CENTER no mean(g).

    SUMS: how many of the per-record gradients are wanted: none, the weight's, or the weight's and the bias's.
    """
    chunks = tl.cdiv(num_tokens, TOKENS)
    record = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * TOKENS
    head_1H = tl.arange(0, HEAD)[None, :]
    tail_1T = HEAD + tl.arange(0, TAIL)[None, :]
    inside_1T = tail_1T < WIDTH
    weight_1H, weight_1T = _load(
        weight_ptr + record * weight_stride_b, head_1H, tail_1T, head_1H < WIDTH, inside_1T, PRECISION
    )
    weight_sum_RH, weight_sum_RT = tl.zeros((ROWS, HEAD), PRECISION), tl.zeros((ROWS, TAIL), PRECISION)
    bias_sum_RH, bias_sum_RT = tl.zeros((ROWS, HEAD), PRECISION), tl.zeros((ROWS, TAIL), PRECISION)
    for start in tl.range(first, tl.minimum(first + TOKENS, num_tokens), ROWS, num_stages=STAGES):
        token_R1 = start + tl.arange(0, ROWS)[:, None]
        valid_R1 = token_R1 < num_tokens
        x_R1 = x_ptr + record * x_stride_b + token_R1.to(tl.int64) * x_stride_n
        grad_y_R1 = grad_y_ptr + record * grad_y_stride_b + token_R1.to(tl.int64) * grad_y_stride_n
        grad_x_R1 = grad_x_ptr + (record * num_tokens + token_R1) * WIDTH
        inside_RT = valid_R1 & inside_1T
        x_RH, x_RT = _load(x_R1, head_1H, tail_1T, valid_R1, inside_RT, PRECISION)
        grad_RH, grad_RT = _load(grad_y_R1, head_1H, tail_1T, valid_R1, inside_RT, PRECISION)
        u_RH, u_RT, rstd_R1 = _normed(x_RH, x_RT, inside_1T, WIDTH, EPS, CENTER)
        if SUMS > 0:
            weight_sum_RH += grad_RH * u_RH
            weight_sum_RT += grad_RT * u_RT
        if SUMS > 1:
            bias_sum_RH += grad_RH
            bias_sum_RT += grad_RT
        grad_RH, grad_RT = grad_RH * weight_1H, grad_RT * weight_1T
        along_R1 = (tl.sum(grad_RH * u_RH, 1, keep_dims=True) + tl.sum(grad_RT * u_RT, 1, keep_dims=True)) / WIDTH
        if CENTER:
            mean_R1 = (tl.sum(grad_RH, 1, keep_dims=True) + tl.sum(grad_RT, 1, keep_dims=True)) / WIDTH
            grad_RH, grad_RT = grad_RH - mean_R1, grad_RT - mean_R1
        grad_RH, grad_RT = rstd_R1 * (grad_RH - u_RH * along_R1), rstd_R1 * (grad_RT - u_RT * along_R1)
        _store(grad_x_R1, head_1H, tail_1T, valid_R1, inside_RT, grad_RH, grad_RT)
    head_H, tail_T = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    sums_ptr = sums_BCSD_ptr + tl.program_id(0).to(tl.int64) * (SUMS * WIDTH)
    if SUMS > 0:
        tl.store(sums_ptr + head_H, tl.sum(weight_sum_RH, 0))
        tl.store(sums_ptr + tail_T, tl.sum(weight_sum_RT, 0), tail_T < WIDTH)
    if SUMS > 1:
        tl.store(sums_ptr + WIDTH + head_H, tl.sum(bias_sum_RH, 0))
        tl.store(sums_ptr + WIDTH + tail_T, tl.sum(bias_sum_RT, 0), tail_T < WIDTH)


@triton.jit
def sum_chunks(sums_BCX_ptr, sums_BX_ptr, num_chunks, num_columns, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr):
    """Add up a record's chunks in their order; zeros behind the last change nothing."""
    blocks = tl.cdiv(num_columns, COLUMNS)
    record = (tl.program_id(0) // blocks).to(tl.int64)
    column_X = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    sums_BCX_ptr += record * num_chunks * num_columns
    total_X = tl.zeros((COLUMNS,), sums_BX_ptr.dtype.element_ty)
    for start in range(0, num_chunks, CHUNKS):
        chunk_C1 = start + tl.arange(0, CHUNKS)[:, None]
        mask_CX = (chunk_C1 < num_chunks) & (column_X < num_columns)[None, :]
        total_X += tl.sum(tl.load(sums_BCX_ptr + chunk_C1 * num_columns + column_X[None, :], mask_CX, 0.0), 0)
    tl.store(sums_BX_ptr + record * num_columns + column_X, total_X, column_X < num_columns)


def split(width: int) -> tuple[int, int]:
    """How many columns a row's head and tail have; neither is empty, so that every width takes the same path."""
    head = 1 << max(0, (width - 1).bit_length() - 1)
    return head, triton.next_power_of_2(max(1, width - head))


def row_constants(width: int, eps: float, center: bool, double: bool) -> dict[str, Any]:
    """What forward and backward are compiled for, beside their tile."""
    head, tail = split(width)
    precision = tl.float64 if double else tl.float32
    return {"WIDTH": width, "HEAD": head, "TAIL": tail, "EPS": eps, "CENTER": center, "PRECISION": precision}


def tile(width: int, *, backward: bool) -> Tile:
    """As many rows at a time as leave a thread 36 elements of them, or 16 in the backward, which holds its sums too."""
    padded = sum(split(width))
    num_warps = 4 if padded <= 2048 else 8
    most = (16 if backward else 36) * 32 * num_warps // padded
    rows = min(32, 1 << max(0, most.bit_length() - 1))
    tokens = max(32 if backward else 16, 8 * rows)  # long chunks: a backward writes its sums once a chunk
    return Tile({"ROWS": rows, "TOKENS": tokens}, num_warps, num_stages=3 if backward else 2)


WIDTHS = (72, 128, 384, 768, 1024, 1152, 4096)  # of heads and of models


def builds() -> list[Build]:
    """Every kernel at every width that is in use; weights are fp32, as under autocast."""
    found = list[Build]()
    for dtype, width, (name, center) in product(
        ("bf16", "fp16", "fp32"), WIDTHS, (("rms_norm", False), ("layer_norm", True))
    ):
        types = {"x_ptr": f"*{dtype}", "weight_ptr": "*fp32", "num_tokens": "i32"}
        types |= dict.fromkeys(("x_stride_b", "x_stride_n", "weight_stride_b"), "i64")
        forward_types = {"bias_ptr": "*fp32", "y_ptr": f"*{dtype}", "bias_stride_b": "i64"}
        backward_types = {"grad_y_ptr": f"*{dtype}", "grad_x_ptr": f"*{dtype}", "sums_BCSD_ptr": "*fp32"}
        backward_types |= dict.fromkeys(("grad_y_stride_b", "grad_y_stride_n"), "i64")
        for kernel, own_types, own_constants in (
            (forward, forward_types, {"BIAS": center}),
            (backward, backward_types, {"SUMS": 2 if center else 1}),
        ):
            cut = tile(width, backward=kernel is backward)
            strides = {argument for argument in {**types, **own_types} if "stride" in argument}
            found.append(
                Build(
                    op=f"{name}.{'backward' if kernel is backward else 'forward'}",
                    case=f"D={width} {dtype}",
                    kernel=kernel,
                    types={**types, **own_types},
                    constants={**row_constants(width, 1e-6, center, False), **own_constants, **cut.constants}
                    | {"STAGES": cut.num_stages},
                    num_warps=cut.num_warps,
                    num_stages=cut.num_stages,
                    aligned=frozenset(strides if width % 16 == 0 else ()),
                )
            )
    found.append(
        Build(
            op="norm.sum_chunks",
            case="fp32",
            kernel=sum_chunks,
            types={"sums_BCX_ptr": "*fp32", "sums_BX_ptr": "*fp32", "num_chunks": "i32", "num_columns": "i32"},
            constants=SUM_TILE.constants,
            num_warps=SUM_TILE.num_warps,
            num_stages=SUM_TILE.num_stages,
            aligned=frozenset({"num_columns"}),
        )
    )
    return found
