"""What filters records, opened: in a child process of each worker, for images and models may kill it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from privacy.pii.detectors import open_detectors
from privacy.pii.duplicates import Signatures, signatures
from privacy.pii.filter import FilterResult, Item, Tools, filter_records
from privacy.pii.findings import Pixels
from privacy.pii.pixels import apply_boxes, decode
from privacy.pii.policy import Policy
from privacy.pii.pseudonyms import Pseudonyms
from privacy.secrets import load_master_secret
from train.images import ImageError, open_image
from train.shards import Record

Filtered = tuple[FilterResult, Signatures | None]  # the signature of a kept record, where it is asked for


def open_tools(policy: Policy, key_file: Path) -> Tools:
    """Open all that `policy` needs; the key of pseudonyms comes from `key_file` or SFUMATO_SECRET.

    Raises MissingDetector where a detector cannot be opened, SecretError where a key is needed and there is none.
    """
    texts, images = open_detectors(policy)
    pseudonyms = Pseudonyms(load_master_secret(key_file)) if policy.pseudonymises else None
    return Tools(texts, images, decode, apply_boxes, pseudonyms)


class Filter:
    """Applies a policy to records, each by itself.

    Refused (WrongKey, ValueError): another key of pseudonyms, or other versions of the detectors, than `key_id` and
    `versions` say, which are those that the stage was planned with.
    """

    def __init__(
        self, policy: Policy, key_file: Path, key_id: str | None, versions: Mapping[str, str], with_signatures: bool
    ) -> None:
        self.policy, self.tools, self.with_signatures = policy, open_tools(policy, key_file), with_signatures
        if self.tools.pseudonyms is not None and key_id is not None:
            self.tools.pseudonyms.check(key_id, "the filter stage")
        for detector in (*self.tools.texts, *self.tools.images):
            if detector.version != versions[detector.name]:
                raise ValueError(
                    f"detector {detector.name} is version {detector.version} here, and the stage began with "
                    f"{versions[detector.name]}: install the same on every machine, or start the stage again"
                )

    def __call__(self, records: Sequence[Record]) -> list[Filtered]:
        """What becomes of each record."""
        items = [Item(record.image, record.caption, record.svg) for record in records]
        results = filter_records(items, self.policy, self.tools)
        return [(result, self._signature(record, result)) for record, result in zip(records, results, strict=True)]

    def _signature(self, record: Record, result: FilterResult) -> Signatures | None:
        if not self.with_signatures or result.reason is not None:
            return None
        return signatures([record.key], [result.image], [result.caption], _decode)


def _decode(image: bytes) -> Pixels:
    """The upright image in RGB, transparency over white."""
    picture = open_image(image)
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255: told by its bytes
        raise ImageError("undecodable")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(picture.convert("RGB"))
