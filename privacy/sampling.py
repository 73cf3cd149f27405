"""Which units a step reads: keyed functions of (stage, step, attempt), the same on every rank, machine and world size.

Four samplers, each of which also says what the accountant must charge for a step:

    poisson             each unit enters on its own with probability q                     amplified
    truncated_poisson   the same, and of more than a batch's cap a uniform choice is kept  amplified, the cap priced in
    cyclic_poisson      Poisson within one contiguous range of the units a step, in turn   amplified within the range
    shuffled            epochs of a permutation, cut into batches                          not amplified

The last two split the units into parts by their index, so a unit pays only for the steps that read its part. That
holds between neighbours with the same slots: the number of units is public and fixed, and the neighbour of a data set
has one slot empty, contributing zero. The first two hold for adding or removing a unit, at a fixed rate.

Every choice is made in integers: no machine's rounding of logarithms can make two ranks draw differently.
"""

from __future__ import annotations

import hashlib
import hmac
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from numpy.typing import NDArray

from privacy.events import check_max_batch_size, check_sampling_rate

Method = Literal["poisson", "truncated_poisson", "cyclic_poisson", "shuffled"]
Indices = NDArray[np.int64]

TABLE_SIZE = 1 << 16
LEAST_SURVIVAL = 2.0**-6


class Sampler(ABC):
    """Draws of units and the events that they cost.

    Guarantee: a draw is a function of (key, stage, step, attempt) and of nothing else; draws of different (stage, step,
    attempt) are independent as far as HMAC-SHA256 and ChaCha20 are sound.

    The attempt belongs to the key because a replay is charged as a release of its own: two noises on one draw lose more
    than two independent draws (docs/decisions/002). Shuffled batches alone leave it out: they claim no independence.
    """

    def __init__(self, key: bytes, stage: str, num_units: int) -> None:
        if len(key) != 32:
            raise ValueError(f"sampling key has {len(key)} bytes: give the 32 of privacy.secrets.derive")
        if num_units < 0:
            raise ValueError(f"num_units is {num_units}: give the number of units in the data set")
        self.stage, self.num_units, self._key = stage, num_units, key

    @abstractmethod
    def draw(self, step: int, attempt: int) -> Indices:
        """The units of this attempt at `step`: int64, ascending, each in [0, num_units); there may be none."""

    @abstractmethod
    def event(self, step: int, noise_multiplier: float) -> dict[str, Any]:
        """What one attempt at `step` is charged as."""

    @property
    def period(self) -> int | None:
        """After how many steps the events repeat; None where they never do."""
        return 1

    def planned(self, first_step: int, num_steps: int, noise_multiplier: float) -> list[tuple[dict[str, Any], int]]:
        """The charges of one attempt at each of `num_steps` steps from `first_step` on, as (event, number) pairs."""
        period = min(self.period or num_steps, num_steps)
        return [
            (self.event(first_step + start, noise_multiplier), len(range(start, num_steps, period)))
            for start in range(period)
        ]

    def _keystream(self, step: int, attempt: int, *purpose: str) -> CipherContext:
        if step < 0 or attempt < 0:
            raise ValueError(f"step is {step} and attempt {attempt}: both count from 0")
        return keystream(self._key, self.stage, str(step), str(attempt), *purpose)


class PoissonSampler(Sampler):
    """Includes each unit with probability `sampling_rate`, independently of all others.

    Guarantee: each inclusion has its probability within 2^-57, whatever the inclusions before it.

    Method: the gap before the next included unit is geometric, P(gap >= k) = (1 - q)^k, and is read off a table of that
    survival function in 64-bit integers. Where the table ends (survival below 1/64, or 65536 entries) the gap is at
    least that long and is drawn anew from there, for the geometric law has no memory. The cost follows the number of
    units drawn, not num_units.
    """

    def __init__(self, key: bytes, stage: str, num_units: int, sampling_rate: float) -> None:
        super().__init__(key, stage, num_units)
        self.sampling_rate = check_sampling_rate(sampling_rate)
        self._survival = _survival(sampling_rate)  # ascending: P(gap >= K), ..., P(gap >= 1), in units of 2^-64

    def draw(self, step: int, attempt: int) -> Indices:
        return self._include(self._keystream(step, attempt), self.num_units)

    def event(self, step: int, noise_multiplier: float) -> dict[str, Any]:
        return {
            "mechanism": "poisson_sampled_gaussian",
            "sampling_rate": self.sampling_rate,
            "noise_multiplier": noise_multiplier,
        }

    def _include(self, stream: CipherContext, num_units: int) -> Indices:
        longest = len(self._survival)
        found: list[Indices] = []
        position = 0
        while position < num_units:
            block = self._block_size(num_units - position)
            uniforms = _words(stream, block)
            gaps = longest - np.searchsorted(self._survival, uniforms, side="right").astype(np.int64)
            included = gaps < longest
            ends = position + np.cumsum(gaps + included)  # the first unit after each gap and the unit that ended it
            found.append(ends[included] - 1)
            position = int(ends[-1])
        indices = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
        return indices[indices < num_units]

    def _block_size(self, remaining: int) -> int:
        """About as many gaps as `remaining` units hold; the draw does not depend on it, for the keystream goes on."""
        expected = remaining * self.sampling_rate / (1 - LEAST_SURVIVAL) + remaining / TABLE_SIZE
        return int(expected + 4 * expected**0.5) + 16


class TruncatedPoissonSampler(PoissonSampler):
    """Poisson draws of which at most `max_batch_size` units are kept, chosen uniformly where there are more.

    The choice comes from a keystream of its own, so a draw within the cap is the Poisson draw of the same key.
    """

    def __init__(self, key: bytes, stage: str, num_units: int, sampling_rate: float, max_batch_size: int) -> None:
        super().__init__(key, stage, num_units, sampling_rate)
        self.max_batch_size = check_max_batch_size(max_batch_size)

    def draw(self, step: int, attempt: int) -> Indices:
        drawn = super().draw(step, attempt)
        if len(drawn) <= self.max_batch_size:
            return drawn
        kept = _permutation(self._keystream(step, attempt, "truncation"), len(drawn))[: self.max_batch_size]
        return drawn[np.sort(kept)]

    def event(self, step: int, noise_multiplier: float) -> dict[str, Any]:
        return super().event(step, noise_multiplier) | {
            "mechanism": "truncated_poisson_sampled_gaussian",
            "num_units": self.num_units,
            "max_batch_size": self.max_batch_size,
        }


class CyclicPoissonSampler(PoissonSampler):
    """Poisson draws at `sampling_rate` from one of `cycle` contiguous ranges: step t reads range t mod cycle.

    For streams: within `cycle` steps the index is read once, front to back. At rate 1 each step takes its range whole.
    A unit can be drawn only every `cycle` steps, at cycle times the rate of a Poisson draw of the same size.
    Source: Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization".
    """

    def __init__(self, key: bytes, stage: str, num_units: int, sampling_rate: float, cycle: int) -> None:
        super().__init__(key, stage, num_units, sampling_rate)
        if not 1 <= cycle <= max(num_units, 1):
            raise ValueError(f"cycle is {cycle}: give a number of ranges from 1 to the {num_units} units")
        self.cycle = cycle

    @property
    def period(self) -> int:
        return self.cycle

    def draw(self, step: int, attempt: int) -> Indices:
        begin, end = part_bounds(self.num_units, self.cycle, step % self.cycle)
        return begin + self._include(self._keystream(step, attempt), end - begin)

    def event(self, step: int, noise_multiplier: float) -> dict[str, Any]:
        partition = f"{self.stage}: {self.num_units} units in {self.cycle} ranges"
        return super().event(step, noise_multiplier) | {"partition": partition, "part": step % self.cycle}


class ShuffledSampler(Sampler):
    """Epochs of a keyed permutation, cut into the fewest batches of at most `batch_size`, alike in size within one.

    Each unit is read exactly once an epoch, and the permutation is new in each. A replay reads the same batch again:
    the event counts on no secrecy of the order (shuffling is never accounted as Poisson sampling), so none is lost.
    """

    def __init__(self, key: bytes, stage: str, num_units: int, batch_size: int) -> None:
        super().__init__(key, stage, num_units)
        if not 1 <= batch_size <= num_units:
            raise ValueError(f"batch_size is {batch_size}: give a number from 1 to the {num_units} units")
        self.batch_size = batch_size
        self.steps_per_epoch = -(-num_units // batch_size)
        self._order: tuple[int, Indices] | None = None  # of the epoch drawn from last

    @property
    def period(self) -> None:
        return None

    def draw(self, step: int, attempt: int) -> Indices:
        if step < 0 or attempt < 0:
            raise ValueError(f"step is {step} and attempt {attempt}: both count from 0")
        epoch, part = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            stream = keystream(self._key, self.stage, "epoch", str(epoch))
            self._order = epoch, _permutation(stream, self.num_units)
        begin, end = part_bounds(self.num_units, self.steps_per_epoch, part)
        return np.sort(self._order[1][begin:end])

    def event(self, step: int, noise_multiplier: float) -> dict[str, Any]:
        epoch, part = divmod(step, self.steps_per_epoch)
        partition = f"{self.stage}: epoch {epoch} of {self.num_units} units in {self.steps_per_epoch} batches"
        return {"mechanism": "gaussian", "noise_multiplier": noise_multiplier, "partition": partition, "part": part}


def make_sampler(
    method: Method,
    key: bytes,
    stage: str,
    num_units: int,
    expected_batch_size: int,
    *,
    max_batch_size: int | None = None,
    cycle: int | None = None,
) -> Sampler:
    """The sampler of that method whose batches hold `expected_batch_size` units on average (shuffled: at most).

    max_batch_size goes with truncated_poisson and cycle with cyclic_poisson, each required there and refused elsewhere.
    """
    if not 1 <= expected_batch_size <= num_units:
        raise ValueError(
            f"expected_batch_size is {expected_batch_size}: give a number from 1 to the {num_units} units there are"
        )
    for name, value, owner in (
        ("max_batch_size", max_batch_size, "truncated_poisson"),
        ("cycle", cycle, "cyclic_poisson"),
    ):
        if value is not None and method != owner:
            raise ValueError(f"{name} is {value}, but sampling is {method}: only {owner} takes it")
        if value is None and method == owner:
            raise ValueError(f"{name} is missing: sampling by {owner} needs it")
    if method == "poisson":
        return PoissonSampler(key, stage, num_units, expected_batch_size / num_units)
    if method == "shuffled":
        return ShuffledSampler(key, stage, num_units, expected_batch_size)
    if max_batch_size is not None:
        return TruncatedPoissonSampler(key, stage, num_units, expected_batch_size / num_units, max_batch_size)
    if cycle is not None:
        if expected_batch_size * cycle > num_units:
            raise ValueError(
                f"cycle is {cycle}: its ranges would hold fewer units than the {expected_batch_size} of a batch; "
                f"for {num_units} units give at most {num_units // expected_batch_size}"
            )
        return CyclicPoissonSampler(key, stage, num_units, expected_batch_size * cycle / num_units, cycle)
    raise ValueError(f"sampling is {method!r}: choose poisson, truncated_poisson, cyclic_poisson or shuffled")


class UserRecords:
    """The records of users: what a batch reads where the unit is a user, at most `max_records` of each.

    unit_of: int64 [records], the user of each record, in [0, num_users).
    Guarantee: the choice is a function of (key, stage, step, attempt) and the users drawn, uniform among a user's
    records. It bounds the work of a step; what bounds the privacy loss is that a user's records are clipped together.
    """

    def __init__(self, key: bytes, stage: str, unit_of: Indices, max_records: int) -> None:
        if max_records < 1:
            raise ValueError(
                f"max_records is {max_records}: give the most records a step reads of one user, at least 1"
            )
        self._key, self._stage, self.max_records = key, stage, max_records
        self._records = np.argsort(unit_of, kind="stable")  # grouped by user
        num_records = np.bincount(unit_of)
        self._ends: Indices = np.cumsum(num_records)
        self._begins: Indices = self._ends - num_records

    def draw(self, users: Indices, step: int, attempt: int) -> Indices:
        """The records of the drawn `users` for this attempt, int64 (users, max_records), -1 where a user has fewer."""
        counts: Indices = self._ends[users] - self._begins[users]
        before = np.cumsum(counts) - counts
        total = int(counts.sum())
        place, rank = np.repeat(np.arange(len(users)), counts), np.arange(total) - np.repeat(before, counts)
        records = self._records[np.repeat(self._begins[users], counts) + rank]
        words = _words(keystream(self._key, self._stage, str(step), str(attempt), "records"), 2 * total)
        # Each user's records in a random order: the first of them are kept.
        shuffled = records[np.lexsort((words[1::2], words[::2], place))]
        kept = rank < self.max_records
        slots = np.full((len(users), self.max_records), -1, np.int64)
        slots[place[kept], rank[kept]] = shuffled[kept]
        return slots


def part_bounds(num_units: int, num_parts: int, part: int) -> tuple[int, int]:
    """[begin, end) of one of `num_parts` contiguous parts of the units, whose sizes differ by one at most."""
    return num_units * part // num_parts, num_units * (part + 1) // num_parts


def keystream(key: bytes, *label: str) -> CipherContext:
    """ChaCha20's keystream under a key of the label's own."""
    derived = hmac.new(key, "\x1f".join(label).encode(), hashlib.sha256).digest()
    return Cipher(algorithms.ChaCha20(derived, bytes(16)), mode=None).encryptor()


def _words(stream: CipherContext, number: int) -> NDArray[np.uint64]:
    return np.frombuffer(stream.update(bytes(8 * number)), dtype="<u8")


def _permutation(stream: CipherContext, size: int) -> Indices:
    """A uniform permutation of range(size): the order of 128-bit words, for 64-bit ones would tie too often."""
    words = _words(stream, 2 * size)
    return np.lexsort((words[1::2], words[::2]))


def _survival(sampling_rate: float) -> NDArray[np.uint64]:
    one = 1 << 128
    miss = one - int(Fraction(sampling_rate) * one)
    left, table = one, list[int]()
    while left > one * LEAST_SURVIVAL and len(table) < TABLE_SIZE:
        left = left * miss >> 128
        table.append(left >> 64)
    return np.array(table[::-1], dtype=np.uint64)
