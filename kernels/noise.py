"""Gaussian noise as a function of a key and an element index, never of an order of draws.

A key names one endless standard-normal sequence. Whoever owns a shard draws its slice [offset, offset + length); any
sharding of a tensor, at any number of threads, sees the same bits.

Uniform words come from ChaCha20 (RFC 8439, through OpenSSL) or, where the noise need not be cryptographic, from Philox
(Salmon et al. 2011). Two words make two normals by Box-Muller in float64: one word is the radius, so that |z| reaches
sqrt(150 ln 2) = 10.2, the other the angle. The work is always whole aligned blocks, without a branch or a rejection
that depends on what is drawn. NumPy's logarithm and tangent may differ in the last bit between families of processors:
on one kind of machine the bits are one function of key and index.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 4096  # normals, eight bytes of keystream each; a draw always makes whole blocks
_PAIRS = BLOCK // 2  # the first half of a block's words holds radii, the second angles
_BLOCKS_PER_CHUNK = 32  # smaller chunks spend their time in the interpreter, which threads must share
_THREAD_SHARE = 1 << 18  # fewer normals than this are drawn sooner than a thread starts
_CHACHA_BLOCK_BYTES = 64
_COUNTER_BITS = 32  # RFC 8439; higher bits of the position go into the nonce
_LOW_63, _LOW_11 = np.int64((1 << 63) - 1), np.int64((1 << 11) - 1)
_BITS_OF_2_TO_MINUS_22 = np.float64(2.0**-22).view(np.int64)
_ZEROS = bytes(_BLOCKS_PER_CHUNK * BLOCK * 8)


def gaussian(key: bytes, offset: int, length: int, generator: str = "chacha20") -> Tensor:
    """Standard normals [offset, offset + length) of the sequence named by a 32-byte key; fp32, on the CPU."""
    out = np.empty(max(length, 0), dtype=np.float32)

    def store(start: int, normals: NDArray[np.float64]) -> None:
        out[start : start + len(normals)] = normals

    visit_gaussian(key, offset, length, store, generator)
    return torch.from_numpy(out)


def visit_gaussian(
    key: bytes,
    offset: int,
    length: int,
    visit: Callable[[int, NDArray[np.float64]], None],
    generator: str = "chacha20",
) -> None:
    """Call `visit(start, normals)` on chunks that cover [offset, offset + length) once; `start` counts from `offset`.

    The normals are float64, at most 2^17 of them, and `visit`'s to overwrite until it returns. Long draws use up to
    `torch.get_num_threads()` threads, each calling `visit` on chunks of its own.
    """
    if len(key) != 32:
        raise ValueError(f"a noise key has 32 bytes, this one has {len(key)}")
    if offset < 0 or length < 0:
        raise ValueError(f"offset and length must not be negative, got {offset} and {length}")
    if generator not in KEYSTREAMS:
        raise ValueError(f"noise generator is {generator!r}: choose one of {', '.join(KEYSTREAMS)}")
    first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
    blocks = iter(range(first, last, _BLOCKS_PER_CHUNK))  # shared: a thread takes the next chunk when it is free

    def draw() -> None:
        box_muller = _BoxMuller(min(_BLOCKS_PER_CHUNK, last - first))
        for block in blocks:
            count = min(_BLOCKS_PER_CHUNK, last - block)
            KEYSTREAMS[generator](key, block * BLOCK, box_muller.words[: count * BLOCK])
            normals = box_muller(count)
            low = max(offset - block * BLOCK, 0)
            high = min(offset + length - block * BLOCK, count * BLOCK)
            if low < high:
                visit(block * BLOCK + low - offset, normals[low:high])

    threads = max(1, min(torch.get_num_threads(), length // _THREAD_SHARE))
    with ThreadPoolExecutor(threads) as pool:  # NumPy and OpenSSL work outside the interpreter's lock
        others = [pool.submit(draw) for _ in range(threads - 1)]
        draw()
        for other in others:
            other.result()


def chacha20_words(key: bytes, start: int, out: NDArray[np.uint64]) -> None:
    """Fill `out` with 64-bit words of the ChaCha20 keystream from word `start` on, a multiple of 8."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms  # which a GPU's own noise does without

    counter = start * 8 // _CHACHA_BLOCK_BYTES
    low, high = counter % (1 << _COUNTER_BITS), counter >> _COUNTER_BITS
    nonce = low.to_bytes(4, "little") + high.to_bytes(12, "little")
    encryptor = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
    encryptor.update_into(memoryview(_ZEROS)[: out.nbytes], out.data.cast("B"))


def philox_words(key: bytes, start: int, out: NDArray[np.uint64]) -> None:
    """Fill `out` with words of Philox4x64-10 keyed by the first 16 bytes, from word `start` on, a multiple of 4."""
    generator = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8"), counter=start // 4)
    out[:] = generator.random_raw(len(out))


KEYSTREAMS = {"chacha20": chacha20_words, "philox": philox_words}


class _BoxMuller:
    """Box-Muller on whole blocks (twin: `kernels.reference.box_muller`), in buffers that one thread keeps.

    With t = tan(angle / 2), cos(angle) = 2 / (1 + t^2) - 1 and sin(angle) = 2 t / (1 + t^2): one tangent in place of a
    cosine and a sine, which are NumPy's slowest functions in float64.
    """

    def __init__(self, num_blocks: int) -> None:
        self._radii, self._tangents, self._scratch = (np.empty((num_blocks, _PAIRS)) for _ in range(3))
        self._normals = np.empty((num_blocks, 2, _PAIRS))
        self.words = np.empty(num_blocks * BLOCK, dtype="<u8")

    def __call__(self, count: int) -> NDArray[np.float64]:
        """One normal a word of the first `count` blocks of `words`; they live until the next call."""
        signed = self.words.view("<i8").reshape(-1, 2, _PAIRS)[:count]
        r, t, p = self._radii[:count], self._tangents[:count], self._scratch[:count]
        bits = p.view(np.int64)
        # r: uniform in (0, 1), 63 bits of the one word and below them the 11 that float64 drops of the other.
        np.bitwise_and(signed[:, 0], _LOW_63, out=bits)
        np.copyto(r, bits)
        np.multiply(r, 2.0**-63, out=r)
        np.bitwise_and(signed[:, 1], _LOW_11, out=bits)
        np.bitwise_or(bits, _BITS_OF_2_TO_MINUS_22, out=bits)  # read as float64: 2^-22 + (the 11 bits) * 2^-74
        np.subtract(p, 2.0**-22 - 2.0**-75, out=p)
        np.add(r, p, out=r)
        np.log(r, out=r)
        np.multiply(r, -2.0, out=r)
        np.sqrt(r, out=r)
        # t: tangent of half the angle, which lies in [-pi/2, pi/2), where float64's tangent is finite.
        np.copyto(t, signed[:, 1])
        np.multiply(t, np.pi * 2.0**-64, out=t)
        np.tan(t, out=t)
        np.multiply(t, t, out=p)
        np.add(p, 1.0, out=p)
        np.divide(r, p, out=p)
        np.add(p, p, out=p)
        normals = self._normals[:count]
        np.subtract(p, r, out=normals[:, 0])
        np.multiply(p, t, out=normals[:, 1])
        return normals.reshape(-1)
