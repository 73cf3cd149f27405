"""Records whose image and caption both come again: what diffusion models learn by heart.

Map: `signatures` of each shard. Reduce, once: `find_duplicates` over all of them. Filter: leave out its `dropped`.
Two records are near where their images are (the same bytes, or few differing bits of a perceptual hash and nearly the
same colours) and their captions are (most words and pairs of words shared). Images alone or captions alone are not: it
is the two together that a model reproduces. Source: Somepalli et al. 2023, Understanding and Mitigating Copying in
Diffusion Models; Carlini et al. 2023, Extracting Training Data from Diffusion Models.

A signature is as private as the record: who guesses a caption can check the guess. Only the report's counts are not.
"""

# n records, k chunks of the perceptual hash, p minima of a caption
from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from privacy.pii.findings import Pixels

HASH_BITS = 128
_MINIMA = 64
_CROWD = 64  # records that share a key; more are told apart by their captions first
_CROWD_BANDS = 4  # of the minima
_AT_ONCE = 1 << 22  # pairs compared at a time
_TOLD_EVERY = 1 << 20
_LEAST_CONTRAST = 8.0  # of 255: of a plain texture, storing it again changes as much as a tenth of that
_FIELDS = [
    ("exact", "<u8", (2,)), ("perceptual", "<u8", (2,)), ("colours", "u1", (192,)), ("side", "<u4"),
    ("caption", "<u4", (_MINIMA,)),
]  # fmt: skip

Signatures = NDArray[np.void]  # [n], fields: key and _FIELDS; side is 0 where the image does not decode
_Indices = NDArray[np.int64]
_Key = TypeVar("_Key", bound=np.integer[Any])


class DuplicatesConfig(BaseModel):
    """How near is near."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    image_bits: Annotated[int, Field(ge=0, le=16)] = 10  # of 128 that may differ
    # Root mean square of that of the mean colours, as a share of their contrast. Most copies stored again as a JPEG or
    # at half size differ by less; cards of two suits by more, and so does a copy with a mark or of another contrast.
    colour_difference: Annotated[float, Field(ge=0, lt=1)] = 0.07
    caption_similarity: Annotated[float, Field(gt=0, le=1)] = 0.7  # Jaccard, estimated to about .06
    # Pixels. Smaller images hold too little to tell a copy from a likeness: they are near where their bytes are equal.
    smallest_side: Annotated[int, Field(ge=1)] = 32


@dataclass(frozen=True)
class Duplicates:
    """dropped: key -> the key that is kept for it; report: counts, without any value."""

    dropped: Mapping[str, str]
    report: Mapping[str, int]


def signatures(
    keys: Sequence[str],
    images: Sequence[bytes],
    captions: Sequence[str | None],
    decode: Callable[[bytes], Pixels],
) -> Signatures:
    """One signature a record; an image on which `decode` raises is told by its bytes alone.

    A function of (key, image, caption) on every machine: the hash compares sums of integers.
    """
    width = max((len(key) for key in keys), default=1)
    made = np.zeros(len(keys), [("key", f"S{width}"), *_FIELDS])
    for number, (key, image, caption) in enumerate(zip(keys, images, captions, strict=True)):
        if not key.isascii():
            raise ValueError(f"record key {key!r}: use letters, digits, _ and -, with / between folders")
        made["key"][number] = key.encode("ascii")
        made["exact"][number] = np.frombuffer(hashlib.blake2b(image, digest_size=16).digest(), "<u8")
        made["caption"][number] = caption_minima(caption or "")
        try:
            pixels = decode(image)
        except Exception:
            continue  # side stays 0
        made["side"][number] = min(pixels.shape[:2])
        made["perceptual"][number] = perceptual_hash(pixels)
        made["colours"][number] = colours(pixels)
    return made


def to_bytes(made: Signatures) -> bytes:
    """A shard's signatures as an .npy file: the same bytes for the same signatures."""
    out = io.BytesIO()
    np.save(out, made, allow_pickle=False)
    return out.getvalue()


def from_bytes(data: bytes, where: str) -> Signatures:
    """Read `to_bytes` back; anything else is a ValueError that begins with `where`."""
    try:
        made: Signatures = np.load(io.BytesIO(data), allow_pickle=False)
        ours = [("key", made.dtype["key"]), *_FIELDS] if made.dtype.names else None
    except (ValueError, OSError, EOFError, KeyError):
        ours, made = None, np.empty(0, np.void)
    if ours is None or made.dtype != np.dtype(ours) or made.ndim != 1:
        raise ValueError(f"{where} holds no signatures of this version: make them again")
    return made


def perceptual_hash(pixels: Pixels) -> NDArray[np.uint64]:
    """A 128-bit difference hash: is each cell of an 8 x 8 grid brighter than its neighbour to the left, and above?

    dHash in both directions, not pHash: on the photographs of scikit-image and 100 faces of LFW, through JPEG at
    quality 50, half and double size, brightness, contrast and a mark in a corner, it differs in at most 15 bits where
    other faces differ in 20 or more; the mark alone turns a quarter of pHash's. Source: Krawetz 2013,
    "Kind of Like That", for rows. Exact: cells are sums of integers, which doubles add without rounding.
    """
    across, down = (_cells(pixels, *grid) @ (299.0, 587.0, 114.0) for grid in ((8, 9), (9, 8)))  # ITU-R BT.601 luma
    bits = np.concatenate([(across[:, 1:] > across[:, :-1]).ravel(), (down[1:] > down[:-1]).ravel()])
    return np.packbits(bits).view("<u8")


def colours(pixels: Pixels) -> NDArray[np.uint8]:
    """The mean colours of an 8 x 8 grid: what tells drawings on white, and flags, from others of the same hash."""
    height, width = pixels.shape[:2]
    return (_cells(pixels, 8, 8) // (height * width)).astype(np.uint8).ravel()


def _cells(pixels: Pixels, rows: int, columns: int) -> NDArray[np.float64]:
    """The sum over each cell of a grid, in units of 1 / (rows columns) pixel: a pixel may lie in several cells."""

    def shares(pixels: int, cells: int) -> NDArray[np.float64]:
        pixel, cell = np.arange(pixels) * cells, np.arange(cells)[:, None] * pixels
        return np.maximum(np.minimum(pixel + cells, cell + pixels) - np.maximum(pixel, cell), 0).astype(np.float64)

    down, across = shares(pixels.shape[0], rows), shares(pixels.shape[1], columns).T
    return np.stack([down @ pixels[..., channel].astype(np.float64) @ across for channel in range(3)], axis=-1)


_MULTIPLIERS, _OFFSETS = (
    np.frombuffer(hashlib.shake_256(b"sfumato/1/minima/" + name).digest(8 * _MINIMA), "<u8") for name in (b"a", b"b")
)
# Thai, Lao, Burmese, Khmer, kana and Han are written without spaces between words: each character counts as one.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")


def caption_minima(caption: str) -> NDArray[np.uint32]:
    """MinHash of the caption's words and pairs of words, whatever their case and punctuation; uint32 [p].

    Two captions agree in a share of their minima that estimates the Jaccard similarity of those sets. Without a word
    all minima are the greatest number. Source: Broder 1997, On the resemblance and containment of documents.
    """
    words = _WORD.findall(unicodedata.normalize("NFKC", caption).casefold())
    shingles = {word.encode() for word in words} | {f"{a} {b}".encode() for a, b in itertools.pairwise(words)}
    if not shingles:
        return np.full(_MINIMA, 0xFFFFFFFF, np.uint32)
    digests = b"".join(hashlib.blake2b(shingle, digest_size=8).digest() for shingle in sorted(shingles))
    hashed = np.frombuffer(digests, "<u8")[:, None] * (_MULTIPLIERS | np.uint64(1)) + _OFFSETS  # modulo 2^64
    return (hashed >> np.uint64(32)).min(axis=0).astype(np.uint32)


def find_duplicates(
    parts: Sequence[Signatures], config: DuplicatesConfig, progress: Callable[[int, int | None], None] | None = None
) -> Duplicates:
    """Of records that are near each other keep the one whose key comes first, and give for the others which it is.

    Guarantee: a record is dropped only where it is near the one kept for it, and not as a copy of a copy: a series of
    pictures, each near the next, keeps as many as it takes. The same whatever the order of parts and records. Every
    pair of images within `image_bits` is compared, unless a crowd shares all that the two share (a placeholder with
    other words each time): then those with the same words are, and of those whose minima agree in a share s about
    1 - (1 - s^16)^4 (.9 at s = .95), or the work would grow with the crowd's square. `progress` (done, of all) is
    called at least every few million pairs compared.

    report: records, groups, dropped, dropped_exact (same bytes, same caption as the one that is kept), largest_group,
    same_image_other_caption (kept beside a kept record of the same bytes), small and undecoded (compared by bytes).
    Give one split at a time: which public records there are must not hang on the private ones.
    """
    made = np.concatenate(parts) if parts else np.zeros(0, [("key", "S1"), *_FIELDS])
    made = made[np.argsort(made["key"])]
    keys: list[str] = np.char.decode(made["key"], "ascii").tolist()
    for first, second in itertools.pairwise(keys):
        if first == second:
            raise ValueError(f"record key {first!r} occurs twice: keys must be unique in a split")
    kept_for = _kept_for(made, config, progress or (lambda _done, _of: None))
    firsts: list[int] = kept_for.tolist()
    kept = np.flatnonzero(kept_for == np.arange(len(made)))
    dropped = np.flatnonzero(kept_for != np.arange(len(made)))
    exact = np.logical_and.reduce([
        (made[field][dropped] == made[field][kept_for[dropped]]).all(axis=1) for field in ("exact", "caption")
    ])  # fmt: skip
    sizes = np.bincount(kept_for, minlength=1)
    return Duplicates(
        {keys[number]: keys[first] for number, first in enumerate(firsts) if number != first},
        {
            "records": len(keys),
            "groups": int((sizes > 1).sum()),
            "dropped": len(dropped),
            "dropped_exact": int(exact.sum()),
            "largest_group": int(sizes.max()),
            "same_image_other_caption": len(kept) - len(np.unique(made["exact"][kept], axis=0)),
            "small": int(((made["side"] > 0) & (made["side"] < config.smallest_side)).sum()),
            "undecoded": int((made["side"] == 0).sum()),
        },
    )


def _kept_for(made: Signatures, config: DuplicatesConfig, progress: Callable[[int, int | None], None]) -> _Indices:
    """For each record the one that is kept for it, itself or an earlier one."""
    hashed = made["side"] >= config.smallest_side
    image = np.where(hashed[:, None], made["perceptual"], made["exact"])
    same = _same(hashed, image, made["colours"], made["caption"])
    alone = np.flatnonzero(same == np.arange(len(made)))  # one of those that are the same in all

    contrast = _contrasts(made["colours"])
    num_keys, done, seen = math.comb(_num_chunks(config.image_bits), 2) + 1, 0, 0

    def tell(pairs: _Indices) -> None:
        nonlocal seen
        seen += pairs.shape[1]
        if seen >= _TOLD_EVERY:
            progress(done, num_keys)
            seen = 0

    def near(pairs: _Indices) -> NDArray[np.bool_]:
        one, other = pairs
        most_bits = np.where(hashed[one] & hashed[other], config.image_bits, 0)
        result = np.bitwise_count(image[one] ^ image[other]).sum(axis=1) <= most_bits
        for alike in (colours_alike, captions_alike):
            left = np.flatnonzero(result)
            result[left] = alike(one[left], other[left])
        return result

    def colours_alike(one: _Indices, other: _Indices) -> NDArray[np.bool_]:
        # Squares, in which one cell that is another weighs more than a little in all of them; exact in float32.
        difference = made["colours"][one].astype(np.float32) - made["colours"][other]
        most = np.maximum(_LEAST_CONTRAST, np.maximum(contrast[one], contrast[other])) * config.colour_difference
        return np.einsum("nc,nc->n", difference, difference) <= 192 * np.square(most)

    def captions_alike(one: _Indices, other: _Indices) -> NDArray[np.bool_]:
        return (made["caption"][one] == made["caption"][other]).mean(axis=1) >= config.caption_similarity

    root = np.arange(len(made))
    level, reach = made["colours"].mean(axis=1, dtype=np.float64), _reach(contrast, config)
    by_level = alone[np.argsort(level[alone], kind="stable")]
    by_hash, by_bytes = by_level[hashed[by_level]], by_level[~hashed[by_level]]
    hash_keys = ((by_hash, key) for key in _chunk_keys(image[by_hash], config.image_bits))
    for members, key in itertools.chain(hash_keys, [(by_bytes, image[by_bytes, 0])]):
        for pairs in _pairs(key, members, made["caption"], root, level, reach):
            unjoined = pairs[:, root[pairs[0]] != root[pairs[1]]]
            _join(root, unjoined[:, near(unjoined)])
            tell(pairs)
        done += 1
        progress(done, num_keys)

    kept_for = np.arange(len(made))
    _, groups, starts, lengths = _sorted_runs(root[alone], alone)
    for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        left = groups[start : start + length]
        while len(left):
            pairs = np.stack([np.full_like(left, left[0]), left])
            of_first = near(pairs)
            tell(pairs)
            kept_for[left[of_first]] = left[0]
            left = left[~of_first]
    return kept_for[same]


def _same(*columns: NDArray[np.generic]) -> _Indices:
    """For each record the first that is the same in all columns."""
    widths = [column.itemsize * math.prod(column.shape[1:]) for column in columns]
    flat = [
        np.ascontiguousarray(column).view(np.uint8).reshape(-1, n) for column, n in zip(columns, widths, strict=True)
    ]
    rows = np.concatenate(flat, axis=1)
    _, first, inverse = np.unique(rows.view(f"V{rows.shape[1]}").ravel(), return_index=True, return_inverse=True)
    return first[inverse]


def _contrasts(colours: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[n]: the root mean square by which each image's colours differ from their own mean. Exact: sums of integers."""
    squares = np.einsum("nc,nc->n", colours, colours, dtype=np.int64)
    sums = colours.reshape(-1, 64, 3).sum(axis=1, dtype=np.int64)
    return np.sqrt((squares - np.square(sums).sum(axis=1) / 64) / 192)


def _reach(contrast: NDArray[np.float64], config: DuplicatesConfig) -> NDArray[np.float64]:
    """[n]: by how much the mean colour of an image of like colours can be another: what spares most comparisons.

    Neither means nor contrasts differ by more than the root mean square r of the differences; so where r is at most a
    share d of the larger contrast, that is at most the smaller one / (1 - d).
    """
    largest = np.maximum(_LEAST_CONTRAST, contrast / (1 - config.colour_difference))
    return config.colour_difference * largest + 1e-6  # rounding


def _chunk_keys(image: NDArray[np.uint64], image_bits: int) -> Iterator[NDArray[np.uint64]]:
    """Keys of which any two hashes within `image_bits` share at least one.

    The hash is cut into image_bits + 2 chunks, of which the differing bits leave two whole: each pair of chunks is a
    key. A chunk takes its bits from all over the image, or a plain margin would be a chunk that very many share.
    """
    count = _num_chunks(image_bits)
    chunks = np.zeros((count, len(image)), np.uint64)
    for bit in range(HASH_BITS):
        word, place = divmod(bit, 64)
        chunk = chunks[bit % count]
        chunk <<= np.uint64(1)
        chunk |= (image[:, word] >> np.uint64(place)) & np.uint64(1)
    for one, other in itertools.combinations(chunks, 2):
        yield one << np.uint64(32) | other


def _num_chunks(image_bits: int) -> int:
    return max(4, image_bits + 2)  # two chunks fit into 64 bits


def _pairs(
    key: NDArray[np.uint64],
    members: _Indices,
    minima: NDArray[np.uint32],
    root: _Indices,
    level: NDArray[np.float64],
    reach: NDArray[np.float64],
) -> Iterator[_Indices]:
    """Pairs [2, ...] of members, sorted by level, whose keys are equal and whose levels lie within the lower's reach.

    In a crowd, those that share a band of minima too.
    """
    key, members, starts, lengths = _sorted_runs(key, members)
    crowded = np.repeat(lengths > _CROWD, lengths)
    yield from _runs(key[~crowded], members[~crowded], level, reach)
    crowd_key, crowd = key[crowded], members[crowded]
    for columns in np.split(np.arange(_MINIMA), _CROWD_BANDS):
        mixed = crowd_key
        for column in columns:
            mixed = (mixed ^ minima[crowd, column]) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        mixed, members, starts, lengths = _sorted_runs(mixed, crowd)
        if not len(members):
            return
        first = root[members]
        joined = np.minimum.reduceat(first, starts) == np.maximum.reduceat(first, starts)
        open_still = ~np.repeat(joined, lengths)
        yield from _runs(mixed[open_still], members[open_still], level, reach)


def _sorted_runs(key: NDArray[_Key], members: _Indices) -> tuple[NDArray[_Key], _Indices, _Indices, _Indices]:
    """Both in the order of the keys, and where each run of equal keys starts and how long it is."""
    order = np.argsort(key, kind="stable")
    key = key[order]
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])[: len(key)])
    return key, members[order], starts, np.diff(starts, append=len(key))


def _runs(
    key: NDArray[np.uint64], members: _Indices, level: NDArray[np.float64], reach: NDArray[np.float64]
) -> Iterator[_Indices]:
    """Pairs [2, ...] of members whose keys, which are sorted, are equal, within reach; at most _AT_ONCE at a time."""
    level, highest = level[members], level[members] + reach[members]
    for start in range(0, len(key), _AT_ONCE):
        here = np.arange(start, min(start + _AT_ONCE, len(key)))
        for step in itertools.count(1):
            here = here[here + step < len(key)]
            here = here[(key[here] == key[here + step]) & (level[here + step] <= highest[here])]
            if not len(here):
                break
            yield np.stack([members[here], members[here + step]])


def _join(root: _Indices, pairs: _Indices) -> None:
    """Union of pairs [2, ...], in place: afterwards each record's root is the least record of its set.

    Source: Shiloach and Vishkin 1982, An O(log n) parallel connectivity algorithm (hooking and pointer jumping).
    """
    while pairs.size:
        roots = root[pairs]
        np.minimum.at(root, roots.max(axis=0), roots.min(axis=0))
        while not np.array_equal(root, up := root[root]):
            root[:] = up
        pairs = pairs[:, root[pairs[0]] != root[pairs[1]]]
