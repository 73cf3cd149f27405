"""Plain twins: what each operation means, written for reading and for comparison, in whatever precision is given."""

# B records, G groups, N tokens, P input features, D output features, V rows of a table, E experts;
# in attention H query heads, G key heads, N queries, M keys, K head width
from __future__ import annotations

import math
import struct

import torch
import torch.nn.functional as F
from torch import Tensor


def outer_products(left_BGND: Tensor, right_BGNP: Tensor) -> Tensor:
    """Each record's gradient of a linear layer or a convolution in G groups, (B, G, D, P)."""
    return (left_BGND[..., :, None] * right_BGNP[..., None, :]).sum(2)


def row_sums(rows_BN: Tensor, left_BND: Tensor, num_rows: int) -> Tensor:
    """Each record's gradient of a table, (B, V, D); rows of -1 add nothing."""
    gradients_BVD = left_BND.new_zeros(len(rows_BN), num_rows, left_BND.shape[2])
    for record, rows_N in enumerate(rows_BN.tolist()):
        for token, row in enumerate(rows_N):
            if row >= 0:
                gradients_BVD[record, row] += left_BND[record, token]
    return gradients_BVD


def expert_outer_products(experts_BN: Tensor, left_BND: Tensor, right_BNP: Tensor, num_experts: int) -> Tensor:
    """Each record's gradient of each expert's matrix, (B, E, D, P)."""
    of_expert_BEN = experts_BN[:, None] == torch.arange(num_experts, device=experts_BN.device)[:, None]
    products_BNDP = left_BND[..., :, None] * right_BNP[..., None, :]
    return (of_expert_BEN[..., None, None] * products_BNDP[:, None]).sum(2)


def chacha20_block(key: bytes, counter: int, nonce: bytes) -> bytes:
    """One 64-byte block of the ChaCha20 keystream, RFC 8439 section 2.3."""
    words = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574]
    words += [*struct.unpack("<8L", key), counter, *struct.unpack("<3L", nonce)]
    state = list(words)

    def rotate(value: int, bits: int) -> int:
        return ((value << bits) & 0xFFFFFFFF) | (value >> (32 - bits))

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for left, right, target, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[left] = (state[left] + state[right]) & 0xFFFFFFFF
            state[target] = rotate(state[target] ^ state[left], bits)

    for _ in range(10):
        for column in range(4):
            quarter(column, 4 + column, 8 + column, 12 + column)
        for diagonal in range(4):
            quarter(diagonal, 4 + (diagonal + 1) % 4, 8 + (diagonal + 2) % 4, 12 + (diagonal + 3) % 4)
    return struct.pack("<16L", *((a + b) & 0xFFFFFFFF for a, b in zip(state, words, strict=True)))


def box_muller(radius_word: int, angle_word: int) -> tuple[float, float]:
    """Two normals from two 64-bit words: a 74-bit uniform for the radius, and a turn of angle."""
    uniform = ((radius_word % (1 << 63)) * 2048 + angle_word % 2048 + 0.5) * 2.0**-74
    radius = math.sqrt(-2.0 * math.log(uniform))
    angle = 2.0 * math.pi * angle_word * 2.0**-64
    return radius * math.cos(angle), radius * math.sin(angle)


def attention(
    q_BHNK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, visible_BNM: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k') v over the visible keys, and the logarithm of the softmax's denominator, (B, H, N).

    H query heads share G key heads in order. `scale` is 1 / sqrt(K) by default. A query that sees nothing gets zeros,
    a logarithm of -inf, and no gradient. Source: Vaswani et al. 2017, Eq. 1; Ainslie et al. 2023 (grouped heads).
    """
    heads_per_group = q_BHNK.shape[1] // k_BGMK.shape[1]
    k_BHMK, v_BHMK = (x.repeat_interleave(heads_per_group, dim=1) for x in (k_BGMK, v_BGMK))
    factor = 1 / math.sqrt(q_BHNK.shape[-1]) if scale is None else scale
    scores_BHNM = factor * q_BHNK @ k_BHMK.mT
    if visible_BNM is None:
        return scores_BHNM.softmax(-1) @ v_BHMK, scores_BHNM.detach().logsumexp(-1)
    hidden_B1NM = ~visible_BNM[:, None]
    empty_B1N1 = hidden_B1NM.all(-1, keepdim=True)
    scores_BHNM = scores_BHNM.masked_fill(hidden_B1NM, -math.inf)
    # an empty row of zeros, not of -inf: its softmax has a gradient, which the second fill stops
    weights_BHNM = scores_BHNM.masked_fill(empty_B1N1, 0).softmax(-1).masked_fill(empty_B1N1, 0)
    return weights_BHNM @ v_BHMK, scores_BHNM.detach().logsumexp(-1)


def qk_norm_rope(
    q_BNHK: Tensor, k_BNGK: Tensor, q_weight_BK: Tensor, k_weight_BK: Tensor, angles: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head of q and k under each record's weights, then its pairs (i, i + R) turned by the angles.

    `angles` are cosines and sines, ([B,] N, 2, R). Sources: Zhang and Sennrich 2019, Eq. 4; Su et al. 2021, Eq. 34.
    """
    cos_N1R, sin_N1R = (part[..., None, :] for part in angles.unbind(-2))
    R = angles.shape[-1]

    def normed_and_turned(x_BNHK: Tensor, weight_BK: Tensor) -> Tensor:
        y_BNHK = F.rms_norm(x_BNHK, x_BNHK.shape[-1:], eps=eps) * weight_BK[:, None, None]
        first, second, rest = y_BNHK.split((R, R, y_BNHK.shape[-1] - 2 * R), dim=-1)
        return torch.cat([first * cos_N1R - second * sin_N1R, second * cos_N1R + first * sin_N1R, rest], dim=-1)

    return normed_and_turned(q_BNHK, q_weight_BK), normed_and_turned(k_BNGK, k_weight_BK)


def adaln(
    x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, branch_BND: Tensor | None, gate_BD: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual x + gate * branch (x without a branch), and its LayerNorm times (1 + scale), plus shift."""
    if branch_BND is not None and gate_BD is not None:
        x_BND = x_BND + gate_BD[:, None] * branch_BND
    normed_BND = F.layer_norm(x_BND, x_BND.shape[-1:], eps=eps)
    return x_BND, normed_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]


def rms_norm(x: Tensor, weight_BD: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times the record's weight, over the last dimension of x, (B, ..., D)."""
    weight = weight_BD.view(len(x), *[1] * (x.dim() - 2), -1)
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor, weight_BD: Tensor, bias_BD: Tensor | None, eps: float) -> Tensor:
    """`rms_norm` of x less its mean, plus the record's bias."""
    normed = rms_norm(x - x.mean(-1, keepdim=True), weight_BD, eps)
    return normed if bias_BD is None else normed + bias_BD.view(len(x), *[1] * (x.dim() - 2), -1)


def highest_experts(logits_TE: Tensor, top_k: int) -> Tensor:
    """Each token's `top_k` experts by falling logit, the lower expert first among equals, (T, A)."""
    rows = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:top_k] for row in logits_TE.tolist()]
    return torch.tensor(rows, dtype=torch.int64, device=logits_TE.device).view(-1, top_k)


def experts_mlp(
    x_TP: Tensor, up_EFP: Tensor, down_EDH: Tensor, experts_TA: Tensor, weights_TA: Tensor, activation: str
) -> Tensor:
    """sum_a weight_ta down_e activation(up_e x_t) with e = experts_ta, every token with matrices of its own, (T, D).

    "swiglu": silu of the first half of the features times the second (Shazeer 2020, arXiv:2002.05202, Eq. 6); "gelu":
    its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415, Sec. 2).
    """
    z_TAF = torch.einsum("tp,tafp->taf", x_TP, up_EFP[experts_TA])
    gate_TAH, value_TAH = z_TAF.chunk(2, dim=-1)
    h_TAH = F.silu(gate_TAH) * value_TAH if activation == "swiglu" else F.gelu(z_TAF, approximate="tanh")
    y_TAD = torch.einsum("tah,tadh->tad", h_TAH, down_EDH[experts_TA])
    return (weights_TA[..., None] * y_TAD).sum(1).to(x_TP.dtype)


def released(gradient: Tensor, normals: Tensor, std: float) -> Tensor:
    """gradient + std * normals on the grid that `kernels.release` describes; all float64."""
    spacing = 2.0 ** (math.floor(math.log2(std)) - 44)
    total = torch.round(gradient / spacing) + torch.round(normals * (std / spacing))
    return torch.round(total / 2**28) * 2**28 * spacing


def adamw_ema(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, average: Tensor,
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int, ema_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Parameter, moments and average after update `step` (from 1). Source: Loshchilov and Hutter 2019, Algorithm 2."""
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * gradient
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * gradient**2
    first, second = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    parameter = parameter - lr * weight_decay * parameter - lr * first / (second.sqrt() + eps)
    return parameter, exp_avg, exp_avg_sq, ema_decay * average + (1 - ema_decay) * parameter
