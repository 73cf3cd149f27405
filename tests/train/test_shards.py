import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.shards import Record, ShardError, index_shard, write_shards


def png(shade: int, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("L", (size, size), shade).save(out, "PNG")
    return out.getvalue()


def records(count: int) -> list[Record]:
    return [Record(f"r{n:03d}", f"r{n:03d}", png(n), n % 3, f"caption {n}") for n in range(count)]


def tar_of(path: Path, members: dict[str, bytes], edit: Callable[[tarfile.TarInfo], None] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if edit:
                edit(member)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_the_bytes_are_a_function_of_the_records(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "a", "public", records(7), 3)
    second = write_shards(tmp_path / "b", "public", records(7), 3)
    assert first == second and (first.records, first.shards) == (7, 3)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"public-0000{n}{end}" for n in range(3) for end in (".index.jsonl", ".tar")]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_tar_carries_no_time_no_owner_and_is_what_webdataset_reads(tmp_path: Path) -> None:
    import webdataset

    write_shards(tmp_path / "public", "public", records(2), 3)
    shard = tmp_path / "public" / "public-00000.tar"
    with tarfile.open(shard) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}
    read = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [(r["__key__"], r["png"], r["cls"], r["txt"]) for r in read] == [
        ("r000", png(0), b"0", b"caption 0"),
        ("r001", png(1), b"1", b"caption 1"),
    ]


def test_the_index_says_where_every_member_lies(tmp_path: Path) -> None:
    write_shards(tmp_path / "public", "public", records(3), 3)
    content = (tmp_path / "public" / "public-00000.tar").read_bytes()
    lines = (tmp_path / "public" / "public-00000.index.jsonl").read_text().splitlines()
    for record, entry in zip(records(3), map(json.loads, lines), strict=True):
        found = {name: content[offset : offset + length] for name, (offset, length) in entry["members"].items()}
        assert found == {"png": record.image, "cls": str(record.label).encode(), "txt": record.caption.encode()}
        assert (entry["key"], entry["unit"], entry["label"]) == (record.key, record.unit, record.label)


def test_the_root_does_not_depend_on_the_cut_but_on_every_record(tmp_path: Path) -> None:
    whole = write_shards(tmp_path / "a", "public", records(6), 6).root
    assert write_shards(tmp_path / "b", "public", records(6), 2).root == whole
    base = records(6)
    changes = [
        Record("other", "other", base[2].image, base[2].label, base[2].caption),
        Record("r002", "someone", base[2].image, base[2].label, base[2].caption),
        Record("r002", "r002", png(99), base[2].label, base[2].caption),
        Record("r002", "r002", base[2].image, None, base[2].caption),
        Record("r002", "r002", base[2].image, base[2].label, None),
        Record("r002", "r002", base[2].image, base[2].label, base[2].caption, b"<svg/>"),
    ]
    roots = {write_shards(tmp_path / "c", "public", [*base[:2], change, *base[3:]], 6).root for change in changes}
    assert len(roots | {whole}) == 7
    assert write_shards(tmp_path / "d", "public", base[::-1], 6).root != whole


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    before = write_shards(tmp_path / "public", "public", records(2), 2)
    with pytest.raises(ValueError, match=r"'r000' occurs twice in split public"):
        write_shards(tmp_path / "public", "public", [*records(3), records(1)[0]], 2)
    assert [path.name for path in tmp_path.iterdir()] == ["public"]
    assert before == write_shards(tmp_path / "other", "public", records(2), 2)


def test_a_split_written_again_holds_no_shard_of_the_first(tmp_path: Path) -> None:
    write_shards(tmp_path / "public", "public", records(6), 1)
    write_shards(tmp_path / "public", "public", records(6), 6)
    assert len(list((tmp_path / "public").iterdir())) == 2


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../b", "a.b", "a b", "a//b", "é"])
def test_a_key_that_is_no_plain_name_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="record key"):
        write_shards(tmp_path / "public", "public", [Record(key, "u", png(0), 0, None)], 1)


def test_an_empty_split_and_an_empty_shard_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split public has no records"):
        write_shards(tmp_path / "public", "public", [], 1)
    with pytest.raises(ValueError, match="shard_size is 0"):
        write_shards(tmp_path / "public", "public", records(1), 0)
    with pytest.raises(ValueError, match="a shard holds PNG and JPEG"):
        write_shards(tmp_path / "public", "public", [Record("a", "a", b"GIF89a", 0, None)], 1)


def test_a_record_shows_neither_image_nor_caption_nor_drawing() -> None:
    assert repr(replace(records(1)[0], svg=b"<svg/>")) == "Record(key='r000', unit='r000', label=0)"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"x"}, "record 'a' is not ours .no_image."),
        ({"/a.png": b"x"}, "'/a.png' leaves the folder"),
        ({"../a.png": b"x"}, "'../a.png' leaves the folder"),
        ({"b/../../a.png": b"x"}, "leaves the folder"),
        ({"README": b"x"}, "no plain file named KEY.EXTENSION"),
        ({".hidden": b"x"}, "no plain file named KEY.EXTENSION"),
        ({"a.png": b"x", "a.PNG": b"y"}, "byte [0-9]+: a.png occurs twice"),
        ({"a.png": b"x", "b.png": b"y", "a.txt": b"z"}, "byte [0-9]+: key 'a' occurs twice"),
        ({"a.png": b"x", "a.cls": b"cat"}, "record 'a' is not ours .bad_class."),
        ({"a.png": b"x", "a.txt": b"\xff"}, "record 'a' is not ours .bad_caption."),
        ({"a.png": b"x", "a.json": b"[]"}, "record 'a' is not ours .bad_unit."),
        ({}, "holds no records"),
    ],
)
def test_a_foreign_tar_is_refused_by_name_and_place(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    tar = tar_of(tmp_path / "x-00000.tar", members)
    with pytest.raises(ShardError, match=message) as refusal:
        index_shard(tar)
    assert str(tar) in str(refusal.value)
    assert not (tmp_path / "x-00000.index.jsonl").exists()


def test_a_link_is_refused(tmp_path: Path) -> None:
    def link(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0

    with pytest.raises(ShardError, match="no plain file"):
        index_shard(tar_of(tmp_path / "x-00000.tar", {"a.png": b""}, link))


def test_a_tar_cut_or_flipped_anywhere_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "public", "public", records(3), 3)
    whole = (tmp_path / "public" / "public-00000.tar").read_bytes()
    end = whole.rindex(b"caption 2") // 512 * 512 + 512  # of the last member
    cut = tmp_path / "x-00000.tar"
    for length in [*range(0, end + 1024, 256), 1, 511, 513, end - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ShardError, match=str(cut)):
            index_shard(cut)
    for header in range(0, end, 1024):
        cut.write_bytes(whole[:header] + b"#" + whole[header + 1 :])
        with pytest.raises(ShardError, match=str(cut)):
            index_shard(cut)
    cut.write_bytes(np.random.default_rng(0).bytes(4096))
    with pytest.raises(ShardError, match="no whole uncompressed tar"):
        index_shard(cut)
