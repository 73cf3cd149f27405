"""Tuned tiles are files of a GPU and a Triton version; a malformed one stops the run and names its place."""

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import tiles
from kernels.tiles import Tile, read_tiles, tile_file, trial, tuned, write_tiles

DEFAULT = Tile({"BLOCK": 64}, num_warps=4, num_stages=2)
FASTER = Tile({"BLOCK": 128}, num_warps=8, num_stages=3)


@pytest.fixture(autouse=True)
def _forgets() -> Iterator[None]:
    tiles._of_this_gpu.cache_clear()
    yield
    tiles._of_this_gpu.cache_clear()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tile file of an invented GPU, which this machine pretends to have."""
    monkeypatch.setattr(tiles, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Invented GPU 1")
    return tile_file("Invented GPU 1", importlib.metadata.version("triton"))


def test_a_file_is_of_one_gpu_and_one_minor_version() -> None:
    assert tile_file("NVIDIA H200", "3.6.0").name == "nvidia-h200.triton-3.6.json"
    assert tile_file("NVIDIA A100-SXM4-80GB", "3.9.1+git0a").name == "nvidia-a100-sxm4-80gb.triton-3.9.json"


def test_without_a_gpu_every_tile_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuned("op", "K=64", DEFAULT) is DEFAULT


def test_a_tuned_tile_stands_in_for_its_own_op_and_class_alone(path: Path) -> None:
    write_tiles(path, {("op", "K=64"): FASTER})
    assert tuned("op", "K=64", DEFAULT) == FASTER
    assert tuned("op", "K=72", DEFAULT) is DEFAULT
    assert tuned("another", "K=64", DEFAULT) is DEFAULT


def test_a_gpu_without_a_file_has_the_defaults(path: Path) -> None:
    assert tuned("op", "K=64", DEFAULT) is DEFAULT


def test_the_file_is_read_once_a_process(path: Path) -> None:
    write_tiles(path, {("op", "K=64"): FASTER})
    tuned("op", "K=64", DEFAULT)
    path.write_text("not JSON")
    assert tuned("op", "K=64", DEFAULT) == FASTER


def test_what_is_written_is_read(path: Path) -> None:
    written = {("op", "K=64"): FASTER, ("op", "K=128"): DEFAULT, ("a", "D=1152"): Tile({}, 1, 1)}
    write_tiles(path, written)
    assert read_tiles(path) == written
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["a", "op"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ([], r"the file is \[\]: give a mapping"),
        ({"op": 3}, "op is 3: give a mapping"),
        ({"op": {"K=64": {"num_warps": 4}}}, r"op \(K=64\) has \['num_warps'\]: give constants, num_warps"),
        ({"op": {"K=64": {"constants": [], "num_warps": 4, "num_stages": 1}}}, r"constants of op \(K=64\) is \[\]"),
        ({"op": {"K=64": {"constants": {"BLOCK": "64"}, "num_warps": 4, "num_stages": 1}}}, "BLOCK of op .* is '64'"),
        ({"op": {"K=64": {"constants": {}, "num_warps": True, "num_stages": 1}}}, "num_warps of op .* is True"),
        ({"op": {"K=64": {"constants": {}, "num_warps": 3, "num_stages": 1}}}, "num_warps 3 .* 1, 2, 4, 8, 16 warps"),
        ({"op": {"K=64": {"constants": {}, "num_warps": 4, "num_stages": 0}}}, "num_stages 0: .* one stage or more"),
    ],
)
def test_a_malformed_file_is_refused_by_name_and_place(path: Path, content: Any, said: str) -> None:
    path.parent.mkdir()
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=said) as raised:
        tuned("op", "K=64", DEFAULT)
    assert str(raised.value).startswith(str(path))


def test_a_tile_of_other_constants_is_refused_with_the_mend(path: Path) -> None:
    write_tiles(path, {("op", "K=64"): Tile({"BLOCK_M": 64}, 4, 2)})
    with pytest.raises(ValueError, match=r"\['BLOCK_M'\], the kernel \['BLOCK'\]: tune again"):
        tuned("op", "K=64", DEFAULT)


def test_a_trial_goes_before_the_file_and_sees_what_was_asked_for(path: Path) -> None:
    write_tiles(path, {("op", "K=64"): FASTER})
    tried = Tile({"BLOCK": 32}, 2, 1)
    with trial({("op", "K=64"): tried}) as given:
        assert tuned("op", "K=64", DEFAULT) == tried
        assert tuned("op", "K=72", DEFAULT) is DEFAULT
    assert given == {("op", "K=64"): tried, ("op", "K=72"): DEFAULT}
    assert tuned("op", "K=64", DEFAULT) == FASTER


def test_the_files_that_are_kept_can_be_read() -> None:
    for path in tiles.FOLDER.glob("*"):
        assert read_tiles(path), path
