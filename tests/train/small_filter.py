"""Small inputs of the filter stage, and the stage run on them in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from privacy.pii.policy import Policy
from train.filter_job import FilterJob
from train.filter_tools import Filter
from train.filtering import filter_shards, plan_filter
from train.sandbox import Died
from train.shards import Record, write_shards
from train.tasks import work

NO_KEY = Path("no-such.key")


class Inline:
    """A Sandbox without a child, which takes a second to start. The record named `killer` would kill it."""

    def __init__(self, make: Callable[[], Filter], timeout_s: float) -> None:
        self.make, self.filter = make, None

    def run(self, records: Sequence[Record]) -> list[Any]:
        self.filter = self.filter or self.make()
        results = iter(self.filter([record for record in records if record.key != "killer"]))
        return [Died("crashed") if record.key == "killer" else next(results) for record in records]

    def close(self) -> None:
        self.filter = None


def png(shade: int = 100) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), shade).save(out, "PNG")
    return out.getvalue()


def picture(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def captioned(captions: Sequence[str | None]) -> list[Record]:
    return [Record(f"r{n:03d}", f"r{n:03d}", png(), 0, caption) for n, caption in enumerate(captions)]


def write(folder: Path, records: Sequence[Record], split: str = "private", shard_size: int = 16) -> None:
    write_shards(folder / "in" / split, split, records, shard_size)


def plan(folder: Path, splits: Sequence[str] = ("private",), policy: Policy | None = None, **options: Any) -> FilterJob:
    """The job that filters folder/in into folder/out."""
    key_file = options.pop("key_file", NO_KEY)
    return plan_filter(folder / "in", folder / "out", splits, policy or Policy(), key_file, **options)


def do(job: FilterJob) -> None:
    """Do all of a job in this process; what it tells of its progress is a share of the whole that never shrinks."""
    last = [0]

    def tell() -> None:
        done, total = job.look()
        assert last[0] <= done <= total
        last[0] = done

    work(job, tell=tell)


def run(folder: Path, splits: Sequence[str] = ("private",), policy: Policy | None = None, **options: Any) -> Any:
    return filter_shards(plan(folder, splits, policy, **options), do)


def listed(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "out" / "quarantine.jsonl").read_text().splitlines()]


def left(folder: Path) -> dict[str, bytes]:
    """Every file under folder/out."""
    files = (path for path in (folder / "out").rglob("*") if path.is_file())
    return {str(path.relative_to(folder / "out")): path.read_bytes() for path in files}
