"""Triton kernels of attention: forward, and a backward in which every gradient has one owner and no atomics.

A program owns a tile of one head's queries (forward, dQ) or keys (dK and dV) and walks the tiles of the other side in
ascending order: first those of full blocks, which need no mask, then those of partial ones. Its sums therefore have one
order, which depends on its own record alone. Up to SHORT tokens one program does a whole head: the forward holds all
keys, and the backward forms the scores once for all three gradients.

A head width that is no power of two is a HEAD of 64 features and a TAIL of 16 or 32, of which those past WIDTH are
zeros: 72 takes 80 columns of the tensor cores, where padding to 128 would take 128.

Softmax is in base 2, its statistics and every sum in fp32. Sources: Dao 2023 (arXiv:2307.08691), Alg. 1 and 2, the
backward in two passes; Milakov & Gimelshein 2018 (arXiv:1805.02867), Alg. 3.

One file: forward and backward share the arithmetic of tiles and masks.
"""

# B records, H query heads, G key heads, N queries, M keys, K head width, I blocks of queries, J blocks of keys
# ruff: noqa: PLR0912, PLR0915  a kernel is one function, for its tiles live in registers
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from kernels.aot import TARGETS, Build
from kernels.tiles import Tile

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def _tile(base, stride, first, end, ROWS: tl.constexpr, FROM: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
          RAGGED: tl.constexpr):  # fmt: skip
    """Rows [first, first + ROWS) and columns [FROM, FROM + COLUMNS): zeros past WIDTH and, where RAGGED, past `end`."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = FROM + tl.arange(0, COLUMNS)[None, :]
    # 64 bits for where the tile begins, 32 within it
    pointers = base + tl.cast(first, tl.int64) * stride + (rows * stride + columns)
    if RAGGED and FROM + COLUMNS > WIDTH:
        tile = tl.load(pointers, mask=(rows < end - first) & (columns < WIDTH), other=0.0)
    elif RAGGED:
        tile = tl.load(pointers, mask=rows < end - first, other=0.0)
    elif FROM + COLUMNS > WIDTH:
        tile = tl.load(pointers, mask=columns < WIDTH, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _streamed(source, base, stride, record, head, first, end, ROWS: tl.constexpr, FROM: tl.constexpr,
              COLUMNS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """`_tile` of what a loop walks over: by Hopper's copy engine, which fills in the zeros by itself, or by loads."""
    if DESCRIPTORS:
        return source.load([record, head, first, FROM]).reshape(ROWS, COLUMNS)
    else:  # not behind the return: Triton would compile it all the same
        return _tile(base, stride, first, end, ROWS, FROM, COLUMNS, WIDTH, RAGGED)


@triton.jit
def _store(base, stride, first, end, value, FROM: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.arange(0, value.shape[0])[:, None]
    columns = FROM + tl.arange(0, value.shape[1])[None, :]
    pointers = base + tl.cast(first, tl.int64) * stride + (rows * stride + columns)
    tl.store(pointers, value.to(base.dtype.element_ty), mask=(rows < end - first) & (columns < WIDTH))


@triton.jit
def _bounds(lo, hi, seg, first, end, ROWS: tl.constexpr, MASK: tl.constexpr):
    """lo, hi and segment of the queries; rows past the end see nothing."""
    rows = tl.arange(0, ROWS)
    inside = rows < end - first
    low = tl.load(lo + first + rows, mask=inside, other=0)
    high = tl.load(hi + first + rows, mask=inside, other=0)
    segment = low
    if MASK == 2:
        segment = tl.load(seg + first + rows, mask=inside, other=0)
    return low, high, segment


@triton.jit
def _noise_of(noise, first, end, COLUMNS: tl.constexpr, MASK: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    if MASK == 2:
        return tl.load(noise + first + columns, mask=columns < end - first, other=-1)
    return columns


@triton.jit
def _visible(low, high, segment, keys, noise, MASK: tl.constexpr):
    """The mask's rule; the arguments have shapes that broadcast to the scores'."""
    visible = (keys >= low) & (keys < high)
    if MASK == 2:
        visible = visible & ((noise < 0) | (noise == segment))
    return visible


@triton.jit
def forward(
    q, k, v, k_tail, v_tail, out, lse,
    lo, hi, seg, noise, num_full, full, num_partial, partial,
    q_b, q_h, q_n, k_b, k_g, k_m, v_b, v_g, v_m, out_b, out_h, out_n, H, N, M, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, MASK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """out (B, H, N, K) and lse (B, H, N), a logarithm to base 2, of a tile of queries.

    GROUP query heads share a key head. Strides count UNIT elements. MASK: 0 none, 1 lo and hi, 2 with the noise rule.
    """
    num_tiles = tl.cdiv(N, QUERIES)
    # the last queries first: under a causal mask they see most, and what runs last should be short
    first_query = (num_tiles - 1 - tl.program_id(0) % num_tiles) * QUERIES
    head_of_batch = tl.program_id(0) // num_tiles
    record, head = head_of_batch // H, head_of_batch % H
    record64 = record.to(tl.int64)
    q += (record64 * q_b + head.to(tl.int64) * q_h) * UNIT
    out += (record64 * out_b + head.to(tl.int64) * out_h) * UNIT
    lse += head_of_batch.to(tl.int64) * N
    k_base, v_base = k, v
    if not DESCRIPTORS:
        k_base = k + (record64 * k_b + (head // GROUP).to(tl.int64) * k_g) * UNIT
        v_base = v + (record64 * v_b + (head // GROUP).to(tl.int64) * v_g) * UNIT

    query = _tile(q, q_n * UNIT, first_query, N, QUERIES, 0, HEAD, WIDTH, True)
    if TAIL:
        query_tail = _tile(q, q_n * UNIT, first_query, N, QUERIES, HEAD, TAIL, WIDTH, True)
    if MASK:
        low, high, segment = _bounds(
            lo + record64 * N, hi + record64 * N, seg + record64 * N, first_query, N, QUERIES, MASK
        )
        noise += record64 * M
        num_columns = tl.cdiv(M, BLOCK)
        row = record64 * tl.cdiv(N, BLOCK) + first_query // BLOCK
    scale2 = scale * LOG2E
    top = tl.full([QUERIES], -INFINITY, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, HEAD], tl.float32)
    if TAIL:
        sums_tail = tl.zeros([QUERIES, TAIL], tl.float32)

    for PARTIAL in tl.static_range(2):
        if MASK:
            if PARTIAL:
                num_steps = tl.load(num_partial + row) * (BLOCK // KEYS)
                blocks = partial + row * num_columns
            else:
                num_steps = tl.load(num_full + row) * (BLOCK // KEYS)
                blocks = full + row * num_columns
            block = tl.load(blocks)
        else:
            first_step = M // KEYS if PARTIAL else 0
            num_steps = tl.cdiv(M, KEYS) - M // KEYS if PARTIAL else M // KEYS
        for step in tl.range(0, num_steps, num_stages=1 if PARTIAL and not MASK else None):
            if MASK:
                first_key = block * BLOCK + step % (BLOCK // KEYS) * KEYS
                # a step ahead, so that no address waits for it
                block = tl.load(blocks + tl.minimum((step + 1) // (BLOCK // KEYS), num_columns - 1))
            else:
                first_key = (first_step + step) * KEYS
            key = _streamed(k, k_base, k_m * UNIT, record, head // GROUP, first_key, M, KEYS, 0, HEAD, WIDTH, PARTIAL,
                            DESCRIPTORS)  # fmt: skip
            value = _streamed(v, v_base, v_m * UNIT, record, head // GROUP, first_key, M, KEYS, 0, HEAD, WIDTH,
                              PARTIAL, DESCRIPTORS)  # fmt: skip
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            if TAIL:
                key_tail = _streamed(k_tail, k_base, k_m * UNIT, record, head // GROUP, first_key, M, KEYS, HEAD, TAIL,
                                     WIDTH, PARTIAL, DESCRIPTORS)  # fmt: skip
                value_tail = _streamed(v_tail, v_base, v_m * UNIT, record, head // GROUP, first_key, M, KEYS, HEAD,
                                       TAIL, WIDTH, PARTIAL, DESCRIPTORS)  # fmt: skip
                scores = tl.dot(query_tail, tl.trans(key_tail), scores, input_precision="ieee")
            if PARTIAL:
                keys = (first_key + tl.arange(0, KEYS))[None, :]
                if MASK:
                    noise_of = _noise_of(noise, first_key, M, KEYS, MASK)[None, :]
                    visible = _visible(low[:, None], high[:, None], segment[:, None], keys, noise_of, MASK)
                else:
                    visible = keys < M
                scores = tl.where(visible, scores, -INFINITY)
            new_top = tl.maximum(top, tl.max(scores, 1))
            # of a row that has seen nothing yet, -inf less -inf would be no number
            base = tl.where(new_top == -INFINITY, 0.0, new_top) * scale2 if PARTIAL else new_top * scale2
            weights = tl.exp2(scores * scale2 - base[:, None])
            decay = tl.exp2(top * scale2 - base)
            total = total * decay + tl.sum(weights, 1)
            weights = weights.to(value.dtype)
            sums = tl.dot(weights, value, sums * decay[:, None], input_precision="ieee")
            if TAIL:
                sums_tail = tl.dot(weights, value_tail, sums_tail * decay[:, None], input_precision="ieee")
            top = new_top

    empty = total == 0.0
    if MASK:  # a block may be listed as full over the heads of rows that see nothing: padding between documents
        empty = empty | (low >= high)
    share = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    logs = tl.where(empty, -INFINITY, top * scale2 + tl.log2(tl.where(empty, 1.0, total)))
    queries = tl.arange(0, QUERIES)
    tl.store(lse + first_query + queries, logs, mask=queries < N - first_query)
    _store(out, out_n * UNIT, first_query, N, sums * share[:, None], 0, WIDTH)
    if TAIL:
        _store(out, out_n * UNIT, first_query, N, sums_tail * share[:, None], HEAD, WIDTH)


@triton.jit
def forward_short(
    q, k, v, q_tail, out, lse,
    k_b, k_g, k_m, v_b, v_g, v_m, out_b, out_h, out_n, H, N, M, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`forward` of a whole head without a mask, its M <= KEYS keys held: softmax in one go for each tile of queries.

    q and q_tail are tensor descriptors.
    """
    record, head = tl.program_id(0) // H, tl.program_id(0) % H
    record64 = record.to(tl.int64)
    k += (record64 * k_b + (head // GROUP).to(tl.int64) * k_g) * UNIT
    v += (record64 * v_b + (head // GROUP).to(tl.int64) * v_g) * UNIT
    out += (record64 * out_b + head.to(tl.int64) * out_h) * UNIT
    lse += tl.program_id(0).to(tl.int64) * N

    key = _tile(k, k_m * UNIT, 0, M, KEYS, 0, HEAD, WIDTH, True)
    value = _tile(v, v_m * UNIT, 0, M, KEYS, 0, HEAD, WIDTH, True)
    if TAIL:
        key_tail = _tile(k, k_m * UNIT, 0, M, KEYS, HEAD, TAIL, WIDTH, True)
        value_tail = _tile(v, v_m * UNIT, 0, M, KEYS, HEAD, TAIL, WIDTH, True)
    scale2 = scale * LOG2E
    for first_query in tl.range(0, N, QUERIES, num_stages=1):  # registers: others cover the wait for a tile
        query = q.load([record, head, first_query, 0]).reshape(QUERIES, HEAD)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if TAIL:
            query_tail = q_tail.load([record, head, first_query, HEAD]).reshape(QUERIES, TAIL)
            scores = tl.dot(query_tail, tl.trans(key_tail), scores, input_precision="ieee")
        scores = tl.where(tl.arange(0, KEYS)[None, :] < M, scores, -INFINITY)
        top = tl.max(scores, 1)
        weights = tl.exp2(scores * scale2 - (top * scale2)[:, None])
        total = tl.sum(weights, 1)
        queries = tl.arange(0, QUERIES)
        tl.store(lse + first_query + queries, top * scale2 + tl.log2(total), mask=queries < N - first_query)
        weights = weights.to(value.dtype)
        sums = tl.dot(weights, value, input_precision="ieee")
        _store(out, out_n * UNIT, first_query, N, sums / total[:, None], 0, WIDTH)
        if TAIL:
            sums_tail = tl.dot(weights, value_tail, input_precision="ieee")
            _store(out, out_n * UNIT, first_query, N, sums_tail / total[:, None], HEAD, WIDTH)


@triton.jit
def prepare(
    out, dout, lse, logs, centre, out_b, out_h, out_n, dout_b, dout_h, dout_n, H, N,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the backward wants of each row: its lse, and the sum over K of out * dout.

    logs and centre are (B, H, I * BLOCK), so that no loop has to ask where the rows end: past N, and in empty rows,
    logs is +inf, under which every weight is 0.
    """
    num_tiles = tl.cdiv(N, BLOCK)
    tile = tl.program_id(0).to(tl.int64)
    first_query = tl.program_id(0) % num_tiles * BLOCK
    record64, head64 = tile // num_tiles // H, tile // num_tiles % H
    rows = tl.arange(0, BLOCK)
    value = tl.load(lse + tile // num_tiles * N + first_query + rows, mask=rows < N - first_query, other=-INFINITY)
    tl.store(logs + tile * BLOCK + rows, tl.where(value == -INFINITY, INFINITY, value))
    out += (record64 * out_b + head64 * out_h) * UNIT
    dout += (record64 * dout_b + head64 * dout_h) * UNIT
    total = _tile_centre(out, out_n * UNIT, dout, dout_n * UNIT, first_query, N, BLOCK, 0, HEAD, WIDTH)
    if TAIL:
        total += _tile_centre(out, out_n * UNIT, dout, dout_n * UNIT, first_query, N, BLOCK, HEAD, TAIL, WIDTH)
    tl.store(centre + tile * BLOCK + rows, total)


@triton.jit
def _tile_centre(out, out_n, dout, dout_n, first, end, ROWS: tl.constexpr, FROM: tl.constexpr, COLUMNS: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    product = _tile(out, out_n, first, end, ROWS, FROM, COLUMNS, WIDTH, True).to(tl.float32)
    product *= _tile(dout, dout_n, first, end, ROWS, FROM, COLUMNS, WIDTH, True).to(tl.float32)
    return tl.sum(product, 1)


@triton.jit
def backward_keys(
    q, k, v, dout, q_tail, dout_tail, dk, dv, logs, centre,
    lo, hi, seg, noise, num_full, full, num_partial, partial,
    q_b, q_h, q_n, k_b, k_g, k_m, v_b, v_g, v_m, dout_b, dout_h, dout_n, dk_b, dk_g, dk_m, dv_b, dv_g, dv_m,
    H, N, M, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, MASK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, G, M, K) of a tile of keys: over the group's query heads in order, and over each one's queries.

    Scores stand transposed, keys by queries, so that both gradients take them as they are. The lists are the
    transposed ones. Keys past M need no mask: what they give is their own rows, which are not stored.
    """
    num_tiles = tl.cdiv(M, KEYS)
    first_key = tl.program_id(0) % num_tiles * KEYS
    G = H // GROUP
    record, group = tl.program_id(0) // num_tiles // G, tl.program_id(0) // num_tiles % G
    record64, group64 = record.to(tl.int64), group.to(tl.int64)
    k += (record64 * k_b + group64 * k_g) * UNIT
    v += (record64 * v_b + group64 * v_g) * UNIT
    dk += (record64 * dk_b + group64 * dk_g) * UNIT
    dv += (record64 * dv_b + group64 * dv_g) * UNIT
    key = _tile(k, k_m * UNIT, first_key, M, KEYS, 0, HEAD, WIDTH, True)
    value = _tile(v, v_m * UNIT, first_key, M, KEYS, 0, HEAD, WIDTH, True)
    dkey = tl.zeros([KEYS, HEAD], tl.float32)
    dvalue = tl.zeros([KEYS, HEAD], tl.float32)
    if TAIL:
        key_tail = _tile(k, k_m * UNIT, first_key, M, KEYS, HEAD, TAIL, WIDTH, True)
        value_tail = _tile(v, v_m * UNIT, first_key, M, KEYS, HEAD, TAIL, WIDTH, True)
        dkey_tail = tl.zeros([KEYS, TAIL], tl.float32)
        dvalue_tail = tl.zeros([KEYS, TAIL], tl.float32)
    if MASK:
        lo, hi, seg = lo + record64 * N, hi + record64 * N, seg + record64 * N
        keys = (first_key + tl.arange(0, KEYS))[:, None]
        noise_of = _noise_of(noise + record64 * M, first_key, M, KEYS, MASK)[:, None]
        num_columns = tl.cdiv(N, BLOCK)
        row = record64 * tl.cdiv(M, BLOCK) + first_key // BLOCK
    scale2 = scale * LOG2E

    for member in tl.range(0, GROUP):
        head = group * GROUP + member
        head64 = head.to(tl.int64)
        q_base, dout_base = q, dout
        if not DESCRIPTORS:
            q_base = q + (record64 * q_b + head64 * q_h) * UNIT
            dout_base = dout + (record64 * dout_b + head64 * dout_h) * UNIT
        rows = (record64 * H + head64) * tl.cdiv(N, BLOCK) * BLOCK + tl.arange(0, QUERIES)
        for PARTIAL in tl.static_range(2 if MASK else 1):
            if MASK:
                if PARTIAL:
                    num_steps = tl.load(num_partial + row) * (BLOCK // QUERIES)
                    blocks = partial + row * num_columns
                else:
                    num_steps = tl.load(num_full + row) * (BLOCK // QUERIES)
                    blocks = full + row * num_columns
                block = tl.load(blocks)
            else:
                num_steps = tl.cdiv(N, QUERIES)
            for step in tl.range(0, num_steps):
                if MASK:
                    first_query = block * BLOCK + step % (BLOCK // QUERIES) * QUERIES
                    block = tl.load(blocks + tl.minimum((step + 1) // (BLOCK // QUERIES), num_columns - 1))
                else:
                    first_query = step * QUERIES
                query = _streamed(q, q_base, q_n * UNIT, record, head, first_query, N, QUERIES, 0, HEAD, WIDTH, True,
                                  DESCRIPTORS)  # fmt: skip
                dsum = _streamed(dout, dout_base, dout_n * UNIT, record, head, first_query, N, QUERIES, 0, HEAD, WIDTH,
                                 True, DESCRIPTORS)  # fmt: skip
                scores = tl.dot(key, tl.trans(query), input_precision="ieee")
                dweights = tl.dot(value, tl.trans(dsum), input_precision="ieee")
                if TAIL:
                    query_tail = _streamed(q_tail, q_base, q_n * UNIT, record, head, first_query, N, QUERIES, HEAD,
                                           TAIL, WIDTH, True, DESCRIPTORS)  # fmt: skip
                    dsum_tail = _streamed(dout_tail, dout_base, dout_n * UNIT, record, head, first_query, N, QUERIES,
                                          HEAD, TAIL, WIDTH, True, DESCRIPTORS)  # fmt: skip
                    scores = tl.dot(key_tail, tl.trans(query_tail), scores, input_precision="ieee")
                    dweights = tl.dot(value_tail, tl.trans(dsum_tail), dweights, input_precision="ieee")
                if MASK and PARTIAL:
                    low, high, segment = _bounds(lo, hi, seg, first_query, N, QUERIES, MASK)
                    visible = _visible(low[None, :], high[None, :], segment[None, :], keys, noise_of, MASK)
                    scores = tl.where(visible, scores, -INFINITY)
                weights = tl.exp2(scores * scale2 - tl.load(logs + rows + first_query)[None, :])
                dvalue = tl.dot(weights.to(dsum.dtype), dsum, dvalue, input_precision="ieee")
                if TAIL:
                    dvalue_tail = tl.dot(weights.to(dsum.dtype), dsum_tail, dvalue_tail, input_precision="ieee")
                dscores = (weights * (dweights - tl.load(centre + rows + first_query)[None, :])).to(query.dtype)
                dkey = tl.dot(dscores, query, dkey, input_precision="ieee")
                if TAIL:
                    dkey_tail = tl.dot(dscores, query_tail, dkey_tail, input_precision="ieee")

    _store(dk, dk_m * UNIT, first_key, M, dkey * scale, 0, WIDTH)
    _store(dv, dv_m * UNIT, first_key, M, dvalue, 0, WIDTH)
    if TAIL:
        _store(dk, dk_m * UNIT, first_key, M, dkey_tail * scale, HEAD, WIDTH)
        _store(dv, dv_m * UNIT, first_key, M, dvalue_tail, HEAD, WIDTH)


@triton.jit
def backward_queries(
    q, k, v, dout, k_tail, v_tail, dq, logs, centre,
    lo, hi, seg, noise, num_full, full, num_partial, partial,
    q_b, q_h, q_n, k_b, k_g, k_m, v_b, v_g, v_m, dout_b, dout_h, dout_n, dq_b, dq_h, dq_n, H, N, M, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, MASK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dq (B, H, N, K) of a tile of queries."""
    num_tiles = tl.cdiv(N, QUERIES)
    first_query = (num_tiles - 1 - tl.program_id(0) % num_tiles) * QUERIES
    head_of_batch = tl.program_id(0) // num_tiles
    record, head = head_of_batch // H, head_of_batch % H
    record64, head64 = record.to(tl.int64), head.to(tl.int64)
    q += (record64 * q_b + head64 * q_h) * UNIT
    dout += (record64 * dout_b + head64 * dout_h) * UNIT
    dq += (record64 * dq_b + head64 * dq_h) * UNIT
    k_base, v_base = k, v
    if not DESCRIPTORS:
        k_base = k + (record64 * k_b + (head // GROUP).to(tl.int64) * k_g) * UNIT
        v_base = v + (record64 * v_b + (head // GROUP).to(tl.int64) * v_g) * UNIT

    query = _tile(q, q_n * UNIT, first_query, N, QUERIES, 0, HEAD, WIDTH, True)
    dsum = _tile(dout, dout_n * UNIT, first_query, N, QUERIES, 0, HEAD, WIDTH, True)
    dquery = tl.zeros([QUERIES, HEAD], tl.float32)
    if TAIL:
        query_tail = _tile(q, q_n * UNIT, first_query, N, QUERIES, HEAD, TAIL, WIDTH, True)
        dsum_tail = _tile(dout, dout_n * UNIT, first_query, N, QUERIES, HEAD, TAIL, WIDTH, True)
        dquery_tail = tl.zeros([QUERIES, TAIL], tl.float32)
    rows = head_of_batch.to(tl.int64) * tl.cdiv(N, BLOCK) * BLOCK + first_query + tl.arange(0, QUERIES)
    row_logs, row_centre = tl.load(logs + rows)[:, None], tl.load(centre + rows)[:, None]
    if MASK:
        low, high, segment = _bounds(
            lo + record64 * N, hi + record64 * N, seg + record64 * N, first_query, N, QUERIES, MASK
        )
        noise += record64 * M
        num_columns = tl.cdiv(M, BLOCK)
        row = record64 * tl.cdiv(N, BLOCK) + first_query // BLOCK
    scale2 = scale * LOG2E

    for PARTIAL in tl.static_range(2):
        if MASK:
            if PARTIAL:
                num_steps = tl.load(num_partial + row) * (BLOCK // KEYS)
                blocks = partial + row * num_columns
            else:
                num_steps = tl.load(num_full + row) * (BLOCK // KEYS)
                blocks = full + row * num_columns
            block = tl.load(blocks)
        else:
            first_step = M // KEYS if PARTIAL else 0
            num_steps = tl.cdiv(M, KEYS) - M // KEYS if PARTIAL else M // KEYS
        for step in tl.range(0, num_steps, num_stages=1 if PARTIAL and not MASK else None):
            if MASK:
                first_key = block * BLOCK + step % (BLOCK // KEYS) * KEYS
                block = tl.load(blocks + tl.minimum((step + 1) // (BLOCK // KEYS), num_columns - 1))
            else:
                first_key = (first_step + step) * KEYS
            key = _streamed(k, k_base, k_m * UNIT, record, head // GROUP, first_key, M, KEYS, 0, HEAD, WIDTH, PARTIAL,
                            DESCRIPTORS)  # fmt: skip
            value = _streamed(v, v_base, v_m * UNIT, record, head // GROUP, first_key, M, KEYS, 0, HEAD, WIDTH,
                              PARTIAL, DESCRIPTORS)  # fmt: skip
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            dweights = tl.dot(dsum, tl.trans(value), input_precision="ieee")
            if TAIL:
                key_tail = _streamed(k_tail, k_base, k_m * UNIT, record, head // GROUP, first_key, M, KEYS, HEAD, TAIL,
                                     WIDTH, PARTIAL, DESCRIPTORS)  # fmt: skip
                value_tail = _streamed(v_tail, v_base, v_m * UNIT, record, head // GROUP, first_key, M, KEYS, HEAD,
                                       TAIL, WIDTH, PARTIAL, DESCRIPTORS)  # fmt: skip
                scores = tl.dot(query_tail, tl.trans(key_tail), scores, input_precision="ieee")
                dweights = tl.dot(dsum_tail, tl.trans(value_tail), dweights, input_precision="ieee")
            if PARTIAL:
                keys = (first_key + tl.arange(0, KEYS))[None, :]
                if MASK:
                    noise_of = _noise_of(noise, first_key, M, KEYS, MASK)[None, :]
                    visible = _visible(low[:, None], high[:, None], segment[:, None], keys, noise_of, MASK)
                else:
                    visible = keys < M
                scores = tl.where(visible, scores, -INFINITY)
            weights = tl.exp2(scores * scale2 - row_logs)
            dscores = (weights * (dweights - row_centre)).to(key.dtype)
            dquery = tl.dot(dscores, key, dquery, input_precision="ieee")
            if TAIL:
                dquery_tail = tl.dot(dscores, key_tail, dquery_tail, input_precision="ieee")

    _store(dq, dq_n * UNIT, first_query, N, dquery * scale, 0, WIDTH)
    if TAIL:
        _store(dq, dq_n * UNIT, first_query, N, dquery_tail * scale, HEAD, WIDTH)


@triton.jit
def backward_short(
    q, k, v, dout, q_tail, dout_tail, dq, dk, dv, dq_so_far, logs, centre,
    k_b, k_g, k_m, v_b, v_g, v_m,
    dq_b, dq_h, dq_n, dk_b, dk_g, dk_m, dv_b, dv_g, dv_m, H, N, M, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one key head and its group of query heads, KEYS keys at a time.

    The scores are formed once for all three gradients: five products where two kernels need seven. From one KEYS to the
    next dq waits in `dq_so_far`, fp32 (B, H, N, K) contiguous, which no other program touches.
    """
    G = H // GROUP
    record, group = tl.program_id(0) // G, tl.program_id(0) % G
    record64, group64 = record.to(tl.int64), group.to(tl.int64)
    k += (record64 * k_b + group64 * k_g) * UNIT
    v += (record64 * v_b + group64 * v_g) * UNIT
    dk += (record64 * dk_b + group64 * dk_g) * UNIT
    dv += (record64 * dv_b + group64 * dv_g) * UNIT
    scale2 = scale * LOG2E

    for first_key in tl.range(0, M, KEYS, num_stages=1):
        if first_key > 0:
            tl.debug_barrier()  # what these threads wrote of dq, others now read
        key = _tile(k, k_m * UNIT, first_key, M, KEYS, 0, HEAD, WIDTH, True)
        value = _tile(v, v_m * UNIT, first_key, M, KEYS, 0, HEAD, WIDTH, True)
        dkey = tl.zeros([KEYS, HEAD], tl.float32)
        dvalue = tl.zeros([KEYS, HEAD], tl.float32)
        if TAIL:
            key_tail = _tile(k, k_m * UNIT, first_key, M, KEYS, HEAD, TAIL, WIDTH, True)
            value_tail = _tile(v, v_m * UNIT, first_key, M, KEYS, HEAD, TAIL, WIDTH, True)
            dkey_tail = tl.zeros([KEYS, TAIL], tl.float32)
            dvalue_tail = tl.zeros([KEYS, TAIL], tl.float32)
        visible = tl.arange(0, KEYS)[:, None] < M - first_key
        for member in tl.range(0, GROUP):
            head = group * GROUP + member
            head64 = head.to(tl.int64)
            dq_base = dq + (record64 * dq_b + head64 * dq_h) * UNIT
            rows = (record64 * H + head64) * tl.cdiv(N, BLOCK) * BLOCK + tl.arange(0, QUERIES)
            so_far = dq_so_far + (record64 * H + head64) * N * WIDTH
            for first_query in tl.range(0, N, QUERIES):
                query = q.load([record, head, first_query, 0]).reshape(QUERIES, HEAD)
                dsum = dout.load([record, head, first_query, 0]).reshape(QUERIES, HEAD)
                scores = tl.dot(key, tl.trans(query), input_precision="ieee")
                dweights = tl.dot(value, tl.trans(dsum), input_precision="ieee")
                if TAIL:
                    query_tail = q_tail.load([record, head, first_query, HEAD]).reshape(QUERIES, TAIL)
                    dsum_tail = dout_tail.load([record, head, first_query, HEAD]).reshape(QUERIES, TAIL)
                    scores = tl.dot(key_tail, tl.trans(query_tail), scores, input_precision="ieee")
                    dweights = tl.dot(value_tail, tl.trans(dsum_tail), dweights, input_precision="ieee")
                scores = tl.where(visible, scores, -INFINITY)
                weights = tl.exp2(scores * scale2 - tl.load(logs + rows + first_query)[None, :])
                dvalue = tl.dot(weights.to(dsum.dtype), dsum, dvalue, input_precision="ieee")
                if TAIL:
                    dvalue_tail = tl.dot(weights.to(dsum.dtype), dsum_tail, dvalue_tail, input_precision="ieee")
                dscores = (weights * (dweights - tl.load(centre + rows + first_query)[None, :])).to(query.dtype)
                dkey = tl.dot(dscores, query, dkey, input_precision="ieee")
                dquery = tl.dot(tl.trans(dscores), key, input_precision="ieee")
                if TAIL:
                    dkey_tail = tl.dot(dscores, query_tail, dkey_tail, input_precision="ieee")
                    dquery_tail = tl.dot(tl.trans(dscores), key_tail, input_precision="ieee")
                if first_key > 0:
                    dquery += _tile(so_far, WIDTH, first_query, N, QUERIES, 0, HEAD, WIDTH, True)
                    if TAIL:
                        dquery_tail += _tile(so_far, WIDTH, first_query, N, QUERIES, HEAD, TAIL, WIDTH, True)
                if first_key + KEYS < M:
                    _store(so_far, WIDTH, first_query, N, dquery, 0, WIDTH)
                    if TAIL:
                        _store(so_far, WIDTH, first_query, N, dquery_tail, HEAD, WIDTH)
                else:
                    _store(dq_base, dq_n * UNIT, first_query, N, dquery * scale, 0, WIDTH)
                    if TAIL:
                        _store(dq_base, dq_n * UNIT, first_query, N, dquery_tail * scale, HEAD, WIDTH)
        _store(dk, dk_m * UNIT, first_key, M, dkey * scale, 0, WIDTH)
        _store(dv, dv_m * UNIT, first_key, M, dvalue, 0, WIDTH)
        if TAIL:
            _store(dk, dk_m * UNIT, first_key, M, dkey_tail * scale, HEAD, WIDTH)
            _store(dv, dv_m * UNIT, first_key, M, dvalue_tail, HEAD, WIDTH)


SHORT = 256  # tokens up to which one program does a whole head
WIDEST_SHORT = 80  # of a head: wider, a program would run out of registers
WIDTHS = (32, 64, 72, 80, 96, 128)  # of a head


def parts(width: int) -> tuple[int, int]:
    """HEAD and TAIL of a head width."""
    if width in (32, 64, 128):
        return width, 0
    return 64, 16 if width <= 80 else 32


def keys_held(num_keys: int) -> int:
    """The KEYS of `forward_short`."""
    return max(64, triton.next_power_of_2(num_keys))


def shape_class(width: int, dtype: str, masked: bool, num_keys: int | None) -> str:
    """How `kernels.tiles` names a case; `num_keys` is of a short one."""
    rest = " masked" if masked else "" if num_keys is None else f" M<={keys_held(num_keys)}"
    return f"K={width} {dtype}{rest}"


def tile(kernel: str, width: int, dtype: str, capability: int, masked: bool, num_keys: int | None) -> Tile:
    """The tile of a kernel for a head width and "bf16", "fp16" or "fp32", on compute capability 9.0 (90) or other (80).

    Chosen by what the compiler makes of it: the widest without spills whose registers leave room for two programs.
    """
    if kernel == "forward_short":
        return Tile({"QUERIES": 64}, 4, 2)
    if kernel == "backward_short":
        return Tile({"QUERIES": 64, "KEYS": min(128, keys_held(num_keys or SHORT))}, 8, 2)
    if dtype == "fp32":  # exact products, without the tensor cores
        queries, keys, num_warps, num_stages = 16, 32, 8, 1
        if kernel == "backward_queries" and capability == 80:
            keys = 16
    elif capability == 90:
        queries, keys, num_warps, num_stages = (64, 128, 8, 3) if kernel == "backward_keys" else (128, 64, 8, 3)
    elif kernel == "forward":
        queries, keys, num_warps, num_stages = 64, 64, 4, 3
    elif kernel == "backward_keys":
        queries, keys, num_warps, num_stages = {96: (32, 64, 8, 2), 128: (64, 64, 8, 2)}.get(width, (32, 128, 8, 2))
    else:
        queries, keys, num_warps, num_stages = {32: (64, 64, 4, 2), 96: (64, 32, 8, 2)}.get(width, (64, 64, 8, 2))
    hopper = capability == 90 and dtype != "fp32"
    constants = {"QUERIES": queries, "KEYS": keys, "DESCRIPTORS": int(hopper)}
    if kernel != "backward_queries":  # which goes as backward_keys goes
        constants["SHORT"] = SHORT if hopper and width <= WIDEST_SHORT and not masked else 0
    return Tile(constants, num_warps, num_stages)


def builds() -> list[Build]:
    """Every kernel at every head width in bf16, with all of a mask's rules too; fp16 and fp32 without a mask."""
    found = list[Build]()
    for width in WIDTHS:
        for kernel in ("forward", "backward_keys", "backward_queries"):
            for target in TARGETS:
                found += [_build(kernel, width, "bf16", (target,), masked) for masked in (False, True)]
            found += [_build(kernel, width, "fp16", (90,)), *(_build(kernel, width, "fp32", (t,)) for t in TARGETS)]
        found.append(_build("prepare", width, "bf16", TARGETS))
        for kernel in ("forward_short", "backward_short") if width <= WIDEST_SHORT else ():
            found += [_build(kernel, width, "bf16", (90,), num_keys=num_keys) for num_keys in (64, 256)]
    return found


def _build(
    name: str, width: int, dtype: str, targets: tuple[int, ...], masked: bool = False, num_keys: int | None = None
) -> Build:
    kernel, (head, tail) = globals()[name], parts(width)
    chosen = Tile({}, 4, 1) if name == "prepare" else tile(name, width, dtype, targets[-1], masked, num_keys)
    descriptors = bool(chosen.constants.get("DESCRIPTORS", name.endswith("short")))
    lists = ("lo", "hi", "seg", "noise", "num_full", "full", "num_partial", "partial")
    constants = {"GROUP": 1, "WIDTH": width, "HEAD": head, "TAIL": tail, "UNIT": 8, "BLOCK": 128, "MASK": 2 * masked,
                 "KEYS": keys_held(num_keys or SHORT), **chosen.constants, "DESCRIPTORS": descriptors,
                 **dict.fromkeys(() if masked else lists)}  # fmt: skip
    walked = {"forward": ("k", "v"), "backward_queries": ("k", "v"), "forward_short": ("q",)}.get(name, ("q", "dout"))
    types = dict.fromkeys(kernel.arg_names, "i32") | {"scale": "fp32"}
    types |= dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), f"*{dtype}")
    types |= dict.fromkeys(("lse", "logs", "centre", "dq_so_far"), "*fp32") | dict.fromkeys(lists, "*i32")
    for argument in walked:
        rows = constants["KEYS" if argument in ("k", "v") else "QUERIES"] if descriptors else None
        for part, columns in ((argument, head), (f"{argument}_tail", tail or head)):
            types[part] = f"tensordesc<{dtype}[1, 1, {rows}, {columns}]>" if descriptors else f"*{dtype}"
    case = f"K={width} {dtype}{' masked' if masked else ''}{f' M={num_keys}' if num_keys else ''}"
    return Build(
        f"attention.{name}", case, kernel,
        {argument: types[argument] for argument in kernel.arg_names if argument not in constants},
        {argument: value for argument, value in constants.items() if argument in kernel.arg_names},
        chosen.num_warps, chosen.num_stages, wgmma=dtype != "fp32", targets=targets,
    )  # fmt: skip
