"""What a recipe may say of a source: its kind, its parts and the shares of each split."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, Self

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from train import shapes
from train.images import MAX_PIXELS

# No stage trains on test and private_test; private_test is what is held back of records that are private.
Split = Literal["public", "private", "test", "private_test"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Part(_Section):
    """A piece of a source and the shares of its privacy units that go to each split."""

    splits: dict[Split, Annotated[float, Field(gt=0, le=1)]]

    @field_validator("splits")
    @classmethod
    def _shares_are_the_whole(cls, splits: dict[Split, float]) -> dict[Split, float]:
        if abs(sum(splits.values()) - 1) > 1e-9:
            raise ValueError(f"the shares of splits add up to {sum(splits.values()):g}: make them 1")
        return splits

    def split_of(self, unit: str, seed: int) -> Split:
        """A unit's split, a function of (seed, unit): whatever else the source holds, and all its records together."""
        at = int.from_bytes(blake3(f"{seed}:{unit}".encode()).digest(8)) / 2**64
        chosen: Split = next(iter(self.splits))
        for split, share in self.splits.items():
            chosen, at = split, at - share
            if at < 0:
                break
        return chosen


class Source(_Section):
    """What every source is asked for."""

    max_pixels: Annotated[int, Field(gt=0)] = MAX_PIXELS  # width * height of an image; more are quarantined
    max_quarantine_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05  # more of all records fail the stage


class DigitsSource(Source):
    """The 1,797 handwritten digits inside scikit-learn (8x8, grey), with personal data planted in the private split."""

    kind: Literal["digits"]


class IdxPart(Part):
    """A pair of MNIST-format files, plain or gzipped."""

    images: str
    labels: str


class IdxSource(Source):
    """MNIST-format files of grey images; a class's name is its images' caption."""

    kind: Literal["idx"]
    parts: Annotated[tuple[IdxPart, ...], Field(min_length=1)]
    class_names: Annotated[tuple[str, ...], Field(min_length=1)] = tuple("0123456789")


class ShapedSource(Source):
    """A source of images of any shape: without these, PNG and JPEG bytes are kept and other formats become PNG."""

    image_size: Annotated[int, Field(gt=0)] | None = None  # centre crop and resize to a square
    channels: Literal[1, 3] | None = None  # convert to grey or RGB


class FolderPart(Part):
    """A folder with one sub-folder a class; beside NAME.png may lie a caption, NAME.txt, and a drawing, NAME.svg."""

    folder: str
    classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # these sub-folders alone; null: all of them


class ImageFolderSource(ShapedSource):
    """Folders of images; the classes are the sub-folders' names, sorted, and the captions where no file has one."""

    kind: Literal["image_folder"]
    parts: Annotated[tuple[FolderPart, ...], Field(min_length=1)]
    unit: Literal["record", "caption"] = "record"  # caption: all images of one are one privacy unit, and in one split

    @model_validator(mode="after")
    def _a_class_is_in_one_part(self) -> Self:
        for (first, one), (second, other) in combinations(enumerate(self.parts), 2):
            mine, others = one.classes or other.classes or (), other.classes or one.classes or ()
            shared = sorted(set(mine) & set(others)) or ([] if mine else ["every class"])
            if shared and Path(one.folder).expanduser() == Path(other.folder).expanduser():
                raise ValueError(
                    f"parts {first} and {second} both take {shared[0]} of {one.folder}, whose images would be in two "
                    "splits: give each part `classes` of its own"
                )
        return self


class ShardPart(Part):
    """Existing WebDataset tars: a path or fsspec URL, with * for several."""

    shards: str


class WebDatasetSource(ShapedSource):
    """Existing WebDataset tars (KEY.png|jpg|..., .cls, .txt, .svg; `unit` of KEY.json names the privacy unit)."""

    kind: Literal["webdataset"]
    parts: Annotated[tuple[ShardPart, ...], Field(min_length=1)]
    num_classes: Annotated[int, Field(gt=0)]


class ShapesSource(Source):
    """Drawn shapes, as many as wanted, with exact captions; a class is a colour and a form (`train.shapes`)."""

    kind: Literal["shapes"]
    records: Annotated[dict[Split, Annotated[int, Field(gt=0)]], Field(min_length=1)]
    image_size: Annotated[int, Field(le=256)] = 24
    max_count: Annotated[int, Field(ge=1, le=3)] = 3  # forms in an image
    held_out: int = 1  # forms of each colour that `test` alone shows, and it nothing else; 0: it shows all

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        shapes.combinations(self.held_out, seed=0)
        if self.image_size < (least := shapes.least_image_size(self.max_count)):
            raise ValueError(
                f"image_size is {self.image_size}, too small to tell {self.max_count} forms apart: "
                f"give at least {least}, or a smaller max_count"
            )
        return self


SourceConfig = Annotated[
    DigitsSource | IdxSource | ImageFolderSource | WebDatasetSource | ShapesSource, Field(discriminator="kind")
]  # fmt: skip
