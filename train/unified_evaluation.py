"""How well a unified model tells images in words and draws what words say: stage `eval_unified`.

    figures = measure(model, objective, records, "test", judges, settings, progress)
    figures.rows        # captions_exact.test, bits_per_byte.test, shapes_recognised.test, frechet_distance.test, ...

Every figure is a function of weights, records and seed. Where real images can stand in for generated ones, the same
figure for them stands beside it (`..._real`): the floor of a distance, the ceiling of a share.

Privacy: what is computed is a function of the records it is given, beside the model: of public and held-out public
ones the figures are free.
"""

# N records, C channels, S image side
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.dit import DiTConfig
from models.packed import Document, Image, Text, image_to_text
from models.unified import Unified, UnifiedConfig
from models.unified_objective import UnifiedObjective
from privacy.pii.measuring import Share
from train.autoencoding import Decoder, decoder_of
from train.config import EvalUnifiedStage
from train.data import ShardDataset, epoch_order
from train.documents import layout_of
from train.evaluation import Classifier, Note, frechet_distance, image_grid, train_classifier
from train.generation import draw, write
from train.measurements import Row
from train.retrieval import DualEncoder, train_encoder
from train.run_folder import RunFolder
from train.shapes import Scene, recognise, scene_of

Progress = Callable[[int, str], None]
"""Told how many captions and images are done, and what is under way."""

_GREEN, _RED, _GREY = "#117733", "#cc3311", "#444444"
_SHOWN = 5  # captions of each kind, good and bad


class Records(NamedTuple):
    """Captioned images: as the model reads them, and as pixels (the same, but for a model of latents)."""

    inputs: Tensor
    pixels: Tensor  # [N, C, S, S] in [-1, 1]
    captions: list[str]

    def part(self, start: int, stop: int) -> Records:
        """The records from `start` up to `stop`."""
        return Records(self.inputs[start:stop], self.pixels[start:stop], self.captions[start:stop])


@dataclass(frozen=True)
class Source:
    """Where a stage's records lie: `data` holds what the model reads, and `pixels` the same records as images.

    For a model of latents the two differ, and `decode` makes images of its own ones.
    """

    data: Path
    pixels: Path
    decode: Decoder | None = None

    @classmethod
    def of(cls, run: RunFolder, stage_name: str) -> Source:
        """That of a finished stage of data."""
        data, decode = run.path / stage_name, decoder_of(run, stage_name)
        if decode is None:
            return cls(data, data)
        manifest = run.read_manifest(stage_name)
        assert manifest is not None
        return cls(data, run.path / manifest["config"]["data_from"], decode)

    def pixels_shape(self, config: DiTConfig | UnifiedConfig) -> tuple[int, int]:
        """Channels and side of the images that a model draws."""
        return (config.channels, config.image_size) if self.decode is None else self.decode.image_shape[:2]

    def records(self, split: str, number: int, seed: int, config: UnifiedConfig) -> Records:
        """Up to `number` of a split's captioned records, drawn by `seed`. Raises ValueError where there are none."""
        dataset = ShardDataset(self.data / split, split)
        captioned = np.flatnonzero(dataset.caption_bytes > 0)
        if not len(captioned):
            raise ValueError(f"split {split} of {self.data} has no captions: give captioned images, or leave it out")
        chosen = captioned[epoch_order(seed, 0, len(captioned))[:number]]
        inputs, captions = dataset.captioned(chosen, config.channels, config.image_size)
        images = inputs
        if self.decode is not None:
            images, _ = ShardDataset(self.pixels / split, split).captioned(chosen, *self.pixels_shape(config))
        return Records(inputs, images, [caption or "" for caption in captions])

    def judges(self, stage: EvalUnifiedStage, config: UnifiedConfig) -> Judges:
        """Trained on the public split, on up to `stage.reference_images` of its records."""
        public = ShardDataset(self.pixels / "public", "public")
        chosen = epoch_order(stage.seed, 0, len(public))[: stage.reference_images]
        classifier = None
        if (public.labels[chosen] >= 0).all():
            classifier = train_classifier(*public.batch(chosen, *self.pixels_shape(config)), stage.seed)
        encoder = None
        if stage.retrieval:
            captioned = self.records("public", stage.reference_images, stage.seed, config)
            encoder = train_encoder(captioned.pixels, captioned.captions, stage.seed)
        return Judges(classifier, encoder)


@dataclass(frozen=True)
class Judges:
    """What was trained on public images to judge by: no classifier where these have no classes, no encoder where the
    stage asks for no retrieval."""

    classifier: Classifier | None
    encoder: DualEncoder | None

    def sha256(self) -> dict[str, str | None]:
        """Of their weights: what tells one judge from another."""
        judges = {"classifier_sha256": self.classifier, "encoder_sha256": self.encoder}
        return {name: None if judge is None else judge.sha256 for name, judge in judges.items()}


@dataclass(frozen=True)
class Measured:
    """What a model made of one split's records, and its figures."""

    rows: list[Row]
    told: Records
    written: list[str]  # of the records told
    asked: Records
    drawn: Tensor  # of the records asked
    right: list[bool] | None  # whether form and colour are those asked for; None where captions are of no shapes

    def show_samples(self, path: Path, title: str, number: int = 16) -> Path:
        """A grid of drawn images above what was asked for, marked where it is told whether they show it."""
        captions = self.asked.captions
        notes = [[(caption, _GREY)] for caption in captions]
        if self.right is not None:
            notes = [[_marked(caption, right)] for caption, right in zip(captions, self.right, strict=True)]
        return image_grid(self.drawn[:number], 8, path, title, notes[:number])

    def show_captions(self, path: Path, title: str) -> Path:
        """Up to ten images with what was written of them: five right and five wrong ones, where there are as many."""
        exact = [text == caption for text, caption in zip(self.written, self.told.captions, strict=True)]
        good = [n for n, right in enumerate(exact) if right]
        bad = [n for n, right in enumerate(exact) if not right]
        num_good = max(_SHOWN, 2 * _SHOWN - len(bad))
        chosen = good[:num_good] + bad[: 2 * _SHOWN - len(good[:num_good])]
        notes: list[list[Note]] = [
            [_marked(self.written[n], exact[n]), *([] if exact[n] else [(self.told.captions[n], _GREY)])]
            for n in chosen
        ]
        return image_grid(self.told.pixels[chosen], _SHOWN, path, title, notes)


def measure(
    model: Unified,
    objective: UnifiedObjective,
    stage: EvalUnifiedStage,
    split: str,
    source: Source,
    judges: Judges,
    progress: Progress,
) -> Measured:
    """Tell records of the split in words, draw what captions of it say, and measure both.

    captions_exact: share of the greedy captions that are the record's, to the letter.
    bits_per_byte: cross-entropy of the records' captions, each token given those before it, over their UTF-8 bytes.
    shapes_recognised, scenes_recognised: share of the drawn images in which `train.shapes.recognise` sees the form and
    the colour asked for, or all that was asked for; measured where all captions are of scenes.
    frechet_distance: between the classifier's features of drawn images and of up to `stage.reference_images` others of
    the split, whose captions were not drawn; `_real` is that of the images whose captions were.
    recall_at_K: share of the captions that find the image drawn of them among K (`train.retrieval`), beside chance.
    """
    number = max(stage.captions, stage.images + stage.reference_images)
    records = source.records(split, number, stage.seed, model.config)
    told, asked = records.part(0, stage.captions), records.part(0, stage.images)
    written = write(
        model,
        [[Image(image)] for image in told.inputs],
        batch_size=stage.batch_size,
        progress=lambda done: progress(done, f"captions of {split} images"),
    )
    exact = Share(sum(text == caption for text, caption in zip(written, told.captions, strict=True)), len(written))
    rows = [
        _share(f"captions_exact.{split}", exact),
        Row(name=f"bits_per_byte.{split}", value=bits_per_byte(model, told, stage.batch_size), unit="bits"),
    ]
    drawn = draw(
        model,
        objective,
        [prompt(model, caption) for caption in asked.captions],
        seed=stage.seed,
        sampler=stage.sampler,
        steps=stage.sampler_steps,
        guidance=stage.guidance,
        decode=source.decode,
        batch_size=stage.batch_size,
        progress=lambda done: progress(len(written) + done, f"images of {split} captions"),
    )
    right, of_shapes = recognised(drawn, asked, split)
    rows += of_shapes
    others = records.pixels[stage.images :]
    if judges.classifier is not None and min(len(others), len(drawn)) > 1:
        reference = judges.classifier.features(others)
        for suffix, images in (("", drawn), ("_real", asked.pixels)):
            distance = frechet_distance(judges.classifier.features(images), reference)
            rows.append(Row(name=f"frechet_distance{suffix}.{split}", value=distance, unit="of features"))
    if judges.encoder is not None:
        for suffix, images in (("", drawn), ("_real", asked.pixels)):
            for name, share in judges.encoder.recall(images, asked.captions).items():
                if not (suffix and name.endswith("_chance")):
                    rows.append(Row(name=f"{name}{suffix}.{split}", value=share, unit="share of captions"))
    return Measured(rows, told, written, asked, drawn, right)


def prompt(model: Unified, caption: str) -> Document:
    """The document that an image of the caption goes on with; too long a caption is cut, as in training."""
    tokenizer = layout_of(model.config).tokenizer
    return [Text(tokenizer.encode(caption, max_tokens=model.config.max_caption_tokens).tokens)]


@torch.no_grad()
def bits_per_byte(model: Unified, records: Records, batch_size: int) -> float:
    """Cross-entropy of the captions given their images, in bits over their UTF-8 bytes; each caption's end counts.

    A caption that is too long counts with the tokens, and bytes, that training leaves of it.
    """
    layout, device = layout_of(model.config), model.embed.weight.device
    nats, num_bytes = 0.0, 0
    for start in range(0, len(records.captions), batch_size):
        part = records.part(start, start + batch_size)
        kept = [layout.tokenizer.encode(text, max_tokens=model.config.max_caption_tokens) for text in part.captions]
        rows = [
            [image_to_text(image, each.tokens, whole=not each.num_dropped)]
            for image, each in zip(part.inputs, kept, strict=True)
        ]
        batch = layout.pack(rows).to(device)
        times_BI = torch.zeros(batch.noised_BI.shape, device=device)
        losses = UnifiedObjective().losses(model, batch, torch.zeros_like(batch.patches_BNF), times_BI)
        nats += float(losses.text_B.double().sum())
        left = [
            layout.tokenizer.decode(each.tokens) if each.num_dropped else caption
            for each, caption in zip(kept, part.captions, strict=True)
        ]
        num_bytes += sum(len(caption.encode()) for caption in left)
    return nats / math.log(2) / num_bytes


def recognised(drawn: Tensor, asked: Records, split: str) -> tuple[list[bool] | None, list[Row]]:
    """Of each drawn image whether it shows the form and colour asked for, and the figures; None and no figures where a
    caption is of no scene."""
    scenes = [scene_of(caption) for caption in asked.captions]
    if not all(scenes):
        return None, []
    rows: list[Row] = []
    right: list[bool] = []
    for suffix, images in (("_real", asked.pixels), ("", drawn)):
        seen = [_seen(image) for image in images]
        pairs = list(zip(seen, scenes, strict=True))
        right = [_kind(found) == _kind(scene) for found, scene in pairs]
        rows += [
            _share(f"shapes_recognised{suffix}.{split}", Share(sum(right), len(right))),
            _share(f"scenes_recognised{suffix}.{split}", Share(sum(a == b for a, b in pairs), len(right))),
        ]
    return right, rows


def side_by_side(rows: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Each figure of all models, by their stages, and of real images: what a stage did to it, in one line."""
    told: dict[str, list[str]] = defaultdict(list)
    real: dict[str, str] = {}
    for source, of_model in rows.items():
        for row in of_model:
            low, high = row.get("interval", (None, None))
            value = f"{row['value']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")
            if "_real." in row["name"]:
                real[row["name"].replace("_real.", ".")] = f"real {value}"
            else:
                told[row["name"]].append(f"{source} {value}")
    return {name: ", ".join([*values, *filter(None, [real.get(name)])]) for name, values in told.items()}


def _marked(text: str, right: bool) -> Note:
    return (f"✓ {text}", _GREEN) if right else (f"✗ {text}", _RED)


def _seen(image: Tensor) -> Scene | None:
    found = recognise(((image + 1) * 127.5).permute(1, 2, 0).numpy())
    return None if found is None else found.scene


def _kind(scene: Scene | None) -> tuple[str, str] | None:
    return None if scene is None else (scene.form, scene.colour)


def _share(name: str, share: Share) -> Row:
    return Row(name=name, value=share.rate, unit=f"of {share.of:,}", interval=share.interval)
