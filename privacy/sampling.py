"""Poisson sampling as a keyed function: which units step t reads, the same on every rank, machine and world size."""

from __future__ import annotations

import hashlib
import hmac
from fractions import Fraction

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from privacy.events import check_sampling_rate

TABLE_SIZE = 1 << 16
LEAST_SURVIVAL = 2.0**-6


class PoissonSampler:
    """Draws that include each of `num_units` units with probability `sampling_rate`, independently of all others.

    Guarantee: a draw is a function of (key, stage, step, attempt) and of nothing else; draws of different (stage, step,
    attempt) are independent as far as HMAC-SHA256 and ChaCha20 are sound. Each inclusion has its probability within
    2^-57, whatever the inclusions before it. The choice is made in integers: no machine's rounding of logarithms can
    make two ranks draw differently.

    The attempt belongs to the key because a replay is charged as a release of its own: two noises on one draw lose more
    than two independent draws (docs/decisions/002).

    Method: the gap before the next included unit is geometric, P(gap >= k) = (1 - q)^k, and is read off a table of that
    survival function in 64-bit integers. Where the table ends (survival below 1/64, or 65536 entries) the gap is at
    least that long and is drawn anew from there, for the geometric law has no memory. The cost follows the number of
    units drawn, not num_units.
    """

    def __init__(self, key: bytes, stage: str, num_units: int, sampling_rate: float) -> None:
        if len(key) != 32:
            raise ValueError(f"sampling key has {len(key)} bytes: give the 32 of privacy.secrets.derive")
        if num_units < 0:
            raise ValueError(f"num_units is {num_units}: give the number of units in the data set")
        check_sampling_rate(sampling_rate)
        self.stage, self.num_units, self.sampling_rate = stage, num_units, sampling_rate
        self._key = key
        self._survival = _survival(sampling_rate)  # ascending: P(gap >= K), ..., P(gap >= 1), in units of 2^-64

    def draw(self, step: int, attempt: int) -> NDArray[np.int64]:
        """The indices included in `step`, sorted, each in [0, num_units); it may be empty."""
        if step < 0 or attempt < 0:
            raise ValueError(f"step is {step} and attempt {attempt}: both count from 0")
        label = "\x1f".join((self.stage, str(step), str(attempt)))
        key = hmac.new(self._key, label.encode(), hashlib.sha256).digest()
        keystream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        longest = len(self._survival)
        found: list[NDArray[np.int64]] = []
        position = 0
        while position < self.num_units:
            block = self._block_size(self.num_units - position)
            uniforms = np.frombuffer(keystream.update(bytes(8 * block)), dtype="<u8")
            gaps = longest - np.searchsorted(self._survival, uniforms, side="right").astype(np.int64)
            included = gaps < longest
            ends = position + np.cumsum(gaps + included)  # the first unit after each gap and the unit that ended it
            found.append(ends[included] - 1)
            position = int(ends[-1])
        indices = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
        return indices[indices < self.num_units]

    def _block_size(self, remaining: int) -> int:
        """About as many gaps as `remaining` units hold; the draw does not depend on it, for the keystream goes on."""
        expected = remaining * self.sampling_rate / (1 - LEAST_SURVIVAL) + remaining / TABLE_SIZE
        return int(expected + 4 * expected**0.5) + 16


def _survival(sampling_rate: float) -> NDArray[np.uint64]:
    one = 1 << 128
    miss = one - int(Fraction(sampling_rate) * one)
    left, table = one, list[int]()
    while left > one * LEAST_SURVIVAL and len(table) < TABLE_SIZE:
        left = left * miss >> 128
        table.append(left >> 64)
    return np.array(table[::-1], dtype=np.uint64)
