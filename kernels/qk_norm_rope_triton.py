"""The kernels of `kernels.qk_norm_rope`: a program takes a block of one record's tokens through a group of its heads.

Rotary turns the pairs (i, i + R), so a head is read as two halves of R features, each padded to a power of two, and
the rest where 2R < K. Each element is read once and written once: cosines, sines and weights stay in registers while
the loop over heads prefetches. The weights' gradients are summed over a program's tokens and heads; `sum_partials` then
adds those of a record's programs in an order that depends on nothing but the record.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# B records, N tokens, H query heads, G key heads, K head width, R rotary pairs, T tokens of a block, C columns of a
# part of the head, P partial sums. Strides of q, k and their gradients count in ALIGN elements, so that the compiler
# sees how far rows are aligned. `angles_tokens` is N where each record has angles of its own, 0 where all share them.
from __future__ import annotations

import math

import triton
import triton.language as tl

from kernels.aot import Build
from kernels.tiles import Tile


def forward_tile(width: int) -> Tile:
    """One 16-byte load a thread for each half of a head of 64 or 128 in 16 bits."""
    return Tile({"TOKENS": max(1, 2048 // triton.next_power_of_2(width)), "HEADS": 8}, num_warps=4, num_stages=3)


def backward_tile(width: int) -> Tile:
    """Half the tokens of the forward, which has half the operands, and more heads, for fewer partial sums."""
    return Tile({"TOKENS": max(1, 1024 // triton.next_power_of_2(width)), "HEADS": 16}, num_warps=4, num_stages=3)


def sum_tile(width: int) -> Tile:
    """Partial sums that are added at a time."""
    return Tile({"PARTIALS": max(1, 4096 // triton.next_power_of_2(width))}, num_warps=4, num_stages=3)


def head_constants(width: int, pairs: int, align: int) -> dict[str, int]:
    """What all of forward and backward know of a head of `width` features with `pairs` rotary pairs."""
    rest = width - 2 * pairs
    padded_rest = triton.next_power_of_2(rest) if rest else 0
    return {"K": width, "R": pairs, "HALF": triton.next_power_of_2(pairs), "REST": padded_rest, "ALIGN": align}


def sum_constants(width: int) -> dict[str, int]:
    """What `sum_partials` knows of a head."""
    return {"K": width, "WIDTH": triton.next_power_of_2(width)}


@triton.jit
def _load_halves(rows_T1, columns_C, mask_TC, R: tl.constexpr):
    at_TC = rows_T1 + columns_C[None, :]
    first_TC = tl.load(at_TC, mask_TC, 0.0).to(tl.float32)
    second_TC = tl.load(at_TC + R, mask_TC, 0.0).to(tl.float32)
    return first_TC, second_TC


@triton.jit
def _store_halves(rows_T1, columns_C, mask_TC, R: tl.constexpr, first_TC, second_TC):
    at_TC = rows_T1 + columns_C[None, :]
    tl.store(at_TC, first_TC.to(rows_T1.dtype.element_ty), mask_TC)
    tl.store(at_TC + R, second_TC.to(rows_T1.dtype.element_ty), mask_TC)


@triton.jit
def _forward_heads(
    x_T1, y_T1, weight, angles_T1, valid_T1, first_head, last_head, x_stride_h, y_stride_h, eps,
    K: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    column_C = tl.arange(0, HALF)
    mask_TC = valid_T1 & (column_C < R)[None, :]
    cos_TC, sin_TC = _load_halves(angles_T1, column_C, mask_TC, R)
    weight1_1C, weight2_1C = _load_halves(weight, column_C, (column_C < R)[None, :], R)
    if REST:
        rest_C = 2 * R + tl.arange(0, REST)
        rest_TC = valid_T1 & (rest_C < K)[None, :]
        rest_weight_1C = tl.load(weight + rest_C, rest_C < K, 0.0).to(tl.float32)[None, :]
    align = tl.full((), ALIGN, tl.int64)  # the heads of a transposed tensor may lie more than 2^31 elements apart
    for head in tl.range(first_head, last_head, num_stages=STAGES):
        x_head_T1, y_head_T1 = x_T1 + head * (align * x_stride_h), y_T1 + head * (align * y_stride_h)
        x1_TC, x2_TC = _load_halves(x_head_T1, column_C, mask_TC, R)
        squares_T = tl.sum(x1_TC * x1_TC + x2_TC * x2_TC, 1)
        if REST:
            x3_TC = tl.load(x_head_T1 + rest_C[None, :], rest_TC, 0.0).to(tl.float32)
            squares_T += tl.sum(x3_TC * x3_TC, 1)
        inverse_T1 = tl.rsqrt(squares_T / K + eps)[:, None]
        u1_TC, u2_TC = x1_TC * inverse_T1 * weight1_1C, x2_TC * inverse_T1 * weight2_1C
        y1_TC, y2_TC = u1_TC * cos_TC - u2_TC * sin_TC, u2_TC * cos_TC + u1_TC * sin_TC
        _store_halves(y_head_T1, column_C, mask_TC, R, y1_TC, y2_TC)
        if REST:
            y3_TC = x3_TC * inverse_T1 * rest_weight_1C
            tl.store(y_head_T1 + rest_C[None, :], y3_TC.to(y_T1.dtype.element_ty), rest_TC)


@triton.jit
def forward(
    q, k, q_weight, k_weight, angles, q_out, k_out,
    num_tokens, q_heads, k_heads, token_blocks,
    q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, out_stride_h,
    q_weight_stride, k_weight_stride, angles_tokens, eps,
    K: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Normalise, weigh and rotate q and k; `q_out` and `k_out` are contiguous."""
    q_groups, k_groups = tl.cdiv(q_heads, HEADS), tl.cdiv(k_heads, HEADS)
    program = tl.program_id(0)
    group, block = program % (q_groups + k_groups), program // (q_groups + k_groups)
    record = (block // token_blocks).to(tl.int64)
    token_T1 = (block % token_blocks * TOKENS + tl.arange(0, TOKENS))[:, None].to(tl.int64)
    valid_T1, row_T1 = token_T1 < num_tokens, record * num_tokens + token_T1
    angles_T1 = angles + (record * angles_tokens + token_T1) * (2 * R)
    if group < q_groups:
        q_T1 = q + (record * q_stride_b + token_T1 * q_stride_n) * ALIGN
        q_out_T1 = q_out + row_T1 * q_heads * out_stride_h * ALIGN
        first, last = group * HEADS, tl.minimum((group + 1) * HEADS, q_heads)
        _forward_heads(
            q_T1, q_out_T1, q_weight + record * q_weight_stride, angles_T1, valid_T1,
            first, last, q_stride_h, out_stride_h, eps, K, R, HALF, REST, ALIGN, STAGES,
        )  # fmt: skip
    else:
        k_T1 = k + (record * k_stride_b + token_T1 * k_stride_n) * ALIGN
        k_out_T1 = k_out + row_T1 * k_heads * out_stride_h * ALIGN
        first, last = (group - q_groups) * HEADS, tl.minimum((group - q_groups + 1) * HEADS, k_heads)
        _forward_heads(
            k_T1, k_out_T1, k_weight + record * k_weight_stride, angles_T1, valid_T1,
            first, last, k_stride_h, out_stride_h, eps, K, R, HALF, REST, ALIGN, STAGES,
        )  # fmt: skip


@triton.jit
def _backward_heads(
    dy_T1, x_T1, dx_T1, weight, partial, angles_T1, valid_T1, first_head, last_head,
    dy_stride_h, x_stride_h, dx_stride_h, eps,
    K: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column_C = tl.arange(0, HALF)
    mask_TC = valid_T1 & (column_C < R)[None, :]
    cos_TC, sin_TC = _load_halves(angles_T1, column_C, mask_TC, R)
    weight1_1C, weight2_1C = _load_halves(weight, column_C, (column_C < R)[None, :], R)
    dweight1_TC, dweight2_TC = tl.zeros((TOKENS, HALF), tl.float32), tl.zeros((TOKENS, HALF), tl.float32)
    if REST:
        rest_C = 2 * R + tl.arange(0, REST)
        rest_TC = valid_T1 & (rest_C < K)[None, :]
        rest_weight_1C = tl.load(weight + rest_C, rest_C < K, 0.0).to(tl.float32)[None, :]
        dweight3_TC = tl.zeros((TOKENS, REST), tl.float32)
    align = tl.full((), ALIGN, tl.int64)
    for head in tl.range(first_head, last_head, num_stages=STAGES):
        x_head_T1, dy_head_T1 = x_T1 + head * (align * x_stride_h), dy_T1 + head * (align * dy_stride_h)
        dx_head_T1 = dx_T1 + head * (align * dx_stride_h)
        x1_TC, x2_TC = _load_halves(x_head_T1, column_C, mask_TC, R)
        dy1_TC, dy2_TC = _load_halves(dy_head_T1, column_C, mask_TC, R)
        # turned back; then, with n = x * inverse: dweight = sum du * n, and dx = inverse * (dn - n * mean(dn * n))
        du1_TC, du2_TC = dy1_TC * cos_TC + dy2_TC * sin_TC, dy2_TC * cos_TC - dy1_TC * sin_TC
        dn1_TC, dn2_TC = du1_TC * weight1_1C, du2_TC * weight2_1C
        squares_T = tl.sum(x1_TC * x1_TC + x2_TC * x2_TC, 1)
        products_T = tl.sum(dn1_TC * x1_TC + dn2_TC * x2_TC, 1)
        if REST:
            x3_TC = tl.load(x_head_T1 + rest_C[None, :], rest_TC, 0.0).to(tl.float32)
            du3_TC = tl.load(dy_head_T1 + rest_C[None, :], rest_TC, 0.0).to(tl.float32)
            dn3_TC = du3_TC * rest_weight_1C
            squares_T += tl.sum(x3_TC * x3_TC, 1)
            products_T += tl.sum(dn3_TC * x3_TC, 1)
        inverse_T = tl.rsqrt(squares_T / K + eps)
        inverse_T1, mean_T1 = inverse_T[:, None], (inverse_T * products_T / K)[:, None]
        n1_TC, n2_TC = x1_TC * inverse_T1, x2_TC * inverse_T1
        dweight1_TC += du1_TC * n1_TC
        dweight2_TC += du2_TC * n2_TC
        dx1_TC, dx2_TC = inverse_T1 * (dn1_TC - n1_TC * mean_T1), inverse_T1 * (dn2_TC - n2_TC * mean_T1)
        _store_halves(dx_head_T1, column_C, mask_TC, R, dx1_TC, dx2_TC)
        if REST:
            n3_TC = x3_TC * inverse_T1
            dweight3_TC += du3_TC * n3_TC
            dx3_TC = inverse_T1 * (dn3_TC - n3_TC * mean_T1)
            tl.store(dx_head_T1 + rest_C[None, :], dx3_TC.to(dx_T1.dtype.element_ty), rest_TC)
    tl.store(partial + column_C, tl.sum(dweight1_TC, 0), column_C < R)
    tl.store(partial + R + column_C, tl.sum(dweight2_TC, 0), column_C < R)
    if REST:
        tl.store(partial + rest_C, tl.sum(dweight3_TC, 0), rest_C < K)


@triton.jit
def backward(
    dq_out, dk_out, q, k, q_weight, k_weight, angles, dq, dk, partials,
    num_tokens, q_heads, k_heads, token_blocks,
    dq_out_stride_b, dq_out_stride_n, dq_out_stride_h, dk_out_stride_b, dk_out_stride_n, dk_out_stride_h,
    q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, out_stride_h,
    q_weight_stride, k_weight_stride, angles_tokens, eps,
    K: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of q and k, contiguous, and each program's share of its weight's gradient, (program, K)."""
    q_groups, k_groups = tl.cdiv(q_heads, HEADS), tl.cdiv(k_heads, HEADS)
    program = tl.program_id(0)
    group, block = program % (q_groups + k_groups), program // (q_groups + k_groups)
    record = (block // token_blocks).to(tl.int64)
    token_T1 = (block % token_blocks * TOKENS + tl.arange(0, TOKENS))[:, None].to(tl.int64)
    valid_T1, row_T1 = token_T1 < num_tokens, record * num_tokens + token_T1
    angles_T1 = angles + (record * angles_tokens + token_T1) * (2 * R)
    partial = partials + program.to(tl.int64) * K
    if group < q_groups:
        dq_out_T1 = dq_out + (record * dq_out_stride_b + token_T1 * dq_out_stride_n) * ALIGN
        q_T1 = q + (record * q_stride_b + token_T1 * q_stride_n) * ALIGN
        dq_T1 = dq + row_T1 * q_heads * out_stride_h * ALIGN
        first, last = group * HEADS, tl.minimum((group + 1) * HEADS, q_heads)
        _backward_heads(
            dq_out_T1, q_T1, dq_T1, q_weight + record * q_weight_stride, partial, angles_T1, valid_T1, first, last,
            dq_out_stride_h, q_stride_h, out_stride_h, eps, K, R, HALF, REST, ALIGN, TOKENS, STAGES,
        )  # fmt: skip
    else:
        dk_out_T1 = dk_out + (record * dk_out_stride_b + token_T1 * dk_out_stride_n) * ALIGN
        k_T1 = k + (record * k_stride_b + token_T1 * k_stride_n) * ALIGN
        dk_T1 = dk + row_T1 * k_heads * out_stride_h * ALIGN
        first, last = (group - q_groups) * HEADS, tl.minimum((group - q_groups + 1) * HEADS, k_heads)
        _backward_heads(
            dk_out_T1, k_T1, dk_T1, k_weight + record * k_weight_stride, partial, angles_T1, valid_T1, first, last,
            dk_out_stride_h, k_stride_h, out_stride_h, eps, K, R, HALF, REST, ALIGN, TOKENS, STAGES,
        )  # fmt: skip


@triton.jit
def sum_partials(
    partials, dq_weight, dk_weight, token_blocks, q_groups, k_groups,
    K: tl.constexpr, WIDTH: tl.constexpr, PARTIALS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add a record's partial sums, (token_blocks, q_groups + k_groups, K): those of q, or in a second program of k.

    In the order of the tokens: blocks of padding after them add zeros at the end and change no bit.
    """
    record = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        first, groups, total = 0, q_groups, dq_weight
    else:
        first, groups, total = q_groups, k_groups, dk_weight
    column_C = tl.arange(0, WIDTH)
    sum_PC = tl.zeros((PARTIALS, WIDTH), tl.float32)
    for start in tl.range(0, token_blocks * groups, PARTIALS, num_stages=STAGES):
        index_P = start + tl.arange(0, PARTIALS)
        program_P = (record * token_blocks + index_P // groups) * (q_groups + k_groups) + first + index_P % groups
        mask_PC = (index_P < token_blocks * groups)[:, None] & (column_C < K)[None, :]
        sum_PC += tl.load(partials + (program_P * K)[:, None] + column_C[None, :], mask_PC, 0.0)
    tl.store(total + record * K + column_C, tl.sum(sum_PC, 0), column_C < K)


def builds() -> list[Build]:
    """Every head width of the recipes, turned whole, and one turned in part."""
    heads = [(64, 32), (72, 36), (80, 40), (96, 48), (128, 64), (128, 32)]
    found = [_sum_build(width) for width, pairs in heads if 2 * pairs == width]
    for width, pairs in heads:
        part = "" if 2 * pairs == width else f" R={pairs}"
        constants = head_constants(width, pairs, math.gcd(16, width, pairs))
        for dtype in ("bf16", "fp16", "fp32"):
            for kernel, tile in ((forward, forward_tile(width)), (backward, backward_tile(width))):
                types = {name: _type(name, dtype) for name in kernel.arg_names if not name.isupper()}
                stages = {"STAGES": tile.num_stages}
                found.append(
                    Build(
                        f"qk_norm_rope.{kernel.__name__}", f"K={width}{part} {dtype}", kernel, types,
                        {**constants, **tile.constants, **stages}, tile.num_warps, tile.num_stages,
                    )
                )  # fmt: skip
    return found


def _sum_build(width: int) -> Build:
    tile = sum_tile(width)
    types = {name: _type(name, "fp32") for name in sum_partials.arg_names if not name.isupper()}
    constants = {**sum_constants(width), **tile.constants, "STAGES": tile.num_stages}
    return Build(
        "qk_norm_rope.sum_partials", f"K={width} fp32", sum_partials, types, constants, tile.num_warps, tile.num_stages
    )


def _type(argument: str, dtype: str) -> str:
    if argument == "eps":
        return "fp32"
    if argument in ("q", "k", "q_out", "k_out", "dq_out", "dk_out", "dq", "dk"):
        return f"*{dtype}"
    return "*fp32" if argument.endswith("weight") or argument in ("angles", "partials") else "i32"
