"""Triton kernels of `kernels.ghost_norm`: Gram matrices by symmetric tiles, segmented direct products, clipped sums.

No reduction crosses programs: each program leaves a partial result, and one program a record (`finish`) adds up that
record's in an order which only the record's own length decides. Its rounding bound is derived in `kernels.ghost_norm`.
"""

# T tokens of all records, I and J tokens of a tile, D left features, P right features, K features at a time
# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from kernels.aot import Build
from kernels.tiles import Tile

EPS = tl.constexpr(2.0**-23)
TINY = tl.constexpr(2.0**-126)
# In eps, what one more term of a sum may cost, and with it all that a product and the sum over a Gram matrix may.
TERM = tl.constexpr(0.64)
SUMMED = tl.constexpr(192.0)
CHUNK = tl.constexpr(256)  # tokens that a matrix unit adds up before its sum is added to the others' in fp32
PARTS = tl.constexpr(64)  # partial results that `finish` takes at a time


@triton.jit
def _segment(offsets_ptr, record):
    start = tl.load(offsets_ptr + record)
    return start, (tl.load(offsets_ptr + record + 1) - start).to(tl.int32)


@triton.jit
def _gram(
    x_ptr, stride, rows_I, valid_I, rows_J, width,
    SAME: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Inner products of rows I with rows J, all of them valid; with SAME they are rows I, and are loaded once."""
    gram_IJ = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, width, BLOCK_K):
        features_K = first + tl.arange(0, BLOCK_K)
        mask_IK, mask_JK = valid_I[:, None], None
        if not WHOLE:
            mask_JK = (features_K < width)[None, :]
            mask_IK = mask_IK & mask_JK
        x_IK = tl.load(x_ptr + rows_I[:, None] * stride + features_K[None, :], mask=mask_IK, other=0.0)
        if SAME:
            y_JK = x_IK
        elif WHOLE:
            y_JK = tl.load(x_ptr + rows_J[:, None] * stride + features_K[None, :])
        else:
            y_JK = tl.load(x_ptr + rows_J[:, None] * stride + features_K[None, :], mask=mask_JK, other=0.0)
        gram_IJ = tl.dot(x_IK, tl.trans(y_JK), gram_IJ, input_precision="ieee")
    return gram_IJ


@triton.jit
def _root(squared, width):
    # what underflowed in one factor may meet a large value of the other: no norm of a token is below this
    return tl.sqrt_rn(squared) + tl.sqrt_rn(width * (TINY / EPS))


@triton.jit
def _magnitude(left_IJ, right_IJ, left_I, left_J, right_I, right_J, D, P):
    """What one unit of rounding in every term may add up to, from the norms of the tokens."""
    of_left_I = tl.sum(tl.abs(right_IJ) * left_J[None, :], 1)
    of_right_I = tl.sum(tl.abs(left_IJ) * right_J[None, :], 1)
    return tl.sum((D + SUMMED) * left_I * of_left_I + P * right_I * of_right_I)


@triton.jit
def gram_diagonal(
    left_ptr, right_ptr, offsets_ptr, norms_ptr, parts_ptr, left_stride, right_stride, D, P, num_tokens, most, tiles,
    ONES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_P: tl.constexpr,
):  # fmt: skip
    """A diagonal tile of a record's two Gram matrices, and the norms of its tokens."""
    record, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    start, length = _segment(offsets_ptr, record)
    tokens_I = tile * BLOCK + tl.arange(0, BLOCK)
    if (tile * BLOCK < length) & (length <= most):
        rows_I, valid_I = start + tokens_I, tokens_I < length
        left_II = _gram(left_ptr, left_stride, rows_I, valid_I, rows_I, D, True, BLOCK, BLOCK_K, WHOLE_D)
        right_II = _gram(right_ptr, right_stride, rows_I, valid_I, rows_I, P, True, BLOCK, BLOCK_K, WHOLE_P)
        if ONES:
            right_II += 1.0
        eye_II = tl.arange(0, BLOCK)[:, None] == tl.arange(0, BLOCK)[None, :]
        left_I = tl.where(valid_I, _root(tl.sum(tl.where(eye_II, left_II, 0.0), 1), D), 0.0)
        right_I = tl.where(valid_I, _root(tl.sum(tl.where(eye_II, right_II, 0.0), 1), P + ONES), 0.0)
        tl.store(norms_ptr + rows_I, left_I, mask=valid_I)
        tl.store(norms_ptr + num_tokens + rows_I, right_I, mask=valid_I)
        part_ptr = parts_ptr + tl.program_id(0)
        tl.store(part_ptr, tl.sum(left_II * right_II))
        magnitude = _magnitude(left_II, right_II, left_I, left_I, right_I, right_I, D, P + ONES)
        tl.store(part_ptr + tl.num_programs(0), magnitude)


@triton.jit
def gram_below(
    left_ptr, right_ptr, offsets_ptr, norms_ptr, parts_ptr, left_stride, right_stride, D, P, num_tokens, most, tiles,
    ONES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_P: tl.constexpr,
):  # fmt: skip
    """A tile below the diagonal, counted twice; `gram_diagonal` has left the norms of the tokens."""
    record, pair = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    start, length = _segment(offsets_ptr, record)
    row = ((tl.sqrt_rn(8.0 * pair + 1.0) + 1.0) * 0.5).to(tl.int32)  # pairs (1, 0), (2, 0), (2, 1), (3, 0), ...
    row = tl.where(row * (row - 1) // 2 > pair, row - 1, row)
    row = tl.where(row * (row + 1) // 2 <= pair, row + 1, row)
    column = pair - row * (row - 1) // 2
    if (row * BLOCK < length) & (length <= most):
        tokens_I, tokens_J = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
        rows_I, rows_J, valid_I = start + tokens_I, start + tokens_J, tokens_I < length
        left_IJ = _gram(left_ptr, left_stride, rows_I, valid_I, rows_J, D, False, BLOCK, BLOCK_K, WHOLE_D)
        right_IJ = _gram(right_ptr, right_stride, rows_I, valid_I, rows_J, P, False, BLOCK, BLOCK_K, WHOLE_P)
        if ONES:
            right_IJ += 1.0
        part_ptr = parts_ptr + tl.program_id(0)
        tl.store(part_ptr, 2.0 * tl.sum(left_IJ * right_IJ))
        left_I = tl.load(norms_ptr + rows_I, mask=valid_I, other=0.0)
        left_J = tl.load(norms_ptr + rows_J)
        right_I = tl.load(norms_ptr + num_tokens + rows_I, mask=valid_I, other=0.0)
        right_J = tl.load(norms_ptr + num_tokens + rows_J)
        magnitude = _magnitude(left_IJ, right_IJ, left_I, left_J, right_I, right_J, D, P + ONES)
        tl.store(part_ptr + tl.num_programs(0), 2.0 * magnitude)


@triton.jit
def _squares(x_ptr, stride, rows_I, valid_I, width, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    squares_I = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK_K):
        features_K = first + tl.arange(0, BLOCK_K)
        mask_IK = valid_I[:, None] & (features_K < width)[None, :]
        x_IK = tl.load(x_ptr + rows_I[:, None] * stride + features_K[None, :], mask=mask_IK, other=0.0).to(tl.float32)
        squares_I += tl.sum(x_IK * x_IK, 1)
    return squares_I


@triton.jit
def token_norms(
    left_ptr, right_ptr, norms_ptr, left_stride, right_stride, D, P, num_tokens,
    ONES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The norms of tokens, where no Gram matrix has them on its diagonal."""
    rows_I = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid_I = rows_I < num_tokens
    left_I = _root(_squares(left_ptr, left_stride, rows_I, valid_I, D, BLOCK, BLOCK_K), D)
    right_I = _root(_squares(right_ptr, right_stride, rows_I, valid_I, P, BLOCK, BLOCK_K) + ONES, P + ONES)
    tl.store(norms_ptr + rows_I, left_I, mask=valid_I)
    tl.store(norms_ptr + num_tokens + rows_I, right_I, mask=valid_I)


@triton.jit
def _sum_of_outer_products(
    left_ptr, right_ptr, offsets_ptr, weights_ptr, left_stride, right_stride, D, P, first_token, length, first_record,
    last_record, blocks, first_D, first_P, EQUAL: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_P: tl.constexpr,
):  # fmt: skip
    """sum_b weight_b sum_{n of b} left_n (x) right_n: one tile of it, over records of at most `blocks` blocks each.

    One loop over all blocks, so that the next record's loads are under way while the last one's are multiplied. With
    EQUAL records have `length` tokens each, the first of them at `first_token`; otherwise the offsets say where.
    """
    features_D, features_P = first_D + tl.arange(0, BLOCK_D), first_P + tl.arange(0, BLOCK_P)
    total_DP, chunk_DP = tl.zeros((BLOCK_D, BLOCK_P), tl.float32), tl.zeros((BLOCK_D, BLOCK_P), tl.float32)
    for block in range(first_record * blocks, last_record * blocks):
        record = block // blocks
        own = block - record * blocks  # its number in the record
        if EQUAL:
            start = first_token + record.to(tl.int64) * length
        else:
            start, length = _segment(offsets_ptr, record)
        tokens_T = own * BLOCK_T + tl.arange(0, BLOCK_T)
        rows_T, mask_TD, mask_TP = start + tokens_T, (tokens_T < length)[:, None], (tokens_T < length)[:, None]
        if not WHOLE_D:
            mask_TD = mask_TD & (features_D < D)[None, :]
        if not WHOLE_P:
            mask_TP = mask_TP & (features_P < P)[None, :]
        left_TD = tl.load(left_ptr + rows_T[:, None] * left_stride + features_D[None, :], mask=mask_TD, other=0.0)
        right_TP = tl.load(right_ptr + rows_T[:, None] * right_stride + features_P[None, :], mask=mask_TP, other=0.0)
        chunk_DP = tl.dot(tl.trans(left_TD), right_TP, chunk_DP, input_precision="ieee")
        if (own == blocks - 1) | ((own + 1) % (CHUNK // BLOCK_T) == 0):
            if WEIGHTED:
                weight = tl.load(weights_ptr + record)
                first, number = _segment(offsets_ptr, record)
                # a record that was not read as the offsets say must not pass for its neighbour
                wrong = (first != start) | (number != length) | (number > blocks * BLOCK_T)
                if weight != 0.0:  # otherwise what was summed may be inf or NaN, and is forgotten
                    total_DP += tl.where(wrong, float("nan"), weight) * chunk_DP
            else:
                total_DP += chunk_DP
            chunk_DP = tl.zeros((BLOCK_D, BLOCK_P), tl.float32)
    return total_DP


@triton.jit
def direct(
    left_ptr, right_ptr, offsets_ptr, parts_ptr, left_stride, right_stride, D, P, most, tiles, row,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_P: tl.constexpr,
):  # fmt: skip
    """Squares over one tile of a record's gradient; the tile itself is never stored."""
    across = tl.cdiv(P, BLOCK_P)
    record, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    start, length = _segment(offsets_ptr, record)
    if length > most:
        gradient_DP = _sum_of_outer_products(
            left_ptr, right_ptr, offsets_ptr, parts_ptr, left_stride, right_stride, D, P, start, length, 0, 1,
            tl.cdiv(length, BLOCK_T), tile // across * BLOCK_D, tile % across * BLOCK_P,
            True, False, BLOCK_D, BLOCK_P, BLOCK_T, WHOLE_D, WHOLE_P,
        )  # fmt: skip
        tl.store(parts_ptr + record.to(tl.int64) * row + tile, tl.sum(gradient_DP * gradient_DP))


@triton.jit
def weighted(
    left_ptr, right_ptr, offsets_ptr, weights_ptr, out_ptr, left_stride, right_stride, D, P, num_records, length,
    EQUAL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_P: tl.constexpr,
):  # fmt: skip
    """One tile of the weighted sum over one share of the records, of `length` tokens at most (EQUAL: exactly)."""
    tile, share, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    across = tl.cdiv(P, BLOCK_P)
    first_D, first_P = tile // across * BLOCK_D, tile % across * BLOCK_P
    total_DP = _sum_of_outer_products(
        left_ptr, right_ptr, offsets_ptr, weights_ptr, left_stride, right_stride, D, P, 0, length,
        num_records * share // shares, num_records * (share + 1) // shares, tl.cdiv(length, BLOCK_T),
        first_D, first_P, EQUAL, True, BLOCK_D, BLOCK_P, BLOCK_T, WHOLE_D, WHOLE_P,
    )  # fmt: skip
    features_D, features_P = first_D + tl.arange(0, BLOCK_D), first_P + tl.arange(0, BLOCK_P)
    mask_DP = (features_D < D)[:, None] & (features_P < P)[None, :]
    rows_D = share.to(tl.int64) * D + features_D
    tl.store(out_ptr + rows_D[:, None] * P + features_P[None, :], total_DP, mask=mask_DP)


@triton.jit
def _total(parts_ptr, number):
    total = tl.zeros((PARTS,), tl.float32)
    for first in range(0, number, PARTS):
        index = first + tl.arange(0, PARTS)
        total += tl.load(parts_ptr + index, mask=index < number, other=0.0)
    return tl.sum(total)


@triton.jit
def finish(
    offsets_ptr, norms_ptr, diagonal_ptr, below_ptr, direct_ptr, out_ptr, D, P, num_tokens, most, longest,
    diagonal_tiles, below_tiles, direct_tiles, BLOCK: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """A record's squared norm from its partial results: guarded, as it came out, and what bounds its rounding."""
    record, records = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    start, tokens = _segment(offsets_ptr, record)
    length = tl.minimum(tokens, longest)
    spread_S = tl.zeros((SPREAD,), tl.float32)
    for first in range(0, length, SPREAD):
        tokens_S = first + tl.arange(0, SPREAD)
        left_S = tl.load(norms_ptr + start + tokens_S, mask=tokens_S < length, other=0.0)
        right_S = tl.load(norms_ptr + num_tokens + start + tokens_S, mask=tokens_S < length, other=0.0)
        spread_S += left_S * right_S
    spread = tl.sum(spread_S)
    of_sum = (TERM * EPS) * (tl.minimum(length, CHUNK) + tl.cdiv(length, CHUNK)) * spread
    if length <= most:
        across = tl.cdiv(length, BLOCK)
        pairs = across * (across - 1) // 2
        diagonal_ptr += record * diagonal_tiles
        below_ptr += record * below_tiles
        squared = _total(diagonal_ptr, across) + _total(below_ptr, pairs)
        magnitude = _total(diagonal_ptr + records * diagonal_tiles, across)
        magnitude += _total(below_ptr + records * below_tiles, pairs)
        both = (TERM * EPS * D * spread) * (TERM * EPS * P * spread)  # errors of one factor met by the other's
        largest = squared + (TERM * EPS) * magnitude + both + (TINY * length) * length
    else:
        squared = _total(direct_ptr + record * direct_tiles, direct_tiles)
        magnitude = SUMMED * squared
        largest = squared + (TERM * EPS) * magnitude + (TINY * D) * P
        of_sum *= 2.0  # the sum that was measured rounds as the one that will be released does
    norm = tl.sqrt_rn(tl.where(largest < 0.0, 0.0, largest)) + of_sum  # not maximum: a NaN must be seen
    # a record longer than was said was not read to its end: it must not count
    tl.store(out_ptr + record, tl.where(tokens <= longest, norm * norm, float("nan")))
    tl.store(out_ptr + records + record, squared)
    tl.store(out_ptr + 2 * records + record, magnitude)
    tl.store(out_ptr + 3 * records + record, spread)


NORM_TILE = Tile({"BLOCK": 32, "BLOCK_K": 128}, num_warps=4, num_stages=2)
FINISH_TILE = Tile({"SPREAD": 1024}, num_warps=4, num_stages=1)
PROGRAMS = 264  # that fill an H100 or H200 twice


def gram_tile(itemsize: int, longest: int, *, aligned: bool) -> Tile:
    """Tiles of BLOCK x BLOCK tokens; aligned: rows begin at multiples of 16 bytes."""
    if itemsize == 4:  # multiplied without tensor cores
        return Tile({"BLOCK": 64, "BLOCK_K": 16}, num_warps=8, num_stages=2)
    if not aligned:  # loaded by way of registers
        return Tile({"BLOCK": 64, "BLOCK_K": 32}, num_warps=8, num_stages=3)
    if longest <= 64:
        return Tile({"BLOCK": 64, "BLOCK_K": 64}, num_warps=4, num_stages=4)
    return Tile({"BLOCK": 128, "BLOCK_K": 64}, num_warps=8, num_stages=4)


def product_tile(itemsize: int, D: int, P: int, *, aligned: bool) -> Tile:
    """Tiles of BLOCK_D x BLOCK_P features; tensor cores take no fewer than 64 by 16."""
    if itemsize == 4:
        return Tile({"BLOCK_D": 64, "BLOCK_P": 64, "BLOCK_T": 16}, num_warps=8, num_stages=2)
    if not aligned:
        return Tile({"BLOCK_D": 64, "BLOCK_P": 64, "BLOCK_T": 32}, num_warps=4, num_stages=3)
    block_d, block_p = (128 if D > 64 else 64), min(128, max(16, triton.next_power_of_2(P)))
    return Tile({"BLOCK_D": block_d, "BLOCK_P": block_p, "BLOCK_T": 64}, 8 if block_d == block_p == 128 else 4, 3)


def builds() -> list[Build]:
    """A DiT's layers: widths that are multiples of 64, and those of its patches (P = 16) and of its output (D = 32)."""
    found = list[Build]()
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for longest in (64, 1024)[itemsize == 4 :]:  # one tile serves both in fp32
            for kernel in (gram_diagonal, gram_below):
                tile = gram_tile(itemsize, longest, aligned=True)
                found.append(_build(kernel, dtype, f"T={longest}", tile, ONES=True, WHOLE_D=True, WHOLE_P=True))
        for D, P in ((1152, 1152), (1152, 16), (32, 1152)):
            tile = product_tile(itemsize, D, P, aligned=True)
            whole = {"WHOLE_D": D > 32, "WHOLE_P": P > 16}
            found.append(_build(direct, dtype, f"{D}x{P}", tile, **whole))
            found.append(_build(weighted, dtype, f"{D}x{P}", tile, **whole, EQUAL=True))
        tile = product_tile(itemsize, 1152, 1152, aligned=True)
        found.append(_build(weighted, dtype, "packed", tile, WHOLE_D=True, WHOLE_P=True, EQUAL=False))
        found.append(_build(token_norms, dtype, "", NORM_TILE, ONES=True))
    masked = {"WHOLE_D": False, "WHOLE_P": False}
    for kernel in (gram_diagonal, gram_below):
        tile = gram_tile(2, 1024, aligned=False)
        found.append(_build(kernel, "bf16", "odd widths", tile, aligned=False, ONES=True, **masked))
    tile = product_tile(2, 1151, 1151, aligned=False)
    found.append(_build(direct, "bf16", "odd widths", tile, aligned=False, **masked))
    found.append(_build(weighted, "bf16", "odd widths", tile, aligned=False, **masked, EQUAL=True))
    return [*found, _build(finish, "fp32", "", FINISH_TILE, BLOCK=128)]


def _build(kernel, dtype: str, case: str, tile: Tile, *, aligned: bool = True, **constants: bool | int) -> Build:
    factors, scratch = {"left_ptr": f"*{dtype}", "right_ptr": f"*{dtype}", "offsets_ptr": "*i64"}, "*fp32"
    types = {
        name: factors.get(name, scratch if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in tile.constants and name not in constants
    }
    return Build(
        op=f"ghost_norm.{kernel.fn.__name__}",
        case=f"{case} {dtype}".strip(),
        kernel=kernel,
        types=types,
        constants={**tile.constants, **constants},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=frozenset({"left_stride", "right_stride", "D", "P"} & types.keys()) if aligned else frozenset(),
        wgmma=dtype != "fp32",
    )
