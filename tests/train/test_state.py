"""The state of a stage in one process: what is saved, what is filled in, and how little memory a load takes."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.layout import CHUNK_ELEMENTS, CheckpointError, SaveId
from checkpointing.places import LocalPlace
from checkpointing.sharded import Checkpoint, Chunk, latest, save_now
from models.dit import DiT, DiTConfig
from train.config import Optim, Parallel
from train.optim import ExponentialMovingAverage
from train.parallel import Backend, build_model, join_world, shard_model
from train.state import initialise, load_weights, pieces, ranges, restore, tensors

ROOT = Path(__file__).resolve().parents[2]
CONFIG = DiTConfig(width=16, depth=2, heads=2, image_size=8, channels=1, num_classes=10)
OPTIM = Optim(learning_rate=1e-2, weight_decay=0.1)
SINGLE = Parallel(backend="single")


def built(config: DiTConfig = CONFIG) -> Backend:
    return build_model(lambda: DiT(config), join_world(), SINGLE, OPTIM, microbatch_size=4, bf16=False)


def step(backend: Backend, number: int = 0) -> None:
    generator = torch.Generator().manual_seed(number)
    x, t = torch.randn(4, 1, 8, 8, generator=generator), torch.rand(4, generator=generator)
    with backend.microbatch(last=True):
        backend.backward((backend.model(x, t, torch.arange(4)) - x).square().mean())
    backend.update(1e-2)


def trained(steps: int = 3) -> tuple[Backend, ExponentialMovingAverage]:
    backend = built()
    initialise(backend, 5)
    average = ExponentialMovingAverage(backend, 0.9)
    for number in range(steps):
        step(backend, number)
        average.update(number + 1)
    return backend, average


def save(root: Path, backend: Backend, average: ExponentialMovingAverage, config: DiTConfig = CONFIG) -> Checkpoint:
    chunks = [
        Chunk(piece.kind, piece.name, piece.offset, piece.shape, tensor.detach())
        for piece, tensor in zip(pieces(backend, average), tensors(backend, average), strict=True)
    ]
    state: dict[str, Any] = {"num_updates": backend.num_updates, "model": config.model_dump()}
    save_now(LocalPlace(root), SaveId(1, 1, 3), chunks, state, rank=0, world_size=1, timeout_s=10)
    checkpoint = latest(root)
    assert checkpoint is not None
    return checkpoint


def test_pieces_name_every_element_of_the_state_once_and_tensors_are_views_of_it() -> None:
    backend, average = trained()
    named = pieces(backend, average)
    sizes = {
        (kind, name): math.prod(s)
        for kind in ("param", "exp_avg", "exp_avg_sq", "ema")
        for name, s in backend.shapes.items()
    }
    assert {(piece.kind, piece.name): piece.length for piece in named} == sizes
    assert named == ranges(backend, average)
    before = tensors(backend, average)
    kept = copy.deepcopy(before)
    step(backend, 9)
    average.update(4)
    for piece, old, now, again in zip(named, kept, before, tensors(backend, average), strict=True):
        assert now.data_ptr() == again.data_ptr()
        assert (len(now), now.dtype) == (piece.length, torch.float32)
        assert not torch.equal(old, now), f"{piece.kind} {piece.name} did not see the step"


def test_pieces_are_the_same_before_the_first_step_as_after_it() -> None:
    backend = built()
    initialise(backend, 0)
    average = ExponentialMovingAverage(backend, 0.9)
    before, zeros = pieces(backend, average), tensors(backend, average)
    assert all(not t.any() for piece, t in zip(before, zeros, strict=True) if piece.kind.startswith("exp_avg"))
    step(backend)
    assert pieces(backend, average) == before


def test_a_model_filled_in_shard_by_shard_starts_and_trains_as_one_built_whole() -> None:
    whole = DiT(CONFIG)
    whole.init_weights(torch.Generator().manual_seed(5))
    reference = shard_model(whole, join_world(), SINGLE, OPTIM, microbatch_size=4, bf16=False)
    backend = built()
    initialise(backend, 5)
    for expected, got in zip(reference.shards, backend.shards, strict=True):
        assert expected.name == got.name and torch.equal(expected.value, got.value)
    for number in range(3):
        step(reference, number)
        step(backend, number)
    assert all(torch.equal(a.value, b.value) for a, b in zip(reference.shards, backend.shards, strict=True))
    assert torch.equal(whole.positions, backend.module.positions)  # type: ignore[arg-type]


def test_a_restored_state_is_the_saved_one_and_goes_on_as_it_would_have(tmp_path: Path) -> None:
    backend, average = trained()
    checkpoint = save(tmp_path, backend, average)
    other = built()
    copied = ExponentialMovingAverage(other, 0.9)
    restore(checkpoint, other, copied)
    assert other.num_updates == 3
    for number in range(3, 5):
        assert all(
            torch.equal(a, b) for a, b in zip(tensors(backend, average), tensors(other, copied), strict=True)
        )  # fmt: skip
        for each, its_average in ((backend, average), (other, copied)):
            step(each, number)
            its_average.update(number + 1)


def test_updates_are_counted_apart_from_steps_for_a_step_may_be_skipped(tmp_path: Path) -> None:
    backend, average = trained(steps=2)
    checkpoint = save(tmp_path, backend, average)  # of step 3: one was skipped
    other = built()
    restore(checkpoint, other, ExponentialMovingAverage(other, 0.9))
    assert {float(state["step"]) for state in other.optimizer.state.values()} == {2.0}


def test_another_stages_average_is_where_a_stage_starts_from(tmp_path: Path) -> None:
    backend, average = trained()
    checkpoint = save(tmp_path, backend, average)
    other = built()
    load_weights(checkpoint, other)
    expected = {shard.name: value for shard, value in average.averages}
    assert all(torch.equal(shard.value, expected[shard.name]) for shard in other.shards)
    assert other.num_updates == 0
    assert all(not state.any() for _, _, state in other.optimizer_tensors())


@pytest.mark.parametrize(
    ("change", "named"),
    [({"width": 32}, "patch_embed.weight"), ({"depth": 3}, "blocks.2."), ({"num_classes": 11}, "class_embed.weight")],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_first_tensor_that_differs(
    tmp_path: Path, change: dict[str, int], named: str
) -> None:
    checkpoint = save(tmp_path, *trained())
    other = built(CONFIG.model_copy(update=change))
    initialise(other, 0)
    before = [shard.value.clone() for shard in other.shards]
    for load in (
        lambda: restore(checkpoint, other, ExponentialMovingAverage(other, 0.9)),
        lambda: load_weights(checkpoint, other),
    ):
        with pytest.raises(CheckpointError, match=f"another model: param {named}"):
            load()
    assert all(torch.equal(old, shard.value) for old, shard in zip(before, other.shards, strict=True))


def test_nothing_changes_before_before_update_has_returned() -> None:
    backend, average = trained()
    expected = copy.deepcopy(tensors(backend, average))
    seen = list[bool]()

    def look() -> None:
        seen.append(all(torch.equal(a, b) for a, b in zip(expected, tensors(backend, average), strict=True)))

    backend.before_update = look
    step(backend, 9)
    assert seen == [True]
    expected, before = copy.deepcopy(tensors(backend, average)), backend.num_updates

    def fail() -> None:
        raise CheckpointError("the snapshot could not be taken")

    backend.before_update = fail
    with pytest.raises(CheckpointError):
        step(backend, 10)
    assert all(torch.equal(a, b) for a, b in zip(expected, tensors(backend, average), strict=True))
    assert backend.num_updates == before


def test_a_model_with_frozen_weights_is_refused_for_no_checkpoint_has_them() -> None:
    def make() -> DiT:
        model = DiT(CONFIG)
        model.patch_embed.requires_grad_(False)
        return model

    with pytest.raises(ValueError, match=r"patch_embed\.weight does not train"):
        build_model(make, join_world(), SINGLE, OPTIM, microbatch_size=4, bf16=False)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 28 million parameters: 450 MB of state."""
    root = tmp_path_factory.mktemp("large")
    config = DiTConfig(width=512, depth=6, heads=8, image_size=8, channels=1, num_classes=10)
    backend = built(config)
    initialise(backend, 0)
    save(root, backend, ExponentialMovingAverage(backend, 0.9), config)
    return root


@pytest.mark.distributed
@pytest.mark.parametrize(("backend", "nproc"), [("single", 1), ("fsdp2", 4), ("zero3", 2)])
def test_a_load_takes_a_ranks_own_share_of_memory_and_one_chunk(
    large: Path, tmp_path: Path, backend: str, nproc: int
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    done = subprocess.run(
        [*command, "tests/train/load_worker.py", str(large), str(tmp_path), backend], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for rank in range(nproc):
        figures = json.loads((tmp_path / f"{rank}.json").read_text())
        # DeepSpeed keeps the weights twice, and room for their gradients, which is half as much again.
        own = figures["share"] * (1.5 if backend == "zero3" else 1)
        assert figures["loaded"] <= 1.2 * own + 4 * CHUNK_ELEMENTS, figures
        if backend == "fsdp2":  # weights and AdamW's moments; the whole model beside them would be seen
            assert figures["built"] <= 1.2 * 3 / 4 * own, figures
