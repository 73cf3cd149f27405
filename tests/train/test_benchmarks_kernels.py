"""The kernels' bench asks for what the issue asks, compares like with like, and leaves empty what it cannot measure."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import tiles
from kernels.tiles import Tile, read_tiles, tuned, write_tiles
from train import benchmarks_gpu, benchmarks_kernels
from train.benchmarks_gpu import Contest, Rates, Times, Work, compete, faster_than, not_measured, tflops, tune

ROOT = Path(__file__).resolve().parents[2]
NEEDLESS = ("pydantic", "blake3", "deepspeed", "opacus", "dp_accounting", "cryptography", "wandb", "models", "privacy")

TARGETS = {
    "attention.forward.d64_n4096.tflops": 400,
    "attention.forward.d72_n4096.tflops": 380,
    "attention.forward.d128_n4096.tflops": 470,
    "attention.backward.d64_n4096.tflops": 260,
    "attention.backward.d72_n4096.tflops": 240,
    "attention.backward.d128_n4096.tflops": 320,
    "attention.backward.d64_n4096.faster_than_sdpa_deterministic": 1.5,
    "attention.backward.d72_n4096.faster_than_sdpa_deterministic": 1.5,
    "attention.backward.d128_n4096.faster_than_sdpa_deterministic": 1.5,
    "attention.unified_mask.d64_n8192.faster_than_flex_attention": 1.3,
    "adaln.forward.d1152.of_copy_bandwidth": 92,
    "adaln.backward.d1152.of_copy_bandwidth": 85,
    "adaln.backward.d1152.faster_than_compiled": 1.3,
    "moe.forward.e8_a2.of_cublas": 80,
    "moe.forward.e128_a8.of_cublas": 65,
    "moe.forward.e8_a2.faster_than_grouped_mm": 1.2,
    "moe.forward.e128_a8.faster_than_grouped_mm": 1.2,
    "ghost_norm.dit_xl_block.t256.cost_over_backward": 10,
    "ghost_norm.dit_xl_block.t1024.cost_over_backward": 30,
    "noisy_adamw_ema.of_copy_bandwidth": 85,
    "noisy_adamw_ema.cost_over_noise_free": 5,
}


def test_every_target_of_the_issue_has_its_row() -> None:
    rows = {row["name"].removeprefix("kernels."): row for row in not_measured(benchmarks_kernels.contests())}
    assert TARGETS.items() <= {name: row.get("target") for name, row in rows.items()}.items()


def test_without_a_gpu_its_rows_are_empty_and_those_of_the_cpu_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmarks_kernels, "_cpu_ratio", lambda ours, plain: 1.01)
    rows = benchmarks_kernels.kernels()
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        arithmetic = row["name"].endswith((".flops", ".bytes"))
        on_cpu = row["name"].startswith("kernels.cpu.")
        assert (row["value"] is not None) == (arithmetic or on_cpu), row
        assert row.get("ok") == (True if on_cpu else None), row
    assert {row["value"] for row in rows if row["name"].endswith("attention.forward.d64_n4096.flops")} == {
        4 * 64 * 4096**2 * 16 * 4 / 1e9
    }


SMALL: dict[str, Callable[[], Sequence[Contest]]] = {
    "attention_forward": lambda: [benchmarks_kernels._attention_forward(16, 2, 2, 40, [])],
    "attention_backward": lambda: [benchmarks_kernels._attention_backward(16, 2, 2, 40, [])],
    "adaln": lambda: list(benchmarks_kernels._adaln(2, 9, 24)),
    "moe": lambda: list(benchmarks_kernels._moe(4, 2, 32, 16, 24, [])),
    "qk_norm_rope": lambda: list(benchmarks_kernels._qk_norm_rope(2, 16, 3, 16)),
    "rms_norm": lambda: list(benchmarks_kernels._rms_norm(2, 5, 24)),
}


@pytest.fixture
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(benchmarks_kernels, "_compiled", lambda function: function)


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("name", SMALL)
def test_rivals_compute_what_ours_does(name: str) -> None:
    for contest in SMALL[name]():
        inputs, made = contest.inputs(), dict[str, list[Tensor]]()
        for contestant in contest.contestants.keys() - {"cublas", "sdpa_cudnn"}:  # of other matrices; not on a CPU
            torch.manual_seed(0)  # a backward's gradients of its outputs
            given = contest.contestants[contestant](inputs)()
            made[contestant] = [given] if isinstance(given, Tensor) else list(given)
        assert len(made) > 1
        for rival in made.values():
            for value, expected in zip(rival, made["ours"], strict=True):
                assert (value - expected).norm() <= 1e-2 * expected.norm(), (contest.name, made.keys())


@pytest.mark.usefixtures("_on_the_cpu")
def test_the_dense_rival_of_the_experts_does_as_many_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for contest in benchmarks_kernels._moe(4, 2, 32, 16, 24, []):
        work = contest.contestants["cublas"](contest.inputs())
        with FlopCounterMode(display=False) as counter:
            work()
        assert counter.get_total_flops() == contest.flops


@pytest.mark.usefixtures("_on_the_cpu")
def test_flex_attention_is_given_our_mask() -> None:
    contest = benchmarks_kernels._attention_unified(16, 2, 2, 512)
    inputs = contest.inputs()
    q, k, v = (inputs[name].detach() for name in "qkv")
    expected = benchmarks_kernels.attention(q, k, v, inputs["mask"])
    found = benchmarks_kernels._flex(q, k, v, benchmarks_kernels._flex_mask(inputs["mask"]))
    assert (found - expected).norm() <= 1e-2 * expected.norm()
    assert (benchmarks_kernels.attention(q, k, v) - expected).norm() > 0.1 * expected.norm()


@pytest.mark.usefixtures("_on_the_cpu")
def test_ghost_norms_come_on_top_of_the_same_backward() -> None:
    contest = benchmarks_kernels._ghost_norm(2, 4, 10)
    inputs = contest.inputs()
    gradients = contest.contestants["backward"](inputs)()
    norms = contest.contestants["ours"](inputs)()
    left, right = gradients[-4], inputs["factors"][0]
    exact = torch.einsum("bnd,bnp->bdp", left.double(), right.double()).square().sum((1, 2))
    torch.testing.assert_close(norms[0].double(), exact, rtol=1e-3, atol=0)
    assert len(norms) == 4


@pytest.mark.usefixtures("_on_the_cpu")
def test_pytorchs_own_update_is_ours_without_noise() -> None:
    contest = benchmarks_kernels._noisy_adamw_ema(2, 4096)
    first = contest.inputs()["shards"]
    left = {}
    for name in ("ours", "noise_free", "torch_fused"):
        shards = [[tensor.clone() for tensor in tensors] for tensors in first]
        contest.contestants[name]({"shards": shards})()
        left[name] = torch.cat([tensor.float() for tensors in shards for tensor in tensors])
    torch.testing.assert_close(left["torch_fused"], left["noise_free"], rtol=1e-5, atol=1e-6)
    assert (left["ours"] - left["noise_free"]).abs().max() > 0.01


def test_goals_compare_in_the_promised_direction() -> None:
    contest = Contest("op", flops=2 * 10**12, num_bytes=10**9, inputs=dict, contestants={"ours": _never, "old": _never})
    times = Times({"ours": [2.0, 4.0, 3.0], "old": [3.0, 6.0, 9.0]}, Rates(copy=1e9, matmul=1e12))
    assert tflops(1).value(contest, times) == pytest.approx(2 / 3)
    assert benchmarks_gpu.copy_bandwidth(1).value(contest, times) == pytest.approx(100 / 3)
    assert faster_than("old", 1).value(contest, times) == 1.5  # median of the rounds' ratios 1.5, 1.5, 3
    assert benchmarks_gpu.cost_over("old", 10).value(contest, times) == pytest.approx(-100 / 3)
    assert faster_than("another", 1).value(contest, times) is None
    assert contest.floor_s(times.rates) == 2.0  # its arithmetic takes longer than its memory traffic

    goals = [tflops(1), faster_than("old", 1.5), benchmarks_gpu.cost_over("old", 10), faster_than("another", 1)]
    with_goals = Contest("op", 1, 1, dict, {"ours": _never, "old": _never}, goals)
    verdicts = [row.get("ok") for row in with_goals.rows(times) if row.get("target") is not None]
    assert verdicts == [False, True, True, None]


def _never(inputs: object) -> Work:
    raise AssertionError("not to be run")


class FakeEvent:
    def __init__(self, *, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A GPU whose graphs are calls and whose clock is the host's."""
    properties = SimpleNamespace(L2_cache_size=100)
    for name, value in {
        "Stream": lambda: None, "stream": nullcontext, "current_stream": lambda: None, "synchronize": lambda: None,
        "empty_cache": lambda: None, "get_device_properties": lambda: properties, "Event": FakeEvent,
        "is_available": lambda: True, "get_device_name": lambda: "Invented GPU 1",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    monkeypatch.setattr(benchmarks_gpu, "_graphed", lambda works, stream: benchmarks_gpu._called(works))
    monkeypatch.setattr(benchmarks_gpu, "_rates", lambda: Rates(copy=1e12, matmul=1e14))
    monkeypatch.setattr(benchmarks_gpu, "SECONDS", 0.0)
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles._of_this_gpu.cache_clear()
    yield
    tiles._of_this_gpu.cache_clear()


def sleeping(seconds: float) -> Callable[[Any], Work]:
    return lambda inputs: lambda: time.sleep(seconds)


def failing(inputs: object) -> Work:
    raise RuntimeError("head width 72\nis not supported")


@pytest.mark.usefixtures("fake_gpu")
def test_rivals_run_in_turn_over_buffers_beyond_the_cache() -> None:
    made = list[int]()
    contest = Contest(
        "op", 10**9, 60, lambda: {"number": made.append(len(made))},
        {"ours": sleeping(0.001), "old": sleeping(0.004)}, [faster_than("old", 2.0)],
    )  # fmt: skip
    rows = {row["name"]: row for row in compete([contest])}
    assert len(made) == 2 * 5  # 3 x 100 bytes of cache in sets of 60 bytes, for each contestant
    assert rows["kernels.op.faster_than_old"]["ok"] is True
    p20, p50, p80 = (rows[f"kernels.op.ours.p{percentile}"]["value"] for percentile in (20, 50, 80))
    assert 1000 <= p20 <= p50 <= p80  # type: ignore[operator]
    assert rows["kernels.op.roofline"]["value"] == pytest.approx(10)  # 1e9 FLOP at 1e14 FLOP/s, in us
    assert rows["kernels.op.of_roofline"]["value"] == pytest.approx(100 * 10 / p50)  # type: ignore[operator]
    assert set(rows) == {row["name"] for row in not_measured([contest])}


@pytest.mark.usefixtures("fake_gpu")
def test_a_rival_that_cannot_run_is_not_measured_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    contest = Contest("op", 1, 100, dict, {"ours": sleeping(0.0), "old": failing}, [tflops(0), faster_than("old", 2.0)])
    rows = {row["name"]: row for row in compete([contest])}
    assert rows["kernels.op.ours.p50"]["value"] is not None
    assert (rows["kernels.op.old.p50"]["value"], rows["kernels.op.faster_than_old"].get("ok")) == (None, None)
    assert "op.old: not measured: RuntimeError: head width 72" in caplog.text


@pytest.mark.usefixtures("fake_gpu")
def test_an_op_of_ours_that_cannot_run_fails_the_measurement_but_not_the_others() -> None:
    broken = Contest("broken", 1, 100, dict, {"ours": failing}, [tflops(1)])
    whole = Contest("whole", 1, 100, dict, {"ours": sleeping(0.0)})
    rows = {row["name"]: row for row in compete([broken, whole])}
    assert rows["kernels.broken.failed"]["ok"] is False
    assert rows["kernels.broken.failed"]["value"] == "RuntimeError: head width 72"
    assert rows["kernels.whole.ours.p50"]["value"] is not None


@pytest.mark.usefixtures("fake_gpu")
def test_past_the_deadline_nothing_begins() -> None:
    contest = Contest("op", 1, 100, dict, {"ours": _never}, [tflops(1)])
    values = {row["name"]: row["value"] for row in compete([contest], deadline=time.monotonic() - 1)}
    assert values["kernels.op.ours.p50"] is None
    assert values["kernels.op.tflops"] is None


@pytest.mark.usefixtures("fake_gpu")
def test_tuning_takes_a_faster_tile_and_refuses_a_wrong_or_a_broken_one(tmp_path: Path) -> None:
    path = tiles.tile_file("Invented GPU 1", "3.6")
    write_tiles(path, {("another", "K=1"): Tile({}, 1, 1)})
    default = Tile({"BLOCK": 32}, num_warps=4, num_stages=1)

    def ours(inputs: Any) -> Work:
        def work() -> Tensor:
            tile = tuned("op", "K=64", default)
            if tile.constants["BLOCK"] > 64:
                raise ValueError("shared memory")
            time.sleep(0.0005 if tile.num_warps == 2 else 0.002 if tile.constants["BLOCK"] == 64 else 0.004)
            return torch.tensor(float("nan") if tile.num_warps == 2 else 1.0)

        return work

    tune([Contest("op", 1, 1000, dict, {"ours": ours})], path)
    found = read_tiles(path)
    assert found["op", "K=64"].constants == {"BLOCK": 64}
    assert found["op", "K=64"].num_warps != 2
    assert found["another", "K=1"] == Tile({}, 1, 1)


def test_a_tiles_neighbours_differ_in_one_thing_and_do_not_outgrow_a_masks_blocks() -> None:
    tile = Tile({"ROWS": 128, "COLUMNS": 256, "FLAG": 1}, num_warps=2, num_stages=1)
    neighbours = list(benchmarks_gpu._neighbours(tile))
    assert {tuple(other.constants.values()) for other in neighbours} == {
        (128, 256, 1), (64, 256, 1), (128, 128, 1), (128, 256, 0),
    }  # fmt: skip
    assert [(other.num_warps, other.num_stages) for other in neighbours[-2:]] == [(4, 1), (2, 2)]


def test_what_pytorch_was_told_of_determinism_is_as_it_was() -> None:
    with benchmarks_kernels._deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_the_gpu_machine_needs_little_of_what_we_depend_on() -> None:
    code = f"import sys, train.benchmarks_kernels; print([m for m in {NEEDLESS} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["kernels", "--tune"], "torch sees none: leave it out"), (["pii", "--tune"], "--tune is for kernels")],
)
def test_tuning_is_refused_where_it_means_nothing(arguments: list[str], said: str) -> None:
    if torch.cuda.is_available() and arguments[0] == "kernels":
        pytest.skip("there is a GPU to tune for")
    done = subprocess.run(
        [sys.executable, "scripts/bench.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
