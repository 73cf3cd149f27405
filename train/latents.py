"""What the latents stage does, as tasks: a shard of images in, a shard of latents out, by any number of workers.

    vae/                                          the autoencoder, as `diffusers` stores one
    <split>/<split>-00003.tar, .index.jsonl       see train.latent_shards
    <split>/<split>-00003.latents.json            written last: see privacy.pii.latent_manifests
    <split>/latents.json                          of the second round: what the public split's shards say of its latents

Latents are the posteriors' means; docs/decisions/016-latents.md says why.
"""

# B records, C channels, H = W image size, c latent channels, h x w latents
from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, PrivateAttr

from models.vae import VAE
from privacy.pii.latent_manifests import SUFFIX, LatentManifest
from privacy.pii.manifests import ManifestError, merkle_root, read_leaf, read_leaves
from train.autoencoding import VAE_FOLDER, Decoder, load_vae, save_vae, vae_digest
from train.data import ShardDataset
from train.filter_job import InputShard, batches
from train.filtering import input_shards
from train.images import ImageError, pixels
from train.latent_shards import HEADER, SPLIT_OF_STATISTICS, LatentHeader, read_header, to_npy
from train.shards import Record, ShardError, index_name, root_of, write_shard
from train.tasks import (
    LEASE,
    WORK,
    Task,
    aside,
    commit,
    digest_of,
    file_digest,
    leases,
    mendable,
    open_job,
    require_open,
)

# Part of every task's id. Raise it where this code makes other shards of the same input and VAE.
FORMAT = 3

_LEAST_STD = 1e-6
_SHOWN = 256
# Always, were it with blank images: a convolution's rounding hangs on how many go through it together, and a record's
# latents would hang on which others there are.
_BATCH = 64
_FILES = (".tar", ".index.jsonl", SUFFIX)


@dataclass(frozen=True)
class _ShardTask(Task):
    shard: InputShard


@dataclass(frozen=True)
class _HeaderTask(Task):
    split: str


class LatentsJob(BaseModel):
    """All that a worker needs, in any process, as JSON. `plan_latents` makes it.

    Guarantee: the shards are a function of the input and the VAE, whoever makes them and however often they were begun;
    to the byte on machines of one kind, for CPUs and GPUs round a convolution each in their own way. Mean and deviation
    are of the public split: no record of another has any part in them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["latents"] = "latents"
    folder: Path
    shards: tuple[InputShard, ...]
    vae: str  # its digest
    shape: tuple[int, int, int]  # of one image's latents

    _model: VAE | None = PrivateAttr(None)
    _done: dict[str, LatentManifest] = PrivateAttr(default_factory=lambda: {})  # by task, as of the last `look`

    @property
    def path(self) -> Path:
        """Where the job's file lies while it may be worked on; its name binds all that decides the shards."""
        ids = [self._shard_id(shard) for shard in self.shards]
        return self.folder / WORK / f"job-{digest_of(ids).removeprefix('blake3:')[:16]}.json"

    @property
    def splits(self) -> list[str]:
        """In the order in which they were named."""
        return list(dict.fromkeys(shard.split for shard in self.shards))

    def begin(self) -> None:
        """Open the folder to workers of this job and of no other; a shard of which a byte has changed is undone."""
        open_job(self.path, self.model_dump_json().encode())
        for task in self._shard_tasks():
            made = self._standing(task)
            if made is not None and not _whole(made, self._output(task)):
                self._output(task, SUFFIX).unlink()

    def finish(self) -> dict[str, list[LatentManifest]]:
        """The shards of each split, once every task is done; tidies the folder up."""
        shards: dict[str, list[LatentManifest]] = {split: [] for split in self.splits}
        for task in self._shard_tasks():
            made = self._standing(task)
            if made is None:
                raise ValueError(f"{self._output(task)}: the shard was changed while the stage ran: run it again")
            shards[task.shard.split].append(made)
        ours = {self._output(task, suffix) for task in self._shard_tasks() for suffix in _FILES}
        for path in {path for suffix in (*_FILES, LEASE) for path in self.folder.glob(f"[!.]*/*{suffix}")} - ours:
            path.unlink(missing_ok=True)  # of earlier jobs
        shutil.rmtree(self.folder / WORK, ignore_errors=True)
        return shards

    # --- the tasks: train.tasks.Job ---

    def tasks(self) -> list[Task]:
        """Every shard, and then what they have in common."""
        return [*self._shard_tasks(), *(_HeaderTask(1, f"{split}/latents", 0, split) for split in self.splits)]

    def done(self, task: Task) -> bool:
        """Whether the task's output stands, by its mark and its size: `begin` looks at every byte."""
        if isinstance(task, _ShardTask):
            return self._standing(task) is not None
        header = self._output(task, ".json")
        return header.exists() and header.read_bytes() == self._header().content()

    def run(self, task: Task, beat: Callable[[int], None]) -> None:
        """Do a task to its commit. ValueError where the folder was given to another job meanwhile."""
        require_open(self.path)
        with aside(self.folder) as files:
            if isinstance(task, _ShardTask):
                self._encode(task, files, beat)
            else:
                (files / HEADER).write_bytes(self._header().content())
            beat(task.records)
            require_open(self.path)
            commit(files, self._output(task), SUFFIX if isinstance(task, _ShardTask) else ".json")

    def look(self) -> tuple[int, int]:
        """Records done, of how many."""
        held: list[str] = []
        for task in self._shard_tasks():
            if task.name not in self._done:
                made = self._standing(task)
                if made is None:
                    held.append(task.name)
                else:
                    self._done[task.name] = made
        return sum(self.counts().values()) + leases(self.folder, held), sum(shard.records for shard in self.shards)

    def counts(self) -> dict[str, int]:
        """Records in the shards that are done, as of the last `look`."""
        return {"encoded": sum(made.records for made in self._done.values())}

    def close(self) -> None:
        """Let go of the VAE."""
        self._model = None

    def _shard_tasks(self) -> list[_ShardTask]:
        return [_ShardTask(0, f"{shard.split}/{shard.name}", shard.records, shard) for shard in self.shards]

    # --- a shard through the VAE ---

    def _encode(self, task: _ShardTask, files: Path, beat: Callable[[int], None]) -> None:
        sums, done = np.zeros((2, self.shape[0])), 0

        def encoded() -> Iterator[Record]:
            nonlocal sums, done
            for batch in batches(task.shard.tar, _BATCH):
                records = [_whole_record(task.shard, key, record) for key, record in batch]
                latents_Bchw = self._latents(records)
                exact = latents_Bchw.astype(np.float64)
                sums += np.stack([exact.sum((0, 2, 3)), (exact**2).sum((0, 2, 3))])
                for record, latents in zip(records, latents_Bchw, strict=True):
                    yield replace(record, image=to_npy(latents), svg=None)
                done += len(records)
                beat(done)

        tar = files / f"{task.shard.name}.tar"
        digests = write_shard(tar, encoded())
        public = task.shard.split == SPLIT_OF_STATISTICS
        made = LatentManifest(
            task=self._shard_id(task.shard),
            split=task.shard.split,
            shard=task.shard.name,
            made_from=task.shard.tar.stem,
            source=task.shard.digest,
            vae=self.vae,
            records=len(digests),
            bytes=tar.stat().st_size,
            root=root_of(digests),
            tar=file_digest(tar),
            index=file_digest(Path(index_name(str(tar)))),
            sums=tuple(sums[0].tolist()) if public else None,
            square_sums=tuple(sums[1].tolist()) if public else None,
        )
        (files / f"{task.shard.name}{SUFFIX}").write_bytes(made.leaf())

    def _latents(self, records: Sequence[Record]) -> np.ndarray[Any, np.dtype[np.float16]]:
        """The posterior's mean of each record's image, float16 [B, c, h, w]."""
        model = self._vae()
        config = model.config
        images = np.zeros((_BATCH, config.channels, config.image_size, config.image_size), np.uint8)
        for place, record in enumerate(records):
            try:
                images[place] = pixels(record.image, config.channels, *images.shape[2:])
            except ImageError as error:
                raise ShardError(f"record {record.key}: {error.reason}: ingest it anew") from None
        device = next(model.parameters()).device
        with torch.no_grad(), _same_rounding():
            mean, _ = model.encode(torch.from_numpy(images).to(device).float().div_(127.5).sub_(1))
        stored = mean[: len(records)].half()
        if not bool(torch.isfinite(stored).all()):
            place = int((~torch.isfinite(stored)).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"record {records[place].key} encodes to what float16 cannot hold: take another VAE")
        return stored.cpu().numpy()

    def _vae(self) -> VAE:
        if self._model is None:
            model = load_vae(self.folder / VAE_FOLDER)
            if vae_digest(model) != self.vae:
                raise ValueError(f"{self.folder / VAE_FOLDER} is not the VAE that the stage began with: run it again")
            self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        return self._model

    # --- what stands ---

    def _standing(self, task: _ShardTask) -> LatentManifest | None:
        """What the mark of a task's output says, where it is of this very task and its files are there."""
        try:
            made = read_leaf(LatentManifest, self._output(task, SUFFIX))
            there = self._output(task, ".tar").stat().st_size == made.bytes
        except (OSError, ManifestError):
            return None
        there = there and self._output(task, ".index.jsonl").exists()
        return made if there and made.task == self._shard_id(task.shard) else None

    def _header(self) -> LatentHeader:
        """Of the shards of the public split alone; they are done."""
        public = [self._standing(task) for task in self._shard_tasks() if task.shard.split == SPLIT_OF_STATISTICS]
        made = [shard for shard in public if shard is not None]
        assert made
        assert len(made) == len(public), "the round before is done"
        records, (_, height, width) = sum(shard.records for shard in made), self.shape
        # fsum: the same whatever the order of the shards; float64 sums of float16 values lose nothing that shows
        means, squares = (
            [math.fsum(values) / (records * height * width) for values in zip(*columns, strict=True)]
            for columns in ([shard.sums or () for shard in made], [shard.square_sums or () for shard in made])
        )
        std = [math.sqrt(max(0.0, square - mean**2)) for mean, square in zip(means, squares, strict=True)]
        if (least := min(std)) < _LEAST_STD:
            raise ValueError(
                f"channel {std.index(least)} of the latents is the same all over the public split: the VAE leaves it "
                "unused; give it fewer latent_channels, or a lower objective.kl_weight"
            )
        return LatentHeader(
            vae=self.vae,
            shape=self.shape,
            mean=tuple(means),
            std=tuple(std),
            public_records=records,
            public_root=digest_of([shard.root for shard in made]),
        )

    def _shard_id(self, shard: InputShard) -> str:
        return digest_of(FORMAT, shard.split, shard.name, shard.digest, self.vae)

    def _output(self, task: Task, suffix: str = "") -> Path:
        return self.folder / f"{task.name}{suffix}"


def plan_latents(in_dir: Path, folder: Path, splits: Sequence[str], vae: VAE) -> LatentsJob:
    """The job that encodes `in_dir/<split>` into `folder/<split>`; reads the indexes and no record, and writes the VAE.

    Raises ValueError where there is no public split, and ShardError where the input is not whole.
    """
    if SPLIT_OF_STATISTICS not in splits:
        raise ValueError(
            f"{in_dir} has no {SPLIT_OF_STATISTICS} split ({', '.join(splits)}): mean and deviation of the latents are "
            "of it alone; ingest one"
        )
    digest, place = vae_digest(vae), folder.absolute() / VAE_FOLDER
    if not place.exists() or _digest_in(place) != digest:
        save_vae(place, vae)
    shards = tuple(shard for split in splits for shard in input_shards(in_dir.absolute(), split))
    return LatentsJob(folder=folder.absolute(), shards=shards, vae=digest, shape=vae.config.latent_shape)


def encode_shards(job: LatentsJob, run: Callable[[LatentsJob], None]) -> dict[str, Any]:
    """Have `run` do every task of `job`, and return the stage's metrics; begun again, it goes on where it was.

    metrics: splits -> {records, bytes, shards, root}; shards_root: the Merkle root over the shards' manifests; vae: its
    digest; shape; mean and std by channel.
    """
    with mendable(job.folder):
        job.begin()
        run(job)
        shards = job.finish()
    header = read_header(fsspec.filesystem("file"), str(job.folder / SPLIT_OF_STATISTICS))
    assert header is not None
    return {
        "splits": {split: _split(job.folder / split, made) for split, made in shards.items()},
        "shards_root": merkle_root([manifest.leaf() for manifest in read_leaves(LatentManifest, job.folder)]),
        **header.model_dump(mode="json", include={"vae", "shape", "mean", "std"}),
    }


def reconstruction_psnr(images: ShardDataset, latents: ShardDataset, decode: Decoder) -> float:
    """Peak signal-to-noise ratio, in dB, of what decoding stored latents gives back, over _SHOWN records of a split."""
    chosen = np.linspace(0, len(images) - 1, min(_SHOWN, len(images))).astype(np.int64)
    image_shape, latent_shape = decode.image_shape, decode.vae.config.latent_shape
    real, _ = images.captioned(chosen, image_shape[0], image_shape[1])
    stored, _ = latents.captioned(chosen, latent_shape[0], latent_shape[1])
    return float(10 * torch.log10(4 / (decode(stored) - real).square().mean()))


def _split(folder: Path, made: Sequence[LatentManifest]) -> dict[str, Any]:
    """The metrics of one split."""
    root = ShardDataset(folder, folder.name).root
    records, size = sum(shard.records for shard in made), sum(shard.bytes for shard in made)
    return {"records": records, "bytes": size, "shards": len(made), "root": root}


def _digest_in(folder: Path) -> str | None:
    try:
        return vae_digest(load_vae(folder))
    except ValueError:
        return None


def _whole_record(shard: InputShard, key: str, record: Record | None) -> Record:
    if record is None:
        raise ShardError(f"{shard.tar}: record {key} was changed: restore the shard, or make it anew")
    return record


def _whole(made: LatentManifest, place: Path) -> bool:
    """Whether the files beside a mark are, to the byte, those that it names."""
    return file_digest(Path(f"{place}.tar")) == made.tar and file_digest(Path(f"{place}.index.jsonl")) == made.index


@contextmanager
def _same_rounding() -> Iterator[None]:
    """One thread, for each worker has a core, and sums are then in one order; on GPUs one way to convolve."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(threads)
