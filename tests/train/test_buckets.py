"""Images that keep their form: which size each is cropped to, and that lengths, noise and sums follow."""

import io
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from models.unified import UnifiedConfig
from tests.train.test_documents import (
    MODEL,
    AsRank,
    by_one,
    caption,
    clipped_sum,
    documents,
    finetune,
    network,
    pretrain,
    step_over,
)
from train.config import TrainStage
from train.data import ShardDataset
from train.documents import Documents
from train.empirical import CanarySplit
from train.families import batches_of
from train.images import ImageError, encode_png, pixels, upright_size
from train.latent_shards import HEADER, LatentHeader
from train.shards import Record, write_shards

MODEL_16 = MODEL.replace("image_size: 8", "image_size: 16")  # 16 patches
SQUARES = (MODEL_16, "documents={row_tokens: 90}")
BUCKETS = (MODEL_16, "documents={row_tokens: 90, buckets: true}")
BOUNDED = (MODEL_16, "documents={row_tokens: 90, bounds: [52, 64, 90], buckets: true}")

# as they are seen, and the nearest of sizes of 16 or 15 patches
FORMS = {
    (16, 16): (16, 16),
    (60, 10): (32, 8),
    (12, 48): (8, 32),  # a JPEG that is stored on its side
    (50, 32): (20, 12),
    (20, 33): (12, 20),
    (2, 90): (8, 32),  # of more extreme aspect than any bucket
}
SIZES = list(FORMS)


def stored(height: int, width: int, chance: np.random.Generator) -> bytes:
    image = Image.fromarray(chance.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if (height, width) != (12, 48):
        return encode_png(image)
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(out, "JPEG", exif=exif)
    return out.getvalue()


@pytest.fixture(scope="module")
def formed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captioned images, two of each form."""
    folder, chance = tmp_path_factory.mktemp("buckets"), np.random.default_rng(0)
    for split in ("public", "private"):
        records = (Record(f"r{i}", f"r{i}", stored(*SIZES[i % 6], chance), None, caption(i)) for i in range(12))
        write_shards(folder / "filter" / split, split, records, shard_size=20)
    return folder


class InThread(AsRank):
    """One of two ranks, each in a thread."""

    told: ClassVar[list[Any]] = [None, None]
    meet: ClassVar = threading.Barrier(2)

    def gather(self, value: object) -> list[Any]:
        self.told[self.rank] = value
        self.meet.wait(30)
        return list(self.told)


def two_ranks(folder: Path, stage: TrainStage) -> list[Documents]:
    def of_rank(rank: int) -> Documents:
        assert isinstance(stage.model, UnifiedConfig)
        world, dataset = (
            InThread(rank, 2, torch.device("cpu")),
            ShardDataset(folder / "filter" / stage.split, stage.split),
        )
        batches = batches_of(stage, stage.model, world, dataset)
        assert isinstance(batches, Documents)
        return batches

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(of_rank, range(2)))


def test_each_image_goes_to_the_bucket_of_its_form_as_it_is_seen(formed: Path) -> None:
    batches = documents(formed, pretrain(*BUCKETS))
    assert [tuple(size) for size in batches.sizes.tolist()] == 2 * list(FORMS.values())
    assert documents(formed, pretrain(*SQUARES)).sizes.tolist() == 12 * [[16, 16]]


def test_a_size_is_read_from_the_header() -> None:
    chance = np.random.default_rng(0)
    for size in SIZES:
        whole = stored(*size, chance)
        assert upright_size(whole) == size
        if size != (16, 16):
            assert upright_size(whole[: len(whole) * 3 // 4]) == size  # which no decoder would take
    with pytest.raises(ImageError, match="too_many_pixels"):
        upright_size(whole, max_pixels=100)
    with pytest.raises(ImageError, match="unknown_image_type"):
        upright_size(b"no image")


@pytest.mark.parametrize("num_draws", [1, 2])
def test_the_lengths_that_are_known_are_those_that_are_packed(formed: Path, num_draws: int) -> None:
    stage = pretrain(*BUCKETS, f"objective.noise_draws={num_draws}", "train.microbatch_size=100")
    batches = documents(formed, stage)
    loaded = batches.load(2, by_one(*range(12)))
    (laid,) = loaded.laid
    lengths = [int((row == number).sum()) for row in laid.batch.document_BN for number in range(int(row.max()) + 1)]
    patches = [height * width // 16 for height, width in FORMS.values()] * 2
    told = Counter(len(caption(n)) + 4 + patches[n] for n in range(12))
    assert told <= Counter(lengths) and len(lengths) == 24
    totals = [12 * each for each in (loaded.totals.text, loaded.totals.patches, loaded.totals.tokens)]
    counts = (laid.batch.weights_BN, laid.batch.learnt_patches_BN, laid.batch.present_BN)
    assert totals == pytest.approx([float(each.sum()) for each in counts])
    assert totals[1] == num_draws * sum(patches) and loaded.flops == sum(
        batches.config.forward_flops(1, length) for length in lengths
    )
    assert torch.equal(laid.noise_BNF.any(-1), laid.batch.learnt_patches_BN)


def test_an_image_is_cropped_to_its_bucket_and_its_noise_is_its_own(formed: Path) -> None:
    stage = pretrain(*BUCKETS, "documents.tasks=[text_to_image]")
    batches = documents(formed, stage)
    for record, size in enumerate(FORMS.values()):
        (laid,) = batches.load(3, by_one(record)).laid
        learnt = laid.batch.learnt_patches_BN
        shown = batches.layout.unpatchify(laid.batch.patches_BNF[learnt][None], *size)[0]
        expected = pixels(batches.dataset.read(record).image, 3, *size)
        assert ((shown + 1) * 127.5).round().numpy().astype(np.uint8).tolist() == expected.tolist()
        noise = batches.layout.unpatchify(laid.noise_BNF[learnt][None], *size)
        assert torch.equal(noise, batches.draws(3, [record], (3, *size), 1).noise)


def test_square_images_are_what_they_are_without_buckets(formed: Path) -> None:
    (with_buckets,), (without,) = (
        documents(formed, pretrain(*overrides)).load(1, by_one(0, 6)).laid for overrides in (BUCKETS, SQUARES)
    )
    assert torch.equal(with_buckets.batch.patches_BNF, without.batch.patches_BNF)
    assert torch.equal(with_buckets.noise_BNF, without.noise_BNF)
    assert torch.equal(with_buckets.times_BI, without.times_BI)


def test_a_public_step_over_mixed_forms_is_the_same_on_two_ranks(formed: Path) -> None:
    stage = pretrain(*BUCKETS)
    model, slots = network(stage), by_one(*range(1, 12))
    loss, gradients = step_over([documents(formed, stage)], model, 1, slots)
    other_loss, others = step_over(two_ranks(formed, stage), model, 1, slots)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for mine, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_private_row_and_its_share_of_the_sum_are_the_same_whatever_form_the_others_have(formed: Path) -> None:
    stage = finetune(*BOUNDED)
    batches, model = documents(formed, stage), network(stage)
    rows = list[tuple[torch.Tensor, ...]]()
    for other in range(1, 6):
        for laid in batches.load(0, by_one(0, other)).laid:
            for row in np.flatnonzero(laid.slots_BR[:, 0] == 0).tolist():
                rows.append((laid.batch.tokens_BN[row], laid.batch.patches_BNF[row], laid.noise_BNF[row]))
    assert len(rows) == 5
    for row in rows[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(rows[0], row, strict=True))
    alone = sum(clipped_sum([batches], model, by_one(n)) for n in range(6))
    together = clipped_sum([batches], model, by_one(*range(6)))
    assert isinstance(alone, torch.Tensor) and (together - alone).norm() / alone.norm() < 1e-5


def test_latents_have_no_form_to_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record("r0", "r0", encode_png(Image.new("RGB", (8, 8))), None, "words")
    write_shards(tmp_path / "filter" / "public", "public", [record], shard_size=20)
    header = LatentHeader(vae="", shape=(3, 16, 16), mean=(0,) * 3, std=(1,) * 3, public_records=1, public_root="")
    (tmp_path / "filter" / "public" / HEADER).write_bytes(header.content())
    monkeypatch.setattr(ShardDataset, "read", lambda *_: pytest.fail("a record was read"))
    with pytest.raises(
        ValueError, match=r"documents\.buckets is true, and data_from of pretrain is filter, which holds"
    ):
        documents(tmp_path, pretrain(*BUCKETS))


def test_canaries_among_images_of_any_form_are_blank_squares(formed: Path) -> None:
    stage = finetune(*BUCKETS)
    assert isinstance(stage.model, UnifiedConfig)
    split = CanarySplit(ShardDataset(formed / "filter" / "private", "private"), 3, 2)
    batches = Documents(stage, stage.model, AsRank(0, 1, torch.device("cpu")), split)  # type: ignore[arg-type]
    assert batches.sizes.tolist() == [[16, 16], [32, 8], [8, 32], [16, 16], [16, 16]]
    laid = {
        int(laid.slots_BR[row, 0]): laid.batch.rows(torch.tensor([row]))
        for laid in batches.load(0, by_one(1, 3, 4)).laid
        for row in range(len(laid.slots_BR))
    }
    assert not laid[3].patches_BNF.any() and not laid[4].patches_BNF.any() and laid[1].patches_BNF.any()
