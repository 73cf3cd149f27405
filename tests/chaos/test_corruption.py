"""Every kind of harm to every file of committed saves: passed over for an older save, or refused by name and range."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import warnings
from pathlib import Path

import pytest

from checkpointing import store
from checkpointing.__main__ import main as look
from checkpointing.sharded import Checkpoint, Chunk, save_now
from checkpointing.store import CheckpointError, LocalPlace, SaveId
from tests.chaos.corruption import FAULTS, corrupt
from tests.chaos.harness import remove_tree
from tests.chaos.trainer import expected, pieces_of, state_at, wrong_pieces

WORLD_SIZE = 2
OLDER, NEWER = SaveId(1, 1, 4), SaveId(1, 2, 8)
FILES = ("rank-00000.safetensors", "rank-00001.safetensors", "rank-00000.json", "rank-00001.json", "MANIFEST.json")
CASES = [
    (kind, file)
    for kind in FAULTS
    for file in FILES
    if not (kind == "swapped_between_ranks" and file == "MANIFEST.json")
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with two committed saves of two ranks."""
    place = LocalPlace(tmp_path_factory.mktemp("whole") / "checkpoints")
    store.fence(place, 1)
    for save in (OLDER, NEWER):
        for rank in reversed(range(WORLD_SIZE)):
            chunks = [
                Chunk(piece.kind, piece.name, piece.offset, piece.shape, expected(piece, save.step))
                for piece in pieces_of(rank, WORLD_SIZE)
            ]
            if rank:
                _write_without_waiting(place, save, chunks, rank)
            else:
                save_now(place, save, chunks, state_at(save.step), rank=rank, world_size=WORLD_SIZE)
    return place.root


def _write_without_waiting(place: LocalPlace, save: SaveId, chunks: list[Chunk], rank: int) -> None:
    with pytest.raises(CheckpointError, match="not committed"):
        save_now(place, save, chunks, {}, rank=rank, world_size=WORLD_SIZE, timeout_s=0)
    (place.folder(save) / f"rank-{rank:05d}.failed").unlink()


def harm(whole: Path, folder: Path, kind: str, file: str, seed: int, save: SaveId = NEWER) -> set[SaveId]:
    """A copy of the place with one file harmed; which saves are hit."""
    shutil.copytree(whole, folder)
    harmed = corrupt(kind, folder / save.name / file, random.Random(seed))
    assert harmed
    return {hit for path in harmed if (hit := SaveId.parse(path.parent.name))}


def require_refused(place: LocalPlace, save: SaveId, kind: str, file: str) -> None:
    """No wrong bit is handed out, and whoever asks is told which file, and where in it."""
    with pytest.raises(CheckpointError) as refused:
        store.verify(place, save)
    said = str(refused.value)
    if not kind.startswith("swapped"):  # of two files changed for each other either may be met first
        assert file in said or (file == "MANIFEST.json" and kind == "missing")
    if file.endswith(".safetensors") and kind in ("bit_flip", "torn", "zero_hole"):
        assert re.search(r"bytes [\d,]+ to [\d,]+", said), said
    with contextlib.suppress(CheckpointError):  # it may read what is not harmed
        assert not wrong_pieces(Checkpoint.open(place, save), pieces_of(0, 1))


def check(whole: Path, folder: Path, kind: str, file: str, seed: int) -> None:
    place = LocalPlace(folder)
    hit = harm(whole, folder, kind, file, seed)
    for save in hit:
        require_refused(place, save, kind, file)
    if OLDER in hit:
        with pytest.raises(CheckpointError, match="whole"):
            store.newest_whole(place)
    else:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = store.newest_whole(place)
        assert found is not None and found.save == OLDER
        assert not wrong_pieces(Checkpoint.open(place, OLDER), pieces_of(0, 1))
        if (kind, file) != ("missing", "MANIFEST.json"):  # then it was, to all appearance, never committed
            assert NEWER.name in " ".join(str(warning.message) for warning in said)
            assert look(["verify", str(folder)]) == 1
    assert store.prune(place, 1) == [], "the last whole save must stay, and broken ones beside it"
    remove_tree(folder)


@pytest.mark.parametrize(("kind", "file"), CASES, ids=str)
def test_a_harmed_save_is_passed_over_by_name_and_no_wrong_bit_is_handed_out(
    whole: Path, tmp_path: Path, kind: str, file: str
) -> None:
    check(whole, tmp_path / "copy", kind, file, 0)


@pytest.mark.slow
def test_of_thousands_of_random_harms_none_is_silent(whole: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    for seed in range(1000):
        check(whole, tmp_path / "copy", *generator.choice(CASES), seed)


@pytest.mark.parametrize("kind", ["bit_flip", "torn", "truncated", "missing"])
def test_a_harmed_pointer_misleads_nobody(whole: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    corrupt(kind, tmp_path / "copy" / store.POINTER, random.Random(0))
    found = store.newest_whole(LocalPlace(tmp_path / "copy"))
    assert found is not None and found.save == NEWER


@pytest.mark.parametrize("save", [OLDER, NEWER])
def test_where_every_save_is_harmed_nothing_is_begun_again_from_nothing(
    whole: Path, tmp_path: Path, save: SaveId
) -> None:
    place = LocalPlace(tmp_path / "copy")
    harm(whole, place.root, "bit_flip", FILES[0], 1)
    corrupt("bit_flip", place.root / OLDER.name / FILES[1], random.Random(2))
    with pytest.raises(CheckpointError) as refused:
        store.newest_whole(place)
    assert save.name in str(refused.value)
