"""`gpu_check.py` says where it cannot run, and tells what became of every test and figure."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from train import benchmarks_kernels
from train.measurements import Row

ROOT = Path(__file__).resolve().parents[2]

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="0" failures="1" skipped="1" tests="3" time="1.5">
<testcase classname="tests.kernels.test_attention" name="test_bf16[64]" time="0.75" />
<testcase classname="tests.kernels.test_attention" name="test_bf16[72]" time="0.5">
<failure message="AssertionError: 3e-2 &gt; 1e-2&#10;at element 5">traceback</failure></testcase>
<testcase classname="tests.kernels.test_moe" name="test_bf16" time="0.25"><skipped message="one GPU" /></testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts/gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_that(monkeypatch: pytest.MonkeyPatch, status: int, report: str = REPORT) -> list[list[str]]:
    """pytest replaced by one that writes `report`; returns the commands it was started with."""
    commands = list[list[str]]()

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        path = next(argument.partition("=")[2] for argument in command if argument.startswith("--junitxml="))
        Path(path).write_text(report, encoding="utf-8")
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/gpu_check.py", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch sees no CUDA device: run it where there is one" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_folder_must_be_given() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/gpu_check.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "--out" in done.stderr) == (2, True)


def test_only_files_with_gpu_tests_are_run_and_every_outcome_is_kept(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = pytest_that(monkeypatch, status=1)
    assert gpu_check._test(tmp_path) is False
    (command,) = commands
    files = {Path(argument).name for argument in command if argument.endswith(".py")}
    assert files and "test_dispatch.py" not in files
    assert all("mark.gpu" in (ROOT / "tests/kernels" / name).read_text(encoding="utf-8") for name in files)
    written = json.loads((tmp_path / "tests.json").read_text(encoding="utf-8"))
    assert [(test["outcome"], test["seconds"], test["why"]) for test in written["tests"]] == [
        ("passed", 0.75, None),
        ("failure", 0.5, "AssertionError: 3e-2 > 1e-2"),
        ("skipped", 0.25, "one GPU"),
    ]
    assert written["tests"][1]["name"] == "tests.kernels.test_attention::test_bf16[72]"
    assert not (tmp_path / "tests.xml").exists()


def test_a_run_without_a_test_has_not_passed(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest_that(monkeypatch, status=0, report="<testsuites><testsuite /></testsuites>")
    assert gpu_check._test(tmp_path) is False
    pytest_that(monkeypatch, status=0)
    assert gpu_check._test(tmp_path) is True


def test_tests_that_take_too_long_have_not_passed_and_that_is_said(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], *, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_check._test(tmp_path) is False
    written = json.loads((tmp_path / "tests.json").read_text(encoding="utf-8"))
    assert (written["passed"], written["said"], written["tests"]) == (False, "not done within 240 s", [])


@pytest.mark.parametrize(("ok", "met"), [(True, True), (None, True), (False, False)])
def test_figures_are_shown_and_written_in_the_one_form(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ok: bool | None, met: bool,
) -> None:  # fmt: skip
    value = None if ok is None else 425.0
    rows = [
        Row(name="kernels.attention.tflops", value=value, unit="TFLOP/s", target=400, ok=ok),
        Row(name="kernels.attention.ours.p50", value=value, unit="us"),
    ]
    monkeypatch.setattr(benchmarks_kernels, "kernels", lambda deadline: rows)
    assert gpu_check._measure(tmp_path, deadline=0.0) is met
    written = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert set(written) == {"machine", "versions", "commit", "rows"}
    assert [row["value"] for row in written["rows"]] == [value, value]
    (line,) = capsys.readouterr().out.splitlines()
    assert ("425" in line, "not measured" in line, "MISSED" in line) == (ok is not None, ok is None, ok is False)


LACKING = """
import sys

LACKING = ("pydantic", "blake3", "cryptography", "deepspeed", "opacus", "dp_accounting", "wandb")


class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in LACKING:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)


sys.meta_path.insert(0, Lacking())
"""


def test_the_gpu_tests_are_found_where_most_of_what_we_depend_on_is_missing(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LACKING, encoding="utf-8")
    files = map(str, gpu_check.files_with_gpu_tests())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", *files],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
