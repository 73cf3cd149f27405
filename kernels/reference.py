"""Plain twins: what each operation means, written for reading and for comparison, in whatever precision is given."""

# B records, N tokens, P input features, D output features, V entries of a table
from __future__ import annotations

import math
import struct

import torch
from torch import Tensor


def linear_squared_norms(x_BNP: Tensor, g_BND: Tensor) -> Tensor:
    """Form every record's weight gradient, then square it."""
    return torch.einsum("bnd,bnp->bdp", g_BND, x_BNP).square().sum((1, 2))


def embedding_squared_norms(indices_BN: Tensor, g_BND: Tensor, num_entries: int) -> Tensor:
    """Form every record's table gradient, then square it."""
    onehot_BNV = torch.nn.functional.one_hot(indices_BN, num_entries).to(g_BND.dtype)
    return torch.einsum("bnd,bnv->bvd", g_BND, onehot_BNV).square().sum((1, 2))


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
