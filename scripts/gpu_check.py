#!/usr/bin/env python3
"""On a machine with a GPU: the GPU tests of every kernel, then the kernels' measurements, in under eight minutes.

Of what we depend on it needs torch, Triton, NumPy and pytest alone; pytest-xdist, where there is one, makes it quicker.
Writes tests.json and kernels.json into the folder given.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # our `kernels`, whatever else is installed

LIMIT_S = 8 * 60
TESTS_LIMIT_S = 4 * 60
CONTEST_S = 45  # of the limit, kept for the contest under way: compiled rivals take long to start
MAX_PROCESSES = 8  # the tests' time is the compiler's, on the CPU

log = logging.getLogger("gpu_check")


def main() -> int:
    """Exit status: 0 where all tests pass and no figure misses its target, 1 otherwise, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="D", help="the folder to write to")
    out: Path = parser.parse_args().out.resolve()
    deadline = time.monotonic() + LIMIT_S - CONTEST_S
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    import torch

    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device: run it where there is one (elsewhere: make test)", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    passed = _test(out)
    met = _measure(out, deadline)
    log.info("tests: %s; targets: %s; see %s", "passed" if passed else "FAILED", "met" if met else "missed", out)
    return 0 if passed and met else 1


def _test(out: Path) -> bool:
    """Whether every GPU test passes; what became of each goes to tests.json."""
    files = files_with_gpu_tests()
    report = out / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", *map(str, files)]
    command += ["--continue-on-collection-errors"]  # a file that cannot be imported fails, and the others run
    if importlib.util.find_spec("xdist"):
        command += ["--numprocesses", str(min(MAX_PROCESSES, os.cpu_count() or 1))]
    log.info("testing %s", ", ".join(path.stem for path in files))
    start, said = time.monotonic(), "no test ran"
    try:
        status = subprocess.run(command, cwd=ROOT, check=False, timeout=TESTS_LIMIT_S).returncode
        said = f"pytest's exit status is {status}"
    except subprocess.TimeoutExpired:
        status, said = None, f"not done within {TESTS_LIMIT_S} s"
    tests = _outcomes(report) if report.exists() else []
    report.unlink(missing_ok=True)
    passed = status == 0 and any(test["outcome"] == "passed" for test in tests)
    summary = {"passed": passed, "said": said, "seconds": time.monotonic() - start, "tests": tests}
    (out / "tests.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return passed


def files_with_gpu_tests() -> list[Path]:
    """The others are left out whole: they import what may not be installed here."""
    paths = sorted((ROOT / "tests/kernels").glob("test_*.py"))
    return [path for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]


def _outcomes(report: Path) -> list[dict[str, Any]]:
    """Name, outcome, seconds and, where it did not pass, the first line of why, of each test in a JUnit report."""
    tests = list[dict[str, Any]]()
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        tests.append(
            {
                "name": f"{case.get('classname')}::{case.get('name')}",
                "outcome": "passed" if wrong is None else wrong.tag,
                "seconds": float(case.get("time", "nan")),
                "why": None if wrong is None else (wrong.get("message") or "").split("\n")[0],
            }
        )
    return tests


def _measure(out: Path, deadline: float) -> bool:
    """Whether no figure misses its target; the figures go to kernels.json."""
    from train.benchmarks_kernels import kernels
    from train.measurements import all_met, measurement

    logging.getLogger("train").setLevel(logging.INFO)
    rows = kernels(deadline)
    measured = measurement(rows)
    (out / "kernels.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    for row in measured["rows"]:
        if row["target"] is not None or row["ok"] is False:
            value = f"{row['value']:.4g}" if isinstance(row["value"], float) else row["value"] or "not measured"
            verdict = {True: "met", False: "MISSED", None: ""}[row["ok"]]
            print(f"{row['name']:<64} {value:>12} {row['unit']:<8} (target {row['target']})  {verdict}")
    return all_met(rows)


if __name__ == "__main__":
    sys.exit(main())
