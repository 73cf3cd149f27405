"""Triton kernels of `kernels.moe`: products of sorted rows with each expert's matrix, and what goes with them.

Tiles of rows never straddle experts. Expert e owns the tiles `offsets[e] // BLOCK_S + e` and on: as
floor((o + n) / B) - floor(o / B) + 1 >= ceil(n / B), these are enough for its n rows, however many they are, and the
tiles of all experts together are S // BLOCK_S + E. So a program finds its expert by counting, the grid depends on
shapes alone, and the few programs left without rows return at once.

A row's result is a function of that row and its expert's matrix: each product runs over its contracted axis in steps of
one width from the first to the last, in tiles whose size depends on no batch; rows of a tile never meet.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalOperand=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# T tokens, A choices of a token, S = T * A rows sorted by expert, E experts, P input features, D output features,
# H hidden features, F features of the first product: H, or 2H where a gate comes before them
from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from kernels.aot import TARGETS, Build
from kernels.tiles import Tile

NONE, SWIGLU = tl.constexpr(0), tl.constexpr(1)
ACTIVATIONS = {"none": 0, "swiglu": 1, "gelu": 2}


@triton.jit
def _tile_of_expert(offsets_E1, num_experts, EXPERTS: tl.constexpr, BLOCK_S: tl.constexpr, tile):
    """The expert that owns a tile of rows, the tile's first row, and the end of the expert's rows."""
    expert_E = tl.arange(0, EXPERTS)
    real_E = expert_E < num_experts
    first_E = tl.load(offsets_E1 + expert_E, mask=real_E, other=0) // BLOCK_S + expert_E
    expert = tl.sum((real_E & (first_E <= tile)).to(tl.int32), 0) - 1
    begin = tl.load(offsets_E1 + expert)
    row = begin + (tile - begin // BLOCK_S - expert) * BLOCK_S
    return expert, row, tl.load(offsets_E1 + expert + 1)


@triton.jit
def _grouped(program, num_rows, num_columns, GROUP: tl.constexpr):
    """(row, column) of a program, in bands of GROUP rows: neighbours in time share operands in the L2 cache."""
    band = program // (GROUP * num_columns)
    rows_in_band = tl.minimum(num_rows - band * GROUP, GROUP)
    within = program % (GROUP * num_columns)
    return band * GROUP + within % rows_in_band, within // rows_in_band


@triton.jit
def _sigmoid(gate, ACTIVATION: tl.constexpr):
    """s and its slope, where the activation is gate * s(gate) (* value): the tanh form of GELU is one of these too."""
    if ACTIVATION == SWIGLU:
        s = tl.sigmoid(gate)
        slope = s * (1 - s)
    else:
        s = tl.sigmoid(1.5957691216057308 * gate * (1 + 0.044715 * gate * gate))  # 2 sqrt(2 / pi)
        slope = s * (1 - s) * 1.5957691216057308 * (1 + 3 * 0.044715 * gate * gate)
    return s, slope


@triton.jit
def product_kernel(
    x, weight, y, h_SH, weights_TA, order_S, offsets_E1, num_tiles, num_experts, top_k, width_D, width_P,
    stride_x, stride_e, stride_d, stride_p,
    ACTIVATION: tl.constexpr, GATHER: tl.constexpr, WHOLE_P: tl.constexpr, TRANSPOSED: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Each sorted row times its expert's matrix: y = x weight^T.

    GATHER: x (T, P) by token, y (S, D) sorted. Otherwise: x (S, P) sorted, y (T * A, D) by token and choice.
    weight points to (E, D, P), or where DESCRIPTOR describes (E * D, P); or if TRANSPOSED (E * P, D), with WHOLE_P.
    With an ACTIVATION also h = weight of the row's choice * activation(y), sorted as y.
    """
    tile, column = _grouped(tl.program_id(0), num_tiles, tl.cdiv(width_D, BLOCK_D), GROUP)
    expert, row, end = _tile_of_expert(offsets_E1, num_experts, EXPERTS, BLOCK_S, tile)
    if row >= end:
        return
    row_S = row + tl.arange(0, BLOCK_S)
    # Rows past the end repeat the last one, which costs no mask, and are not stored.
    choice_S = tl.load(order_S + tl.minimum(row_S, end - 1))
    from_S = choice_S.to(tl.int32) // top_k if GATHER else tl.minimum(row_S, end - 1)
    to_S = row_S if GATHER else choice_S
    d_D = column * BLOCK_D + tl.arange(0, BLOCK_D)
    real_D = d_D < width_D
    if ACTIVATION == SWIGLU:  # each gate beside its value: a thread's neighbouring accumulators
        d_D = d_D // 2 + d_D % 2 * (width_D // 2)
    p_P = tl.arange(0, BLOCK_P)
    x_SP = x + from_S.to(tl.int64)[:, None] * stride_x + p_P[None, :]
    if not DESCRIPTOR:
        weight_PD = (
            weight + expert.to(tl.int64) * stride_e
            + d_D.to(tl.int64)[None, :] * stride_d + p_P.to(tl.int64)[:, None] * stride_p
        )  # fmt: skip
    sum_SD = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for p in range(0, width_P, BLOCK_P):
        real_P = p_P < width_P - p
        left = tl.load(x_SP) if WHOLE_P else tl.load(x_SP, mask=real_P[None, :], other=0.0)
        if DESCRIPTOR and TRANSPOSED:
            right = weight.load([expert * width_P + p, column * BLOCK_D])
        elif DESCRIPTOR:  # past D are the next expert's columns, which are not stored
            right = weight.load([expert * width_D + column * BLOCK_D, p]).T
        else:
            real_PD = real_D[None, :] if WHOLE_P else real_P[:, None] & real_D[None, :]
            right = tl.load(weight_PD, mask=real_PD, other=0.0)
        sum_SD = tl.dot(left, right, sum_SD, input_precision="ieee")
        x_SP += BLOCK_P
        if not DESCRIPTOR:
            weight_PD += BLOCK_P * stride_p
    y_SD = sum_SD.to(y.dtype.element_ty)
    to_S1, real_S1 = to_S.to(tl.int64)[:, None], (row_S < end)[:, None]
    if ACTIVATION == SWIGLU:
        width_H = width_D // 2
        h_H = column * (BLOCK_D // 2) + tl.arange(0, BLOCK_D // 2)
        real_SH = real_S1 & (h_H < width_H)[None, :]
        gate_SH, value_SH = tl.split(tl.reshape(y_SD, (BLOCK_S, BLOCK_D // 2, 2)))
        tl.store(y + to_S1 * width_D + h_H[None, :], gate_SH, mask=real_SH)
        tl.store(y + to_S1 * width_D + width_H + h_H[None, :], value_SH, mask=real_SH)
    else:
        width_H, h_H, real_SH, gate_SH, value_SH = width_D, d_D, real_S1 & real_D[None, :], y_SD, y_SD
        tl.store(y + to_S1 * width_D + d_D[None, :], y_SD, mask=real_SH)
    if ACTIVATION != NONE:
        gate_SH = gate_SH.to(tl.float32)
        active_SH = tl.load(weights_TA + choice_S)[:, None] * gate_SH * _sigmoid(gate_SH, ACTIVATION)[0]
        if ACTIVATION == SWIGLU:
            active_SH *= value_SH.to(tl.float32)
        tl.store(h_SH + to_S1 * width_H + h_H[None, :], active_SH.to(y.dtype.element_ty), mask=real_SH)


@triton.jit
def weight_grad_kernel(
    left, right, grad_EDP, order_S, offsets_E1, top_k, width_D, width_P, stride_left, stride_right,
    GATHER_LEFT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """grad[e] = sum over the rows of expert e, from the first to the last, of left (x) right; zero where it has none.

    One side is sorted by expert, the other is by token: left where GATHER_LEFT, otherwise right.
    """
    num_d, num_p = tl.cdiv(width_D, BLOCK_D), tl.cdiv(width_P, BLOCK_P)
    expert = tl.program_id(0) // (num_d * num_p)
    block_d, block_p = _grouped(tl.program_id(0) % (num_d * num_p), num_d, num_p, GROUP)
    begin, end = tl.load(offsets_E1 + expert), tl.load(offsets_E1 + expert + 1)
    d_D = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    p_P = block_p * BLOCK_P + tl.arange(0, BLOCK_P)
    real_D, real_P = d_D < width_D, p_P < width_P
    sum_DP = tl.zeros((BLOCK_D, BLOCK_P), tl.float32)
    row_S = begin + tl.arange(0, BLOCK_S)
    # One step ahead of the rows it names: a load that names another's address within a step halves the pipeline.
    choice_S = tl.load(order_S + row_S, mask=row_S < end, other=0)
    for _ in range(begin, end, BLOCK_S):
        real_S = row_S < end
        token_S = choice_S.to(tl.int32) // top_k
        left_S = (token_S if GATHER_LEFT else row_S).to(tl.int64) * stride_left
        right_S = (row_S if GATHER_LEFT else token_S).to(tl.int64) * stride_right
        left_DS = tl.load(left + left_S[None, :] + d_D[:, None], mask=real_S[None, :] & real_D[:, None], other=0.0)
        right_SP = tl.load(right + right_S[:, None] + p_P[None, :], mask=real_S[:, None] & real_P[None, :], other=0.0)
        sum_DP = tl.dot(left_DS, right_SP, sum_DP, input_precision="ieee")
        row_S += BLOCK_S
        choice_S = tl.load(order_S + row_S, mask=row_S < end, other=0)
    offset_DP = (expert.to(tl.int64) * width_D + d_D[:, None]) * width_P + p_P[None, :]
    tl.store(grad_EDP + offset_DP, sum_DP.to(grad_EDP.dtype.element_ty), mask=real_D[:, None] & real_P[None, :])


@triton.jit
def sum_kernel(
    y_TAD, out_TD, num_tokens, width_D, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[t] = y[t, 0] + y[t, 1] + ..., in this order, in fp32."""
    token_T = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real_TD = (token_T < num_tokens)[:, None] & (d_D < width_D)[None, :]
    sum_TD = tl.zeros((ROWS, BLOCK), tl.float32)
    for choice in tl.static_range(TOP_K):
        y_TD = y_TAD + ((token_T * TOP_K + choice) * width_D)[:, None] + d_D[None, :]
        sum_TD += tl.load(y_TD, mask=real_TD, other=0.0).to(tl.float32)
    tl.store(out_TD + (token_T * width_D)[:, None] + d_D[None, :], sum_TD.to(out_TD.dtype.element_ty), mask=real_TD)


@triton.jit
def _gate_and_value(z_SF, row_S, h_H, real_SH, width_H, ACTIVATION: tl.constexpr):
    """What the activation is a function of, in fp32: (gate, value), or twice the same where there is no gate."""
    if ACTIVATION == SWIGLU:
        gate = z_SF + (row_S * 2 * width_H)[:, None] + h_H[None, :]
        value_SH = tl.load(gate + width_H, mask=real_SH, other=0.0).to(tl.float32)
        gate_SH = tl.load(gate, mask=real_SH, other=0.0).to(tl.float32)
    else:
        value = z_SF + (row_S * width_H)[:, None] + h_H[None, :]
        value_SH = tl.load(value, mask=real_SH, other=0.0).to(tl.float32)
        gate_SH = value_SH
    return gate_SH, value_SH


@triton.jit
def activation_backward_kernel(
    grad_h_SH, z_SF, weights_TA, order_S, grad_z_SF, h_SH, grad_weights_TA, num_rows, width_H,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of z and of the row's weight, and h itself once more, which the forward did not keep."""
    row_S = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real_S = row_S < num_rows
    choice_S = tl.load(order_S + row_S, mask=real_S, other=0)
    weight_S1 = tl.load(weights_TA + choice_S)[:, None]
    sum_SH = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, width_H, BLOCK):
        h_H = start + tl.arange(0, BLOCK)
        real_SH = real_S[:, None] & (h_H < width_H)[None, :]
        at_SH = (row_S * width_H)[:, None] + h_H[None, :]
        gate_SH, value_SH = _gate_and_value(z_SF, row_S, h_H, real_SH, width_H, ACTIVATION)
        grad_SH = tl.load(grad_h_SH + at_SH, mask=real_SH, other=0.0).to(tl.float32)
        s_SH, slope_SH = _sigmoid(gate_SH, ACTIVATION)
        active_SH, by_gate_SH = gate_SH * s_SH, s_SH + gate_SH * slope_SH
        if ACTIVATION == SWIGLU:
            grad_value_SH = (weight_S1 * grad_SH * active_SH).to(grad_z_SF.dtype.element_ty)
            active_SH *= value_SH
            by_gate_SH *= value_SH
            at_gate_SH = at_SH + (row_S * width_H)[:, None]
            tl.store(grad_z_SF + at_gate_SH + width_H, grad_value_SH, mask=real_SH)
        else:
            at_gate_SH = at_SH
        grad_gate_SH = (weight_S1 * grad_SH * by_gate_SH).to(grad_z_SF.dtype.element_ty)
        tl.store(grad_z_SF + at_gate_SH, grad_gate_SH, mask=real_SH)
        tl.store(h_SH + at_SH, (weight_S1 * active_SH).to(h_SH.dtype.element_ty), mask=real_SH)
        sum_SH += grad_SH * active_SH
    tl.store(grad_weights_TA + choice_S, tl.sum(sum_SH, 1), mask=real_S)


# DESCRIPTOR (sm_90): the tensor memory accelerator fetches the matrices; rows are gathered, which it cannot do there.
def _product(block_s: int, block_d: int, block_p: int, num_warps: int, num_stages: int) -> Tile:
    blocks = {"BLOCK_S": block_s, "BLOCK_D": block_d, "BLOCK_P": block_p, "GROUP": 8, "DESCRIPTOR": 0}
    return Tile(blocks, num_warps, num_stages)


# 8 warps of a 128 x 256 tile hold 128 accumulators a thread, and at an H200's full rate ask the L2 cache for 86 bytes a
# nanosecond and multiprocessor; tiles of 128 x 128 would ask for 117, more than it gives.
_PRODUCT = {90: _product(128, 256, 64, 8, 4), 80: _product(128, 128, 32, 4, 4)}
_PRODUCT_FP32 = _product(64, 64, 16, 4, 2)
_WEIGHT_GRAD = {
    90: Tile({"BLOCK_D": 128, "BLOCK_P": 256, "BLOCK_S": 64, "GROUP": 8}, num_warps=8, num_stages=4),
    80: Tile({"BLOCK_D": 128, "BLOCK_P": 128, "BLOCK_S": 32, "GROUP": 8}, num_warps=4, num_stages=4),
}
_WEIGHT_GRAD_FP32 = Tile({"BLOCK_D": 64, "BLOCK_P": 64, "BLOCK_S": 16, "GROUP": 8}, num_warps=4, num_stages=2)


def product_tile(capability: int, dtype: str) -> Tile:
    """Of `product_kernel`. It depends on no number of rows: a row's bits must not."""
    return _PRODUCT_FP32 if dtype == "fp32" else _PRODUCT[90 if capability >= 90 else 80]


def weight_grad_tile(capability: int, dtype: str) -> Tile:
    """Of `weight_grad_kernel`."""
    return _WEIGHT_GRAD_FP32 if dtype == "fp32" else _WEIGHT_GRAD[90 if capability >= 90 else 80]


def row_block(width: int) -> dict[str, int]:
    """Rows, and features of each, that a program of the row-wise kernels holds at a time: 1024 elements."""
    block = min(1024, triton.next_power_of_2(width))
    return {"ROWS": 1024 // block, "BLOCK": block}


def expert_block(num_experts: int) -> int:
    """Experts among which a program of `product_kernel` looks for its own."""
    return max(16, triton.next_power_of_2(num_experts))


def builds() -> list[Build]:
    """As a mixture of 8 or 128 experts launches them, both ways, in each dtype; a "tail" is of width_P."""
    found = list[Build]()
    for dtype in ("bf16", "fp16", "fp32"):
        for target in TARGETS:
            product, weight_grad = product_tile(target, dtype), weight_grad_tile(target, dtype)
            for op, gather in (("gathered", True), ("summed", False)):
                for case, num_experts, transposed, whole, activation in (
                    ("E=8", 8, False, True, "none"),
                    ("E=8 transposed", 8, True, True, "none"),
                    ("E=8 tail", 8, False, False, "none"),
                    ("E=128", 128, False, True, "none"),
                    *(("E=8 " + name, 8, False, True, name) for name in ("swiglu", "gelu") if gather),
                ):
                    constants = {"ACTIVATION": ACTIVATIONS[activation], "GATHER": gather, "WHOLE_P": whole}
                    constants |= {"TRANSPOSED": transposed}
                    constants |= {"EXPERTS": expert_block(num_experts), "stride_d" if transposed else "stride_p": 1}
                    found.append(_build(op, case, dtype, product_kernel, product, constants, (target,)))
                    if target >= 90 and dtype != "fp32" and whole and activation != "swiglu":
                        described = replace(product, constants={**product.constants, "DESCRIPTOR": 1})
                        name = f"{case} descriptor"
                        found.append(_build(op, name, dtype, product_kernel, described, constants, (target,)))
            for case, gather_left in (("tokens right", False), ("tokens left", True)):
                constants = {"GATHER_LEFT": gather_left}
                found.append(_build("weight_grad", case, dtype, weight_grad_kernel, weight_grad, constants, (target,)))
        for width in (384, 1024):
            block = Tile(row_block(width), num_warps=4, num_stages=2)
            for name in ("swiglu", "gelu"):
                case, constants = f"H={width} {name}", {"ACTIVATION": ACTIVATIONS[name]}
                found.append(_build("activation_backward", case, dtype, activation_backward_kernel, block, constants))
            for top_k in (2, 8):
                found.append(_build("sum", f"D={width} A={top_k}", dtype, sum_kernel, block, {"TOP_K": top_k}))
    return found


def _build(
    op: str, case: str, dtype: str, kernel: triton.JITFunction, tile: Tile, constants: dict[str, object],
    targets: tuple[int, ...] = TARGETS,
) -> Build:  # fmt: skip
    constants = {**constants, **tile.constants}
    types = {name: _type(name, dtype) for name in kernel.arg_names if name not in constants}
    if constants.get("DESCRIPTOR"):
        block = [constants["BLOCK_D"], constants["BLOCK_P"]]
        types["weight"] = f"tensordesc<{dtype}{block[::-1] if constants['TRANSPOSED'] else block}>"
    aligned = frozenset(name for name in types if name.startswith(("width_", "stride_")))
    wgmma = kernel in (product_kernel, weight_grad_kernel) and dtype != "fp32"
    return Build(
        f"moe.{op}", f"{case} {dtype}", kernel, types, constants, tile.num_warps, tile.num_stages, aligned,
        wgmma=wgmma, targets=targets,
    )  # fmt: skip


def _type(name: str, dtype: str) -> str:
    """Of an argument, by its name."""
    match name:
        case "order_S":
            return "*i64"
        case "offsets_E1":
            return "*i32"
        case "weights_TA" | "grad_weights_TA":
            return "*fp32"
        case "stride_e":
            return "i64"
        case _ if name.startswith(("num_", "width_", "stride_")) or name == "top_k":
            return "i32"
        case _:
            return f"*{dtype}"
