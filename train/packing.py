"""Which documents share a row, and which rows a rank takes: functions of the lengths of one step's documents alone.

    rows = pack(lengths, num_tokens=512)                           # public: as many documents to a row as fit
    rows = rows_of_units(lengths_by_unit, bounds=(88, 104, 152))   # private: row u is unit u, and nobody else's
    portions = share(rows, world_size, microbatch_tokens=4096, token_pairs=6 * width)[rank]

The records of a step are decided before (`train.data.public_batch`, a sampler's draw), and nothing is carried from one
step to the next: a resumed run packs as the unbroken one did. No row knows the world size; only who takes it depends
on that.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from models.packed import MAX_ASPECT_RATIO
from models.tokenizer import Encoded, Tokenizer

Bucket = tuple[int, int]  # height and width of an image, pixels


@dataclass(frozen=True)
class Row:
    """Documents side by side in `num_tokens` tokens, padding included.

    documents: their places, ascending, in the list that the row was made from (private: in the unit's own list).
    lengths: their tokens, in that order; left_out: a private unit's documents that found no room.
    """

    documents: tuple[int, ...]
    lengths: tuple[int, ...]
    num_tokens: int
    left_out: tuple[int, ...] = ()

    @property
    def padding(self) -> int:
        """Tokens of padding."""
        return self.num_tokens - sum(self.lengths)

    def cost(self, token_pairs: float) -> float:
        """What the row takes, in units of one pair of tokens that attend to each other; padding attends to nothing.

        token_pairs: what a token costs beside attention. In `Unified`, whose blocks spend 24 width^2 FLOPs on a token
        and 4 width on a pair, that is 6 * width.
        """
        return token_pairs * self.num_tokens + sum(length**2 for length in self.lengths)


@dataclass(frozen=True)
class Portion:
    """One rank's part of one microbatch.

    rows: places in the step's rows; there may be none. num_rows: of the largest portion of this microbatch, up to which
    rows without documents fill the others where all ranks need one shape. num_tokens: of each row.
    """

    rows: tuple[int, ...]
    num_rows: int
    num_tokens: int


def pack(lengths: Sequence[int], num_tokens: int) -> list[Row]:
    """Every document once, in rows of `num_tokens`: first-fit decreasing, or evenly filled rows where fewer are enough.

    First-fit decreasing needs at most 11/9 of the fewest rows possible, and one more (Dósa 2007), but its rows have
    gaps of nearly a document where documents are alike; a given number of rows, filled evenly (Graham 1969), have not.
    A step's loss is a sum over its documents, so that their order is free. Raises ValueError for an empty document and
    for one that is longer than a row.
    """
    for place, length in enumerate(lengths):
        if _checked(length, f"document {place}") > num_tokens:
            raise ValueError(
                f"document {place} has {length} tokens, a row {num_tokens}: cut its caption (`fit_caption`), scale its "
                "image down or leave it out"
            )
    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    held = _first_fit(longest_first, lengths, num_tokens)
    few, many = math.ceil(sum(lengths) / num_tokens), len(held)
    while few < many:  # by halves: more rows fit better, all but always
        even = _evenly(longest_first, lengths, (few + many) // 2)
        if all(sum(lengths[place] for place in row) <= num_tokens for row in even):
            held, many = even, len(even)
        else:
            few = len(even) + 1
    return [_row(sorted(places), lengths, num_tokens) for places in held]


def rows_of_units(units: Sequence[Sequence[int]], bounds: Sequence[int]) -> list[Row]:
    """One row for each unit, given as the lengths of its documents, padded to the least of `bounds` that holds them.

    Documents are kept in their order, each that still fits under the largest bound; the others are left out, and what
    is left of a unit may be an empty row.

    Guarantee: row u is a function of unit u and of `bounds`, which are the stage's: public, or chosen on public data
    (`choose_bounds`). Adding, removing or changing a unit changes no other's row. How many rows have which bound, what
    was left out and how much is padding are facts of private data, for the operator alone.
    """
    if not bounds or list(bounds) != sorted(set(bounds)) or bounds[0] < 1:
        raise ValueError(f"bounds are {list(bounds)}: give one or more numbers of tokens, ascending")
    rows: list[Row] = []
    for unit, lengths in enumerate(units):
        kept, left_out, used = list[int](), list[int](), 0
        for place, length in enumerate(lengths):
            fits = used + _checked(length, f"document {place} of unit {unit}") <= bounds[-1]
            (kept if fits else left_out).append(place)
            used += length if fits else 0
        bound = next(bound for bound in bounds if bound >= used)
        rows.append(_row(kept, lengths, bound, tuple(left_out)))
    return rows


def choose_bounds(lengths: Sequence[int], num_bounds: int, longest: int) -> tuple[int, ...]:
    """At most `num_bounds` bounds, the last of them `longest`, with which rows of these lengths are padded least.

    The lengths must be public, and stand for the private ones; those above `longest` count as that long. By dynamic
    programming over the distinct lengths, of which a few thousand are too many.
    """
    if num_bounds < 1 or longest < 1:
        raise ValueError(f"num_bounds is {num_bounds} and longest {longest}: both must be at least 1")
    values, counts = np.unique([*np.minimum(lengths, longest), longest], return_counts=True)
    up_to = np.cumsum(counts)  # the `longest` that was added fills its bound whatever the others are
    tokens = up_to * values.astype(float)  # of all rows up to each value, under one bound
    chains = [[int(value)] for value in values]
    for _ in range(num_bounds - 1):
        # [j, i]: the best up to value j, and one bound more, value i, for those between
        added = np.where(values[:, None] < values, tokens[:, None] + (up_to - up_to[:, None]) * values, np.inf)
        before = added.argmin(0)
        better = added.min(0) < tokens
        chains = [
            [*chains[j], int(value)] if won else chain
            for j, won, chain, value in zip(before, better, chains, values, strict=True)
        ]
        tokens = np.minimum(tokens, added.min(0))
    return tuple(chains[-1])


def share(rows: Sequence[Row], world_size: int, microbatch_tokens: int, token_pairs: float) -> list[list[Portion]]:
    """Every row to one rank: each rank's portions, in the order in which all ranks take them.

    Ranks wait for each other in every microbatch, so rows of one bound and of like cost are taken together, dearest
    first; of those, each goes to the rank with the least to do so far. Ranks have equally many portions, of at most
    `microbatch_tokens` each (or of one row). A step without rows is one portion without rows.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}: there is at least one rank")
    loads = [0.0] * world_size
    portions: list[list[Portion]] = [[] for _ in range(world_size)]
    costs = [row.cost(token_pairs) for row in rows]
    for num_tokens in sorted({row.num_tokens for row in rows}, reverse=True):
        places = [place for place, row in enumerate(rows) if row.num_tokens == num_tokens]
        places.sort(key=lambda place: -costs[place])
        of_rank = math.ceil(len(places) / world_size)
        count = math.ceil(of_rank / max(1, microbatch_tokens // num_tokens))
        size = world_size * math.ceil(of_rank / count)
        for start in range(0, len(places), size):
            together = places[start : start + size]
            num_rows = math.ceil(len(together) / world_size)
            taken: list[list[int]] = [[] for _ in range(world_size)]
            able = [(load, rank) for rank, load in enumerate(loads)]
            heapq.heapify(able)
            for place in together:
                _, rank = heapq.heappop(able)
                taken[rank].append(place)
                loads[rank] += costs[place]
                if len(taken[rank]) < num_rows:
                    heapq.heappush(able, (loads[rank], rank))
            for rank, mine in enumerate(taken):
                portions[rank].append(Portion(tuple(mine), num_rows, num_tokens))
    return portions if rows else [[Portion((), 1, 1)] for _ in range(world_size)]


def padding_fraction(rows: Sequence[Row]) -> float:
    """The share of the rows' tokens that is padding."""
    total = sum(row.num_tokens for row in rows)
    return sum(row.padding for row in rows) / total if total else 0.0


def waiting_fraction(shares: Sequence[Sequence[Portion]], rows: Sequence[Row], token_pairs: float) -> float:
    """The share of the ranks' time that they wait for the dearest portion of a microbatch, by the rows' costs."""
    costs = [[sum(rows[row].cost(token_pairs) for row in portion.rows) for portion in mine] for mine in shares]
    lasts = len(shares) * sum(map(max, zip(*costs, strict=True)))
    return 1 - sum(map(sum, costs)) / lasts if lasts else 0.0


def packed_over_padded(lengths: Sequence[int], num_tokens: int, bound: int, token_pairs: float) -> float:
    """How many times cheaper the documents are packed than one to a row of `bound` tokens, by the rows' costs."""
    packed, padded = pack(lengths, num_tokens), rows_of_units([[length] for length in lengths], [bound])
    return sum(row.cost(token_pairs) for row in padded) / sum(row.cost(token_pairs) for row in packed)


def fit_caption(
    tokenizer: Tokenizer, caption: str | bytes, beside: int, num_tokens: int, too_long: Literal["truncate", "leave_out"]
) -> Encoded | None:
    """The caption of a document that has `beside` more tokens, delimiters included, within `num_tokens`.

    Under `truncate` its first tokens, with the number of those dropped; None, and the document is to be left out and
    counted, where it does not fit (or, under `truncate`, not even an empty caption would). In a private stage it
    depends on this document alone, and both counts are the operator's. Raises ValueError for invalid UTF-8.
    """
    room = num_tokens - beside
    encoded = tokenizer.encode(caption, max_tokens=max(0, room))
    return None if room < 0 or (encoded.num_dropped and too_long == "leave_out") else encoded


def image_buckets(patch_size: int, max_patches: int) -> tuple[Bucket, ...]:
    """Sizes for images of any aspect up to `MAX_ASPECT_RATIO`, flat ones first: none has room for a row or column more.

    Each is of whole patches, `max_patches` of them or a few less, so that images of any form cost about the same.
    """
    if patch_size < 1 or max_patches < 1:
        raise ValueError(f"patch_size is {patch_size} and max_patches {max_patches}: both must be at least 1")
    grids = [(rows, max_patches // rows) for rows in range(1, max_patches + 1)]
    return tuple(
        (rows * patch_size, columns * patch_size)
        for rows, columns in grids
        if rows == max_patches // columns and max(rows, columns) <= MAX_ASPECT_RATIO * min(rows, columns)
    )


def bucket_of(height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect is nearest to an image's, by ratio; a function of the image alone.

    An image of more extreme aspect than any bucket has goes to the last of them, and is to be cropped as any other: so
    that `models.packed.Layout` never meets one that it would refuse. Raises ValueError for an image without area.
    """
    if min(height, width) < 1:
        raise ValueError(f"an image is {height} x {width}: it has no area")
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] * width / (bucket[1] * height))))


def _checked(length: int, what: str) -> int:
    if length < 1:
        raise ValueError(f"{what} has {length} tokens: leave empty documents out")
    return length


def _first_fit(order: Sequence[int], lengths: Sequence[int], num_tokens: int) -> list[list[int]]:
    """Each document in the first row that has room for it."""
    room = np.full(len(order), num_tokens)
    held: list[list[int]] = []
    for place in order:
        row = int(np.argmax(room[: len(held) + 1] >= lengths[place]))  # there is room in one that is not begun
        if row == len(held):
            held.append([])
        held[row].append(place)
        room[row] -= lengths[place]
    return held


def _evenly(order: Sequence[int], lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """Each document in the row that is filled least, however full."""
    filled = [(0, row) for row in range(num_rows)]
    held: list[list[int]] = [[] for _ in filled]
    for place in order:
        tokens, row = filled[0]
        held[row].append(place)
        heapq.heapreplace(filled, (tokens + lengths[place], row))
    return held


def _row(places: Sequence[int], lengths: Sequence[int], num_tokens: int, left_out: tuple[int, ...] = ()) -> Row:
    return Row(tuple(places), tuple(lengths[place] for place in places), num_tokens, left_out)
