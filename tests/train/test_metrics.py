"""Metrics: one row a step whatever happened, nothing private by accident, nothing on the network unasked."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.metrics import MetricsLogger, Throughput, format_mfu, plot_curves, read_metrics

_REPOSITORY = Path(__file__).parents[2]


def logger(folder: Path, resume_step: int = 0, operator: bool = False) -> MetricsLogger:
    return MetricsLogger(folder, "pretrain", {}, wandb_mode="disabled", resume_step=resume_step, operator=operator)


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder)]


def test_a_row_can_be_read_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    metrics = logger(tmp_path)
    metrics.log(0, loss=0.5, note="warm-up", mfu=None)
    assert list(read_metrics(tmp_path)) == [{"step": 0, "loss": 0.5, "note": "warm-up", "mfu": None}]
    metrics.close()


def test_tensors_and_numpy_scalars_are_numbers(tmp_path: Path) -> None:
    with logger(tmp_path) as metrics:
        metrics.log(1, a=torch.tensor(0.5), b=np.float32(0.25), c=np.int64(3))
    assert list(read_metrics(tmp_path)) == [{"step": 1, "a": 0.5, "b": 0.25, "c": 3.0}]


def test_a_value_that_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    with logger(tmp_path) as metrics:
        metrics.log(1, loss=float("nan"), epsilon=float("inf"), images_per_s=2.0)
    (row,) = read_metrics(tmp_path)
    assert row == {"step": 1, "loss": None, "epsilon": None, "images_per_s": 2.0, "non_finite": ["loss", "epsilon"]}


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    with logger(tmp_path) as metrics:
        for step in range(10):
            metrics.log(step, loss=1.0)
    with logger(tmp_path, resume_step=6) as metrics:
        for step in range(6, 12):
            metrics.log(step, loss=2.0)
    assert steps(tmp_path) == list(range(12))
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0] * 6 + [2.0] * 6


def test_a_line_torn_by_a_crash_is_dropped(tmp_path: Path) -> None:
    with logger(tmp_path) as metrics:
        metrics.log(0, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    with logger(tmp_path, resume_step=5) as metrics:
        metrics.log(5, loss=1.0)
    assert steps(tmp_path) == [0, 5]


def test_a_damaged_line_is_an_error_naming_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nrubbish\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not JSON"):
        logger(tmp_path, resume_step=5)


def test_operator_only_values_are_refused_unless_allowed(tmp_path: Path) -> None:
    with logger(tmp_path) as metrics, pytest.raises(ValueError, match=r"clip_fraction .* privacy\.operator_metrics"):
        metrics.log_operator_only(1, clip_fraction=0.3)
    assert steps(tmp_path) == []


def test_operator_only_rows_are_marked_and_in_no_picture(tmp_path: Path) -> None:
    with logger(tmp_path, operator=True) as metrics:
        metrics.log_operator_only(1, loss=0.3)
    assert list(read_metrics(tmp_path)) == [{"step": 1, "operator_only": True, "loss": 0.3}]
    assert plot_curves(tmp_path) is None


# --- Weights & Biases ----------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server that wandb is told to use, which hangs up on everyone; the list of who called."""
    callers: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connection, address = listener.accept()
                except OSError:
                    return
                callers.append(str(address))
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield callers
        listener.shutdown(socket.SHUT_RDWR)


_RUN = """
import sys
from pathlib import Path
from train.metrics import MetricsLogger
folder, mode = sys.argv[1:]
try:
    metrics = MetricsLogger(Path(folder), "pretrain", {"lr": 1e-3}, wandb_mode=mode, operator=True)
except ValueError as error:
    sys.exit(f"refused: {error}")
with metrics:
    for step in range(3):
        metrics.log(step, loss=0.123456)
    metrics.log_operator_only(3, raw_loss=0.654321)
"""


def run(folder: Path, mode: str, tracer: tuple[str, ...] = (), **environment: str) -> tuple[int, str]:
    """Exit status and everything said by a process that logs three steps; wandb keeps its settings for a process."""
    command = [*tracer, sys.executable, "-c", _RUN, str(folder), mode]
    environment = {**os.environ, "HOME": str(folder), **environment}
    done = subprocess.run(command, cwd=_REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_offline_wandb_is_quiet_calls_nobody_and_stays_in_the_folder(tmp_path: Path, server: list[str]) -> None:
    assert run(tmp_path, "offline") == (0, "")
    assert server == []
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"0.123456" in content
    assert b"raw_loss" not in content
    assert steps(tmp_path) == [0, 1, 2, 3]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is what sees every connection")
def test_offline_wandb_asks_not_even_for_a_name(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    tracer = ("strace", "-f", "-qq", "-e", "trace=connect,sendto", "-o", str(trace))
    assert run(tmp_path, "offline", tracer, WANDB_API_KEY="0" * 40) == (0, "")
    assert "AF_UNIX" in trace.read_text()  # to its own service: the trace does see connections
    assert "AF_INET" not in trace.read_text()


def test_online_wandb_without_a_key_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    status, said = run(tmp_path, "online", WANDB_BASE_URL="http://127.0.0.1:9")
    assert status == 1
    assert "refused: wandb is online, but no run could be started: No API key configured" in said
    assert "Set wandb: offline" in said


@pytest.mark.slow
def test_online_wandb_without_a_network_is_a_clear_error(tmp_path: Path, server: list[str]) -> None:
    status, said = run(tmp_path, "online")
    assert status == 1
    assert "refused: wandb is online, but no run could be started: " in said
    assert server != []


# --- throughput and curves -----------------------------------------------------------------------------------------


def test_throughput_counts_three_forwards() -> None:
    now = iter([10.0, 12.0, 15.0])
    throughput = Throughput(peak_flops=1.2e12, clock=lambda: next(now))
    throughput.count(60, 120e9)
    throughput.count(40, 80e9)
    assert throughput.read() == pytest.approx({"images_per_s": 50.0, "tflops": 0.3, "mfu": 0.25})
    assert throughput.read() == pytest.approx({"images_per_s": 0.0, "tflops": 0.0, "mfu": 0.0})


def test_without_a_known_peak_the_mfu_is_not_available() -> None:
    assert Throughput(peak_flops=None).read()["mfu"] is None
    assert format_mfu(None) == "n/a"
    assert format_mfu(0.4125) == "41.2%"


def test_curves_are_drawn_of_what_was_logged(tmp_path: Path) -> None:
    assert plot_curves(tmp_path) is None
    with logger(tmp_path) as metrics:
        for step in range(40):
            metrics.log(step, loss=1 / (step + 1), epsilon=step / 10)
    path = plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    with Image.open(path) as two_panels:
        two_width = two_panels.width
        assert np.asarray(two_panels.convert("L")).std() > 5
    with logger(tmp_path, resume_step=40) as metrics:
        for step, panels in ((40, 2), (41, 3)):  # a curve takes two values
            metrics.log(step, loss=float("nan"), images_per_s=10.0)
            plot_curves(tmp_path)
            with Image.open(path) as picture:
                assert picture.width == two_width * panels // 2


def test_importing_metrics_imports_neither_wandb_nor_matplotlib_nor_torch() -> None:
    check = "import sys, train.metrics; print([m for m in ('wandb', 'matplotlib', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=_REPOSITORY, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
