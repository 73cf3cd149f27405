import io
import tarfile
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import salvage
from train.salvage import REASONS, Salvaged, salvage_tar
from train.shards import ShardError

KINDS = ("cls", "png", "txt")


def tar_of(members: dict[str, bytes], edit: Callable[[tarfile.TarInfo], None] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if edit:
                edit(member)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def members(count: int, kinds: tuple[str, ...] = KINDS) -> dict[str, bytes]:
    return {f"r{n:02d}.{kind}": f"{kind} {n} ".encode() * 40 for n in range(count) for kind in kinds}


def salvaged(tar: bytes) -> list[Salvaged]:
    return list(salvage_tar(io.BytesIO(tar), "x.tar"))


def outcome(tar: bytes) -> dict[str, str | None]:
    found = salvaged(tar)
    assert len({record.key for record in found}) == len(found)
    return {record.key: record.reason for record in found}


WHOLE = tar_of(members(10))
RECORD = len(KINDS) * 1024  # bytes, by the lengths above
GOOD = {f"r{n:02d}": None for n in range(10)}


def test_a_whole_tar_gives_its_records_and_nothing_else() -> None:
    found = salvaged(WHOLE)
    assert [record.key for record in found] == list(GOOD)
    assert found[3] == Salvaged("r03", {kind: members(4)[f"r03.{kind}"] for kind in KINDS}, None)
    assert salvaged(tar_of({})) == []
    assert outcome(WHOLE.rstrip(b"\0") + bytes(-len(WHOLE.rstrip(b"\0")) % 512 + 1024)) == GOOD


@pytest.mark.parametrize("member", range(3))
@pytest.mark.parametrize("record", [2, 5, 9])
def test_a_damaged_header_costs_its_record_alone(record: int, member: int) -> None:
    tar = bytearray(WHOLE)
    tar[record * RECORD + member * 1024] ^= 1
    assert outcome(bytes(tar)) == GOOD | {f"r{record:02d}": "damaged_tar"}


def test_beside_a_hole_nothing_is_taken_for_whole_before_it_is_known_what_a_record_has() -> None:
    tar = bytearray(WHOLE)
    tar[2 * 1024] ^= 1
    assert outcome(bytes(tar)) == GOOD | {"r00": "damaged_tar", "r01": "damaged_tar"}


def test_a_header_of_a_record_of_one_member_costs_it_and_is_told_once() -> None:
    tar = bytearray(tar_of(members(10, ("png",))))
    tar[3 * 1024] ^= 1
    found = outcome(bytes(tar))
    assert found.pop(f"x.tar@{3 * 1024}") == "damaged_tar"
    assert found == {key: None for key in GOOD if key != "r03"}


@pytest.mark.parametrize("filling", [bytes(4 * RECORD), np.random.default_rng(0).bytes(4 * RECORD)])
def test_a_hole_costs_what_lay_in_it_and_what_it_cut(filling: bytes) -> None:
    start = 2 * RECORD + 1500
    found = outcome(WHOLE[:start] + filling + WHOLE[start + len(filling) :])
    kept = {"r00", "r01", "r07", "r08", "r09"}
    assert {key for key, reason in found.items() if reason is None} == kept
    assert found["r06"] == "damaged_tar" and set(found.values()) == {None, "damaged_tar"}


@pytest.mark.parametrize("length", [512, 600, 1024, 5 * RECORD - 1024, 5 * RECORD - 700, 5 * RECORD - 1024 + 512])
def test_a_cut_tail_costs_the_record_that_was_cut(length: int) -> None:
    found = outcome(WHOLE[:length])
    last = (length - 1) // RECORD
    assert {key for key, reason in found.items() if reason is None} == {f"r{n:02d}" for n in range(last)}
    assert [reason for reason in found.values() if reason] == ["truncated_tar"]


def test_a_tar_cut_between_records_keeps_all_of_them_and_says_so() -> None:
    for end in (0, 512):
        found = outcome(WHOLE[: 5 * RECORD] + bytes(end))
        assert found.pop(f"x.tar@{5 * RECORD}") == "truncated_tar"
        assert found == {key: None for key in list(GOOD)[:5]}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd.png", "unsafe_path"),
        ("../up.png", "unsafe_path"),
        ("a/../../up.png", "unsafe_path"),
        ("README", "no_extension"),
        (".hidden", "no_extension"),
    ],
)
def test_a_member_that_no_record_has_is_refused_by_itself(name: str, reason: str) -> None:
    found = salvaged(tar_of({"a.png": b"1", name: b"secret", "b.png": b"2"}))
    assert [(record.reason, record.members) for record in found] == [
        (None, {"png": b"1"}), (reason, {}), (None, {"png": b"2"}),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_link_or_device_costs_its_record(kind: bytes) -> None:
    def link(member: tarfile.TarInfo) -> None:
        if member.name == "b.txt":
            member.type, member.linkname, member.size = kind, "/etc/passwd", 0

    files = {"a.png": b"1", "b.png": b"2", "b.txt": b"", "c.png": b"3"}
    assert outcome(tar_of(files, link)) == {"a": None, "b": "not_a_file", "c": None}


def test_a_folder_is_no_record_and_long_and_foreign_names_are_read() -> None:
    def folder(member: tarfile.TarInfo) -> None:
        if member.name == "d":
            member.type = tarfile.DIRTYPE

    long = "n" * 300
    assert outcome(tar_of({"d": b"", f"d/{long}.png": b"1", "./é.png": b"2"}, folder)) == {f"d/{long}": None, "é": None}


def test_a_member_that_comes_twice_costs_its_record_and_a_key_elsewhere_is_given_again() -> None:
    assert outcome(tar_of({"a.png": b"1", "a.PNG": b"2", "b.png": b"3"})) == {"a": "duplicate_key", "b": None}
    apart = salvaged(tar_of({"a.png": b"1", "b.png": b"2", "a.txt": b"3"}))
    assert [record.key for record in apart] == ["a", "b", "a"]


def test_a_member_that_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salvage, "MAX_MEMBER_BYTES", 100)
    assert outcome(tar_of({"a.png": b"1", "b.png": bytes(101)})) == {"a": None, "b": "member_too_large"}


@pytest.mark.parametrize("content", [b"", b"PK\3\4" * 900, np.random.default_rng(0).bytes(9000), b"\x1f\x8b" + WHOLE])
def test_a_file_without_a_header_is_another_kind_of_file(content: bytes) -> None:
    with pytest.raises(ShardError, match=r"x\.tar is no uncompressed tar: unpack it"):
        salvaged(content)


@settings(max_examples=150)
@given(st.data())
def test_however_a_tar_is_damaged_what_is_given_is_whole(data: st.DataObject) -> None:
    tar = bytearray(WHOLE)
    headers = range(0, 30 * 1024, 1024)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 511))
        tar[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(tar), data.draw(st.integers(0, len(tar)))]))
    try:
        found = salvaged(bytes(tar[:cut]))
    except ShardError:
        return
    for record in found:
        assert record.reason is None or record.reason in REASONS
        if record.reason is None and record.key in GOOD:
            assert record.members == {kind: members(10)[f"{record.key}.{kind}"] for kind in KINDS}
