"""Gaussian noise as a function of a key and an element index, never of an order of draws.

`gaussian(key, offset, length)` is the slice [offset, offset + length) of one endless standard-normal sequence that the
key names. Whoever owns a shard draws its slice; any sharding of a parameter sees the same bits.

Uniform words come from ChaCha20 (RFC 8439, through OpenSSL) or, where the noise need not be cryptographic, from Philox
(Salmon et al. 2011). Box-Muller in float64 on 53-bit uniforms, rounded to fp32: |z| reaches 8.57 standard deviations.
The elementary functions run on whole blocks aligned to the global index, because a vectorised logarithm may differ in
its last bit from the scalar one that handles a ragged tail.
"""

from __future__ import annotations

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 4096  # normals, eight bytes of keystream each
_BLOCKS_PER_CHUNK = 16  # keeps the work of one chunk inside a core's cache
_CHACHA_BLOCK_BYTES = 64
_COUNTER_BITS = 32  # RFC 8439; higher bits of the position go into the nonce


def gaussian(key: bytes, offset: int, length: int, generator: str = "chacha20") -> Tensor:
    """Standard normals [offset, offset + length) of the sequence named by a 32-byte key; fp32, on the CPU."""
    if len(key) != 32:
        raise ValueError(f"a noise key has 32 bytes, this one has {len(key)}")
    if offset < 0 or length < 0:
        raise ValueError(f"offset and length must not be negative, got {offset} and {length}")
    if generator not in KEYSTREAMS:
        raise ValueError(f"noise generator is {generator!r}: choose one of {', '.join(KEYSTREAMS)}")
    keystream = KEYSTREAMS[generator]
    out = torch.empty(length, dtype=torch.float32)
    position = offset
    while position < offset + length:
        block = position // BLOCK
        last = -(-(offset + length) // BLOCK)
        count = min(_BLOCKS_PER_CHUNK, last - block)
        normals = _box_muller(keystream(key, block * BLOCK, count * BLOCK))
        start = position - block * BLOCK
        stop = min(count * BLOCK, offset + length - block * BLOCK)
        out[position - offset : position - offset + stop - start] = torch.from_numpy(normals[start:stop])
        position += stop - start
    return out


def chacha20_words(key: bytes, start: int, count: int) -> NDArray[np.uint64]:
    """Words [start, start + count) of 64 bits of the ChaCha20 keystream; `start` is a multiple of 8."""
    counter = start * 8 // _CHACHA_BLOCK_BYTES
    low, high = counter % (1 << _COUNTER_BITS), counter >> _COUNTER_BITS
    nonce = low.to_bytes(4, "little") + high.to_bytes(12, "little")
    encryptor = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(count * 8)), dtype="<u8")


def philox_words(key: bytes, start: int, count: int) -> NDArray[np.uint64]:
    """Words [start, start + count) of Philox4x64-10 keyed by the first 16 bytes; `start` is a multiple of 4."""
    generator = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8"), counter=start // 4)
    return generator.random_raw(count)


KEYSTREAMS = {"chacha20": chacha20_words, "philox": philox_words}


def _box_muller(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """One normal a word: pairs of 53-bit uniforms, the first in (0, 1] so that its logarithm is finite."""
    uniforms = (words >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((uniforms[0::2] + 1.0) * 2.0**-53))
    angle = uniforms[1::2] * (2.0 * np.pi * 2.0**-53)
    normals = np.empty(words.shape[0], dtype=np.float32)
    normals[0::2] = radius * np.cos(angle)
    normals[1::2] = radius * np.sin(angle)
    return normals
