"""What a save costs the training loop, and what reading one back costs, beside torch.save, DCP and the disk itself.

Beside the loop's forward and backward on all cores, the same state is saved by each rival in turn, buffers warm. A
save's stall is how long the loop stands still for it. What it adds is how much later the loop is, all told, once the
save is over and the disk has had time to take it: the time of the steps meanwhile less that of as many steps before.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from checkpointing.layout import Piece, SaveId
from checkpointing.places import LocalPlace
from checkpointing.sharded import Checkpoint, Chunk, save_now
from checkpointing.tiers import Checkpointer, Tiers, memory_folder
from models.dit import DiTConfig
from train.benchmarks import fixed_losses, one_process, ratio, seconds
from train.measurements import Row

ROUNDS = {100 * 10**6: 12, 10**9: 5, 4 * 10**9: 3}  # by bytes of state: what a small one costs is harder to see
_TENSORS = 16  # that the state is made of
_BLOCK_BYTES = 1 << 23
_STATE_BYTES_AN_ELEMENT = 16  # weight, two moments and average, in fp32
_BASELINE_S = 2.0
_WINDOW_S_A_GB = 2.0  # after a save: what it leaves to the kernel to write still costs the loop

log = logging.getLogger(__name__)


def checkpoint(rounds_by_size: Mapping[int, int] = ROUNDS) -> list[Row]:
    """Stall and added time of a save over the rivals', and synchronous saves and loads over the disk's own speed."""
    rows: list[Row] = []
    for size_bytes, rounds in rounds_by_size.items():
        log.info("state of %.3g GB", size_bytes / 1e9)
        with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as name:
            rows += _beside_the_loop(Path(name), size_bytes, rounds)
        with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as name:
            rows += _against_the_disk(Path(name), size_bytes, rounds)
    return rows


# --- beside the loop -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Saver:
    """How one rival saves: `begin` is called between two steps, `settle` before the weights change."""

    begin: Callable[[], object]
    settle: Callable[[], object] = lambda: None
    over: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class _Cost:
    stall_s: float
    added_s: float
    background_s: float


class _Loop:
    """Steps of the digits recipe's model, on all cores, each with as many microbatches as make it as long as the step
    of a model would be whose state is what is saved: the weights may not change while they are copied.
    """

    def __init__(self, state_bytes: int) -> None:
        config = DiTConfig(size="nano", image_size=8, channels=1, patch_size=2, num_classes=10)
        self.backend = one_process(config)
        self.losses = fixed_losses(config, 64, self.backend.world.device)
        self.microbatches = max(1, round(state_bytes / (_STATE_BYTES_AN_ELEMENT * self.backend.num_elements)))

    def step(self, settle: Callable[[], object] = lambda: None) -> float:
        """Runs one step; returns how long `settle` took within it."""
        for _ in range(self.microbatches):
            self.backend.backward(self.losses(self.backend.model).mean())
        stall = seconds(settle)
        self.backend.update(1e-3)
        return stall

    def steps_for(self, limit_s: float) -> float:
        """Seconds of a step, from as many as fit."""
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < limit_s:
            self.step()
            count += 1
        return (time.perf_counter() - begin) / count

    def cost(self, saver: _Saver, window_s: float) -> _Cost:
        os.sync()
        before = self.steps_for(max(_BASELINE_S, window_s / 2))
        begin, steps = time.perf_counter(), 0
        stall, over_after = seconds(saver.begin), None
        while over_after is None or time.perf_counter() - begin < window_s:
            stall += self.step(saver.settle)
            steps += 1
            if over_after is None and saver.over():
                over_after = time.perf_counter() - begin
        elapsed = time.perf_counter() - begin
        os.sync()
        after = self.steps_for(max(_BASELINE_S, window_s / 2))
        return _Cost(stall, elapsed - steps * (before + after) / 2, over_after)


def _beside_the_loop(folder: Path, size_bytes: int, rounds: int) -> list[Row]:
    state = _state(size_bytes)
    loop = _Loop(size_bytes)
    window_s = 2 + _WINDOW_S_A_GB * size_bytes / 1e9
    with ExitStack() as stack:
        savers = {
            "ours": stack.enter_context(_ours(folder, state)),
            "torch": _torch_save(folder, state),
            "dcp_async": _dcp_async(folder, state),
            "dcp": _Saver(lambda: dcp.save(state, storage_writer=_dcp_writer(folder / "dcp"))),
            "nothing": _Saver(lambda: None),  # what it seems to add is the noise of all
        }
        costs: dict[str, list[_Cost]] = {name: [] for name in savers}
        for number in range(rounds + 1):  # the first is not counted but for what is first in it
            names = list(savers)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                cost = loop.cost(savers[name], window_s)
                log.info(
                    "round %d, %s: stall %.4f s, added %.3f s, over after %.2f s",
                    number, name, cost.stall_s, cost.added_s, cost.background_s,
                )  # fmt: skip
                costs[name].append(cost)
    first = costs["ours"][0].stall_s
    counted = {name: values[1:] for name, values in costs.items()}

    def middle(work: str, rival: str, part: Callable[[_Cost], float]) -> float:
        return statistics.median(part(a) / part(b) for a, b in zip(counted[work], counted[rival], strict=True))

    def stall(cost: _Cost) -> float:
        return cost.stall_s

    # Where nothing can be seen of a save, noise is as often below zero as above: a median of seconds, then the ratio.
    added = {name: statistics.median(cost.added_s for cost in values) for name, values in counted.items()}
    stalled = {name: statistics.median(map(stall, values)) for name, values in counted.items()}
    label = _label(size_bytes)
    return [
        *(Row(name=f"checkpoint.{label}.stall.{name}", value=value, unit="s") for name, value in stalled.items()),
        *(Row(name=f"checkpoint.{label}.added.{name}", value=value, unit="s") for name, value in added.items()),
        Row(
            name=f"checkpoint.{label}.background.ours",
            value=statistics.median(cost.background_s for cost in counted["ours"]),
            unit="s",
        ),
        _at_most(f"checkpoint.{label}.stall_over_torch_save", middle("ours", "torch", stall), 0.05),
        _at_most(f"checkpoint.{label}.stall_over_dcp_async", middle("ours", "dcp_async", stall), 0.5),
        _at_most(f"checkpoint.{label}.added_over_torch_save", _over(added, "torch"), 0.2),
        _at_most(f"checkpoint.{label}.added_over_dcp_async", _over(added, "dcp_async"), 1.0),
        _at_most(f"checkpoint.{label}.first_stall_over_torch_save", first / stalled["torch"], 0.05),
    ]


@contextmanager
def _ours(folder: Path, state: dict[str, Tensor]) -> Iterator[_Saver]:
    pieces = [Piece("param", name, 0, len(tensor), (len(tensor),)) for name, tensor in state.items()]
    memory = memory_folder(f"bench-{os.getpid()}", folder.name, 0)
    tiers, tensors = Tiers(folder / "ours", memory, keep=1), list(state.values())
    asked: list[int] = []
    with Checkpointer(tiers, pieces, rank=0, world_size=1, epoch=1, agree=lambda values: values) as checkpointer:

        def begin() -> None:
            asked.append(len(asked) + 1)
            checkpointer.snapshot(asked[-1], tensors, {}, durable=True)

        def over() -> bool:
            newest = checkpointer.newest_durable()
            return newest is not None and newest.step == asked[-1]

        yield _Saver(begin, checkpointer.settle, over)
        checkpointer.finish()


def _torch_save(folder: Path, state: dict[str, Tensor]) -> _Saver:
    return _Saver(lambda: torch.save(state, folder / "rival.pt"))


def _dcp_async(folder: Path, state: dict[str, Tensor]) -> _Saver:
    """With its staging buffers kept, as ours are."""
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    stager = DefaultStager(options)
    under_way: list[Any] = []

    def begin() -> None:
        under_way[:] = [dcp.async_save(state, storage_writer=_dcp_writer(folder / "dcp_async"), async_stager=stager)]

    return _Saver(begin, over=lambda: bool(under_way[0].done()))


def _dcp_writer(folder: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(folder, overwrite=True)


# --- against the disk ----------------------------------------------------------------------------------------------


def _against_the_disk(folder: Path, size_bytes: int, rounds: int) -> list[Row]:
    state = _state(size_bytes)
    chunks = [Chunk("param", name, 0, (len(tensor),), tensor) for name, tensor in state.items()]
    place, saves = LocalPlace(folder / "ours"), iter(SaveId(1, n, 1) for n in range(1, 2 * rounds + 9))
    saved: list[SaveId] = []
    raw, raw_bytes = folder / "raw", torch.cat(list(state.values())).numpy().data.cast("B")
    buffer = torch.empty(max(map(len, state.values())))
    scratch = bytearray(_BLOCK_BYTES)

    def save() -> None:
        saved.append(next(saves))
        save_now(place, saved[-1], chunks, {})

    def load() -> None:
        found = Checkpoint.open(place, saved[-1])
        for name, tensor in state.items():
            found.read_into("param", name, 0, buffer[: len(tensor)])

    def write() -> None:
        descriptor = os.open(raw, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for begin in range(0, len(raw_bytes), _BLOCK_BYTES):
            os.write(descriptor, raw_bytes[begin : begin + _BLOCK_BYTES])
        os.fsync(descriptor)
        os.close(descriptor)

    def read() -> None:
        with raw.open("rb", buffering=0) as file:
            while file.readinto(scratch):
                pass

    times: dict[str, list[float]] = {"save": [], "write": [], "load": [], "read": []}
    writing, reading = {"save": save, "write": write}, {"load": load, "read": read}
    for number in range(rounds + 1):
        for works in (writing, reading):
            for name, work in list(works.items())[:: 1 if number % 2 else -1]:
                if name == "save" and saved:
                    place.remove(saved[-1])
                elif name == "write":
                    raw.unlink(missing_ok=True)
                _forget(folder)  # syncs, too: to give back the room of a large file keeps a disk busy for a while
                log.info("round %d of %d: %s", number, rounds, name)
                value = seconds(work)
                if number:  # the first round warms up
                    times[name].append(value)
    label = _label(size_bytes)
    return [
        Row(name=f"checkpoint.{label}.disk_write", value=_speed(size_bytes, times["write"]), unit="GB/s"),
        Row(name=f"checkpoint.{label}.disk_read", value=_speed(size_bytes, times["read"]), unit="GB/s"),
        _at_least(f"checkpoint.{label}.sync_save_over_disk", ratio(times, "write", "save"), 0.8),
        _at_least(f"checkpoint.{label}.verified_load_over_disk", ratio(times, "read", "load"), 0.8),
    ]


def _forget(folder: Path) -> None:
    """Drop the files from the page cache, so that reading them is reading the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _state(size_bytes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    numel = size_bytes // 4 // _TENSORS
    return {f"blocks.{n}.weight": torch.randn(numel, generator=generator) for n in range(_TENSORS)}


def _label(size_bytes: int) -> str:
    return f"{size_bytes // 10**6}MB" if size_bytes < 10**9 else f"{size_bytes // 10**9}GB"


def _speed(size_bytes: int, times: Sequence[float]) -> float:
    return size_bytes / statistics.median(times) / 1e9


def _over(added: Mapping[str, float], rival: str) -> float | None:
    """Ours over a rival's; None where the machine was not quiet enough to see what the rival adds."""
    return added["ours"] / added[rival] if added[rival] > 0 else None


def _at_most(name: str, value: float | None, target: float) -> Row:
    return Row(name=name, value=value, unit="1", target=target, ok=None if value is None else value <= target)


def _at_least(name: str, value: float, target: float) -> Row:
    return Row(name=name, value=value, unit="1", target=target, ok=value >= target)
