"""How an op is timed on a GPU beside its rivals, in one run: CUDA graphs, over buffers that no cache holds, in turn.

Every call of a graph reads and writes memory of its own, together more than three times the second-level cache. What a
time is held against is measured on the same GPU in the same run: the rate of a copy, and cuBLAS's of a large product.
Needs torch, Triton and `kernels` only, so that it runs where the rest of what we depend on is missing.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.tiles import Key, Tile, read_tiles, trial, write_tiles
from train.measurements import Row

Work = Callable[[], Any]  # one call of an op; returns what it made
Inputs = Mapping[str, Any]

OURS = "ours"
CACHES = 3  # times the second-level cache that the buffers of one contestant fill
ROUNDS = (10, 60)
SECONDS = 0.3  # of replays for a contestant, within ROUNDS
BETTER = 0.98  # a tile must be faster by this to take another's place: less is noise
MAX_PASSES = 3  # over a tile's neighbours
LARGEST = 128  # to which a tile's sizes may grow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rates:
    """What this GPU reached: bytes read and written a second by a copy, bf16 FLOP/s of cuBLAS."""

    copy: float
    matmul: float


@dataclass(frozen=True)
class Round:
    """A contestant's calls, one on each of its buffers, which live as long as this does: a graph only has addresses."""

    works: Sequence[Work]
    run: Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of one call of each contestant, in each round."""

    of: Mapping[str, Sequence[float]]
    rates: Rates

    def median(self, name: str = OURS) -> float | None:
        """None where the contestant did not run."""
        return statistics.median(self.of[name]) if name in self.of else None


@dataclass(frozen=True)
class Goal:
    """What is promised of an op's time: `value` is to be at least `target`, or at most where `at_most`."""

    name: str
    unit: str
    value: Callable[[Contest, Times], float | None]
    target: float
    at_most: bool = False


@dataclass(frozen=True)
class Contest:
    """An op at one shape, its rivals, and what it is to reach.

    `inputs` makes one set of buffers on the GPU; each contestant, ours first, makes of a set what is timed. An op that
    brings something from the host at each call cannot be `graphed`: then all contestants are timed with their launches.
    """

    name: str
    flops: int
    num_bytes: int
    inputs: Callable[[], Inputs]
    contestants: Mapping[str, Callable[[Inputs], Work]]
    goals: Sequence[Goal] = field(default=())
    graphed: bool = True

    def rows(self, times: Times | None) -> list[Row]:
        """The contest's rows; without times every one of them is there and empty, but the arithmetic."""
        name = f"kernels.{self.name}"
        rows = [
            Row(name=f"{name}.flops", value=self.flops / 1e9, unit="GFLOP"),
            Row(name=f"{name}.bytes", value=self.num_bytes / 1e6, unit="MB"),
            Row(name=f"{name}.roofline", value=times and 1e6 * self.floor_s(times.rates), unit="us at measured rates"),
            Row(name=f"{name}.of_roofline", value=times and self._of_roofline(times), unit="%"),
        ]
        for contestant in self.contestants:
            seconds = times.of.get(contestant, ()) if times else ()
            tenths = statistics.quantiles(seconds, n=10) if seconds else [None] * 9
            for percentile in (20, 50, 80) if contestant == OURS else (50,):
                value = tenths[percentile // 10 - 1]
                microseconds = None if value is None else 1e6 * value
                rows.append(Row(name=f"{name}.{contestant}.p{percentile}", value=microseconds, unit="us"))
        for goal in self.goals:
            value = goal.value(self, times) if times else None
            met = None if value is None else value <= goal.target if goal.at_most else value >= goal.target
            rows.append(Row(name=f"{name}.{goal.name}", value=value, unit=goal.unit, target=goal.target, ok=met))
        return rows

    def _of_roofline(self, times: Times) -> float | None:
        return _over(100 * self.floor_s(times.rates), times.median())

    def floor_s(self, rates: Rates) -> float:
        """The longer of the times that its arithmetic and its memory traffic take at these rates."""
        return max(self.flops / rates.matmul, self.num_bytes / rates.copy)


def tflops(target: float) -> Goal:
    """Our FLOP/s, by the op's formula."""
    return Goal("tflops", "TFLOP/s", lambda contest, times: _over(contest.flops / 1e12, times.median()), target)


def copy_bandwidth(target: float) -> Goal:
    """Our bytes a second, by the op's formula, in per cent of the copy's."""
    return Goal(
        "of_copy_bandwidth", "%",
        lambda contest, times: _over(100 * contest.num_bytes / times.rates.copy, times.median()), target,
    )  # fmt: skip


def matmul_rate(target: float) -> Goal:
    """Our FLOP/s, by the op's formula, in per cent of what cuBLAS takes for as many, timed as the rival `cublas`."""
    return Goal("of_cublas", "%", lambda _, times: _ratio(times, "cublas", OURS, 100), target)


def faster_than(rival: str, target: float) -> Goal:
    """The rival's time over ours."""
    return Goal(f"faster_than_{rival}", "x", lambda _, times: _ratio(times, rival, OURS), target)


def cost_over(rival: str, target_percent: float) -> Goal:
    """By how many per cent ours, which does more, takes longer than the rival."""

    def value(_: Contest, times: Times) -> float | None:
        ratio = _ratio(times, OURS, rival, 100)
        return None if ratio is None else ratio - 100

    return Goal(f"cost_over_{rival}", "%", value, target_percent, at_most=True)


def gradients_of(forward: Callable[[], Tensor | Sequence[Tensor]], wanted: Sequence[Tensor]) -> Work:
    """The backward of `forward`, which runs here, once, with random gradients of its outputs."""
    made = forward()
    outputs = [made] if isinstance(made, Tensor) else list(made)
    grads = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def compete(contests: Iterable[Contest], deadline: float = math.inf) -> list[Row]:
    """The rows of all contests; one that begins past `deadline` (of time.monotonic) is not measured, and that is said.

    A rival that cannot run is not measured, which is said; where ours cannot, a row with the reason is not ok.
    """
    rows = list[Row]()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # a backward runs on its forward's stream: one for all, which graphs capture
        rates = _rates()
        rows += _rate_rows(rates)
        for contest in contests:
            if time.monotonic() > deadline:
                log.warning("%s: not measured, the time is over", contest.name)
                rows += contest.rows(None)
                continue
            log.info("%s", contest.name)
            rounds, failures = _ready(contest, stream)
            times = None if OURS in failures else Times(_replayed(rounds), rates)
            rows += contest.rows(times)
            if OURS in failures:
                rows.append(Row(name=f"kernels.{contest.name}.failed", value=failures[OURS], unit="", ok=False))
            del rounds
            torch.cuda.empty_cache()
    return rows


def not_measured(contests: Iterable[Contest]) -> list[Row]:
    """The same rows as `compete` makes, empty."""
    return [*_rate_rows(None), *(row for contest in contests for row in contest.rows(None))]


def tune(contests: Iterable[Contest], path: Path) -> None:
    """Try the neighbours of each tile that our contestants ask for, and write the best to `path` after each contest.

    A tile is taken only if what it gives agrees with what the first tile gave, and if it is clearly faster. What `path`
    already holds is where the search begins, and stays where no contest asks for it.
    """
    best = dict[Key, Tile]()
    with torch.cuda.stream(torch.cuda.Stream()):
        for contest in contests:
            stream = torch.cuda.current_stream()
            works = _works(contest, OURS)
            with trial(best) as given:
                expected = _tensors(works[0]())
            if not (expected and contest.graphed):  # what works in place cannot be compared
                log.info("%s: its tiles are left as they are", contest.name)
                continue
            for key in [key for key in given if key not in best]:
                best[key] = _best(contest.name, key, given[key], best, works, expected, stream)
            write_tiles(path, {**read_tiles(path), **best})
            del works, expected
            torch.cuda.empty_cache()


def _best(
    contest: str, key: Key, first: Tile, chosen: Mapping[Key, Tile], works: Sequence[Work],
    expected: Sequence[Tensor], stream: torch.cuda.Stream,
) -> Tile:  # fmt: skip
    """The fastest tile that is reached from `first` by steps to a faster neighbour."""

    def median(tile: Tile) -> float:
        with trial({**chosen, key: tile}):
            made = _tensors(works[0]())
            for value, reference in zip(made, expected, strict=True):
                scale = float(reference.abs().max())
                torch.testing.assert_close(value, reference, rtol=0, atol=1e-2 * scale, equal_nan=True)
            return statistics.median(_replayed({OURS: _graphed(works, stream)})[OURS])

    tile, fastest = first, median(first)
    for _ in range(MAX_PASSES):
        before = tile
        for neighbour in list(_neighbours(tile)):
            try:
                taken = median(neighbour)
            except Exception as error:  # does not compile, does not fit, is refused, or is wrong
                log.info("%s: %s %s: %s", contest, key, neighbour, _reason(error))
                continue
            log.info("%s: %s %s: %.1f us, best %.1f", contest, key, neighbour, 1e6 * taken, 1e6 * fastest)
            if taken < BETTER * fastest:
                tile, fastest = neighbour, taken
        if tile == before:
            break
    return tile


def _neighbours(tile: Tile) -> Iterator[Tile]:
    """A flag turned, a size halved or doubled; past LARGEST only what begins there, for masks list blocks so large."""
    for name, value in tile.constants.items():
        for other in (1 - value,) if value in (0, 1) else (value // 2, 2 * value):
            if other <= max(value, LARGEST):
                yield replace(tile, constants={**tile.constants, name: other})
    for num_warps in (tile.num_warps // 2, 2 * tile.num_warps):
        if num_warps in (2, 4, 8, 16):
            yield replace(tile, num_warps=num_warps)
    for num_stages in (tile.num_stages - 1, tile.num_stages + 1):
        if 1 <= num_stages <= 5:
            yield replace(tile, num_stages=num_stages)


def _ready(contest: Contest, stream: torch.cuda.Stream) -> tuple[dict[str, Round], dict[str, str]]:
    """Each contestant's round, and why the others have none."""
    rounds, failures = dict[str, Round](), dict[str, str]()
    for name in contest.contestants:
        try:
            works = _works(contest, name)
            rounds[name] = _graphed(works, stream) if contest.graphed else _called(works)
        except Exception as error:  # a rival's limits are many, and each is worth a line, not the run
            failures[name] = _reason(error)
            log.warning("%s.%s: not measured: %s", contest.name, name, failures[name])
    return rounds, failures


def _works(contest: Contest, name: str) -> list[Work]:
    cache = torch.cuda.get_device_properties().L2_cache_size
    sets = max(2, math.ceil(CACHES * cache / contest.num_bytes))
    return [contest.contestants[name](contest.inputs()) for _ in range(sets)]


def _called(works: Sequence[Work]) -> Round:
    """Called once already: it is compiled, and has made what a first call makes."""

    def run() -> None:
        for work in works:
            work()

    run()
    return Round(works, run)


def _graphed(works: Sequence[Work], stream: torch.cuda.Stream) -> Round:
    _called(works).run()
    graph = torch.cuda.CUDAGraph()
    kept = list[object]()  # within the capture: memory that is given back would be the next call's, still in the cache
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        kept += [work() for work in works]
    return Round(works, graph.replay)


def _replayed(contestants: Mapping[str, Round]) -> dict[str, list[float]]:
    """Seconds of one call of each in each round; each round begins with another."""
    names = list(contestants)
    longest = max(_seconds(contestant.run) for contestant in contestants.values())
    rounds = min(max(int(SECONDS / longest), ROUNDS[0]), ROUNDS[1])
    events = dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]({name: [] for name in names})
    for number in range(rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contestants[name].run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: [start.elapsed_time(end) / 1e3 / len(contestants[name].works) for start, end in pairs]
        for name, pairs in events.items()
    }


def _seconds(run: Callable[[], object]) -> float:
    """Of the second of two."""
    elapsed = 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    return elapsed


def _rates() -> Rates:
    """By the median, as ours: a copy of a GiB and a bf16 product of 8192 x 8192 x 8192, of random numbers."""
    stream = torch.cuda.current_stream()
    source = torch.randint(-100, 100, (1 << 30,), dtype=torch.int8, device="cuda")
    copies = [functools.partial(torch.empty_like(source).copy_, source) for _ in range(2)]
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    rounds = {"copy": _graphed(copies, stream), "matmul": _graphed([lambda: left @ right] * 2, stream)}
    seconds = {name: statistics.median(values) for name, values in _replayed(rounds).items()}
    return Rates(copy=2 * source.numel() / seconds["copy"], matmul=2 * 8192**3 / seconds["matmul"])


def _rate_rows(rates: Rates | None) -> list[Row]:
    return [
        Row(name="kernels.copy_rate", value=rates and rates.copy / 1e12, unit="TB/s read and written"),
        Row(name="kernels.cublas_rate", value=rates and rates.matmul / 1e12, unit="TFLOP/s, bf16"),
    ]


def _tensors(made: object) -> list[Tensor]:
    values = made if isinstance(made, Sequence) else [made]
    return [value.clone() for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _reason(error: Exception) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}"


def _over(amount: float, seconds: float | None) -> float | None:
    return None if seconds is None else amount / seconds


def _ratio(times: Times, above: str, below: str, scale: float = 1.0) -> float | None:
    """The median over rounds, as in `train.benchmarks.ratio`; None where one of the two did not run."""
    if above not in times.of or below not in times.of:
        return None
    return scale * statistics.median(a / b for a, b in zip(times.of[above], times.of[below], strict=True))
