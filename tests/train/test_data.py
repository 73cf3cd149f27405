import io
import threading
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.data import Prefetcher, ShardDataset, epoch_order, public_batch
from train.shards import Record, ShardError, index_shard, write_shards


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def grey(shade: int, size: int = 8) -> bytes:
    return encoded(Image.new("L", (size, size), shade))


def records(count: int) -> list[Record]:
    return [Record(f"r{n:03d}", f"user{n % 4}", grey(n), n % 3, f"caption {n}") for n in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "public", "public", records(10), 4)
    return tmp_path / "public"


def test_records_come_back_as_they_went_in(folder: Path) -> None:
    dataset = ShardDataset(folder, "public")
    assert len(dataset) == 10
    assert [dataset.read(n) for n in range(10)] == records(10)
    assert dataset.labels.tolist() == [n % 3 for n in range(10)]
    assert dataset.units == ["user0", "user1", "user2", "user3"]
    assert dataset.unit_of.tolist() == [n % 4 for n in range(10)]
    assert dataset.root == write_shards(folder.parent / "again", "public", records(10), 10).root
    assert len({dataset.digest(n) for n in range(10)}) == 10


def test_a_remote_split_is_read_by_ranges(folder: Path) -> None:
    remote = f"memory://{uuid.uuid4().hex}/public"
    files, root = fsspec.core.url_to_fs(remote)
    files.put(str(folder), root, recursive=True)
    local, far = ShardDataset(folder, "public"), ShardDataset(remote, "public")
    assert far.root == local.root
    assert far.read(7) == records(10)[7]
    for ours, theirs in zip(local.batch([9, 0, 5], 1, 8), far.batch([9, 0, 5], 1, 8), strict=True):
        assert torch.equal(ours, theirs)
    files.rm(f"{root}/public-00001.tar")
    with pytest.raises(ShardError, match=r"public-00001.tar is missing"):
        far.read(5)


def test_a_batch_is_scaled_and_in_the_order_asked_for(folder: Path) -> None:
    images, labels = ShardDataset(folder, "public").batch(np.array([9, 0, 0, 5]), 1, 8)
    assert (images.dtype, images.shape, labels.dtype) == (torch.float32, (4, 1, 8, 8), torch.int64)
    assert labels.tolist() == [0, 0, 0, 2]
    for image, shade in zip(images, (9, 0, 0, 5), strict=True):
        assert torch.allclose(image, torch.full((1, 8, 8), shade / 127.5 - 1))


def test_a_batch_may_be_empty(folder: Path) -> None:
    images, labels = ShardDataset(folder, "public").batch([], 3, 16)
    assert images.shape == (0, 3, 16, 16) and labels.shape == (0,)


def test_every_kind_of_image_comes_in_the_shape_asked_for(tmp_path: Path) -> None:
    stripes = Image.new("RGB", (20, 10), "red")
    stripes.paste("blue", (5, 0, 15, 10))  # the centre square
    clear = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    deep = Image.fromarray(np.full((10, 10), 0x8000, np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown a quarter turn clockwise
    halves = Image.new("RGB", (10, 10), "white")
    halves.paste("black", (0, 0, 5, 10))
    stored = {
        "crop": encoded(stripes, "JPEG", quality=95, subsampling=0),
        "palette": encoded(stripes.convert("P")),
        "clear": encoded(clear),
        "deep": encoded(deep),
        "turned": encoded(halves, exif=turned),
    }
    write_shards(tmp_path / "test", "test", [Record(key, key, image, 0, None) for key, image in stored.items()], 9)
    dataset = ShardDataset(tmp_path / "test", "test")
    colour, _ = dataset.batch(range(5), 3, 10)
    blue = torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 10, 10)
    assert torch.allclose(colour[0], blue, atol=0.2) and torch.allclose(colour[1], blue, atol=0.05)
    assert colour[2].eq(1).all()
    assert torch.allclose(colour[3], torch.zeros(3, 10, 10), atol=0.01)
    assert colour[4][:, :5].eq(-1).all() and colour[4][:, 5:].eq(1).all()
    small, _ = dataset.batch(range(5), 1, 4)
    assert small.shape == (5, 1, 4, 4) and small.abs().max() <= 1


def test_a_record_without_a_class_is_refused_in_a_batch(tmp_path: Path) -> None:
    write_shards(tmp_path / "test", "test", [Record("a", "a", grey(0), None, None)], 1)
    dataset = ShardDataset(tmp_path / "test", "test")
    assert dataset.labels.tolist() == [-1] and dataset.read(0).label is None
    with pytest.raises(ValueError, match="record a of split test has no class"):
        dataset.batch([0], 1, 8)


def test_a_flipped_bit_is_noticed_when_the_record_is_read(folder: Path) -> None:
    dataset = ShardDataset(folder, "public")
    tar = folder / "public-00001.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b"caption 5")] ^= 1
    tar.write_bytes(content)
    assert dataset.read(4) == records(10)[4]
    with pytest.raises(ShardError, match=r"public-00001.tar, byte \d+: record r005 does not have the digest"):
        dataset.read(5)


def test_an_index_that_gives_another_class_or_unit_is_noticed(folder: Path) -> None:
    index = folder / "public-00000.index.jsonl"
    index.write_text(index.read_text().replace('"label":1', '"label":2').replace('"unit":"user2"', '"unit":"user3"'))
    dataset = ShardDataset(folder, "public")
    for record in (1, 2):
        with pytest.raises(ShardError, match="another unit or class than its index"):
            dataset.read(record)


def test_a_truncated_tar_is_noticed_on_opening(folder: Path) -> None:
    tar = folder / "public-00002.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(ShardError, match=r"public-00002.tar is truncated at byte 2000: record r008 ends at byte \d+"):
        ShardDataset(folder, "public")


def test_a_missing_index_is_said_and_not_rebuilt(folder: Path) -> None:
    (folder / "public-00001.index.jsonl").unlink()
    with pytest.raises(ShardError, match=r"public-00001.tar has no index .*index_shard on it"):
        ShardDataset(folder, "public")
    assert not (folder / "public-00001.index.jsonl").exists()
    index_shard(folder / "public-00001.tar")
    assert ShardDataset(folder, "public").read(5) == records(10)[5]


@pytest.mark.parametrize("name", ["public-00000.tar", "public-00001.tar", "public-00002.tar"])
def test_a_missing_tar_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ShardError, match=f"{name} is missing, its index is there"):
        ShardDataset(folder, "public")


def test_a_gap_in_the_shards_is_named(folder: Path) -> None:
    for path in folder.glob("public-00001.*"):
        path.unlink()
    with pytest.raises(ShardError, match=r"public-00001.tar is missing, public-00002.tar is there"):
        ShardDataset(folder, "public")


def test_a_folder_without_shards_is_said(folder: Path) -> None:
    for place in (folder.parent, folder / "nowhere"):
        with pytest.raises(ShardError, match=r"holds no shard public-00000.tar: run the ingest stage first"):
            ShardDataset(place, "public")


@pytest.mark.parametrize("line", ["", "nonsense", "[]", '{"key": "a"}'])
def test_a_damaged_index_is_named_with_its_line(folder: Path, line: str) -> None:
    index = folder / "public-00001.index.jsonl"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(ShardError, match=r"public-00001.index.jsonl, line 2: not an index entry"):
        ShardDataset(folder, "public")


def test_a_key_in_two_shards_is_refused(folder: Path) -> None:
    for end in ("tar", "index.jsonl"):
        (folder / f"public-00003.{end}").write_bytes((folder / f"public-00000.{end}").read_bytes())
    with pytest.raises(ShardError, match="'r000' occurs 2 times"):
        ShardDataset(folder, "public")


@given(st.integers(0, 2**32), st.integers(0, 1000), st.integers(1, 500))
def test_an_epoch_is_a_permutation_and_a_function_of_its_arguments(seed: int, epoch: int, n: int) -> None:
    order = epoch_order(seed, epoch, n)
    assert sorted(order.tolist()) == list(range(n))
    epoch_order.cache_clear()
    np.testing.assert_array_equal(order, epoch_order(seed, epoch, n))


def test_epochs_and_seeds_differ_and_the_order_is_the_one_written_down_here() -> None:
    assert epoch_order(0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert len({tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}) == 9


@given(st.integers(0, 100), st.integers(1, 70), st.integers(1, 30))
def test_public_batches_lay_whole_epochs_end_to_end(seed: int, batch_size: int, n: int) -> None:
    steps = -(-3 * n // batch_size)
    drawn = np.concatenate([public_batch(seed, step, batch_size, n) for step in range(steps)])
    assert all(len(public_batch(seed, step, batch_size, n)) == batch_size for step in range(steps))
    for epoch in range(3):
        assert drawn[epoch * n : (epoch + 1) * n].tolist() == epoch_order(seed, epoch, n).tolist()


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 4 from 0 records"):
        public_batch(0, 0, 4, 0)


def test_the_prefetcher_gives_what_the_dataset_gives_one_step_ahead(folder: Path) -> None:
    dataset, loaded = ShardDataset(folder, "public"), list[tuple[int, str]]()

    def load(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        loaded.append((step, threading.current_thread().name))
        return dataset.batch(public_batch(0, step, 3, len(dataset)), 1, 8)

    with Prefetcher(load, num_steps=3) as prefetcher:
        for step in range(3):
            images, labels = prefetcher.fetch(step)
            expected, classes = dataset.batch(public_batch(0, step, 3, len(dataset)), 1, 8)
            assert torch.equal(images, expected) and torch.equal(labels, classes)
    assert [step for step, _ in loaded] == [0, 1, 2]  # each once, none past the end
    assert all(name.startswith("prefetch") for _, name in loaded)


def test_a_step_out_of_turn_is_loaded_anew() -> None:
    with Prefetcher(lambda step: 10 * step, num_steps=9) as prefetcher:
        assert [prefetcher.fetch(step) for step in (0, 7, 3, 4)] == [0, 70, 30, 40]


def test_what_fails_in_the_thread_is_raised_by_the_fetch_of_that_step(folder: Path) -> None:
    dataset = ShardDataset(folder, "public")
    tar = folder / "public-00001.tar"
    tar.write_bytes(tar.read_bytes().replace(b"caption 4", b"caption X"))
    before = threading.active_count()
    with Prefetcher(lambda step: dataset.batch([step], 1, 8)[1].tolist(), num_steps=9) as prefetcher:
        prefetcher.fetch(3)
        with pytest.raises(ShardError, match="r004"):
            prefetcher.fetch(4)
        assert prefetcher.fetch(5) == dataset.labels[[5]].tolist()
    assert threading.active_count() == before
