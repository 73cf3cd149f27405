"""Triton kernels of `kernels.adaln`: each row of the model's width is read once, kept in registers and written once.

A row is a head, the largest power of two below the width, and a tail for the rest: 1152 = 1024 + 128. Statistics and
sums are fp32 (fp64 where an input is). A program owns TOKENS tokens of one record. In the backward it also sums over
them the gradients of shift, scale and gate, and `norms_triton.sum_chunks` adds up a record's programs in their order:
what a record gets depends neither on the batch, nor on its place there, nor on padding after its tokens.
"""

# B records, N tokens, D model width, C chunks of TOKENS tokens, S sums (gradients of shift, scale and gate)
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from kernels.aot import Build
from kernels.tiles import Tile


@triton.jit
def _load(ptr, offsets, mask, precision: tl.constexpr):
    other: tl.constexpr = None if mask is None else 0.0
    return tl.load(ptr + offsets, mask=mask, other=other).to(precision)


@triton.jit
def _residual(x_ptr, branch_ptr, gate_ptr, residual_ptr, columns, mask, GATED: tl.constexpr, precision: tl.constexpr):
    """x + gate * branch, stored; returned as it was stored, for the backward recomputes from that."""
    x = _load(x_ptr, columns, mask, precision)
    if GATED:
        x += _load(gate_ptr, columns, mask, precision) * _load(branch_ptr, columns, mask, precision)
        stored = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + columns, stored, mask=mask)
        x = stored.to(precision)
    return x


@triton.jit
def _modulate(normed, shift_ptr, scale_ptr, modulated_ptr, columns, mask, precision: tl.constexpr):
    scale = _load(scale_ptr, columns, mask, precision)
    modulated = normed * (1 + scale) + _load(shift_ptr, columns, mask, precision)
    tl.store(modulated_ptr + columns, modulated.to(modulated_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward(
    x_ptr, branch_ptr, shift_ptr, scale_ptr, gate_ptr, residual_ptr, modulated_ptr, mean_ptr, rstd_ptr, num_tokens,
    x_stride_b, x_stride_n, branch_stride_b, branch_stride_n, shift_stride_b, scale_stride_b, gate_stride_b,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, GATED: tl.constexpr, EPS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = mean_ptr.dtype.element_ty
    chunks = tl.cdiv(num_tokens, TOKENS)
    record = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * TOKENS
    x_ptr += record * x_stride_b
    branch_ptr += record * branch_stride_b
    gate_ptr += record * gate_stride_b
    shift_ptr += record * shift_stride_b
    scale_ptr += record * scale_stride_b
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    for start in range(first, tl.minimum(first + TOKENS, num_tokens)):
        token = tl.cast(start, tl.int64)
        row = record * num_tokens + token
        x_row, branch_row = x_ptr + token * x_stride_n, branch_ptr + token * branch_stride_n
        residual_row, modulated_row = residual_ptr + row * WIDTH, modulated_ptr + row * WIDTH
        head_D = _residual(x_row, branch_row, gate_ptr, residual_row, head, None, GATED, precision)
        tail_D = _residual(x_row, branch_row, gate_ptr, residual_row, tail, tail < WIDTH, GATED, precision)
        mean = (tl.sum(head_D, 0) + tl.sum(tail_D, 0)) / WIDTH
        head_D -= mean
        tail_D = tl.where(tail < WIDTH, tail_D - mean, 0.0)
        rstd = tl.rsqrt((tl.sum(head_D * head_D, 0) + tl.sum(tail_D * tail_D, 0)) / WIDTH + EPS)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
        _modulate(head_D * rstd, shift_ptr, scale_ptr, modulated_row, head, None, precision)
        _modulate(tail_D * rstd, shift_ptr, scale_ptr, modulated_row, tail, tail < WIDTH, precision)


@triton.jit
def _through_modulation(grad_row, residual_row, scale_D, columns, mask, mean, rstd, precision: tl.constexpr):
    """The gradients of what was modulated and of what was normed, and what was normed."""
    grad_D = _load(grad_row, columns, mask, precision)
    normed_D = (_load(residual_row, columns, mask, precision) - mean) * rstd
    return grad_D, grad_D * (1 + scale_D), normed_D


@triton.jit
def _through_residual(
    grad_D, grad_residual_row, branch_row, gate_D, grad_x_row, grad_branch_row, columns, mask,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Store the gradients of x and branch; returns the gate's."""
    if RESIDUAL:
        grad_D += _load(grad_residual_row, columns, mask, precision)
    tl.store(grad_x_row + columns, grad_D.to(grad_x_row.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(grad_branch_row + columns, (grad_D * gate_D).to(grad_branch_row.dtype.element_ty), mask=mask)
        grad_D *= _load(branch_row, columns, mask, precision)
    return grad_D


@triton.jit
def backward(
    grad_residual_ptr, grad_modulated_ptr, residual_ptr, mean_ptr, rstd_ptr, scale_ptr, branch_ptr, gate_ptr,
    grad_x_ptr, grad_branch_ptr, sums_BCSD_ptr, num_tokens,
    grad_residual_stride_b, grad_residual_stride_n, grad_modulated_stride_b, grad_modulated_stride_n,
    residual_stride_b, residual_stride_n, branch_stride_b, branch_stride_n, scale_stride_b, gate_stride_b,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (w - mean(w) - normed * mean(w * normed)) + grad_residual, where w = grad_modulated * (1 + scale).

    RESIDUAL: whether the residual has a gradient of its own.
    """
    precision: tl.constexpr = mean_ptr.dtype.element_ty
    chunks = tl.cdiv(num_tokens, TOKENS)
    record = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * TOKENS
    scale_ptr += record * scale_stride_b
    gate_ptr += record * gate_stride_b
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    scale_head_D, scale_tail_D, gate_head_D, gate_tail_D = 0.0, 0.0, 0.0, 0.0
    if KEEP:
        scale_head_D = _load(scale_ptr, head, None, precision)
        scale_tail_D = _load(scale_ptr, tail, tail < WIDTH, precision)
        if GATED:
            gate_head_D = _load(gate_ptr, head, None, precision)
            gate_tail_D = _load(gate_ptr, tail, tail < WIDTH, precision)
    sum_shift_head_D = tl.zeros((HEAD,), precision)
    sum_scale_head_D, sum_gate_head_D = sum_shift_head_D, sum_shift_head_D
    sum_shift_tail_D = tl.zeros((TAIL,), precision)
    sum_scale_tail_D, sum_gate_tail_D = sum_shift_tail_D, sum_shift_tail_D

    for start in tl.range(first, tl.minimum(first + TOKENS, num_tokens), num_stages=STAGES):
        token = tl.cast(start, tl.int64)
        row = record * num_tokens + token
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        grad_row = grad_modulated_ptr + record * grad_modulated_stride_b + token * grad_modulated_stride_n
        residual_row = residual_ptr + record * residual_stride_b + token * residual_stride_n
        grad_head_D, head_D, normed_head_D = _through_modulation(
            grad_row, residual_row, scale_head_D if KEEP else _load(scale_ptr, head, None, precision),
            head, None, mean, rstd, precision,
        )  # fmt: skip
        grad_tail_D, tail_D, normed_tail_D = _through_modulation(
            grad_row, residual_row, scale_tail_D if KEEP else _load(scale_ptr, tail, tail < WIDTH, precision),
            tail, tail < WIDTH, mean, rstd, precision,
        )  # fmt: skip
        sum_shift_head_D += grad_head_D
        sum_shift_tail_D += grad_tail_D
        sum_scale_head_D += grad_head_D * normed_head_D
        sum_scale_tail_D += grad_tail_D * normed_tail_D

        along_ones = (tl.sum(head_D, 0) + tl.sum(tail_D, 0)) / WIDTH
        along_normed = (tl.sum(head_D * normed_head_D, 0) + tl.sum(tail_D * normed_tail_D, 0)) / WIDTH
        head_D = (head_D - along_ones - normed_head_D * along_normed) * rstd
        tail_D = (tail_D - along_ones - normed_tail_D * along_normed) * rstd
        grad_residual_row = grad_residual_ptr + record * grad_residual_stride_b + token * grad_residual_stride_n
        branch_row = branch_ptr + record * branch_stride_b + token * branch_stride_n
        grad_x_row, grad_branch_row = grad_x_ptr + row * WIDTH, grad_branch_ptr + row * WIDTH
        sum_gate_head_D += _through_residual(
            head_D, grad_residual_row, branch_row,
            gate_head_D if KEEP or not GATED else _load(gate_ptr, head, None, precision),
            grad_x_row, grad_branch_row, head, None, GATED, RESIDUAL, precision,
        )  # fmt: skip
        sum_gate_tail_D += _through_residual(
            tail_D, grad_residual_row, branch_row,
            gate_tail_D if KEEP or not GATED else _load(gate_ptr, tail, tail < WIDTH, precision),
            grad_x_row, grad_branch_row, tail, tail < WIDTH, GATED, RESIDUAL, precision,
        )  # fmt: skip

    sums_ptr = sums_BCSD_ptr + tl.program_id(0).to(tl.int64) * ((2 + GATED) * WIDTH)
    tl.store(sums_ptr + head, sum_shift_head_D)
    tl.store(sums_ptr + tail, sum_shift_tail_D, mask=tail < WIDTH)
    tl.store(sums_ptr + WIDTH + head, sum_scale_head_D)
    tl.store(sums_ptr + WIDTH + tail, sum_scale_tail_D, mask=tail < WIDTH)
    if GATED:
        tl.store(sums_ptr + 2 * WIDTH + head, sum_gate_head_D)
        tl.store(sums_ptr + 2 * WIDTH + tail, sum_gate_tail_D, mask=tail < WIDTH)


def split(width: int, num_warps: int) -> dict[str, int]:
    """A row's constants."""
    head = 1 << (width - 1).bit_length() - 1
    # two elements a thread at least: asynchronous copies take 4 bytes or more
    return {"WIDTH": width, "HEAD": head, "TAIL": max(triton.next_power_of_2(width - head), 64 * num_warps)}


def forward_tile(width: int) -> Tile:
    """A warp takes a row of up to 1152, without a barrier: 79 registers, so that 25 rows are under way at once on a
    multiprocessor."""
    return Tile({"TOKENS": 8}, triton.next_power_of_2(triton.cdiv(width, 1152)), num_stages=1)


def backward_tile(width: int, itemsize: int) -> Tile:
    """Sums, scale and gate stay in registers (128 at 1152) while the next row is on its way to shared memory.

    Past 4096 the registers hold the sums only (KEEP=0); past 16 KiB a row, shared memory of sm_80 holds no second one.
    """
    num_warps = min(triton.next_power_of_2(triton.cdiv(width, 384)), 16)
    constants = {"TOKENS": 32, "KEEP": int(width <= 4096)}
    return Tile(constants, num_warps, num_stages=2 if width * itemsize <= 16384 else 1)


def builds() -> list[Build]:
    """With and without a branch, at the widths of the DiT sizes and at powers of two."""
    sizes = {"bf16": 2, "fp16": 2, "fp32": 4}
    found = list[Build]()
    for width in (128, 192, 384, 768, 1024, 1152, 1536, 2048, 4096, 8192):
        for dtype, itemsize in sizes.items():
            if width * itemsize > 16384:  # a width of 8192 in fp32 works, but not without spills
                continue
            for gated in (True, False):
                case = f"D={width} {dtype}{'' if gated else ' no branch'}"
                tile = forward_tile(width)
                constants = {**split(width, tile.num_warps), **tile.constants, "GATED": gated, "EPS": 1e-6}
                found.append(_build("adaln.forward", case, forward, dtype, constants, tile))
                tile = backward_tile(width, itemsize)
                constants = {**split(width, tile.num_warps), **tile.constants, "STAGES": tile.num_stages}
                constants |= {"GATED": gated, "RESIDUAL": gated}
                found.append(_build("adaln.backward", case, backward, dtype, constants, tile))
    return found


def _build(op: str, case: str, kernel, dtype: str, constants: dict[str, int | float], tile: Tile) -> Build:
    types = dict[str, str]()
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            types[name] = "*fp32" if name.startswith(("mean", "rstd", "sums")) else f"*{dtype}"
        elif name not in constants:
            types[name] = "i32"
    aligned = frozenset(name for name in types if "_stride_" in name or name == "num_columns")
    return Build(op, case, kernel, types, constants, tile.num_warps, tile.num_stages, aligned)
