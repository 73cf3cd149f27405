"""The canonical layout: any sharding writes it, any sharding reads it, and nothing in between is lost or trusted."""

import resource
import shutil
import signal
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from checkpointing import store
from checkpointing.sharded import Checkpoint, Chunk, latest, save
from checkpointing.store import CheckpointError
from tests.checkpointing.simulated_ranks import assert_holds, example_state, in_processes, in_threads, shard

STATE = {"stage": "pretrain", "ledger": None, "loss": 0.1, "betas": [0.9, 0.999]}


def save_all(root: Path, step: int, tensors: Any, cuts: tuple[float, ...] = ()) -> list[Any]:
    """Save from `len(cuts) + 1` ranks; each rank's folder or exception."""
    world_size = len(cuts) + 1
    return in_threads(
        world_size,
        lambda rank, gather: save(
            root, step, shard(tensors, cuts, rank), STATE, rank=rank, world_size=world_size, gather=gather
        ),
    )


def load(root: Path) -> Checkpoint:
    checkpoint = latest(root)
    assert checkpoint is not None
    return checkpoint


def chunk(offset: int, length: int, shape: tuple[int, ...] = (10,), name: str = "w") -> Chunk:
    return Chunk("param", name, offset, shape, torch.ones(length))


def refuse(tmp_path: Path, *ranks: list[Chunk]) -> str:
    """The message that all ranks, each saving its chunks, are refused with."""
    results = in_threads(
        len(ranks),
        lambda rank, gather: save(tmp_path, 1, ranks[rank], {}, rank=rank, world_size=len(ranks), gather=gather),
    )
    assert all(isinstance(result, CheckpointError) for result in results), results
    assert len({str(result) for result in results}) == 1
    assert not list(tmp_path.iterdir())
    return str(results[0])


# --- what is saved is what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(), (0.37, 0.38), (0.0, 1.0)], ids=["1 rank", "3 uneven", "3, two of them empty"])
def test_every_bit_comes_back(tmp_path: Path, cuts: tuple[float, ...]) -> None:
    tensors = example_state()
    tensors["param", "prime"][:3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    folders = save_all(tmp_path, 100, tensors, cuts)
    assert len(set(folders)) == 1
    checkpoint = load(tmp_path)
    assert (checkpoint.step, checkpoint.state, checkpoint.folder) == (100, STATE, folders[0])
    assert_holds(checkpoint, tensors)


def test_two_ranks_save_three_resume_and_save_and_one_reads_all(tmp_path: Path) -> None:
    tensors = example_state()
    save_all(tmp_path / "two", 1, tensors, (0.61,))
    two = load(tmp_path / "two")

    def resume(rank: int, gather: Any) -> Path:
        chunks = [
            Chunk(c.kind, c.name, c.offset, c.shape, two.read(c.kind, c.name, c.offset, c.data.numel()))
            for c in shard(tensors, (0.0, 0.23), rank)
        ]
        return save(tmp_path / "three", 2, chunks, STATE, rank=rank, world_size=3, gather=gather)

    in_threads(3, resume)
    assert_holds(load(tmp_path / "three"), tensors)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), numel=st.integers(0, 60), num_cuts=st.integers(0, 5))
def test_any_range_of_any_cutting_reads_as_a_slice(
    data: st.DataObject, numel: int, num_cuts: int, tmp_path: Path
) -> None:
    flat = torch.arange(numel, dtype=torch.float32)
    bounds = sorted(data.draw(st.lists(st.integers(0, numel), min_size=num_cuts, max_size=num_cuts)))
    chunks = [Chunk("ema", "w", a, (numel,), flat[a:b]) for a, b in pairwise([0, *bounds, numel])]
    root = tmp_path / "root"
    try:
        save(root, 3, data.draw(st.permutations(chunks)), {})
        checkpoint = load(root)
        begin = data.draw(st.integers(0, numel))
        length = data.draw(st.integers(0, numel - begin))
        assert torch.equal(checkpoint.read("ema", "w", begin, length), flat[begin : begin + length])
    finally:
        shutil.rmtree(root, ignore_errors=True)


def test_rank_files_are_safetensors_that_the_library_reads(tmp_path: Path) -> None:
    tensors = example_state()
    (folder,) = save_all(tmp_path, 1, tensors)
    with safe_open(str(folder / "rank-00000.safetensors"), "pt") as file:
        assert torch.equal(file.get_tensor("ema/matrix@0"), tensors["ema", "matrix"].flatten())
        assert torch.equal(file.get_tensor("param/scale@0"), tensors["param", "scale"].flatten())


def test_a_range_outside_the_tensor_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, [chunk(0, 10)], {})
    checkpoint = load(tmp_path)
    with pytest.raises(ValueError, match="param w has 10 elements: 4 to 11"):
        checkpoint.read("param", "w", 4, 7)
    with pytest.raises(CheckpointError, match="has no ema w"):
        checkpoint.read("ema", "w")


def test_a_file_cut_short_under_a_reader_is_an_error_naming_file_and_bytes(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, [chunk(0, 10)], {})
    checkpoint = load(tmp_path)
    checkpoint.read("param", "w")
    path = folder / "rank-00000.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 8)
    with pytest.raises(CheckpointError, match=rf"rank-00000\.safetensors, bytes {size - 40} to {size}: .*after 32"):
        checkpoint.read("param", "w")


# --- what does not fit together is refused, on every rank ----------------------------------------------------------


def test_a_hole_is_refused_naming_tensor_and_range(tmp_path: Path) -> None:
    assert refuse(tmp_path, [chunk(0, 4)], [chunk(7, 3)]) == "param w: no rank has its elements 4 to 7"


def test_a_missing_end_is_a_hole(tmp_path: Path) -> None:
    assert refuse(tmp_path, [chunk(0, 4)], [chunk(4, 5)]) == "param w: no rank has its elements 9 to 10"


def test_an_overlap_is_refused_naming_tensor_ranks_and_range(tmp_path: Path) -> None:
    message = refuse(tmp_path, [chunk(0, 6)], [chunk(4, 3), chunk(7, 3)])
    assert message == "param w: ranks 0 and 1 both have its elements 4 to 6"


def test_replicas_that_both_save_are_an_overlap(tmp_path: Path) -> None:
    assert refuse(tmp_path, [chunk(0, 10)], [chunk(0, 10)]).endswith("ranks 0 and 1 both have its elements 0 to 10")


def test_two_shapes_of_one_tensor_are_refused(tmp_path: Path) -> None:
    message = refuse(tmp_path, [chunk(0, 4)], [chunk(4, 6, shape=(2, 5))])
    assert message == "param w has shape [10], but rank 1 says [2, 5]"


@pytest.mark.parametrize("state", [{1: "a"}, {"a": (1, 2)}, {"loss": float("nan")}, {"path": Path("x")}])
def test_a_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[Any, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"rank 0: .*JSON"):
        save(tmp_path, 1, [chunk(0, 10)], state)


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


def test_a_gather_that_lost_a_rank_commits_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="1 of 2 ranks answered"):
        save(tmp_path, 1, [chunk(0, 10)], {}, rank=0, world_size=2)
    assert latest(tmp_path) is None


# --- death at every place ------------------------------------------------------------------------------------------

BEFORE_THE_COMMIT = [
    ("attempt.opened", 0),
    ("shard.half_written:4@rank=0", 0),
    ("shard.half_written:4@rank=1", 1),
    ("shard.synced@rank=1", 1),
    ("manifest.half_written", 0),
    ("manifest.synced", 0),
]
AFTER_THE_COMMIT = [("manifest.renamed", 0), ("pointer.half_written", 0), ("pointer.synced", 0), ("pointer.renamed", 0)]


def save_and_be_killed(tmp_path: Path, failpoint: str, victim: int, step: int, seed: int) -> None:
    def work(rank: int, gather: Any) -> Path:
        chunks = shard(example_state(seed), (0.4,), rank)
        return save(tmp_path / "root", step, chunks, STATE, rank=rank, world_size=2, gather=gather)

    codes = in_processes(2, tmp_path / "talk", work, {"SFUMATO_FAILPOINT": failpoint})
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(2)]


@pytest.mark.parametrize(("failpoint", "victim"), BEFORE_THE_COMMIT)
def test_a_rank_killed_before_the_commit_costs_only_that_save(tmp_path: Path, failpoint: str, victim: int) -> None:
    root = tmp_path / "root"
    (before,) = save_all(root, 10, example_state(1))
    save_and_be_killed(tmp_path, failpoint, victim, 20, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an uncommitted folder is not even a skipped checkpoint
        checkpoint = load(root)
    assert checkpoint.step == 10
    assert_holds(checkpoint, example_state(1))
    debris = store.uncommitted_folders(root)
    assert len(debris) == 1
    (after,) = save_all(root, 20, example_state(2))
    assert after not in (before, *debris)
    assert sorted(root.iterdir()) == sorted([before, after, root / "latest"])
    assert_holds(load(root), example_state(2))


@pytest.mark.parametrize(("failpoint", "victim"), AFTER_THE_COMMIT)
def test_a_rank_killed_after_the_commit_leaves_the_new_checkpoint(tmp_path: Path, failpoint: str, victim: int) -> None:
    root = tmp_path / "root"
    save_all(root, 10, example_state(1))
    save_and_be_killed(tmp_path, failpoint, victim, 20, seed=2)
    checkpoint = load(root)
    assert checkpoint.step == 20
    assert_holds(checkpoint, example_state(2))


# --- damage at rest ------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_and_any_cut_is_skipped_with_its_reason(data: st.DataObject, tmp_path: Path) -> None:
    root = tmp_path / "root"
    try:
        save_all(root, 1, example_state(1), (0.5,))
        newest = save_all(root, 2, example_state(2), (0.5,))[0]
        path = data.draw(st.sampled_from(sorted(newest.iterdir())))
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[position] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del content[position:]
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=f"skipped a broken checkpoint: .*{path.name}"):
            checkpoint = load(root)
        assert checkpoint.step == 1
        assert_holds(checkpoint, example_state(1))
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("name", ["rank-00001.safetensors", "MANIFEST.json"])
def test_a_lost_file_is_walked_back_over(tmp_path: Path, name: str) -> None:
    save_all(tmp_path, 1, example_state(1), (0.5,))
    newest = save_all(tmp_path, 2, example_state(2), (0.5,))[0]
    (newest / name).unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load(tmp_path).step == 1
    assert [name in str(warning.message) for warning in caught] == ([True] if name.startswith("rank") else [])


def test_shards_of_two_saves_do_not_mix(tmp_path: Path) -> None:
    first = save_all(tmp_path, 1, example_state(1), (0.5,))[0]
    second = save_all(tmp_path, 2, example_state(2), (0.5,))[0]
    shutil.copy(first / "rank-00001.safetensors", second)
    with pytest.warns(UserWarning, match=r"rank-00001\.safetensors is damaged"):
        assert load(tmp_path).step == 1


def test_where_none_of_the_checkpoints_is_whole_a_person_must_decide(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step, [chunk(0, 10)], {}) / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* is whole: .*begin again"):
        latest(tmp_path)


# --- no room -------------------------------------------------------------------------------------------------------

_FULL_DISK = """
import sys
from pathlib import Path
import torch
from checkpointing.sharded import Chunk, latest, save
from checkpointing.store import CheckpointError
from tests.checkpointing.simulated_ranks import assert_holds, example_state, in_processes, in_threads, shard

disk = Path(sys.argv[1])
root = disk / "checkpoints"

def chunks(mib, value):
    return [Chunk("param", "w", 0, (mib << 18,), torch.full((mib << 18,), value))]

def refused(act):
    try:
        act()
    except CheckpointError as error:
        print(error)
    else:
        raise SystemExit("the save was not refused")
    assert sorted(path.name for path in root.iterdir()) == ["latest", good.name]
    checkpoint = latest(root)
    assert checkpoint.step == 1 and checkpoint.read("param", "w").eq(1.0).all()

def a_neighbour_takes_the_room(mine, calls=[]):
    calls.append(mine)
    if len(calls) == 2:  # the free space was checked, and nothing is written yet
        (disk / "neighbour").write_bytes(bytes(5 << 20))
    return [mine]

good = save(root, 1, chunks(1, 1.0), {})
refused(lambda: save(root, 2, chunks(12, 2.0), {}))
refused(lambda: save(root, 3, chunks(3, 3.0), {}, gather=a_neighbour_takes_the_room))
(disk / "neighbour").unlink()
save(root, 4, chunks(3, 4.0), {})
assert latest(root).step == 4
"""

_REPOSITORY = Path(__file__).parents[2]
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
    assert "bytes free and the checkpoint of step 2 needs 13,631,488" in before
    assert "rank-00000.safetensors could not be written past byte" in during
    assert during.endswith("No space left on device")


def test_a_write_that_fails_on_one_rank_fails_the_save_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    save_all(root, 1, example_state(1))
    before = sorted(root.iterdir())
    seen = tmp_path / "errors"

    def work(rank: int, gather: Any) -> None:
        if rank == 1:  # this rank's files may not grow past 4 KiB, which its share of the tensor does
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            mine = [Chunk("param", "w", 10 * rank, (10_010,), torch.ones(10_000 if rank else 10))]
            save(root, 2, mine, STATE, rank=rank, world_size=2, gather=gather)
        except CheckpointError as error:
            with seen.open("a") as file:
                file.write(f"{error}\n")
            raise

    assert in_processes(2, tmp_path / "talk", work, {}) == [1, 1]
    first, second = seen.read_text().splitlines()
    assert first == second
    assert first.startswith("rank 1: ")
    assert "rank-00001.safetensors could not be written past byte" in first
    assert first.endswith("File too large")
    assert sorted(root.iterdir()) == before
    assert load(root).step == 1
