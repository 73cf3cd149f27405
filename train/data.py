"""Reading shards: random access verified at every read, the order of public batches, loading one step ahead."""

# B records, C channels, H x W image size (H = W but for `cropped`)
from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, NamedTuple, Self, TypeVar

import fsspec
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from train.images import ImageError, pixels
from train.latent_shards import LatentHeader, read_header
from train.shards import Record, ShardError, extent, find_shards, index_name, parse_entry, root_of, verified

Indices = NDArray[np.int64]
Loaded = TypeVar("Loaded")


class ShardDataset:
    """Random access to the records of one split, in the shards' order; `folder` is local or any fsspec URL.

    Opening reads the indexes alone. A record is fetched by a range read and checked against its digest every time.

    root: binds every record's key, unit, image, class, caption and drawing, in order.
    labels: int64 [records], -1 where a record has no class.
    caption_bytes: int64 [records], the length of each record's caption in UTF-8, -1 where it has none.
    units: the privacy units, sorted, each once; unit_of: int64 [records], each record's place in `units`.
    latents: what the records of a split of latents have in common; None where they are images. As images of a record,
        float32 [C, H, W], such a split gives its latents, of mean 0 and deviation 1 a channel over the public split.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.split = split
        self._fs, self._folder = fsspec.core.url_to_fs(str(folder))
        self.latents = read_header(self._fs, self._folder)
        self._tars: list[str] = []
        self._lines: list[bytes] = []  # parsed again when read: millions of parsed entries would not fit in memory
        self._digests: list[str] = []
        keys, units, labels, shards, captions = list[str](), list[str](), list[int](), list[int](), list[int]()
        for shard, (tar, size) in enumerate(find_shards(self._fs, self._folder, split)):
            self._tars.append(tar)
            index = index_name(tar)
            for number, line in enumerate(self._fs.cat_file(index).splitlines(), 1):
                entry = parse_entry(line, f"{index}, line {number}")
                if (end := extent(entry)[1]) > size:
                    raise ShardError(f"{tar} is truncated at byte {size}: record {entry['key']} ends at byte {end}")
                self._lines.append(line)
                self._digests.append(entry["digest"])
                keys.append(entry["key"])
                units.append(entry["unit"])
                labels.append(-1 if entry["label"] is None else entry["label"])
                captions.append(entry["members"].get("txt", (0, -1))[1])
                shards.append(shard)
        key, times = Counter(keys).most_common(1)[0] if keys else ("", 0)
        if times != 1:
            told = f"key {key!r} occurs {times} times: keys must be unique" if keys else "the indexes are empty"
            raise ShardError(f"{self._folder}: {told}: run the ingest stage again")
        self._shards = np.array(shards, np.int32)
        self.root = root_of(self._digests)
        self.labels: Indices = np.array(labels, np.int64)
        self.caption_bytes: Indices = np.array(captions, np.int64)
        self.units: list[str] = sorted(set(units))
        place = {unit: number for number, unit in enumerate(self.units)}
        self.unit_of: Indices = np.array([place[unit] for unit in units], np.int64)

    def __len__(self) -> int:
        return len(self._lines)

    def digest(self, index: int) -> str:
        """The digest of a record's key and members, "blake3:" and 64 hex digits."""
        return self._digests[index]

    def read(self, index: int) -> Record:
        """One record, verified; ShardError names the file and the byte where it is not what was ingested."""
        return self._read([index])[0]

    def batch(self, indices: ArrayLike, channels: int, image_size: int) -> tuple[Tensor, Tensor]:
        """Images float32 [B, C, H, W] in [-1, 1] and labels int64 [B]; B may be 0.

        Images of another size are centre-cropped and resized. A record without a class is refused.
        """
        chosen = np.asarray(indices, np.int64).reshape(-1)
        labels = self.labels[chosen]
        if (bare := chosen[labels < 0]).size:
            raise ValueError(f"record {self.read(bare[0]).key} of split {self.split} has no class: ingest it with one")
        images = self._images(self._read(chosen.tolist()), channels, image_size, image_size)
        return images, torch.from_numpy(labels)

    def captioned(self, indices: ArrayLike, channels: int, image_size: int) -> tuple[Tensor, list[str | None]]:
        """Images as `batch` gives them, and captions, None where a record has none."""
        records = self._read(np.asarray(indices, np.int64).reshape(-1).tolist())
        images = self._images(records, channels, image_size, image_size)
        return images, [record.caption for record in records]

    def cropped(
        self, indices: ArrayLike, channels: int, sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Tensor], list[str | None]]:
        """As `captioned`, each image of a height and a width of its own."""
        records = self._read(np.asarray(indices, np.int64).reshape(-1).tolist())
        images = [self._images([record], channels, *size)[0] for record, size in zip(records, sizes, strict=True)]
        return images, [record.caption for record in records]

    def _images(self, records: Sequence[Record], channels: int, height: int, width: int) -> Tensor:
        if self.latents is not None:
            return self._normalised(self.latents, records, (channels, height, width))
        images = np.empty((len(records), channels, height, width), np.uint8)
        for place, record in enumerate(records):
            try:
                images[place] = pixels(record.image, channels, height, width)
            except ImageError as error:
                raise ShardError(f"record {record.key} of split {self.split}: {error.reason}: ingest it anew") from None
        return torch.from_numpy(images).float().div_(127.5).sub_(1)

    def _normalised(self, header: LatentHeader, records: Sequence[Record], asked: tuple[int, int, int]) -> Tensor:
        if asked != header.shape:
            raise ValueError(
                f"split {self.split} in {self._folder} holds latents of shape {header.shape}, not {asked}: "
                f"set model.channels to {header.shape[0]} and model.image_size to {header.shape[1]}"
            )
        latents = np.empty((len(records), *asked), np.float32)
        for place, record in enumerate(records):
            try:
                latents[place] = header.normalised(record.image)
            except ShardError as error:
                raise ShardError(
                    f"record {record.key} of split {self.split}: {error}: run the latents stage anew"
                ) from None
        return torch.from_numpy(latents)

    def _read(self, indices: Sequence[int]) -> list[Record]:
        if not indices:
            return []
        entries = [parse_entry(self._lines[index], self._folder) for index in indices]
        tars = [self._tars[self._shards[index]] for index in indices]
        starts, ends = zip(*map(extent, entries), strict=True)
        try:
            blocks = self._fs.cat_ranges(tars, list(starts), list(ends), on_error="raise")
        except FileNotFoundError as error:
            raise ShardError(f"{error.filename or error} is missing: restore it or ingest again") from None
        return [verified(*found) for found in zip(entries, blocks, tars, strict=True)]


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> Indices:
    """A permutation of range(n), a function of its arguments alone; read-only, int64.

    Philox's raw words are fixed by its definition; NumPy promises no such thing for `Generator.permutation`.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


def public_batch(seed: int, step: int, batch_size: int, n: int) -> Indices:
    """The records of a non-private step, int64 [batch_size]: shuffled epochs laid end to end, nothing dropped."""
    if n < 1 or batch_size < 1:
        raise ValueError(f"a batch of {batch_size} from {n} records: both must be at least 1")
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // n
    return np.concatenate(
        [epoch_order(seed, int(epoch), n)[places[epochs == epoch] % n] for epoch in np.unique(epochs)]
    )


class Batch(NamedTuple):
    """A step's records: indices int64 [B], images float32 [B, C, H, W] in [-1, 1], labels int64 [B]."""

    indices: Indices
    images: Tensor
    labels: Tensor


class Prefetcher(Generic[Loaded]):
    """Loads step + 1 in one background thread while step computes.

    `load(step)` is called ahead of its step, so it must be a pure function. What fails in the thread is raised by the
    `fetch` of that step.
    """

    def __init__(self, load: Callable[[int], Loaded], num_steps: int) -> None:
        self._load, self._num_steps = load, num_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[Loaded]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fetch(self, step: int) -> Loaded:
        """What the step loads; begins to load the one after, if there is one."""
        if self._ahead is not None and self._ahead[0] == step:
            loading = self._ahead[1]
        else:
            loading = self._thread.submit(self._load, step)
        self._ahead = None
        loaded = loading.result()
        if step + 1 < self._num_steps:
            self._ahead = (step + 1, self._thread.submit(self._load, step + 1))
        return loaded

    def close(self) -> None:
        """Wait for the thread to end; what it loaded is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
