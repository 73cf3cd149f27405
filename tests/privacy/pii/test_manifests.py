"""A shard's manifest adds up, its tree is RFC 6962's, and a shard that was touched is named."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from pydantic import ValidationError

from privacy.pii import manifests
from privacy.pii.manifests import (
    ManifestError,
    ShardManifest,
    inclusion_proof,
    manifest_path,
    merkle_root,
    read_manifest,
    read_manifests,
    verify_inclusion,
    verify_manifests,
    verify_shards,
)
from tests.privacy.filtered_shards import digest, fields, put, root_now, write_filtered
from train.shards import root_of

SECRET = "somebody@example.org"


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    write_filtered(tmp_path)
    return tmp_path


def verify(folder: Path, root: str) -> dict[str, str]:
    return verify_shards(folder, verify_manifests(folder, root))


# --- a manifest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"counts": {"in": 4, "kept": 2, "dropped": 1, "quarantined": 0}}, "4 records went in, and 2 kept"),
        ({"counts": {"in": 3, "kept": 2, "dropped": 1}}, "it takes in, kept, dropped, quarantined"),
        ({"set_aside": []}, "set_aside names 0"),
        ({"damaged": 1}, "1 records are damaged, of 0"),
        ({"tar": None}, "does not fit"),
        ({"bytes": 0}, "does not fit"),
        ({"tar": "sha256:00"}, "tar"),
        ({"set_aside": [("gone0", SECRET)]}, "set_aside"),
        ({"set_aside": [(SECRET, "holds_email")]}, "set_aside"),
        ({"entities": {SECRET: 1}}, "entities"),
        ({"entities": {SECRET: 0}}, "entities"),
        ({"detectors": {SECRET: "1"}}, "detectors"),
        ({"host": "node7"}, "host"),
    ],
)
def test_a_manifest_that_does_not_add_up_or_holds_a_value_is_refused_without_showing_it(
    changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValidationError, match=named) as caught:
        ShardManifest(**fields(**changed))
    assert SECRET not in str(caught.value)


def test_a_manifests_file_is_its_leaf_to_the_byte(stage: Path) -> None:
    found = read_manifests(stage)
    assert [manifest.shard for manifest in found] == [
        "private-00000", "private-00001", "private-00002", "public-00000",
    ]  # fmt: skip
    path = manifest_path(stage, "public", "public-00000")
    assert path.read_bytes() == found[-1].leaf()
    path.write_bytes(json.dumps(json.loads(path.read_bytes()), indent=1).encode())
    with pytest.raises(ManifestError, match=r"public-00000\.manifest\.json is not as it was written"):
        read_manifests(stage)


def test_a_bit_that_turns_in_a_manifest_makes_no_other_manifest_of_it(stage: Path) -> None:
    path = manifest_path(stage, "public", "public-00000")
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ManifestError, match=r"public-00000\.manifest\.json"):
            read_manifest(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"format": 2}', b"[1]"])
def test_what_is_no_manifest_is_refused_by_name(stage: Path, content: bytes) -> None:
    manifest_path(stage, "public", "public-00000").write_bytes(content)
    with pytest.raises(ManifestError, match=r"public-00000\.manifest\.json is no shard manifest of format 1"):
        read_manifests(stage)


def test_a_manifest_in_another_shards_place_is_refused(stage: Path) -> None:
    here, there = (manifest_path(stage, "private", f"private-0000{i}") for i in (0, 1))
    there.write_bytes(here.read_bytes())
    with pytest.raises(ManifestError, match=r"private-00001.*or not where"):
        read_manifests(stage)


# --- the tree -------------------------------------------------------------------------------------------------------


def test_the_tree_is_the_one_of_rfc_6962(monkeypatch: pytest.MonkeyPatch) -> None:
    """The roots that RFC 6962's reference tests give for their eight leaves, with SHA-256 in BLAKE3's place.

    Source: certificate-transparency, cpp/merkletree/merkle_tree_test.cc (and trillian, testonly/reference).
    """
    monkeypatch.setattr(manifests, "blake3", hashlib.sha256)
    leaves = [bytes.fromhex(text) for text in (
        "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
    )]  # fmt: skip
    roots = {
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    assert {size: merkle_root(leaves[:size]).removeprefix("blake3:") for size in roots} == roots


def test_every_leaf_is_proven_under_its_root_and_nothing_else_is() -> None:
    for size in range(1, 18):
        leaves = [f"shard {i}".encode() for i in range(size)]
        root = merkle_root(leaves)
        for at, leaf in enumerate(leaves):
            proof = inclusion_proof(leaves, at)
            assert verify_inclusion(leaf, at, size, proof, root)
            assert not verify_inclusion(leaf + b"!", at, size, proof, root)
            assert not verify_inclusion(leaf, (at + 1) % size, size, proof, root) or size == 1
            assert not verify_inclusion(leaf, at, size, [*proof, proof[-1] if proof else root], root)
            assert not verify_inclusion(leaf, at, size, proof[:-1], root) or not proof
            assert not verify_inclusion(leaf, at, size, proof, digest(b"another"))
    assert not verify_inclusion(b"shard 0", 3, 3, [], merkle_root([b"shard 0"]))
    assert not verify_inclusion(b"a", 0, 2, ["blake3:not hex"], merkle_root([b"a", b"b"]))
    with pytest.raises(ValueError, match="no leaf 2 among 2"):
        inclusion_proof([b"a", b"b"], 2)


def test_a_node_cannot_pass_for_a_leaf() -> None:
    a, b = (blake3(b"\0" + leaf).digest() for leaf in (b"a", b"b"))
    assert merkle_root([a + b]) != merkle_root([b"a", b"b"])


# --- the shards -----------------------------------------------------------------------------------------------------


def test_whole_shards_give_the_roots_that_a_ledger_would_name(stage: Path) -> None:
    found = verify(stage, root_now(stage))
    for split, root in found.items():
        lines = [line for index in sorted((stage / split).glob("*.jsonl")) for line in index.read_text().splitlines()]
        assert root == root_of(json.loads(line)["digest"] for line in lines)
    assert set(found) == {"public", "private"}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["private-00001.tar", "private-00000.index.jsonl"])
def test_a_shard_with_one_bit_changed_is_named(stage: Path, name: str) -> None:
    root = root_now(stage)
    flip(stage / "private" / name, 600 if name.endswith("tar") else 20)
    with pytest.raises(ManifestError, match=rf"{name} is not as its manifest names it"):
        verify(stage, root)


@pytest.mark.parametrize("name", ["private-00001.tar", "private-00001.index.jsonl"])
def test_a_missing_file_is_named(stage: Path, name: str) -> None:
    root = root_now(stage)
    (stage / "private" / name).unlink()
    with pytest.raises(ManifestError, match=rf"{name} cannot be read"):
        verify(stage, root)


def test_a_shard_without_a_manifest_and_one_that_should_be_empty_are_named(stage: Path) -> None:
    root = root_now(stage)
    extra = stage / "private" / "private-00007.tar"
    extra.write_bytes(b"")
    with pytest.raises(ManifestError, match=r"private-00007\.tar has no manifest"):
        verify(stage, root)
    extra.rename(stage / "private" / "private-00002.tar")
    with pytest.raises(ManifestError, match=r"private-00002\.tar exists, and its manifest says that nothing"):
        verify(stage, root)


def test_manifests_that_were_changed_with_their_shard_have_another_root(stage: Path) -> None:
    root = root_now(stage)
    path = manifest_path(stage, "private", "private-00002")
    manifest = read_manifest(path).model_dump()
    put(stage, **manifest | {"set_aside": [("gone0", "uncertain_email")]})
    with pytest.raises(ManifestError, match="one was changed, added or removed"):
        verify(stage, root)
    path.unlink()
    with pytest.raises(ManifestError, match="the 3 shard manifests"):
        verify(stage, root)
    with pytest.raises(ManifestError, match="the 0 shard manifests"):
        verify(stage / "public", root)


def test_an_index_and_a_manifest_made_to_fit_do_not_hide_other_records(stage: Path) -> None:
    """Who rewrites index and manifest, to keep a record's old digest, is shown by the bytes."""
    tar = stage / "public" / "public-00000.tar"
    flip(tar, tar.read_bytes().index(b"a caption"))
    path = manifest_path(stage, "public", "public-00000")
    put(stage, **read_manifest(path).model_dump() | {"tar": digest(tar.read_bytes())})
    with pytest.raises(ManifestError, match=r"public-00000\.tar: its records are not those that its manifest names"):
        verify(stage, root_now(stage))


@pytest.mark.parametrize("line", [b"not json\n", b'{"key": 3, "members": {}}\n', b'{"key": "a"}\n', b"[]\n"])
def test_an_index_that_cannot_be_read_is_named(stage: Path, line: bytes) -> None:
    index = stage / "public" / "public-00000.index.jsonl"
    index.write_bytes(line)
    path = manifest_path(stage, "public", "public-00000")
    put(stage, **read_manifest(path).model_dump() | {"index": digest(line)})
    with pytest.raises(ManifestError, match=r"public-00000\.tar cannot be read by its index"):
        verify(stage, root_now(stage))
