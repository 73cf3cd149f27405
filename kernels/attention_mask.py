"""Which keys each query of attention sees, as four vectors, and which blocks of queries and keys that leaves to visit.

Key j is visible to query i of the same record where

    lo[i] <= j < hi[i]  and  (noise[j] < 0 or noise[j] == seg[i])

so one pair of bounds a query says causal, packed documents and whole images, and a noised image is a segment of keys
that only its own queries see. A row may be empty: attention then gives zeros. The kernels visit the listed blocks only,
and look at the vectors in partial blocks only.
"""

# B records, N queries, M keys, I blocks of queries, J blocks of keys, L documents a record
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries and keys of a block; the kernels' tiles divide it


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """A batch's mask, made by `attention_mask` or one of the constructors below it; every tensor is contiguous int32.

    Guarantee: a block in no list has no visible pair; in a full block every query sees all BLOCK keys, but for those
    without bounds (lo >= hi), which see nothing; any other is partial. Lists ascend; what stands behind their count is
    some block's number. The `_BI` lists give the key blocks of a query block, the `_BJ` lists the query blocks of a key
    block.
    """

    lo_BN: Tensor
    hi_BN: Tensor
    seg_BN: Tensor | None  # None, as is noise_BM: no key is hidden by noise
    noise_BM: Tensor | None
    num_keys: int
    num_full_BI: Tensor
    full_BIJ: Tensor
    num_partial_BI: Tensor
    partial_BIJ: Tensor
    num_full_BJ: Tensor
    full_BJI: Tensor
    num_partial_BJ: Tensor
    partial_BJI: Tensor

    @property
    def num_records(self) -> int:
        return self.lo_BN.shape[0]

    @property
    def num_queries(self) -> int:
        return self.lo_BN.shape[1]

    def visible_BNM(self) -> Tensor:  # noqa: N802
        """The whole mask, true where a key is visible: for the twin, and for attention on the CPU."""
        keys_M = torch.arange(self.num_keys, device=self.lo_BN.device, dtype=torch.int32)
        visible_BNM = (self.lo_BN[..., None] <= keys_M) & (keys_M < self.hi_BN[..., None])
        if self.noise_BM is None or self.seg_BN is None:
            return visible_BNM
        noise_B1M = self.noise_BM[:, None]
        return visible_BNM & ((noise_B1M < 0) | (noise_B1M == self.seg_BN[..., None]))

    def visited_pairs(self) -> int:
        """`visited_pairs` of this mask. Waits for the device."""
        lists = (self.num_full_BI, self.full_BIJ, self.num_partial_BI, self.partial_BIJ)
        return visited_pairs(*lists, self.num_queries, self.num_keys)


def attention_mask(
    lo_BN: Tensor,
    hi_BN: Tensor,
    seg_BN: Tensor | None = None,
    noise_BM: Tensor | None = None,
    *,
    num_keys: int | None = None,
    debug: bool = False,
) -> AttentionMask:
    """The mask of these int32 vectors, over `num_keys` keys (else as many as noise has, else as many as queries).

    Lists are exact: a block is full, partial or left out by what its queries see, not by an estimate. Never waits for
    the device, and torch.compile traces it whole. Bounds outside 0..M act as the nearest one inside.

    Raises ValueError for shapes, dtypes and devices that do not fit; with `debug`, which waits for the device, also
    for bounds outside 0..M.
    """
    if noise_BM is not None and noise_BM.dim() == 2:
        num_keys = noise_BM.shape[1] if num_keys is None else num_keys
    num_keys = lo_BN.shape[-1] if num_keys is None else num_keys
    _check(lo_BN, hi_BN, seg_BN, noise_BM, num_keys)
    if debug:
        _check_bounds(lo_BN, hi_BN, num_keys)
    num_queries = lo_BN.shape[1]
    visible_BNJ = _count_visible(lo_BN, hi_BN, seg_BN, noise_BM, num_keys)
    rows, padding = (-(-num_queries // BLOCK), BLOCK), (0, 0, 0, -num_queries % BLOCK)
    # Queries past the last, and those without bounds, speak neither for nor against a block: padding must not change
    # the kind of a block, and with it the order of sums.
    least_BNJ = visible_BNJ.masked_fill((lo_BN >= hi_BN)[..., None], BLOCK)
    least_BIJ = F.pad(least_BNJ, padding, value=BLOCK).unflatten(1, rows).amin(2)
    most_BIJ = F.pad(visible_BNJ, padding, value=0).unflatten(1, rows).amax(2)
    full_BIJ = (least_BIJ == BLOCK) & (most_BIJ > 0)
    partial_BIJ = (most_BIJ > 0) & ~full_BIJ
    return AttentionMask(
        lo_BN.contiguous(),
        hi_BN.contiguous(),
        None if seg_BN is None else seg_BN.contiguous(),
        None if noise_BM is None else noise_BM.contiguous(),
        num_keys,
        *_listed(full_BIJ),
        *_listed(partial_BIJ),
        *_listed(full_BIJ.mT),
        *_listed(partial_BIJ.mT),
    )


def causal(num_records: int, num_tokens: int, device: torch.device | str | None = None) -> AttentionMask:
    """Every token sees itself and those before it."""
    tokens_N = torch.arange(num_tokens, device=device, dtype=torch.int32)
    hi_BN = (tokens_N + 1).expand(num_records, -1)
    return attention_mask(torch.zeros_like(hi_BN), hi_BN)


def documents(lengths_BL: Tensor, num_tokens: int, *, causal: bool) -> AttentionMask:
    """Documents packed one after another: a token sees its own only, and of it, where `causal`, what is not after it.

    A record's lengths (any integers, 0 for none) add up to at most `num_tokens`; what is left is padding, whose rows
    are empty. More than that is cut off at the last token.
    """
    if lengths_BL.dim() != 2 or lengths_BL.is_floating_point():
        raise ValueError(
            f"lengths_BL is {lengths_BL.dtype} of shape {tuple(lengths_BL.shape)}: give the integer lengths (B, L)"
        )
    tokens_N = torch.arange(num_tokens, device=lengths_BL.device, dtype=torch.int32)
    ends_BL = lengths_BL.cumsum(-1, dtype=torch.int32)
    # which document holds a token; past the last one stands an empty document
    own_BN = torch.searchsorted(ends_BL, tokens_N.repeat(len(lengths_BL), 1), right=True)
    lo_BN = F.pad(ends_BL - lengths_BL, (0, 1)).to(torch.int32).gather(1, own_BN)
    hi_BN = F.pad(ends_BL, (0, 1)).gather(1, own_BN).clamp(max=num_tokens)
    return attention_mask(lo_BN, torch.minimum(hi_BN, tokens_N + 1) if causal else hi_BN)


def text_and_images(document_BN: Tensor, image_BN: Tensor, noised_BN: Tensor) -> AttentionMask:
    """The unified model's mask: text is causal, an image is whole within itself and follows what precedes it.

    A noised image is seen by nothing but itself, so that text after it learns from the clean image only.

    document_BN: which document a token is of, a run of equal numbers each; negative is padding (an empty row).
    image_BN: which image a token is of, a run of equal numbers each, numbered apart within a record; negative is text.
    noised_BN: bool, whether the token is of a noised image.
    """
    for name, value in (("document_BN", document_BN), ("image_BN", image_BN)):
        if value.dim() != 2 or value.dtype != torch.int32:
            raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}: give int32 (B, N)")
    if noised_BN.dtype != torch.bool:
        raise ValueError(f"noised_BN is {noised_BN.dtype}: give bool (B, N)")
    for name, value in (("image_BN", image_BN), ("noised_BN", noised_BN)):
        if value.shape != document_BN.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: with document_BN give {tuple(document_BN.shape)}")
    tokens_N = torch.arange(document_BN.shape[1], device=document_BN.device, dtype=torch.int32)
    document_starts_BN, _ = _run_bounds(document_BN)
    _, image_ends_BN = _run_bounds(image_BN)
    hi_BN = torch.where(image_BN < 0, tokens_N + 1, image_ends_BN)
    hi_BN = hi_BN.masked_fill(document_BN < 0, 0)
    return attention_mask(document_starts_BN, hi_BN, image_BN, image_BN.masked_fill(~noised_BN, -1))


def visited_pairs(
    num_full_BI: Tensor, full_BIJ: Tensor, num_partial_BI: Tensor, partial_BIJ: Tensor, num_queries: int, num_keys: int
) -> int:
    """How many pairs of a query and a key stand in the listed blocks, over the batch: what a head's work is made of.

    Waits for the device.
    """
    sizes_I, sizes_J = _block_sizes(num_queries, full_BIJ), _block_sizes(num_keys, full_BIJ)
    places_J = torch.arange(full_BIJ.shape[2], device=full_BIJ.device)
    pairs = 0
    for num_BI, listed_BIJ in ((num_full_BI, full_BIJ), (num_partial_BI, partial_BIJ)):
        keys_BI = (sizes_J[listed_BIJ.long()] * (places_J < num_BI[..., None])).sum(-1)
        pairs += int((sizes_I * keys_BI).sum())
    return pairs


def _count_visible(
    lo_BN: Tensor, hi_BN: Tensor, seg_BN: Tensor | None, noise_BM: Tensor | None, num_keys: int
) -> Tensor:
    """How many keys of each block each query sees, (B, N, J)."""
    starts_J = torch.arange(0, num_keys, BLOCK, device=lo_BN.device, dtype=torch.int32)
    ends_J = (starts_J + BLOCK).clamp(max=num_keys)
    first_BNJ = lo_BN[..., None].clamp(starts_J, ends_J)
    last_BNJ = hi_BN[..., None].clamp(starts_J, ends_J)
    if noise_BM is None or seg_BN is None:
        return (last_BNJ - first_BNJ).clamp(min=0)
    # In the order of (noise, key) the clean keys stand together, as do the keys of each segment, so that two binary
    # searches count those of one kind between two keys, without a matrix of all pairs. A kind's last place is the next
    # kind's first.
    keys_M = torch.arange(num_keys, device=lo_BN.device)
    order_BM = (noise_BM.clamp(min=-1).long() * num_keys + keys_M).sort(-1).values

    def between(kind_BN: Tensor) -> Tensor:
        before_BNJ, until_BNJ = (
            torch.searchsorted(order_BM, (kind_BN[..., None].long() * num_keys + key_BNJ).flatten(1)).view_as(key_BNJ)
            for key_BNJ in (first_BNJ, last_BNJ)
        )
        return until_BNJ - before_BNJ

    clean_BNJ = between(torch.full_like(seg_BN, -1))
    own_BNJ = between(seg_BN.clamp(min=0)).masked_fill(seg_BN[..., None] < 0, 0)
    return (clean_BNJ + own_BNJ).clamp(min=0)


def _listed(blocks_BIJ: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are true, and the row's blocks with the true ones first, ascending."""
    num_blocks = blocks_BIJ.shape[-1]
    numbers_J = torch.arange(num_blocks, device=blocks_BIJ.device, dtype=torch.int32)
    ranked_BIJ = torch.where(blocks_BIJ, numbers_J, numbers_J + num_blocks).contiguous().sort(-1).values
    return blocks_BIJ.sum(-1, dtype=torch.int32).contiguous(), ranked_BIJ % num_blocks


def _run_bounds(values_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run of equal values that a token stands in begins, and the place after its end, int32."""
    num_tokens = values_BN.shape[1]
    tokens_N = torch.arange(num_tokens, device=values_BN.device, dtype=torch.int32)
    changes_BN = values_BN[:, 1:] != values_BN[:, :-1]
    begins_BN = F.pad(changes_BN, (1, 0), value=True)
    ends_BN = F.pad(changes_BN, (0, 1), value=True)
    starts_BN = torch.where(begins_BN, tokens_N, 0).cummax(-1).values
    stops_BN = torch.where(ends_BN, tokens_N + 1, num_tokens).flip(-1).cummin(-1).values.flip(-1)
    return starts_BN, stops_BN


def _block_sizes(num_tokens: int, like: Tensor) -> Tensor:
    starts = torch.arange(0, num_tokens, BLOCK, device=like.device)
    return (num_tokens - starts).clamp(max=BLOCK)


def _check(lo_BN: Tensor, hi_BN: Tensor, seg_BN: Tensor | None, noise_BM: Tensor | None, num_keys: int) -> None:
    if lo_BN.dim() != 2 or lo_BN.shape[1] == 0:
        raise ValueError(f"lo_BN has shape {tuple(lo_BN.shape)}: give (B, N) with at least one query")
    if num_keys < 1:
        raise ValueError(f"num_keys is {num_keys}: give at least one key")
    if (seg_BN is None) != (noise_BM is None):
        given, missing = ("seg_BN", "noise_BM") if noise_BM is None else ("noise_BM", "seg_BN")
        raise ValueError(f"{missing} is None, but {given} is given: give both, or neither for no noise rule")
    queries, keys = tuple(lo_BN.shape), (len(lo_BN), num_keys)
    expected = {"lo_BN": (lo_BN, queries), "hi_BN": (hi_BN, queries), "seg_BN": (seg_BN, queries)}
    for name, (value, shape) in {**expected, "noise_BM": (noise_BM, keys)}.items():
        if value is None:
            continue
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: with lo_BN of {queries} give {shape}")
        if value.dtype != torch.int32:
            raise ValueError(f"{name} is {value.dtype}: give torch.int32")
        if value.device != lo_BN.device:
            raise ValueError(f"{name} is on {value.device}, but lo_BN on {lo_BN.device}: give them one device")


def _check_bounds(lo_BN: Tensor, hi_BN: Tensor, num_keys: int) -> None:
    for name, value_BN in (("lo_BN", lo_BN), ("hi_BN", hi_BN)):
        wrong_BN = (value_BN < 0) | (value_BN > num_keys)
        if wrong_BN.any():
            record, query = wrong_BN.nonzero()[0].tolist()
            raise ValueError(f"{name}[{record}, {query}] is {int(value_BN[record, query])}: give 0 to {num_keys}")
