"""Latents in shards: each record's image is the member `npy`, and what turns it into what models see is `latents.json`.

    <split>/<split>-00003.tar, .index.jsonl     as ever (train.shards); KEY.npy is float16 [c, h, w], not normalised
    <split>/latents.json                        shape, and mean and std by channel over the public split

`train.latents` writes them, and `ShardDataset` reads them normalised.
"""

# c latent channels, h x w latents
from __future__ import annotations

import io
import json
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from train.shards import ShardError
from train.tasks import digest_of

HEADER = "latents.json"
SPLIT_OF_STATISTICS = "public"

Positive = Annotated[int, Field(gt=0)]


class LatentHeader(BaseModel):
    """What all records of a split of latents have in common.

    mean, std: by channel, over every place of the records of the public split, whose shards' roots `public_root` binds.
    A private record never entered them, so what is read with them is a function of the record and of public data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    vae: str  # its digest
    shape: tuple[Positive, Positive, Positive]
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]
    public_records: Positive
    public_root: str

    def content(self) -> bytes:
        """The bytes of the file; their own digest is in them."""
        return sealed(self.model_dump(mode="json"))

    def normalised(self, data: bytes) -> NDArray[np.float32]:
        """A record's latents [c, h, w], of mean 0 and deviation 1 a channel over the public split; ShardError else."""
        stored = from_npy(data)
        if stored.shape != self.shape:
            raise ShardError(f"latents of shape {stored.shape}, but {HEADER} says {self.shape}")
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        return (stored.astype(np.float32) - mean) / std


def read_header(files: Any, folder: str) -> LatentHeader | None:
    """The header of a split, None where it holds images; `files` is the fsspec file system that `folder` is on."""
    path = f"{folder}/{HEADER}"
    try:
        content: bytes = files.cat_file(path)
    except FileNotFoundError:
        return None
    try:
        return LatentHeader.model_validate(unsealed(content))
    except ValidationError:
        content = b""
    except ValueError:
        pass
    raise ShardError(f"{path} is not as it was written: run the latents stage again")


def to_npy(latents: NDArray[np.float16]) -> bytes:
    """The file that `numpy.save` writes."""
    out = io.BytesIO()
    np.save(out, latents, allow_pickle=False)
    return out.getvalue()


def from_npy(data: bytes) -> NDArray[np.float16]:
    """Its inverse; ShardError on anything but float16."""
    try:
        stored = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise ShardError("the latents are no .npy file") from None
    if not isinstance(stored, np.ndarray) or stored.dtype != np.float16:
        raise ShardError("the latents are not float16")
    return stored


def sealed(body: dict[str, Any]) -> bytes:
    """JSON of `body` with a digest of itself."""
    return (json.dumps({**body, "digest": digest_of(body)}, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def unsealed(content: bytes) -> dict[str, Any]:
    """The body that was sealed; ValueError where a byte of it has changed."""
    body = json.loads(content)
    if not isinstance(body, dict) or body.pop("digest", None) != digest_of(body):
        raise ValueError("the digest is another")
    return body
