"""Captioned images as a unified model's microbatches: documents packed into rows of tokens.

A record gives a document for each task: its image told in words, its caption drawn. Public rows hold as many documents
as fit, over all ranks; a private row is one unit's and nobody else's. Documents' lengths are known before a step reads
anything, from the shards' index or from one reading at the start, so that every rank knows the whole step's rows, and
what its losses are divided by.
"""

# B rows of a microbatch, R records of a row, K noise draws a record, N tokens, F features of a patch,
# I images of a row, C channels, H x W image size
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kernels.moe import load_variation
from models.packed import Document, Layout, Packed, image_to_text, text_to_image
from models.tokenizer import Encoded, open_tokenizer
from models.unified import UnifiedConfig
from models.unified_objective import Losses, Totals, UnifiedObjective
from train.config import FinetuneStage, TrainStage
from train.config import Objective as ObjectiveSection
from train.data import Indices, ShardDataset
from train.images import upright_size
from train.metrics import plot_expert_load
from train.packing import Bucket, Portion, Row, bucket_of, fit_caption, image_buckets, pack, rows_of_units, share
from train.parallel import World
from train.randomness import Draws
from train.shards import Record
from train.step import Batches, Microbatch, Slots


def layout_of(config: UnifiedConfig) -> Layout:
    """How this model's documents become tokens."""
    return Layout(open_tokenizer(config.tokenizer), config.channels, config.patch_size)


def objective_of(section: ObjectiveSection) -> UnifiedObjective:
    """What a stage's `objective` section asks of a unified model."""
    return UnifiedObjective(
        flow={"prediction": section.prediction, "timesteps": section.timesteps},  # type: ignore[arg-type]
        patches_weight=section.patches_weight,
        balancing=section.balancing,
        balance_weight=section.balance_weight,
        z_weight=section.z_weight,
    )


DELIMITERS = 2  # of a text or an image


class Planned(NamedTuple):
    """A document before it is read."""

    record: int
    task: str
    bare: bool  # drawn without its caption, for guidance
    length: int


@dataclass(frozen=True, eq=False)
class Laid:
    """A microbatch in host memory: `slots_BR` are the records of each row."""

    slots_BR: Slots
    batch: Packed
    noise_BNF: Tensor
    times_BI: Tensor
    left_out: int  # documents that found no room in their unit's row


@dataclass(frozen=True, eq=False)
class Loaded:
    """This rank's microbatches of a step; `totals` are what there is to a unit, `flops` are of all ranks."""

    laid: list[Laid]
    totals: Totals
    flops: float


class Documents(Batches):
    """The losses of packed documents: a row's sums, over what the step has of each kind of token.

    Guarantee: which documents a step has, and what each of them meets, is a function of the step, whatever the world
    size. In a private stage a row is a function of its unit alone, and so is its loss: what it is divided by is the
    configuration's (where images have forms of their own, they may have a few patches less), and the number of the
    unit's records.
    """

    def __init__(self, stage: TrainStage, config: UnifiedConfig, world: World, dataset: ShardDataset) -> None:
        super().__init__(stage, config, world, dataset)
        assert stage.documents is not None, "checked against the model"
        self.config, self.section = config, stage.documents
        self.layout, self.objective = layout_of(config), objective_of(stage.objective)
        self.private = isinstance(stage, FinetuneStage)
        if self.private:
            self.objective.require_private()
        self.buckets = self._choose_buckets()
        self.kept, self.dropped, self.sizes = self._measure()
        caption = self.section.caption_tokens or config.max_caption_tokens
        tasks = self.section.tasks
        lengths = [self._length(task, round(caption), config.num_patches) for task in tasks]
        self.fixed_totals = Totals(
            caption + 1 if "image_to_text" in tasks else 1,
            stage.objective.noise_draws * config.num_patches if "text_to_image" in tasks else 1,
            sum(lengths),
        )
        self.unit_flops = float(sum(config.forward_flops(1, length) for length in lengths))
        self._tally = torch.zeros(5, dtype=torch.float64, device=world.device)
        self._load_LE: Tensor | None = None  # since `figures` was called, and what that told last
        self._told_LE: Tensor | None = None

    def require_fit(self) -> None:
        """Raise ValueError for records without a caption, and where a document may be longer than a row."""
        dataset = self.dataset
        if (without := np.flatnonzero(dataset.caption_bytes <= 0)).size:
            raise ValueError(
                f"{without.size} of {len(dataset)} records of split {dataset.split} have no caption, or an empty one, "
                f"such as {dataset.read(int(without[0])).key}: ingest them with captions, or without these records; "
                "where the filter's policy redacted all there was, have it fill or drop"
            )
        most = (self.config.max_caption_tokens, self.config.num_patches)
        longest = max(self._length(task, *most) for task in self.section.tasks)
        if longest > self.section.row_tokens:
            raise ValueError(
                f"documents.row_tokens is {self.section.row_tokens}, and a document may have {longest} tokens: raise "
                f"it, or lower model.max_caption_tokens ({self.config.max_caption_tokens}) or objective.noise_draws"
            )

    def load(self, step: int, slots: Slots) -> Loaded:
        by_record = iter(self._plan(step, slots[slots >= 0]))
        units = [list(chain.from_iterable(islice(by_record, num))) for num in (slots >= 0).sum(1).tolist()]
        if self.private:
            rows = rows_of_units([_lengths(unit) for unit in units], self.section.bounds or (self.section.row_tokens,))
            held = [[unit[place] for place in row.documents] for unit, row in zip(units, rows, strict=True)]
            totals, flops, of_rows = self.fixed_totals, len(slots) * self.unit_flops, slots
        else:
            documents = [document for unit in units for document in unit]
            rows = pack(_lengths(documents), self.section.row_tokens)
            held = [[documents[place] for place in row.documents] for row in rows]
            totals = self._counted(documents, len(slots))
            flops = sum(self.config.forward_flops(1, n) * times for n, times in Counter(_lengths(documents)).items())
            of_rows = _records_of(held)
        largest = self.stage.train.microbatch_size * self.section.row_tokens
        portions = share(rows, self.world.size, largest, 6 * self.config.width)[self.world.rank]
        mine = sorted({document.record for portion in portions for row in portion.rows for document in held[row]})
        sizes = [self._size(record) for record in mine]
        images, captions = self.dataset.cropped(mine, self.config.channels, sizes)
        read = {record: (images[n], self._encode(captions[n])) for n, record in enumerate(mine)}
        return Loaded([self._lay(step, portion, rows, held, of_rows, read) for portion in portions], totals, flops)

    def of(self, loaded: Loaded) -> Iterator[Microbatch]:
        """Each portion's rows; some of them are empty where other ranks have more."""
        device = self.world.device
        for number, laid in enumerate(loaded.laid):
            batch, noise, times = laid.batch.to(device), laid.noise_BNF.to(device), laid.times_BI.to(device)
            records_B = torch.from_numpy((laid.slots_BR >= 0).sum(1)).to(device)
            self._tally[4] += laid.left_out

            def losses(
                network: nn.Module, batch: Packed = batch, noise: Tensor = noise, times: Tensor = times,
                records_B: Tensor = records_B,
            ) -> Tensor:  # fmt: skip
                with self.autocast:
                    found = self.objective.losses(network, batch, noise, times)
                self._count(found, batch)
                loss_B = self.objective.weighed(found, loaded.totals)
                return loss_B / records_B.clamp(min=1) if self.private else loss_B

            yield Microbatch(records_B > 0, losses, number == len(loaded.laid) - 1, laid.slots_BR)

    # --- what is told ---

    def facts(self) -> Mapping[str, int]:
        """How many captions are cut short, and how many records left out because theirs are too long."""
        cut = int(((self.dropped > 0) & (self.kept >= 0)).sum())
        return {"captions_truncated": cut, "records_left_out": int((self.kept < 0).sum())}

    def figures(self) -> Mapping[str, float]:
        """Nats a text token, squared error a patch, documents left out, and, with routers, how uneven the experts' load
        is: its coefficient of variation among those of a modality, a mean over layers.
        """
        text, tokens, error, patches, left_out = self.world.sum(self._tally).tolist()
        found = {"text_loss": text / max(1.0, tokens), "patches_loss": error / max(1.0, patches)}
        found |= {"documents_left_out": left_out} if self.private else {}
        if self._load_LE is not None:
            self._told_LE = self.world.sum(self._load_LE).cpu()
            by_modality = self._told_LE.unflatten(1, (self.config.num_modalities, -1)).flatten(0, 1)
            found["expert_load_cv"] = float(torch.stack([load_variation(load_E) for load_E in by_modality]).mean())
        self._tally, self._load_LE = torch.zeros_like(self._tally), None
        return found

    def draw(self, folder: Path) -> list[Path]:
        """`expert_load.png`, where there are routers."""
        modalities = ("text", "image") if self.config.modality_experts else ("expert",)
        return [] if self._told_LE is None else [plot_expert_load(folder, self._told_LE.tolist(), modalities)]

    @torch.no_grad()
    def _count(self, found: Losses, batch: Packed) -> None:
        sums = (found.text_B, batch.weights_BN, found.patches_B, batch.learnt_patches_BN)
        self._tally[:4] += torch.stack([each.sum(dtype=torch.float64) for each in sums])
        if found.load_LE is not None:
            load_LE = found.load_LE.detach().double()
            self._load_LE = load_LE if self._load_LE is None else self._load_LE + load_LE

    # --- lengths, known before a step ---

    def _choose_buckets(self) -> tuple[Bucket, ...]:
        """The sizes that images may have, a function of the configuration alone. Raises ValueError for latents."""
        config = self.config
        if not self.section.buckets:
            return ((config.image_size, config.image_size),)
        if self.dataset.latents is not None:
            raise ValueError(
                f"documents.buckets is true, and data_from of {self.stage.name} is {self.stage.data_from}, which holds "
                "latents, all of one square: set it to false, or name the stage that they were made from"
            )
        return image_buckets(config.patch_size, config.num_patches)

    def _measure(self) -> tuple[Indices, Indices, Indices]:
        """Every record's tokens that are kept, -1 where it is to be left out, and that are dropped; int64 [records].
        And its image's height and width, int64 [records, 2].

        Records that must be read for that, all of them where images have several sizes, are read here, each by one
        rank; a call of all ranks together. Of an image only the header is looked at.
        """
        kept, dropped = self.dataset.caption_bytes.copy(), np.zeros(len(self.dataset), np.int64)
        sizes = np.tile(np.array(self.buckets[0], np.int64), (len(self.dataset), 1))
        by_bytes = self.config.tokenizer == "bytes"
        unread = (kept > (self.config.max_caption_tokens if by_bytes else -1)) | self.section.buckets
        mine = list[tuple[int, int, int, Bucket]]()
        for index in np.flatnonzero(unread).tolist()[self.world.rank :: self.world.size]:
            record = self.dataset.read(index)
            found, size = self._encode(record.caption), self._bucket(record)
            mine.append((index, -1, 0, size) if found is None else (index, len(found.tokens), found.num_dropped, size))
        for part in self.world.gather(mine):
            for index, num_kept, num_dropped, size in part:
                kept[index], dropped[index], sizes[index] = num_kept, num_dropped, size
        return kept, dropped, sizes

    def _bucket(self, record: Record) -> Bucket:
        """The size that the record's image is cropped to: a function of the image alone."""
        if not self.section.buckets:
            return self.buckets[0]
        try:
            return bucket_of(*upright_size(record.image), self.buckets)
        except ValueError as error:
            raise ValueError(f"record {record.key} of split {self.stage.split}: {error}: ingest it anew") from None

    def _encode(self, caption: str | None) -> Encoded | None:
        """The caption's tokens as the stage wants them, None where the record is to be left out."""
        most = self.config.max_caption_tokens
        return None if caption is None else fit_caption(self.layout.tokenizer, caption, 0, most, self.section.too_long)

    def _length(self, task: str, caption_tokens: int, num_patches: int) -> int:
        """Tokens of a document: a noised image comes once for each draw."""
        images = self.stage.objective.noise_draws if task == "text_to_image" else 1
        return caption_tokens + DELIMITERS + images * (num_patches + DELIMITERS)

    def _size(self, record: int) -> Bucket:
        height, width = self.sizes[record].tolist()
        return height, width

    def _num_patches(self, record: int) -> int:
        return math.prod(self._size(record)) // self.config.patch_size**2

    def _plan(self, step: int, records: Indices) -> list[list[Planned]]:
        """Each record's documents."""
        dropout = self.stage.objective.label_dropout
        draws = self.draws(step, records.tolist(), (0,), 1)  # of K draws the first decides
        planned = list[list[Planned]]()
        for record, dropped in zip(records.tolist(), (draws.dropout < dropout).tolist(), strict=True):
            num_patches, of_record = self._num_patches(record), list[Planned]()
            for task in self.section.tasks if self.kept[record] >= 0 else ():
                bare = dropped and task == "text_to_image"
                length = self._length(task, 0 if bare else int(self.kept[record]), num_patches)
                of_record.append(Planned(record, task, bare, length))
            planned.append(of_record)
        return planned

    def _counted(self, documents: Sequence[Planned], num_units: int) -> Totals:
        """What a step's documents have of each kind of token, for each of its units."""
        told = np.array([document.record for document in documents if document.task == "image_to_text"], np.int64)
        text = int((self.kept[told] + (self.dropped[told] == 0)).sum())
        drawn = sum(self._num_patches(document.record) for document in documents if document.task == "text_to_image")
        counts = (text, drawn * self.stage.objective.noise_draws, sum(_lengths(documents)))
        return Totals(*(max(1, count) / num_units for count in counts))  # they are divided by

    # --- rows ---

    def _lay(
        self, step: int, portion: Portion, rows: Sequence[Row], held: Sequence[list[Planned]], of_rows: Slots,
        read: Mapping[int, tuple[Tensor, Encoded | None]],
    ) -> Laid:  # fmt: skip
        """The portion's documents in their rows, with the noise and the times of their images."""
        num_draws, mine = self.stage.objective.noise_draws, list(portion.rows)
        planned = [held[row] for row in mine] + [[] for _ in range(portion.num_rows - len(mine))]
        batch = self.layout.pack(
            [[_document(each, num_draws, *read[each.record]) for each in row] for row in planned], portion.num_tokens
        )
        drawn = [[each.record for each in row if each.task == "text_to_image"] for row in planned]
        draws = [self._noise_draws(step, record) for row in drawn for record in row]
        noise_BNF, times_BI = torch.zeros_like(batch.patches_BNF), torch.zeros(batch.noised_BI.shape)
        if draws:  # as masks are read: row by row, and in a row from left to right
            noises = [self.layout.patchify(noise_CHW) for of_record in draws for noise_CHW in of_record.noise]
            noise_BNF[batch.learnt_patches_BN] = torch.cat(noises)
            times = torch.cat([of_record.timestep for of_record in draws])
            times_BI[batch.noised_BI] = self.objective.flow.sample_timesteps(times)
        slots_BR = np.full((len(planned), of_rows.shape[1]), -1, np.int64)
        slots_BR[: len(mine)] = of_rows[mine]
        return Laid(slots_BR, batch, noise_BNF, times_BI, sum(len(rows[row].left_out) for row in mine))

    def _noise_draws(self, step: int, record: int) -> Draws:
        """The noise and the times of the record's image, which comes K times."""
        shape = (self.config.channels, *self._size(record))
        return self.draws(step, [record], shape, self.stage.objective.noise_draws)


def _document(planned: Planned, num_draws: int, image: Tensor, caption: Encoded | None) -> Document:
    assert caption is not None, "a record whose caption is left out has no documents"
    if planned.task == "image_to_text":
        return image_to_text(image, caption.tokens, whole=not caption.num_dropped)
    return text_to_image([] if planned.bare else caption.tokens, image, num_draws)


def _lengths(documents: Sequence[Planned]) -> list[int]:
    return [document.length for document in documents]


def _records_of(held: Sequence[Sequence[Planned]]) -> Slots:
    """The records of each row, -1 behind them."""
    records = [sorted({document.record for document in row}) for row in held]
    slots = np.full((len(records), max(map(len, records), default=1)), -1, np.int64)
    for row, found in enumerate(records):
        slots[row, : len(found)] = found
    return slots
