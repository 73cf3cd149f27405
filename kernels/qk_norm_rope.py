"""QK-norm and rotary position embedding in one pass: RMSNorm of queries and keys over each head, then rotation.

Queries and keys are read once, as the strided parts of a fused projection that they usually are, and written once. The
weights come per record, so that private training gets each record's gradient of them (`kernels.per_record.copies`).

Sources: RMSNorm, Zhang and Sennrich 2019 (arXiv:1910.07467, Eq. 4); of queries and keys, Henry et al. 2020
(arXiv:2010.04245) and Dehghani et al. 2023 (arXiv:2302.05442, section 2.1); rotary, Su et al. 2021 (arXiv:2104.09864,
Eq. 34); over several axes, each with pairs of its own, Heo et al. 2024 (arXiv:2403.13298, "axial").
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (a kernel takes its launch options, and its constants as plain numbers)
# B records, N tokens, H query heads, G key heads, K head width, R rotary pairs, A axes of a position
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import use_triton
from kernels.tiles import Tile, tuned

MAX_HEAD_WIDTH = 256
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def rotary_angles(positions: Tensor, widths: Sequence[int], base: float = 10_000.0) -> Tensor:
    """The cosine and the sine of every pair's angle, fp32 (..., 2, R), for positions (..., A) on A axes.

    Axis a turns `widths[a]` of the R = sum(widths) pairs, one after the other: its pair i by
    position * base ** (-i / widths[a]). Text has one axis, images two, videos or text with images three. Make them
    once a batch; every layer uses them.

    Guarantee: rounded once, from float64. An angle in radians could not be kept so: at position 8,192 one fp32 is off
    by up to 2e-4, and a kernel would have to take cosines of large arguments, in every layer.
    Raises ValueError where axes and widths do not agree.
    """
    if positions.dim() == 0 or positions.shape[-1] != len(widths):
        raise ValueError(f"positions has shape {tuple(positions.shape)}: its last dimension takes {len(widths)} axes")
    if not widths or min(widths) < 1:
        raise ValueError(f"widths is {tuple(widths)}: give each axis one pair or more")
    if not base > 0:
        raise ValueError(f"base is {base}: it must be positive")
    angles: list[Tensor] = []  # torch.compile cannot trace list[Tensor]()
    for axis, width in enumerate(widths):
        index_W = torch.arange(width, dtype=torch.float64, device=positions.device)
        angles.append(positions[..., axis, None].double() * base ** (-index_W / width))
    angles_R = torch.cat(angles, dim=-1)
    return torch.stack([angles_R.cos(), angles_R.sin()], dim=-2).float()


def qk_norm_rope(
    q_BNHK: Tensor, k_BNGK: Tensor, q_weight_BK: Tensor, k_weight_BK: Tensor, angles: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight for every head of q and k, its pairs (i, i + R) then turned by the angles.

    `angles` are `rotary_angles`, (N, 2, R) for all records or (B, N, 2, R); features from 2R on are not turned. q and k
    may be strided; only a head's features must lie together, or are copied. Returns both, contiguous, in q's dtype.

    Guarantee: fp32 (float64 for float64) inside, rounded once at the end. Each record's outputs and gradients, that of
    its weights too, depend on this record alone, bit for bit. Angles have no gradient.
    Raises ValueError where shapes, dtypes or devices do not agree.
    """
    _check(q_BNHK, k_BNGK, q_weight_BK, k_weight_BK, angles, eps)
    if use_triton(q_BNHK):
        if q_BNHK.dtype not in _DTYPES:
            raise ValueError(f"q is {q_BNHK.dtype}: the kernel takes {', '.join(_DTYPES.values())}")
        return _forward(q_BNHK, k_BNGK, q_weight_BK, k_weight_BK, angles, eps)
    wide = torch.promote_types(q_BNHK.dtype, torch.float32)
    q, k = reference.qk_norm_rope(q_BNHK.to(wide), k_BNGK.to(wide), q_weight_BK, k_weight_BK, angles, eps)
    return q.to(q_BNHK.dtype), k.to(k_BNGK.dtype)


def qk_norm_rope_bytes(q_BNHK: Tensor, k_BNGK: Tensor, angles: Tensor, *, backward: bool = False) -> int:
    """Bytes that have to move: each element in and out, in the backward its gradient too, and the angles once."""
    times = 3 if backward else 2
    return times * (q_BNHK.nbytes + k_BNGK.nbytes) + angles.nbytes


@torch.library.custom_op("sfumato::qk_norm_rope", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, angles: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from kernels import qk_norm_rope_triton as kernels

    q_out, k_out = _empty_like(q), _empty_like(k)
    if q.numel() == 0:
        return q_out, k_out
    q, k, q_weight, k_weight = map(_with_features_together, (q, k, q_weight, k_weight))
    angles = angles.contiguous()
    tile = tuned("qk_norm_rope.forward", _shape_class(q), kernels.forward_tile(q.shape[3]))
    blocks, groups = _cut(q, k, tile)
    align = _alignment(angles, q, k)
    with torch.cuda.device_of(q):
        kernels.forward[(len(q) * blocks * sum(groups),)](
            q, k, q_weight, k_weight, angles, q_out, k_out,
            q.shape[1], q.shape[2], k.shape[2], blocks, *_strides(align, q, k), q.shape[3] // align,
            q_weight.stride(0), k_weight.stride(0), _own_tokens(angles), eps,
            **kernels.head_constants(q.shape[3], angles.shape[-1], align), **_options(tile),
        )  # fmt: skip
    return q_out, k_out


@torch.library.custom_op("sfumato::qk_norm_rope_backward", mutates_args=())
def _backward(
    dq_out: Tensor, dk_out: Tensor,
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, angles: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from kernels import qk_norm_rope_triton as kernels

    dq, dk = _empty_like(q), _empty_like(k)
    dq_weight, dk_weight = (torch.empty(w.shape, dtype=torch.float32, device=w.device) for w in (q_weight, k_weight))
    if q.numel() == 0:
        return dq, dk, dq_weight.zero_(), dk_weight.zero_()
    dq_out, dk_out, q, k = map(_with_features_together, (dq_out, dk_out, q, k))
    q_weight, k_weight = map(_with_features_together, (q_weight, k_weight))
    angles = angles.contiguous()
    tile = tuned("qk_norm_rope.backward", _shape_class(q), kernels.backward_tile(q.shape[3]))
    sum_tile = tuned("qk_norm_rope.sum_partials", _shape_class(q), kernels.sum_tile(q.shape[3]))
    blocks, groups = _cut(q, k, tile)
    partials = torch.empty(len(q), blocks, sum(groups), q.shape[3], dtype=torch.float32, device=q.device)
    align = _alignment(angles, dq_out, dk_out, q, k)
    with torch.cuda.device_of(q):
        kernels.backward[(len(q) * blocks * sum(groups),)](
            dq_out, dk_out, q, k, q_weight, k_weight, angles, dq, dk, partials,
            q.shape[1], q.shape[2], k.shape[2], blocks, *_strides(align, dq_out, dk_out, q, k), q.shape[3] // align,
            q_weight.stride(0), k_weight.stride(0), _own_tokens(angles), eps,
            **kernels.head_constants(q.shape[3], angles.shape[-1], align), **_options(tile),
        )  # fmt: skip
        kernels.sum_partials[(len(q), 2)](
            partials, dq_weight, dk_weight, blocks, *groups, **kernels.sum_constants(q.shape[3]), **_options(sum_tile)
        )
    return dq, dk, dq_weight, dk_weight


@_forward.register_fake
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, angles: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty_like(q), _empty_like(k)


@_backward.register_fake
def _(
    dq_out: Tensor, dk_out: Tensor,
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, angles: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq_weight, dk_weight = (torch.empty(w.shape, dtype=torch.float32, device=w.device) for w in (q_weight, k_weight))
    return _empty_like(q), _empty_like(k), dq_weight, dk_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)  # views of what the projection keeps anyway; the norms are taken again


def _differentiate(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    q, k, q_weight, k_weight, angles = ctx.saved_tensors
    dq, dk, dq_weight, dk_weight = _backward(dq_out, dk_out, q, k, q_weight, k_weight, angles, ctx.eps)
    return dq, dk, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _with_features_together(x: Tensor) -> Tensor:
    """`x`, copied where its last dimension is strided (the gradient of a sum has stride 0): the kernels step by one."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _shape_class(q_BNHK: Tensor) -> str:
    return f"K={q_BNHK.shape[3]} {_DTYPES[q_BNHK.dtype]}"


def _cut(q_BNHK: Tensor, k_BNGK: Tensor, tile: Tile) -> tuple[int, tuple[int, int]]:
    """Token blocks of a record, and groups of its query heads and of its key heads."""
    tokens, heads = tile.constants["TOKENS"], tile.constants["HEADS"]
    return -(-q_BNHK.shape[1] // tokens), (-(-q_BNHK.shape[2] // heads), -(-k_BNGK.shape[2] // heads))


def _alignment(angles: Tensor, *heads_BNHK: Tensor) -> int:
    """Elements that divide every offset of a half head: Triton itself sees no multiple below 16, and 72 is one of 8."""
    return math.gcd(16, angles.shape[-1], *(n for x in heads_BNHK for n in (x.shape[3], *x.stride()[:3])))


def _strides(align: int, *heads_BNHK: Tensor) -> list[int]:
    return [stride // align for x in heads_BNHK for stride in x.stride()[:3]]


def _own_tokens(angles: Tensor) -> int:
    """Tokens from a record's angles to the next record's; none where all records share theirs."""
    return angles.shape[1] if angles.dim() == 4 else 0


def _options(tile: Tile) -> dict[str, int]:
    return {**tile.constants, "STAGES": tile.num_stages, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, angles: Tensor, eps: float) -> None:
    if q.dim() != 4 or not q.shape[2] or not q.is_floating_point():
        raise ValueError(f"q is {_said(q)}: give floating-point heads of shape (B, N, H, K)")
    B, N, _, K = q.shape
    if not 2 <= K <= MAX_HEAD_WIDTH:
        raise ValueError(f"q has heads of width {K}: 2 to {MAX_HEAD_WIDTH} are supported")
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (B, N, K) or not k.shape[2] or k.dtype != q.dtype:
        raise ValueError(f"k is {_said(k)}, but q is {_said(q)}: only the number of heads may differ")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != (B, K) or not weight.is_floating_point():
            raise ValueError(f"{name} is {_said(weight)}: give one for each record, floating-point ({B}, {K})")
    pairs = angles.shape[-1] if angles.dim() else 0
    if angles.shape not in ((N, 2, pairs), (B, N, 2, pairs)) or angles.dtype != torch.float32:
        raise ValueError(f"angles is {_said(angles)}: give rotary_angles, fp32 ({N}, 2, R) or ({B}, {N}, 2, R)")
    if not 1 <= pairs <= K // 2:
        raise ValueError(f"angles turns {pairs} pairs of features: heads of width {K} have 1 to {K // 2}")
    if angles.requires_grad:
        raise ValueError("angles requires grad, but has none here: detach it")
    for name, x in (("k", k), ("q_weight", q_weight), ("k_weight", k_weight), ("angles", angles)):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q on {q.device}: move one of them")
    if not eps > 0:
        raise ValueError(f"eps is {eps}: it must be positive, for a head of zeros")


def _said(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
