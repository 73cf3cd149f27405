"""The canonical layout: any sharding writes it, any sharding reads it, and nothing in between is lost or trusted."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from checkpointing import layout, store
from checkpointing.layout import FORMAT, Index, Piece, SaveId, ShardLayout, seal_index
from checkpointing.places import LocalPlace, open_place, shard_file
from checkpointing.sharded import Checkpoint, Chunk, latest, reshard, save_now, write_shard
from checkpointing.store import CheckpointError
from tests.checkpointing.simulated_ranks import (
    STATE,
    assert_holds,
    example_state,
    in_processes,
    in_threads,
    load,
    save_all,
    shard,
)

_REPOSITORY = Path(__file__).parents[2]
FIRST, SECOND = SaveId(1, 1, 10), SaveId(1, 2, 20)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of 16 elements, so that small tensors are cut into many."""
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 16)
    return 16


def chunk(offset: int, length: int, shape: tuple[int, ...] = (10,), name: str = "w") -> Chunk:
    return Chunk("param", name, offset, shape, torch.ones(length))


def save_one(root: Path, chunks: list[Chunk], save: SaveId = FIRST) -> Path:
    """The folder of a save from one rank."""
    save_now(LocalPlace(root), save, chunks, {})
    return root / save.name


def refuse(tmp_path: Path, *ranks: list[Chunk]) -> str:
    """The message that all ranks, each saving its chunks, are refused with."""
    results = in_threads(
        len(ranks),
        lambda rank: save_now(
            LocalPlace(tmp_path), FIRST, ranks[rank], {}, rank=rank, world_size=len(ranks), timeout_s=5
        ),
    )
    assert all(isinstance(result, CheckpointError) for result in results), results
    assert len({str(result) for result in results}) == 1
    assert latest(tmp_path) is None
    assert not list(tmp_path.glob("*/*.safetensors"))
    return str(results[0])


# --- what is saved is what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(), (0.37, 0.38), (0.0, 1.0)], ids=["1 rank", "3 uneven", "3, two of them empty"])
@pytest.mark.usefixtures("small_chunks")
def test_every_bit_comes_back(tmp_path: Path, cuts: tuple[float, ...]) -> None:
    tensors = example_state()
    tensors["param", "prime"][:3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    save_all(LocalPlace(tmp_path), FIRST, tensors, cuts)
    checkpoint = load(tmp_path)
    assert (checkpoint.step, checkpoint.state, checkpoint.folder) == (10, STATE, tmp_path / FIRST.name)
    assert_holds(checkpoint, tensors)


@pytest.mark.usefixtures("small_chunks")
def test_one_rank_two_three_and_one_again_hold_the_same_bits(tmp_path: Path) -> None:
    tensors = example_state()
    save_all(LocalPlace(tmp_path / "1"), FIRST, tensors)
    previous = load(tmp_path / "1")
    for number, cuts in enumerate([(0.61,), (0.0, 0.23), ()]):
        place, held = LocalPlace(tmp_path / f"next-{number}"), previous

        def resume(
            rank: int, held: Checkpoint = held, place: LocalPlace = place, cuts: tuple[float, ...] = cuts
        ) -> None:
            mine = Checkpoint.open(held.folder)
            chunks = [
                Chunk(c.kind, c.name, c.offset, c.shape, mine.read(c.kind, c.name, c.offset, c.data.numel()))
                for c in shard(tensors, cuts, rank)
            ]
            save_now(place, SECOND, chunks, STATE, rank=rank, world_size=len(cuts) + 1)

        assert in_threads(len(cuts) + 1, resume) == [None] * (len(cuts) + 1)
        previous = load(place.root)
        assert_holds(previous, tensors)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), numel=st.integers(0, 90), num_cuts=st.integers(0, 5))
def test_any_range_of_any_cutting_reads_as_a_slice(
    data: st.DataObject, numel: int, num_cuts: int, tmp_path: Path, small_chunks: int
) -> None:
    flat = torch.arange(numel, dtype=torch.float32)
    bounds = sorted(data.draw(st.lists(st.integers(0, numel), min_size=num_cuts, max_size=num_cuts)))
    chunks = [Chunk("ema", "w", a, (numel,), flat[a:b]) for a, b in pairwise([0, *bounds, numel])]
    root = tmp_path / "root"
    try:
        save_one(root, data.draw(st.permutations(chunks)))
        checkpoint = load(root)
        for _ in range(4):
            begin = data.draw(st.integers(0, numel))
            length = data.draw(st.integers(0, numel - begin))
            assert torch.equal(checkpoint.read("ema", "w", begin, length), flat[begin : begin + length])
            apart = torch.zeros(2 * length)[
                ::2
            ]  # not contiguous, as another device's memory would be: filled by copies
            checkpoint.read_into("ema", "w", begin, apart)
            assert torch.equal(apart, flat[begin : begin + length])
    finally:
        shutil.rmtree(root, ignore_errors=True)


def test_rank_files_are_safetensors_that_the_library_reads(tmp_path: Path) -> None:
    tensors = example_state()
    save_all(LocalPlace(tmp_path), FIRST, tensors, (0.5,))
    for rank in range(2):
        with safe_open(str(tmp_path / FIRST.name / f"rank-0000{rank}.safetensors"), "pt") as file:
            for saved in shard(tensors, (0.5,), rank):
                if saved.data.numel():
                    assert torch.equal(file.get_tensor(f"{saved.kind}/{saved.name}@{saved.offset}"), saved.data)


@pytest.mark.usefixtures("small_chunks")
def test_a_shard_written_from_memory_is_the_one_that_is_written_from_tensors(tmp_path: Path) -> None:
    chunks = shard(example_state(), (), 0)
    save_one(tmp_path, chunks)
    laid_out = ShardLayout.of([chunk.piece for chunk in chunks])
    payload = bytearray(laid_out.size_bytes)
    payload[: len(laid_out.header)] = laid_out.header
    for begin, piece in zip(laid_out.begins, chunks, strict=True):
        payload[begin : begin + 4 * len(piece.data)] = piece.data.numpy().tobytes()
    view = memoryview(payload)
    for index in (None, seal_index(laid_out, FIRST, 0, 1, view)):
        place = LocalPlace(tmp_path / f"from-memory-{index is None}")
        place.open(FIRST, len(view))
        write_shard(place, FIRST, 0, 1, laid_out, view, index)
        for file in ("rank-00000.safetensors", "rank-00000.json"):
            assert place.read(FIRST, file) == (tmp_path / FIRST.name / file).read_bytes()


def test_a_payload_of_another_layout_is_refused(tmp_path: Path) -> None:
    laid_out = ShardLayout.of([Piece("param", "w", 0, 4, (4,))])
    for payload in (bytes(laid_out.size_bytes), laid_out.header):
        with pytest.raises(ValueError, match="are not a shard of this layout"):
            write_shard(LocalPlace(tmp_path), FIRST, 0, 1, laid_out, memoryview(payload))


def test_a_range_outside_the_tensor_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    save_one(tmp_path, [chunk(0, 10)])
    checkpoint = load(tmp_path)
    for offset, length in ((4, 7), (-1, 3), (11, 0)):
        with pytest.raises(ValueError, match="param w has 10 elements"):
            checkpoint.read("param", "w", offset, length)
    with pytest.raises(CheckpointError, match="has no ema w"):
        checkpoint.read("ema", "w")


def test_only_the_shards_that_hold_a_range_are_needed(tmp_path: Path) -> None:
    save_all(LocalPlace(tmp_path), FIRST, {("param", "w"): torch.ones(30)}, (1 / 3, 2 / 3))
    checkpoint = load(tmp_path)
    assert checkpoint.needed([Piece("param", "w", 5, 10, (30,))]) == [0, 1]
    assert checkpoint.needed([Piece("param", "w", 20, 1, (30,)), Piece("param", "w", 3, 0, (30,))]) == [2]


def test_a_save_in_memory_is_read_without_a_manifest_and_without_the_shards_that_nobody_needs(tmp_path: Path) -> None:
    place, tensors = LocalPlace(tmp_path), example_state()
    indexes: list[Index] = []
    for rank in range(2):
        chunks = shard(tensors, (0.5,), rank)
        laid_out = ShardLayout.of([chunk.piece for chunk in chunks])
        payload = b"".join([laid_out.header, *(chunk.data.numpy().tobytes() for chunk in chunks)])
        index = seal_index(laid_out, FIRST, rank, 2, memoryview(payload), STATE)
        place.open(FIRST, 0)
        write_shard(place, FIRST, rank, 2, laid_out, memoryview(payload), index)
        indexes.append(Index.parse(index, "memory"))
    sources = {rank: place.source(FIRST, shard_file(rank)) for rank in range(2)}
    checkpoint = Checkpoint.of_shards(indexes[::-1], sources)
    assert (checkpoint.state, checkpoint.where) == (STATE, "memory")
    assert_holds(checkpoint, tensors)
    del sources[0]
    tail = Checkpoint.of_shards(indexes, sources).read("param", "prime", 60, 41)
    assert torch.equal(tail, tensors["param", "prime"][60:])
    with pytest.raises(CheckpointError, match="two saves are mixed"):
        Checkpoint.of_shards(indexes[:1], sources)


def test_a_checkpoint_of_another_model_is_refused_by_its_first_differing_tensor(tmp_path: Path) -> None:
    save_one(tmp_path, [chunk(0, 10), chunk(0, 4, (2, 2), "bias")])
    checkpoint = load(tmp_path)
    checkpoint.require({("param", "w"): (10,), ("param", "bias"): (2, 2)})
    with pytest.raises(
        CheckpointError, match=r"another model: param w has shape \[10\] there, and the model has shape \[5, 2\]"
    ):
        checkpoint.require({("param", "w"): (5, 2), ("param", "bias"): (4,)})
    with pytest.raises(CheckpointError, match=r"param gain has none there, and the model has shape \[1\]"):
        checkpoint.require({("param", "gain"): (1,)})
    with pytest.raises(CheckpointError, match=r"param bias has shape \[2, 2\] there, and the model has none"):
        checkpoint.require({("param", "w"): (10,)})


# --- what does not fit together is refused, on every rank ----------------------------------------------------------


def test_a_hole_is_refused_naming_tensor_and_range(tmp_path: Path) -> None:
    assert refuse(tmp_path, [chunk(0, 4)], [chunk(7, 3)]) == "param w: no rank has its elements 4 to 7"


def test_a_missing_end_is_a_hole(tmp_path: Path) -> None:
    assert refuse(tmp_path, [chunk(0, 4)], [chunk(4, 5)]) == "param w: no rank has its elements 9 to 10"


def test_a_tensor_that_nobody_has_any_of_is_a_hole(tmp_path: Path) -> None:
    assert refuse(tmp_path, [chunk(0, 0)]) == "param w: no rank has its elements 0 to 10"


def test_an_overlap_is_refused_naming_tensor_ranks_and_range(tmp_path: Path) -> None:
    message = refuse(tmp_path, [chunk(0, 6)], [chunk(4, 3), chunk(7, 3)])
    assert message == "param w: ranks 0 and 1 both have its elements 4 to 6"


def test_replicas_that_both_save_are_an_overlap(tmp_path: Path) -> None:
    assert refuse(tmp_path, [chunk(0, 10)], [chunk(0, 10)]).endswith("ranks 0 and 1 both have its elements 0 to 10")


def test_two_pieces_of_one_rank_that_begin_together_are_an_overlap(tmp_path: Path) -> None:
    assert refuse(tmp_path, [chunk(0, 10), chunk(0, 4)]) == "param w: two pieces begin at its element 0"


def test_two_shapes_of_one_tensor_are_refused(tmp_path: Path) -> None:
    message = refuse(tmp_path, [chunk(0, 4)], [chunk(4, 6, shape=(2, 5))])
    assert message == "param w has shape [10], but rank 1 says [2, 5]"


@pytest.mark.parametrize("state", [{1: "a"}, {"a": (1, 2)}, {"loss": float("nan")}, {"path": Path("x")}])
def test_a_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="JSON"):
        save_now(LocalPlace(tmp_path), FIRST, [chunk(0, 10)], state)
    assert latest(tmp_path) is None


@pytest.mark.parametrize(
    ("offset", "data", "reason"),
    [
        (0, torch.ones(10, dtype=torch.float64), "float64"),
        (0, torch.ones(2, 5), r"shape \(2, 5\)"),
        (0, torch.ones(20)[::2], "contiguous"),
        (4, torch.ones(7), "4 to 11 lie outside"),
        (-1, torch.ones(3), "-1 to 2 lie outside"),
    ],
)
def test_a_chunk_that_is_no_flat_fp32_range_is_refused(offset: int, data: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Chunk("param", "w", offset, (10,), data)


def test_a_rank_that_never_comes_is_named_when_the_time_is_over(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no sealed shard of rank 1, 2 within 0\.1 s"):
        save_now(LocalPlace(tmp_path), FIRST, [chunk(0, 10)], {}, rank=0, world_size=3, timeout_s=0.1)
    assert latest(tmp_path) is None


# --- death at every place ------------------------------------------------------------------------------------------

BEFORE_THE_COMMIT = [
    *((f"{place}@rank={rank}", rank) for place in ("attempt.opened", "shard.half_written:4") for rank in (0, 1)),
    *((f"{place}@rank={rank}", rank) for place in ("shard.synced", "index.half_written") for rank in (0, 1)),
    *((f"{place}@rank={rank}", rank) for place in ("index.synced", "index.renamed") for rank in (0, 1)),
    ("manifest.half_written", 0),
    ("manifest.synced", 0),
]
AFTER_THE_COMMIT = [("manifest.renamed", 0), ("pointer.half_written", 0), ("pointer.synced", 0), ("pointer.renamed", 0)]


def save_and_be_killed(tmp_path: Path, failpoint: str, victim: int) -> list[int | None]:
    """Exit codes of two ranks that save step 20; the victim's is checked."""

    def work(rank: int) -> None:
        chunks = shard(example_state(2), (0.4,), rank)
        save_now(LocalPlace(tmp_path), SECOND, chunks, STATE, rank=rank, world_size=2, timeout_s=0.5)

    codes = in_processes(2, work, {"SFUMATO_FAILPOINT": failpoint})
    assert codes[victim] == -signal.SIGKILL
    return codes


@pytest.mark.parametrize(("failpoint", "victim"), BEFORE_THE_COMMIT)
def test_a_rank_killed_before_the_commit_costs_only_that_save(tmp_path: Path, failpoint: str, victim: int) -> None:
    place = LocalPlace(tmp_path)
    save_all(place, FIRST, example_state(1), (0.4,))
    codes = save_and_be_killed(tmp_path, failpoint, victim)
    # index.renamed on rank 1: its shard is whole, so the save may well be committed by rank 0, as it should
    committed = failpoint.startswith("index.renamed") and victim == 1
    assert codes[1 - victim] == (0 if committed else 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an uncommitted folder is not even a skipped checkpoint
        checkpoint = load(tmp_path)
    assert checkpoint.save == (SECOND if committed else FIRST)
    assert_holds(checkpoint, example_state(2 if committed else 1))
    store.fence(place, 2)
    assert store.uncommitted(place) == []
    save_all(place, SaveId(2, 1, 20), example_state(3), (0.4,))
    assert_holds(load(tmp_path), example_state(3))


@pytest.mark.parametrize(("failpoint", "victim"), AFTER_THE_COMMIT)
def test_a_rank_killed_after_the_commit_leaves_the_new_checkpoint(tmp_path: Path, failpoint: str, victim: int) -> None:
    save_all(LocalPlace(tmp_path), FIRST, example_state(1))
    save_and_be_killed(tmp_path, failpoint, victim)
    checkpoint = load(tmp_path)
    assert checkpoint.step == 20
    assert_holds(checkpoint, example_state(2))


# --- damage at rest ------------------------------------------------------------------------------------------------


def small_save(root: Path) -> Path:
    """The folder of a save of few bytes, from two ranks."""
    tensors: dict[tuple[layout.Kind, str], torch.Tensor] = {("param", "w"): torch.arange(12.0)}
    save_all(LocalPlace(root), FIRST, tensors, (0.25,))
    return root / FIRST.name


def test_each_byte_of_each_file_is_guarded(tmp_path: Path) -> None:
    """One bit flipped in every byte of payload, header, padding, index and manifest, one after another."""
    folder = small_save(tmp_path)
    place = LocalPlace(tmp_path)
    paths = sorted(folder.iterdir())
    assert [path.name for path in paths] == [
        "MANIFEST.json",
        "rank-00000.json",
        "rank-00000.safetensors",
        "rank-00001.json",
        "rank-00001.safetensors",
    ]
    for path in paths:
        whole = path.read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            reason = store.reason_broken(place, FIRST)
            assert reason is not None, (path.name, position)
            assert path.name in reason, (path.name, position, reason)
            try:  # what is handed out without `verify` is right all the same
                values = Checkpoint.open(folder).read("param", "w")
            except CheckpointError:
                continue
            assert torch.equal(values, torch.arange(12.0)), (path.name, position)
        path.write_bytes(whole)
    store.verify(place, FIRST)


def test_a_damaged_chunk_is_named_by_file_and_bytes_and_harms_no_other(tmp_path: Path, small_chunks: int) -> None:
    folder = save_one(tmp_path, [Chunk("param", "w", 0, (64,), torch.arange(64.0))])
    path = folder / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    begin = len(content) - 4 * small_chunks
    content[begin + 5] ^= 64
    path.write_bytes(content)
    checkpoint = Checkpoint.open(folder)
    assert torch.equal(checkpoint.read("param", "w", 0, 48), torch.arange(48.0))
    for offset, length in ((48, 16), (63, 1), (40, 20)):
        message = rf"rank-00000\.safetensors, bytes {begin} to {len(content)}, is damaged"
        with pytest.raises(CheckpointError, match=message):
            checkpoint.read("param", "w", offset, length)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read_into("param", "w", 50, torch.zeros(8)[::2])


@pytest.mark.parametrize("file", ["MANIFEST.json", "rank-00001.json", "rank-00001.safetensors"])
def test_a_file_cut_short_lengthened_or_lost_is_named(tmp_path: Path, file: str) -> None:
    path = small_save(tmp_path) / file
    place, whole = LocalPlace(tmp_path), path.read_bytes()
    for damaged in [*(whole[:end] for end in range(0, len(whole), 7)), whole[:-1], whole + b" ", whole + bytes(4096)]:
        path.write_bytes(damaged)
        reason = store.reason_broken(place, FIRST)
        assert reason is not None
        assert file in reason
    path.unlink()
    assert file in (store.reason_broken(place, FIRST) or "")


def test_a_hole_of_zeros_is_seen(tmp_path: Path) -> None:
    folder = save_one(tmp_path, [Chunk("param", "w", 0, (9000,), torch.rand(9000) + 1)])
    path = folder / "rank-00000.safetensors"
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(bytes(4096))
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors, bytes .* is damaged"):
        Checkpoint.open(folder).read("param", "w")


def test_a_file_cut_short_under_a_reader_is_an_error_naming_file_and_bytes(tmp_path: Path) -> None:
    path = save_one(tmp_path, [chunk(0, 10)]) / "rank-00000.safetensors"
    checkpoint = load(tmp_path)
    checkpoint.read("param", "w")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 8)
    with pytest.raises(CheckpointError, match=rf"rank-00000\.safetensors, bytes {size - 40} to {size}: .*after 32"):
        checkpoint.read("param", "w")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_and_any_cut_is_skipped_with_its_reason(data: st.DataObject, tmp_path: Path) -> None:
    root = tmp_path / "root"
    try:
        for save, seed in ((FIRST, 1), (SECOND, 2)):
            save_all(LocalPlace(root), save, example_state(seed), (0.5,))
        path = data.draw(st.sampled_from(sorted((root / SECOND.name).iterdir())))
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[position] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del content[position:]
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=f"skipped a broken checkpoint: .*{path.name}"):
            checkpoint = load(root)
        assert checkpoint.save == FIRST
        assert_holds(checkpoint, example_state(1))
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("file", ["rank-00001.safetensors", "rank-00001.json"])
def test_shards_of_two_saves_do_not_mix(tmp_path: Path, file: str) -> None:
    for save, seed in ((FIRST, 1), (SECOND, 2)):
        save_all(LocalPlace(tmp_path), save, example_state(seed), (0.5,))
    shutil.copy(tmp_path / FIRST.name / file, tmp_path / SECOND.name)
    with pytest.warns(UserWarning, match=file.replace(".", r"\.")):
        assert load(tmp_path).save == FIRST


def test_shards_of_two_worlds_do_not_mix(tmp_path: Path) -> None:
    tensors, place = example_state(), LocalPlace(tmp_path / "two")
    save_all(place, FIRST, tensors, (0.5,))
    three = LocalPlace(tmp_path / "three")
    save_all(three, FIRST, tensors, (0.3, 0.6))
    (three.root / FIRST.name / store.MANIFEST).unlink()
    for file in ("rank-00001.safetensors", "rank-00001.json"):
        shutil.copy(place.root / FIRST.name / file, three.root / FIRST.name)
    with pytest.raises(CheckpointError, match=r"rank-00001\.json is of rank 1 of 2 of .*two saves are mixed"):
        store.commit(three, FIRST, 3, {}, timeout_s=1)
    assert not three.has(FIRST, store.MANIFEST)


def test_two_ranks_shards_exchanged_are_refused(tmp_path: Path) -> None:
    folder = small_save(tmp_path)
    for suffix in ("json", "safetensors"):
        first, second, aside = folder / f"rank-00000.{suffix}", folder / f"rank-00001.{suffix}", folder / "aside"
        for old, new in ((first, aside), (second, first), (aside, second)):
            old.rename(new)
    assert "is not the index that was committed" in (store.reason_broken(LocalPlace(tmp_path), FIRST) or "")


def test_an_index_that_lies_under_a_right_digest_is_refused(tmp_path: Path) -> None:
    """Not damage but a wrong writer: what it says must still hold together."""
    folder = small_save(tmp_path)
    body = json.loads((folder / "rank-00001.json").read_bytes())
    del body["digest"]
    first = body["chunks"][0]
    lies = [
        {"chunks": [first | {"begin": 0}]},
        {"chunks": [first | {"length": 100}]},
        {"chunks": [first | {"offset": -1}]},
        {"chunks": []},
        {"chunks": [{}]},
        {"save": "step-1"},
        {"bytes": 1},
        {"chunks": None},
    ]
    for lie in lies:
        with pytest.raises(CheckpointError, match="x is no index of a shard"):
            Index.parse(layout.seal({**body, **lie}), "x")
    with pytest.raises(CheckpointError, match=f"x has format {FORMAT + 1}, and this code reads format {FORMAT}"):
        Index.parse(layout.seal({**body, "format": FORMAT + 1}), "x")


def test_where_none_of_the_checkpoints_is_whole_a_person_must_decide(tmp_path: Path) -> None:
    for save in (FIRST, SECOND):
        (save_one(tmp_path, [chunk(0, 10)], save) / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* is whole: .*begin again"):
        latest(tmp_path)


# --- another world size --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
def test_reshard_to_any_world_and_back_is_the_same_state_and_the_same_files(tmp_path: Path) -> None:
    tensors = example_state()
    save_all(LocalPlace(tmp_path / "1"), FIRST, tensors, (0.2, 0.9))
    before = load(tmp_path / "1")
    hops = [
        (2, f"memory://{tmp_path.name}/two"),
        (5, tmp_path / "five"),
        (1, tmp_path / "one"),
        (5, tmp_path / "again"),
    ]
    for world_size, where in hops:
        place = open_place(where)
        reshard(before, place, world_size)
        manifest = store.newest_whole(place)
        assert manifest is not None
        assert (manifest.world_size, manifest.save, manifest.state) == (world_size, FIRST, STATE)
        before = Checkpoint.open(place, manifest.save)
        assert_holds(before, tensors)
    for path in (tmp_path / "five" / FIRST.name).iterdir():
        assert path.read_bytes() == (tmp_path / "again" / FIRST.name / path.name).read_bytes()


def test_a_damaged_checkpoint_is_not_resharded(tmp_path: Path) -> None:
    folder = save_one(tmp_path / "in", [chunk(0, 10)])
    path = folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        reshard(Checkpoint.open(folder), LocalPlace(tmp_path / "out"), 2)
    assert LocalPlace(tmp_path / "out").saves() == []


def test_resharding_onto_itself_is_refused(tmp_path: Path) -> None:
    folder = save_one(tmp_path, [chunk(0, 10)])
    with pytest.raises(CheckpointError, match="already"):
        reshard(Checkpoint.open(folder), LocalPlace(tmp_path), 2)
    assert_holds(load(tmp_path), {("param", "w"): torch.ones(10)})


# --- memory --------------------------------------------------------------------------------------------------------


def test_a_read_holds_what_was_asked_for_and_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 1 << 18)  # 1 MiB
    numel = 16 << 18
    folder = save_one(tmp_path, [Chunk("param", "w", 0, (numel,), torch.arange(numel, dtype=torch.float32))])
    checkpoint = Checkpoint.open(folder)
    out = torch.empty(numel // 2)
    tracemalloc.start()
    checkpoint.read_into("param", "w", numel // 4 + 7, out)
    store.verify(LocalPlace(tmp_path), FIRST)
    reshard(checkpoint, LocalPlace(tmp_path / "other"), 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(out, torch.arange(numel // 4 + 7, numel // 4 + 7 + numel // 2, dtype=torch.float32))
    assert peak < 2.25 * (1 << 20)  # the checkpoint's chunk and, later, the verification's or the new save's


_PEAK = """
import sys, torch
from checkpointing.sharded import Checkpoint
from pathlib import Path
def peak():  # not ru_maxrss, which begins with what the process was forked from
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM:"))
out = torch.zeros(int(sys.argv[2]))
checkpoint = Checkpoint.open(Path(sys.argv[1]))
checkpoint.read_into("param", "w", 5, torch.zeros(1))  # what the first read of all sets up
before = peak()
checkpoint.read_into("param", "w", 1234, out)
print(peak() - before)
"""


def test_a_process_that_reads_its_share_grows_by_less_than_a_chunk(tmp_path: Path) -> None:
    numel = 5 * layout.CHUNK_ELEMENTS // 2
    folder = save_one(tmp_path, [Chunk("param", "w", 0, (numel,), torch.zeros(numel))])
    command = [sys.executable, "-c", _PEAK, str(folder), str(numel - 2000)]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 << 10  # KiB


# --- no room -------------------------------------------------------------------------------------------------------

_FULL_DISK = """
import sys
from pathlib import Path
import torch
from checkpointing import places
from checkpointing.layout import SaveId
from checkpointing.places import LocalPlace
from checkpointing.sharded import Chunk, latest, save_now
from checkpointing.store import CheckpointError

disk = Path(sys.argv[1])
root = disk / "checkpoints"

def save(number, mib):
    chunk = Chunk("param", "w", 0, (mib << 18,), torch.full((mib << 18,), float(number)))
    save_now(LocalPlace(root), SaveId(1, number, number), [chunk], {})

def refused(*what):
    try:
        save(*what)
    except CheckpointError as error:
        print(error)
    else:
        raise SystemExit("the save was not refused")
    assert sorted(path.name for path in root.iterdir()) == ["latest", SaveId(1, 1, 1).name]
    checkpoint = latest(root)
    assert checkpoint.step == 1 and checkpoint.read("param", "w").eq(1.0).all()

save(1, 1)
refused(2, 12)
free_bytes = places.disk.free_bytes
places.disk.free_bytes = lambda folder: 1 << 40  # a neighbour takes the room after it was looked at
(disk / "neighbour").write_bytes(bytes(5 << 20))
refused(3, 3)
places.disk.free_bytes = free_bytes
(disk / "neighbour").unlink()
save(4, 3)
assert latest(root).step == 4
"""

_MOUNTER = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]  # a shell that may mount, root or not


def test_a_full_disk_is_refused_before_or_cleaned_up_after(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=8m tmpfs {tmp_path}"
    trial = shutil.which("unshare") and subprocess.run([*_MOUNTER, mount], capture_output=True, check=False)
    if not trial or trial.returncode != 0:
        pytest.skip("this machine lets no user mount a small disk")
    script = tmp_path.parent / f"{tmp_path.name}-full_disk.py"
    script.write_text(_FULL_DISK)
    command = f"{mount} && PYTHONPATH=. {sys.executable} {script} {tmp_path}"
    done = subprocess.run([*_MOUNTER, command], cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, during = done.stdout.splitlines()
    assert f"{tmp_path}/checkpoints has " in before
    assert "bytes free and the checkpoint of step 2 needs 13,631,616" in before
    assert "rank-00000.safetensors could not be written past byte" in during
    assert during.endswith("No space left on device")


def test_a_write_that_fails_on_one_rank_fails_the_save_on_all_at_once(tmp_path: Path) -> None:
    root, seen = tmp_path / "root", tmp_path / "errors"
    save_all(LocalPlace(root), FIRST, example_state(1))
    seen.mkdir()

    def work(rank: int) -> None:
        if rank == 1:  # this rank's files may not grow past 4 KiB, which its share of the tensor does
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            mine = [Chunk("param", "w", 10 * rank, (10_020,), torch.ones(10_000 if rank == 1 else 10))]
            mine = [] if rank == 2 else mine
            save_now(LocalPlace(root), SECOND, mine, STATE, rank=rank, world_size=3, timeout_s=60)
        except CheckpointError as error:
            (seen / str(rank)).write_text(str(error))
            raise

    assert in_processes(3, work) == [1, 1, 1]
    first, second, third = (path.read_text() for path in sorted(seen.iterdir()))
    assert "rank-00001.safetensors could not be written past byte" in second
    assert second.endswith("File too large")
    assert first == third == f"rank 1: {second}"
    assert load(root).save == FIRST
    store.fence(LocalPlace(root), 2)
    assert LocalPlace(root).saves() == [FIRST]


def test_an_id_used_twice_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    save_one(tmp_path, [chunk(0, 10)])
    for world_size in (1, 2):
        with pytest.raises(CheckpointError, match="is committed already"):
            save_now(LocalPlace(tmp_path), FIRST, [chunk(0, 3)], {}, world_size=world_size)
    assert_holds(load(tmp_path), {("param", "w"): torch.ones(10)})
