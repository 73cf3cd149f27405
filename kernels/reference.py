"""Plain twins: what each operation means, written for reading and for comparison, in whatever precision is given."""

# B records, G groups, N tokens, P input features, D output features, V rows of a table, E experts
from __future__ import annotations

import math
import struct

import torch
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
